"""The network's state: a flat dictionary of arrays, such as "norm1.gamma"."""

import numpy as np

State = dict[str, np.ndarray]


def part(state: State, layer: str) -> State:
    """What belongs to one layer, without its prefix."""
    prefix = f"{layer}."
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
