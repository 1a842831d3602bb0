"""What is made of measurements: targets, shares, the table, the JSON file and the picture."""

import dataclasses
import json

import pytest
from matplotlib.figure import Figure
from rich.console import Console

from rbn.benchmarks import plot, report
from rbn.benchmarks.cases import (
    BATCH_NORM,
    EQUATIONS,
    EVALUATION,
    FORMS,
    PLAIN,
    RBN,
    TARGETS,
    TRAINING,
    Options,
)
from rbn.benchmarks.runner import WORKERS, Run
from rbn.benchmarks.timing import Comparison
from rbn.benchmarks.worker import Measurement
from rbn.progress import Progress

SHAPES = ((2, 3, 4, 4), (4, 3))


def beside_10_ms(ratio):
    return Comparison(ratio / 100, 0.01, ratio, ratio, ratio, 5)


def measured(name="torch", variants=("channels_first",), rbn=0.6, shapes=SHAPES):
    """A run whose BatchNorm takes 10 ms, and a copy 1 ms."""
    times = {RBN: rbn, PLAIN: 2.0, EQUATIONS: 5.0}
    return Run(
        name,
        measurements=[
            Measurement(
                variant, shape, phase, form, Comparison(ratio / 100, 0.01, ratio, ratio, ratio, 5), 0.001
            )
            for variant in variants
            for shape in shapes
            for form, ratio in times.items()
            for phase in (TRAINING, EVALUATION)
        ],
        versions={name: "1.0"},
        threads=2,
        seconds=3.0,
    )


def printed(*runs, options=None):
    console = Console(width=120, record=True)
    console.print(report.render(runs, options or Options()))
    return console.export_text()


def test_every_framework_has_a_worker_and_targets():
    assert list(WORKERS) == list(TARGETS)


@pytest.mark.parametrize(("phase", "share"), [(TRAINING, 4 / 6), (EVALUATION, 1 / 6)])
def test_the_share_of_the_copy_bandwidth_counts_passes(phase, share):
    """6 ms; a copy is 2 passes and takes 1 ms, so the 8 of training need 4 ms, the 2 of evaluation 1 ms."""
    (first,) = [m for m in measured(shapes=SHAPES[:1]).measurements if (m.form, m.phase) == (RBN, phase)]
    assert report.share_of_copy(first) == pytest.approx(share)


@pytest.mark.parametrize(
    ("rbn", "training", "evaluation"), [(0.7, 2, 2), (0.71, 0, 2), (1.1, 0, 2), (1.11, 0, 0)]
)
def test_the_table_says_whether_the_targets_are_reached(rbn, training, evaluation):
    text = printed(measured(rbn=rbn))
    assert (
        f"torch: {training} of 2 are at most 0.70 in training, {evaluation} of 2 are at most 1.10 in "
        "evaluation; measured in 3 s" in text
    )
    assert sum(" yes " in line for line in text.splitlines()) == training + evaluation
    assert sum(" no " in line for line in text.splitlines()) == 4 - training - evaluation


def test_the_table_of_the_longest_entries_fits_where_there_is_no_terminal():
    run = measured(shapes=((32, 2048, 112, 112),))
    slow = Comparison(1.2345, 1.2345, 12.34, 10.12, 15.67, 5)
    run.measurements = [dataclasses.replace(each, comparison=slow) for each in run.measurements]
    text = printed(run)
    assert "…" not in text
    assert "12.34 (10.12-15.67)" in text


def test_the_table_without_the_plain_form_and_with_a_failure():
    run = measured("flax", variants=("",))
    run.measurements = [each for each in run.measurements if each.form != PLAIN]
    run.failure = "it broke"
    text = printed(run)
    assert " - " in text
    assert "flax: it broke" in text


def test_a_network_has_its_own_target():
    found = Comparison(1.01, 1.0, 1.01, 1.0, 1.02, 9)
    run = Run("torch", measurements=[Measurement("", (8, 3, 224, 224), TRAINING, RBN, found, None)])
    assert "torch: 1 of 1 are at most 1.02 in training" in printed(run, options=Options(network="resnet50"))


def test_the_json_file_has_everything(tmp_path):
    file = tmp_path / "bench.json"
    report.write_json(file, [measured(), Run("jittor", failure="it broke")], Options(), "rbn bench")
    content = json.loads(file.read_text())
    assert set(content) == {
        "rbn", "python", "numpy", "system", "processor", "processors", "loops", "date", "command", "options",
        "frameworks",
    }  # fmt: skip
    assert content["processor"]
    assert content["options"]["dtype"] == "float32"
    assert content["frameworks"]["jittor"]["failure"] == "it broke"
    torch = content["frameworks"]["torch"]
    assert (torch["versions"], torch["threads"], torch["seconds"]) == ({"torch": "1.0"}, 2, 3.0)
    assert len(torch["measurements"]) == 12
    assert torch["measurements"][0] == {
        "variant": "channels_first",
        "shape": [2, 3, 4, 4],
        "phase": "training",
        "form": "RBN",
        "seconds": 0.006,
        "batch_norm_seconds": 0.01,
        "ratio": 0.6,
        "ratio_quartiles": [0.6, 0.6],
        "pairs": 5,
        "copy_seconds": 0.001,
        "share_of_copy": pytest.approx(4 / 6),
        "target": 0.7,
        "reached": True,
    }
    assert {each["target"] for each in torch["measurements"] if each["form"] != "RBN"} == {None}


def test_the_picture_has_a_bar_for_each_form_and_the_floor(tmp_path, monkeypatch):
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: figures.append(self) or save(self, *a, **k))
    file = tmp_path / "bench.png"
    runs = [measured(variants=("channels_first", "channels_last")), measured("flax", ("",))]
    plot.write_plot(file, runs, "title")
    assert file.read_bytes().startswith(b"\x89PNG")
    (figure,) = figures
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == [
        f"{name}, {phase}"
        for name in ("torch channels_first", "torch channels_last", "flax")
        for phase in (TRAINING, EVALUATION)
    ]
    bars = {bar.get_label(): [patch.get_height() for patch in bar] for bar in figure.axes[0].containers}
    assert list(bars) == [BATCH_NORM, RBN, PLAIN, EQUATIONS]
    assert [*bars.values()] == [pytest.approx([ms, ms]) for ms in (10, 6, 20, 50)]
    for axes, floor in zip(figure.axes[:2], (4.0, 1.0), strict=True):
        (lines,) = axes.collections
        assert [segment[0][1] for segment in lines.get_segments()] == pytest.approx([floor, floor])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [*FORMS, "copy bandwidth"]


def test_progress_on_no_terminal_is_a_line_now_and_then():
    console = Console(record=True, force_terminal=False, width=100)
    with Progress(console, report.progress_row, interval=0.0) as progress:
        progress([Run("torch", now="(2, 3), RBN, training", total=8), Run("flax")])
    assert console.export_text() == "torch: 0 of 8, (2, 3), RBN, training\n"
