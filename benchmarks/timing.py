"""How time is measured: two things in turn, compared pair by pair."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Step = Callable[[], object]
"""Something to measure. Its results are there when it returns, or on a GPU are on their way."""

WARM_UP = 2
"""Calls before the first measured one: they compile, and touch the memory that an allocator then reuses."""

LEAST, MOST = 5, 100
"""How many pairs there are, however long they take."""


COPIES = 10
"""So many in a row, so that waking the threads that copy does not count."""

Bytes = NDArray[np.uint8]

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of malloc.h: how many free bytes are too many, and how many in one block come straight from the system."""


@dataclass(frozen=True)
class Comparison:
    """Times of something and of what it is compared with, measured in turn.

    Args:
        seconds: The median time of the first.
        other_seconds: The median time of the second.
        ratio: The median of the ratios of the two times of a pair, first / second.
        low: Their lower quartile.
        high: Their upper quartile.
        pairs: How many there are.
    """

    seconds: float
    other_seconds: float
    ratio: float
    low: float
    high: float
    pairs: int


def keep_freed_memory() -> None:
    """Tell glibc to keep what is freed, as the allocators of MindSpore, Jittor and the GPUs do.

    It would return large blocks to the system, and every step would wait for their pages to be zeroed anew,
    for half of its time in PyTorch, whatever the layer.
    """
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):
        for parameter in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
            libc.mallopt(parameter, 2**31 - 1)


def by_the_clock(step: Step) -> float:
    """How long a step takes, in seconds."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def compare(
    first: Step, second: Step, budget: float, measure: Callable[[Step], float] = by_the_clock
) -> Comparison:
    """Measure two steps in turn, A B A B ..., so that what slows the machine for a while slows both.

    Args:
        first: What is asked about.
        second: What it is compared with.
        budget: Seconds for it all, after the warming up; `LEAST` pairs are measured in any case.
        measure: How long a step takes.
    """
    for _ in range(WARM_UP):
        second()
        first()
    pairs: list[tuple[float, float]] = []
    end = time.perf_counter() + budget
    while len(pairs) < LEAST or (len(pairs) < MOST and time.perf_counter() < end):
        other = measure(second)
        pairs.append((measure(first), other))
    return comparison(pairs)


def comparison(pairs: list[tuple[float, float]]) -> Comparison:
    """Medians, and the ratio pair by pair: that of two medians would mix different moments."""
    times = np.array(pairs)
    low, ratio, high = np.quantile(times[:, 0] / times[:, 1], (0.25, 0.5, 0.75))
    seconds, other_seconds = np.median(times, axis=0)
    return Comparison(float(seconds), float(other_seconds), float(ratio), float(low), float(high), len(pairs))


def median_time(step: Step, budget: float, measure: Callable[[Step], float] = by_the_clock) -> float:
    """The median time of a step, in seconds."""
    for _ in range(WARM_UP):
        step()
    times: list[float] = []
    end = time.perf_counter() + budget
    while len(times) < LEAST or (len(times) < MOST and time.perf_counter() < end):
        times.append(measure(step))
    return float(np.median(times))


def copy_seconds(size: int, budget: float) -> float:
    """How long a copy of so many bytes by all processors takes, without any framework: what memory allows."""
    source, target = np.ones(size, np.uint8), np.zeros(size, np.uint8)  # both touched
    processors = len(os.sched_getaffinity(0))

    def copy(target: Bytes, source: Bytes) -> None:
        for _ in range(COPIES):
            np.copyto(target, source)

    with ThreadPoolExecutor(processors) as pool:
        parts = [np.array_split(whole, processors) for whole in (target, source)]
        return median_time(lambda: list(pool.map(copy, *parts)), budget) / COPIES
