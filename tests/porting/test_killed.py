"""Writing is all or nothing, whenever the writer is killed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

KILLS = {
    "canonical": 500,
    "torch_safetensors": 50,
    "pth": 50,
    "msgpack": 50,
    "orbax": 4,
    "ckpt": 50,
    "pkl": 50,
}
"""Orbax's writers are new processes, which take seconds each; the others are forks."""

FEW = 20


@pytest.mark.parametrize(
    ("name", "kills"),
    [(name, FEW) for name in KILLS if name != "orbax"]
    + [pytest.param(name, kills, marks=pytest.mark.long) for name, kills in KILLS.items()],
)
def test_a_file_is_whole_whenever_its_writer_is_killed(name, kills, tmp_path):
    script = Path(__file__).with_name("killed.py")
    command = [sys.executable, script, name, str(kills), "0", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["kills"] == kills
    assert found["whole"] >= kills  # the file was always there
    assert found["left"] >= (1 if kills == FEW else 0.2 * kills)  # so many were killed while they wrote
