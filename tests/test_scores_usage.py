"""Usage: the decayed average, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from fedmoe_sched import InputError
from fedmoe_sched.scores import UsageOptions, UsageScores


def test_ema_in_samples():
    usage = UsageScores(3, UsageOptions(decay=0.25))
    usage.update([100, 0, 40])
    np.testing.assert_allclose(usage.values, [25, 0, 10])
    usage.update([0, 8, 40])
    np.testing.assert_allclose(usage.values, [18.75, 2, 17.5])


def test_compute_weights_experts_by_their_work():
    usage = UsageScores(2, UsageOptions(decay=1.0, unit="compute"), expert_compute=[1.0, 2.5])
    usage.update([10, 10])
    assert usage.values.tolist() == [10, 25]


def test_samples_ignore_the_work_of_an_expert():
    usage = UsageScores(2, UsageOptions(decay=1.0), expert_compute=[1.0, 2.5])
    usage.update([10, 10])
    assert usage.values.tolist() == [10, 10]


def test_steady_work_is_the_limit():
    usage = UsageScores(2)
    for _ in range(100):
        usage.update([30, 70])
    np.testing.assert_allclose(usage.values, [30, 70], rtol=1e-12)


@pytest.mark.parametrize(
    ("samples", "message"),
    [([1, -2], r"samples\[1\] = -2"), ([np.nan, 0], r"samples\[0\] = nan"), ([1], "samples: has shape")],
)
def test_bad_update_changes_nothing(samples, message):
    usage = UsageScores(2)
    usage.update([5, 5])
    before = usage.values.copy()
    with pytest.raises(InputError, match=message):
        usage.update(samples)
    assert (usage.values == before).all()


@pytest.mark.parametrize(
    ("options", "message"), [({"decay": 0}, "decay = 0"), ({"unit": "watts"}, "unit = 'watts'")]
)
def test_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        UsageOptions(**options)
