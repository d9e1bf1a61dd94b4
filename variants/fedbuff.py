"""FedBuff: asynchronous training with a buffer (Nguyen et al. 2022, Algorithm 1).

m clients are at work at any time. One that has reported is replaced by another one, which begins
with the server's current model. Whenever buffer_size clients have reported, the server makes a
step: a round. It applies the mean of their updates, each multiplied by 1 / sqrt(1 + staleness),
the number of steps that the server made since the client began.

Who works when follows from the clock and the seed alone, not from the weights. So a round trains
its clients at once, each from the model that it began with; the server keeps those models.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from harness.cli.fields import UserError
from harness.training.streams import open_stream
from variants.adversity import drawn_clients
from variants.clock import Clock
from variants.stateful import check_memory
from variants.wrapping import unflatten

import numpy as np
import tensorflow as tf

MOST_LOST = 100  # times the number of clients that may fail to report, one after the other


class Work(NamedTuple):
    """A client's work."""

    finish: float  # simulated seconds since the run began
    client: int
    version: int  # the server's steps when it began
    draw: int  # number of the draw that chose it


class Step(NamedTuple):
    """A step of the server."""

    work: list[Work]  # of the clients in the buffer
    lost: list[int]  # clients that failed to report since the step before
    seconds: float  # since the step before
    needed: frozenset[int]  # versions that some client has begun with and not been counted yet


class Schedule:
    """Who works when: an event queue, up to the step that is asked for."""

    def __init__(
        self,
        clock: Clock,
        sample: Callable[[int], list[int]],
        find_reporting: Callable[[list[int], int], list[int]],
    ):
        """`sample` and `find_reporting` are FedAvg's parts, or variants of them."""
        config = clock.config
        self.clock = clock
        self.sample = sample
        self.find_reporting = find_reporting
        self.seed = config.seed
        self.at_once = config.cohort_size
        self.buffer_size = config.optimization.buffer_size
        self.clients = drawn_clients(config)
        self.now = 0.0
        self.draws = 0
        self.last_fedavg_draw = -1  # the version
        self.at_work: list[Work] = []
        self.buffer: list[Work] = []
        self.steps: list[Step] = []

    def step(self, round_num: int) -> Step:
        """Return the server's step of a round, 1, 2, ..."""
        while len(self.steps) < round_num:
            self.steps.append(self.make_step())
        return self.steps[round_num - 1]

    def make_step(self) -> Step:
        """Let clients work until the buffer is full."""
        began = self.now
        lost: list[int] = []
        num_lost = 0  # one after the other
        while len(self.buffer) < self.buffer_size:
            self.draw_clients()
            self.now = min(work.finish for work in self.at_work)
            done = sorted(work for work in self.at_work if work.finish == self.now)
            self.at_work = [work for work in self.at_work if work.finish > self.now]
            for work in done:
                if self.find_reporting([work.client], work.draw):
                    self.buffer.append(work)
                    num_lost = 0
                else:
                    lost.append(work.client)
                    num_lost += 1
            if num_lost > MOST_LOST * len(self.clients):
                raise UserError(
                    f"dropout={self.clock.config.adversity.dropout:g}: no client reports any more, "
                    "so fedbuff's buffer never fills; choose a smaller --dropout"
                )
        counted = self.buffer[: self.buffer_size]
        self.buffer = self.buffer[self.buffer_size :]
        needed = frozenset(work.version for work in [*self.at_work, *self.buffer])
        return Step(counted, lost, self.now - began, needed)

    def draw_clients(self) -> None:
        """Fill the free places, with clients that neither work nor wait in the buffer.

        A round's first draw, if all places are free, is FedAvg's; others are functions of the seed
        and the number of the draw.
        """
        version = len(self.steps)
        busy = [work.client for work in [*self.at_work, *self.buffer]]
        idle = np.setdiff1d(self.clients, busy)
        free = min(self.at_once - len(self.at_work), len(idle))
        if free < 1:
            return
        self.draws += 1
        if busy or self.last_fedavg_draw == version:
            rng = open_stream("arrivals", self.seed, self.draws)
            chosen = sorted(rng.choice(idle, free, replace=False).tolist())
        else:
            chosen = self.sample(version + 1)
            self.last_fedavg_draw = version
        for client in chosen:
            finish = self.now + self.clock.seconds(client, version + 1)
            self.at_work.append(Work(finish, client, version, self.draws))


class Versions:
    """What the server keeps in addition to the weights: models that clients have begun with.

    float32[slots,d+2]. While a round is trained, a row is a client's: its id + 1, its staleness,
    and the model that it began with. Between rounds a row is a version's: its number + 1, 0, and
    the model. A row that begins with 0 is free.
    """

    def __init__(self, num_slots: int, num_parameters: int):
        self.shape = (num_slots, num_parameters + 2)
        self.places: dict[int, int] = {}  # client of the round -> row

    def slots_of(self, clients: np.ndarray) -> list[int]:
        """Return the rows of these clients, for a host that trains them."""
        return [self.places[int(client)] for client in clients]

    def begin(self, step: Step, models: dict[int, np.ndarray], now: int) -> np.ndarray:
        """Return the rows of a step's clients; `models` are by version, of which `now` is last."""
        rows = np.zeros(self.shape, np.float32)
        self.places = {work.client: place for place, work in enumerate(step.work)}
        for row, work in zip(rows, step.work, strict=False):
            row[0] = work.client + 1
            row[1] = now - work.version
            row[2:] = models[work.version]
        return rows

    def end(self, step: Step, models: dict[int, np.ndarray]) -> np.ndarray:
        """Return the rows of the versions that clients who are still at work began with."""
        rows = np.zeros(self.shape, np.float32)
        for row, version in zip(rows, sorted(step.needed), strict=False):
            row[0] = version + 1
            row[2:] = models[version]
        return rows


def read_models(state: Any) -> dict[int, np.ndarray]:
    """Return version -> model float32[d], of the state between two rounds."""
    kept = np.asarray(state.client_work.memory)
    models = {int(row[0]) - 1: row[2:] for row in kept if row[0]}
    current = [np.asarray(w).reshape(-1) for w in state.global_model_weights.trainable]
    return models | {int(state.client_work.round): np.concatenate(current)}


def add_field(metrics_type: Any, name: str) -> Any:
    """Return a NamedTuple with one more field, a float32."""
    return NamedTuple("Metrics", [(field, Any) for field in (*metrics_type._fields, name)])


def run_asynchronously(parts: Any, experiment: Any) -> Any:
    """Return the parts in which a round is a step of FedBuff's server.

    Raises UserError where something else needs the memory, or rounds that begin together.
    """
    check_neighbours(parts, experiment)
    config = experiment.config
    schedule = Schedule(Clock(parts, experiment), parts.sample_clients, parts.find_reporting)
    slots = max(config.cohort_size, config.optimization.buffer_size)
    versions = Versions(slots, experiment.num_parameters)
    check_memory(versions, "algorithm='fedbuff'")
    metrics_type = add_field(parts.metrics_type, "staleness")
    inner_chunk = parts.build_train_chunk
    inner_cohort = parts.train_cohort

    def build_train_chunk(train_client, parts_in_use):
        def from_own_version(broadcast, client_id):
            place = tf.argmax(tf.equal(broadcast.memory[:, 0], tf.cast(client_id + 1, tf.float32)))
            row = broadcast.memory[place]
            staleness = row[1]
            begun = broadcast._replace(
                weights=unflatten(row[2:], broadcast.weights),
                round_num=broadcast.round_num - tf.cast(staleness, tf.int64),
            )
            output = train_client(begun, client_id)
            factor = 1 / tf.sqrt(1 + staleness)
            return output._replace(
                update=tf.nest.map_structure(lambda u: factor * u, output.update),
                metrics=metrics_type(*output.metrics, staleness=staleness),
            )

        return inner_chunk(from_own_version, parts_in_use)

    def train_cohort(worker, experiment_in_use, state, clients):
        round_num = int(state.client_work.round) + 1
        step = schedule.step(round_num)
        models = read_models(state)
        sent = versions.begin(step, models, round_num - 1)
        begun = state._replace(client_work=state.client_work._replace(memory=sent))
        new, reports, measured = inner_cohort(worker, experiment_in_use, begun, clients)
        kept = versions.end(step, models)
        new_state = new._replace(client_work=new.client_work._replace(memory=kept))
        return new_state, reports, measured

    def find_reporting(clients, round_num):
        return sorted(work.client for work in schedule.step(round_num).work)

    def find_cohort(round_num):
        return [*find_reporting([], round_num), *schedule.step(round_num).lost]

    first = parts.sample_clients(1)
    return parts._replace(
        notices=(*parts.notices, schedule.clock.describe(first)),
        sample_clients=find_cohort,
        find_reporting=find_reporting,
        simulate_seconds=lambda clients, round_num: schedule.step(round_num).seconds,
        build_train_chunk=build_train_chunk,
        train_cohort=train_cohort,
        metrics_type=metrics_type,
        memory=versions,
    )


def check_neighbours(parts: Any, experiment: Any) -> None:
    """Raise UserError for flags that asynchronous rounds have no rule for."""
    config = experiment.config
    most = len(drawn_clients(config))
    if config.optimization.buffer_size > most:
        raise UserError(
            f"buffer_size={config.optimization.buffer_size} exceeds the {most} clients, of which "
            f"each reports once in a round; give --buffer-size, 1 to {most}"
        )
    if parts.memory is not None:
        raise UserError(
            f"algorithm='fedbuff' cannot be combined with batch_norm="
            f"{config.training.batch_norm!r}, as both keep models at the server; drop one of them"
        )
    if experiment.network.statistics:
        raise UserError(
            f"algorithm='fedbuff' cannot be combined with batch_norm="
            f"{config.training.batch_norm!r}: moves of the statistics that are added late could "
            "make a variance negative; use GroupNormalization"
        )
