"""A writer killed again and again: python killed.py FORMAT KILLS SEED FOLDER.

A process writes two contents in turn over one file and is killed at a random moment. Then the file holds one
of the two as a whole. Orbax folders are not replaced: each has a name of its own, and is whole or not there.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from mutate import FORMATS

from rbn import porting
from rbn_core import weights

STATES = [
    {f"params/a{number}": np.full(size, value, np.float32) for number in range(40)}
    for size, value in ((3000, 1.0), (4000, 2.0))
]
"""Files of 480 and 640 kB."""


def write(name, path, state):
    framework = FORMATS[name][0]
    if framework == "canonical":
        weights.save(path, state)
    else:
        porting.write(path, framework, state, {}, None)


def write_on_and_on(name, folder):
    for number in range(10**9):
        target = folder / (f"{number}.whole" if name == "orbax" else FORMATS[name][1])
        write(name, target, STATES[number % 2])


def started(name, folder):
    """The process id of a writer, a fork of this process: importing takes longer than writing."""
    if name == "orbax":  # whose library refuses to be forked
        writer = subprocess.Popen([sys.executable, __file__, "orbax", "0", "", str(folder)])
        while not list(folder.glob("*.whole")):
            time.sleep(0.01)
        return writer.pid
    writer = os.fork()
    if writer == 0:
        write_on_and_on(name, folder)
    return writer


def is_whole(name, path):
    found = porting.stored_arrays(path, FORMATS[name][0])
    return any(
        found.keys() == state.keys() and all(np.array_equal(found[key], state[key]) for key in state)
        for state in STATES
    )


def main(name, kills, seed, folder):
    random_ = random.Random(f"{name} {seed}")
    folder.mkdir(exist_ok=True)
    write(name, folder / f"warm_{FORMATS[name][1]}", STATES[0])
    shutil.rmtree(folder)
    whole = left = 0
    for _ in range(kills):
        folder.mkdir(exist_ok=True)
        writer = started(name, folder)
        time.sleep(random_.uniform(0, 0.5 if name == "orbax" else 0.03))
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)
        for path in folder.iterdir():
            if path.name.startswith("."):
                left += 1
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            else:
                assert is_whole(name, path), path
                whole += 1
        if name == "orbax":
            shutil.rmtree(folder)
    print(json.dumps({"kills": kills, "whole": whole, "left": left}))


if __name__ == "__main__":
    if sys.argv[2] == "0":
        write_on_and_on(sys.argv[1], Path(sys.argv[4]))
    else:
        main(sys.argv[1], int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
