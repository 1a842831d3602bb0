"""What a killed run has found is on the disk, as it was found."""

import json
import math

import pytest

from rbn.conformance.checks import FAILED, PASSED, Result
from rbn.conformance.comparison import Deviation
from rbn.conformance.diagnosis import Cause, Diagnosis
from rbn.conformance.journal import Journal, read_journal
from rbn.conformance.runner import Run
from rbn.conformance.suite import all_cases, select
from rbn_core import RBNValueError

CASES = select(all_cases(), ["bn/train/offset0/8x3/*", "bn/train/offset0/3x4x2x3/momentum=None/float32"])


def result(place, status=PASSED):
    deviation = Deviation("y", math.inf if status == FAILED else 1e-7, 1e-6, "shape \udcff")
    return Result(
        CASES[place].id, CASES[place].group, status, (deviation,), "said", 0.5, ("behaves like: it.",)
    )


@pytest.fixture
def journal(tmp_path):
    targets = {"numpy": ("m:N",), "m:A": ("m:A",), "m:B": ("m:B",)}
    journal = Journal(tmp_path / "made" / "r.json.partial", "rbn conform", targets, CASES)
    yield journal
    journal.file.close()


def test_the_runs_are_read_as_they_were(journal):
    done = Run("numpy", ("m:N",), CASES, takes=[CASES[0].id], total=1, versions={"numpy": "1"})
    done.results = {"n": [result(0)]}
    done.seconds, done.failure = 2.5, "it ended"
    journal.record(done, "n", result(0))
    journal.record(done, "", None)
    killed = Run("m:A", ("m:A",), CASES, file="m.py")
    for each in (result(0), result(1), result(1, FAILED)):  # the second ended its process after its result
        journal.record(killed, "a", each)
    command, (first, second, third) = read_journal(journal.path)
    assert command == "rbn conform"
    assert (first.results, first.versions, first.seconds) == (done.results, {"numpy": "1"}, 2.5)
    assert (first.failure, first.stopped, first.missing, first.stage) == ("it ended", "", [], "done")
    assert second.results == {"a": [result(0), result(1, FAILED)]}
    assert (second.stopped, second.file, second.passed) == ("interrupted", "m.py", False)
    assert second.missing == [case.id for case in CASES[2:]]
    assert second.early_end == f"interrupted: {len(CASES) - 2} of {len(CASES)} cases have no result"
    assert third.missing == [case.id for case in CASES]
    assert third.verdict == "interrupted"


def test_what_is_wrong_with_a_subject_is_read_as_it_was_said(journal):
    cause = Cause("behaves like: it.", (CASES[0].id,))
    run = Run("m:A", ("m:A",), CASES, results={"a": [result(0, FAILED)]})
    run.diagnoses = {"a": Diagnosis((cause,), ("y is wrong.",), "This predicts it.")}
    journal.record(run, "a", result(0, FAILED))
    journal.record(run, "", None)
    _, (_, read, _) = read_journal(journal.path)
    assert read.diagnoses == run.diagnoses
    assert read.results["a"] == [result(0, FAILED)]


def test_half_a_last_line_is_left_out(journal):
    journal.record(Run("m:A", ("m:A",), CASES), "a", result(0))
    with journal.path.open("a") as file:
        file.write('{"run": "m:A", "subj')
    _, (_, run, _) = read_journal(journal.path)
    assert run.results == {"a": [result(0)]}


def test_a_journal_whose_reports_are_written_goes(journal):
    journal.remove()
    assert not journal.path.exists()


@pytest.mark.parametrize("text", [None, "", "{}", "[1]\n", json.dumps({"runs": {}}), "\x80 no json"])
def test_another_file_is_refused(tmp_path, text):
    path = tmp_path / "r.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(RBNValueError, match=r"r\.json: expected the \.partial file of a run that was killed"):
        read_journal(path)
