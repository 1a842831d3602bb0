"""`examples/detection`, as a user runs it, but for torchvision's operators: `with_operators.py`."""

import csv
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

HERE = Path(__file__).parent
EXAMPLE = HERE.parents[1] / "examples" / "detection"
NEEDED = ("torchvision", "pycocotools")
SMALL = ("--detector", "retinanet", "--network", "resnet18", "--size", "32", "--channels", "16")
SMALL += ("--anchors", "8", "--batch-size", "4", "--workers", "0", "--device", "cpu")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}

pytestmark = [
    pytest.mark.skipif(not (shutil.which("g++") and shutil.which("nm")), reason="there is no g++ or nm"),
    pytest.mark.skipif(
        not all(importlib.util.find_spec(name) for name in NEEDED),
        reason="torchvision or pycocotools is not installed",
    ),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """8 images for training and 4 for validation."""
    folder = tmp_path_factory.mktemp("digits")
    command = [sys.executable, EXAMPLE, "digits", folder, "--images", "8", "--validation", "4"]
    subprocess.run(command, check=True, capture_output=True, env=ENVIRONMENT)
    return folder


@pytest.fixture(scope="module")
def calls(data, tmp_path_factory):
    """What `detection_example.py` found."""
    command = [sys.executable, HERE / "detection_example.py", tmp_path_factory.mktemp("calls"), data]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def command(folder, *arguments, processes=1):
    """The command line that runs the example."""
    several = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}")
    start = several if processes > 1 else ()
    return [sys.executable, *start, HERE / "with_operators.py", folder / "operators", EXAMPLE, *arguments]


def rows(run):
    with (run / "log.csv").open() as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """The folder of a run that nobody stopped."""
    folder = tmp_path_factory.mktemp("whole")
    run = subprocess.run(
        command(folder, "train", data, "--out", folder / "run", *SMALL),
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
    )
    assert run.returncode == 0, run.stderr
    return folder / "run"


def test_boxes_areas_and_masks_are_those_that_pycocotools_takes_from_the_masks(data):
    from pycocotools import mask as masks

    for split, images in (("train", 8), ("val", 4)):
        content = json.loads((data / "annotations" / f"instances_{split}2017.json").read_text())
        assert len(content["images"]) == len(list((data / f"{split}2017").iterdir())) == images
        for each in content["annotations"]:
            encoded = masks.frPyObjects(each["segmentation"], 128, 128)
            assert masks.toBbox(encoded).tolist() == each["bbox"]
            assert masks.area(encoded) == each["area"] > 0


@pytest.mark.parametrize("norm", ["batch", "rbn", "iebn", "bnet"])
@pytest.mark.parametrize(
    ("detector", "fpn", "heads"), [("faster_rcnn", 8, 4), ("mask_rcnn", 8, 8), ("retinanet", 6, 40)]
)
def test_the_norm_is_everywhere_and_a_step_reaches_every_parameter(calls, detector, norm, fpn, heads):
    kind = {"batch": "BatchNorm2d"}.get(norm, norm.upper())
    found = calls["builds"][f"{detector} {norm}"]
    assert found["norms"] == {"body": {kind: 20}, "fpn": {kind: fpn}, "heads": {kind: heads}}
    assert np.isfinite(found["loss"])
    assert found["learned"]


def test_the_other_places_are_the_backbone_and_its_last_norms(calls):
    nowhere = {"fpn": {}, "heads": {}}
    assert calls["places"]["backbone"] == {"body": {"BNET": 53}, **nowhere}
    assert calls["places"]["bn3"] == {"body": {"BatchNorm2d": 37, "BNET": 16}, **nowhere}


@pytest.mark.parametrize("kind", ["batch", "rbn", "iebn", "bnet"])
def test_a_backbone_gives_what_the_imagenet_network_gives(calls, kind):
    assert calls["backbones"][kind] < 1e-5


def test_a_perfect_detector_has_an_ap_of_100_and_others_have_less(calls):
    found = calls["perfect"]
    for kind in ("box", "mask"):
        assert found[kind]["AP"] == found[kind]["AP75"] == found[kind]["APs"] == pytest.approx(100)
        assert np.isnan(found[kind]["APl"])  # no digit is so large
    assert found["large"]["AP"] < 50
    assert found["nothing"]["AP"] == 0


def test_a_run_that_ctrl_c_stops_goes_on_to_the_same_weights(data, whole, tmp_path):
    process = subprocess.Popen(
        command(tmp_path, "train", data, "--out", tmp_path / "run", *SMALL, "--workers", "1"),
        stdout=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        start_new_session=True,
    )
    while process.poll() is None and not (tmp_path / "run" / "log.csv").exists():
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the process that reads images gets it, too
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"resume {tmp_path / 'run' / 'last.pth'} goes on" in said
    done = subprocess.run(
        command(tmp_path, "resume", tmp_path / "run" / "last.pth", "--workers", "0", "--device", "cpu"),
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
    )
    assert done.returncode == 0, done.stderr
    expected, found = (torch.load(run / "last.pth", weights_only=True) for run in (whole, tmp_path / "run"))
    assert found["step"] == expected["step"] == 24
    assert [row["epoch"] for row in rows(tmp_path / "run")] == list(range(1, 13))
    for name, value in expected["model"].items():
        assert torch.equal(found["model"][name], value), name


def test_the_loss_falls_and_the_learning_rate_has_its_steps(whole):
    found = rows(whole)
    assert found[-1]["loss"] < found[0]["loss"]
    rates = [row["learning_rate"] / 0.0025 for row in found]  # 0.01 for 16 images, and here 4
    first = (1 + 0.001) / 2  # of the second of two steps that the warm-up takes
    np.testing.assert_allclose(rates, [first] + [1] * 7 + [0.1] * 3 + [0.01])
    assert all(0 <= row["box AP"] <= 100 for row in found)


@pytest.mark.parametrize(
    ("mistake", "status", "said"),
    [
        ("no folder", 1, "expected COCO's folders and files"),
        ("no annotations", 1, "expected annotations and categories"),
        ("no JSON", 1, "expected COCO's JSON"),
        ("no image", 1, "1 of 8 are not there"),
        ("category 0", 1, "expected categories from 1 on"),
        ("crowds alone", 1, "expected annotations with boxes"),
        ("no masks", 1, "Take --detector faster_rcnn"),
        ("unknown norm", 2, "'group' is not one of"),
        ("unknown network", 1, "expected --network resnet18"),
        ("large batch", 1, "expected at least 64 images"),
        ("no bn3", 1, "expected a backbone with bottlenecks"),
        ("sync", 1, "expected a GPU for --sync with --norm batch"),
        ("another norm", 1, "Give --norm iebn"),
        ("another network", 1, "rbn port FILE"),
        ("other options", 1, "{'scaling': 'channel_std'}"),
        ("no weights", 1, "which is no file"),
        ("old run", 1, "expected a folder without a run"),
        ("no checkpoint", 1, "damaged or another kind of file"),
        ("no file", 1, "No such file"),
        ("no GPU", 1, "expected a GPU for process 99"),
    ],
)
def test_a_mistake_is_one_error(calls, mistake, status, said):
    found, text = calls["mistakes"][mistake]
    assert found == status
    assert said in text


@pytest.mark.long
def test_two_processes_with_synchronised_statistics_train_as_one(data, whole, tmp_path):
    done = subprocess.run(
        command(tmp_path, "train", data, "--out", tmp_path / "run", *SMALL, "--sync", processes=2),
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
    )
    assert done.returncode == 0, done.stderr
    expected, found = rows(whole), rows(tmp_path / "run")
    assert len(found) == 12
    # Of two steps, before rounding has grown: in so small a network a step makes it a hundred times as large.
    assert found[0]["loss"] == pytest.approx(expected[0]["loss"], rel=1e-5)
