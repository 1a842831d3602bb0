"""Each framework's layers on some cases of the suite, in the process of its tests."""

import importlib

import pytest

from rbn.backends import frameworks
from rbn.conformance import runner
from rbn.conformance.checks import ABSENT, PASSED, check
from rbn.conformance.suite import all_cases, quick_cases, select

OPTIONS = select(all_cases(), ["rbn/*/offset0/3x4x2x3/*=*/float32"])
"""All choices of the statistics and all options, on one shape."""

SHARED = select(all_cases(), ["*/shares=2+2"])


def subjects(framework):
    return [
        runner.load(reference)
        for name, references in runner.SUBJECTS.items()
        for reference in references
        if name.partition(".")[0] == framework
    ]


@pytest.mark.framework("torch", "flax", "mindspore")  # Jittor compiles for minutes: `make conform` runs it
def test_the_layers_conform(request):
    name = request.config.option.framework
    cases = (*quick_cases(), *OPTIONS, *SHARED)
    if name == "flax":  # several devices have to be asked for before JAX starts: a test of their own does
        cases = cases[: -len(SHARED)]
    for subject in subjects(name):
        results = check(subject, cases)
        assert {result.status for result in results} <= {PASSED, ABSENT}


@pytest.mark.framework(*frameworks.FRAMEWORKS)
def test_the_processor_is_a_device(request):
    backend = importlib.import_module(f"rbn.backends.{request.config.option.framework}.devices")
    assert any("cpu" in name.lower() for name in backend.devices())
