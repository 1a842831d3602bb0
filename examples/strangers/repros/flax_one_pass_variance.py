import jax
import jax.numpy as jnp
from flax import linen

x = jnp.array([[4096.0], [4097.0]])
for fast in (True, False):
    layer = linen.BatchNorm(use_running_average=False, use_fast_variance=fast)
    y, _ = layer.apply(layer.init(jax.random.key(0), x), x, mutable=["batch_stats"])
    print(f"use_fast_variance={fast}: Y is {y[0, 0]:.0f} and {y[1, 0]:.0f}")
