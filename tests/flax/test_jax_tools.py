"""The layers among JAX's own tools, beside BatchNorm: Taylor mode, export, costs, averages of variables."""

import functools
import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import export, lax
from jax.experimental.jet import jet

import rbn.backends.flax as rbn_flax
from rbn.backends.flax import BNET, RBN, from_numpy, fused, internals, to_numpy
from rbn.backends.flax.internals import enable_x64

STATS = ["batch_stats"]
LAYERS: dict[str, Any] = {"BatchNorm": nn.BatchNorm(), "RBN": RBN(), "BNET": BNET()}


def normal(*shape: int, seed: int = 0, dtype: Any = jnp.float32) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def variables_of(layer: Any, x: jax.Array) -> Any:
    """Variables that no mistake hides in."""
    fresh = layer.init(jax.random.key(1), x, use_running_average=False)
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.uniform(0.5, 1.0, leaf.shape), leaf.dtype) if leaf.ndim else leaf, fresh
    )


def runner(layer: Any, variables: Any, training: bool) -> Any:
    def run(x: jax.Array) -> jax.Array:
        y = layer.apply(variables, x, use_running_average=not training, mutable=STATS)[0]
        return jnp.asarray(y)

    return run


def close(actual: Any, expected: Any, tolerance: float = 1e-5) -> None:
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance), actual, expected
    )


# Taylor mode


def derivatives(function: Any, orders: int) -> list[Any]:
    """Those of a function of a number at 0, by forward mode in forward mode."""
    found = []
    for _ in range(orders):

        def function(t: Any, before: Any = function) -> Any:
            return jax.jvp(before, (t,), (1.0,))[1]

        found.append(function(0.0))
    return found


@pytest.mark.meeting(
    "`jax.experimental.jet`",
    "works",
    "jet(f, (x,), ((v, zeros),))",
)
@pytest.mark.parametrize(
    ("name", "training"), [("BatchNorm", True), ("RBN", True), ("RBN", False), ("BNET", True)]
)
def test_taylor_mode_gives_the_derivatives_of_forward_mode(name: str, training: bool) -> None:
    with enable_x64():
        x, along = (normal(2, 2, 4, 3, seed=seed, dtype=jnp.float64) for seed in (0, 1))
        run = runner(LAYERS[name], variables_of(LAYERS[name], x), training)
        agree(run, x, along)


def test_taylor_mode_through_a_gradient() -> None:
    with enable_x64():
        x, along = (normal(2, 2, 4, 3, seed=seed, dtype=jnp.float64) for seed in (0, 1))
        run = runner(RBN(), variables_of(RBN(), x), False)
        agree(jax.grad(lambda x: jnp.sin(run(x)).sum()), x, along)


def agree(function: Any, x: jax.Array, along: jax.Array) -> None:
    @jax.jit
    def both(x: jax.Array) -> Any:
        y, terms = jet(function, (x,), ((along, jnp.zeros_like(x)),))
        return (y, terms), (function(x), derivatives(lambda t: function(x + t * along), 2))

    found, due = both(x)
    close(found, due, 1e-10)


def test_taylor_mode_of_the_hard_sigmoid_is_that_of_jax() -> None:
    x = normal(2, 2, 4, 3)
    run = runner(RBN(restrict="hard_sigmoid"), variables_of(RBN(), x), False)
    series = ((jnp.ones_like(x), jnp.zeros_like(x)),)
    try:
        jet(jax.nn.hard_sigmoid, (x,), series)
    except Exception as error:  # in JAX 0.7.1: its nested functions leak tracers
        with pytest.raises(type(error)):
            jet(run, (x,), series)
    else:
        assert np.isfinite(jet(run, (x,), series)[1][0]).all()


def test_without_the_rules_of_taylor_mode_there_are_operations_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for gone in ("jax.experimental.gone", "jax.numpy"):
        monkeypatch.setattr(internals, "TAYLOR", gone)
        assert internals.taylor_mode() is None
    if fused.AVAILABLE:
        operation = internals.operation("rbn_test", lambda layer, x: [x], lambda layer, x: [x])
        close(jax.jit(lambda x: operation.bind(x, call=None)[0])(jnp.ones(2)), jnp.ones(2))


# Export


def test_the_plain_form_exports_with_symbols_for_every_size() -> None:
    """As the other does in test_as_batch_norm.py."""
    run = runner(RBN(fused=False), variables_of(RBN(), normal(2, 4, 4, 3)), True)
    shape = jax.ShapeDtypeStruct(export.symbolic_shape("n,h,w,3"), jnp.float32)
    program = export.export(jax.jit(run))(shape)
    x = normal(3, 1, 7, 3)
    close(program.call(x), run(x))


@pytest.mark.meeting(
    "`jax.export`",
    "works, with symbols for every size, and runs where `rbn` is not installed",
    "jax.export.export(jax.jit(f))(x)",
)
def test_an_exported_program_calls_nothing_of_this_package() -> None:
    x = normal(2, 4, 4, 3)
    train, evaluate = (runner(RBN(), variables_of(RBN(), x), training) for training in (True, False))
    for function in (evaluate, jax.value_and_grad(lambda x: jnp.sin(train(x)).sum())):
        program = export.export(jax.jit(function))(x)
        assert "custom_call" not in program.mlir_module()
        close(program.call(x), function(x))


ALONE = """
import sys
from pathlib import Path
import numpy as np

for name in ("rbn", "rbn_core"):
    sys.modules[name] = None  # its import is an error
import jax
from jax import export

for name in ("rbn", "rbn_core", "rbn.backends.flax"):
    try:
        __import__(name)
    except ImportError:
        pass
    else:
        raise SystemExit(f"{name} was imported")
programs = sorted(Path(sys.argv[1]).glob("*.program"))
for path in programs:
    stored = np.load(path.with_suffix(".npz"))
    found = jax.tree.leaves(export.deserialize(bytearray(path.read_bytes())).call(stored["x"]))
    for index, each in enumerate(found):
        np.testing.assert_allclose(each, stored[f"arr_{index}"], rtol=1e-4, atol=1e-4)
assert "rbn_kernels" not in Path("/proc/self/maps").read_text()
print(f"{len(programs)} programs are right")
"""


@pytest.mark.meeting(
    "`jax.export`",
    "works, with symbols for every size, and runs where `rbn` is not installed",
    "jax.export.export(jax.jit(f))(x)",
)
def test_exported_programs_run_in_a_process_that_cannot_import_the_package(tmp_path: Path) -> None:
    class Net(nn.Module):
        in_loops: bool

        @nn.compact
        def __call__(self, x: jax.Array, train: bool) -> jax.Array:
            x = RBN(use_running_average=not train, fused=self.in_loops)(nn.Conv(4, (3, 3))(x))
            return BNET(use_running_average=not train, fused=self.in_loops)(nn.relu(x))

    x = normal(2, 4, 4, 3)
    programs: dict[str, Any] = {}
    for in_loops in (True, False):
        net = Net(in_loops)
        variables = jax.jit(lambda net=net: net.init(jax.random.key(0), x, train=False))()

        def loss(x: jax.Array, net: Any = net, variables: Any = variables) -> Any:
            y, stats = net.apply(variables, x, train=True, mutable=STATS)
            return jnp.sin(y).sum(), stats

        programs[f"evaluation {in_loops}"] = functools.partial(net.apply, variables, train=False)
        programs[f"training {in_loops}"] = jax.value_and_grad(loss, has_aux=True)
        module = nnx.Sequential(rbn_flax.nnx.RBN(3, fused=in_loops, rngs=nnx.Rngs(0)), nnx.relu)
        module.eval()
        programs[f"nnx {in_loops}"] = module
    for name, function in programs.items():
        compiled = jax.jit(function)
        (tmp_path / f"{name}.program").write_bytes(export.export(compiled)(x).serialize())
        np.savez(tmp_path / f"{name}.npz", *jax.tree.leaves(compiled(x)), x=x)
    command = [sys.executable, "-W", "ignore", "-c", ALONE, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == "6 programs are right\n", done.stderr


# Costs


@pytest.mark.meeting(
    "`compiled.cost_analysis()`",
    "XLA does not know the cost of a custom call: count with `fused=False`",
    "jax.jit(f).lower(x).compile().cost_analysis()",
)
@pytest.mark.skipif(not fused.AVAILABLE, reason="without custom calls")
def test_xla_counts_a_layer_in_operations_and_knows_no_custom_call() -> None:
    x = normal(2, 4, 4, 3)
    variables = variables_of(RBN(), x)

    def flops(layer: Any, platform: str) -> float:
        program = jax.jit(runner(layer, variables, True)).trace(x).lower(lowering_platforms=(platform,))
        return float(program.cost_analysis()["flops"])

    assert flops(RBN(), "cpu") < 0  # XLA's mark for what it does not know
    due = flops(RBN(fused=False), "cpu")
    assert due > 5 * x.size
    assert flops(RBN(), "cuda") == due  # in a program for something else there is no custom call


# The counter among the variables


@pytest.mark.meeting(
    "`jax.grad` over all variables",
    "works with `allow_int=True`",
    "jax.grad(loss, allow_int=True)(variables)",
)
def test_gradients_of_all_variables_are_batch_norms_where_integers_are_allowed() -> None:
    x = normal(2, 4, 4, 3)
    variables = variables_of(RBN(), x)

    def loss(variables: Any, training: bool) -> Any:
        y, _ = RBN().apply(variables, x, use_running_average=not training, mutable=STATS)
        return jnp.sin(y).sum()

    with pytest.raises(TypeError, match="allow_int"):
        jax.grad(loss)(variables, True)
    found = jax.grad(loss, allow_int=True)(variables, True)
    close(found["params"], jax.grad(lambda p: loss(variables | {"params": p}, True))(variables["params"]))
    close(found["batch_stats"]["mean"], jnp.zeros(3))  # of which E and Var are in training no function
    assert found["batch_stats"]["num_batches_tracked"].dtype == jax.dtypes.float0
    assert np.abs(jax.grad(loss, allow_int=True)(variables, False)["batch_stats"]["mean"]).min() > 0


def averaged(way: str, variables: Any) -> Any:
    if way == "pmean":
        both = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), variables)
        mean = jax.vmap(lambda v: jax.tree.map(lambda leaf: lax.pmean(leaf, "i"), v), axis_name="i")(both)
        return jax.tree.map(lambda leaf: leaf[0], mean)
    if way == "optax.ema":
        ema = optax.ema(0.9)
        return ema.update(variables, ema.init(variables))[0]
    if way == "half":
        return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), variables)
    return optax.incremental_update(variables, variables, 0.1)


@pytest.mark.meeting(
    "`lax.pmean`, `optax.ema` and `optax.incremental_update` over the statistics",
    "works",
    "optax.incremental_update(new, old, 0.1)",
    packages=("optax",),
)
@pytest.mark.parametrize("way", ["pmean", "optax.ema", "incremental_update", "half"])
@pytest.mark.parametrize("momentum", [0.9, None])
def test_averaged_variables_go_on_and_are_whole_batches(way: str, momentum: float | None) -> None:
    layer, x = RBN(momentum=momentum), normal(2, 4, 4, 3)
    variables = variables_of(layer, x)
    variables["batch_stats"]["num_batches_tracked"] = jnp.asarray(256, jnp.int32)  # and bfloat16 ends at 256
    found = averaged(way, variables)
    assert jnp.issubdtype(found["batch_stats"]["num_batches_tracked"].dtype, jnp.floating)
    tolerance = 1e-2 if way == "half" else 1e-5
    close(to_numpy(found), to_numpy(variables), tolerance)
    assert to_numpy(found)["num_batches_tracked"] == 256
    assert to_numpy(found)["num_batches_tracked"].dtype.kind == "i"
    from_numpy(layer, to_numpy(found))

    def step(variables: Any, _: Any) -> Any:
        y, stats = layer.apply(variables, x, use_running_average=False, mutable=STATS)
        return {**variables, **stats}, y

    first, _ = step(found, None)  # statistics in half precision become float32 ones, as BatchNorm's
    after, ys = lax.scan(step, first, None, length=2)
    due, expected = lax.scan(step, step(variables, None)[0], None, length=2)
    close(ys, expected, 10 * tolerance)
    close(to_numpy(after), to_numpy(due), 10 * tolerance)
    assert to_numpy(after)["num_batches_tracked"] == 259


def test_a_step_that_averages_over_devices_is_a_loop_of_scan() -> None:
    """Where the counter is a float from the start, as `lax.pmean` makes it."""
    layer, x = RBN(), normal(2, 4, 4, 3)

    def synchronised(stats: Any) -> Any:
        return jax.tree.map(lambda leaf: lax.pmean(leaf, "i"), stats)

    def epoch(variables: Any) -> Any:
        def step(variables: Any, _: Any) -> Any:
            _, stats = layer.apply(variables, x, use_running_average=False, mutable=STATS)
            return {**variables, **synchronised(stats)}, None

        return lax.scan(step, variables | synchronised({"batch_stats": variables["batch_stats"]}), None, 3)[0]

    once = jax.tree.map(lambda leaf: leaf[None], variables_of(layer, x))
    after = jax.vmap(epoch, axis_name="i")(once)
    assert after["batch_stats"]["num_batches_tracked"] == 3


def test_an_nnx_counter_that_is_a_float_counts_on() -> None:
    module = rbn_flax.nnx.RBN(3, rngs=nnx.Rngs(0))
    module.num_batches_tracked = nnx.BatchStat(jnp.asarray(256, jnp.bfloat16))
    module(normal(2, 4, 4, 3))
    assert module.num_batches_tracked[...] == 257
    assert to_numpy(module)["num_batches_tracked"].dtype.kind == "i"


# Options


HOW_A_VARIANCE_IS_COMPUTED = {"use_fast_variance", "force_float32_reductions"}
"""What the layers need not be told: always from X - E, and in at least float32."""


@pytest.mark.meeting(
    "the options of Flax's BatchNorm",
    "the same, except how a variance is computed",
    "RBN(use_running_average=False, axis_name='batch')",
)
@pytest.mark.parametrize("name", ["RBN", "IEBN", "BNET"])
def test_the_layers_have_the_options_of_batch_norm(name: str) -> None:
    in_the_place_of_affine = {"use_bias", "use_scale", "scale_init"} if name == "BNET" else set()
    in_nnx = {"bias_metadata", "scale_metadata"} if name == "BNET" else set()
    missing = HOW_A_VARIANCE_IS_COMPUTED | in_the_place_of_affine
    pairs: Any = (
        (nn.BatchNorm, getattr(rbn_flax, name), missing),
        (nnx.BatchNorm, getattr(rbn_flax.nnx, name), missing | in_nnx),
    )
    for theirs, ours, allowed in pairs:
        options = inspect.signature(theirs).parameters
        own = inspect.signature(ours).parameters
        lacking = options.keys() - own.keys()
        assert lacking <= allowed, f"{theirs} has {lacking - allowed}"
        for option in options.keys() & own.keys() - {"momentum"}:
            assert own[option].default == options[option].default or option == "promote_dtype", option


def test_how_a_variance_is_computed_is_no_option() -> None:
    for option in HOW_A_VARIANCE_IS_COMPUTED:
        with pytest.raises(TypeError, match=f"expected an option of this layer, got '{option}'"):
            RBN(**{option: False})


ADDED = {
    "RBN": ("center_weight", "scale_weight", "scale_bias"),
    "IEBN": ("scale_weight", "scale_bias"),
    "BNET": ("kernel", "bias"),
}
"""What a layer has beside gamma and beta; BNET's are those of its convolution."""


def added(name: str, parameters: Any) -> Any:
    return parameters["conv"] if name == "BNET" else parameters


@pytest.mark.meeting(
    "`nn.with_partitioning` and `nnx.with_partitioning`",
    "every parameter is partitioned as its initializer says",
    "RBN(scale_bias_init=nn.with_partitioning(nn.initializers.ones, ('model',)))",
)
@pytest.mark.parametrize("name", ADDED)
def test_every_parameter_is_partitioned_by_its_initializer(name: str) -> None:
    x, names = normal(2, 4, 4, 3), ADDED[name]
    affine = () if name == "BNET" else ("scale", "bias")
    axes = {own: (None, None, None, "model") if own == "kernel" else ("model",) for own in (*names, *affine)}
    start = nn.initializers.constant(0.3)

    inits = {f"{own}_init": nn.with_partitioning(start, axes[own]) for own in axes}
    layer = getattr(rbn_flax, name)(**inits)
    variables = layer.init(jax.random.key(0), x, use_running_average=True)
    specs = added(name, nn.get_partition_spec(variables)["params"])
    assert {own: tuple(specs[own]) for own in axes} == axes
    run = functools.partial(layer.apply, use_running_average=True)
    close(run(variables, x), run(nn.unbox(variables), x), 0)
    plain = getattr(rbn_flax, name)(**{f"{own}_init": start for own in axes})
    close(plain.init(jax.random.key(0), x, use_running_average=True), nn.unbox(variables), 0)

    with jax.make_mesh((1,), ("model",)):
        inits = {f"{own}_init": nnx.with_partitioning(start, axes[own]) for own in axes}
        module = getattr(rbn_flax.nnx, name)(3, rngs=nnx.Rngs(0), **inits)
        close(module(x, use_running_average=True), run(variables, x), 0)
        of_nnx = added(name, nnx.to_pure_dict(nnx.get_partition_spec(nnx.state(module, nnx.Param))))
    assert {own: tuple(of_nnx[own]) for own in axes} == axes


def test_initializers_are_there_for_the_parameters_that_are_there() -> None:
    """A constant start takes no random key: a network's other layers start as beside a BatchNorm."""
    draw = nn.initializers.normal()
    x = normal(2, 4, 4, 3)
    params = RBN(center_weight_init=draw, scaling=None).init(jax.random.key(0), x, use_running_average=True)[
        "params"
    ]
    assert params.keys() == {"scale", "bias", "center_weight"}
    assert len(np.unique(params["center_weight"])) == 3

    def after(kind: Any, **options: Any) -> Any:
        rngs = nnx.Rngs(0)
        layer = kind(3, rngs=rngs, **options)
        return layer, rngs.params()

    _, due = after(nnx.BatchNorm)
    assert after(rbn_flax.nnx.RBN)[1] == due
    assert after(rbn_flax.nnx.IEBN)[1] == due
    layer, following = after(rbn_flax.nnx.RBN, center_weight_init=draw)
    assert following != due
    assert len(np.unique(layer.center_weight[...])) == 3
    assert after(rbn_flax.nnx.RBN, centering=None, center_weight_init=draw)[1] == due


@pytest.mark.parametrize("preserve", [True, False])
def test_initializers_of_a_conversion_are_the_new_layers(preserve: bool) -> None:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return nn.BatchNorm(use_running_average=True, name="norm")(x)

    x = normal(2, 4, 4, 3)
    variables = Net().init(jax.random.key(0), x)
    halves = nn.initializers.constant(0.5)
    boxed = nn.with_partitioning(halves, ("model",))
    convert = functools.partial(rbn_flax.convert, Net(), variables, preserve=preserve)
    model, new, _ = convert(scale_bias_init=boxed)
    assert new["params"]["norm"]["scale_bias"].names == ("model",)
    close(nn.unbox(new)["params"]["norm"]["scale_bias"], np.full(3, 0.5))
    close(new["params"]["norm"]["scale_weight"], np.zeros(3))
    if preserve:
        close(model.apply(new, x), Net().apply(variables, x))
    table = convert(center_weight_init=halves)[2]
    holder = nnx.List([nnx.BatchNorm(3, rngs=nnx.Rngs(0))])
    also = rbn_flax.nnx.convert(holder, preserve=preserve, center_weight_init=halves)
    for row in (*table.rows, *also.rows):
        assert row.status == ("kept" if preserve else "replaced")
        assert row.detail.startswith("center_weight would not start at 0" if preserve else "RBN")
    if not preserve:
        close(holder[0].center_weight[...], np.full(3, 0.5))
