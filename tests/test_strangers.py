"""The frameworks' own BatchNorm layers differ where their examples say, and nowhere else."""

import importlib
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from rbn.conformance.checks import ABSENT, EXPECTED, FAILED, PASSED, check, lacks
from rbn.conformance.suite import all_cases, select

FOLDER = Path(__file__).parents[1] / "examples" / "own_batch_norm"
CASES = select(all_cases(), ["bn/*"], ["*/precision=*", "*/spoilt=*"])
"""Without those that a subject must say how to enter."""


@pytest.fixture
def example(monkeypatch):
    """Imports an example as it is imported where it is run."""
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module


BIASED = select(CASES, ["*running_var=biased*"])
"""What PyTorch and MindSpore have no option for."""

ONE_VALUE = "*/1x3*"


def statuses(subject, cases=CASES):
    """How many cases have which status; the check raises at anything that was not declared."""
    return Counter(result.status for result in check(subject, cases))


def reasons(subject, cases=CASES):
    """How many cases ran and differ for which declared reason."""
    expected = [result for result in check(subject, cases) if result.status == EXPECTED]
    assert all(result.worst.quantity != "raised" for result in expected)
    return Counter(result.message for result in expected)


@pytest.mark.framework("torch")
def test_torch_counts_what_it_refuses_and_differs_nowhere_else(example):
    module = example("torch_batch_norm")
    refused = select(CASES, ["bn/train/*/1x3*"])
    assert reasons(module.subject) == {module.COUNTED: len(refused)}
    passed = len(CASES) - len(BIASED) - len(refused)
    assert statuses(module.subject) == {PASSED: passed, EXPECTED: len(refused), ABSENT: len(BIASED)}


@pytest.mark.framework("torch")
def test_the_example_prints_a_table_and_the_command_takes_its_subject():
    done = subprocess.run([sys.executable, FOLDER / "torch_batch_norm.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    absent = len(BIASED)
    text = f"{len(CASES) - absent - 2} cases pass, 2 differ as declared, {absent} cannot run, 0 fail"
    assert text in done.stdout
    assert "has no option running_var" in done.stdout
    command = [Path(sys.executable).with_name("rbn"), "conform", "--only", "bn/*/offset10/*"]
    command += ["--subject", "torch_batch_norm:subject"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=FOLDER)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "torch BatchNorm" in done.stdout


@pytest.mark.framework("flax")
@pytest.mark.parametrize("name", ["subject", "nnx_subject"])
def test_flax_has_a_one_pass_variance_and_promotes_half_precision(example, name):
    module = example("flax_batch_norm")
    some = select(CASES, ["*/offset1000/*", "*/3x4x2x3/*", "*/*float16", "*/8x3/*", ONE_VALUE])
    found = check(getattr(module, name), some)
    half = [result for result in found if result.status != ABSENT and "float16" in result.case]
    assert Counter(result.message for result in found if result.status == EXPECTED) == {
        module.ONE_PASS: 2,
        module.PROMOTED: len(half),
        module.ACCEPTED: 2,
    }
    assert {result.worst.quantity for result in found if result.message == module.ONE_PASS} == {"y"}


@pytest.mark.framework("flax")
def test_flax_is_right_with_the_options_that_its_findings_name(example, monkeypatch):
    module = example("flax_batch_norm")
    monkeypatch.setattr(module.subject, "expected_failures", {})

    def passes(pattern, **options):
        make = module.make
        monkeypatch.setattr(
            module.subject, "make", lambda config, dtype: make(config, dtype).clone(**options)
        )
        return statuses(module.subject, select(CASES, [pattern])).keys() == {PASSED}

    assert passes("bn/train/offset1000/*", use_fast_variance=False)
    assert passes("bn/train/photographs/*", use_fast_variance=False)
    assert passes("bn/*/float16", dtype="float16")
    assert passes("bn/*/bfloat16", dtype="bfloat16")


@pytest.mark.framework("mindspore")
def test_mindspore_refuses_dtypes_and_stores_too_much(example):
    module = example("mindspore_batch_norm")
    found = check(module.subject)
    expected = [result for result in found if result.status == EXPECTED]
    assert {result.message for result in expected} == {module.NAN}
    assert len(expected) == 2
    assert all("running_var [nan nan nan]" in result.worst.message for result in expected)
    assert any(result.message == module.TOO_MUCH for result in found)
    refused = [result for result in found if result.message == module.NO_DTYPE]
    assert {result.case for result in refused} == {
        case.id
        for case in select(CASES, ["*/float64*", "*/bfloat16*"])
        if lacks(module.subject, case) is None
    }
    told = [result.worst.message for result in refused if "=False" not in result.case]
    assert all("must be a type of {Tensor[Float16], Tensor[Float32]}" in message for message in told)


@pytest.mark.framework("jittor")
def test_jittor_has_a_one_pass_variance_and_keeps_neither_float64_nor_float32_where_due(example):
    module = example("jittor_batch_norm")
    # Few shapes and options: for every one Jittor compiles kernels when it first meets it.
    some = select(CASES, ["*/offset1000/*", "*/nan/*", "*/*float16", "*/offset0/8x3/float??", ONE_VALUE])
    found = reasons(module.subject, some)
    assert found.keys() - {module.NAN} == {
        module.ONE_PASS,
        module.ACCEPTED,
        module.CONSTANTS,
        module.IN_HALF,
        module.PROMOTED,
    }
    assert found[module.NAN] == len(module.LOST) / 2  # for infinity it is declared as well


@pytest.mark.framework("jittor")
def test_jittor_is_right_in_float64_where_its_constants_are_powers_of_two(example, monkeypatch):
    subject = example("jittor_batch_norm").subject
    monkeypatch.setattr(subject, "expected_failures", {})
    exact = "bn/train/offset0/2x4x2x2/eps=0.0009765625,momentum=0.5/float64"
    assert statuses(subject, select((), [exact])) == {PASSED: 1}


def test_the_suite_names_the_mistake_of_a_numpy_function(example):
    module = example("numpy_function")
    results = check(module.subject, on_failure="collect")
    failed = [result for result in results if result.status == FAILED]
    assert 30 < len(failed) < len(results) / 2
    assert all(result.case.startswith("bn/train/") for result in failed)
    named = [
        result
        for result in failed
        if "behaves like: The running variance has the other" in str(result.causes)
    ]
    assert len(named) == len(failed)


def test_the_example_of_a_wrong_layer_says_what_is_wrong_with_it(example):
    subject = example("numpy_function").subject
    count = len([case for case in all_cases() if subject.takes(case)])
    done = subprocess.run([sys.executable, FOLDER / "numpy_function.py"], capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(rf"\d+ of {count} cases failed", done.stdout)
    assert "behaves like: The running variance has the other estimator" in done.stdout
