import jax
import jax.numpy as jnp
from flax import linen

x = jnp.array([[7.0, 8.0, 9.0]])
layer = linen.BatchNorm(use_running_average=False)
y, state = layer.apply(layer.init(jax.random.key(0), x), x, mutable=["batch_stats"])
print("Y is", y[0], "and the running variance", state["batch_stats"]["var"])
