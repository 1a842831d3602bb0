"""Where Jittor can run."""

from __future__ import annotations

import jittor as jt


def devices() -> list[str]:
    """The processor, and the number of CUDA devices where Jittor was compiled for them."""
    return ["cpu", f"cuda ({jt.get_device_count()})"] if jt.has_cuda else ["cpu"]
