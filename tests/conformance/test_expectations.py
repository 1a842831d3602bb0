"""A pinned list of failures: what a run wrote makes the next one conform, and is held to."""

import pytest

from rbn.conformance import runner
from rbn.conformance.checks import ABSENT, EXPECTED, FAILED, PASSED, Result
from rbn.conformance.comparison import Deviation
from rbn.conformance.expectations import Expectations, read_expectations, write_expectations
from rbn.conformance.runner import Run
from rbn.conformance.suite import all_cases, select
from rbn_core import RBNValueError

CASES = select(all_cases(), ["bn/train/offset0/8x3/float??", "bn/train/offset0/1x3/float32"])
LAYERS = """
from rbn.conformance.subjects.numpy import NumpyLayer
from rbn.conformance.wrong_layers import UnbiasedNormalization
from rbn_core.reference import Layer


class Wrong(NumpyLayer):
    layers = ("bn",)

    def __init__(self):
        super().__init__("wrong", UnbiasedNormalization)

    def run(self, x, training, cotangent):
        if x.dtype == "float64":
            raise RuntimeError("no \\"float64\\" \\udcff")
        return super().run(x, training, cotangent)


class Right(NumpyLayer):
    layers = ("bn",)

    def __init__(self):
        super().__init__("right", Layer)
"""


@pytest.fixture
def check(tmp_path, monkeypatch):
    (tmp_path / "pinned.py").write_text(LAYERS)
    monkeypatch.syspath_prepend(tmp_path)

    def run(reference, known):
        (found,) = runner.run({"theirs": (reference,)}, CASES, lambda runs: None, expectations=known)
        return found

    return run


def test_what_one_run_writes_the_next_one_expects(check, tmp_path):
    path = tmp_path / "made" / "expected.toml"
    first = check("pinned:Wrong", {})
    assert not first.passed
    assert write_expectations(path, [first], {}) == []
    known = read_expectations(path)
    assert known["theirs"].expected.keys() == {CASES[0].id}
    assert (
        "behaves like: X is normalized with the unbiased variance." in known["theirs"].expected[CASES[0].id]
    )
    assert known["theirs"].absent == {CASES[1].id: 'RuntimeError: no "float64" �'}
    second = check("pinned:Wrong", known)
    (results,) = second.results.values()
    assert [result.status for result in results] == [EXPECTED, ABSENT, PASSED]
    assert second.passed
    text = path.read_text()
    assert write_expectations(path, [second], known) == []
    assert path.read_text() == text


def test_what_is_expected_and_passes_fails_the_run_and_is_dropped(check, tmp_path):
    known = {
        "theirs": Expectations({CASES[0].id: "known", "bn/never/*": "no such case"}, {}),
        "other": Expectations({"bn/*": "x"}),
    }
    run = check("pinned:Right", known)
    (results,) = run.results.values()
    assert [result.status for result in results] == [FAILED, PASSED, PASSED, FAILED]
    assert results[0].message == "declared (known), but it passes. Drop the declaration."
    assert write_expectations(tmp_path / "expected.toml", [run], known) == []
    assert read_expectations(tmp_path / "expected.toml") == {"other": Expectations({"bn/*": "x"})}


def result(case, status, quantity="y", message="wrong"):
    deviations = () if quantity is None else (Deviation(quantity, 0.0 if status == PASSED else 1.0),)
    return Result(case, "g", status, deviations, message)


def test_a_pattern_stays_while_all_of_its_cases_fail(tmp_path):
    known = {"a": Expectations({"bn/x/*": "known", "bn/y/*": "known, too", "bn/z/*": "did not run"})}
    results = [
        result("bn/x/1", EXPECTED),
        result("bn/x/2", EXPECTED),
        result("bn/y/1", EXPECTED),
        result("bn/y/2", FAILED, None, "declared (known, too), but it passes. Drop the declaration."),
        result("bn/new", FAILED),
    ]
    run = Run("a", ("m:A",), (), "done", results={"a": results})
    assert write_expectations(tmp_path / "expected.toml", [run], known) == []
    assert read_expectations(tmp_path / "expected.toml")["a"].expected == {
        "bn/x/*": "known",
        "bn/y/1": "known, too",
        "bn/z/*": "did not run",
        "bn/new": "wrong",
    }


def test_what_cannot_be_expected_is_said(tmp_path):
    results = [
        result("bn/1", FAILED, "process", "ended the process with signal SIGSEGV\nlog"),
        result("bn/2", FAILED, None, "declared (in the subject), but it passes. Drop the declaration."),
    ]
    run = Run("a", ("m:A",), (), "done", results={"a": results}, failure="it broke\nlog")
    assert write_expectations(tmp_path / "expected.toml", [run], {}) == [
        "a: it broke",
        "a: bn/1: ended the process with signal SIGSEGV",
        "a: bn/2: declared (in the subject), but it passes. Drop the declaration.",
    ]
    assert read_expectations(tmp_path / "expected.toml") == {}


@pytest.mark.parametrize(
    "text",
    [None, "no toml", "a = 1\n", '[a.b]\n"x" = "y"\n', '[a.expected]\n"x" = 1\n', '[a.absent]\n"x" = ""\n'],
)
def test_another_file_is_refused(tmp_path, text):
    path = tmp_path / "expected.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(RBNValueError, match=r"expected\.toml: "):
        read_expectations(path)
