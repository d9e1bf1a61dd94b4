"""What tests compare with: a client's batches by the documented rule, and gradients and means in NumPy."""

from pathlib import Path

import federated_learning as fl

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff


def alone(clients):
    """Each client a group of its own."""
    return [np.array([client]) for client in clients]


def functional_model(config):
    """The model as TFF makes it functional. It invalidates the Keras models built before it."""
    batch = (tf.TensorSpec([None, 28, 28, 1], tf.float32), tf.TensorSpec([None], tf.int32))
    loss = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return tff.learning.models.functional_model_from_keras(fl.build_model(config, 10), loss, batch)


def weights_of(state):
    return [np.asarray(w) for w in state.global_model_weights.trainable]


def largest_difference(some, others):
    return max(np.abs(a - b).max() for a, b in zip(some, others, strict=True))


def batches_of(config: fl.Config, shards: Path, client: int, round_num: int):
    """The (images float[n,28,28,1], labels) batches of a client in a round, by the documented rule, eagerly."""
    records = np.frombuffer((shards / f"{client}.bin").read_bytes()[: -fl.FOOTER_BYTES], np.uint8).reshape(
        -1, fl.RECORD_BYTES
    )
    key = tf.random.experimental.stateless_fold_in(tf.constant([config.seed, client], tf.int64), np.int64(round_num))
    for epoch in range(config.local_epochs):
        epoch_key = tf.random.experimental.stateless_fold_in(key, np.int64(epoch))
        order = tf.random.experimental.stateless_shuffle(tf.range(len(records)), epoch_key).numpy()
        size = config.batch_size or len(records)
        for start in range(0, len(records), size):
            chosen = records[order[start : start + size]]
            yield chosen[:, :-1].reshape(-1, 28, 28, 1) / np.float32(255), chosen[:, -1].astype(np.int32)


def numpy_gradients(weights, images, labels):
    """Those of the mean cross-entropy of softmax regression on a tanh layer, written out, in float64."""
    w1, b1, w2, b2 = weights
    x = images.reshape(len(images), -1).astype(np.float64)
    hidden = np.tanh(x @ w1 + b1)
    logits = hidden @ w2 + b2
    softmax = np.exp(logits - logits.max(axis=1, keepdims=True))
    softmax /= softmax.sum(axis=1, keepdims=True)
    d_logits = (softmax - np.eye(10)[labels]) / len(labels)
    d_hidden = d_logits @ w2.T * (1 - hidden**2)
    return [x.T @ d_hidden, d_hidden.sum(axis=0), hidden.T @ d_logits, d_logits.sum(axis=0)]


def numpy_sgd_step(weights, images, labels, rate):
    """w - rate * gradient."""
    return [w - rate * g for w, g in zip(weights, numpy_gradients(weights, images, labels), strict=True)]


def weighted_mean(layers, sizes):
    """sum_k (n_k / n) x_k of the lists of arrays x_k."""
    return [sum(n * x for n, x in zip(sizes, xs, strict=True)) / sum(sizes) for xs in zip(*layers, strict=True)]
