"""Configuration fields: types, ranges, and copies with other values.

A group is a frozen dataclass of numbers, texts and choices. Each field is a flag of the command
line. Names are unique over all groups, so a field is found by its name alone:
`config.replace(alpha=0.1, seed=3)`.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import os
import re
import sys
import typing
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, NamedTuple, Self

import tyro


def in_notebook() -> bool:
    """Return whether IPython runs the code: a notebook, or its own terminal."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and ipython.get_ipython() is not None


def name_fields(text: str) -> str:
    """Return a message as a notebook's user writes it: client_lr=0.01 in place of a flag."""
    if not in_notebook():
        return text

    def replaced(found: re.Match[str]) -> str:
        field = found["flag"].replace("-", "_")
        value = found["value"]
        return f"{field}={value}" if value else field

    return re.sub(r"(?<!\S)--(?P<flag>[a-z][a-z-]*[a-z])( (?P<value>\d[\w.]*))?", replaced, text)


def render_as_line(error: BaseException) -> list[str]:
    """Render an error in IPython as one line, without a traceback."""
    return [name_fields(f"{type(error).__name__}: {error}".rstrip(": "))]


class UserError(Exception):
    """A user's mistake, printed as one line with the field, its value and the cure; exit code 2."""

    _render_traceback_ = render_as_line

    def __str__(self) -> str:
        """Return the line, without the trace that TensorFlow puts before it in its graphs."""
        text = super().__str__()
        traced = text.startswith("in user code:")
        return text.rpartition("UserError: ")[2].strip() if traced else text


class Range(NamedTuple):
    """The closed interval that a number must lie in."""

    low: float
    high: float


def format_number(number: float) -> str:
    """Return a number as people write it: 0.001, 1,000,000."""
    is_large = abs(number) >= 1 and number == int(number)
    return f"{int(number):,}" if is_large else f"{number:g}"


def number_type(kind: Any, low: float, high: float) -> Any:
    """Return the type of a number from `low` to `high`, both included; --help shows the range."""
    metavar = f"{format_number(low)}..{format_number(high)}"
    return Annotated[kind, Range(low, high), tyro.conf.arg(metavar=metavar)]


def int_range(low: int, high: int) -> Any:
    """Return the type of an integer in this range."""
    return number_type(int, low, high)


def float_range(low: float, high: float) -> Any:
    """Return the type of a float in this range."""
    return number_type(float, low, high)


def optional_float(low: float, high: float) -> Any:
    """Return the type of a float in this range, or None: the default depends on other fields."""
    return number_type(float | None, low, high)


def optional_int(low: int, high: int) -> Any:
    """Return the type of an integer in this range, or None: the default depends on other fields."""
    return number_type(int | None, low, high)


def text(metavar: str) -> Any:
    """Return the type of a text, which --help calls `metavar`."""
    return Annotated[str, tyro.conf.arg(metavar=metavar)]


class Choices(NamedTuple):
    """The choices of a text field: (name, its line in --help)."""

    lines: tuple[tuple[str, str], ...]
    pattern: str = ""  # a regular expression of the other texts that it may be
    others: str = ""  # how --help calls those


def choice(table: dict[str, Any], pattern: str = "", others: str = "") -> Any:
    """Return the type of a text that is a key of `table`: of name -> its line in --help.

    A value may also be an object with this line as its attribute `help`. With a `pattern` the text
    may be another that matches it, such as `others`.
    """
    lines = tuple((name, getattr(value, "help", value)) for name, value in table.items())
    if not pattern:
        return Annotated[Literal[tuple(table)], Choices(lines)]
    metavar = tyro.conf.arg(metavar=f"{{{','.join(filter(None, [*table, others]))}}}")
    return Annotated[str, Choices(lines, pattern, others), metavar]


Path = text("PATH")
Folder = text("FOLDER")
Name = text("NAME")
Count = int_range(1, 1000)
NumClients = int_range(0, 60_000)
CountOrZero = int_range(0, 60_000)  # the field's docstring says what 0 stands for
Rounds = int_range(1, 100_000)
Probability = float_range(0, 1)
Rate = float_range(0, 1000)
OptionalRate = optional_float(0, 1000)
Scale = float_range(0, 1e6)


def to_plain(value: Any) -> Any:
    """Return a NumPy number as Python's, and a path as text; any other value as it is."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    is_number = getattr(value, "ndim", None) == 0 and hasattr(value, "item")
    return value.item() if is_number else value


def cached(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Cache a function of a class, which mypy calls unhashable."""
    return functools.cache(function)


@cached
def hints(group: Any) -> dict[str, Any]:
    """Return field -> type of a group, with the ranges of numbers."""
    return typing.get_type_hints(group, include_extras=True)


@dataclasses.dataclass(frozen=True)
class ConfigGroup:
    """Base of the dataclasses that hold fields, or other groups. Each field is checked."""

    def __post_init__(self) -> None:
        """Raise UserError for a value of the wrong type or range."""
        for field, value in vars(self).items():
            hint = hints(type(self))[field]
            if isinstance(hint, type) and issubclass(hint, ConfigGroup):
                if not isinstance(value, hint):
                    raise UserError(
                        f"{field}={value!r:.60} is not a group of fields; give fields by their "
                        "names: Config().replace(rounds=3)"
                    )
            else:
                check_value(field, value, hint)

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Return field -> default value over all groups in this one."""
        return defaults_of(cls)

    @classmethod
    def types(cls) -> dict[str, Any]:
        """Return field -> type over all groups in this one."""
        return types_of(cls)

    def to_dict(self) -> dict[str, Any]:
        """Return field -> value over all groups in this one: what config.json holds."""
        fields: dict[str, Any] = {}
        for field, value in vars(self).items():
            if isinstance(value, ConfigGroup):
                fields |= value.to_dict()
            elif is_float(hints(type(self))[field]) and value is not None:
                fields[field] = float(value)  # 1 and 1.0 are the same configuration
            else:
                fields[field] = value
        return fields

    def changed(self) -> dict[str, Any]:
        """Return field -> value of those that differ from the default."""
        default = self.defaults()
        return {field: value for field, value in self.to_dict().items() if value != default[field]}

    def subset(self, names: Sequence[str]) -> dict[str, Any]:
        """Return name -> value of these fields."""
        return {name: value for name, value in self.to_dict().items() if name in names}

    def replace(self, **changes: Any) -> Self:
        """Return a copy with other values in these fields.

        Raises UserError for an unknown field, or a value of the wrong type or range.
        """
        changes = {field: to_plain(value) for field, value in changes.items()}
        known = self.to_dict()
        for field in changes.keys() - known.keys():
            near = difflib.get_close_matches(field, known, n=3, cutoff=0.6)
            raise UserError(
                f"{field!r:.60} is not a configuration field; choose {', '.join(near or known)}"
            )
        replaced = {}
        for field, value in vars(self).items():
            if isinstance(value, ConfigGroup):
                own = changes.keys() & value.to_dict().keys()
                replaced[field] = value.replace(**{name: changes[name] for name in own})
            elif field in changes:
                replaced[field] = changes[field]
        return dataclasses.replace(self, **replaced)

    def choices(self, field: str) -> tuple[str, ...]:
        """Return the values that the field of this name can have, if they are a few texts."""
        if field in vars(self):
            return choices_of(hints(type(self))[field])
        groups = [value for value in vars(self).values() if isinstance(value, ConfigGroup)]
        return next(group.choices(field) for group in groups if field in group.to_dict())


@cached
def defaults_of(group: Any) -> dict[str, Any]:
    """Return field -> default value over all groups in this one."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(group):
        value: Any = field.default
        values |= value.to_dict() if isinstance(value, ConfigGroup) else {field.name: value}
    return values


@cached
def types_of(group: Any) -> dict[str, Any]:
    """Return field -> type over all groups in this one."""
    types: dict[str, Any] = {}
    for field, hint in hints(group).items():
        is_group = isinstance(hint, type) and issubclass(hint, ConfigGroup)
        types |= types_of(hint) if is_group else {field: hint}
    return types


def choices_mark(hint: Any) -> Choices | None:
    """Return the Choices in an annotated type, or None."""
    return next((mark for mark in typing.get_args(hint)[1:] if isinstance(mark, Choices)), None)


def choices_of(hint: Any) -> tuple[str, ...]:
    """Return the texts that a field of this type can be; of any other type nothing."""
    if mark := choices_mark(hint):
        return tuple(name for name, _ in mark.lines)
    if typing.get_origin(hint) is Annotated:
        hint = typing.get_args(hint)[0]
    return typing.get_args(hint) if typing.get_origin(hint) is Literal else ()


def choice_lines(hint: Any) -> dict[str, str]:
    """Return choice -> its line in --help, of a type that `choice` made; of any other nothing."""
    mark = choices_mark(hint)
    return dict(mark.lines) if mark else {}


def describe_range(span: Range) -> str:
    """Return "1 to 100", as people write it: "0.001 to 1,000,000"."""
    return f"{format_number(span.low)} to {format_number(span.high)}"


def is_plain_text(hint: Any) -> bool:
    """Return whether a field of this type holds any text."""
    return (typing.get_args(hint) or [hint])[0] is str and not choices_mark(hint)


def is_float(hint: Any) -> bool:
    """Return whether a field of this type holds a float, or None."""
    arguments = typing.get_args(hint)
    return bool(arguments) and arguments[0] in (float, float | None)


NOT_BUILT_IN = "this data set is not built in; save it as an .npz and give it with --data FILE.npz"
CUSTOM_MODEL = "this network is not built in; give a custom one with --model FILE.py:FUNCTION"
NON_IID = "choose a non-IID split, such as dirichlet, shards or labels-per-client"
USUAL_WORDS = {  # (field, a word that other programs take there) -> the cure
    **{("partition", word): NON_IID for word in ("noniid", "non-iid", "non_iid", "niid", "lda")},
    ("partition", "pathological"): "choose shards, McMahan's pathological split",
    ("partition", "power-law"): "choose quantity",
    **{
        ("dataset", name): NOT_BUILT_IN
        for name in (
            *("cifar", "cifar10", "cifar-10", "cifar100", "cifar-100", "svhn", "usps", "kmnist"),
            *("fashion", "fashionmnist", "fashion-mnist", "fmnist", "emnist", "femnist"),
            *("medmnist", "imagenet", "shakespeare", "celeba"),
        )
    },
    **{("model", name): CUSTOM_MODEL for name in ("resnet", "resnet18", "vgg", "vgg11", "lstm")},
    ("model", "linear"): "choose logreg",
    ("model", "lr"): "choose logreg",
    ("algorithm", "fedopt"): "choose fedadagrad, fedadam or fedyogi",
    ("algorithm", "local"): "use --baselines, which also trains each client alone",
    ("aggregator", "fedavg"): "choose mean",
    ("aggregator", "geomed"): "choose median, trimmed-mean, krum or multi-krum",
    ("aggregator", "bulyan"): "choose median, trimmed-mean, krum or multi-krum",
}


def check_value(field: str, value: Any, hint: Any) -> None:
    """Raise UserError if `value` does not fit `hint`, the type of the field."""
    fault = "not a valid value"
    if hint is bool:
        valid = isinstance(value, bool)
        cure = "it must be True or False"
    elif is_plain_text(hint):
        valid = isinstance(value, str) and "\0" not in value
        cure = "it must be a text without null characters"
    elif choices := choices_of(hint):
        mark = choices_mark(hint)
        others = mark.others if mark else ""
        is_other = others and isinstance(value, str) and re.fullmatch(mark.pattern, value)
        valid = isinstance(value, str) and (value in choices or bool(is_other))
        cure = f"choose {', '.join(filter(None, (*choices, others)))}"
        near = difflib.get_close_matches(str(value).lower(), choices, n=1, cutoff=0.75)
        if (field, str(value).lower()) in USUAL_WORDS:
            cure = USUAL_WORDS[field, value.lower()]
        elif near:
            cure = f"did you mean {near[0]}? {cure}"
        elif others and str(value).endswith(".py"):
            cure = f"name its function too, such as {value!s:.60}:build"
    else:
        kind, span, _ = typing.get_args(hint)
        is_whole = kind in (int, int | None)
        is_number = isinstance(value, int if is_whole else (int, float))
        kind_of_number = "an integer" if is_whole else "a number"
        fault = "out of range" if is_number else f"not {kind_of_number}"
        in_range = is_number and not isinstance(value, bool) and span.low <= value <= span.high
        valid = in_range or (value is None and kind in (int | None, float | None))
        cure = f"it must be {kind_of_number} from {describe_range(span)}"
        if is_number and span == Range(0, 1) and 1 < value <= 100:
            cure += f", such as {value / 100:g} for {value:g} %"
    if not valid:
        raise UserError(f"{field}={value!r:.60} is {fault}; {cure}")
