"""A run in each framework: what it gives, what it goes on from, and what it refuses."""

import dataclasses
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from typer.testing import CliRunner

from rbn.cli import app
from rbn.training import loop, run, run_file
from rbn.training.log import read_log
from rbn.training.preset import read_preset
from rbn.training.share import Share
from rbn_core import RBNValueError, execution, networks, weights
from rbn_core.networks import Activation, Convolution, Linear, Network, Norm, Pooling

FRAMEWORKS = ("torch", "flax", "mindspore", "jittor")

pytestmark = pytest.mark.framework(*FRAMEWORKS)

BATCH, CLASSES = 12, 10
PRESET = read_preset("digits").changed(batch_size=BATCH, learning_rate=0.05, label_smoothing=0.1)


@pytest.fixture
def name(request):
    return request.config.option.framework


def small(layer="rbn"):
    """A network that every framework compiles in seconds."""
    return Network(
        "small",
        (
            Convolution("conv1", ("input",), 3, 6, 3, 2, 1),
            Norm("bn1", ("conv1",), 6, layer),
            Activation("relu", ("bn1",)),
            Pooling("pool", ("relu",), "average"),
            Linear("fc", ("pool",), 6, CLASSES),
        ),
    )


@pytest.fixture
def small_networks(monkeypatch):
    """Have every preset's network be the small one."""
    monkeypatch.setattr(run.architectures, "network", lambda name, norm, classes: small(norm))


def images(count, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, 3, 8, 8)).astype(np.float32), rng.integers(0, CLASSES, count)


def losses_of(logits, labels, smoothing):
    """The losses, written out."""
    logits = np.asarray(logits, np.float64)
    logp = logits - logits.max(1, keepdims=True)
    logp -= np.log(np.exp(logp).sum(1, keepdims=True))
    q = (1 - smoothing) * np.eye(CLASSES)[labels] + smoothing / CLASSES
    return -(q * logp).sum(1)


def test_a_step_and_an_evaluation_are_what_numpy_gives(name):
    network, (x, labels) = small(), images(BATCH)
    state = execution.initial_state(network, 3)
    built = loop.build(name, network, PRESET, "")
    built.load(state, None)
    expected, after = execution.run(network, state, x.astype(np.float64), training=True)
    loss, correct = built.step(x, labels, 0.05)
    assert loss == pytest.approx(losses_of(expected, labels, 0.1).mean(), rel=1e-5)
    assert correct == (expected.argmax(1) == labels).sum()
    found = built.state()
    np.testing.assert_allclose(found["bn1.running_mean"], after["bn1.running_mean"], rtol=1e-4, atol=1e-6)
    labels[-5:] = -1
    logits, _ = execution.run(network, found, x.astype(np.float64))
    scores = built.evaluate(x, labels)
    order = np.argsort(-logits[:-5], axis=1) == labels[:-5, None]
    assert scores.count == BATCH - 5
    assert scores.loss == pytest.approx(losses_of(logits[:-5], labels[:-5], 0).sum(), rel=1e-4)
    assert (scores.top1, scores.top5) == (order[:, 0].sum(), order[:, :5].sum())


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("decay_norms", [True, False])
def test_an_update_is_what_the_papers_and_their_options_say(name, optimizer, decay_norms):
    preset = PRESET.changed(optimizer=optimizer, weight_decay=0.3, decay_norms=decay_norms)
    start = execution.initial_state(small(), 1)
    x, labels = images(BATCH)
    plain = loop.build(name, small(), preset.changed(weight_decay=0), "")
    built = loop.build(name, small(), preset, "")
    for each in (plain, built):
        each.load(start, None)
        each.step(x, labels, 0.1)
    first, before, kept = plain.training(), built.state(), built.training()
    built.step(x, labels, 0.05)
    after, now = built.state(), built.training()
    assert (kept.step, now.step, now.decoupled) == (1, 2, optimizer == "adamw")
    assert [group.learning_rate for group in now.groups] == pytest.approx([0.05] * len(now.groups))
    decays = {each: group.weight_decay for group in now.groups for each in group.parameters}
    assert len(decays) == 1 + 5 + 2
    for each, decay in decays.items():
        assert decay == pytest.approx(0.3 * (decay_norms or each in ("conv1.weight", "fc.weight")))
        p = before[each].astype(np.float64)
        if optimizer == "sgd":
            expected = p - 0.05 * now.slots["momentum"][each]
            slot, gradient = "momentum", first.slots["momentum"][each] + decay * start[each]
        else:
            m, v = now.slots["first_moment"][each], now.slots["second_moment"][each]
            m, v = m / (1 - 0.9**2), v / (1 - 0.999**2)
            expected = p - 0.05 * (m / (np.sqrt(v) + 1e-8) + decay * p)
            slot, gradient = "first_moment", first.slots["first_moment"][each]
        np.testing.assert_allclose(after[each], expected, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(kept.slots[slot][each], gradient, rtol=1e-4, atol=1e-6)


def without_statistics():
    """The small network without its normalization."""
    conv, _, relu, *rest = small().nodes
    return dataclasses.replace(small(), nodes=(conv, dataclasses.replace(relu, inputs=("conv1",)), *rest))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_batch_in_parts_is_the_whole_one_where_there_are_no_batch_statistics(name, optimizer):
    states, results = [], []
    for parts in (1, 3):
        preset = PRESET.changed(optimizer=optimizer, accumulate=parts)
        built = loop.build(name, without_statistics(), preset, "")
        built.load(execution.initial_state(without_statistics(), 1), None)
        results.append([built.step(*images(BATCH, step), 0.01) for step in range(3)])
        states.append(built.state())
        assert built.training().step == 3
    for (loss, correct), (expected, expected_correct) in zip(*results, strict=True):
        assert loss == pytest.approx(expected, rel=1e-5)
        assert correct == expected_correct
    for each, array in states[0].items():
        np.testing.assert_allclose(states[1][each], array, rtol=1e-4, atol=1e-5, err_msg=each)


def test_batch_statistics_are_of_a_part_and_go_into_the_running_ones_part_by_part(name):
    network, (x, labels) = small(), images(BATCH)
    state = execution.initial_state(network, 3)
    built = loop.build(name, network, PRESET.changed(accumulate=2), "")
    built.load(state, None)
    loss, _ = built.step(x, labels, 0.05)
    losses = []
    for part in (slice(0, 6), slice(6, 12)):
        logits, state = execution.run(network, state, x[part].astype(np.float64), training=True)
        losses.append(losses_of(logits, labels[part], 0.1).mean())
    assert loss == pytest.approx(np.mean(losses), rel=1e-5)
    found = built.state()
    for each in ("bn1.running_mean", "bn1.running_var"):
        np.testing.assert_allclose(found[each], state[each], rtol=1e-4, atol=1e-6)


@pytest.mark.framework("torch")
def test_half_precision_and_the_memory_format_change_rounding_alone(monkeypatch):
    from torch import channels_last

    from rbn.training import loop_torch

    def two_steps(means):
        built = loop.build("torch", small(), PRESET, "cpu", means=means)
        built.load(execution.initial_state(small(), 1), None)
        losses = [built.step(*images(BATCH, step), 0.05)[0] for step in range(2)]
        return built, np.array([*losses, built.evaluate(*images(BATCH)).loss / BATCH])

    _, expected = two_steps(loop.PLAIN)
    built, found = two_steps(loop.Means(channels_last=True))
    assert built.model.conv1.weight.is_contiguous(memory_format=channels_last)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    _, found = two_steps(loop.Means(amp="bfloat16"))
    assert 0 < np.abs(found - expected).max() < 0.02
    monkeypatch.setattr(loop_torch, "_check_amp", lambda *arguments: None)  # which wants a GPU for it
    built, found = two_steps(loop.Means(amp="float16"))
    assert built.scaler.get_scale() > 1000  # no step was left out
    assert 0 < np.abs(found - expected).max() < 0.002


@pytest.mark.long
@pytest.mark.framework("torch")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # PyTorch's own
def test_a_compiled_network_is_the_same_to_rounding():
    losses = []
    for means in (loop.PLAIN, loop.Means(compile=True)):
        built = loop.build("torch", small(), PRESET, "cpu", means=means)
        built.load(execution.initial_state(small(), 1), None)
        losses.append([built.step(*images(BATCH, step), 0.05)[0] for step in range(2)])
    assert built.module._compiled_call_impl is not None
    np.testing.assert_allclose(*losses, rtol=1e-5)


@pytest.mark.framework("torch")
def test_what_cannot_be_combined_is_refused(tmp_path, small_networks, monkeypatch):
    from rbn.training.loop_torch import join

    begun = ("train", "--out", tmp_path / "run")
    for arguments, message in (
        (("--amp", "float16", "--device", "cpu"), "expected a GPU for --amp float16, got cpu"),
        (("--amp", "half"), "expected --amp bfloat16 or float16, got 'half'"),
        (("--amp", "bfloat16", "--dtype", "float64"), "expected --dtype float32 with --amp, got float64"),
        (("--accumulate", "7"), "a multiple of 7, .* got 64. Give for example --batch-size 63"),
        (("--accumulate", "0"), "expected accumulate of 1 or more, got 0"),
    ):
        done = call(*begun, "--framework", "torch", *arguments)
        assert done.exit_code == 2, done.output
        assert re.search(message, done.output.replace("\n", " ")), done.output
    with pytest.raises(RBNValueError, match="--channels-last in PyTorch, which alone has them, got flax"):
        loop.build("flax", small(), PRESET, "", means=loop.Means(compile=True))
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RBNValueError, match=r"a device that is there, cpu.*, got 'cuda:0'"):
        loop.build("torch", small(), PRESET, "cuda:0", Share(0, 2))
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert join("") == Share(0, 1)


@pytest.mark.framework("torch", "mindspore")
def test_a_batch_norm_that_cannot_share_its_statistics_is_refused(name):
    device = {"torch": "cpu", "mindspore": "CPU"}[name]
    with pytest.raises(
        RBNValueError, match=r"expected RBN, IEBN or BNET for --sync .* got bn\. Leave --sync"
    ):
        loop.build(name, small("bn"), PRESET.changed(sync=True), device, Share(0, 2))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("norm", ["rbn", "iebn", "bnet"])
def test_a_run_goes_on_bit_for_bit(name, norm, optimizer):
    preset = PRESET.changed(optimizer=optimizer)
    whole = loop.build(name, small(norm), preset, "")
    whole.load(execution.initial_state(small(norm)), None)
    for step in range(2):
        whole.step(*images(BATCH, step), 0.05)
    later = loop.build(name, small(norm), preset, "")
    later.load(whole.state(), whole.training())
    for step in range(2, 4):
        assert whole.step(*images(BATCH, step), 0.04) == later.step(*images(BATCH, step), 0.04)
    expected, found = whole.state(), later.state()
    assert expected.keys() == found.keys()
    for each, array in expected.items():
        np.testing.assert_array_equal(array, found[each], err_msg=each)


def test_a_device_that_is_not_there_is_refused(name):
    with pytest.raises(RBNValueError, match=r"expected a device that is there, .*got 'gpu:7'\. Give one of"):
        loop.build(name, small(), PRESET, "gpu:7")


def call(*arguments):
    return CliRunner().invoke(app, [str(each) for each in arguments])


SHORT = ("--batch-size", 256, "--log-every", 1, "--epochs", 2)
"""A run of ten steps."""


def test_a_run_s_folder_explains_itself(name, tmp_path, small_networks):
    done = call("train", "--framework", name, "--out", tmp_path / "run", *SHORT)
    assert done.exit_code == 0, done.output
    assert "small with rbn for 10 classes" in done.output
    assert re.search(r"epoch 2 of 2: loss [\d.]+, top-1 [\d.]+ %; evaluation: loss", done.output)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"last.safetensors", "best.safetensors", "log.csv", "preset.toml", "tensorboard"}
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    rows = read_log(tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(1, 11))
    assert [row["step"] for row in rows if "evaluation_top5" in row] == [5, 10]
    assert rows[-1]["loss"] < rows[0]["loss"]
    saved = run_file.load(tmp_path / "run" / "last.safetensors")
    assert (saved.progress.step, saved.training.step, saved.framework) == (10, 10, name)
    assert saved.progress.best == pytest.approx(max(row.get("evaluation_top1", 0) for row in rows))
    assert saved.preset == read_preset(tmp_path / "run" / "preset.toml")
    read = weights.read(tmp_path / "run" / "last.safetensors")
    assert read.run["epoch"] == 2
    assert {"rbn", "numpy", name} <= read.run["versions"].keys()
    again = call("eval", tmp_path / "run" / "last.safetensors")
    assert again.exit_code == 0, again.output
    assert f"449 images of digits in {name}: top-1 {rows[-1]['evaluation_top1']:.2f} %" in again.output
    assert call("train", "--out", tmp_path / "run", *SHORT).exit_code == 2  # it has a run


def test_a_run_that_was_stopped_goes_on_bit_for_bit(name, tmp_path, small_networks, monkeypatch):
    """By Ctrl-C in the middle of an epoch, behind a row of the log that is due after two steps."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    options = ("--framework", name, *SHORT, "--log-every", 2)
    assert call("train", "--out", whole, *options).exit_code == 0
    made, known = [], run.learning_rate

    def interrupted(*arguments):
        made.append(0)
        if len(made) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return known(*arguments)

    with monkeypatch.context() as context:
        context.setattr(run.Plan, "lines", lambda plan: [])  # which asks for learning rates, too
        context.setattr(run, "learning_rate", interrupted)
        stopped = call("train", "--out", cut, *options)
    assert stopped.exit_code == 130
    assert f"rbn train --resume {cut / 'last.safetensors'}" in stopped.output
    assert run_file.load(cut / "last.safetensors").progress.step == 3
    done = call("train", "--resume", cut / "last.safetensors", "--log-every", 2)
    assert done.exit_code == 0, done.output
    expected, found = (weights.read(folder / "last.safetensors") for folder in (whole, cut))
    for each, array in expected.state.items():
        np.testing.assert_array_equal(array, found.state[each], err_msg=each)
    without_speed = [
        [{key: value for key, value in row.items() if key != "images_per_second"} for row in read_log(folder)]
        for folder in (whole, cut)
    ]
    assert without_speed[0] == without_speed[1]


def test_a_loss_that_is_no_number_stops_the_run(name, tmp_path, small_networks, monkeypatch):
    steps = []

    def diverging(built, x, labels, rate):
        steps.append(rate)
        return (1.0 if len(steps) < 7 else float("nan")), 0

    module = sys.modules[type(loop.build(name, small(), PRESET, "")).__module__]
    monkeypatch.setattr(module.Loop, "step", diverging)
    out = tmp_path / "run"
    done = call("train", "--framework", name, "--out", out, *SHORT)
    assert done.exit_code == 1
    for text in ("got nan in step 7", "--learning-rate", f"--resume {out / 'last.safetensors'}"):
        assert text in done.output
    assert run_file.load(out / "last.safetensors").progress.step == 5


@pytest.mark.framework("torch")
def test_the_file_of_another_run_is_refused(tmp_path, small_networks):
    out = tmp_path / "run"
    options = ("--steps", 1, "--batch-size", 64, "--framework", "torch")
    assert call("train", "--out", out, *options).exit_code == 0
    last = out / "last.safetensors"
    before = last.read_bytes()
    for arguments, message in (
        (("train", "--resume", last, "--norm", "iebn"), "expected the file of a run with small with iebn"),
        (("train", "--resume", last, "--optimizer", "adamw"), "expected the file of a run with adamw"),
        (("train", "--resume", last, "--preset", "digits"), "expected --resume or --preset, got both"),
        (("train", "--resume", last, "--epochs", 0), "expected epochs of 1 or more"),
        (("train", "--resume", last, "--framework", "tf"), "got 'tf'"),
        (("train", "--resume", tmp_path / "none"), "which is no file"),
        (("eval", last, "--data", f"cifar10:{tmp_path / 'no'}"), "expected a folder with the data"),
    ):
        done = call(*arguments)
        assert done.exit_code == 2, done.output
        assert message in done.output.replace("\n", " ")
        assert "Traceback" not in done.output
    assert last.read_bytes() == before
    weights.save(tmp_path / "a.safetensors", {"gamma": np.ones(3)})
    assert "holds no run" in call("train", "--resume", tmp_path / "a.safetensors").output
    read = weights.read(last)
    fields = {each.name: getattr(read, each.name) for each in dataclasses.fields(read)}
    state = fields.pop("state")
    weights.save(tmp_path / "b.safetensors", state, **fields | {"run": {"preset": {}}})
    assert "whose run is damaged" in call("eval", tmp_path / "b.safetensors").output
    finished = call("train", "--resume", last)
    assert (finished.exit_code, "all 1 steps are made" in finished.output) == (0, True)


@pytest.mark.framework("torch")
def test_a_dry_run_says_what_the_run_would_be(tmp_path):
    done = call("train", "--out", tmp_path / "run", "--dry-run", "--schedule", "step", "--milestones", "5,8")
    assert done.exit_code == 0
    for text in (
        "cifar_resnet20 with rbn for 10 classes, 274,826 parameters, 0.00255 billion multiply-adds",
        "digits: 1,348 images to train with, 449 to evaluate with",
        "210 of 64 images, 21 in an epoch; 0 are made",
    ):
        assert text in done.output.replace("\n", " ")
    assert not (tmp_path / "run").exists()


def test_a_network_that_leaves_nothing_of_the_images_is_refused():
    network = dataclasses.replace(
        small(), nodes=(Convolution("conv1", ("input",), 3, 6, 9), *small().nodes[1:])
    )
    with pytest.raises(RBNValueError, match="expected images that small can take, got 12 at a time of 8 x"):
        run.check_fit(network, PRESET)
    with pytest.raises(RBNValueError, match="of which bn1 gets"):
        run.check_fit(small(), PRESET.changed(batch_size=1, image_size=1))
    run.check_fit(small(), PRESET.changed(batch_size=2, image_size=1, sync=True), Share(0, 2))
    for options, share in (({}, Share(0, 2)), ({"accumulate": 2}, Share())):
        with pytest.raises(RBNValueError, match="got 1 at a time of 1 x 1 pixels, of which bn1 gets"):
            run.check_fit(small(), PRESET.changed(batch_size=2, image_size=1, **options), share)
    assert networks.Network.from_json(small().to_json()) == small()


DISK = """
import resource, sys
from test_loops import call, small
from rbn.training import run, run_file

save, count = run_file.save, [0]


def full(*arguments, **options):
    count[0] += 1
    if count[0] == 3:  # last and best are written in the first epoch
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
    save(*arguments, **options)


run_file.save = full
run.architectures.network = lambda name, norm, classes: small(norm)
done = call(*sys.argv[1:])
print(done.output)
sys.exit(done.exit_code)
"""


def python(*arguments):
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *filter(None, sys.path)])
    }
    return subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, env=environment
    )


@pytest.mark.framework("torch")
def test_a_full_disk_leaves_the_last_file(tmp_path):
    out = tmp_path / "run"
    arguments = ("train", "--framework", "torch", "--out", out, "--epochs", 2, "--batch-size", 512)
    done = python("-c", DISK, *arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    assert f"expected to write {out / 'last.safetensors'}, got: File too large" in done.stdout.replace(
        "\n", ""
    )
    assert run_file.load(out / "last.safetensors").progress.step == 2
    assert [path.name for path in out.iterdir() if path.name.startswith(".")] == []


@pytest.mark.framework("torch")
@pytest.mark.parametrize("kills", [3, pytest.param(50, marks=pytest.mark.long)])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, kills):
    done = python(os.path.join(os.path.dirname(__file__), "killed.py"), tmp_path, kills)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split()[-1]) >= kills // 2
    expected, found = (weights.read(tmp_path / each / "last.safetensors") for each in ("whole", "cut"))
    assert found.run["progress"]["step"] == expected.run["progress"]["step"]
    for each, array in expected.state.items():
        np.testing.assert_array_equal(array, found.state[each], err_msg=each)
    for each, array in expected.training.slots["momentum"].items():
        np.testing.assert_array_equal(array, found.training.slots["momentum"][each], err_msg=each)


@pytest.mark.long
@pytest.mark.framework("torch")
def test_ctrl_c_in_a_terminal_leaves_the_workers_to_the_run(tmp_path):
    """A terminal sends it to all processes of a command."""
    out = tmp_path / "run"
    arguments = ("train", "--framework", "torch", "--out", out, "--workers", 2, *SHORT[:4], "--epochs", 500)
    command = [sys.executable, "-m", "rbn", *map(str, arguments)]
    process = subprocess.Popen(
        command, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    while process.poll() is None and not ((out / "log.csv").is_file() and len(read_log(out)) > 2):
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    assert "stopped and saved" in output
    assert "Traceback" not in output
    assert run_file.load(out / "last.safetensors").progress.step > 2
