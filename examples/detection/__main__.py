"""Train torchvision's detectors with BatchNorm, RBN, IEBN or BNET on data in COCO's format.

python examples/detection digits DIR          makes a small data set
python examples/detection train DIR           trains; torchrun --nproc-per-node 8 examples/detection train DIR
python examples/detection resume run/last.pth
python examples/detection evaluate run/last.pth
"""

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from options import Detector, Norm, Options, Schedule, Where

# Commands import what they need themselves: the help and the digits need no PyTorch.
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)

Data = Annotated[str, typer.Argument(metavar="DIR", help="annotations/, train2017/ and val2017/, as COCO.")]
Device = Annotated[str, typer.Option(help="cuda or cpu; by default a GPU where there is one.")]
Workers = Annotated[int, typer.Option(min=0, help="Processes that read images, for each process.")]
Moved = Annotated[str, typer.Option("--data", metavar="DIR", help="Where the data are now, if they moved.")]
Checkpoint = Annotated[Path, typer.Argument(metavar="FILE", help="last.pth of a run.")]


@app.command()
def digits(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where to.")],
    images: Annotated[int, typer.Option(min=1, help="Images for training.")] = 600,
    validation: Annotated[int, typer.Option(min=1, help="Images for validation.")] = 200,
) -> None:
    """Paste scikit-learn's digits on scikit-learn's photographs, in COCO's format."""
    from digits import make

    make(folder, images, validation)


@app.command()
def train(
    data: Data,
    out: Annotated[Path, typer.Option(metavar="DIR", help="The run's folder.")] = Path("run"),
    detector: Annotated[Detector, typer.Option()] = Options.detector,
    network: Annotated[str, typer.Option(help="The backbone: resnet50, resnet101, ...")] = Options.network,
    norm: Annotated[Norm, typer.Option()] = Options.norm,
    where: Annotated[
        Where, typer.Option(help="Everywhere, in the backbone, or after its last convolutions.")
    ] = Options.where,
    backbone: Annotated[
        str, typer.Option(metavar="FILE", help="ImageNet weights, as rbn train or rbn port writes them.")
    ] = Options.backbone,
    schedule: Annotated[Schedule, typer.Option(help="12 or 24 epochs.")] = Options.schedule,
    batch_size: Annotated[int, typer.Option(min=1, help="Over all processes.")] = Options.batch_size,
    learning_rate: Annotated[
        float, typer.Option(min=0, help="0 is 0.02 for 16 images, of RetinaNet 0.01.")
    ] = Options.learning_rate,
    size: Annotated[int, typer.Option(min=32, help="The shorter side of an image.")] = Options.size,
    channels: Annotated[int, typer.Option(min=8, help="Of the FPN.")] = Options.channels,
    anchors: Annotated[int, typer.Option(min=4, help="The side of the smallest.")] = Options.anchors,
    sync: Annotated[bool, typer.Option("--sync", help="Batch statistics over all processes.")] = Options.sync,
    seed: Annotated[int, typer.Option(min=0)] = Options.seed,
    device: Device = "",
    workers: Workers = 4,
) -> None:
    """Train a detector, and evaluate it after every epoch."""
    from loop import LAST

    if (out / LAST).exists():
        raise SystemExit(
            f"detection: expected a folder without a run, got {out}. Give another --out, or go on with: "
            f"resume {out / LAST}"
        )
    options = Options(
        os.path.abspath(data),
        detector,
        network,
        norm,
        where,
        backbone,
        schedule,
        batch_size,
        learning_rate,
        size,
        channels,
        anchors,
        sync,
        seed,
    )
    _run(options, out, device, workers)


@app.command()
def resume(file: Checkpoint, data: Moved = "", device: Device = "", workers: Workers = 4) -> None:
    """Go on where a run was stopped."""
    options, saved = _read(file, data)
    _run(options, file.parent, device, workers, saved)


@app.command()
def evaluate(file: Checkpoint, data: Moved = "", device: Device = "", workers: Workers = 4) -> None:
    """Print the AP of a run."""
    import coco
    import evaluation
    import loop
    import showing
    from processes import processes
    from rich.console import Console

    options, saved = _read(file, data)
    with processes(device) as among:
        validation = coco.validation_set(options)
        model = loop.build(options, saved["classes"], among, None)
        model.load_state_dict(saved["model"])
        with showing.bars(Console(quiet=among.rank > 0)) as progress:
            show = showing.images_in(progress, "evaluation")
            found = evaluation.evaluate(model, validation, among, workers, show)
    for name, value in found.items():
        print(f"{name} {value:.1f}")


def _read(file: Path, data: str) -> tuple[Options, dict[str, Any]]:
    """What a checkpoint holds."""
    import checkpoint

    saved = checkpoint.load(file)
    options = Options(**saved["options"])
    return (replace(options, data=os.path.abspath(data)) if data else options), saved


def _run(options: Options, out: Path, device: str, workers: int, saved: dict[str, Any] | None = None) -> None:
    """Train, and say how to go on if the run is stopped."""
    import loop
    from processes import processes

    out.mkdir(parents=True, exist_ok=True)
    with processes(device) as among:
        finished = loop.train(options, among, out, workers, saved)
    if not finished:
        if among.rank == 0:
            print(f"stopped and saved: resume {out / loop.LAST} goes on")
        sys.exit(130)


if __name__ == "__main__":
    app()
