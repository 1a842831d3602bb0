"""One process of tests/torch/test_distributed.py: its share of a batch, held to the whole batch."""

import copy
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from rbn.backends.torch import BNET, IEBN, RBN, convert_sync_rbn
from rbn_core import RBNValueError

SHARES = {1: (4,), 2: (3, 1), 4: (2, 0, 3, 1)}
LAYERS = {
    "RBN": lambda: RBN(5),
    "RBN*": lambda: RBN(5, scaling="channel_std", centering="channel_std"),
    "spatial": lambda: RBN(5, scaling="spatial_mean", centering="spatial_std"),
    "IEBN": lambda: IEBN(5, momentum=None),
    "BNET": lambda: BNET(5),
}


def main(backend: str, rank: int, world: int, rendezvous: Path) -> None:
    dist.init_process_group(backend, init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    if backend == "nccl":
        torch.set_default_device(f"cuda:{rank}")
    sizes = SHARES[world]
    mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    for name, make in LAYERS.items():
        torch.manual_seed(0)
        whole = make()
        with torch.no_grad():
            for parameter in whole.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        shared = convert_sync_rbn(copy.deepcopy(whole))
        whole.double()  # so that the errors are those of the shared layer alone
        for _ in range(3):
            x, cotangent = torch.randn(sum(sizes), 5, 4, 3), torch.randn(sum(sizes), 5, 4, 3)
            expected, dx = step(whole, x.double(), cotangent.double())
            y, dx_mine = step(shared, x[mine], cotangent[mine])
            close(f"{name} y", y, expected[mine])
            close(f"{name} dx", dx_mine, dx[mine])
        for (key, parameter), reference in zip(shared.named_parameters(), whole.parameters(), strict=True):
            gradient = parameter.grad
            dist.all_reduce(gradient)
            close(f"{name} d {key}", gradient, reference.grad)
        for key, value in shared.state_dict().items():
            close(f"{name} {key}", value, whole.state_dict()[key])
    empty = convert_sync_rbn(RBN(5))
    before = copy.deepcopy(empty.state_dict())
    for x in (torch.randn(0, 5, 4, 3), torch.randn(1 if rank == 0 else 0, 5, 1, 1)):
        with pytest.raises(RBNValueError):
            empty(x)
    for key, value in empty.state_dict().items():
        assert torch.equal(value, before[key]), key


def step(layer, x, cotangent):
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(cotangent)
    return y.detach(), x.grad


def close(what, actual, expected):
    scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    error = (actual.double() - expected.double()).abs().max().item() if expected.numel() else 0.0
    assert error <= 1e-6 * scale, f"rank {dist.get_rank()}, {what}: off by {error:.1e} of {scale:.1e}"


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
    os._exit(0)  # gloo's threads outlive the group
