"""The Triton kernels compute the layers: `interpreted.py`, in a process with Triton's interpreter."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

CASES = Path(__file__).with_name("interpreted.py")


@pytest.mark.timeout(1800)  # minutes, beside the other tests
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_kernels_conform_in_tritons_interpreter(pytestconfig):
    command = [sys.executable, "-m", "pytest", "--framework", "torch", "-q", CASES]
    command += ["-m", pytestconfig.option.markexpr]  # with the long searches where this runs with them
    run = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=1700
    )
    assert run.returncode == 0, run.stdout + run.stderr
