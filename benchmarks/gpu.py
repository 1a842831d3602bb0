"""RBN on an NVIDIA GPU: right, and as fast as the memory, beside `torch.nn.BatchNorm2d`.

    python -m rbn.benchmarks.gpu results.json

First the layer is held to its plain form in float64, on the shapes that are measured and with every
statistic; then it is measured in turn with BatchNorm, called from Python ("eager") and replayed from a CUDA
graph ("graph"), which leaves the device's own time. A share of the copy bandwidth counts the passes over a
tensor of `cases.PASSES`; tensors that the second-level cache holds can exceed it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import triton
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from rbn.backends.torch import IEBN, RBN
from rbn.benchmarks import cases
from rbn.benchmarks.cases import EVALUATION, TRAINING, Shape
from rbn.benchmarks.timing import Comparison, Step, compare, median_time
from rbn_core.options import Statistic

DEVICE = "cuda"
SHAPES: tuple[Shape, ...] = (*cases.SHAPES, (256, 64, 56, 56))
SMALL: Shape = (4, 6, 5, 7)
LARGE: Shape = (2, 3, 1024, 1024)
HUGE: Shape = (2100, 64, 128, 128)
DTYPES = (torch.float32, torch.bfloat16)
STATISTICS: tuple[Statistic | None, ...] = (None, "channel_mean", "channel_std")
LAUNCHES = ("eager", "graph")
BUDGET = 0.15
"""Seconds for each comparison."""

COPY = 2**30
"""The bytes of the copy whose bandwidth others are a share of: many times the second-level cache."""

FACTOR = 16.0
"""How many units in the last place of the terms a sum may miss, as in the conformance suite."""


@dataclass(frozen=True)
class Check:
    """The largest error of one quantity, beside what rounding allows.

    Args:
        case: What was computed.
        quantity: "y", "dx", or the gradient of a parameter.
        error: The largest absolute difference from float64.
        tolerance: What is allowed.
    """

    case: str
    quantity: str
    error: float
    tolerance: float

    @property
    def right(self) -> bool:
        """Whether it is; a NaN is not."""
        return self.error <= self.tolerance


@dataclass(frozen=True)
class Measurement:
    """A form beside BatchNorm.

    Args:
        shape: Of X, (N, C, *spatial).
        dtype: Of X.
        layout: "channels_first" or "channels_last".
        phase: "training", forward and backward, or "evaluation", forward.
        launch: "eager" or "graph".
        form: `cases.RBN` or `cases.PLAIN`.
        comparison: Its time and BatchNorm's.
        share: The copy bandwidth's share that it reached.
        batch_norm_share: The same of BatchNorm.
    """

    shape: Shape
    dtype: str
    layout: str
    phase: str
    launch: str
    form: str
    comparison: Comparison
    share: float
    batch_norm_share: float


# ---- right ----


def layouts(shape: Shape) -> tuple[str, ...]:
    """The memory formats there are of a shape."""
    return ("channels_first", "channels_last") if len(shape) > 2 else ("channels_first",)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same numbers, with the channels first or last in memory."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if layout == "channels_last" else x


def numbers(shape: Shape, seed: int, offset: float = 0.0) -> Tensor:
    """Random numbers that every dtype has exactly."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return (torch.randn(shape, generator=generator, device=DEVICE) + offset).bfloat16().double()


def trained(layer: nn.Module) -> nn.Module:
    """The layer with no special numbers."""
    with torch.no_grad():
        for seed, parameter in enumerate(layer.parameters()):
            parameter.add_(numbers(tuple(parameter.shape), seed) / 2)
        layer.running_mean.copy_(numbers(tuple(layer.running_mean.shape), 7))
        layer.running_var.copy_(numbers(tuple(layer.running_var.shape), 8).abs() + 0.5)
    return layer


def results(layer: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """Y, the gradients of X and of the parameters, and the running statistics after it."""
    x = x.detach().requires_grad_()
    y = layer(x)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    gradients = torch.autograd.grad(y, (x, *parameters), dy)
    statistics = {name: getattr(layer, name) for name in ("running_mean", "running_var")}
    return {"y": y} | dict(zip(("dx", *names), gradients, strict=True)) | statistics


def check(
    make: Callable[..., nn.Module],
    shape: Shape,
    dtype: torch.dtype,
    layout: str,
    training: bool,
    case: str,
) -> Iterator[Check]:
    """Every quantity of the fused form beside the plain one in float64, and that it comes out again.

    A unit in the last place is one of the terms that are added up: of a parameter's gradient, its channel's.
    """
    x, dy = numbers(shape, 1, offset=1.0), numbers(shape, 2)
    found, again = (
        results(
            trained(make(fused=True)).train(training),
            laid_out(x.to(dtype), layout),
            laid_out(dy.to(dtype), layout),
        )
        for _ in range(2)
    )
    exact = trained(make(fused=False)).train(training).double()
    expected = results(exact, x, dy)
    y = expected["y"].abs()
    terms = (dy.abs() * (y + 1)).transpose(0, 1).flatten(1).sum(1).max().item()
    unit = FACTOR * torch.finfo(torch.float32).eps
    for name, value in expected.items():
        error = (found[name].double() - value).abs().max().item()
        largest = value.abs().max().item()
        scale = terms if name in dict(exact.named_parameters()) else largest + 1
        tolerance = unit * scale
        if name in ("y", "dx"):
            tolerance += torch.finfo(dtype).eps * largest
        yield Check(case, name, error, tolerance)
        yield Check(case, f"{name}, again", (again[name] - found[name]).abs().max().item(), 0.0)


def check_offsets(layout: str) -> Iterator[Check]:
    """Equal images, of more values than 32 bits count, come out equal: the first and the last."""
    images, *image = HUGE
    x, dy = (
        laid_out(numbers((1, *image), seed).bfloat16(), layout).expand(HUGE).clone() for seed in (1, 2)
    )  # a clone keeps the layout of the image
    found = results(trained(RBN(image[0], device=DEVICE)), x, dy)
    for name in ("y", "dx"):
        first, last = (found[name][n].float() for n in (0, images - 1))
        yield Check(f"{described(HUGE)}/{layout}", name, (last - first).abs().max().item(), 0.0)


def checks() -> Iterator[Check]:
    """Every statistic on a small shape, and the default layer on the shapes that are measured."""
    for centering, scaling, training in itertools.product(STATISTICS, STATISTICS, (True, False)):
        make = partial(RBN, SMALL[1], device=DEVICE, centering=centering, scaling=scaling)
        case = f"{centering}/{scaling}/{'training' if training else 'evaluation'}"
        yield from check(make, SMALL, torch.float32, "channels_first", training, case)
    make = partial(IEBN, SMALL[1], device=DEVICE)
    yield from check(make, SMALL, torch.float32, "channels_last", True, "IEBN/training")
    for shape, dtype in itertools.product((*SHAPES, LARGE), DTYPES):
        for layout, training in itertools.product(layouts(shape), (True, False)):
            case = f"{described(shape)}/{name_of(dtype)}/{layout}/{'training' if training else 'evaluation'}"
            yield from check(partial(RBN, shape[1], device=DEVICE), shape, dtype, layout, training, case)
    for layout in layouts(HUGE):
        yield from check_offsets(layout)


# ---- fast ----


def on_device(step: Step) -> float:
    """The seconds that pass on the device from a step's beginning to its end."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def replayed(step: Step) -> Step:
    """The step as a CUDA graph: without the host's part."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def step_of(layer: nn.Module, x: Tensor, dy: Tensor, phase: str) -> Step:
    """Forward and backward in training, or forward in evaluation."""
    layer.train(phase == TRAINING)
    if phase == TRAINING:
        x = x.detach().requires_grad_()
        inputs = (x, *layer.parameters())
        return lambda: torch.autograd.grad(layer(x), inputs, dy)
    evaluate = torch.no_grad()(layer)
    return lambda: evaluate(x)


def batch_norm(shape: Shape) -> nn.Module:
    """PyTorch's own."""
    return (nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d)(shape[1], device=DEVICE)


def measurements(bandwidth: float) -> Iterator[Measurement]:
    """Both forms beside BatchNorm, on all shapes."""
    for shape, dtype in itertools.product(SHAPES, DTYPES):
        for layout, phase in itertools.product(layouts(shape), (TRAINING, EVALUATION)):
            x, dy = (laid_out(numbers(shape, seed).to(dtype), layout) for seed in (1, 2))
            makers: dict[str, nn.Module] = {
                cases.RBN: RBN(shape[1], device=DEVICE),
                cases.PLAIN: RBN(shape[1], device=DEVICE, fused=False),
                cases.BATCH_NORM: batch_norm(shape),
            }
            eager = {form: step_of(layer, x, dy, phase) for form, layer in makers.items()}
            for launch in LAUNCHES:
                steps = eager if launch == "eager" else {form: replayed(step) for form, step in eager.items()}
                for form in (cases.RBN, cases.PLAIN):
                    found = compare(steps[form], steps[cases.BATCH_NORM], BUDGET, on_device)
                    moved = cases.PASSES[phase] * x.numel() * x.element_size()
                    yield Measurement(
                        shape, name_of(dtype), layout, phase, launch, form, found,
                        moved / found.seconds / bandwidth, moved / found.other_seconds / bandwidth,
                    )  # fmt: skip


def copy_bandwidth() -> float:
    """Bytes read and written per second by a large copy on the device."""
    source = torch.ones(COPY, dtype=torch.uint8, device=DEVICE)
    target = torch.zeros_like(source)
    return cases.COPY_PASSES * COPY / median_time(lambda: target.copy_(source), 1.0, on_device)


def kernels_of(shape: Shape, dtype: torch.dtype, layout: str, phase: str) -> dict[str, float]:
    """The seconds of every kernel of a step of the fused form."""
    x, dy = (laid_out(numbers(shape, seed).to(dtype), layout) for seed in (1, 2))
    step = step_of(RBN(shape[1], device=DEVICE), x, dy, phase)
    step()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    repeats = 10
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(repeats):
            step()
        torch.cuda.synchronize()
    return {event.key: event.device_time_total / repeats / 1e6 for event in profile.key_averages()}


def profiles() -> Iterator[dict[str, object]]:
    """The kernels' times, on all shapes."""
    for shape, dtype in itertools.product(SHAPES, DTYPES):
        for layout, phase in itertools.product(layouts(shape), (TRAINING, EVALUATION)):
            yield {
                "shape": shape,
                "dtype": name_of(dtype),
                "layout": layout,
                "phase": phase,
                "kernels": kernels_of(shape, dtype, layout, phase),
            }


# ---- what is printed and written ----


def described(shape: Shape) -> str:
    """Such as 32x64x56x56."""
    return "x".join(map(str, shape))


def name_of(dtype: torch.dtype) -> str:
    """Such as float32."""
    return str(dtype).removeprefix("torch.")


def hardware() -> dict[str, object]:
    """The machine, and the versions of what runs on it."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory": properties.total_memory,
        "cache": properties.L2_cache_size,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
    }


def table(found: list[Measurement]) -> Table:
    """One row for every shape, dtype, memory format and phase."""
    out = Table(
        "shape", "dtype", "layout", "phase", title="times in µs, ratios to BatchNorm, shares of the copy"
    )
    for launch in LAUNCHES:
        for column in ("RBN", "plain", "BatchNorm", "ratio"):
            out.add_column(f"{launch}\n{column}", justify="right")
    for column in ("RBN", "BatchNorm"):
        out.add_column(f"share\n{column}", justify="right")

    def row(m: Measurement) -> tuple[str, str, str, str]:
        return described(m.shape), m.dtype, m.layout, m.phase

    for key, group in itertools.groupby(found, row):
        by = {(m.launch, m.form): m for m in group}
        cells = []
        for launch in LAUNCHES:
            mine, plain = by[launch, cases.RBN].comparison, by[launch, cases.PLAIN].comparison
            times = (mine.seconds, plain.seconds, mine.other_seconds)
            cells += [*(f"{1e6 * seconds:.1f}" for seconds in times), f"{mine.ratio:.2f}"]
        last = by["graph", cases.RBN]
        out.add_row(*key, *cells, f"{last.share:.0%}", f"{last.batch_norm_share:.0%}")
    return out


def main() -> int:
    """Check, measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("results", type=Path, help="where the JSON goes")
    parser.add_argument("--profile", action="store_true", help="also the time of every kernel")
    arguments = parser.parse_args()
    console = Console(width=170)
    written: dict[str, object] = {"hardware": hardware()}
    console.print(written["hardware"])

    def write() -> None:
        arguments.results.write_text(json.dumps(written, indent=1))

    checked = list(checks())
    written["checks"] = [asdict(c) for c in checked]
    write()
    wrong = [c for c in checked if not c.right]
    for c in wrong:
        console.print(f"wrong: {c.case}: {c.quantity} is off by {c.error:.2g}, {c.tolerance:.2g} are allowed")
    console.print(f"{len(checked) - len(wrong)} of {len(checked)} quantities are right")
    bandwidth = copy_bandwidth()
    written["copy_bandwidth"] = bandwidth
    console.print(f"a copy of 1 GiB moves {bandwidth / 1e12:.2f} TB/s")
    found = []
    for measurement in measurements(bandwidth):
        found.append(measurement)
        written["measurements"] = [asdict(m) for m in found]
        write()
    console.print(table(found))
    if arguments.profile:
        written["profiles"] = list(profiles())
        write()
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
