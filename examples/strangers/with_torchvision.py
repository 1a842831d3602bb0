"""Import torchvision also where its own operators are compiled for another PyTorch, and do not load."""

import torch

try:
    import torchvision  # noqa: F401
except RuntimeError:
    for name in ("nms", "qnms"):  # what it registers shapes for
        torch.library.define(f"torchvision::{name}", "(Tensor a, Tensor b, float c) -> Tensor")
