"""Presets: what they say, and what is refused; and the schedule that they decide."""

import dataclasses

import pytest
from typer.testing import CliRunner

from rbn.cli import app
from rbn.training.preset import PRESETS, from_dict, read_preset
from rbn.training.schedule import learning_rate, total_steps
from rbn_core import RBNValueError, architectures

PUBLISHED = {
    "rbn-imagenet": ("sgd", 0.1, 0.9, 1e-4, 256, 100, "step", (30, 60, 90), 0, True),
    "rbn-mobilenet": ("sgd", 0.05, 0.9, 4e-5, 256, 200, "cosine", (), 5, True),
    "iebn-cifar100": ("sgd", 0.1, 0.9, 1e-4, 128, 164, "step", (81, 122), 0, True),
    "bnet-imagenet": ("sgd", 0.1, 0.9, 1e-4, 256, 100, "step", (30, 60, 90), 0, True),
}


def test_the_presets_are_those_of_the_papers():
    assert set(PRESETS) == {"digits", *PUBLISHED}
    for name, expected in PUBLISHED.items():
        preset = read_preset(name)
        found = (
            *(preset.optimizer, preset.learning_rate, preset.momentum, preset.weight_decay),
            *(preset.batch_size, preset.epochs, preset.schedule, preset.milestones),
            *(preset.warmup_epochs, preset.decay_norms),
        )
        assert found == expected
        architectures.network(preset.network, preset.norm)


@pytest.mark.parametrize("name", PRESETS)
def test_what_is_printed_is_read_again(name, tmp_path):
    printed = CliRunner().invoke(app, ["train", "--preset", name, "--print-preset"])
    assert printed.exit_code == 0
    (tmp_path / "own.toml").write_text(printed.output)
    assert read_preset(tmp_path / "own.toml") == read_preset(name)
    assert from_dict(read_preset(name).as_dict(), "itself") == read_preset(name)


def test_every_value_is_an_option():
    options = {
        "network": "cifar_resnet164",
        "norm": '{"layer": "rbn", "stages": [1, 2]}',
        "mean": "0.1,0.2,0.3",
        "milestones": "3, 7.5",
        "flip": None,
        "decay_norms": False,
        "epochs": "7",
        "factor": "0.5",
    }
    arguments = ["train", "--print-preset"]
    for name, value in options.items():
        word = name.replace("_", "-")
        arguments += (
            [f"--{word}"] if value is None else [f"--no-{word}"] if value is False else [f"--{word}", value]
        )
    printed = CliRunner().invoke(app, arguments)
    assert printed.exit_code == 0, printed.output
    for line in (
        'norm = { layer = "rbn", stages = [1, 2] }',
        "mean = [0.1, 0.2, 0.3]",
        "milestones = [3.0, 7.5]",
        "flip = true",
        "decay_norms = false",
        "epochs = 7",
        "factor = 0.5",
    ):
        assert line in printed.output.splitlines()
    shown = CliRunner().invoke(app, ["train", "--help"], env={"COLUMNS": "200"}).output
    for each in dataclasses.fields(read_preset("digits")):
        assert f"--{each.name.replace('_', '-')}" in shown


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rat": 1.0}, "got 'learning_rat'. Did you mean 'learning_rate'?"),
        ({"optimizer": "adam"}, "one of sgd, adamw, got 'adam'. Did you mean 'adamw'?"),
        ({"epochs": 0}, "epochs of 1 or more, got 0"),
        ({"epochs": 1.5}, "epochs to be an integer, got 1.5"),
        ({"batch_size": True}, "batch_size to be an integer, got True"),
        ({"learning_rate": float("nan")}, "learning_rate to be a finite number, got nan"),
        ({"mean": [0.5]}, "mean of three colours, got"),
        ({"deviation": [0, 1, 1]}, "deviation of three colours above 0"),
        ({"milestones": ["a"]}, "milestones to be a list of numbers"),
        ({"momentum": 0}, "momentum above 0"),
        ({"label_smoothing": 1}, "label_smoothing below 1"),
        ({"norm": {"stages": [1]}}, "norm to be a layer's name, or a table with a layer"),
    ],
)
def test_a_wrong_value_is_refused(change, message):
    with pytest.raises(RBNValueError) as caught:
        read_preset("digits").changed(**change)
    assert message in str(caught.value)


def test_a_wrong_file_is_refused(tmp_path):
    with pytest.raises(RBNValueError, match=r"got 'rbn-imagent'\. Did you mean 'rbn-imagenet'\?"):
        read_preset("rbn-imagent")
    (tmp_path / "a.toml").write_text("epochs =")
    with pytest.raises(RBNValueError, match="expected a preset as TOML"):
        read_preset(tmp_path / "a.toml")
    (tmp_path / "a.toml").write_text("epochs = 3")
    with pytest.raises(RBNValueError, match=r"without network, norm, .*--print-preset, which prints all"):
        read_preset(tmp_path / "a.toml")


STEPS = 7
"""Steps of an epoch."""


def rates(preset):
    return [learning_rate(preset, step, STEPS) for step in range(total_steps(preset, STEPS))]


def test_the_steps_end_with_the_epochs_or_where_they_are_given():
    preset = read_preset("digits")
    assert total_steps(preset, STEPS) == 10 * STEPS
    assert total_steps(preset.changed(steps=3), STEPS) == 3


@pytest.mark.framework("flax")
@pytest.mark.parametrize("warmup", [0, 2])
def test_the_schedules_are_optax_s(warmup):
    import optax

    preset = read_preset("digits").changed(warmup_epochs=warmup, epochs=6, learning_rate=0.3)
    first, total = warmup * STEPS, 6 * STEPS
    warm = optax.linear_schedule(0.3 / max(1, first), 0.3, first - 1)
    cosine = optax.join_schedules([warm, optax.cosine_decay_schedule(0.3, total - first)], [first])
    assert rates(preset) == pytest.approx([float(cosine(step)) for step in range(total)], abs=1e-7)
    steps = preset.changed(schedule="step", milestones=[3, 5], factor=0.2)
    falls = {(3 * STEPS) - first: 0.2, (5 * STEPS) - first: 0.2}
    falling = optax.piecewise_constant_schedule(0.3, falls)  # which counts anew behind the warm-up
    stepped = optax.join_schedules([warm, falling], [first])
    assert rates(steps) == pytest.approx([float(stepped(step)) for step in range(total)], abs=1e-7)


@pytest.mark.framework("torch")
@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*before.*optimizer.step")
@pytest.mark.parametrize("schedule", ["cosine", "step"])
@pytest.mark.parametrize("warmup", [0, 2])
def test_the_schedules_are_pytorch_s(warmup, schedule):
    import torch
    from torch.optim import lr_scheduler

    preset = read_preset("digits").changed(
        warmup_epochs=warmup, epochs=6, learning_rate=0.3, schedule=schedule, milestones=[3, 5], factor=0.2
    )
    first, total = warmup * STEPS, 6 * STEPS
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.3)
    behind = {
        "cosine": lambda: lr_scheduler.CosineAnnealingLR(optimizer, total - first),
        "step": lambda: lr_scheduler.MultiStepLR(optimizer, [3 * STEPS - first, 5 * STEPS - first], 0.2),
    }[schedule]
    scheduler = behind()
    if warmup:
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.3)
        warm = lr_scheduler.LinearLR(optimizer, 1 / first, total_iters=first - 1)
        scheduler = lr_scheduler.SequentialLR(optimizer, [warm, behind()], [first])
    found = []
    for _ in range(total):
        found.append(optimizer.param_groups[0]["lr"])
        scheduler.step()
    assert rates(preset) == pytest.approx(found, rel=1e-6)
