"""segmentation-models-pytorch."""

import pytest
import torch

from rbn.backends import torch as backend


@pytest.fixture(scope="module")
def models(library):
    return library("segmentation_models_pytorch")


def unet(models, encoder, **options):
    channels = {"decoder_channels": (16, 8, 8, 8, 4), "classes": 2}
    return models.Unet(encoder, encoder_weights=None, **channels, **options).eval()


def images():
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.meeting(
    "segmentation-models-pytorch's networks and encoders",
    "work by `convert`",
    "convert(smp.Unet('resnet18', encoder_weights=None))",
    packages=("segmentation-models-pytorch",),
)
@pytest.mark.parametrize(
    ("encoder", "to"), [("resnet18", "rbn"), ("mobilenet_v2", "bnet"), ("timm-efficientnet-b0", "iebn")]
)
def test_networks_are_converted_and_train(encoder, to, models):
    torch.manual_seed(0)
    model = unet(models, encoder)
    expected = model(images())
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    rows = backend.convert(model, to, preserve=True).rows
    assert len(rows) == len(norms)
    assert {row.status for row in rows} == {"replaced"}
    torch.testing.assert_close(model(images()), expected, rtol=1e-4, atol=1e-4)
    model.train()(images()).square().mean().backward()
    kind = getattr(backend, to.upper())
    layers = [module for module in model.modules() if isinstance(module, kind)]
    assert len(layers) == len(norms)
    used = [layer for layer in layers if layer.num_batches_tracked]  # an encoder's head is not
    assert len(used) > len(layers) - 5
    assert all(p.grad is not None for layer in used for p in layer.parameters())


@pytest.mark.meeting(
    "segmentation-models-pytorch's `decoder_use_norm=` and `from_pretrained`",
    "accept their own layers only: an error; call `convert` first",
    "smp.Unet(decoder_use_norm='rbn')",
    packages=("segmentation-models-pytorch",),
)
def test_names_and_files_of_other_layers_are_refused(models, tmp_path):
    for name in ("rbn", "groupnorm", {"type": "rbn"}):  # it has no GroupNorm either
        with pytest.raises(ValueError, match="Unrecognized normalization type string provided"):
            unet(models, "resnet18", decoder_use_norm=name)
    model = unet(models, "resnet18")
    backend.convert(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*center_weight"):
        models.from_pretrained(tmp_path)
