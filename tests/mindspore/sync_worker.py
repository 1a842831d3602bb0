"""One process of tests/mindspore/test_distributed.py: its share of a batch, held to the whole batch."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, ops
from mindspore.communication import get_rank, init

from rbn.backends.mindspore import BNET, IEBN, RBN, from_numpy, to_numpy
from rbn_core import RBNValueError

LAYERS = {
    "RBN": lambda **options: RBN(5, **options),
    "RBN*": lambda **options: RBN(5, scaling="channel_std", centering="channel_std", **options),
    "spatial": lambda **options: RBN(5, scaling="spatial_mean", centering="spatial_std", **options),
    "IEBN": lambda **options: IEBN(5, momentum=None, data_format="NHWC", **options),
    "BNET": lambda **options: BNET(5, **options),
    "float64": lambda **options: RBN(5, dtype=ms.float64, **options),
    "groups": lambda **options: RBN(
        5, **options, **({"process_groups": [[1, 0]]} if "sync" in options else {})
    ),
}
COMPILED = ("RBN", "BNET", "float64")
SHARES = ((3, 1), (0, 4), (4, 0))
TOLERANCES = {ms.float32: 1e-6, ms.float64: 1e-14}


def main() -> None:
    init()
    ms.set_seed(0)  # BNET starts at random: the same on both processes
    for name, make in LAYERS.items():  # in MindSpore's operations, as the shared ones: its exp is off by 1e-6
        compare(name, make(fused=False).set_train(), make(sync=True).set_train(), ms.PYNATIVE_MODE, SHARES)
    for name in COMPILED:
        make = LAYERS[name]
        shares = SHARES[:1] * 3  # no empty one
        compare(
            f"compiled {name}",
            make(fused=False).set_train(),
            make(sync=True).set_train(),
            ms.GRAPH_MODE,
            shares,
        )
    alone, local = RBN(5).set_train(), RBN(5, sync=True, process_groups=[[0], [1]]).set_train()
    x = Tensor(np.random.default_rng(get_rank()).normal(size=(2, 5, 4, 3)).astype(np.float32))
    close("a group of one", local(x), alone(x), 0)
    refuse_too_little(compiled=False)
    ms.set_context(mode=ms.GRAPH_MODE)
    refuse_too_little(compiled=True)


def compare(what, whole, shared, mode, shares) -> None:
    rng = np.random.default_rng(0)
    state = {name: value + 0.3 * rng.random(value.shape) for name, value in to_numpy(whole).items()}
    from_numpy(whole, state | {"num_batches_tracked": np.array(0)})
    from_numpy(shared, state | {"num_batches_tracked": np.array(0)})
    dtype = whole.trainable_params()[0].dtype
    tolerance = TOLERANCES[dtype]
    for sizes in shares:
        of_input = sizes != SHARES[2]  # the first layer of a network gives its input no gradient
        shape = (4, 4, 3, 5) if whole.data_format == "NHWC" else (4, 5, 4, 3)
        x, cotangent = (rng.normal(size=shape) for _ in range(2))
        mine = slice(sum(sizes[: get_rank()]), sum(sizes[: get_rank() + 1]))
        y, dx, gradients = step(whole, Tensor(x, dtype), Tensor(cotangent, dtype), of_input)
        ms.set_context(mode=mode)
        y_mine, dx_mine, own_gradients = step(
            shared, Tensor(x[mine], dtype), Tensor(cotangent[mine], dtype), of_input
        )
        ms.set_context(mode=ms.PYNATIVE_MODE)
        close(f"{what}: y", y_mine, y.asnumpy()[mine], tolerance)
        if of_input:
            close(f"{what}: dx", dx_mine, dx.asnumpy()[mine], tolerance)
        for parameter, expected, part in zip(whole.trainable_params(), gradients, own_gradients, strict=True):
            close(f"{what}: d {parameter.name}", total(part), expected, tolerance)
        for key, value in to_numpy(whole).items():
            close(f"{what}: {key}", to_numpy(shared)[key], value, tolerance)


def step(layer, x, cotangent, of_input):
    def loss(x):
        y = layer(x)
        return (y * cotangent).sum(), y

    gradient = ms.value_and_grad(loss, 0 if of_input else None, layer.trainable_params(), has_aux=True)
    (_, y), gradients = gradient(x)
    return (y, *gradients) if of_input else (y, None, gradients)


def total(part):
    """The sum over both processes in the dtype, of which MindSpore's own knows float32 at most."""
    high = part.astype(ms.float32)
    low = (part - high.astype(part.dtype)).astype(ms.float32)
    return ops.sum(ops.AllGather()(ops.stack((high, low))).astype(part.dtype), 0)


def refuse_too_little(*, compiled) -> None:
    layer = RBN(5, sync=True).set_train()
    before = to_numpy(layer)
    inputs = [np.zeros((0, 5, 4, 3))]
    if not compiled:  # a graph does not know how little the others have, and refuses every empty share
        inputs.append(np.zeros((1 if get_rank() == 0 else 0, 5, 1, 1)))
    for x in inputs:
        with pytest.raises(RBNValueError, match="RBN: expected"):
            layer(Tensor(x, ms.float32))
    for key, value in to_numpy(layer).items():
        np.testing.assert_array_equal(value, before[key], key)


def close(what, actual, expected, tolerance) -> None:
    actual, expected = (np.asarray(a.asnumpy() if isinstance(a, Tensor) else a) for a in (actual, expected))
    assert actual.shape == expected.shape, what
    scale = max(1.0, np.abs(expected).max()) if expected.size else 1.0
    error = np.abs(actual - expected).max() if expected.size else 0.0
    assert error <= tolerance * scale, f"rank {get_rank()}, {what}: off by {error:.1e} of {scale:.1e}"


if __name__ == "__main__":
    main()
