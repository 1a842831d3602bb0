import jittor as jt
import numpy as np

x = np.random.default_rng(0).normal(size=(3, 4, 2, 3))
x[0, 0, 0, 0] = np.nan
for dtype in ("float32", "float64"):
    layer = jt.nn.BatchNorm(4)
    layer(jt.array(x, dtype=dtype))
    mean, variance = layer.running_mean.numpy(), layer.running_var.numpy()
    print(f"{dtype}: of channel 0 the running mean is {mean[0]:.2f}, the running variance {variance[0]:.2f}")
