"""The backends, one file and one class each; imported as ``fedmoe_sched.solvers``."""

if __name__ != "fedmoe_sched.solvers":
    msg = (
        f"this folder is the package fedmoe_sched.solvers, not {__name__!r}: "
        "import it from fedmoe_sched (install the project, or put its root on sys.path)"
    )
    raise ImportError(msg)
