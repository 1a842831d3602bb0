"""The examples run, each as a user would run it."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.framework("torch")  # any one of them: the example starts the others in processes of their own
def test_a_network_trained_in_pytorch_classifies_the_same_in_all_four():
    done = subprocess.run([sys.executable, EXAMPLES / "port_digits"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for framework in ("torch", "flax", "mindspore", "jittor"):
        assert framework in done.stdout
    assert done.stdout.count("449 of 449") == 4
