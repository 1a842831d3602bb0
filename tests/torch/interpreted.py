"""The Triton kernels on the CPU, in Triton's interpreter: `test_triton.py` runs this file in its own process.

    TRITON_INTERPRET=1 .venv/bin/pytest --framework torch tests/torch/interpreted.py

What `rbn::forward` and `rbn::backward` do on CUDA is put in place of what they do on the CPU.
"""

import math
import warnings

import pytest
import torch

from rbn.backends.torch import RBN, fused, triton_kernels
from rbn.conformance.cases import parse
from rbn.conformance.checks import PASSED, check
from rbn.conformance.subjects.torch import Torch
from rbn.conformance.suite import all_cases

# NumPy warns of what a GPU computes silently.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

SUITE = [
    case
    for case in all_cases()
    if not case.shares and not case.config.uses_spatial_statistics and 0 < math.prod(case.shape) < 10**6
]
"""All that the kernels are for, but for what takes the interpreter minutes."""

SIZES = [
    *("1x3x80x80", "2x3x73x71", "1x2x9001"),  # planes of several blocks, in parts
    *("130x5x3", "1100x5"),  # more images than a program reads by itself, or at a time
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
        patch.setattr(fused, "_nobody_listens", lambda *_: False)  # or the loops are called at once
        patch.setitem(fused.AVAILABLE, "cpu", True)
        patch.setattr(triton_kernels, "processors", lambda device: PROCESSORS)
        yield


@pytest.mark.parametrize("case", SUITE + LARGE, ids=lambda case: case.id)
def test_conforms(case):
    assert {result.status for result in check(Torch(), [case])} == {PASSED}


@pytest.fixture
def layer():
    torch.manual_seed(0)
    layer = RBN(5)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    return layer


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("frozen", ["input", "parameters"])
def test_what_is_frozen_gets_no_gradient(layer, training, frozen):
    layer.train(training)
    x = torch.randn(3, 5, 4, 4, requires_grad=True)
    dy = torch.randn_like(x)
    layer(x).backward(dy)
    expected = {"input": x.grad} | {name: value.grad for name, value in layer.named_parameters()}
    inputs = {"input": x.detach().requires_grad_(frozen != "input")} | dict(layer.named_parameters())
    layer.zero_grad()
    for parameter in layer.parameters():
        parameter.requires_grad_(frozen != "parameters")
    layer(inputs["input"]).backward(dy)
    for name, value in inputs.items():
        assert (value.grad is None) == ((name == "input") == (frozen == "input"))
        assert value.grad is None or torch.equal(value.grad, expected[name])


def test_parameters_may_have_gaps(layer):
    x = torch.randn(3, 5, 4, 4)
    wide = [torch.randn(5, 2)[:, 0] for _ in range(5)]
    options = (layer.eps, "channel_mean", "channel_std", "sigmoid")
    found, expected = (
        triton_kernels.forward(x, values, (values[0], values[1].square()), *options)[0]
        for values in (wide, [value.clone() for value in wide])
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize("running", [True, False])
def test_an_empty_batch_has_no_statistics_and_gives_no_gradient(layer, running):
    x = torch.randn(0, 5, 4, 4)
    values = list(layer.parameters())
    running = (layer.running_mean, layer.running_var) if running else None
    options = (layer.eps, "channel_mean", "channel_mean", "sigmoid")
    y, mu, v, mean, var = triton_kernels.forward(x, values, running, *options)
    assert y.shape == x.shape
    assert mu.shape == v.shape == (0, 5)
    assert running is not None or all(s.isnan().all() for s in (mean, var))
    dx, gradients = triton_kernels.backward(x, x, mu, v, values, running, *options, True, [True] * 5)
    assert dx.shape == x.shape
    assert all(torch.equal(gradient, torch.zeros(5)) for gradient in gradients)
