"""Figures and run folders: what is drawn is what was measured. Needs neither torch nor a display."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from fedmoe_sched._files import write_archive
from fedmoe_sched.errors import InputError, StateFileError
from fedmoe_sched.federated.runs import Run, RunFolder, read_run
from fedmoe_sched.figures import accuracy_figure, heat_map_figure, load_figure, run_labels, save_figures

CONFIG = """
policy = "{policy}"
[data]
name = "digits"
[clients]
count = 4
split = "domains"
[model]
experts = 3
"""
# Clients 0 and 2 are of domain 1, clients 1 and 3 of domain 0; expert 2 suits domain 0, expert 0 suits domain 1.
GROUPS = np.array([1, 0, 1, 0])
FITNESS = np.array([[0.9, 0.1, 0.0], [0.0, 0.2, 0.8], [0.7, 0.1, 0.1], [0.1, 0.1, 0.9]], dtype=np.float32)


def make_run(path, policy="balanced", rounds=3, fitness=FITNESS):
    folder = RunFolder(path)
    folder.begin(CONFIG.format(policy=policy))
    write_archive(
        folder.clients_file,
        {"counts": np.ones((4, 10), dtype=np.int64), "groups": GROUPS, "capacity": np.ones(4, dtype=np.int64)},
        {},
    )
    for number in range(1, rounds + 1):
        assignment = np.zeros((4, 3), dtype=bool)
        assignment[np.arange(4), [0, 2, 0 if number > 1 else 1, 2]] = True
        loads = assignment.sum(axis=0)
        folder.write_schedule(
            number,
            {
                "assignment": assignment,
                "fitness": fitness,
                "samples": 10.0 * assignment,
                "client_accuracy": np.ones(4),
            },
        )
        folder.append(
            {
                "round": number,
                "accuracy": 0.2 * number,
                "client_accuracy_mean": 0.3 * number,
                "client_accuracy_worst_decile": 0.1 * number,
                "loads": loads,
                "trained_loads": loads,
                "client_jain": 1.0,
                "load_cv": loads.std() / loads.mean(),
                "gap": float("nan"),
                "solve_seconds": 0.5,
                "train_seconds": 2.0,
            }
        )
    return path


def test_all_figures_are_written_in_every_format(tmp_path):
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", "greedy")]
    paths = save_figures(runs, tmp_path / "out" / "figures", formats=("png", "svg"), target=0.5)
    assert sorted(p.name for p in paths) == sorted(
        f"{name}.{suffix}" for name in ("accuracy", "load", "fitness", "training") for suffix in ("png", "svg")
    )
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG" if path.suffix == ".png" else b"<?xml")


def test_accuracy_figure_shows_every_run(tmp_path):
    runs = [read_run(make_run(tmp_path / "a")), read_run(make_run(tmp_path / "b", "greedy", rounds=2))]
    left, right = accuracy_figure(runs, target=0.5).axes
    assert [line.get_ydata().tolist() for line in left.lines[:2]] == [
        pytest.approx([0.2, 0.4, 0.6]),
        pytest.approx([0.2, 0.4]),
    ]
    assert [text.get_text() for text in left.get_legend().get_texts()] == [
        "balanced: 60.0%",
        "greedy: 40.0%",
        "target 50%",
    ]
    assert len(right.lines) == 4
    assert (left.get_xlabel(), left.get_ylabel()) == ("round", "accuracy")


def test_load_figure_shows_clients_per_expert_and_round(tmp_path):
    panel, bar = load_figure([read_run(make_run(tmp_path / "a"))]).axes
    assert panel.images[0].get_array().tolist() == [[1, 2, 2], [1, 0, 0], [2, 2, 2]]
    assert "load CV" in panel.get_title()
    # 5, 1 and 6 clients trained the experts
    assert "Jain 1.00 clients, 0.77 experts" in panel.get_title()
    assert bar.get_ylabel() == "load (clients)"


@pytest.mark.parametrize("values", ["fitness", "training"])
def test_heat_map_groups_clients_and_puts_their_experts_on_the_diagonal(tmp_path, values):
    figure = heat_map_figure([read_run(make_run(tmp_path / "a"))], values)
    panel = figure.axes[0]
    # Clients 1 and 3 (domain 0) come first, and with them expert 2.
    experts = [int(label.get_text()) for label in panel.get_xticklabels()]
    assert experts[0] == 2
    assert experts.index(0) > 0
    table = FITNESS if values == "fitness" else np.array([[1, 0, 0], [0, 0, 1], [2 / 3, 1 / 3, 0], [0, 0, 1]])
    assert np.allclose(panel.images[0].get_array(), table[np.ix_([1, 3, 0, 2], experts)])
    assert [label.get_text() for label in panel.get_yticklabels()] == ["0", "1"]
    assert panel.get_yticks().tolist() == [0.5, 2.5]
    assert panel.get_ylabel() == "client group (domain)"


def test_a_policy_without_fitness_gives_an_empty_map(tmp_path):
    run = read_run(make_run(tmp_path / "a", fitness=np.full((4, 3), np.nan, dtype=np.float32)))
    assert np.isnan(np.ma.filled(heat_map_figure([run]).axes[0].images[0].get_array(), np.nan)).all()


def test_runs_of_one_policy_are_told_apart(tmp_path):
    runs = [read_run(make_run(tmp_path / name)) for name in ("one", "two")]
    assert run_labels(runs) == ["balanced (one)", "balanced (two)"]


def test_summary_and_rounds_to_target(tmp_path):
    run = read_run(make_run(tmp_path / "a"))
    assert [run.rounds_to(t) for t in (0.2, 0.35, 0.9)] == [1, 2, None]
    summary = run.summary(target=0.35)
    assert summary["accuracy"] == summary["accuracy_best"] == pytest.approx(0.6)
    assert summary["rounds_to_target"] == 2
    assert summary["gap"] is None  # never known: no number is made up
    assert summary["load_cv"] == pytest.approx(np.mean([np.sqrt(2) / 4, np.sqrt(2) / 2, np.sqrt(2) / 2]))
    assert summary["seconds"] == pytest.approx(6.0)
    for key in ("bytes_up", "bytes_down", "simulated_time", "simulated_time_to_target"):
        assert summary[key] is None  # no record has them


def test_rounds_to_converge_by_hand():
    def converged(*values):
        records = tuple({"round": number, "accuracy": value} for number, value in enumerate(values, 1))
        none = np.zeros(0, dtype=np.int64)
        return Run(Path(), {}, records, none, none, none).rounds_to_converge()

    # Smoothed: (0+0+6)/3 = 2, (0+0+6+6)/4 = 3, (0+0+6+6+6)/5 = 3.6, (0+6+6+6+6)/5 = 4.8, then 6; in tenths.
    assert converged(0.0, 0.0, 0.6, 0.6, 0.6, 0.6, 0.6, 0.6) == 5
    # Smoothed 0.5 everywhere but round 1, with (0.47 + 0.5 + 0.5) / 3 = 0.49: just within 0.01 of the best.
    assert converged(0.47, 0.5, 0.5, 0.5, 0.5) == 1
    assert converged(0.46, 0.5, 0.5, 0.5, 0.5) == 2  # 0.4867, then (0.46 + 3 x 0.5) / 4 = 0.49
    # One lucky round is no convergence. Smoothed around it (0.2 + 0.9 + 0.2) / 3 = 0.433; later 0.44, then 0.5.
    assert converged(0.2, 0.9, 0.2, 0.2, 0.2, 0.5, 0.5, 0.5, 0.5, 0.5) == 8
    assert converged(0.3) == 1


def test_many_runs_are_drawn_in_rows_with_their_labels(tmp_path):
    runs = [read_run(make_run(tmp_path / str(number))) for number in range(6)]
    labels = [*"abcde", "a label that goes on and on until it is broken"]
    for figure in (heat_map_figure(runs, labels=labels), load_figure(runs, labels=labels)):
        *panels, bar = figure.axes
        titles = [panel.get_title().splitlines() for panel in panels]
        assert [title[0] for title in titles] == [*"abcde", "a label that goes on and on until it is"]
        assert titles[5][1] == "broken"
        assert [bool(panel.get_ylabel()) for panel in panels] == [True, False, False] * 2
        assert bar.get_ylabel()


def test_what_cannot_be_drawn_is_refused(tmp_path):
    with pytest.raises(InputError, match="runs: there is none"):
        accuracy_figure([])
    run = make_run(tmp_path / "a")
    with pytest.raises(InputError, match="values = 'load'"):
        heat_map_figure([read_run(run)], "load")
    with pytest.raises(InputError, match="no round is finished"):
        read_run(make_run(tmp_path / "b", rounds=0))
    (run / "schedules" / "round-000002.npz").unlink()
    with pytest.raises(StateFileError, match=r"round-000002\.npz: cannot be read"):
        heat_map_figure([read_run(run)])


def test_a_line_that_is_being_written_is_not_read(tmp_path):
    run = make_run(tmp_path / "a")
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write('{"round": 4, "accur')
    assert len(read_run(run).records) == 3


def test_importing_figures_loads_no_matplotlib():
    code = "import sys, fedmoe_sched.figures; sys.exit('matplotlib' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
