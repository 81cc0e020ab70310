"""README and documentation: examples run and print what they say; tables and commands match the code."""

from __future__ import annotations

import contextlib
import io
import math
import re
import tomllib
from pathlib import Path

import click
import pytest
import typer

from fedmoe_sched import __version__, solvers
from fedmoe_sched.cli import app
from fedmoe_sched.policies import POLICIES

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?")


def blocks(page):
    """Return (language, text) of every fenced block."""
    return FENCE.findall(page.read_text(encoding="utf-8"))


def examples(page):
    """Return (code, expected output or None): a text block right after the code is its output."""
    text = page.read_text(encoding="utf-8")
    found = list(FENCE.finditer(text))
    for place, match in enumerate(found):
        if match[1] != "python":
            continue
        after = found[place + 1] if place + 1 < len(found) else None
        follows = after is not None and after[1] == "text" and not text[match.end() : after.start()].strip()
        yield match[2], after[2] if follows else None


def assert_same_output(printed, expected):
    """Words must be equal, numbers equal to within what another machine may round differently."""
    assert NUMBER.sub("#", printed) == NUMBER.sub("#", expected), f"printed:\n{printed}"
    for one, other in zip(NUMBER.findall(printed), NUMBER.findall(expected), strict=True):
        assert math.isclose(float(one), float(other), rel_tol=1e-3, abs_tol=1e-9), f"printed:\n{printed}"


def test_the_comparison_can_fail():
    assert_same_output("gap 1.0e-16, [1, 2]", "gap 0.0e+00, [1, 2]")
    for wrong in ("gap 1.0e-16, [1, 3]", "gap 1.0e-3, [1, 2]", "gap none, [1, 2]", "gap 0, [1, 2, 3]"):
        with pytest.raises(AssertionError):
            assert_same_output(wrong, "gap 0.0e+00, [1, 2]")


@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(examples(page))], ids=lambda page: str(page.relative_to(ROOT))
)
def test_examples_print_what_the_page_says(page, tmp_path, monkeypatch):
    if page.name == "flower.md":
        pytest.importorskip("flwr")
    if page.name == "problem.md":
        pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    for code, expected in examples(page):
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(code, str(page), "exec"), names)
        if expected is not None:
            assert_same_output(out.getvalue(), expected)
        else:
            assert out.getvalue() == "", "prints something that the page does not show"


def test_the_readme_opens_with_an_example_of_a_certified_answer():
    code, expected = next(examples(ROOT / "README.md"))
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
    for word in ("optimal", "objective", "bound", "gap"):
        assert word in expected


@pytest.mark.parametrize("page", ["README.md", "docs/solvers.md"])
def test_the_solver_table_is_the_registry(page):
    rows = re.findall(r"^\| `([\w-]+)` \| (yes|no) \| ([^|]+) \|", (ROOT / page).read_text("utf-8"), re.MULTILINE)
    from fedmoe_sched.registry import solver_class

    assert rows == [
        (entry.name, "yes" if entry.exact else "no", ", ".join(solver_class(entry.name).requires) or "-")
        for entry in solvers()
    ]


def test_the_policy_table_is_the_registry():
    table = (ROOT / "docs/policies/index.md").read_text("utf-8").split("## Scores")[0]
    assert re.findall(r"^\| \[?`([\w-]+)`", table, re.MULTILINE) == list(POLICIES)


def test_every_command_in_the_pages_exists():
    command = typer.main.get_command(app)
    seen = 0
    for page in PAGES:
        lines = [line for language, text in blocks(page) if language == "console" for line in text.splitlines()]
        for line in lines:
            words = line.removeprefix("$ ").split("#")[0].split()
            if words[:1] != ["fedmoe-sched"]:
                continue
            sub = command.get_command(click.Context(command), words[1])
            assert sub is not None, f"{page.name}: {line}"
            options = {option for parameter in sub.params for option in parameter.opts + parameter.secondary_opts}
            unknown = {word for word in words[2:] if word.startswith("-")} - options
            assert not unknown, f"{page.name}: {line}"
            seen += 1
    assert seen > 3


def test_every_make_target_in_the_pages_exists():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for page in PAGES:
        named = set(re.findall(r"(?:^\$ |`)make ([\w-]+)", page.read_text(encoding="utf-8"), re.MULTILINE))
        assert named <= targets, page.name


def test_local_links_lead_somewhere():
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_the_citation_names_this_version():
    found = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)
    assert found is not None
    assert found[1] == __version__


def test_settings_in_the_pages_are_valid():
    pytest.importorskip("pydantic")
    from fedmoe_sched.federated import TrainConfig
    from fedmoe_sched.federated.experiment import Experiment

    texts = [text for page in PAGES for language, text in blocks(page) if language == "toml"]
    assert texts
    for text in texts:
        values = tomllib.loads(text)
        assert Experiment.from_dict(values).plan() if "arms" in values else TrainConfig.from_dict(values).rounds
