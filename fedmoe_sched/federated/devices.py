"""One device per client: how fast it computes and sends, what it can hold, and when it is there; seeded.

Two sources, see `fedmoe_sched.federated.config.DevicesConfig`:

``phones``
    Real measurements, see `fedmoe_sched.federated.phones`. A client's memory and speed are those of one phone, its
    two bandwidths those of one user, its availability that of one trace with a random shift; the three are drawn
    independently of one another and with replacement.

``synthetic``
    Distributions near those measurements, for runs without files [I]:

    ================  =======================================================================================
    speed             log-normal, median 63 ms per inference, standard deviation of the logarithm 0.8
    download, upload  log-normal, medians 4300 and 3300 kbit/s, standard deviations of the logarithm 0.5, 0.7
    RAM               one of 2, 3, 4, 4, 6, 6, 8, 8, 8, 12 GB
    availability      alternating intervals, exponential, mean 30 minutes available and 4.5 hours away: 10 % of
                      the time; repeated every 5 days
    ================  =======================================================================================

    For comparison, the measurements: 63 ms and 0.8; 4318 and 3286 kbit/s with 0.5 and 0.7; RAM from 0.75 to 16 GB,
    median 6; available for 32 minutes at a time, 9.5 % of the time, traces of 1 to 10 days.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fedmoe_sched._arrays import FloatArray
from fedmoe_sched.federated import phones
from fedmoe_sched.federated.availability import Availability, Traces, alternating_traces
from fedmoe_sched.federated.config import DevicesConfig
from fedmoe_sched.scores import CapacityProfile, profile_table

__all__ = ["Devices", "draw_devices"]

_BYTES_PER_KBIT = 1000 / 8
_BYTES_PER_GB = 1e9

# Streams of random numbers, so that drawing more of one kind changes no other.
_HARDWARE, _NETWORK, _TRACE, _SHIFT = 0xD0, 0xD1, 0xD2, 0xD3

_RAM_GB = (2, 3, 4, 4, 6, 6, 8, 8, 8, 12)
_ON_SECONDS, _OFF_SECONDS, _PERIOD_SECONDS = 1800.0, 16200.0, 432_000


@dataclass(frozen=True, eq=False)
class Devices:
    """The devices of all clients.

    Parameters
    ----------
    profiles : tuple of CapacityProfile
        One per client; ``ms_per_sample`` is that of one inference.
    availability : Availability or None
        None: all clients are always there.
    """

    profiles: tuple[CapacityProfile, ...]
    availability: Availability | None

    def for_work(self, samples: Sequence[int]) -> tuple[CapacityProfile, ...]:
        """Return the profiles with all that a client trains on in a round as the unit of work.

        Parameters
        ----------
        samples : sequence of n ints
            Samples times epochs of every client.
        """
        return tuple(
            replace(profile, ms_per_sample=profile.ms_per_sample * count)
            for profile, count in zip(self.profiles, samples, strict=True)
        )

    def fingerprint(self) -> str:
        """Return a checksum: a resumed run must find the devices that it began with."""
        digest = hashlib.sha256(profile_table(self.profiles).tobytes())
        if self.availability is not None:
            traces = self.availability.traces
            for array in (traces.offset, traces.start, traces.end, traces.period, self.availability.shift):
                digest.update(array.tobytes())
        return digest.hexdigest()


def draw_devices(config: DevicesConfig, count: int, *, seed: int, data_dir: str | None = None) -> Devices | None:
    """Draw one device per client.

    Parameters
    ----------
    config : DevicesConfig
    count : int
        n, the number of clients.
    seed : int
        The answer depends on nothing else, apart from the files.
    data_dir : str, optional
        Where to look for the measurements if the config does not say.

    Returns
    -------
    Devices
        None for the source ``none``.

    Raises
    ------
    DataFileError
        A file of measurements is missing or corrupted.

    Examples
    --------
    >>> devices = draw_devices(DevicesConfig(source="synthetic"), 3, seed=0)
    >>> len(devices.profiles), devices.availability is None
    (3, True)
    """
    if config.source == "none":
        return None
    source: _Phones | _Synthetic = _Synthetic()
    if config.source == "phones":
        source = _Phones(phones.phones_folder(config.dir, data_dir), config.bandwidth)

    def rng(purpose: int) -> np.random.Generator:
        return np.random.default_rng([seed, purpose])

    ram, ms = source.hardware(count, rng(_HARDWARE))
    down, up = source.network(count, rng(_NETWORK))
    profiles = tuple(
        CapacityProfile(
            ms_per_sample=float(ms[i]) * config.speed_scale,
            memory_bytes=float(ram[i]) * _BYTES_PER_GB * config.memory_share,
            down_bandwidth=float(down[i]) * _BYTES_PER_KBIT,
            up_bandwidth=float(up[i]) * _BYTES_PER_KBIT,
        )
        for i in range(count)
    )
    if not config.availability:
        return Devices(profiles, None)
    traces = source.traces(count, rng(_TRACE))
    return Devices(profiles, Availability(traces, rng(_SHIFT).integers(0, traces.period)))


class _Phones:
    """Rows of the measurements, drawn with replacement."""

    def __init__(self, folder: Path, bandwidth: str) -> None:
        self._folder, self._bandwidth = folder, bandwidth

    def hardware(self, count: int, rng: np.random.Generator) -> tuple[FloatArray, FloatArray]:
        ram, ms = phones.read_columns(self._folder / phones.SPEC, ("ram_gb", "infer_ms"))
        rows = rng.integers(0, len(ram), count)
        return ram[rows], ms[rows]

    def network(self, count: int, rng: np.random.Generator) -> tuple[FloatArray, FloatArray]:
        down, up = phones.read_columns(self._folder / phones.UP_DOWN, ("down_mean_kbps", "up_mean_kbps"))
        users = rng.integers(0, len(down), count)
        if self._bandwidth == "updown":
            return down[users], up[users]
        [measured] = phones.read_columns(self._folder / phones.MOBIPERF, ("mean_kbps",))
        chosen = measured[rng.integers(0, len(measured), count)]
        return chosen, chosen * up[users] / down[users]

    def traces(self, count: int, rng: np.random.Generator) -> Traces:
        traces = phones.read_traces(self._folder / phones.TRACES)
        return traces.taken(rng.integers(0, len(traces), count))


class _Synthetic:
    """The distributions in the table of this module."""

    def hardware(self, count: int, rng: np.random.Generator) -> tuple[FloatArray, FloatArray]:
        return rng.choice(np.array(_RAM_GB, dtype=np.float64), count), rng.lognormal(np.log(63.0), 0.8, count)

    def network(self, count: int, rng: np.random.Generator) -> tuple[FloatArray, FloatArray]:
        return rng.lognormal(np.log(4300.0), 0.5, count), rng.lognormal(np.log(3300.0), 0.7, count)

    def traces(self, count: int, rng: np.random.Generator) -> Traces:
        return alternating_traces(count, on=_ON_SECONDS, off=_OFF_SECONDS, period=_PERIOD_SECONDS, rng=rng)
