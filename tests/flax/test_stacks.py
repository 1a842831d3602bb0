"""Stacks of layers, as `nn.scan`, `nn.vmap`, `nnx.scan` and `nnx.vmap` make them: in them, and converted."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rbn.backends import flax as rbn_flax
from rbn.backends.flax import BNET, IEBN, RBN, convert, freeze, to_numpy, update_rbn
from rbn_core import RBNValueError

STATS = ["batch_stats"]
LAYERS: dict[str, Any] = {"BatchNorm": nn.BatchNorm, "RBN": RBN, "IEBN": IEBN, "BNET": BNET}
DEPTH = 3


def images(seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (4, 5, 5, DEPTH))  # as many channels as layers


def spread(tree: Any) -> Any:
    """Values that no mistake hides in."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: (
            jnp.asarray(rng.uniform(0.5, 1, leaf.shape), leaf.dtype) if leaf.dtype == jnp.float32 else leaf
        ),
        tree,
    )


def close(actual: Any, expected: Any, tolerance: float = 2e-5) -> None:
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), actual, expected
    )


class Block(nn.Module):
    """A convolution and a layer."""

    kind: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> tuple[jax.Array, None]:
        x = nn.Conv(DEPTH, (1, 1), name="conv")(x)
        return self.kind(use_running_average=not train, name="norm")(x), None


AXES: dict[str, Any] = {
    "stacked": {"variable_axes": {"params": 0, "batch_stats": 0}, "split_rngs": {"params": True}},
    "one set of parameters": {
        "variable_axes": {"batch_stats": 0},
        "variable_broadcast": "params",
        "split_rngs": {"params": False},
    },
    "along the last axis": {
        "variable_axes": {"params": -1, "batch_stats": -1},
        "split_rngs": {"params": True},
    },
}


class Scanned(nn.Module):
    """Blocks one after another in a loop."""

    kind: Any = nn.BatchNorm
    axes: str = "stacked"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        loop = nn.scan(Block, in_axes=nn.broadcast, length=DEPTH, **AXES[self.axes])
        return loop(self.kind, name="blocks")(x, train)[0]


class Ensemble(nn.Module):
    """Blocks side by side."""

    kind: Any = nn.BatchNorm

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        both = nn.vmap(Block, in_axes=(None, None), axis_size=DEPTH, **AXES["stacked"])
        return both(self.kind, name="blocks")(x, train)[0].sum(0)


class Checkpointed(nn.Module):
    """Blocks of which the backward pass computes anew what it needs."""

    kind: Any = nn.BatchNorm

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        for i in range(DEPTH):
            x, _ = nn.remat(Block, static_argnums=2)(self.kind, name=f"block{i}")(x, train)
        return x


def start(net: Any) -> Any:
    return net.init(jax.random.key(0), images(), train=False)


def layer_of(variables: Any, index: int) -> Any:
    if "block0" in variables["batch_stats"]:
        return {name: tree[f"block{index}"] for name, tree in variables.items()}
    return {name: jax.tree.map(lambda leaf: leaf[index], tree["blocks"]) for name, tree in variables.items()}


@pytest.mark.meeting(
    "`nn.scan`, `nn.vmap` and `nn.remat` over modules with the layers",
    "works",
    "nn.scan(Block, variable_axes={'params': 0, 'batch_stats': 0}, split_rngs={'params': True}, length=3)",
)
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (Scanned, "BatchNorm"),
        (Scanned, "RBN"),
        pytest.param(Scanned, "IEBN", marks=pytest.mark.long),
        pytest.param(Scanned, "BNET", marks=pytest.mark.long),
        (Ensemble, "RBN"),
        (Ensemble, "BNET"),
        (Checkpointed, "RBN"),
    ],
)
def test_layers_of_a_stack_are_what_they_are_one_by_one(kind: Any, name: str) -> None:
    net, x = kind(LAYERS[name]), images()
    variables = spread(jax.jit(lambda: start(net))())

    @jax.jit
    def loss(params: Any) -> Any:
        y, stats = net.apply({**variables, "params": params}, x, train=True, mutable=STATS)
        return jnp.sin(y).sum(), (y, stats)

    @jax.jit
    def one_by_one(params: Any) -> Any:
        outputs, stats, y = [], [], x
        for i in range(DEPTH):
            each = layer_of({**variables, "params": params}, i)
            given = x if kind is Ensemble else y
            (y, _), new = Block(LAYERS[name]).apply(each, given, train=True, mutable=STATS)
            outputs.append(y)
            stats.append(new["batch_stats"])
        y = sum(outputs[1:], outputs[0]) if kind is Ensemble else outputs[-1]
        return jnp.sin(y).sum(), (y, stats)

    (_, (found, stats)), gradients = jax.value_and_grad(loss, has_aux=True)(variables["params"])
    (_, (due, expected)), wanted = jax.value_and_grad(one_by_one, has_aux=True)(variables["params"])
    close(found, due)
    for i in range(DEPTH):
        close(layer_of(stats, i)["batch_stats"]["norm"], expected[i]["norm"])
    close(gradients, wanted, 1e-4)


def lively(net: Any) -> Any:
    variables = spread(jax.jit(lambda: start(net))())
    step = jax.jit(lambda variables: net.apply(variables, images(1), train=True, mutable=STATS)[1])
    return variables | step(variables)


@pytest.mark.meeting(
    "`convert` of stacks that `nn.scan` and `nn.vmap` made",
    "works with `init=`, if the layers lie along the first axis",
    "convert(model, variables, init=lambda: model.init(key, x))",
)
@pytest.mark.parametrize(
    ("net", "to", "options"),
    [
        (Scanned(), "rbn", {"scaling": "channel_std"}),
        pytest.param(Ensemble(), "bnet", {}, marks=pytest.mark.long),
        (Scanned(axes="one set of parameters"), "bnet", {"kernel_size": 5}),
    ],
)
def test_a_converted_stack_gives_what_it_gave(net: Any, to: str, options: dict[str, Any]) -> None:
    variables = lively(net)
    model, new, table = convert(net, variables, to, init=lambda: start(net), preserve=True, **options)
    assert [(row.name, row.status) for row in table.rows] == [("blocks.norm", "replaced")]
    made = jax.eval_shape(lambda: start(model))
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, new)

    def both(each: Any, given: Any) -> Any:
        found = each.apply(given, images(2), train=True, mutable=STATS)
        stats = found[1]["batch_stats"]["blocks"]["norm"]
        return found[0], each.apply(given, images(2), train=False), stats["mean"], stats["var"]

    expected = jax.jit(lambda given: both(net, given))(variables)
    close(jax.jit(lambda given: both(model, given))(new), expected, 1e-4)
    back, old, _ = convert(model, new, "bn", init=lambda: start(model))
    close(old, variables, 1e-6)
    assert jax.tree.structure(jax.eval_shape(lambda: start(back))) == jax.tree.structure(old)


def test_new_kernels_of_a_stack_are_drawn_one_by_one() -> None:
    for axes, due in (("stacked", DEPTH), ("one set of parameters", 1)):
        net = Scanned(axes=axes)
        variables = lively(net)
        _, new, _ = convert(net, variables, "bnet", init=lambda net=net: start(net))
        kernel = new["params"]["blocks"]["norm"]["conv"]["kernel"].reshape(-1, 3, 3, 1, DEPTH)
        assert len(np.unique(np.asarray(kernel[:, 0, 0, 0, 0]))) == len(kernel) == due


def test_initializers_and_boxes_of_a_stack_are_those_of_its_layers() -> None:
    net = Scanned()
    normal = nn.with_partitioning(nn.initializers.normal(), ("model",))
    new = convert(net, start(net), init=lambda: start(net), scale_bias_init=normal)[1]
    scale_bias = new["params"]["blocks"]["norm"]["scale_bias"]
    assert scale_bias.names == (None, "model")
    assert len(np.unique(scale_bias.value)) == DEPTH * DEPTH


def test_one_calibrated_layer_of_a_stack_keeps_the_stack() -> None:
    net = Scanned(RBN)
    variables = start(net)
    weight = variables["params"]["blocks"]["norm"]["center_weight"]
    variables["params"]["blocks"]["norm"]["center_weight"] = weight.at[1].set(0.5)
    table = convert(net, variables, "bn", init=lambda: start(net))[2]
    assert [row.status for row in table.rows] == ["kept"]
    assert table.rows[0].detail == "center_weight is not 0 everywhere (largest 0.5), in layer 1 of the stack"
    assert str(table).endswith("0 replaced")


def test_a_stack_that_cannot_be_told_is_refused() -> None:
    net = Scanned()
    with pytest.raises(RBNValueError, match=r"expected init=, which tells how .* of shape \(3, 3\)"):
        convert(net, start(net))
    net = Scanned(axes="along the last axis")
    with pytest.raises(RBNValueError, match=r"a stack of layers along the first axis, got another in blocks"):
        convert(net, start(net), init=lambda: start(net))


def test_recipes_know_a_stack() -> None:
    net = Scanned(RBN)
    variables = lively(net)
    found = update_rbn(net, variables, [images(1), images(2)], train=True)
    norm = found["batch_stats"]["blocks"]["norm"]
    np.testing.assert_array_equal(norm["num_batches_tracked"], np.full(DEPTH, 2))
    each = []
    for seed in (1, 2):
        alone = Scanned(lambda **options: RBN(momentum=0.0, **options))
        stats = alone.apply(variables, images(seed), train=True, mutable=STATS)[1]
        each.append(stats["batch_stats"]["blocks"]["norm"])
    for name in ("mean", "var"):
        close(norm[name], (each[0][name] + each[1][name]) / 2, 1e-4)
    frozen, _, _ = freeze(net, variables)
    close(frozen.apply(variables, images(), train=True), net.apply(variables, images(), train=False))


# NNX


class Pair(nnx.Module):
    """A convolution and a layer."""

    def __init__(self, kind: Any, rngs: nnx.Rngs) -> None:
        self.conv, self.norm = nnx.Conv(DEPTH, DEPTH, (1, 1), rngs=rngs), kind(DEPTH, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.norm(self.conv(x))


class Stack(nnx.Module):
    """Several in one."""

    def __init__(self, kind: Any, depth: int = DEPTH) -> None:
        @nnx.split_rngs(splits=depth)
        @nnx.vmap
        def create(rngs: nnx.Rngs) -> Pair:
            return Pair(kind, rngs)

        self.pairs = create(nnx.Rngs(0))
        nnx.update(self, spread(nnx.state(self)))

    def __call__(self, x: jax.Array) -> jax.Array:
        """One after another."""

        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def follow(x: jax.Array, pair: Pair) -> jax.Array:
            return pair(x)

        return follow(x, self.pairs)

    def beside(self, x: jax.Array) -> jax.Array:
        """Side by side."""
        return nnx.vmap(lambda pair, x: pair(x), in_axes=(0, None))(self.pairs, x)


def alone(stack: Stack, index: int) -> Pair:
    graph, state = nnx.split(stack.pairs)
    pair: Pair = nnx.merge(graph, jax.tree.map(lambda leaf: leaf[index], state))
    return pair


@pytest.mark.meeting(
    "`nnx.vmap`, `nnx.scan` and `nnx.remat` over modules with the layers",
    "works",
    "nnx.vmap(lambda module, x: module(x), in_axes=(0, None))(modules, x)",
)
@pytest.mark.parametrize(
    "name", ["RBN", *(pytest.param(name, marks=pytest.mark.long) for name in ("BatchNorm", "BNET"))]
)
def test_nnx_layers_of_a_stack_are_what_they_are_one_by_one(name: str) -> None:
    kind = nnx.BatchNorm if name == "BatchNorm" else getattr(rbn_flax.nnx, name)
    stack, x = Stack(kind), images()
    pairs = [alone(stack, i) for i in range(DEPTH)]
    before = nnx.clone(stack)
    y, due = stack(x), x
    for pair in pairs:
        due = pair(due)
    close(y, due)
    for i, pair in enumerate(pairs):
        close(to_numpy(alone(stack, i).norm), to_numpy(pair.norm))
    close(before.beside(x), jnp.stack([alone(Stack(kind), i)(x) for i in range(DEPTH)]))
    checkpointed, plain = alone(Stack(kind), 0), alone(Stack(kind), 0)
    gradient = nnx.grad(lambda pair: jnp.sin(nnx.remat(lambda pair, x: pair(x))(pair, x)).sum())(checkpointed)
    close(nnx.to_pure_dict(gradient), nnx.to_pure_dict(nnx.grad(lambda pair: jnp.sin(pair(x)).sum())(plain)))


@pytest.mark.meeting(
    "`nnx.convert` of stacks that `nnx.vmap` made",
    "works, if the layers lie along the first axis",
    "convert(model)",
)
@pytest.mark.parametrize(("to", "depth"), [("rbn", DEPTH), ("bnet", 2)])
def test_a_converted_nnx_stack_gives_what_it_gave(to: str, depth: int) -> None:
    model, expected = Stack(nnx.BatchNorm, depth), Stack(nnx.BatchNorm, depth)
    scale = model.pairs.norm.scale
    table = rbn_flax.nnx.convert(model, to, preserve=True)
    assert [(row.name, row.status) for row in table.rows] == [("pairs.norm", "replaced")]
    assert to == "bnet" or model.pairs.norm.scale is scale
    close(model(images()), expected(images()), 1e-4)
    np.testing.assert_array_equal(model.pairs.norm.num_batches_tracked[...], np.ones(depth))
    for each in (model, expected):
        each.eval()
    close(model.beside(images()), expected.beside(images()), 1e-4)
    rbn_flax.nnx.convert(model, "bn")
    assert type(model.pairs.norm) is nnx.BatchNorm
    close(nnx.to_pure_dict(nnx.state(model)), nnx.to_pure_dict(nnx.state(expected)), 1e-6)


def test_new_nnx_kernels_of_a_stack_are_drawn_one_by_one() -> None:
    model = Stack(nnx.BatchNorm, 2)
    rbn_flax.nnx.convert(model, "bnet")
    kernel = model.pairs.norm.conv.kernel[...]
    assert kernel.shape == (2, 3, 3, 1, DEPTH)
    assert np.abs(kernel[0] - kernel[1]).min() > 0


def test_an_nnx_stack_that_cannot_be_told_is_refused_and_stays_whole() -> None:
    model = Stack(nnx.BatchNorm)
    before = nnx.to_pure_dict(nnx.state(model))
    with pytest.raises(RBNValueError, match=r"got params/\w+ of shape \(3, 3\) for 3 channels in pairs.norm"):
        rbn_flax.nnx.convert(model, "bnet")
    close(nnx.to_pure_dict(nnx.state(model)), before, 0)
    last = nnx.StateAxes({...: 1})
    other = nnx.vmap(lambda rngs: nnx.BatchNorm(4, rngs=rngs), in_axes=0, out_axes=last)
    holder = nnx.List([nnx.split_rngs(splits=2)(other)(nnx.Rngs(0))])
    with pytest.raises(RBNValueError, match=r"of shape \(4, 2\) for 4 channels in 0"):
        rbn_flax.nnx.convert(holder)
