"""--batch-norm average: the moving statistics are moved as Keras does, and averaged."""

from dataclasses import replace

import federated_learning as fl
from harness.cli.fields import UserError
from harness.cli.own_files import give
from harness.reporting.captions import caption

import numpy as np
import pytest
import tensorflow as tf
from runs import check_saved, configure

L = tf.keras.layers
SMALL = {"dataset": "digits", "rounds": 1, "local_epochs": 3, "batch_size": 0, "client_lr": 0.1}
SMALL |= {"figures": "none", "batch_norm": "average"}


def build():
    """Fused and not fused, with branches, so that the weights are made in another order."""
    x = L.Input((28, 28, 1))
    y = L.Conv2D(3, 5, strides=3)(x)
    late = L.BatchNormalization(momentum=0.8)(L.Conv2D(2, 5, strides=3)(x))
    y = L.ReLU()(L.BatchNormalization(momentum=0.9)(y))
    y = L.Flatten()(L.Concatenate()([y, late]))
    return tf.keras.Model(x, L.BatchNormalization(momentum=0.7)(L.Dense(8)(y)))


def small():
    """Built in a fraction of the time."""
    return [L.Flatten(), L.Dense(8), L.BatchNormalization(momentum=0.7), L.ReLU()]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def train(partition, **fields):
    """The weights after a run on these shards, with the statistics."""
    config = configure(**SMALL | fields)
    result = fl.run(config, model=small, partition=partition)
    return [np.asarray(w) for w in result.state.global_model_weights.trainable]


def test_a_caption_says_what_becomes_of_statistics_if_there_are_some(digits):
    def caption_of(model, kind):
        fields = {"dataset": "digits", "batch_norm": kind, "client_test": 0.2, "model": model}
        return caption(fl.build_experiment(configure(**fields), digits))

    own = give(small)
    assert "BatchNormalization averaged" in caption_of(own, "average")
    assert "BatchNormalization local" in caption_of(own, "local")
    assert "BatchNormalization" not in caption_of("mlp", "average")


def test_a_client_alone_does_as_keras(here, digits):
    """Three steps on the whole shard, by Keras' own training of the same initial model; what is
    saved of it is the same."""
    shard = np.arange(300)
    result = fl.run(configure(**SMALL), model=build, partition=[shard])
    experiment = fl.build_experiment(
        configure(**SMALL, num_clients=1).replace(model="python:build")
    )
    model = fl.build_model(experiment.network, seed=0)
    assert sum("moving" in w.name for w in model.weights) == 6
    loss = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(tf.keras.optimizers.SGD(0.1), loss)
    x = digits.train.images[shard].astype(np.float32) / 255
    for _ in range(3):
        model.train_on_batch(x, digits.train.labels[shard])
    found = result.state.global_model_weights.trainable
    for one, other in zip(model.get_weights(), found, strict=True):
        assert np.allclose(one, other, atol=2e-5)
    check_saved(result)


def test_the_server_takes_the_mean_by_examples(here):
    first = np.arange(100)
    second = np.arange(400, 700)
    alone = [train([part], name=f"alone{n}") for n, part in enumerate((first, second))]
    both = train([first, second], name="both")
    for one, other, found in zip(*alone, both, strict=True):
        assert np.allclose(0.25 * one + 0.75 * other, found, atol=2e-5)


@pytest.mark.parametrize(
    "fields",
    [
        {"algorithm": "fedprox", "prox_mu": 0.1},
        {"algorithm": "fedadam", "server_lr": 0.01},
        {"algorithm": "fednova"},
        {"client_optimizer": "adam", "client_lr": 0.01},
        {"client_optimizer": "momentum", "weight_decay": 0.01},
        {"aggregator": "median", "byzantine": 1},
        {"server_schedule": "cosine", "client_schedule": "exponential"},
        {"baselines": True},
    ],
    ids=str,
)
def test_statistics_are_not_a_matter_of_the_optimizers(here, fields):
    """With a rate of 0 the weights stay, and the statistics move as they do without the variant."""
    parts = np.array_split(np.arange(600), 4)
    frozen = {"client_lr": 1e-30}
    usual = train(parts, **{"client_lr": 1e-30}, name="usual")
    found = train(parts, **{**fields, **frozen}, name="found", rounds=1)
    training = replace(configure(batch_norm="average").training, model="python:small")
    statistics = fl.make_network(training, load_digits()).statistics
    assert len(statistics) == 2
    if "byzantine" not in fields:
        for place in statistics:
            assert np.allclose(usual[place], found[place], atol=1e-5)
    assert all(np.isfinite(w).all() for w in found)


def load_digits():
    return fl.load_dataset(configure(dataset="digits").data)


def test_a_run_with_statistics_is_resumed(here):
    config = configure(**{**SMALL, "rounds": 2, "num_clients": 3})
    whole = fl.run(config.replace(rounds=3), model=small)
    half = fl.run(config.replace(name="half"), model=small)
    more = fl.run(config.replace(rounds=3, resume=str(half.folder)), model=small)
    ends = [run.state.global_model_weights.trainable for run in (whole, more)]
    assert all(map(np.array_equal, *ends))


@pytest.mark.parametrize("kind", ["average", "local"])
def test_fednova_does_not_scale_what_no_rate_moves(here, kind):
    """Of shards of two sizes: their clients take 1 and 8 steps, but what they move has its mean."""
    parts = [np.arange(20), np.arange(400, 560)]
    fields = {"batch_size": 20, "local_epochs": 1, "batch_norm": kind, "client_lr": 1e-30}
    if kind == "local":
        fields["client_test"] = 0.5
    usual = train(parts, **fields, name="usual")
    found = train(parts, **fields, algorithm="fednova", name="found")
    training = replace(configure(batch_norm="average").training, model="python:small")
    statistics = fl.make_network(training, load_digits()).statistics
    for place, (one, other) in enumerate(zip(usual, found, strict=True)):
        assert np.allclose(one, other, atol=1e-6), (place, place in statistics)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"batch_norm": "refuse"}, "or add --batch-norm average"),
        (
            {"algorithm": "fedbuff", "latency": 1.0, "buffer_size": 1},
            "could make a variance negative",
        ),
        ({"algorithm": "scaffold"}, "algorithm='scaffold', whose memory is of trained weights"),
        ({"aggregator": "dp", "public_cohorts": True}, "can make a variance negative"),
    ],
)
def test_what_cannot_be_averaged_is_one_line(here, fields, said):
    with pytest.raises(UserError, match=said):
        fl.run(configure(**SMALL | fields), model=small)


LOCAL = SMALL | {"batch_norm": "local", "client_test": 0.25, "local_epochs": 2, "rounds": 3}


def keras_fedbn(experiment, digits):
    """FedBN by Keras: a model each, of which the server averages all but BatchNormalization.

    Yields, after each round, the mean of all weights, and each client's accuracy by its own model.
    """
    partition = experiment.partition
    clients = []
    for _ in partition.indices:
        model = fl.build_model(experiment.network, seed=0)
        loss = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(tf.keras.optimizers.SGD(0.1), loss)
        clients.append(model)
    is_norm = ["batch_normalization" in w.name for w in clients[0].weights]
    mean = clients[0].get_weights()
    shares = partition.sizes / partition.sizes.sum()
    x = digits.train.images.astype(np.float32) / 255
    y = digits.train.labels
    while True:
        for model, own in zip(clients, partition.indices, strict=True):
            kept = zip(mean, model.get_weights(), is_norm, strict=True)
            model.set_weights([old if norm else new for new, old, norm in kept])
            for _ in range(2):
                model.train_on_batch(x[own], y[own])
        tensors = zip(*(model.get_weights() for model in clients), strict=True)
        mean = [np.tensordot(shares, np.stack(of_clients), 1) for of_clients in tensors]
        accuracies = []
        for model, tests in zip(clients, partition.test_indices, strict=True):
            kept = zip(mean, model.get_weights(), is_norm, strict=True)
            own_weights = [old if norm else new for new, old, norm in kept]
            judge = fl.build_model(experiment.network, seed=0)
            judge.set_weights(own_weights)
            accuracies.append(np.mean(np.argmax(judge(x[tests]), 1) == y[tests]))
        yield mean, accuracies


def test_local_layers_are_fedbn(here, digits):
    partition = [np.arange(0, 200), np.arange(300, 400)]
    config = configure(**LOCAL)
    result = fl.run(config, model=build, partition=partition)
    experiment = fl.build_experiment(fl.load(result.folder).config)
    assert sum(len(part) for part in experiment.partition.test_indices) == 75
    expected = keras_fedbn(experiment, digits)
    for record in result.records:
        mean, accuracies = next(expected)
        assert record.extra_accuracies["personal_accuracy"] == pytest.approx(np.mean(accuracies))
        assert record.extra_accuracies["personal_worst10"] == pytest.approx(min(accuracies))
    for one, other in zip(mean, result.state.global_model_weights.trainable, strict=True):
        assert np.allclose(one, other, atol=5e-5)


@pytest.mark.parametrize(
    "fields",
    [
        {"algorithm": "fedprox", "prox_mu": 0.1},
        {"algorithm": "fedadam", "server_lr": 0.01},
        {"clients_per_round": 2, "dropout": 0.3},
        {"sampling": "poisson", "clients_per_round": 2},
        {"aggregator": "median"},
        {"partition": "feature", "unseen_clients": 0.3},
    ],
    ids=str,
)
def test_local_layers_with_other_variants_resume(here, fields):
    config = configure(**LOCAL | {"num_clients": 4} | fields)
    whole = fl.run(config, model=small)
    half = fl.run(config.replace(rounds=2, name="half"), model=small)
    more = fl.run(config.replace(resume=str(half.folder)), model=small)
    ends = [run.records[-1].extra_accuracies for run in (whole, more)]
    assert ends[0] == ends[1] and 0 <= ends[0]["personal_accuracy"] <= 1
    weights = [run.state.global_model_weights.trainable for run in (whole, more)]
    assert all(map(np.array_equal, *weights))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"client_test": 0.0}, "evaluated on its own images; add --client-test 0.2"),
        ({"algorithm": "feddyn"}, "algorithm='feddyn', whose memory"),
        ({"baselines": True}, "cannot be combined with 'baselines'"),
        ({"sampling": "by-size", "clients_per_round": 2}, "may draw a client twice"),
    ],
)
def test_what_clients_cannot_keep_is_one_line(here, fields, said):
    with pytest.raises(UserError, match=said):
        fl.run(configure(**LOCAL | fields), model=small)
