"""The BatchNorms of Equinox, Haiku and Keras are what docs/findings.md says, each in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "strangers_on_the_page.py"


def hold(subject, **environment):
    command = [sys.executable, SCRIPT, subject]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_equinox():
    hold("equinox_batch_norm:subject")


def test_haiku():
    hold("haiku_batch_norm:subject")


@pytest.mark.parametrize("backend", ["tensorflow", "jax", "torch"])
def test_keras(backend):
    hold("keras_batch_norm:subject", KERAS_BACKEND=backend)
