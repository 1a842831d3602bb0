"""The Triton kernels on the CPU, in Triton's interpreter: `test_triton.py` runs this file in its own process.

    TRITON_INTERPRET=1 .venv/bin/pytest --framework torch tests/torch/interpreted.py

What `rbn::forward` and `rbn::backward` do on CUDA is put in place of what they do on the CPU.
"""

import warnings

import pytest

from rbn.backends.torch import fused, triton_kernels
from rbn.conformance.cases import parse
from rbn.conformance.checks import PASSED, check
from rbn.conformance.subjects.torch import Torch
from rbn.conformance.suite import all_cases, quick_cases, select

# NumPy warns of what a GPU computes silently.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

CALIBRATIONS = select(all_cases(), ["rbn/*/offset0/3x4x2x3/*=*/float32"])
"""All choices of the statistics and all options, on one shape."""

SUITE = [
    case
    for case in dict.fromkeys((*quick_cases(), *CALIBRATIONS))
    if not case.shares and not case.config.uses_spatial_statistics and 0 not in case.shape
]

SIZES = [
    *("1x3x80x80", "2x3x73x71", "1x2x9001"),  # planes of several blocks, in parts
    *("130x5x3", "300x3", "70x2x65x65"),  # more images than a program reads by itself
    *("3x20x9x9", "9x7x1x1", "5x33x5"),  # several planes in a tile, and some of none
]
"""What the suite's small shapes leave out."""

LARGE = [
    parse("/".join(filter(None, [layer, mode, data, size, options, dtype, layout])))
    for size in SIZES
    for layer, mode, data, options, dtype in [
        ("rbn", "train", "offset0", "", "float32"),
        ("rbn", "train", "offset1000", "centering=channel_std,scaling=channel_std", "float32"),
        ("rbn", "eval", "offset10", "", "bfloat16"),
    ]
    for layout in ["", "channels_last"]
]

PROCESSORS = 4
"""For so many multiprocessors the work is shared out here: few programs, and large planes in parts."""


@pytest.fixture(scope="module", autouse=True)
def on_the_cpu():
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the loops that are in place there
        for name, implementation in (("forward", fused._forward_cuda), ("backward", fused._backward_cuda)):
            fused.LIBRARY.impl(name, implementation, "CPU", allow_override=True)
        patch.setitem(fused.AVAILABLE, "cpu", True)
        patch.setattr(triton_kernels, "processors", lambda device: PROCESSORS)
        yield


@pytest.mark.parametrize("case", SUITE + LARGE, ids=lambda case: case.id)
def test_conforms(case):
    assert {result.status for result in check(Torch(), [case])} == {PASSED}
