"""Aggregators other than the weighted mean.

Each is a function change(parts, experiment) -> parts. The robust rules look at all updates at once,
so that a minority of the clients cannot move them at will. They are unweighted: what a client says
of its number of examples must not give it power.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

from harness.cli.loading import change_parts
from harness.engine.gather import gather
from variants.wrapping import flatten, unflatten, wrap_client

import tensorflow as tf
import tensorflow_federated as tff


def change_aggregator(parts: Any, experiment: Any) -> Any:
    """Change the parts as the chosen aggregator does."""
    return change_parts("aggregator", parts, experiment)


def weigh_alike(parts: Any, experiment: Any) -> Any:
    """Let all clients count the same in the mean, whatever their numbers of examples."""

    def wrap(client_update):
        return lambda broadcast, task: client_update(broadcast, task)._replace(weight=1.0)

    return wrap_client(parts, wrap)


# == Means of TFF's, which see each client by itself ===============================================


def see_each_client(parts: Any, aggregator: Any) -> Any:
    """Return the parts with this TFF factory, to which each client is a chunk of its own."""
    return parts._replace(aggregator=aggregator, num_chunks=None)


def share_norms(parts: Any) -> Any:
    """Return the parts of an aggregator that adapts to the norms of the updates.

    The norm, 4 bytes, goes both ways. A client with a non-finite update sends zeros with weight 0,
    whose norm would count, so the round is repeated from the same state without that client; its
    report stays in the record.
    """
    inner = parts.train_cohort

    def train_cohort(worker, experiment, state, clients):
        next_state, reports, measured = inner(worker, experiment, state, clients)
        finite = [report["client"] for report in reports if report["finite"]]
        if len(finite) < len(reports):
            next_state, _, measured = train_cohort(worker, experiment, state, finite)
        return next_state, reports, measured

    return parts._replace(train_cohort=train_cohort, message_bytes=parts.message_bytes + 4)


def clipping(parts: Any, experiment: Any) -> Any:
    """The mean of updates that are cut to an adaptive norm (Andrew et al. 2021)."""
    return share_norms(see_each_client(parts, tff.learning.robust_aggregator(zeroing=False)))


def zeroing(parts: Any, experiment: Any) -> Any:
    """The mean in which very large updates, by an adaptive norm, count as zeros."""
    return share_norms(see_each_client(parts, tff.learning.robust_aggregator(clipping=False)))


def compressed(parts: Any, experiment: Any) -> Any:
    """The mean of updates in 8 bits (Suresh et al. 2017), rounded so that a run repeats."""
    factory = tff.learning.compression_aggregator(zeroing=False, clipping=False, stochastic=False)
    sizes = [weights.size for weights in experiment.initial_weights]
    return see_each_client(parts, factory)._replace(update_bytes=compressed_bytes(sizes))


def compressed_bytes(sizes: Sequence[int]) -> int:
    """Return the bytes of an update in 8 bits an element; TFF packs 28 bits into an int32.

    Each tensor also sends its minimum and maximum. Tensors of up to 20,000 elements are sent as
    float32.
    """
    return sum(4 * math.ceil(8 * size / 28) + 8 if size > 20_000 else 4 * size for size in sizes)


def secure(parts: Any, experiment: Any) -> Any:
    """The mean by secure sums (Bonawitz et al. 2017)."""
    is_uniform = experiment.config.aggregation.client_weighting == "uniform"
    factory = secure_mean(int(experiment.partition.sizes.max()), is_uniform)
    return see_each_client(parts, factory)._replace(
        note="arithmetic of secure sums only: no cryptography, bytes without keys, shares and masks"
    )


def secure_mean(most_examples: int, is_uniform: bool) -> Any:
    """Return TFF's mean by secure sums of n_k * update and of n_k, in 32 bits.

    A client's value is cut at the bounds in silence, and the steps of a sum are as wide as they
    are. They allow for the largest n_k, or 1 if all count the same, and for an update of 16 of each
    parameter, far above that of any training that goes well. Bounds with n_k are at least 1e5.
    """
    if is_uniform:
        weight_bound = 1.0
        value_bound = 16.0
    else:
        weight_bound = max(1e5, float(most_examples))
        value_bound = max(1e5, 16.0 * most_examples)
    return tff.aggregators.MeanFactory(
        tff.aggregators.SecureSumFactory(value_bound, -value_bound),
        tff.aggregators.SecureSumFactory(weight_bound, 0.0),
    )


# == Rules that see all updates at once ============================================================


def stack_updates(train_client: Callable, parts: Any) -> Callable[[Any, Any], Any]:
    """Return train_chunk(broadcast, clients int64[g]) -> what they send, a row for each.

    Rows are the update float32[g,d], the weight float32[g], the metrics and the messages.
    """
    num_parameters = sum(math.prod(spec.shape) for spec in parts.update_spec)
    num_metrics = len(parts.metrics_type._fields)

    @tf.function
    def train_chunk(broadcast, clients):  # line 4 of the pseudo-code
        g = tf.size(clients)
        updates = tf.TensorArray(tf.float32, g, element_shape=[num_parameters])
        weights = tf.TensorArray(tf.float32, g, element_shape=[])
        metrics = tf.TensorArray(tf.float32, g, element_shape=[num_metrics])
        messages = tf.TensorArray(tf.float32, g, element_shape=[parts.message_size])
        for place in tf.range(g):
            tf.autograph.experimental.set_loop_options(parallel_iterations=1)
            output = train_client(broadcast, clients[place])
            updates = updates.write(place, flatten(output.update))
            weights = weights.write(place, output.weight)
            metrics = metrics.write(place, tf.stack(output.metrics))
            messages = messages.write(place, output.message)
        return updates.stack(), weights.stack(), metrics.stack(), messages.stack()

    return train_chunk


class StackedRule(tff.aggregators.WeightedAggregationFactory):
    """rule(updates float32[m,d]) -> float32[d] as a TFF factory for what stack_updates returns.

    Updates with weight 0 are left out.
    """

    def __init__(self, rule: Callable[[Any], Any]):
        self.rule = rule

    def create(self, value_type: Any, weight_type: Any) -> tff.templates.AggregationProcess:
        """Return the process for float32[g,d] of each chunk, and weights float32[g].

        Without any update the result is 0.
        """

        @tff.tensorflow.computation
        def apply(updates, weights):
            counted = tf.boolean_mask(updates, weights > 0)
            has_any = tf.size(counted) > 0
            return tf.cond(has_any, lambda: self.rule(counted), lambda: tf.zeros_like(updates[0]))

        @tff.federated_computation
        def initialize():
            return tff.federated_value((), tff.SERVER)

        at_clients = [
            tff.FederatedType(member, tff.CLIENTS) for member in (value_type, weight_type)
        ]

        @tff.federated_computation(initialize.type_signature.result, *at_clients)
        def next_fn(state, value, weight):
            result = tff.federated_map(apply, gather(tff.federated_zip((value, weight))))
            return tff.templates.MeasuredProcessOutput(
                state, result, tff.federated_value((), tff.SERVER)
            )

        return tff.templates.AggregationProcess(initialize, next_fn)


class Unflattened(tff.aggregators.WeightedAggregationFactory):
    """A factory for flat updates whose result has the shapes of the weights `like`."""

    def __init__(self, inner: Any, like: Sequence[Any]):
        self.inner = inner
        self.like = like

    def create(self, value_type: Any, weight_type: Any) -> tff.templates.AggregationProcess:
        """Return the process of `inner` with such a result."""
        inner = self.inner.create(value_type, weight_type)
        at_clients = [
            tff.FederatedType(member, tff.CLIENTS) for member in (value_type, weight_type)
        ]

        @tff.tensorflow.computation
        def from_flat(flat):
            return unflatten(flat, self.like)

        @tff.federated_computation(inner.initialize.type_signature.result, *at_clients)
        def next_fn(state, value, weight):
            found = inner.next(state, value, weight)
            result = tff.federated_map(from_flat, found.result)
            return tff.templates.MeasuredProcessOutput(found.state, result, found.measurements)

        return tff.templates.AggregationProcess(inner.initialize, next_fn)


def median(updates: Any) -> Any:
    """Return each coordinate's median; of an even number, the mean of the middle two.

    Yin et al. 2018.
    """
    count = tf.shape(updates)[0]
    ordered = tf.sort(updates, axis=0)
    return (ordered[(count - 1) // 2] + ordered[count // 2]) / 2


def trimmed_mean(updates: Any, share: float) -> Any:
    """Return each coordinate's mean without the `share` highest and lowest (Yin et al. 2018)."""
    count = tf.shape(updates)[0]
    ordered = tf.sort(updates, axis=0)
    to_drop = tf.constant(share, tf.float64) * tf.cast(count, tf.float64)
    # 0.29 * 100 is 29, not the 28.999... of binary fractions.
    cut = tf.cast(tf.floor(to_drop + 1e-9), tf.int32)
    return tf.reduce_mean(ordered[cut : count - cut], axis=0)


def krum(updates: Any, attackers: int, chosen: int = 1) -> Any:
    """Return the mean of the `chosen` updates nearest to their neighbours (Blanchard et al. 2017).

    The score of an update is the sum of its squared distances to the m - attackers - 2 nearest
    others; the lowest are chosen. `chosen` 0 is multi-Krum with m - attackers.
    """
    count = tf.shape(updates)[0]

    def distances_to(update):
        # One difference at a time, in float64: products of whole matrices would round an
        # attacker's size into all.
        difference = tf.cast(updates, tf.float64) - tf.cast(update, tf.float64)
        return tf.reduce_sum(difference**2, axis=1)

    distances = tf.map_fn(
        distances_to, updates, fn_output_signature=tf.float64, parallel_iterations=1
    )
    nearest = tf.sort(distances, axis=1)  # itself, at 0, comes first
    scores = tf.reduce_sum(nearest[:, : tf.maximum(count - attackers - 2, 1) + 1], axis=1)
    best = tf.argsort(scores, stable=True)[: chosen or tf.maximum(count - attackers, 1)]
    return tf.reduce_mean(tf.gather(updates, best), axis=0)


CHUNKS_OF_ROWS = 10  # each is a matrix of its clients' updates; see `gather`


def see_all_updates(parts: Any, experiment: Any, rule: Callable[[Any], Any]) -> Any:
    """Return the parts with rule(updates float32[m,d]) -> float32[d] as their aggregator.

    Drawn by size a client may come twice. Two equal updates would be each other's neighbours and
    outvote others, so the rule gets each client's once.
    """
    inner = parts.train_cohort

    def train_cohort(worker, experiment, state, clients):
        return inner(worker, experiment, state, sorted(set(clients)))

    return parts._replace(
        aggregator=Unflattened(StackedRule(rule), experiment.initial_weights),
        build_train_chunk=stack_updates,
        num_chunks=CHUNKS_OF_ROWS,
        train_cohort=train_cohort,
    )


def coordinate_median(parts: Any, experiment: Any) -> Any:
    """The `median` of each coordinate."""
    return see_all_updates(parts, experiment, median)


def coordinate_trimmed_mean(parts: Any, experiment: Any) -> Any:
    """The `trimmed_mean` of each coordinate."""
    share = experiment.config.aggregation.trim
    return see_all_updates(parts, experiment, functools.partial(trimmed_mean, share=share))


def nearest_update(parts: Any, experiment: Any) -> Any:
    """The update that `krum` chooses."""
    attackers = experiment.config.aggregation.tolerated
    return see_all_updates(parts, experiment, functools.partial(krum, attackers=attackers))


def mean_of_nearest(parts: Any, experiment: Any) -> Any:
    """The mean of all updates but the tolerated that `krum` would choose last."""
    attackers = experiment.config.aggregation.tolerated
    rule = functools.partial(krum, attackers=attackers, chosen=0)
    return see_all_updates(parts, experiment, rule)
