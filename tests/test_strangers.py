"""Other BatchNorms differ where docs/findings.md says, and nowhere else."""

import importlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rbn.conformance.checks import ABSENT, EXPECTED, FAILED, PASSED, check
from rbn.conformance.suite import all_cases, select

TESTS = Path(__file__).parent
FOLDER = TESTS.parent / "examples" / "strangers"


@pytest.fixture
def example(monkeypatch):
    """Imports an example as it is imported where it is run."""
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module


@pytest.fixture
def page(monkeypatch):
    """What compares a BatchNorm with its part of the page."""
    spec = importlib.util.spec_from_file_location("on_the_page", TESTS / "strangers_on_the_page.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def of(framework, *subjects):
    """Subjects as parameters of a test that needs a framework."""
    marks = [pytest.mark.framework(framework)] if framework else []
    return [pytest.param(subject, marks=marks, id=subject) for subject in subjects]


HELD = (
    *of("torch", "torch_batch_norm:subject", "torch_sync_batch_norm:subject"),
    *of("torch", "torchvision_frozen:subject", "timm_batch_norm_act:subject"),
    *of("flax", "flax_batch_norm:subject", "flax_batch_norm:nnx_subject"),
    *of("mindspore", "mindspore_batch_norm:subject", "mint_batch_norm:subject"),
    *of(None, "onnx_reference:subject", "onnx_reference:opset9", "onnxruntime_batch_norm:subject"),
)
"""In the frameworks of this project; those of others are in tests/integrations/."""


@pytest.mark.parametrize("subject", HELD)
def test_a_stranger_is_what_its_part_of_the_page_says(page, subject):
    package = subject.partition("_")[0]
    if importlib.util.find_spec({"mint": "mindspore"}.get(package, package)) is None:
        pytest.skip(f"{package} is not installed")
    page.main(subject)


FOUND = {
    "name": "a layer",
    "findings": [{"what": "loses digits", "known": "", "cases": ["bn/*"]}],
    "rows": [
        {"status": EXPECTED, "why": "loses digits"},
        {"status": EXPECTED, "why": "counts otherwise"},
        {"status": ABSENT, "why": "has no layout"},
    ],
}
TEXT = """
## a layer

**Wrong:** loses digits.

**Otherwise:** counts otherwise (3 cases).

**Not run:** has no layout (2 cases).
"""


@pytest.mark.parametrize(
    ("here", "there"),
    [
        ("loses digits.", "loses many digits."),
        ("**Otherwise:**", "**Wrong:** more.\n\n**Otherwise:**"),
        ("counts otherwise", "counts likewise"),
        ("has no layout", "has no dtype"),
        ("## a layer", "## another layer"),
    ],
)
def test_a_page_that_says_something_else_is_found(page, here, there):
    page.compare(TEXT, FOUND)
    with pytest.raises(AssertionError):
        page.compare(TEXT.replace(here, there), FOUND)


@pytest.mark.framework("torch")
def test_a_page_with_another_program_or_output_is_found(page):
    repro = "torch_counts_what_it_refuses.py"
    text = page.PAGE.read_text("utf-8")
    page.shows(text, repro)
    for here in ("num_batches_tracked is 1", "layer(torch.ones(1, 3))"):
        assert here in text
        with pytest.raises(AssertionError, match="num_batches_tracked is 1"):
            page.shows(text.replace(here, "something else"), repro)


def test_the_page_has_every_stranger(page):
    spec = importlib.util.spec_from_file_location("findings_tool", TESTS.parent / "tools" / "findings.py")
    tool = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = tool  # dataclasses look it up
    spec.loader.exec_module(tool)
    text = (TESTS.parent / tool.PAGE).read_text("utf-8")
    commands = re.findall(r"^    (.*findings\.py \w+:\w+)$", text.partition("\n## ")[2], re.MULTILINE)
    seen = [tool.Seen(stranger, "", "", {}, [], [], {}).command for stranger in tool.STRANGERS]
    assert commands == seen
    tested = {parameter.values[0] for parameter in HELD}
    ours = {stranger.subject for stranger in tool.STRANGERS if not stranger.other}
    assert ours == tested | {
        "jittor_batch_norm:subject"
    }  # which has tests of its own, as it compiles for long
    shown = set(re.findall(r"^# examples/strangers/repros/(\w+\.py)$", text, re.MULTILINE))
    assert shown == {path.name for path in (FOLDER / "repros").glob("*.py")}


NAMED = "behaves like: The running variance has no Bessel's correction, whatever the option says."

CASES = select(all_cases(), ["bn/*"], ["*/precision=*", "*/spoilt=*"])


def passes(subject, pattern):
    """Whether all of these cases pass without any declaration."""
    return {result.status for result in check(subject, select(CASES, [pattern]))} == {PASSED}


@pytest.mark.framework("torch")
def test_the_command_takes_a_stranger_and_prints_what_differs():
    command = [Path(sys.executable).with_name("rbn"), "conform", "--only", "bn/*/offset10/*"]
    command += ["--subject", "torch_batch_norm:subject"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=FOLDER)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "torch BatchNorm" in done.stdout


@pytest.mark.framework("torch")
def test_two_processes_of_sync_batch_norm_are_refused_on_a_cpu(example):
    subject, cases = example("torch_sync_batch_norm").subject, select((), example("findings").SHARED)
    (result,) = check(subject, cases)
    assert result.status == ABSENT
    assert "SyncBatchNorm expected input tensor to be on GPU or XPU" in result.worst.message


@pytest.mark.framework("flax")
def test_flax_is_right_with_the_options_that_its_findings_name(example, monkeypatch):
    module = example("flax_batch_norm")
    make = module.make
    monkeypatch.setattr(module.subject, "expected_failures", {})

    def passes_with(pattern, **options):
        monkeypatch.setattr(
            module.subject, "make", lambda config, dtype: make(config, dtype).clone(**options)
        )
        return passes(module.subject, pattern)

    assert passes_with("bn/train/offset1000/*", use_fast_variance=False)
    assert passes_with("bn/train/photographs/*", use_fast_variance=False)
    assert passes_with("bn/*/float16", dtype="float16")
    assert passes_with("bn/*/bfloat16", dtype="bfloat16")


@pytest.mark.framework("mindspore")
def test_what_mindspore_cannot_run_it_says_itself(example):
    nn = check(example("mindspore_batch_norm").subject, select(CASES, ["bn/train/offset0/3x4x2x3/float64"]))
    mint = check(example("mint_batch_norm").subject, select(CASES, ["bn/train/offset0/3x4x2x3/float32"]))
    assert [result.status for result in (*nn, *mint)] == [ABSENT, ABSENT]
    assert "must be a type of {Tensor[Float16], Tensor[Float32]}" in nn[0].worst.message
    assert "The kernel BatchNormExt unregistered" in mint[0].worst.message


@pytest.mark.framework("jittor")
def test_jittor_differs_where_it_is_declared_to(example, page):
    module, findings = example("jittor_batch_norm"), example("findings")
    # Few shapes and options: for every one Jittor compiles kernels when it first meets it.
    cases = ["*/offset1000/*", "*/nan/*", "*/*float16", "*/offset0/8x3/float??", "*/1x3*"]
    results = findings.held(module.subject, select(CASES, cases))
    assert not [result for result in results if result.status == FAILED]
    met = {result.message for result in results if result.status == EXPECTED}
    wrong = {finding.what for finding in module.FINDINGS["subject"]}
    assert met == {module.PROMOTED, *wrong}
    part = page.part_of(page.PAGE.read_text("utf-8"), "jittor BatchNorm")
    assert {*page.told(part, "Wrong")} == wrong
    assert page.told(part, "Otherwise") == [module.PROMOTED]


@pytest.mark.framework("jittor")
@pytest.mark.parametrize(
    ("name", "output"),
    [
        ("one_pass_variance", "Y is -158 and 158"),
        ("one_value", "Y is [0. 0. 0.] and the running variance [0.9 0.9 0.9]"),
        ("float64", "the running mean is float64, and off by 3e-09"),
        ("half", "Y is [0. 0.] and the running variance [inf] float16"),
    ],
)
def test_jittor_shows_its_findings(page, name, output):
    assert output in page.run(FOLDER / "repros" / f"jittor_{name}.py").splitlines()


@pytest.mark.framework("jittor")
def test_jittor_is_right_in_float64_where_its_constants_are_powers_of_two(example, monkeypatch):
    subject = example("jittor_batch_norm").subject
    monkeypatch.setattr(subject, "expected_failures", {})
    exact = "bn/train/offset0/2x4x2x2/eps=0.0009765625,momentum=0.5/float64"
    assert {result.status for result in check(subject, select((), [exact]))} == {PASSED}


@pytest.mark.parametrize("name", ["onnx_reference", "onnxruntime_batch_norm"])
def test_onnx_is_right_in_float64_where_its_attributes_are_powers_of_two(example, monkeypatch, name):
    pytest.importorskip("onnxruntime", reason="the package onnxruntime is not installed")
    subject = example(name).subject
    monkeypatch.setattr(subject, "expected_failures", {})
    for mode in ("train", "eval"):
        exact = f"bn/{mode}/offset0/2x4x2x2/eps=0.0009765625,momentum=0.5/float64"
        assert {result.status for result in check(subject, select((), [exact]))} == {PASSED}


def test_the_suite_names_the_mistake_of_a_numpy_function(example):
    module = example("numpy_function")
    results = check(module.subject, on_failure="collect")
    failed = [result for result in results if result.status == FAILED]
    assert 30 < len(failed) < len(results) / 2
    assert all(result.case.startswith("bn/train/") for result in failed)
    (cause,) = results.diagnosis.causes
    assert cause.mistake == NAMED
    assert {*cause.cases} == {result.case for result in failed}


def test_the_example_of_a_wrong_layer_says_what_is_wrong_with_it():
    done = subprocess.run(
        [sys.executable, FOLDER / "findings.py", "numpy_function:subject"], capture_output=True, text=True
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(
        r" cases pass, 0 differ as declared, \d+ cannot run, [1-9]\d+ fail$", done.stdout, re.MULTILINE
    )
    assert NAMED in done.stdout.replace("\n", " ")
