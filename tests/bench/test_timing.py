"""Pairs, medians and ratios: what the measuring loop makes of steps whose times are known."""

import ctypes
import subprocess
import sys

import pytest

from rbn.benchmarks import timing
from rbn.benchmarks.timing import LEAST, MOST, WARM_UP, compare, comparison


class Machine:
    """A clock that the steps move: `slow` of each pair's moments are ten times slower."""

    def __init__(self, monkeypatch, slow=()):
        self.now, self.calls, self.slow = 0.0, [], slow
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

    def step(self, name, seconds):
        def run():
            moment = (len(self.calls) - 2 * WARM_UP) // 2
            self.calls.append(name)
            self.now += seconds * (10 if moment in self.slow else 1)

        return run


def test_the_ratio_is_the_median_of_the_pairs_and_not_of_the_medians():
    found = comparison([(1.0, 1.0), (2.0, 4.0), (9.0, 3.0)])
    assert (found.seconds, found.other_seconds, found.pairs) == (2.0, 3.0, 3)
    assert (found.low, found.ratio, found.high) == (0.75, 1.0, 2.0)


def test_two_steps_take_turns_after_warming_up(monkeypatch):
    machine = Machine(monkeypatch)
    found = compare(machine.step("rbn", 0.5), machine.step("bn", 1.0), budget=12.0)
    assert machine.calls == ["bn", "rbn"] * (WARM_UP + found.pairs)
    assert found.pairs == 8  # of 1.5 seconds each
    assert (found.seconds, found.other_seconds, found.ratio) == (0.5, 1.0, 0.5)


def test_slow_moments_slow_both_and_leave_the_ratio(monkeypatch):
    machine = Machine(monkeypatch, slow=(0, 2, 3))
    found = compare(machine.step("rbn", 0.5), machine.step("bn", 1.0), budget=0.0)
    assert (found.low, found.ratio, found.high, found.pairs) == (0.5, 0.5, 0.5, LEAST)
    assert found.seconds == 5.0


def test_short_steps_stop_after_enough_pairs(monkeypatch):
    machine = Machine(monkeypatch)
    assert compare(machine.step("rbn", 1e-6), machine.step("bn", 1e-6), budget=1.0).pairs == MOST


@pytest.mark.parametrize("size", [1, 7, 4096])
def test_a_copy_copies_every_byte_and_counts_once(monkeypatch, size):
    arrays = []
    for name in ("ones", "zeros"):
        make = getattr(timing.np, name)
        monkeypatch.setattr(timing.np, name, lambda *a, make=make: arrays.append(make(*a)) or arrays[-1])
    copies = []
    copy = timing.np.copyto
    monkeypatch.setattr(timing.np, "copyto", lambda to, of: copies.append(of.size) or copy(to, of))
    calls = []

    def median_time(step, budget):
        step()
        calls.append(budget)
        return 30.0

    monkeypatch.setattr(timing, "median_time", median_time)
    seconds = timing.copy_seconds(size, 0.5)
    source, target = arrays
    assert (target == source).all()
    assert seconds * sum(copies) == pytest.approx(30.0 * size)
    assert calls == [0.5]


FAULTS = """
import resource, sys
import numpy as np
from rbn.benchmarks.timing import keep_freed_memory
if sys.argv[1:]:
    keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    a, b, c = (np.ones(3_000_000) for _ in range(3))
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")
def test_freed_memory_is_kept():
    """Three arrays of 24 MB, allocated again: by default their pages are new ones."""
    default, kept = (
        int(subprocess.run([sys.executable, "-c", FAULTS, *argument], capture_output=True, check=True).stdout)
        for argument in ((), ("keep",))
    )
    assert kept < 100 < default
