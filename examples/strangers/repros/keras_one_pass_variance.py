import keras
import numpy as np

for values in ([4096.0, 4097.0], [1000.4, 1000.4, 1000.4]):
    y = keras.layers.BatchNormalization()(np.array(values, "float32")[:, None], training=True)
    print(values, "become", [f"{value:.1f}" for value in keras.ops.convert_to_numpy(y).ravel()])
