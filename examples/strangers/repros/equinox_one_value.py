import equinox as eqx
import jax
import jax.numpy as jnp

layer, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(3, "batch", mode="batch")
train = jax.vmap(layer, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
y, state = train(jnp.array([[7.0, 8.0, 9.0]]), state)
print("Y is", y[0], "and the running variance", state.get(layer.batch_state_index)[1])
