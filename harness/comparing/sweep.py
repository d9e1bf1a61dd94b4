"""Rows of a comparison, from --compare: each with the fields that it changes."""

from __future__ import annotations

import glob
import itertools
import math
import os
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from harness.cli.fields import ConfigGroup, UserError, check_value
from harness.cli.flags import split_off, to_value
from harness.cli.own_files import is_own
from harness.cli.run_options import COMPARABLE, MAY_GROW, SINGLE, Run, identity
from harness.comparing.terms import NEVER, Entry, label_settings, read_term, sweepable
from harness.storage.files import expand_path, read_json

MOST_RUNS = 200
# Fields of a list of configurations that the first one has for all, whatever the others have.
OF_THE_FIRST = {"runs", "name", "cache", "config"}
SHOWN_BY_DEFAULT = {*COMPARABLE} - {"attack"}  # which has no effect without attackers


class Row(NamedTuple):
    """A row of a comparison."""

    label: str  # "fedprox", "alpha 0.1", or of a grid "scaffold, alpha 0.1"
    changes: dict[str, Any]  # field -> value
    # What is compared -> its label here: {"algorithm": "scaffold", "alpha": "alpha 0.1"}; None if
    # the row does not use it, as FedAvg does not use prox_mu.
    cells: dict[str, str | None] = {}
    terms: dict[str, dict[str, Any]] = {}  # what is compared -> its field -> value; for tables

    @property
    def settings(self) -> list[dict[str, Any]]:
        """Field -> value of each thing that is compared and that the row uses."""
        return [of_term for term, of_term in self.terms.items() if self.cells[term]]


class Compared(NamedTuple):
    """All rows, and which of them the others are held against: the default, else the first."""

    fields: tuple[str, ...]
    rows: list[Row]
    base: str | dict[str, str]  # of a grid: label -> that of the row it is held against


def check_comparison(config: ConfigGroup) -> None:
    """Raise UserError for a comparison that cannot be made."""
    flat = config.to_dict()
    if flat["baselines"] and (flat["compare"] or flat["seeds"] > 1):
        raise UserError("baselines=True cannot be combined with compare or seeds; drop one of them")
    compared_rows(config)


def compared_rows(config: Any) -> Compared | None:
    """Return the rows of a comparison, or None for a single run.

    A field that has no effect on a row makes no second row of it. Raises UserError for names that
    do not belong to one field, and for too many runs.
    """
    flat = config.to_dict()
    if overlaid_folders(flat["compare"]):
        if flat["tune"]:
            raise UserError(
                f"tune={flat['tune']!r:.60} cannot be combined with finished runs; drop it, or "
                "compare choices such as fedavg,fedprox"
            )
        check_jobs(flat)
        return None
    if not flat["compare"] and not flat["tune"] and flat["seeds"] == 1:
        check_jobs(flat)
        return None
    if flat["resume"]:
        raise UserError(
            f"resume={flat['resume']!r:.60} cannot be combined with compare, seeds or tune, which "
            "resume their runs automatically; drop one of them"
        )
    listed = [read_term(term, config) for term in flat["compare"].split(";") if term.strip()]
    if not listed and flat["compare"]:
        raise UserError(f"compare={flat['compare']!r:.60} names nothing; drop it, or name choices")
    if not listed:
        name = flat["algorithm"]
        listed = [("algorithm", [Entry(name, name, {"algorithm": name})])]
    check_fields(flat["compare"], listed)
    num_runs = math.prod(len(entries) for _, entries in listed) * flat["seeds"]
    if num_runs > MOST_RUNS:
        raise UserError(
            f"compare={flat['compare']!r:.60} with seeds={flat['seeds']} makes {num_runs:,} runs; "
            f"choose at most {MOST_RUNS}"
        )
    names = tuple(field for field, _ in listed)
    rows = []
    for combination in itertools.product(*(entries for _, entries in listed)):
        changes = {name: v for entry in combination for name, v in entry.changes.items()}
        labels = [entry.label for entry in combination]
        cells = dict(zip(names, labels, strict=True))
        terms = dict(zip(names, (entry.changes for entry in combination), strict=True))
        rows.append(Row(", ".join(labels), changes, cells, terms))
    distinct = drop_unused(config, rows)
    fields = tuple(dict.fromkeys(field for row in rows for field in row.changes))
    compared = Compared(fields, distinct, find_base(distinct, names, config.defaults()))
    candidates_of_rows(config, compared)
    return compared


def check_jobs(flat: dict[str, Any]) -> None:
    """Raise UserError for several jobs without several runs."""
    if flat["jobs"] > 1:
        raise UserError(
            f"jobs={flat['jobs']} is for a comparison, whose runs it trains at once; add compare "
            "or seeds, or drop it"
        )


def candidates_of_rows(config: Any, compared: Compared) -> dict[str, list[dict[str, Any]]]:
    """Return label -> the settings that --tune tries on a row, [{"client_lr": 0.05}, ...].

    A row is not tuned, and left out, if it fixes the field itself or does not use it. Raises
    UserError for fields and values that cannot be tuned.
    """
    terms = [term for term in config.comparison.tune.split(";") if term.strip()]
    lists: dict[str, list[Any]] = {}
    for term in terms:
        field, values = read_tuned(term, config)
        if field in lists:
            raise UserError(
                f"tune={config.comparison.tune!r:.60} names {field} twice; give its values once"
            )
        lists[field] = values
    tuned = {}
    for row in compared.rows if lists else ():
        free = [
            field
            for field in lists
            if field not in row.changes and has_effect(config, row, field, lists)
        ]
        candidates: dict[str, dict[str, Any]] = {}
        for combination in itertools.product(*(lists[field] for field in free)):
            chosen = dict(zip(free, combination, strict=True))
            of_row = row._replace(changes=row.changes | chosen)
            candidates.setdefault(settings_of(config, of_row), chosen)
        if len(candidates) > 1:
            tuned[row.label] = list(candidates.values())
    if lists:
        check_tuning(config, compared, tuned)
    return tuned


def has_effect(config: Any, row: Row, field: str, lists: Mapping[str, Sequence[Any]]) -> bool:
    """Return whether the values of a field make different runs of a row.

    It is asked with each of the other fields' values, as a schedule's own field needs it.
    """
    others = [name for name in lists if name != field and name not in row.changes]
    for combination in itertools.product(*(lists[name] for name in others)):
        fixed = row.changes | dict(zip(others, combination, strict=True))
        runs = [row._replace(changes=fixed | {field: value}) for value in lists[field]]
        if len({settings_of(config, run) for run in runs}) > 1:
            return True
    return False


def tunable_groups(config: Any) -> tuple[ConfigGroup, ...]:
    """Return the groups of fields that may be chosen: of the method, not of data and clients."""
    return config.training, config.optimization, config.aggregation


def read_tuned(term: str, config: Any) -> tuple[str, list[Any]]:
    """Return (field, values) of "client_lr=0.05,0.1". Raises UserError for another text."""
    name, _, values = term.partition("=")
    field = name.strip().removeprefix("--").replace("-", "_")
    hint = sweepable(config).get(field)
    if hint is None or not any(field in group.to_dict() for group in tunable_groups(config)):
        raise UserError(
            f"tune={term!r:.60} does not begin with a field of the training; write one with values "
            "to try, such as client_lr=0.05,0.1,0.2"
        )
    found = [to_value(text.strip(), hint) for text in values.split(",")]
    for value in found:
        check_value(field, value, hint)
    return field, found


def check_tuning(config: Any, compared: Compared, tuned: dict[str, list[dict[str, Any]]]) -> None:
    """Raise UserError for a tuning that cannot be made or that would be unfair."""
    text = f"tune={config.comparison.tune!r:.60}"
    if not tuned:
        raise UserError(
            f"{text} changes nothing in the rows that are compared; give several values of a field "
            "that they use and do not set themselves, such as client_lr=0.05,0.1,0.2"
        )
    if config.partitioning.partition_file:
        raise UserError(
            f"{text} cannot be combined with partition_file, whose clients have the images that "
            "are held out; drop one of them"
        )
    if config.data.validation:
        raise UserError(
            f"{text} cannot be combined with validation=True; hold out training images with "
            "--holdout 5000"
        )
    for row in compared.rows:
        tried = [row.changes | chosen for chosen in tuned.get(row.label, [{}])]
        if any(config.effective(**changes, **SINGLE).is_private for changes in tried):
            raise UserError(
                f"{text} cannot be combined with private runs (of row {row.label!r:.60}), as each "
                "value tried would spend epsilon on the same clients; leave them out"
            )
    num_runs = sum(map(len, tuned.values())) * config.comparison.seeds
    if num_runs > MOST_RUNS:
        raise UserError(
            f"{text} makes {num_runs:,} runs to choose the values; choose at most {MOST_RUNS}"
        )


def rows_of_configs(configs: Sequence[Any]) -> Compared:
    """Return the rows of a comparison of these configurations.

    Raises UserError for fewer than two, for equal ones, and for those of different data or seeds.
    """
    for config in configs:
        if not isinstance(config, ConfigGroup):
            raise UserError(f"{config!r:.60} is not a configuration; give those of fl.parse(...)")
    if len(configs) < 2:
        raise UserError(f"a comparison needs two or more configurations, not {len(configs)}")
    for config in configs:
        for field in ("compare", "tune", "resume", "baselines"):
            if value := config.to_dict()[field]:
                raise UserError(
                    f"{field}={value!r:.60} cannot be combined with a list of configurations, each "
                    "of which is a row; drop it"
                )
    check_alike(configs)
    given = [config.replace(**SINGLE).to_dict() for config in configs]
    own = {*Run().to_dict(), *SINGLE}
    differing = [
        field for field in given[0] if field not in own and len({row[field] for row in given}) > 1
    ]
    for field in differing:
        if field in NEVER and field != "rounds":
            values = ", ".join(repr(row[field]) for row in given)
            raise UserError(
                f"{field}={values:.60} differs between the configurations; compare those of one "
                f"{field}"
            )
    in_use = [config.effective(**SINGLE).to_dict() for config in configs]
    runs = [settings_of(config, Row("", {})) for config in configs]
    if len(set(runs)) < len(runs):
        raise UserError("two of the configurations make the same run; give each once")
    shown = shown_settings(in_use, differing, [config.changed() for config in configs])
    labels = [label_settings(settings) for settings in shown]
    changes = [{field: row[field] for field in differing} for row in given]
    if len(set(labels)) < len(labels):
        raise UserError(
            "two of the configurations would have the same name in tables; give functions of files "
            "different names"
        )
    rows = [
        Row(label, of_row, {"": label}, {"": settings})
        for label, of_row, settings in zip(labels, changes, shown, strict=True)
    ]
    return Compared(tuple(differing), rows, rows[0].label)


def check_alike(configs: Sequence[Any]) -> None:
    """Raise UserError for flags of a run or comparison that only a later configuration has."""
    first = configs[0].to_dict()
    of_all = {*Run().to_dict(), *SINGLE} - OF_THE_FIRST
    for config in configs[1:]:
        for field, value in config.changed().items():
            if field in of_all and value != first[field]:
                raise UserError(
                    f"{field}={value!r:.60} is not a field in which rows differ; give it to the "
                    "first configuration, which sets it for all"
                )


def shown_settings(
    values: Sequence[dict[str, Any]],
    differing: Sequence[str],
    changed: Sequence[Container[str]],
) -> list[dict[str, Any]]:
    """Return what each row is called by: field -> value of the fields in which they differ.

    A field at its default is often one that the row does not use: it is left out where the names
    differ without it. `changed` are the fields of each row that are not at their defaults.
    """
    whole = [{field: row[field] for field in differing} for row in values]
    short = [
        {field: row[field] for field in row if field in SHOWN_BY_DEFAULT or field in of_row}
        for row, of_row in zip(whole, changed, strict=True)
    ]
    labels = [label_settings(row) for row in short]
    return whole if "" in labels or len(set(labels)) < len(labels) else short


def check_fields(text: str, terms: Sequence[tuple[str, list[Entry]]]) -> None:
    """Raise UserError if two terms of a grid set the same field."""
    fields = [{field for entry in entries for field in entry.changes} for _, entries in terms]
    for one, other in itertools.combinations(fields, 2):
        if one & other:
            raise UserError(f"compare={text!r:.60} names a field twice; name each field once")


def settings_of(config: Any, row: Row) -> str:
    """Return, as a text, everything that the numbers of a row's run depend on."""
    single = config.effective(**row.changes, **SINGLE)
    grows = [single.to_dict()[field] for field in MAY_GROW]
    return repr([sorted(identity(single).items()), grows])


def drop_unused(config: Any, rows: Sequence[Row]) -> list[Row]:
    """Return the rows that differ; of a field without effect on a row, its label has nothing.

    Raises UserError if none of several rows differs from the others, or a row's own setting has no
    effect.
    """
    kept: dict[str, list[Row]] = {}
    for row in rows:
        kept.setdefault(settings_of(config, row), []).append(row)
    if len(kept) == 1 < len(rows):
        fields = ", ".join(rows[0].changes)
        raise UserError(
            f"compare={config.comparison.compare!r:.60} makes rows that do not differ, as {fields} "
            "has no effect with the other settings; compare something that uses it"
        )
    found = []
    for same in kept.values():
        alike = {field: len({row.cells[field] for row in same}) == 1 for field in same[0].cells}
        cells = {field: same[0].cells[field] if alike[field] else None for field in alike}
        label = ", ".join(text for text in cells.values() if text)
        found.append(Row(label, same[0].changes, cells, same[0].terms))
    labels = [row.label for row in found]
    return found if len(set(labels)) == len(labels) else [same[0] for same in kept.values()]


def find_base(
    rows: Sequence[Row], fields: Sequence[str], defaults: dict[str, Any]
) -> str | dict[str, str]:
    """Return the label of the row with the default value, else of the first.

    In a grid that is asked for each value of the other fields: which algorithm is better is asked
    for each alpha. The field that rows of a group differ in is a choice, such as algorithm, if one
    is compared, else the first.
    """
    field = next((field for field in fields if field in COMPARABLE), fields[0])
    bases = {}
    for row in rows:
        group = [other for other in rows if are_comparable(row, other, field)]
        usual = [other for other in group if has_default(other, field, defaults)]
        # Of several, such as fedavg and fedavg(local_epochs=1), that with the fewest settings.
        bases[row.label] = min(usual or group[:1], key=lambda other: len(other.changes)).label
    return bases if len(set(bases.values())) > 1 else bases[rows[0].label]


def are_comparable(one: Row, other: Row, field: str) -> bool:
    """Return whether two rows differ in `field` alone; what a row does not use does not count."""
    return all(
        name == field or None in (text, other.cells[name]) or text == other.cells[name]
        for name, text in one.cells.items()
    )


def has_default(row: Row, field: str, defaults: dict[str, Any]) -> bool:
    """Return whether a row has a field's default value, whatever else it sets."""
    return field in row.changes and row.changes[field] == defaults[field]


def overlaid_folders(text: str) -> list[Path]:
    """Return the folders of finished runs that --compare names, none if it names choices.

    A pattern such as 'runs/*-seed*' stands for the runs that match it, the folder of a comparison
    for its runs. Raises UserError if a folder among them has no run.
    """
    names = [name.strip() for name in text.replace(";", ",").split(",")]
    names = [name for name in names if name]
    are_folders = [os.path.isdir(expand_path(name)) for name in names]
    if not any("/" in name for name in names) and not any(runs_of(expand_path(n)) for n in names):
        return []
    names_settings = any("(" in name or "=" in name or is_own(name) for name in names)
    if names_settings and not any(are_folders):
        return []  # a choice, or settings, that name a file
    found: list[Path] = []
    for name in names:
        folders = runs_of(expand_path(name))
        if not folders:
            raise UserError(
                f"compare={name!r:.200} contains no run; give folders of runs, such as those "
                "listed by --list runs, or choices such as fedavg,fedprox"
            )
        found += folders
    return list(dict.fromkeys(found)) if has_pattern(names) else found


def has_pattern(names: Sequence[str]) -> bool:
    """Return whether a name stands for several folders, which may then overlap."""
    return any(char in name for name in names for char in "*?[")


def runs_of(path: Path) -> list[Path]:
    """Return the folders of runs that a path, a pattern or a comparison's folder stands for."""
    try:
        if os.path.isfile(path / "config.json"):
            return [path]
        if os.path.isfile(path / "comparison.json"):
            runs = read_json(path / "comparison.json").get("runs", [])
            return [path / run for run in runs if os.path.isfile(path / run / "config.json")]
        if has_pattern([str(path)]):
            matching = sorted(map(Path, glob.glob(str(path))))
            return [run for match in matching if match.is_dir() for run in runs_of(match)]
    except (OSError, ValueError):  # such as a name that is too long
        pass
    return []


def join_compared(words: Sequence[str]) -> list[str]:
    """Return a command line with its --compare flags made one, and its --tune flags: two of them
    are a grid."""
    joined = list(words)
    for flag in ("compare", "tune"):
        terms, others = split_off(joined, flag)
        if terms:
            joined = [*others, f"--{flag}", ";".join(terms)]
    return joined
