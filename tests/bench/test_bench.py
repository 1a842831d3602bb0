"""`rbn bench`: what it refuses, what it writes, and every framework on small inputs."""

import json
import multiprocessing
import signal
import time

import pytest
from typer.testing import CliRunner

from rbn import cli
from rbn.backends.frameworks import FRAMEWORKS
from rbn.benchmarks import runner
from rbn.benchmarks.cases import (
    BATCH_NORM,
    EVALUATION,
    RBN,
    SECONDS,
    TRAINING,
    Options,
)
from rbn.benchmarks.runner import Run, run
from rbn.benchmarks.timing import Comparison
from rbn.benchmarks.worker import Measurement, Worker, count, work

FOUND = Comparison(0.6, 1.0, 0.6, 0.5, 0.7, 5)


def call(*arguments):
    return CliRunner().invoke(cli.app, ["bench", *arguments])


@pytest.fixture
def measured(monkeypatch):
    """What the command asked to measure, in place of the measuring; torch fails where it is to."""
    asked = []

    def run(names, options, progress):
        asked.append((list(names), options))
        measurements = [Measurement("", (4, 3), phase, RBN, FOUND, 0.1) for phase in (TRAINING, EVALUATION)]
        runs = [Run(name, measurements=list(measurements)) for name in names]
        runs[0].failure = (asked[0][1].network == "resnet18" and "it broke") or ""
        progress(runs)
        return runs

    monkeypatch.setattr(runner, "run", run)
    monkeypatch.setattr(cli, "is_installed", lambda name: True)
    return asked


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["tensorflow"], "tensorflow: expected some of torch, flax, mindspore, jittor"),
        (["--network", "resnet51"], "resnet51: expected one of"),
        (["flax", "--dtype", "bfloat16"], "--network, --dtype and --device are for torch, got flax"),
        (["torch", "jittor", "--network", "resnet50"], "are for torch, got torch, jittor"),
        (["--dtype", "int8"], "int8"),
        (["--network", "resnet50", "--plot", "x.png"], "Leave one out"),
    ],
)
def test_what_is_unknown_is_exit_status_2(measured, arguments, text):
    result = call(*arguments)
    assert result.exit_code == 2
    assert text in " ".join(result.output.replace("│", "").split())
    assert measured == []


def test_a_framework_that_is_not_installed_is_exit_status_2(measured, monkeypatch):
    monkeypatch.setattr(cli, "is_installed", lambda name: name != "jittor")
    result = call("torch", "jittor")
    assert result.exit_code == 2
    assert "jittor is not installed: pip install 'rbn[jittor]'" in result.output
    assert measured == []


def test_all_installed_frameworks_by_default(measured, monkeypatch):
    monkeypatch.setattr(cli, "is_installed", lambda name: name != "jittor")
    result = call()
    assert result.exit_code == 0, result.output
    assert "jittor is not installed: pip install 'rbn[jittor]'" in result.output
    ((names, options),) = measured
    assert names == ["torch", "flax", "mindspore"]
    assert (options.seconds, options.dtype, options.device) == (SECONDS, "float32", "cpu")


def test_without_matplotlib_the_error_names_the_extra(measured, monkeypatch):
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    result = call("--plot", "x.png")
    assert result.exit_code == 2
    assert "pip install 'rbn[bench]'" in " ".join(result.output.replace("│", "").split())


def test_it_writes_the_files_that_were_asked_for(measured, tmp_path):
    result = call("torch", "--quick", "--json", str(tmp_path / "b.json"), "--plot", str(tmp_path / "b.svg"))
    assert result.exit_code == 0, result.output
    assert "torch: 1 of 1 are at most 0.70 in training" in result.output
    assert list(json.loads((tmp_path / "b.json").read_text())["frameworks"]) == ["torch"]
    assert "<svg" in (tmp_path / "b.svg").read_text()
    ((_, options),) = measured
    assert options.seconds == 0.0


def test_a_failure_is_exit_status_1(measured):
    result = call("--network", "resnet18")
    assert result.exit_code == 1
    assert "torch: it broke" in result.output


class Counted(Worker):
    """A worker that notes what is built."""

    variants = ("one", "two")
    forms = (BATCH_NORM, RBN)

    def __init__(self, options):
        super().__init__(options)
        self.built = []

    def build(self, form, variant, shape):
        self.built.append((form, variant, shape))
        return {TRAINING: lambda: None, EVALUATION: lambda: None}

    def takes(self, variant, shape):
        return variant == "one" or len(shape) == 4


def test_every_form_is_measured_in_every_phase_on_every_shape():
    worker = Counted(Options(shapes=((2, 3, 4, 4), (4, 3)), seconds=0.0))
    announced = []
    found = list(work(worker, announced.append))
    assert [(m.variant, m.shape, m.phase, m.form) for m in found] == [
        (variant, shape, phase, RBN)
        for variant, shape in (("one", (2, 3, 4, 4)), ("two", (2, 3, 4, 4)), ("one", (4, 3)))
        for phase in (TRAINING, EVALUATION)
    ]
    assert count(worker) == len(found) == len(announced)
    assert worker.built.count((BATCH_NORM, "one", (4, 3))) == 1


def test_a_process_that_fails_says_why(monkeypatch):
    monkeypatch.setitem(runner.WORKERS, "torch", "rbn.benchmarks.no_such_module:Worker")
    (found,) = run(["torch"], Options(), lambda runs: None)
    assert "No module named 'rbn.benchmarks.no_such_module'" in found.failure


def test_a_process_that_dies_says_how(monkeypatch):
    monkeypatch.setitem(runner.WORKERS, "torch", "os:_exit")
    (found,) = run(["torch"], 7, lambda runs: None)
    assert "its process ended with exit code 7" in found.failure


@pytest.mark.framework(*FRAMEWORKS)
def test_a_framework_on_small_inputs(request):
    """The real workers; nothing is said about the times."""
    name = request.config.option.framework
    options = Options(shapes=((2, 3, 4, 4), (4, 3)), seconds=0.0)
    seen = set()
    (found,) = run([name], options, lambda runs: seen.update(each.now for each in runs))
    assert found.failure == ""
    assert len(found.measurements) == found.total > 0
    assert found.versions
    assert found.threads >= 1
    assert "importing" in seen
    assert {m.phase for m in found.measurements} == {TRAINING, EVALUATION}
    assert {m.shape for m in found.measurements} == set(options.shapes)
    assert all(m.comparison.seconds > 0 and m.copy_seconds > 0 for m in found.measurements)


@pytest.mark.framework("torch")
def test_a_network_on_small_images():
    options = Options(network="cifar_resnet20", images=(2, 3, 32, 32), seconds=0.0)
    (found,) = run(["torch"], options, lambda runs: None)
    assert found.failure == ""
    (measurement,) = found.measurements
    assert (measurement.shape, measurement.form, measurement.phase) == ((2, 3, 32, 32), RBN, TRAINING)


@pytest.mark.parametrize("after", [0.0, 3.0])
def test_an_interrupted_run_leaves_no_process_behind(monkeypatch, after):
    """Neither at once, nor when the process has its group."""
    monkeypatch.setitem(runner.WORKERS, "torch", "time:sleep")
    started, processes = time.monotonic(), []

    def interrupt(runs):
        if time.monotonic() - started >= after:
            processes.extend(multiprocessing.active_children())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(["torch"], 600, interrupt)
    (process,) = processes
    process.join(10)
    assert process.exitcode == -signal.SIGKILL
