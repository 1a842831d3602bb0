"""The named maps of Flax's example and of transformers: names, shapes, and results, padded as ours."""

import warnings
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rbn.backends.flax import from_numpy, network, to_numpy
from rbn_core.zoos import table


class Example(nn.Module):
    """A residual network whose layers are numbered as Flax's example has them, and padded as ours.

    The example itself is no package. Compact modules count the layers of each class by themselves.
    """

    depths: tuple[int, ...]
    bottleneck: bool
    padding: str = "ours"

    @nn.compact
    def __call__(self, x):
        norm = partial(nn.BatchNorm, use_running_average=True, use_fast_variance=False)
        conv = partial(nn.Conv, use_bias=False)
        x = nn.relu(norm(name="bn_init")(conv(64, (7, 7), 2, padding=3, name="conv_init")(x)))
        x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)) if self.padding == "ours" else "SAME")
        kind = BottleneckResNetBlock if self.bottleneck else ResNetBlock
        for stage, depth in enumerate(self.depths):
            for i in range(depth):
                x = kind(64 * 2**stage, 2 if stage and not i else 1, self.padding)(x)
        return nn.Dense(7)(x.mean((1, 2)))


class ResNetBlock(nn.Module):
    """Two convolutions beside a shortcut."""

    width: int
    stride: int
    padding: str
    sizes = ((3, 1), (3, 1))
    strided = 0

    @nn.compact
    def __call__(self, x):
        norm = partial(nn.BatchNorm, use_running_average=True, use_fast_variance=False)
        y = x
        for i, (size, factor) in enumerate(self.sizes):
            stride = self.stride if i == self.strided else 1
            padding = size // 2 if self.padding == "ours" else "SAME"
            y = nn.Conv(self.width * factor, (size, size), stride, padding, use_bias=False)(y)
            y = norm()(y)
            y = nn.relu(y) if i < len(self.sizes) - 1 else y
        if x.shape != y.shape:
            x = nn.Conv(y.shape[-1], (1, 1), self.stride, use_bias=False, name="conv_proj")(x)
            x = norm(name="norm_proj")(x)
        return nn.relu(x + y)


class BottleneckResNetBlock(ResNetBlock):
    """A narrow convolution between two of single pixels."""

    sizes = ((1, 1), (3, 1), (1, 4))
    strided = 1


def lively(state):
    rng = np.random.default_rng(0)
    return {
        name: (np.abs(value) + rng.uniform(0.05, 0.2, value.shape)).astype(np.float32)
        if value.ndim == 1
        else value
        for name, value in state.items()
    }


def check(zoo, name, init, run):
    """Their weights give our network their results, and ours are theirs again."""
    state = lively(to_numpy(jax.jit(init)(), init))
    theirs, _ = from_numpy(init, state)
    ours = network(name, num_classes=7)
    variables, found = from_numpy(ours, state, rename=table(f"from-{zoo}", state))
    assert not found.faults
    x = np.random.default_rng(1).normal(size=(2, 64, 64, 3)).astype(np.float32)
    expected, result = jax.jit(run)(theirs, x), jax.jit(partial(ours.apply, train=False))(variables, x)
    assert np.max(np.abs(result - expected)) < 1e-5 * np.max(np.abs(expected))
    back = to_numpy(variables, ours)
    again, found = from_numpy(init, back, rename=table(f"to-{zoo}", back))
    assert not found.faults
    jax.tree.map(np.testing.assert_array_equal, again, theirs)


@pytest.mark.parametrize(
    ("name", "depths", "bottleneck"),
    [
        ("resnet18", (2, 2, 2, 2), False),
        pytest.param("resnet50", (3, 4, 6, 3), True, marks=pytest.mark.long),
    ],
)
def test_flaxs_example(name, depths, bottleneck):
    net = Example(depths, bottleneck)

    def init():
        return net.init(jax.random.key(0), jnp.ones((1, 64, 64, 3)))

    check("flax-example", name, init, net.apply)


@pytest.mark.long
def test_transformers():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers = pytest.importorskip(
            "transformers.models.resnet.modeling_flax_resnet", reason="needs transformers 4.48"
        )
        from transformers import ResNetConfig
    config = ResNetConfig(layer_type="bottleneck", depths=[3, 4, 6, 3], num_labels=7)
    net = transformers.FlaxResNetForImageClassificationModule(config)

    def init():
        return net.init(jax.random.key(0), jnp.ones((1, 64, 64, 3)))

    check("transformers", "resnet50", init, lambda variables, x: net.apply(variables, x).logits)
