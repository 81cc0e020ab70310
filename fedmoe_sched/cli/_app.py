"""The command group, and how errors leave it."""

from __future__ import annotations

from typing import Annotated

import click
import typer
from typer.core import TyperGroup

from fedmoe_sched._version import __version__
from fedmoe_sched.cli import _compare, _experiment, _solve, _train
from fedmoe_sched.cli._output import complain
from fedmoe_sched.errors import (
    InputError,
    MissingDependencyError,
    NoAssignmentError,
    StateFileError,
    UnsupportedProblemError,
    WorkerError,
)

__all__ = ["app", "main"]

# What a user can do something about: one line and exit code 2. Anything else is a bug and keeps its traceback.
_USER_ERRORS = (
    InputError,
    MissingDependencyError,
    NoAssignmentError,
    StateFileError,
    UnsupportedProblemError,
    WorkerError,
    OSError,
)


class _Group(TyperGroup):
    """Commands whose user errors end as one line on standard error."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            where = (error.ctx or ctx).command_path
            complain(f"{error.format_message().rstrip('.')} (see {where} --help)")
            raise typer.Exit(2) from error
        except BrokenPipeError:
            raise  # the reader went away: click ends quietly
        except _USER_ERRORS as error:
            complain(_words(error))
            raise typer.Exit(2) from error
        except KeyboardInterrupt as error:
            complain("interrupted")
            raise typer.Exit(130) from error


def _words(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror
    return str(error)


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Decide which client trains which experts in federated Mixture-of-Experts training, and prove how good "
    "the answer is.",
    epilog="Exit codes: 0 done, 1 no usable answer, 2 wrong input, 130 interrupted.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fedmoe-sched {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    pass


app.command("solvers")(_solve.list_solvers)
app.command("solve")(_solve.solve_file)
app.command("compare")(_compare.compare_backends)
app.command("train")(_train.train_policy)
app.command("experiment")(_experiment.run_experiment)
app.command("figures")(_train.draw_figures)
app.command("demo")(_train.demonstrate)


def main() -> None:
    """Run the command line; the entry point of ``fedmoe-sched``."""
    app()
