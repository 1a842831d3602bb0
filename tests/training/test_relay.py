"""A run that moves from framework to framework is the run of one."""

import os
import subprocess
import sys
from itertools import permutations

import numpy as np
import pytest

from rbn.backends.frameworks import FRAMEWORKS
from rbn.training.log import read_log

SCRIPT = """
import sys
from test_loops import small
from rbn.cli import app
from rbn.training import run

run.architectures.network = lambda name, norm, classes: small(norm)
app(sys.argv[1:])
"""


def train(*arguments):
    path = os.pathsep.join([os.path.dirname(__file__), *filter(None, sys.path)])
    command = [sys.executable, "-c", SCRIPT, "train", *map(str, arguments), "--log-every", "1"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path})
    assert done.returncode == 0, done.stdout + done.stderr


def losses(folder):
    return np.array([row["loss"] for row in read_log(folder)])


def relay(folder, order, each, *options):
    """The losses of so many steps in each framework but the first, and those of the first."""
    options = (*options, "--batch-size", 32, "--epochs", 2)  # of 42 steps each
    whole, moved = folder / "whole", folder / "moved"
    steps = each * len(order)
    train("--out", whole, "--framework", order[0], "--steps", steps, "--save-every", each, "--keep", *options)
    file = whole / f"step-{each}.safetensors"
    for number, name in enumerate(order[1:], 2):
        train("--resume", file, "--out", moved, "--framework", name, "--steps", each * number)
        file = moved / "last.safetensors"
    return losses(moved), losses(whole)


CONSTANT = ("--schedule", "step", "--milestones", "", "--learning-rate")
"""A learning rate that does not depend on how many steps there will be."""


def check(moved, whole, tolerance, count):
    difference = np.abs(moved - whole[-count:]).max()
    print(f"largest difference of {count} losses: {difference:.1e}")
    assert len(moved) == count
    assert whole[-5:].mean() < whole[:5].mean()  # it learns
    assert difference < tolerance


def test_a_run_through_all_four_frameworks_is_the_run_of_one(tmp_path):
    moved, whole = relay(tmp_path, tuple(FRAMEWORKS), 5, *CONSTANT, 0.1)
    check(moved, whole, 1e-4, 15)


@pytest.mark.long
@pytest.mark.parametrize(("optimizer", "rate"), [("sgd", 0.1), ("adamw", 0.003)])
@pytest.mark.parametrize("norm", ["rbn", "iebn", "bnet"])
def test_eighty_steps_through_all_four_are_those_of_one(tmp_path, norm, optimizer, rate):
    options = (*CONSTANT, rate, "--norm", norm, "--optimizer", optimizer)
    moved, whole = relay(tmp_path, tuple(FRAMEWORKS), 20, *options)
    check(moved, whole, 1e-4, 60)


@pytest.mark.long
@pytest.mark.parametrize("norm", ["rbn", "iebn", "bnet"])
def test_in_float64_they_are_so_to_1e_8(tmp_path, norm):
    """MindSpore's optimizers have float32 alone, and in Jittor constants are rounded to it: 4e-7 there."""
    moved, whole = relay(
        tmp_path, ("torch", "flax", "torch"), 20, *CONSTANT, 0.1, "--norm", norm, "--dtype", "float64"
    )
    check(moved, whole, 1e-8, 40)


@pytest.mark.long
@pytest.mark.parametrize(("first", "second"), [*permutations(FRAMEWORKS, 2)])
def test_a_run_moves_between_every_two(tmp_path, first, second):
    moved, whole = relay(tmp_path, (first, second), 20, *CONSTANT, 0.1)
    check(moved, whole, 1e-4, 20)
