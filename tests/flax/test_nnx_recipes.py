"""What recipes that look for BatchNorm do, with NNX models."""

import copy
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from rbn.backends.flax.nnx import BNET, IEBN, RBN, fold, freeze, parameter_groups, to_numpy, update_rbn
from rbn_core import RBNTypeError, RBNValueError

NAMES = ("bn", "rbn", "iebn", "bnet")


class Net(nnx.Module):
    """Every layer behind a convolution, and a BatchNorm behind a linear layer."""

    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.convs = nnx.List([nnx.Conv(3, 3, (3, 3), use_bias=bool(i % 2), rngs=rngs) for i in range(4)])
        self.bn, self.rbn = nnx.BatchNorm(3, rngs=rngs), RBN(3, rngs=rngs)
        self.iebn, self.bnet = IEBN(3, rngs=rngs), BNET(3, rngs=rngs)
        self.dropout = nnx.Dropout(0.0, rngs=rngs)
        self.head, self.last = nnx.Linear(3, 5, rngs=rngs), nnx.BatchNorm(5, rngs=rngs)
        rng = np.random.default_rng(0)
        for _, variable in nnx.iter_graph(self):
            if isinstance(variable, nnx.Param | nnx.BatchStat) and variable[...].ndim:
                variable[...] = jnp.asarray(rng.uniform(0.5, 1, variable[...].shape), jnp.float32)

    def __call__(self, x: Any) -> Any:
        for conv, name in zip(self.convs, NAMES, strict=True):
            x = nnx.relu(getattr(self, name)(conv(x)))
        return self.last(self.head(self.dropout(x).mean((1, 2))))


def inert() -> Net:
    model = Net()
    for weight in (model.rbn.center_weight, model.rbn.scale_weight, model.iebn.scale_weight):
        weight[...] = jnp.zeros(3)
    kernel = model.bnet.conv.kernel
    kernel[...] = jnp.zeros_like(kernel[...]).at[1, 1].set(kernel[...][1, 1])
    model.eval()
    return model


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def close(actual: Any, expected: Any, tolerance: float = 1e-4) -> None:
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), actual, expected
    )


def test_statistics_taken_anew_are_the_mean_over_batches() -> None:
    model, batches = Net(), [normal(4, 6, 6, 3, seed=seed) + seed for seed in range(2)]
    model.eval()
    each = []
    for batch in batches:
        alone = nnx.clone(model)
        for name in (*NAMES, "last"):
            getattr(alone, name).momentum = 0.0
        alone.train()
        alone(batch)
        each.append(to_numpy(alone))
    before = to_numpy(model)
    update_rbn(model, [(batch, "label") for batch in batches])
    for name, value in to_numpy(model).items():
        if name.endswith("num_batches_tracked"):
            assert value == 2
        elif "running" in name:
            close(value, (each[0][name] + each[1][name]) / 2)
        else:
            close(value, before[name], 0)
    assert (model.bn.momentum, model.rbn.momentum) == (0.99, 0.9)
    assert model.rbn.use_running_average
    assert model.dropout.deterministic
    with pytest.raises(RBNValueError, match="got 0 batches"):
        update_rbn(model, [])
    with pytest.raises(
        RBNValueError, match="update_rbn: expected RBN, IEBN, BNET or BatchNorm layers, got none"
    ):
        update_rbn(model.head, [batches[0]])
    with pytest.raises(RBNTypeError, match="expected an NNX module"):
        freeze(nnx.state(model))


def test_a_frozen_model_evaluates_and_keeps_its_parameters() -> None:
    model, x = Net(), normal(4, 6, 6, 3)
    model.eval()
    due = model(x)
    before = to_numpy(model)
    assert len(freeze(model).rows) == 5
    assert len(freeze(model).rows) == 5  # once more changes nothing
    model.train()
    close(model(x), due, 0)
    assert isinstance(model.rbn, RBN)
    optimizer = nnx.Optimizer(model, optax.adamw(0.1), wrt=nnx.Param)
    gradients = nnx.grad(lambda model: jnp.sin(model(x)).sum())(model)
    assert set(gradients) == {"convs", "head"}
    optimizer.update(model, gradients)
    for name, value in to_numpy(model).items():
        moved = bool(np.any(value != before[name]))
        assert moved == name.startswith(("convs", "head")), name
    graphdef, state = nnx.split(model)
    close(nnx.merge(graphdef, state)(x), model(x), 0)
    with pytest.raises(RBNValueError, match="0 layers"):
        update_rbn(model, [x])


def test_only_kernels_decay() -> None:
    model = Net()
    before = to_numpy(model)
    optimizer = nnx.Optimizer(
        model, optax.adamw(0.1, weight_decay=0.5, mask=parameter_groups(model)), wrt=nnx.Param
    )
    still = jax.tree.map(jnp.zeros_like, nnx.state(model, nnx.Param))
    optimizer.update(model, still)
    after = to_numpy(model)
    decayed = {name for name, value in after.items() if np.any(value != before[name])}
    assert decayed == {f"convs.{i}.weight" for i in range(4)} | {"head.weight"}


def test_a_frozen_model_is_copied_and_pickled_as_one() -> None:
    # Flax pickles none of its convolutions.
    model, x = nnx.List([getattr(Net(), name) for name in NAMES[:3]]), normal(4, 6, 6, 3)
    freeze(model)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), nnx.clone(model)):
        again.train()
        for found, due in zip(again, model, strict=True):
            close(found(x), due(x))
            assert type(found) is type(due)
        assert not jax.tree.leaves(nnx.state(again, nnx.Param))


def test_statistics_stay_after_an_error() -> None:
    def failing() -> Any:
        yield normal(4, 6, 6, 3)
        raise RuntimeError("stop here")

    model = Net()
    model.rbn.eval()
    before = to_numpy(model)
    with pytest.raises(RuntimeError, match="stop here"):
        update_rbn(model, failing())
    np.testing.assert_equal(to_numpy(model), before)
    assert (model.bn.momentum, model.rbn.momentum) == (0.99, 0.9)
    assert (model.bn.use_running_average, model.rbn.use_running_average) == (False, True)


def test_folding_keeps_a_stack_of_layers() -> None:
    class Stacked(nnx.Module):
        def __init__(self) -> None:
            self.conv = nnx.Conv(3, 3, (1, 1), rngs=nnx.Rngs(0))
            self.norm = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
            make = nnx.vmap(lambda rngs: RBN(3, rngs=rngs))
            self.several = nnx.split_rngs(splits=2)(make)(nnx.Rngs(0))

        def __call__(self, x: Any) -> Any:
            x = self.norm(self.conv(x))
            return nnx.vmap(lambda norm, x: norm(x), in_axes=(0, None))(self.several, x)

    model, x = Stacked(), normal(4, 6, 6, 3)
    model(x)
    folded, table = fold(model, x)
    assert {row.name: (row.status, row.detail) for row in table.rows} == {
        "norm": ("folded", "into conv"),
        "several": ("kept", "stands for several layers"),
    }
    model.eval()
    close(folded(x), model(x))


def test_folding_leaves_what_a_model_gives() -> None:
    model, x = inert(), normal(4, 6, 6, 3)
    before = to_numpy(model)
    folded, table = fold(model, x)
    assert [row.status for row in table.rows] == ["folded"] * 5, str(table)
    close(folded(x), model(x))
    close(to_numpy(model), before, 0)
    assert type(model.rbn) is RBN
    assert {"running_mean", "running_var"}.isdisjoint(name.rpartition(".")[2] for name in to_numpy(folded))


def test_folding_refuses_what_is_calibrated_and_keeps_what_it_cannot_fold() -> None:
    model, x = Net(), normal(4, 6, 6, 3)
    with pytest.raises(RBNValueError, match="got 3 that are not: rbn, iebn, bnet"):
        fold(model, x)
    assert type(model.rbn) is RBN
    alone = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    folded, table = fold(nnx.Sequential(alone, nnx.relu), x)
    assert [row.detail for row in table.rows] == ["no convolution or linear layer before it"]
    close(folded(x), nnx.relu(alone(x, use_running_average=True)), 0)
