"""A simulated clock: how long each round would take on clients of given speed and connection.

Nothing waits: the times are computed from (seed, round, client), and they decide who reports in
time. A client's time in a round is

    2 * latency + bytes down / bandwidth + examples / speed + bytes up / bandwidth

with examples = local_epochs * n_k, or what a variant lets it train on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from harness.cli.loading import import_function
from harness.training.records import client_traffic
from harness.training.streams import client_key, open_stream
from variants.adversity import cut_work
from variants.optimizers import count_examples
from variants.sampling import draw_cohort

import numpy as np
import tensorflow as tf


def draw_speeds(clock: Any, sizes: np.ndarray, seed: int) -> np.ndarray:
    """Return the clients' speeds in examples a second, float64[K], a function of the seed.

    speed = examples_per_second * exp(spread * z), where z has the correlation speed_by_size with
    log n_k, in expectation; sizes that are all equal count as uncorrelated.
    """
    z = open_stream("device speeds", seed).standard_normal(len(sizes))
    logs = np.log(sizes)
    if clock.speed_by_size and np.ptp(logs) > 0:
        rho = clock.speed_by_size
        z = rho * (logs - logs.mean()) / logs.std() + math.sqrt(1 - rho**2) * z
    return clock.examples_per_second * np.exp(clock.speed_spread * z)


class Clock:
    """The time that each client's work takes."""

    def __init__(self, parts: Any, experiment: Any):
        self.config = experiment.config
        self.sizes = experiment.partition.sizes
        self.work = parts.work
        self.shard_passes = parts.shard_passes
        clock = self.config.clock
        self.speeds = np.full(len(self.sizes), math.inf)
        if clock.device_speed:
            self.speeds = draw_speeds(clock, self.sizes, self.config.seed)
        down, up = client_traffic(parts, experiment.num_parameters)
        self.messages = 2 * clock.latency
        if clock.bandwidth:
            self.messages += (down + up) / clock.bandwidth

    def count_examples(self, client: int, round_num: int) -> int:
        """Return on how many examples a client trains in a round."""
        training = self.config.training
        size = int(self.sizes[client])
        examples = training.local_epochs * size
        if training.local_steps:
            examples = count_examples(training.local_steps, training.batch_size, size)
        stragglers = self.config.adversity.stragglers
        if stragglers:
            key = client_key(self.config.seed, np.int64(client), round_num)
            examples = int(cut_work(tf.constant(examples), key, stragglers))
        return examples

    def seconds(self, client: int, round_num: int) -> float:
        """Return the time from the weights' departure to the arrival of the client's update."""
        examples = self.work * self.count_examples(client, round_num)
        examples += self.shard_passes * int(self.sizes[client])
        return float(self.messages + examples / self.speeds[client])

    def describe(self, clients: Sequence[int]) -> str:
        """Return a notice on the times of the clients of round 1."""
        times = [self.seconds(client, 1) for client in clients]
        if not times:  # Poisson sampling may draw nobody
            return "simulated clock: no client was drawn for round 1"
        text = (
            f"simulated clock: the clients of round 1 take {min(times):.3g} to {max(times):.3g} s, "
            f"median {np.median(times):.3g} s"
        )
        deadline = self.config.clock.deadline
        num_late = sum(seconds > deadline for seconds in times)
        if deadline and num_late:
            text += f"; {num_late} of {len(times)} miss the deadline of {deadline:g} s"
        return text


class Closed(NamedTuple):
    """A round that the server has closed."""

    reporting: list[int]  # the clients that were in time, sorted
    seconds: float


def close_round(times: Sequence[tuple[float, int]], wanted: int, deadline: float) -> Closed:
    """Close a round, of (time, client) of those that report, sorted.

    The server takes the first `wanted` reports. If the `deadline` comes before, it takes those that
    are there; 0 stands for none. Without a deadline it knows who has dropped out, and waits for the
    others.
    """
    in_time = [one for one in times if not deadline or one[0] <= deadline]
    taken = in_time[:wanted]
    last = taken[-1][0] if taken else 0.0
    waits_in_vain = deadline and len(taken) < wanted
    return Closed(
        reporting=sorted(client for _, client in taken),
        seconds=deadline if waits_in_vain else last,
    )


def keep_time(parts: Any, experiment: Any) -> Any:
    """Give each round its simulated seconds; leave out who is late, and draw more for that."""
    if experiment.config.optimization.algorithm == "fedbuff":
        return import_function("fedbuff:run_asynchronously")(parts, experiment)
    config = experiment.config
    clock = Clock(parts, experiment)
    sizes = experiment.partition.sizes
    changed = parts
    if config.clock.over_select > 1:
        more = config.replace(clients_per_round=config.num_selected, over_select=1.0)
        changed = parts._replace(
            sample_clients=lambda round_num: draw_cohort(more, round_num, sizes)
        )
    find_reporting = parts.find_reporting

    def close(clients: list[int], round_num: int) -> Closed:
        reporting = find_reporting(clients, round_num)
        times = sorted((clock.seconds(client, round_num), client) for client in reporting)
        # Poisson sampling may draw fewer than m.
        most = config.cohort_size if config.clock.over_select > 1 else len(clients)
        wanted = min(most, len(clients))
        return close_round(times, wanted, config.clock.deadline)

    return changed._replace(
        notices=(*parts.notices, clock.describe(changed.sample_clients(1))),
        find_reporting=lambda clients, round_num: close(clients, round_num).reporting,
        simulate_seconds=lambda clients, round_num: close(clients, round_num).seconds,
    )
