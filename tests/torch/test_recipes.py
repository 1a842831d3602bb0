"""Tools that look for BatchNorm, on our layers: right numbers, or an error that names the way out.

Those of torch, torchvision and timm are the packages' own. Those of packages that are not installed here are
a few lines that do to a layer what the package does.
"""

import copy
import io
import operator
import pickle

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import fusion, parametrize
from torch.optim import swa_utils
from torch.utils.flop_counter import FlopCounterMode

from rbn.backends.torch import (
    BNET,
    IEBN,
    RBN,
    convert,
    fold,
    freeze,
    parameter_groups,
    update_rbn,
)
from rbn_core import RBNTypeError, RBNValueError
from rbn_core.matching import Row

KINDS = pytest.mark.parametrize("kind", [RBN, IEBN, BNET], ids=lambda kind: kind.__name__)
REFUSED = "expected a plain BatchNorm where a tool reads eps, got .*layer.epsilon"


def layer_of(kind, **options):
    """A layer with a calibration at work, and statistics of its own."""
    torch.manual_seed(0)
    layer = kind(4, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter) / 2)
        for _ in range(3):
            layer(torch.randn(8, 4, 6, 6) * 2 + 1)
    return layer


def model_of(kind):
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 4, 3), layer_of(kind), nn.ReLU())


def images(shift=0.0):
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(5)) + shift


def statistics_move(model):
    """Whether a step of training changes the statistics of the norm layer."""
    before = model[1].running_mean.clone()
    model.train()(images())
    return not torch.equal(model[1].running_mean, before)


def mean_over_batches(model, batches):
    """The statistics of the norm layer, each batch taken alone, and their mean."""
    found = []
    for batch in batches:
        alone = copy.deepcopy(model).train()
        alone[1].momentum = 1.0
        alone(batch)
        found.append(torch.stack((alone[1].running_mean, alone[1].running_var)))
    return torch.stack(found).mean(dim=0)


def assert_statistics(model, expected):
    torch.testing.assert_close(torch.stack((model[1].running_mean, model[1].running_var)), expected)


# ---- what updates, freezes, groups or resets ----


@KINDS
def test_the_layers_are_batch_norms(kind):
    layer = layer_of(kind)
    assert isinstance(layer, nn.BatchNorm2d)
    assert "eps=1e-05" in repr(layer)
    layer.eps = 0.5
    assert layer.epsilon == 0.5
    with pytest.raises(RBNTypeError, match=REFUSED):
        _ = layer.eps


@pytest.mark.meeting(
    "`torch.optim.swa_utils.update_bn`",
    "works",
    "update_bn(batches, model)",
)
@KINDS
def test_update_bn_of_torch(kind):
    model, batches = model_of(kind), [images(), images(5.0)]
    expected = mean_over_batches(model, batches)
    swa_utils.update_bn(batches, model)
    assert_statistics(model, expected)
    assert model[1].momentum == 0.1


@KINDS
def test_stochastic_weight_averaging_of_lightning(kind):
    """It resets what is a `_BatchNorm`, lets one epoch pass, and puts the momentum back."""
    model, batches = model_of(kind).train(), [images(), images(5.0)]
    expected = mean_over_batches(model, batches)
    (found,) = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    found.running_mean = torch.zeros_like(found.running_mean)
    found.running_var = torch.ones_like(found.running_var)
    found.momentum = None
    found.num_batches_tracked *= 0
    for batch in batches:
        model(batch)
    assert_statistics(model, expected)


@KINDS
def test_base_finetuning_of_lightning_freezes(kind):
    """It sets `track_running_stats` of what is a `_BatchNorm`."""
    model = model_of(kind)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.track_running_stats = False
    assert not statistics_move(model)


@KINDS
def test_base_finetuning_of_lightning_leaves_batch_norms_to_train(kind):
    """With `train_bn=True` it frees a BatchNorm's own parameters and freezes every other layer's."""
    model = model_of(kind)
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(isinstance(module, _BatchNorm))
    assert all(p.requires_grad for p in model[1].parameters()) == (kind is not BNET)


@pytest.mark.meeting(
    "loops over `isinstance(m, nn.BatchNorm2d)`",
    "works",
    "[m.eval() for m in model.modules() if isinstance(m, nn.BatchNorm2d)]",
)
@KINDS
@pytest.mark.parametrize("base", [nn.BatchNorm2d, _BatchNorm])
def test_loops_that_evaluate_what_is_a_batch_norm(kind, base):
    model = model_of(kind).train()
    before = model[1].running_mean.clone()
    for module in model.modules():
        if isinstance(module, base):
            module.eval()
    model(images())
    assert torch.equal(model[1].running_mean, before)


@pytest.mark.meeting(
    "`torch.func.replace_all_batch_norm_modules_`",
    "works",
    "torch.func.replace_all_batch_norm_modules_(model)",
)
@KINDS
def test_torch_func_takes_the_statistics_away(kind):
    model = model_of(kind).train()
    torch.func.replace_all_batch_norm_modules_(model)
    assert model[1].running_mean is None
    parameters = dict(model.named_parameters())

    def run(image):
        return torch.func.functional_call(model, parameters, (image[None],))[0]

    expected = torch.cat([model(image[None]) for image in images()])
    torch.testing.assert_close(torch.func.vmap(run)(images()), expected)


@pytest.mark.meeting(
    "torchvision's `split_normalization_params`",
    "works for RBN and IEBN; BNET: `parameter_groups`",
    "split_normalization_params(model)",
    packages=("torchvision",),
)
@pytest.mark.parametrize("kind", [RBN, IEBN])
def test_split_normalization_params_of_torchvision(kind, torchvision):
    model = model_of(kind)
    norm, other = torchvision.ops._utils.split_normalization_params(model)
    assert {id(p) for p in norm} == {id(p) for p in model[1].parameters()}
    assert {id(p) for p in other} == {id(p) for p in model[0].parameters()}


def test_bnets_convolution_is_none_of_a_norm_to_torchvision_and_timm(torchvision, timm):
    """The documented exception: they go by layers without children, and by axes; ours does it right."""
    model = model_of(BNET)
    norm, _ = torchvision.ops._utils.split_normalization_params(model)
    assert norm == []
    _, timms = timm.optim.param_groups_weight_decay(model, 0.1)
    assert [id(p) for p in timms["params"]] == [id(model[0].weight), id(model[1].conv.weight)]
    decays, rests = parameter_groups(model, 0.1)
    assert [id(p) for p in decays["params"]] == [id(model[0].weight)]
    assert len(rests["params"]) == 3


@KINDS
def test_conversions_to_half_that_leave_affine_batch_norms_out(kind):
    """As apex's O2 and its like do. BNET is not affine, and its convolution is in half like any other."""
    model = model_of(kind).eval()
    for module in model.modules():
        if not (isinstance(module, _BatchNorm) and module.affine):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.half()
    assert {p.dtype for p in model[1].parameters()} == {torch.float16 if kind is BNET else torch.float32}
    assert model[1].running_var.dtype == torch.float32
    assert model(images().half()).dtype == torch.float16


# ---- what rebuilds or folds a plain BatchNorm ----


def fuses(model):
    return fusion.fuse_conv_bn_eval(model[0], model[1])


def fuses_like_mmcv(model):
    factor = model[1].weight / torch.sqrt(model[1].running_var + model[1].eps)
    return model[0].weight * factor[:, None, None, None]


def fuses_like_ultralytics(model):
    norm = model[1]
    return fusion.fuse_conv_bn_weights(
        model[0].weight, None, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )


def freezes_like_detectron2(model):
    frozen = nn.Module()
    if isinstance(model[1], nn.BatchNorm2d):
        frozen.running_mean = model[1].running_mean
        frozen.eps = model[1].eps
    return frozen


def evaluates_like_mmengine(model):
    if isinstance(model[1], _BatchNorm):
        return torch.rsqrt(model[1].running_var + model[1].eps)
    return None


@pytest.mark.meeting(
    "`convert_sync_batchnorm`, `fuse_conv_bn_eval` and others that rebuild or fold a BatchNorm",
    "an error that says what to do instead",
    "nn.SyncBatchNorm.convert_sync_batchnorm(model)",
)
@KINDS
@pytest.mark.parametrize(
    "tool",
    [
        fuses,
        fuses_like_mmcv,
        fuses_like_ultralytics,
        freezes_like_detectron2,
        evaluates_like_mmengine,
        nn.SyncBatchNorm.convert_sync_batchnorm,
    ],
)
def test_what_would_drop_the_calibration_is_refused(kind, tool):
    model = model_of(kind).eval()
    with pytest.raises(RBNTypeError, match=REFUSED):
        tool(model)
    assert type(model[1]) is kind


@pytest.mark.meeting(
    "timm's `convert_sync_batchnorm`, `freeze_batch_norm_2d` and `freeze`",
    "an error that says what to do instead",
    "timm.layers.freeze_batch_norm_2d(model)",
    packages=("timm",),
)
@KINDS
@pytest.mark.parametrize(
    "tool", ["layers.convert_sync_batchnorm", "layers.freeze_batch_norm_2d", "utils.freeze"]
)
def test_what_would_drop_the_calibration_in_timm_is_refused(kind, tool, timm):
    with pytest.raises(RBNTypeError, match=REFUSED):
        operator.attrgetter(tool)(timm)(model_of(kind).eval())


@pytest.mark.parametrize("kind", [RBN, IEBN])
def test_what_rebuilds_a_batch_norm_without_its_eps_drops_the_calibration(kind):
    """The documented exception: DETR's `replace_batch_norm` in transformers, in a few lines."""
    norm = model_of(kind)[1]
    frozen = nn.BatchNorm2d(norm.num_features).eval()
    for name in ("weight", "bias", "running_mean", "running_var"):
        getattr(frozen, name).data.copy_(getattr(norm, name).data)
    x = torch.randn(2, 4, 5, 5)
    assert not torch.allclose(frozen(x), norm.eval()(x))


def test_fuse_linear_bn_eval_is_refused():
    with pytest.raises(RBNTypeError, match=REFUSED):
        fusion.fuse_linear_bn_eval(nn.Linear(3, 4).eval(), layer_of(RBN).eval())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.fx's import of torch.jit
@KINDS
def test_what_folds_by_type_leaves_the_layers_alone_or_refuses(kind):
    from torch.fx.experimental.optimization import fuse

    model = model_of(kind).eval()
    expected = model(images())
    fused = fuse(model)
    torch.testing.assert_close(fused(images()), expected)
    assert type(fused.get_submodule("1")) is kind
    with pytest.raises((AssertionError, NotImplementedError), match="did not find fuser method"):
        torch.ao.quantization.fuse_modules(model, ["0", "1"])


@pytest.mark.meeting(
    "ResNets built with `norm_layer=`",
    "works; BNET in torchvision: `convert(model, 'bnet')`",
    "timm.create_model('resnet18', norm_layer=RBN)",
    packages=("torchvision", "timm"),
)
@KINDS
def test_resnets_of_torchvision_and_timm_take_the_layers(kind, torchvision, timm):
    timms = timm.create_model("resnet18", norm_layer=kind)
    assert sum(type(module) is kind for module in timms.modules()) == 20
    if kind is BNET:  # they set gamma to 1
        with pytest.raises(AttributeError, match="'NoneType' object has no attribute 'fill_'"):
            torchvision.models.resnet18(norm_layer=kind)
        model = torchvision.models.resnet18()
        convert(model, "bnet")
    else:
        model = torchvision.models.resnet18(norm_layer=kind, zero_init_residual=True)
        assert not model.layer1[0].bn2.weight.any()
    assert sum(type(module) is kind for module in model.modules()) == 20


@pytest.mark.meeting(
    "torchvision's feature pyramid and heads built with `norm_layer=`, the parts of Panoptic FPN",
    "work",
    "FeaturePyramidNetwork([64, 128], 256, norm_layer=RBN)",
    packages=("torchvision",),
)
@KINDS
def test_the_parts_of_panoptic_fpn_take_the_layers(kind, torchvision):
    """The branch for what has no instances is torchvision's blocks on the pyramid's levels."""
    ops, detection = torchvision.ops, torchvision.models.detection
    pyramid = ops.FeaturePyramidNetwork([4, 8], 6, norm_layer=kind)
    branch = nn.Sequential(ops.Conv2dNormActivation(6, 5, norm_layer=kind), nn.Upsample(scale_factor=2))
    masks = detection.mask_rcnn.MaskRCNNHeads(6, (5, 5), 1, norm_layer=kind)
    boxes = detection.faster_rcnn.FastRCNNConvFCHead((6, 7, 7), (5,), (8,), norm_layer=kind)
    retina = detection.retinanet.RetinaNetHead(6, 2, 3, norm_layer=kind)
    x = {"0": torch.randn(2, 4, 8, 8), "1": torch.randn(2, 8, 4, 4)}
    levels = list(pyramid(x).values())
    found = [branch(levels[1]) + nn.functional.conv2d(levels[0], torch.ones(5, 6, 1, 1)), masks(levels[0])]
    found += [boxes(torch.randn(3, 6, 7, 7)), *retina(levels).values()]
    sum(each.square().mean() for each in found).backward()
    layers = [
        layer
        for part in (pyramid, branch, masks, boxes, retina)
        for layer in part.modules()
        if type(layer) is kind
    ]
    assert len(layers) == 4 + 1 + 2 + 1 + 8
    assert all(parameter.grad is not None for layer in layers for parameter in layer.parameters())


@pytest.mark.meeting(
    "norms by name in timm",
    "a KeyError of timm's, whose names are fixed: pass the class",
    "timm.layers.create_norm_layer(RBN, 64)",
    packages=("timm",),
)
@KINDS
def test_timm_takes_the_class_and_no_name(kind, timm):
    for name in (kind.__name__.lower(), "instancenorm2d"):  # one of PyTorch's own that is not in its list
        with pytest.raises(KeyError, match=name):
            timm.layers.create_norm_layer(name, 8)
    assert type(timm.layers.create_norm_layer(kind, 8)) is kind


@pytest.mark.meeting(
    "`FrozenBatchNorm2d` of torchvision and transformers",
    "works by `convert`: the layers in their place are frozen",
    "convert(torchvision.models.detection.fasterrcnn_resnet50_fpn(weights_backbone=None), preserve=True)",
    packages=("torchvision", "transformers"),
)
@KINDS
@pytest.mark.parametrize("package", ["torchvision", "transformers"])
def test_frozen_batch_norms_become_frozen_layers(kind, package, torchvision):
    from transformers.models.detr.modeling_detr import DetrFrozenBatchNorm2d

    classes = {
        "torchvision": torchvision.ops.FrozenBatchNorm2d,
        "transformers": DetrFrozenBatchNorm2d,
    }
    model = nn.Sequential(nn.Conv2d(3, 4, 3), classes[package](4))
    for buffer, start in zip(model[1].buffers(), (0.5, 1, 2, 3), strict=False):
        buffer.copy_(torch.arange(4) / 4 + start)
    expected = model(images())
    (row,) = convert(model, kind.__name__.lower(), preserve=True).rows
    assert row.detail == f"{kind.__name__}, frozen"
    torch.testing.assert_close(model.train()(images()), expected, rtol=1e-4, atol=1e-5)
    assert not statistics_move(model)
    assert not any(parameter.requires_grad for parameter in model[1].parameters())


# ---- what copies, stores or wraps ----


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def averaged(model):
    average = swa_utils.AveragedModel(model, use_buffers=True)
    average.update_parameters(model)
    return average.eval()


def parametrized(model):
    parametrize.register_parametrization(model[0], "weight", nn.Identity())
    if model[1].weight is not None:
        parametrize.register_parametrization(model[1], "weight", nn.Identity())
    return model


@KINDS
@pytest.mark.parametrize(
    "way",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), saved, averaged, parametrized],
    ids=["deepcopy", "pickle", "save", "average", "parametrize"],
)
def test_copies_give_the_same(kind, way):
    model = model_of(kind).eval()
    expected = model(images())
    torch.testing.assert_close(way(model)(images()), expected)


@pytest.fixture
def group(tmp_path):
    """One process that is a group."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.meeting(
    "`DistributedDataParallel`, `fully_shard`",
    "works",
    "DistributedDataParallel(model)",
)
@pytest.mark.filterwarnings("ignore")  # FSDP on the CPU
@KINDS
def test_distributed_wrappers_train_the_same(kind, group):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    expected = model_of(kind)(images())
    torch.testing.assert_close(nn.parallel.DistributedDataParallel(model_of(kind))(images()), expected)
    sharded = model_of(kind)
    mesh = init_device_mesh("cpu", (1,))
    fully_shard(sharded[1], mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    torch.testing.assert_close(sharded(images()), expected)


@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"track_running_stats": False}])
@pytest.mark.parametrize("kind", [RBN, IEBN, BNET, nn.BatchNorm2d])
def test_an_empty_batch_passes_through_and_is_counted(kind, options):
    layer = layer_of(kind, **options)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    x = torch.zeros(0, 4, 5, 5, requires_grad=True)
    y = layer(x)
    assert y.shape == x.shape
    y.sum().backward()
    assert not any(p.grad.any() for p in layer.parameters())
    if "num_batches_tracked" in before:
        before["num_batches_tracked"] += 1
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name]), name


# ---- what leaves PyTorch, or looks into a model ----


@pytest.mark.meeting(
    "`torch.onnx.export(dynamo=False)`, run in onnxruntime",
    "works, with any batch and size",
    "torch.onnx.export(model, images, 'model.onnx', dynamo=False)",
    packages=("onnx", "onnxruntime"),
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(
    "layer",
    [
        layer_of(RBN),
        layer_of(IEBN),
        layer_of(BNET),
        layer_of(RBN, centering="channel_std", scaling="channel_std", restrict="hard_sigmoid"),
        layer_of(RBN, centering="spatial_mean", scaling="spatial_std"),
    ],
    ids=["RBN", "IEBN", "BNET", "std", "spatial"],
)
def test_legacy_onnx_export_writes_plain_operations(layer):
    onnx = pytest.importorskip("onnx", reason="the package onnx is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="the package onnxruntime is not installed")
    model, file = nn.Sequential(nn.Conv2d(3, 4, 3), layer).eval(), io.BytesIO()
    names = {"input_names": ["x"], "output_names": ["y"]}
    axes = {"x": {0: "n", 2: "h", 3: "w"}, "y": {0: "n", 2: "h", 3: "w"}}
    torch.onnx.export(model, (images(),), file, dynamo=False, dynamic_axes=axes, **names)
    assert {node.domain for node in onnx.load_from_string(file.getvalue()).graph.node} == {""}
    session = runtime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    x = torch.randn(2, 3, 11, 9)
    (y,) = session.run(None, {"x": x.numpy()})
    expected = model(x).detach()
    assert float((torch.from_numpy(y) - expected).abs().max() / expected.abs().max()) < 1e-6


@pytest.mark.meeting(
    "`torch.jit.script`",
    "an error that names `torch.jit.trace`",
    "torch.jit.script(model)",
)
@pytest.mark.filterwarnings("ignore:`torch.jit")
@KINDS
def test_torch_jit_script_names_the_way_out(kind):
    with pytest.raises(RBNTypeError, match=r"got torch.jit.script, .* Use torch.jit.trace"):
        torch.jit.script(model_of(kind).eval())


@pytest.mark.meeting(
    "`prepare_fx` and `convert_fx`",
    "works: the layers stay in float",
    "prepare_fx(model, qconfig_mapping, images)",
)
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::UserWarning"
)  # of what is quantized in PyTorch
@KINDS
def test_quantization_keeps_the_layers_in_float(kind):
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    model = model_of(kind).eval()
    expected = model(images())
    prepared = prepare_fx(copy.deepcopy(model), get_default_qconfig_mapping("x86"), (images(),))
    torch.testing.assert_close(prepared(images()), expected)
    quantized = convert_fx(prepared)
    assert type(quantized.get_submodule("1")) is kind
    assert (quantized(images()) - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.meeting(
    "torchvision's and timm's feature extraction",
    "works",
    "create_feature_extractor(model, ['layer1'])",
    packages=("torchvision", "timm"),
)
@KINDS
def test_feature_extraction_of_torchvision_and_timm(kind, torchvision, timm):
    model = model_of(kind).eval()
    found = torchvision.models.feature_extraction.create_feature_extractor(model, {"1": "norm", "2": "relu"})
    given = found(images())
    torch.testing.assert_close(given["norm"], model[1](model[0](images())))
    torch.testing.assert_close(given["relu"], model(images()))
    features = timm.create_model("resnet18", norm_layer=kind, features_only=True, out_indices=(0, 1)).eval()
    assert [y.shape[1] for y in features(torch.randn(1, 3, 32, 32))] == [64, 64]


@pytest.mark.meeting(
    "`torch.utils.flop_counter`",
    "counts 0, as for BatchNorm",
    "FlopCounterMode(display=False)",
)
@KINDS
def test_floating_point_operations_are_counted_as_for_batch_norm(kind):
    counted, plain = [], nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    if kind is BNET:
        plain.append(nn.Conv2d(4, 4, 3, padding=1, groups=4))
    for model in (model_of(kind), plain):
        with FlopCounterMode(display=False) as counter:
            model(images()).sum().backward()
        counted.append(counter.get_total_flops())
    assert counted[0] == counted[1]


# ---- our own ----


@pytest.mark.parametrize("kind", [RBN, IEBN, BNET, nn.BatchNorm2d])
def test_update_rbn_takes_the_plain_mean_over_batches(kind):
    model, batches = model_of(kind), [(images(), 0), (images(5.0), 1)]
    expected = mean_over_batches(model, [batch for batch, _ in batches])
    model.train()[2].eval()
    update_rbn(model, iter(batches))
    assert_statistics(model, expected)
    assert model[1].momentum == 0.1
    assert [module.training for module in model] == [True, True, False]


def test_update_rbn_leaves_the_statistics_after_an_error():
    model = nn.Sequential(layer_of(RBN), nn.BatchNorm2d(4))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RBNValueError, match="expected 4 channels"):
        update_rbn(model, [torch.randn(2, 4, 5, 5), torch.randn(2, 3, 5, 5)])
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_update_rbn_puts_everything_back_after_an_error_and_refuses_what_has_no_effect():
    model = model_of(RBN).eval()
    with pytest.raises(RuntimeError, match="channels"):
        update_rbn(model, [images(), images()[:, :2]])
    assert model[1].momentum == 0.1
    assert not model[1].training
    before = model[1].running_mean.clone()
    with pytest.raises(RBNValueError, match="update_rbn: expected one batch or more, got none"):
        update_rbn(model, [])
    assert torch.equal(model[1].running_mean, before)
    freeze(model)
    for nothing in (nn.Sequential(nn.Conv2d(3, 4, 3), RBN(4, track_running_stats=False)), model):
        with pytest.raises(RBNValueError, match=r"update_rbn: expected a model .* got none in a Sequential"):
            update_rbn(nothing, [images()])
    assert torch.equal(model[1].running_mean, before)


@pytest.mark.parametrize("kind", [RBN, IEBN, BNET, nn.BatchNorm2d])
@pytest.mark.parametrize("way", [lambda model: model, copy.deepcopy, saved], ids=["itself", "copy", "file"])
def test_frozen_layers_stay_in_evaluation(kind, way):
    model = model_of(kind)
    expected = copy.deepcopy(model).eval()(images())
    table = freeze(model)
    assert table.rows == (Row("1", "frozen", kind.__name__),)
    freeze(model)  # again changes nothing
    model = way(model)
    assert len(model[1]._forward_pre_hooks) == 1
    assert not statistics_move(model)
    torch.testing.assert_close(model.train()(images()), expected)
    assert [p.requires_grad for p in model[0].parameters()] == [True, True]
    assert not any(p.requires_grad for p in model[1].parameters())


def test_frozen_layers_stay_so_when_converted_and_compiled():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    freeze(model)
    convert(model, preserve=True)
    assert not statistics_move(model)
    compiled = torch.compile(model, backend="aot_eager")
    before = model[1].running_mean.clone()
    torch.testing.assert_close(compiled.train()(images()), model(images()))
    assert torch.equal(model[1].running_mean, before)


def test_freeze_of_a_model_without_norms_is_an_error():
    with pytest.raises(RBNValueError, match=r"freeze: expected a model with RBN, .* got none in a Linear"):
        freeze(nn.Linear(3, 4))


def test_parameter_groups_let_kernels_alone_decay():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), RBN(4), IEBN(4), BNET(4), nn.BatchNorm2d(4), nn.GroupNorm(2, 4), shared, shared
    )
    model[2].requires_grad_(False)
    decays, rests = parameter_groups(model, 0.1)
    assert (decays["weight_decay"], rests["weight_decay"]) == (0.1, 0.0)
    assert [id(p) for p in decays["params"]] == [id(model[0].weight), id(shared.weight)]
    assert len(rests["params"]) == 1 + 5 + 2 + 2 + 2 + 1
    torch.optim.AdamW([decays, rests], lr=0.1)


def inert(kind, n):
    """A layer that is a plain BatchNorm in evaluation, with statistics of its own."""
    layer = kind(n)
    if kind is BNET:
        model = nn.Sequential(nn.BatchNorm2d(n))
        convert(model, "bnet", preserve=True)
        (layer,) = model
    layer.running_mean.normal_()
    layer.running_var.uniform_(0.5, 2.0)
    with torch.no_grad():
        for name in ("weight", "bias", "scale_bias"):
            if getattr(layer, name, None) is not None:
                getattr(layer, name).normal_()
    return layer


class Branches(nn.Module):
    """Every place that a norm layer can have."""

    def __init__(self, kind):
        super().__init__()
        self.first, self.norm_1 = nn.Conv2d(3, 4, 3), inert(kind, 4)
        self.twice, self.norm_2, self.norm_3 = nn.Conv2d(4, 4, 1), inert(kind, 4), inert(kind, 4)
        self.used, self.norm_4 = nn.Conv2d(4, 4, 1, bias=False), inert(kind, 4)
        self.up, self.norm_5 = nn.ConvTranspose2d(4, 4, 2), inert(kind, 4)
        self.groups, self.norm_6 = nn.ConvTranspose2d(4, 4, 2, groups=2), inert(kind, 4)
        self.linear, self.norm_7 = nn.Linear(4, 4), inert(RBN if kind is BNET else kind, 4)

    def forward(self, x):
        x = torch.relu(self.norm_1(self.first(x)))
        x = self.norm_3(self.twice(self.norm_2(self.twice(x))))
        used = self.used(x)
        x = used + self.norm_4(used)
        x = self.norm_6(self.groups(self.norm_5(self.up(x))))
        return self.norm_7(self.linear(x.mean((2, 3))))


@pytest.mark.parametrize("kind", [RBN, IEBN, BNET, nn.BatchNorm2d])
def test_fold_gives_the_same_and_leaves_what_cannot_be_folded(kind):
    torch.manual_seed(0)
    model = Branches(kind).double()
    if kind is nn.BatchNorm2d:
        model.norm_7 = nn.BatchNorm1d(4).double()
    before = copy.deepcopy(model)
    folded = fold(model.train())
    assert model.training
    for name, value in before.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
    x = images().double()
    torch.testing.assert_close(folded(x), before.eval()(x))
    left = {name for name, _ in folded.named_children() if name.startswith("norm")}
    assert left == {"norm_2", "norm_3", "norm_4", "norm_6"}


def test_fold_lists_all_that_is_at_work():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), layer_of(RBN), layer_of(IEBN), layer_of(BNET), RBN(4))
    model.append(RBN(4, track_running_stats=False))
    with pytest.raises(
        RBNValueError, match=r"fold: expected layers that are plain .* got 4 that are not"
    ) as told:
        fold(model)
    for part in ("1 center_weight is not 0", "2 scale_weight is", "3 conv_weight is", "5 has no running"):
        assert part in str(told.value)


def test_fold_leaves_what_hooks_change_and_refuses_another_axis():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), inert(RBN, 4))
    model[0].register_forward_hook(lambda layer, given, made: made + 1)
    expected = model.eval()(images())
    torch.testing.assert_close(fold(model)(images()), expected)
    folded = fold(nn.Sequential(nn.Linear(4, 4), inert(RBN, 4)))
    assert folded(torch.randn(2, 4)).shape == (2, 4)
    with pytest.raises(AssertionError, match=r"fold: expected inputs of shape \(N, C\)"):
        folded(torch.randn(2, 4, 4))


def test_fold_of_a_frozen_network_folds_every_layer():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), inert(RBN, 4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    freeze(model)
    expected = model.eval()(images())
    folded = fold(model)
    assert not any(isinstance(module, _BatchNorm) for module in folded.modules())
    torch.testing.assert_close(folded(images()), expected, rtol=1e-5, atol=1e-5)
