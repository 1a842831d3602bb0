"""What a run is: network, data, optimizer and schedule, as one set of values that is read from TOML."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_type_hints

from rbn_core.errors import RBNValueError

FOLDER = Path(__file__).parent / "presets"

PRESETS = tuple(sorted(path.stem for path in FOLDER.glob("*.toml")))
"""The presets that come along."""

OPTIMIZERS = ("sgd", "adamw")
SCHEDULES = ("step", "cosine")
CROPS = ("none", "pad", "resized")
DTYPES = ("float32", "float64")


def _value(text: str, *choices: str, least: float | None = None, above: float | None = None) -> Any:
    """A field with what it means, and which values it takes."""
    return field(metadata={"help": text, "choices": choices, "least": least, "above": above})


@dataclass(frozen=True)
class Preset:
    """All that decides which numbers a run gives, but for the framework. Every field is a key in TOML.

        preset = read_preset("rbn-imagenet").changed(epochs=90)

    Raises:
        RBNValueError: A value has another type than its field, or is out of its range.
    """

    network: str = _value("The network: one of rbn_core.architectures.ARCHITECTURES.")
    norm: str | Mapping[str, Any] = _value("Its normalization: bn, rbn, iebn, bnet, or JSON with options.")
    data: str = _value("digits, cifar10:DIR, cifar100:DIR or imagefolder:DIR.")
    image_size: int = _value("Height and width of the images that the network gets, in pixels.", least=1)
    resize: int = _value("The shorter side before the crop in evaluation; 0 is image_size.", least=0)
    crop: str = _value("How training images are cropped: none, pad or resized.", *CROPS)
    padding: int = _value("The pixels that crop = pad adds on each side.", least=0)
    flip: bool = _value("Whether half of the training images are mirrored.")
    mean: tuple[float, ...] = _value("What is subtracted from the colours, which are within 0 and 1.")
    deviation: tuple[float, ...] = _value("What the colours are divided by then.")
    epochs: int = _value("How often the run goes through the data.", least=1)
    steps: int = _value("After how many steps the run ends; 0 leaves it to the epochs.", least=0)
    batch_size: int = _value("Images in a step, over all processes.", least=1)
    accumulate: int = _value("In how many parts a step goes through them, to need less memory.", least=1)
    sync: bool = _value("Whether batch statistics are of all processes' images, or of each one's.")
    optimizer: str = _value("sgd or adamw.", *OPTIMIZERS)
    learning_rate: float = _value("Its highest learning rate.", least=0)
    momentum: float = _value("That of sgd.", above=0)
    weight_decay: float = _value("The weight decay; adamw's is decoupled from the gradient.", least=0)
    decay_norms: bool = _value("Whether norm layers and biases decay, too, as in the papers.")
    schedule: str = _value("step or cosine.", *SCHEDULES)
    milestones: tuple[float, ...] = _value("The epochs at which schedule = step multiplies by factor.")
    factor: float = _value("What the learning rate is multiplied by there.", above=0)
    warmup_epochs: float = _value("For how many epochs the learning rate rises at first.", least=0)
    label_smoothing: float = _value("What part of the target is spread over all classes.", least=0)
    dtype: str = _value("float32 or float64.", *DTYPES)
    seed: int = _value("Decides the first weights, the order of the data and their augmentation.", least=0)

    def __post_init__(self) -> None:
        hints = get_type_hints(Preset)
        for each in dataclasses.fields(self):
            value = _typed(each.name, getattr(self, each.name), hints[each.name])
            object.__setattr__(self, each.name, value)
            _check_range(each, value)
        for name in ("mean", "deviation"):
            if len(getattr(self, name)) != 3 or (name == "deviation" and min(self.deviation) <= 0):
                raise RBNValueError(
                    f"train: expected {name} of three colours{' above 0' if name == 'deviation' else ''}, "
                    f"got {list(getattr(self, name))}. Give three numbers."
                )
        if self.label_smoothing >= 1:
            raise RBNValueError(
                f"train: expected a label_smoothing below 1, got {self.label_smoothing}. 0.1 is usual."
            )

    def changed(self, **values: Any) -> Preset:
        """A preset in which these values are others.

        Raises:
            RBNValueError: A key is unknown, or a value is wrong.
        """
        _check_keys(values)
        return dataclasses.replace(self, **values)

    def as_dict(self) -> dict[str, Any]:
        """Its values by their keys, as TOML and JSON have them."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in ((each.name, getattr(self, each.name)) for each in dataclasses.fields(self))
        }

    def to_toml(self) -> str:
        """The preset as TOML, with a comment for every key, which `read_preset` reads."""
        lines = []
        for each in dataclasses.fields(self):
            value = self.as_dict()[each.name]
            lines += [f"# {each.metadata['help']}", f"{each.name} = {_toml(value)}"]
        return "\n".join(lines) + "\n"


def read_preset(name: str | Path) -> Preset:
    """A preset that comes along, by its name, or one from a TOML file.

    Args:
        name: One of `PRESETS`, or a path.

    Raises:
        RBNValueError: There is none of that name, the file is no TOML, or a key is unknown or lacks.
    """
    path = FOLDER / f"{name}.toml" if str(name) in PRESETS else Path(name)
    if not path.is_file():
        raise RBNValueError(
            f"train: expected a preset, {', '.join(PRESETS)}, or a TOML file, got {str(name)!r}. "
            f"{_near(str(name), PRESETS)}"
        )
    try:
        values = tomllib.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise RBNValueError(
            f"train: expected a preset as TOML, got {path} ({error}). Start from rbn train --print-preset."
        ) from error
    return from_dict(values, str(path))


def from_dict(values: Mapping[str, Any], source: str) -> Preset:
    """The preset of all its values by their keys.

    Args:
        values: As `Preset.as_dict` gives them.
        source: Where they come from, for the errors.

    Raises:
        RBNValueError: A key is unknown or lacks, or a value is wrong.
    """
    _check_keys(values)
    if absent := [each.name for each in dataclasses.fields(Preset) if each.name not in values]:
        raise RBNValueError(
            f"train: expected all keys of a preset, got {source} without {', '.join(absent)}. "
            "Start from rbn train --print-preset, which prints all."
        )
    return Preset(**values)


def _check_keys(values: Mapping[str, Any]) -> None:
    """Refuse keys that no preset has, with the nearest one."""
    known = [each.name for each in dataclasses.fields(Preset)]
    for key in values:
        if key not in known:
            raise RBNValueError(f"train: expected the keys of a preset, got {key!r}. {_near(key, known)}")


def _near(name: str, known: tuple[str, ...] | list[str]) -> str:
    """What was meant, perhaps."""
    found = difflib.get_close_matches(name, known, 1, 0.5)
    return f"Did you mean {found[0]!r}?" if found else "rbn train --print-preset prints a whole one."


def _typed(name: str, value: Any, hint: Any) -> Any:
    """A value as its field has it: a list as a tuple, an integer where a fraction is allowed as a float."""
    wanted = hint if isinstance(hint, type) else next(iter(get_args(hint)))
    if wanted is tuple or getattr(hint, "__origin__", None) is tuple:
        if isinstance(value, list | tuple) and all(_is_number(each) for each in value):
            return tuple(float(each) for each in value)
        kind = "a list of numbers"
    elif name == "norm":
        if isinstance(value, str) or (isinstance(value, Mapping) and "layer" in value):
            return value
        kind = "a layer's name, or a table with a layer"
    elif wanted is float:
        if _is_number(value):
            return float(value)
        kind = "a finite number"
    else:
        if type(value) is wanted:
            return value
        kind = {"int": "an integer", "bool": "true or false", "str": "a text"}[wanted.__name__]
    raise RBNValueError(f"train: expected {name} to be {kind}, got {value!r}. Correct it.")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_range(each: dataclasses.Field[Any], value: Any) -> None:
    """Refuse what is no choice of a field, or too small."""
    choices, least, above = (each.metadata[key] for key in ("choices", "least", "above"))
    if choices and value not in choices:
        raise RBNValueError(
            f"train: expected {each.name} to be one of {', '.join(choices)}, got {value!r}. "
            f"{_near(value, choices)}"
        )
    if least is not None and value < least:
        raise RBNValueError(f"train: expected {each.name} of {least} or more, got {value}. Correct it.")
    if above is not None and value <= above:
        raise RBNValueError(f"train: expected {each.name} above {above}, got {value}. Correct it.")


def _toml(value: Any) -> str:
    """A value as TOML has it, of which texts and lists are as in JSON."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {_toml(own)}" for key, own in value.items()) + " }"
    return repr(value) if isinstance(value, float) else json.dumps(value)
