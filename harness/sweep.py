"""Rows of a comparison, from --compare: each with the fields that it changes."""

from __future__ import annotations

import difflib
import itertools
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from harness.fields import ConfigGroup, UserError, check_value
from harness.files import expand_path
from harness.flags import split_off, to_value
from harness.run_options import Comparison, Run

COMPARABLE = ("algorithm", "partition", "aggregator", "model", "attack")  # by their choices alone
NEVER = (
    "rounds",
    "seed",
    "preset",
    "dataset",
    "data",
    "data_name",
    "transpose",
    "validation",
    "holdout",
    "partition_file",
    "initial_model",
)
MOST_RUNS = 200


class Row(NamedTuple):
    """A row of a comparison."""

    label: str  # "fedprox", "alpha 0.1", or of a grid "scaffold, alpha 0.1"
    changes: dict[str, Any]  # field -> value


class Compared(NamedTuple):
    """All rows, and which of them the others are held against: the default, else the first."""

    fields: tuple[str, ...]
    rows: list[Row]
    base: str | dict[str, str]  # of a grid: label -> that of the row it is held against


def check_comparison(config: ConfigGroup) -> None:
    """Raise UserError for a comparison that cannot be made."""
    compared_rows(config)


def compared_rows(config: ConfigGroup) -> Compared | None:
    """Return the rows of a comparison, or None for a single run.

    Raises UserError for names that do not belong to one field, and for too many runs.
    """
    flat = config.to_dict()
    if not flat["compare"] and flat["seeds"] == 1 or overlaid_folders(flat["compare"]):
        return None
    if flat["resume"]:
        raise UserError(
            f"resume={flat['resume']!r:.60} cannot be combined with compare or seeds, which "
            "resume their runs automatically; drop one of them"
        )
    terms = [term for term in flat["compare"].split(";") if term.strip()]
    values_of = dict(read_term(term, config) for term in terms)
    if len(values_of) < len(terms):
        raise UserError(
            f"compare={flat['compare']!r:.60} names a field twice; name each field once"
        )
    values_of = values_of or {"algorithm": [flat["algorithm"]]}
    num_runs = math.prod(map(len, values_of.values())) * flat["seeds"]
    if num_runs > MOST_RUNS:
        raise UserError(
            f"compare={flat['compare']!r:.60} with seeds={flat['seeds']} makes {num_runs:,} runs; "
            f"choose at most {MOST_RUNS}"
        )
    rows = []
    for combination in itertools.product(*values_of.values()):
        changes = dict(zip(values_of, combination, strict=True))
        rows.append(Row(", ".join(map(label_of, changes, combination)), changes))
    return Compared(tuple(values_of), rows, find_base(rows, config.defaults()))


def find_base(rows: Sequence[Row], defaults: dict[str, Any]) -> str | dict[str, str]:
    """Return the label of the row with the default value, else of the first.

    In a grid that is asked for each value of the other fields: which algorithm is better is asked
    for each alpha. The field that rows of a group differ in is a choice, such as algorithm, if one
    is compared, else the first.
    """
    fields = list(rows[0].changes)
    field = next((field for field in fields if field in COMPARABLE), fields[0])
    groups: dict[str, list[Row]] = {}
    for row in rows:
        others = {name: value for name, value in row.changes.items() if name != field}
        groups.setdefault(repr(others), []).append(row)
    bases = {}
    for group in groups.values():
        usual = [row for row in group if row.changes[field] == defaults[field]]
        bases |= {row.label: (usual or group)[0].label for row in group}
    return bases if len(groups) > 1 else bases[rows[0].label]


def overlaid_folders(text: str) -> list[Path]:
    """Return the folders of finished runs that --compare names, none if it names choices.

    Raises UserError if a folder among them has no run.
    """
    names = [name.strip() for name in text.replace(";", ",").split(",")]
    paths = [expand_path(name) for name in names if name]
    if not any(
        "/" in name or os.path.isdir(path) for name, path in zip(names, paths, strict=False)
    ):
        return []
    for path in paths:
        if not os.path.isfile(path / "config.json"):
            raise UserError(
                f"compare={str(path)!r:.60} contains no run; give folders of runs, such as those "
                "listed by --list runs, or choices such as fedavg,fedprox"
            )
    return paths


def read_term(term: str, config: ConfigGroup) -> tuple[str, list[Any]]:
    """Return (field, its values) of "alpha=0.1,1", or of "fedavg,fedprox", names of one field."""
    name, has_field, texts = term.rpartition("=")
    names = [text.strip() for text in texts.split(",")]
    if has_field:
        field = name.strip().removeprefix("--").replace("-", "_")
        hint = sweepable(config).get(field)
        if hint is None:
            several = "; for a grid give --compare twice" if "," in name else ""
            raise UserError(
                f"compare={term!r:.60}: {field!r:.40} is not a field that a comparison can "
                f"change; choose one such as alpha, client_lr or algorithm{several}"
            )
        values = [to_value(text, hint) for text in names]
        for value in values:
            check_value(field, value, hint)
    else:
        values = names
        known = [field for field in COMPARABLE if set(names) <= set(config.choices(field))]
        field = known[0] if known else ""
    if not field and (confusion := find_confusion(names, config)):
        raise UserError(f"compare={term!r:.60}: {confusion}")
    if not field or len({label_of(field, value) for value in values}) < len(values):
        raise UserError(
            f"compare={term!r:.60} does not name different choices of one flag, separated by "
            f"commas; choose from {', '.join(COMPARABLE)}, such as fedavg,fedprox, or values such "
            "as alpha=0.1,1"
        )
    return field, values


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
        return f"{unknown[0]!r:.40} is not a choice of {', '.join(COMPARABLE)}; {cure}"
    kinds = [
        f"{name} is a choice of {' and '.join(found)}" for name, found in fields.items() if found
    ]
    if len({tuple(found) for found in fields.values() if found}) > 1:
        return f"{', '.join(kinds)}; name choices of one flag, or give --compare twice for a grid"
    return ""


def sweepable(config: ConfigGroup) -> dict[str, Any]:
    """Return field -> type of those that a comparison can change: numbers and choices of a run."""
    own = {*Run().to_dict(), *Comparison().to_dict(), *NEVER}
    return {field: hint for field, hint in config.types().items() if field not in own}


def label_of(field: str, value: Any) -> str:
    """Return how a value is called in a table: a choice by its name, a number with its field."""
    if isinstance(value, str):
        return value if field in COMPARABLE else f"{field.replace('_', ' ')} {value}"
    return f"{field.replace('_', ' ')} {str(value).removesuffix('.0')}"


def join_compared(words: Sequence[str]) -> list[str]:
    """Return a command line with its --compare flags made one: two of them are a grid."""
    terms, others = split_off(words, "compare")
    return [*others, "--compare", ";".join(terms)] if terms else list(words)
