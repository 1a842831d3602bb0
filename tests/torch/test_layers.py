"""What is PyTorch's own about the layer; the mathematics is the conformance suite's business."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from rbn.backends.torch import BNET, IEBN, RBN, convert, from_numpy, to_numpy
from rbn_core import RBNTypeError, RBNValueError


def test_a_batch_norm_checkpoint_loads_into_rbn() -> None:
    norm = nn.BatchNorm2d(3)
    norm(torch.randn(4, 3, 5, 5))
    layer = RBN(3)
    result = layer.load_state_dict(norm.state_dict(), strict=False)
    assert result.missing_keys == ["center_weight", "scale_weight", "scale_bias"]
    assert result.unexpected_keys == []
    assert torch.equal(layer.running_var, norm.running_var)


def test_a_fresh_layer_is_batch_norm_times_one_constant() -> None:
    x = torch.randn(4, 3, 5, 5)
    expected = nn.BatchNorm2d(3)(x) * torch.sigmoid(torch.tensor(1.0))
    torch.testing.assert_close(RBN(3)(x), expected)


def test_statistics_follow_batch_norm_step_by_step() -> None:
    layer, norm = RBN(3), nn.BatchNorm2d(3)
    for _ in range(3):
        x = torch.randn(4, 3, 5, 5)
        layer(x), norm(x)
    torch.testing.assert_close(layer.running_mean, norm.running_mean)
    torch.testing.assert_close(layer.running_var, norm.running_var)
    assert layer.num_batches_tracked == 3


def test_evaluation_leaves_every_statistic_alone() -> None:
    layer = RBN(3).eval()
    before = to_numpy(layer)
    layer(torch.randn(4, 3, 5, 5))
    for name, value in to_numpy(layer).items():
        np.testing.assert_array_equal(value, before[name])


def test_cumulative_momentum_averages_all_batches() -> None:
    layer, norm = RBN(3, momentum=None), nn.BatchNorm2d(3, momentum=None)
    for _ in range(3):
        x = torch.randn(4, 3, 5, 5)
        layer(x), norm(x)
    torch.testing.assert_close(layer.running_var, norm.running_var)


def test_channels_last_input_gives_channels_last_output_without_a_copy() -> None:
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    y = RBN(3)(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, RBN(3)(x.contiguous()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_input_keeps_float32_statistics(dtype: torch.dtype) -> None:
    layer = RBN(3)
    y = layer((torch.randn(8, 3, 16, 16) + 10).to(dtype))
    assert y.dtype == dtype
    assert layer.running_mean.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_statistics_stay_in_float32_when_the_model_goes_to_half_precision(dtype: torch.dtype) -> None:
    x = torch.randn(8, 3, 16, 16)
    layer = RBN(3)
    layer(x)
    kept = layer.running_mean.clone()
    model = nn.Sequential(layer).to(dtype)
    assert torch.equal(layer.running_mean, kept)
    assert model(x.to(dtype)).dtype == dtype
    assert (layer.weight.dtype, layer.running_var.dtype) == (dtype, torch.float32)
    assert RBN(3, dtype=dtype).running_var.dtype == torch.float32
    assert layer.double().running_mean.dtype == torch.float64


def test_a_layer_on_the_meta_device_is_built_without_memory() -> None:
    layer = RBN(3, device="meta")
    assert {value.device.type for value in layer.state_dict().values()} == {"meta"}


def test_iebn_starts_as_batch_norm_times_sigmoid_of_minus_one() -> None:
    x = torch.randn(4, 3, 5, 5)
    torch.testing.assert_close(IEBN(3)(x), nn.BatchNorm2d(3)(x) * torch.sigmoid(torch.tensor(-1.0)))


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_bnet_starts_as_pytorchs_depthwise_convolution(rank: int) -> None:
    torch.manual_seed(0)
    layer = BNET(4, 5, spatial_dims=rank)
    torch.manual_seed(0)
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1](4, 4, 5, padding=2, groups=4)
    assert torch.equal(layer.conv.weight, conv.weight)
    assert torch.equal(layer.conv.bias, conv.bias)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("affine", [True, False])
def test_bnet_in_the_place_of_a_batch_norm_equals_it(rank: int, affine: bool) -> None:
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[rank - 1](4, 1e-3, 0.2, affine=affine).double()
    x = torch.randn(3, 4, *(5,) * rank, dtype=torch.float64)
    if affine:
        nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    norm(x)
    model = nn.Sequential(copy.deepcopy(norm))
    convert(model, "bnet", preserve=True)
    layer = model[0]
    for _ in range(2):
        torch.testing.assert_close(layer(x), norm(x))
    torch.testing.assert_close(layer.eval()(x), norm.eval()(x))
    assert layer.num_batches_tracked == norm.num_batches_tracked


def test_bnet_refuses_an_even_kernel_and_another_rank() -> None:
    with pytest.raises(RBNValueError, match=r"BNET: expected an odd kernel_size, got 4\. Take 3 or 5"):
        BNET(3, 4)
    with pytest.raises(RBNValueError, match="BNET: expected an input with 2 spatial axes, got shape"):
        BNET(3)(torch.randn(2, 3, 5))


@pytest.mark.parametrize("make", [IEBN, BNET])
def test_the_relatives_refuse_bad_options_under_their_own_name(make: type) -> None:
    with pytest.raises(RBNValueError, match=f"{make.__name__}: expected eps to be positive"):
        make(3, eps=0.0)
    with pytest.raises(RBNTypeError, match=f"{make.__name__}: expected an option of this layer"):
        make(3, centering="channel_mean")


def test_gradients_of_gradients() -> None:
    layer = RBN(2, dtype=torch.float64)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn(2, dtype=torch.float64))
    x = torch.randn(3, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(layer, (x,))


def test_the_layer_compiles_into_one_graph() -> None:
    layer = RBN(3)
    x = torch.randn(2, 3, 4, 4)
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))


def test_state_dict_and_pickle_survive(tmp_path) -> None:
    layer = RBN(3)
    layer(torch.randn(4, 3, 5, 5))
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    other = RBN(3)
    other.load_state_dict(torch.load(tmp_path / "layer.pt", weights_only=True))
    for name, value in to_numpy(layer).items():
        np.testing.assert_array_equal(value, to_numpy(other)[name])


def test_printing_shows_every_option() -> None:
    assert "centering='channel_std'" in repr(nn.Sequential(RBN(3, centering="channel_std")))


class Doubled(nn.Module):
    """A parametrization."""

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        """Twice of it."""
        return 2 * value


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", ["weight", "bias", "center_weight", "scale_weight", "scale_bias"])
def test_parameters_that_are_computed_from_others(name: str, fused: bool) -> None:
    layer, x = RBN(3, fused=fused), torch.randn(4, 3, 5, 5)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    expected, pruned = copy.deepcopy(layer), copy.deepcopy(layer)
    with torch.no_grad():
        getattr(expected, name).mul_(2)
    parametrize.register_parametrization(layer, name, Doubled())
    torch.testing.assert_close(layer(x), expected(x))
    layer(x).square().sum().backward()
    assert layer.parametrizations[name].original.grad.abs().sum() > 0

    prune.l1_unstructured(pruned, name, amount=2)  # sets the value and keeps the parameter elsewhere
    with torch.no_grad():
        getattr(expected, name).div_(2).mul_(getattr(pruned, f"{name}_mask"))
    torch.testing.assert_close(pruned(x), expected(x))


def test_frozen_parameters_get_no_gradient() -> None:
    layer = RBN(3)
    layer.center_weight.requires_grad_(False)
    layer(torch.randn(4, 3, 5, 5)).square().sum().backward()
    assert layer.center_weight.grad is None
    assert layer.scale_weight.grad is not None


def test_the_layer_can_be_used_twice_in_one_step() -> None:
    layer = RBN(3)
    layer(layer(torch.randn(4, 3, 5, 5))).square().sum().backward()
    assert layer.num_batches_tracked == 2


def test_the_layer_without_parameters_and_statistics() -> None:
    layer = RBN(3, affine=False, track_running_stats=False, centering=None, scaling=None)
    assert to_numpy(layer) == {}
    x = torch.randn(4, 3, 5, 5)
    torch.testing.assert_close(layer(x), nn.BatchNorm2d(3)(x))
    torch.testing.assert_close(layer.eval()(x), nn.BatchNorm2d(3)(x))


def test_a_state_that_does_not_fit_lists_every_fault_and_changes_nothing() -> None:
    layer = RBN(3)
    before = to_numpy(layer)
    state = {name: value + 1 for name, value in before.items() if name != "beta"}
    state |= {"gamma": np.ones(4), "surprise": np.ones(3)}
    with pytest.raises(RBNValueError, match="missing beta; unexpected surprise; gamma of shape"):
        from_numpy(layer, state)
    for name, value in to_numpy(layer).items():
        np.testing.assert_array_equal(value, before[name])


def test_to_numpy_gives_copies() -> None:
    layer = RBN(3)
    to_numpy(layer)["gamma"][:] = 7
    assert torch.equal(layer.weight, torch.ones(3))
