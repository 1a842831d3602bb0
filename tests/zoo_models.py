"""Models of torchvision, timm and transformers as these packages build them, in a process with PyTorch.

    python zoo_models.py save FOLDER ZOO.NETWORK...

builds each with random weights, and writes ZOO.NETWORK.pth, and ZOO.NETWORK.npz with images and logits.

    python zoo_models.py load FOLDER ZOO.NETWORK...

loads each ZOO.NETWORK.*.pth into such a model, strictly, and fails where the logits are others.
"""

import sys
from pathlib import Path

import numpy as np
import torch

try:
    import torchvision
except RuntimeError:  # its own operators are compiled for PyTorch with CUDA: networks need them only declared
    for name in ("nms", "qnms"):
        declared = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        torch.library.define(f"torchvision::{name}", declared)
    import torchvision

import timm

torch.set_num_threads(1)  # several wait for each other where other tests run beside them

TIMM = {"mobilenet_v2": "mobilenetv2_100"}
"""What timm calls otherwise than torchvision does."""


def build(zoo, network):
    """A model."""
    if zoo == "torchvision":
        return torchvision.models.get_model(network, weights=None)
    if zoo == "timm":
        return timm.create_model(TIMM.get(network, network), pretrained=False)
    from transformers import ResNetConfig, ResNetForImageClassification  # seconds, for one model

    layers = {
        "resnet18": {"layer_type": "basic", "depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 256, 512]},
        "resnet50": {"layer_type": "bottleneck", "depths": [3, 4, 6, 3]},
    }
    return ResNetForImageClassification(ResNetConfig(num_labels=1000, **layers[network]))


def run(model, images):
    """The logits of some images."""
    with torch.no_grad():
        found = model.eval()(torch.from_numpy(images))
    return getattr(found, "logits", found).numpy()


def save(folder, zoo, network):
    """Write a model's weights and what it gives."""
    model = build(zoo, network)
    rng = np.random.default_rng(0)
    for name, values in model.state_dict().items():
        if values.ndim == 1:  # all that starts at 0 or 1
            values.abs_().add_(torch.from_numpy(rng.uniform(0.05, 0.2, values.shape)))
        elif name.endswith("num_batches_tracked"):
            values.fill_(7)
    images = rng.normal(size=(2, 3, 64, 64)).astype(np.float32)
    torch.save(model.state_dict(), folder / f"{zoo}.{network}.pth")
    np.savez(folder / f"{zoo}.{network}.npz", images=images, logits=run(model, images))


def load(folder, zoo, network):
    """Hold what came back to what was written."""
    written = np.load(folder / f"{zoo}.{network}.npz")
    back = sorted(folder.glob(f"{zoo}.{network}.*.pth"))
    assert back
    model = build(zoo, network)
    for path in back:
        model.load_state_dict(torch.load(path, weights_only=True), strict=True)
        np.testing.assert_array_equal(run(model, written["images"]), written["logits"], err_msg=path.name)


if __name__ == "__main__":
    what, folder, *names = sys.argv[1:]
    for name in names:
        {"save": save, "load": load}[what](Path(folder), *name.split("."))
