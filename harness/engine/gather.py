"""Concatenation of all clients' arrays at the server."""

from __future__ import annotations

from typing import Any

import tensorflow as tf
import tensorflow_federated as tff


def gather(value: Any) -> Any:
    """Return a CLIENTS-placed struct of arrays [g, ...] as one of [m, ...] at SERVER, in order.

    What is concatenated on the way stays in the worker's memory, (chunks + 1) / 2 times all of it.
    So clients come in few chunks, whose arrays are stacked in the graph.
    """
    member = value.type_signature.member

    @tff.tensorflow.computation
    def nothing():
        specs = tff.types.type_to_tf_tensor_specs(member)
        return tf.nest.map_structure(lambda spec: tf.zeros([0, *spec.shape[1:]], spec.dtype), specs)

    @tff.tensorflow.computation(member, member)
    def concatenate(first, second):
        return tf.nest.map_structure(lambda *arrays: tf.concat(arrays, axis=0), first, second)

    @tff.tensorflow.computation(member)
    def as_it_is(gathered):
        return gathered

    return tff.federated_aggregate(value, nothing(), concatenate, concatenate, as_it_is)
