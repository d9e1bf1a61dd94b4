"""Clients that do not do what they should: dropouts, stragglers, and attackers that send the server
something else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from variants.options import Adversity

import numpy as np
import tensorflow as tf

Update = tuple[Any, ...]


def drop_out(
    clients: Sequence[int], adversity: Adversity, num_clients: int, seed: int, round_num: int
) -> list[int]:
    """Return those of `clients` that report, each with probability 1 - dropout: by (seed, round,
    client)."""
    luck = np.random.default_rng([seed, round_num, 1]).random(num_clients)
    return [client for client in clients if luck[client] >= adversity.dropout]


def captions(adversity: Adversity) -> dict[str, str]:
    """Return what a caption says of each kind, nothing of one that is not there."""
    scale = (
        f", scale {adversity.attack_scale:g}" if adversity.attack in ("scaled", "gaussian") else ""
    )
    return {
        "dropout": f"dropout {adversity.dropout:g}" if adversity.dropout else "",
        "stragglers": f"stragglers {adversity.stragglers:g}" if adversity.stragglers else "",
        "attack": f"{adversity.byzantine} attackers ({adversity.attack}{scale})"
        if adversity.byzantine
        else "",
    }


def choose_attackers(adversity: Adversity, num_clients: int, seed: int) -> np.ndarray:
    """Return the clients that attack in every round, int64[byzantine], sorted: a function of the
    seed."""
    rng = np.random.default_rng([seed, 0, 2])
    return np.sort(rng.choice(num_clients, adversity.byzantine, replace=False))


def flip_labels(records: Any, num_classes: int) -> Any:
    """Return records uint8[n,785] in which label l is C - 1 - l (Fang et al. 2020, section 5)."""
    return tf.concat(
        [records[:, :-1], tf.cast(num_classes - 1, tf.uint8) - records[:, -1:]], axis=1
    )


def honest_records(records: Any, num_classes: int) -> Any:
    """Return the records as they are."""
    return records


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
    """A row: what an attacker trains on in the place of its records, and sends in that of its
    update."""

    records: Callable = honest_records
    update: Callable = honest_update


ATTACKS = {
    "label-flip": Attack(records=flip_labels),
    "sign-flip": Attack(update=flip_sign),
    "scaled": Attack(update=scale_up),
    "gaussian": Attack(update=gaussian),
    "nan": Attack(update=not_a_number),
}


class Honest:
    """A client that trains on its records, makes all its steps, and sends its own update."""

    def records(self, client: Any, records: Any) -> Any:
        """Return what `client`, an int64 scalar, trains on, uint8[n,785]."""
        return records

    def budget(self, budget: Any, key: Any) -> Any:
        """Return how many examples it trains on, of `budget`, int32; `key` int64[2] is the client's
        in this round."""
        return budget

    def update(self, client: Any, update: Update, key: Any) -> Update:
        """Return what it sends."""
        return update


class Adversary(Honest):
    """A client that may be an attacker, or a straggler."""

    def __init__(self, adversity: Adversity, attackers: np.ndarray, num_classes: int):
        self.adversity = adversity
        self.attackers = attackers
        self.num_classes = num_classes
        self.attack = ATTACKS[adversity.attack]

    def attacks(self, client: Any) -> Any:
        """Return whether it is one of the attackers."""
        return tf.reduce_any(tf.equal(client, self.attackers))

    def records(self, client, records):
        """Return an attacker's records as the attack has them."""
        if not self.adversity.byzantine:
            return records
        return tf.cond(
            self.attacks(client),
            lambda: self.attack.records(records, self.num_classes),
            lambda: records,
        )

    def budget(self, budget, key):
        """Return `budget`, or with probability `stragglers` a uniform share of it."""
        if not self.adversity.stragglers:
            return budget
        late, share = tf.unstack(
            tf.random.stateless_uniform([2], tf.random.experimental.stateless_fold_in(key, -1))
        )
        less = tf.maximum(tf.cast(share * tf.cast(budget, tf.float32), budget.dtype), 1)
        return tf.where(late < self.adversity.stragglers, less, budget)

    def update(self, client, update, key):
        """Return an attacker's update as the attack has it."""
        if not self.adversity.byzantine:
            return update
        scale = self.adversity.attack_scale
        return tf.cond(
            self.attacks(client), lambda: self.attack.update(update, key, scale), lambda: update
        )


def build_behaviour(adversity: Adversity, num_clients: int, num_classes: int, seed: int) -> Honest:
    """Return how the clients behave."""
    if adversity.byzantine or adversity.stragglers:
        return Adversary(adversity, choose_attackers(adversity, num_clients, seed), num_classes)
    return Honest()
