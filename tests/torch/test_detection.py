"""torchvision's detectors, segmentation and classification networks with the layers: `detection.py`."""

import importlib.util
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.skipif(not (shutil.which("g++") and shutil.which("nm")), reason="there is no g++ or nm"),
    pytest.mark.skipif(
        importlib.util.find_spec("torchvision") is None, reason="torchvision is not installed"
    ),
]


def meet(tmp_path, name, layer):
    """Convert a model, compare what it gives, and train it for a step."""
    command = [sys.executable, Path(__file__).with_name("detection.py"), tmp_path, name, layer]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    print(name, layer, found)
    assert found["replaced"] == found["norms"] == found["layers"] > 0
    assert found["off"] < 1e-4
    assert math.isfinite(found["loss"])
    assert found["moved"] == found["layers"]
    assert found["learned"]


@pytest.mark.meeting(
    "torchvision's Faster R-CNN, Mask R-CNN and RetinaNet, with an image without objects",
    "works by `convert`",
    "convert(torchvision.models.detection.retinanet_resnet50_fpn(), preserve=True)",
    packages=("torchvision",),
)
@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("fasterrcnn_mobilenet_v3_large_320_fpn", "rbn"),
        pytest.param("maskrcnn_resnet50_fpn_v2", "rbn", marks=pytest.mark.long),
        pytest.param("retinanet_resnet50_fpn", "iebn", marks=pytest.mark.long),
        pytest.param("fasterrcnn_resnet50_fpn_v2", "bnet", marks=pytest.mark.long),
    ],
)
def test_detectors_are_converted_and_train(name, layer, tmp_path):
    meet(tmp_path, name, layer)


@pytest.mark.meeting(
    "torchvision's DeepLab, FCN, EfficientNet, RegNet, DenseNet and MobileNet",
    "works by `convert`",
    "convert(torchvision.models.efficientnet_b0())",
    packages=("torchvision",),
)
@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("deeplabv3_mobilenet_v3_large", "rbn"),
        pytest.param("efficientnet_b0", "rbn", marks=pytest.mark.long),
        pytest.param("mobilenet_v3_small", "bnet", marks=pytest.mark.long),
        pytest.param("fcn_resnet50", "rbn", marks=pytest.mark.long),
        pytest.param("regnet_x_400mf", "iebn", marks=pytest.mark.long),
        pytest.param("densenet121", "rbn", marks=pytest.mark.long),
    ],
)
def test_networks_are_converted_and_train(name, layer, tmp_path):
    meet(tmp_path, name, layer)
