import equinox as eqx
import jax
import jax.numpy as jnp

x = jnp.array([[-1.0], [1.0]])
layer, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(1, "batch", mode="batch", momentum=0.0)
_, state = jax.vmap(layer, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(x, state)
print("the running variance of -1 and 1 is", state.get(layer.batch_state_index)[1])
