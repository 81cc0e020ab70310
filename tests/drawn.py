"""How many examples Hypothesis draws."""

from __future__ import annotations

from hypothesis import settings

_FEW = 25


def drawn(count: int) -> int:
    """Return how many examples a test gets that asks for `count`, by the profile; see ``conftest.py``.

    A profile says how many of a hundred there are. Few are not made fewer.
    """
    return max(min(count, _FEW), count * settings.default.max_examples // 100)
