import jittor as jt
import numpy as np

layer = jt.nn.BatchNorm(1, momentum=0.1)
layer.float64()
layer(jt.array(np.array([[1.0], [3.0]]), dtype="float64"))
mean = layer.running_mean
print(f"the running mean is {mean.dtype}, and off by {abs(mean.numpy()[0] - 0.2):.0e}")
