"""A configuration made of themes: what its fields may hold, and copies of it with some of them
replaced.

A theme is a frozen dataclass of numbers, texts and choices, each a flag of the command line. Field
names are unique over all themes, so that a field goes by its name alone: `config.but(alpha=0.1,
seed=3)`.
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple, Self

import tyro


class UserError(Exception):
    """A mistake of the user's: printed as one line that names field, value and remedy; exit code
    2."""


class Range(NamedTuple):
    """The closed interval that a number must lie in."""

    low: float
    high: float


def whole(low: int, high: int) -> Any:
    """Return the type of a whole number in low..high, which `--help` shows."""
    return Annotated[int, Range(low, high), tyro.conf.arg(metavar=f"{low}..{high}")]


def real(low: float, high: float) -> Any:
    """Return the type of a real number in low..high, which `--help` shows."""
    return Annotated[float, Range(low, high), tyro.conf.arg(metavar=f"{low:g}..{high:g}")]


Count = whole(1, 1000)
Clients = whole(1, 60_000)
SomeClients = whole(0, 60_000)  # 0: none, or all
Rounds = whole(1, 100_000)
Probability = real(0, 1)
Rate = real(0, 1000)
Scale = real(0, 1e6)


@functools.cache
def hints(theme: type) -> dict[str, Any]:
    """Return the types of a theme's fields, the ranges of numbers with them."""
    return typing.get_type_hints(theme, include_extras=True)


class Theme:
    """Base of the frozen dataclasses that hold the fields, or other themes.

    Making one checks each field.
    """

    def __post_init__(self) -> None:
        """Raise UserError for a value of the wrong type or range."""
        for field, value in vars(self).items():
            if not isinstance(value, Theme):
                check_value(field, value, hints(type(self))[field])

    def flat(self) -> dict[str, Any]:
        """Return field -> value over all themes in this one: what config.json holds of a Config."""
        found: dict[str, Any] = {}
        for field, value in vars(self).items():
            if isinstance(value, Theme):
                found |= value.flat()
            else:
                real_number = float in typing.get_args(hints(type(self))[field])
                # 1 and 1.0 are one configuration
                found[field] = float(value) if real_number else value
        return found

    def changed(self) -> dict[str, Any]:
        """Return field -> value of what differs from the default."""
        default = type(self)().flat()
        return {field: value for field, value in self.flat().items() if value != default[field]}

    def pick(self, names: Sequence[str]) -> dict[str, Any]:
        """Return the fields of these names, as a row of a table gets them."""
        return {name: value for name, value in self.flat().items() if name in names}

    def but(self, **changes: Any) -> Self:
        """Return a copy with the fields of these names replaced.

        Raise UserError for a wrong name or value.
        """
        known = self.flat()
        for field in changes.keys() - known.keys():
            raise UserError(
                f"{field!r:.60} is no field of the configuration; choose from {', '.join(known)}"
            )
        replaced = {}
        for field, value in vars(self).items():
            if isinstance(value, Theme):
                replaced[field] = value.but(
                    **{name: changes[name] for name in changes.keys() & value.flat().keys()}
                )
            elif field in changes:
                replaced[field] = changes[field]
        return dataclasses.replace(self, **replaced)

    def only_used(self, **changes: Any) -> Self:
        """Return a copy with these fields replaced, and each that then has no effect at its
        default; here, none is."""
        return self.but(**changes)

    def choices(self, field: str) -> tuple[str, ...]:
        """Return what the field of this name may be, of a few."""
        if field in vars(self):
            return typing.get_args(hints(type(self))[field])
        return next(
            theme.choices(field)
            for theme in vars(self).values()
            if isinstance(theme, Theme) and field in theme.flat()
        )


def check_value(field: str, value: Any, hint: Any) -> None:
    """Raise UserError where `value` is not what `hint`, the field's type, asks for."""
    choices = typing.get_args(hint) if typing.get_origin(hint) is Literal else ()
    remedy = f"choose {', '.join(choices)}" if choices else "give a text without a null character"
    if hint is bool:
        valid = isinstance(value, bool)
        remedy = "choose True or False"
    elif hint is str or choices:
        valid = isinstance(value, str) and "\0" not in value and (not choices or value in choices)
    else:
        kind, span, _ = typing.get_args(hint)
        number = isinstance(value, int if kind is int else (int, float)) and not isinstance(
            value, bool
        )
        valid = number and span.low <= value <= span.high
        remedy = f"choose a {'whole ' if kind is int else ''}number in {span.low:g}..{span.high:g}"
    if not valid:
        raise UserError(f"{field}={value!r:.60} is not possible; {remedy}")
