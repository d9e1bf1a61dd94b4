"""What a field's effect depends on: conditions, values in use, and notices. No TensorFlow here.

A field that no selected choice uses has no effect, and triggers a notice.
"""

from __future__ import annotations

import re
from collections.abc import Container, Sequence
from typing import Any, NamedTuple

from harness.cli.flags import to_flag
from harness.cli.own_files import is_own
from harness.cli.run_options import FORM, Run
from harness.config.tables import Tables, num_unseen

SEES_CONFIG = ("algorithm", "aggregator")  # of FILE.py:FUNCTION, change(parts, experiment)
CLOCK_FIELDS = ("device_speed", "bandwidth", "latency")  # each of which turns the clock on


SIGNS = re.compile("[,;=()]")  # what separates fields and values in --compare and --tune


class Condition(NamedTuple):
    """A field has an effect only if one of the fields `deciding` has one of `values`.

    Without `values` it is enough that one of them is not 0, False or empty.
    """

    deciding: tuple[str, ...]
    values: tuple[str, ...] = ()

    def is_met(self, chosen: dict[str, Any], compared: Sequence[str]) -> bool:
        """Return whether the values `chosen` meet it, or a comparison's.

        `compared` are the fields and values in the texts of --compare and --tune.
        """
        actual = [chosen[field] for field in self.deciding]
        if self.values:
            return not set(self.values).isdisjoint([*actual, *compared])
        return any(actual) or not set(self.deciding).isdisjoint(compared)

    def is_own(self, chosen: dict[str, Any]) -> bool:
        """Return whether a user's own function, which gets the configuration, decides."""
        return any(is_own(str(chosen[field])) for field in self.deciding if field in SEES_CONFIG)

    def __str__(self) -> str:
        flags = " or ".join(to_flag(field) for field in self.deciding)
        return f"{flags} {' or '.join(self.values)}".strip()


def conditions_of(deciding: Sequence[str], tables: Tables) -> dict[str, Condition]:
    """Return field -> the condition that one of the fields `deciding` has a choice that uses it.

    The first of these fields has the most choices.
    """
    users: dict[str, tuple[str, ...]] = {}
    for name, choice_made in tables.entries[deciding[0]].items():
        for field in choice_made.fields:
            users[field] = (*users.get(field, ()), name)
    return {
        field: Condition(
            tuple(one for one in deciding if not tables.entries[one].keys().isdisjoint(names)),
            names,
        )
        for field, names in users.items()
    }


def all_conditions(tables: Tables) -> dict[str, tuple[Condition, ...]]:
    """Return field -> what else must be chosen for it to have an effect."""
    by_choice = {
        **conditions_of(["partition"], tables),
        **conditions_of(["algorithm"], tables),
        **conditions_of(["client_optimizer"], tables),
        **conditions_of(["client_schedule", "server_schedule"], tables),
        **conditions_of(["aggregator"], tables),
        **conditions_of(["attack"], tables),
    }
    conditions: dict[str, tuple[Condition, ...]]
    conditions = {field: (condition,) for field, condition in by_choice.items()}
    has_attackers = Condition(("byzantine",))
    conditions["attack"] = (has_attackers,)
    for field in ("attack_scale", "backdoor_target", "backdoor_share"):
        conditions[field] = (has_attackers, by_choice[field])
    aggregators = tables.entries["aggregator"]
    weighted = tuple(name for name, made in aggregators.items() if made.kind == "weighted")
    conditions["client_weighting"] = (Condition(("aggregator",), weighted),)
    conditions["drop_stragglers"] = (Condition(("stragglers",)),)
    for field in ("data_name", "transpose", "test_share", "image_size"):
        conditions[field] = (Condition(("data",)),)
    for field in ("examples_per_second", "speed_by_size"):
        conditions[field] = (Condition(("device_speed",)),)
    for field in ("deadline", "over_select"):
        conditions[field] = (Condition(CLOCK_FIELDS),)
    conditions["accept_changes"] = (Condition(("resume",)),)
    conditions["pictures"] = (Condition(("predict",)),)
    conditions["after_target"] = (Condition(("target_accuracy",)),)
    has_figures = Condition(("figures",), ("png", "pdf", "svg"))
    for field in FORM:
        conditions[field] = (has_figures,)
    is_several = Condition(("compare", "seeds", "tune"))
    conditions["figure_y"] = (has_figures, is_several)
    conditions["table_columns"] = (is_several,)
    return conditions


def find_unused(chosen: dict[str, Any], default: dict[str, Any], tables: Tables) -> dict[str, str]:
    """Return field -> what it would need, of the fields that are set but have no effect.

    `chosen` and `default` are field -> value. A user's own algorithm or aggregator may read any
    field of the choice that it replaces, except that it makes no run private.
    """
    words = [word.strip() for word in SIGNS.split(f"{chosen['compare']};{chosen['tune']}")]
    compared = [*words, *(word.removeprefix("--").replace("-", "_") for word in words)]
    if chosen["partition_file"]:
        chosen = chosen | {"partition": "file"}
    chosen = chosen | {"seeds": chosen["seeds"] - 1}  # a single one compares nothing
    private = tables.private_fields()
    unused = {}
    for field, conditions in all_conditions(tables).items():
        missing = [
            condition
            for condition in conditions
            if not condition.is_met(chosen, compared)
            and (field in private or not condition.is_own(chosen))
        ]
        if missing and chosen[field] != default[field]:
            unused[field] = " and ".join(map(str, missing))
    return unused


def unused_notices(
    chosen: dict[str, Any],
    default: dict[str, Any],
    tables: Tables,
    fields: Container[str] | None = None,
) -> list[str]:
    """Return a notice on each flag that has no effect; of a command without rounds on `fields`."""
    unused = [
        f"{field}={chosen[field]} has no effect without {needed}"
        for field, needed in find_unused(chosen, default, tables).items()
        if fields is None or field in fields
    ]
    if fields is not None:
        return unused
    return [
        *unused,
        *notices_on_steps(chosen, default),
        *memory_notices(chosen, tables),
        *notices_on_attackers(chosen, tables),
    ]


def default_client_lr(chosen: dict[str, Any], tables: Tables) -> float:
    """Return the clients' rate where the user names none, of the configuration field -> value.

    It is the client optimizer's own. For sgd it is the algorithm's, or the model's or the data
    set's if that is lower.
    """
    own = tables.find("client_optimizer", chosen["client_optimizer"]).client_lr
    if own is not None:
        return own
    algorithm = tables.find("algorithm", chosen["algorithm"])
    model = tables.find("model", chosen["model"])
    dataset = tables.find("dataset", chosen["dataset"])
    return min(algorithm.client_lr, model.highest_default_lr, dataset.highest_default_lr)


def scheduled_by(field: str, chosen: dict[str, Any], tables: Tables) -> bool:
    """Return whether a rate has a schedule that uses this field."""
    schedules = (chosen["client_schedule"], chosen["server_schedule"])
    return any(field in tables.find("client_schedule", name).fields for name in schedules)


def notices_on_steps(chosen: dict[str, Any], default: dict[str, Any]) -> list[str]:
    """Return a notice on local epochs that local steps stand in place of."""
    if chosen["local_steps"] and chosen["local_epochs"] != default["local_epochs"]:
        return [
            f"local_epochs={chosen['local_epochs']} has no effect: "
            f"local_steps={chosen['local_steps']} replaces it"
        ]
    return []


def notices_on_attackers(chosen: dict[str, Any], tables: Tables) -> list[str]:
    """Return a notice on more attackers than the aggregator can withstand."""
    attackers = chosen["byzantine"]
    cohort = updates_per_step(chosen, tables)
    withstands = tables.find("aggregator", chosen["aggregator"]).withstands
    if not cohort or withstands is None or attackers <= withstands(chosen, cohort):
        return []
    return [
        f"byzantine={attackers} attackers exceed the {withstands(chosen, cohort)} per round that "
        f"aggregator={chosen['aggregator']!r} withstands in this setting"
    ]


def memory_notices(chosen: dict[str, Any], tables: Tables) -> list[str]:
    """Return a notice on an algorithm's memory, which a robust aggregator does not protect."""
    algorithm = tables.find("algorithm", chosen["algorithm"])
    is_robust = tables.find("aggregator", chosen["aggregator"]).kind == "unweighted"
    if not is_robust or not str(algorithm.function).startswith("stateful:"):
        return []
    return [
        f"aggregator={chosen['aggregator']!r} combines the updates only: the memory of algorithm="
        f"{chosen['algorithm']!r} is a plain mean, which attackers can move"
    ]


def learning_notices(chosen: dict[str, Any], tables: Tables) -> list[str]:
    """Return a notice on rounds in which nothing is learned.

    Then a rate is 0, such as in rounds behind the end of a cosine, or no client reports.
    """
    for field in ("dropout", "stragglers"):
        drops = field == "dropout" or chosen["drop_stragglers"]
        if chosen[field] == 1 and drops:
            return [f"{field}=1: no client reports, so no learning will take place"]
    for field in ("client_lr", "server_lr"):
        if chosen[field] == 0:
            return [f"{field}=0: no learning will take place"]
    if scheduled_by("lr_decay", chosen, tables) and chosen["lr_decay"] == 0:
        return ["lr_decay=0: the rate is 0 from round 2 on, so learning stops"]
    horizon = chosen["lr_horizon"]
    has_horizon = horizon is not None and scheduled_by("lr_horizon", chosen, tables)
    if not has_horizon or chosen["rounds"] <= horizon:
        return []
    return [
        f"lr_horizon={horizon}: the cosine schedule's rate is 0 from round {horizon + 1} on, so "
        "learning stops"
    ]


def is_buffered(chosen: dict[str, Any], tables: Tables) -> bool:
    """Return whether the server makes a step once buffer_size clients have reported."""
    return "buffer_size" in tables.find("algorithm", chosen["algorithm"]).fields


def updates_per_step(chosen: dict[str, Any], tables: Tables) -> int:
    """Return how many updates a step of the server has at most, of fields `chosen`.

    With Poisson sampling it is the mean. It is 0 where all owners of the data, who are not counted
    yet, are drawn.
    """
    if is_buffered(chosen, tables):
        return chosen["buffer_size"]
    clients = chosen["num_clients"]
    drawable = max(clients - num_unseen(chosen["unseen_clients"], clients), 0)
    return chosen["clients_per_round"] or drawable


def effective_values(
    chosen: dict[str, Any], default: dict[str, Any], tables: Tables
) -> dict[str, Any]:
    """Return the fields of one run whose value in use is not the chosen one.

    A rate that is None becomes the default one. The fields that define the algorithm get its
    values. A field without effect becomes its default, unless it is one of files and figures, which
    a resumed run may draw.
    """
    facts = tables.find("algorithm", chosen["algorithm"])
    unused = find_unused(chosen, default, tables).keys() - Run().to_dict().keys()
    values = {field: default[field] for field in unused}
    if chosen["client_lr"] is None:
        values["client_lr"] = default_client_lr(chosen, tables)
    if chosen["server_lr"] is None:
        values["server_lr"] = facts.server_lr
    if chosen["lr_horizon"] is None and scheduled_by("lr_horizon", chosen, tables):
        values["lr_horizon"] = chosen["rounds"]
    if chosen["sampling"] == "by-size":  # the sizes count in the draw
        values["client_weighting"] = "uniform"
    if chosen["local_steps"]:
        values["local_epochs"] = default["local_epochs"]
    return values | facts.required
