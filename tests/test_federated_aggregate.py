"""Expert-wise aggregation: by hand on small arrays, order-independent, and strict with malformed updates."""

import numpy as np
import pytest
from drawn import drawn
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmoe_sched.federated.aggregate import Update, aggregate, expert_of, split_state

STATE = {
    "extractor.weight": np.zeros(2),
    "experts.0.weight": np.array([10.0, 10.0]),
    "experts.1.weight": np.array([20.0, 20.0]),
    "experts.11.weight": np.array([30.0, 30.0]),
}


def update(client, samples=1.0, experts=None, **parameters):
    names = {"shared": "extractor.weight", "e0": "experts.0.weight", "e1": "experts.1.weight"}
    values = {names.get(k, k): np.array(v, dtype=float) for k, v in parameters.items()}
    return Update(client, values, samples, experts or {})


def test_names_tell_the_expert():
    assert [expert_of(n) for n in ("experts.3.0.weight", "gate.bias", "experts.12.bias")] == [3, None, 12]
    shared, experts = split_state(STATE)
    assert list(shared) == ["extractor.weight"]
    assert {j: list(v) for j, v in experts.items()} == {
        0: ["experts.0.weight"],
        1: ["experts.1.weight"],
        11: ["experts.11.weight"],
    }


def test_worked_example():
    answer = aggregate(
        STATE,
        [
            update("a", 1, {0: 1.0, 1: 5.0}, shared=[1, 1], e0=[0, 4], e1=[7, 9]),
            update("b", 3, {0: 3.0}, shared=[5, 9], e0=[4, 0]),
        ],
    )
    assert answer.state["extractor.weight"].tolist() == [4.0, 7.0]  # weights 1 : 3
    assert answer.state["experts.0.weight"].tolist() == [3.0, 1.0]  # weights 1 : 3
    assert answer.state["experts.1.weight"].tolist() == [7.0, 9.0]  # one client alone
    assert answer.state["experts.11.weight"].tolist() == [30.0, 30.0]  # nobody: as it was
    assert answer.expert_samples == {0: 4.0, 1: 5.0}
    assert answer.rejected == ()
    assert STATE["experts.0.weight"].tolist() == [10.0, 10.0]


def test_no_update_or_no_weight_changes_nothing():
    for updates in ([], [update("a", 0, {0: 0.0}, shared=[9, 9], e0=[9, 9])]):
        answer = aggregate(STATE, updates)
        assert all(np.array_equal(answer.state[name], STATE[name]) for name in STATE)
        assert answer.expert_samples == {}


@settings(max_examples=drawn(30), deadline=None)
@given(st.permutations(range(6)), st.integers(0, 100))
def test_the_order_of_updates_does_not_matter_bit_for_bit(order, seed):
    rng = np.random.default_rng(seed)
    updates = [
        update(i, rng.random(), {0: rng.random()}, shared=rng.normal(size=2), e0=rng.normal(size=2))
        for i in range(6)
    ]
    one, other = aggregate(STATE, updates), aggregate(STATE, [updates[i] for i in order])
    assert all(np.array_equal(one.state[name], other.state[name]) for name in STATE)


GOOD = update("good", 2, {0: 2.0}, shared=[1, 1], e0=[1, 1])


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (update("bad", 1, {0: 1.0}, e0=[1, np.nan]), "parameter 'experts.0.weight'[1] = nan: must be finite"),
        (update("bad", 1, {0: 1.0}, e0=[np.inf, 1]), "parameter 'experts.0.weight'[0] = inf: must be finite"),
        (update("bad", 1, {0: 1.0}, e0=[1, 1, 1]), "parameter 'experts.0.weight': has shape (3,), must be (2,)"),
        (update("bad", 1, {1: 1.0}, e1=[1, 1]), "expert 1 was not assigned to this client"),
        (update("bad", 1, {}, e0=[1, 1]), "parameter 'experts.0.weight': no sample count for expert 0"),
        (update("bad", 1, {}, **{"experts.9.weight": [1, 1]}), "'experts.9.weight': there is none of that name"),
        (update("bad", -1, {0: 1.0}, e0=[1, 1]), "samples = -1.0: must be finite and >= 0"),
        (update("bad", 1, {0: -2.0}, e0=[1, 1]), "samples of expert 0 = -2.0: must be finite and >= 0"),
        (update("bad", 1, {0: float("nan")}, e0=[1, 1]), "samples of expert 0 = nan"),
        (update("bad", "many", {0: 1.0}, e0=[1, 1]), "samples = 'many': must be a number"),
        (Update("bad", {"experts.0.weight": ["x", "y"]}, 1, {0: 1.0}), "cannot be read as numbers"),
        (update("good", 1, {0: 1.0}, e0=[1, 1]), "sent two updates"),
    ],
)
def test_malformed_updates_are_rejected_with_a_reason_and_the_rest_is_used(bad, reason):
    assigned = {"good": [0], "bad": [0]}
    answer = aggregate(STATE, [GOOD, bad], assigned=assigned)
    assert [r.client for r in answer.rejected] == [bad.client]
    assert reason in str(answer.rejected[0])
    clean = aggregate(STATE, [GOOD], assigned=assigned)
    assert all(np.array_equal(answer.state[name], clean.state[name]) for name in STATE)
    assert answer.state["experts.0.weight"].tolist() == [1.0, 1.0]


def test_types_are_kept():
    state = {"experts.0.weight": np.zeros(2, dtype=np.float32)}
    answer = aggregate(state, [Update("a", {"experts.0.weight": np.ones(2)}, 1, {0: 1})])
    assert answer.state["experts.0.weight"].dtype == np.float32


@pytest.mark.train
def test_torch_tensors_give_the_same_as_arrays():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    state = {name: rng.normal(size=(3, 2)).astype(np.float32) for name in STATE}
    updates = [
        Update(i, {n: rng.normal(size=(3, 2)).astype(np.float32) for n in STATE}, 1.0 + i, {0: 1.0, 1: i, 11: 0.0})
        for i in range(4)
    ]
    plain = aggregate(state, updates)
    tensors = aggregate(
        {n: torch.from_numpy(v) for n, v in state.items()},
        [
            Update(
                u.client, {n: torch.from_numpy(v) for n, v in u.parameters.items()}, u.samples, u.expert_samples
            )
            for u in updates
        ],
    )
    for name, value in tensors.state.items():
        assert isinstance(value, torch.Tensor)
        assert value.dtype == torch.float32
        assert np.array_equal(value.numpy(), plain.state[name])


def test_aggregation_needs_no_torch():
    import subprocess
    import sys

    code = "import sys, fedmoe_sched.federated.aggregate, fedmoe_sched.figures; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
