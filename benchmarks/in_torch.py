"""PyTorch: the layers on both memory formats, and whole training steps of the networks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from rbn.backends.torch import RBN, network
from rbn.benchmarks import cases
from rbn.benchmarks.cases import EVALUATION, TRAINING, Shape
from rbn.benchmarks.timing import Step, median_time
from rbn.benchmarks.worker import Worker, random

FORMATS = {"channels_first": torch.contiguous_format, "channels_last": torch.channels_last}


class Equations(nn.Module):
    """Eq. 12 as it stands, on (N, C, *spatial): what it costs without the two-pass form."""

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        for name, start in {"gamma": 1.0, "beta": 0.0, "w_m": 0.0, "w_v": 0.0, "w_b": 1.0}.items():
            setattr(self, name, nn.Parameter(torch.full((num_features,), start)))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def forward(self, x: Tensor) -> Tensor:
        """Y."""
        spatial = tuple(range(2, x.dim()))

        def shaped(values: Tensor) -> Tensor:
            return values.reshape(-1, *(1,) * len(spatial))

        def instance_mean(values: Tensor) -> Tensor:
            return values.mean(spatial, keepdim=True) if spatial else values

        x_cm = x + shaped(self.w_m) * instance_mean(x)
        if self.training:
            var, mean = torch.var_mean(x_cm, (0, *spatial), correction=0)
            with torch.no_grad():
                values = x.numel() // x.shape[1]
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(var * (values / (values - 1)), self.momentum)
        else:
            mean, var = self.running_mean, self.running_var
        x_s = (x_cm - shaped(mean)) / torch.sqrt(shaped(var) + self.eps)
        x_cs = x_s * torch.sigmoid(shaped(self.w_v) * instance_mean(x_s) + shaped(self.w_b))
        return x_cs * shaped(self.gamma) + shaped(self.beta)


def batch_norm(shape: Shape) -> nn.Module:
    """PyTorch's own for (N, C, *spatial)."""
    return (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[len(shape) - 2](shape[1])


LAYERS: dict[str, Callable[[Shape], nn.Module]] = {
    cases.BATCH_NORM: batch_norm,
    cases.RBN: lambda shape: RBN(shape[1]),
    cases.PLAIN: lambda shape: RBN(shape[1], fused=False),
    cases.EQUATIONS: lambda shape: Equations(shape[1]),
}


class Torch(Worker):
    """PyTorch on one device."""

    variants = tuple(FORMATS)
    forms = tuple(LAYERS)

    def build(self, form: str, variant: str, shape: Shape) -> dict[str, Step]:
        """A step for each phase."""
        layer = LAYERS[form](shape).to(self.options.device)
        parameters = list(layer.parameters())
        x = self.tensor(shape, variant, seed=0).requires_grad_()
        dy = self.tensor(shape, variant, seed=1)

        def training() -> object:
            layer.train()
            return torch.autograd.grad(layer(x), (x, *parameters), dy)

        @torch.no_grad()
        def evaluation() -> object:
            layer.eval()
            return layer(x)

        return {TRAINING: training, EVALUATION: evaluation}

    def network_step(self, name: str, norm: str) -> Step:
        """A whole training step: forward, cross entropy, backward, and SGD with momentum."""
        torch.manual_seed(0)
        net = network(name, norm=norm).to(self.options.device).train()
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)
        images = torch.from_numpy(random(self.options.images, seed=0)).to(self.options.device)
        labels = torch.arange(len(images), device=self.options.device)

        def step() -> object:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(images), labels)
            loss.backward()
            optimizer.step()
            return loss

        return step

    def tensor(self, shape: Shape, variant: str, seed: int) -> Tensor:
        """Random numbers in a memory format."""
        values = torch.from_numpy(random(shape, seed))
        values = values.to(self.options.device, getattr(torch, self.options.dtype))
        return values.contiguous(memory_format=FORMATS[variant])

    def takes(self, variant: str, shape: Shape) -> bool:
        """Only images have the second format."""
        return variant == "channels_first" or len(shape) == 4

    def threads(self) -> int:
        """As PyTorch says."""
        return torch.get_num_threads()

    def copy_seconds(self, shape: Shape) -> float:
        """How long a copy of X takes; on the GPU by PyTorch."""
        if self.options.device == "cpu":
            return super().copy_seconds(shape)
        x = self.tensor(shape, "channels_first", seed=0)
        target = torch.empty_like(x)
        return median_time(lambda: target.copy_(x), self.options.seconds / 2, self.measure)

    def measure(self, step: Step) -> float:
        """How long a step takes, in seconds; on the GPU by its own clock."""
        if self.options.device == "cpu":
            return super().measure(step)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000
