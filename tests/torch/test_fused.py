"""The fused form in PyTorch is the same layer as the plain one, for autograd, the compiler and all else."""

import copy
import itertools
import threading

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rbn.backends.torch import BNET, IEBN, RBN, fused
from rbn_core.names import NAMES

pytestmark = [
    pytest.mark.skipif(not fused.AVAILABLE["cpu"], reason="the loops were not compiled: no C++ compiler"),
    # PyTorch's own rules for forward-mode derivatives are scripted.
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated"),
]

OPTIONS = [
    {"centering": centering, "scaling": scaling}
    for centering, scaling in itertools.product((None, "channel_mean", "channel_std"), repeat=2)
]


class Operators(TorchDispatchMode):
    """The names of all operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def operators(layer, x):
    with Operators() as mode:
        layer(x).sum().backward()
    return mode.names


def trained(layer, seed=0):
    """A layer none of whose numbers is special."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) / 2)
        if layer.running_mean is not None:
            layer.running_mean.normal_(generator=generator)
            layer.running_var.uniform_(0.5, 2, generator=generator)
    return layer


def plain(layer):
    """The same layer in the framework's own operations."""
    other = copy.deepcopy(layer)
    other.fused = False
    return other


def images(*shape, dtype=torch.float64, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) + 3


def both(layer, x, step):
    """What a step gives of a layer and of the plain one."""
    other = plain(layer)
    return step(layer, x.detach().requires_grad_()), step(other, x.detach().requires_grad_())


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def forward_and_gradients(layer, x):
    y = layer(x)
    return y, *torch.autograd.grad(y.square().sum() + y.sin().sum(), [x, *layer.parameters()])


def test_one_operator_forward_and_one_backward():
    names = operators(RBN(4), images(2, 4, 3, 3, dtype=torch.float32).requires_grad_())
    assert names.count("rbn::forward") == names.count("rbn::backward") == 1


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (RBN(4, fused=False), images(2, 4, 3, 3)),
        (IEBN(4, fused=False), images(2, 4, 3, 3)),
        (BNET(4, fused=False), images(2, 4, 3, 3, dtype=torch.float32)),
        (RBN(4, centering="spatial_mean"), images(2, 4, 3, 3)),
        (RBN(4, scaling="spatial_std"), images(2, 4, 3, 3)),
        (RBN(4).eval(), images(0, 4, 3, 3)),
    ],
)
def test_what_takes_the_frameworks_own_operations(layer, x):
    assert not any(name.startswith("rbn::") for name in operators(layer, x.requires_grad_()))


def test_without_compiled_loops_the_layers_take_the_frameworks_own_operations(monkeypatch):
    monkeypatch.setitem(fused.AVAILABLE, "cpu", False)
    assert "rbn::forward" not in operators(RBN(4), images(2, 4, 3, 3).requires_grad_())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # opcheck's own, of its copies
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("training", [True, False])
def test_the_operators_keep_the_rules_of_the_library(options, training):
    layer = trained(RBN(3, dtype=torch.float64, **options))
    stored = [getattr(layer, NAMES["torch"][name]) for name in fused.VECTOR_PARAMETERS]
    stored = [None if value is None else value.detach().requires_grad_() for value in stored]
    running = (None, None) if training else (layer.running_mean, layer.running_var)
    arguments = (*stored, *running, 1e-5, layer.centering, layer.scaling, "sigmoid")
    for x in (images(4, 3, 5, 2), images(4, 3, 5, 2).to(memory_format=torch.channels_last)):
        torch.library.opcheck(torch.ops.rbn.forward.default, (x.requires_grad_(), *arguments))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("training", [True, False])
def test_gradients_and_gradients_of_gradients(options, training):
    layer = trained(RBN(3, dtype=torch.float64, track_running_stats=True, **options)).train(training)
    names = [name for name, _ in layer.named_parameters()]

    def function(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    inputs = [images(3, 3, 2, 2).requires_grad_(), *layer.parameters()]
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_third_derivatives():
    def third(layer, x):
        y = layer(x).sin().sum()
        for _ in range(3):
            (g,) = torch.autograd.grad(y, x, create_graph=True)
            y = g.square().sum()
        return y, layer.running_mean

    assert_same(*both(trained(RBN(3, dtype=torch.float64)), images(3, 3, 2, 2), third))


@pytest.mark.parametrize("layer", [RBN(4), IEBN(4), BNET(4)])
def test_the_whole_layer_compiles(layer):
    layer = trained(layer)
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="aot_eager")
    x = images(2, 4, 5, 3, dtype=torch.float32).requires_grad_()
    for _ in range(2):
        found, expected = forward_and_gradients(compiled, x), forward_and_gradients(layer, x)
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(compiled._orig_mod.state_dict(), layer.state_dict())


@pytest.mark.parametrize(
    "x",
    [
        images(2, 4, 5, 3).to(memory_format=torch.channels_last),
        images(2, 4, 3, 5, 2).to(memory_format=torch.channels_last_3d),
        images(2, 5, 4).transpose(1, 2),
        images(2, 4, 5, 6)[:, :, ::2, 1::3],
        images(1, 4, 5, 6).expand(3, 4, 5, 6),
        images(3, 4),
    ],
)
@pytest.mark.parametrize("transposed", [False, True])
def test_any_memory_format_of_input_and_gradient(x, transposed):
    def step(layer, x):
        y = layer(x)
        dy = images(*y.shape, seed=3)
        dy = dy.movedim(1, -1).contiguous().movedim(-1, 1) if transposed else dy
        return y, *torch.autograd.grad(y, [x, *layer.parameters()], dy)

    found, expected = both(trained(RBN(4, dtype=torch.float64)), x, step)
    assert_same(found, expected)
    assert found[0].stride() == expected[0].stride()


def test_only_what_is_asked_for_has_a_gradient():
    layer = trained(RBN(4))
    layer.weight.requires_grad_(False)
    layer(images(2, 4, 3, 3, dtype=torch.float32)).sum().backward()
    assert {name for name, p in layer.named_parameters() if p.grad is not None} == {
        "bias", "center_weight", "scale_weight", "scale_bias"
    }  # fmt: skip
    layer.requires_grad_(False)
    assert not layer(images(2, 4, 3, 3, dtype=torch.float32)).requires_grad


def test_evaluation_before_a_training_step_keeps_its_gradient():
    def step(layer, x):
        y = layer.eval()(x)
        layer.train()(x)  # changes the running statistics that y was made with
        return torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])

    assert_same(*both(trained(RBN(4, dtype=torch.float64)), images(2, 4, 3, 3), step))


@pytest.mark.parametrize("momentum", [0.1, 0.7, 1.0, 0.0, 1, None])
@pytest.mark.parametrize("running_var", ["unbiased", "biased"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("statistics", [torch.float32, torch.float64])
def test_running_statistics(momentum, running_var, dtype, statistics):
    layer = trained(RBN(4, momentum=momentum, running_var=running_var, dtype=statistics))
    for change in (lambda old: old, lambda old: torch.stack([old, old], dim=1)[:, 0]):  # one with gaps
        layer.running_mean = change(layer.running_mean)
        other, x = plain(layer), images(3, 4, 5, 5, dtype=dtype)
        for _ in range(2):
            layer(x), other(x)
        unit = torch.finfo(torch.promote_types(dtype, statistics)).eps if dtype is statistics else 2**-23
        torch.testing.assert_close(layer.state_dict(), other.state_dict(), rtol=8 * unit, atol=8 * unit)


def test_autograd_knows_that_the_running_statistics_have_changed():
    layer = RBN(4)
    square = layer.running_mean.requires_grad_().square()
    layer.running_mean.requires_grad_(False)
    layer(images(2, 4, 3, 3, dtype=torch.float32))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.sum().backward()


@pytest.mark.parametrize("training", [True, False])
def test_what_a_step_makes_lies_where_the_input_lies(training):
    layer, x = trained(RBN(4)).train(training), images(2, 4, 3, 3, dtype=torch.float32).requires_grad_()
    with torch.device("meta"):  # where tensors are made by default
        y = layer(x)
        y.sum().backward()
    assert {tensor.device.type for tensor in (y, x.grad, layer.weight.grad, layer.running_mean)} == {"cpu"}


def test_evaluation_with_and_without_gradients_is_the_same():
    layer = trained(RBN(4)).eval()
    for x in (images(2, 4, 3, 3, dtype=torch.float32), images(2, 4, 40, 30, dtype=torch.bfloat16)):
        for given in (x, x.to(memory_format=torch.channels_last)):
            with torch.no_grad():
                alone = layer(given)
            assert torch.equal(alone, layer(given).detach())


def test_a_changed_input_is_refused_in_the_backward_pass():
    x = images(2, 4, 3, 3).requires_grad_()
    layer = RBN(4, dtype=torch.float64)
    inside = x * 1
    y = layer(inside)
    inside.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_transforms_of_functions():
    layer = trained(RBN(3, dtype=torch.float64)).eval()
    x = images(4, 3, 2, 2)
    tangent = images(4, 3, 2, 2, seed=2)
    for function in (
        lambda f: torch.func.grad(lambda x: f(x).square().sum())(x),
        lambda f: torch.func.hessian(lambda x: f(x).square().sum())(x[:1, :, :1, :1]),
        lambda f: torch.func.jvp(f, (x,), (tangent,)),
        lambda f: torch.func.vmap(lambda one: f(one[None])[0])(x),
        lambda f: torch.autograd.functional.jvp(f, x, tangent),
    ):
        assert_same(function(layer), function(plain(layer)))


def test_forward_mode():
    layer, x = trained(RBN(3, dtype=torch.float64)), images(4, 3, 2, 2)
    tangent = images(4, 3, 2, 2, seed=2)

    def step(layer, x):
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x.detach(), tangent)
            return torch.autograd.forward_ad.unpack_dual(layer(dual)).tangent

    assert_same(*both(layer, x, step))


def test_an_exported_program_needs_nothing_of_this_package():
    x = images(2, 3, 4, 4, dtype=torch.float32)
    layer = trained(RBN(3)).eval()
    program = torch.export.export(layer, (x,))
    assert not any("rbn" in str(node.target) for node in program.graph.nodes if node.op == "call_function")
    torch.testing.assert_close(program.module()(x), layer(x))


@pytest.mark.parametrize("gradients", [True, False])
def test_a_profile_names_the_operators(gradients):
    layer, x = RBN(3), torch.randn(4, 3, 5, 5, requires_grad=gradients)
    with torch.set_grad_enabled(gradients), torch.profiler.profile() as profile:
        y = layer(x)
        if gradients:
            y.sum().backward()
    names = {event.name for event in profile.events()}
    assert names >= ({"rbn::forward", "rbn::backward"} if gradients else {"rbn::forward"})


@pytest.mark.filterwarnings("ignore:`torch.jit.trace")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("gradients", [True, False])
def test_a_trace_knows_the_operator(gradients):
    layer = trained(RBN(3)).eval()
    x, other = torch.randn(2, 4, 3, 5, 5)
    with torch.set_grad_enabled(gradients):
        traced = torch.jit.trace(layer, x)
        torch.testing.assert_close(traced(other), layer(other))


def test_autocast_and_half_precision_layers():
    x = images(2, 4, 5, 5, dtype=torch.bfloat16)
    for layer in (trained(RBN(4)), trained(RBN(4)).bfloat16(), trained(BNET(4)).bfloat16()):
        found, expected = both(layer, x, forward_and_gradients)
        assert [value.dtype for value in found] == [value.dtype for value in expected]
        torch.testing.assert_close(found, expected, rtol=2**-6, atol=2**-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert RBN(4)(x).dtype == torch.bfloat16


def test_the_number_of_threads_changes_nothing():
    layer, x = trained(RBN(5)), images(3, 5, 40, 40, dtype=torch.float32).requires_grad_()
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            found.append(forward_and_gradients(layer, x))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


def test_several_threads_at_once():
    layer = trained(RBN(8)).eval()
    inputs = [images(4, 8, 30, 30, dtype=torch.float32, seed=seed).requires_grad_() for seed in range(4)]
    expected = [forward_and_gradients(layer, x) for x in inputs]
    found = {}

    def work(number):
        for _ in range(10):
            found[number] = forward_and_gradients(layer, inputs[number])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, one in enumerate(expected):
        assert all(torch.equal(a, b) for a, b in zip(one, found[number], strict=True))
