"""Flax layers on several devices that tell each other nothing."""

from rbn.conformance.subjects.flax import Flax, FlaxNNX


class Alone:
    """Drops the name of the axis."""

    def options(self, config, dtype):
        return super().options(config, dtype) | {"axis_name": None}


class Linen(Alone, Flax):
    pass


class NNX(Alone, FlaxNNX):
    pass
