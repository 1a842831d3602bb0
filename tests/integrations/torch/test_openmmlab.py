"""mmengine's registry, mmcv and mmdet, with the block of docs/libraries.md that registers the layers.

mmcv-lite has no compiled operators; functions that raise stand for them. Nothing here calls one.
"""

import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

from rbn.backends import torch as backend
from rbn_core import RBNTypeError


class Absent(types.ModuleType):
    """A module that seems to have every function."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)

        def absent(*_, **__):
            raise NotImplementedError(f"{self.__name__}.{name}")

        return absent


@pytest.fixture(scope="module")
def build(library, block):
    """A function that builds what a configuration says, as mmdet does."""
    sys.modules["mmcv._ext"] = Absent("mmcv._ext")
    library("mmdet.models")
    library("mmengine.registry").init_default_scope("mmdet")
    block("mmengine, mmcv and mmdet")
    yield library("mmdet.registry").MODELS.build
    del sys.modules["mmcv._ext"]


def norms(model, kind):
    return [module for module in model.modules() if type(module) is kind]


@pytest.mark.meeting(
    "mmcv's `build_norm_layer` and `ConvModule`",
    "work once the layers are registered",
    "ConvModule(3, 8, 3, norm_cfg=dict(type='RBN'))",
    packages=("mmengine", "mmcv-lite"),
)
@pytest.mark.parametrize(
    ("name", "options"),
    [("RBN", {"scaling": "channel_std"}), ("IEBN", {"momentum": 0.2}), ("BNET", {"kernel_size": 5})],
)
def test_mmcv_builds_the_layers_by_name(name, options, build, library):
    cnn, kind = library("mmcv.cnn"), getattr(backend, name)
    called, layer = cnn.build_norm_layer({"type": name, "requires_grad": False, **options}, 8, postfix=1)
    assert (called, type(layer), layer.num_features) == ("bn1", kind, 8)
    assert {option: getattr(layer, option, 5) for option in options} == options
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    module = cnn.ConvModule(3, 8, 3, norm_cfg={"type": name})
    assert module.conv.bias is None
    assert module(torch.randn(2, 3, 6, 6)).shape == (2, 8, 4, 4)
    assert len(norms(module, kind)) == 1


@pytest.mark.meeting(
    "mmdet's ResNet with `norm_eval`, `frozen_stages` and `zero_init_residual`",
    "works once the layers are registered",
    "dict(type='ResNet', depth=18, norm_cfg=dict(type='RBN'), frozen_stages=1)",
    packages=("mmengine", "mmcv-lite", "mmdet"),
)
@pytest.mark.parametrize("name", ["RBN", "IEBN", "BNET", "BN"])
def test_the_resnet_of_mmdet(name, build):
    options = {"norm_cfg": {"type": name}, "base_channels": 8, "frozen_stages": 1}
    kind = nn.BatchNorm2d if name == "BN" else getattr(backend, name)
    model = build({"type": "ResNet", "depth": 18, "norm_eval": True, **options})
    model.init_weights()
    model.train()
    found = norms(model, kind)
    assert len(found) == 20
    assert not any(norm.training for norm in found)
    frozen = {path for path, parameter in model.named_parameters() if not parameter.requires_grad}
    assert {path.split(".")[0] for path in frozen} == {"conv1", "bn1", "layer1"}
    if name != "BNET":
        assert not model.layer4[1].bn2.weight.any()  # zero_init_residual
    assert [y.shape[1] for y in model(torch.randn(1, 3, 32, 32))] == [8, 16, 32, 64]


def sample(library, boxes):
    """The truth of an image."""
    truth, size = library("mmdet.structures").DetDataSample(), (64, 64)
    truth.set_metainfo({"img_shape": size, "ori_shape": size, "pad_shape": size, "batch_input_shape": size})
    instances = library("mmengine.structures").InstanceData
    truth.gt_instances = instances(
        bboxes=torch.tensor(boxes).reshape(-1, 4), labels=torch.zeros(len(boxes), dtype=torch.long)
    )
    return truth


@pytest.mark.meeting(
    "mmdet's RetinaNet, from its own configuration",
    "trains once the layers are registered, also with an image without objects",
    "cfg.model.backbone.norm_cfg = dict(type='RBN')",
    packages=("mmengine", "mmcv-lite", "mmdet"),
)
@pytest.mark.parametrize("name", ["RBN", "BNET"])
def test_the_retinanet_of_mmdet_trains(name, build, library):
    folder = Path(library("mmdet").__file__).parent / ".mim" / "configs" / "_base_" / "models"
    config = library("mmengine.config").Config.fromfile(folder / "retinanet_r50_fpn.py").model
    norm, kind = {"type": name}, getattr(backend, name)
    config.backbone.update(depth=18, base_channels=8, norm_cfg=norm, init_cfg=None, frozen_stages=-1)
    config.backbone.update(norm_eval=False)
    config.neck.update(in_channels=[8, 16, 32, 64], out_channels=8, norm_cfg=norm)
    head = {"in_channels": 8, "feat_channels": 8, "stacked_convs": 1, "norm_cfg": norm}
    config.bbox_head.update(num_classes=2, **head)
    torch.manual_seed(0)
    model = build(config).train()
    found = norms(model, kind)
    assert len(found) > 20
    batch = torch.rand(2, 3, 64, 64), [sample(library, [[4.0, 4.0, 40.0, 40.0]]), sample(library, [])]
    losses = [loss for losses in model.loss(*batch).values() for loss in losses]
    sum(losses).backward()
    assert all(loss.isfinite() for loss in losses)
    assert all(norm.running_mean.any() for norm in found)
    assert all(p.grad is not None and p.grad.isfinite().all() for norm in found for p in norm.parameters())


@pytest.mark.meeting(
    "mmcv's `fuse_conv_bn`, mmengine's `convert_sync_batchnorm` and `efficient_conv_bn_eval`",
    "an error that says what to do instead",
    "fuse_conv_bn(model)",
    packages=("mmengine", "mmcv-lite"),
)
@pytest.mark.parametrize("name", ["RBN", "IEBN", "BNET"])
def test_what_would_drop_the_calibration_is_refused(name, build, library):
    cnn = library("mmcv.cnn")

    def module(**options):
        return cnn.ConvModule(3, 8, 3, norm_cfg={"type": name}, **options).eval()

    def evaluates():
        return module(efficient_conv_bn_eval=True)(torch.randn(1, 3, 8, 8))

    for tool in (
        lambda: library("mmcv.cnn.utils").fuse_conv_bn(module()),
        lambda: library("mmengine.model").convert_sync_batchnorm(module()),
        evaluates,
    ):
        with pytest.raises(RBNTypeError, match="expected a plain BatchNorm where a tool reads eps"):
            tool()
