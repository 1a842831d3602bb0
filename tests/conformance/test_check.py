"""The suite itself: what is right passes, what is wrong is named, and no subject stops the rest."""

import collections
import io
import json
from typing import ClassVar

import numpy as np
import pytest
from rich.console import Console

from rbn.conformance import runner
from rbn.conformance.cases import DTYPES, MODES, OFFSETS, SHAPES, Case, all_cases, quick_cases
from rbn.conformance.check import ABSENT, FAILED, PASSED, Deviation, Result, check, compare
from rbn.conformance.mutants import MUTANTS, subject_of
from rbn.conformance.report import Progress, render, write_json
from rbn.conformance.subjects.numpy import Numpy
from rbn_core.reference import Layer

SOME = tuple(
    case
    for case in all_cases()
    if case.data == "digits" and case.dtype in DTYPES and case.config.layer == "RBN"
)


def failed(subject, cases=None):
    return [result for result in check(subject, cases) if result.status == FAILED]


def test_the_reference_passes_every_case():
    assert failed(subject_of(Layer)) == []


def test_the_two_pass_form_passes_every_case():
    assert failed(Numpy()) == []


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_every_mutant_is_rejected(mutant, record_property):
    caught = failed(subject_of(mutant))
    assert caught, f"nothing catches: {mutant.__doc__}"
    record_property("caught by", caught[0].case)
    print(f"{mutant.__name__}: {len(caught)} cases, first {caught[0].case}: {caught[0].message}")
    broken = [result.case for result in caught if result.worst.quantity == "raised"]
    assert all("/0x" in case for case in broken), "a mutant is wrong, not broken, but for an empty batch"


def test_there_are_at_least_ten_mutants_and_each_says_its_mistake():
    assert len(MUTANTS) >= 10
    assert all(mutant.__doc__ and mutant.__doc__ != Layer.__doc__ for mutant in MUTANTS)


def test_case_ids_are_unique_and_name_what_they_are():
    counts = collections.Counter(case.id for case in all_cases())
    assert [name for name, count in counts.items() if count > 1] == []


def test_a_quick_run_has_one_case_for_every_row():
    assert [case.group for case in quick_cases()] == list(dict.fromkeys(case.group for case in all_cases()))


def test_every_mode_dtype_offset_and_shape_has_a_case():
    data = {(case.training, case.dtype, case.data, case.shape) for case in all_cases()}
    for mode in MODES:
        for dtype in DTYPES:
            for offset in OFFSETS:
                assert {(mode == "train", dtype, f"offset{offset}", shape) for shape in SHAPES} <= data
            for real in ("photographs", "digits"):
                assert any(entry[:3] == (mode == "train", dtype, real) for entry in data)


@pytest.mark.parametrize("case", quick_cases(), ids=lambda case: case.id)
def test_a_case_is_the_same_wherever_it_runs(case: Case):
    for (x, cotangent), (again, cotangent_again) in zip(case.inputs(), case.inputs(), strict=True):
        np.testing.assert_array_equal(x, again)
        np.testing.assert_array_equal(cotangent, cotangent_again)
        assert x.shape == cotangent.shape == case.shape
        assert x.dtype == cotangent.dtype == case.dtype
    for name, value in case.state().items():
        np.testing.assert_array_equal(value, case.state()[name])


class Raises(Numpy):
    name = "raises"

    def run(self, x, training, cotangent):
        raise RuntimeError("out of order")


class WrongShape(Layer):
    """dx is one image short."""

    def backward(self, dy):
        dx, gradients = super().backward(dy)
        return dx[1:], gradients


class SwallowsNaN(Layer):
    """y is NaN."""

    def forward(self, x, training):
        return np.full_like(super().forward(x, training), np.nan)


class ForgetsAGradient(Layer):
    """The gradient of beta is not there."""

    def backward(self, dy):
        dx, gradients = super().backward(dy)
        return dx, {name: value for name, value in gradients.items() if name != "beta"}


@pytest.mark.parametrize(
    ("subject", "quantity", "message"),
    [
        (Raises(), "raised", "RuntimeError: out of order"),
        (subject_of(WrongShape), "dx", "shape (15, 6, 6, 6) where (16, 6, 6, 6) is due"),
        (subject_of(SwallowsNaN), "y", "nan where"),
        (
            subject_of(ForgetsAGradient),
            "gradients",
            "['center_weight', 'gamma', 'scale_bias', 'scale_weight'] where",
        ),
    ],
    ids=["raises", "wrong shape", "NaN", "a gradient missing"],
)
def test_a_broken_subject_gets_a_clear_row_for_every_case(subject, quantity, message):
    results = list(check(subject, SOME))
    assert [result.case for result in results] == [case.id for case in SOME]
    assert {result.status for result in results} == {FAILED}
    assert {result.worst.quantity for result in results} == {quantity}
    assert all(message in result.message for result in results)


@pytest.mark.parametrize(("error", "tolerance"), [(1.0, np.nan), (np.inf, np.inf), (np.nan, 1.0)])
def test_what_cannot_be_compared_is_never_right(error, tolerance):
    assert Deviation("y", error, tolerance).ratio == np.inf


def test_a_wrong_dtype_is_a_deviation():
    assert compare("y", np.zeros(2, np.float64), np.zeros(2), 1.0, dtype="float32").ratio == np.inf


class Declares(Raises):
    absent: ClassVar = {"rbn/*/digits/*": "this machine has no fingers"}


def test_a_declared_absence_is_absent_with_its_reason():
    results = list(check(Declares(), SOME))
    assert {(result.status, result.message) for result in results} == {
        (ABSENT, "this machine has no fingers")
    }


def test_a_declared_absence_that_passes_fails():
    class Wrong(Numpy):
        absent = Declares.absent

    results = list(check(Wrong(), SOME))
    assert {result.status for result in results} == {FAILED}
    assert "but it passes" in results[0].message


def test_a_declaration_that_matches_nothing_fails():
    class Stale(Numpy):
        absent = Numpy.absent | {"rbn/no/such/case": "it was removed"}

    (result,) = failed(Stale(), SOME)
    assert "no case matches 'rbn/no/such/case'" in result.message


def finished_run(status=PASSED, failure=""):
    worst = Deviation("y", 1.0, 2.0) if status == PASSED else Deviation("y", np.inf, 2.0, "at [0]")
    result = Result("rbn/train/x/float32", "rbn/train/float32", status, worst, "why", 0.1)
    return runner.Run("numpy", (), "done", 0.0, 1.0, {"numpy": [result]}, {"numpy": "1"}, failure)


def shown(runs):
    console = Console(width=120, file=io.StringIO())
    console.print(render(runs))
    return console.file.getvalue()


def test_the_matrix_shows_the_worst_ratio_and_what_failed():
    assert "0.50" in shown([finished_run()])
    assert "conforms: 1 passed" in shown([finished_run()])
    text = shown([finished_run(FAILED)])
    assert "1 failed: inf" in text
    assert "rbn/train/x/float32: inf times the tolerance: why" in text
    assert "DIFFERS" in text


def test_the_json_holds_every_case_and_is_plain_json(tmp_path):
    write_json(tmp_path / "results.json", [finished_run(FAILED)])
    content = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    (result,) = content["frameworks"]["numpy"]["subjects"]["numpy"]
    assert result["case"] == "rbn/train/x/float32"
    assert result["worst"]["error"] is None
    assert content["frameworks"]["numpy"]["passed"] is False


def test_a_run_counts_as_passed_only_when_it_is_whole():
    assert finished_run().passed
    assert not finished_run(FAILED).passed
    assert not finished_run(failure="the process ended with exit code -11").passed


def test_the_runner_runs_a_framework_in_a_process_of_its_own():
    (numpy,) = runner.run(["numpy"], Progress(Console(quiet=True)))
    assert numpy.passed, numpy.failure
    assert numpy.finished == numpy.total == len(all_cases())


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("rbn.conformance.no_such_module:Subject", "No module named 'rbn.conformance.no_such_module'"),
        ("os:abort", "the process ended with exit code -6"),
    ],
)
def test_a_process_that_cannot_import_or_dies_is_a_failed_run(monkeypatch, reference, message):
    monkeypatch.setitem(runner.SUBJECTS, "numpy", (reference,))
    (broken,) = runner.run(["numpy"], lambda runs: None)
    assert message in broken.failure
    assert not broken.passed
    assert message in shown([broken])


def test_progress_without_a_terminal_is_a_line_now_and_then(capsys):
    progress = Progress(Console(width=120), interval=0.0)
    waiting = runner.Run("jittor", all_cases(), "importing")
    with progress:
        progress([waiting, runner.Run("torch", all_cases())])
    assert capsys.readouterr().out == (
        "jittor: importing (on first use Jittor compiles itself, about 3 minutes), 0 of "
        f"{waiting.total} cases, 0 s\n"
    )
