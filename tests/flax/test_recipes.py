"""What recipes that look for BatchNorm do, with linen models."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

from rbn.backends.flax import (
    BNET,
    IEBN,
    RBN,
    convert,
    fold,
    freeze,
    parameter_groups,
    to_numpy,
    update_rbn,
)
from rbn_core import RBNTypeError, RBNValueError

STATS = ["batch_stats"]


class Net(nn.Module):
    """Every layer behind a convolution; one of them twice in a batch."""

    twice: bool = False

    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        norms = [
            nn.BatchNorm(not train, name="bn"),
            RBN(not train, name="rbn"),
            IEBN(not train, name="iebn"),
            BNET(not train, name="bnet"),
        ]
        for index, norm in enumerate(norms):
            x = nn.Conv(4, (3, 3), use_bias=index % 2 == 0, name=f"conv{index}")(x)
            x = nn.relu(norm(x))
            if self.twice:
                x = norm(x)
        x = x.mean((1, 2))
        return nn.BatchNorm(not train, name="last")(nn.Dense(5, name="head")(x))


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def variables_of(model: Any, x: jax.Array) -> Any:
    rng = np.random.default_rng(0)
    fresh = model.init(jax.random.key(0), x, train=False)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.uniform(0.5, 1.0, leaf.shape), leaf.dtype) if leaf.ndim else leaf, fresh
    )


def inert(variables: Any) -> Any:
    flat = traverse_util.flatten_dict(variables)
    for path, leaf in flat.items():
        if path[-1] in ("center_weight", "scale_weight"):
            flat[path] = jnp.zeros_like(leaf)
        if path[-3:] == ("bnet", "conv", "kernel"):
            flat[path] = jnp.zeros_like(leaf).at[1, 1].set(leaf[1, 1])
    return traverse_util.unflatten_dict(flat)


def close(actual: Any, expected: Any, tolerance: float = 1e-4) -> None:
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), actual, expected
    )


def test_statistics_taken_anew_are_the_mean_over_batches() -> None:
    model, batches = Net(), [normal(4, 6, 6, 3, seed=seed) + seed for seed in range(3)]
    variables = variables_of(model, batches[0])
    found = update_rbn(model, variables, [(batch, "label") for batch in batches], train=True)
    # Without momentum a batch leaves its own statistics: a step's are what it took from 0.1 or 0.01 of them.
    each = []
    for batch in batches:
        stats = model.apply(variables, batch, train=True, mutable=STATS)[1]["batch_stats"]
        alone = {}
        for name, before in variables["batch_stats"].items():
            weight = 0.99 if name in ("bn", "last") else 0.9
            alone[name] = {
                key: (stats[name][key] - weight * before[key]) / (1 - weight) for key in ("mean", "var")
            }
        each.append(alone)
    due = jax.tree.map(lambda *leaves: np.mean(leaves, 0), *each)
    for name, expected in due.items():
        close({key: found["batch_stats"][name][key] for key in expected}, expected, 2e-3)
    assert found["batch_stats"]["rbn"]["num_batches_tracked"] == 3
    assert jax.tree.structure(found) == jax.tree.structure(variables)
    close(found["params"], variables["params"], 0)


def test_a_layer_that_is_called_twice_averages_its_calls() -> None:
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            norm = RBN(use_running_average=False, running_var="biased", centering=None, scaling=None)
            return norm(5 * x + 3) + norm(x)

    x = normal(4, 6, 6, 3)
    variables = Twice().init(jax.random.key(0), x)
    (stats,) = update_rbn(Twice(), variables, [x])["batch_stats"].values()
    close(stats["mean"], (jnp.mean(5 * x + 3, (0, 1, 2)) + x.mean((0, 1, 2))) / 2)


def test_statistics_are_not_taken_where_nothing_trains() -> None:
    model, x = Net(), normal(4, 6, 6, 3)
    variables = variables_of(model, x)
    for batches, call in (([x], {"train": False}), ([], {"train": True})):
        with pytest.raises(RBNValueError, match="update_rbn: expected batches and a model that trains"):
            update_rbn(model, variables, batches, **call)


@pytest.mark.meeting(
    "fine-tuning with `optax.multi_transform`",
    "works with `freeze`",
    "model, labels, table = freeze(model, variables)",
    packages=("optax",),
)
def test_a_frozen_model_evaluates_and_its_labels_hold_its_parameters() -> None:
    model, x = Net(), normal(4, 6, 6, 3)
    variables = variables_of(model, x)
    frozen, labels, table = freeze(model, variables)
    assert {row.name for row in table.rows} == {"bn", "rbn", "iebn", "bnet", "last"}
    y, stats = frozen.apply(variables, x, train=True, mutable=STATS)
    close(y, model.apply(variables, x, train=False), 1e-6)
    close(stats["batch_stats"], variables["batch_stats"], 0)

    tx = optax.multi_transform({"trained": optax.adamw(0.1), "frozen": optax.set_to_zero()}, labels)
    params = variables["params"]
    gradients = jax.grad(lambda p: frozen.apply(variables | {"params": p}, x, train=True).sum())(params)
    after = optax.apply_updates(params, tx.update(gradients, tx.init(params), params)[0])
    for name in params:
        moved = max(
            float(abs(a - b).max())
            for a, b in zip(*map(jax.tree.leaves, (params[name], after[name])), strict=True)
        )
        assert (moved == 0) == (name in ("bn", "rbn", "iebn", "bnet", "last")), name
    with pytest.raises(RBNValueError, match="freeze: expected RBN"):
        freeze(nn.Dense(3), nn.Dense(3).init(jax.random.key(0), x))


def test_only_kernels_decay() -> None:
    model, x = Net(), normal(4, 6, 6, 3)
    variables = variables_of(model, x)
    mask = parameter_groups(variables)
    decaying = {path for path, decays in traverse_util.flatten_dict(mask).items() if decays}
    assert decaying == {(f"conv{i}", "kernel") for i in range(4)} | {("head", "kernel")}
    params = variables["params"]
    still = jax.tree.map(jnp.zeros_like, params)
    forms: Any = (
        optax.adamw(0.1, weight_decay=0.5, mask=mask),
        optax.multi_transform({True: optax.adamw(0.1, weight_decay=0.5), False: optax.adam(0.1)}, mask),
    )
    for tx in forms:
        updates = traverse_util.flatten_dict(tx.update(still, tx.init(params), params)[0])
        assert {path for path, update in updates.items() if np.any(update)} == decaying
    with pytest.raises(RBNTypeError, match="expected all variables"):
        parameter_groups(params)


@pytest.mark.meeting(
    "masks for weight decay by name",
    "decay w_m, w_v and w_b: use `parameter_groups`",
    "optax.adamw(rate, mask=parameter_groups(variables))",
    packages=("optax",),
)
def test_a_mask_by_the_names_of_batch_norm_decays_what_the_layers_add() -> None:
    x = normal(4, 6, 6, 3)
    params = RBN().init(jax.random.key(0), x, use_running_average=True)["params"]
    mask = traverse_util.path_aware_map(lambda path, _: path[-1] != "scale" and path[-1] != "bias", params)
    assert mask == {
        "scale": False,
        "bias": False,
        "center_weight": True,
        "scale_weight": True,
        "scale_bias": True,
    }


def test_folding_leaves_what_a_model_gives() -> None:
    model, x = Net(), normal(4, 6, 6, 3)
    variables = inert(variables_of(model, x))
    folded, less, table = fold(model, variables, x, train=False)
    assert [row.status for row in table.rows] == ["folded"] * 5, str(table)
    assert less["params"]["rbn"].keys() == {"bias"}
    assert "batch_stats" not in less
    close(jax.jit(lambda x: folded.apply(less, x, train=False))(x), model.apply(variables, x, train=False))
    with pytest.raises(RBNValueError, match="one in training"):
        fold(model, variables, x, train=True)


def test_folding_refuses_what_is_calibrated_and_lists_it() -> None:
    model, x = Net(), normal(4, 6, 6, 3)
    variables = variables_of(model, x)
    with pytest.raises(RBNValueError, match="got 3 that are not: rbn, iebn, bnet"):
        fold(model, variables, x, train=False)
    with pytest.raises(RBNValueError, match="fold: expected RBN, IEBN, BNET or BatchNorm layers, got none"):
        fold(nn.Dense(3), nn.Dense(3).init(jax.random.key(0), x), x)


class Branching(nn.Module):
    """Where a norm cannot be folded: none before it, used twice, taken elsewhere, two on one convolution."""

    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        x = nn.relu(nn.BatchNorm(not train, name="first")(x))
        conv = nn.Conv(3, (1, 1), name="twice")
        x = nn.BatchNorm(not train, name="behind_twice")(conv(conv(x)))
        y = nn.Conv(3, (1, 1), name="residual")(x)
        x = nn.BatchNorm(not train, name="behind_residual")(y) + y
        y = nn.Conv(3, (1, 1), name="shared")(x)
        x = nn.BatchNorm(not train, name="one")(y) * nn.BatchNorm(not train, name="other")(y)
        return nn.BatchNorm(not train, axis=1, name="rows")(nn.Conv(3, (1, 1))(x))


def test_folding_keeps_what_is_not_only_behind_one_convolution() -> None:
    model, x = Branching(), normal(4, 6, 6, 3)
    variables = variables_of(model, x)
    folded, less, table = fold(model, variables, x, train=False)
    assert {row.name: row.detail for row in table.rows} == {
        "first": "no convolution or linear layer before it",
        "behind_twice": "called more than once",
        "behind_residual": "its input is used elsewhere, too",
        "one": "its input is used elsewhere, too",
        "other": "its input is used elsewhere, too",
        "rows": "its channels are not on the last axis",
    }
    close(folded.apply(less, x, train=False), model.apply(variables, x, train=False), 0)


def test_a_converted_model_is_a_model() -> None:
    model, x = Branching(), normal(4, 6, 6, 3)
    variables = variables_of(model, x)
    converted, new, _ = convert(model, variables, preserve=True, where="(behind_.*|first)")
    found = update_rbn(converted, new, [x], train=True)
    close(to_numpy(found)["first.running_mean"], x.mean((0, 1, 2)))
    frozen, _, _ = freeze(converted, new)
    close(frozen.apply(new, x, train=True), converted.apply(new, x, train=False))
    folded, less, table = fold(converted, new, x, train=False)
    assert [row.status for row in table.rows] == ["kept"] * 6
    close(folded.apply(less, x, train=False), model.apply(variables, x, train=False))


def test_layers_that_a_model_is_given_are_converted_and_folded() -> None:
    model = nn.Sequential([nn.Conv(3, (1, 1)), nn.BatchNorm(use_running_average=True)])
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 3))
    variables = model.init(jax.random.key(1), x)
    due = model.apply(variables, x)
    converted, new, _ = convert(model, variables)
    np.testing.assert_allclose(converted.apply(new, x), due * jax.nn.sigmoid(1.0), rtol=1e-5, atol=1e-5)
    for each, stored in ((model, variables), convert(model, variables, preserve=True)[:2]):
        folded, smaller, _ = fold(each, stored, x)
        np.testing.assert_allclose(folded.apply(smaller, x), due, rtol=1e-5, atol=1e-5)
