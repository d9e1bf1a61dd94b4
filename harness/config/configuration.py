"""The configuration as a whole: how it is read, and what follows from its fields. No TensorFlow
here."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import shlex
import sys
from collections.abc import Container, Sequence
from typing import TYPE_CHECKING, Any, Self

from harness.cli import command_line, saved_config, trust, usage
from harness.cli.fields import ConfigGroup, UserError
from harness.cli.flags import split_off, to_flag
from harness.cli.output import warn
from harness.cli.own_files import OWN_FIELDS, is_own, own_fields
from harness.comparing.sweep import check_comparison, join_compared, overlaid_folders
from harness.config import preset_flags
from harness.config.combinations import (
    check_combination,
    check_default_data,
    check_definition,
    check_given,
    check_is_private,
)
from harness.config.conditions import (
    effective_values,
    find_unused,
    notices_on_steps,
    unused_notices,
)
from harness.config.tables import Tables, num_unseen
from harness.storage.files import briefly, expand_path

IDLE = ("evaluate", "predict", "list", "version")  # fields of commands that train nothing

NAMING_DATA = frozenset({"dataset", "data"})


class ExperimentConfig(ConfigGroup):
    """A configuration of which some values follow from others: the script's Config is one."""

    if TYPE_CHECKING:  # what Config has
        tables: Tables
        preset: str
        data: Any
        partitioning: Any
        training: Any
        clock: Any
        run: Any

    def __new__(cls, *_groups: Any, **given: Any) -> Self:
        """Refuse Config(rounds=3), as fields are in groups, with what to write instead."""
        own = given.keys() - {field.name for field in dataclasses.fields(cls)}
        if own:
            cls().replace(**{field: given[field] for field in own})  # refuses what is no field
            fields = ", ".join(f"{field}=..." for field in given if field in own)
            raise UserError(
                f"Config({fields}) takes whole groups; write Config().replace({fields})"
            )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        """Raise UserError if fields do not go together."""
        super().__post_init__()
        flat = self.to_dict()
        if flat["compare"]:  # each row is checked as it will be run
            check_is_private(flat, self.defaults(), self.tables)
        else:
            check_combination(flat, self.defaults(), self.tables)
        if self.clock.device_speed:
            self.clock.speed_spread  # noqa: B018, raises UserError
        check_comparison(self)

    def replace(self, **changes: Any) -> Self:
        """Return a copy with other values in these fields.

        First come the fields that a preset sets; the data of the run that `evaluate` names, unless
        others are named; and, if `num_clients` is at its default, all owners as the clients of
        partition="natural".
        """
        kind = type(self)
        read = functools.partial(parse, kind)
        implied = preset_flags.preset_fields(changes.get("preset"), self.tables.presets, read)
        is_usual = self.partitioning.num_clients == self.defaults()["num_clients"]
        is_new = not self.tables.has_owners(self.partitioning.partition)
        if self.tables.has_owners(changes.get("partition")) and is_new and is_usual:
            implied = {"num_clients": 0} | implied
        if changes.get("evaluate"):
            super().replace(evaluate=changes["evaluate"])  # refuses what is no text
            saved = saved_config.read_saved(changes["evaluate"], kind())
            names_data = not NAMING_DATA.isdisjoint(changes)
            implied |= {} if names_data else saved.data.to_dict()
        return super().replace(**implied | changes)

    def effective(self, **changes: Any) -> Self:
        """Return a copy with these changes, and then with the values that are really in use.

        Default rates are filled in, and a field that has no effect is at its default, but for those
        of files and figures. So configurations that differ only in fields without effect have the
        same effective copy.
        """
        chosen = self.to_dict() | changes
        return super().replace(**changes | effective_values(chosen, self.defaults(), self.tables))

    def absolute_paths(self) -> dict[str, str]:
        """Return the fields that name files, as absolute paths."""
        return absolute_paths(self.to_dict(), self.tables)

    def with_absolute_paths(self) -> Self:
        """Return a copy whose files are named wherever it is read, FL_DATA's too."""
        return self.replace(**self.absolute_paths())

    def overridden_fields(self) -> dict[str, Any]:
        """Return the fields, by name, in which this differs from its preset."""
        read = functools.partial(parse, type(self))
        fields = preset_flags.preset_fields(self.preset, self.tables.presets, read)
        return {
            name: value for name, value in self.subset([*fields]).items() if value != fields[name]
        }

    def find_unused(self) -> dict[str, str]:
        """Return field -> what it would need, of the fields that are set but have no effect."""
        return find_unused(self.to_dict(), self.defaults(), self.tables)

    def unused_notices(self, fields: Container[str] | None = None, **known: Any) -> list[str]:
        """Return a notice on each flag that has no effect; of a command without rounds on `fields`.

        `known` are values that are not as in this configuration, such as the seeds of a list.
        """
        return unused_notices(self.to_dict() | known, self.defaults(), self.tables, fields)

    def chosen(self, field: str) -> Any:
        """Return the entry of a table in choices.py that this field names.

        Of FILE.py:FUNCTION it has that as its function, and no help.
        """
        name = self.partition_name if field == "partition" else self.to_dict()[field]
        return self.tables.find(field, name)

    def fields_of_choice(self, field: str) -> dict[str, Any]:
        """Return the fields, by name, that the choice made in this field uses; not all do."""
        return self.subset(self.chosen(field).fields)

    def fields_to_name(self, field: str) -> dict[str, Any]:
        """Return the fields, by name, that a caption names with the choice made in this field.

        A user's own function may read those of any choice in its place but a private one; those at
        their defaults are left out.
        """
        if not is_own(self.to_dict()[field]):
            return self.fields_of_choice(field)
        fields = {name for entry in self.tables.entries[field].values() for name in entry.fields}
        readable = fields.difference(self.tables.private_fields())
        return {name: value for name, value in self.changed().items() if name in readable}

    def fields_of_split(self) -> str:
        """Return the fields that the split follows from, as JSON; of a file, its path."""
        fields = ("num_clients", "min_images", "partition_file", "seed")
        used = self.subset(fields) | self.fields_of_choice("partition")
        return json.dumps([self.partition_name, used], sort_keys=True)

    @property
    def partition_name(self) -> str:
        """The partition in use: a partition_file implies "file"."""
        return "file" if self.partitioning.partition_file else self.partitioning.partition

    @property
    def has_own_model(self) -> bool:
        """Whether the model is the user's own FILE.py:FUNCTION."""
        return is_own(self.training.model)

    @property
    def is_private(self) -> bool:
        """Whether the run is differentially private, and tells nothing of single clients."""
        return self.chosen("aggregator").kind == "private"

    @property
    def cohort_size(self) -> int:
        """Clients that train in a round, m; with Poisson sampling on average."""
        drawn = self.partitioning.num_clients - self.num_unseen
        return self.training.clients_per_round or drawn

    @property
    def num_selected(self) -> int:
        """Clients that are drawn for a round, over_select * m, rounded up."""
        return math.ceil(self.clock.over_select * self.cohort_size - 1e-9)

    @property
    def num_unseen(self) -> int:
        """Clients that are never drawn."""
        partitioning = self.partitioning
        return num_unseen(partitioning.unseen_clients, partitioning.num_clients)


def parse(kind: type[ExperimentConfig], words: str | Sequence[str] | None) -> Any:
    """Return the configuration of this class that a command line asks for; see the script's."""
    given = split_words(words)
    preset_flags.explain_preset(given, kind.tables.presets)
    usage.answer_help(kind(), given)
    in_file, asked = saved_config.read_base(given, kind())
    with_preset = preset_flags.insert_preset_flags(given, kind.tables.presets)
    flags = join_compared(insert_implied_flags(with_preset, "num_clients" in asked, kind.tables))
    base = with_data_of_evaluated(kind, in_file, asked, given)
    config = command_line.read_flags(kind, flags, default=base)
    check_command_line(config, asked, given)
    if config.run.resume:
        warn_of_place(given)
        saved_config.check_resumed(config, in_file)
    for field, name in own_fields(config.to_dict()).items():
        if not split_off(given, field)[0]:
            trust.check_file(field, name, config.run.resume or config.run.config)
    return config


def split_words(words: str | Sequence[str] | None) -> list[str]:
    """Return a command line as a list; None is sys.argv. Raises UserError for anything else."""
    if not (words is None or isinstance(words, str | Sequence)):
        raise UserError(f"{words!r:.60} is not a command line; give flags, such as '--rounds 3'")
    if not isinstance(words, str):
        return list(sys.argv[1:] if words is None else words)
    try:
        return shlex.split(words)
    except ValueError as error:  # a quotation mark without its other
        raise UserError(f"{words!r:.60} cannot be divided into flags ({error}); fix it") from error


def with_data_of_evaluated(
    kind: type[ExperimentConfig],
    in_file: ExperimentConfig | None,
    asked: Container[str],
    words: Sequence[str],
) -> Any:
    """Return the configuration in a file, or None, with the data of the run that --evaluate names.

    It is returned as it is without that flag, or if the file's fields `asked`, or `words`, name
    other data. Of the file, what else it says of the data is kept.
    """
    evaluated = split_off(words, "evaluate")[0]
    names_data = any(field in asked or split_off(words, field)[0] for field in NAMING_DATA)
    if not evaluated or names_data:
        return in_file
    base = in_file or kind()
    own = base.subset(tuple(field for field in base.data.to_dict() if field in asked))
    return base.replace(**own, evaluate=evaluated[-1])


def check_command_line(
    config: ExperimentConfig, asked: Container[str], words: Sequence[str]
) -> None:
    """Check what only a command line tells: flags that are given although they do nothing.

    `asked` are the fields that a file names. Raises UserError where they contradict something else,
    and warns of the others.
    """
    check_given(config.to_dict(), words)
    if config.run.evaluate and split_off(words, "model")[0] and not config.has_own_model:
        saved = saved_config.read_saved(config.run.evaluate, type(config)())
        check_model_of_run(config, saved.training.model)
    check_definition(config.to_dict(), config.defaults(), config.tables, words)
    has_finished_runs = bool(overlaid_folders(config.to_dict()["compare"]))
    command_line.check_use(config, words, has_finished_runs)
    if not (has_finished_runs or any(config.subset(IDLE).values())):
        check_defaults(config, asked, words)


def check_model_of_run(config: ExperimentConfig, saved: str) -> None:
    """Raise UserError if the model is not `saved`, that of the run to evaluate."""
    if config.training.model != saved:
        raise UserError(
            f"model={config.training.model!r:.200} is not that of {config.run.evaluate!r:.200}, "
            f"which is {saved!r:.200}; drop it"
        )


def check_defaults(config: ExperimentConfig, asked: Container[str], words: Sequence[str]) -> None:
    """Warn of flags without effect whose values are the default ones, which no notice is on.

    Raises UserError where such a value contradicts something else.
    """
    chosen = config.to_dict() | config.absolute_paths()  # with FL_DATA
    if "dataset" in asked or split_off(words, "dataset")[0]:
        check_default_data(chosen, words)
    given = [field for field in chosen if split_off(words, field)[0]]
    usual = [field for field in given if chosen[field] == config.defaults()[field]]
    unlike = config.defaults() | dict.fromkeys(usual)  # None is the value of none of them
    check_is_private(chosen, unlike, config.tables)
    for field, needed in find_unused(chosen, unlike, config.tables).items():
        if field in usual:
            warn(f"{field}={chosen[field]} has no effect without {needed}")
    if "local_epochs" in usual:
        for notice in notices_on_steps(chosen, unlike):
            warn(notice)


def warn_of_place(words: Sequence[str]) -> None:
    """Warn of flags that would place a run that is resumed in another folder."""
    for field in ("runs", "name"):
        if split_off(words, field)[0]:
            warn(
                f"{to_flag(field)} has no effect with --resume, which continues in the run's folder"
            )


def check_paths(config: Any) -> None:
    """Raise UserError for a file, or a run's folder, that a flag names and that is not there."""
    check_files(config.to_dict(), config.tables)
    for folder in filter(None, [config.run.evaluate, *overlaid_folders(config.comparison.compare)]):
        saved_config.read_saved(str(folder), type(config)())


def insert_implied_flags(words: Sequence[str], is_given: bool, tables: Tables) -> list[str]:
    """Return a command line with what its flags imply.

    The partition natural has all owners as clients, unless a file says how many (`is_given`);
    --list alone is that of the folder runs.
    """
    words = list(words)
    for place, word in enumerate(words):
        if word == "--list" and (words[place + 1 :] or ["--"])[0].startswith("--"):
            words[place] = "--list=runs"
    words = gather_pictures(words)
    partitions = split_off(words, "partition")[0]
    says_how_many = is_given or split_off(words, "num_clients")[0] or split_off(words, "resume")[0]
    if tables.has_owners((partitions or [""])[-1]) and not says_how_many:
        return [*words, "--num-clients", "0"]
    return words


def gather_pictures(words: Sequence[str]) -> list[str]:
    """Return a command line with the words behind --predict RUN as its --pictures."""
    for place, word in enumerate(words):
        if word == "--predict" or word.startswith("--predict="):
            first = place + (1 if "=" in word else 2)
            named = []
            for name in words[first:]:
                if name.startswith("--"):
                    break
                named.append(name)
            rest = list(words[first + len(named) :])
            pictures = [f"--pictures={chr(10).join(named)}"] if named else []
            return [*words[:first], *pictures, *rest]
    return list(words)


def environment_data() -> str:
    """Return the absolute path in the environment variable FL_DATA, or ""."""
    path = os.environ.get("FL_DATA", "")
    return str(expand_path(path).absolute()) if path else ""


def absolute_paths(chosen: dict[str, Any], tables: Tables) -> dict[str, str]:
    """Return the fields that name files, FL_DATA's too, as absolute paths: a run resumes anywhere.

    Fields that name no file are left out.
    """
    files = {"data": chosen["data"], "partition_file": chosen["partition_file"]}
    files["initial_model"] = chosen["initial_model"]
    files |= {field: chosen[field] for field in own_fields(chosen)}
    is_saved = chosen["resume"] or chosen["evaluate"]  # whose data its folder names
    if not is_saved and not tables.find("dataset", chosen["dataset"]).function:
        files["data"] = files["data"] or environment_data()
    return {field: str(expand_path(path).absolute()) for field, path in files.items() if path}


def check_files(chosen: dict[str, Any], tables: Tables) -> None:
    """Raise UserError if a file that a flag names is not there. `chosen` is field -> value.

    The files are read later, by whoever uses them; this tells a wrong path before TensorFlow is
    imported.
    """
    for field, path in absolute_paths(chosen, tables).items():
        file = path.rpartition(":")[0] if field in OWN_FIELDS else path
        try:
            os.stat(file)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or briefly(error)
            is_moved = field == "data" and chosen["resume"]
            cure = "give the data's new path with --data" if is_moved else "give an existing file"
            raise UserError(f"{field}={path!r:.200} cannot be read ({reason}); {cure}") from error
