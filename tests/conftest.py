"""Which tests run: those that need no framework, or with ``--framework NAME`` those of that framework.

One framework per process, because Jittor and PyTorch in one process have crashed.
"""

import importlib
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from rbn import porting
from rbn.backends.frameworks import FRAMEWORKS

TESTS = Path(__file__).parent
LIBRARIES = TESTS / "integrations"
"""What needs libraries that make test does not install; it has a folder for each framework, too."""

CHOSEN, LEFT_OUT = pytest.StashKey(), pytest.StashKey()


def pytest_addoption(parser):
    parser.addoption("--framework", choices=FRAMEWORKS, help="run the tests of this framework alone")


def pytest_configure(config):
    config.addinivalue_line("markers", "framework(*names): runs with --framework NAME, once per name")
    config.addinivalue_line(
        "markers", "meeting(name, shows, example, packages=()): a row of docs/integrations.md"
    )
    config.addinivalue_line("markers", "long: one search over very many cases, which make test leaves out")
    if config.option.framework == "mindspore":  # what it rewrites at level O1 lies in folders that it forgets
        config.addinivalue_line("filterwarnings", "ignore:Implicitly cleaning up:ResourceWarning")
    if config.option.framework == "flax" and config.option.markexpr == "not long":
        # XLA compiles in half of the time so; the suite and the long searches have it optimize.
        os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
    if config.option.framework == "jittor":  # whose operators then take half as long to compile
        importlib.import_module("rbn.conformance.subjects.jittor")


def pytest_report_header(config):
    return f"tests that need: {config.option.framework or 'no framework (the others: --framework NAME)'}"


@pytest.fixture(
    scope="session",
    params=["reference", *(pytest.param(name, marks=pytest.mark.framework(name)) for name in FRAMEWORKS)],
)
def framework(request):
    """The name of what is tested: the NumPy reference or one of the four frameworks."""
    return request.param


@pytest.fixture(scope="session")
def runs():
    """Whether the process of a number runs; one that has ended and that nobody waited for does not."""

    def runs(process):
        try:
            return Path("/proc", process, "stat").read_text().rpartition(") ")[2][0] not in "ZX"
        except (FileNotFoundError, ProcessLookupError):  # the latter when it goes between opening and reading
            return False

    return runs


ZOO_MODELS = {
    "torchvision.resnet18": None,
    "torchvision.mobilenet_v2": None,
    "timm.resnet18": None,
    "timm.mobilenet_v2": "timm-mobilenet",
}
LONG_ZOO_MODELS = {
    "torchvision.resnet50": None,
    "timm.resnet50": None,
    "transformers.resnet18": "transformers",
    "transformers.resnet50": "transformers",
}
"""Models of packages by their network, with the map of those that have other names than ours."""


@dataclass(frozen=True)
class ZooModel:
    """A model of a package, with random weights: its network, file and map, and what it gives."""

    network: str
    zoo_map: str | None
    path: Path
    images: np.ndarray
    logits: np.ndarray

    def port(self, destination, **options):
        """Write the weights as our network's."""
        zoo_map = self.zoo_map and f"from-{self.zoo_map}"
        porting.port(self.path, destination, network=self.network, zoo_map=zoo_map, **options)

    def port_back(self, source, destination):
        """Write the weights of our network as the model's."""
        zoo_map = self.zoo_map and f"to-{self.zoo_map}"
        porting.port(source, destination, zoo_map=zoo_map, destination_format="torch")

    def check(self, logits):
        """Hold the logits of our network to the model's."""
        difference = np.max(np.abs(np.asarray(logits) - self.logits)) / np.max(np.abs(self.logits))
        print(f"{self.path.stem}: {difference:.1e} of the largest")
        assert difference < 1e-5

    def check_back(self, source):
        """Hold a file of our network to the model's, bit for bit, but for what not every BatchNorm counts."""
        self.port_back(source, back := source.with_name("back.safetensors"))
        expected, found = (
            {name: array for name, array in arrays.items() if not name.endswith("num_batches_tracked")}
            for arrays in (porting.stored_arrays(self.path, "torch"), porting.stored_arrays(back, "torch"))
        )
        assert found.keys() == expected.keys()
        for name, array in expected.items():
            np.testing.assert_array_equal(found[name], array, err_msg=name)


@pytest.fixture(scope="session")
def zoo(tmp_path_factory):
    """A folder with the models, and what runs zoo_models.py there, in a process of its own with PyTorch."""
    folder = tmp_path_factory.mktemp("zoo")

    def run(what, *names):
        command = [sys.executable, TESTS / "zoo_models.py", what, folder, *names]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    run("save", *ZOO_MODELS)
    yield folder, run
    shutil.rmtree(folder)  # half a gigabyte


@pytest.fixture(
    params=[*ZOO_MODELS, *(pytest.param(name, marks=pytest.mark.long) for name in LONG_ZOO_MODELS)]
)
def zoo_model(request, zoo):
    """Each of the models."""
    folder, run = zoo
    if request.param in LONG_ZOO_MODELS:
        run("save", request.param)
    stored = np.load(folder / f"{request.param}.npz")
    network = request.param.partition(".")[2]
    zoo_map = (ZOO_MODELS | LONG_ZOO_MODELS)[request.param]
    return ZooModel(network, zoo_map, folder / f"{request.param}.pth", stored["images"], stored["logits"])


def pytest_ignore_collect(collection_path, config):
    """Leave the folders of the other frameworks alone, whose tests import them, and those of libraries.

    pytest does not ask of what is named on the command line.
    """
    if collection_path == LIBRARIES:
        return True
    name = _folder(collection_path)
    return True if name in FRAMEWORKS and name != config.option.framework else None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    selected, deselected = [], []
    for item in items:
        if (name := _folder(item.path)) in FRAMEWORKS:
            item.add_marker(pytest.mark.framework(name))
        for meeting in item.iter_markers("meeting"):  # for the report that tools/integrations.py reads
            item.user_properties.append(("meeting", meeting.args[0]))
        mark = item.get_closest_marker("framework")
        names = mark.args if mark else (None,)
        if unknown := set(names) - {None, *FRAMEWORKS}:
            raise pytest.UsageError(f"{item.nodeid}: unknown in the framework mark: {', '.join(unknown)}")
        (selected if config.option.framework in names else deselected).append(item)
    items[:] = selected
    config.hook.pytest_deselected(items=deselected)
    config.stash[CHOSEN] = {item for item in selected if item.get_closest_marker("long")}


def pytest_collection_finish(session):
    session.config.stash[LEFT_OUT] = len(session.config.stash.get(CHOSEN, set()).difference(session.items))


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):  # one of xdist's processes, which all collect the same
        session.config.workeroutput["left_out"] = session.config.stash.get(LEFT_OUT, 0)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    node.config.stash[LEFT_OUT] = getattr(node, "workeroutput", {}).get("left_out", 0)


def pytest_terminal_summary(terminalreporter, config):
    if left_out := config.stash.get(LEFT_OUT, 0):
        terminalreporter.line(f"long tests left out: {left_out}")


def _folder(path):
    """The top folder of tests/, or of tests/integrations/, that a path lies in."""
    top = LIBRARIES if path.is_relative_to(LIBRARIES) else TESTS
    parts = path.relative_to(top).parts if path.is_relative_to(top) else ()
    return parts[0] if parts else None
