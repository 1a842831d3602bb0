import equinox as eqx
import jax
import jax.numpy as jnp

x = jnp.array([[-300.0], [300.0]], jnp.float16)
layer, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(1, "batch", mode="batch")
y, state = jax.vmap(layer, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(x, state)
print("Y is", y.ravel(), "and the running variance", state.get(layer.batch_state_index)[1])
