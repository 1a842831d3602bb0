import torch

layer = torch.nn.BatchNorm1d(3)
try:
    layer(torch.ones(1, 3))
except ValueError:
    print("refused; num_batches_tracked is", layer.num_batches_tracked.item())
