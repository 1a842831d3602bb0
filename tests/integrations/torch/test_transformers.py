"""transformers' `save_pretrained` and `from_pretrained`, with the block of docs/libraries.md."""

import logging

import pytest
import torch

from rbn.backends.torch import BNET, IEBN, RBN, convert

SIZES = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}


@pytest.fixture(scope="module")
def transformers(library):
    return library("transformers")


@pytest.fixture(scope="module")
def ours(transformers, block):
    return block("transformers")


def images():
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def logits(model):
    with torch.no_grad():
        return model.eval()(images()).logits


def trained(model):
    """A model with a calibration at work and statistics of its own."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) / 4)
        model.train()(images())
    return model


def plain(transformers):
    return transformers.ResNetForImageClassification(transformers.ResNetConfig(**SIZES))


@pytest.mark.meeting(
    "transformers' `save_pretrained` and `from_pretrained`",
    "work with a class of your own",
    "AutoModelForImageClassification.from_pretrained(folder)",
    packages=("transformers",),
)
def test_a_class_of_ones_own_is_saved_and_loaded(transformers, ours, tmp_path):
    model = trained(ours["RBNResNet"](ours["RBNResNetConfig"](**SIZES)))
    model.save_pretrained(tmp_path)
    for loader in (ours["RBNResNet"], transformers.AutoModelForImageClassification):
        loaded, report = loader.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(report.values())
        assert type(loaded) is ours["RBNResNet"]
        assert sum(isinstance(module, RBN) for module in loaded.modules()) == 6
        assert torch.equal(logits(loaded), logits(model))


@pytest.mark.meeting(
    "transformers' `from_pretrained` of a model that `convert` has changed",
    "builds BatchNorm, and a warning names what it leaves out",
    "model.load_state_dict(weights)  # after convert(model)",
    packages=("transformers",),
)
@pytest.mark.parametrize(("to", "kind"), [("rbn", RBN), ("iebn", IEBN), ("bnet", BNET)])
def test_a_class_of_theirs_builds_batch_norm_and_says_what_it_leaves_out(
    to, kind, transformers, tmp_path, caplog, monkeypatch
):
    model = plain(transformers)
    convert(model, to)
    expected = logits(trained(model))
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path)
    told, *_ = [record for record in caplog.records if "were not used when initializing" in record.message]
    assert told.levelno == logging.WARNING
    left_out = {name for name in model.state_dict() if name not in loaded.state_dict()}
    assert len(left_out) == {RBN: 3, IEBN: 2, BNET: 2}[kind] * 6
    assert all(name in told.message for name in left_out)
    assert not torch.allclose(logits(loaded), expected, atol=1e-2)
    convert(loaded, to)
    loaded.load_state_dict(model.state_dict())
    assert torch.equal(logits(loaded), expected)


def test_any_other_layer_is_left_out_too(transformers, tmp_path, caplog, monkeypatch):
    """What PyTorch's own layers cannot do either: a GroupNorm with a name of its own."""
    model = plain(transformers)
    model.resnet.embedder.embedder.normalization = torch.nn.Sequential(torch.nn.GroupNorm(2, 8))
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    transformers.ResNetForImageClassification.from_pretrained(tmp_path)
    assert any("embedder.normalization.0.weight" in record.message for record in caplog.records)
