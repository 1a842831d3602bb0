"""What the strangers that are called as plain functions have in common."""

from collections.abc import Mapping

from rbn.conformance.subjects.numpy import NumpyFunction, Step


class Stranger(NumpyFunction):
    """A BatchNorm that counts no batches, run in one precision, with a state that nobody has spoilt.

    Args:
        name: What the reports call it.
        step: As `NumpyFunction` takes it.
        fixed: What it always does.
        forward_only: Whether it has no gradients.
        absent: What it cannot run, by the pattern of the cases.
        expected_failures: Where it is known to differ.
    """

    precisions = ()
    spoils = ()

    def __init__(
        self,
        name: str,
        step: Step,
        fixed: Mapping[str, object],
        *,
        forward_only: bool = False,
        absent: Mapping[str, str] | None = None,
        expected_failures: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(
            name,
            step,
            layers=("bn",),
            counts_batches=False,
            fixed=fixed,
            absent=absent,
            expected_failures=expected_failures,
        )
        self.forward_only = forward_only
