"""The loop: train for an epoch, save, evaluate."""

import csv
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import checkpoint
import coco
import detectors
import evaluation
import norms
import schedule
import showing
import torch
from options import Options
from processes import Processes
from rich.console import Console
from torch import nn

from rbn.backends.torch import convert_sync_rbn
from rbn.stopping import stopping

LAST, LOG = "last.pth", "log.csv"


def build(options: Options, num_classes: int, among: Processes, backbone: Path | None) -> nn.Module:
    """The detector of a run, with its layers."""
    torch.manual_seed(options.seed)
    model = detectors.build(options, num_classes)
    norms.place(model, options, backbone)
    if options.sync:
        if options.norm == "batch" and among.device.type != "cuda":
            raise SystemExit(
                "detection: expected a GPU for --sync with --norm batch, as for PyTorch's SyncBatchNorm, got "
                f"{among.device.type}. Leave --sync out; the other norms synchronise on every device."
            )
        convert_sync_rbn(model)
    return model.to(among.device)


@dataclass
class Run:
    """What changes from step to step, and is saved.

    Args:
        model: The detector.
        optimizer: Of its parameters.
        rates: The learning rates.
        step: How many steps are made.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    rates: torch.optim.lr_scheduler.LRScheduler
    step: int = 0

    def state(self) -> dict[str, Any]:
        """What goes on from here."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.rates.state_dict(),
            "step": self.step,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.rates.load_state_dict(state["schedule"])
        self.step = state["step"]


def train(options: Options, among: Processes, out: Path, workers: int, saved: dict[str, Any] | None) -> bool:
    """Train from the start, or from where a file stands.

    Args:
        options: The run.
        among: The processes.
        out: The run's folder.
        workers: How many processes read images for each.
        saved: What `checkpoint.load` gave, if the run goes on.

    Returns:
        Whether it has come to its end, and was not stopped.
    """
    dataset, validation = coco.training_set(options), coco.validation_set(options)
    classes, steps = coco.num_classes(dataset), coco.steps_per_epoch(dataset, options, among.world)
    if saved is not None and saved["classes"] != classes:
        raise SystemExit(
            f"detection: expected data of {saved['classes']} classes, as the run had them, got {classes} in "
            f"{options.data}. Give the data that it was trained on."
        )
    backbone = Path(options.backbone) if options.backbone and saved is None else None
    model = build(options, classes, among, backbone)
    run = Run(model, *schedule.optimizer_and_schedule(model, options, steps))
    if saved is not None:
        run.load(saved)
    wrapped = among.wrap(model)
    epochs = schedule.EPOCHS[options.schedule]
    total = steps * epochs
    shown = showing.Shown("", run.step, total, began=run.step)
    console = Console(quiet=among.rank > 0)
    with stopping() as signals, showing.bars(console) as progress:
        while run.step < total:
            epoch = run.step // steps
            losses = []
            for images, targets in coco.epoch_batches(
                dataset, options, epoch, run.step % steps, among.rank, among.world, workers
            ):
                torch.manual_seed((options.seed * total + run.step) * among.world + among.rank)
                (rate,) = run.rates.get_last_lr()
                losses.append(_step(wrapped.train(), run, images, targets, among.device, out))
                shown.name, shown.done = f"epoch {epoch + 1} of {epochs}", run.step
                shown.stage = f"step {run.step} of {total}, loss {losses[-1]:.3f}"
                progress([shown])
                if among.any(bool(signals)):
                    break
            if among.rank == 0:
                known = {"options": asdict(options), "classes": classes}
                checkpoint.save(out / LAST, known | run.state())
            ended = run.step % steps == 0
            if ended:
                everyone = [loss for part in among.gather(losses) for loss in part]
                show = showing.images_in(progress, f"{shown.name}: evaluation")
                found = evaluation.evaluate(model, validation, among, workers, show)
                if among.rank == 0:
                    loss = sum(everyone) / len(everyone)
                    _log(out / LOG, {"epoch": epoch + 1, "loss": loss, "learning_rate": rate} | found)
                    told = ", ".join(f"{name} {found[name]:.1f}" for name in found if name.endswith("AP"))
                    console.print(f"epoch {epoch + 1}: loss {loss:.3f}, {told}", highlight=False)
            if run.step < total and (not ended or among.any(bool(signals))):
                return False
    return True


def _step(
    model: nn.Module,
    run: Run,
    images: list[torch.Tensor],
    targets: list[dict[str, torch.Tensor]],
    device: torch.device,
    out: Path,
) -> float:
    """One update; the loss before it."""
    on_device = [{name: value.to(device) for name, value in target.items()} for target in targets]
    loss = sum(model([image.to(device) for image in images], on_device).values())
    value = loss.item()
    if not math.isfinite(value):
        raise SystemExit(
            f"detection: expected a finite loss, got {value} in step {run.step + 1}. Give a lower "
            f"--learning-rate. If there is a {out / LAST}, it is from before."
        )
    run.optimizer.zero_grad()
    loss.backward()
    run.optimizer.step()
    run.rates.step()
    run.step += 1
    return value


def _log(path: Path, values: dict[str, float]) -> None:
    """Add a row."""
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(values))
        if file.tell() == 0:
            writer.writeheader()
        writer.writerow(values)
