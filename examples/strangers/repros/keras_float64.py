import keras
import numpy as np

if keras.backend.backend() == "jax":
    import jax

    jax.config.update("jax_enable_x64", True)
layer = keras.layers.BatchNormalization(dtype="float64", epsilon=1.0)
y = keras.ops.convert_to_numpy(layer(np.array([[0.0], [1.4]]), training=True))
print(y.dtype, f"and off by {abs(y[1, 0] - 0.7 / 1.49**0.5):.0e}")
