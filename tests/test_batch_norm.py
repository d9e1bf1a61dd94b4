"""--batch-norm average: the moving statistics are moved as Keras does, and averaged."""

import federated_learning as fl
from harness.fields import UserError

import numpy as np
import pytest
import tensorflow as tf
from runs import configure

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


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def train(partition, **fields):
    """The weights after a run on these shards, with the statistics."""
    config = configure(**SMALL | fields)
    result = fl.run(config, model=build, partition=partition)
    return [np.asarray(w) for w in result.state.global_model_weights.trainable]


def test_a_client_alone_does_as_keras(here, digits):
    """Three steps on the whole shard, by Keras' own training of the same initial model."""
    shard = np.arange(300)
    found = train([shard])
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
    for one, other in zip(model.get_weights(), found, strict=True):
        assert np.allclose(one, other, atol=2e-5)


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
    frozen = {"client_lr": 1e-30} if "client_optimizer" not in fields else {}
    usual = train(parts, **{"client_lr": 1e-30}, name="usual")
    found = train(parts, **{**fields, **frozen}, name="found", rounds=1)
    statistics = fl.make_network("python:build", build_list, load_digits(), "average").statistics
    assert len(statistics) == 6
    if frozen and "byzantine" not in fields:
        for place in statistics:
            assert np.allclose(usual[place], found[place], atol=1e-5)
    assert all(np.isfinite(w).all() for w in found)


def build_list():
    """The model as a list of layers, as make_network takes it."""
    return [build()]


def load_digits():
    return fl.load_dataset(configure(dataset="digits").data)


def test_a_run_with_statistics_is_evaluated_loaded_and_resumed(here):
    config = configure(**{**SMALL, "rounds": 2, "num_clients": 3})
    whole = fl.run(config.replace(rounds=3), model=build)
    half = fl.run(config.replace(name="half"), model=build)
    more = fl.run(config.replace(rounds=3, resume=str(half.folder)), model=build)
    ends = [run.state.global_model_weights.trainable for run in (whole, more)]
    assert all(map(np.array_equal, *ends))
    saved = fl.load(whole.folder)
    assert saved.evaluate().accuracy == whole.evaluation.accuracy
    images = saved.dataset.test.images.astype(np.float32)
    assert np.array_equal(np.argmax(saved.model()(images), 1), whole.evaluation.predictions)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"batch_norm": "refuse"}, "or add --batch-norm average"),
        ({"algorithm": "scaffold"}, "algorithm='scaffold', whose memory is of trained weights"),
        ({"aggregator": "dp", "public_cohorts": True}, "can make a variance negative"),
    ],
)
def test_what_cannot_be_averaged_is_one_line(here, fields, said):
    with pytest.raises(UserError, match=said):
        fl.run(configure(**SMALL | fields), model=build)
