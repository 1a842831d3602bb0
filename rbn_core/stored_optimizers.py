"""The optimizers that checkpoints of PyTorch and Jittor hold beside a network, and whose arrays theirs are.

    PyTorch   {"state": {NUMBER: {"momentum_buffer": array}}, "param_groups": [{"params": [NUMBER]}]}
    Jittor    {"defaults": {"lr": 0.1, "n_step": 9, "param_groups": [{"params": [array], "values": [array]}]}}

PyTorch numbers the parameters in the order in which the optimizer was given them, and names them only where
it was given their names. Jittor stores the network's own arrays again, which are the same in the file.
Neither says what optimizer it is, which its options tell. What these do not tell is never guessed: then the
optimizer stays behind, with the reason.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from rbn_core.matching import State
from rbn_core.names import RUNNING_STATISTICS
from rbn_core.pickles import PREFIXES, Array, Note, said
from rbn_core.training import REFUSED, Training, fault, few, grouped

Shape = tuple[int, ...]
Place = tuple[str, ...]

SLOTS: dict[str, dict[str, dict[str, str]]] = {
    "torch": {
        "sgd": {"momentum": "momentum_buffer"},
        "adam": {"first_moment": "exp_avg", "second_moment": "exp_avg_sq"},
    },
    "jittor": {
        "sgd": {"momentum": "values"},
        "adam": {"first_moment": "m", "second_moment": "values"},
    },
}
"""What an optimizer keeps for every parameter, and what each framework calls it."""

OPTIONS: dict[str, dict[str, set[str]]] = {
    "torch": {
        "sgd": {"lr", "weight_decay", "momentum", "dampening", "nesterov"},
        "adam": {"lr", "weight_decay", "betas", "eps", "amsgrad"},
    },
    "jittor": {
        "sgd": {"lr", "weight_decay", "momentum", "dampening", "nesterov"},
        "adam": {"lr", "weight_decay", "betas", "eps"},
    },
}
"""The options of SGD, and those of Adam and AdamW, by which they are told from others."""

HARMLESS = {
    "torch": {
        *("params", "param_names", "name", "maximize", "foreach", "differentiable", "fused", "capturable"),
        *("decoupled_weight_decay", "initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum"),
        "swa_lr",
    },
    "jittor": {"params", "values", "m", "grads", "name", "initial_lr"},
}
"""What groups can have beside these: PyTorch's schedules keep their own there."""

BOOKKEEPING = {"param_groups", "param_sync_iter", "n_step"}
"""What a Jittor optimizer stores beside its options."""

AGAIN = {"sgd": ("momentum", "nesterov"), "adam": ("betas", "eps")}
"""The options that are no state: the next optimizer needs them, and the canonical file has no place."""

ELSEWHERE = "an optimizer's state, which only a canonical file takes"
"""What is to be said of an optimizer where its state is not asked for."""

DISTRIBUTED = "an optimizer's state stays behind: it is not read from a distributed checkpoint"
"""The same of one that is in parts."""

DEEPEST = 4
"""How many dictionaries, one in another, are looked into for one."""

STEP = "step"
"""Where a count of steps is, among what is kept for a parameter."""


class LeftOutError(ValueError):
    """Why an optimizer's state stays behind."""

    def __str__(self) -> str:
        return f"an optimizer's state stays behind: {super().__str__()[:300]}"


class Sketch(NamedTuple):
    """What is known of an array before it is read.

    Args:
        shape: Its shape.
        dtype: Its dtype.
        key: What is the same for the same array alone.
    """

    shape: Shape
    dtype: np.dtype[Any]
    key: Any


Sketcher = Callable[[Any], Sketch | None]
"""What is known of what stands for an array; nothing of what does not."""


class Stored(NamedTuple):
    """An optimizer, before its arrays are read.

    Args:
        kind: "sgd" or "adam".
        slots: What it keeps for every parameter.
        options: The learning rate and the weight decay of every parameter, by its name in the file.
        arrays: By slot and name what stands for the arrays, and under "step" for counts of steps. A parameter
            that has had no gradient yet has none.
        steps: The counts of steps that are plain numbers.
        decoupled: Whether its weight decay is decoupled.
        remark: What of it is not in a training, in words.
    """

    kind: str
    slots: tuple[str, ...]
    options: dict[str, tuple[float, float | None]]
    arrays: dict[tuple[str, str], Any]
    steps: tuple[Any, ...]
    decoupled: bool
    remark: str


@dataclass
class Beside:
    """The optimizers beside a network.

    Args:
        told: What is to be said of them, by the dotted names of their entries and of what these are in.
        stored: The one that goes along, if there is one.
        arrays: Its arrays, by slot and name in the file, once they are read.
    """

    told: dict[str, str] = field(default_factory=dict)
    stored: Stored | None = None
    arrays: dict[tuple[str, str], NDArray[Any]] = field(default_factory=dict)

    def training(self, names: Mapping[str, str], state: State) -> Training | None:
        """Where the one that goes along stands; if that is no place to go on from, what is told says so.

        Args:
            names: What the network's arrays are called, by their names in the file.
            state: These arrays, whose shapes may be others than in the file.
        """
        if self.stored is None:
            return None
        try:
            return _training(self.stored, self.arrays, names, state)
        except LeftOutError as error:
            self.told = dict.fromkeys(self.told, str(error))
            return None


def beside(
    loaded: Any,
    network: Mapping[str, Any],
    sketch: Sketcher,
    of_framework: Callable[[Mapping[str, Any], Mapping[str, Any], Sketcher], Stored],
    unlike: str = "",
) -> Beside:
    """The optimizers of a checkpoint, and of these the one that is certain to be the network's.

    Args:
        loaded: All that the checkpoint holds.
        network: What stands for the network's arrays, by their names in the file.
        sketch: Tells what is known of an array.
        of_framework: `of_torch` or `of_jittor`.
        unlike: Why it cannot be the network's, if that is known.
    """
    found = entries(loaded)
    try:
        if len(found) > 1:
            raise LeftOutError("it is one of several, and nothing tells which is the network's")
        if unlike:
            raise LeftOutError(unlike)
        for place, entry in found.items():
            stored = of_framework(entry, network, sketch)
            return Beside(_said_of([place], stored.remark), stored)
    except LeftOutError as error:
        return Beside(_said_of(found, str(error)))
    return Beside()


def unwanted(loaded: Any) -> Beside:
    """The optimizers of a checkpoint, where none is wanted."""
    return Beside(_said_of(entries(loaded), ELSEWHERE))


def of_distributed(loaded: Any) -> Beside:
    """Those of a distributed checkpoint."""
    return Beside(_said_of(entries(loaded), DISTRIBUTED))


def _said_of(places: Iterable[Place], words: str) -> dict[str, str]:
    return {".".join(place[:depth]): words for place in places for depth in range(1, len(place) + 1)}


def entries(loaded: Any) -> dict[Place, Any]:
    """All optimizers that a checkpoint holds, by the names under which they are, one in another.

    Args:
        loaded: What a `rbn_core.pickles.Machine` gives.
    """
    return dict(_entries(loaded, (), set()))


def _entries(loaded: Any, place: Place, seen: set[int]) -> Iterator[tuple[Place, Any]]:
    if not isinstance(loaded, dict | list | tuple) or id(loaded) in seen or len(place) > DEEPEST:
        return
    seen.add(id(loaded))
    if _is_optimizer(loaded):
        yield place, loaded
    elif isinstance(loaded, dict):
        for name, value in loaded.items():
            if isinstance(name, str):
                yield from _entries(value, (*place, name), seen)
    else:  # Lightning's
        for number, value in enumerate(loaded):
            if _is_optimizer(value):
                yield from _entries(value, (*place, str(number)), seen)


def _is_optimizer(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    defaults = value.get("defaults")
    of_jittor = isinstance(defaults, dict) and "param_groups" in defaults
    return of_jittor or {"state", "param_groups"} <= value.keys()


def tell(left_out: Iterable[tuple[str, str]], optimizers: Mapping[str, str], note: Note) -> None:
    """Tell of what is left out, and of optimizers in words of their own.

    Args:
        left_out: The names of entries, and what they are.
        optimizers: What is to be said of optimizers, as in `Beside`.
        note: Told of each.
    """
    for name, what in left_out:
        note(name, optimizers.get(name, what))


def of_torch(entry: Mapping[str, Any], network: Mapping[str, Any], sketch: Sketcher) -> Stored:
    """An optimizer as PyTorch stores it.

    Args:
        entry: Its `state_dict()`.
        network: What stands for the network's arrays, by their names in the file.
        sketch: Tells what is known of an array.

    Raises:
        LeftOutError: It is another optimizer, gives its arrays another meaning, or it is not certain whose
            these are.
    """
    state = entry.get("state")
    groups = _groups(entry.get("param_groups"))
    if not isinstance(state, dict) or not all(isinstance(own, dict) for own in state.values()):
        raise LeftOutError("it is not as PyTorch stores one")
    kind = _kind("torch", groups)
    numbers: dict[int, None] = {}
    for group in groups:
        for number in group["params"]:
            if type(number) is not int or number in numbers:
                raise LeftOutError("its parameters have no numbers of their own")
            numbers[number] = None
    if state.keys() - numbers.keys():
        raise LeftOutError("it has arrays of parameters that are in none of its groups")
    slots = SLOTS["torch"][kind]
    shapes: dict[int, Shape] = {}
    for number, own in state.items():
        if strange := [str(key) for key in own if key not in (*slots.values(), STEP)]:
            raise LeftOutError(f"it keeps {few(strange)}, which neither SGD nor Adam does")
        for key, value in own.items():
            found = sketch(value)
            counts = key == STEP and (_is_number(value) or (found is not None and found.shape == ()))
            if value is None or counts:
                continue
            if found is None or key == STEP:
                raise LeftOutError(f"it keeps {said(value)} as {key}")
            if shapes.setdefault(number, found.shape) != found.shape:
                raise LeftOutError("what it keeps for a parameter has several shapes")
    if kind == "adam" and any(own and own.keys() != {*slots.values(), STEP} for own in state.values()):
        raise LeftOutError("it does not keep all that Adam does")
    trained = _trained(network, sketch)
    ordered = [group["params"] for group in groups]
    names = _named(groups, network, sketch) or _ordered(ordered, shapes, trained)
    for number, shape in shapes.items():
        if (needed := cast("Sketch", sketch(network[names[number]])).shape) != shape:
            raise LeftOutError(f"what it keeps for {names[number]} has the shape {shape} and not {needed}")
    if not _uses_momentum(kind, groups):
        slots = {}
    arrays = {
        (slot, names[number]): own[key]
        for number, own in state.items()
        for slot, key in (*slots.items(), (STEP, STEP))
        if sketch(own.get(key)) is not None
    }
    steps = tuple(own[STEP] for own in state.values() if _is_number(own.get(STEP)))
    members = [[names[number] for number in group["params"]] for group in groups]
    forms: list[bool | None] = [None if kind == "adam" else False]
    if any("decoupled_weight_decay" in group for group in groups):
        decaying = [group for group in groups if group["weight_decay"]] or groups
        stored = [group.get("decoupled_weight_decay") for group in decaying]
        forms = [form if isinstance(form, bool) else None for form in stored]
    if kind == "sgd" and any(forms):
        raise LeftOutError("its weight decay is decoupled, as that of SGD is not")
    return _stored(kind, slots, groups, members, arrays, steps, forms, counts=kind == "adam")


def of_jittor(entry: Mapping[str, Any], network: Mapping[str, Any], sketch: Sketcher) -> Stored:
    """An optimizer as Jittor stores it; with arguments and errors as `of_torch`."""
    defaults = entry.get("defaults")
    if not isinstance(defaults, dict) or any(not isinstance(key, str) for key in defaults):
        raise LeftOutError("it is not as Jittor stores one")
    options = _plain({key: value for key, value in defaults.items() if key not in BOOKKEEPING})
    _check_known("jittor", options)
    groups = [options | group for group in _groups(defaults.get("param_groups"))]
    kind = _kind("jittor", groups)
    slots = SLOTS["jittor"][kind] if _uses_momentum(kind, groups) else {}
    trained = {cast("Sketch", sketch(network[name])).key: name for name in _trained(network, sketch)}
    others = {found.key for value in network.values() if (found := sketch(value))} - trained.keys()
    arrays: dict[tuple[str, str], Any] = {}
    members: list[list[str]] = []
    seen = set()
    for group in groups:
        kept = {slot: group.get(key) for slot, key in slots.items()}
        if any(not isinstance(own, list) or len(own) != len(group["params"]) for own in kept.values()):
            raise LeftOutError("it does not keep an array for every parameter")
        members.append([])
        for index, parameter in enumerate(group["params"]):
            found = sketch(parameter)
            if found is None or found.key not in trained.keys() | others:
                raise LeftOutError("its parameters are not the network's own arrays in the file")
            if found.key in seen:
                raise LeftOutError("a parameter is in it twice")
            seen.add(found.key)
            if found.key in others:
                continue  # statistics, which Jittor's optimizers hold and do not change
            name = trained[found.key]
            members[-1].append(name)
            for slot, own in kept.items():
                like = sketch(cast("list[Any]", own)[index])
                if like is None or like.shape != found.shape:
                    raise LeftOutError(f"what it keeps for {name} has not the shape {found.shape}")
                arrays[slot, name] = cast("list[Any]", own)[index]
    step = defaults.get("n_step")
    if not _is_number(step):
        raise LeftOutError("it does not say how many steps it has made")
    forms: list[bool | None] = [None if kind == "adam" else False]
    return _stored(kind, slots, groups, members, arrays, (step,), forms, counts=True)


def _training(
    stored: Stored, arrays: Mapping[tuple[str, str], NDArray[Any]], names: Mapping[str, str], state: State
) -> Training:
    """Where an optimizer stands, with arguments as in `Beside`."""
    read = (array for (slot, _), array in arrays.items() if slot == STEP)
    steps = {*map(float, stored.steps), *map(float, read)}
    if len(steps) > 1:
        raise LeftOutError(f"its parameters differ in their steps, {few([f'{s:g}' for s in sorted(steps)])}")
    (step,) = steps or {0.0}
    if not math.isfinite(step) or step != int(step):
        raise LeftOutError(f"it has made {step} steps")
    slots: dict[str, State] = {slot: {} for slot in stored.slots}
    for slot, own in slots.items():
        for name in stored.options:
            like, array = state[names[name]], arrays.get((slot, name))
            if array is None:
                array = np.zeros((), like.dtype)  # which takes no memory in any shape
            own[names[name]] = (
                np.broadcast_to(array, like.shape) if array.ndim == 0 else array.reshape(like.shape)
            )
    options = {names[name]: option for name, option in stored.options.items()}
    training = Training(stored.kind, int(step), grouped(options), slots, stored.decoupled)
    if wrong := fault(training):
        raise LeftOutError(f"it has {wrong}")
    return training


def _groups(stored: Any) -> list[dict[str, Any]]:
    """The groups of parameters, with plain numbers in place of NumPy's."""
    if not isinstance(stored, list) or not stored:
        raise LeftOutError("it has no groups of parameters")
    if len({*map(id, stored)}) < len(stored):
        raise LeftOutError("a group of it is there twice")
    for group in stored:
        if not isinstance(group, dict) or not isinstance(group.get("params"), list):
            raise LeftOutError("a group of it has no parameters")
        if any(not isinstance(key, str) for key in group):
            raise LeftOutError("an option of it has no name")
    return [_plain(group) for group in stored]


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: value.array.item()
        if isinstance(value, Array) and value.array is not None and value.array.shape == ()
        else value
        for key, value in options.items()
    }


def _kind(framework: str, groups: list[dict[str, Any]]) -> str:
    """What an optimizer is, by its options, if these leave its arrays their meaning."""
    keys = {key for group in groups for key in group}
    _check_known(framework, keys)
    fitting = [
        kind
        for kind, needed in OPTIONS[framework].items()
        if keys - needed <= HARMLESS[framework] and all(needed <= group.keys() for group in groups)
    ]
    if not fitting:
        raise LeftOutError("its options are not those of SGD, Adam or AdamW")
    for group in groups:
        for option in ("lr", "weight_decay", "momentum", "dampening"):
            if not _is_number(group.get(option, 0)):
                raise LeftOutError(f"its {option} is no plain finite number")
        for option, reason in REFUSED.items():
            if group.get(option):
                raise LeftOutError(f"{option} is {said(group[option])}: {reason}")
    return fitting[0]


def _check_known(framework: str, options: Iterable[str]) -> None:
    """Refuse options that neither of the optimizers has."""
    known = set[str]().union(HARMLESS[framework], *OPTIONS[framework].values())
    if strange := sorted({*options} - known):
        raise LeftOutError(f"its options are not those of SGD, Adam or AdamW, with {few(strange)}")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 2**63


def _uses_momentum(kind: str, groups: list[dict[str, Any]]) -> bool:
    uses = {kind == "adam" or bool(group["momentum"]) for group in groups}
    if len(uses) > 1:
        raise LeftOutError("some of its groups have a momentum, and others have none")
    return uses.pop()


def _trained(network: Mapping[str, Any], sketch: Sketcher) -> dict[str, Shape]:
    """The shapes of what a network can train, by name: of what it holds under two names the first."""
    found: dict[Any, tuple[str, Shape]] = {}
    for name, value in network.items():
        known = sketch(value)
        if known and known.dtype.kind in "fV" and name.rpartition(".")[2] not in RUNNING_STATISTICS:
            found.setdefault(known.key, (name, known.shape))
    return dict(found.values())


def _named(
    groups: list[dict[str, Any]], network: Mapping[str, Any], sketch: Sketcher
) -> dict[int, str] | None:
    """The names of numbered parameters, where the optimizer was given them."""
    if not all("param_names" in group for group in groups):
        return None
    own = {_bare(name): name for name, value in network.items() if sketch(value)}
    names: dict[int, str] = {}
    for group in groups:
        given = group["param_names"]
        if not isinstance(given, list) or len(given) != len(group["params"]):
            raise LeftOutError("a group of it does not name all of its parameters")
        for number, name in zip(group["params"], given, strict=True):
            if not isinstance(name, str) or _bare(name) not in own:
                raise LeftOutError(f"it trains {said(name)}, which the network has not")
            names[number] = own[_bare(name)]
    if len({*names.values()}) < len(names):
        raise LeftOutError("a parameter is in it twice")
    return names


def _bare(name: str) -> str:
    """A name without what wrappers put before it."""
    return re.sub(f"^({'|'.join(map(re.escape, PREFIXES))})+", "", name)


def _ordered(
    groups: list[list[int]], shapes: Mapping[int, Shape], trained: Mapping[str, Shape]
) -> dict[int, str]:
    """The names of numbered parameters by their order, which is the network's in every group.

    In several groups they are told by their shapes, of which each must be in one group alone.
    """
    groups = [group for group in groups if group]
    numbers = [number for group in groups for number in group]
    if len(numbers) != len(trained):
        raise LeftOutError(f"it trains {len(numbers)} arrays, and the network has {len(trained)} to train")
    if len(groups) <= 1:
        return dict(zip(numbers, trained, strict=True))
    owner: dict[Shape, int] = {}
    alike: dict[Shape, list[str]] = {}
    for name, shape in trained.items():
        alike.setdefault(shape, []).append(name)
    left = {shape: iter(names) for shape, names in alike.items()}
    names: dict[int, str] = {}
    places = {name: place for place, name in enumerate(trained)}
    for index, group in enumerate(groups):
        before = -1
        for number in group:
            if number not in shapes:
                raise LeftOutError("it has several groups, and keeps nothing yet that tells their parameters")
            if owner.setdefault(shapes[number], index) != index:
                raise LeftOutError(
                    f"several of its groups have parameters of the shape {shapes[number]}, and nothing tells "
                    "which is which"
                )
            name = next(left.get(shapes[number], iter(())), "")
            if not name or places[name] < before:
                raise LeftOutError("its parameters are not those of the network, in their order")
            names[number], before = name, places[name]
    return names


def _stored(
    kind: str,
    slots: Mapping[str, str],
    groups: list[dict[str, Any]],
    members: list[list[str]],
    arrays: dict[tuple[str, str], Any],
    steps: tuple[Any, ...],
    forms: list[bool | None],
    *,
    counts: bool,
) -> Stored:
    """An optimizer whose arrays are known, and what of it has no place in a training.

    Args:
        kind: As in `Stored`, as are `arrays` and `steps`.
        slots: What it keeps.
        groups: Its groups.
        members: The names of each group's parameters.
        arrays: What stands for its arrays.
        steps: Its counts.
        forms: Whether its weight decay is decoupled, in each group that decays; `None` if it does not say.
        counts: Whether it counts its steps.
    """
    decays = any(group["weight_decay"] for group in groups)
    if len({*forms}) > 1:
        raise LeftOutError("the weight decay is decoupled in some of its groups, and in others it is not")
    untold = decays and forms[0] is None
    options = {
        name: (float(group["lr"]), None if untold else float(group["weight_decay"]))
        for group, own in zip(groups, members, strict=True)
        for name in own
    }
    values = {
        option: few([*dict.fromkeys(_shown(group[option]) for group in groups)]) for option in AGAIN[kind]
    }
    again = ", ".join(f"{option} {found}" for option, found in values.items())
    remark = f"goes along as the training, without what is yours to give again: {again}"
    if untold:
        decayed = few([*dict.fromkeys(f"{group['weight_decay']:g}" for group in groups)])
        remark += f", and weight decay {decayed}, as the file does not tell Adam's from AdamW's"
    if not counts:
        remark += "; PyTorch's SGD counts no steps, so that they begin at 0"
    return Stored(kind, tuple(slots), options, arrays, steps, forms[0] is True, remark)


def _shown(value: Any) -> str:
    short = isinstance(value, list | tuple) and len(value) <= 4 and all(map(_is_number, value))
    return str(value) if short else said(value)
