"""Calls of examples/detection, in a process: python detection_example.py FOLDER DATA. Prints JSON."""

import importlib.util
import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import detection

EXAMPLE = Path(__file__).parents[2] / "examples" / "detection"
CLASSES = 11


def builds(options):
    """Every detector with every norm: its norm layers by part and class, and a step of training."""
    import coco
    import detectors
    import norms
    import torch

    found = {}
    for detector in ("faster_rcnn", "mask_rcnn", "retinanet"):
        for norm in ("batch", "rbn", "iebn", "bnet"):
            chosen = replace(options, detector=detector, norm=norm)
            torch.manual_seed(0)
            model = detectors.build(chosen, CLASSES)
            norms.place(model, chosen, None)
            dataset = coco.training_set(chosen)
            images, targets = next(iter(coco.epoch_batches(dataset, chosen, 0, 0, 0, 1, 0)))
            loss = sum(model.train()(images, targets).values())
            loss.backward()
            found[f"{detector} {norm}"] = {
                "norms": counted(model),
                "loss": loss.item(),
                "learned": all(
                    parameter.grad is not None and bool(parameter.grad.isfinite().all())
                    for parameter in model.parameters()
                ),
            }
    return found


def places(options):
    """How many layers of which class the other places give."""
    import detectors
    import norms

    found = {}
    for where in ("backbone", "bn3"):
        chosen = replace(options, network="resnet50", norm="bnet", where=where)
        model = detectors.build(chosen, CLASSES)
        norms.place(model, chosen, None)
        found[where] = counted(model)
    return found


def ported(folder, name, network, norm=None):
    """The canonical file of a ResNet-18."""
    import torch

    from rbn import porting

    torch.save(network.state_dict(), folder / f"{name}.pth")
    path = folder / f"{name}.safetensors"
    porting.port(folder / f"{name}.pth", path, network="resnet18", norm=norm)
    return path


def perfect(data):
    """The AP of a detector that finds what is annotated, of one with too large boxes, and of none."""
    import evaluation
    from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2

    annotations = CocoDetection(data / "val2017", data / "annotations" / "instances_val2017.json")
    dataset = wrap_dataset_for_transforms_v2(annotations, ["boxes", "labels", "masks", "image_id"])
    found, large = [], []
    for _, target in dataset:
        output = {
            "boxes": target["boxes"],
            "labels": target["labels"],
            "scores": target["labels"] / CLASSES,
            "masks": target["masks"][:, None].float(),
        }
        found += evaluation.results(target["image_id"], output)
        large += evaluation.results(target["image_id"], output | {"boxes": target["boxes"] * 2})
    return {
        "box": evaluation.score(dataset.coco, found, "bbox"),
        "mask": evaluation.score(dataset.coco, found, "segm"),
        "large": evaluation.score(dataset.coco, large, "bbox"),
        "nothing": evaluation.score(dataset.coco, [], "bbox"),
    }


def counted(model):
    """The norm layers of each part by class."""
    from torch.nn.modules.batchnorm import _BatchNorm

    parts = {"body": "backbone.body.", "fpn": "backbone.fpn.", "heads": ""}
    count = {part: {} for part in parts}
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm):
            part = next(part for part, prefix in parts.items() if name.startswith(prefix))
            kind = type(module).__name__
            count[part][kind] = count[part].get(kind, 0) + 1
    return count


def backbones(options, folder):
    """How far logits from a backbone are from those of the network that it was loaded from."""
    import detectors
    import norms
    import torch
    import torchvision

    from rbn.backends.torch import network

    images = torch.randn(2, 3, 64, 64)
    found = {}
    for kind in ("batch", "rbn", "iebn", "bnet"):
        torch.manual_seed(1)
        theirs = torchvision.models.resnet18() if kind == "batch" else network("resnet18", kind)
        with torch.no_grad():
            for parameter in theirs.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
        canonical = ported(folder, kind, theirs)
        chosen = replace(options, norm="rbn" if kind == "batch" else kind)
        model = detectors.build(chosen, CLASSES)
        norms.place(model, chosen, canonical)
        with torch.no_grad():
            expected = theirs.eval()(images)
            maps = list(model.backbone.body.eval()(images).values())[-1]
            got = theirs.fc(maps.mean(dim=(2, 3)))
        found[kind] = ((got - expected).abs().max() / expected.abs().max()).item()
    return found


def mistakes(data, folder):
    """What a user is told who makes a mistake: exit status and text by the mistake."""
    from typer.testing import CliRunner

    from rbn.backends.torch import network

    spec = importlib.util.spec_from_file_location("detection_command", EXAMPLE / "__main__.py")
    command = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(command)

    def copy(name, change):
        """The data with other annotations for training."""
        place = folder / name
        shutil.copytree(data, place)
        path = place / "annotations" / "instances_train2017.json"
        path.write_text(change(json.loads(path.read_text())))
        return place

    def changed(**values):
        return lambda content: json.dumps(content | values)

    def annotated(**values):
        """Other values in every annotation."""
        return lambda content: json.dumps(
            content | {"annotations": [each | values for each in content["annotations"]]}
        )

    gone = copy("gone", json.dumps)
    next((gone / "train2017").iterdir()).unlink()
    (folder / "text.pth").write_text("no checkpoint")
    (folder / "old").mkdir()
    (folder / "old" / "last.pth").write_text("a run")
    norm = {"layer": "rbn", "scaling": "channel_std"}
    scaled = ported(folder, "scaled", network("resnet18", norm), norm)
    tried = {
        "no folder": [folder / "nowhere"],
        "no annotations": [copy("empty", changed(annotations=[]))],
        "no JSON": [copy("broken", lambda content: "{")],
        "no image": [gone],
        "category 0": [copy("zero", changed(categories=[{"id": 0, "name": "zero"}]))],
        "crowds alone": [copy("crowds", annotated(iscrowd=1))],
        "no masks": [copy("boxes", annotated(segmentation=[])), "--detector", "mask_rcnn"],
        "unknown norm": [data, "--norm", "group"],
        "unknown network": [data, "--network", "vgg16"],
        "large batch": [data, "--batch-size", "64"],
        "no bn3": [data, "--network", "resnet18", "--where", "bn3"],
        "sync": [data, "--network", "resnet18", "--norm", "batch", "--sync"],
        "another norm": [data, "--network", "resnet18", "--backbone", folder / "iebn.safetensors"],
        "another network": [data, "--network", "resnet34", "--backbone", folder / "rbn.safetensors"],
        "other options": [data, "--network", "resnet18", "--backbone", scaled],
        "no weights": [data, "--network", "resnet18", "--backbone", folder / "nowhere.safetensors"],
        "old run": [data, "--out", folder / "old"],
    }
    small = ("--batch-size", "2", "--device", "cpu", "--workers", "0", "--out", folder / "run")
    calls = {name: ["train", *small, *arguments] for name, arguments in tried.items()}
    calls["no checkpoint"] = ["resume", folder / "text.pth"]
    calls["no file"] = ["evaluate", folder / "nowhere.pth"]
    calls["no GPU"] = ["train", data, "--out", folder / "run", "--device", "cuda"]
    os.environ["LOCAL_RANK"] = "99"  # no machine has so many
    found = {}
    for name, arguments in calls.items():
        result = CliRunner().invoke(command.app, [str(each) for each in arguments])
        found[name] = [result.exit_code, " ".join(result.output.split())]
    return found


def main(folder, data):
    detection.load_operators(folder)
    sys.path.insert(0, str(EXAMPLE))
    from options import Options

    options = Options(str(data), network="resnet18", batch_size=2, size=64, channels=16, anchors=8)
    result = {
        "builds": builds(options),
        "places": places(options),
        "backbones": backbones(options, folder),
        "perfect": perfect(data),
        "mistakes": mistakes(data, folder),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
