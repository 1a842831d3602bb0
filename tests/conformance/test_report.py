"""What the terminal and the JSON say of a run."""

import io
import json
import time
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from rbn.conformance import loading, runner
from rbn.conformance.checks import ABSENT, EXPECTED, FAILED, LATE, PASSED, Result
from rbn.conformance.comparison import Deviation
from rbn.conformance.diagnosis import Cause, Diagnosis
from rbn.conformance.report import (
    CASES,
    TYPICAL,
    coverage,
    progress_row,
    render,
    seconds_left,
    write_json,
)
from rbn.conformance.suite import all_cases
from rbn.progress import Progress

CAUSE = "behaves like: The momentum weighs the new value instead of the old."


def finished_run(status=PASSED, failure=""):
    worst = Deviation("y", 1.0, 2.0) if status == PASSED else Deviation("y", np.inf, 2.0, "at [0]")
    causes = (CAUSE,) if status == FAILED else ()
    why = "" if status == PASSED else "why"
    result = Result("rbn/train/x/float32", "rbn/train/float32", status, (worst,), why, 0.1, causes)
    run = runner.Run("numpy", ("a:B",), (), "done", 0.0, 1.0, {"numpy": [result]}, {"numpy": "1"}, failure)
    if status == FAILED:
        run.diagnoses["numpy"] = Diagnosis(
            (Cause(CAUSE, (result.case,)),), ("y is wrong.",), "Something is left."
        )
    return run


def shown(runs):
    console = Console(width=120, file=io.StringIO())
    console.print(render(runs))
    return console.file.getvalue()


def test_the_matrix_shows_the_worst_ratio_what_failed_and_the_cause():
    assert "0.50" in shown([finished_run()])
    assert "conforms: 1 passed" in shown([finished_run()])
    text = shown([finished_run(FAILED)])
    assert "1 failed: inf" in text
    assert "rbn/train/x/float32: why\n" in text
    assert f"  {CAUSE} (1 failed case)\n  Something is left.\n  - y is wrong.\n" in text
    assert "DIFFERS" in text


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_matrix_is_whole_however_narrow_the_terminal(width):
    run = finished_run()
    (results,) = run.results.values()
    run.results = {f"framework{number}.plain": results for number in range(9)}
    matrix, *_ = render([run]).renderables
    console = Console(width=width, file=io.StringIO())
    console.print(matrix)
    text = console.file.getvalue()
    assert "…" not in text
    assert text.count("framework") == text.count(".plain") == text.count("0.50") == 9


def test_the_coverage_names_who_lacks_a_value():
    cases = [
        case
        for case in all_cases()
        if case.id in ("rbn/train/offset0/8x3/float32", "rbn/eval/offset0/8x3/float32")
    ]
    results = {
        name: [Result(case.id, case.group, PASSED, (), "", 0.1, ()) for case in some]
        for name, some in {"a": cases, "b": cases[:1], "c": cases[:1]}.items()
    }
    run = runner.Run("a", ("a:B",), cases, "done", results=results)
    rows = dict(zip(coverage([run]).columns[0].cells, coverage([run]).columns[2].cells, strict=True))
    assert len(cases) == 2
    assert rows["mode"] == f"not {cases[1].features['mode']}: b, c"
    assert rows["layer"] == "all"


@pytest.mark.parametrize("status", [ABSENT, EXPECTED])
def test_what_was_declared_stands_there_with_its_reason(status):
    text = shown([finished_run(status)])
    assert f"{status}: numpy, 1 case: why" in text
    assert f"conforms: 1 {status}" in text
    assert "inf" not in text


def test_a_run_that_ended_early_says_why():
    text = shown([finished_run(failure="the process ended [bold]so[/bold]")])
    assert "numpy: the process ended [bold]so[/bold]" in text
    assert "numpy DIFFERS" in text


def test_the_json_holds_every_case_and_is_plain_json(tmp_path):
    write_json(tmp_path / "results.json", [finished_run(FAILED)])
    content = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    (result,) = content["runs"]["numpy"]["subjects"]["numpy"]
    assert result["case"] == "rbn/train/x/float32"
    assert result["deviations"][0]["error"] is None
    assert result["causes"] == [CAUSE]
    assert content["runs"]["numpy"]["passed"] is False


def test_what_is_late_is_neither_right_nor_different(tmp_path):
    run = finished_run(LATE)
    text = shown([run])
    assert "numpy NO RESULT IN TIME: 1 late" in text
    assert "late: numpy: rbn/train/x/float32: why" in text
    assert "1 late" in text.partition("late: numpy")[0]  # in the matrix
    assert "DIFFERS" not in text
    assert "conforms" not in text
    run.results["numpy"] += finished_run(FAILED).results["numpy"]
    assert "numpy DIFFERS: 1 failed, 1 late" in shown([run])
    write_json(tmp_path / "results.json", [finished_run(LATE)])
    written = json.loads((tmp_path / "results.json").read_text())["runs"]["numpy"]
    assert (written["passed"], written["verdict"]) == (False, "no result in time")


def test_the_texts_of_refusals_are_shown(tmp_path):
    run = finished_run()
    (result,) = run.results["numpy"]
    run.results["numpy"] = [replace(result, message=f"ValueError: text {n}") for n in (0, 0, 1, 2, 3)]
    text = shown([run])
    assert "refused: numpy, 5 cases in 4 different texts" in text
    assert [f"ValueError: text {n}" in text for n in range(4)] == [True, True, True, False]
    assert "refused" not in shown([finished_run(ABSENT)])
    write_json(tmp_path / "results.json", [run])
    (*_, last) = json.loads((tmp_path / "results.json").read_text())["runs"]["numpy"]["subjects"]["numpy"]
    assert (last["status"], last["message"]) == (PASSED, "ValueError: text 3")


def test_a_plain_column_is_explained_where_it_is_met():
    run = finished_run()
    assert "fused=False" not in shown([run])
    run.results = {"torch.plain": run.results["numpy"]}
    assert "A .plain column is the same layers in the framework's own operations, fused=False." in shown(
        [run]
    )


def test_a_stopped_run_says_how_much_is_missing(tmp_path):
    run = finished_run()
    run.stopped, run.takes, run.total = "interrupted", ["rbn/train/x/float32", "rbn/b"], 2
    assert run.verdict == "interrupted"
    assert not run.passed
    assert "numpy INTERRUPTED: 1 passed, 1 of 2 missing, 1 s (numpy 1)" in shown([run])
    assert "numpy: interrupted: 1 of 2 cases have no result" in shown([run])
    assert "coverage" in shown([finished_run()])
    assert "coverage" not in shown([run])
    write_json(tmp_path / "results.json", [run])
    written = json.loads((tmp_path / "results.json").read_text())["runs"]["numpy"]
    assert (written["stopped"], written["missing"]) == ("interrupted", ["rbn/b"])


def test_a_run_counts_as_passed_only_when_it_is_whole():
    assert finished_run().passed
    assert not finished_run(FAILED).passed
    assert not finished_run(LATE).passed
    assert not finished_run(failure="it ended").passed


def test_progress_on_a_terminal_is_a_bar_for_every_framework():
    console = Console(width=100, file=io.StringIO(), force_terminal=True)
    half_done = finished_run()
    half_done.stage, half_done.total, half_done.seconds = "checking", 2, 7.0
    with Progress(console, progress_row) as progress:
        progress([half_done, runner.Run("torch", ("a:B",), all_cases())])
        assert "━" in console.file.getvalue()
        for text in ("checking, 1 of 2 cases, 7 s", f"waiting, 0 of {len(all_cases())} cases"):
            assert text in console.file.getvalue()


def played(name, stage, finished, total, seconds):
    """A run that began so long ago, or took so long."""
    result = Result("rbn/train/x/float32", "rbn/train/float32", PASSED, (), "", 0.1)
    started, seconds = (0.0, seconds) if stage == "done" else (time.monotonic() - seconds, 0.0)
    results = {name: [result] * finished}
    return runner.Run(name, ("a:B",), (), stage, started, seconds, results, total=total)


def test_the_time_left_follows_from_the_pace_so_far():
    waiting = runner.Run("theirs", ("a:B",), all_cases())
    assert seconds_left([waiting], 2) is None
    assert seconds_left([played("theirs", "importing", 0, 0, 1.0)], 2) is None
    assert seconds_left([played("other", "checking", 4, 100, 20.0)], 2) is None
    assert seconds_left([played("other", "checking", 5, 100, 20.0)], 2) == pytest.approx(380, rel=0.01)
    done, half = played("mine", "done", 100, 100, 10.0), played("other", "checking", 50, 100, 20.0)
    assert seconds_left([done], 2) == 0
    assert seconds_left([done, half], 2) == pytest.approx(20, rel=0.01)
    # What waits goes on as all did: 30 s for 150 cases. Two run at a time, and none is faster than alone.
    waiting.total = 300
    assert seconds_left([done, half, waiting], 2) == pytest.approx(60, rel=0.01)
    assert seconds_left([done, half, waiting], 1) == pytest.approx(80, rel=0.01)


def test_the_time_left_of_a_known_run_follows_from_what_is_typical_of_it():
    assert TYPICAL.keys() == loading.SUBJECTS.keys()
    typical = TYPICAL["jittor"]
    waiting = runner.Run("torch", ("a:B",), all_cases(), total=CASES)
    # A quarter of the cases has taken half of the time: the first ones compile most.
    slow_start = played("jittor", "checking", CASES // 4, CASES, typical / 2)
    expected = typical / 2 + TYPICAL["torch"]
    assert seconds_left([slow_start, waiting], 1) == pytest.approx(expected, rel=0.01)
    # On a machine half as fast as the one that was measured.
    done = played("numpy", "done", CASES, CASES, 2 * TYPICAL["numpy"])
    expected = 1.5 * typical + 2 * TYPICAL["torch"]
    assert seconds_left([done, slow_start, waiting], 1) == pytest.approx(expected, rel=0.01)
    # One that has taken longer than that goes on as it has.
    late = played("jittor", "checking", CASES // 2, CASES, 2 * typical)
    assert seconds_left([late], 1) == pytest.approx(2 * typical, rel=0.01)


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, ""), (240.0, " | about 4 min left"), (62.0, " | about 62 s left")]
)
def test_the_time_left_is_shown(seconds, text):
    run = played("jittor", "checking", 1, 2, 7.0)
    for terminal in (False, True):
        console = Console(width=100, file=io.StringIO(), force_terminal=terminal)
        with Progress(console, progress_row, interval=0.0, left=lambda runs: seconds) as progress:
            progress([run])
        expected = text.removeprefix(" | ") if terminal else f"1 of 2 cases, 7 s{text}\n"
        assert expected in console.file.getvalue()
        assert ("left" in console.file.getvalue()) == (seconds is not None)


def test_progress_without_a_terminal_is_a_line_now_and_then(capsys):
    progress = Progress(Console(width=120), progress_row, interval=0.0)
    waiting = runner.Run("jittor", ("a:B",), all_cases(), "importing")
    with progress:
        progress([waiting, runner.Run("torch", ("a:B",), all_cases())])
    assert capsys.readouterr().out == (
        "jittor: importing (on first use Jittor compiles itself, about 3 minutes), 0 of "
        f"{waiting.total} cases, 0 s\n"
    )
