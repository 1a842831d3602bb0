"""Kills a run many times, and has it go on each time: python killed.py FOLDER KILLS.

All runs are forked from one process, which imports once: a run is shorter than the imports are.
"""

import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
from test_loops import call, small

from rbn.backends import torch  # noqa: F401
from rbn.training import loop_torch, run, run_file  # noqa: F401

STEPS = 12
"""What a run makes between two kills, about; each step writes a file of its own."""


def forked(*arguments):
    """Start a run in a process of its own."""
    process = os.fork()
    if process == 0:
        done = call("train", *arguments)
        if done.exit_code:
            print(done.output, file=sys.stderr)
        sys.stdout.flush()
        os._exit(done.exit_code)
    return process


def ended(process):
    """Wait for a run that is to end well."""
    assert os.waitpid(process, 0)[1] == 0


def main(folder, kills):
    """Leave the runs `whole` and `cut` in the folder, and print how many kills there were."""
    run.architectures.network = lambda name, norm, classes: small(norm)
    steps = STEPS * kills
    options = ("--batch-size", 16, "--steps", steps, "--framework", "torch")
    ended(forked("--out", folder / "whole", *options))
    last = folder / "cut" / run.LAST
    moments = np.random.default_rng(kills).uniform(0, 0.2, kills)
    met = 0
    for moment in moments:
        before = last.stat().st_mtime_ns if last.is_file() else 0
        start = ("--resume", last) if before else ("--out", last.parent, *options)
        process = forked(*start, "--save-every", 1, "--log-every", 1)
        while not (last.is_file() and last.stat().st_mtime_ns != before):
            if os.waitpid(process, os.WNOHANG)[0]:
                break
            time.sleep(0.001)
        else:
            time.sleep(moment)
            os.kill(process, signal.SIGKILL)
            met += os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
        run_file.load(last)  # which is whole
    ended(forked("--resume", last))
    print(met)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
