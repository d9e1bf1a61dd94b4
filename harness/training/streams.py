"""Random streams of a run: each a function of (seed, round, client) and its own number.

The split is drawn from the seed alone, a round's cohort from (seed, round), and what a partition
changes on a client's images from (seed, client). NumPy's generator of [s, 0] is that of s, so that
these three share numbers, for unlike uses; a new stream gets a number of its own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

# What is drawn from each other stream; the numbers are never reused.
NUMBERS = {
    "dropouts": 1,  # of a round: who does not report
    "attackers": 2,
    "split again": 3,  # the attempts after the first
    "unseen clients": 5,
    "extra evaluations": 6,  # images of many
    "device speeds": 8,
    "arrivals": 9,  # in FedBuff: the clients that take the places of those that have reported
    "client tests": 7,  # the images of a client that it does not train on
}


def open_stream(name: str, seed: int, round_num: int = 0, *more: int) -> np.random.Generator:
    """Return the generator of a stream; round 0 stands for the whole run."""
    return np.random.default_rng([seed, round_num, NUMBERS[name], *more])


def client_key(seed: int, client: Any, round_num: Any) -> Any:
    """Return the key int64[2] of all that is random on a client in a round."""
    seed_and_client = tf.stack([tf.constant(seed, tf.int64), client])
    return tf.random.experimental.stateless_fold_in(seed_and_client, tf.cast(round_num, tf.int64))
