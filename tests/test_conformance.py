"""Each framework's layers on a case of each of the suite's rows, in the process of its tests."""

import importlib
import itertools

import pytest

from rbn.backends import frameworks
from rbn.conformance import loading
from rbn.conformance.cases import PRECISIONS_OF, SPOILS
from rbn.conformance.checks import ABSENT, PASSED, check
from rbn.conformance.suite import all_cases, quick_cases, select

UNKNOWN = {
    "torch": {"read_only", "shared_compiled"},
    "flax": {"elsewhere", "shared_compiled"},
    "mindspore": {"elsewhere", "read_only", "subclass"},
    "jittor": {"elsewhere", "read_only", "subclass", "shared_compiled"},
}
"""What cannot happen there: a CPU is one device, and what a parameter is can not be chosen. JAX never
writes to an array, Jittor compiles every step, and torch.compile gets BatchNorm itself wrong there."""

SHARED = select(all_cases(), ["*/shares=2+2"])


def subjects(framework):
    return [
        loading.load(reference)
        for name, references in loading.SUBJECTS.items()
        for reference in references
        if name.partition(".")[0] == framework
    ]


@pytest.mark.parametrize("layer", ["rbn", "iebn", "bnet"])
def test_every_two_choices_meet_in_a_case(layer):
    """Mode, dtype, layout, rank, statistics and kernel in pairs, and each of them with every option."""
    crossed = {"mode", "dtype", "layout", "spatial axes", "centering", "scaling", "kernel_size"}
    options = {"restrict", "running_var", "gamma and beta", "momentum"}
    mine = (layer, "bn") if layer == "rbn" else (layer,)
    covered = [case.features for case in all_cases() if case.layer in mine]
    values = {name: {case[name] for case in covered} for name in crossed | options}
    values["momentum"] -= {"0.0", "1.0"}  # as any other number between them
    for one, other in itertools.combinations(sorted(values), 2):
        if {one, other} <= options:
            continue
        met = {(case[one], case[other]) for case in covered}
        assert set(itertools.product(values[one], values[other])) <= met, (one, other)
    assert len(values["dtype"]) == len(values["layout"]) == 4
    assert len(values["spatial axes"]) == (3 if layer == "bnet" else 4)
    assert len(values["centering"]) == len(values["scaling"]) == (5 if layer == "rbn" else 1)


@pytest.mark.framework(*frameworks.FRAMEWORKS)
def test_all_ways_into_mixed_precision_and_all_that_can_be_spoilt_are_run(request):
    name = request.config.option.framework
    for subject in subjects(name):
        assert {*subject.precisions} == PRECISIONS_OF[name].keys(), subject.name
        assert {*SPOILS} - {*subject.spoils} <= UNKNOWN.get(name, set()), subject.name


@pytest.mark.framework("torch", "flax", "mindspore")  # Jittor compiles for minutes: `make conform` runs it
def test_the_layers_conform(request):
    name = request.config.option.framework
    mine = subjects(name)
    rows = sorted(quick_cases(), key=lambda case: (bool(case.spoilt), case.layer, case.training))
    for number, subject in enumerate(mine):
        # Where compiling takes minutes, every layer's rows are dealt out: `make conform` runs all with each.
        cases = rows if name == "torch" else rows[number :: len(mine)]
        if name != "flax":  # several devices have to be asked for before JAX starts: a test of its own does
            cases = [*cases, *SHARED]
        results = check(subject, cases)
        assert {result.status for result in results} <= {PASSED, ABSENT}


@pytest.mark.framework(*frameworks.FRAMEWORKS)
def test_the_processor_is_a_device(request):
    backend = importlib.import_module(f"rbn.backends.{request.config.option.framework}.devices")
    assert any("cpu" in name.lower() for name in backend.devices())
