"""Aggregators that look at all updates at once: a minority of clients cannot move them at will.

All are unweighted: what a client says of its number of examples must not give it power.
"""

from collections.abc import Callable
from typing import Any

import tensorflow as tf
import tensorflow_federated as tff

from variants.rows import gather


class RowRule(tff.aggregators.WeightedAggregationFactory):
    """rule(rows float32[m,d]) -> float32[d] as a TFF factory for stacked updates; rows of weight 0 are left out."""

    def __init__(self, rule: Callable[[Any], Any]):
        self.rule = rule

    def create(self, value_type: Any, weight_type: Any) -> tff.templates.AggregationProcess:
        """For float32[g,d] of each group and its weights float32[g]; without any row the result is 0."""

        @tff.tensorflow.computation
        def apply(rows, weights):
            kept = tf.boolean_mask(rows, weights > 0)
            return tf.cond(tf.size(kept) > 0, lambda: self.rule(kept), lambda: tf.zeros_like(rows[0]))

        @tff.federated_computation
        def initialize():
            return tff.federated_value((), tff.SERVER)

        at_clients = [tff.FederatedType(member, tff.CLIENTS) for member in (value_type, weight_type)]

        @tff.federated_computation(initialize.type_signature.result, *at_clients)
        def next_fn(state, value, weight):
            result = tff.federated_map(apply, gather(tff.federated_zip((value, weight))))
            return tff.templates.MeasuredProcessOutput(state, result, tff.federated_value((), tff.SERVER))

        return tff.templates.AggregationProcess(initialize, next_fn)


def median(rows: Any) -> Any:
    """Each coordinate's median; of an even number the mean of the middle two (Yin et al. 2018)."""
    count, ordered = tf.shape(rows)[0], tf.sort(rows, axis=0)
    return (ordered[(count - 1) // 2] + ordered[count // 2]) / 2


def trimmed_mean(rows: Any, share: float) -> Any:
    """Each coordinate's mean without the `share` highest and the `share` lowest (Yin et al. 2018)."""
    count, ordered = tf.shape(rows)[0], tf.sort(rows, axis=0)
    cut = tf.cast(tf.floor(share * tf.cast(count, tf.float32)), tf.int32)
    return tf.reduce_mean(ordered[cut : count - cut], axis=0)


def krum(rows: Any, attackers: int, chosen: int = 1) -> Any:
    """The mean of the `chosen` rows nearest to their neighbours (Blanchard et al. 2017).

    A row's score is the sum of its squared distances to the m - attackers - 2 nearest others, lowest first. `chosen`
    0 is multi-Krum with m - attackers.
    """
    count = tf.shape(rows)[0]
    centred = rows - tf.reduce_mean(rows, axis=0)  # the distances are the same, and float32 holds them better
    squares = tf.reduce_sum(centred**2, axis=1)
    distances = tf.maximum(squares[:, tf.newaxis] + squares - 2 * tf.matmul(centred, centred, transpose_b=True), 0)
    nearest = tf.sort(tf.linalg.set_diag(distances, tf.zeros([count])), axis=1)  # itself, at 0, comes first
    scores = tf.reduce_sum(nearest[:, : tf.maximum(count - attackers - 2, 1) + 1], axis=1)
    best = tf.argsort(scores, stable=True)[: chosen or tf.maximum(count - attackers, 1)]
    return tf.reduce_mean(tf.gather(rows, best), axis=0)
