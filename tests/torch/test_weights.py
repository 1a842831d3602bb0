"""Any PyTorch model's arrays under canonical names, and back."""

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import nn

from rbn.backends.torch import BNET, IEBN, RBN, describe, from_numpy, network, to_numpy
from rbn.porting import port
from rbn_core import RBNTypeError, RBNValueError, weights
from rbn_core.architectures import network as describe_network
from rbn_core.execution import initial_state
from rbn_core.names import to_own


class Mixed(nn.Module):
    """Every kind of layer that is laid out by its kind, and what belongs to none."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), RBN(4), BNET(4))
        self.line = nn.Conv1d(4, 8, 3, groups=2)
        self.up = nn.ConvTranspose2d(4, 6, 2, groups=2)
        self.words = nn.Embedding(10, 4)
        self.bags = nn.EmbeddingBag(10, 4)
        self.head = nn.Linear(4, 2)
        self.norms = nn.ModuleList(
            [nn.LayerNorm((4, 3)), nn.GroupNorm(2, 4), nn.InstanceNorm1d(4, affine=True)]
        )
        self.act = nn.PReLU(4)
        self.scale = nn.Parameter(torch.randn(2, 3))
        self.register_buffer("index", torch.arange(5))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("scratch", torch.ones(2), persistent=False)


KINDS = {
    "": "other",
    "stem.0": "convolution",
    "stem.1": "norm",
    "stem.2": "norm",
    "stem.3": "norm",
    "line": "convolution",
    "up": "transposed_convolution",
    "words": "embedding",
    "bags": "embedding",
    "head": "linear",
    "norms.0": "norm",
    "norms.1": "norm",
    "norms.2": "norm",
    "act": "other",
}


def same(state, other):
    assert state.keys() == other.keys()
    for name in state:
        np.testing.assert_array_equal(state[name], other[name], err_msg=name)


def test_arrays_are_called_after_the_kind_of_layer_that_owns_them():
    model = Mixed()
    state = to_numpy(model)
    assert {"stem.0.weight", "stem.1.gamma", "stem.2.scale_bias", "stem.3.conv_weight"} <= state.keys()
    assert {"up.weight", "words.weight", "norms.0.gamma", "norms.2.beta", "act.weight"} <= state.keys()
    assert {"scale", "index", "mask", "stem.1.num_batches_tracked"} <= state.keys()
    assert "scratch" not in state
    assert {path: layer["kind"] for path, layer in describe(model).items()} == KINDS
    same(to_own("torch", state, KINDS), {k: v.numpy() for k, v in model.state_dict().items()})


def test_a_model_takes_its_state_again_whatever_it_is_made_of():
    source, target = Mixed(), Mixed()
    nn.init.normal_(source.stem[3].conv.weight)
    source.index.mul_(3)
    table = from_numpy(target, to_numpy(source))
    assert {row.status for row in table.rows} == {"matched"}
    assert len(table.rows) == len(source.state_dict())
    for name, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], value), name


def test_integers_do_not_take_other_numbers():
    state = to_numpy(Mixed())
    with pytest.raises(RBNValueError, match="index of dtype float64"):
        from_numpy(Mixed(), state | {"index": np.ones(5)})


@pytest.mark.parametrize(
    "layer", [RBN(3), RBN(3, affine=False, centering=None), IEBN(3), BNET(3, spatial_dims=1)]
)
def test_a_layer_alone_has_no_path(layer):
    assert describe(layer)[""]["layer"] == type(layer).__name__
    other = type(layer)(3, spatial_dims=1) if isinstance(layer, BNET) else None
    if other is not None:
        from_numpy(other, to_numpy(layer))
        same(to_numpy(other), to_numpy(layer))
        assert to_numpy(layer)["conv_weight"].shape == (3, 1, 3)
    assert all("." not in name for name in to_numpy(layer))


@pytest.mark.parametrize("norm", ["bn", "rbn", "iebn", {"layer": "bnet", "kernel_size": 5}])
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_networks_describe_themselves_as_their_descriptions_do(name, norm):
    described = describe_network(name, norm)
    model = network(name, norm)
    assert describe(model) == described.layers()
    assert {k: v.shape for k, v in to_numpy(model).items()} == described.state_shapes()


def test_options_that_differ_from_the_defaults_are_described():
    options = {"momentum": 0.3, "eps": 1e-3, "scaling": "spatial_std", "restrict": "hard_sigmoid"}
    options |= {"running_var": "biased", "beta": False}
    described = describe_network("resnet18", {"layer": "rbn", **options})
    assert describe(network("resnet18", {"layer": "rbn", **options})) == described.layers()
    assert describe(RBN(3, momentum=None))[""]["momentum"] is None


def test_half_precision_goes_out_as_float32_and_comes_in_as_the_models():
    model = nn.Sequential(nn.Linear(2, 2), RBN(2)).bfloat16()
    state = to_numpy(model)
    assert {v.dtype.name for v in state.values()} == {"float32", "int64"}
    from_numpy(model, {k: v + 1 for k, v in state.items()})
    assert model[0].weight.dtype == torch.bfloat16
    assert model[1].running_var.dtype == torch.float32
    assert torch.equal(model[1].weight, torch.full((2,), 2.0, dtype=torch.bfloat16))


def test_arrays_of_any_dtype_and_layout_come_in():
    layer = nn.Linear(2, 3).double()
    weight = np.arange(6.0).reshape(2, 3)
    for array in (
        weight.T,
        weight.T[::-1][::-1],
        weight.T.astype(">f4"),
        weight.T.astype(ml_dtypes.bfloat16),
        weight.T.astype(np.float16),
        np.lib.stride_tricks.as_strided(weight.T, writeable=False),
    ):
        from_numpy(layer, {"weight": array, "bias": np.flip(np.arange(3.0))})
        np.testing.assert_array_equal(layer.weight.detach().numpy(), weight.T)
        np.testing.assert_array_equal(layer.bias.detach().numpy(), [2, 1, 0])
    with pytest.raises(RBNValueError, match="expected arrays of numbers, got dtype"):
        from_numpy(layer, {"weight": np.zeros((3, 2), "V8"), "bias": np.zeros(3)})


def test_a_parameter_under_two_names_is_there_twice_and_one():
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2), "c": RBN(2)})
    model["b"].weight = model["a"].weight
    model["d"] = model["c"]
    state = to_numpy(model)
    assert {"a.weight", "b.weight", "c.gamma", "d.gamma"} <= state.keys()
    from_numpy(model, {name: array + 1 for name, array in state.items()})
    assert model["b"].weight is model["a"].weight
    np.testing.assert_array_equal(model["c"].weight.detach().numpy(), [2, 2])
    np.testing.assert_array_equal(to_numpy(model)["b.weight"], state["a.weight"] + 1)


def test_names_are_those_inside_of_wrappers():
    model = nn.Sequential(nn.Linear(2, 2))
    wrapped = torch.compile(nn.DataParallel(model), backend="eager")
    assert (
        to_numpy(wrapped).keys()
        == {"0.weight", "0.bias"}
        == {f"{p}.weight" for p in describe(wrapped)} | {"0.bias"}
    )
    from_numpy(wrapped, {"0.weight": np.ones((2, 2)), "0.bias": np.ones(2)})
    assert torch.equal(model[0].bias, torch.ones(2))


def test_names_are_renamed_and_the_rest_may_be_left_out():
    model = nn.Sequential(nn.Linear(2, 3))
    state = {"backbone.fc.weight": np.ones((3, 2)), "backbone.fc.bias": np.ones(4), "extra": np.ones(1)}
    rename = {r"backbone\.fc\.(.*)": r"0.\1"}
    before = to_numpy(model)
    with pytest.raises(
        RBNValueError, match=r"unexpected extra; 0\.bias of shape \(4,\) where \(3,\) is needed"
    ):
        from_numpy(model, state, rename=rename)
    same(to_numpy(model), before)
    table = from_numpy(model, state, rename=rename, strict=False)
    assert {row.name: row.status for row in table.rows} == {
        "0.weight": "renamed",
        "0.bias": "wrong shape",
        "extra": "unexpected",
    }
    np.testing.assert_array_equal(to_numpy(model)["0.weight"], np.ones((3, 2)))
    np.testing.assert_array_equal(to_numpy(model)["0.bias"], before["0.bias"])


def test_a_counter_of_batches_may_lack_and_stays():
    layer = RBN(2)
    layer(torch.randn(3, 2))
    state = to_numpy(layer)
    del state["num_batches_tracked"]
    from_numpy(layer, state)
    assert layer.num_batches_tracked == 1


def test_gradients_flags_and_objects_stay():
    model = nn.Linear(2, 2)
    model.weight.requires_grad_(False)
    weight, bias = model.weight, model.bias
    from_numpy(model, {"weight": np.ones((2, 2)), "bias": np.ones(2)})
    assert model.weight is weight
    assert model.bias is bias
    assert (weight.requires_grad, bias.requires_grad) == (False, True)


def test_a_model_without_values_is_refused():
    with pytest.raises(RBNValueError, match=r"parameters have their shapes, got a lazy 0\.weight"):
        to_numpy(nn.Sequential(nn.LazyLinear(3)))
    with pytest.raises(RBNValueError, match=r"parameters have their shapes, got a lazy weight"):
        from_numpy(nn.LazyConv2d(3, 3), {})
    with pytest.raises(RBNValueError, match="parameters have values, got weight on the meta device"):
        to_numpy(nn.Linear(2, 2, device="meta"))


def test_a_described_networks_initial_state_loads():
    model = network("cifar_resnet164_basic", "iebn", 4)
    state = initial_state(model.description, 3)
    from_numpy(model, state)
    same(to_numpy(model), state)


def test_unknown_names_are_the_common_error():
    with pytest.raises(RBNTypeError):
        network("resnet18", {"layer": "rbn", "scale": 3})


def test_a_canonical_file_loads_into_the_model_that_it_came_from(tmp_path):
    """Also where a name and a shape do not tell the layer."""

    def build(seed):
        torch.manual_seed(seed)
        layers = [nn.PReLU(4), nn.LayerNorm(4), nn.LayerNorm((4, 3)), nn.GroupNorm(2, 4), nn.RMSNorm(4)]
        layers += [nn.InstanceNorm2d(4, affine=True), nn.BatchNorm1d(4, track_running_stats=False)]
        layers += [nn.Embedding(4, 3), nn.LSTM(2, 3), nn.Bilinear(2, 3, 4), nn.BatchNorm2d(3), RBN(3)]
        net = nn.Sequential(*layers)
        net.register_buffer("mask", torch.triu(torch.full((3, 3), -torch.inf), 1))
        for parameter in net.parameters():
            nn.init.normal_(parameter)
        return net

    net, other = build(0), build(1)
    torch.save(net.state_dict(), tmp_path / "a.pth")
    port(tmp_path / "a.pth", tmp_path / "a.safetensors")
    from_numpy(other, weights.load(tmp_path / "a.safetensors"))
    for name, value in net.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name
