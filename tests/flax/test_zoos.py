"""The named maps of Flax's example and of transformers, and files of PyTorch's zoos: names and results."""

import warnings
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, serialization, traverse_util

from rbn.backends.flax import RBN, convert, from_numpy, network, to_numpy
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


def converted(net, init, run, count):
    """A network's BatchNorms become ours, with the same results in evaluation, and go back."""
    theirs, _ = from_numpy(init, lively(to_numpy(init())))
    x = np.random.default_rng(1).normal(size=(2, 32, 32, 3)).astype(np.float32)
    ours, variables, table = convert(net, theirs, init=init, preserve=True)
    assert str(table).endswith(f"{count} replaced")
    expected, found = jax.jit(partial(run, net))(theirs, x), jax.jit(partial(run, ours))(variables, x)
    assert np.max(np.abs(found - expected)) < 1e-5 * np.max(np.abs(expected))
    _, again, table = convert(ours, variables, "bn", init=lambda: init(ours))
    assert str(table).endswith(f"{count} replaced")
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), again, theirs)
    return ours, variables, x


class Defined(nn.Module):
    """A small residual network that is told its layers, as Flax's example is: by a `ModuleDef`."""

    norm: Any

    @nn.compact
    def __call__(self, x, train=True):
        norm = partial(self.norm, use_running_average=not train, momentum=0.9, epsilon=1e-5)
        x = nn.relu(norm(name="bn_init")(nn.Conv(4, (3, 3), use_bias=False, name="conv_init")(x)))
        for _ in range(2):
            x = DefinedBlock(norm)(x)
        return nn.Dense(7)(x.mean((1, 2)))


class DefinedBlock(nn.Module):
    """Two convolutions, the last norm from 0."""

    norm: Any

    @nn.compact
    def __call__(self, x):
        y = nn.relu(self.norm()(nn.Conv(4, (3, 3), use_bias=False)(x)))
        y = self.norm(scale_init=nn.initializers.zeros)(nn.Conv(4, (3, 3), use_bias=False)(y))
        return nn.relu(x + y)


@pytest.mark.meeting(
    "linen models that take `norm=`, as Flax's example does",
    "work with `norm=RBN`, and by `convert`",
    "ResNet50(norm=RBN, num_classes=1000)",
)
def test_a_model_that_is_told_its_norm():
    def init(net=None):
        return (net or Defined(nn.BatchNorm)).init(jax.random.key(0), jnp.ones((1, 32, 32, 3)), train=False)

    def run(net, variables, x):
        return net.apply(variables, x, train=False)

    ours, variables, x = converted(Defined(nn.BatchNorm), init, run, 5)
    named = {
        tuple(name.replace("BatchNorm_", "RBN_") for name in path): leaf
        for path, leaf in traverse_util.flatten_dict(variables).items()
    }
    given, built = traverse_util.unflatten_dict(named), Defined(partial(RBN, running_var="biased"))
    assert jax.tree.map(jnp.shape, given) == jax.tree.map(jnp.shape, init(built))
    step = {"train": True, "mutable": ["batch_stats"]}
    due = jax.jit(partial(ours.apply, **step))(variables, x)[0]
    np.testing.assert_allclose(jax.jit(partial(built.apply, **step))(given, x)[0], due, rtol=1e-5, atol=1e-5)


@pytest.mark.meeting(
    "transformers' `FlaxResNetModel` by `convert`",
    "works",
    "convert(model.module, model.params, init=lambda: model.module.init(key, images))",
    packages=("transformers",),
)
def test_transformers_is_converted():
    config = ResNetConfig(
        num_labels=7, layer_type="basic", depths=[1, 1], hidden_sizes=[8, 16], embedding_size=8
    )
    net = FlaxResNetForImageClassificationModule(config)

    def init(net=net):
        return net.init(jax.random.key(0), jnp.ones((1, 32, 32, 3)))

    converted(net, init, lambda net, variables, x: net.apply(variables, x).logits, 6)


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
