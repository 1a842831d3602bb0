"""How many steps a run has, and the learning rate of each: the same numbers in every framework."""

from __future__ import annotations

import math

from rbn.training.preset import Preset


def total_steps(preset: Preset, steps_per_epoch: int) -> int:
    """After how many steps a run ends."""
    return preset.steps or preset.epochs * steps_per_epoch


def learning_rate(preset: Preset, step: int, steps_per_epoch: int) -> float:
    """The learning rate of a step.

    With the highest rate L, w steps of warm-up and T in all, it is L (step + 1) / w in the warm-up, and then

        step      L factor^k, with k the number of milestones, in epochs, that have begun
        cosine    L (1 + cos(pi (step - w) / (T - w))) / 2

        learning_rate(read_preset("rbn-imagenet"), 30 * 5004, 5004)     # 0.01

    Args:
        preset: The run.
        step: The step, from 0.
        steps_per_epoch: The steps of an epoch.
    """
    warmup = round(preset.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return preset.learning_rate * (step + 1) / warmup
    if preset.schedule == "step":
        passed = sum(step >= round(epoch * steps_per_epoch) for epoch in preset.milestones)
        return preset.learning_rate * preset.factor**passed
    total = total_steps(preset, steps_per_epoch)
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return preset.learning_rate * (1 + math.cos(math.pi * progress)) / 2
