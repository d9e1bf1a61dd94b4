"""Clients that do not do what they should: dropouts, stragglers, and attackers that send the server
something else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from harness.shards import Shard
from variants.options import Adversity

import numpy as np
import tensorflow as tf

Update = tuple[Any, ...]


def drop_out(clients: Sequence[int], config: Any, round_num: int) -> list[int]:
    """Return those of the round's clients that report, each with probability 1 - dropout.

    It is a function of (seed, round, client).
    """
    rng = np.random.default_rng([config.seed, round_num, 1])
    luck = rng.random(config.partitioning.num_clients)
    return [client for client in clients if luck[client] >= config.adversity.dropout]


def choose_attackers(adversity: Adversity, num_clients: int, seed: int) -> np.ndarray:
    """Return the clients that attack in every round, int64[byzantine], sorted: a function of the
    seed."""
    rng = np.random.default_rng([seed, 0, 2])
    return np.sort(rng.choice(num_clients, adversity.byzantine, replace=False))


def flip_labels(shard: Shard, num_classes: int) -> Shard:
    """Return a shard in which label l is C - 1 - l (Fang et al. 2020, section 5)."""
    return shard._replace(labels=num_classes - 1 - shard.labels)


def honest_shard(shard: Shard, num_classes: int) -> Shard:
    """Return the shard as it is."""
    return shard


def honest_update(update: Update, key: Any, scale: float) -> Update:
    """Return the update as it is."""
    return update


def flip_sign(update: Update, key: Any, scale: float) -> Update:
    """Return the honest update backwards."""
    return tuple(-u for u in update)


def scale_up(update: Update, key: Any, scale: float) -> Update:
    """Return the honest update `scale` times (Bagdasaryan et al. 2020)."""
    return tuple(scale * u for u in update)


def gaussian(update: Update, key: Any, scale: float) -> Update:
    """Return noise whose standard deviation is `scale` times the update's root mean square
    (Blanchard et al. 2017)."""
    size = sum(tf.size(u, out_type=tf.float32) for u in update)
    spread = scale * tf.sqrt(sum(tf.reduce_sum(u**2) for u in update) / size)
    keys = [
        tf.random.experimental.stateless_fold_in(key, -2 - number) for number in range(len(update))
    ]
    return tuple(
        spread * tf.random.stateless_normal(u.shape, k) for u, k in zip(update, keys, strict=True)
    )


def not_a_number(update: Update, key: Any, scale: float) -> Update:
    """Return NaN everywhere."""
    return tuple(u * np.nan for u in update)


class Attack(NamedTuple):
    """A row: what an attacker trains on in place of its shard, and sends in that of its
    update."""

    shard: Callable = honest_shard
    update: Callable = honest_update


ATTACKS = {
    "label-flip": Attack(shard=flip_labels),
    "sign-flip": Attack(update=flip_sign),
    "scaled": Attack(update=scale_up),
    "gaussian": Attack(update=gaussian),
    "nan": Attack(update=not_a_number),
}


class ClientBehaviour:
    """What the clients train on and send: honest ones, stragglers and attackers.

    `key` is always the client's int64[2] of the round.
    """

    def __init__(self, config: Any, attack: Attack, num_classes: int):
        self.adversity: Adversity = config.adversity
        self.attack = attack
        self.num_classes = num_classes
        self.attackers = choose_attackers(
            self.adversity, config.partitioning.num_clients, config.seed
        )

    def is_attacker(self, client: Any) -> Any:
        """Return whether `client`, an int64 scalar, attacks."""
        return tf.reduce_any(tf.equal(client, self.attackers))

    def shard(self, client: Any, shard: Shard) -> Shard:
        """Return what a client with this shard trains on."""
        if not self.adversity.byzantine:
            return shard
        return tf.cond(
            self.is_attacker(client),
            lambda: self.attack.shard(shard, self.num_classes),
            lambda: shard,
        )

    def num_visits(self, num_visits: Any, key: Any) -> Any:
        """Return how many of these examples, int32, a client trains on.

        With probability `stragglers` it is a uniform share of them, one at least.
        """
        if not self.adversity.stragglers:
            return num_visits
        late_key = tf.random.experimental.stateless_fold_in(key, -1)
        luck, share = tf.unstack(tf.random.stateless_uniform([2], late_key))
        fewer = tf.cast(share * tf.cast(num_visits, tf.float32), num_visits.dtype)
        is_late = luck < self.adversity.stragglers
        return tf.where(is_late, tf.maximum(fewer, 1), num_visits)

    def update(self, client: Any, update: Update, key: Any) -> Update:
        """Return what a client with this update sends."""
        if not self.adversity.byzantine:
            return update
        return tf.cond(
            self.is_attacker(client),
            lambda: self.attack.update(update, key, self.adversity.attack_scale),
            lambda: update,
        )
