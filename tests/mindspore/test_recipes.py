"""Statistics anew, freezing, groups of parameters and folding, for our layers and BatchNorm alike."""

import os

os.environ.setdefault("GLOG_v", "4")

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

import rbn_core
from rbn.backends.mindspore import (
    BNET,
    IEBN,
    RBN,
    fold,
    freeze,
    from_numpy,
    network,
    parameter_groups,
    to_numpy,
    update_rbn,
)

rng = np.random.default_rng(0)
BATCHES = [Tensor(rng.normal(1, 2, (size, 3, 6, 6)).astype(np.float32)) for size in (4, 2, 5)]
NORMS = {
    "BatchNorm2d": nn.BatchNorm2d,
    "RBN": RBN,
    "plain": lambda channels: RBN(channels, fused=False),
    "IEBN": IEBN,
    "BNET": BNET,
}


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def convolution(**options):
    return nn.Conv2d(3, 4, 3, weight_init="normal", **options)


def spoil(layer, calibrated=True):
    """Give a layer numbers none of which is special; with or without a calibration at work."""
    state = to_numpy(layer)
    for name, value in state.items():
        inert = not calibrated and name in ("center_weight", "scale_weight", "conv_weight")
        if value.ndim and not inert:
            state[name] = (value + rng.uniform(0.1, 0.5, value.shape)).astype(np.float32)
    if "conv_weight" in state and not calibrated:
        state["conv_weight"] = np.zeros_like(state["conv_weight"])
        state["conv_weight"][:, 0, 1, 1] = [0.5, -1, 2, 0.7]
    from_numpy(layer, state)
    return layer


# ---- update_rbn ----


@pytest.mark.parametrize("name", NORMS)
def test_statistics_become_the_mean_over_the_batches(name) -> None:
    first, layer = convolution(), spoil(NORMS[name](4))
    momentum = layer.momentum
    model = nn.SequentialCell(first, layer).set_train(False)
    before = to_numpy(layer)
    update_rbn(model, [(BATCHES[0], "labels"), [BATCHES[1]], BATCHES[2]])
    maps = [first(x).asnumpy().astype(np.float64) for x in BATCHES]
    if name in ("RBN", "plain"):  # E and Var are of X_cm
        weight = before["center_weight"].reshape(-1, 1, 1)
        maps = [x + weight * x.mean((2, 3), keepdims=True) for x in maps]
    found = to_numpy(layer)
    for key, due in (
        ("running_mean", np.mean([x.mean((0, 2, 3)) for x in maps], 0)),
        ("running_var", np.mean([x.var((0, 2, 3), ddof=1) for x in maps], 0)),
    ):
        np.testing.assert_allclose(found[key], due, rtol=2e-5, atol=1e-6)
    assert found.get("num_batches_tracked", 3) == 3
    for key in before.keys() - {"running_mean", "running_var", "num_batches_tracked"}:
        np.testing.assert_array_equal(found[key], before[key])
    assert layer.momentum == momentum
    assert not model.training
    assert not layer.training


def test_modes_and_the_context_are_what_they_were() -> None:
    model = nn.SequentialCell(convolution(), RBN(4), nn.Dropout(p=0.5)).set_train(False)
    model[2].set_train()
    ms.set_context(mode=ms.GRAPH_MODE)
    try:
        update_rbn(model, BATCHES)
        assert ms.get_context("mode") == ms.GRAPH_MODE
    finally:
        ms.set_context(mode=ms.PYNATIVE_MODE)
    assert [cell.training for _, cell in model.cells_and_names()] == [False, False, False, True]


def test_a_shared_layer_counts_every_call() -> None:
    found = []
    for layer in (nn.BatchNorm2d(3), IEBN(3)):
        twice = Twice(layer)
        update_rbn(twice, BATCHES[:1])
        found.append(to_numpy(layer)["running_mean"])
    x = BATCHES[0].asnumpy()
    np.testing.assert_allclose(found[0], (x.mean((0, 2, 3)) + (3 * x).mean((0, 2, 3))) / 2, rtol=1e-5)
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5)


class Twice(nn.Cell):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def construct(self, x):
        return self.layer(x) + self.layer(3 * x)


def test_a_frozen_layer_keeps_its_statistics() -> None:
    frozen, other = spoil(RBN(3)), IEBN(3)
    freeze(frozen)
    before = to_numpy(frozen)
    update_rbn(nn.SequentialCell(frozen, other), BATCHES)
    np.testing.assert_equal(to_numpy(frozen), before)
    assert to_numpy(other)["num_batches_tracked"] == 3


@pytest.mark.parametrize(
    ("model", "batches", "text"),
    [
        (nn.SequentialCell(nn.ReLU()), BATCHES, "got none in a SequentialCell"),
        (nn.SequentialCell(RBN(3)), [], "expected one batch or more"),
        (nn.SequentialCell(nn.BatchNorm2d(3, momentum=1.0)), BATCHES, "momentum=1.0"),
    ],
)
def test_what_takes_no_statistics_is_refused(model, batches, text) -> None:
    with pytest.raises(rbn_core.RBNValueError, match=text):
        update_rbn(model, batches)


def test_nothing_changes_where_a_layer_did_not_run_or_failed() -> None:
    class Idle(nn.Cell):
        def __init__(self):
            super().__init__()
            self.used, self.idle = spoil(RBN(3)), spoil(nn.BatchNorm2d(3))

        def construct(self, x):
            return self.used(x)

    model = Idle()
    before = to_numpy(model)
    with pytest.raises(rbn_core.RBNValueError, match="every layer to run, got no run of idle"):
        update_rbn(model, BATCHES)
    with pytest.raises(rbn_core.RBNValueError, match="expected 3 channels"):
        update_rbn(model, [BATCHES[0], Tensor(np.ones((2, 5, 4, 4), np.float32))])
    np.testing.assert_equal(to_numpy(model), before)
    assert model.used.momentum == 0.9


# ---- freeze ----


@pytest.mark.parametrize("mode", [ms.PYNATIVE_MODE, ms.GRAPH_MODE], ids=["pynative", "graph"])
def test_frozen_layers_evaluate_in_training_and_get_no_gradient(mode) -> None:
    ms.set_context(mode=mode)
    try:
        for name in ("BatchNorm2d", "RBN") if mode == ms.GRAPH_MODE else NORMS:
            layer = spoil(NORMS[name](3))
            model = nn.SequentialCell(layer).set_train()
            model(BATCHES[0])  # a graph in training is compiled
            due = model.set_train(False)(BATCHES[0]).asnumpy()
            table = freeze(model)
            before = to_numpy(layer)
            assert [(row.name, row.status) for row in table.rows] == [("0", "frozen")]
            np.testing.assert_array_equal(model.set_train()(BATCHES[0]).asnumpy(), due)
            np.testing.assert_equal(to_numpy(layer), before)
            assert model.trainable_params() == []
    finally:
        ms.set_context(mode=ms.PYNATIVE_MODE)


def test_a_model_without_norm_layers_cannot_be_frozen() -> None:
    with pytest.raises(rbn_core.RBNValueError, match="got none in a Dense"):
        freeze(nn.Dense(2, 2))


# ---- parameter_groups ----


def of_all_kinds():
    return nn.SequentialCell(
        convolution(has_bias=True), RBN(4), nn.BatchNorm2d(4), IEBN(4), BNET(4), nn.Flatten(), nn.Dense(4, 2)
    )


def test_kernels_decay_and_biases_and_norm_layers_do_not() -> None:
    model = of_all_kinds()
    decaying, others = parameter_groups(model, 0.5)
    assert [parameter.name for parameter in decaying["params"]] == ["0.weight", "6.weight"]
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.5, 0.0)
    assert len(others["params"]) == 2 + 5 + 2 + 4 + 2
    before = to_numpy(model)
    optimizer = nn.SGD(parameter_groups(model, 0.5), learning_rate=1.0)
    optimizer(tuple(ops.zeros_like(parameter) for parameter in optimizer.parameters))
    changed = {name for name, value in to_numpy(model).items() if not np.array_equal(value, before[name])}
    assert changed == {"0.weight", "6.weight"}


def test_an_empty_group_is_left_out() -> None:
    (group,) = parameter_groups(RBN(3), 0.5)
    assert group["weight_decay"] == 0
    nn.SGD([group], learning_rate=1.0)


def test_the_usual_filter_by_names_decays_what_only_our_layers_have() -> None:
    decayed = [
        p.name for p in of_all_kinds().trainable_params() if "beta" not in p.name and "gamma" not in p.name
    ]
    ours = {"1.center_weight", "1.scale_weight", "1.scale_bias", "3.scale_weight", "3.scale_bias"}
    assert ours | {"4.conv.weight", "4.conv.bias"} <= set(decayed)


# ---- fold ----


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", NORMS)
def test_a_norm_layer_is_folded_into_the_convolution_before_it(name, bias) -> None:
    layer = spoil(NORMS[name](4), calibrated=False)
    model = nn.SequentialCell(convolution(has_bias=bias), layer, nn.ReLU()).set_train(False)
    before, due = to_numpy(model), model(BATCHES[0]).asnumpy()
    folded = fold(model)
    assert [type(cell).__name__ for cell in folded] == ["Conv2d", "Identity", "ReLU"]
    found = folded(BATCHES[0]).asnumpy()
    assert np.abs(found - due).max() <= 1e-5 * np.abs(due).max()
    np.testing.assert_equal(to_numpy(model), before)
    np.testing.assert_array_equal(model(BATCHES[0]).asnumpy(), due)


@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_layer_takes_one_too_and_the_copy_runs_as_a_graph_and_keeps_its_names(bias) -> None:
    dense = nn.Dense(5, 4, weight_init="normal", has_bias=bias)
    model = nn.SequentialCell(dense, spoil(RBN(4), calibrated=False)).set_train(False)
    x = Tensor(rng.normal(size=(6, 5)).astype(np.float32))
    due = model(x).asnumpy()
    folded = fold(model)
    assert set(folded.parameters_dict()) == {"0.weight", "0.bias"}
    np.testing.assert_allclose(ms.jit(folded)(x).asnumpy(), due, rtol=1e-4, atol=1e-5)


class Residual(nn.Cell):
    def __init__(self, layer):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 3, 3, weight_init="normal"), layer

    def construct(self, x):
        return x + self.bn1(self.conv1(x))


def test_pairs_are_named_where_a_model_does_not_tell_them() -> None:
    model = Residual(spoil(RBN(3), calibrated=False)).set_train(False)
    due = model(BATCHES[0]).asnumpy()
    with pytest.raises(rbn_core.RBNValueError, match="found no pair that is certain in a Residual"):
        fold(model)
    found = fold(model, [("conv1", "bn1")])(BATCHES[0]).asnumpy()
    assert np.abs(found - due).max() <= 1e-5 * np.abs(due).max()


def test_our_networks_tell_their_pairs() -> None:
    model = network("resnet18", "rbn").set_train(False)
    for _, cell in model.cells_and_names():
        if isinstance(cell, RBN | nn.BatchNorm2d):
            spoil(cell, calibrated=False)
    x = Tensor(rng.normal(size=(2, 3, 32, 32)).astype(np.float32))
    due = model(x).asnumpy()
    folded = fold(model)
    assert not [cell for _, cell in folded.cells_and_names() if isinstance(cell, RBN | nn.BatchNorm2d)]
    assert np.abs(folded(x).asnumpy() - due).max() <= 2e-4 * np.abs(due).max()


def test_every_layer_with_a_calibration_at_work_is_listed() -> None:
    model = nn.SequentialCell(convolution(), spoil(RBN(4)), nn.BatchNorm2d(4), spoil(IEBN(4)), spoil(BNET(4)))
    before = to_numpy(model)
    with pytest.raises(rbn_core.RBNValueError, match=r"got 3 that are not: 1 center_weight.*3 scale.*4 conv"):
        fold(model)
    np.testing.assert_equal(to_numpy(model), before)


@pytest.mark.parametrize(
    ("pairs", "text"),
    [
        ([("0", "none")], "expected dotted paths"),
        ([("2", "1")], "'2', a ReLU"),
        ([("3", "1")], "behind '3'"),
        ([("0", "1"), ("0", "4")], "in one pair"),
    ],
)
def test_pairs_that_do_not_fit_are_refused(pairs, text) -> None:
    model = nn.SequentialCell(convolution(), RBN(4), nn.ReLU(), nn.Conv2d(4, 3, 1), RBN(4))
    with pytest.raises(rbn_core.RBNValueError, match=text):
        fold(model, pairs)


def test_batch_norms_of_mint_are_refused() -> None:
    model = nn.SequentialCell(ms.mint.nn.BatchNorm2d(3))
    for recipe in (lambda: freeze(model), lambda: fold(model), lambda: update_rbn(model, BATCHES)):
        with pytest.raises(rbn_core.RBNTypeError, match=r"mint\.nn: 0"):
            recipe()
