"""Unreliable and malicious clients: dropouts, stragglers, attackers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from harness.cli.fields import UserError
from harness.cli.loading import import_function
from harness.training.shards import Shard
from harness.training.streams import open_stream
from variants.options import Adversity
from variants.wrapping import wrap_client

import numpy as np
import tensorflow as tf

Update = tuple[Any, ...]
WHITE = np.uint8(255)
SHARD_KEY = -1_000_000  # of what is random on an attacker's shard; the updates' keys are above it


def find_late(
    clients: Sequence[int], config: Any, round_num: int, client_key: Callable
) -> set[int]:
    """Return those of the clients that are stragglers in the round.

    It is a function of (seed, round, client); client_key(seed, client, round) is a client's key.
    """
    keys = {client: client_key(config.seed, np.int64(client), round_num) for client in clients}
    stragglers = config.adversity.stragglers
    return {client for client, key in keys.items() if is_late(key, stragglers)[0]}


def is_late(key: Any, probability: float) -> tuple[Any, Any]:
    """Return whether a client with this key is a straggler, and the share of its work that it does,
    0..1."""
    late_key = tf.random.experimental.stateless_fold_in(key, -1)
    luck, share = tf.unstack(tf.random.stateless_uniform([2], late_key))
    return luck < probability, share


def choose_attackers(adversity: Adversity, clients: np.ndarray, seed: int) -> np.ndarray:
    """Return those of the clients that attack in every round, int64[byzantine], sorted: a function
    of the seed."""
    rng = open_stream("attackers", seed)
    return np.sort(rng.choice(clients, adversity.byzantine, replace=False))


def unseen_clients(config: Any) -> np.ndarray:
    """Return the clients that are never drawn, int64, sorted: a function of the seed."""
    rng = open_stream("unseen clients", config.seed)
    num_clients = config.partitioning.num_clients
    return np.sort(rng.choice(num_clients, config.num_unseen, replace=False))


def drawn_clients(config: Any) -> np.ndarray:
    """Return the clients that a round may draw, int64, sorted: by default all."""
    return np.setdiff1d(np.arange(config.partitioning.num_clients), unseen_clients(config))


def trigger_mask(image_shape: Sequence[int]) -> np.ndarray:
    """Return where a backdoor's trigger is, bool[H,W,1]: a square in the lower right corner.

    Its side is a seventh of the image's: 4 pixels of MNIST's 28, one pixel off the border.
    """
    height, width, _ = image_shape
    side = max(1, min(height, width) // 7)
    margin = 1 if min(height, width) > side + 1 else 0
    mask = np.zeros((height, width, 1), bool)
    mask[height - margin - side : height - margin, width - margin - side : width - margin] = True
    return mask


def flip_labels(shard: Shard, key: Any, attackers: Attackers) -> Shard:
    """Return a shard in which label l is C - 1 - l (Fang et al. 2020, section 5)."""
    return shard._replace(labels=attackers.num_classes - 1 - shard.labels)


def stamp_trigger(shard: Shard, key: Any, attackers: Attackers) -> Shard:
    """Return a shard whose images have the trigger and the target's label, a share of them.

    Bagdasaryan et al. 2020, who mix such images into each batch.
    """
    adversity = attackers.adversity
    own_key = tf.random.experimental.stateless_fold_in(key, SHARD_KEY)
    luck = tf.random.stateless_uniform(tf.shape(shard.labels), own_key)
    chosen = luck < adversity.backdoor_share
    stamped = tf.where(trigger_mask(shard.images.shape[1:]), WHITE, shard.images)
    images = tf.where(chosen[:, tf.newaxis, tf.newaxis, tf.newaxis], stamped, shard.images)
    return Shard(images, tf.where(chosen, adversity.backdoor_target, shard.labels))


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


def attack(parts: Any, experiment: Any) -> Any:
    """Let the attackers train on another shard, or send another update, as the attack says."""
    config = experiment.config
    attackers = Attackers(config, experiment.dataset.num_classes)

    def wrap(client_update):
        def wrapped(broadcast, task):
            shard = attackers.shard(task.client, task.shard, task.key)
            output = client_update(broadcast, task._replace(shard=shard))
            return output._replace(update=attackers.update(task.client, output.update, task.key))

        return wrapped

    return wrap_client(parts, wrap)


def straggle(parts: Any, experiment: Any) -> Any:
    """Let each client do only a random share of its local steps, with probability stragglers."""
    stragglers = experiment.config.adversity.stragglers

    def wrap(client_update):
        def wrapped(broadcast, task):
            fewer = cut_work(task.examples_to_train, task.key, stragglers)
            return client_update(broadcast, task._replace(examples_to_train=fewer))

        return wrapped

    return wrap_client(parts, wrap)


def cut_work(num_examples: Any, key: Any, stragglers: float) -> Any:
    """Return on how many of these examples, int32, a client with this key trains: one at least."""
    late, share = is_late(key, stragglers)
    fewer = tf.cast(share * tf.cast(num_examples, tf.float32), num_examples.dtype)
    return tf.where(late, tf.maximum(fewer, 1), num_examples)


class Attackers:
    """Which clients attack, and what they train on and send.

    `key` is always the client's int64[2] of the round.
    """

    def __init__(self, config: Any, num_classes: int):
        self.adversity: Adversity = config.adversity
        self.attack = config.chosen("attack")
        self.num_classes = num_classes
        target = self.adversity.backdoor_target
        if target >= num_classes:
            raise UserError(
                f"backdoor_target={target} is not a label of these data; choose 0 to "
                f"{num_classes - 1}"
            )
        self.attackers = choose_attackers(self.adversity, drawn_clients(config), config.seed)

    def is_attacker(self, client: Any) -> Any:
        """Return whether `client`, an int64 scalar, attacks."""
        return tf.reduce_any(tf.equal(client, self.attackers))

    def shard(self, client: Any, shard: Shard, key: Any) -> Shard:
        """Return the shard to train on."""
        if not self.attack.shard:
            return shard
        change = import_function(self.attack.shard)
        return tf.cond(self.is_attacker(client), lambda: change(shard, key, self), lambda: shard)

    def update(self, client: Any, update: Update, key: Any) -> Update:
        """Return the update to send."""
        if not self.attack.update:
            return update
        change = import_function(self.attack.update)
        return tf.cond(
            self.is_attacker(client),
            lambda: change(update, key, self.adversity.attack_scale),
            lambda: update,
        )
