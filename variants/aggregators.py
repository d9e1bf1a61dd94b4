"""Aggregators other than the weighted mean: how the clients' updates become one.

A row has a function that builds a TFF aggregation factory. The robust rules look at all updates at
once, so that a minority of the clients cannot move them at will. They are unweighted: what a client
says of its number of examples must not give it power.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from harness.engine.gather import gather
from variants.sampling import draw_in_secret
from variants.wrapping import flatten, unflatten, wrap_client

import tensorflow as tf
import tensorflow_federated as tff

# == Rows ==========================================================================================


class CohortInfo(NamedTuple):
    """What an aggregator may need to know of the clients."""

    size: int  # clients in a round, m
    most_examples: int  # of any client


class Aggregator(NamedTuple):
    """A row: build(config, CohortInfo) -> a TFF aggregation factory, and what it must see.

    `update_format` is "summed" if a weighted mean of weighted means will do, so that many clients
    can come as few chunks; "per_client" if it must see each client by itself; "stacked" if it must
    see all updates at once, as float32[m,d].
    """

    build: Callable[[Any, CohortInfo], Any]
    update_format: str
    # Bytes of an update, by its tensors' numbers of elements; None if they are float32.
    num_bytes: Callable[[Sequence[int]], int] | None = None
    sends_norm: bool = False  # 4 bytes more each way, for an adaptive norm
    note: str = ""  # for captions
    private: bool = False  # each round costs epsilon


# == Means of TFF's ================================================================================


def build_clipping(config: Any, cohort: CohortInfo) -> Any:
    """Return the mean of updates that are cut to an adaptive norm (Andrew et al. 2021)."""
    return tff.learning.robust_aggregator(zeroing=False)


def build_zeroing(config: Any, cohort: CohortInfo) -> Any:
    """Return the mean without updates that are very large, adaptively."""
    return tff.learning.robust_aggregator(clipping=False)


def build_compressed(config: Any, cohort: CohortInfo) -> Any:
    """Return the mean of updates in 8 bits (Suresh et al. 2017), rounded so that a run repeats."""
    return tff.learning.compression_aggregator(zeroing=False, clipping=False, stochastic=False)


def compressed_bytes(sizes: Sequence[int]) -> int:
    """Return the bytes of an update in 8 bits: TFF packs 28 of them into an int32.

    A tensor's lowest and highest value come beside them. A tensor of up to 20,000 elements stays
    as it is.
    """
    return sum(4 * math.ceil(8 * size / 28) + 8 if size > 20_000 else 4 * size for size in sizes)


def build_secure(config: Any, cohort: CohortInfo) -> Any:
    """Return the mean by secure sums (Bonawitz et al. 2017) of n_k * update and of n_k, in 32 bits.

    A sum is cut at its bounds in silence, and its steps are as wide as they are. So they follow the
    clients: n_k as it is, or 1 if all count the same, and 16 for the update of a weight, far above
    that of any training that goes well.
    """
    if config.aggregation.client_weighting == "uniform":
        weight_bound = 1.0
        value_bound = 16.0
    else:
        weight_bound = max(1e5, float(cohort.most_examples))
        value_bound = max(1e5, 16.0 * cohort.most_examples)
    return tff.aggregators.MeanFactory(
        tff.aggregators.SecureSumFactory(value_bound, -value_bound),
        tff.aggregators.SecureSumFactory(weight_bound, 0.0),
    )


def build_dp(config: Any, cohort: CohortInfo) -> Any:
    """Return the unweighted mean of updates, clipped adaptively, with Gaussian noise.

    McMahan et al. 2018.
    """
    noise_multiplier = config.privacy.noise_multiplier
    mean = tff.learning.dp_aggregator(noise_multiplier, cohort.size, zeroing=False)
    return tff.aggregators.as_weighted_aggregator(mean)


# == Rules that see all updates at once ============================================================


def stack_updates(client: Callable, parts: Any) -> Callable[[Any, Any], Any]:
    """Return train_chunk(broadcast, clients int64[g]) -> what they send, a row for each.

    Rows are the update float32[g,d], the weight float32[g], the metrics and the messages.
    """
    num_parameters = sum(math.prod(spec.shape) for spec in parts.update_spec)
    num_metrics = parts.num_metrics

    @tf.function
    def train_chunk(broadcast, clients):  # line 4 of the pseudo-code
        g = tf.size(clients)
        updates = tf.TensorArray(tf.float32, g, element_shape=[num_parameters])
        weights = tf.TensorArray(tf.float32, g, element_shape=[])
        metrics = tf.TensorArray(tf.float32, g, element_shape=[num_metrics])
        messages = tf.TensorArray(tf.float32, g, element_shape=[parts.message_size])
        for place in tf.range(g):
            tf.autograph.experimental.set_loop_options(parallel_iterations=1)
            output = client(broadcast, clients[place])
            updates = updates.write(place, flatten(output.update))
            weights = weights.write(place, output.weight)
            metrics = metrics.write(place, tf.stack(output.metrics))
            messages = messages.write(place, output.message)
        return updates.stack(), weights.stack(), metrics.stack(), messages.stack()

    return train_chunk


class StackedRule(tff.aggregators.WeightedAggregationFactory):
    """rule(updates float32[m,d]) -> float32[d] as a TFF factory for StackedChunks.

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


def build_median(config: Any, cohort: CohortInfo) -> Any:
    """Return the factory of `median`."""
    return StackedRule(median)


def build_trimmed_mean(config: Any, cohort: CohortInfo) -> Any:
    """Return the factory of `trimmed_mean`."""
    return StackedRule(functools.partial(trimmed_mean, share=config.aggregation.trim))


def build_krum(config: Any, cohort: CohortInfo) -> Any:
    """Return the factory of `krum`."""
    return StackedRule(functools.partial(krum, attackers=config.aggregation.tolerated))


def build_multi_krum(config: Any, cohort: CohortInfo) -> Any:
    """Return the factory of `krum` that chooses all but the tolerated."""
    attackers = config.aggregation.tolerated
    return StackedRule(functools.partial(krum, attackers=attackers, chosen=0))


CHUNKS_OF_ROWS = 10  # each is a matrix of its clients' updates; see `gather`


def change_aggregator(parts: Any, experiment: Any) -> Any:
    """Let the chosen row make one update of the clients'."""
    config = experiment.config
    row = experiment.aggregator
    cohort = CohortInfo(config.cohort_size, int(experiment.partition.sizes.max()))
    aggregator = row.build(config, cohort)
    if row.private and not config.privacy.public_cohorts:
        parts = draw_in_secret(parts, experiment)
    if row.update_format == "stacked":
        return parts._replace(
            aggregator=Unflattened(aggregator, experiment.initial_weights),
            collect=stack_updates,
            num_chunks=CHUNKS_OF_ROWS,
        )
    if row.update_format == "per_client":
        return parts._replace(aggregator=aggregator, num_chunks=None)
    return parts._replace(aggregator=aggregator)


def weigh_alike(parts: Any, experiment: Any) -> Any:
    """Let all clients count the same in the mean, whatever their numbers of examples."""

    def wrap(client_update):
        return lambda broadcast, task: client_update(broadcast, task)._replace(weight=1.0)

    return wrap_client(parts, wrap)


ROWS = {
    "clipping": Aggregator(build_clipping, "per_client", sends_norm=True),
    "zeroing": Aggregator(build_zeroing, "per_client", sends_norm=True),
    "median": Aggregator(build_median, "stacked"),
    "trimmed-mean": Aggregator(build_trimmed_mean, "stacked"),
    "krum": Aggregator(build_krum, "stacked"),
    "multi-krum": Aggregator(build_multi_krum, "stacked"),
    "compressed": Aggregator(build_compressed, "per_client", num_bytes=compressed_bytes),
    "secure": Aggregator(
        build_secure,
        "per_client",
        note="the arithmetic of secure sums, no cryptography, bytes without keys, shares and masks",
    ),
    "dp": Aggregator(build_dp, "per_client", sends_norm=True, private=True),
}
