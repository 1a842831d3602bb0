"""The examples of an RBN of one's own conform, and so does what `rbn conform new` writes, at once."""

import importlib
import sys
from pathlib import Path

import pytest

from rbn.conformance.blank import FRAMEWORKS_OF_BLANKS, write_blank
from rbn.conformance.checks import ABSENT, FAILED, PASSED, check
from rbn.conformance.loading import load
from rbn.conformance.suite import all_cases, select
from rbn_core import RBNValueError

FOLDER = Path(__file__).parents[1] / "examples" / "own_rbn"
FEW = select(
    all_cases(),
    [
        "rbn/*/offset1000/8x3/float??",
        "rbn/train/offset1000/1x2x2x3/float32",
        "rbn/*/offset0/2x5x7x7/*float16",
        "rbn/*/offset0/3x4x2x3/eps=0.1/*",
        "rbn/train/offset0/3x4x2x3/momentum=*/float32",
        "rbn/train/*/1x3/*",
        "rbn/eval/offset0/0x2x2x3/float32",
        "rbn/train/*/strided",
    ],
    ["*/precision=*", "*/spoilt=*"],
)
SPOILT = select(all_cases(), ["rbn/*/spoilt=*", "rbn/*/precision=mixed_*"])


@pytest.fixture
def subject_of(monkeypatch):
    """Imports the subject of a file."""

    def subject(path):
        monkeypatch.syspath_prepend(path.parent)
        monkeypatch.delitem(sys.modules, path.stem, raising=False)
        return importlib.import_module(path.stem).subject

    return subject


def statuses(subject, cases):
    return {result.status for result in check(subject, [case for case in cases if subject.takes(case)])}


@pytest.mark.framework("torch", "flax")
def test_an_own_rbn_conforms(request, subject_of):
    name = request.config.option.framework
    assert statuses(subject_of(FOLDER / f"{name}_rbn.py"), FEW) == {PASSED, ABSENT}


def test_an_own_rbn_in_numpy_conforms_whatever_is_stored(subject_of):
    assert statuses(subject_of(FOLDER / "numpy_rbn.py"), (*FEW, *SPOILT)) == {PASSED, ABSENT}


@pytest.mark.parametrize("name", ["numpy", "torch", "flax"])
def test_the_page_shows_the_examples(name):
    _, _, code = (FOLDER / f"{name}_rbn.py").read_text().partition('"""\n\n')
    assert f"```python\n{code}```" in (FOLDER.parents[1] / "docs" / "conformance.md").read_text()


def runs_at_once(framework, folder, subject_of):
    path = folder / f"mine_{framework}.py"
    assert f"rbn conform --subject mine_{framework}:subject" in write_blank(path, framework)
    assert f"rbn conform --subject mine_{framework}:subject" in path.read_text()
    subject = subject_of(path)
    found = check(subject, select(all_cases(), ["bn/*/offset0/8x3/float??", "rbn/*/offset0/8x3/float??"]))
    assert [result.status for result in found] == 4 * [PASSED] + 4 * [ABSENT]
    assert {result.message for result in found[4:]} == {"TO DO: the calibrations of RBN"}
    return path


@pytest.mark.framework(*(name for name in FRAMEWORKS_OF_BLANKS if name != "numpy"))
def test_a_new_subject_runs_at_once(request, tmp_path, subject_of):
    runs_at_once(request.config.option.framework, tmp_path, subject_of)


def test_a_new_subject_in_numpy_runs_at_once_and_says_when_nothing_is_left_to_do(tmp_path, subject_of):
    path = runs_at_once("numpy", tmp_path, subject_of)
    text = path.read_text()
    own = (FOLDER / "numpy_rbn.py").read_text()
    start, end = text.index("def step("), text.index("subject = ")
    filled = text[:start] + own[own.index("def rbn(") : own.index("subject = ")] + text[end:]
    (tmp_path / "mine_filled.py").write_text(filled.replace("    step,", "    rbn,"))
    (result,) = check(
        subject_of(tmp_path / "mine_filled.py"),
        select(all_cases(), ["rbn/train/offset0/8x3/float32"]),
        on_failure="collect",
    )
    assert result.status == FAILED
    assert result.message.endswith("but it passes. Drop the declaration.")


@pytest.mark.parametrize(
    ("name", "framework", "text"),
    [
        ("there.py", "numpy", "is there already"),
        ("mine.txt", "numpy", "expected the name of a module"),
        ("my-layer.py", "numpy", "expected the name of a module"),
        ("nowhere/mine.py", "numpy", "expected a folder"),
        ("mine.py", "tensorflow", "expected one of numpy, torch, flax"),
    ],
)
def test_what_cannot_be_written_is_refused(tmp_path, name, framework, text):
    (tmp_path / "there.py").write_text("mine")
    with pytest.raises(RBNValueError, match=text):
        write_blank(tmp_path / name, framework)
    assert [path.name for path in tmp_path.iterdir()] == ["there.py"]
    assert (tmp_path / "there.py").read_text() == "mine"


def test_a_subject_that_always_calibrates_can_have_batch_norm_too(subject_of):
    """What it always does is no option of BatchNorm's cases."""
    subject = load("rbn.conformance.subjects.numpy:Numpy")
    subject.fixed = {"centering": "channel_mean", "scaling": "channel_mean", "gamma": True}
    cases = select(
        all_cases(), [f"{layer}/train/offset0/3x4x2x3/*" for layer in ("rbn", "iebn", "bnet", "bn")]
    )
    found = check(subject, [case for case in cases if not case.shares and not case.spoilt])
    assert {result.status for result in found} == {PASSED, ABSENT}
    ran = {result.case.partition("/")[0] for result in found if result.status == PASSED}
    assert ran == {"rbn", "iebn", "bnet", "bn"}
