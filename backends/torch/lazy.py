"""RBN, IEBN and BNET that take the number of channels from their first input, as PyTorch's lazy layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter, is_lazy

from rbn.backends.torch.layers import BNET, IEBN, RBN, CalibratedNorm
from rbn_core.errors import RBNTypeError


class Lazy(LazyModuleMixin, CalibratedNorm):
    """A layer without a number of channels. The class that it becomes stands behind this one.

    Args:
        given: Nothing: there is no `num_features`, and options go by name.
        options: Those of the class that it becomes.

    Raises:
        RBNError: An option is refused.
    """

    def __init__(self, *given: Any, **options: Any) -> None:
        if given or "num_features" in options:
            got = ", ".join([*map(repr, given), *(f"{name}={value!r}" for name, value in options.items())])
            raise RBNTypeError(
                f"{type(self).__name__}: expected options by name, without num_features, got ({got}). The "
                f"first input gives it: leave num_features out, or build {self.cls_to_become.__name__}."
            )
        for_now: Any = 1  # channel
        super().__init__(for_now, **options)
        self.num_features = 0
        kinds: Any = ((self._parameters, UninitializedParameter), (self._buffers, UninitializedBuffer))
        for tensors, kind in kinds:
            for name, tensor in tensors.items():
                if tensor is not None and tensor.dim():
                    tensors[name] = kind(device=tensor.device, dtype=tensor.dtype)

    def reset_running_stats(self) -> None:
        """Start the statistics as BatchNorm does, once there are any."""
        if not self.has_uninitialized_params():
            super().reset_running_stats()

    def reset_parameters(self) -> None:
        """Start as the layer that this one becomes, once there are parameters."""
        if not self.has_uninitialized_params():
            super().reset_parameters()

    def initialize_parameters(self, input: Tensor) -> None:
        """Take the number of channels from the first input, and start as the layer that this one becomes.

        What was loaded before stays as it is, and has the number of channels.

        Raises:
            RBNError: No layer could take the input; this one still has no channels then.
        """
        tensors = (*self.parameters(), *self.buffers())
        loaded = [tensor.shape[0] for tensor in tensors if not is_lazy(tensor) and tensor.dim()]
        self.num_features = loaded[0] if loaded else input.shape[1] if input.dim() > 1 else 0
        try:
            self._check(input, training=False, values=None)
        except BaseException:  # Ctrl-C, too, leaves a layer without channels
            self.num_features = 0
            raise
        if self.has_uninitialized_params():
            with torch.no_grad():
                for tensor in (*self._parameters.values(), *self._buffers.values()):
                    if is_lazy(tensor):
                        tensor.materialize((self.num_features,))
                self.reset_parameters()


class LazyRBN(Lazy, RBN):
    """`RBN` that takes its number of channels from its first input, as `torch.nn.LazyBatchNorm2d` does.

    It takes RBN's options by name, but for `num_features`, and inputs of any number of spatial axes. With the
    first of them, of shape (N, C, *spatial), its parameters and statistics get the shape (C,), and it becomes
    an `RBN`. Move it to its device and dtype before; a `state_dict` of an RBN can be loaded before, too.

        model = nn.Sequential(nn.LazyConv2d(8, 3), LazyRBN(scaling="channel_std"))
        model(torch.randn(4, 3, 16, 16))

    Raises:
        RBNError: An option or an input is refused; a layer that refuses its first input is still a `LazyRBN`.
    """

    cls_to_become = RBN


class LazyIEBN(Lazy, IEBN):
    """`IEBN` that takes its number of channels from its first input, as `LazyRBN` does."""

    cls_to_become = IEBN


class LazyBNET(Lazy, BNET):
    """`BNET` that takes its number of channels from its first input, as `LazyRBN` does."""

    cls_to_become = BNET

    def __init__(self, *given: Any, **options: Any) -> None:
        super().__init__(*given, **options)
        before, kinds = self.conv, (nn.LazyConv1d, nn.LazyConv2d, nn.LazyConv3d)
        self.conv = kinds[len(before.kernel_size) - 1](
            1,
            before.kernel_size,
            padding=before.padding,
            device=before.weight.device,
            dtype=before.weight.dtype,
        )

    def initialize_parameters(self, input: Tensor) -> None:
        """Take the number of channels from the first input, for the convolution, too."""
        super().initialize_parameters(input)
        self.conv.in_channels = self.conv.out_channels = self.conv.groups = self.num_features
        self.conv.initialize_parameters(input)
