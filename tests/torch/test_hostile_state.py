"""What a layer stores may be anything when it is called: an error that says so, or the right numbers."""

import copy
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from rbn.backends.torch import BNET, IEBN, RBN
from rbn_core import RBNError, RBNTypeError, RBNValueError

FORMS = pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
PHASES = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
VECTORS = ("weight", "bias", "center_weight", "scale_weight", "scale_bias", "running_mean", "running_var")


def layer_of(make=RBN, **options):
    """A layer of 8 channels none of whose numbers is special."""
    torch.manual_seed(0)
    layer = make(8, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter) / 3)
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2)
    return layer


def images(*shape):
    return torch.randn(*(shape or (4, 8, 6, 5)), generator=torch.Generator().manual_seed(1))


def store(layer, name, value):
    """Put it where the layer keeps what is called so."""
    kept = layer._buffers if name in layer._buffers else layer._parameters
    kept[name] = nn.Parameter(value) if kept is layer._parameters and value is not None else value


def refused(layer, kind, text, x=None):
    """Hold the layer to one error of this text, after which its state is as before."""
    before = {name: value.clone() for name, value in layer.state_dict().items() if not value.is_meta}
    with pytest.raises(RBNError, match=text) as caught:
        layer(images() if x is None else x)
    assert type(caught.value) is kind
    after = layer.state_dict()
    assert all(torch.equal(after[name].to_dense(), value.to_dense()) for name, value in before.items())


@PHASES
@FORMS
@pytest.mark.parametrize("shape", [(4,), (1,), (16,), (0,), (1, 8), ()], ids=str)
@pytest.mark.parametrize("name", VECTORS)
def test_another_shape_is_refused(name, shape, fused, training):
    layer = layer_of(fused=fused).train(training)
    store(layer, name, torch.ones(shape))
    refused(layer, RBNValueError, rf"RBN: expected {name} of shape \(8,\), got one of shape ")


@FORMS
def test_a_parameter_of_another_shape_is_refused_in_a_functional_call(fused):
    layer = layer_of(fused=fused)
    with pytest.raises(RBNValueError, match=r"expected weight of shape \(8,\), got one of shape \(1,\)"):
        torch.func.functional_call(layer, {"weight": torch.ones(1)}, (images(),))


@PHASES
@FORMS
@pytest.mark.parametrize("name", VECTORS[2:])
def test_what_the_options_need_is_not_left_out(name, fused, training):
    for remove in (lambda layer: store(layer, name, None), lambda layer: delattr(layer, name)):
        layer = layer_of(fused=fused).train(training)
        remove(layer)
        refused(layer, RBNValueError, rf"RBN: expected {name} of shape \(8,\), got None")


@FORMS
@pytest.mark.parametrize(("name", "neutral"), [("weight", 1.0), ("bias", 0.0)])
def test_without_gamma_or_beta_the_layer_goes_without(name, neutral, fused):
    layer, expected = layer_of(fused=fused), layer_of(fused=fused)
    nn.init.constant_(getattr(expected, name), neutral)
    for remove in (lambda layer: setattr(layer, name, None), lambda layer: delattr(layer, name)):
        other = copy.deepcopy(layer)
        remove(other)
        torch.testing.assert_close(other(images()), copy.deepcopy(expected)(images()))


@FORMS
def test_without_both_running_statistics_a_layer_takes_the_batchs(fused):
    layer, norm = layer_of(fused=fused).eval(), layer_of(fused=fused)
    layer.running_mean = layer.running_var = None
    torch.testing.assert_close(layer(images()), norm(images()))


@FORMS
def test_without_a_counter_a_layer_trains(fused):
    for remove in (
        lambda layer: store(layer, "num_batches_tracked", None),
        lambda layer: delattr(layer, "num_batches_tracked"),
    ):
        layer, other = layer_of(fused=fused), layer_of(fused=fused)
        remove(layer)
        assert torch.equal(layer(images()), other(images()))
        assert torch.equal(layer.running_var, other.running_var)
        layer.momentum = None
        refused(layer, RBNValueError, "RBN: expected num_batches_tracked with momentum=None")


@PHASES
@FORMS
@pytest.mark.parametrize("name", VECTORS)
def test_another_device_is_refused(name, fused, training):
    layer = layer_of(fused=fused).train(training)
    store(layer, name, torch.ones(8, device="meta"))
    refused(layer, RBNValueError, f"RBN: expected {name} on the input's device, cpu, got it on meta")


@FORMS
@pytest.mark.parametrize("make", [RBN, IEBN, BNET])
def test_a_layer_without_memory_is_not_called_with_an_image(make, fused):
    layer = make(8, fused=fused, device="meta")
    with pytest.raises(RBNValueError, match="on the input's device, cpu, got it on meta"):
        layer(images())
    with pytest.raises(RBNValueError, match="on the input's device, meta, got it on cpu"):
        layer_of(make, fused=fused)(images().to("meta"))
    assert layer(images().to("meta")).shape == images().shape


@PHASES
@FORMS
@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn])
@pytest.mark.parametrize("name", VECTORS)
def test_what_is_no_floating_point_number_is_refused(name, dtype, fused, training):
    layer = layer_of(fused=fused).train(training)
    kept = layer._buffers if name in layer._buffers else layer._parameters
    kept[name] = torch.ones(8).to(dtype)
    refused(layer, RBNTypeError, f"RBN: expected {name} of dense floating-point numbers, got {dtype}")


@FORMS
@pytest.mark.parametrize("name", VECTORS)
def test_sparse_numbers_are_refused(name, fused):
    layer = layer_of(fused=fused)
    store(layer, name, torch.ones(8).to_sparse())
    refused(layer, RBNTypeError, f"RBN: expected {name} of dense floating-point numbers, got .*sparse")


@FORMS
@pytest.mark.parametrize("name", VECTORS[-2:])
def test_statistics_that_cannot_be_accumulated_in_are_refused_in_training_and_read_in_evaluation(name, fused):
    for dtype in (torch.float16, torch.bfloat16):
        layer = layer_of(fused=fused)
        store(layer, name, getattr(layer, name).to(dtype))
        refused(layer, RBNTypeError, f"RBN: expected {name} in float32 or float64 to train, got {dtype}")
        same = copy.deepcopy(layer).float()
        torch.testing.assert_close(layer.eval()(images()), same.eval()(images()))
    layer = layer_of(fused=fused)
    store(layer, name, torch.ones(1).expand(8))
    refused(layer, RBNValueError, f"RBN: expected {name} with a place for each channel to train")
    same = copy.deepcopy(layer)
    store(same, name, torch.ones(8))
    assert torch.equal(layer.eval()(images()), same.eval()(images()))


@PHASES
@FORMS
@pytest.mark.parametrize("name", VECTORS)
@pytest.mark.parametrize("change", ["double", "strided", "expanded", "negative", "shifted"])
def test_other_numbers_in_the_same_place_are_respected(change, name, fused, training):
    layer = layer_of(fused=fused).train(training)
    value = getattr(layer, name).detach().clone()
    if change == "expanded":
        if training and name.startswith("running"):
            return  # refused above
        value = value[:1].expand(8)
    same = copy.deepcopy(layer)
    store(same, name, value.clone())
    changed = {
        "double": value.double(),
        "strided": torch.stack([value, value + 1], 1)[:, 0],
        "expanded": value,
        "negative": torch.complex(value, -value).conj().imag,  # read through a bit that turns the sign
        "shifted": torch.frombuffer(
            bytearray(1) + bytearray(value.contiguous().numpy().tobytes()), dtype=torch.float32, offset=1
        )
        if change == "shifted"
        else None,
    }[change]
    store(layer, name, changed)
    x, z = images().requires_grad_(), images().requires_grad_()
    y, expected = layer(x), same(z)
    torch.testing.assert_close(y, expected)
    y.pow(3).sum().backward(), expected.pow(3).sum().backward()
    torch.testing.assert_close(x.grad, z.grad, rtol=1e-4, atol=1e-4)
    for statistic in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(layer, statistic).float(), getattr(same, statistic))


@FORMS
@pytest.mark.parametrize("kept", ["running_mean", "running_var"])
@pytest.mark.parametrize("name", VECTORS[:5])
def test_a_statistic_in_the_memory_of_a_parameter_is_updated_after_everything_is_read(name, kept, fused):
    layer = layer_of(fused=fused)
    same = copy.deepcopy(layer)
    setattr(layer, kept, getattr(layer, name).data)
    setattr(same, kept, getattr(layer, name).detach().clone())
    x, z = images().requires_grad_(), images().requires_grad_()
    y, expected = layer(x), same(z)
    assert torch.equal(y, expected)
    y.pow(3).sum().backward(), expected.pow(3).sum().backward()
    assert torch.equal(x.grad, z.grad)
    for parameter, other in zip(layer.parameters(), same.parameters(), strict=True):
        assert torch.equal(parameter.grad, other.grad)
    assert torch.equal(getattr(layer, kept), getattr(same, kept))


class Doubled(torch.Tensor):
    """Stands for twice of what it wraps, and has no memory of its own."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, device=inner.device, requires_grad=inner.requires_grad
        )

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].inner)

        def unwrapped(value):
            return value.inner * 2 if isinstance(value, cls) else value

        return func(*pytree.tree_map(unwrapped, args), **pytree.tree_map(unwrapped, kwargs or {}))


@FORMS
@pytest.mark.parametrize("name", VECTORS)
def test_a_subclass_that_wraps_another_tensor_is_respected(name, fused):
    layer = layer_of(fused=fused).eval()
    same = copy.deepcopy(layer)
    value = getattr(layer, name).detach().clone()
    store(layer, name, Doubled(value))
    store(same, name, value * 2)
    torch.testing.assert_close(layer(images()), same(images()))


@FORMS
def test_an_input_that_is_read_through_a_bit_that_turns_the_sign(fused):
    layer, values = layer_of(fused=fused), images()
    x = torch.complex(values, -values).conj().imag
    assert x.is_neg()
    for training in (True, False):
        layer.train(training)
        torch.testing.assert_close(copy.deepcopy(layer)(x), copy.deepcopy(layer)(values))
    z = values.clone().requires_grad_()
    (found,) = torch.autograd.grad(layer(z), z, x)
    (expected,) = torch.autograd.grad(layer(z), z, values)
    torch.testing.assert_close(found, expected)


@FORMS
@pytest.mark.parametrize(
    ("make", "name", "value"),
    [
        (RBN, "centering", "typo"),
        (RBN, "scaling", "typo"),
        (RBN, "scaling", "input_mean"),
        (RBN, "restrict", "typo"),
        (RBN, "variance_estimator", "typo"),
        (IEBN, "centering", "channel_mean"),
        (IEBN, "scaling", "channel_mean"),
        (BNET, "scaling", "channel_mean"),
    ],
)
def test_an_option_that_the_layer_does_not_have_is_refused_at_the_call(make, name, value, fused):
    layer = layer_of(make, fused=fused)
    setattr(layer, name, value)
    option = "running_var" if name == "variance_estimator" else name
    refused(layer, RBNValueError, f"{make.__name__}: expected {option} to be one of .*, got '{value}'")
    for wrong in (3, ["channel_mean"], np.ones(2)):  # two of which cannot be looked up
        setattr(layer, name, wrong)
        text = f"{make.__name__}: expected {option} to be one of .*, got {re.escape(repr(wrong))}"
        refused(layer, RBNTypeError, text)


@FORMS
@pytest.mark.parametrize("name", ["eps", "momentum"])
@pytest.mark.parametrize("value", ["0.1", [0.1], True])
def test_what_is_no_number_is_refused_at_the_call_where_a_number_is_due(name, value, fused):
    layer = layer_of(RBN, fused=fused)
    setattr(layer, name, value)
    refused(layer, RBNTypeError, f"RBN: expected {name} to be a .*number.*, got {re.escape(repr(value))}")


@PHASES
@pytest.mark.parametrize(
    ("name", "value", "kind", "text"),
    [
        (
            "weight",
            torch.ones(16, 1, 3, 3),
            RBNValueError,
            r"BNET: expected conv.weight of shape \(8, 1, 3, 3\)",
        ),
        ("weight", torch.ones(8, 1, 3), RBNValueError, r"BNET: expected conv.weight of shape \(8, 1, 3, 3\)"),
        ("bias", torch.ones(1), RBNValueError, r"BNET: expected conv.bias of shape \(8,\)"),
        ("bias", None, RBNValueError, r"BNET: expected conv.bias of shape \(8,\), got None"),
        (
            "weight",
            torch.ones(8, 1, 3, 3, device="meta"),
            RBNValueError,
            "BNET: expected conv.weight on the input's",
        ),
        ("weight", torch.ones(8, 1, 3, 3).int(), RBNTypeError, "BNET: expected conv.weight of dense"),
    ],
)
def test_a_convolution_that_does_not_fit_is_refused_before_statistics_change(
    name, value, kind, text, training
):
    layer = layer_of(BNET).train(training)
    layer.conv._parameters[name] = value
    refused(layer, kind, text)


@FORMS
def test_an_image_that_starts_between_two_numbers(fused):
    layer, values = layer_of(fused=fused), images()
    memory = bytearray(1) + bytearray(values.numpy().tobytes())
    x = torch.frombuffer(memory, dtype=torch.float32, offset=1).reshape(values.shape)
    assert x.data_ptr() % 4 == 1
    torch.testing.assert_close(copy.deepcopy(layer)(x), copy.deepcopy(layer)(values))
    z = values.clone().requires_grad_()
    (found,) = torch.autograd.grad(layer(z), z, x)
    (expected,) = torch.autograd.grad(layer(z), z, values)
    torch.testing.assert_close(found, expected)


def test_statistics_that_want_a_gradient_get_none_and_change_nothing():
    for fused in (True, False):
        layer, same = layer_of(fused=fused), layer_of(fused=fused)
        layer.running_mean.requires_grad_()
        x = images().requires_grad_()
        layer(x).sum().backward()
        same(images())
        assert torch.equal(layer.running_mean, same.running_mean)
        layer.eval()(x).sum().backward()
