"""What JAX does not promise to keep may go: the layers are slower, say so once, and give the same numbers."""

import subprocess
import sys
import textwrap
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from rbn import kernels
from rbn.backends.flax import RBN, fused, internals
from rbn_core.errors import RBNWarning

pytestmark = pytest.mark.skipif(not fused.AVAILABLE, reason=kernels.problem() or "without custom calls")

PROGRAM = textwrap.dedent("""
    import importlib, sys, warnings
    import jax, jax.numpy as jnp, numpy as np
    from flax import nnx

    for name in sys.argv[1:]:
        module, _, last = name.rpartition(".")
        delattr(importlib.import_module(module), last)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        import rbn.backends.flax as flax
        from rbn.backends.flax import fused
        from rbn_core import RBN
        from rbn_core.errors import RBNWarning

        rng = np.random.default_rng(0)
        x = np.moveaxis(rng.normal(size=(2, 3, 4, 4)), 1, -1).astype(np.float32)
        module = flax.nnx.RBN(3, rngs=nnx.Rngs(0))
        state = {name: rng.uniform(0.5, 1, value.shape) for name, value in flax.to_numpy(module).items()}
        state["num_batches_tracked"] = np.array(0)
        layer = flax.RBN()
        variables, _ = flax.from_numpy(layer, state)

        @jax.jit
        def step(variables, x):
            def loss(x):
                y, stats = layer.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
                return (y * jnp.cos(x)).sum(), (y, stats)

            return jax.grad(loss, has_aux=True)(x)

        dx, (y, stats) = step(variables, x)
    reference = RBN(3)
    reference.load(state)
    first = np.moveaxis(x, -1, 1)
    due = reference.forward(first, True)
    np.testing.assert_allclose(np.moveaxis(y, -1, 1), due, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(stats["batch_stats"]["var"], reference.state()["running_var"], rtol=1e-5)
    assert np.isfinite(dx).all()
    slower = [str(each.message) for each in heard if issubclass(each.category, RBNWarning)]
    print(fused.AVAILABLE, step.lower(variables, x).as_text().count("@rbn_xla"), len(slower), slower)
""")


def without(*names: str) -> str:
    finished = subprocess.run(
        [sys.executable, "-c", PROGRAM, *names], capture_output=True, text=True, timeout=240
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    return finished.stdout.splitlines()[-1]


@pytest.mark.parametrize("name", ["", *internals.NAMES])
def test_a_name_may_go(name: str) -> None:
    found = without(*filter(None, [name]))
    if name:
        assert found.startswith("False 0 1 ")
        assert f"expected JAX to have {name}" in found
    else:
        assert found == "True 2 0 []"


@pytest.mark.parametrize("name", ["DEVICES", "EXPORTED", "MANUAL_AXES", "SHARDING"])
def test_an_attribute_may_go(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = ("gone",) if name == "MANUAL_AXES" else "module_context.gone"
    monkeypatch.setattr(internals, name, gone)
    internals.warn_slower.cache_clear()
    layer, x = RBN(use_running_average=True), jnp.cos(jnp.arange(96.0)).reshape(2, 4, 4, 3)
    variables = RBN(use_running_average=True, fused=False).init(jax.random.key(0), x)
    with pytest.warns(RBNWarning, match="slower") as heard:
        program = jax.jit(lambda x: layer.apply(variables, x)).lower(x)
    assert len(heard) == 1
    assert "@rbn_xla" not in program.as_text()
    internals.warn_slower.cache_clear()


def test_operations_that_cannot_be_made_leave_the_plain_ones() -> None:
    internals.warn_slower.cache_clear()
    with pytest.warns(RBNWarning, match="expected JAX to have .*def_impl"):
        assert internals.built(lambda: SimpleNamespace().def_impl) is None
    internals.warn_slower.cache_clear()
