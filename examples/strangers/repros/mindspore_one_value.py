import numpy as np
from mindspore import Tensor, nn

layer = nn.BatchNorm1d(3).set_train()
layer(Tensor(np.ones((1, 3), "float32")))
print("the running variance is", layer.moving_variance.asnumpy())
