"""More than 2^31 values behind a statistic, by arithmetic and by shapes: no count may be an int32."""

import numpy as np
import pytest

from rbn_core.config import Config
from rbn_core.reference import Layer

VALUES = 2**33
SHAPE = (2**9, 2, 2**12, 2**12)
EXPECTED = 0.9 * 1.0 + 0.1 * 2.0 * (VALUES / (VALUES - 1))
"""The running variance, from 1, after a batch of variance 2."""


def after_a_large_batch(framework):
    """The running variance that a layer accumulates, and the shape of Y where it can be told."""
    mean, var = np.zeros(2), np.full(2, 2.0)
    if framework == "reference":
        layer = Layer(Config(2))
        layer.accumulate(mean, var, VALUES)
        return layer.state()["running_var"], None
    if framework == "torch":
        import torch

        from rbn.backends.torch import RBN, functional

        running = torch.zeros(2), torch.ones(2)
        functional.accumulate(running, torch.tensor(mean), torch.tensor(var), 0.1, values=VALUES)
        shape = RBN(2, device="meta")(torch.empty(SHAPE, device="meta")).shape
        return running[1].numpy(), tuple(shape)
    if framework == "flax":
        import jax
        import jax.numpy as jnp

        from rbn.backends.flax import RBN, functional

        x = jax.ShapeDtypeStruct((SHAPE[0], *SHAPE[2:], SHAPE[1]), jnp.float32)
        layer = RBN(use_running_average=False)
        y, _ = jax.eval_shape(lambda x: layer.init_with_output(jax.random.key(0), x), x)
        running = jnp.zeros(2), jnp.ones(2)
        _, running_var = functional.accumulate(running, mean, var, 0.1, values=VALUES)
        return np.asarray(running_var), (y.shape[0], y.shape[3], *y.shape[1:3])
    if framework == "mindspore":
        import mindspore as ms

        from rbn.backends.mindspore import functional

        batch = (ms.Tensor(mean, ms.float32), ms.Tensor(var, ms.float32))
        running = (ms.Parameter(ms.ops.zeros(2)), ms.Parameter(ms.ops.ones(2)))
        functional.accumulate(running, *batch, 0.1, values=VALUES)
        return running[1].asnumpy(), None
    from rbn.backends.jittor import functional

    # After the backend, which prepares what Jittor reads at its import.
    # isort: split
    import jittor as jt

    running = jt.zeros(2), jt.ones(2)
    functional.accumulate(running, jt.array(mean), jt.array(var), 0.1, values=VALUES)
    return running[1].numpy(), None


def test_the_unbiased_variance_and_the_shape_of_a_large_batch_are_right(framework):
    running_var, shape = after_a_large_batch(framework)
    np.testing.assert_allclose(running_var, EXPECTED, rtol=1e-6)
    assert shape in (None, SHAPE)
    assert np.prod(SHAPE, dtype=object) > 2**31


@pytest.mark.parametrize("shape", [SHAPE, (2**40, 3)])
def test_a_large_input_is_counted_right(shape):
    from rbn_core.config import check_input

    check_input(shape, "float32", shape[1], training=True)
