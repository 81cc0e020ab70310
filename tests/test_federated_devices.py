"""Devices of clients: drawn from files or distributions, there or away; and files that are missing or wrong."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("pydantic")

from device_tools import FLASH, traces_of, write_flash, write_measurements

from fedmoe_sched.errors import InputError
from fedmoe_sched.federated.availability import Availability, alternating_traces
from fedmoe_sched.federated.config import DevicesConfig, LocalConfig
from fedmoe_sched.federated.cost import model_cost
from fedmoe_sched.federated.data import DataFileError
from fedmoe_sched.federated.devices import draw_devices
from fedmoe_sched.federated.phones import read_columns, read_traces
from fedmoe_sched.scores import profile_table

pytestmark = pytest.mark.train


@pytest.fixture
def folder(tmp_path):
    write_measurements(tmp_path)
    return tmp_path


def phones(folder, **changes):
    return DevicesConfig(**{"source": "phones", "dir": str(folder)} | changes)


# Profiles --------------------------------------------------------------------------------------------------------


def test_profiles_are_rows_of_the_files_in_bytes_and_seconds(folder):
    devices = draw_devices(phones(folder, memory_share=0.5, speed_scale=2.0), 200, seed=0)
    table = profile_table(devices.profiles)
    # 2 x infer_ms and half of the RAM, of one phone; kilobits per second x 125, of one user
    assert set(map(tuple, table[:, :2])) == {(40.0, 4e9), (1260.0, 0.375e9), (126.0, 2e9)}
    assert set(map(tuple, table[:, 2:4])) == {(1e6, 0.5e6), (250e3, 50e3)}
    assert len({tuple(row) for row in table}) == 6  # phones and users are paired freely
    assert (table[:, 4] == 0).all()
    assert devices.availability is None


def test_mobiperf_downloads_with_the_ratio_of_a_user(folder):
    devices = draw_devices(phones(folder, bandwidth="mobiperf"), 200, seed=0)
    pairs = {(p.down_bandwidth, p.up_bandwidth) for p in devices.profiles}
    assert pairs == {(5e6, 2.5e6), (5e6, 1e6), (200.0, 100.0), (200.0, 40.0)}


def test_the_same_seed_draws_the_same_devices(folder):
    for config in (phones(folder, availability=True), DevicesConfig(source="synthetic", availability=True)):
        one, same, other = (draw_devices(config, 30, seed=seed) for seed in (4, 4, 5))
        assert one.profiles == same.profiles
        assert one.fingerprint() == same.fingerprint() != other.fingerprint()
        without = draw_devices(config.model_copy(update={"availability": False}), 30, seed=4)
        assert without.profiles == one.profiles  # availability changes nothing else
        assert without.fingerprint() != one.fingerprint()


def test_there_are_no_devices_by_default():
    assert draw_devices(DevicesConfig(), 5, seed=0) is None


def test_synthetic_devices_are_near_what_the_page_says():
    devices = draw_devices(DevicesConfig(source="synthetic", memory_share=1.0, availability=True), 2000, seed=0)
    table = profile_table(devices.profiles)
    for column, median, spread in ((0, 63, 0.8), (2, 4300 * 125, 0.5), (3, 3300 * 125, 0.7)):
        assert np.median(table[:, column]) == pytest.approx(median, rel=0.1)
        assert np.log(table[:, column]).std() == pytest.approx(spread, rel=0.1)
    assert set(table[:, 1] / 1e9) == {2, 3, 4, 6, 8, 12}
    traces = devices.availability.traces
    lengths = traces.end - traces.start
    assert lengths.mean() == pytest.approx(1800, rel=0.05)
    assert lengths.sum() / traces.period.sum() == pytest.approx(0.1, rel=0.05)


def test_work_is_milliseconds_times_samples(folder):
    devices = draw_devices(phones(folder), 3, seed=1)
    work = devices.for_work([10, 20, 30])
    assert [w.ms_per_sample for w in work] == [
        p.ms_per_sample * k for p, k in zip(devices.profiles, (10, 20, 30), strict=True)
    ]
    assert [w.memory_bytes for w in work] == [p.memory_bytes for p in devices.profiles]


SIZES = {"extractor.0.weight": 600, "gate.weight": 200, "gate.bias": 8} | {
    f"experts.{j}.0.weight": 1000 for j in (0, 1)
}


@pytest.mark.parametrize(
    ("local", "stated", "expected"),
    [
        ({}, {}, (1000, 808, 808)),
        ({"train_extractor": False}, {}, (1000, 808, 208)),
        ({"train_gate": False}, {}, (1000, 808, 600)),
        ({"train_gate": False, "train_extractor": False}, {}, (1000, 808, 0)),
        ({}, {"expert_bytes": 3.5e8, "shared_bytes": 1e8}, (3.5e8, 1e8, 1e8)),
        ({"train_gate": False}, {"shared_bytes": 8080}, (1000, 8080, 6000)),  # the same share of it
    ],
)
def test_bytes_of_a_model_down_and_up(local, stated, expected):
    cost = model_cost(SIZES, LocalConfig(**local), DevicesConfig(**stated))
    assert (cost.expert_bytes, cost.shared_bytes, cost.shared_upload) == pytest.approx(expected)
    assert (cost.samples, cost.expert_compute, cost.memory_overhead) == (1, 1, 4)


# Availability ----------------------------------------------------------------------------------------------------


def test_traces_start_anew_at_their_end():
    availability = Availability(traces_of([(0, 10), (60, 100)], [(20, 30)], period=100), np.array([0, 95]))
    # Client 0 is there from 60 to 110, across the end of its trace; client 1 from 25 to 35, at 95 + t.
    expected = {0: (10, 0), 9.5: (0.5, 0), 10: (0, 0), 25: (0, 10), 34: (0, 1), 35: (0, 0), 60: (50, 0)}
    expected |= {99: (11, 0), 100: (10, 0), 125: (0, 10), 1_000_000_060: (50, 0)}
    assert {t: tuple(availability.remaining(t).tolist()) for t in expected} == expected
    waits = {0: (0, 25), 10: (50, 15), 35: (25, 90), 105: (0, 20), 110: (50, 15)}
    assert {t: tuple(availability.waiting(t).tolist()) for t in waits} == waits


def test_a_whole_trace_is_for_ever():
    availability = Availability(traces_of([(0, 40), (40, 100)], period=100), np.array([7]))
    assert availability.remaining(3).tolist() == [math.inf]
    assert availability.waiting(3).tolist() == [0]


@given(st.data())
def test_availability_is_what_a_second_by_second_table_says(data):
    """The tables say for every second whether a client is there; they repeat, and are read one by one."""
    period = data.draw(st.integers(1, 12), label="period")
    tables = data.draw(
        st.lists(st.lists(st.booleans(), min_size=period, max_size=period).filter(any), min_size=1, max_size=4)
    )
    shift = np.array(data.draw(st.lists(st.integers(0, 11), min_size=len(tables), max_size=len(tables))))
    # One interval per second: touching ones are one interval.
    traces = traces_of(*([(s, s + 1) for s in range(period) if table[s]] for table in tables), period=period)
    availability = Availability(traces, shift)
    time = data.draw(st.integers(0, 50)) + data.draw(st.sampled_from([0.0, 0.25]))
    for i, table in enumerate(tables):

        def there(second, table=table, i=i):
            return table[(second + int(shift[i])) % period]

        second = int(time)
        stays = next((s for s in range(second, second + 30) if not there(s)), math.inf)
        comes = next(s for s in range(second, second + 30) if there(s))
        assert availability.remaining(time)[i] == (stays - time if there(second) else 0)
        assert availability.waiting(time)[i] == (0 if there(second) else comes - time)


@given(seed=st.integers(0, 1000), time=st.floats(0, 1e8))
def test_who_is_waited_for_is_there(seed, time):
    rng = np.random.default_rng(seed)
    traces = alternating_traces(5, on=100, off=300, period=2000, rng=rng)
    availability = Availability(traces, rng.integers(0, 2000, 5))
    time = round(time, 6)  # as the clock has it
    for wait, client in zip(availability.waiting(time), range(5), strict=True):
        assert availability.remaining(time + wait)[client] > 0
        left = availability.remaining(time + wait)[client]
        assert availability.remaining(round(time + wait + left, 6))[client] == 0


def test_wrong_traces_are_refused():
    with pytest.raises(InputError, match=r"traces\[1\]: has no interval"):
        Availability(traces_of([(0, 1)], [(5, 5)], period=10), np.array([0, 0]))
    with pytest.raises(InputError, match=r"shift: has length 1, must be 2"):
        Availability(traces_of([(0, 1)], [(5, 6)], period=10), np.array([0]))


# Files -----------------------------------------------------------------------------------------------------------


def test_traces_are_read_from_their_own_start_on(folder):
    traces = read_traces(folder / "availability_flash.npz")
    # The second device is never there, and left out.
    assert (traces.offset.tolist(), traces.period.tolist()) == ([0, 2, 3], [100, 1000])
    assert (traces.start.tolist(), traces.end.tolist()) == ([10, 90, 200], [20, 100, 400])
    devices = draw_devices(phones(folder, availability=True), 50, seed=0)
    assert set(devices.availability.traces.period.tolist()) == {100, 1000}
    assert (devices.availability.shift < devices.availability.traces.period).all()
    assert len(set(devices.availability.shift.tolist())) > 10


def test_the_folder_is_found_beside_the_data(folder, tmp_path_factory, monkeypatch):
    data = tmp_path_factory.mktemp("data")
    folder.rename(data / "device_traces")
    config = DevicesConfig(source="phones")
    expected = draw_devices(phones(data / "device_traces"), 5, seed=0).profiles
    assert draw_devices(config, 5, seed=0, data_dir=str(data)).profiles == expected
    assert draw_devices(config, 5, seed=0, data_dir=str(data / "device_traces")).profiles == expected
    monkeypatch.setenv("FEDMOE_SCHED_DATA", str(data))
    assert draw_devices(config, 5, seed=0).profiles == expected
    with pytest.raises(DataFileError, match=r"empty.device_traces.phones_spec\.csv: is missing, and so is"):
        draw_devices(config, 5, seed=0, data_dir=str(data / "empty"))
    with pytest.raises(DataFileError, match=r"elsewhere.phones_spec\.csv: is missing$"):
        draw_devices(phones("elsewhere"), 5, seed=0)
    monkeypatch.delenv("FEDMOE_SCHED_DATA")
    with pytest.raises(DataFileError, match=r"set devices\.dir"):
        draw_devices(config, 5, seed=0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ram_gb,infer_ms\n8,20\n4,fast\n", r"table\.csv, line 3: infer_ms = 'fast': must be a finite number > 0"),
        ("ram_gb,infer_ms\n8,20\n\n-4,20\n", r"table\.csv, line 4: ram_gb = '-4'"),
        ("ram_gb,infer_ms\n8,inf\n", r"line 2: infer_ms = 'inf'"),
        ("ram_gb,infer_ms\n8,nan\n", r"line 2: infer_ms = 'nan'"),
        ("ram_gb,infer_ms\n8\n", r"line 2: infer_ms = None"),
        ("ram_gb,ms\n8,20\n", r"table\.csv: lacks the column 'infer_ms' \(has 'ram_gb', 'ms'\)"),
        ("", r"lacks the column 'ram_gb' \(has none\)"),
        ("ram_gb,infer_ms\n", r"has no row below its header"),
        (None, r"table\.csv: is missing"),
        (b"\xff\xfe\x00", r"table\.csv: cannot be read"),
    ],
)
def test_wrong_tables_name_file_line_and_value(tmp_path, text, words):
    path = tmp_path / "table.csv"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataFileError, match=words):
        read_columns(path, ("ram_gb", "infer_ms"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"end": [1020, 1100, 20, 600, 650, 900]}, r"end\[4\] = 650: must be >= its start = 700"),
        ({"start": [1010, 1015, 20, 600, 700, 800]}, r"start\[1\] = 1015: must be >= what comes before = 1020"),
        ({"start": [999, 1090, 20, 600, 700, 800]}, r"start\[0\] = 999: must be >= what comes before = 1000"),
        ({"end": [1020, 1101, 20, 600, 800, 900]}, r"end\[1\] = 1101: must be <= its trace_end = 1100"),
        ({"trace_end": [1000, 50, 1500]}, r"trace_end\[0\] = 1000: must be > its trace_start = 1000"),
        ({"trace_end": [1100, 50]}, r"trace_end: has length 2, must be 3"),
        ({"offset": [0, 2, 3, 5]}, r"offset: must rise from 0 to 6"),
        ({"offset": [0, 4, 3, 6]}, r"offset: must rise from 0 to 6"),
        ({"start": [1010, 1090, 20, 600, 700, 800], "end": [1010, 1090, 20, 600, 700, 800]}, "ever available"),
    ],
)
def test_wrong_traces_name_array_position_and_value(folder, changes, words):
    write_flash(folder, **changes)
    with pytest.raises(DataFileError, match=r"availability_flash\.npz: .*" + words):
        draw_devices(phones(folder, availability=True), 5, seed=0)
    assert len(draw_devices(phones(folder), 5, seed=0).profiles) == 5  # the file is not needed then


def test_damaged_archives_are_told(folder):
    path = folder / "availability_flash.npz"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataFileError, match=r"availability_flash\.npz: cannot be read"):
        read_traces(path)
    np.savez(path, **{name: FLASH[name] for name in FLASH if name != "end"})
    with pytest.raises(DataFileError, match=r"lacks the array 'end'"):
        read_traces(path)
    np.savez(path, **(FLASH | {"start": np.array(FLASH["start"]) + 0.5}))
    with pytest.raises(DataFileError, match=r"start: holds float64 values"):
        read_traces(path)
    with path.open("wb") as file:
        np.save(file, np.arange(3))
    with pytest.raises(DataFileError, match=r"holds a single array"):
        read_traces(path)
    path.unlink()
    with pytest.raises(DataFileError, match=r"is missing"):
        read_traces(path)
