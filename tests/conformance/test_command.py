"""`rbn conform` from outside: a layer of somebody else's, every report, and what is asked for wrongly."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest

HERE = Path(__file__).parent
PATTERN = "bn/train/offset0/8x3/float??"
CAUSE = "behaves like: X is normalized with the unbiased variance."

LAYER = """
import time

from rbn.conformance.subjects.numpy import NumpyLayer
from rbn.conformance.wrong_layers import UnbiasedNormalization
from rbn_core.reference import Layer


class Right(NumpyLayer):
    layers = ("bn",)

    def __init__(self):
        super().__init__("right", Layer)


class Slow(Right):
    def run(self, x, training, cotangent):
        time.sleep(0.3)
        return super().run(x, training, cotangent)


class Says(Right):
    def run(self, x, training, cotangent):
        raise RuntimeError("half a \\udcff, a bell \\x07, red \\x1b[31m")


class Named(Right):
    absent = {"bn/*/float64": "takes \\udcff only"}

    def __init__(self):
        super().__init__()
        self.name = "half \\udcff"

    def run(self, x, training, cotangent):
        assert x.dtype != "float64"
        return super().run(x, training, cotangent)


class Wrong(NumpyLayer):
    layers = ("bn",)

    def __init__(self):
        super().__init__("wrong", UnbiasedNormalization)
"""


@pytest.fixture
def folder(tmp_path):
    """A folder with somebody else's layers."""
    (tmp_path / "theirs.py").write_text(LAYER)
    return tmp_path


def called(folder, *arguments):
    """How to call the command where the folder's modules are found."""
    places = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(places)}
    command = [Path(sys.executable).with_name("rbn"), "conform", *arguments]
    return {"args": command, "text": True, "cwd": folder, "env": environment}


def rbn(folder, *arguments):
    return subprocess.run(**called(folder, *arguments), capture_output=True)


def test_a_wrong_layer_is_told_its_cause_in_every_report(folder):
    reports = ("--html", "page", "--json", "results.json", "--junit", "results.xml")
    done = rbn(folder, "--subject", "theirs:Wrong", "--only", PATTERN, *reports)
    assert done.returncode == 1, done.stderr
    assert f"{CAUSE} (2 failed cases)" in done.stdout
    assert "This predicts all 2 failures, number by number" in done.stdout
    assert "theirs:Wrong DIFFERS: 2 failed" in done.stdout
    (wrong,) = json.loads((folder / "results.json").read_text())["runs"]["theirs:Wrong"]["subjects"].values()
    assert {(result["status"], *result["causes"]) for result in wrong} == {("failed", CAUSE)}
    told = json.loads((folder / "results.json").read_text())["runs"]["theirs:Wrong"]["diagnoses"]["wrong"]
    assert [cause["mistake"] for cause in told["causes"]] == [CAUSE]
    suites = ElementTree.parse(folder / "results.xml").getroot()
    assert suites.attrib["failures"] == "2"
    assert all(CAUSE in failure.text for failure in suites.iter("failure"))
    assert all(f"{CAUSE} (2 failed cases)" in out.text for out in suites.iter("system-out"))
    assert len([*suites.iter("system-out")]) == 1
    page = (folder / "page" / "index.html").read_text()
    assert page.count(f"<li>{CAUSE}</li>") == 2
    (again,) = set(
        re.findall(r'data-command="(rbn conform --subject theirs:Wrong --only [^"]*float32)"', page)
    )
    done = rbn(folder, *again.split()[2:])
    assert (done.returncode, done.stdout.count(CAUSE)) == (1, 1)


def test_seeds_and_patterns_choose_what_runs(folder):
    chosen = ("--subject", "theirs:Right", "--only", PATTERN, "--exclude", "*/float64", "--seeds", "3")
    done = rbn(folder, *chosen)
    assert done.returncode == 0, done.stderr
    assert "theirs:Right conforms: 3 passed" in done.stdout
    listed = rbn(folder, *chosen, "--list").stdout.split()
    assert listed == [f"bn/train/offset0/8x3/float32{seed}" for seed in ("", "/seed=1", "/seed=2")]


@pytest.mark.parametrize("option", ["--only", "--exclude"])
def test_a_pattern_that_matches_nothing_is_an_error(folder, option):
    done = rbn(folder, "--subject", "theirs:Right", option, "bn/trian/*")
    assert done.returncode == 2
    assert "'bn/trian/*'" in done.stderr
    assert done.stdout == ""


def test_an_installed_package_names_a_subject_of_its_own(folder):
    information = folder / "theirs-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text("[rbn.conformance]\ntheir-norm = theirs:Right\n")
    done = rbn(folder, "their-norm", "--only", PATTERN)
    assert done.returncode == 0, done.stderr
    assert "their-norm conforms: 2 passed" in done.stdout
    done = rbn(folder, "their-nrom", "--only", PATTERN)
    assert done.returncode == 2
    assert "their-norm" in done.stderr


def test_what_a_subject_prints_is_not_in_the_report(folder):
    (folder / "misbehaving.py").write_text((HERE / "misbehaving.py").read_text())
    done = rbn(folder, "--subject", "misbehaving:Misbehaves", "--only", "bn/train/offset10/3x1x2x3/float32")
    assert done.returncode == 0, done.stderr
    assert "misbehaving:Misbehaves conforms: 1 passed" in done.stdout
    assert "a line of its own" not in done.stdout + done.stderr


REPORTS = ("--json", "made/r.json", "--junit", "made/r.xml", "--html", "made", "--badge", "made/r.svg")
SLOW = ("--subject", "theirs:Slow", "--only", "bn/train/*/float??")


def started(folder, *arguments):
    """A run of a slow layer, once its first results are on the disk; and its journal."""
    process = subprocess.Popen(**called(folder, *SLOW, *arguments), stdout=subprocess.PIPE)
    journal = folder / "made" / "r.json.partial"
    deadline = time.monotonic() + 60
    while not journal.exists() or journal.read_text().count('"subject": "right"') < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process, journal


def theirs(folder):
    """What the JSON file says of the slow layer."""
    run = json.loads((folder / "made" / "r.json").read_text())["runs"]["theirs:Slow"]
    (results,) = run["subjects"].values()
    return run, [result["case"] for result in results]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_reports_what_is_done_and_what_is_missing(folder, number):
    process, journal = started(folder, *REPORTS)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    run, done = theirs(folder)
    assert run["stopped"] == run["verdict"] == "interrupted"
    assert len(done) >= 2
    assert {*done}.isdisjoint(run["missing"])
    due = f"{len(run['missing'])} of {len(done) + len(run['missing'])}"
    assert f"theirs:Slow: interrupted: {due} cases have no result" in output
    assert f"interrupted: {due} cases have no result" in (folder / "made" / "index.html").read_text()
    assert "interrupted" in (folder / "made" / "r.svg").read_text()
    (error,) = [e for e in ElementTree.parse(folder / "made" / "r.xml").iter("error") if due in e.text]
    assert error.text.splitlines()[2:] == run["missing"]
    assert not journal.exists()


def test_a_killed_run_leaves_its_results_for_the_reports(folder):
    process, journal = started(folder, *REPORTS)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert [path.name for path in journal.parent.iterdir()] == [journal.name]
    done = rbn(folder, "--from", str(journal.relative_to(folder)), *REPORTS)
    assert done.returncode == 1, done.stderr
    run, cases = theirs(folder)
    assert len(cases) >= 2
    assert run["verdict"] == "interrupted"
    assert "theirs:Slow INTERRUPTED: " in done.stdout
    assert len(list(journal.parent.iterdir())) == 5


def test_the_first_failure_stops_a_run_that_is_to_fail_fast(folder):
    done = rbn(folder, *SLOW, "--subject", "theirs:Wrong", "--fail-fast")
    assert done.returncode == 1
    # More than one may have failed by the time that the first is heard of.
    assert re.search(r"theirs:Wrong DIFFERS: .*[1-9] failed, [1-9]\d* of 40 missing", done.stdout)
    assert "theirs:Slow: stopped at the first failure: " in done.stdout


def test_what_no_report_can_hold_is_replaced_in_all_of_them(folder):
    done = rbn(folder, "--subject", "theirs:Says", "--only", PATTERN, *REPORTS)
    assert done.returncode == 1, done.stderr
    text = "RuntimeError: half a �, a bell �, red �[31m"
    assert text in done.stdout
    assert (
        text
        in json.loads((folder / "made" / "r.json").read_text())["runs"]["theirs:Says"]["subjects"]["right"][
            0
        ]["message"]
    )
    (failure, _) = ElementTree.parse(folder / "made" / "r.xml").iter("failure")
    assert text in failure.get("message")
    assert text in (folder / "made" / "index.html").read_text()


def test_a_name_and_a_reason_may_be_anything_too(folder):
    done = rbn(folder, "--subject", "theirs:Named", "--only", PATTERN, *REPORTS)
    assert done.returncode == 0, done.stderr
    assert "absent: half ?, 1 case: takes ? only" in done.stdout
    assert (
        "half �" in json.loads((folder / "made" / "r.json").read_text())["runs"]["theirs:Named"]["subjects"]
    )
    assert "half �" in (folder / "made" / "index.html").read_text()
    assert ElementTree.parse(folder / "made" / "r.xml").find("testsuite[@name='half �']") is not None


def test_a_list_of_failures_is_written_and_held_to(folder):
    wrong = ("--subject", "theirs:Wrong", "--only", PATTERN)
    assert rbn(folder, *wrong, "--write-expected", "known.toml").returncode == 1
    done = rbn(folder, *wrong, "--expected", "known.toml")
    assert done.returncode == 0, done.stdout
    assert "theirs:Wrong conforms: 2 expected" in done.stdout


def test_a_subject_that_cannot_be_loaded_stops_all_before_any_case_runs(folder):
    (folder / "theirs.py").write_text(LAYER + "\n\ndef subject():\n    return Wrong().no_such_attribute\n")
    done = rbn(folder, "--subject", "theirs:Right", "--subject", "theirs:subject", *REPORTS)
    assert (done.returncode, done.stdout) == (2, "")
    line = LAYER.count("\n") + 4
    assert done.stderr == (
        f"rbn: theirs:subject: theirs.py, line {line}, in subject: "
        "AttributeError: 'Wrong' object has no attribute 'no_such_attribute'\n"
    )
    assert list((folder / "made").iterdir()) == []
