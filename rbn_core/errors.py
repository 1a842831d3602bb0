"""The errors that every `rbn` layer, in every framework, raises for bad input, and its one warning."""

from __future__ import annotations


class RBNError(Exception):
    """Anything `rbn` refuses. The text is the rule, what was received, and the way out."""


class RBNValueError(RBNError, ValueError):
    """The kind of thing is right and its value is not: a shape, a range, an unknown option."""


class RBNTypeError(RBNError, TypeError):
    """The kind of thing is wrong: an integer image, a text where a number belongs."""


class RBNWarning(UserWarning):
    """What still gives the right numbers, but not as it was meant to: the text says what is lost and why."""
