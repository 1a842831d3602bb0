"""Every ordered pair of the four frameworks, each in a process of its own: networks, gradients, training.

Takes some ten minutes, so that it is not part of `make test`: pytest tests/porting/pairs.py
"""

import itertools
import subprocess
import sys
from multiprocessing.connection import Listener
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from sklearn.datasets import load_digits

from rbn.backends.frameworks import FRAMEWORKS
from rbn.verification import ALLOWED
from rbn_core import execution, weights
from rbn_core.architectures import ARCHITECTURES, network
from rbn_core.matching import COUNTER
from rbn_core.names import STATISTICS
from rbn_core.networks import INPUT, Activation, Add, Convolution, Linear, Network, Norm, Pooling

SUFFIXES = {"torch": ".pth", "flax": ".msgpack", "mindspore": ".ckpt", "jittor": ".pkl"}
PAIRS = list(itertools.permutations(FRAMEWORKS, 2))

NORMS = itertools.cycle(
    ["rbn", "bn", {"layer": "rbn", "stages": [1, 4], "scaling": "channel_std"}, "iebn", "bnet"]
)
"""Each network has one of these, in turn."""


class Process:
    """A framework's process, to be asked for the methods of `worker.Worker`."""

    def __init__(self, framework, folder):
        address = str(folder / f"{framework}.socket")
        with Listener(address) as listener:
            self.log = (folder / f"{framework}.log").open("w")
            script = Path(__file__).with_name("worker.py")
            command = [sys.executable, script, framework, address]
            self.process = subprocess.Popen(command, stdout=self.log, stderr=self.log)
            self.connection = listener.accept()

    def ask(self, method, *arguments):
        self.connection.send((method, arguments))
        return self

    def answer(self):
        status, result = self.connection.recv()
        assert status == "done", result
        return result

    def close(self):
        self.connection.send(None)
        self.process.wait()
        self.log.close()


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """The frameworks' processes, and the one that ports."""
    folder = tmp_path_factory.mktemp("processes")
    running = {name: Process(name, folder) for name in (*FRAMEWORKS, "porter")}
    yield running
    for process in running.values():
        process.close()


def trained(description, size=32):
    """A state with parameters that differ from where they start, and the statistics of some noise.

    What is added to a shortcut is small beside it, as in trained networks: roundings do not grow from block
    to block then.
    """
    rng = np.random.default_rng(0)
    state = execution.initial_state(description)
    for name, value in state.items():
        if value.ndim == 1:
            state[name] = (value + rng.normal(0, 0.1, value.shape)).astype(np.float32)
    for node in description.nodes:
        for name in node.inputs if isinstance(node, Add) else ():
            for scale in {f"{name}.gamma", f"{name}.conv_weight"} & state.keys():
                state[scale] *= np.float32(0.1)
    noise = rng.normal(size=(8, description.in_channels, size, size)).astype(np.float32)
    _, after = execution.run(description, state, noise, training=True)
    for name in state:
        batch = (after[name] - 0.9 * state[name]) / 0.1  # of which a step has taken over a tenth
        if name.endswith(".running_mean"):
            state[name] = batch.astype(np.float32)
        elif name.endswith(".running_var"):  # with a floor, so that no channel's roundings are enlarged
            state[name] = (batch + np.mean(batch)).astype(np.float32)
        elif name.endswith(COUNTER):
            state[name] = np.array(12, np.int64)
    return state


DIGITS = Network(
    "digits",
    (
        Convolution("conv1", (INPUT,), 1, 8, 3, padding=1),
        Norm("norm1", ("conv1",), 8, "rbn"),
        Activation("relu1", ("norm1",)),
        Convolution("conv2", ("relu1",), 8, 16, 3, stride=2, padding=1),
        Norm("norm2", ("conv2",), 16, "rbn"),
        Activation("relu2", ("norm2",)),
        Pooling("means", ("relu2",), "average"),
        Linear("head", ("means",), 16, 10),
    ),
    in_channels=1,
)


def batches(count, size=64):
    """The digits in a fixed order: pairs of (size, 1, 8, 8) images and classes."""
    bunch = load_digits()
    order = np.random.default_rng(0).permutation(len(bunch.target))
    chosen = [np.take(order, range(i * size, (i + 1) * size), mode="wrap") for i in range(count)]
    return [
        ((bunch.images[i, None] / 16).astype(np.float32), bunch.target[i].astype(np.int64)) for i in chosen
    ]


def close(one, other):
    """How far results are apart, relative to the largest."""
    return np.max(np.abs(one - other)) / np.max(np.abs(other))


@pytest.mark.parametrize(("name", "norm"), list(zip(ARCHITECTURES, NORMS, strict=False)), ids=str)
def test_every_network_moves_between_every_pair(processes, tmp_path, name, norm):
    """B loads by itself what was ported from A's own file: the same arrays, bit for bit, and logits."""
    described = network(name, norm, 7)
    start = tmp_path / "start.safetensors"
    size = 16 if name.startswith("cifar_") else 32
    weights.save(start, trained(described, size))
    images = np.random.default_rng(1).normal(size=(2, 3, size, size)).astype(np.float32)
    native = {framework: tmp_path / f"native{suffix}" for framework, suffix in SUFFIXES.items()}
    for framework, path in native.items():
        processes[framework].ask("save", described.to_json(), start, path, images)
    logits = {framework: processes[framework].answer() for framework in FRAMEWORKS}
    expected, _ = execution.run(described, weights.load(start), images)
    plain = [node.name for node in described.nodes if isinstance(node, Norm) and node.layer == "bn"]
    uncounted = {f"{name}.{COUNTER}" for name in plain}  # PyTorch's BatchNorm alone counts batches
    for framework in FRAMEWORKS:
        assert close(logits[framework], expected) < ALLOWED, framework
    for source, target in PAIRS:
        ported = tmp_path / f"ported{SUFFIXES[target]}"
        processes["porter"].ask("port", native[source], ported).answer()
        wrong = set(processes[target].ask("load", ported, start).answer())
        assert wrong <= uncounted, (source, target)
        ported.unlink()
    for framework in FRAMEWORKS:
        processes[framework].ask("run", images)
    for framework in FRAMEWORKS:
        np.testing.assert_array_equal(processes[framework].answer(), logits[framework])


GRADIENTS = 2e-4
"""How far a gradient may be off, relative to its array's largest: 2e-5 are measured, from the roundings of
float32 (6e-8) in forty layers there and back, each a sum of some hundred products."""


def distance_from_the_kink(description, state, images):
    """How close to 0 the numbers come that reach a rectifier, relative to their root mean square."""
    found = []
    clip = np.clip

    def recording(x, *limits):
        found.append(np.min(np.abs(x)) / np.sqrt(np.mean(x**2)))
        return clip(x, *limits)

    with mock.patch.object(execution.np, "clip", recording):
        execution.run(description, state, images, training=True)
    return min(found)


def images_away_from_the_kink(description, state):
    """Images with which no rounding switches a rectifier, and with it a gradient, on or off.

    Of 400,000 numbers that reach a rectifier one is else within a few roundings of 0.
    """
    tried = [np.random.default_rng(seed).normal(size=(4, 3, 48, 48)) for seed in range(60)]
    best = max(tried, key=lambda images: distance_from_the_kink(description, state, images))
    assert distance_from_the_kink(description, state, best) > 5e-6
    return best.astype(np.float32)


@pytest.mark.parametrize("norm", ["bn", "rbn", "iebn", "bnet"])
def test_gradients_in_training_are_the_same_everywhere(processes, tmp_path, norm):
    described = network("resnet18", norm, 10)
    start = tmp_path / "start.safetensors"
    weights.save(start, trained(described))
    images, classes = images_away_from_the_kink(described, weights.load(start)), np.arange(4)
    for framework in FRAMEWORKS:
        processes[framework].ask("gradients", described.to_json(), start, images, classes)
    found = {framework: processes[framework].answer() for framework in FRAMEWORKS}
    names = [name for name in described.state_shapes() if name.rpartition(".")[2] not in STATISTICS]
    worst = {}
    for one, other in PAIRS:
        for name in names:
            largest = np.max(np.abs(found[other][name]))
            assert largest > 0, name
            worst[one, other, name] = np.max(np.abs(found[one][name] - found[other][name])) / largest
    top = max(worst, key=worst.get)
    print(top, worst[top])
    assert worst[top] < GRADIENTS, top


def test_a_network_trained_on_digits_knows_them_everywhere(processes, tmp_path):
    start, test = tmp_path / "start.safetensors", load_digits()
    weights.save(start, execution.initial_state(DIGITS))
    native = {framework: tmp_path / f"digits{suffix}" for framework, suffix in SUFFIXES.items()}
    half = tmp_path / "half.safetensors"
    task = (DIGITS.to_json(), start, "adam", 0.01, batches(501), 500, half, native["torch"])
    processes["torch"].ask("train", *task).answer()
    images = (test.images[:, None] / 16).astype(np.float32)
    for target in ("flax", "mindspore", "jittor"):
        processes["porter"].ask("port", native["torch"], native[target]).answer()
    logits = {}
    for framework in FRAMEWORKS:
        logits[framework] = (
            processes[framework].ask("save", DIGITS.to_json(), half, tmp_path / "unused", images).answer()
        )
    assert np.mean(logits["torch"].argmax(axis=1) == test.target) > 0.95
    for source, target in PAIRS:
        ported = tmp_path / f"ported{SUFFIXES[target]}"
        processes["porter"].ask("port", native[source], ported).answer()
        assert processes[target].ask("load", ported, half).answer() == [], (source, target)
        found = processes[target].ask("run", images).answer()
        assert close(found, logits[source]) < ALLOWED, (source, target)
        np.testing.assert_array_equal(found.argmax(axis=1), logits[source].argmax(axis=1))


@pytest.mark.parametrize(("kind", "rate"), [("sgd", 0.2), ("adam", 0.01)])
def test_training_goes_on_in_any_framework_as_if_nothing_had_happened(processes, tmp_path, kind, rate):
    """20 steps in A and 20 in B give the losses of 40 in A."""
    start, steps = tmp_path / "start.safetensors", batches(40)
    weights.save(start, execution.initial_state(DIGITS))
    half = {framework: tmp_path / f"{framework}.safetensors" for framework in FRAMEWORKS}
    native = {framework: tmp_path / f"half{suffix}" for framework, suffix in SUFFIXES.items()}
    for framework in FRAMEWORKS:
        task = (DIGITS.to_json(), start, kind, rate, steps, 20, half[framework], native[framework])
        processes[framework].ask("train", *task)
    whole = {framework: processes[framework].answer() for framework in FRAMEWORKS}
    for framework, losses in whole.items():
        assert losses[-1] < 0.7 * losses[0], framework
    worst = {}
    for source, target in PAIRS:
        ported = tmp_path / f"ported{SUFFIXES[target]}"
        processes["porter"].ask("port", native[source], ported).answer()
        task = (DIGITS.to_json(), half[source], ported, kind, rate, steps[20:])
        found = processes[target].ask("go_on", *task).answer()
        worst[source, target] = np.max(np.abs(np.subtract(found, whole[source][20:])))
    print({pair: f"{value:.1e}" for pair, value in worst.items()})
    assert max(worst.values()) < 1e-4, worst
