"""Small files of measurements, and traces, for the tests of devices and of the simulated clock."""

from __future__ import annotations

import numpy as np

from fedmoe_sched.federated.availability import Traces

SPEC = "phone_id,model,ram_gb,infer_ms\n0,Fast,8,20\n1,Slow,0.75,630\n2,Other,4,63\n"
UP_DOWN = "row,down_mean_kbps,down_std_kbps,up_mean_kbps\n0,8000,1,4000\n1,2000,1,400\n"
MOBIPERF = "row,model,mean_kbps,samples_kbps\n0,A,40000,1;2\n1,B,1.6,3\n"
# Three devices; the second is never available, the third in two intervals that touch, after an empty one.
FLASH = {
    "device_id": [5, 6, 7],
    "trace_start": [1000, 0, 500],
    "trace_end": [1100, 50, 1500],
    "offset": [0, 2, 3, 6],
    "start": [1010, 1090, 20, 600, 700, 800],
    "end": [1020, 1100, 20, 600, 800, 900],
}


def write_measurements(folder):
    """Write the four files of the source ``phones``."""
    (folder / "phones_spec.csv").write_text(SPEC)
    (folder / "bandwidth_updown.csv").write_text(UP_DOWN)
    (folder / "bandwidth_mobiperf_2018.csv").write_text(MOBIPERF)
    write_flash(folder)


def write_flash(folder, **changes):
    """Write the availability traces, with other values for some arrays."""
    arrays = {name: np.array(values, dtype=np.int32) for name, values in (FLASH | changes).items()}
    np.savez(folder / "availability_flash.npz", **arrays)


def traces_of(*clients, period):
    """Make traces of one period, each of a list of (start, end)."""
    counts = [len(intervals) for intervals in clients]
    flat = np.array([pair for intervals in clients for pair in intervals], dtype=np.int64).reshape(-1, 2)
    offset = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return Traces(offset, flat[:, 0], flat[:, 1], np.full(len(clients), period, dtype=np.int64))
