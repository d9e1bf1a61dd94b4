"""The text of --compare: rows separated by commas, with settings of their own."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from harness.cli.fields import ConfigGroup, UserError, check_value
from harness.cli.flags import to_value
from harness.cli.own_files import is_own, short_name
from harness.cli.run_options import COMPARABLE, SINGLE, Run

NEVER = (
    "rounds",
    "seed",
    "preset",
    "dataset",
    "data",
    "data_name",
    "transpose",
    "validation",
    "test_share",
    "image_size",
    "holdout",
    "partition_file",
    "initial_model",
)


class Entry(NamedTuple):
    """One of the values that a --compare lists."""

    label: str
    value: Any  # of the term's field; None in a term of settings alone
    changes: dict[str, Any]  # field -> value, also of the settings in parentheses


def label_settings(settings: dict[str, Any]) -> str:
    """Return what a row of these settings is called."""
    return ", ".join(label_of(field, value) for field, value in settings.items())


def split_list(text: str) -> list[str]:
    """Return the parts between commas that are not in parentheses."""
    return [part.strip() for part in re.split(r",(?![^()]*\))", text)]


def read_term(term: str, config: Any) -> tuple[str, list[Entry]]:
    """Return (field, its entries) of "alpha=0.1,1", or of "fedavg,fedprox", names of one field.

    An entry may have settings of its own: "fedprox(client_lr=0.1,prox_mu=0.1)". The field is "" for
    entries that are settings alone, "(alpha=0.1,client_lr=0.2),(alpha=1)".
    """
    outside = re.sub(r"\([^()]*\)", "", term)
    if "(" in outside or ")" in outside:
        raise UserError(
            f"compare={term!r:.60} has unmatched parentheses; write settings of a row as in "
            "fedprox(client_lr=0.1,prox_mu=0.1)"
        )
    name, has_field, _ = outside.rpartition("=")
    parts = split_list(term.removeprefix(f"{name}=") if has_field else term)
    texts = [part.partition("(")[0].strip() for part in parts]
    settings = [part.partition("(")[2].removesuffix(")") for part in parts]
    if not any(texts) and all(settings):
        rows = [read_settings(text, term, config) for text in settings]
        labels = [label_settings(row) for row in rows]
        if len(set(labels)) < len(labels):
            raise UserError(f"compare={term!r:.60} has the same row twice; give each row once")
        return "", [Entry(label, None, row) for label, row in zip(labels, rows, strict=True)]
    field, values = read_values(term, name if has_field else None, texts, config)
    if not field:
        raise UserError(
            f"compare={term!r:.60} does not name different choices of one flag, separated by "
            f"commas; choose from {', '.join(COMPARABLE)}, such as fedavg,fedprox, or values such "
            "as alpha=0.1,1"
        )
    entries = []
    for value, text in zip(values, settings, strict=True):
        own = read_settings(text, term, config) if text else {}
        if field in own:
            raise UserError(f"compare={term!r:.60} gives {field} twice in a row; give it once")
        label = label_of(field, value)
        if own:
            label = f"{label} ({label_settings(own)})"
        check_effect(term, {field: value, **own}, own, config)
        entries.append(Entry(label, value, {field: value, **own}))
    labels = [entry.label for entry in entries]
    twice = [label for label in labels if labels.count(label) > 1]
    if twice:
        raise UserError(
            f"compare={term!r:.60} has two rows {twice[0]!r:.60}; give each row once, and "
            "functions different names"
        )
    return field, entries


def read_values(
    term: str, name: str | None, texts: Sequence[str], config: Any
) -> tuple[str, list[Any]]:
    """Return (field, values) of the texts in a term; `name` is what stands before its "="."""
    if name is not None:
        field = name.strip().removeprefix("--").replace("-", "_")
        return field, [read_value(term, field, text, config) for text in texts]
    known = [field for field in COMPARABLE if set(texts) <= set(config.choices(field))]
    field = known[0] if known else ""
    if not field and (confusion := find_confusion(texts, config)):
        raise UserError(f"compare={term!r:.60}: {confusion}")
    return field, list(texts)


def read_value(term: str, field: str, text: str, config: Any) -> Any:
    """Return the value of a field that a term names. Raises UserError if it has no such value."""
    hint = sweepable(config).get(field)
    if hint is None:
        several = "; for a grid give --compare twice" if "," in field else ""
        raise UserError(
            f"compare={term!r:.60}: {field!r:.40} is not a field that a comparison can "
            f"change; choose one such as alpha, client_lr or algorithm{several}"
        )
    value = to_value(text, hint)
    check_value(field, value, hint)
    return value


def read_settings(text: str, term: str, config: Any) -> dict[str, Any]:
    """Return field -> value of a row's settings, "client_lr=0.1,prox_mu=0.1"."""
    settings: dict[str, Any] = {}
    for part in text.split(","):
        name, equals, value = part.partition("=")
        field = name.strip().removeprefix("--").replace("-", "_")
        if not equals or field in settings:
            raise UserError(
                f"compare={term!r:.60}: {part!r:.40} is not a setting of a row; write different "
                "settings such as fedprox(client_lr=0.1,prox_mu=0.1)"
            )
        settings[field] = read_value(term, field, value.strip(), config)
    return settings


def check_effect(term: str, changes: dict[str, Any], own: dict[str, Any], config: Any) -> None:
    """Raise UserError if a row's own setting has no effect on it."""
    in_use = config.effective(**changes, **SINGLE).to_dict() if own else {}
    for field, value in own.items():
        if in_use[field] != value:
            raise UserError(
                f"compare={term!r:.60}: {field}={value!s:.40} has no effect on this row; drop it"
            )


def find_confusion(names: Sequence[str], config: ConfigGroup) -> str:
    """Return what is wrong with names that are choices of no one flag, nothing if all are empty."""
    fields = {
        name: [field for field in COMPARABLE if name in config.choices(field)] for name in names
    }
    unknown = [name for name in names if name and not fields[name]]
    if unknown:
        every = [name for field in COMPARABLE for name in config.choices(field)]
        near = difflib.get_close_matches(unknown[0].lower(), every, n=1)
        cure = f"did you mean {near[0]}?" if near else "see --help-all"
        if is_own(unknown[0]):
            cure = f"name the field too, such as algorithm={unknown[0]:.40}"
        return f"{unknown[0]!r:.40} is not a choice of {', '.join(COMPARABLE)}; {cure}"
    kinds = [
        f"{name} is a choice of {' and '.join(found)}" for name, found in fields.items() if found
    ]
    if len({tuple(found) for found in fields.values() if found}) > 1:
        return f"{', '.join(kinds)}; name choices of one flag, or give --compare twice for a grid"
    return ""


def sweepable(config: ConfigGroup) -> dict[str, Any]:
    """Return field -> type of those that a comparison can change: numbers and choices of a run."""
    own = {*Run().to_dict(), *SINGLE, *NEVER}
    return {field: hint for field, hint in config.types().items() if field not in own}


def label_of(field: str, value: Any) -> str:
    """Return how a value is called in a table: a choice by its name, a number with its field."""
    if value == "":
        return f"no {field.replace('_', ' ')}"
    if isinstance(value, str):
        name = short_name(value)
        return name if field in COMPARABLE else f"{field.replace('_', ' ')} {name}"
    return f"{field.replace('_', ' ')} {str(value).removesuffix('.0')}"
