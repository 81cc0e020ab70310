"""The two halves of the app; all that they do is in the package fedmoe_sched."""

from fedmoe_sched.flower import client_app, server_app

client = client_app()
server = server_app()
