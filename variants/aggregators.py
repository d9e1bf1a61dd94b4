"""Aggregators: how the clients' updates become one. Each is a row: a function that builds a TFF aggregation factory.

The robust rules look at all updates at once, so that a minority of clients cannot move them at will. They are
unweighted: what a client says of its number of examples must not give it power.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from harness.results import with_fields

import tensorflow as tf
import tensorflow_federated as tff


def plain_bytes(sizes: Sequence[int]) -> int:
    """Return the bytes of an update whose tensors have so many float32 elements."""
    return 4 * sum(sizes)


def compressed_bytes(sizes: Sequence[int]) -> int:
    """Return the same in 8 bits, with a tensor's lowest and highest; TFF leaves tensors of up to 20,000 as they are."""
    return sum(size + 8 if size > 20_000 else 4 * size for size in sizes)


class Aggregator(NamedTuple):
    """A row: build(cohort, **flags) -> TFF factory, `flags` being the fields of the configuration that it uses.

    `needs` is what it must see. "sums": the clients' weighted sums will do, and many clients come as few groups.
    "each": every client by itself. "rows": all the updates of a group as float32[g,d]. `num_bytes` are those of an
    update, `about` is said beside the name, `private` that each round costs epsilon.
    """

    build: Callable[..., Any]
    needs: str
    flags: tuple[str, ...] = ()
    num_bytes: Callable[[Sequence[int]], int] = plain_bytes
    about: str = ""
    private: bool = False


def caption(row: Aggregator, fields: dict[str, Any], ledger: Any) -> str:
    """Return what a caption says of the row: its own fields, what it gives, or what the ledger's figure rests on."""
    about = ledger.assumption() if ledger else row.about
    return with_fields(fields["aggregator"], {name: fields[name] for name in row.flags}) + (about and f": {about}")


def clipping(cohort: int) -> Any:
    """Return the mean of updates whose norm is cut at an adaptive one (Andrew et al. 2021)."""
    return tff.learning.robust_aggregator(zeroing=False)


def zeroing(cohort: int) -> Any:
    """Return the mean without updates that are very large, adaptively."""
    return tff.learning.robust_aggregator(clipping=False)


def compressed(cohort: int) -> Any:
    """Return the mean of updates in 8 bits (Suresh et al. 2017), rounded to the nearest so that a run repeats."""
    return tff.learning.compression_aggregator(zeroing=False, clipping=False, stochastic=False)


def secure(cohort: int) -> Any:
    """Return the mean by secure sums (Bonawitz et al. 2017) of n_k * update and n_k, in these bounds in 32 bits."""
    return tff.aggregators.MeanFactory(
        tff.aggregators.SecureSumFactory(1e5, -1e5), tff.aggregators.SecureSumFactory(1e5, 0.0)
    )


def dp(cohort: int, noise_multiplier: float) -> Any:
    """Return the unweighted mean of updates clipped adaptively, with Gaussian noise (McMahan et al. 2018)."""
    return tff.aggregators.as_weighted_aggregator(tff.learning.dp_aggregator(noise_multiplier, cohort, zeroing=False))


def gather(value: Any) -> Any:
    """Return a CLIENTS-placed struct of [g, ...] tensors as one of [m, ...] at SERVER: all rows.

    What is concatenated on the way stays in the worker's memory: (groups + 1) / 2 times the rows. So clients come in
    few groups, whose rows are stacked in the graph.
    """
    member = value.type_signature.member

    @tff.tensorflow.computation
    def nothing():
        specs = tff.types.type_to_tf_tensor_specs(member)
        return tf.nest.map_structure(lambda spec: tf.zeros([0, *spec.shape[1:]], spec.dtype), specs)

    @tff.tensorflow.computation(member, member)
    def concatenate(first, second):
        return tf.nest.map_structure(lambda *rows: tf.concat(rows, axis=0), first, second)

    @tff.tensorflow.computation(member)
    def done(rows):
        return rows

    return tff.federated_aggregate(value, nothing(), concatenate, concatenate, done)


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
    """Return each coordinate's median; of an even number the mean of the middle two (Yin et al. 2018)."""
    count, ordered = tf.shape(rows)[0], tf.sort(rows, axis=0)
    return (ordered[(count - 1) // 2] + ordered[count // 2]) / 2


def trimmed_mean(rows: Any, share: float) -> Any:
    """Return each coordinate's mean without the `share` highest and the `share` lowest (Yin et al. 2018)."""
    count, ordered = tf.shape(rows)[0], tf.sort(rows, axis=0)
    dropped = tf.constant(share, tf.float64) * tf.cast(count, tf.float64)
    cut = tf.cast(tf.floor(dropped + 1e-9), tf.int32)  # 0.29 * 100 is 29, not the 28.999... of binary fractions
    return tf.reduce_mean(ordered[cut : count - cut], axis=0)


def krum(rows: Any, attackers: int, chosen: int = 1) -> Any:
    """Return the mean of the `chosen` rows nearest to their neighbours (Blanchard et al. 2017).

    A row's score is the sum of its squared distances to the m - attackers - 2 nearest others, lowest first. `chosen`
    0 is multi-Krum with m - attackers.
    """
    count = tf.shape(rows)[0]

    def distances_to(row):
        """One difference at a time, in float64: products of whole rows would round an attacker's size into all."""
        return tf.reduce_sum((tf.cast(rows, tf.float64) - tf.cast(row, tf.float64)) ** 2, axis=1)

    distances = tf.map_fn(distances_to, rows, fn_output_signature=tf.float64, parallel_iterations=1)
    nearest = tf.sort(distances, axis=1)  # itself, at 0, comes first
    scores = tf.reduce_sum(nearest[:, : tf.maximum(count - attackers - 2, 1) + 1], axis=1)
    best = tf.argsort(scores, stable=True)[: chosen or tf.maximum(count - attackers, 1)]
    return tf.reduce_mean(tf.gather(rows, best), axis=0)


def build_median(cohort: int) -> Any:
    """Return the coordinate-wise median."""
    return RowRule(median)


def build_trimmed_mean(cohort: int, trim: float) -> Any:
    """Return the trimmed mean."""
    return RowRule(functools.partial(trimmed_mean, share=trim))


def build_krum(cohort: int, tolerated: int) -> Any:
    """Return Krum."""
    return RowRule(functools.partial(krum, attackers=tolerated))


def build_multi_krum(cohort: int, tolerated: int) -> Any:
    """Return multi-Krum."""
    return RowRule(functools.partial(krum, attackers=tolerated, chosen=0))


ROWS = {
    "clipping": Aggregator(clipping, "each"),
    "zeroing": Aggregator(zeroing, "each"),
    "median": Aggregator(build_median, "rows"),
    "trimmed-mean": Aggregator(build_trimmed_mean, "rows", ("trim",)),
    "krum": Aggregator(build_krum, "rows", ("tolerated",)),
    "multi-krum": Aggregator(build_multi_krum, "rows", ("tolerated",)),
    "compressed": Aggregator(compressed, "each", num_bytes=compressed_bytes),
    "secure": Aggregator(secure, "each", about="the arithmetic of secure sums, without the cryptography"),
    "dp": Aggregator(dp, "each", ("noise_multiplier",), private=True),
}
