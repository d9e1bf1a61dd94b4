"""Layers of a model that somebody adds: what Keras promises of them holds in a federated round
too."""

import federated_learning as fl
from harness.cli.fields import UserError
from harness.training import layers
from variants import choices

import numpy as np
import pytest
import tensorflow as tf
from reference import alone, largest_difference, network, replace_choice, weights_of
from runs import configure

keras = tf.keras.layers
NETWORKS = {
    "dropout": lambda: [*layers.dense(16), keras.Dropout(0.5)],
    "noise": lambda: [keras.GaussianNoise(5.0), *layers.dense(16)],
    "rotation": lambda: [keras.RandomRotation(0.2), *layers.dense(16)],
    "alpha": lambda: [*layers.dense(16), keras.AlphaDropout(0.3), keras.GaussianDropout(0.2)],
}


@pytest.fixture
def trained(worker, tmp_path, monkeypatch):
    """The weights after a round of a network, in a process built new."""
    small = {"dataset": "digits", "model": "2nn", "num_clients": 3, "cache": str(tmp_path)}

    def train(layers_of_2nn, **flags):
        replace_choice(monkeypatch, choices.MODELS, "2nn", layers_of_2nn)
        experiment = fl.build_prepared(configure(**small | flags))
        return weights_of(
            experiment.process.next(experiment.process.initialize(), alone([0, 1, 2]))[0]
        )

    return train


def few(names, quick):
    """`make test` has a case of each kind, `make thorough` all."""
    return [
        name if name in quick else pytest.param(name, marks=pytest.mark.thorough) for name in names
    ]


@pytest.mark.parametrize("name", few(NETWORKS, {"dropout", "rotation"}))
def test_randomness_is_there_and_repeats(trained, name):
    once = trained(NETWORKS[name])
    assert largest_difference(once, trained(NETWORKS[name])) == 0
    assert largest_difference(once, trained(lambda: layers.dense(16))) > 1e-3


def test_dropout_drops_what_the_key_says():
    """tf.nn's stateless dropout, called by hand with the layer's key: other units for another key,
    none by rate 0."""
    x = tf.ones([4, 1000])
    key = tf.constant([3, 5], tf.int64)
    fold = tf.random.experimental.stateless_fold_in
    dropped = layers.train_layer(keras.Dropout(0.25), x, key, 2)
    expected = tf.nn.experimental.stateless_dropout(x, 0.25, fold(fold(key, 2000), 1))
    assert np.array_equal(dropped, expected) and np.mean(dropped == 0) == pytest.approx(
        0.25, abs=0.03
    )
    assert not np.array_equal(dropped, layers.train_layer(keras.Dropout(0.25), x, key + 1, 2))
    assert not np.array_equal(dropped, layers.train_layer(keras.Dropout(0.25), x, key, 3))


def test_nothing_is_dropped_in_evaluation(monkeypatch, mnist):
    replace_choice(monkeypatch, choices.MODELS, "2nn", NETWORKS["dropout"])
    model = fl.build_model(network("2nn"), 0)
    images = mnist.test.images[:90]
    x = fl.to_input(images)
    logits = model(x, training=False)
    assert not np.allclose(logits, model(x, training=True), atol=1e-3)
    weights = fl.tff.learning.models.ModelWeights([w.numpy() for w in model.weights], [])
    labels = mnist.test.labels[:90].astype(np.int32)
    predictions, losses = fl.build_predictor(network("2nn"))(weights, images, labels)
    assert np.array_equal(predictions, np.argmax(logits, 1))
    assert np.allclose(losses, fl.cross_entropy(labels, logits), atol=1e-5)


def test_weights_start_as_keras_initializers_have_them(monkeypatch):
    """Ones for LayerNormalization, He's variance where it is asked for, Glorot's where nothing is;
    by the seed."""

    def build():
        return [
            keras.Conv2D(4, 3, kernel_initializer="he_normal"),
            keras.LayerNormalization(),
            *layers.dense(300),
        ]

    replace_choice(monkeypatch, choices.MODELS, "2nn", build)
    model, again, other = (fl.build_model(network("2nn"), seed).get_weights() for seed in (0, 0, 1))
    conv, conv_bias, gamma, beta, kernel = model[:5]
    assert (gamma == 1).all() and not beta.any() and not conv_bias.any()
    assert conv.std() == pytest.approx((2 / 9) ** 0.5, rel=0.3)
    assert np.abs(kernel).max() == pytest.approx((6 / (26 * 26 * 4 + 300)) ** 0.5, rel=1e-3)
    assert all(np.array_equal(a, b) for a, b in zip(model, again, strict=True))
    assert not np.array_equal(conv, other[0]) and not np.array_equal(kernel, other[4])


@pytest.mark.parametrize("name", choices.MODELS)
def test_the_rows_start_as_they_always_did(name):
    """Glorot uniform from (seed, position), zero biases."""
    for position, weight in enumerate(fl.build_model(network(name), 3).get_weights()):
        glorot = tf.keras.initializers.GlorotUniform(seed=3 + 2**31 * position)
        assert np.array_equal(
            weight, glorot(weight.shape) if weight.ndim > 1 else np.zeros_like(weight)
        )


LOST = {
    "state .moving_mean": keras.BatchNormalization,
    "state .mean": keras.Normalization,
    "kernel_constraint": lambda: keras.Conv2D(
        2, 3, kernel_constraint=tf.keras.constraints.MaxNorm(1)
    ),
    "not float32": lambda: keras.Conv2D(2, 3, dtype="float16"),
}


@pytest.mark.parametrize("lost", LOST)
def test_a_layer_of_which_something_would_be_lost_is_refused_in_one_line(monkeypatch, lost):
    replace_choice(monkeypatch, choices.MODELS, "2nn", lambda: [LOST[lost](), *layers.dense(16)])
    with pytest.raises(UserError, match=f"^model='2nn': the layer .* {lost}"):
        fl.build_model(network("2nn"), 0)


@pytest.mark.parametrize(
    "name, shape, message",
    [
        (
            "lean-cnn",
            (4, 4, 1),
            "model='lean-cnn' cannot process images of 4x4x1 (Negative dimension",
        ),
        (
            "lean-cnn",
            (6, 6, 3),
            "caused by subtracting 2 from 1); choose another model, such as mlp",
        ),
        ("cnn", (1, 1, 1), "model='cnn' cannot process images of 1x1x1"),
        ("mlp", (2000, 2100, 1), "model='mlp' has more than 536,870,911 parameters for images of"),
    ],
)
def test_a_model_too_small_or_too_large_for_the_images_is_one_line(name, shape, message):
    too_wide = fl.Network(name, fl.find_model(name), shape, 10)
    with pytest.raises(UserError) as refused:
        fl.build_model(too_wide, 0)
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_layers_that_are_made_once_are_refused(monkeypatch):
    made = layers.dense(16)
    replace_choice(monkeypatch, choices.MODELS, "2nn", lambda: made)
    fl.build_model(network("2nn"), 0)
    with pytest.raises(UserError, match="create new layers on each call"):
        fl.build_model(network("2nn"), 0)
