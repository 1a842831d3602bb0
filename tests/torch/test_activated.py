"""Norm layers with an activation: what timm's EfficientNet, MobileNetV3, RegNet and DenseNet are made of."""

import pytest
import torch
from torch import nn

from rbn.backends.torch import BNET, IEBN, RBN, BNETAct2d, IEBNAct2d, RBNAct2d, convert, fold, to_numpy
from rbn.backends.torch.surgery import HAS_ACTIVATION
from rbn_core import RBNTypeError
from rbn_core.matching import Row

KINDS = {"rbn": (RBN, RBNAct2d), "iebn": (IEBN, IEBNAct2d), "bnet": (BNET, BNETAct2d)}
MODELS = {"efficientnet_b0": 49, "mobilenetv3_small_100": 34, "regnetx_002": 44, "densenet121": 121}
"""How many norm layers of a model of timm's have an activation in them, or are plain."""


def trained(layer):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter) / 2)
    return layer


@pytest.mark.parametrize("to", KINDS)
@pytest.mark.parametrize("training", [True, False])
def test_the_activation_follows_the_layer(to, training):
    plain, activated = KINDS[to]
    layer = trained(activated(4, act_layer=nn.Hardswish, drop_layer=lambda: nn.Dropout(0.0))).train(training)
    inner = plain(4).train(training)
    inner.load_state_dict(layer.state_dict())
    x = torch.randn(3, 4, 5, 5, requires_grad=True)
    y, expected = layer(x), nn.functional.hardswish(inner(x))
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    found, due = (torch.autograd.grad(each, x, dy) for each in (y, expected))
    torch.testing.assert_close(found, due)
    assert layer.state_dict().keys() == inner.state_dict().keys()


def test_the_activation_can_be_left_out_and_chosen():
    assert type(RBNAct2d(4, apply_act=False).act) is nn.Identity
    assert type(RBNAct2d(4, act_layer=None).act) is nn.Identity
    assert RBNAct2d(4).act.inplace
    assert type(RBNAct2d(4, act_layer=nn.GELU, act_kwargs={"approximate": "tanh"}).act) is nn.GELU
    assert RBNAct2d(4, scaling="channel_std").scaling == "channel_std"
    with pytest.raises(RBNTypeError, match="expected an option of this layer, got 'scalling'"):
        RBNAct2d(4, scalling=None)


def test_torch_fx_sees_the_layer_and_its_activation_as_one_node():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), RBNAct2d(4)).eval()
    graph = torch.fx.symbolic_trace(model)
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(graph(x), model(x))
    torch.testing.assert_close(fold(model)(x), model(x))
    assert len(graph.graph.nodes) == 4


@pytest.mark.meeting(
    "timm's models with `BatchNormAct2d`: EfficientNet, MobileNetV3, RegNet, DenseNet",
    "works by `convert`, and by `norm_layer=`",
    "convert(timm.create_model('efficientnet_b0'))",
    packages=("timm",),
)
@pytest.mark.parametrize("name", MODELS)
def test_models_of_timm_are_converted_whole_and_back(name, timm):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected, before = model(x), to_numpy(model)
        table = convert(model, "rbn", preserve=True)
        assert {row.status for row in table.rows} == {"replaced"}
        assert len(table.rows) == MODELS[name]
        close(model(x), expected)
        table = convert(model, "bn")
        assert {row.status for row in table.rows} == {"replaced"}
        close(model(x), expected)
    assert to_numpy(model).keys() == before.keys()
    assert not any(isinstance(module, RBN) for module in model.modules())


def close(found, expected):
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_timm_builds_a_model_of_the_layers(timm):
    model = timm.create_model("regnetx_002", norm_layer=lambda channels, **kw: RBNAct2d(channels, **kw))
    assert sum(isinstance(module, RBNAct2d) for module in model.modules()) == MODELS["regnetx_002"]
    model(torch.randn(2, 3, 64, 64)).sum().backward()


def test_a_layer_that_was_none_of_timms_before_or_is_synchronised_stays(timm):
    model = nn.Sequential(RBNAct2d(4), timm.layers.BatchNormAct2d(4))
    convert(model)
    model[1].sync = True
    for path, row in zip("01", convert(model, "bn").rows, strict=True):
        assert row == Row(path, "kept", "RBNAct2d", HAS_ACTIVATION)
