"""Every ordered pair of the four frameworks, each in a process of its own: networks, gradients, training."""

import itertools
import shutil
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
from rbn_core.names import RUNNING_STATISTICS
from rbn_core.networks import INPUT, Activation, Add, Convolution, Linear, Network, Norm, Pooling

SUFFIXES = {"torch": ".pth", "flax": ".msgpack", "mindspore": ".ckpt", "jittor": ".pkl"}
PAIRS = list(itertools.permutations(FRAMEWORKS, 2))
NAMES = list(FRAMEWORKS)
ROUNDS = [list(zip(NAMES, NAMES[step:] + NAMES[:step], strict=True)) for step in range(1, len(NAMES))]
"""The pairs, so that in each round every framework is the target of one: all work at once."""

STAGES = {"layer": "rbn", "stages": [1, 4], "scaling": "channel_std"}
NETWORKS = [
    ("resnet18", "rbn"),
    ("resnet34", "bn"),
    ("resnet50", STAGES),
    ("resnet50", "bnet"),
    ("resnet101", "bnet"),
    ("resnext50_32x4d", "iebn"),
    ("res2net50_26w_4s", "rbn"),
    ("mobilenet_v2", "bn"),
    ("cifar_resnet20", "rbn"),
    ("cifar_resnet50", STAGES),
    ("cifar_resnext29_8x64d", "rbn"),
    ("cifar_resnet164", "iebn"),
    ("cifar_resnet164_basic", "rbn"),
]
"""Every network, with one of the layers."""

QUICK = {"resnet18-rbn", "mobilenet_v2-bn", "cifar_resnet50-stages"}
"""One of each kind of block; the others take long, and every framework computes all networks for itself."""


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


@pytest.fixture
def folder(tmp_path):
    """A folder that goes with the test: the files of large networks would fill the disk."""
    yield tmp_path
    shutil.rmtree(tmp_path)


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
        elif name.endswith("conv_weight"):  # which starts at 0 in networks
            state[name] = (value + rng.normal(0, 1 / 3, value.shape)).astype(np.float32)
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


def ported(processes, native, source, target):
    """The file that a framework's own becomes in another's format."""
    path = native[source].with_name(f"{source}_in_{target}{SUFFIXES[target]}")
    processes["porter"].ask("port", native[source], path).answer()
    return path


def uncounted(described):
    """The counts of batches that PyTorch's own BatchNorm alone keeps."""
    return {
        f"{node.name}.{COUNTER}" for node in described.nodes if isinstance(node, Norm) and node.layer == "bn"
    }


def check_every_pair(processes, described, start, native, images, logits):
    """B loads by itself what was ported from A's own file: the same arrays, bit for bit, and A's logits."""
    for pairs in ROUNDS:
        for source, target in pairs:
            path = ported(processes, native, source, target)
            processes[target].ask("load", path, start, images)
        for source, target in pairs:
            wrong, found = processes[target].answer()
            assert set(wrong) <= uncounted(described), (source, target)
            assert close(found, logits[source]) < ALLOWED, (source, target)


def test_every_network_is_among_them():
    assert {name for name, _ in NETWORKS} == ARCHITECTURES.keys()


@pytest.mark.parametrize(
    ("name", "norm"),
    [
        pytest.param(name, norm, id=label, marks=() if label in QUICK else pytest.mark.long)
        for name, norm in NETWORKS
        for label in [f"{name}-{norm if isinstance(norm, str) else 'stages'}"]
    ],
)
def test_every_network_moves_between_every_pair(processes, folder, name, norm):
    described = network(name, norm, 7)
    start = folder / "start.safetensors"
    size = 16 if name.startswith("cifar_") else 32
    weights.save(start, trained(described, size))
    images = np.random.default_rng(1).normal(size=(2, 3, size, size)).astype(np.float32)
    native = {framework: folder / f"native{suffix}" for framework, suffix in SUFFIXES.items()}
    for framework, path in native.items():
        processes[framework].ask("save", described.to_json(), start, path, images)
    logits = {framework: processes[framework].answer() for framework in FRAMEWORKS}
    expected, _ = execution.run(described, weights.load(start), images)
    for framework in FRAMEWORKS:
        assert close(logits[framework], expected) < ALLOWED, framework
    check_every_pair(processes, described, start, native, images, logits)


GRADIENTS = 1e-4
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
    tried = (
        np.random.default_rng(seed).normal(size=(4, 3, 48, 48)).astype(np.float32) for seed in range(100)
    )
    return next(images for images in tried if distance_from_the_kink(description, state, images) > 8e-6)


def check_gradients(processes, described, start, images, classes):
    """The gradients of every parameter in training are the same in every pair of frameworks."""
    for framework in FRAMEWORKS:
        processes[framework].ask("gradients", described.to_json(), start, images, classes)
    found = {framework: processes[framework].answer() for framework in FRAMEWORKS}
    names = [name for name in described.state_shapes() if name.rpartition(".")[2] not in RUNNING_STATISTICS]
    worst = {}
    for one, other in PAIRS:
        for name in names:
            largest = np.max(np.abs(found[other][name]))
            assert largest > 0, name
            worst[one, other, name] = np.max(np.abs(found[one][name] - found[other][name])) / largest
    top = max(worst, key=worst.get)
    print(top, worst[top])
    assert worst[top] < GRADIENTS, top


@pytest.mark.parametrize("norm", ["bn", "rbn", "iebn", "bnet"])
def test_gradients_in_training_are_the_same_everywhere(processes, folder, norm):
    described = network("resnet18", norm, 10)
    start = folder / "start.safetensors"
    weights.save(start, trained(described))
    images = images_away_from_the_kink(described, weights.load(start))
    check_gradients(processes, described, start, images, np.arange(4))


def test_a_network_trained_on_digits_moves_between_every_pair(processes, folder):
    """It knows them everywhere, and would learn on in the same direction."""
    start, test = folder / "start.safetensors", load_digits()
    weights.save(start, execution.initial_state(DIGITS))
    native = {framework: folder / f"digits{suffix}" for framework, suffix in SUFFIXES.items()}
    learned = folder / "learned.safetensors"
    task = (DIGITS.to_json(), start, "adam", 0.01, batches(501), 500, learned, folder / "unused")
    processes["torch"].ask("train", *task).answer()
    images = (test.images[:, None] / 16).astype(np.float32)
    for framework, path in native.items():
        processes[framework].ask("save", DIGITS.to_json(), learned, path, images)
    logits = {framework: processes[framework].answer() for framework in FRAMEWORKS}
    assert np.mean(logits["torch"].argmax(axis=1) == test.target) > 0.95
    check_every_pair(processes, DIGITS, learned, native, images, logits)
    check_gradients(processes, DIGITS, learned, *batches(1)[0])


@pytest.mark.parametrize(("kind", "rate"), [("sgd", 0.2), ("adam", 0.01), ("adamw", 0.01)])
def test_training_goes_on_in_any_framework_as_if_nothing_had_happened(processes, folder, kind, rate):
    """20 steps in A and 20 in B give the losses of 40 in A; SGD and AdamW have two groups of parameters."""
    start, steps = folder / "start.safetensors", batches(40)
    weights.save(start, execution.initial_state(DIGITS))
    half = {framework: folder / f"{framework}.safetensors" for framework in FRAMEWORKS}
    native = {framework: folder / f"half{suffix}" for framework, suffix in SUFFIXES.items()}
    for framework in FRAMEWORKS:
        task = (DIGITS.to_json(), start, kind, rate, steps, 20, half[framework], native[framework])
        processes[framework].ask("train", *task)
    whole = {framework: processes[framework].answer() for framework in FRAMEWORKS}
    for framework, losses in whole.items():
        assert losses[-1] < 0.8 * losses[0], framework
    worst = {}
    for pairs in ROUNDS:
        for source, target in pairs:
            path = ported(processes, native, source, target)
            task = (DIGITS.to_json(), half[source], path, kind, rate, steps[20:])
            processes[target].ask("go_on", *task)
        for source, target in pairs:
            found = processes[target].answer()
            worst[source, target] = np.max(np.abs(np.subtract(found, whole[source][20:])))
    print({pair: f"{value:.1e}" for pair, value in worst.items()})
    assert max(worst.values()) < 1e-4, worst
