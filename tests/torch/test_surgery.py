"""BatchNorm to RBN, IEBN and BNET in any PyTorch model, and back."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from rbn.backends.torch import BNET, IEBN, RBN, convert, network, to_numpy
from rbn_core import RBNError, RBNTypeError, RBNValueError
from rbn_core.errors import RBNWarning
from rbn_core.matching import Row

TARGETS = ["rbn", "iebn", "bnet"]


def trained(*layers, steps=3):
    """A model whose BatchNorms have statistics and parameters of their own."""
    torch.manual_seed(0)
    model = nn.Sequential(*layers)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.weight is not None:
            nn.init.normal_(module.weight, 1.0, 0.3)
            nn.init.normal_(module.bias)
    for _ in range(steps):
        model(torch.randn(8, 3, 6, 6) * 2 + 1)
    return model


def convolutional(**options):
    return nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, **options), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5)


@pytest.mark.parametrize("to", TARGETS)
def test_every_batch_norm_is_replaced_and_keeps_what_it_has(to):
    model = trained(*convolutional(eps=1e-3, momentum=0.3))
    before = copy.deepcopy(model)
    table = convert(model, to)
    kind = {"rbn": RBN, "iebn": IEBN, "bnet": BNET}[to]
    assert table.rows == tuple(Row(p, "replaced", "BatchNorm2d", kind.__name__) for p in ("1", "4"))
    assert type(model[1]) is type(model[4]) is kind
    assert (model[1].epsilon, model[1].momentum, model[4].momentum) == (1e-3, 0.3, 0.1)
    own = to_numpy(before)
    for name, array in to_numpy(model).items():
        if name in own:
            np.testing.assert_array_equal(array, own[name])
    assert model[1].num_batches_tracked == 3
    x = torch.randn(4, 3, 6, 6)
    if to != "bnet":  # a fresh calibration is one constant
        z, y = before[1](before[0](x)), model[1](model[0](x))
        constant = torch.sigmoid(model[1].scale_bias[0])
        shift = model[1].bias[:, None, None]
        torch.testing.assert_close(y - shift, (z - shift) * constant)


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_preserved_outputs_are_the_same_in_evaluation_and_training(to, dtype):
    model = trained(*convolutional()).to(dtype)
    before = copy.deepcopy(model)
    convert(model, to, preserve=True, **({"kernel_size": 5} if to == "bnet" else {"running_var": "unbiased"}))
    x = torch.randn(4, 3, 6, 6, dtype=dtype)
    for training in (False, True):
        torch.testing.assert_close(model.train(training)(x), before.train(training)(x))
    state = to_numpy(model)
    for name, array in to_numpy(before).items():
        if "running" in name:
            np.testing.assert_allclose(state[name], array, rtol=1e-5)


@pytest.mark.parametrize("scaling", ["channel_std", "spatial_mean", None])
@pytest.mark.parametrize("restrict", ["sigmoid", "hard_sigmoid"])
def test_options_reach_the_layers_and_outputs_are_preserved_with_them(scaling, restrict):
    model = trained(*convolutional())
    x = torch.randn(4, 3, 6, 6)
    expected = model.eval()(x)
    convert(model, preserve=True, scaling=scaling, restrict=restrict, centering="channel_std")
    assert (model[1].scaling, model[1].centering, model[1].restrict) == (scaling, "channel_std", restrict)
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("to", TARGETS)
def test_there_and_back_is_the_same(to):
    model = trained(*convolutional(), nn.Flatten(), nn.Linear(20, 3), nn.BatchNorm1d(3))
    before = copy.deepcopy(model)
    x = torch.randn(4, 3, 6, 6)
    where = r"1|4" if to == "bnet" else None  # whose convolution needs a spatial axis
    convert(model, to, where=where, preserve=True)
    table = convert(model, "bn")
    assert {row.status for row in table.rows} == {"replaced"}
    assert [type(layer) for layer in model] == [type(layer) for layer in before]
    for training in (False, True):
        torch.testing.assert_close(model.train(training)(x), before.train(training)(x))


def test_a_calibration_at_work_is_kept_and_the_table_says_why():
    model = nn.Sequential(RBN(3), RBN(3), IEBN(3), BNET(3), nn.BatchNorm2d(3))
    convert(model, "bnet", preserve=True)
    with torch.no_grad():
        model[0].center_weight[1] = 0.5
        model[2].scale_weight[0] = -0.25
    table = convert(model, "bn")
    rows = {row.name: (row.status, row.source, row.detail) for row in table.rows}
    assert rows["0"] == ("kept", "RBN", "center_weight is not 0 everywhere (largest 0.5)")
    assert rows["2"] == ("kept", "IEBN", "scale_weight is not 0 everywhere (largest 0.25)")
    assert rows["3"][:2] == ("kept", "BNET")
    assert rows["3"][2].startswith("conv_weight is not 0 beside its centre")
    assert rows["1"] == ("replaced", "RBN", "BatchNorm2d")
    assert rows["4"] == ("replaced", "BNET", "BatchNorm2d")
    assert [type(layer) for layer in model] == [RBN, nn.BatchNorm2d, IEBN, BNET, nn.BatchNorm2d]


def test_layers_without_gamma_go_both_ways():
    model = nn.Sequential(nn.BatchNorm2d(3, affine=False, track_running_stats=False))
    table = convert(model, preserve=True)
    assert table.rows == (Row("0", "kept", "BatchNorm2d", "has no gamma that could make up for R(w_b)"),)
    convert(model, scaling=None, preserve=True)
    assert model[0].weight is None
    assert model[0].running_mean is None
    convert(model, "bn")
    assert (type(model[0]), model[0].affine) == (nn.BatchNorm2d, False)
    x = torch.randn(4, 3, 5, 5)
    model = nn.Sequential(RBN(3, affine=False))
    expected = model(x)
    convert(model, "bn")
    torch.testing.assert_close(model(x), expected)
    model = nn.Sequential(RBN(3, bias=False))
    expected = model(x)
    convert(model, "bn")
    assert model[0].bias is None
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_every_rank(rank):
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[rank - 1]
    x = torch.randn(4, 3, *(5,) * rank)
    for to in TARGETS:
        model = nn.Sequential(norm(3))
        expected = copy.deepcopy(model)(x)
        convert(model, to, preserve=True)
        torch.testing.assert_close(model(x), expected)
        convert(model, "bn")
        assert type(model[0]) is norm
    model = nn.Sequential(RBN(3))
    convert(model, "bn", spatial_dims=rank)
    assert type(model[0]) is norm


def test_parameters_and_statistics_are_the_same_objects():
    model = trained(*convolutional())
    model[1].weight.requires_grad_(False)
    weight, bias, mean = model[1].weight, model[1].bias, model[1].running_mean
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for to in ("rbn", "bn", "iebn"):
        convert(model, to, where="1", preserve=True)
        assert model[1].weight is weight
        assert model[1].bias is bias
        assert model[1].running_mean is mean
    assert not weight.requires_grad
    before = bias.clone()
    model(torch.randn(4, 3, 6, 6)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model[1].bias, before)
    frozen = nn.Sequential(nn.BatchNorm2d(3)).requires_grad_(False)
    convert(frozen, "bnet", preserve=True)
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    convert(frozen, "bn")
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


@pytest.mark.parametrize("to", ["rbn", "iebn", "bnet"])
def test_what_a_conversion_adds_is_learned_if_a_parameter_before_was(to):
    frozen, partly, bare = (
        nn.BatchNorm2d(3).requires_grad_(False),
        nn.BatchNorm2d(3),
        nn.BatchNorm2d(3, affine=False),
    )
    partly.weight.requires_grad_(False)
    model = nn.ModuleDict({"frozen": frozen, "partly": partly, "bare": bare})
    table = convert(model, to)
    name = to.upper()
    assert {row.name: row.detail for row in table.rows} == {
        "frozen": f"{name}, not learned, as the layer before",
        "partly": name,
        "bare": name,
    }
    assert not any(parameter.requires_grad for parameter in model["frozen"].parameters())
    plain = nn.Sequential(nn.BatchNorm2d(3, affine=False))
    for kind, options in (("rbn", {"centering": None, "scaling": None}), ("bn", {})):
        row = convert(plain, kind, **options).rows[0]
        assert row.detail == type(plain[0]).__name__
    for path in ("partly", "bare"):
        learned = {own for own, parameter in model[path].named_parameters() if parameter.requires_grad}
        added = {"conv.bias"} if to == "bnet" else {"scale_weight", "scale_bias"}
        assert added <= learned


def test_the_table_says_what_was_looked_at():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Sequential(nn.BatchNorm2d(3)))
    assert str(convert(nn.Sequential(nn.ReLU()))) == "0 replaced: there is no BatchNorm"
    for nowhere in (nn.Sequential(nn.ReLU()), model):
        with pytest.raises(RBNValueError, match="expected where to match the whole path of a layer, got 'x'"):
            convert(nowhere, where="x")
    assert str(convert(model, where="1")).endswith("1 replaced")
    assert str(convert(model)).endswith("1 replaced")
    assert str(convert(model)) == "0 replaced: there is no BatchNorm"


def test_mode_is_kept_layer_by_layer():
    model = trained(*convolutional())
    model[1].eval()
    convert(model, "bnet")
    assert [model[1].training, model[1].conv.training, model[4].training] == [False, False, True]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_and_its_statistics_become_float32(dtype):
    model = trained(*convolutional()).to(dtype)
    convert(model, preserve=True)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert (model[1].running_var.dtype, model[1].num_batches_tracked.dtype) == (torch.float32, torch.int64)
    convert(model, "bn")
    assert model[1].weight.dtype == dtype


def test_hooks_go_on_and_their_handles_still_remove_them():
    model = trained(*convolutional())
    calls = []
    handles = [
        model[1].register_forward_pre_hook(lambda *_: calls.append("before")),
        model[1].register_forward_hook(lambda *_, **__: calls.append("after"), with_kwargs=True),
        model[1].register_full_backward_hook(lambda *_: calls.append("backward")),
        model[1].register_state_dict_post_hook(lambda *_: calls.append("state")),
    ]
    convert(model)
    model(torch.randn(4, 3, 6, 6)).sum().backward()
    model.state_dict()
    assert calls == ["before", "after", "backward", "state"]
    for handle in handles:
        handle.remove()
    model(torch.randn(4, 3, 6, 6)).sum().backward()
    model.state_dict()
    assert len(calls) == 4


def test_where_chooses_by_whole_paths():
    model = network("resnet18", "bn", 4)
    with pytest.raises(RBNValueError, match=r"got 'layer1', which matches none of these 20: bn1, layer1"):
        convert(model, where="layer1")
    table = convert(model, "iebn", where=r"layer[14]\..*|bn1")
    chosen = {name for name, module in model.named_modules() if isinstance(module, IEBN)}
    assert chosen == {row.name for row in table.rows}
    assert "bn1" in chosen
    assert {name.partition(".")[0] for name in chosen} == {"bn1", "layer1", "layer4"}
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 4)


def test_a_shared_layer_stays_shared():
    norm = nn.BatchNorm2d(3)
    model = nn.ModuleDict({"a": norm, "b": nn.Sequential(norm), "c": nn.BatchNorm2d(3)})
    table = convert(model, where="b.*")
    assert model["a"] is model["b"][0]
    assert isinstance(model["a"], RBN)
    assert [row.name for row in table.rows] == ["a", "b.0"]
    assert type(model["c"]) is nn.BatchNorm2d


def test_what_is_no_plain_batch_norm_is_kept():
    class Own(nn.BatchNorm2d):
        pass

    named = nn.BatchNorm2d(3)
    named.register_buffer("more", torch.ones(1))
    model = nn.Sequential(Own(3), nn.LazyBatchNorm2d(), named, nn.InstanceNorm2d(3), nn.BatchNorm2d(3))
    parametrize.register_parametrization(model[4], "bias", nn.Identity())
    before = list(model)
    table = convert(model)
    assert {row.name: row.detail for row in table.rows} == {
        "0": "is a class of its own",
        "1": "has not seen an input yet: run the model once",
        "2": "has more parameters, buffers or modules than a BatchNorm",
        "4": "has parametrizations: remove them first",
    }
    assert {row.status for row in table.rows} == {"kept"}
    assert list(model) == before


def test_synchronized_batch_norm_becomes_synchronized_and_back():
    group = object()
    model = nn.Sequential(nn.SyncBatchNorm(3, process_group=group), nn.SyncBatchNorm(3))
    convert(model, where="0")
    convert(model, "bnet", where="1")
    assert [layer.sync for layer in model] == [True, True]
    assert model[0].process_group is group
    convert(model, "bn", where="0")
    assert type(model[0]) is nn.SyncBatchNorm
    assert model[0].process_group is group


def test_wrapped_and_compiled_models_are_converted_inside():
    inner = trained(*convolutional()).eval()
    x = torch.randn(2, 3, 6, 6)
    expected = inner(x)
    compiled = torch.compile(inner, backend="eager")
    compiled(x)
    for model in (nn.DataParallel(inner), compiled):
        table = convert(model, "rbn", preserve=True)
        assert [row.name for row in table.rows] == ["1", "4"]
        assert isinstance(inner[1], RBN)
        torch.testing.assert_close(model(x), expected)
        convert(model, "bn")


def test_a_model_on_the_meta_device_is_converted():
    with torch.device("meta"):
        model = nn.Sequential(*convolutional())
    convert(model)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_a_network_that_its_library_builds_anew_is_warned_of():
    """A stand-in for ultralytics' `DetectionModel`; tests/integrations has the library."""
    kind = type("DetectionModel", (nn.Sequential,), {"__module__": "ultralytics.nn.tasks"})
    model = kind(*convolutional())
    model.yaml = {}
    convert(model)  # as in a class of one's own, which is no YOLO's yet
    convert(model, "bn")
    model.task = "detect"
    with pytest.warns(RBNWarning, match=r"YOLO.train builds it anew, with BatchNorm, .* docs/libraries.md"):
        convert(nn.Sequential(model))
    convert(model)  # which finds nothing to replace
    convert(model, "bn")


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (("ln",), {}, RBNValueError, "expected to to be one of 'bn', 'rbn'"),
        (("rbn",), {"where": "("}, RBNValueError, "expected where to be a regular expression"),
        (("rbn",), {"where": 3}, RBNTypeError, "expected where to be a regular expression"),
        (("rbn",), {"scaling": "mean"}, RBNValueError, "expected scaling to be one of"),
        (
            ("rbn",),
            {"kernel_size": 3},
            RBNTypeError,
            "RBN: expected an option of this layer, got 'kernel_size'",
        ),
        (("bnet",), {"kernel_size": 4}, RBNValueError, "expected an odd kernel_size"),
        (("rbn",), {"eps": 1.0}, RBNTypeError, "options that the layer before has not, got eps"),
        (("bn",), {"scaling": None}, RBNTypeError, "no option but spatial_dims for 'bn', got scaling"),
        (("bn",), {"spatial_dims": 4}, RBNTypeError, "expected spatial_dims to be one of 1, 2, 3, got 4"),
    ],
)
def test_what_is_refused_changes_nothing(arguments, options, error, message):
    for model in (nn.Sequential(nn.BatchNorm2d(3), RBN(3)), nn.Sequential()):
        before = list(model)
        with pytest.raises(error, match=message):
            convert(model, *arguments, **options)
        assert list(model) == before
    assert issubclass(error, RBNError)


def test_a_layer_itself_cannot_be_replaced():
    with pytest.raises(RBNTypeError, match="expected a model with layers inside, got a BatchNorm2d itself"):
        convert(nn.BatchNorm2d(3))
    with pytest.raises(RBNTypeError, match="expected a model with layers inside, got a RBN itself"):
        convert(nn.DataParallel(RBN(3)), "bn")
    table = convert(RBN(3))
    assert (table.rows, str(table)) == ((), "0 replaced: there is no BatchNorm")


def test_a_frozen_batch_norm_that_is_none_is_kept_and_the_table_says_why():
    class FrozenBatchNorm2d(nn.Module):
        """One without numbers, and one that is more."""

    class WithMore(nn.Module):
        def __init__(self):
            super().__init__()
            for name in ("weight", "bias", "running_mean", "running_var"):
                self.register_buffer(name, torch.ones(4))

        def forward(self, x):
            return 2 * x

    WithMore.__name__ = "FrozenBatchNormAndMore"
    table = convert(nn.Sequential(FrozenBatchNorm2d(), WithMore()))
    assert [row.detail for row in table.rows] == [
        "has more parameters, buffers or modules than a BatchNorm",
        "does not give what a BatchNorm with its numbers gives",
    ]
