"""The optimizer and its learning rates: the 1x and 2x schedules of Detectron and mmdetection."""

from options import Options
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import ChainedScheduler, LinearLR, LRScheduler, MultiStepLR

EPOCHS = {"1x": 12, "2x": 24}
DECAYS = {"1x": (8, 11), "2x": (16, 22)}
"""After how many epochs the learning rate is divided by 10."""
RATES = {"faster_rcnn": 0.02, "mask_rcnn": 0.02, "retinanet": 0.01}
"""For 16 images in a step; for other numbers in proportion."""
WARM_UP, FIRST = 500, 1e-3
"""The steps in which the learning rate grows, at most an epoch, and the part of it that it starts from."""


def optimizer_and_schedule(
    model: nn.Module, options: Options, steps_per_epoch: int
) -> tuple[SGD, LRScheduler]:
    """SGD with a momentum of 0.9 and a weight decay of 1e-4 on all parameters; the schedule goes by steps."""
    rate = options.learning_rate or RATES[options.detector] * options.batch_size / 16
    optimizer = SGD(model.parameters(), rate, momentum=0.9, weight_decay=1e-4)
    warm_up = LinearLR(optimizer, FIRST, total_iters=min(WARM_UP, steps_per_epoch))
    decays = MultiStepLR(optimizer, [steps_per_epoch * epoch for epoch in DECAYS[options.schedule]], 0.1)
    return optimizer, ChainedScheduler([warm_up, decays])
