"""ultralytics: training, prediction and folding of a network of six layers, without a download."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from rbn.backends.torch import BNET, IEBN, RBN, convert
from rbn_core import RBNTypeError
from rbn_core.errors import RBNWarning

NETWORK = """nc: 1
backbone:
  - [-1, 1, Conv, [8, 3, 2]]
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, C2f, [16, True]]
  - [-1, 1, Conv, [32, 3, 2]]
  - [-1, 1, SPPF, [32, 5]]
head:
  - [[2, 4], 1, Detect, [nc]]
"""
NORMS, SIDE = 17, 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where everything is: four images with a bright square, one of them without, and the network."""
    folder = tmp_path_factory.mktemp("yolo")
    for name in ("images", "labels"):
        (folder / name).mkdir()
    for index in range(4):
        image = np.random.default_rng(index).integers(0, 200, (SIDE, SIDE, 3), dtype=np.uint8)
        image[10:40, 10:40] = 255
        Image.fromarray(image).save(folder / "images" / f"{index}.png")
        (folder / "labels" / f"{index}.txt").write_text("0 0.39 0.39 0.47 0.47\n" if index else "")
    (folder / "data.yaml").write_text(f"path: {folder}\ntrain: images\nval: images\nnames: [square]\n")
    (folder / "tiny.yaml").write_text(NETWORK)
    return folder


@pytest.fixture(scope="module")
def ultralytics(folder, library):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("YOLO_CONFIG_DIR", str(folder))
        patch.setenv("YOLO_OFFLINE", "1")
        patch.chdir(folder)
        yield library("ultralytics")


def network(ultralytics, convert_to=None):
    """A new model of theirs; the warning of `convert` is tested by itself."""
    model = ultralytics.YOLO("tiny.yaml")
    if convert_to:
        with pytest.warns(RBNWarning, match="YOLO.train"):
            convert(model.model, convert_to)
    return model


def train(model, folder, **options):
    quiet = {"workers": 0, "device": "cpu", "plots": False, "verbose": False, "amp": False, "seed": 0}
    data = {"data": str(folder / "data.yaml"), "imgsz": SIDE, "batch": 2, "epochs": 1}
    model.train(**data, **quiet, project=str(folder / "runs"), **options)


def count(model, kind):
    return sum(type(module) is kind for module in model.model.modules())


def predict(model):
    image = np.zeros((SIDE, SIDE, 3), np.uint8)
    return model.predict(image, imgsz=SIDE, verbose=False, device="cpu", conf=1e-4)


@pytest.mark.meeting(
    "ultralytics' training, prediction and files",
    "work with a class of your own",
    "RBNYOLO('yolo11n.yaml').train(data='coco8.yaml')",
    packages=("ultralytics",),
)
def test_a_class_of_ones_own_trains_predicts_and_loads(ultralytics, folder, block, monkeypatch):
    ours = block("ultralytics")
    for name in ("RBNModel", "RBNTrainer"):  # files hold the class by its name
        monkeypatch.setitem(globals(), name, ours[name])
        monkeypatch.setattr(ours[name], "__module__", __name__)
    model = ours["RBNYOLO"]("tiny.yaml")
    train(model, folder)
    assert (count(model, RBN), count(model, nn.BatchNorm2d)) == (NORMS, 0)
    norms = [module for module in model.model.modules() if type(module) is RBN]
    assert all(norm.running_mean.any() for norm in norms)
    assert any(norm.center_weight.any() for norm in norms)  # the files are in half precision
    assert predict(model)[0].boxes is not None
    loaded = ours["RBNYOLO"](str(model.trainer.best))
    images = torch.rand(1, 3, SIDE, SIDE)
    torch.testing.assert_close(loaded.model.eval()(images)[0], model.model.eval()(images)[0])
    train(loaded, folder)
    assert (count(loaded, RBN), count(loaded, nn.BatchNorm2d)) == (NORMS, 0)


@pytest.mark.meeting(
    "ultralytics' `YOLO.train` after `convert`",
    "builds the network again with BatchNorm, as after every change of a network; `convert` warns of it",
    "convert(YOLO('yolo11n.yaml').model)",
    packages=("ultralytics",),
)
@pytest.mark.parametrize("change", ["convert", "GroupNorm"])
def test_training_builds_the_network_anew_and_convert_warns(change, ultralytics, folder):
    model = network(ultralytics, "rbn" if change == "convert" else None)
    if change == "convert":
        assert count(model, RBN) == NORMS
    else:
        model.model.model[0].bn = nn.GroupNorm(2, 8)
    train(model, folder, val=False)
    assert count(model, nn.BatchNorm2d) == NORMS


@pytest.mark.meeting(
    "ultralytics' `fuse()`, also in `predict`",
    "an error that says what to do instead",
    "model.predict(image)",
    packages=("ultralytics",),
)
@pytest.mark.parametrize(("to", "kind"), [("rbn", RBN), ("iebn", IEBN), ("bnet", BNET)])
def test_folding_is_refused(to, kind, ultralytics):
    for tool in (lambda model: model.fuse(), predict):
        model = network(ultralytics, to)
        with pytest.raises(RBNTypeError, match="where a tool reads eps"):
            tool(model)
        assert count(model, kind) == NORMS


def test_folding_is_right_for_batch_norm(ultralytics):
    """And a wrong number of it would show: the same comparison with the layers of the library."""
    model, images = network(ultralytics).model.eval(), torch.rand(1, 3, SIDE, SIDE)
    expected = model(images)[0]
    torch.testing.assert_close(model.fuse(verbose=False)(images)[0], expected, rtol=1e-3, atol=1e-3)
