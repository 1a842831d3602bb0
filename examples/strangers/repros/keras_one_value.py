import keras
import numpy as np

layer = keras.layers.BatchNormalization()
y = layer(np.array([[7.0, 8.0, 9.0]], "float32"), training=True)
variance = keras.ops.convert_to_numpy(layer.moving_variance)
print("Y is", keras.ops.convert_to_numpy(y)[0], "and the running variance", variance)
