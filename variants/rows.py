"""Bringing what each client sends to the server as the rows of one tensor, in the order of the clients."""

from typing import Any

import tensorflow as tf
import tensorflow_federated as tff


def gather(value: Any) -> Any:
    """A CLIENTS-placed struct of [g, ...] tensors as the same struct of [m, ...] at SERVER: all rows, concatenated.

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
