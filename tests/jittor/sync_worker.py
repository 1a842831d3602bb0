"""One process of tests/jittor/test_distributed.py: its share of a batch, held to the whole batch.

The suite's own rows have the other layers and options: every one has kernels for Jittor to compile.
"""

import os
import traceback

import numpy as np
import pytest

from rbn.backends.jittor import IEBN, RBN, from_numpy, to_numpy

# After the backend, which prepares what Jittor reads at its import.
# isort: split
import jittor as jt
from jittor import nn

from rbn_core import RBNValueError
from rbn_core.names import PARAMETERS

SHARES = ((3, 1), (0, 4))
LAYERS = {
    "RBN": lambda sync: RBN(5, sync=sync),
    "IEBN": lambda sync: IEBN(5, momentum=None, sync=sync),
}


class Network(nn.Module):
    """Layers behind each other and beside each other."""

    def __init__(self, sync):
        self.first, self.second, self.beside = RBN(5, sync=sync), RBN(4, sync=sync), RBN(4, sync=sync)
        self.conv, self.projection = nn.Conv(5, 4, 3, padding=1), nn.Conv(5, 4, 1)

    def execute(self, x):
        return self.second(self.conv(nn.relu(self.first(x)))) + self.beside(self.projection(x))


def main():
    assert jt.world_size == 2
    for sizes in SHARES:
        mine = slice(sum(sizes[: jt.rank]), sum(sizes[: jt.rank + 1]))
        for name, make in LAYERS.items():
            check_layer(f"{sizes} {name}", make, sum(sizes), mine)
        check_network(f"{sizes} network", sum(sizes), mine)
    check_gradients_of_gradients()
    check_refusals()
    check_that_evaluation_waits_for_nobody()


def check_layer(name, make, images, mine):
    rng = np.random.default_rng(0)
    whole, shared = make(False), make(True)
    state = to_numpy(whole)
    for key in sorted(state.keys() & set(PARAMETERS)):
        state[key] = rng.normal(0.5, 0.3, state[key].shape)
    from_numpy(whole, state)
    from_numpy(shared, state)
    for _ in range(3):
        x, cotangent = rng.normal(size=(2, images, 5, 4, 3))
        y, (dx, *gradients) = step(shared, x[mine], cotangent[mine])
        expected, (whole_dx, *whole_gradients) = step(whole, x, cotangent)
        close(f"{name} y", y, expected[mine])
        close(f"{name} dx", dx, whole_dx[mine])
    for gradient, expected in zip(gradients, whole_gradients, strict=True):
        close(f"{name} d parameter", gradient.mpi_all_reduce("add"), expected)
    compare_states(name, shared, whole)


def step(layer, x, cotangent):
    x, cotangent = jt.array(x, dtype="float32"), jt.array(cotangent, dtype="float32")
    y = layer(x)
    return y, jt.grad((y * cotangent).sum(), [x, *trained(layer)])


def check_network(name, images, mine):
    rng = np.random.default_rng(1)
    whole, shared = Network(False), Network(True)
    whole.mpi_param_broadcast()
    shared.load_state_dict(whole.state_dict())
    batches = [(rng.normal(size=(images, 5, 4, 3)), rng.normal(size=(images, 4, 4, 3))) for _ in range(3)]
    train(whole, batches)
    # The optimizer takes the mean over the processes of what each has a share in.
    train(shared, [(x[mine], jt.world_size * cotangent[mine]) for x, cotangent in batches])
    compare_states(name, shared, whole)


def train(network, batches):
    jt.sync_all()  # Jittor's own collective operations have no order between two networks
    optimizer = nn.SGD(network.parameters(), 0.01)
    for x, cotangent in batches:
        loss = (network(jt.array(x, dtype="float32")) * jt.array(cotangent, dtype="float32")).sum()
        if jt.rank == 0:
            loss.item()  # executes on one process what is pending on the other
        optimizer.step(loss)


def check_gradients_of_gradients():
    rng = np.random.default_rng(2)
    whole, shared = RBN(2, sync=False, fused=False), RBN(2)
    whole.float64()
    shared.float64()
    values, cotangent, along = rng.normal(size=(3, 4, 2, 3, 3))
    mine = slice(0, 3) if jt.rank == 0 else slice(3, 4)

    def second(layer, part):
        x, g, d = (jt.array(array[part], dtype="float64") for array in (values, cotangent, along))
        dx = jt.grad((layer(x).sqr() * g).sum(), x)
        return jt.grad((dx * d).sum(), x)

    close("gradients of gradients", second(shared, mine), second(whole, slice(None))[mine])


def check_refusals():
    layer = RBN(5)
    before = to_numpy(layer)
    for shape in ((0, 5, 4, 3), (1 - jt.rank, 5, 1, 1)):
        with pytest.raises(RBNValueError):
            layer(jt.zeros(shape))
    for key, value in to_numpy(layer).items():
        np.testing.assert_array_equal(value, before[key])


def check_that_evaluation_waits_for_nobody():
    if jt.rank == 0:
        RBN(5).eval()(jt.ones((2, 5, 4))).sync()


def trained(layer):
    return [parameter for parameter in layer.parameters() if not parameter.is_stop_grad()]


def compare_states(name, actual, expected):
    expected = expected.state_dict()
    for key, value in actual.state_dict().items():
        close(f"{name} {key}", value, expected[key])


def close(what, actual, expected):
    actual, expected = actual.numpy().astype("float64"), expected.numpy().astype("float64")
    assert actual.shape == expected.shape, (what, actual.shape, expected.shape)
    error, scale = abs(actual - expected).max(initial=0), max(1, abs(expected).max(initial=0))
    assert error <= 1e-6 * scale, f"rank {jt.rank}, {what}: off by {error:.1e} of {scale:.1e}"


if __name__ == "__main__":
    try:
        main()
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # Jittor's exit would wait for the other process, and that for this one
