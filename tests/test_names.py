"""Names of clients and experts: what may be one, and JSON and back with type and hash."""

from __future__ import annotations

import enum
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmoe_sched import InputError
from fedmoe_sched._names import ExpertNames, check_names, decode_name, encode_name

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=2**62)
    | st.floats(allow_nan=False)
    | st.text(st.characters())
    | st.binary()
)
names = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3).map(tuple), max_leaves=6)


@given(names)
def test_names_come_back_with_their_types(name):
    back = decode_name(json.loads(json.dumps(encode_name(name))))
    assert back == name
    assert hash(back) == hash(name)
    assert repr(back) == repr(name)  # 1, 1.0 and True are equal, and -0.0 and 0.0


class Colour(enum.StrEnum):
    RED = "red"


class Odd(str):
    __slots__ = ()

    def __hash__(self):
        return 7


@pytest.mark.parametrize(
    "name",
    [np.int64(3), np.float32(0.1), np.str_("x"), np.bool_(True), Colour.RED, 10**5000],
    ids=lambda name: type(name).__name__,
)
def test_names_that_equal_plain_ones(name):
    back = decode_name(json.loads(json.dumps(encode_name(name))))
    assert back == name
    assert hash(back) == hash(name)


@pytest.mark.parametrize("name", [frozenset({1}), 1j, object(), (1, (object(),)), Odd("x"), range(3)])
def test_names_that_cannot_be_stored(name):
    with pytest.raises(TypeError):
        encode_name(name)


@pytest.mark.parametrize(
    "code",
    [{}, {"float": "x"}, {"int": 3}, {"bytes": "zz"}, {"tuple": "ab"}, {"set": [1]}, [1], {"a": 1, "b": 2}, 0.5],
)
def test_codes_that_are_not_names(code):
    with pytest.raises(ValueError):  # noqa: PT011  (of several kinds)
        decode_name(code)


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ("abc", "clients = 'abc': must be several names"),
        (b"abc", "must be several names"),
        (7, "clients = 7: must be an iterable"),
        (["a", ["b"]], r"clients\[1\] = \['b'\]: must be hashable"),
        (["a", float("nan")], r"clients\[1\] = nan: differs from itself"),
        (["a", "b", "a"], r"clients\[2\] = 'a': already at position 0"),
        ([1, 1.0], r"clients\[1\] = 1.0: already at position 0"),
        ([(1, [2])], r"clients\[0\] = \(1, \[2\]\): must be hashable"),
    ],
)
def test_bad_names(given_, message):
    with pytest.raises(InputError, match=message):
        check_names("clients", given_)


def test_arrays_become_plain_names():
    checked = check_names("clients", np.array([3, 1]))
    assert checked == (3, 1)
    assert type(checked[0]) is int


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        (0, "experts = 0: must be at least one"),
        (-1, "experts = -1"),
        ([], r"experts = \[\]"),
        (["a", "a"], r"experts\[1\] = 'a'"),
        ("ab", "experts = 'ab'"),
        (2.5, "experts = 2.5"),
        (True, "experts = True"),
    ],
)
def test_bad_experts(experts, message):
    with pytest.raises(InputError, match=message):
        ExpertNames(experts)


def test_expert_numbers_masks_and_values():
    experts = ExpertNames(["vision", "audio", "text"])
    assert experts.number("here", "audio") == 1
    assert experts.mask("here", ["text", "vision"]).tolist() == [True, False, True]
    assert experts.values("fitness", {"text": 2}, np.array([0.1, 0.2, 0.3])).tolist() == [0.1, 0.2, 2.0]
    for bad in ("smell", ["vision"]):
        with pytest.raises(InputError, match="here: there is no expert"):
            experts.number("here", bad)
    with pytest.raises(InputError, match=r"fitness\['text'\]\[0\] = nan"):
        experts.values("fitness", {"text": float("nan")}, np.zeros(3))
