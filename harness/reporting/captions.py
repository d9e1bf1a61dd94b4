"""Captions: everything that a run's results depend on, in one line."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from harness.cli.own_files import is_own, short_name
from harness.storage.files import one_line

import numpy as np

# What a single run's caption leaves out, by topic; of the other topics it is nothing.
USUAL = {
    "aggregator": "mean",
    "sampling": "uniform sampling",
    "loss": "cross-entropy",
    "start": "from the seed",
    "fine_tune_epochs": "not fine-tuned",
}
NORMS = {"average": "averaged", "local": "local"}
SAMPLING = {"fixed": "", "poisson": "Poisson sampling", "by-size": "clients drawn by size"}


def join_parts(parts: Iterable[str]) -> str:
    """Return a caption of these parts without empty ones; "1 labels" becomes "1 label"."""
    text = one_line(" · ".join(filter(None, parts)))
    return re.sub(r"(?<![\d.,])1 (client|label|shard|attacker|image|local step)s\b", r"1 \1", text)


def with_fields(name: str, fields: dict[str, Any]) -> str:
    """Return a name and the fields that belong to it: "krum, tolerated 3"."""
    parts = [f"{field.replace('_', ' ')} {value:g}" for field, value in fields.items()]
    return ", ".join([name, *parts])


def caption(experiment: Any) -> str:
    """Return the caption of an experiment."""
    return join_parts([experiment.dataset.name, *caption_parts(experiment).values()])


def caption_parts(experiment: Any) -> dict[str, str]:
    """Return topic -> what a caption says; a topic that can be compared is named as its field."""
    config = experiment.config
    training = config.training
    num_clients = config.partitioning.num_clients
    batch_size = training.batch_size or "all"
    share = config.partitioning.client_test
    initial = training.initial_model
    steps = f"{training.local_steps} local steps"
    work = steps if training.local_steps else f"E = {training.local_epochs}"
    return {
        "clients": f"{num_clients} clients, {describe_cohort(config)}",
        "client_test": f"{100 * share:.4g} % of each client's images held out" if share else "",
        "fine_tune_epochs": describe_fine_tuning(config.optimization.fine_tune_epochs),
        "unseen": f"{config.num_unseen} never drawn" if config.num_unseen else "",
        "sampling": SAMPLING[training.sampling],
        "partition": describe_split(experiment),
        "algorithm": describe_algorithm(config),
        "aggregator": describe_aggregator(experiment),
        "model": describe_model(experiment),
        "training": f"{work}, B = {batch_size}",
        "loss": describe_loss(training),
        "start": f"from {Path(initial).name}" if initial else "",
        **describe_adversity(config),
        **describe_clock(config.clock),
        "seed": f"seed {config.seed}",
    }


def describe_model(experiment: Any) -> str:
    """Describe the network, and what becomes of its statistics if it has some."""
    training = experiment.config.training
    name = short_name(training.model)
    if not experiment.network.statistics:
        return name
    return f"{name}, BatchNormalization {NORMS[training.batch_norm]}"


def describe_cohort(config: Any) -> str:
    """Describe how many clients a round has; asynchronous ones have those that report first."""
    if "buffer_size" in config.chosen("algorithm").fields:
        return f"{config.cohort_size} at work, {config.optimization.buffer_size} a round"
    return f"{config.cohort_size} a round"


def describe_fine_tuning(epochs: int) -> str:
    """Describe --fine-tune-epochs; "" without it."""
    return f"global model also fine-tuned by each client, E = {epochs}" if epochs else ""


def describe_loss(training: Any) -> str:
    """Return the clients' loss; nothing for the plain cross-entropy."""
    smoothing = training.label_smoothing
    parts = [
        f"loss {short_name(training.loss)}" if is_own(training.loss) else "",
        f"label smoothing {smoothing:g}" if smoothing else "",
        "balanced classes" if training.class_weights == "balanced" else "",
    ]
    return ", ".join(filter(None, parts))


def has_all_owners(experiment: Any) -> bool:
    """Return whether each owner of images is a client; False of data without owners."""
    owners = experiment.dataset.owners
    return owners is not None and len(np.unique(owners)) == len(experiment.partition.sizes)


def describe_split(experiment: Any) -> str:
    """Return the partitioner's title with its fields."""
    config = experiment.config
    title = config.chosen("partition").title.format(**config.to_dict())
    if config.partitioning.owner_choice != "largest" and not has_all_owners(experiment):
        title = f"{title}, owners at random"
    min_images = experiment.config.partitioning.min_images
    return f"{title}, at least {min_images} images a client" if min_images else title


def describe_algorithm(config: Any) -> str:
    """Return the algorithm, its own fields, the client optimizer and the rates.

    Of plain SGD only the rate is named, of plain averaging nothing.
    """
    optimization = config.optimization
    fields = config.fields_to_name("algorithm")
    if optimization.server_epsilon is None:
        fields.pop("server_epsilon", None)
    parts = [with_fields(short_name(optimization.algorithm), fields)]
    optimizer = config.chosen("client_optimizer").title.format(**config.to_dict())
    if optimizer:
        parts.append(optimizer)
    if optimization.weight_decay:
        parts.append(f"weight decay {optimization.weight_decay:g}")
    client_schedule = config.chosen("client_schedule").title.format(**config.to_dict())
    parts.append(f"lr {config.training.client_lr:g}{client_schedule}")
    server_schedule = config.chosen("server_schedule").title.format(**config.to_dict())
    if config.training.server_lr != 1 or server_schedule:
        parts.append(f"server lr {config.training.server_lr:g}{server_schedule}")
    return ", ".join(parts)


def describe_aggregator(experiment: Any) -> str:
    """Return the aggregator, its own fields, and what its results rest on."""
    config = experiment.config
    name = short_name(config.aggregation.aggregator)
    fields = config.fields_to_name("aggregator")
    if config.is_private:
        fields = {"noise_multiplier": config.privacy.noise_multiplier}
    text = with_fields(name, fields)
    is_by_examples = config.aggregation.client_weighting == "examples"
    if not config.chosen("aggregator").function:  # the usual one
        text = "" if is_by_examples else name
    if not is_by_examples and config.chosen("aggregator").kind == "weighted":
        text = f"{text}, all clients equal"
    note = experiment.parts.note
    return f"{text}: {note}" if note else text


def describe_adversity(config: Any) -> dict[str, str]:
    """Describe dropouts, stragglers and attackers; "" for those that are absent."""
    adversity = config.adversity
    attack = adversity.attack
    fields = config.fields_of_choice("attack")
    if "attack_scale" in fields:
        attack = f"{attack}, scale {adversity.attack_scale:g}"
    if "backdoor_target" in fields:
        attack += f", {adversity.backdoor_share:.4g} of the images as {adversity.backdoor_target}"
    stragglers = f"stragglers {adversity.stragglers:g}" if adversity.stragglers else ""
    return {
        "dropout": f"dropout {adversity.dropout:g}" if adversity.dropout else "",
        "stragglers": f"{stragglers}, dropped" if adversity.drop_stragglers else stragglers,
        "attack": f"{adversity.byzantine} attackers ({attack})" if adversity.byzantine else "",
    }


def describe_clock(clock: Any) -> dict[str, str]:
    """Describe the simulated clock; "" for what is not in use."""
    speed = f"{clock.device_speed}, {clock.examples_per_second:g} examples/s"
    if clock.speed_by_size:
        speed += f", by size {clock.speed_by_size:g}"
    return {
        "device_speed": speed if clock.device_speed else "",
        "bandwidth": f"{clock.bandwidth / 1e6:g} MB/s" if clock.bandwidth else "",
        "latency": f"latency {clock.latency:g} s" if clock.latency else "",
        "deadline": f"deadline {clock.deadline:g} s" if clock.deadline else "",
        "over_select": f"over-select {clock.over_select:g}" if clock.over_select > 1 else "",
    }
