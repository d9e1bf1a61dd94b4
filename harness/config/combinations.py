"""Which fields contradict each other. No TensorFlow here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from harness.cli.fields import UserError
from harness.cli.flags import split_off, to_flag
from harness.config.conditions import CLOCK_FIELDS, find_unused, is_buffered, updates_per_step
from harness.config.tables import Tables, num_unseen
from harness.engine.ssh import HERE


def check_combination(chosen: dict[str, Any], default: dict[str, Any], tables: Tables) -> None:
    """Raise UserError if flags do not go together.

    `chosen` and `default` are field -> value.
    """
    check_data(chosen, default, tables)
    check_cohort(chosen, tables)
    check_algorithm(chosen, default, tables)
    check_is_private(chosen, default, tables)
    check_privacy(chosen, tables)
    check_aggregator(chosen, tables)
    check_clock(chosen, default, tables)
    if chosen["save_clients"] and chosen["workers"] != HERE:
        raise UserError(
            f"save_clients=True cannot be combined with workers={chosen['workers']!r:.60}, which "
            "keeps the shards on the hosts; drop one of them"
        )
    if chosen["save_clients"] and not tables.find("aggregator", chosen["aggregator"]).shows_updates:
        raise UserError(
            "save_clients=True cannot be combined with aggregator='secure', whose server sees "
            "only sums; drop one of them"
        )
    if chosen["baselines"] and chosen["local_steps"]:
        raise UserError(
            f"baselines=True cannot be combined with local_steps={chosen['local_steps']}, as "
            "baselines train for whole epochs; use --local-epochs, or drop one of them"
        )


def check_data(chosen: dict[str, Any], default: dict[str, Any], tables: Tables) -> None:
    """Raise UserError if the data or the partition are chosen twice."""
    if chosen["dataset"] != default["dataset"] and chosen["data"]:
        raise UserError(
            f"data={chosen['data']!r} replaces mnist, so it cannot be combined with the built-in "
            f"dataset={chosen['dataset']!r}; drop one of them"
        )
    if not chosen["data_name"].isprintable():
        raise UserError(
            f"data_name={chosen['data_name']!r:.60} contains characters that plots cannot show; "
            "use letters and digits"
        )
    partition = chosen["partition"]
    reads_file = "partition_file" in tables.find("partition", partition).fields
    is_other = not reads_file and partition != default["partition"]
    if is_other if chosen["partition_file"] else reads_file:
        raise UserError(
            f"partition={partition!r} contradicts "
            f"partition_file={chosen['partition_file']!r:.60}; use partition='file' with a file, "
            "or another partition without one"
        )


def check_cohort(chosen: dict[str, Any], tables: Tables) -> None:
    """Raise UserError for more clients in a round, or attackers, than there are clients."""
    clients = chosen["num_clients"]
    if chosen["unseen_clients"] and chosen["baselines"]:
        raise UserError(
            f"baselines=True cannot be combined with unseen_clients={chosen['unseen_clients']:g}, "
            "whose images no federated client trains on; drop one of them"
        )
    if clients == 0:
        if not tables.has_owners(chosen["partition"]):
            raise UserError(
                "num_clients=0 means all owners of partition='natural'; choose 1 to 60,000"
            )
        return  # how many owners there are, the data tell; then all is checked again
    drawn = clients - num_unseen(chosen["unseen_clients"], clients)
    unseen = f", {clients - drawn} of them never drawn" if drawn < clients else ""
    if drawn < 1:
        raise UserError(
            f"unseen_clients={chosen['unseen_clients']:g} of num_clients={clients} leaves no "
            "client to train; choose a smaller share, or more clients"
        )
    if chosen["clients_per_round"] > drawn:
        raise UserError(
            f"clients_per_round={chosen['clients_per_round']} exceeds "
            f"num_clients={clients}{unseen}; choose 1 to {drawn}, or 0 for all"
        )
    if chosen["byzantine"] > drawn:
        raise UserError(
            f"byzantine={chosen['byzantine']} exceeds num_clients={clients}{unseen}; choose 0 to "
            f"{drawn}"
        )


def check_clock(chosen: dict[str, Any], default: dict[str, Any], tables: Tables) -> None:
    """Raise UserError for a clock that cannot be kept, or that changes what a run may not."""
    used = [field for field in CLOCK_FIELDS if chosen[field]]
    is_private = tables.find("aggregator", chosen["aggregator"]).kind == "private"
    if used and is_private:
        raise UserError(
            f"{used[0]}={chosen[used[0]]} cannot be combined with aggregator='dp': a round's time "
            "tells how many images the drawn clients have; drop one of them"
        )
    if tables.find("algorithm", chosen["algorithm"]).needs_clock:
        check_asynchronous(chosen, default, bool(used))
    if chosen["num_clients"] == 0:
        return  # the data tell how many owners there are
    cohort = chosen["clients_per_round"]
    drawable = chosen["num_clients"] - num_unseen(chosen["unseen_clients"], chosen["num_clients"])
    selected = math.ceil(chosen["over_select"] * (cohort or drawable) - 1e-9)
    if used and chosen["over_select"] > 1 and selected > drawable:
        most = math.floor(drawable / chosen["over_select"] + 1e-9)
        cure = f"clients_per_round of at most {most}" if most else "a smaller over_select"
        raise UserError(
            f"over_select={chosen['over_select']:g} draws {selected} clients for a round of "
            f"{cohort or drawable}, more than there are ({drawable}); choose {cure}"
        )


def check_asynchronous(chosen: dict[str, Any], default: dict[str, Any], has_clock: bool) -> None:
    """Raise UserError for flags that asynchronous rounds have no rule for."""
    algorithm = chosen["algorithm"]
    if not has_clock:
        raise UserError(
            f"algorithm={algorithm!r} needs a clock, which tells when clients report; add "
            "--device-speed lognormal:0.5, --bandwidth or --latency"
        )
    if chosen["dropout"] == 1:
        raise UserError(
            f"dropout=1: no client reports, so the buffer of algorithm={algorithm!r} never fills; "
            "choose a smaller dropout"
        )
    for field in ("deadline", "over_select", "drop_stragglers", "sampling", "save_clients"):
        if chosen[field] != default[field]:
            raise UserError(
                f"{field}={chosen[field]} cannot be combined with algorithm={algorithm!r}, whose "
                "clients do not begin together; drop one of them"
            )


def check_definition(
    chosen: dict[str, Any], default: dict[str, Any], tables: Tables, words: Sequence[str] = ()
) -> None:
    """Raise UserError for fields that contradict the algorithm's definition.

    A default value contradicts it only where a command line's `words` give it.
    """
    algorithm = chosen["algorithm"]
    for field, value in tables.find("algorithm", algorithm).required.items():
        is_asked_for = chosen[field] != default[field] or split_off(words, field)[0]
        if chosen[field] != value and is_asked_for:
            raise UserError(
                f"{field}={chosen[field]} contradicts algorithm={algorithm!r}, which is defined "
                f"by {field}={value}; drop one of them"
            )


def check_algorithm(chosen: dict[str, Any], default: dict[str, Any], tables: Tables) -> None:
    """Raise UserError for fields that do not go with the algorithm."""
    algorithm = chosen["algorithm"]
    facts = tables.find("algorithm", algorithm)
    check_definition(chosen, default, tables)
    if chosen["local_steps"] and "local_epochs" in facts.required:
        raise UserError(
            f"local_steps={chosen['local_steps']} contradicts algorithm={algorithm!r}, which "
            "takes a single step; drop one of them"
        )
    if chosen["local_steps"] and "head_epochs" in facts.fields:
        raise UserError(
            f"local_steps={chosen['local_steps']} cannot be combined with algorithm="
            f"{algorithm!r}, whose clients train two parts for whole epochs; use --local-epochs"
        )
    if facts.client_optimizers and chosen["client_optimizer"] not in facts.client_optimizers:
        raise UserError(
            f"algorithm={algorithm!r} supports only client_optimizer "
            f"{' and '.join(facts.client_optimizers)}, not {chosen['client_optimizer']!r}; change "
            "one of the flags"
        )
    if facts.sends_loss_gradients and chosen["weight_decay"]:
        raise UserError(
            f"weight_decay={chosen['weight_decay']:g} cannot be combined with "
            "algorithm='mimelite', which sends gradients of the loss only; drop one of them"
        )


NOT_PRIVATE = {  # field -> why a private run does not have it
    "unseen_clients": "which reports nothing about the clients' own images",
    "client_test": "which reports nothing about the clients' own images",
    "save_clients": "which reveals nothing about single clients",
    "baselines": "which reveals nothing about single clients",
    "tensorboard": "as the times of rounds reveal how many images the drawn clients have",
}


def check_is_private(chosen: dict[str, Any], default: dict[str, Any], tables: Tables) -> None:
    """Raise UserError for a flag of privacy in runs none of which is private.

    Whoever sets such a flag would believe that the run is private.
    """
    of_privacy = {field: default[field] for field in tables.private_fields()}
    for field, needed in find_unused(chosen, chosen | of_privacy, tables).items():
        raise UserError(
            f"{field}={chosen[field]} has no effect without {needed}, and the run would not be "
            f"private; add that, or drop {to_flag(field)}"
        )


def check_privacy(chosen: dict[str, Any], tables: Tables) -> None:
    """Raise UserError for flags that a private run does not have."""
    if tables.find("aggregator", chosen["aggregator"]).kind != "private":
        return
    for field, why in NOT_PRIVATE.items():
        if chosen[field]:
            raise UserError(
                f"{field}={chosen[field]} cannot be combined with aggregator='dp', {why}; drop one "
                "of them"
            )
    if chosen["sampling"] == "by-size":
        raise UserError(
            "sampling='by-size' cannot be combined with aggregator='dp', whose epsilon assumes "
            "draws that do not depend on the data; choose fixed or poisson"
        )
    cohort = chosen["clients_per_round"] or chosen["num_clients"]
    # TFF cannot spread the noise. A cohort of 0 is one of all owners, who are not counted yet.
    is_given = not chosen["target_epsilon"]  # which decides the noise, and has a check of its own
    if cohort and is_given and chosen["noise_multiplier"] >= 0.1 * cohort - 1e-9:
        raise UserError(
            f"noise_multiplier={chosen['noise_multiplier']} is too high for {cohort} clients per "
            f"round; choose less than {0.1 * cohort:g}, or more clients"
        )


def check_default_data(chosen: dict[str, Any], words: Sequence[str]) -> None:
    """Raise UserError for dataset="mnist", which was named, with other data, or FL_DATA."""
    if chosen["dataset"] == "mnist" and chosen["data"]:
        is_given = split_off(words, "data")[0]
        source = (
            "data" if is_given else "the environment variable FL_DATA, or the file of --config:"
        )
        raise UserError(
            f"dataset='mnist' contradicts {source} {chosen['data']!r:.200}, which replaces it; "
            "drop one of them"
        )


def check_given(chosen: dict[str, Any], words: Sequence[str]) -> None:
    """Raise UserError for flags of a command line that contradict each other by a default value.

    They are the noise, with the epsilon that it follows from, and weights of a draw by size.
    """
    given = split_off(words, "client_weighting")[0]
    if chosen["sampling"] == "by-size" and given and given[-1] == "examples":
        raise UserError(
            "client_weighting='examples' contradicts sampling='by-size', in whose draws the sizes "
            "count already; drop one of them"
        )
    if chosen["target_epsilon"] and split_off(words, "noise_multiplier")[0]:
        raise UserError(
            f"noise_multiplier={chosen['noise_multiplier']:g} cannot be combined with "
            f"target_epsilon={chosen['target_epsilon']:g}, which determines the noise; drop one "
            "of them"
        )


def check_aggregator(chosen: dict[str, Any], tables: Tables) -> None:
    """Raise UserError for a robust aggregator with too few clients, or the wrong algorithm."""
    aggregator = chosen["aggregator"]
    facts = tables.find("aggregator", aggregator)
    cohort = updates_per_step(chosen, tables)
    most = (cohort - 3) // 2
    if "tolerated" in facts.fields and cohort and chosen["tolerated"] > most:
        more = "a larger buffer_size" if is_buffered(chosen, tables) else "more clients"
        cure = f"choose at most {most}, or {more}" if most >= 0 else f"it needs 3; choose {more}"
        raise UserError(
            f"tolerated={chosen['tolerated']} attackers among {cohort} clients per round are more "
            f"than {aggregator} can withstand; {cure}"
        )
    if facts.kind == "unweighted" and tables.find("algorithm", chosen["algorithm"]).weights_steps:
        raise UserError(
            f"aggregator={aggregator!r} cannot be combined with algorithm='fednova', whose mean "
            "number of steps is weighted by examples; change one of the flags"
        )
