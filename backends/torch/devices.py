"""Where PyTorch can run."""

from __future__ import annotations

import torch


def devices() -> list[str]:
    """The devices a layer can be moved to, as PyTorch names them."""
    found = [
        f"cuda:{index} ({torch.cuda.get_device_name(index)})" for index in range(torch.cuda.device_count())
    ]
    return ["cpu", *found]
