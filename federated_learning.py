#!/usr/bin/env python3
# /// script
# requires-python = "==3.11.*"
# dependencies = [
#   "dp-accounting==0.4.3", "grpcio==1.74.0", "h5py==3.16.0", "jinja2==3.1.6",
#   "matplotlib==3.11.2", "numpy==1.25.2", "scikit-learn==1.7.2", "scipy==1.9.3",
#   "tensorflow==2.14.1", "tensorflow_federated==0.87.0", "tqdm==4.70.1", "tyro==1.0.17",
# ]
# [tool.uv]  # TFF's own pins forbid these, or name versions that are no longer on PyPI
# override-dependencies = ["jax==0.4.20", "jaxlib==0.4.20", "typing-extensions==4.16.0"]
# ///
"""Federated learning on MNIST: FedAvg on non-IID clients through TensorFlow Federated (TFF).

    config -> data -> partition -> shards -> federated process -> rounds -> evaluation -> plots

Federated averaging [1, Algorithm 1], and the function that does each line:

    1  w <- initial weights                                     # build_model
    2  for round t = 1, 2, ...:                                 # run_rounds
    3      S <- clients_per_round of the num_clients clients    # sample_clients
    4      for each client k in S, on its own shard:            # average_updates
    5          w_k <- w after local_epochs of SGD on batches    # build_local_training
    6      w <- sum over k in S of (n_k / n) w_k                # average_updates and fedavg_round

Training runs in TFF's worker, a separate process. It receives client ids and weights, and reads
each client's shard from a file. For speed, clients are grouped into chunks, each of which TFF sees
as one client (make_chunks). Notation: K clients, m of them in a round, g of them in a chunk; n_k
examples on client k, n on all clients in S, N in the training set; C labels; d model parameters;
r metrics that a client reports (ClientMetrics).

    python federated_learning.py                                  # 10 clients, 5 rounds
    python federated_learning.py --partition shards --rounds 50   # McMahan's non-IID split
    python federated_learning.py --compare fedavg,fedprox         # one plot, same split and seed
    python federated_learning.py --help                           # overview of all flags

All randomness is a function of (seed, round, client), except for the noise and the secret cohorts
of private runs: on one kind of processor, the same command gives the same weights, bit for bit.
This file contains FedAvg, whole. Its variants, which flags select, are in variants/: they replace
or wrap FedAvg's parts (the class `Parts`, below) from outside. harness/ is the infrastructure
around a run: files, workers, command line.

[1] McMahan et al. 2017, Communication-Efficient Learning of Deep Networks from Decentralized
    Data (AISTATS)
[2] Yurochkin et al. 2019, Bayesian Nonparametric Federated Learning of Neural Networks (ICML)
Papers of the variants are listed in variants/__init__.py.
"""

from __future__ import annotations

import os
import sys

__all__ = [  # the public names; see docs/python.md
    "Callback",
    "Config",
    "RunFailed",
    "StopRun",
    "UserError",
    "build_dataset",
    "build_experiment",
    "compare",
    "evaluate_saved",
    "load",
    "main",
    "make_partition",
    "parse",
    "prepare",
    "run",
    "run_rounds",
]
HERE = os.path.dirname(os.path.abspath(__file__))
# Started as a script, this module is __main__; a user's own file of --model or --algorithm that
# imports it by its name must get the same copy.
sys.modules["federated_learning"] = sys.modules[__name__]
if __name__ == "__main__" and HERE not in sys.path:  # PYTHONSAFEPATH leaves it out
    sys.path.insert(0, HERE)

# Imported first: from here on Ctrl-C prints no traceback.
from harness.cli import command_line, listing, output, saved_config
from harness.cli.command_line import RunFailed as RunFailed  # for users' code

# isort: split
import gc
import heapq
import time
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from harness.cli.fields import (
    Count,
    CountOrZero,
    NumClients,
    OptionalRate,
    Rounds,
    UserError,
    choice,
    float_range,
    in_notebook,
    int_range,
)
from harness.cli.output import print_line
from harness.cli.own_files import OWN, give, is_own, own_fields, short_name
from harness.cli.run_options import Comparison, Run
from harness.comparing.sweep import compared_rows, overlaid_folders
from harness.config import conditions, configuration, preset_flags
from variants import choices, options
from variants.presets import PRESETS

import numpy as np

# == Config: one experiment; the command line is made from it ======================================


# Each class has a base class in variants/options.py, with the fields that only variants use.
# choice(...), int_range(...) and the like return annotated types, from which --help and the checks
# of values are made.


@dataclass(frozen=True)
class Data(options.MoreData):
    """Training images, and those that the global model is evaluated on."""

    dataset: choice(choices.DATASETS) = "mnist"
    """Built-in data set."""
    holdout: int_range(0, 50_000) = 0
    """Number of training images to hold out and evaluate on instead of the test set, for choosing
    hyperparameters."""


@dataclass(frozen=True)
class Partitioning(options.MorePartitioning):
    """The clients, and how the images are split over them."""

    partition: choice(choices.PARTITIONS, OWN, "FILE.py:FUNCTION") = "dirichlet"
    """How the training images are split over the clients. FILE.py:FUNCTION is a custom split: the
    function gets labels, num_clients and a NumPy generator, and returns an index array for each
    client."""
    num_clients: NumClients = 10
    """Number of clients, K. With --partition natural the default is 0: every owner is a client."""
    alpha: float_range(0.001, 1e6) = 0.5
    """Concentration of the Dirichlet splits; smaller means more skew."""


@dataclass(frozen=True)
class Training(options.MoreTraining):
    """Settings of every algorithm: network, rounds, clients, local work, learning rates.

    Settings of single algorithms are in the group Optimization.
    """

    model: choice(choices.MODELS, OWN, "FILE.py:FUNCTION") = "lean-cnn"
    """The clients' network. FILE.py:FUNCTION is a custom one: the function returns new Keras
    layers, or a new Keras model, on each call; a layer for the logits is added if it has none."""
    rounds: Rounds = 5
    """Number of communication rounds, T."""
    clients_per_round: CountOrZero = 0
    """Clients drawn per round, m; 0: all."""
    local_epochs: Count = 3
    """Local passes over the client's shard per round, E."""
    batch_size: CountOrZero = 16
    """Local batch size, B; 0: the client's whole shard."""
    client_lr: OptionalRate = None
    """Learning rate of the clients' local steps. Default: that of the client optimizer; for sgd
    0.2, except 0.15 for lean-cnn, 0.1 for scaffold, 0.05 for digits and 0.0005 for mimelite (the
    lowest of several)."""
    server_lr: OptionalRate = None
    """Learning rate of the server optimizer. Default: that of the algorithm: 1 for plain averaging,
    0.3 for fedavgm, 0.03 for fedadagrad, 0.1 for fedadam and fedyogi."""


@dataclass(frozen=True)
class Config(configuration.ExperimentConfig):
    """One experiment. Each field is also a flag: client_lr is --client-lr."""

    # What there is to choose, for the rules in harness/config/. No field: it has no type.
    tables = configuration.Tables(choices.TABLES, choices.KINDS, PRESETS)

    seed: int_range(0, 2**31 - 1) = 0
    """Random seed of the split, the initial weights, the cohorts, the batch order and all else
    that is drawn, except for the noise and the secret cohorts of private runs."""
    preset: choice(PRESETS) = "none"
    """Flags of a published experiment; flags given in addition override them."""
    data: Data = Data()
    partitioning: Partitioning = Partitioning()
    training: Training = Training()
    optimization: options.Optimization = options.Optimization()
    aggregation: options.Aggregation = options.Aggregation()
    privacy: options.Privacy = options.Privacy()
    adversity: options.Adversity = options.Adversity()
    clock: options.Clock = options.Clock()
    comparison: Comparison = Comparison()
    run: Run = Run()


def parse(words: str | Sequence[str] | None = None) -> Config:
    """Parse command-line flags into a Config.

    Args:
        words: flags as one string or a list; None reads sys.argv. With --resume, flags that are not
            given take the saved run's values.

    Raises:
        UserError: a flag is unknown, out of range, or contradicts another.
    """
    return configuration.parse(Config, words)


# Flags are parsed before TensorFlow is imported, so that --help and errors appear at once. Garbage
# collection is off during the imports, which it would slow down; the end of this file turns it on.
if __name__ == "__main__":
    parsed_config = command_line.run_or_exit(parse)
    if parsed_config.run.version or parsed_config.run.list:
        command_line.run_or_exit(listing.answer, parsed_config.run, Config())
        sys.exit()
    command_line.run_or_exit(configuration.check_paths, parsed_config)
    output.tell_loading()
    gc.disable()

from harness.cli.loading import import_function
from harness.comparing import commands, overlay
from harness.engine.execution import NOT_INLINED, without_autograph
from harness.engine.gather import gather
from harness.engine.multi_host import check_hosts, start_workers
from harness.reporting import notices
from harness.storage import evaluating, origin, provenance, saving
from harness.storage.callbacks import Callback, CallbackList, check_callbacks
from harness.storage.callbacks import StopRun as StopRun  # for users' callbacks
from harness.storage.files import check_clock, check_temporary_folder
from harness.storage.predicting import predict_pictures
from harness.storage.run_folder import RunFolder, check_held_out
from harness.storage.saved_run import SavedRun
from harness.storage.saving import Result
from harness.training import histories, layers, own_models, records, shards
from harness.training.dataset import Dataset, OtherImages, check_dataset, make_dataset, read_arrays
from harness.training.dataset import Split as Split  # for data sets made in Python
from harness.training.records import Evaluation, RoundRecord
from harness.training.settings import pinned_keras_settings
from harness.training.streams import client_key
from variants import (
    CHANGES,
    LOSSES,
    SETTLED,
    baselines,
    datasets,
    given_splits,
    models,
    partitions,
)

import tensorflow as tf
import tensorflow_federated as tff

# TFF's types, for annotations.
Computation: TypeAlias = tff.Computation
ModelWeights: TypeAlias = tff.learning.models.ModelWeights
Optimizer: TypeAlias = tff.learning.optimizers.Optimizer
State: TypeAlias = tff.learning.templates.LearningAlgorithmState  # between two rounds

# == Data ==========================================================================================

MNIST_FILE = Path(__file__).resolve().parent / "data" / "mnist.npz"


def load_mnist() -> Dataset:
    """Load MNIST from data/mnist.npz. Raises UserError if the file is damaged or not MNIST.

    Returns a Dataset: `train` and `test`, each with images uint8[N,H,W,channels] and labels
    uint8[N].
    """
    arrays = read_arrays(MNIST_FILE)
    arrays |= {key: arrays[key][..., np.newaxis] for key in ("x_train", "x_test")}
    dataset = make_dataset("MNIST", arrays)
    if not dataset.is_mnist:
        raise UserError(
            f"{MNIST_FILE} is not MNIST (its SHA-256 differs); restore the committed file"
        )
    return dataset


build_dataset = datasets.build_dataset  # from custom arrays, for run(config, dataset=...)


def load_dataset(data: Data) -> Dataset:
    """Load the configured data set.

    Raises:
        UserError: the data are missing or malformed.
    """
    function = choices.DATASETS[data.dataset].function  # "module:name" in variants/; "": load_mnist
    if data.data or data.validation:
        dataset = datasets.load_custom(data)
    else:
        dataset = import_function(function)() if function else load_mnist()
    if data.holdout:
        dataset = datasets.hold_out(dataset, data.holdout)
    return dataset


# == Partition: which training images each client has ==============================================


def split_dirichlet(
    labels: np.ndarray, num_clients: int, rng: np.random.Generator, alpha: float
) -> list[np.ndarray]:
    """Divide each label over the clients in proportions drawn from Dirichlet(alpha) [2].

    `labels` is uint8[N] or uint16[N]. Returns K index arrays int64[n_k]; some may be empty.
    """
    owner = np.empty(len(labels), np.int64)  # the client of each image
    for label in np.unique(labels):
        images = rng.permutation(np.flatnonzero(labels == label))
        shares = rng.dirichlet(np.full(num_clients, alpha))
        cuts = (np.cumsum(shares)[:-1] * len(images)).round().astype(np.int64)
        # The client of the i-th of these images is the number of cuts at or below i.
        owner[images] = np.searchsorted(cuts, np.arange(len(images)), side="right")
    images_by_client = np.argsort(owner, kind="stable")
    sizes = np.bincount(owner, minlength=num_clients)
    return np.split(images_by_client, sizes.cumsum()[:-1])


@dataclass(frozen=True)
class Partition:
    """A split: `indices` are K arrays int64[n_k] of training images, disjoint, none empty.

    They need not cover all training images: those of --client-test are in `test_indices`, and a
    file, a custom split or owners that are not drawn may leave some out.
    """

    indices: list[np.ndarray]
    counts: np.ndarray  # int64[K,C], a client's images by label
    num_filled_clients: int  # clients whose draw was empty; each was given one image
    digest: str  # hash of what the shard files hold, which names their folder
    test_indices: Sequence[np.ndarray] = ()  # with --client-test, what each client holds out
    drawn_by: str = ""  # the fields that it follows from

    @property
    def sizes(self) -> np.ndarray:
        """The number of images of each client, n_k, int64[K]."""
        return self.counts.sum(axis=1)


def fill_empty_clients(split: list[np.ndarray]) -> tuple[list[np.ndarray], int]:
    """Give each client without images one image of the largest client.

    The split has no fewer images than clients. Returns the new split, and the number of clients
    that received an image.
    """
    indices = list(split)
    sizes = np.array([len(part) for part in indices])
    empty = np.flatnonzero(sizes == 0)
    for client in empty:
        donor = int(sizes.argmax())
        indices[client] = indices[donor][-1:]
        indices[donor] = indices[donor][:-1]
        sizes[client] = 1
        sizes[donor] = sizes[donor] - 1
    return indices, len(empty)


def find_split(config: Config, dataset: Dataset) -> Callable[[np.random.Generator], list]:
    """Return split(rng), the configured split with its other arguments bound.

    By default it is split_dirichlet, with alpha=0.5.
    """
    chosen = config.chosen("partition")  # its entry in variants/choices.py
    function = split_dirichlet
    if chosen.function:
        function = import_function(chosen.function, "partition")
    # The fields of a partition that changes images, such as the noise of "feature", are for the
    # change, not for the split.
    fields = {} if chosen.change_images else config.fields_of_choice("partition")  # {"alpha": 0.5}
    extra: dict[str, Any] = {"dataset": dataset} if chosen.needs_dataset else {}
    num_clients = config.partitioning.num_clients
    labels = dataset.train.labels
    draw = partial(function, labels, num_clients, **fields, **extra)
    return given_splits.check_draws(draw, labels, config) if is_own(config.partition_name) else draw


def make_partition(dataset: Dataset, config: Config) -> Partition:
    """Split the training images as configured; the result depends on data, flags and seed only.

    Raises:
        UserError: the data do not allow such a split.
    """
    check_dataset(dataset)
    saved_config.check_config(config)
    labels = dataset.train.labels
    num_clients = config.partitioning.num_clients
    if num_clients < 1:
        raise UserError(
            "num_clients=0 means all owners, which are not counted here; give their number, or "
            "take fl.build_experiment(config, dataset).partition"
        )
    if num_clients > len(labels):
        raise UserError(
            f"num_clients={num_clients} exceeds the {len(labels)} training images; choose 1 to "
            f"{len(labels)}"
        )
    draw = find_split(config, dataset)
    split = draw(np.random.default_rng(config.seed))
    if is_own(config.partition_name):
        given_splits.check_repeated(draw, split, config)
    if config.partitioning.min_images:
        split = partitions.draw_until_large(draw, split, config)
    filled, num_filled = fill_empty_clients(split)
    whole = [np.sort(part).astype(np.int64) for part in filled]
    if config.partitioning.partition_file:
        given_splits.verify_partition_file(config.partitioning.partition_file, dataset, whole)
    share = config.partitioning.client_test
    tests = partitions.draw_tests(whole, share, config.seed) if share else ()
    indices = whole
    if share:
        indices = [np.setdiff1d(part, test) for part, test in zip(whole, tests, strict=True)]
    counts = [np.bincount(labels[part], minlength=dataset.num_classes) for part in indices]
    digest = shards.hash_shards(dataset, indices, config)
    return Partition(
        indices=indices,
        counts=np.stack(counts),
        num_filled_clients=num_filled,
        digest=digest,
        test_indices=tests,
        drawn_by=config.with_absolute_paths().fields_of_split(),
    )


# == Model: Keras layers from images float32[n,H,W,channels] in 0..1 to C logits ===================


def build_lean_cnn() -> list[tf.keras.layers.Layer]:
    """Return the layers of the default network, without the logits; 153,930 parameters in all."""
    return [  # conv: Conv2D, 2x2 max-pooling, ReLU; dense: Flatten, then Dense and ReLU
        *layers.conv(16, size=5, padding="valid"),
        *layers.conv(32, size=3),
        *layers.dense(128),
    ]


def cross_entropy(labels: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
    """Return the local losses float32[n] in nats, of labels int32[n] and logits float32[n,C]."""
    return tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)


class Network(NamedTuple):
    """An architecture: its name, layers, shapes of input and output, and the loss."""

    name: str
    build_hidden_layers: Callable[[], list[tf.keras.layers.Layer]]
    image_shape: tuple[int, int, int]  # height, width, channels
    num_classes: int
    loss: Callable[[tf.Tensor, tf.Tensor], tf.Tensor] = cross_entropy
    has_logits: bool = False  # whether the last hidden layer gives the logits already
    # Of a custom model (own_models.OwnModel): the order in which its layers create the weights, and
    # the places of BatchNormalization's moving statistics and of all its weights.
    creation_order: tuple[int, ...] = ()
    statistics: tuple[int, ...] = ()
    norms: tuple[int, ...] = ()
    takes_statistics: bool = False  # whether --batch-norm allows moving statistics

    def build_layers(self) -> list[tf.keras.layers.Layer]:
        """Return new Keras layers; the last one returns the logits."""
        hidden = self.build_hidden_layers()
        layers.check_new(self.name, hidden)
        return hidden if self.has_logits else [*hidden, tf.keras.layers.Dense(self.num_classes)]


# AutoGraph would look for loops to convert, for nothing: that doubles the time to build the graph.
@tf.autograph.experimental.do_not_convert
def to_input(images: tf.Tensor) -> tf.Tensor:
    """Scale images uint8[n,H,W,channels] to float32 in 0..1."""
    return tf.cast(images, tf.float32) / 255


@pinned_keras_settings()  # float32, graphs, ..., instead of the user's own settings of Keras
def build_model(network: Network, seed: int) -> tf.keras.Model:
    """Line 1: build a Keras model; its initial weights depend on the network and the seed only.

    They come from the layers' own initializers: Keras' default is Glorot uniform, with zero biases.
    """
    # Notes the initializer of each weight, to be seeded below; raises UserError if the layers do
    # not suit the size of the images.
    with layers.record_initializers(network.name, network.image_shape) as initializers:
        inputs = tf.keras.Input(network.image_shape)
        model = tf.keras.Sequential([inputs, *network.build_layers()])
    layers.check_layers(network.name, model, network.takes_statistics)
    model.set_weights(layers.initial_weights(model, initializers, seed))
    return model


def forward(
    network: Network, weights: Sequence[tf.Tensor], x: tf.Tensor, key: tf.Tensor
) -> tuple[tf.Tensor, Sequence[tf.Tensor]]:
    """Return (logits float32[n,C], losses of regularizers) of a batch x, computed with `weights`.

    Layers are in training mode; `key` int64[2] seeds Dropout and similar layers.
    """
    # New Keras layers create variables; in this scope each gets the next of our tensors instead.
    # TFF's functional_model_from_keras does the same, but a step takes 1.4 times as long: it puts
    # the forward pass alone into a function, which hides a max-pooling from its gradient.
    order = network.creation_order or range(len(weights))
    # `order` is of a custom model's own layers; the weights of the added logits follow them.
    next_weight = iter([*(weights[place] for place in order), *weights[len(order) :]])
    with tf.variable_creator_scope(
        lambda _, **options: layers.take_tensor(next(next_weight), options)
    ):
        with layers.scratch_graph():
            made = network.build_layers()
        for position, layer in enumerate(made):
            x = layers.train_layer(layer, x, key, position)
        return x, layers.penalties(made)


def loss_and_gradients(
    network: Network, weights: Sequence[tf.Tensor], x: tf.Tensor, y: tf.Tensor, key: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor, Sequence[tf.Tensor]]:
    """Return (losses float32[n] of network.loss, logits, gradients of their mean) of a batch.

    Penalties of regularizers in custom layers enter the gradients, but not the losses.
    """
    with tf.GradientTape() as tape:
        tape.watch(weights)
        # The weights themselves; of a custom model with BatchNormalization, also how it moves them.
        caught = layers.catch_statistics(weights, network.statistics)
        logits, penalties = forward(network, caught, x, key)
        losses = network.loss(y, logits)
        mean_loss = sum(penalties, start=tf.reduce_mean(losses))
    gradients = tape.gradient(mean_loss, weights)
    return losses, logits, layers.add_moves(gradients, caught, network.statistics)


# == Client: line 5 ================================================================================


class Broadcast(NamedTuple):
    """Message from the server to every client of a round."""

    weights: Sequence[tf.Tensor]  # w, a tuple of float32 tensors
    round_num: tf.Tensor  # int64, from 1
    memory: tf.Tensor  # float32[slots,d], vectors that a variant keeps; FedAvg's is float32[0,0]


class ClientTask(NamedTuple):
    """Input of a client's training in a round."""

    client: tf.Tensor  # int64
    key: tf.Tensor  # int64[2], of all its randomness in this round
    shard: shards.Shard  # its images uint8[n_k,H,W,channels] and labels int32[n_k]
    examples_to_train: tf.Tensor  # int32, E * n_k; not E, since some variants stop within an epoch
    hparams: dict[str, tf.Tensor]  # of the optimizer, set each round: {"learning_rate": float32}


class ClientMetrics(NamedTuple):
    """Metrics of a client's round, float32 each; metrics.json lists them per client.

    A round's record has means weighted by n_k, of all but the first two: train_loss,
    train_accuracy, train_steps.
    """

    examples: tf.Tensor  # n_k
    finite: tf.Tensor  # 1, or 0 if its update was not finite, and was left out
    loss: tf.Tensor  # of network.loss; mean over its examples, each at the weights of its step
    accuracy: tf.Tensor  # 0..1, likewise
    steps: tf.Tensor  # of SGD


class ClientOutput(NamedTuple):
    """Message from a client to the server."""

    update: Any  # w - w_k, structured like w; the server subtracts its mean
    weight: tf.Tensor  # float32, n_k
    metrics: ClientMetrics
    message: tf.Tensor  # float32[d] of a stateful algorithm; FedAvg's is float32[0]


def count_steps(batch_size: int, size: tf.Tensor, num_examples: tf.Tensor) -> tf.Tensor:
    """Return the number of SGD steps, int32, that cover `num_examples` of a shard, epoch by epoch.

    A full epoch takes ceil(size / batch_size) steps; the last epoch may be partial in a variant.
    """
    batch = batch_size or size
    full_epochs = num_examples // size
    rest = num_examples % size
    return full_epochs * -(-size // batch) + -(-rest // batch)


def build_train_step(
    network: Network, optimizer: Optimizer, differentiate: Callable
) -> Callable[..., tuple]:
    """Return train_step(optimizer_state, weights, x, y, key), a single SGD step.

    train_step returns (optimizer_state, weights, sum of losses, number of correct predictions).
    `differentiate` is loss_and_gradients, or a variant of it.
    """

    @tf.autograph.experimental.do_not_convert  # no loop: nothing to convert
    def train_step(optimizer_state, weights, x, y, key):
        losses, logits, gradients = differentiate(network, weights, x, y, key)
        optimizer_state, weights = optimizer.next(optimizer_state, weights, gradients)
        predicted = tf.argmax(logits, axis=1, output_type=tf.int32)
        num_correct = tf.reduce_sum(tf.cast(tf.equal(predicted, y), tf.float32))
        return optimizer_state, weights, tf.reduce_sum(losses), num_correct

    if not layers.has_max_pooling(network.build_layers()):
        return train_step
    # Keep the whole step, max-pooling and its gradient, in one function of the worker's graph: once
    # it is inlined into the loop, oneDNN may not find the max-pooling that a gradient belongs to.
    return tf.function(train_step, autograph=False, experimental_attributes={NOT_INLINED: True})


def build_local_training(
    network: Network, optimizer: Optimizer, batch_size: int, differentiate: Callable
) -> Callable[[Sequence[tf.Tensor], ClientTask], tuple]:
    """Return local_training(weights, task) -> (w_k, mean loss, accuracy): local SGD of one round.

    Its loops over epochs and batches are in one graph, which the worker runs without Python.
    """
    train_step = build_train_step(network, optimizer, differentiate)
    is_random = layers.are_random(network.build_layers())
    fold_in = tf.random.experimental.stateless_fold_in

    @tf.autograph.experimental.do_not_convert
    def initial_optimizer_state(weights, hparams):
        specs = tf.nest.map_structure(lambda w: tf.TensorSpec(w.shape, w.dtype), weights)
        return optimizer.set_hparams(optimizer.initialize(specs), hparams)

    @tf.function
    def local_training(weights, task):  # line 5: w_k <- w after local_epochs of SGD on batches
        size = tf.size(task.shard.labels)
        optimizer_state = initial_optimizer_state(weights, task.hparams)
        loss_sum = 0.0
        num_correct = 0.0
        # local_epochs iterations; in a variant that cuts the work, the last epoch may be partial
        for epoch in tf.range(-(-task.examples_to_train // size)):
            epoch_key = fold_in(task.key, tf.cast(epoch, tf.int64))
            shuffled = tf.random.experimental.stateless_shuffle(tf.range(size), epoch_key)
            order = shuffled[: task.examples_to_train - epoch * size]  # in FedAvg all of it
            for start in tf.range(0, tf.size(order), batch_size or size):
                tf.autograph.experimental.set_loop_options(parallel_iterations=1)  # saves memory
                batch = order[start : start + (batch_size or size)]
                x = to_input(tf.gather(task.shard.images, batch))
                y = tf.gather(task.shard.labels, batch)
                # Only Dropout and similar layers use the key of a step.
                step_key = fold_in(epoch_key, tf.cast(start, tf.int64)) if is_random else epoch_key
                optimizer_state, weights, loss, correct = train_step(
                    optimizer_state, weights, x, y, step_key
                )
                loss_sum += loss
                num_correct += correct
        num_examples = tf.cast(task.examples_to_train, tf.float32)
        return weights, loss_sum / num_examples, num_correct / num_examples

    return local_training


def fedavg_client(
    network: Network,
    optimizer: Optimizer,
    batch_size: int,
    differentiate: Callable = loss_and_gradients,
) -> Callable[[Broadcast, ClientTask], ClientOutput]:
    """Return client_update(broadcast, task) -> ClientOutput, FedAvg's client [1, ClientUpdate]."""
    local_training = build_local_training(network, optimizer, batch_size, differentiate)

    def client_update(broadcast, task):
        trained, loss, accuracy = local_training(broadcast.weights, task)
        update = tuple(w - w_k for w, w_k in zip(broadcast.weights, trained, strict=True))
        size = tf.size(task.shard.labels)
        n_k = tf.cast(size, tf.float32)
        steps = tf.cast(count_steps(batch_size, size, task.examples_to_train), tf.float32)
        metrics = ClientMetrics(
            examples=n_k,
            finite=1.0,  # leave_out_nonfinite checks it
            loss=loss,
            accuracy=accuracy,
            steps=steps,
        )
        return ClientOutput(update, n_k, metrics, tf.zeros([0]))

    return client_update


def leave_out_nonfinite(client_update: Callable) -> Callable[[Broadcast, ClientTask], ClientOutput]:
    """Wrap a client: a non-finite update becomes 0, with weight 0.

    Means of metrics, and the memory of stateful algorithms, leave out clients with finite = 0.
    """

    def wrapped(broadcast, task):
        output = client_update(broadcast, task)
        tensors = tf.nest.flatten(output.update)
        finite = tf.reduce_all([tf.reduce_all(tf.math.is_finite(tensor)) for tensor in tensors])
        return output._replace(
            update=tf.nest.map_structure(lambda u: tf.where(finite, u, 0), output.update),
            weight=tf.where(finite, output.weight, 0),
            metrics=output.metrics._replace(finite=tf.cast(finite, tf.float32)),
        )

    return wrapped


def build_client(experiment: Experiment) -> Callable[[Broadcast, tf.Tensor], ClientOutput]:
    """Return train_client(broadcast, id) -> ClientOutput, which reads a shard and trains on it."""
    config = experiment.config
    image_shape = experiment.network.image_shape
    parts = experiment.parts
    # `fedavg_parts`, below, gives FedAvg's parts: build_client_update is fedavg_client with network
    # and batch size bound.
    client_update = leave_out_nonfinite(parts.build_client_update(parts.client_optimizer))
    # With --workers the path is relative: on each host, to the worker's working directory.
    folder = experiment.shard_folder
    if not config.run.single_worker:
        folder = Path(folder.name)

    def train_client(broadcast, client_id):
        shard = shards.read_shard(folder, client_id, image_shape)
        task = ClientTask(
            client=client_id,
            key=client_key(config.seed, client_id, broadcast.round_num),
            shard=shard,
            examples_to_train=config.training.local_epochs * tf.size(shard.labels),
            # Config.effective has replaced None by the default rate.
            hparams={"learning_rate": tf.constant(config.training.client_lr)},
        )
        return client_update(broadcast, task)

    return tf.autograph.experimental.do_not_convert(train_client)


# == Server: lines 3, 4 and 6, and the round =======================================================
# TFF's build_weighted_fed_avg is usually given the clients' images in each round, and spends most
# of its time on copying them. This round takes client ids, and is made of the same parts of TFF.


def sample_clients(config: Config, round_num: int) -> list[int]:
    """Line 3: draw clients without replacement, as a function of (seed, round).

    They are sorted, because the last bits of a sum depend on its order.
    """
    rng = np.random.default_rng([config.seed, round_num])
    num_clients = config.partitioning.num_clients
    m = config.cohort_size  # clients_per_round, or K where that is 0
    return sorted(rng.choice(num_clients, m, replace=False).tolist())


# TFF spends about 1 ms and some memory on each of its clients, so we give it chunks of our clients,
# if the aggregator allows it. The number of chunks does not depend on that of cores, because the
# last bits of a sum depend on how it is divided.
NUM_CHUNKS = 32


def make_chunks(clients: Sequence[int], sizes: np.ndarray, most: int | None) -> list[np.ndarray]:
    """Group clients into at most `most` chunks int64[g] with similar numbers of examples.

    `sizes` has the n_k of all K clients. With `most` None, each client is a chunk of its own.
    """
    if most is None or len(clients) <= most:
        return [np.array([client], np.int64) for client in clients]
    chunks: list[list[int]] = [[] for _ in range(most)]
    fullness = [(0, chunk) for chunk in range(most)]  # a heap: the emptiest comes first
    for client in sorted(clients, key=lambda client: (-sizes[client], client)):
        num_examples, chunk = heapq.heappop(fullness)
        chunks[chunk].append(client)
        heapq.heappush(fullness, (num_examples + int(sizes[client]), chunk))
    return [np.array(sorted(chunk), np.int64) for chunk in chunks]


class ChunkOutput(NamedTuple):
    """Message from a chunk of g clients to the server."""

    update: Any  # the mean of the clients' updates by their weights
    weight: tf.Tensor  # float32, the sum of their weights
    metrics: tf.Tensor  # float32[g,r], a row of ClientMetrics for each client
    messages: tf.Tensor  # float32[g,d] of a stateful algorithm, or float32[g,0]


@tf.autograph.experimental.do_not_convert
def add_weighted(update_sum: Any, update: Any, weight: Any) -> Any:
    """Return update_sum + weight * update, for nested structures of tensors."""
    return tf.nest.map_structure(lambda s, u: s + weight * u, update_sum, update)


def average_updates(
    train_client: Callable, parts: Parts
) -> Callable[[Broadcast, tf.Tensor], ChunkOutput]:
    """Return train_chunk(broadcast, clients int64[g]) -> ChunkOutput, which averages updates.

    Updates are summed as they are computed, so their memory does not grow with the clients' number.
    """

    @tf.function
    def train_chunk(broadcast, clients):  # line 4: for each client k in S
        g = tf.size(clients)
        update_sum = tf.nest.map_structure(lambda spec: tf.zeros(spec.shape), parts.update_spec)
        weight_sum = 0.0
        metrics = tf.TensorArray(tf.float32, g, element_shape=[len(parts.metrics_type._fields)])
        messages = tf.TensorArray(tf.float32, g, element_shape=[parts.message_size])
        for place in tf.range(g):
            tf.autograph.experimental.set_loop_options(parallel_iterations=1)
            output = train_client(broadcast, clients[place])
            update_sum = add_weighted(update_sum, output.update, output.weight)
            weight_sum += output.weight
            metrics = metrics.write(place, tf.stack(output.metrics))
            messages = messages.write(place, output.message)
        # line 6, within the chunk
        mean = tf.nest.map_structure(lambda s: tf.math.divide_no_nan(s, weight_sum), update_sum)
        return ChunkOutput(mean, weight_sum, metrics.stack(), messages.stack())

    return train_chunk


class ServerProgress(NamedTuple):
    """What is kept in the slot "client_work" of TFF's state: the round and a variant's memory."""

    round: tf.Tensor  # int64, rounds done; within a round, its own number
    memory: tf.Tensor  # float32[slots,d] of a stateful algorithm; FedAvg's is float32[0,0]


class RoundSteps(NamedTuple):
    """TFF computations of a round, and its initial state."""

    initialize: Computation  # -> TFF's LearningAlgorithmState, at SERVER
    begin_round: Computation  # ServerProgress -> that of the next round
    train: Computation  # (weights, ServerProgress, clients int64[g]) -> ChunkOutput
    aggregate: tff.templates.AggregationProcess  # of the chunks' updates
    finalize: tff.learning.templates.FinalizerProcess  # the server optimizer's step


CHUNKS_TYPE = tff.FederatedType(tff.TensorType(np.int64, [None]), tff.CLIENTS)


def build_steps(parts: Parts, experiment: Experiment) -> RoundSteps:
    """Build the computations of a round from the parts."""
    initial = ModelWeights(experiment.initial_weights, ())
    train_chunk = parts.build_train_chunk(build_client(experiment), parts)
    memory_shape = parts.memory.shape if parts.memory else (0, 0)

    @tff.tensorflow.computation
    def initial_weights():
        return tf.nest.map_structure(tf.constant, initial)

    @tff.tensorflow.computation
    def round_0():
        return ServerProgress(tf.constant(0, tf.int64), tf.zeros(memory_shape))

    @tff.tensorflow.computation
    def begin_round(progress):
        return progress._replace(round=progress.round + 1)

    weights_type = initial_weights.type_signature.result
    progress_type = round_0.type_signature.result

    @tff.tensorflow.computation(weights_type, progress_type, tff.TensorType(np.int64, [None]))
    def train(weights, progress, clients):
        broadcast = Broadcast(tuple(weights.trainable), progress.round, progress.memory)
        return ChunkOutput(*train_chunk(broadcast, clients))

    chunk_type = train.type_signature.result
    # FedAvg: the weighted mean, and SGD with rate 1.
    aggregate = parts.aggregator.create(chunk_type.update, chunk_type.weight)
    finalize = tff.learning.templates.build_apply_optimizer_finalizer(
        parts.server_optimizer,
        weights_type,
        # TFF's default; no loop: nothing to convert
        tf.autograph.experimental.do_not_convert(tff.learning.templates.reject_non_finite_update),
    )

    @tff.federated_computation
    def initialize():
        weights = tff.federated_eval(initial_weights, tff.SERVER)  # line 1
        progress = tff.federated_eval(round_0, tff.SERVER)
        state = State(
            global_model_weights=weights,
            distributor=(),
            client_work=progress,
            aggregator=aggregate.initialize(),
            finalizer=finalize.initialize(),
        )
        return tff.federated_zip(state)

    return RoundSteps(initialize, begin_round, train, aggregate, finalize)


def fedavg_round(steps: RoundSteps) -> Computation:
    """Return next_round(state, chunks) -> (state, measurements, client metrics float32[m,r]).

    `chunks` come from make_chunks. `state` is TFF's LearningAlgorithmState: global weights, (),
    ServerProgress, aggregator state, server optimizer state.
    """

    @tff.federated_computation(steps.initialize.type_signature.result, CHUNKS_TYPE)
    def next_round(state, chunks):
        progress = tff.federated_map(steps.begin_round, state.client_work)
        weights = tff.federated_broadcast(state.global_model_weights)
        sent = (weights, tff.federated_broadcast(progress), chunks)
        trained = tff.federated_map(steps.train, sent)  # lines 4 and 5, and 6 within each chunk
        mean = steps.aggregate.next(state.aggregator, trained.update, trained.weight)  # line 6
        new = steps.finalize.next(state.finalizer, state.global_model_weights, mean.result)
        next_state = State(new.result, (), progress, mean.state, new.state)
        metrics = gather(trained.metrics)  # the chunks' rows, in one matrix at the server
        return tff.federated_zip(next_state), mean.measurements, metrics

    return next_round


def train_cohort(
    worker: Any, experiment: Experiment, state: State, clients: Sequence[int]
) -> tuple[State, list[dict[str, Any]], Any]:
    """Lines 4 to 6: train clients from the weights in `state`, and aggregate.

    `worker` comes from start_workers: TFF's worker here, or those of several hosts.
    Returns the next state, a dict of metrics per client in the order of their ids, and the
    aggregator's measurements. Without an update that can be used, the weights stay as they are,
    except in a private run.
    """
    round_num = int(state.client_work.round) + 1
    progress = state.client_work._replace(round=np.int64(round_num))
    same_weights = state._replace(client_work=progress)
    chunks = [
        chunk
        for clients_of_host in worker.assign(clients)  # one list, unless there are several hosts
        for chunk in make_chunks(
            clients_of_host, experiment.partition.sizes, experiment.parts.num_chunks
        )
    ]
    if not chunks:  # with dropout or a deadline it can happen that no client reports
        return same_weights, [], None
    names = experiment.parts.metrics_type._fields
    name = f"round {round_num}"
    # The worker executes process.next; of several hosts, each does so up to the sum of its chunks.
    next_state, measured, metrics = worker.run_round(name, experiment.process, state, chunks)
    reports = records.name_reports(chunks, metrics, names)
    # A private round steps by its noise, whatever the clients sent.
    if not experiment.config.is_private and not any(report["finite"] for report in reports):
        return same_weights, reports, None
    return next_state, reports, measured


def everyone(clients: list[int], round_num: int) -> list[int]:
    """Return the clients that report; in FedAvg, all that were drawn."""
    return clients


def only_global(evaluation: Evaluation, state: State) -> Evaluation:
    """Return the evaluation of the global model, the only model of FedAvg."""
    return evaluation


class Parts(NamedTuple):
    """The parts of a federated algorithm; `fedavg_parts` gives FedAvg's.

    Most variants are a function change(parts, experiment) -> parts that replaces or wraps some of
    them; variants/__init__.py lists all, in the order in which they apply.
    """

    sample_clients: Callable[[int], list[int]]  # round -> the clients that get the weights
    client_optimizer: Optimizer
    build_client_update: Callable[[Optimizer], Callable]  # client optimizer -> client_update
    build_train_chunk: Callable  # (train_client, parts) -> train_chunk(broadcast, clients)
    num_chunks: int | None  # see make_chunks
    aggregator: tff.aggregators.WeightedAggregationFactory  # for the chunks' updates
    server_optimizer: Optimizer
    build_round: Callable[[RoundSteps], Computation]  # -> next_round
    train_cohort: Callable  # (worker, experiment, state, clients) -> (state, reports, measured)
    find_reporting: Callable[[list[int], int], list[int]]  # (clients drawn, round) -> who reports
    update_spec: Any  # tf.TensorSpecs of ClientOutput.update
    update_bytes: int  # size of an update when it is sent
    metrics_type: type[Any]  # ClientMetrics, or a variant with more fields
    extend_evaluation: Callable[[Evaluation, State], Evaluation]  # (global model's, state)
    # The rest is for variants; FedAvg leaves the defaults.
    memory: Any = None  # a stateful algorithm's, with .shape (slots, d): variants/stateful.py
    message_size: int = 0  # of ClientOutput.message
    message_bytes: int = 0  # additional bytes that a client receives, and as many that it sends
    kept_parameters: int = 0  # those that stay at the client, and do not travel
    work: float = 1.0  # a client's training in a round; 1 is local_epochs epochs
    shard_passes: int = 0  # additional gradients over a client's whole shard, per round
    callbacks: tuple[Callback, ...] = ()  # before and after each round
    note: str = ""  # for captions, such as "arithmetic of secure sums only"
    notices: tuple[str, ...] = ()  # what the user should know before the run begins
    simulate_seconds: Callable[[list[int], int], float] | None = None  # (clients drawn, round)
    extra_evaluations: dict[str, Callable[[], OtherImages]] = {}  # beside the test set, by name


def fedavg_parts(experiment: Experiment) -> Parts:
    """The parts of FedAvg [1, Algorithm 1]."""
    training = experiment.config.training
    return Parts(
        sample_clients=partial(sample_clients, experiment.config),
        # task.hparams sets the rate again each round, as schedules need.
        client_optimizer=tff.learning.optimizers.build_sgdm(training.client_lr),
        build_client_update=partial(
            fedavg_client, experiment.network, batch_size=training.batch_size
        ),
        build_train_chunk=average_updates,
        num_chunks=NUM_CHUNKS,
        # The server subtracts the mean from w: w - sum_k (n_k / n) (w - w_k) = sum_k (n_k / n) w_k.
        aggregator=tff.aggregators.MeanFactory(no_nan_division=True),
        # No loop: nothing for AutoGraph to convert.
        server_optimizer=without_autograph(tff.learning.optimizers.build_sgdm(training.server_lr)),
        build_round=fedavg_round,
        train_cohort=train_cohort,
        find_reporting=everyone,
        update_spec=tuple(tf.TensorSpec(w.shape) for w in experiment.initial_weights),
        update_bytes=4 * experiment.num_parameters,  # float32
        metrics_type=ClientMetrics,
        extend_evaluation=only_global,
    )


@pinned_keras_settings()
def build_process(experiment: Experiment) -> tff.templates.IterativeProcess:
    """Build TFF's iterative process; each step of it is a round."""
    tf.get_logger().setLevel("CRITICAL")  # some of TFF's aggregators log hundreds of lines
    steps = build_steps(experiment.parts, experiment)
    next_round = experiment.parts.build_round(steps)
    return tff.templates.IterativeProcess(steps.initialize, next_round, next_is_multi_arg=True)


# == Experiment: what a configuration stands for, resolved once ====================================


def find_model(name: str) -> Callable[[], list[tf.keras.layers.Layer]]:
    """Return the function that builds the layers of a named model, or of FILE.py:FUNCTION."""
    if name not in choices.MODELS:
        return models.load_own(name)
    function = choices.MODELS[name].function
    return import_function(function) if function else build_lean_cnn


@pinned_keras_settings()
def make_network(training: Training, dataset: Dataset) -> Network:
    """Return the network for these data. Raises UserError for custom layers that cannot work."""
    name = training.model
    build_hidden_layers = find_model(name)
    network = Network(name, build_hidden_layers, dataset.image_shape, dataset.num_classes)
    if name in choices.MODELS:
        return network
    own = own_models.inspect_own(
        name, build_hidden_layers, dataset.image_shape, dataset.num_classes
    )
    return network._replace(**own._asdict(), takes_statistics=training.batch_norm != "refuse")


def make_initial_weights(network: Network, config: Config) -> tuple[np.ndarray, ...]:
    """Return the initial global weights, from the configured file or the seed."""
    model = build_model(network, config.seed)
    file = config.training.initial_model
    return tuple(layers.read_weights(file, model) if file else model.get_weights())


@dataclass(frozen=True)
class Experiment:
    """A resolved run: configuration, data, split, network and the parts of the algorithm."""

    config: Config  # effective: default rates filled in, unused fields at their defaults
    dataset: Dataset  # whose test images are those held out, with --holdout or --validation
    partition: Partition
    network: Network
    initial_weights: tuple[np.ndarray, ...]  # line 1, one float32 array per tensor
    choice_hashes: dict[str, str]  # field -> hash of what is chosen; --resume compares them
    # Added by the rest of `build_experiment`, which needs the fields above:
    parts: Parts | None = None  # FedAvg's, as the flags change them
    notices: Sequence[str] = ()  # what the user should know before the run begins
    # None until `prepare` has made them:
    process: Any = None  # TFF's iterative process, one step of which is a round
    evaluate: Callable[[ModelWeights], Evaluation] | None = None  # on the test set
    train_client: Callable[[Broadcast, tf.Tensor], ClientOutput] | None = None  # for --save-clients
    host_folders: dict[str, Any] | None = None  # host -> its folder, of other machines that train

    def images_of_client(self, images: np.ndarray, client: int) -> np.ndarray:
        """Return images uint8[n,H,W,channels] as this client sees them.

        Some partitions rotate them or add noise.
        """
        config = self.config
        change_images = config.chosen("partition").change_images
        if not change_images:
            return images
        num_clients = config.partitioning.num_clients
        fields = config.fields_of_choice("partition")
        return import_function(change_images)(images, client, num_clients, config.seed, **fields)

    @property
    def num_parameters(self) -> int:
        """The number of model parameters, d."""
        return sum(weights.size for weights in self.initial_weights)

    def evaluate_state(self, state: State) -> Evaluation:
        """Evaluate the global model of a state; variants add evaluations of more models."""
        evaluation = self.evaluate(state.global_model_weights)
        return self.parts.extend_evaluation(evaluation, state)

    # variants/ and harness/ do not import this file; they call the next methods instead.

    def build_predictor(self) -> Predictor:
        """Build predict(weights, images, labels), for models other than the global one."""
        return build_predictor(self.network)

    def build_evaluator(self, dataset: Dataset) -> Callable[[ModelWeights], Evaluation]:
        """Build evaluate(weights) on the test images of other data than the run's own."""
        return build_evaluator(self.network, dataset)

    def loss_and_gradients(
        self, weights: Sequence[tf.Tensor], x: tf.Tensor, y: tf.Tensor, key: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, Sequence[tf.Tensor]]:
        """Return (losses, logits, gradients of the mean loss) of a batch at these weights."""
        return loss_and_gradients(self.network, weights, x, y, key)

    def shard_gradient(self, weights: Any, task: ClientTask) -> Any:
        """Return the gradient over the task's whole shard at these weights."""
        x = to_input(task.shard.images)
        return self.loss_and_gradients(weights, x, task.shard.labels, task.key)[2]

    def build_tuner(self, parts: Parts) -> Callable[[Sequence[Any], int, int], Any]:
        """Build tune(weights, client, round) -> weights, a client's local training in this process.

        They are NaN if it diverges. It trains as `parts` say, which may be others than the run's.
        """
        # With the default workers the path of the shards is absolute, as in this process.
        here = self.config.replace(workers=Run().workers)
        train_client = build_client(replace(self, config=here, parts=parts))
        train = tf.function(train_client, autograph=False)

        def tune(weights, client_id, round_num):
            tensors = tuple(map(tf.constant, weights))
            broadcast = Broadcast(tensors, tf.constant(round_num, tf.int64), tf.zeros([0, 0]))
            output = train(broadcast, tf.constant(client_id, tf.int64))
            if not output.metrics.finite:  # its update is 0, as if nothing had happened
                return tuple(np.full(w.shape, np.nan, np.float32) for w in tensors)
            return tuple(w - u for w, u in zip(tensors, output.update, strict=True))

        return tune

    def broadcast(self, state: State | None) -> Broadcast:
        """Return the broadcast after `state`, or the first one for None; for --save-clients."""
        if state is None:
            memory_shape = self.parts.memory.shape if self.parts.memory else (0, 0)
            weights = self.initial_weights
            progress = ServerProgress(np.int64(0), np.zeros(memory_shape, np.float32))
        else:
            weights = state.global_model_weights.trainable
            progress = state.client_work
        return Broadcast(
            tuple(map(tf.constant, weights)),
            tf.constant(progress.round + 1, tf.int64),
            tf.constant(progress.memory, tf.float32),
        )

    def build_model(self) -> tf.keras.Model:
        """Build the Keras model; its weights, those of seed 0, are to be replaced."""
        return build_model(self.network, seed=0)

    def build_saved_model(self, weights: ModelWeights) -> tf.keras.Model:
        """Build the Keras model to save, with TFF's ModelWeights."""
        return build_saved_model(self.network, weights)

    @property
    def shard_folder(self) -> Path:
        """Folder of the shard files, which `prepare` writes.

        Its name contains the hash of the split, so that shards of another split are never read.
        """
        return shards.folder_of(self.config.run.cache, self.partition.digest)


def apply_changes(changes: Sequence[Any], changed: Container[str], value: Any, context: Any) -> Any:
    """Apply those changes of a table whose fields are set, in the order of the table.

    With --byzantine 3, for example, CHANGES calls adversity.attack(parts, experiment). `changed`
    are the fields that are not at their defaults; a change is function(value, context) -> value.
    """
    for change in changes:
        if any(field in changed for field in change.fields):
            value = import_function(change.function)(value, context)
    return value


def write_shards(experiment: Experiment) -> None:
    """Write the shard file of each client, unless an intact one exists."""
    train = experiment.dataset.train
    folder = shards.make_folder(experiment.shard_folder)
    for client, indices in enumerate(experiment.partition.indices):
        images = experiment.images_of_client(train.images[indices], client)
        shards.write_shard(folder, client, images, train.labels[indices])


def check_experiment(experiment: Any) -> None:
    """Raise UserError for something else than an Experiment, such as a configuration."""
    if not isinstance(experiment, Experiment):
        raise UserError(
            f"experiment={experiment!r:.60} is not an experiment; give fl.build_experiment(config)"
        )


def prepare(experiment: Experiment) -> Experiment:
    """Write the shards, check the hosts, and build the process and the evaluator.

    Raises:
        UserError: this machine or a host lacks something, the model cannot be trained, or a metric
            of --metrics cannot be computed.
    """
    check_experiment(experiment)
    check_clock()  # a .keras file cannot store dates before 1980: fail now, not at the end
    check_temporary_folder()
    host_folders = check_hosts(experiment.config.run)
    write_shards(experiment)
    extra = {name: find() for name, find in experiment.parts.extra_evaluations.items()}
    evaluate = build_evaluator(experiment.network, experiment.dataset, extra)
    own_metrics = experiment.config.run.metrics
    if own_metrics:
        import_function("evaluations:check_metrics")(own_metrics, experiment.dataset.test.labels)
        evaluate = import_function("evaluations:with_metrics")(evaluate, own_metrics)
    return replace(
        experiment,
        process=build_process(experiment),
        evaluate=evaluate,
        train_client=tf.function(build_client(experiment), autograph=False),
        host_folders=host_folders,
    )


# == Rounds: line 2 ================================================================================


class RoundOutcome(NamedTuple):
    """Result of a round."""

    state: State  # from which the next round starts
    record: RoundRecord
    evaluation: Evaluation


def run_rounds(
    experiment: Experiment,
    state: State | None = None,
    callbacks: Sequence[Callback] = (),
    folder: RunFolder | None = None,
) -> Iterator[RoundOutcome]:
    """Train, and yield the outcome of each round.

    TFF's worker lives as long as the generator. Errors are raised by its first `next()`, not by
    this call.

    Args:
        experiment: from build_experiment.
        state: state to continue from; None starts with round 1.
        callbacks: called before and after each round, in addition to those of the parts.
        folder: the run's folder, for the worker's log and the callbacks; a private run notes in it
            which rounds it has begun.

    Raises:
        UserError: an argument is invalid, or `prepare` raises it.
        RunFailed: a round cannot be completed.
    """
    check_experiment(experiment)
    check_callbacks(callbacks)
    if experiment.process is None:
        experiment = prepare(experiment)
    config = experiment.config
    parts = experiment.parts
    simulate_seconds = parts.simulate_seconds
    all_callbacks = CallbackList([*parts.callbacks, *callbacks])
    log = folder.log if folder else os.devnull
    # What TFF sees as clients: chunks, or clients where the aggregator takes each by itself. A
    # single one has the worker's threads for itself, which may change the last bits.
    clients_at_once = min(config.cohort_size, parts.num_chunks or config.cohort_size)
    with start_workers(experiment, clients_at_once, log) as worker:
        if state is None:
            state = worker.call("round 0", experiment.process.initialize)  # line 1
        first = int(state.client_work.round) + 1
        all_callbacks.before_run(folder, first)
        for round_num in range(first, config.training.rounds + 1):  # line 2
            if not all_callbacks.before_round(round_num):
                return
            start = time.perf_counter()
            cohort = parts.sample_clients(round_num)  # line 3
            reporting = parts.find_reporting(cohort, round_num)
            state, reports, measured = parts.train_cohort(
                worker, experiment, state, reporting
            )  # lines 4 to 6
            evaluation = experiment.evaluate_state(state)
            record = records.make_record(
                round_num,
                reports,
                evaluation,
                parts.metrics_type._fields,
                dropped=len(cohort) - len(reporting),
                measured=measured,
                seconds=round(time.perf_counter() - start, 3),
                simulated_seconds=simulate_seconds(cohort, round_num) if simulate_seconds else None,
                **records.communication_cost(experiment, len(cohort), len(reporting)),
                **worker.measured_bytes(),
            )
            # `release` returns what may be published: of a private run, a small part.
            outcome = RoundOutcome(state, all_callbacks.release(record), evaluation)
            goes_on = all_callbacks.after_round(outcome)
            yield outcome
            if not goes_on:
                return


# == Evaluation ====================================================================================

EVALUATION_BATCH = 1000
Predictor = Callable[..., tuple[np.ndarray, np.ndarray]]


@pinned_keras_settings()
def build_predictor(network: Network) -> Predictor:
    """Return predict(weights, images, labels) -> (predictions, cross-entropies float32) per image.

    Predictions have the labels' dtype. `weights` are TFF's ModelWeights; None evaluates those of
    the previous call again.
    """
    model = build_model(network, seed=0)
    batch_shape = [None, *network.image_shape]
    signature = [tf.TensorSpec(batch_shape, tf.float32), tf.TensorSpec([None], tf.int32)]

    @tf.function(autograph=False, input_signature=signature)
    def evaluate_batch(x, y):
        logits = model(x, training=False)
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(y, logits)
        return tf.argmax(logits, axis=1), losses

    # Trace it now: once a later `build_process` has created layers in graphs of its own, this model
    # cannot be traced any more.
    evaluate_batch.get_concrete_function()

    def predict(weights, images, labels):
        if weights is not None:
            layers.assign_weights(model, weights)
        found = []
        for start in range(0, len(labels), EVALUATION_BATCH):
            batch = slice(start, start + EVALUATION_BATCH)
            y = tf.constant(labels[batch], tf.int32)
            found.append(evaluate_batch(to_input(images[batch]), y))
        predictions = np.concatenate([predicted for predicted, _ in found])
        losses = np.concatenate([loss for _, loss in found])
        return predictions.astype(labels.dtype), losses

    return predict


def build_evaluator(
    network: Network, dataset: Dataset, others: dict[str, OtherImages] | None = None
) -> Callable[[ModelWeights], Evaluation]:
    """Return evaluate(weights) -> Evaluation on the whole test set, of TFF's ModelWeights.

    `others` maps names to further images. The accuracy on them becomes a column of that name,
    unless they define columns of their own (OtherImages.measure).
    """
    predict = build_predictor(network)

    @pinned_keras_settings()
    def evaluate(weights: ModelWeights) -> Evaluation:
        test = dataset.test
        predictions, losses = predict(weights, test.images, test.labels)
        correct = {}
        columns: dict[str, float] = {}
        for name, other in (others or {}).items():
            correct[name] = predict(None, other.images, other.labels)[0] == other.labels
            if other.measure:
                columns |= other.measure(correct[name])
            else:
                columns[name] = float(np.mean(correct[name]))
        return Evaluation(
            loss=float(losses.mean(dtype=np.float64)),
            accuracy=float(np.mean(predictions == test.labels)),
            labels=test.labels,
            predictions=predictions,
            num_classes=dataset.num_classes,
            extra_accuracies=columns,
            correct=correct,
        )

    return evaluate


# == Main: an experiment is built, run, and saved ==================================================


def find_notices(experiment: Experiment, given: dict[str, Any]) -> list[str]:
    """Collect the notices to show before the run.

    `given` has all fields as the user gave them, but with absolute paths.
    Those of a private run leave out what depends on the clients' images.
    """
    config = experiment.config
    dataset = experiment.dataset
    partition = experiment.partition
    settled = given | {"num_clients": config.partitioning.num_clients}  # the natural ones counted
    on_data = [
        *dataset.notices,
        *notices.partition_notices(partition, len(dataset.train.labels)),
    ]
    return [
        *provenance.edited_notices(),
        *preset_flags.preset_notices(config, Config()),
        *conditions.unused_notices(settled, Config.defaults(), config.tables),
        *conditions.learning_notices(config.to_dict(), config.tables),
        *notices.find_weak_settings(experiment),
        *origin.origin_notices(config.training.initial_model, dataset),
        *([] if config.is_private else on_data),
        *experiment.parts.notices,
    ]


def hash_choices(config: Config, network: Network) -> dict[str, str]:
    """Hash each choice by field; a resumed run must have the same hashes."""
    # The data set has a hash of its own.
    rows = {field: config.chosen(field) for field in choices.TABLES if field != "dataset"}
    for field, name in own_fields(config.to_dict()).items():
        rows[field] = import_function(name, field)
    if config.has_own_model:
        rows["model"] = network.build_hidden_layers
    if config.training.initial_model:
        rows["initial_model"] = layers.hash_weights(config.training.initial_model)
    return provenance.hash_rows(rows)


def build_experiment(
    config: Config,
    dataset: Dataset | None = None,
    partition: Partition | Sequence[Any] | dict[Any, Any] | None = None,
) -> Experiment:
    """Resolve a configuration into an Experiment.

    Args:
        config: the configuration, from parse or Config().replace.
        dataset: used instead of the configured data set.
        partition: indices of training images, as in `run`, used instead of the configured split; or
            the configured split itself, from make_partition.

    Raises:
        UserError: the settings, or settings and data, are incompatible.
    """
    saved_config.check_config(config)
    if not isinstance(partition, Partition | None):
        config = config.replace(**given_splits.fields_of_indices(partition, config.run.cache))
    paths = config.absolute_paths()
    given = config.to_dict() | paths
    # Default rates are filled in; fields that nothing reads are at their defaults.
    with_defaults = config.effective(**paths)
    if dataset is None:
        dataset = load_dataset(with_defaults.data)
    check_dataset(dataset)
    check_held_out(with_defaults, dataset)
    # What depends on the data: the number of natural clients, and then the noise for an epsilon.
    config = apply_changes(SETTLED, with_defaults.changed(), with_defaults, dataset)
    if isinstance(partition, Partition):
        given_splits.check_given_partition(partition, config, dataset)
        split = partition
    else:
        split = make_partition(dataset, config)
    if config.run.baselines:
        baselines.check_num_classes(dataset.num_classes)
    origin.check_private_origin(config, dataset, load_dataset)
    network = make_network(config.training, dataset)
    experiment = Experiment(
        config=config,
        dataset=dataset,
        partition=split,
        network=network,
        initial_weights=make_initial_weights(network, config),
        choice_hashes=hash_choices(config, network),
    )
    changed = config.changed()
    with_loss = replace(experiment, network=apply_changes(LOSSES, changed, network, experiment))
    parts = apply_changes(CHANGES, changed, fedavg_parts(with_loss), with_loss)
    with_parts = replace(with_loss, parts=parts)
    return replace(with_parts, notices=find_notices(with_parts, given))


@pinned_keras_settings()
def build_saved_model(network: Network, weights: ModelWeights) -> tf.keras.Model:
    """Build the Keras model to save, with TFF's ModelWeights.

    It takes raw pixels [n,H,W,channels] in 0..255, so that users need not know our scaling.
    """
    model = build_model(network, seed=0)
    layers.assign_weights(model, weights)
    pixels = tf.keras.Input(network.image_shape)
    return tf.keras.Sequential([pixels, tf.keras.layers.Rescaling(1 / 255), *model.layers])


def build_prepared(
    config: Config, dataset: Dataset | None = None, partition: Any = None
) -> Experiment:
    """Build and prepare an experiment; the arguments are those of build_experiment."""
    return prepare(build_experiment(config, dataset, partition))


@command_line.one_at_a_time()
def run(
    config: Config,
    *,
    dataset: Dataset | None = None,
    partition: Sequence[Any] | dict[Any, Any] | None = None,
    model: Callable[[], list[tf.keras.layers.Layer] | tf.keras.Model] | None = None,
    on_round: Callable[[RoundRecord], Any] | None = None,
    resume_hint: str = "",
) -> Result:
    """Run one experiment, from data to figures. Ctrl-C keeps the completed rounds.

    Args:
        config: the configuration.
        dataset: a data set from build_dataset, used instead of the configured one.
        partition: indices of training images, a list or array for each client (a dict's are in the
            order of its sorted keys), used instead of the configured split.
        model: a function that returns new Keras layers, or a new Keras model, on each call; used
            instead of the configured network.
        on_round: called with the record of each new round, after it is saved; returning False, or
            raising StopRun, ends the run with all its files.
        resume_hint: of a comparison, whose runs continue with it; such a run prints a summary only.

    Raises:
        UserError: invalid input.
        RunFailed: a round cannot be completed.
    """
    saved_config.check_single(config)
    if on_round is not None and not callable(on_round):
        raise UserError(f"on_round={on_round!r:.60} is not a function; give one of a RoundRecord")
    if partition is not None:
        config = config.replace(**given_splits.fields_of_indices(partition, config.run.cache))
    if model is not None:
        config = config.replace(model=give(model))
    experiment = build_prepared(config, dataset)
    run_flags = experiment.config.run
    given = ""  # arguments to give again, where only a call can resume the run
    given += ", dataset=dataset" if dataset is not None else ""
    given += f", model={short_name(config.training.model)}" if model is not None else ""
    if partition is not None and (given or in_notebook()):
        given += ", partition=partition"
    opened = RunFolder.open(experiment, resume_hint, given)
    with output.quietly(run_flags.quiet), opened as folder:
        saver = saving.open_run(folder, experiment)
        earlier = saver.records
        callbacks = saving.make_callbacks(saver, experiment, on_round)
        if histories.stops_early(earlier, run_flags):
            print_line(histories.describe_end(earlier, run_flags))
        else:
            rounds = run_rounds(experiment, saver.state, callbacks, folder)
            with saver.kept_if_stopped():
                for _ in output.show_progress(rounds, experiment.config, len(earlier)):
                    pass
        result = saver.finish(is_compared=bool(resume_hint))  # only comparisons pass a hint
        if run_flags.baselines:
            has_all = baselines.run_baselines(
                experiment, result, folder, build_prepared, saver.has_new_round
            )
            return replace(result, is_cut=not has_all)
    return result


def compare(config: Config | Sequence[Config], *, dataset: Dataset | None = None) -> Path:
    """Run every compared setting and seed; return the folder with the table and the figure.

    If the time limit passes (--time-limit), table and figure are of the runs that are done; the
    same call continues.

    Args:
        config: a configuration with `compare` or `seeds`, or a list of configurations, a row each;
            the first one's `seeds`, `runs` and `name` count.
        dataset: a data set from build_dataset, used instead of the configured one.

    Raises:
        UserError: the configuration compares nothing, or one of the runs is invalid.
    """
    # harness/ does not import this file; it is given the functions that it calls.
    return commands.compare(config, dataset, load_dataset, build_experiment, run)


@dataclass(frozen=True)
class TrainedModel:
    """The global model of a finished run."""

    network: Network
    weights: ModelWeights

    def evaluate(self, dataset: Dataset) -> Evaluation:
        """Evaluate it on the test images of a data set."""
        return build_evaluator(self.network, dataset)(self.weights)

    def build_keras_model(self) -> tf.keras.Model:
        """Build it as a Keras model: raw pixels [n,H,W,channels] in 0..255 to logits."""
        return build_saved_model(self.network, self.weights)


def read_trained(file: Path, training: Training, dataset: Dataset) -> TrainedModel:
    """Read the weights that a run with these settings saved in a .keras file."""
    network = make_network(training, dataset)
    weights = layers.read_weights(str(file), build_model(network, seed=0))
    return TrainedModel(network, ModelWeights(weights, []))


def evaluate_saved(config: Config) -> Path:
    """Evaluate a run's model, named by config.run.evaluate, on the configured data.

    Returns the folder with metrics.json and the figures.

    Raises:
        UserError: the run does not exist or is not finished, a flag would change its training, or
            the images or labels are unlike those that the model was trained on.
    """
    return evaluating.evaluate_saved(config, load_dataset, read_trained)


def load(folder: str | Path, dataset: Dataset | None = None) -> SavedRun:
    """Read a run's folder: configuration, history, weights, split, model.

    `dataset` is the run's own, if that was given to fl.run. What a run that was stopped lacks is
    refused when it is asked for.

    Raises:
        UserError: the folder has no run.
    """
    return SavedRun(folder, Config(), load_dataset, read_trained, dataset)


def main(config: Config) -> None:
    """Run the command that the flags select."""
    saved_config.check_config(config)
    if config.run.version or config.run.list:  # from Python; the script answers before its imports
        listing.answer(config.run, Config())
        return
    configuration.check_paths(config)
    with output.quietly(config.run.quiet):
        made: Path | Result | list[dict[str, Any]]
        if config.run.predict:
            made = predict_pictures(load(config.run.predict), config.run)
        elif config.run.evaluate:
            made = evaluate_saved(config)
        elif overlaid_folders(config.comparison.compare):  # --compare runs/a,runs/b
            made = overlay.overlay(config, Config())
        elif compared_rows(config):  # --compare fedavg,fedprox, or --seeds 3
            made = compare(config)
        else:
            made = run(config)
    if config.run.json:
        print_line(saving.to_json_line(made))


if __name__ == "__main__":
    gc.freeze()  # what is imported stays
    gc.enable()
    command_line.run_or_exit(main, parsed_config)
    gc.freeze()  # spares a last collection: the process ends
