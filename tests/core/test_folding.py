"""A layer whose calibration does nothing is one multiplication and one addition a channel."""

import numpy as np
import pytest

from rbn_core import folding, reference
from rbn_core.config import Config

CONFIGS = {
    "bn": Config(3, centering=None, scaling=None),
    "rbn": Config(3),
    "hard": Config(3, restrict="hard_sigmoid", scaling="channel_std", gamma=False),
    "iebn": Config.iebn(3),
    "bnet": Config.bnet(3),
}


def layer_of(config):
    rng = np.random.default_rng(0)
    layer = reference.Layer(config)
    state = {name: rng.uniform(0.5, 1.5, value.shape) for name, value in layer.state().items()}
    if config.kernel_size:
        state["conv_weight"][:] *= np.arange(9).reshape(3, 3) == 4
    for name in ("center_weight", "scale_weight"):
        if name in state:
            state[name][:] = 0
    state["num_batches_tracked"] = np.array(3)
    layer.load(state)
    return layer


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_inert_is_one_affine_step(name):
    layer = layer_of(CONFIGS[name])
    a, b = folding.plain_affine(CONFIGS[name], layer.state())
    x = np.random.default_rng(1).normal(size=(2, 3, 4, 4))
    due = layer.forward(x, training=False)
    np.testing.assert_allclose(a[:, None, None] * x + b[:, None, None], due, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "array"),
    [("rbn", "center_weight"), ("rbn", "scale_weight"), ("iebn", "scale_weight"), ("bnet", "conv_weight")],
)
def test_one_channel_that_is_calibrated_is_enough_to_refuse(name, array):
    state = layer_of(CONFIGS[name]).state()
    state[array].reshape(-1)[0] = 1e-3
    assert folding.plain_affine(CONFIGS[name], state).startswith(f"{array} is not 0")
