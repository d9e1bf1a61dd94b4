"""Configurations in files: those of saved runs, and those that --config names."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.cli.fields import ConfigGroup, UserError
from harness.cli.flags import find_field, split_off, to_flag
from harness.cli.own_files import is_own
from harness.cli.run_options import (
    BY_CONTENT,
    COMPARABLE,
    FIRST_FIELDS,
    MAY_GROW,
    SINCE_1_2,
    SINGLE,
    identity,
)
from harness.storage.files import briefly, expand_path, read_bytes, read_json
from harness.storage.provenance import changed, read_programs

# Fields of a run's config.json that a new run has not.
OF_ONE_COMMAND = (
    "config",
    "resume",
    "accept_changes",
    "time_limit",
    "quiet",
    "json",
    "predict",
    "pictures",
    "list",
    "version",
)
# Files that a run has from its first round on, or never.
OF_FIRST_ROUND = ("initial_model", "partition_file", "metrics")
# Of these, what a file of the user's cannot ask for either.
FLAGS_ONLY = {*OF_ONE_COMMAND} - {"time_limit", "quiet", "json"}


def read_saved(folder: str, default: ConfigGroup) -> Any:
    """Return the configuration of the run in `folder`, checked as a new one is."""
    if not folder:
        raise UserError("no run is named; give the folder of a run, such as runs/NAME")
    path = expand_path(folder) / "config.json"
    if os.path.exists(path.with_name("comparison.json")):
        raise UserError(
            f"{str(path.parent)!r:.200} is a comparison, not a run; to continue it, run the "
            "command that made it"
        )
    fields = read_json(path)
    known = default.to_dict().keys()
    required = {*FIRST_FIELDS, *MAY_GROW, *BY_CONTENT, "compare", "seeds"} - {*SINCE_1_2}
    strange = (fields.keys() - known) | (required - fields.keys())
    if strange:
        raise UserError(
            f"{path}: the field {min(strange)!r:.60} is unknown or missing; restore the file"
        )
    split = path.with_name("partition.json")
    if fields["partition_file"] and "indices" in read_json(split):
        # The split is as the run got it, wherever that file is now.
        fields["partition_file"] = str(split)
    # A folder that came from elsewhere asks for nothing else than its own run.
    usual = default.defaults()
    asked = {field: usual[field] for field in (*OF_ONE_COMMAND, *SINGLE, "evaluate")}
    try:
        return default.replace(**{**fields, **asked, "resume": folder})
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def read_base(words: Sequence[str], default: ConfigGroup) -> tuple[Any, frozenset[str]]:
    """Return (the configuration that --config or --resume names, the fields that were asked for).

    The first is a default for flags, and None without these two. Of a run's config.json that
    --config names, what belongs to that run alone is left out, such as what it resumed; it has all
    fields, so those that are not at their defaults count as asked for. Raises UserError for a file
    that has something else.
    """
    folders, others = split_off(words, "resume")
    names = split_off(others, "config")[0]
    if names and folders:
        raise UserError(
            f"--config {names[-1]!r:.200} cannot be combined with --resume, which takes all "
            "fields from the saved run; drop one of them"
        )
    if folders and folders[-1]:
        saved = read_saved(folders[-1], default)
        return saved, frozenset(saved.changed())
    if not names:
        return None, frozenset()
    path = expand_path(names[-1])
    fields = read_groups(path, default)
    left_out = OF_ONE_COMMAND if path.suffix == ".json" else ()
    own = {field: value for field, value in fields.items() if field not in left_out}
    try:
        for field in sorted(own.keys() & FLAGS_ONLY):
            raise UserError(f"{field} cannot be set in a file; give it as a flag: {to_flag(field)}")
        if isinstance(own.get("compare"), list):  # [[compare]], a table a row
            own["compare"] = rows_to_text(own["compare"])
        for field in own:
            find_field(f"--{field}", default.types())  # tells what it may be called here
        config = default.replace(**own)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return config, frozenset(config.changed() if path.suffix == ".json" else own)


def is_nested(value: Any) -> bool:
    """Return whether a value of a TOML file is itself a table or a list."""
    return isinstance(value, dict | list)


def rows_to_text(rows: Sequence[dict[str, Any]]) -> str:
    """Return rows, tables of settings in a TOML file, as --compare takes them."""
    if not rows:
        raise UserError("compare=[] has no row; give tables such as [[compare]], or drop it")
    shared = [
        field for field in COMPARABLE if all(isinstance(row, dict) and field in row for row in rows)
    ]
    texts = []
    for row in rows:
        if not isinstance(row, dict) or not row or any(map(is_nested, row.values())):
            raise UserError(
                f"compare={row!r:.60} is not a row of settings; write tables such as [[compare]] "
                "with algorithm and client_lr"
            )
        head = str(row[shared[0]]) if shared else ""
        rest = [f"{field}={value}" for field, value in row.items() if field not in shared[:1]]
        texts.append(f"{head}({','.join(rest)})" if rest else head)
    needs_name = shared and any(is_own(str(row[shared[0]])) for row in rows)
    return (f"{shared[0]}=" if needs_name else "") + ",".join(texts)


def read_groups(path: Path, default: ConfigGroup) -> dict[str, Any]:
    """Return field -> value in a file whose tables are groups of fields, such as [training].

    Raises UserError for another table, a field in the table of another group, and one given twice.
    """
    groups = {name: g for name, g in vars(default).items() if isinstance(g, ConfigGroup)}
    fields: dict[str, Any] = {}
    for name, value in read_table(path).items():
        if isinstance(value, list) and name in groups:
            raise UserError(f"{path}: [[{name}]] is a list of tables; write [{name}]")
        if not isinstance(value, dict):
            found = {name: value}
        elif name in groups:
            found = value
            strange = sorted(value.keys() & default.to_dict().keys() - groups[name].to_dict())
            if strange:
                raise UserError(
                    f"{path}: [{name}] has no field {strange[0]}; move it to its own table, or "
                    "above all tables"
                )
        else:
            raise UserError(
                f"{path}: [{name!s:.60}] is not a group of fields; choose {', '.join(groups)}, or "
                "remove the table heading"
            )
        twice = sorted(found.keys() & fields.keys())
        if twice:
            raise UserError(f"{path}: {twice[0]} is given twice; give it once")
        fields |= found
    return fields


def read_table(path: Path) -> dict[str, Any]:
    """Return what a TOML or JSON file holds. Raises UserError if it cannot be read."""
    if path.suffix != ".toml":
        return read_json(path, "give a TOML file, or a run's config.json")
    try:
        return tomllib.loads(read_bytes(path).decode("utf-8-sig"))
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); give an existing file") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, or not TOML
        raise UserError(f"{path} is not valid TOML ({briefly(error)}); fix it") from error


def check_resumed(
    config: ConfigGroup, saved: ConfigGroup, row_hashes: dict[str, str] | None = None
) -> None:
    """Raise UserError if a run would be resumed with another configuration, or by another program.

    `row_hashes` are those of the rows in use; None where flags are read, before they are known.
    """
    ours = identity(config)
    theirs = identity(saved)
    folder = config.to_dict()["resume"]
    for field in OF_FIRST_ROUND:  # files count by their content, but not whether there is one
        wanted = config.to_dict()[field]
        used = saved.to_dict()[field]
        if bool(wanted) != bool(used):
            again = "partition=" if field == "partition_file" else field
            cure = "drop the flag" if wanted else f"give {again} as in that run"
            raise UserError(
                f"{field}={wanted!r:.200} differs from {used!r:.200} of {folder}; {cure}, or start "
                "a new run"
            )
    usual = config.defaults()  # of fields that one of them leaves out
    in_python = f"give fl.parse({['--resume', folder]}) as the configuration"
    remedy = "drop the flag" if row_hashes is None else in_python
    for field in sorted(ours.keys() | theirs.keys()):
        wanted = ours.get(field, usual.get(field))
        used = theirs.get(field, usual.get(field))
        if wanted != used:
            raise UserError(
                f"{field}={wanted!r} differs from {used!r} of {folder}; {remedy}, or start a new "
                "run"
            )
    last = read_programs(expand_path(folder))[-1]
    names = ", ".join(changed(last, last["rows"] if row_hashes is None else row_hashes))
    if names and not config.to_dict()["accept_changes"]:
        raise UserError(
            f"resume={folder!r:.200}: the program, or a file given to it, has changed since that "
            f"run ({names:.200}); restore it, start a new run, or add --accept-changes to continue "
            "anyway"
        )
    rounds = config.to_dict()["rounds"]
    done = saved.to_dict()["rounds"]
    if rounds < done:
        raise UserError(
            f"--rounds {rounds} is less than the {done} rounds of {folder}; give a larger number, "
            "or omit --rounds"
        )


def check_config(config: Any) -> None:
    """Raise UserError for something else than a configuration, such as flags as a text."""
    if not isinstance(config, ConfigGroup):
        raise UserError(f"config={config!r:.60} is not a configuration; give fl.parse(...)")


def check_single(config: ConfigGroup) -> None:
    """Raise UserError for a configuration that asks for more or less than one run."""
    check_config(config)
    fields = config.to_dict()
    for field, usual in SINGLE.items():
        if fields[field] != usual:
            raise UserError(
                f"{field}={fields[field]!r:.60} asks for more than one run; call "
                "fl.compare(config), or fl.main(config) for folders of finished runs"
            )
    for field in ("list", "evaluate", "predict", "version"):
        if fields[field]:
            raise UserError(f"{field}={fields[field]!r:.60} does not train; call fl.main(config)")
