"""After an exception inside of a gradient a layer goes on as a new one that was given the same steps."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad

from rbn.backends.torch import BNET, IEBN, RBN
from rbn_core.errors import RBNValueError

LAYERS = {
    "rbn": lambda: RBN(3),
    "plain": lambda: RBN(3, fused=False),
    "iebn": lambda: IEBN(3),
    "bnet": lambda: BNET(3),
    "spatial": lambda: RBN(3, scaling="spatial_std", momentum=None),
}


class Interrupted(BaseException):
    """What a user's Ctrl+C raises, under a name of its own: pytest ends at a KeyboardInterrupt."""


def images(channels=3):
    return torch.randn(4, channels, 5, 5, generator=torch.Generator().manual_seed(channels)) * 2 + 3


def right(layer, call, x):
    return call(x)


def refused(layer, call, x):
    return call(images(2))


def own_mistake(layer, call, x):
    call(x)
    raise ValueError("the user's own")


def interrupted_forward(layer, call, x):
    hook = layer.register_forward_hook(interrupt)
    try:
        return call(x)
    finally:
        hook.remove()


def interrupted_backward(layer, call, x):
    y = call(x)
    y.register_hook(interrupt)
    return y


def interrupt(*_):
    raise Interrupted


FAILURES = {
    refused: (RBNValueError, False),
    own_mistake: (ValueError, True),
    interrupted_forward: (Interrupted, True),
    interrupted_backward: (Interrupted, True),
}
"""What goes wrong, what is raised then, and whether the batch was counted before."""


def backward(layer, run, x, call=None):
    x = x.clone().requires_grad_()
    run(layer, call or layer, x).pow(3).sum().backward()
    return x.grad, *(parameter.grad for parameter in layer.parameters())


def autograd_grad(layer, run, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(run(layer, layer, x).pow(3).sum(), (x, *layer.parameters()))


def func_grad(layer, run, x):
    def loss(parameters, x, statistics):
        return run(layer, lambda x: functional_call(layer, parameters | statistics, (x,)), x).pow(3).sum()

    parameters = {name: value.detach() for name, value in layer.named_parameters()}
    gradients, dx = grad(loss, (0, 1))(parameters, x, dict(layer.named_buffers()))
    return dx, *gradients.values()


def compiled(layer, run, x):
    function = torch.compile(layer, backend="aot_eager")
    return backward(layer, run, x, lambda x: function(x))


def state(layer):
    return {name: value.clone() for name, value in layer.state_dict().items()}


def assert_equal(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


# A network that was refused is compiled in parts from then on, and PyTorch looks at what is between them.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("way", [backward, autograd_grad, func_grad, compiled])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_goes_on_after_an_exception(name, way, failure):
    torch._dynamo.reset()
    raised, counted = FAILURES[failure]
    layer, norm = LAYERS[name](), nn.BatchNorm2d(3)
    fresh = copy.deepcopy(layer)
    for each in (layer, norm):
        with pytest.raises(RuntimeError if failure is refused and each is norm else raised):
            way(each, failure, images())
        each.zero_grad()
    if counted:
        fresh(images())
        other = nn.BatchNorm2d(3)
        other(images())
        assert torch.equal(norm.running_mean, other.running_mean)
    assert_equal(state(layer).values(), state(fresh).values())

    x = images().flip(0) + 1
    assert_equal(way(layer, right, x), way(fresh, right, x))
    assert_equal(state(layer).values(), state(fresh).values())
