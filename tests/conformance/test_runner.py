"""The runner outlives every subject: what dies, hangs, prints or cannot be imported is a clear row."""

import time
from pathlib import Path

import pytest

from rbn.conformance import loading, runner
from rbn.conformance.cases import parse
from rbn.conformance.checks import FAILED, LATE, PASSED
from rbn.conformance.suite import all_cases, select

FEW = select(all_cases(), ["bn/train/offset*/float32"], ["*/channels_last"])
NUMPY = {"numpy": loading.SUBJECTS["numpy"]}


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    """Let the processes find this file's subjects."""
    monkeypatch.syspath_prepend(Path(__file__).parent)


def run(reference, cases=FEW, **options):
    (only,) = runner.run({"it": (f"misbehaving:{reference}",)}, cases, lambda runs: None, **options)
    return only


@pytest.mark.parametrize(
    ("reference", "how"),
    [
        ("Dies", "ended the process with signal SIGSEGV"),
        ("Exits", "ended the process with exit code 3"),
        ("Hangs", "gave no result within 5 s and was stopped"),
    ],
)
def test_a_case_that_ends_its_process_fails_and_the_next_one_runs(reference, how):
    started = time.monotonic()
    found = run(reference, time_limit=5)
    results = found.results["misbehaves"]
    assert [result.case for result in results] == [case.id for case in FEW]
    assert {result.case for result in results if result.status == FAILED} == {"bn/train/offset0/8x3/float32"}
    (failed,) = [result for result in results if result.status == FAILED]
    assert failed.message.startswith(how)
    assert "a line of its own" in failed.message
    assert (found.stage, found.failure, found.passed) == ("done", "", False)
    assert time.monotonic() - started < 60


def test_a_subject_that_always_dies_is_given_up_and_stops_no_other(monkeypatch):
    monkeypatch.setattr(runner, "DEATHS", 2)
    dead, alive = runner.run({"dead": ("misbehaving:AlwaysDies",), **NUMPY}, FEW, lambda runs: None)
    assert dead.failure == "given up after 2 cases that ended its process"
    assert [result.status for result in dead.results["misbehaves"]] == [FAILED] * 2
    assert alive.passed


SPOILT = select(all_cases(), ["bn/train/offset0/8x3/float32", "bn/train/*/spoilt=running_mean:*"])


def test_spoilt_states_that_end_the_process_are_given_up_and_nothing_else_is(monkeypatch):
    monkeypatch.setattr(runner, "DEATHS", 2)
    found = run("DiesWhenSpoilt", SPOILT)
    right, *dead, rest = found.results["misbehaves"]
    assert (right.case, right.status) == ("bn/train/offset0/8x3/float32", PASSED)
    assert [result.status for result in dead] == [FAILED] * 2
    assert all(result.message.startswith("ended the process with signal SIGSEGV") for result in dead)
    left = len(SPOILT) - 4 - 1  # NumPy's arrays cannot be elsewhere
    assert (rest.status, rest.message) == (
        FAILED,
        f"not run, and {left} more, after 2 that ended the process",
    )
    assert (found.failure, found.stage, found.passed) == ("", "done", False)


def test_a_death_after_a_spoilt_state_names_that_too():
    _, blamed, dead, *_ = run("Ruined", SPOILT[:3]).results["misbehaves"]
    assert (blamed.status, dead.status) == (PASSED, FAILED)
    assert dead.case == SPOILT[2].id
    assert f"signal SIGABRT, perhaps for what {SPOILT[1].id} did before" in dead.message


def test_a_process_that_dies_after_its_last_case_has_not_passed():
    found = run("DiesAtItsEnd", SPOILT)
    assert {result.status for result in found.results["misbehaves"]} == {PASSED}
    assert found.failure.startswith("ended the process with signal SIGABRT after its last case")
    assert found.verdict == "differs"


def test_what_is_late_is_tried_again():
    found = run("LateOnce")
    assert {result.status for result in found.results["misbehaves"]} == {PASSED}
    assert (found.verdict, found.passed) == ("conforms", True)


def test_what_stays_late_is_neither_right_nor_wrong():
    found = run("AlwaysLate")
    (late,) = [result for result in found.results["misbehaves"] if result.status != PASSED]
    assert (late.status, late.message) == (LATE, "no result in time: device 1 of 2")
    assert (found.verdict, found.passed) == ("no result in time", False)


def test_several_devices_that_are_stopped_are_late():
    case = parse("bn/train/offset0/8x3/float32/shares=4+4")
    (late,) = run("Hangs", [case], time_limit=2).results["misbehaves"]
    assert late.status == LATE
    assert "gave no result within 2 s" in late.message


def test_every_subject_has_a_process_of_its_own_and_only_its_layers():
    (numpy,) = runner.run(NUMPY, FEW, lambda runs: None)
    assert numpy.passed, numpy.failure
    assert numpy.finished == numpy.total == len(FEW)
    assert numpy.versions["numpy"]
    found = run("Misbehaves", select(all_cases(), ["*/train/digits/*/float64"]))
    assert found.finished == found.total == 1
    assert [result.status for result in found.results["misbehaves"]] == [PASSED]


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("rbn.conformance.no_such_module:Subject", "there is no module rbn.conformance.no_such_module"),
        ("rbn.conformance.runner:nobody", "has no nobody"),
        (
            "builtins:dict",
            "expected a rbn.conformance.Subject, or a class or function that makes one, got {}",
        ),
        ("os:abort", "ended the process with signal SIGABRT before its first case"),
    ],
)
def test_a_subject_that_cannot_be_loaded_is_a_failed_run(reference, message):
    (broken,) = runner.run({"it": (reference,)}, FEW, lambda runs: None)
    assert message in broken.failure
    assert (broken.stage, broken.passed) == ("done", False)


def test_an_entry_point_names_a_subject(monkeypatch):
    from importlib.metadata import EntryPoint

    point = EntryPoint("theirs", "their.module:Subject", loading.ENTRY_POINTS)
    monkeypatch.setattr(loading, "entry_points", lambda group: [point] if group == "rbn.conformance" else [])
    assert loading.registered() == {"theirs": ("their.module:Subject",)}
