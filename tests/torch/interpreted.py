"""The Triton kernels on the CPU, in Triton's interpreter: `test_triton.py` runs this file in its own process.

    TRITON_INTERPRET=1 .venv/bin/pytest --framework torch tests/torch/interpreted.py

What `rbn::forward` and `rbn::backward` do on CUDA is put in place of what they do on the CPU.
"""

import math
import sys
import warnings

import pytest
import torch

from rbn.backends.torch import RBN, fused
from rbn.backends.torch.fused import Options, Vectors
from rbn.backends.torch.triton import launch
from rbn.conformance.cases import parse
from rbn.conformance.checks import PASSED, check
from rbn.conformance.subjects.torch import Torch
from rbn.conformance.suite import all_cases, quick_cases
from rbn_core import RBNValueError

# NumPy warns of what a GPU computes silently.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

REACHING = ("", "half", "double", "strided")
"""What of a spoilt state gets as far as a launch; the rest is refused, or takes plain operations."""

SUITE = [
    case
    for case in all_cases()
    if not case.shares
    and case.config.has_two_pass_form
    and 0 < math.prod(case.shape) < 10**6
    and not case.precision  # the kernels see the dtype, which the half-precision cases have
    and case.spoil[1] in REACHING
    and (not case.spoilt or case.layer == "rbn")  # whose arrays are all that there are
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
        patch.setattr(launch, "processors", lambda device: PROCESSORS)
        yield


QUICK = {case.id for case in (*quick_cases(), *LARGE[::4])}
"""What shows most of it; the others are a long search."""


MEASURED = (
    *("1x2x9001", "2x3x73x71", "130x5x3", "3x20x9x9"),
    *("hard_sigmoid", "channels_last", "2x5x7x7/float16"),
)
"""What the cases have in their names that run every line of the kernels between them."""


@pytest.fixture
def measured_lines(request):
    """Coverage, which makes the interpreter three times as slow, sees no more cases than it needs."""
    tracing = sys.gettrace()
    if not any(part in request.node.name for part in MEASURED):
        sys.settrace(None)
    yield
    sys.settrace(tracing)


@pytest.mark.usefixtures("measured_lines")
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.id, marks=() if case.id in QUICK else pytest.mark.long)
        for case in SUITE + LARGE
    ],
)
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
    options = Options(layer.epsilon, "channel_mean", "channel_std", "sigmoid")
    found, expected = (
        launch.forward(x, Vectors(*values, values[0], values[1].square()), options)[0]
        for values in (wide, [value.clone() for value in wide])
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize("running", [True, False])
def test_an_empty_batch_has_no_statistics_and_gives_no_gradient(layer, running):
    x = torch.randn(0, 5, 4, 4)
    values = list(layer.parameters())
    vectors = Vectors(*values, *((layer.running_mean, layer.running_var) if running else (None, None)))
    options = Options(layer.epsilon, "channel_mean", "channel_mean", "sigmoid")
    y, mu, v, mean, var = launch.forward(x, vectors, options)
    assert y.shape == x.shape
    assert mu.shape == v.shape == (0, 5)
    assert running or all(s.isnan().all() for s in (mean, var))
    dx, gradients = launch.backward(x, x, mu, v, vectors, options, needs_dx=True)
    assert dx.shape == x.shape
    assert all(torch.equal(gradient, torch.zeros(5)) for gradient in gradients)


OPTIONS = Options(1e-5, "channel_mean", "channel_std", "sigmoid")


def handed_over():
    """What both passes take, all of it in order."""
    x, vectors = torch.randn(3, 5, 4, 4), Vectors(*(torch.rand(5) for _ in range(7)))
    _, mu, v, *_ = launch.forward(x, vectors, OPTIONS)
    return x, mu, v, vectors


def assert_refused(text, x, mu, v, vectors, options=OPTIONS, dy=None):
    if dy is None:
        with pytest.raises(RBNValueError, match=text):
            launch.forward(x, vectors, options)
    dy = x if dy is None else dy
    with pytest.raises(RBNValueError, match=text):
        launch.backward(dy, x, mu, v, vectors, options, needs_dx=True)


WRONG = [torch.rand(4), torch.rand(1), torch.rand(10), torch.rand(0), torch.rand(5, 1), torch.rand(5).half(),
         torch.rand(5).double(), torch.rand(5, device="meta")]  # fmt: skip


@pytest.mark.parametrize(
    "wrong", WRONG, ids=lambda value: f"{tuple(value.shape)} {value.dtype} {value.device}"
)
@pytest.mark.parametrize("name", Vectors._fields)
def test_a_vector_that_does_not_fit_is_refused(name, wrong):
    x, mu, v, vectors = handed_over()
    assert_refused("RBN: expected numbers of shape", x, mu, v, vectors._replace(**{name: wrong}))


@pytest.mark.parametrize("name", ["center_weight", "scale_weight", "scale_bias"])
def test_a_parameter_that_the_options_need_is_not_left_out(name):
    x, mu, v, vectors = handed_over()
    assert_refused("with these options, got None", x, mu, v, vectors._replace(**{name: None}))


@pytest.mark.parametrize(
    "options",
    [(1e-5, "typo", None, "sigmoid"), (1e-5, None, "typo", "sigmoid"), (1e-5, None, None, "typo"),
     (1e-5, "input_mean", None, "sigmoid"), (1e-5, "spatial_mean", None, "sigmoid")],
)  # fmt: skip
def test_an_option_that_the_kernels_do_not_know_is_refused(options):
    assert_refused("RBN: expected options of the two-pass form", *handed_over(), Options(*options))


def test_images_and_gradients_that_do_not_fit_are_refused():
    x, mu, v, vectors = handed_over()
    for wrong in (x[:, :, ::2], x.transpose(2, 3), x.int()):
        assert_refused("RBN: expected floating-point images without gaps", wrong, mu, v, vectors)
    for wrong in (x.half(), x.double(), x[:2], x[:, :, :2], x.to("meta")):
        assert_refused("RBN: expected dY of shape", x, mu, v, vectors, dy=wrong)
    for wrong in (mu[:2], mu[:, :4], mu.double(), mu.to("meta")):
        for planes in ((wrong, v), (mu, wrong)):
            with pytest.raises(RBNValueError, match="RBN: expected numbers of shape"):
                launch.backward(x, x, *planes, vectors, OPTIONS, needs_dx=True)
