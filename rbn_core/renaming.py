"""The rename table by which nearly all arrays of a state would find their places."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

Shapes = Mapping[str, tuple[int, ...]]

NEARLY_ALL = 0.9
"""Which share of a target's arrays has to match before a table is suggested."""

MOST_RULES = 4
"""More replacements than these are no common form, but another network."""

MOST_COMPARED = 60
"""With how many arrays of its shape an array is compared: the parts of a name differ alike all over."""


@dataclass(frozen=True)
class Rule:
    """One replacement in dotted names: of what they begin with, or of parts further inside.

    Args:
        before: The parts to replace; none where something is put before every name.
        after: What takes their place; nothing where they go.
        begins: Whether it is of what names begin with.
    """

    before: str
    after: str
    begins: bool

    def __call__(self, name: str) -> str:
        """The name with the replacement."""
        if self.begins:
            if not self.before:
                return f"{self.after}.{name}"
            rest = name.removeprefix(f"{self.before}.")
            return name if rest == name else ".".join(part for part in (self.after, rest) if part)
        after = f".{self.after}." if self.after else "."
        return name.replace(f".{self.before}.", after, 1)


def suggested(state: Shapes, target: Shapes) -> dict[str, str]:
    r"""A rename table, as `rbn_core.matching.match` takes it, with which nearly all of a target would match.

    Args:
        state: The shapes of what there is.
        target: The shapes of what is needed.

    Returns:
        Patterns with replacements, and an empty one for what is to be left out; empty where no table of up to
        `MOST_RULES` replacements makes nearly all match.
    """
    names = {name: name for name in state}
    rules: list[Rule] = []
    while len(rules) < MOST_RULES and (rule := _best(names, state, target)):
        rules.append(rule)
        names = {name: rule(renamed) for name, renamed in names.items()}
    if not rules or _matching(names, state, target) < NEARLY_ALL * len(target):
        return {}
    return _table(rules, names, target)


def _best(names: Mapping[str, str], state: Shapes, target: Shapes) -> Rule | None:
    """The replacement after which the most match, if it is more than before."""
    open_names = [(name, renamed) for name, renamed in names.items() if target.get(renamed) != state[name]]
    taken = set(names.values())
    by_end: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for name, renamed in open_names:
        by_end.setdefault((renamed.rpartition(".")[2], state[name]), []).append(renamed)
    found: Counter[Rule] = Counter()
    for name, shape in target.items():
        if name not in taken:
            alike = by_end.get((name.rpartition(".")[2], shape), [])
            found.update({_between(other, name) for other in alike[:MOST_COMPARED]})
    before = _matching(names, state, target)
    scores = {
        rule: _matching({name: rule(renamed) for name, renamed in names.items()}, state, target)
        for rule, _ in found.most_common(12)
    }
    best = max(scores, key=lambda rule: (scores[rule], found[rule]), default=None)
    return best if best is not None and scores[best] > before else None


def _between(name: str, wanted: str) -> Rule:
    """The replacement that makes one name of another."""
    one, other = name.split("."), wanted.split(".")
    end = 0
    while end < min(len(one), len(other)) and one[-1 - end] == other[-1 - end]:
        end += 1
    one, other = one[: len(one) - end], other[: len(other) - end]
    start = 0
    while start < min(len(one), len(other)) and one[start] == other[start]:
        start += 1
    return Rule(".".join(one[start:]), ".".join(other[start:]), begins=start == 0)


def _matching(names: Mapping[str, str], state: Shapes, target: Shapes) -> int:
    """How many arrays of the target there are, of the right shape."""
    return len({renamed for name, renamed in names.items() if target.get(renamed) == state[name]})


def _table(rules: list[Rule], names: Mapping[str, str], target: Shapes) -> dict[str, str]:
    """The replacements as patterns: only the first that matches counts, so that one has to do all at once."""
    table: dict[str, str] = {}
    used: dict[tuple[Rule, ...], None] = {}
    for name, renamed in names.items():
        if renamed in target and renamed != name:
            applied, now = [], name
            for rule in rules:
                if rule(now) != now:
                    applied.append(rule)
                    now = rule(now)
            used[tuple(applied)] = None
    for combination in sorted(used, key=len, reverse=True):
        pattern, replacement = _pattern(combination)
        table[pattern] = replacement
    kept = {name.partition(".")[0] for name, renamed in names.items() if renamed in target}
    others = dict.fromkeys(name.partition(".")[0] for name, renamed in names.items() if renamed not in target)
    left = [re.escape(first) for first in others if first not in kept]
    if left:
        table[rf"({'|'.join(left)})(\..*)?"] = ""
    return table


def _pattern(rules: tuple[Rule, ...]) -> tuple[str, str]:
    """One pattern and its replacement for several replacements in a name."""
    begins = [rule for rule in rules if rule.begins]
    inside = sorted({rule for rule in rules if not rule.begins}, key=rules.index)
    pattern = "".join(rf"{re.escape(rule.before)}\." for rule in begins if rule.before)
    replacement = "".join(f"{rule.after}." for rule in reversed(begins) if rule.after)
    for group, rule in enumerate(inside, 1):
        pattern += rf"(.*?)\.{re.escape(rule.before)}\."
        replacement += rf"\{group}." + (f"{rule.after}." if rule.after else "")
    return pattern + "(.*)", replacement + rf"\{len(inside) + 1}"


def as_toml(table: Mapping[str, str]) -> str:
    """A rename table as the lines of a map file."""
    return "\n".join(["[rename]", *(f"'{pattern}' = '{name}'" for pattern, name in table.items())])
