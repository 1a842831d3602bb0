"""A run: training from a preset or from where a file stands, and evaluation, in any framework."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path

from rbn.stopping import stopping
from rbn.training import run_file
from rbn.training.data import Batch, evaluation_batches, steps_per_epoch, training_batches
from rbn.training.log import Log
from rbn.training.loop import PLAIN, Loop, Means, Scores, build
from rbn.training.preset import Preset
from rbn.training.run_file import Meter, Progress, Saved
from rbn.training.schedule import learning_rate, total_steps
from rbn.training.share import ALONE, Share
from rbn.training.sources import Source, open_data
from rbn_core import architectures
from rbn_core.errors import RBNError, RBNValueError
from rbn_core.execution import initial_state
from rbn_core.networks import Network, Norm

LAST, BEST = "last.safetensors", "best.safetensors"


class DivergedError(RBNError):
    """The loss is no finite number any more."""


@dataclass(frozen=True)
class Options:
    """What of a run changes none of its numbers.

    Args:
        framework: One of `rbn.backends.frameworks.FRAMEWORKS`.
        out: The run's folder.
        device: As the framework calls it; empty for its default.
        workers: How many processes decode images; 0 decodes in threads.
        log_every: The steps between two rows of the log.
        save_every: After how many steps the run is saved, beside after each epoch; 0 for only then.
        keep: Whether what is saved between epochs stays, as `step-N.safetensors`.
        means: How PyTorch computes it faster.
    """

    framework: str
    out: Path
    device: str = ""
    workers: int = 0
    log_every: int = 10
    save_every: int = 0
    keep: bool = False
    means: Means = PLAIN


@dataclass
class Shown:
    """What there is to be shown of a run.

    Args:
        step: How many steps it has made.
        total: After how many it ends.
        steps_per_epoch: The steps of an epoch.
        began: The step it began with.
        since: When it did, in seconds of `time.monotonic`.
        loss: The mean loss since the last row of the log.
        top1: The same of the top-1, in percent.
        images_per_second: Of training.
        evaluating: The images that an evaluation has seen, and of how many; nothing between them.
    """

    step: int
    total: int
    steps_per_epoch: int
    began: int = 0
    since: float = field(default_factory=time.monotonic)
    loss: float = math.nan
    top1: float = math.nan
    images_per_second: float = 0.0
    evaluating: tuple[int, int] = (0, 0)


Show = Callable[[Shown], None]
Tell = Callable[[str], None]


class Plan:
    """All that is known of a run before it begins: its data, its network and its steps.

    Args:
        preset: The run.
        saved: Where it goes on; nothing for a new run.
        share: What part of every batch this process gets.

    Raises:
        RBNError: The data are not there, the network does not fit them, or the file is of another network.
    """

    def __init__(self, preset: Preset, saved: Saved | None = None, share: Share = ALONE) -> None:
        self.preset, self.share = preset, share
        self.training_data, self.evaluation_data = open_data(preset.data)
        self.network = architectures.network(preset.network, preset.norm, len(self.training_data.classes))
        self.steps_per_epoch = steps_per_epoch(self.training_data, preset)
        self.total = total_steps(preset, self.steps_per_epoch)
        check_fit(self.network, preset, share)
        if saved is not None and saved.network != self.network:
            raise RBNValueError(
                f"train: expected the file of a run with {_described(self.network)}, got one with "
                f"{_described(saved.network)}. Leave --network, --norm and --data out, which the file knows, "
                "or begin a new run without --resume."
            )
        if (
            saved is not None
            and saved.training.optimizer != {"sgd": "sgd", "adamw": "adam"}[preset.optimizer]
        ):
            raise RBNValueError(
                f"train: expected the file of a run with {preset.optimizer}, got one with "
                f"{saved.preset.optimizer}. Leave --optimizer out, or begin a new run without --resume."
            )
        self.saved = saved
        self.progress = saved.progress if saved else Progress()

    def lines(self) -> list[str]:
        """What the run will be, for people to read."""
        preset, network = self.preset, self.network
        rates = [learning_rate(preset, step, self.steps_per_epoch) for step in range(self.total)]
        changes = [0, *(i for i in range(1, self.total) if rates[i] != rates[i - 1])]
        shown = changes if len(changes) <= 6 else [0, *(round(self.total * k / 4) for k in (1, 2, 3)), -1]
        schedule = ", ".join(f"{rates[i]:.3g} from step {range(self.total)[i]}" for i in shown)
        return [
            f"network   {_described(network)}, {network.parameter_count():,} parameters, "
            f"{network.multiply_adds(preset.image_size) / 1e9:.3g} billion multiply-adds for an image of "
            f"{preset.image_size} x {preset.image_size} pixels",
            f"data      {preset.data}: {len(self.training_data):,} images to train with, "
            f"{len(self.evaluation_data):,} to evaluate with, {len(self.training_data.classes)} classes",
            f"steps     {self.total:,} of {preset.batch_size} images"
            + (f" in {preset.accumulate} parts" if preset.accumulate > 1 else "")
            + f", {self.steps_per_epoch:,} in an epoch; {self.progress.step:,} are made",
            f"optimizer {preset.optimizer}, weight decay {preset.weight_decay:g}"
            + ("" if preset.decay_norms else " but for norm layers and biases"),
            f"schedule  {preset.schedule}, warm-up of {preset.warmup_epochs:g} epochs: {schedule}",
        ]


def _described(network: Network) -> str:
    norms = sorted({node.layer for node in network.nodes if isinstance(node, Norm)} - {"bn"})
    classes = network.nodes[-1].shape((1, 1))[-1]
    return f"{network.name} with {' and '.join(norms) or 'bn'} for {classes} classes"


def check_fit(network: Network, preset: Preset, share: Share = ALONE) -> None:
    """Refuse images of which a network leaves nothing, or one value for a channel's statistics.

    Raises:
        RBNValueError: It would be so.
    """
    size = preset.image_size
    together = preset.batch_size // preset.accumulate // (1 if preset.sync else share.count)
    shapes = network.shapes((max(1, together), network.in_channels, size, size))
    for node in network.nodes:
        planes = shapes[node.inputs[0]]
        values = math.prod((planes[0], *planes[2:]))
        if min(shapes[node.name]) < 1 or (isinstance(node, Norm) and values < 2):
            raise RBNValueError(
                f"train: expected images that {network.name} can take, got {together} at a time of "
                f"{size} x {size} pixels, of which {node.name} gets {planes}. Give a larger --image-size or "
                "--batch-size."
            )


def train(plan: Plan, options: Options, show: Show, tell: Tell) -> bool:
    """Train to the end of the schedule, or until Ctrl-C or a request to end, when it saves first.

    All processes of the run call it; process 0 writes the files.

    Args:
        plan: The run.
        options: Where and how.
        show: Called after every step.
        tell: Called with what a person should read.

    Returns:
        Whether it came to the end.

    Raises:
        RBNError: The loss is not finite, or a file cannot be written; the last file of the run is whole.
    """
    preset, progress, share = plan.preset, plan.progress, plan.share
    out, leads = options.out, share.index == 0
    loop = build(options.framework, plan.network, preset, options.device, share, options.means)
    if plan.saved is None:
        loop.load(initial_state(plan.network, preset.seed), None)
    else:
        loop.load(plan.saved.state, plan.saved.training)
    if leads:
        _make_folder(out)
        (out / "preset.toml").write_text(preset.to_toml(), "utf-8")
        if loop.parts > 1:
            tell(_spread(loop, preset))

    def save(name: str) -> None:
        if not leads:
            return
        saved = Saved(loop.state(), loop.training(), plan.network, preset, progress, options.framework)
        run_file.save(out / name, saved, epoch=progress.step // plan.steps_per_epoch)

    shown = Shown(progress.step, plan.total, plan.steps_per_epoch, progress.step)
    damaged: set[int] = set()
    batches = training_batches(
        plan.training_data, preset, progress.step, workers=options.workers, share=share
    )
    with ExitStack() as stack:
        log = stack.enter_context(Log(out, progress.step)) if leads else None
        signals = stack.enter_context(stopping())
        stack.enter_context(closing(batches))
        began = time.monotonic()
        for batch in itertools.islice(batches, plan.total - progress.step):
            _tell_damaged(batch, plan.training_data, damaged, tell)
            rate = learning_rate(preset, progress.step, plan.steps_per_epoch)
            loss, correct = loop.step(batch.images, batch.labels, rate)
            if not math.isfinite(loss):
                raise DivergedError(_diverged(progress.step, loss, rate, out))
            progress.step += 1
            meter = progress.meter
            meter.count += preset.batch_size
            meter.loss += loss * preset.batch_size
            meter.correct += correct
            shown.step = progress.step
            shown.loss, shown.top1 = meter.loss / meter.count, 100 * meter.correct / meter.count
            shown.images_per_second = (
                preset.batch_size * (shown.step - shown.began) / (time.monotonic() - began)
            )
            show(shown)
            ends = progress.step % plan.steps_per_epoch == 0 or progress.step == plan.total
            values: dict[str, float] = {}
            if progress.step % options.log_every == 0 or ends:
                values = {
                    "epoch": progress.step / plan.steps_per_epoch,
                    "learning_rate": rate,
                    "loss": shown.loss,
                    "top1": shown.top1,
                    "images_per_second": shown.images_per_second,
                }
                progress.meter = Meter()
            if ends:
                paused = time.monotonic()
                scores = evaluate(loop, plan.evaluation_data, preset, options.workers, shown, show, tell)
                began += time.monotonic() - paused
                values |= {f"evaluation_{name}": value for name, value in means(scores).items()}
            if values and log is not None:
                log.row(progress.step, values)
            stopped = loop.any(bool(signals))  # by a signal that one of the processes has got
            if ends:
                best = values["evaluation_top1"] > progress.best
                progress.best = max(progress.best, values["evaluation_top1"])
                save(LAST)
                if best:
                    save(BEST)
                if leads:
                    tell(_told(plan, values))
            elif stopped:
                save(LAST)
            elif options.save_every and progress.step % options.save_every == 0:
                save(LAST)
                if options.keep:
                    save(f"step-{progress.step}.safetensors")
            if stopped and progress.step < plan.total:
                return False
    if damaged:
        tell(f"{len(damaged)} images could not be decoded, and others took their places")
    return True


def evaluate(
    loop: Loop,
    source: Source,
    preset: Preset,
    workers: int,
    shown: Shown,
    show: Show,
    tell: Tell,
) -> Scores:
    """The scores of all images, in all processes.

    Args:
        loop: The network.
        source: The images.
        preset: How they are prepared.
        workers: How many processes decode them.
        shown: What is shown meanwhile.
        show: Called after every batch.
        tell: Called with what a person should read.
    """
    scores = Scores()
    damaged: set[int] = set()
    loop.align()
    with closing(evaluation_batches(source, preset, workers=workers, share=loop.share)) as batches:
        for batch in batches:
            _tell_damaged(batch, source, damaged, tell)
            scores += loop.evaluate(batch.images, batch.labels)
            shown.evaluating = (scores.count, len(source))
            show(shown)
    shown.evaluating = (0, 0)
    if damaged:
        tell(f"{len(damaged)} images could not be decoded, and do not count")
    return scores


def means(scores: Scores) -> dict[str, float]:
    """The mean loss, and the top-1 and top-5 in percent."""
    count = max(1, scores.count)
    return {
        "loss": scores.loss / count,
        "top1": 100 * scores.top1 / count,
        "top5": 100 * scores.top5 / count,
    }


def _told(plan: Plan, values: dict[str, float]) -> str:
    """A line for the end of an epoch."""
    return (
        f"epoch {values['epoch']:g} of {plan.total / plan.steps_per_epoch:g}: loss {values['loss']:.4f}, "
        f"top-1 {values['top1']:.2f} %; evaluation: loss {values['evaluation_loss']:.4f}, top-1 "
        f"{values['evaluation_top1']:.2f} %, top-5 {values['evaluation_top5']:.2f} %"
    )


def _spread(loop: Loop, preset: Preset) -> str:
    """A line on how a batch is spread over processes or devices."""
    images = preset.batch_size // preset.accumulate
    return (
        f"{loop.parts} processes or devices share every batch, {images // loop.parts} images each at a time; "
        f"batch statistics are of {f'{images} images of all' if loop.sync else 'the images of each'}"
    )


def _tell_damaged(batch: Batch, source: Source, known: set[int], tell: Tell) -> None:
    """Name every image that could not be decoded once."""
    for index in set(batch.damaged) - known:
        known.add(index)
        tell(f"{source.name(index)} cannot be decoded, and is skipped")


def _diverged(step: int, loss: float, rate: float, out: Path) -> str:
    last = out / LAST
    back = f" {last} is from before: --resume {last} goes on from there." if last.is_file() else ""
    return (
        f"train: expected a finite loss, got {loss} in step {step + 1}, at a learning rate of {rate:g}. Try "
        "a lower --learning-rate, more --warmup-epochs, or --dtype float64 to see whether it is rounding."
        f"{back}"
    )


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RBNValueError(
            f"train: expected a folder for the run, got {out} ({error.strerror or error}). Give another one "
            "with --out."
        ) from error
