"""LazyRBN, LazyIEBN and LazyBNET: the number of channels comes with the first input."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from rbn.backends.torch import (
    BNET,
    IEBN,
    RBN,
    LazyBNET,
    LazyIEBN,
    LazyRBN,
    convert,
    convert_sync_rbn,
    to_numpy,
)
from rbn_core import RBNError, RBNTypeError, RBNValueError

pytestmark = pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")  # PyTorch's own word

KINDS = pytest.mark.parametrize(
    ("lazy", "kind"), [(LazyRBN, RBN), (LazyIEBN, IEBN), (LazyBNET, BNET)], ids=["RBN", "IEBN", "BNET"]
)


def images(channels=4, *, dims=2):
    return torch.randn(3, channels, *(5,) * dims, generator=torch.Generator().manual_seed(0))


def trained(kind, **options):
    """A layer with a calibration at work, and statistics of its own."""
    torch.manual_seed(1)
    layer = kind(4, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter) / 2)
    layer(images() * 2 + 1)
    return layer


def assert_same(layer, other):
    """Two layers have the same options, and the same numbers in them."""
    assert type(layer) is type(other)
    assert repr(layer) == repr(other)
    found, expected = layer.state_dict(), other.state_dict()
    assert list(found) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0)
    known = {name for name in vars(other) if not name.startswith("_")}
    assert {name for name in vars(layer) if not name.startswith("_")} == known
    assert {name: getattr(layer, name) for name in known} == {name: getattr(other, name) for name in known}
    assert not layer._forward_pre_hooks
    assert not layer._load_state_dict_pre_hooks


@pytest.mark.meeting(
    "lazy layers, as `torch.nn.LazyBatchNorm2d`",
    "`LazyRBN`, `LazyIEBN` and `LazyBNET` become the layer with their first input",
    "nn.Sequential(nn.LazyConv2d(8, 3), LazyRBN())",
)
@KINDS
@pytest.mark.parametrize(
    "options",
    [
        {"eps": 1e-3, "momentum": 0.3, "running_var": "biased", "fused": False},
        {"track_running_stats": False, "dtype": torch.float64},
        {"momentum": None, "sync": True},
    ],
)
def test_the_first_input_makes_the_layer(lazy, kind, options):
    torch.manual_seed(2)
    layer = lazy(**options)
    assert isinstance(layer, kind | nn.BatchNorm2d | LazyModuleMixin)
    assert layer.num_features == 0
    x = images().to(options.get("dtype"))
    torch.manual_seed(2)
    y = layer.eval()(x) if "sync" in options else layer(x)
    torch.manual_seed(2)
    other = kind(4, **options)
    expected = other.eval()(x) if "sync" in options else other(x)
    torch.testing.assert_close(y, expected, rtol=0, atol=0)
    assert_same(layer, other)
    if kind is BNET:
        assert repr(layer.conv) == repr(other.conv)


def test_the_options_of_each_layer_are_kept():
    layer = LazyRBN(centering="channel_std", scaling=None, restrict="hard_sigmoid", affine=False)
    layer(images(6, dims=1))
    assert_same(layer.eval(), copy.deepcopy(layer))
    assert (layer.num_features, layer.centering, layer.scaling) == (6, "channel_std", None)
    assert (layer.restrict, layer.weight, layer.scale_weight) == ("hard_sigmoid", None, None)
    layer = LazyRBN(bias=False)
    layer(images(6, dims=3))
    assert layer.bias is None
    layer = LazyBNET(kernel_size=5, spatial_dims=1)
    layer(images(6, dims=1))
    assert layer.conv.weight.shape == (6, 1, 5)
    assert type(layer.conv) is nn.Conv1d


@KINDS
def test_a_state_dict_is_loaded_before_the_first_input(lazy, kind):
    source = trained(kind)
    layer = lazy()
    assert layer.load_state_dict(source.state_dict()).missing_keys == []
    x = images()
    torch.testing.assert_close(layer.eval()(x), source.eval()(x), rtol=0, atol=0)
    assert_same(layer, source)
    wrong = lazy()
    wrong.load_state_dict(source.state_dict())
    with pytest.raises(RBNValueError, match=r"expected 4 channels .* got an input of shape \(3, 5, 5, 5\)"):
        wrong(images(5))


@KINDS
def test_a_lazy_state_is_stored_and_copied(lazy, kind):
    layer = lazy(eps=1e-3)
    other = lazy(eps=1e-3)
    other.load_state_dict(layer.state_dict())
    for twin in (other, pickle.loads(pickle.dumps(layer))):
        assert type(twin) is lazy
        twin(images())
        assert type(twin) is kind
        assert twin.epsilon == 1e-3


@KINDS
def test_dtype_and_device_are_given_before(lazy, kind):
    layer = lazy().double()
    layer(images().double())
    assert {p.dtype for p in layer.parameters()} == {layer.running_var.dtype} == {torch.float64}
    layer = lazy().half().eval()
    layer(images().half())
    assert {p.dtype for p in layer.parameters()} == {torch.float16}
    assert layer.running_var.dtype == torch.float32
    layer = lazy(device="meta")
    layer(images().to("meta"))
    assert {p.device.type for p in layer.parameters()} == {"meta"}


@KINDS
def test_parameters_are_the_same_objects_afterwards(lazy, kind):
    model = nn.Sequential(nn.LazyConv2d(4, 3), lazy())
    parameters = list(model.parameters())
    model(images())
    assert [id(p) for p in model.parameters()] == [id(p) for p in parameters]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(images()).square().mean().backward()
    optimizer.step()
    assert model[1].running_mean.any()


@pytest.mark.parametrize("given", [(8,), ()])
def test_a_number_of_channels_is_refused(given):
    options = {} if given else {"num_features": 8}
    with pytest.raises(RBNTypeError, match=r"LazyRBN: expected options by name, .* got \(.*8\)\. .* RBN\."):
        LazyRBN(*given, **options)
    with pytest.raises(RBNTypeError, match="expected an option of this layer, got 'scalling'"):
        LazyRBN(scalling=None)


@pytest.mark.parametrize("x", [torch.randn(3), images().int(), images(dims=1)])
def test_a_refused_input_leaves_the_layer_lazy(x):
    layer = LazyBNET()
    with pytest.raises(RBNError, match="BNET: expected"):
        layer(x)
    assert type(layer) is LazyBNET
    assert layer.num_features == 0
    assert layer(images(6)).shape == (3, 6, 5, 5)


@KINDS
def test_what_goes_over_models_takes_or_refuses_a_lazy_layer(lazy, kind):
    model = nn.Sequential(lazy())
    model.apply(lambda module: module.reset_parameters() if hasattr(module, "reset_parameters") else None)
    assert type(model[0]) is lazy
    (row,) = convert(model, "bn").rows
    assert (row.status, row.detail) == ("kept", "has not seen an input yet: run the model once")
    with pytest.raises(RBNTypeError, match="where a tool reads eps"):
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert convert_sync_rbn(model)[0].sync
    with pytest.raises(RBNValueError, match=r"expected a model whose .*Run the model once on an example"):
        to_numpy(model)
