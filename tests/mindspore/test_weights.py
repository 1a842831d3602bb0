"""The state of any MindSpore model to and from canonical arrays."""

import os

os.environ.setdefault("GLOG_v", "4")

import mindspore as ms
import ml_dtypes
import numpy as np
import pytest
from mindspore import Parameter, Tensor, mint, nn, ops

from rbn.backends.mindspore import BNET, IEBN, RBN, describe, from_numpy, to_numpy
from rbn_core import RBNValueError
from rbn_core.config import Config
from rbn_core.names import to_own

rng = np.random.default_rng(0)


class Everything(nn.Cell):
    """A layer of every kind, a list, a parameter of its own, and one layer under two names."""

    def __init__(self):
        super().__init__()
        self.conv1d = nn.Conv1d(2, 4, 3, has_bias=True)
        self.conv2d = nn.SequentialCell(nn.Conv2d(2, 4, 3, group=2), mint.nn.Conv2d(2, 4, 3))
        self.conv3d = nn.Conv3d(2, 4, (1, 2, 3))
        self.up1d = nn.Conv1dTranspose(2, 4, 3)
        self.up2d = nn.CellList([nn.Conv2dTranspose(4, 6, 3, group=2), mint.nn.ConvTranspose2d(2, 4, 3)])
        self.up3d = nn.Conv3dTranspose(2, 4, 3)
        self.dense = nn.Dense(3, 5)
        self.linear = mint.nn.Linear(3, 5, bias=False)
        self.words = nn.Embedding(7, 3)
        self.more_words = mint.nn.Embedding(7, 3)
        self.norms = nn.CellList(
            [
                nn.BatchNorm1d(3),
                nn.BatchNorm2d(3),
                nn.BatchNorm3d(3),
                nn.LayerNorm((2, 3)),
                nn.GroupNorm(1, 3),
            ]
        )
        self.mint_norm = mint.nn.BatchNorm2d(3)
        self.mint_layer_norm = mint.nn.LayerNorm(3)
        self.rbn = RBN(3, momentum=0.7, scaling="spatial_std")
        self.iebn = IEBN(3, eps=0.1)
        self.bnet = BNET(3, 5, spatial_dims=1)
        self.recurrent = nn.GRU(2, 3)
        self.scale = Parameter(Tensor(np.ones(3, np.float32)), name="called otherwise")
        self.table = Parameter(Tensor([1, 2, 3], ms.int32), name="table", requires_grad=False)
        self.again = self.dense


SHAPES = {
    "conv1d.weight": (4, 2, 3),
    "conv1d.bias": (4,),
    "conv2d.0.weight": (4, 1, 3, 3),
    "conv2d.1.weight": (4, 2, 3, 3),
    "conv3d.weight": (4, 2, 1, 2, 3),
    "up1d.weight": (2, 4, 3),
    "up2d.0.weight": (4, 3, 3, 3),
    "up2d.1.weight": (2, 4, 3, 3),
    "up3d.weight": (2, 4, 3, 3, 3),
    "dense.weight": (5, 3),
    "linear.weight": (5, 3),
    "words.weight": (7, 3),
    "more_words.weight": (7, 3),
    "norms.0.gamma": (3,),
    "norms.1.running_mean": (3,),
    "norms.2.running_var": (3,),
    "norms.2.beta": (3,),
    "norms.3.gamma": (2, 3),
    "norms.4.beta": (3,),
    "mint_norm.gamma": (3,),
    "mint_norm.running_var": (3,),
    "mint_norm.num_batches_tracked": (),
    "mint_layer_norm.beta": (3,),
    "rbn.center_weight": (3,),
    "rbn.num_batches_tracked": (),
    "iebn.scale_bias": (3,),
    "bnet.conv_weight": (3, 1, 5),
    "recurrent.weight_ih_l0": (9, 2),
    "scale": (3,),
    "table": (3,),
    "again.bias": (5,),
}


def altered(state):
    """Other numbers, of the same shapes and dtypes."""
    return {
        name: rng.integers(9, size=value.shape).astype(value.dtype)
        if value.dtype.kind == "i"
        else rng.normal(size=value.shape).astype(value.dtype)
        for name, value in state.items()
    }


def alike(state):
    """The same arrays under both names of a shared layer."""
    return state | {name.replace("again", "dense"): v for name, v in state.items() if "again" in name}


def assert_equal(state, expected):
    assert state.keys() == expected.keys()
    for name, value in state.items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)


def test_a_model_of_every_layer_has_canonical_names_and_shapes():
    state = to_numpy(Everything())
    assert {name: state[name].shape for name in SHAPES} == SHAPES
    own = {name.rpartition(".")[2] for name in state}
    assert own.isdisjoint({"moving_mean", "moving_variance", "embedding_table"})
    assert not any("bn2d" in name for name in state)


def test_arrays_lie_as_mindspore_has_them():
    model = Everything()
    state = to_numpy(model)
    np.testing.assert_array_equal(state["conv1d.weight"], model.conv1d.weight.asnumpy()[:, :, 0])
    np.testing.assert_array_equal(state["dense.weight"], model.dense.weight.asnumpy())
    np.testing.assert_array_equal(state["up2d.0.weight"], model.up2d[0].weight.asnumpy())


@pytest.mark.parametrize("one_name", [False, True], ids=["both names", "one name"])
def test_a_state_goes_into_another_model_and_comes_out_the_same(one_name):
    state = alike(altered(to_numpy(Everything())))
    given = {name: value for name, value in state.items() if not (one_name and name.startswith("again"))}
    model = Everything()
    table = from_numpy(model, given)
    assert_equal(to_numpy(model), state)
    assert {row.status for row in table.rows} == {"matched"}
    assert len(table.rows) == len(given)


def test_different_arrays_for_one_parameter_are_refused():
    model = Everything()
    before = to_numpy(model)
    with pytest.raises(RBNValueError, match=r"one array for dense.bias and again.bias.*differ"):
        from_numpy(model, before | {"again.bias": before["dense.bias"] + 1})
    assert_equal(to_numpy(model), before)


def test_what_owns_the_arrays_is_described():
    model = Everything()
    known = describe(model)
    kinds = dict.fromkeys(("conv1d", "conv2d.0", "conv2d.1", "conv3d"), "convolution")
    kinds |= dict.fromkeys(("up1d", "up2d.0", "up2d.1", "up3d"), "transposed_convolution")
    kinds |= dict.fromkeys(("dense", "again", "linear"), "linear")
    kinds |= dict.fromkeys(("words", "more_words"), "embedding")
    kinds |= dict.fromkeys((*(f"norms.{i}" for i in range(5)), "mint_norm", "mint_layer_norm"), "norm")
    kinds |= dict.fromkeys(("recurrent", ""), "other")
    assert {path: known[path] for path in kinds} == {path: {"kind": kind} for path, kind in kinds.items()}
    assert known["rbn"] == {"kind": "norm"} | vars(Config(3, momentum=0.7, scaling="spatial_std"))
    assert known["iebn"] == {"kind": "norm"} | vars(Config.iebn(3, eps=0.1))
    assert known["bnet"] == {"kind": "norm"} | vars(Config.bnet(3, 5, 1))
    assert known.keys() == {*kinds, "rbn", "iebn", "bnet"}


def test_own_names_are_those_of_a_checkpoint(tmp_path):
    model = nn.SequentialCell(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Embedding(3, 2), RBN(4), BNET(4))
    ms.save_checkpoint(model, str(tmp_path / "model.ckpt"))
    kinds = {path: layer["kind"] for path, layer in describe(model).items()}
    own = to_own("mindspore", to_numpy(model), kinds)
    saved = ms.load_checkpoint(str(tmp_path / "model.ckpt"))
    assert_equal(own, {name: parameter.asnumpy() for name, parameter in saved.items()})


def test_a_layer_alone_has_the_empty_path_and_its_own_names_do_not_matter():
    norm = nn.BatchNorm2d(3)
    assert norm.moving_mean.name == "mean"
    assert to_numpy(norm).keys() == {"gamma", "beta", "running_mean", "running_var"}
    assert describe(norm) == {"": {"kind": "norm"}}
    from_numpy(norm, {name: value + 2 for name, value in to_numpy(norm).items()})
    np.testing.assert_array_equal(norm.moving_variance.asnumpy(), [3, 3, 3])


def test_names_can_be_renamed_and_all_faults_are_listed():
    model = nn.SequentialCell(nn.Dense(2, 3), nn.BatchNorm1d(3))
    before = to_numpy(model)
    state = {f"module.{name}": value + 1 for name, value in before.items()}
    with pytest.raises(RBNValueError, match=r"missing 0.weight; .*unexpected module.0.weight"):
        from_numpy(model, state)
    assert_equal(to_numpy(model), before)
    table = from_numpy(model, state, rename={r"module\.(.*)": r"\1"})
    assert {row.status for row in table.rows} == {"renamed"}
    assert_equal(to_numpy(model), {name: value + 1 for name, value in before.items()})


def test_what_fits_is_loaded_when_not_strict():
    model = nn.SequentialCell(nn.Dense(2, 3), nn.BatchNorm1d(3))
    before = to_numpy(model)
    table = from_numpy(model, {"0.bias": np.full(3, 5.0), "0.weight": np.ones((2, 3))}, strict=False)
    assert {row.name: row.status for row in table.rows}["0.weight"] == "wrong shape"
    assert_equal(to_numpy(model), before | {"0.bias": np.full(3, 5)})


def test_counters_are_optional_both_ways():
    counting, other = nn.SequentialCell(RBN(3)), nn.SequentialCell(nn.BatchNorm2d(3))
    from_numpy(counting, {"0.num_batches_tracked": np.array(4)}, strict=False)
    state = {name: value for name, value in to_numpy(counting).items() if "weight" not in name}
    del state["0.scale_bias"]
    from_numpy(other, state)
    del state["0.num_batches_tracked"]
    from_numpy(
        counting,
        state | {f"0.{name}": np.ones(3) for name in ("center_weight", "scale_weight", "scale_bias")},
    )
    assert counting[0].num_batches_tracked == 4


@pytest.mark.parametrize("dtype", [ms.float16, ms.bfloat16, ms.float64])
@pytest.mark.parametrize("given", [np.float64, np.float16, ml_dtypes.bfloat16])
def test_the_dtype_stays_the_models(dtype, given):
    model = nn.Dense(2, 3, dtype=dtype)
    from_numpy(model, {"weight": np.full((3, 2), 1.5, given), "bias": np.zeros(3, given)})
    assert model.weight.dtype == dtype
    assert to_numpy(model)["weight"].dtype == (np.float64 if dtype == ms.float64 else np.float32)
    np.testing.assert_array_equal(to_numpy(model)["weight"], 1.5)


def test_arrays_of_any_layout_are_copied():
    model = nn.Dense(2, 3)
    weight = np.ones((2, 3), np.float32).T[::-1]
    from_numpy(model, {"weight": weight, "bias": np.zeros(3)})
    weight[:] = 7
    to_numpy(model)["weight"][:] = 8
    np.testing.assert_array_equal(model.weight.asnumpy(), 1)


def test_a_compiled_model_sees_what_is_loaded():
    model = nn.Dense(2, 2)
    compiled, x = ms.jit(model), ops.ones((1, 2))
    compiled(x)
    from_numpy(model, {"weight": np.eye(2), "bias": np.array([5.0, 6.0])})
    np.testing.assert_array_equal(compiled(x).asnumpy(), [[6, 7]])


def test_a_network_in_mixed_precision_keeps_its_names():
    model = nn.SequentialCell(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    expected = to_numpy(model)
    wrapped = ms.amp.auto_mixed_precision(model, "O2")
    assert_equal(to_numpy(wrapped), expected)


def test_a_cell_may_hold_the_one_that_holds_it():
    outer, inner = nn.Cell(), nn.Dense(2, 3)
    outer.insert_child_to_cell("inner", inner)
    inner.insert_child_to_cell("outer", outer)
    assert to_numpy(outer).keys() == {"inner.weight", "inner.bias"}


def test_a_compiled_training_step_goes_on_from_what_is_loaded():
    cell = nn.SequentialCell(nn.Dense(3, 4), RBN(4))
    cell.set_train()
    optimizer = nn.SGD(cell.trainable_params(), 0.1)
    x, target = (Tensor(rng.normal(size=shape), ms.float32) for shape in ((5, 3), (5, 4)))

    def loss_of(x):
        return ((cell(x) - target) ** 2).mean()

    gradient = ms.value_and_grad(loss_of, None, optimizer.parameters)

    @ms.jit
    def step(x):
        loss, gradients = gradient(x)
        optimizer(gradients)
        return loss

    start = to_numpy(cell)
    losses = [float(step(x)) for _ in range(3)]
    from_numpy(cell, start)
    assert [float(step(x)) for _ in range(3)] == pytest.approx(losses)
    assert losses[0] > losses[1] > losses[2]
