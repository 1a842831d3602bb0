"""A full-size ResNet-50 is ported within three times the file's size of memory."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from rbn_core import execution, weights
from rbn_core.architectures import network
from rbn_core.networks import INPUT, Linear, Network

CHAIN = [f"a{suffix}" for suffix in (".safetensors", ".pth")]
CHAIN += [f"b{suffix}" for suffix in (".safetensors", ".msgpack", ".ckpt", ".pkl", ".pth")]
CHAIN += ["c.msgpack", "c.pkl", "orbax", "c.ckpt"]
"""Files of every format, each ported to the next."""

MOST = 3
"""How many times the file's size a port may take in memory."""

CODE = """
import json, sys, time
from mutate import memory
from rbn.porting import port
folder, source, destination = sys.argv[1:]
port(f"{folder}/small_{source}", f"{folder}/again_{destination}")  # imports what the formats need
before, began = memory("VmRSS"), time.monotonic()
port(f"{folder}/{source}", f"{folder}/{destination}")
print(json.dumps({"seconds": time.monotonic() - began, "bytes": memory("VmHWM") - before}))
"""


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """What each port took, and the size of the file."""
    folder = tmp_path_factory.mktemp("resnet50")
    described = network("resnet50", "rbn")
    weights.save(folder / CHAIN[0], execution.initial_state(described), network=described)
    small = Network("small", (Linear("fc", (INPUT,), 2, 2),))
    weights.save(folder / f"small_{CHAIN[0]}", execution.initial_state(small), network=small)
    found = {}
    for source, destination in itertools.pairwise(CHAIN):
        done = subprocess.run(
            [sys.executable, "-c", CODE, folder, source, destination],
            cwd=Path(__file__).parent,  # where mutate.py is
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        (folder / f"again_{destination}").rename(folder / f"small_{destination}")
        found[source, destination] = json.loads(done.stdout)
    return found, (folder / CHAIN[0]).stat().st_size


@pytest.mark.parametrize(("source", "destination"), list(itertools.pairwise(CHAIN)))
def test_a_resnet50_is_ported_in_little_memory(chain, source, destination):
    found, size = chain
    taken = found[source, destination]
    print(f"{source} to {destination}: {taken['seconds']:.1f} s, {taken['bytes'] / size:.2f} times the file")
    assert taken["bytes"] <= MOST * size
