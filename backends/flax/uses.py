"""Which convolution or linear layer comes before a normalization, and nothing else after it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rbn_core.errors import RBNValueError
from rbn_core.matching import Row


class Uses:
    """What calls what in a model, for linen and NNX: their layers tell it of each call while it is traced.

    Attributes:
        norms: The normalizations, by path or identity.
        before: By normalization the linear layer whose output it takes.
        outputs: Shapes and dtypes.
    """

    def __init__(self) -> None:
        self.norms: dict[Any, Any] = {}
        self.before: dict[Any, Any] = {}
        self.outputs: dict[Any, Any] = {}
        self._axes: dict[Any, int] = {}
        self._made: list[tuple[Any, Any]] = []
        self._calls: dict[Any, int] = {}
        self._stand_ins: dict[Any, Any] = {}
        self._elsewhere: set[Any] = set()

    def trace(self, run: Callable[[Any], Any], values: Any) -> None:
        """Run a model twice, as shapes: for what follows what, and for what else uses that."""
        jax.eval_shape(lambda values: run(values), values)
        self._made = []
        keys = list(dict.fromkeys(self.before.values()))
        shapes = [self.outputs[key] for key in keys]

        def with_stand_ins(values: Any, arrays: list[Any]) -> Any:
            self._stand_ins = dict(zip(keys, arrays, strict=True))
            return run(values)

        program = jax.make_jaxpr(with_stand_ins)(values, shapes).jaxpr
        used = {id(each) for equation in program.eqns for each in equation.invars}
        used |= {id(each) for each in program.outvars}
        arrays = program.invars[len(program.invars) - len(keys) :]
        self._elsewhere = {key for key, array in zip(keys, arrays, strict=True) if id(array) in used}

    def linear(self, key: Any, call: Callable[[], Any]) -> Any:
        """What a convolution or linear layer returns."""
        if self._stand_ins:
            return self._stand_ins[key] if key in self._stand_ins else call()
        y = call()
        self._calls[key] = self._calls.get(key, 0) + 1
        self._made.append((y, key))
        self.outputs[key] = jax.ShapeDtypeStruct(y.shape, y.dtype)
        return y

    def norm(self, key: Any, x: Any, call: Callable[[], Any], norm: Any) -> Any:
        """What a normalization returns; the second time, where it takes a stand-in, any array like that."""
        if self._stand_ins and self.before.get(key) in self._stand_ins:
            return jnp.zeros(self.outputs[key].shape, self.outputs[key].dtype)
        y = call()
        if not self._stand_ins:
            self._calls[key] = self._calls.get(key, 0) + 1
            self.norms[key] = norm
            self.outputs[key] = jax.ShapeDtypeStruct(y.shape, y.dtype)
            self._axes[key] = y.ndim
            source = next((source for array, source in self._made if array is x), None)
            if source is not None:
                self.before[key] = source
        return y

    def why_not(self, key: Any, axis: int) -> str:
        """Why a normalization cannot be folded into what is before it; empty where it can."""
        if key not in self.before:
            return "no convolution or linear layer before it"
        if axis % self._axes[key] != self._axes[key] - 1:
            return "its channels are not on the last axis"
        if self._calls[key] > 1 or self._calls[self.before[key]] > 1:
            return "called more than once"
        source = self.before[key]
        shared = source in self._elsewhere or list(self.before.values()).count(source) > 1
        return "its input is used elsewhere, too" if shared else ""


def check_inert(wrong: list[str], rows: list[Row]) -> None:
    """Refuse layers that are more than BatchNorm, and a model without any.

    Raises:
        RBNValueError: There are some, or there is none.
    """
    if wrong:
        raise RBNValueError(
            f"fold: expected layers that are BatchNorm in evaluation, got {len(wrong)} that are not: "
            f"{', '.join(wrong)}. Their w_m, w_v or kernel is not 0: keep them as they are."
        )
    if not rows:
        raise RBNValueError(
            "fold: expected RBN, IEBN, BNET or BatchNorm layers, got none. There is nothing to fold."
        )
