"""The compiled loops: RBN and IEBN on the CPU in as many passes over memory as BatchNorm takes."""

from rbn.kernels.library import (
    Plan,
    backward,
    forward,
    instructions,
    limit_cache,
    limit_instructions,
    problem,
)

__all__ = ["Plan", "backward", "forward", "instructions", "limit_cache", "limit_instructions", "problem"]
