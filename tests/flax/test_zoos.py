"""The named maps of Flax's example and of transformers, and files of PyTorch's zoos: names and results."""

import warnings
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, serialization

from rbn.backends.flax import from_numpy, network, to_numpy
from rbn.backends.flax.nnx import network as nnx_network
from rbn_core.zoos import table

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from transformers import ResNetConfig
    from transformers.models.resnet.modeling_flax_resnet import FlaxResNetForImageClassificationModule


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


@pytest.mark.meeting(
    "the ResNets of Flax's example",
    "the same logits with ported weights",
    "rbn port resnet50.pth resnet50.msgpack --map to-flax-example",
)
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


@pytest.mark.meeting(
    "transformers' `FlaxResNetModel`",
    "the same logits with ported weights",
    "rbn port resnet50.pth resnet50.msgpack --map to-transformers-flax",
    packages=("transformers",),
)
@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("resnet18", {"layer_type": "basic", "depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 256, 512]}),
        pytest.param(
            "resnet50", {"layer_type": "bottleneck", "depths": [3, 4, 6, 3]}, marks=pytest.mark.long
        ),
    ],
)
def test_transformers(name, layers):
    config = ResNetConfig(num_labels=7, **layers)
    net = FlaxResNetForImageClassificationModule(config)

    def init():
        return net.init(jax.random.key(0), jnp.ones((1, 64, 64, 3)))

    check("transformers-flax", name, init, lambda variables, x: net.apply(variables, x).logits)


def test_files_of_pytorchs_zoos(zoo_model, tmp_path):
    path, images = tmp_path / "ours.msgpack", zoo_model.images.transpose(0, 2, 3, 1)
    zoo_model.port(path)
    ours = network(zoo_model.network)
    empty = jax.eval_shape(partial(ours.init, train=False), jax.random.key(0), images)
    variables = serialization.from_bytes(empty, path.read_bytes())
    zoo_model.check(jax.jit(partial(ours.apply, train=False))(variables, images))
    path.write_bytes(serialization.to_bytes(variables))
    zoo_model.check_back(path)


@pytest.mark.parametrize("zoo_model", ["torchvision.resnet18"], indirect=True)
def test_files_of_pytorchs_zoos_in_nnx(zoo_model, tmp_path):
    zoo_model.port(tmp_path / "ours.msgpack", layout="nnx")
    ours = nnx_network(zoo_model.network, rngs=nnx.Rngs(0))
    state = nnx.state(ours)
    nnx.replace_by_pure_dict(state, serialization.msgpack_restore((tmp_path / "ours.msgpack").read_bytes()))
    nnx.update(ours, state)
    ours.eval()
    zoo_model.check(nnx.jit(lambda net, x: net(x))(ours, zoo_model.images.transpose(0, 2, 3, 1)))
    pure = nnx.to_pure_dict(nnx.state(ours))
    (tmp_path / "ours.msgpack").write_bytes(serialization.msgpack_serialize(pure))
    zoo_model.check_back(tmp_path / "ours.msgpack")
