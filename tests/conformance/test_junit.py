"""The JUnit file says what the runs found, whatever is in their messages."""

import platform
from pathlib import Path
from xml.etree import ElementTree

import pytest

import rbn
from rbn.conformance.checks import Result
from rbn.conformance.comparison import Deviation
from rbn.conformance.junit import write_junit
from rbn.conformance.runner import Run
from rbn.conformance.suite import all_cases, select

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
    write_junit(file, RUNS, "rbn conform torch")
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
    assert failure.get("message") == "y is <wrong> & �[31mred� � (behaves like: a < b)"
    assert failure.get("type") == "y"
    assert failure.text == "\n".join(
        (
            "y is <wrong> & �[31mred� �",
            "line 2",
            "behaves like: a < b",
            "again: rbn conform torch",
        )
    )
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
    write_junit(file, [Run("torch", ("m:A",), (), "done", results={"A": results})], "rbn conform torch")
    (suite,) = ElementTree.parse(file).getroot()
    assert counts(suite) == [2, 0, 1, 0]
    late, refused = suite.iter("testcase")
    assert late.find("error").attrib == {"type": "late", "message": "no result in time: device 1"}
    assert refused.find("system-out").text == "ValueError: RBN: expected \N{REPLACEMENT CHARACTER} more"


def test_the_command_the_verdict_and_the_versions_are_properties(root):
    properties = {
        each.get("name"): each.get("value") for each in root.find("testsuite[@name='A']/properties")
    }
    assert properties == {
        "command": "rbn conform torch",
        "verdict": "differs",
        "rbn": rbn.__version__,
        "python": platform.python_version(),
        "torch": "2.13",
    }


def test_a_failure_is_one_short_line_with_its_cause_where_the_subjects_file_is(tmp_path):
    (case,) = select(all_cases(), ["bn/train/offset0/8x3/float32"])
    wrong = Result(
        case.id, case.group, "failed", (Deviation("y", 1.0),), "y is wrong " * 40, 0.1, ("behaves like: b.",)
    )
    run = Run("theirs:A", ("theirs:A",), (case,), "done", results={"A": [wrong]}, file="layers/theirs.py")
    write_junit(tmp_path / "junit.xml", [run], "rbn conform --subject theirs:A")
    (testcase,) = ElementTree.parse(tmp_path / "junit.xml").getroot().iter("testcase")
    assert testcase.get("file") == "layers/theirs.py"
    message = testcase.find("failure").get("message")
    assert len(message) <= 160
    assert message.endswith("… (behaves like: b.)")
    assert testcase.find("failure").text.endswith(f"again: rbn conform --subject theirs:A --only {case.id}")


def test_what_an_interrupted_run_lacks_is_an_error_that_names_it(tmp_path):
    cases = select(all_cases(), ["bn/train/offset0/8x3/float??"])
    right = Result(cases[0].id, cases[0].group, "passed")
    run = Run("numpy", ("m:A",), cases, "done", results={"A": [right]}, stopped="interrupted")
    write_junit(tmp_path / "junit.xml", [run], "rbn conform numpy")
    (error,) = ElementTree.parse(tmp_path / "junit.xml").getroot().iter("error")
    assert error.get("message") == "interrupted: 1 of 2 cases have no result"
    assert error.text.endswith(f"without a result:\n{cases[1].id}")


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    file = tmp_path / "junit.xml"
    file.write_text("old")
    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(OSError, match="no space"):
        write_junit(file, RUNS, "rbn conform torch")
    assert [(other.name, other.read_text()) for other in tmp_path.iterdir()] == [("junit.xml", "old")]


def refuse(*_):
    raise OSError("no space")
