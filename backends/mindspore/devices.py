"""Where MindSpore can run."""

from __future__ import annotations

from mindspore import hal


def devices() -> list[str]:
    """The device targets that this installation can use, each with how many there are."""
    targets = [target for target in ("CPU", "GPU", "Ascend") if hal.is_available(target)]
    return [f"{target} ({hal.device_count(target)})" for target in targets]
