"""Changes to the layers of a whole PyTorch model."""

from __future__ import annotations

from typing import TypeVar

from torch import nn
from torch.distributed import ProcessGroup

from rbn.backends.torch.layers import CalibratedNorm

Model = TypeVar("Model", bound=nn.Module)


def convert_sync_rbn(model: Model, process_group: ProcessGroup | None = None) -> Model:
    """Let every RBN, IEBN and BNET of a model take its batch statistics over all processes, in place.

    As `torch.nn.SyncBatchNorm.convert_sync_batchnorm` does for BatchNorm; the two go together on a model that
    has both kinds.

    Args:
        model: The model; its layers keep their parameters, statistics, hooks and mode.
        process_group: The processes; all by default.

    Returns:
        The model.
    """
    for module in model.modules():
        if isinstance(module, CalibratedNorm):
            module.sync, module.process_group = True, process_group
    return model
