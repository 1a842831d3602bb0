"""Models of torchvision with its real operators, in a process: python detection.py FOLDER NAME LAYER.

The operators of torchvision's wheel are compiled for CUDA, and beside a PyTorch for the CPU they lack its
libraries. Empty functions stand for those here: nothing in these models calls one.
"""

import ctypes
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from rbn.backends import torch as backend

SIDE = 64
DATA, STARTED = "allocator", "__cudaRegisterFatBinary"
"""A symbol that is no function, and the one whose result is used when the library is loaded."""


def load_operators(folder):
    """Load torchvision's operators, beside libraries of empty functions where there is no CUDA."""
    package = Path(*importlib.util.find_spec("torchvision").submodule_search_locations)
    library = package / "_C.so"
    lines = subprocess.run(
        ["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True
    )
    names = {line.split()[-1].partition("@")[0] for line in lines.stdout.splitlines()}
    text = "static void *handle[2];\n"
    for name in sorted(name for name in names if "cuda" in name.lower()):
        if DATA in name:
            text += f"void *{name}[64];\n"
        else:
            text += f"void *{name}(void) {{ return {'handle' if name == STARTED else '0'}; }}\n"
    for soname in ("libc10_cuda.so", "libtorch_cuda.so", "libcudart.so.13"):
        source = text if soname == "libc10_cuda.so" else ""
        command = [
            "g++",
            "-shared",
            "-fPIC",
            "-w",
            "-x",
            "c",
            "-",
            f"-Wl,-soname,{soname}",
            "-o",
            folder / soname,
        ]
        subprocess.run(command, input=source, text=True, check=True)
        ctypes.CDLL(folder / soname, mode=ctypes.RTLD_GLOBAL)
    sys.setdlopenflags(os.RTLD_LAZY | os.RTLD_GLOBAL)
    torch.ops.load_library(library)


def targets(masks):
    """What is in the images: one object in the first, none in the second."""
    found = []
    for boxes in ([[4.0, 4.0, 40.0, 40.0]], []):
        target = {
            "boxes": torch.tensor(boxes).reshape(-1, 4),
            "labels": torch.ones(len(boxes), dtype=torch.int64),
        }
        if masks:
            target["masks"] = torch.ones(len(boxes), SIDE, SIDE, dtype=torch.uint8)
        found.append(target)
    return found


def build(name):
    """A model with random weights, for images of this size."""
    from torchvision import models

    options = {"weights": None, "weights_backbone": None}
    if hasattr(models.detection, name):
        return getattr(models.detection, name)(**options, num_classes=3, min_size=SIDE, max_size=SIDE)
    if hasattr(models.segmentation, name):
        return getattr(models.segmentation, name)(**options, num_classes=3)
    return getattr(models, name)(weights=None, num_classes=3)


def outputs(model, images):
    """What a model gives in evaluation; of a detector its features, for random weights find nothing."""
    detects = isinstance(images, list)
    with torch.no_grad():
        found = model.eval().backbone(torch.stack(images)) if detects else model.eval()(images)
    return list(found.values()) if isinstance(found, dict) else [found]


def difference(found, expected):
    """How far apart two lists of outputs are, relative to the largest."""
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, expected, strict=True))


def step(model, images, name):
    """A step of training; returns the loss."""
    model.train()
    if isinstance(images, list):
        loss = sum(model(images, targets("mask" in name)).values())
    else:
        found = model(images)
        loss = sum(each.square().mean() for each in (found.values() if isinstance(found, dict) else [found]))
    loss.backward()
    return loss.item()


def main(folder, name, layer):
    load_operators(Path(folder))
    torch.manual_seed(0)
    model = build(name)
    images = torch.rand(2, 3, SIDE, SIDE)
    images = list(images) if "rcnn" in name or "retina" in name else images
    norms = sum(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())
    expected = outputs(model, images)
    table = backend.convert(model, layer, preserve=True)
    found = outputs(model, images)
    layers = [module for module in model.modules() if type(module).__name__ == layer.upper()]
    before = [module.running_mean.clone() for module in layers]
    loss = step(model, images, name)
    moved = sum(not torch.equal(old, layer.running_mean) for old, layer in zip(before, layers, strict=True))
    result = {
        "norms": norms,
        "replaced": sum(row.status == "replaced" for row in table.rows),
        "off": difference(found, expected),
        "loss": loss,
        "moved": moved,
        "layers": len(layers),
        "learned": all(
            p.grad is not None and bool(p.grad.isfinite().all()) for each in layers for p in each.parameters()
        ),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
