"""Notices before a run begins: on its split, and on settings that do less than they seem to."""

from __future__ import annotations

import math
from typing import Any

from harness.cli.loading import import_function
from harness.reporting.captions import has_all_owners
from harness.reporting.results import pluralize, whole_parts

import numpy as np

REDRAWN = 3  # clients without images, up to which --min-images has a chance to redraw the split


def partition_notices(partition: Any, num_images: int) -> list[str]:
    """Return notices on a Partition of `num_images` training images."""
    found = []
    num_clients = len(partition.sizes)
    if partition.num_filled_clients:
        few = partition.num_filled_clients <= REDRAWN  # of more, hardly any draw has none
        found.append(
            f"{pluralize(partition.num_filled_clients, 'client')} of {num_clients} got no image, "
            "and received one from the largest client"
            + ("; --min-images redraws the split instead" if few else "")
        )
    unused = num_images - sum(map(len, whole_parts(partition)))
    if unused:
        found.append(f"{unused:,} of {num_images:,} training images belong to no client")
    return found


def find_weak_settings(experiment: Any) -> list[str]:
    """Return a notice on each setting that has little or no effect with the others.

    A private run gets none that depends on its clients' images.
    """
    config = experiment.config
    found = [
        of_built_in_data(experiment),
        of_owner_choice(experiment),
        of_sampling(config),
        of_trimming(config),
        of_compression(experiment),
        of_saving(config),
        of_stopping(config),
        of_workers_cache(config),
        of_fine_tuning(config),
        of_private_means(config),
        of_secure_sums(config),
        of_speeds(config),
        "" if config.is_private else of_warm_up(experiment),
    ]
    return [text for text in found if text]


def of_built_in_data(experiment: Any) -> str:
    """Return a notice on a built-in data set whose images others, given in Python, replace."""
    title = experiment.config.chosen("dataset").title
    if not title:  # of mnist, the default, which nobody need have chosen
        return ""
    name = experiment.dataset.name
    if name.startswith(title):  # it, a part of it, what is held out
        return ""
    return (
        f"dataset={experiment.config.data.dataset!r} sets the default of client_lr only: the "
        f"images are {name!r:.60}, of dataset="
    )


def of_owner_choice(experiment: Any) -> str:
    """Return a notice on a choice among owners of whom all are clients."""
    choice = experiment.config.partitioning.owner_choice
    if choice == "largest" or not has_all_owners(experiment):
        return ""
    return (
        f"owner_choice={choice!r} has no effect, as all {len(experiment.partition.sizes)} owners "
        "are clients; choose fewer with --num-clients"
    )


def of_sampling(config: Any) -> str:
    """Return a notice on Poisson sampling that leaves out no client."""
    drawable = config.partitioning.num_clients - config.num_unseen
    if config.training.sampling != "poisson" or config.cohort_size < drawable:
        return ""
    return (
        "sampling='poisson' draws all clients in each round; choose fewer with --clients-per-round"
    )


def of_trimming(config: Any) -> str:
    """Return a notice on a trimmed mean that leaves out no client."""
    if "trim" not in config.fields_of_choice("aggregator"):
        return ""
    trim = config.aggregation.trim
    is_buffered = "buffer_size" in config.chosen("algorithm").fields
    most = config.optimization.buffer_size if is_buffered else config.cohort_size
    if math.floor(trim * most + 1e-9):
        return ""
    return f"trim={trim:g} of {most} clients leaves out none; the trimmed mean is the plain mean"


def of_compression(experiment: Any) -> str:
    """Return a notice on a model of which no tensor is large enough to be compressed."""
    if experiment.config.aggregation.aggregator != "compressed":
        return ""
    sizes = [weights.size for weights in experiment.initial_weights]
    if import_function("aggregators:compressed_bytes")(sizes) < 4 * sum(sizes):
        return ""
    return (
        "aggregator='compressed' compresses nothing here: tensors of up to 20,000 numbers are sent "
        f"as they are, and the model's largest has {max(sizes):,}; choose a larger --model"
    )


def of_saving(config: Any) -> str:
    """Return a notice on models that would be saved after the last round."""
    every = config.run.save_every
    rounds = config.training.rounds
    if every <= rounds:
        return ""
    return f"save_every={every} saves no model, as the run has {pluralize(rounds, 'round')}"


def of_stopping(config: Any) -> str:
    """Return a notice on an early stop that no run of these rounds comes to."""
    patience = config.run.stop_after
    rounds = config.training.rounds
    if not patience or patience < rounds - 1:
        return ""
    return f"stop_after={patience} never stops the run, as it has {pluralize(rounds, 'round')}"


def of_workers_cache(config: Any) -> str:
    """Return a notice on a folder for hosts where there are none."""
    if not config.run.single_worker or "workers_cache" not in config.changed():
        return ""
    return f"workers_cache={config.run.workers_cache!r:.100} has no effect without --workers"


def of_fine_tuning(config: Any) -> str:
    """Return a notice on fine-tuning whose rate is not that of the clients' training."""
    schedule = config.optimization.client_schedule
    if not config.optimization.fine_tune_epochs or schedule == "constant":
        return ""
    return (
        f"fine_tune_epochs: clients fine-tune at client_lr={config.training.client_lr:g} in every "
        f"round, without client_schedule={schedule!r}"
    )


def of_private_means(config: Any) -> str:
    """Return a notice on the steps of a private run to which not all clients report."""
    adversity = config.adversity
    if not config.is_private or not (adversity.dropout or adversity.drop_stragglers):
        return ""
    return (
        "the mean of aggregator='dp' divides by the expected number of clients in a round, whoever "
        "reports, so clients that do not report make its steps shorter"
    )


def of_secure_sums(config: Any) -> str:
    """Return a notice on what reaches the server apart from sums."""
    sees_sums = not config.chosen("aggregator").shows_updates
    if not sees_sums or not str(config.chosen("algorithm").function).startswith("stateful:"):
        return ""
    return (
        f"aggregator={config.aggregation.aggregator!r} sums updates only: what a client sends to "
        f"the memory of algorithm={config.optimization.algorithm!r} reaches the server as it is"
    )


def of_speeds(config: Any) -> str:
    """Return a notice on a correlation of speeds that do not vary."""
    clock = config.clock
    if not clock.device_speed or not clock.speed_by_size or clock.speed_spread:
        return ""
    return (
        f"speed_by_size={clock.speed_by_size:g} has no effect, as device_speed="
        f"{clock.device_speed!r} gives all clients the same speed"
    )


def of_warm_up(experiment: Any) -> str:
    """Return a notice on a warm-up that no client completes in a round."""
    config = experiment.config
    training = config.training
    if "warmup_steps" not in config.chosen("client_schedule").fields:
        return ""
    sizes = np.array(experiment.partition.sizes)
    steps = training.local_epochs * -(-sizes // (training.batch_size or sizes))
    most = training.local_steps or int(steps.max())
    wanted = config.optimization.warmup_steps
    if most >= wanted:
        return ""
    return (
        f"warmup_steps={wanted}: no client makes more than {most} local steps in a round, so the "
        f"rate is at most {100 * most / wanted:.3g} % of client_lr"
    )
