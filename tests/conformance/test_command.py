"""`rbn conform` from outside: a layer of somebody else's, every report, and what is asked for wrongly."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

HERE = Path(__file__).parent
PATTERN = "bn/train/offset0/8x3/float??"
CAUSE = "behaves like: X is normalized with the unbiased variance."

LAYER = """
from rbn.conformance.subjects.numpy import NumpyLayer
from rbn.conformance.wrong_layers import UnbiasedNormalization
from rbn_core.reference import Layer


class Right(NumpyLayer):
    layers = ("bn",)

    def __init__(self):
        super().__init__("right", Layer)


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


def rbn(folder, *arguments):
    command = [Path(sys.executable).with_name("rbn"), "conform", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=folder, env=os.environ | {"PYTHONPATH": str(folder)}
    )


def test_a_wrong_layer_is_told_its_cause_in_every_report(folder):
    reports = ("--html", "page", "--json", "results.json", "--junit", "results.xml")
    done = rbn(folder, "--subject", "theirs:Wrong", "--only", PATTERN, *reports)
    assert done.returncode == 1, done.stderr
    assert f"2 of them: {CAUSE}" in done.stdout
    assert "theirs:Wrong DIFFERS: 2 failed" in done.stdout
    (wrong,) = json.loads((folder / "results.json").read_text())["runs"]["theirs:Wrong"]["subjects"].values()
    assert {(result["status"], *result["causes"]) for result in wrong} == {("failed", CAUSE)}
    suites = ElementTree.parse(folder / "results.xml").getroot()
    assert suites.attrib["failures"] == "2"
    assert all(CAUSE in failure.text for failure in suites.iter("failure"))
    page = (folder / "page" / "index.html").read_text()
    assert page.count(f"<li>{CAUSE}</li>") == 2
    (again,) = set(
        re.findall(r'data-command="(rbn conform --subject theirs:Wrong --only [^"]*float32)"', page)
    )
    done = rbn(folder, *again.split()[2:])
    assert (done.returncode, done.stdout.count(CAUSE)) == (1, 2)


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
