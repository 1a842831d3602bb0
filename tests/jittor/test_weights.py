"""The state of any Jittor model, laid out by the kind of layer that owns it."""

import numpy as np
import pytest

from rbn.backends.jittor import BNET, IEBN, RBN, describe, from_numpy, to_numpy

# After the backend, which prepares what Jittor reads at its import.
# isort: split
import jittor as jt
import ml_dtypes
from jittor import Module, nn

from rbn_core import RBNValueError
from rbn_core.config import Config


class Mixture(Module):
    """One layer of every kind, and variables of its own."""

    def __init__(self):
        self.conv = nn.Conv(4, 6, (3, 2), groups=2)
        self.line = nn.Conv1d(2, 3, 3)
        self.volume = nn.Conv3d(1, 2, 2, bias=False)
        self.up = nn.ConvTranspose(4, 2, 3)
        self.blocks = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.BatchNorm(2, affine=False))
        self.words = nn.Embedding(5, 3)
        self.group = nn.GroupNorm(2, 4)
        self.layer = nn.LayerNorm((2, 3))
        self.instance = nn.InstanceNorm(3)
        self.norm = RBN(3)
        self.spread = BNET(2, spatial_dims=1)
        self.scale = jt.array([1.5])
        self.table = jt.array(np.arange(3), dtype="int32").stop_grad()
        self._hidden = jt.array([1.0])


SHAPES = {
    "scale": (1,),
    "table": (3,),
    "conv.weight": (6, 2, 3, 2),
    "conv.bias": (6,),
    "line.weight": (3, 2, 3),
    "line.bias": (3,),
    "volume.weight": (2, 1, 2, 2, 2),
    "up.weight": (4, 2, 3, 3),
    "up.bias": (2,),
    "blocks.0.weight": (2, 3),
    "blocks.0.bias": (2,),
    "blocks.2.running_mean": (2,),
    "blocks.2.running_var": (2,),
    "words.weight": (5, 3),
    "group.gamma": (4,),
    "group.beta": (4,),
    "layer.gamma": (2, 3),
    "layer.beta": (2, 3),
    "instance.gamma": (3,),
    "instance.beta": (3,),
    "norm.gamma": (3,),
    "norm.beta": (3,),
    "norm.center_weight": (3,),
    "norm.scale_weight": (3,),
    "norm.scale_bias": (3,),
    "norm.running_mean": (3,),
    "norm.running_var": (3,),
    "norm.num_batches_tracked": (),
    "spread.running_mean": (2,),
    "spread.running_var": (2,),
    "spread.num_batches_tracked": (),
    "spread.conv_weight": (2, 1, 3),
    "spread.conv_bias": (2,),
}


def test_every_kind_of_layer_has_canonical_names_and_shapes():
    state = to_numpy(Mixture())
    assert {name: value.shape for name, value in state.items()} == SHAPES


def test_a_state_comes_back_from_another_model():
    model, other = Mixture(), Mixture()
    state = {name: np.asarray(value + 1, value.dtype) for name, value in to_numpy(model).items()}
    table = from_numpy(other, state)
    assert {row.status for row in table.rows} == {"matched"}
    assert {row.name for row in table.rows} == state.keys()
    for name, value in to_numpy(other).items():
        np.testing.assert_array_equal(value, state[name])
        assert value.dtype == state[name].dtype
    np.testing.assert_array_equal(other.line.weight.numpy(), state["line.weight"])
    np.testing.assert_array_equal(other.table.numpy(), [1, 2, 3])


def test_the_kinds_of_the_layers_are_described():
    described = describe(Mixture())
    assert {path: layer["kind"] for path, layer in described.items()} == {
        "": "other",
        "conv": "convolution",
        "line": "convolution",
        "volume": "convolution",
        "up": "transposed_convolution",
        "blocks.0": "linear",
        "blocks.2": "norm",
        "words": "embedding",
        "group": "norm",
        "layer": "norm",
        "instance": "norm",
        "norm": "norm",
        "spread": "norm",
    }
    assert described["blocks.2"] == {"kind": "norm"}


@pytest.mark.parametrize(
    ("layer", "config"),
    [
        (
            RBN(3, 0.1, 0.25, centering=None, running_var="biased"),
            Config(3, 0.1, 0.75, None, running_var="biased"),
        ),
        (RBN(3, affine=False, momentum=None), Config(3, momentum=None, gamma=False, beta=False)),
        (IEBN(2, momentum=0.5), Config.iebn(2, momentum=0.5)),
        (BNET(2, 5, spatial_dims=3), Config.bnet(2, 5, 3)),
    ],
)
def test_the_options_of_our_layers_are_described(layer, config):
    described = describe(layer)[""]
    assert described.pop("kind") == "norm"
    assert Config(**described) == config


def test_a_layer_alone_has_the_empty_path():
    assert set(to_numpy(nn.BatchNorm(2))) == {"gamma", "beta", "running_mean", "running_var"}
    assert set(to_numpy(nn.Linear(2, 2))) == {"weight", "bias"}
    assert {"gamma", "scale_bias"} < set(to_numpy(RBN(2)))


class Tied(Module):
    """One layer under two names, and one variable in two layers."""

    def __init__(self):
        self.first = nn.Linear(2, 2)
        self.second = self.first
        self.third = nn.Linear(2, 2)
        self.third.weight = self.first.weight


def test_what_is_shared_is_under_all_its_names_and_stays_shared():
    model = Tied()
    state = to_numpy(model)
    assert set(state) == {
        f"{layer}.{name}" for layer in ("first", "second", "third") for name in ("weight", "bias")
    }
    # Jittor's own state_dict has the first name alone.
    lone = {name: value + 1 for name, value in state.items() if name in model.state_dict()}
    assert "second.weight" not in lone
    from_numpy(model, lone)
    np.testing.assert_array_equal(model.third.weight.numpy(), state["first.weight"] + 1)
    assert model.third.weight is model.second.weight
    with pytest.raises(RBNValueError, match=r"missing third\.bias\. Nothing"):
        from_numpy(model, {name: value for name, value in lone.items() if name != "third.bias"})


def test_names_are_translated_and_what_is_left_out_is_listed():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    given = {"module.0.weight": np.full((2, 2), 5.0), "module.9.bias": np.zeros(2)}
    before = to_numpy(model)
    with pytest.raises(RBNValueError, match=r"missing 0\.bias; missing 1\.weight.*unexpected 9\.bias"):
        from_numpy(model, given, rename={r"module\.(.*)": r"\1"})
    np.testing.assert_array_equal(to_numpy(model)["0.weight"], before["0.weight"])
    table = from_numpy(model, given, rename={r"module\.(.*)": r"\1"}, strict=False)
    statuses = {row.name: row.status for row in table.rows}
    assert statuses["0.weight"] == "renamed"
    assert (statuses["1.bias"], statuses["9.bias"]) == ("missing", "unexpected")
    np.testing.assert_array_equal(model[0].weight.numpy(), np.full((2, 2), 5.0))
    np.testing.assert_array_equal(to_numpy(model)["1.bias"], before["1.bias"])


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_the_dtype_stays_the_models(dtype):
    model = nn.Linear(2, 2)
    getattr(model, dtype)()
    value = np.array([[1.5, -2.0], [0.25, 3.0]])
    from_numpy(model, {"weight": value, "bias": value[0].astype(ml_dtypes.bfloat16)})
    assert model.weight.dtype == model.bias.dtype == dtype
    state = to_numpy(model)
    assert state["weight"].dtype == ("float64" if dtype == "float64" else "float32")
    np.testing.assert_array_equal(state["weight"], value)
    np.testing.assert_array_equal(state["bias"], value[0])


def test_a_counter_may_lack_and_may_be_too_many():
    layer, norm = RBN(2), nn.BatchNorm(2)
    layer.num_batches_tracked.update(jt.array([7], dtype="int32"))
    state = {name: value for name, value in to_numpy(layer).items() if name != "num_batches_tracked"}
    from_numpy(layer, state)
    assert to_numpy(layer)["num_batches_tracked"] == 7
    from_numpy(norm, to_numpy(norm) | {"num_batches_tracked": np.array(3)})


def test_what_is_trained_and_what_is_frozen_stays_so():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm(2))
    model[0].weight.stop_grad()
    with jt.no_grad():  # which freezes every new variable
        from_numpy(model, to_numpy(model))
    frozen = {name for name, var in model.named_parameters() if var.is_stop_grad()}
    assert frozen == {"0.weight", "1.running_mean", "1.running_var"}


def test_what_comes_is_a_copy():
    model = nn.Linear(2, 2, bias=False)
    state = to_numpy(model)
    from_numpy(model, state)
    before = state["weight"].copy()
    state["weight"][:] = 9
    to_numpy(model)["weight"][:] = 9
    np.testing.assert_array_equal(model.weight.numpy(), before)


def test_integers_and_floats_do_not_mix():
    model = Mixture()
    state = to_numpy(model)
    with pytest.raises(RBNValueError, match=r"table of dtype float32; words\.weight of dtype int64"):
        from_numpy(
            model,
            state | {"table": np.zeros(3, "float32"), "words.weight": np.zeros((5, 3), int)},
        )
