"""The compiled loops: RBN and IEBN on the CPU in as many passes over memory as BatchNorm takes."""

from rbn.kernels.library import (
    NOTHING,
    Array,
    Plan,
    accumulate,
    backward,
    forward,
    instructions,
    limit_cache,
    limit_instructions,
    problem,
    worthwhile_threads,
)

__all__ = [
    "NOTHING",
    "Array",
    "Plan",
    "accumulate",
    "backward",
    "forward",
    "instructions",
    "limit_cache",
    "limit_instructions",
    "problem",
    "worthwhile_threads",
]
