"""What tests compare with: a client's batches by the documented rule, and federated learning in
NumPy, float64."""

from pathlib import Path

import federated_learning as fl
from harness.training import layers
from harness.training.records import Evaluation, name_reports
from harness.training.shards import FOOTER_BYTES, LABEL_BYTES
from variants import privacy
from variants.wrapping import Corrected

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff


def tanh_layers():
    """784-16-C.

    A smooth activation: with ReLU, a pre-activation near 0 flips between float32 and float64.
    """
    return layers.dense(16, activation="tanh")


def named(chunks, metrics):
    """What each client reported, by name."""
    return name_reports(chunks, metrics, fl.ClientMetrics._fields)


def alone(clients):
    """Each client a group of its own."""
    return [np.array([client]) for client in clients]


def network(name, num_classes=10):
    """A network of the table MODELS, as build_experiment resolves it."""
    return fl.Network(name, fl.find_model(name), (28, 28, 1), num_classes)


def accountant_of(config):
    """The privacy accountant of a configuration, as build_experiment makes it."""
    return privacy.PrivacyAccountant(config, privacy.public_cohorts(config))


def replace_choice(monkeypatch, table, name, function):
    """Let the choice of this name stand for another function."""
    monkeypatch.setitem(table, name, table[name]._replace(function=function))


def correcting(rule):
    """An algorithm: local steps go along rule(gradients, weights)."""

    def change(parts, experiment):
        return parts._replace(client_optimizer=Corrected(parts.client_optimizer, rule))

    return change


def functional_model(experiment):
    """The model as TFF makes it functional. It invalidates the Keras models built before it."""
    batch = (tf.TensorSpec([None, 28, 28, 1], tf.float32), tf.TensorSpec([None], tf.int32))
    loss = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model = fl.build_model(experiment.network, experiment.config.seed)
    return tff.learning.models.functional_model_from_keras(model, loss, batch)


def weights_of(state):
    return [np.asarray(w) for w in state.global_model_weights.trainable]


def largest_difference(some, others):
    return max(np.abs(a - b).max() for a, b in zip(some, others, strict=True))


def evaluation_of(confusion) -> Evaluation:
    """An evaluation with this confusion matrix int64[C,C], a row a true label."""
    true, predicted = np.indices(confusion.shape)
    labels = np.repeat(true.ravel(), confusion.ravel())
    predictions = np.repeat(predicted.ravel(), confusion.ravel())
    return Evaluation(1.0, np.mean(labels == predictions), labels, predictions, len(confusion))


def read_shard_file(path: Path, image_shape=(28, 28, 1)):
    """(images uint8[n,H,W,channels], labels [n]) of a shard file, by the documented form."""
    content = path.read_bytes()[:-FOOTER_BYTES]
    pixels = int(np.prod(image_shape))
    size = len(content) // (pixels + LABEL_BYTES)
    images = np.frombuffer(content[: size * pixels], np.uint8).reshape(-1, *image_shape)
    return images, np.frombuffer(content[size * pixels :], "<u2")


def batches_of(
    config: fl.Config, shards: Path, client: int, round_num: int, second: int | None = None
):
    """The (images float[n,28,28,1], labels) batches of a client in a round, by the documented rule,
    eagerly; those of a second training in the round have a key made by the number `second`."""
    images, labels = read_shard_file(shards / f"{client}.bin")
    key = tf.random.experimental.stateless_fold_in(
        tf.constant([config.seed, client], tf.int64), np.int64(round_num)
    )
    if second is not None:
        key = tf.random.experimental.stateless_fold_in(key, np.int64(second))
    training = config.training
    for epoch in range(training.local_epochs):
        epoch_key = tf.random.experimental.stateless_fold_in(key, np.int64(epoch))
        order = tf.random.experimental.stateless_shuffle(tf.range(len(labels)), epoch_key).numpy()
        size = training.batch_size or len(labels)
        for start in range(0, len(labels), size):
            batch = order[start : start + size]
            yield images[batch] / np.float32(255), labels[batch].astype(np.int32)


def numpy_gradients(weights, images, labels):
    """Those of the mean cross-entropy of softmax regression on a tanh layer, written out, in
    float64."""
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
    return [
        w - rate * g for w, g in zip(weights, numpy_gradients(weights, images, labels), strict=True)
    ]


def weighted_mean(layers, sizes):
    """sum_k (n_k / n) x_k of the lists of arrays x_k."""
    return [
        sum(n * x for n, x in zip(sizes, xs, strict=True)) / sum(sizes)
        for xs in zip(*layers, strict=True)
    ]


def factor(schedule, round_num, config):
    """What the learning rate is multiplied by in round 1, 2, ...: lr_decay ** (t - 1), or 1."""
    assert schedule in ("constant", "exponential")
    return config.optimization.lr_decay ** (round_num - 1) if schedule == "exponential" else 1.0


def client_rate(config, round_num):
    return config.training.client_lr * factor(
        config.optimization.client_schedule, round_num, config
    )


def server_rate(config, round_num):
    return config.training.server_lr * factor(
        config.optimization.server_schedule, round_num, config
    )


# one client stays away in the second round, another in the third
COHORTS = [
    [0, 1, 2],
    [0, 2],
    [1, 2],
]


def numpy_local(
    config, shards, client, round_num, weights, rate=None, correct=lambda g, w: g, second=None
):
    """(weights after local SGD, steps); `correct(gradients, weights)` is the algorithm's change."""
    steps = 0
    for images, labels in batches_of(config, shards, client, round_num, second):
        gradients = correct(numpy_gradients(weights, images, labels), weights)
        weights = [
            w - (rate or client_rate(config, round_num)) * g
            for w, g in zip(weights, gradients, strict=True)
        ]
        steps += 1
    return weights, steps


def minus(a, b):
    return [x - y for x, y in zip(a, b, strict=True)]


def times(factor, a):
    return [factor * x for x in a]


def plus(*lists):
    return [sum(xs) for xs in zip(*lists, strict=True)]


def numpy_scaffold(config, shards, sizes, weights):
    """Karimireddy et al. 2020, Algorithm 1, option II, with means weighted by n_k; yields the
    weights."""
    controls = [times(0.0, weights) for _ in sizes]
    for round_num, cohort in enumerate(COHORTS, 1):
        c = weighted_mean(controls, sizes)
        trained = []
        for k in cohort:
            local, steps = numpy_local(
                config,
                shards,
                k,
                round_num,
                weights,
                correct=lambda g, w, k=k, c=c: plus(g, c, times(-1, controls[k])),
            )
            trained.append((k, local, steps))
        for k, local, steps in trained:
            drift = times(1 / (steps * client_rate(config, round_num)), minus(weights, local))
            controls[k] = plus(controls[k], times(-1, c), drift)
        weights = weighted_mean([local for _, local, _ in trained], [sizes[k] for k in cohort])
        yield weights


def numpy_feddyn(config, shards, sizes, weights):
    """Acar et al. 2021, Algorithm 1, with means weighted by n_k (with shards of one size, the
    paper's own)."""
    alpha = config.optimization.dyn_alpha
    shares = np.array(sizes) / sum(sizes)
    own = [times(0.0, weights) for _ in sizes]
    h = times(0.0, weights)
    for round_num, cohort in enumerate(COHORTS, 1):
        trained = {}
        for k in cohort:

            def regularized(g, w, w0=weights, k=k):
                return plus(g, times(-1, own[k]), times(alpha, minus(w, w0)))

            trained[k] = numpy_local(config, shards, k, round_num, weights, correct=regularized)[0]
        for k, w in trained.items():
            own[k] = minus(own[k], times(alpha, minus(w, weights)))
            h = minus(h, times(alpha * shares[k], minus(w, weights)))
        mean = weighted_mean(list(trained.values()), [sizes[k] for k in trained])
        weights = minus(mean, times(1 / alpha, h))
        yield weights


def numpy_fednova(config, shards, sizes, weights):
    """Wang et al. 2020, equation 11 with plain local SGD: w <- w - tau * sum_k p_k (w - w_k) /
    tau_k."""
    for round_num, cohort in enumerate(COHORTS, 1):
        local = [numpy_local(config, shards, k, round_num, weights) for k in cohort]
        shares = np.array([sizes[k] for k in cohort]) / sum(sizes[k] for k in cohort)
        tau = sum(p * steps for p, (_, steps) in zip(shares, local, strict=True))
        directions = [times(1 / steps, minus(weights, w)) for w, steps in local]
        weights = minus(weights, times(tau, weighted_mean(directions, shares)))
        yield weights


def numpy_fedprox(config, shards, sizes, weights):
    """Li et al. 2020: g + mu (w - w_0) in each step."""
    for round_num, cohort in enumerate(COHORTS, 1):

        def pull(g, w, w0=weights):
            return plus(g, times(config.optimization.prox_mu, minus(w, w0)))

        local = [
            numpy_local(config, shards, k, round_num, weights, correct=pull)[0] for k in cohort
        ]
        weights = weighted_mean(local, [sizes[k] for k in cohort])
        yield weights


def numpy_mimelite(config, shards, sizes, weights):
    """Karimireddy et al. 2021, Algorithm 3, with momentum: v stands still on the clients, and moves
    on the server."""
    v = times(0.0, weights)
    whole = config.replace(batch_size=0, local_epochs=1)
    for round_num, cohort in enumerate(COHORTS, 1):

        def push(g, w, v=v):
            return plus(g, times(config.optimization.server_momentum, v))

        local = [
            numpy_local(config, shards, k, round_num, weights, correct=push)[0] for k in cohort
        ]
        full = [numpy_gradients(weights, *next(batches_of(whole, shards, k, 1))) for k in cohort]
        counts = [sizes[k] for k in cohort]
        v = plus(times(config.optimization.server_momentum, v), weighted_mean(full, counts))
        weights = weighted_mean(local, counts)
        yield weights


def numpy_fedsgd(config, shards, sizes, weights):
    """McMahan et al. 2017, section 2: w <- w - eta sum_k (n_k / n) g_k, g_k over the whole
    shard."""
    for round_num, cohort in enumerate(COHORTS, 1):
        g = [
            numpy_gradients(weights, *next(batches_of(config, shards, k, round_num)))
            for k in cohort
        ]
        weights = minus(
            weights,
            times(config.training.client_lr, weighted_mean(g, [sizes[k] for k in cohort])),
        )
        yield weights


def server(rule):
    """A NumPy algorithm: FedAvg's mean update d goes through `rule(weights, d, state, t,
    config)`."""

    def algorithm(config, shards, sizes, weights):
        state = {}
        for round_num, cohort in enumerate(COHORTS, 1):
            local = [numpy_local(config, shards, k, round_num, weights)[0] for k in cohort]
            d = minus(weights, weighted_mean(local, [sizes[k] for k in cohort]))
            weights = [
                rule(w, x, state.setdefault(i, {}), round_num, config)
                for i, (w, x) in enumerate(zip(weights, d, strict=True))
            ]
            yield weights

    return algorithm


def momentum(w, d, state, t, config):
    state["m"] = config.optimization.server_momentum * state.get("m", 0) + d
    return w - server_rate(config, t) * state["m"]


def adagrad(w, d, state, t, config):
    state["v"] = state.get("v", 1e-6) + d**2
    tau = config.optimization.server_epsilon
    epsilon = 1e-6 if tau is None else tau**2
    return w - server_rate(config, t) * d / np.sqrt(state["v"] + epsilon)


def adam(w, d, state, t, config, yogi=False):
    """Reddi et al. 2021, Algorithm 2, with TFF's bias correction."""
    v = state.get("v", 1e-6 if yogi else 0)
    state["m"] = 0.9 * state.get("m", 0) + 0.1 * d
    state["v"] = v + 0.01 * np.sign(d**2 - v) * d**2 if yogi else 0.99 * v + 0.01 * d**2
    rate = server_rate(config, t) * np.sqrt(1 - 0.99**t) / (1 - 0.9**t)
    tau = config.optimization.server_epsilon
    return w - rate * state["m"] / (np.sqrt(state["v"]) + (1e-3 if tau is None else tau))


NUMPY = {
    "fedavg": server(lambda w, d, state, t, config: w - d),
    "fedsgd": numpy_fedsgd,
    "fedprox": numpy_fedprox,
    "fedavgm": server(momentum),
    "fedadagrad": server(adagrad),
    "fedadam": server(adam),
    "fedyogi": server(lambda *a: adam(*a, yogi=True)),
    "fednova": numpy_fednova,
    "mimelite": numpy_mimelite,
    "scaffold": numpy_scaffold,
    "feddyn": numpy_feddyn,
}
