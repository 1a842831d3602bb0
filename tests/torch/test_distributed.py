"""Layers that share their batch statistics over processes equal the layer on the whole batch."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from rbn.backends.torch import BNET, RBN, convert_sync_rbn

WORKER = Path(__file__).with_name("sync_worker.py")
GPUS = torch.cuda.device_count()


@pytest.mark.parametrize(
    ("backend", "world"),
    [
        ("gloo", 2),
        ("gloo", 4),
        pytest.param(
            "nccl",
            4 if GPUS >= 4 else 2 if GPUS >= 2 else 1,
            marks=pytest.mark.skipif(not GPUS, reason="no GPU, and NCCL knows nothing else"),
        ),
    ],
)
def test_unequal_and_empty_shares_give_what_the_whole_batch_gives(backend, world, tmp_path):
    command = [sys.executable, WORKER, backend]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(world), tmp_path / "rendezvous"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:  # one that hangs would outlive the test
            process.kill()
    assert [process.returncode for process in processes] == [0] * world, "\n".join(outputs)


def test_convert_sync_rbn_finds_every_layer_and_changes_no_number():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), RBN(4), nn.Sequential(BNET(4)), nn.BatchNorm2d(4)).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert convert_sync_rbn(model) is model
    assert type(model[3]) is nn.SyncBatchNorm
    assert model[1].sync
    assert model[2][0].sync
    assert not model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_evaluation_needs_no_process_group():
    layer = RBN(3, sync=True).eval()
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(layer(x), RBN(3).eval()(x))
