"""Aggregators: how the clients' updates become one. Each is a row: a function that builds a TFF
aggregation factory.

The robust rules look at all updates at once, so that a minority of clients cannot move them at
will. They are unweighted: what a client says of its number of examples must not give it power.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from harness.results import with_fields

import tensorflow as tf
import tensorflow_federated as tff


def plain_bytes(sizes: Sequence[int]) -> int:
    """Return the bytes of an update whose tensors have so many float32 elements."""
    return 4 * sum(sizes)


def compressed_bytes(sizes: Sequence[int]) -> int:
    """Return the same in 8 bits as TFF packs them: 28 of them in an int32, and a tensor's lowest
    and highest beside.

    It leaves tensors of up to 20,000 elements as they are.
    """
    return sum(4 * math.ceil(8 * size / 28) + 8 if size > 20_000 else 4 * size for size in sizes)


class Federation(NamedTuple):
    """What an aggregator may follow of the clients: how many a round has, and the most images that
    one holds."""

    cohort: int
    most_images: int


class Aggregator(NamedTuple):
    """A row: build(federation, **flags) -> TFF factory, `flags` being the fields of the
    configuration that it uses.

    `needs` is what it must see. "sums": the clients' weighted sums will do, and many clients come
    as few groups. "each": every client by itself. "rows": all the updates of a group as
    float32[g,d]. `num_bytes` are those of an update, `adaptive` says that a norm of 4 bytes goes
    down beside the weights and a figure of 4 bytes up that tells whether the update was below it,
    `about` is said beside the name, `private` that each round costs epsilon.
    """

    build: Callable[..., Any]
    needs: str
    flags: tuple[str, ...] = ()
    num_bytes: Callable[[Sequence[int]], int] = plain_bytes
    adaptive: bool = False
    about: str = ""
    private: bool = False


def caption(row: Aggregator, fields: dict[str, Any], ledger: Any) -> str:
    """Return what a caption says of the row: its own fields, what it gives, or what the ledger's
    figure rests on."""
    about = ledger.assumption() if ledger else row.about
    return with_fields(fields["aggregator"], {name: fields[name] for name in row.flags}) + (
        about and f": {about}"
    )


def clipping(federation: Federation) -> Any:
    """Return the mean of updates whose norm is cut at an adaptive one (Andrew et al. 2021)."""
    return tff.learning.robust_aggregator(zeroing=False)


def zeroing(federation: Federation) -> Any:
    """Return the mean without updates that are very large, adaptively."""
    return tff.learning.robust_aggregator(clipping=False)


def compressed(federation: Federation) -> Any:
    """Return the mean of updates in 8 bits (Suresh et al. 2017), rounded to the nearest so that a
    run repeats."""
    return tff.learning.compression_aggregator(zeroing=False, clipping=False, stochastic=False)


def secure(federation: Federation) -> Any:
    """Return the mean by secure sums (Bonawitz et al. 2017) of n_k * update and n_k, each in bounds
    in 32 bits.

    A sum is cut at its bounds in silence, so they follow the clients: n_k as it is, and 16 for a
    weight's update, far above any of a training that goes well.
    """
    weight_bound = max(1e5, float(federation.most_images))
    value_bound = max(1e5, 16.0 * federation.most_images)
    return tff.aggregators.MeanFactory(
        tff.aggregators.SecureSumFactory(value_bound, -value_bound),
        tff.aggregators.SecureSumFactory(weight_bound, 0.0),
    )


def dp(federation: Federation, noise_multiplier: float) -> Any:
    """Return the unweighted mean of updates clipped adaptively, with Gaussian noise (McMahan et al.
    2018)."""
    return tff.aggregators.as_weighted_aggregator(
        tff.learning.dp_aggregator(noise_multiplier, federation.cohort, zeroing=False)
    )


def gather(value: Any) -> Any:
    """Return a CLIENTS-placed struct of [g, ...] tensors as one of [m, ...] at SERVER: all rows.

    What is concatenated on the way stays in the worker's memory: (groups + 1) / 2 times the rows.
    So clients come in few groups, whose rows are stacked in the graph.
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
    """rule(rows float32[m,d]) -> float32[d] as a TFF factory for stacked updates; rows of weight 0
    are left out."""

    def __init__(self, rule: Callable[[Any], Any]):
        self.rule = rule

    def create(self, value_type: Any, weight_type: Any) -> tff.templates.AggregationProcess:
        """For float32[g,d] of each group and its weights float32[g]; without any row the result is
        0."""

        @tff.tensorflow.computation
        def apply(rows, weights):
            kept = tf.boolean_mask(rows, weights > 0)
            return tf.cond(
                tf.size(kept) > 0, lambda: self.rule(kept), lambda: tf.zeros_like(rows[0])
            )

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


def median(rows: Any) -> Any:
    """Return each coordinate's median; of an even number the mean of the middle two (Yin et al.
    2018)."""
    count = tf.shape(rows)[0]
    ordered = tf.sort(rows, axis=0)
    return (ordered[(count - 1) // 2] + ordered[count // 2]) / 2


def trimmed_mean(rows: Any, share: float) -> Any:
    """Return each coordinate's mean without the `share` highest and the `share` lowest (Yin et al.
    2018)."""
    count = tf.shape(rows)[0]
    ordered = tf.sort(rows, axis=0)
    dropped = tf.constant(share, tf.float64) * tf.cast(count, tf.float64)
    # 0.29 * 100 is 29, not the 28.999... of binary fractions
    cut = tf.cast(tf.floor(dropped + 1e-9), tf.int32)
    return tf.reduce_mean(ordered[cut : count - cut], axis=0)


def krum(rows: Any, attackers: int, chosen: int = 1) -> Any:
    """Return the mean of the `chosen` rows nearest to their neighbours (Blanchard et al. 2017).

    A row's score is the sum of its squared distances to the m - attackers - 2 nearest others,
    lowest first. `chosen` 0 is multi-Krum with m - attackers.
    """
    count = tf.shape(rows)[0]

    def distances_to(row):
        """One difference at a time, in float64: products of whole rows would round an attacker's
        size into all."""
        return tf.reduce_sum((tf.cast(rows, tf.float64) - tf.cast(row, tf.float64)) ** 2, axis=1)

    distances = tf.map_fn(distances_to, rows, fn_output_signature=tf.float64, parallel_iterations=1)
    nearest = tf.sort(distances, axis=1)  # itself, at 0, comes first
    scores = tf.reduce_sum(nearest[:, : tf.maximum(count - attackers - 2, 1) + 1], axis=1)
    best = tf.argsort(scores, stable=True)[: chosen or tf.maximum(count - attackers, 1)]
    return tf.reduce_mean(tf.gather(rows, best), axis=0)


def build_median(federation: Federation) -> Any:
    """Return the coordinate-wise median."""
    return RowRule(median)


def build_trimmed_mean(federation: Federation, trim: float) -> Any:
    """Return the trimmed mean."""
    return RowRule(functools.partial(trimmed_mean, share=trim))


def build_krum(federation: Federation, tolerated: int) -> Any:
    """Return Krum."""
    return RowRule(functools.partial(krum, attackers=tolerated))


def build_multi_krum(federation: Federation, tolerated: int) -> Any:
    """Return multi-Krum."""
    return RowRule(functools.partial(krum, attackers=tolerated, chosen=0))


ROWS = {
    "clipping": Aggregator(clipping, "each", adaptive=True),
    "zeroing": Aggregator(zeroing, "each", adaptive=True),
    "median": Aggregator(build_median, "rows"),
    "trimmed-mean": Aggregator(build_trimmed_mean, "rows", ("trim",)),
    "krum": Aggregator(build_krum, "rows", ("tolerated",)),
    "multi-krum": Aggregator(build_multi_krum, "rows", ("tolerated",)),
    "compressed": Aggregator(compressed, "each", num_bytes=compressed_bytes),
    "secure": Aggregator(
        secure,
        "each",
        about="the arithmetic of secure sums, no cryptography; bytes without keys and masks",
    ),
    "dp": Aggregator(dp, "each", ("noise_multiplier",), adaptive=True, private=True),
}
