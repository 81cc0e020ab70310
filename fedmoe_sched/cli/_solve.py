"""``fedmoe-sched solvers`` and ``fedmoe-sched solve``."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from fedmoe_sched._files import write_text
from fedmoe_sched.cli._held import read_held
from fedmoe_sched.cli._input import NO_BALANCE, Scores, read_input
from fedmoe_sched.cli._output import checked_output, console, gap_text, number_text, plain_table, seconds_text
from fedmoe_sched.errors import InputError
from fedmoe_sched.problem import AssignmentProblem
from fedmoe_sched.registry import solvers
from fedmoe_sched.relax import solve_soft
from fedmoe_sched.result import Schedule, Status
from fedmoe_sched.solve import solve
from fedmoe_sched.solver import Limits

__all__ = ["list_solvers", "solve_file"]

_MOST_CLIENTS_SHOWN = 20


def list_solvers() -> None:
    """List the solver backends: what each can do, and whether it can be used here."""
    table = plain_table("name", "exact", "available", "capabilities", "summary")
    for entry in solvers():
        available = "yes" if entry.available is True else str(entry.available)
        abilities = ", ".join(sorted(entry.capabilities))
        table.add_row(entry.name, "yes" if entry.exact else "no", available, abilities, entry.summary)
    console().print(table)


def solve_file(
    file: Annotated[Path, typer.Argument(show_default=False)],
    *,
    solver: Annotated[str, typer.Option(help="Backend by name; the command solvers lists them.")] = "auto",
    capacity: Annotated[
        int | None, typer.Option(help="The most experts each client may train, for all clients.")
    ] = None,
    balance: Annotated[
        float | None, typer.Option(help="Keep loads within this share of the mean load.", show_default="0.25")
    ] = None,
    no_balance: Annotated[
        bool, typer.Option("--no-balance", help="Bound loads by --load-min and --load-max alone.")
    ] = False,
    load_min: Annotated[int | None, typer.Option(help="The fewest clients each expert must get.")] = None,
    load_max: Annotated[int | None, typer.Option(help="The most clients each expert may get.")] = None,
    fill: Annotated[
        bool | None,
        typer.Option(
            "--fill/--no-fill", help="Use up all capacities, or only for positive scores.", show_default="fill"
        ),
    ] = None,
    fitness_weight: Annotated[float | None, typer.Option(help="Weight of the fitness.", show_default="1")] = None,
    usage_weight: Annotated[float | None, typer.Option(help="Weight of the usage.", show_default="0.1")] = None,
    held: Annotated[
        Path | None, typer.Option(help="What clients hold: the --output of an earlier solve.", show_default=False)
    ] = None,
    switching_cost: Annotated[
        float | None, typer.Option(help="What an expert costs that a client does not hold.", show_default="0")
    ] = None,
    time_limit: Annotated[float | None, typer.Option(help="Seconds for the solver.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of everything random in a backend.")] = 0,
    certify: Annotated[
        bool, typer.Option("--certify", help="Give a heuristic's answer a bound too, by an exact solve.")
    ] = False,
    soft: Annotated[
        bool, typer.Option("--soft", help="Where bounds exclude one another, widen them by the fewest places.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole answer as JSON.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the answer to this .json or .csv file.")
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Draw loads, bounds and prices to this .svg, .png or .pdf file.", show_default=False),
    ] = None,
) -> None:
    """Solve one problem from a file; print the answer and its certificate.

    FILE is a problem (.npz with desirability, capacity and perhaps bounds), scores (.npz with fitness, usage and
    capacity), a matrix of scores (.npy, clients x experts: it stays on disk), or a table of scores (.csv: one
    client per row, one expert per column, labels in the first row and column, perhaps a column "capacity"; an
    empty cell is a pair that is not eligible).

    --capacity, --balance, --load-min, --load-max, --fill, --switching-cost and the weights make a problem
    out of scores; a problem has its own bounds. Exit code 1: there is no assignment, or it breaks a constraint.
    """
    checked_output("--output", output, (".json", ".csv"))
    checked_output("--plot", plot, (".svg", ".png", ".pdf"))
    if no_balance and balance is not None:
        msg = "--no-balance and --balance exclude one another"
        raise InputError(msg)
    options: dict[str, Any] = {
        "capacity": capacity,
        "balance": NO_BALANCE if no_balance else _checked_balance(balance),
        "load_min": load_min,
        "load_max": load_max,
        "fill": fill,
        "fitness_weight": fitness_weight,
        "usage_weight": usage_weight,
        "held": held,
        "switching_cost": switching_cost,
    }
    read = read_input(file)
    if isinstance(read, Scores):
        options["held"] = None if held is None else read_held(held, read.arguments["fitness"])
        options["soft"] = soft or None
        answer = read.schedule(solver=solver, time_limit=time_limit, seed=seed, certify=certify, **options)
    else:
        _refuse_options(file, options)
        limits = Limits(time=time_limit, seed=seed)
        answer = (solve_soft if soft else solve)(read, solver, limits=limits, certify=certify)
    if output is not None:
        write_text(output, _pairs_csv(answer) if output.suffix.lower() == ".csv" else answer.to_json(indent=1))
    if plot is not None and answer.pairs is not None:
        from fedmoe_sched.price_plot import plot_prices

        plot_prices(answer, plot)
    if as_json:
        typer.echo(answer.to_json(indent=1))
    else:
        _print_answer(answer, console(), [path for path in (output, plot) if path is not None])
    if answer.status not in (Status.OPTIMAL, Status.FEASIBLE):
        raise typer.Exit(1)


def _checked_balance(balance: float | None) -> float | None:
    if balance is not None and balance < 0:
        msg = f"--balance {balance:g}: must be >= 0"
        raise InputError(msg)
    return balance


def _refuse_options(file: Path, options: dict[str, Any]) -> None:
    for name, value in options.items():
        if value is not None:
            option = "no-balance" if value == NO_BALANCE else name.replace("_", "-")
            msg = f"--{option}: {file} is a ready problem with bounds of its own"
            raise InputError(msg)


def _pairs_csv(answer: Schedule) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["client", "expert"])
    for client, experts in answer.experts_by_client().items():
        writer.writerows([client, expert] for expert in experts)
    return text.getvalue()


def _print_answer(answer: Schedule, out: Console, written: Sequence[Path]) -> None:
    grid = plain_table("", "")
    grid.show_header = False
    for name, value in _facts(answer):
        grid.add_row(f"[bold]{name}[/]", value)
    out.print(grid)
    if answer.pairs is None:
        return
    if answer.problem.n_clients <= _MOST_CLIENTS_SHOWN:
        out.print()
        out.print(_assignment_table(answer))
    elif not written:
        out.print(f"(--json or --output for the experts of all {answer.problem.n_clients} clients)")
    for path in written:
        out.print(f"written to {path}", markup=False)


def _facts(answer: Schedule) -> list[tuple[str, str]]:
    problem: AssignmentProblem = answer.problem
    n, m = problem.shape
    facts = [
        ("problem", f"{n} clients x {m} experts"),
        ("solver", answer.solver + (f" (auto: {answer.solver_reason})" if answer.solver_reason else "")),
        ("status", f"{answer.status} ({answer.stop_reason}). {answer.status.advice}"),
    ]
    if answer.pairs is not None:
        held = "all hold" if not answer.violations else f"{len(answer.violations)} broken: {answer.violations[0]}"
        facts += [
            ("objective", number_text(answer.objective)),
            (
                "bound",
                number_text(answer.bound) + ("" if answer.prices is None else ", recomputed from the prices"),
            ),
            ("gap", "-" if answer.violations else gap_text(answer.gap)),
            ("constraints", f"{held}, recomputed from the problem"),
            ("loads", f"{answer.loads.min()} to {answer.loads.max()} clients per expert"),
            ("balance", f"Jain's index {answer.client_jain:.3f} per client, {answer.expert_jain:.3f} per expert"),
        ]
    if answer.relaxed:
        facts.append(("widened", _widened(answer)))
    if answer.conflict is not None:
        facts.append(("conflict", answer.conflict.message))
    if answer.message:
        facts.append(("message", answer.message))
    steps = ("build", "solve", "read", "certify")
    facts.append(
        ("time", ", ".join(f"{step} {seconds_text(getattr(answer, f'{step}_seconds'))}" for step in steps))
    )
    # Messages contain brackets, which rich would read as its own markup.
    return [(name, value.replace("[", r"\[")) for name, value in facts]


def _widened(answer: Schedule) -> str:
    places = sum(abs(relaxation.used - relaxation.asked) for relaxation in answer.relaxed)
    shown = [str(relaxation) for relaxation in answer.relaxed[:_MOST_CLIENTS_SHOWN]]
    more = len(answer.relaxed) - len(shown)
    perhaps = " (perhaps fewer would do)" if answer.relaxed_proved is False else ""
    return f"{places} places{perhaps}: " + "; ".join(shown) + (f"; ... ({more} more bounds)" if more else "")


def _assignment_table(answer: Schedule) -> Any:
    table = plain_table("client", "experts")
    for client, experts in answer.experts_by_client().items():
        text = ", ".join(str(expert) for expert in experts) or "none"
        table.add_row(*(cell.replace("[", r"\[") for cell in (str(client), text)))
    return table
