"""Layers where they are used: one twice in a step, a frozen one in between, and not all of them trained."""

import copy
import importlib
import inspect
from contextlib import nullcontext

import numpy as np
import pytest

from rbn_core import Config
from rbn_core.names import NAMES, PARAMETERS
from rbn_core.reference import Layer

SHAPE = (3, 4, 2, 3)
SHARED = Config(4, momentum=0.8)
FROZEN = Config(4, scaling="channel_std")
UNTRAINED = ("center_weight", "gamma")
"""What of the shared layer needs no gradient where not all does."""


def start(config, seed):
    """What a layer stores after a while: no value at which a mistake could hide."""
    rng = np.random.default_rng(seed)
    state = {name: rng.uniform(0.5, 1.5, shape) for name, shape in config.state_shapes().items()}
    return state | {"num_batches_tracked": np.array(5)}


STATES = start(SHARED, 0), start(FROZEN, 1)
X, COTANGENT = np.random.default_rng(2).normal(1.0, 2.0, (2, *SHAPE))


def reference():
    """By hand: the shared layer as two, of which the second goes on where the first ended."""
    first, frozen = Layer(SHARED), Layer(FROZEN)
    first.load(STATES[0])
    frozen.load(STATES[1])
    y = frozen.forward(first.forward(X, training=True), training=False)
    second = copy.deepcopy(first)
    y = second.forward(y, training=True)
    dx, late = second.backward(COTANGENT)
    dx, of_frozen = frozen.backward(dx)
    dx, early = first.backward(dx)
    return {
        "y": y,
        "dx": dx,
        "shared": {name: early[name] + late[name] for name in early},
        "frozen": of_frozen,
        "states": (second.state(), frozen.state()),
    }


def in_torch(everything, options):
    import torch

    from rbn.backends.torch import RBN, from_numpy, to_numpy

    shared = RBN(4, momentum=0.2, dtype=torch.float64, **options)
    frozen = RBN(4, scaling="channel_std", dtype=torch.float64, **options)
    for layer, state in zip((shared, frozen), STATES, strict=True):
        from_numpy(layer, state)
    frozen.eval()
    x = torch.tensor(X, requires_grad=everything)
    for name in () if everything else UNTRAINED:
        getattr(shared, NAMES["torch"][name]).requires_grad_(False)
    y = shared(frozen(shared(x)))
    y.backward(torch.tensor(COTANGENT))
    gradients = [
        {
            name: getattr(layer, own).grad
            for name, own in NAMES["torch"].items()
            if getattr(getattr(layer, own, None), "grad", None) is not None
        }
        for layer in (shared, frozen)
    ]
    return y.detach(), x.grad, *gradients, (to_numpy(shared), to_numpy(frozen))


def in_flax(everything, options):
    import jax
    import jax.numpy as jnp

    from rbn.backends.flax import RBN, from_numpy, to_numpy

    shared = RBN(use_running_average=False, momentum=0.8, axis=1, param_dtype=jnp.float64, **options)
    frozen = RBN(use_running_average=True, scaling="channel_std", axis=1, param_dtype=jnp.float64, **options)
    stored, fixed = (
        from_numpy(layer, state)[0] for layer, state in zip((shared, frozen), STATES, strict=True)
    )
    names = {own.removeprefix("params/"): name for name, own in NAMES["flax"].items()}
    learned = {
        own: value for own, value in stored["params"].items() if everything or names[own] not in UNTRAINED
    }

    def loss(learned, of_frozen, x):
        variables = stored | {"params": stored["params"] | learned}
        y, stats = shared.apply(variables, x, mutable=["batch_stats"])
        y = frozen.apply(fixed | {"params": of_frozen}, y)
        y, stats = shared.apply(variables | stats, y, mutable=["batch_stats"])
        return (y * COTANGENT).sum(), (y, stats)

    arguments = (0, 1, 2) if everything else (0, 1)
    differentiate = jax.value_and_grad(loss, arguments, has_aux=True)
    (_, (y, stats)), (first, second, *dx) = differentiate(learned, fixed["params"], jnp.asarray(X))
    gradients = [{names[own]: value for own, value in found.items()} for found in (first, second)]
    return y, dx[0] if dx else None, *gradients, (to_numpy(stored | stats), to_numpy(fixed))


def in_mindspore(everything, options):
    import mindspore as ms
    from mindspore import Tensor

    from rbn.backends.mindspore import RBN, from_numpy, to_numpy

    shared = RBN(4, momentum=0.8, dtype=ms.float64, **options).set_train()
    frozen = RBN(4, scaling="channel_std", dtype=ms.float64, **options)
    for layer, state in zip((shared, frozen), STATES, strict=True):
        from_numpy(layer, state)
    for name in () if everything else UNTRAINED:
        getattr(shared, NAMES["mindspore"][name]).requires_grad = False

    def loss(x):
        y = shared(frozen(shared(x)))
        return (y * Tensor(COTANGENT)).sum(), y

    weights = [*shared.trainable_params(), *frozen.trainable_params()]
    differentiate = ms.value_and_grad(loss, 0 if everything else None, weights, has_aux=True)
    (_, y), found = differentiate(Tensor(X))
    dx, found = found if everything else (None, found)
    found = {id(weight): gradient for weight, gradient in zip(weights, found, strict=True)}
    gradients = [
        {
            name: found[id(getattr(layer, own))].asnumpy()
            for name, own in NAMES["mindspore"].items()
            if id(getattr(layer, own, None)) in found
        }
        for layer in (shared, frozen)
    ]
    dx = None if dx is None else dx.asnumpy()
    return y.asnumpy(), dx, *gradients, (to_numpy(shared), to_numpy(frozen))


def in_jittor(everything, options):
    from rbn.backends.jittor import RBN, from_numpy, to_numpy

    # After the backend, which prepares what Jittor reads at its import.
    # isort: split
    import jittor as jt

    shared, frozen = RBN(4, momentum=0.2, **options), RBN(4, scaling="channel_std", **options)
    for layer, state in zip((shared, frozen), STATES, strict=True):
        layer.float64()
        from_numpy(layer, state)
    frozen.is_train = False  # eval() would also stop the gradients of its parameters
    for name in () if everything else UNTRAINED:
        getattr(shared, NAMES["jittor"][name]).stop_grad()
    x = jt.array(X, dtype="float64")
    y = shared(frozen(shared(x)))
    places = [
        (index, name, getattr(layer, NAMES["jittor"][name]))
        for index, layer in enumerate((shared, frozen))
        for name in layer_parameters(layer)
    ]
    loss = (y * jt.array(COTANGENT, dtype="float64")).sum()
    found = jt.grad(loss, [*(place[2] for place in places), *([x] if everything else [])])
    gradients = [{}, {}]
    for (index, name, _), gradient in zip(places, found, strict=False):
        gradients[index][name] = gradient.numpy()
    dx = found[-1].numpy() if everything else None
    return y.numpy(), dx, *gradients, (to_numpy(shared), to_numpy(frozen))


def layer_parameters(layer):
    """What of a Jittor layer needs a gradient."""
    stored = layer.state_dict()
    own = {name: NAMES["jittor"][name] for name in PARAMETERS}
    return [name for name in PARAMETERS if own[name] in stored and not stored[own[name]].is_stop_grad()]


STEPS = {"torch": in_torch, "flax": in_flax, "mindspore": in_mindspore, "jittor": in_jittor}


@pytest.mark.framework(*STEPS)
@pytest.mark.parametrize("everything", [True, False], ids=["everything", "not all"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
def test_a_step_is_what_the_reference_does_by_hand(request, everything, fused):
    framework = request.config.option.framework
    layer = importlib.import_module(f"rbn.backends.{framework}").RBN
    options = {"fused": fused} if "fused" in inspect.signature(layer).parameters else {}
    double = nullcontext()
    if framework == "flax":
        from rbn.backends.flax.internals import enable_x64

        double = enable_x64()
    with double:
        y, dx, of_shared, of_frozen, states = STEPS[framework](everything, options)
    expected = reference()
    close(y, expected["y"])
    trained = {
        name: value for name, value in expected["shared"].items() if everything or name not in UNTRAINED
    }
    for found, due in ((of_shared, trained), (of_frozen, expected["frozen"])):
        assert found.keys() == due.keys()
        for name, value in due.items():
            close(found[name], value)
    if everything:
        close(dx, expected["dx"])
    else:
        assert dx is None
    for found, due, before in zip(states, expected["states"], STATES, strict=True):
        for name, value in due.items():
            close(found[name], value)
            if due is expected["states"][1]:
                np.testing.assert_array_equal(found[name], before[name])


def close(actual, expected):
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=1e-9, atol=1e-9)
