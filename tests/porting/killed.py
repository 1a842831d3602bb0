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

STATES = [
    {f"params/a{number}": np.full(size, value, np.float32) for number in range(40)}
    for size, value in ((3000, 1.0), (4000, 2.0))
]
"""Files of 480 and 640 kB."""


def write(name, path, state):
    porting.write(path, FORMATS[name][0], porting.Content({}, {}, {}), state, None)


def target(name, folder, number):
    return folder / (f"{number}.whole" if name == "orbax" else FORMATS[name][1])


def write_on_and_on(name, folder):
    for number in range(10**9):
        write(name, target(name, folder, number), STATES[number % 2])


def started(name, folder):
    """The process id of a writer that writes: a fork of this process, as importing takes longer than that."""
    if name == "orbax":  # whose library refuses to be forked
        writer = subprocess.Popen([sys.executable, __file__, "orbax", "0", "", str(folder)])
        while not list(folder.glob("*.whole")):
            time.sleep(0.01)
        return writer.pid
    ready, begin = os.pipe()
    writer = os.fork()
    if writer == 0:
        os.write(begin, b".")
        write_on_and_on(name, folder)
    os.read(ready, 1)
    os.close(ready)
    os.close(begin)
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
    for number in range(2):  # the first one imports
        began = time.monotonic()
        write(name, target(name, folder, number), STATES[0])
    longest = 3 * (time.monotonic() - began)
    whole = left = 0
    for _ in range(kills):
        if name == "orbax":
            shutil.rmtree(folder)
            folder.mkdir()
        writer = started(name, folder)
        time.sleep(random_.uniform(0, longest))
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)
        for path in folder.iterdir():
            if path.name.startswith("."):
                left += 1
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            else:
                assert is_whole(name, path), path
                whole += 1
    print(json.dumps({"kills": kills, "whole": whole, "left": left}))


if __name__ == "__main__":
    if sys.argv[2] == "0":
        write_on_and_on(sys.argv[1], Path(sys.argv[4]))
    else:
        main(sys.argv[1], int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
