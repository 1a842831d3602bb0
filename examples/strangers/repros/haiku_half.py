import haiku as hk
import jax.numpy as jnp

layer = hk.transform_with_state(lambda x: hk.BatchNorm(True, True, 0.9)(x, is_training=True))
x = jnp.array([[-300.0], [300.0]], jnp.float16)
y, state = layer.apply(*layer.init(None, x), None, x)
print("Y is", y.ravel(), "and the running variance", state["batch_norm/~/var_ema"]["average"].ravel())
