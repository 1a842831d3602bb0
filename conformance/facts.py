"""What the failures of a subject have in common, where no known mistake explains them.

Every fact is checked on all the cases that it speaks of: all that compare the quantity it names.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rbn.conformance.cases import REFUSED_SPOILS, Case
from rbn.conformance.comparison import MEMORY, Step, compare, due
from rbn.conformance.seen import COUNTER, Seen, is_gradient, is_ordinary
from rbn.conformance.subject import Array, Outcome
from rbn.conformance.tolerances import largest
from rbn_core.reference import per_channel

LINES = 6
"""How many facts there are at most."""

CONDITIONS = 3
"""How many conditions say where something is wrong."""

CLEAR = 100.0
"""How many times the tolerance an error must be that anything can be read from."""

LEAST = 1e-300
"""What is divided by where there is nothing to divide by."""

NEARLY = 1e-3
"""How near to 1 a factor says nothing."""

SMALL = 0.01
"""Up to which part of what is due an error is said to be small."""

RUNNING = ("running_mean", "running_var")

Numbers = tuple[Array, Array]
"""What was found and what is due, both less what is not looked at."""


@dataclass(frozen=True)
class Look:
    """One quantity in one step in which it is wrong.

    Attributes:
        case: The case.
        number: The step, from 0.
        step: What is due in it.
        found: What the subject gave.
        right: What is due.
        tolerance: What it may be off by.
        before: What is due in the state before the step.
    """

    case: Case
    number: int
    step: Step
    found: Array
    right: Array
    tolerance: float
    before: Mapping[str, Any]

    def fits(self, values: Array, others: Array, factor: float = 1.0) -> bool:
        """Whether two arrays are the same to the tolerance.

        Larger ones have larger roundings, and so has what was multiplied by a factor.
        """
        finite = np.isfinite(self.right)
        values, others = np.broadcast_arrays(values, others)
        size = max(largest(values), largest(others)) / max(largest(self.right), LEAST)
        with np.errstate(invalid="ignore"):
            return bool(
                np.all(np.abs(values - others)[finite] <= 4.0 * max(1.0, size, factor) * self.tolerance)
            )


def facts_of(seen: Sequence[Seen]) -> list[str]:
    """The facts, the most useful first.

    Args:
        seen: All cases; what is wrong in them is what is to be explained.
    """
    raised = [*_raised(seen)]
    usable = [each for each in seen if "raised" not in each.ratios]
    looks = looks_of(usable)
    roots = roots_of(usable)
    lines = [overview(usable, roots)] if roots else []
    with np.errstate(all="ignore"):  # NaN and infinity are what some cases are about
        said = {quantity: said_of(quantity, looks.get(quantity, ())) for quantity in roots}
    where = {quantity: condition(cases_with(usable, quantity, roots)) for quantity in roots}
    lines += together(said)
    lines += together({quantity: [text] if text else [] for quantity, text in where.items()})
    # Last where more cases are wrong for another reason.
    often = sum("raised" in each.wrong for each in seen) > sum(bool(each.wrong) for each in usable)
    kept = lines[: LINES - len(raised)]
    return raised + kept if often else kept + raised


def said_of(quantity: str, looks: Sequence[Look]) -> list[str]:
    """What all wrong numbers of a quantity have in common, or else those of ordinary cases."""
    chosen = looks
    for words, condition in WHERE.items():
        chosen = [look for look in chosen if condition(look.case)]
        found = list(itertools.islice(relations(quantity, chosen), 2))
        if found:
            return found if len(chosen) == len(looks) else [words + text for text in found]
    return []


def has_means(case: Case) -> bool:
    """Whether K_m and K_s are means over the positions of a plane, where they are there."""
    return {case.config.centering, case.config.scaling} <= {None, "channel_mean", "input_mean"}


WHERE: dict[str, Callable[[Case], bool]] = {
    "": lambda _: True,
    "In ordinary cases: ": is_ordinary,
    "In ordinary cases, K_m and K_s means over positions: ": has_means,
}
"""Of which cases something may be said, each of those before it, too."""


def together(texts: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """Sentences with "{}" for a quantity, once for all the quantities of which they are true."""
    of: dict[str, list[str]] = {}
    for quantity, sentences in texts.items():
        for sentence in sentences:
            of.setdefault(sentence, []).append(quantity)
    for sentence, quantities in of.items():
        names = listed(quantities)
        text = sentence.format(names, "are" if len(quantities) > 1 else "is")
        yield text


def roots_of(seen: Sequence[Seen]) -> dict[str, bool]:
    """The wrong quantities that do not follow from others: gradients count where y is right.

    Returns:
        Whether a quantity is looked at only where y is right.
    """
    wrong: dict[str, bool] = {}
    number: Counter[str] = Counter()
    for each in seen:
        for quantity in each.ratios:
            if quantity in each.wrong and not (is_gradient(quantity) and "y" in each.wrong):
                wrong[quantity] = is_gradient(quantity)
                number[quantity] += 1
    return {quantity: wrong[quantity] for quantity in sorted(ordered(wrong), key=lambda q: -number[q])}


def ordered(quantities: Iterable[str]) -> list[str]:
    """Quantities as the layer has them: y, dx, the parameters' gradients, what is stored."""
    return sorted(quantities, key=lambda q: (q != "y", q != "dx", not is_gradient(q), q))


def cases_with(
    seen: Sequence[Seen], quantity: str, roots: Mapping[str, bool]
) -> tuple[list[Seen], list[Seen]]:
    """The cases in which a quantity is wrong, and those in which it is right."""
    # Where something is refused the state alone is compared, with what it was.
    compared = [
        each
        for each in seen
        if quantity in each.ratios and ("refusal" not in each.ratios or quantity in ("refusal", *each.wrong))
    ]
    if roots.get(quantity):
        compared = [each for each in compared if "y" not in each.wrong]
    failed = [each for each in compared if quantity in each.wrong]
    return failed, [each for each in compared if each.ratios[quantity] <= 1.0]


def overview(seen: Sequence[Seen], roots: Mapping[str, bool]) -> str:
    """Which quantities are wrong, and which are right in all cases."""
    parts = []
    for quantity in roots:
        failed, passed = cases_with(seen, quantity, roots)
        parts.append(f"{quantity} in {len(failed)} of {len(failed) + len(passed)} cases")
    text = f"Wrong: {', '.join(parts)}."
    wrong = {quantity for each in seen for quantity, ratio in each.ratios.items() if ratio > 1.0}
    if {quantity for quantity in wrong if is_gradient(quantity)} - roots.keys() and "y" in roots:
        text += " Gradients are wrong where y is."
    compared = ordered({quantity for each in seen for quantity in each.ratios})
    right = [q for q in compared if q not in wrong and (is_gradient(q) or q in ("y", *RUNNING, COUNTER))]
    return f"{text} Right in all cases: {listed(right)}." if right else text


def looks_of(seen: Iterable[Seen]) -> dict[str, list[Look]]:
    """Every wrong quantity in every step in which it is wrong; of running statistics in the first one."""
    found: dict[str, list[Look]] = {}
    for each in seen:
        if not each.wrong or len(each.outcomes) != each.case.steps or each.case.refused:
            continue
        before: Mapping[str, Any] = each.case.state()
        done: set[str] = set()
        for number, (outcome, step) in enumerate(zip(each.outcomes, due(each.case), strict=True)):
            for quantity in each.wrong:
                values, right = quantity_of(outcome, quantity), quantity_of(step.outcome, quantity)
                if values is None or right is None or np.shape(values) != np.shape(right) or quantity in done:
                    continue
                tolerance = step.tolerances.get(quantity, 0.0)
                if compare(quantity, values, right, tolerance).ratio <= 1.0:
                    continue
                if is_gradient(quantity) and "y" in each.wrong:
                    continue
                if quantity in RUNNING:
                    done.add(quantity)
                look = Look(
                    each.case,
                    number,
                    step,
                    np.asarray(values, dtype=float),
                    np.asarray(right, dtype=float),
                    tolerance,
                    before,
                )
                found.setdefault(quantity, []).append(look)
            before = step.outcome.state
    return found


def quantity_of(outcome: Outcome, quantity: str) -> Array | None:
    """A quantity by its name."""
    if quantity in ("y", "dx"):
        return outcome.y if quantity == "y" else outcome.dx
    if quantity.startswith("d "):
        return outcome.gradients.get(quantity[2:])
    return None if quantity in MEMORY else outcome.state.get(quantity)


def relations(quantity: str, looks: Sequence[Look]) -> Iterator[str]:
    """What the wrong numbers of a quantity are to those that are due, with "{}" for its name."""
    if not looks:
        return
    yield from _step(quantity, looks)
    if all(np.isnan(look.found[np.isfinite(look.right)]).any() for look in looks):
        yield "{} {} NaN in some places wherever wrong."
        return
    if all(np.isfinite(look.found[~np.isfinite(look.right)]).any() for look in looks):
        yield "{} {} finite in places where NaN or infinity is due, wherever wrong."
        return
    if all(look.fits(look.found, np.zeros(1)) for look in looks):
        yield "{} {} 0 wherever wrong."
        return
    if quantity == COUNTER:
        return
    # A relation with a number in it holds of any single value.
    if sum(look.right.size for look in looks) < 2 or all(
        largest(look.found - look.right) <= CLEAR * look.tolerance for look in looks
    ):
        yield from sizes(looks)
        return
    for name, base in bases(quantity):
        text = ratio(looks, base)
        if text:
            yield f"{name} {{1}} {text}."
            return
    if quantity in RUNNING:
        yield from weights(quantity, looks)
        return
    text = offset(quantity, looks)
    if text:
        yield f"{{}} {{}} what is due {text}."
        return
    found = [*patterns(quantity, looks)] if quantity in ("y", "dx") else [*exchanged(quantity, looks)]
    yield from found or sizes(looks)


def exchanged(quantity: str, looks: Sequence[Look]) -> Iterator[str]:
    """Whether a parameter's gradient is what is due as that of another one."""
    if not is_gradient(quantity):
        return
    for name in sorted(looks[0].step.outcome.gradients):
        others = [look.step.outcome.gradients.get(name) for look in looks]
        if all(
            other is not None
            and other.shape == look.right.shape
            and look.fits(look.found, np.asarray(other, float))
            for look, other in zip(looks, others, strict=True)
        ):
            yield f"{{}} {{}} what is due as d {name}."


def sizes(looks: Sequence[Look]) -> Iterator[str]:
    """How large the errors are, where they are small."""
    off = [largest(look.found - look.right) / (largest(look.right) or 1.0) for look in looks]
    if max(off) <= SMALL and all(np.isfinite(look.found[np.isfinite(look.right)]).all() for look in looks):
        yield f"{{}} {{}} off by at most {max(off):.1e} of the largest value that is due, wherever wrong."


def _step(quantity: str, looks: Sequence[Look]) -> Iterator[str]:
    """Since which step it is wrong."""
    first: dict[Case, int] = {}
    for look in looks:
        first[look.case] = min(look.number, first.get(look.case, look.number))
    if all(number > 0 for number in first.values()):
        yield "{} {} right in the first step of every case, and wrong only from the second or third on."


Base = Callable[[Look], Numbers | None]


def bases(quantity: str) -> Iterator[tuple[str, Base]]:
    """What of a quantity may stand in a simple relation to what is due."""
    if quantity in RUNNING:
        yield "What a batch adds to {0}", increment(quantity)
        return
    yield "{0}", lambda look: (look.found, look.right)
    if quantity == "y":
        yield "{0} less its beta (or bias)", without_bias


def without_bias(look: Look) -> Numbers | None:
    """Y without what is added last."""
    state = look.case.state()
    bias = state.get("beta", state.get("conv_bias"))
    if bias is None:
        return look.found, look.right
    added = per_channel(np.asarray(bias, dtype=float), look.right)
    return look.found - added, look.right - added


def increment(quantity: str) -> Base:
    """What a batch adds to a running statistic."""

    def base(look: Look) -> Numbers | None:
        m = weight(look)
        if m == 1.0:
            return None
        kept = m * np.asarray(look.before[quantity], dtype=float)
        return look.found - kept, look.right - kept

    return base


def weight(look: Look) -> float:
    """The weight of the old value in a step."""
    m = look.case.config.momentum
    return 1.0 - 1.0 / float(look.step.outcome.state[COUNTER]) if m is None else m


def symbols(look: Look) -> dict[str, float]:
    """Numbers of a case that a factor may be."""
    images, channels, *sizes = look.case.shape
    plane = math.prod(sizes)
    values, m = images * plane, weight(look) if COUNTER in look.step.outcome.state else 0.0
    plain = {
        "the number of images": images,
        "the number of channels": channels,
        "the number of positions of a plane": plane,
        "the number of values of a channel": values,
    }
    bessel = {
        "n / (n - 1), n the number of values of a channel": values / (values - 1) if values > 1 else 1.0
    }
    if images > 1 and values > 1:
        text = "N / (N - 1) in place of n / (n - 1), N images and n values of a channel"
        bessel[text] = images / (images - 1) * (values - 1) / values
    old = (
        {"momentum / (1 - momentum)": m / (1.0 - m), "1 / (1 - momentum)": 1.0 / (1.0 - m)} if m < 1.0 else {}
    )
    inverse = {f"1 / {name}": 1.0 / value for name, value in plain.items() if value}
    return {**plain, **inverse, **bessel, "(n - 1) / n": 1.0 / next(iter(bessel.values())), **old}


def weights(quantity: str, looks: Sequence[Look]) -> Iterator[str]:
    """As what sum of the old value and the batch's a running statistic comes out."""
    if all(look.fits(look.found, look.before[quantity]) for look in looks):
        yield "{} {} what was there before the step."
        return
    parts = [
        (look, np.asarray(look.before[quantity], dtype=float), pair[1] / (1.0 - weight(look)))
        for look in looks
        if (pair := increment(quantity)(look)) is not None
    ]
    best = max(parts, key=lambda part: largest(part[2]) / max(part[0].tolerance, LEAST), default=None)
    best = max(
        (part for part in parts if np.size(part[1]) > 2),
        key=lambda part: largest(part[2]) / max(part[0].tolerance, LEAST),
        default=best,
    )
    if best is None or np.size(best[1]) < 3:
        return
    for words, vector in ADDED.items():
        vectors = [vector(look, old) for look, old, _ in parts]
        factor = fitted(best[0].found - best[0].right, (1.0 - weight(best[0])) * vector(best[0], best[1]))
        if abs(factor) > NEARLY and all(
            look.fits(look.found, look.right + factor * (1.0 - weight(look)) * each)
            for (look, _, _), each in zip(parts, vectors, strict=True)
        ):
            yield (
                f"What a batch adds to {{}} is what is due {'plus' if factor > 0 else 'less'} "
                f"{times(factor)}{words}."
            )
            return
    look, old, new = best
    (a, b), *_ = np.linalg.lstsq(np.stack([old, new], axis=1), look.found, rcond=None)
    a, b = float(f"{a:.6g}"), float(f"{b:.6g}")
    if all(look.fits(look.found, a * old + b * new) for look, old, new in parts):
        yield f"{{}} {{}} {a:.4g} times the old value plus {b:.4g} times the batch's."


def bessel(look: Look) -> float:
    """n / (n - 1), where the running variance is the unbiased one."""
    values = look.right.size and look.step.x.size // look.right.size
    return values / (values - 1) if look.case.config.running_var == "unbiased" and values > 1 else 1.0


def batch_mean(look: Look) -> Array:
    """The batch's mean of X_cm."""
    return np.asarray(look.step.inside.mean, dtype=float)


ADDED: dict[str, Callable[[Look, Array], Array]] = {
    "eps": lambda look, _: np.full(look.right.shape, look.case.config.eps),
    "the batch's mean": lambda look, _: batch_mean(look),
    "the square of the batch's mean": lambda look, _: np.square(batch_mean(look)),
    "the square of the batch's mean, made unbiased": lambda look, _: (
        bessel(look) * np.square(batch_mean(look))
    ),
    "one": lambda look, _: np.ones(look.right.shape),
}
"""What a batch may add to a running statistic beside what is due."""


def ratio(looks: Sequence[Look], base: Base) -> str:
    """The one factor between what is found and what is due, or nothing."""
    numbers = [(look, pair) for look in looks if (pair := base(look)) is not None]
    telling = [(look, pair) for look, pair in numbers if largest(pair[1]) > 100.0 * look.tolerance]
    if not telling or not any(np.size(right) > 1 for _, (_, right) in telling):
        return ""
    best, (found, right) = max(telling, key=lambda item: largest(item[1][1]) / max(item[0].tolerance, LEAST))
    factor = fitted(found, right)
    if abs(factor - 1.0) > NEARLY and all(
        look.fits(found, factor * right, abs(factor)) for look, (found, right) in numbers
    ):
        return f"{factor:.4g} times what is due" if factor != -1 else "the negative of what is due"
    for name in symbols(best):
        each = [symbols(look).get(name, 1.0) for look, _ in numbers]
        if len(set(each)) > 1 and all(
            look.fits(found, value * right)
            for (look, (found, right)), value in zip(numbers, each, strict=True)
        ):
            return f"{name} times what is due"
    return ""


def fitted(found: Array, right: Array) -> float:
    """The factor that fits best."""
    finite = np.isfinite(found) & np.isfinite(right)
    found, right = np.where(finite, found, 0.0), np.where(finite, right, 0.0)
    size = largest(right) or 1.0
    factor = float((found / size * (right / size)).sum() / np.square(right / size).sum())
    return float(f"{factor:.6g}")


def offset(quantity: str, looks: Sequence[Look]) -> str:
    """What is added to what is due, or nothing: a multiple of something that is stored, or one number."""
    if quantity not in ("y", "dx") and looks[0].right.ndim != 1:
        return ""
    names = [name for name, value in looks[0].case.state().items() if np.ndim(value) == 1]
    for name in (*names, ""):
        if not all(not name or name in look.case.state() for look in looks):
            continue
        vectors = [added(name, look) for look in looks]
        best = max(range(len(looks)), key=lambda i: largest(vectors[i]) / max(looks[i].tolerance, LEAST))
        factor = fitted(looks[best].found - looks[best].right, vectors[best])
        if all(
            look.fits(look.found, look.right + factor * vector)
            for look, vector in zip(looks, vectors, strict=True)
        ):
            what = times(factor) + name if name else f"{abs(factor):.4g} everywhere"
            return f"{'plus' if factor > 0 else 'less'} {what}"
    return ""


def times(factor: float) -> str:
    """A factor in words, without its sign."""
    number = f"{abs(factor):.4g}"
    return "" if number == "1" else f"{number} times "


def added(name: str, look: Look) -> Array:
    """What a multiple of may be added: something that is stored, in every image and position, or 1."""
    if not name:
        return np.ones(look.right.shape)
    value = np.asarray(look.case.state()[name], dtype=float)
    return np.broadcast_to(per_channel(value, look.right) if look.right.ndim > 1 else value, look.right.shape)


def patterns(quantity: str, looks: Sequence[Look]) -> Iterator[str]:
    """How the error goes over images, channels and positions."""
    yield from itertools.islice(places(quantity, looks), 1)
    if quantity == "dx":
        telling = [look for look in looks if telling_planes(look)]
        for text, terms in THROUGH.items():
            if telling and all(fits_per(look, terms(look)) for look in telling):
                yield text
                return
    for text, axes, multiplied in PATTERNS:
        if (quantity == "y" or not multiplied) and holds(looks, axes, multiplied):
            yield text
            if multiplied and axes == "positions":
                yield from restrictions(looks)
            return
    if quantity == "y" and any(map(telling_planes, looks)) and all(map(plane_by_plane, looks)):
        yield "{} {} a factor times what is due plus a number, in every plane of more than three positions."


def telling_planes(look: Look) -> bool:
    """Whether planes have more positions than a line has numbers."""
    return math.prod(look.right.shape[2:]) > 3


def plane_by_plane(look: Look) -> bool:
    """Whether y is in every plane a linear function of what is due."""
    if not telling_planes(look):
        return True
    axes = axes_of(look, "positions")
    found = look.found - look.found.mean(axis=axes, keepdims=True)
    right = look.right - look.right.mean(axis=axes, keepdims=True)
    size = largest(right) or 1.0
    factor = (found * (right / size)).sum(axis=axes, keepdims=True)
    factor = factor / np.maximum((right * (right / size)).sum(axis=axes, keepdims=True), LEAST)
    return look.fits(found, factor * right, largest(factor))


PATTERNS = (
    ("The error of {} is the same in every image and position of a channel.", "images positions", False),
    ("The error of {} is the same at every position of a plane (an image and channel).", "positions", False),
    ("The error of {} is the same in every channel.", "channels", False),
    ("{} less its beta (or bias) is wrong by one factor per channel.", "images positions", True),
    (
        "{} less its beta (or bias) is wrong by one factor per plane (an image and channel).",
        "positions",
        True,
    ),
    ("{} less its beta (or bias) is wrong by one factor per image and position.", "channels", True),
)
"""What is said where the error, or the factor, is the same along some axes."""


def axes_of(look: Look, names: str) -> tuple[int, ...]:
    """The axes by their names."""
    spatial = tuple(range(2, look.right.ndim))
    of = {"images": (0,), "channels": (1,), "positions": spatial}
    return tuple(axis for name in names.split() for axis in of[name])


def holds(looks: Sequence[Look], names: str, multiplied: bool) -> bool:
    """Whether the error, or the factor, is the same along some axes in all looks, and one of them tells."""
    tells = False
    for look in looks:
        axes = axes_of(look, names)
        spread = look.right - look.right.mean(axis=axes, keepdims=True)
        if (
            math.prod(look.right.shape[axis] for axis in axes) < 2
            or largest(spread) <= 100.0 * look.tolerance
        ):
            continue
        tells = True
        found, right = without_bias(look) if multiplied else (look.found, look.right)  # type: ignore[misc]
        if multiplied:
            size = largest(right) or 1.0
            factor = (found * (right / size)).sum(axis=axes, keepdims=True)
            factor = factor / np.maximum((right * (right / size)).sum(axis=axes, keepdims=True), LEAST)
            same = look.fits(found, factor * right, largest(factor))
        else:
            error = found - right
            same = look.fits(error, np.broadcast_to(error.mean(axis=axes, keepdims=True), error.shape))
        if not same:
            return False
    return tells


def through_the_batch(look: Look) -> list[Array]:
    """What a gradient through E and Var is made of."""
    x_s = np.asarray(look.step.inside.x_s, dtype=float)
    axes = axes_of(look, "positions")
    return [np.ones(x_s.shape), x_s, np.broadcast_to(x_s.mean(axis=axes, keepdims=True), x_s.shape)]


def through_planes(look: Look) -> list[Array]:
    """What a gradient through K_m or K_s is made of: one number for every plane, and what E and Var add."""
    x_s = np.asarray(look.step.inside.x_s, dtype=float)
    planes = np.eye(len(x_s)).reshape(len(x_s), len(x_s), *[1] * (x_s.ndim - 1))
    return [x_s, *(np.broadcast_to(plane, x_s.shape) for plane in planes)]


THROUGH: dict[str, Callable[[Look], list[Array]]] = {
    "The error of {} is in every channel a constant plus multiples of X_s and of its plane's mean, as where "
    "the gradient through E or Var is wrong (in planes of more than three positions).": through_the_batch,
    "The error of {} is one number per plane plus in every channel a multiple of X_s, as where the gradient "
    "through K_m or K_s is wrong (in planes of more than three positions).": through_planes,
}
"""What is said of a gradient of X whose error is made of some terms."""


def fits_per(look: Look, terms: Sequence[Array]) -> bool:
    """Whether the error is in every channel a sum of multiples of some terms."""
    error = look.found - look.right
    axes = (0, *range(2, error.ndim))
    if not np.isfinite(error).all() or math.prod(look.right.shape[axis] for axis in axes) <= len(terms):
        return False
    for channel in range(error.shape[1]):
        matrix = np.stack([term[:, channel].ravel() for term in terms], axis=1)
        mine = error[:, channel].ravel()
        if not np.isfinite(matrix).all():
            return False
        solution, *_ = np.linalg.lstsq(matrix, mine, rcond=None)
        if np.abs(matrix @ solution - mine).max() > 4.0 * look.tolerance * max(1.0, largest(mine)):
            return False
    return True


def restrictions(looks: Sequence[Look]) -> Iterator[str]:
    """Between what R then lies, and whether it sums to 1 over the channels."""
    ranges: list[Array] = []
    sums = True
    for look in looks:
        inside, numbers = look.step.inside, without_bias(look)
        if inside.restriction is None or numbers is None or inside.x_s.ndim < 3 or inside.x_s[0, 0].size < 2:
            continue
        gamma = np.asarray(look.case.state().get("gamma", np.ones(look.case.shape[1])), dtype=float)
        whole = np.asarray(inside.x_s, dtype=float) * per_channel(gamma, look.right)
        axes = axes_of(look, "positions")
        restriction = (numbers[0] * whole).sum(axis=axes) / np.maximum(np.square(whole).sum(axis=axes), LEAST)
        ranges.append(restriction)
        sums &= bool(np.allclose(restriction.sum(axis=1), 1.0, atol=1e-4))
    low = min((float(each.min()) for each in ranges), default=0.0)
    high = max((float(each.max()) for each in ranges), default=0.0)
    if ranges and sums:
        yield f"As {{}} shows it, R sums to 1 over the channels; it is from {low:.3g} to {high:.3g}."
    elif ranges and (low < -0.01 or high > 1.01):
        yield f"As {{}} shows it, R is from {low:.3g} to {high:.3g}, where it is due within 0 and 1."


def places(quantity: str, looks: Sequence[Look]) -> Iterator[str]:
    """Which images, channels and positions alone are wrong."""
    masks = []
    for look in looks:
        with np.errstate(invalid="ignore"):
            error = np.abs(look.found - look.right)
        masks.append((look, ~(error <= look.tolerance) & np.isfinite(look.right)))
    for text, inside in PLACES:
        chosen = [(inside(look.right), mask) for look, mask in masks]
        if all(not mask[~where].any() for where, mask in chosen) and any(
            (~where).any() for where, _ in chosen
        ):
            yield text
            return
    for name in ("gamma", "center_weight", "scale_weight", "scale_bias"):
        for word, sign in (("negative", -1.0), ("positive", 1.0)):
            hit, telling = [], set()
            for look, mask in masks:
                value = look.case.state().get(name)
                axes = (0, *range(2, mask.ndim))
                wrong = mask.any(axis=axes)
                if value is not None and not wrong.all():
                    telling.add(look.case)
                if value is None:
                    hit.append(False)
                    continue
                named = sign * np.asarray(value) > 0
                flat = np.ptp(look.right, axis=axes) == 0.0  # as where R is 0: nothing can be wrong there
                hit.append(bool(np.array_equal(wrong, named & (wrong | ~flat))))
            if all(hit) and len(telling) > 2:
                yield f"{{}} {{}} wrong in the channels whose {name} is {word}, and in no other."
                return


def border(right: Array) -> Array:
    """The positions at the border of the planes."""
    inside = np.zeros(right.shape, bool)
    if right.ndim > 2:
        inside[(..., *(slice(1, -1) for _ in right.shape[2:]))] = True
    return ~inside


def but_for(axis: int, index: int) -> Callable[[Array], Array]:
    """All but one image, or channel."""

    def chosen(right: Array) -> Array:
        where = np.ones(right.shape, bool)
        where[(slice(None),) * axis + (index,)] = right.shape[axis] < 2
        return where

    return chosen


def alone(axis: int, index: int) -> Callable[[Array], Array]:
    """One image, or channel, alone."""
    return lambda right: ~but_for(axis, index)(right) if right.shape[axis] > 1 else np.ones(right.shape, bool)


PLACES: tuple[tuple[str, Callable[[Array], Array]], ...] = (
    ("{} {} wrong in the last image alone, wherever there are several.", alone(0, -1)),
    ("{} {} wrong in the first image alone, wherever there are several.", alone(0, 0)),
    ("{} {} wrong in the last channel alone, wherever there are several.", alone(1, -1)),
    ("{} {} wrong in the first channel alone, wherever there are several.", alone(1, 0)),
    ("{} {} right in the first channel of every case with several.", but_for(1, 0)),
    ("{} {} right in the first image of every case with several.", but_for(0, 0)),
    ("{} {} right in the last image of every case with several.", but_for(0, -1)),
    ("{} {} wrong at the border of the planes alone.", border),
)


def condition(cases: tuple[Sequence[Seen], Sequence[Seen]]) -> str:
    """What tells the cases in which a quantity is wrong from those in which it is right."""
    failed, passed = cases
    if not failed:
        return ""
    if not passed:
        return f"{{}} {{}} wrong in all {len(failed)} cases that compare it." if len(failed) > 1 else ""
    mine = [features(each.case) for each in failed]
    left = [features(each.case) for each in passed]
    total = len(left)
    said: list[str] = []
    while left and len(said) < CONDITIONS:
        best = max(mine[0], key=lambda name: excluded(name, mine, left))
        if not excluded(best, mine, left):
            break
        values = dict.fromkeys(each[best] for each in mine)
        said.append(phrase(best, [*values], [*dict.fromkeys(e[best] for e in left if e[best] not in values)]))
        left = [each for each in left if each[best] in values]
    if not said:
        return ""
    text = f"{{}} {{}} wrong only {listed(said)}"
    if not left:
        return f"{text}: in all {len(failed)} such cases, and in none of the other {total}."
    return f"{text}: in {len(failed)} of {len(failed) + len(left)} such cases."


def excluded(name: str, mine: Sequence[Mapping[str, str]], left: Sequence[Mapping[str, str]]) -> int:
    """How many cases a condition rules out that holds in all of mine."""
    values = {each[name] for each in mine}
    return sum(each[name] not in values for each in left)


def phrase(name: str, values: Sequence[str], others: Sequence[str]) -> str:
    """A condition in words."""
    known = PHRASES.get((name, values[0])) if len(values) == 1 else None
    if known:
        return known
    if len(others) == 1 and (name, f"not {others[0]}") in PHRASES:
        return PHRASES[name, f"not {others[0]}"]
    if len(values) <= len(others) or len(values) <= 2:
        return f"with {name} {' or '.join(map(off, values))}"
    return f"with a {name} other than {' and '.join(map(off, others))}"


def off(value: str) -> str:
    """None in words."""
    return "off" if value == "None" else value


PHRASES = {
    ("mode", "training"): "in training",
    ("mode", "evaluation"): "in evaluation",
    ("centering", "not None"): "with centering",
    ("scaling", "not None"): "with scaling",
    ("mixed precision", "None"): "outside mixed precision",
    ("mixed precision", "not None"): "in mixed precision",
    ("spoilt", "None"): "where nothing that is stored is spoilt",
    ("spoilt", "not None"): "where something that is stored is spoilt",
    ("devices", "1"): "on a single device",
    ("devices", "not 1"): "on several devices",
    ("mean of the data", "off 0"): "where the data has a mean",
    ("images", "1"): "with one image",
    ("images", "more"): "with more than one image",
    ("channels", "1"): "with one channel",
    ("channels", "more"): "with more than one channel",
    ("positions of a plane", "more"): "where a plane has more than one position",
    ("positions of a plane", "1"): "where a plane has one position",
    ("gamma and beta", "True"): "with gamma and beta",
    ("gamma and beta", "False"): "without gamma and beta",
    ("track_running_stats", "True"): "with running statistics",
    ("track_running_stats", "False"): "without running statistics",
    ("what is due", "a refusal"): "where a refusal is due",
    ("what is due", "numbers"): "where numbers are due",
    ("momentum", "None"): "with momentum=None",
}


def features(case: Case) -> dict[str, str]:
    """What may decide whether a case fails, the simplest first."""
    many = {True: "more", False: "1"}
    shown = case.features
    mode = {"mode": "training" if case.training else "evaluation", "layer": case.layer}
    sizes = {
        "images": many[case.shape[0] > 1],
        "channels": many[case.shape[1] > 1],
        "positions of a plane": many[math.prod(case.shape[2:]) > 1],
        "mean of the data": "0"
        if case.data in ("offset0", "constant", "tiny", "denormal", "huge", "inf", "nan")
        else "off 0",
        "what is due": "a refusal" if case.refused or case.spoil[1] in REFUSED_SPOILS else "numbers",
    }
    return mode | sizes | {name: value for name, value in shown.items() if name not in mode}


def counted(number: int, thing: str) -> str:
    """A number with its word."""
    return f"{number} {thing}{'' if number == 1 else 's'}"


def listed(words: Sequence[str]) -> str:
    """Words as a list."""
    return ", ".join(words[:-1]) + (" and " if len(words) > 1 else "") + words[-1] if words else ""


def _raised(seen: Sequence[Seen]) -> Iterator[str]:
    """What a subject raised, and where."""
    failed = [each for each in seen if "raised" in each.wrong]
    if not failed:
        return
    texts = Counter(each.message.partition("\n")[0] for each in failed)
    (text, number), *others = texts.most_common()
    more = f" and {counted(len(others), 'other text')}" if others else ""
    yield f"It raises in {len(failed)} of {len(seen)} cases: {text} ({number} of them){more}."
    where = condition((failed, [each for each in seen if "raised" not in each.wrong]))
    if where and "wrong only" in where:
        yield where.format("It", "").replace("  ", " ").replace("wrong only", "raises only", 1)
