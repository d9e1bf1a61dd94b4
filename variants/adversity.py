"""Clients that do not do what they should: stragglers, and attackers that send the server something else."""

from typing import Any

import numpy as np
import tensorflow as tf


def attackers(config: Any) -> np.ndarray:
    """The clients that attack in every round, int64[byzantine], sorted: a function of the seed."""
    rng = np.random.default_rng([config.seed, 0, 2])
    return np.sort(rng.choice(config.num_clients, config.byzantine, replace=False))


def straggle(budget: Any, key: Any, config: Any) -> Any:
    """The examples that a client trains on: `budget`, or with probability `stragglers` a uniform share of it."""
    late, share = tf.unstack(tf.random.stateless_uniform([2], tf.random.experimental.stateless_fold_in(key, -1)))
    less = tf.maximum(tf.cast(share * tf.cast(budget, tf.float32), budget.dtype), 1)
    return tf.where(late < config.stragglers, less, budget)


def flip_labels(records: Any, num_classes: int) -> Any:
    """Label l becomes C - 1 - l in records uint8[n,785] (Fang et al. 2020, section 5)."""
    return tf.concat([records[:, :-1], tf.cast(num_classes - 1, tf.uint8) - records[:, -1:]], axis=1)


def flip_sign(update: Any, key: Any, config: Any) -> Any:
    """The honest update backwards."""
    return tuple(-u for u in update)


def scale(update: Any, key: Any, config: Any) -> Any:
    """The honest update `attack_scale` times (Bagdasaryan et al. 2020)."""
    return tuple(config.attack_scale * u for u in update)


def gaussian(update: Any, key: Any, config: Any) -> Any:
    """Noise whose standard deviation is `attack_scale` times the honest update's root mean square (Blanchard 2017)."""
    size = sum(tf.size(u, out_type=tf.float32) for u in update)
    spread = config.attack_scale * tf.sqrt(sum(tf.reduce_sum(u**2) for u in update) / size)
    keys = [tf.random.experimental.stateless_fold_in(key, -2 - number) for number in range(len(update))]
    return tuple(spread * tf.random.stateless_normal(u.shape, k) for u, k in zip(update, keys, strict=True))


def not_a_number(update: Any, key: Any, config: Any) -> Any:
    """NaN everywhere."""
    return tuple(u * np.nan for u in update)
