"""Where the runs of a comparison are: its folder, the runs in it, those that are done."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from harness.cli.fields import UserError
from harness.cli.output import print_line
from harness.cli.run_options import MAY_GROW, identity
from harness.cli.saved_config import read_saved
from harness.comparing.completing import Single, folder_of, read_earlier
from harness.comparing.sweep import Compared, Row
from harness.storage.files import expand_path, numbered, one_line, read_json, to_json, write_file
from harness.storage.provenance import changed, digest, program, read_programs
from harness.storage.run_names import make_run_folder

LONGEST_NAME = 60  # letters of a run's folder in that of its comparison


class Planned(NamedTuple):
    """A run of a comparison, before it has a place."""

    row: Row
    name: str  # of its folder
    config: Any
    key: str  # hash of all that its numbers depend on
    choice_hashes: dict[str, str]


def folder_names(rows: Sequence[Row]) -> list[str]:
    """Return what the rows' folders are called, without the seed: "fedavg-alpha0.1"."""
    names = []
    for row in rows:
        joined = re.sub(r"(?<=\w) (?=[\d.])", "", row.label)  # alpha 0.1: alpha0.1
        names.append(re.sub(r"[^\w.]+", "-", joined).strip("-."))
    most = LONGEST_NAME - len("-seed2147483647")
    return [
        name
        if name and len(name) <= most and names.count(name) == 1
        else f"{name[: most - 9]}-{digest(row.label)[:8]}"
        for name, row in zip(names, rows, strict=True)
    ]


def key_of(experiment: Any) -> str:
    """Return a hash of everything that the numbers of a run depend on."""
    fields = experiment.config.to_dict()
    depends_on = [
        identity(experiment.config),
        [fields[field] for field in MAY_GROW],
        experiment.partition.digest,
        program(),
        experiment.choice_hashes,
    ]
    return digest(depends_on)


def open_folder(config: Any, compared: Compared, planned: Sequence[Planned]) -> Path:
    """Return the folder of a comparison, made if it is new."""
    described = {
        "field": ", ".join(compared.fields),
        "values": [row.label for row in compared.rows],
        "seeds": config.comparison.seeds,
        "keys": [plan.key for plan in planned],
        "target_accuracy": config.run.target_accuracy,
    }
    return find_folder(expand_path(config.run.runs), config.run.name, described)


def find_folder(runs: Path, name: str, described: dict[str, Any]) -> Path:
    """Return the folder of the comparison that is `described`, made if it is new.

    A name that something else has gets -2, -3, ...
    """
    values = re.sub(r"[^\w.]+", "-", "-".join(described["values"]))
    name = name or f"compare-{values[: LONGEST_NAME - 17]}-{digest(described)[:8]}"
    for folder in numbered(runs / name):
        if not folder.exists():
            folder = make_run_folder(runs, folder.name, {"comparison.json": to_json(described)})
        path = folder / "comparison.json"
        if path.is_file() and described.items() <= read_json(path).items():
            return folder
    raise AssertionError("unreachable")


def place_run(folder: Path, plan: Planned) -> Single:
    """Return a run of the comparison in `folder`.

    It is in that folder, unless another comparison in the same runs/ has made it already.
    """
    path = folder / plan.name
    if not path.exists():
        path = find_run(folder, plan) or path
    config = plan.config.replace(runs=str(path.parent), name=path.name)
    return Single(plan.row, config, read_earlier(config))


def find_run(folder: Path, plan: Planned) -> Path | None:
    """Return the folder of this run in another comparison, None if there is none.

    Says why a run is repeated, if another version of the program made it.
    """
    for file in sorted(folder.parent.glob("*/comparison.json")):
        try:
            runs = read_json(file).get("runs", {}) if file.parent != folder else {}
        except UserError:
            continue
        for name, key in runs.items() if isinstance(runs, dict) else ():
            path = file.parent / name
            if key == plan.key and (path / "config.json").exists():
                return path
            if path.name == plan.name:
                explain_rerun(path, plan)
    return None


def explain_rerun(folder: Path, plan: Planned) -> None:
    """Report that a run of the same settings was made by another version of the program."""
    try:
        saved = read_saved(str(folder), plan.config)
        both = [saved.to_dict(), plan.config.to_dict()]
        same_length = all(both[0][field] == both[1][field] for field in MAY_GROW)
        if same_length and identity(saved) == identity(plan.config):
            names = ", ".join(changed(read_programs(folder)[-1], plan.choice_hashes))
            if names:
                print_line(
                    f"{one_line(str(folder))} was made by another version of the program ({names} "
                    "changed): re-running it"
                )
    except UserError:
        return  # of an earlier version, or damaged: it is another run


def note_runs(
    folder: Path, singles: Sequence[Single], planned: Sequence[Planned], finished: bool = False
) -> None:
    """Write into comparison.json where the runs are, and whether all are done."""
    path = folder / "comparison.json"
    runs = {
        os.path.relpath(folder_of(single.config), folder): plan.key
        for single, plan in zip(singles, planned, strict=True)
    }
    content = read_json(path)
    was_finished = content.get("finished", False)
    write_file(path, to_json(content | {"runs": runs, "finished": finished or was_finished}))
