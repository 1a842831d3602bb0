import haiku as hk
import jax.numpy as jnp

layer = hk.transform_with_state(lambda x: hk.BatchNorm(True, True, 0.9)(x, is_training=True))
for values in ([4096.0, 4097.0], [1000.4, 1000.4, 1000.4]):
    x = jnp.array(values)[:, None]
    y, _ = layer.apply(*layer.init(None, x), None, x)
    print(values, "become", [f"{value:.0f}" for value in y.ravel()])
