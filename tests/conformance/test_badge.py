"""The badge says the verdict on what was asked for, and needs nothing else."""

from xml.etree import ElementTree

import pytest

from rbn.conformance.badge import summary, write_badge
from rbn.conformance.checks import ABSENT, EXPECTED, FAILED, PASSED, Result
from rbn.conformance.runner import Run


def run(name, *statuses, **options):
    results = [Result(f"bn/{place}", "g", status) for place, status in enumerate(statuses)]
    return Run(name, ("m:A",), (), "done", results={name: results}, **options)


NUMPY = run("numpy", PASSED, PASSED)


@pytest.mark.parametrize(
    ("runs", "due"),
    [
        ([NUMPY], ("conforms", "conforms, 2 cases")),
        ([NUMPY, run("m:A", PASSED, ABSENT)], ("conforms", "conforms, 1 case")),
        ([NUMPY, run("m:A", PASSED, FAILED)], ("differs", "differs, 1 of 2 cases fail")),
        ([NUMPY, run("m:A", PASSED, EXPECTED)], ("conforms", "conforms, 2 cases, 1 known to differ")),
        (
            [NUMPY, run("m:A", PASSED, stopped="interrupted", takes=["bn/0", "bn/1"], total=2)],
            ("interrupted", "interrupted, 1 case"),
        ),
    ],
)
def test_the_summary(runs, due):
    assert summary(runs) == due


def test_the_picture_is_well_formed_and_loads_nothing(tmp_path):
    write_badge(tmp_path / "badge.svg", [NUMPY])
    text = (tmp_path / "badge.svg").read_text()
    root = ElementTree.fromstring(text)
    assert root.get("aria-label") == "RBN conformance: conforms, 2 cases"
    assert int(root.get("width")) > 200
    assert "href" not in text
    assert text.count("http") == 1  # the namespace
