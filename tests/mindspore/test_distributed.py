"""Layers that share their batch statistics over processes equal the layer on the whole batch."""

import os

os.environ.setdefault("GLOG_v", "4")

import signal
import socket
import subprocess
import sys
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from rbn.backends.mindspore import BNET, IEBN, RBN, to_numpy
from rbn_core import RBNError, RBNTypeError, RBNValueError

WORKER = Path(__file__).with_name("sync_worker.py")
X = np.random.default_rng(0).normal(size=(4, 3, 5, 5)).astype(np.float32)


@pytest.fixture(params=[ms.PYNATIVE_MODE, ms.GRAPH_MODE], ids=["pynative", "graph"])
def _mode(request, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a refused graph writes into the working folder
    ms.set_context(mode=request.param)
    yield
    ms.set_context(mode=ms.PYNATIVE_MODE)


@pytest.mark.timeout(300)
def test_unequal_and_empty_shares_give_what_the_whole_batch_gives(tmp_path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = Path(sys.executable).parent
    processes = ["--worker_num=2", "--local_worker_num=2", f"--master_port={port}"]
    launch = subprocess.Popen(
        [folder / "msrun", *processes, f"--log_dir={tmp_path}", "--join=True", WORKER],
        cwd=tmp_path,
        env=os.environ | {"GLOG_v": "4", "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output = launch.communicate(timeout=270)[0]
    finally:
        if launch.poll() is None:
            os.killpg(launch.pid, signal.SIGKILL)  # msrun would leave its workers behind
    logs = [log.read_text(errors="replace") for log in sorted(tmp_path.glob("worker_*.log"))]
    assert launch.returncode == 0, "\n".join([output, *logs])


@pytest.mark.usefixtures("_mode")
@pytest.mark.parametrize("kind", [RBN, IEBN, BNET])
def test_training_needs_communication_and_changes_nothing_without(kind) -> None:
    layer = kind(3, sync=True).set_train()
    before = to_numpy(layer)
    with pytest.raises(RBNError, match=f"{kind.__name__}: expected initialized communication"):
        layer(Tensor(X))
    for name, value in to_numpy(layer).items():
        np.testing.assert_array_equal(value, before[name])


@pytest.mark.usefixtures("_mode")
def test_evaluation_needs_no_communication() -> None:
    np.testing.assert_array_equal(RBN(3, sync=True)(Tensor(X)).asnumpy(), RBN(3)(Tensor(X)).asnumpy())


@pytest.mark.parametrize(
    ("groups", "error"),
    [
        (0, RBNTypeError),
        ([0, 1], RBNTypeError),
        ([["0"]], RBNTypeError),
        ([[0, 1], [1]], RBNValueError),
        ([[-1, 0]], RBNValueError),
    ],
)
def test_process_groups_are_lists_of_different_ranks(groups, error) -> None:
    with pytest.raises(error, match="RBN: expected process_groups"):
        RBN(3, sync=True, process_groups=groups)


def test_printing_shows_sync() -> None:
    assert "sync=True" in repr(BNET(3, sync=True))
