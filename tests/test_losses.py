"""Local losses: smoothed labels, weighted classes, regularizers, a user's own."""

import federated_learning as fl
from harness.cli.fields import UserError

import numpy as np
import pytest
import tensorflow as tf
from runs import configure

L = tf.keras.layers
SHARD = np.r_[0:150, 200:210]
SMALL = {"dataset": "digits", "rounds": 1, "local_epochs": 1, "batch_size": 0, "client_lr": 0.1}
SMALL |= {"figures": "none"}
OWN = """\
import tensorflow as tf

def squared(labels, logits):
    return tf.reduce_sum((tf.one_hot(labels, logits.shape[1]) - logits) ** 2, axis=1)

def mean(labels, logits):
    return tf.reduce_mean(squared(labels, logits))

def numbers(labels, logits):
    return 3.0

def kept(labels, logits):
    return tf.reduce_mean(squared(labels, logits), keepdims=True)

def three(labels, logits):
    return squared(labels, logits)[:3]

def branching(labels, logits):
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
    total = tf.zeros_like(losses)
    if tf.size(labels) > 0:
        for _ in tf.range(4):
            total += losses / 4
    return total
"""


def build():
    return [L.Flatten(), L.Dense(8, "relu", kernel_regularizer=tf.keras.regularizers.L2(0.3))]


def plain():
    return [L.Flatten(), L.Dense(8, "relu")]


def active():
    return [L.Flatten(), L.Dense(8, "relu", activity_regularizer=tf.keras.regularizers.L1(0.01))]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(OWN)
    return tmp_path


def smoothed(labels, logits):
    loss = tf.keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.2)
    return loss(tf.one_hot(labels, 10), logits)


def balanced(labels, logits):
    """scikit-learn's formula, n / (C n_c)."""
    counts = np.bincount(labels, minlength=10)
    weights = len(labels) / (10 * counts)
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
    return tf.reduce_mean(weights[labels].astype(np.float32) * losses)


def cross_entropy(labels, logits):
    return tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits))


def squared(labels, logits):
    return tf.reduce_mean(tf.reduce_sum((tf.one_hot(labels, 10) - logits) ** 2, axis=1))


@pytest.mark.parametrize(
    ("fields", "model", "loss"),
    [
        ({"label_smoothing": 0.2}, plain, smoothed),
        ({"class_weights": "balanced"}, plain, balanced),
        ({"loss": "own.py:squared", "client_lr": 0.001}, plain, squared),
        ({"loss": "own.py:branching"}, plain, cross_entropy),
        ({}, build, cross_entropy),
        ({}, active, cross_entropy),
        ({"label_smoothing": 0.2, "local_steps": 2}, build, smoothed),
    ],
    ids=["smoothing", "balanced", "own", "own, with a loop", "L2", "activity", "both, two steps"],
)
def test_a_step_is_keras_own_of_the_same_loss(here, digits, fields, model, loss):
    """A client alone on the whole shard: w - lr * the gradient of loss + Keras' regularizers."""
    config = configure(**SMALL | fields)
    found = fl.run(config, model=model, partition=[SHARD]).state.global_model_weights.trainable
    experiment = fl.build_experiment(
        config.replace(num_clients=1, model=f"python:{model.__name__}")
    )
    keras_model = fl.build_model(experiment.network, seed=0)
    x = fl.to_input(digits.train.images[SHARD])
    labels = digits.train.labels[SHARD].astype(np.int32)
    for _ in range(config.training.local_steps or 1):
        with tf.GradientTape() as tape:
            total = loss(labels, keras_model(x, training=True)) + sum(keras_model.losses)
        gradients = tape.gradient(total, keras_model.trainable_weights)
        for variable, gradient in zip(keras_model.trainable_weights, gradients, strict=True):
            variable.assign_sub(config.training.client_lr * gradient)
    for one, other in zip(keras_model.get_weights(), found, strict=True):
        assert np.allclose(one, other, atol=3e-6)


def test_balanced_classes_help_a_rare_label(here, digits):
    """Of label 3 one image in fifty: with balanced classes its recall is higher."""
    labels = digits.train.labels
    rare = np.flatnonzero(labels == 3)[:3]
    shard = np.sort(np.concatenate([np.flatnonzero(labels != 3), rare]))
    recalls = {}
    for weights in ("none", "balanced"):
        config = configure(
            dataset="digits", model="logreg", rounds=3, class_weights=weights, figures="none"
        )
        result = fl.run(config, partition=np.array_split(shard, 3))
        confusion = result.evaluation.confusion
        recalls[weights] = confusion[3, 3] / confusion[3].sum()
    assert recalls["balanced"] > recalls["none"] + 0.1


@pytest.mark.parametrize(
    ("loss", "line"),
    [
        ("factor = tf.Variable(1.0); return factor * losses", "in line 4; fix it"),
        ("return losses if tf.executing_eagerly() else losses[:, 2]", "has only 1 dims) in line 4"),
    ],
)
def test_an_error_in_a_graph_is_one_line(tmp_path, digits, loss, line):
    """As any other, though TensorFlow puts its trace before it."""
    (tmp_path / "own.py").write_text(
        "import tensorflow as tf\n"
        "def loss(labels, logits):\n"
        "    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)\n"
        f"    {loss}\n"
    )
    config = configure(dataset="digits", model="logreg", loss=f"{tmp_path / 'own.py'}:loss")
    experiment = fl.build_experiment(config.replace(cache=str(tmp_path)), digits)
    with pytest.raises(UserError) as refused:
        fl.build_process(experiment)
    message = str(refused.value)
    assert "\n" not in message and message.startswith("loss=") and line in message, message


@pytest.mark.parametrize(
    "fields",
    [
        {"algorithm": "scaffold"},
        {"algorithm": "mimelite"},
        {"aggregator": "median"},
        {"baselines": True},
        {"byzantine": 1, "attack": "backdoor"},
    ],
    ids=str,
)
def test_losses_with_other_variants(here, fields):
    own = {"label_smoothing": 0.1, "class_weights": "balanced", "num_clients": 3}
    result = fl.run(configure(**SMALL | own | fields, model="logreg"))
    assert np.isfinite(result.evaluation.loss)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"loss": "own.py:mean"},
            r"^loss='.*' returns \(\) for a batch; return one loss",
        ),
        ({"loss": "own.py:numbers"}, "^loss='.*' returns float for a batch"),
        ({"loss": "own.py:kept"}, r"^loss='.*' returns \(1,\) for a batch"),
        ({"loss": "own.py:three"}, r"^loss='.*' returns \(3,\) for a batch"),
        ({"loss": "own.py:gone"}, "has no function gone"),
        ({"loss": "own.py:squared", "label_smoothing": 0.1}, "cannot be combined with loss="),
        ({"loss": "mse"}, "choose"),
        ({"class_weights": "balanced", "aggregator": "dp"}, "exact number of the clients' images"),
    ],
)
def test_losses_that_cannot_be_are_one_line(here, fields, said):
    with pytest.raises(UserError, match=said):
        fl.run(configure(**SMALL | fields, model="logreg"))


def test_a_loss_of_a_file_is_part_of_the_run(here):
    config = configure(**SMALL, loss="own.py:squared", model="logreg", name="a")
    result = fl.run(config)
    (here / "own.py").write_text(OWN + "\n# other\n")
    with pytest.raises(UserError, match=r"has changed since that run \(loss\)"):
        fl.run(config.replace(rounds=2, resume=str(result.folder)))
