"""Sampling of clients other than the default, and dropouts."""

from __future__ import annotations

from typing import Any

from harness.training.streams import client_key, open_stream
from variants.adversity import drawn_clients, find_late

import numpy as np


def draw_cohort(
    config: Any, round_num: int, sizes: np.ndarray, rng: np.random.Generator | None = None
) -> list[int]:
    """Draw the round's clients as `sampling` says, never those that are kept out.

    They are sorted. Drawn by their `sizes` int64[K] a client may come twice, and counts twice. A
    private run with secret cohorts passes an `rng` that the operating system seeded; else it is a
    function of (seed, round).
    """
    generator = np.random.default_rng([config.seed, round_num]) if rng is None else rng
    clients = drawn_clients(config)
    if config.training.sampling == "poisson":
        luck = generator.random(len(clients))
        return clients[luck < config.cohort_size / len(clients)].tolist()
    if config.training.sampling == "by-size":
        shares = sizes[clients] / sizes[clients].sum()
        return sorted(generator.choice(clients, config.cohort_size, p=shares).tolist())
    return sorted(generator.choice(clients, config.cohort_size, replace=False).tolist())


def change_sampling(parts: Any, experiment: Any) -> Any:
    """Draw by Poisson sampling, by size, or among the clients that are not kept out."""
    config = experiment.config
    sizes = experiment.partition.sizes
    return parts._replace(sample_clients=lambda round_num: draw_cohort(config, round_num, sizes))


def draw_in_secret(parts: Any, experiment: Any) -> Any:
    """Draw the cohorts from the operating system's entropy, so that nobody knows them."""
    config = experiment.config
    sizes = experiment.partition.sizes
    rng = np.random.default_rng()
    return parts._replace(
        sample_clients=lambda round_num: draw_cohort(config, round_num, sizes, rng)
    )


def drop_out(parts: Any, experiment: Any) -> Any:
    """Let each client of a round report with probability 1 - dropout, by (seed, round, client)."""
    config = experiment.config
    inner = parts.find_reporting

    def find_reporting(clients, round_num):
        rng = open_stream("dropouts", config.seed, round_num)
        luck = rng.random(config.partitioning.num_clients)
        reporting = inner(clients, round_num)
        return [client for client in reporting if luck[client] >= config.adversity.dropout]

    return parts._replace(find_reporting=find_reporting)


def drop_stragglers(parts: Any, experiment: Any) -> Any:
    """Leave the stragglers out of each round, as FedAvg does [Li et al. 2020]."""
    config = experiment.config
    inner = parts.find_reporting

    def find_reporting(clients, round_num):
        reporting = inner(clients, round_num)
        late = find_late(reporting, config, round_num, client_key)
        return [client for client in reporting if client not in late]

    return parts._replace(find_reporting=find_reporting)
