"""The JUnit file says what the runs found, whatever is in their messages."""

import sys
from xml.etree import ElementTree

import pytest

from rbn.conformance.checks import Result
from rbn.conformance.comparison import Deviation
from rbn.conformance.junit import write_junit
from rbn.conformance.runner import Run

RUNS = [
    Run(
        "torch",
        ("m:A", "m:B"),
        (),
        "done",
        results={
            "A": [
                Result("rbn/a", "g", "passed", seconds=0.25),
                Result(
                    "rbn/b",
                    "g",
                    "failed",
                    (Deviation("y", float("inf"), 0.0),),
                    "y is <wrong> & \x1b[31mred\x00 \udcff\nline 2",
                    0.5,
                    ("behaves like: a < b",),
                ),
                Result("rbn/c", "g", "absent", message="has no <option>"),
            ],
            "B": [
                Result("rbn/d", "g", "expected", message="known \x08 since 1.0"),
                Result("rbn/e", "g", "failed"),
            ],
        },
        versions={"torch": "2.13"},
        failure="given up\nafter 3",
    ),
    Run("jittor", ("m:J",), (), "done", failure="ended \x00 before its first case"),
]


@pytest.fixture
def root(tmp_path):
    file = tmp_path / "made" / "junit.xml"
    write_junit(file, RUNS)
    assert [other.name for other in file.parent.iterdir()] == ["junit.xml"]
    return ElementTree.parse(file).getroot()


def counts(element):
    return [int(element.get(name)) for name in ("tests", "failures", "errors", "skipped")]


def test_the_counts_of_every_suite_and_of_all(root):
    suites = {suite.get("name"): counts(suite) for suite in root}
    assert suites == {"A": [3, 1, 0, 1], "B": [3, 1, 1, 1], "jittor": [1, 0, 1, 0]}
    assert counts(root) == [7, 2, 2, 2]
    assert root.get("time") == root.find("testsuite[@name='A']").get("time") == "0.750"


def test_a_case_has_its_subject_id_and_time(root):
    case = root.find(".//testcase[@name='rbn/a']")
    assert dict(case.attrib) == {"classname": "A", "name": "rbn/a", "time": "0.250"}
    assert list(case) == []


def test_a_failure_has_its_message_and_causes_without_what_xml_cannot_hold(root):
    failure = root.find(".//testcase[@name='rbn/b']/failure")
    assert failure.get("message") == "y is <wrong> & �[31mred� �"
    assert failure.get("type") == "y"
    assert failure.text == failure.get("message") + "\nline 2\nbehaves like: a < b"
    assert root.find(".//testcase[@name='rbn/e']/failure").get("type") == "no result"


def test_absent_and_expected_are_skipped_with_their_reasons(root):
    reasons = [skipped.get("message") for skipped in root.iter("skipped")]
    assert reasons == ["absent: has no <option>", "expected: known � since 1.0"]


def test_a_run_that_ended_early_is_an_error_of_its_last_subject(root):
    torch, jittor = root.iter("error")
    assert (torch.get("message"), torch.text) == ("given up", "given up\nafter 3")
    assert jittor.text == "ended � before its first case"


def test_what_is_late_is_an_error_and_a_refusal_is_the_output(tmp_path):
    results = [
        Result("rbn/f", "g", "late", message="no result in time: device 1"),
        Result("rbn/g", "g", "passed", message="ValueError: RBN: expected \x1b more"),
    ]
    file = tmp_path / "junit.xml"
    write_junit(file, [Run("torch", ("m:A",), (), "done", results={"A": results})])
    (suite,) = ElementTree.parse(file).getroot()
    assert counts(suite) == [2, 0, 1, 0]
    late, refused = suite.iter("testcase")
    assert late.find("error").attrib == {"type": "late", "message": "no result in time: device 1"}
    assert refused.find("system-out").text == "ValueError: RBN: expected \N{REPLACEMENT CHARACTER} more"


def test_versions_are_properties(root):
    assert root.find("testsuite[@name='A']/properties/property").attrib == {"name": "torch", "value": "2.13"}


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    file = tmp_path / "junit.xml"
    file.write_text("old")
    monkeypatch.setattr(sys.modules[write_junit.__module__].os, "replace", refuse)
    with pytest.raises(OSError, match="no space"):
        write_junit(file, RUNS)
    assert [(other.name, other.read_text()) for other in tmp_path.iterdir()] == [("junit.xml", "old")]


def refuse(*_):
    raise OSError("no space")
