"""The compiled loops: RBN and IEBN on the CPU in as many passes over memory as BatchNorm takes."""

from rbn.kernels.library import (
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
