#!/usr/bin/env python3
# /// script
# requires-python = "==3.11.*"
# dependencies = [
#   "dp-accounting==0.4.3", "grpcio==1.74.0", "matplotlib==3.11.2", "numpy==1.25.2",
#   "scikit-learn==1.7.2", "scipy==1.9.3", "tensorflow==2.14.1", "tensorflow_federated==0.87.0",
#   "tqdm==4.70.1", "tyro==1.0.17",
# ]
# [tool.uv]  # versions that TFF's own pins forbid or lost
# override-dependencies = ["jax==0.4.20", "jaxlib==0.4.20", "typing-extensions==4.16.0"]
# ///
"""Federated learning on MNIST: FedAvg on non-IID clients through TensorFlow Federated (TFF).

    config -> data -> partition -> shards -> federated process -> rounds -> evaluation -> plots
                                     ^            | client ids and weights |
                                     +-- read by TFF's worker, which trains --+

Federated averaging [1, Algorithm 1], and the function that does each line:

    1  w <- initial weights                                     # build_model
    2  for round t = 1, 2, ...:                                 # run_rounds
    3      S <- clients_per_round of the num_clients clients    # sample_clients
    4      for each client k in S, on its own shard:            # build_chunk, in TFF's worker
    5          w_k <- w after local_epochs of SGD on batches    # build_local_training
    6      w <- sum over k in S of (n_k / n) w_k                # build_chunk, build_process

n_k is the number of examples on client k, n the number on all clients in S.

    python federated_learning.py                                  # 10 clients, 5 rounds
    python federated_learning.py --partition shards --rounds 50   # McMahan's non-IID split
    python federated_learning.py --compare fedavg,fedprox         # one plot, same split and seed
    python federated_learning.py --help                           # every flag

Randomness is a pure function of (seed, round, client): the same command gives the same weights,
bit for bit. variants/ holds what needs a flag other than the default; harness/ holds what keeps a
run: files, worker, command line.

[1] McMahan et al. 2017, Communication-Efficient Learning of Deep Networks from Decentralized
    Data (AISTATS)
[2] Yurochkin et al. 2019, Bayesian Nonparametric Federated Learning of Neural Networks (ICML)
The papers of the other algorithms are listed in variants/__init__.py.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import heapq
import json
import math
import os
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from harness.command_line import attempt, check_resumed, read_flags, read_saved
from harness.fields import Clients, Count, Rate, Rounds, SomeClients, Theme, UserError, real, whole
from harness.options import Comparison, Run, compared, identity
from variants import options
from variants.presets import PresetName, expand, preset_fields, published

import numpy as np

# == Config: one experiment, by theme; the command line is made from it ============================


@dataclass(frozen=True)
class Data(Theme):
    """What is learned, and what the global model is evaluated on."""

    dataset: Literal["mnist", "digits"] = "mnist"
    """mnist: data/mnist.npz beside the script. digits: scikit-learn's 1,797 8x8 digits, a run of
    seconds."""
    data: str = ""
    """Other data of 28x28 images in place of MNIST: an .npz with Keras' keys x_train, y_train,
    x_test, y_test, or a folder with the four IDX files of MNIST's kin, gzipped or not (or the
    environment variable FL_DATA)."""
    data_name: str = ""
    """What plots and lines call the data of --data, such as Fashion-MNIST."""
    transpose: bool = False
    """Exchange rows and columns of the images of --data, as EMNIST's files need it."""
    holdout: whole(0, 50_000) = 0
    """Training images held out, and evaluated on in place of the test set: for choosing
    hyper-parameters."""


@dataclass(frozen=True)
class Partitioning(Theme):
    """How the training images are split over the clients."""

    partition: options.PartitionName = "dirichlet"
    """iid: shuffled and dealt out. shards: sorted by label, `shards_per_client` pieces a client
    [McMahan et al. 2017]. dirichlet: each label's images in proportions drawn from Dirichlet(alpha)
    [Yurochkin et al. 2019]. capped-dirichlet: the same, but a client that has N / K images gets no
    more, as NIID-Bench's program has it [Li et al. 2022; --min-images 10 there]. client-dirichlet:
    each client draws its own label mix, and all have one size [Hsu et al. 2019; FedDyn's
    "balanced"]. labels-per-client: images of exactly `labels_per_client` labels each, every label
    with as many holders. random-labels: client i holds label i mod C and others at random,
    NIID-Bench's "#C = k" [Li et al. 2022]. quantity: sizes by a power law, labels IID.
    dirichlet-quantity: sizes drawn from Dirichlet(alpha), labels IID [Li et al. 2022]. feature:
    IID, but each client's images are rotated and made noisy in its own way; Li et al.'s is
    --rotation 0 with noise. natural: as the data's own array client_train says, the clients with
    the most images first. file: as `partition_file` says."""
    num_clients: Clients = 10
    """Clients, K."""
    min_images: SomeClients = 0
    """Images that every client holds at least: the split is drawn again until it is so, a function
    of the seed. 0: a client that got none is given one of the client with the most."""
    alpha: real(0.001, 1e6) = 0.5
    """Dirichlet concentration, of each of its parameters; smaller is more skewed. Used by the
    splits that are called dirichlet."""
    shards_per_client: Count = 2
    """Label-sorted shards that a client gets. Used by shards."""


@dataclass(frozen=True)
class Training(Theme):
    """What clients and server do in a round, and how often."""

    model: Literal["mlp", "2nn", "cnn", "small-cnn", "lenet"] = "small-cnn"
    """The clients' network. mlp: 784-128-10. 2nn, cnn: McMahan's. small-cnn: two convolutions.
    lenet: NIID-bench's."""
    rounds: Rounds = 5
    """Rounds of communication, T."""
    clients_per_round: SomeClients = 0
    """Clients drawn for each round, m; 0: all."""
    sampling: Literal["fixed", "poisson"] = "fixed"
    """fixed: clients_per_round of them without replacement. poisson: each by itself, so many on
    average."""
    local_epochs: Count = 3
    """Passes that a client makes over its shard in a round, E."""
    batch_size: SomeClients = 16
    """Examples in a local batch, B; 0: the client's whole shard."""
    client_lr: Rate = 0.0
    """Learning rate of the clients' SGD; 0: the algorithm's own, which is 0.2 but 0.1 of scaffold
    and 0.0005 of mimelite: the momentum that mimelite holds still through a round suits few local
    steps, not the default's 1,100."""
    server_lr: Rate = 0.0
    """Learning rate of the server's optimizer; 0: the algorithm's own, which for plain averaging is
    1."""


@dataclass(frozen=True)
class Config(Theme):
    """One experiment.

    Every field of its themes is a flag (`clients_per_round` is `--clients-per-round`).
    """

    seed: whole(0, 2**31 - 1) = 0
    """Seed of the split, the initial weights, the sampling of clients and the order of the batches.
    """
    preset: PresetName = "none"
    """The flags of a known experiment; flags beside it win. fast: Adam on the clients, fewer
    epochs. mcmahan: 100 clients, C = 0.1, to 97 % (2nn: 87 rounds, noniid 664) or 99 % (cnn: 18,
    206), table 1 [McMahan et al. 2017]. niid-bench: 10 clients, 50 rounds of 10 epochs: iid 99.1 %,
    dirichlet 98.9, two labels 96.9, one 19 [Li et al. 2022, as Flower's baseline runs it]. reddi:
    adaptive servers, the rates of EMNIST in table 8 [Reddi et al. 2021]. seed-readme: the dense
    model that this project started from, 96.7 % claimed."""
    data: Data = Data()
    partitioning: Partitioning = Partitioning()
    splits: options.Splits = options.Splits()
    training: Training = Training()
    optimization: options.Optimization = options.Optimization()
    aggregation: options.Aggregation = options.Aggregation()
    privacy: options.Privacy = options.Privacy()
    adversity: options.Adversity = options.Adversity()
    comparison: Comparison = Comparison()
    run: Run = Run()

    def __post_init__(self) -> None:
        """Raise UserError where fields do not go together."""
        super().__post_init__()
        options.check_pairs(self.flat(), default=vars(Training) | vars(Partitioning))
        compared(self)

    def but(self, **changes: Any) -> Config:
        """Return a copy with the fields of these names replaced; a preset's fields come first,
        those beside it win."""
        return super().but(**preset_fields(changes.get("preset"), parse) | changes)

    def only_used(self, **changes: Any) -> Config:
        """Return a copy with these fields replaced, and each that then has no effect at its
        default."""
        return self.but(**changes | options.without_unused(self.flat() | changes, Config().flat()))

    @property
    def partition(self) -> str:
        """The row of PARTITIONERS: a file's name says that it is used."""
        return "file" if self.splits.partition_file else self.partitioning.partition

    @property
    def cohort(self) -> int:
        """Clients that train in a round, m."""
        return self.training.clients_per_round or self.partitioning.num_clients


def parse(words: str | Sequence[str] | None = None) -> Config:
    """Return the configuration that a command line asks for: `words`, or without them the
    terminal's own.

    What is not named is the default, or with --resume that of the run. Raises UserError for a
    mistake.
    """
    words = expand(shlex.split(words) if isinstance(words, str) else words)
    about = __doc__.split("\n")[0]
    config = read_flags(Config, words, None, about)
    if config.run.resume:
        saved = read_saved(config.run.resume, Config())
        config = read_flags(Config, words, saved, about)
        check_resumed(config, saved)
    return config


# before TensorFlow is imported, so that --help and a wrong flag are answered at once
if __name__ == "__main__":
    command = attempt(parse)
    gc.disable()  # going through all that is imported, again and again, would take a second

from harness import comparison, plots, stopping
from harness.command_line import Progress, notice, say
from harness.files import place, read_bytes, write_file, writing
from harness.plots import (
    BLUE,
    ORANGE,
    default_style,
    plot_confusion,
    plot_cost,
    plot_misclassified,
    plot_partition,
)
from harness.program import hash_rows, program, tell_edited
from harness.records import Evaluation, RoundRecord, client_rows, make_record, reached, tell_epsilon
from harness.results import describe, manifest, summarize
from harness.rounds import start_workers
from harness.run_folder import RunFolder, default_name, go_on
from harness.settings import documented_settings
from harness.worker import NOT_INLINED, Worker
from variants import (
    adversity,
    aggregators,
    algorithms,
    baselines,
    datasets,
    layers,
    partitions,
    privacy,
)
from variants.aggregators import Aggregator, Federation, gather
from variants.algorithms import ALGORITHMS, CLIENT_OPTIMIZERS, Algorithm
from variants.datasets import IMAGE_SIDE, Dataset, Split
from variants.partitions import Partitioner

import sklearn.metrics
import tensorflow as tf
import tensorflow_federated as tff
from matplotlib.figure import Figure

# == Data ==========================================================================================

DATASETS = {"mnist": datasets.load_mnist, "digits": datasets.load_digits}


def load_dataset(data: Data) -> Dataset:
    """Return the data set that is asked for, checked.

    Raise UserError where it is missing or not well-formed.
    """
    if data.data:
        dataset = datasets.load_files(place(data.data), data.data_name, data.transpose)
    else:
        dataset = DATASETS[data.dataset]()
    return datasets.hold_out(dataset, data.holdout) if data.holdout else dataset


# == Partition: which images each client holds =====================================================


def split_iid(labels: np.ndarray, num_clients: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Shuffle and deal out: sizes differ by one at most, labels by chance only."""
    return np.array_split(rng.permutation(len(labels)), num_clients)


def split_shards(
    labels: np.ndarray, num_clients: int, rng: np.random.Generator, shards_per_client: int
) -> list[np.ndarray]:
    """Sort by label, cut into K * shards_per_client pieces, deal out at random (McMahan et al.
    2017, section 3)."""
    if num_clients * shards_per_client > len(labels):
        raise UserError(
            f"shards_per_client={shards_per_client} of num_clients={num_clients} are more than the "
            f"{len(labels)} images; choose 1..{len(labels) // num_clients}"
        )
    pieces = np.array_split(np.argsort(labels, kind="stable"), num_clients * shards_per_client)
    dealt = rng.permutation(len(pieces)).reshape(num_clients, shards_per_client)
    return [np.concatenate([pieces[p] for p in row]) for row in dealt]


def split_dirichlet(
    labels: np.ndarray, num_clients: int, rng: np.random.Generator, alpha: float
) -> list[np.ndarray]:
    """Give each label's images to the clients in shares drawn from Dirichlet(alpha) (Yurochkin et
    al. 2019)."""
    owner = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        images = rng.permutation(np.flatnonzero(labels == label))
        shares = rng.dirichlet(np.full(num_clients, alpha))
        cuts = (np.cumsum(shares)[:-1] * len(images)).round().astype(np.int64)
        owner[images] = np.searchsorted(cuts, np.arange(len(images)), side="right")
    return np.split(
        np.argsort(owner, kind="stable"), np.bincount(owner, minlength=num_clients).cumsum()[:-1]
    )


PARTITIONERS = {
    "iid": Partitioner("IID", split_iid),
    "shards": Partitioner(
        "{shards_per_client} shards a client", split_shards, ("shards_per_client",)
    ),
    "dirichlet": Partitioner("Dirichlet({alpha:g})", split_dirichlet, ("alpha",)),
    **partitions.ROWS,
}


@dataclass(frozen=True)
class Partition:
    """parts: K arrays int64[n_k] of training indices, disjoint, none empty; counts int64[K,C].

    They cover all images, but where a file says otherwise.
    """

    parts: list[np.ndarray]
    counts: np.ndarray
    filled: int  # clients that had got no image, and were given one
    digest: str  # of the data set and of every client's indices: the shard files' name

    @property
    def sizes(self) -> np.ndarray:
        """Images a client, n_k, int64[K]."""
        return self.counts.sum(axis=1)


def make_partition(dataset: Dataset, config: Config) -> Partition:
    """Return the split of the training images over the clients: a function of data, partition flags
    and seed alone."""
    labels = dataset.train.labels
    clients = config.partitioning.num_clients
    if clients > len(labels):
        raise UserError(
            f"num_clients={clients} exceeds the {len(labels)} training images; choose "
            f"1..{len(labels)}"
        )
    row = PARTITIONERS[config.partition]
    owners = {"owners": dataset.owners} if row.natural else {}
    draw = partial(row.split, labels, clients, **config.pick(row.flags), **owners)
    split, filled = partitions.draw_split(draw, config.seed, config.partitioning.min_images)
    parts = [np.sort(part).astype(np.int64) for part in split]
    # (K, C)
    counts = np.stack([np.bincount(labels[part], minlength=dataset.num_classes) for part in parts])
    digest = hashlib.sha256(dataset.digest.encode())
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part.tobytes())
    if config.splits.partition_file:
        partitions.check_claims(config.splits.partition_file, dataset.digest, counts)
    if row.shift:
        shifted_by = [
            config.pick(row.shift_flags),
            config.seed,
            program()["files"]["variants/partitions.py"],
        ]
        digest.update(json.dumps(shifted_by, sort_keys=True).encode())
    return Partition(parts, counts, filled, digest.hexdigest()[:16])


# == Shards: each client's images in a file of its own, read only by the worker that trains ========

RECORD_BYTES = IMAGE_SIDE * IMAGE_SIDE + 1  # 784 pixels and the label
FOOTER_BYTES = 8  # FarmHash64 of the records, by which the worker knows a damaged file


def write_shards(train: Split, partition: Partition, config: Config) -> Path:
    """Return the folder of the shard files, `<client>.bin`: uint8[n_k,785] and a footer. Write
    those not there whole.

    Its name carries the partition's hash, so a shard of another split is never read.
    """
    folder = place(config.run.cache).absolute() / f"shards-{partition.digest}"
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for client, part in enumerate(partition.parts):
        images = as_seen(config, train.images[part], client)
        records = np.concatenate(
            [images.reshape(len(part), -1), train.labels[part, None]], axis=1
        ).ravel()
        content = records.tobytes() + fingerprint(records).numpy().tobytes()
        path = folder / f"{client}.bin"
        with writing(path):
            if not path.exists() or read_bytes(path) != content:
                write_file(path, content)
    return folder


def as_seen(config: Config, images: np.ndarray, client: int) -> np.ndarray:
    """Return images uint8[n,28,28] as the client sees them: as they are, but where the partition
    shifts features."""
    clients = config.partitioning.num_clients
    row = PARTITIONERS[config.partition]
    return (
        row.shift(images, client, clients, config.seed, **config.pick(row.shift_flags))
        if row.shift
        else images
    )


def fingerprint(data: Any) -> Any:
    """Return FarmHash64 of uint8[n], as uint8[8]; the same here and in the worker.

    Against accidents, not attackers.
    """
    return tf.fingerprint(data[tf.newaxis])[0]


def read_shard(path: Any) -> Any:
    """Return uint8[n_k,785] of a shard file, in the worker's graph; fails where the file is missing
    or damaged."""
    content = tf.io.decode_raw(tf.io.read_file(path), tf.uint8)
    # of any length
    records = content[:-FOOTER_BYTES]
    footer = tf.pad(content, [[FOOTER_BYTES, 0]])[-FOOTER_BYTES:]
    whole = tf.reduce_all(tf.equal(fingerprint(records), footer))
    checked = tf.debugging.Assert(whole, ["damaged shard file (deleted, it is made again):", path])
    with tf.control_dependencies([checked]):
        return tf.reshape(records, [-1, RECORD_BYTES])


# == Model: Keras layers from float32[n,28,28,1] in 0..1 to C logits ===============================


def conv(filters: int, padding: str = "same") -> list[Any]:
    """Return a 5x5 convolution that keeps the size ("valid": that loses the border), then 2x2
    max-pooling."""
    return [
        tf.keras.layers.Conv2D(filters, 5, padding=padding, activation="relu"),
        tf.keras.layers.MaxPool2D(),
    ]


def dense(*units: int, activation: str = "relu") -> list[Any]:
    """Return fully connected layers of the flattened input."""
    return [tf.keras.layers.Flatten(), *(tf.keras.layers.Dense(n, activation) for n in units)]


MODELS: dict[str, Callable[[], list[Any]]] = {  # the layers before the logits
    "mlp": lambda: dense(128),
    "2nn": lambda: dense(200, 200),  # McMahan et al. 2017, section 3
    "cnn": lambda: conv(32) + conv(64) + dense(512),  # the same
    "small-cnn": lambda: conv(16) + conv(32) + dense(128),
    "lenet": lambda: (
        conv(6, "valid") + conv(16, "valid") + dense(120, 84)
    ),  # Li et al. 2022, section V
}


def build_layers(name: str, num_classes: int) -> list[Any]:
    """Return the layers of the model's row and the logits, without weights yet."""
    hidden = MODELS[name]()
    layers.check_new(name, hidden)
    return [*hidden, tf.keras.layers.Dense(num_classes)]


@documented_settings()
def build_model(name: str, num_classes: int, seed: int) -> Any:
    """Return a Keras model with its initial weights, a function of the seed alone: by Keras' own
    initializers, which are Glorot uniform and zero biases where a layer names none."""
    model = tf.keras.Sequential(
        [tf.keras.Input((IMAGE_SIDE, IMAGE_SIDE, 1)), *build_layers(name, num_classes)]
    )
    layers.check_layers(name, model)
    model.set_weights(layers.initial_weights(model, seed))
    return model


@documented_settings()
def build_whole_model(name: str, num_classes: int, weights: Any) -> Any:
    """Return the Keras model that is saved: of raw pixels [n,28,28,1] in 0..255, with TFF's
    ModelWeights."""
    model = build_model(name, num_classes, seed=0)
    weights.assign_weights_to(model)
    pixels = tf.keras.Input((IMAGE_SIDE, IMAGE_SIDE, 1))
    return tf.keras.Sequential([pixels, tf.keras.layers.Rescaling(1 / 255), *model.layers])


def predict(name: str, num_classes: int, weights: Sequence[Any], x: Any, key: Any) -> Any:
    """Return logits float32[n,C] of the model's layers with the tensors `weights` as their
    variables, in a graph.

    It is for training: layers such as Dropout drop, by chance that follows from `key` int64[2].

    TFF's functional_model_from_keras does this inside a tf.function of its own, whose border hides
    from oneDNN which max-pooling a gradient belongs to: 1.4 x the time.
    """
    given = iter(weights)
    with tf.variable_creator_scope(lambda _, **about: next(given)):
        for position, layer in enumerate(build_layers(name, num_classes)):
            x = layers.train_layer(layer, x, key, position)
    return x


def differentiate(
    name: str, num_classes: int, weights: Sequence[Any], x: Any, y: Any, key: Any
) -> tuple[Any, Any, Any]:
    """Return (gradients of the mean cross-entropy, cross-entropies float32[n] in nats, logits) of a
    batch."""
    with tf.GradientTape() as tape:
        tape.watch(weights)
        logits = predict(name, num_classes, weights, x, key)
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(y, logits)
        loss = tf.reduce_mean(losses)
    return tape.gradient(loss, weights), losses, logits


def to_input(pixels: Any) -> Any:
    """Turn uint8[n,784] or [n,28,28] into float32[n,28,28,1] in 0..1."""
    return tf.reshape(tf.cast(pixels, tf.float32) / 255, [-1, IMAGE_SIDE, IMAGE_SIDE, 1])


# == What a round is made of =======================================================================


class Report(NamedTuple):
    """What a client tells of its round, float32 each; its loss and accuracy are over the examples
    as it trained."""

    examples: Any  # n_k
    loss: Any  # mean cross-entropy in nats
    accuracy: Any
    steps: Any  # of SGD, tau_k
    finite: Any  # 1, or 0 where its update was left out


class ClientState(NamedTuple):
    """The part of the process's state that is the clients': the rounds done, and the algorithm's
    rows float32[r,d]."""

    round: Any
    memory: Any


class GroupResult(NamedTuple):
    """What leaves a group of clients: `update` is the mean of w - w_k weighted by n_k, `weight` the
    sum of the n_k.

    For an aggregator that needs rows, they are float32[g,d] and float32[g], a row a client. `steps`
    is the mean number of local steps, weighted. `reports` float32[g,r] has a Report a row,
    `sent_back` float32[g,d] what the memory gets, or float32[g,0]. Clients whose weights are not
    finite are in the reports alone. A group of one is a client.
    """

    update: Any
    weight: Any
    steps: Any
    reports: Any
    sent_back: Any


def weighted_mean(federation: Federation) -> Any:
    """Line 6: sum_k (n_k / n) (w - w_k), by which the server's w - 1.0 * mean becomes sum_k (n_k /
    n) w_k."""
    return tff.aggregators.MeanFactory(no_nan_division=True)


AGGREGATORS = {"mean": Aggregator(weighted_mean, "sums"), **aggregators.ROWS}


# == The round, inside out: local training, the client, the group of clients, the process, the loop


def build_local_training(
    training: Training, num_classes: int, optimizer: Any, correct: Callable
) -> Callable:
    """Return local_training(initial, records, key, sent, rate, budget) -> (weights, means): a
    client's SGD.

    It is one graph loop. `initial` are the trainable weights, `records` uint8[n_k,785], `key`
    int64[2], `rate` the learning rate, `budget` the examples to train on: E * n_k, or less for a
    straggler. `means` are loss and accuracy over the examples as they were trained on, float32.
    correct(gradients, weights, initial, sent) is an algorithm's place to change the gradients;
    `optimizer` is TFF's, which begins anew each time.
    """

    @tf.autograph.experimental.do_not_convert  # what has no loop is built in half the time
    def begin(initial, rate):
        state = optimizer.initialize(
            tf.nest.map_structure(lambda w: tf.TensorSpec(w.shape, w.dtype), initial)
        )
        return optimizer.set_hparams(state, {"learning_rate": rate})

    @tf.autograph.experimental.do_not_convert
    def step(state, weights, initial, sent, x, y, key):
        gradients, losses, logits = differentiate(training.model, num_classes, weights, x, y, key)
        gradients = correct(gradients, weights, initial, sent)
        hits = tf.cast(tf.equal(tf.argmax(logits, axis=1, output_type=tf.int32), y), tf.float32)
        return (
            *optimizer.next(state, weights, gradients),
            tf.reduce_sum(losses),
            tf.reduce_sum(hits),
        )

    network = build_layers(training.model, num_classes)
    random = layers.are_random(network)
    if any(isinstance(layer, tf.keras.layers.MaxPool2D) for layer in network):
        # In a graph without the loop oneDNN matches every max-pooling with its gradient, in the
        # loop only by luck.
        step = tf.function(step, autograph=False, experimental_attributes={NOT_INLINED: True})

    @tf.function
    def local_training(
        initial, records, key, sent, rate, budget
    ):  # line 5: w_k <- w after local_epochs of SGD
        pixels = records[:, :-1]
        labels = tf.cast(records[:, -1], tf.int32)
        size = tf.shape(records)[0]
        batch = training.batch_size or size
        state = begin(initial, rate)
        weights = initial
        loss_sum = correct_sum = 0.0
        for epoch in tf.range(-(-budget // size)):
            epoch_key = tf.random.experimental.stateless_fold_in(key, tf.cast(epoch, tf.int64))
            order = tf.random.experimental.stateless_shuffle(tf.range(size), epoch_key)
            order = order[: budget - epoch * size]
            for start in tf.range(0, tf.size(order), batch):
                tf.autograph.experimental.set_loop_options(parallel_iterations=1)
                batch_rows = order[start : start + batch]
                x = to_input(tf.gather(pixels, batch_rows))
                y = tf.gather(labels, batch_rows)
                step_key = epoch_key  # of no use but to a model with Dropout or the like
                if random:
                    step_key = tf.random.experimental.stateless_fold_in(
                        epoch_key, tf.cast(start, tf.int64)
                    )
                state, weights, losses, hits = step(state, weights, initial, sent, x, y, step_key)
                loss_sum += losses
                correct_sum += hits
        seen = tf.cast(budget, tf.float32)
        return weights, {"loss": loss_sum / seen, "accuracy": correct_sum / seen}

    return local_training


def build_client(config: Config, num_classes: int, shards: Path, algorithm: Algorithm) -> Callable:
    """Return train(initial, memory, round_num, client) -> (update, weight, report, sent back): a
    client's round.

    `update` is a tuple of initial - trained, all 0 and with weight 0 where it is not finite;
    `weight` float32 n_k; what is sent back float32[d] for the algorithm's memory, or float32[0].
    """
    training = own_values(config)
    clients = config.partitioning.num_clients
    optimizer = CLIENT_OPTIMIZERS[config.optimization.client_optimizer]
    optimizer = optimizer.build(training.client_lr, config.optimization.client_momentum)
    local_training = build_local_training(training, num_classes, optimizer, algorithm.decayed)
    behaviour = adversity.build_behaviour(config.adversity, clients, num_classes, config.seed)

    def train(initial, memory, round_num, client):
        records = read_shard(
            tf.strings.join([os.fsencode(shards), "/", tf.strings.as_string(client), ".bin"])
        )
        seed = tf.constant(config.seed, tf.int64)
        key = tf.random.experimental.stateless_fold_in(tf.stack([seed, client]), round_num)
        size = tf.shape(records)[0]
        budget = behaviour.budget(size * training.local_epochs, key)
        records = behaviour.records(client, records)

        def gradient():  # of the whole shard at the round's first weights
            x = to_input(records[:, :-1])
            y = tf.cast(records[:, -1], tf.int32)
            return differentiate(training.model, num_classes, initial, x, y, key)[0]

        schedule = config.optimization.client_schedule
        now = tf.cast(round_num, tf.float32)
        rate = training.client_lr * algorithms.schedule(schedule, now, config.optimization)
        sent = algorithm.sent(memory, client)
        trained, means = local_training(initial, records, key, sent, rate, budget)
        update = tuple(old - new for old, new in zip(initial, trained, strict=True))
        steps = tf.cast(algorithms.count_steps(training.batch_size, size, budget), tf.float32)
        sent_back = algorithm.sent_back(sent, initial, trained, steps, rate, gradient)
        if algorithm.normalized:
            update = tuple(u / algorithm.work(steps) for u in update)
        update = behaviour.update(client, update, key)
        finite = tf.reduce_all([tf.reduce_all(tf.math.is_finite(u)) for u in update])
        # a client that diverged has no weight either
        update = tuple(tf.where(finite, u, 0) for u in update)
        examples = tf.cast(size, tf.float32)
        report = Report(
            examples, means["loss"], means["accuracy"], steps, tf.cast(finite, tf.float32)
        )
        return update, tf.where(finite, examples, 0), report, sent_back

    return tf.autograph.experimental.do_not_convert(train)


def build_group(train_client: Callable, stacked: bool, row_size: int, work: Callable) -> Callable:
    """Return train_clients(initial, memory, round_num, clients int64[g]) -> GroupResult, one client
    after the other.

    Updates are summed as they come, so that memory and messages do not grow with their number, or
    stacked as rows. work(steps) is what local steps count in their mean.
    """

    @tf.function
    def train_clients(initial, memory, round_num, clients):  # line 4: for each client k in S
        count = tf.size(clients)
        total = tuple(tf.zeros_like(w) for w in initial)
        weight = 0.0
        steps_sum = 0.0
        size = sum(w.shape.num_elements() for w in initial) if stacked else 0
        reports = tf.TensorArray(tf.float32, count, element_shape=[len(Report._fields)])
        given = tf.TensorArray(tf.float32, count, element_shape=[row_size])
        rows = tf.TensorArray(tf.float32, count, element_shape=[size])
        for position in tf.range(count):
            tf.autograph.experimental.set_loop_options(parallel_iterations=1)
            update, examples, report, sent_back = train_client(
                initial, memory, round_num, clients[position]
            )
            if stacked:
                rows = rows.write(position, algorithms.flatten(update))
            else:
                total = tuple(t + examples * u for t, u in zip(total, update, strict=True))
            weight += examples
            steps_sum += examples * work(report.steps)
            reports = reports.write(position, tf.stack(report))
            given = given.write(position, sent_back)
        steps_mean = tf.math.divide_no_nan(steps_sum, weight)
        reports = reports.stack()
        if stacked:
            columns = Report(*tf.unstack(reports, axis=1))
            update = rows.stack()
            weight = columns.examples * columns.finite
        else:
            update = tuple(tf.math.divide_no_nan(t, weight) for t in total)
        return GroupResult(update, weight, steps_mean, reports, given.stack())

    return train_clients


@documented_settings()
def build_process(config: Config, num_classes: int, shards: Path, sizes: np.ndarray) -> Any:
    """Return a TFF IterativeProcess: next(state, groups) -> (state, measurements, the reports of
    each group).

    `groups` are int64[g] arrays of client ids, a group a client where every update must be seen
    (`group_clients`); `sizes` the n_k of all clients. `state` is a tff LearningAlgorithmState whose
    `client_work` is a ClientState: all randomness of a round comes from (seed, round, client), so
    `next` is a pure function of its arguments.
    """
    # some of TFF's aggregators make hundreds of harmless lines
    tf.get_logger().setLevel("CRITICAL")
    templates = tff.learning.templates
    training = own_values(config)
    algorithm = ALGORITHMS[config.optimization.algorithm](config.optimization, sizes)
    aggregator = AGGREGATORS[config.aggregation.aggregator]
    model = build_model(training.model, num_classes, config.seed)  # line 1: w <- initial weights
    initial = tff.learning.models.ModelWeights(tuple(model.get_weights()), ())
    rows = algorithm.rows()
    stacked = aggregator.needs == "rows"
    row_size = algorithms.check_memory(rows, model.count_params(), config.optimization.algorithm)
    train_client = build_client(config, num_classes, shards, algorithm)
    train_clients = build_group(train_client, stacked, row_size, algorithm.work)
    server = algorithm.server_optimizer(training.server_lr)

    @tff.tensorflow.computation
    def initial_weights():
        return tf.nest.map_structure(tf.constant, initial)

    @tff.tensorflow.computation
    def initial_clients():
        return ClientState(tf.constant(0, tf.int64), tf.zeros([rows, row_size]))

    weights_type = initial_weights.type_signature.result
    clients_type = initial_clients.type_signature.result
    group_type = tff.TensorType(np.int64, [None])

    @tff.tensorflow.computation(clients_type)
    def begin_round(clients):
        return ClientState(clients.round + 1, clients.memory)

    @tff.tensorflow.computation(weights_type, clients_type, group_type)
    def train_group(weights, state, clients):
        return train_clients(tuple(weights.trainable), state.memory, state.round, clients)

    trained_type = train_group.type_signature.result
    factory = aggregator.build(
        Federation(config.cohort, int(sizes.max())), **config.pick(aggregator.flags)
    )
    aggregate = factory.create(trained_type.update, trained_type.weight)
    finalize = templates.build_apply_optimizer_finalizer(server, weights_type)
    after = algorithms.build_server_steps(
        algorithm, server, training.server_lr, initial.trainable, Report
    )

    @tff.federated_computation
    def initialize():
        parts = (
            tff.federated_eval(initial_weights, tff.SERVER),
            (),
            tff.federated_eval(initial_clients, tff.SERVER),
        )
        state = templates.LearningAlgorithmState(
            *parts, aggregate.initialize(), finalize.initialize()
        )
        return tff.federated_zip(state)

    @tff.federated_computation(
        initialize.type_signature.result, tff.FederatedType(group_type, tff.CLIENTS)
    )
    def next_round(state, groups):
        clients = tff.federated_map(begin_round, state.client_work)
        sent = tff.federated_broadcast(state.global_model_weights), tff.federated_broadcast(clients)
        trained = tff.federated_map(train_group, (*sent, groups))
        mean = aggregate.next(state.aggregator, trained.update, trained.weight)  # line 6
        update = mean.result
        optimizer_state = state.finalizer
        if stacked:
            update = tff.federated_map(after.from_row, update)
        if algorithm.normalized:
            steps = tff.federated_mean(trained.steps, trained.weight)
            update = tff.federated_map(after.times, (update, steps))
        if config.optimization.server_schedule != "constant":
            optimizer_state = tff.federated_map(after.set_rate, (optimizer_state, clients))
        reports = trained.reports
        if rows or not config.run.alone:  # what several hosts send comes together at the server
            told = gather(tff.federated_zip((groups, trained.reports, trained.sent_back)))
            clients = tff.federated_map(after.remember, (clients, *told))
            reports = told[1]
        update = tff.federated_map(after.server_step, (update, clients))
        new = finalize.next(optimizer_state, state.global_model_weights, update)
        state = templates.LearningAlgorithmState(new.result, (), clients, mean.state, new.state)
        return tff.federated_zip(state), mean.measurements, reports

    return tff.templates.IterativeProcess(initialize, next_round, next_is_multi_arg=True)


def run_rounds(
    config: Config,
    sizes: np.ndarray,
    process: Any,
    evaluate: Callable,
    state: Any = None,
    journal: Path | None = None,
    **places: Path,
) -> Iterator[tuple[Any, RoundRecord, Evaluation]]:
    """Yield (state, record, evaluation) after each round from that of `state` on; without one, from
    the first.

    `sizes` are the clients' n_k. TFF's worker lives as long as the generator; `places` are its log
    and, for several workers, the folder of the shards; a private run writes in the `journal` what
    it begins. Raises RunFailed where a round cannot be done.
    """
    row = AGGREGATORS[config.aggregation.aggregator]
    clients = config.partitioning.num_clients
    at_once = min(config.cohort, GROUPS.get(row.needs, config.cohort))
    rows_for = ALGORITHMS[config.optimization.algorithm](config.optimization, sizes).rows_for
    with start_workers(config.run, at_once, clients, rows_for, **places) as worker:
        state = worker.call("round 0", process.initialize) if state is None else state
        first = int(state.client_work.round) + 1
        last = config.training.rounds
        # line 2
        for round_num, epsilon in privacy.epsilon_by_round(ledger(config), first, last, journal):
            began = time.perf_counter()
            drawn = sample_clients(config, round_num)  # line 3
            reporting = adversity.drop_out(drawn, config.adversity, clients, config.seed, round_num)
            # lines 4 to 6
            state, told = train_cohort(worker, process, state, reporting, sizes, row)
            evaluation = evaluate(state.global_model_weights)
            counts = (config.cohort, config.cohort) if row.private else (len(drawn), len(reporting))
            sent = traffic(config, state.global_model_weights, *counts)
            seconds = time.perf_counter() - began
            figures = {
                "dropped": len(drawn) - len(reporting),
                "epsilon": epsilon,
                "seconds": round(seconds, 3),
                **sent,
            }
            record = make_record(round_num, told, evaluation, **figures, **worker.wire())
            if row.private:
                record = record.published()
            yield state, record, evaluation
            if reached([record], config.run.target_accuracy):
                return


# == What the round calls: whom it asks, what the server does beside the mean, what is recorded ====


def own_values(config: Config) -> Training:
    """Return the training flags with the algorithm's own rates where none were given, and the
    fields that define it."""
    row = ALGORITHMS[config.optimization.algorithm]
    given = config.training
    client_lr = (
        given.client_lr
        or CLIENT_OPTIMIZERS[config.optimization.client_optimizer].rate
        or row.client_lr
    )
    return given.but(client_lr=client_lr, server_lr=given.server_lr or row.server_lr, **row.fixed)


def sample_clients(config: Config, round_num: int) -> list[int]:
    """Line 3: return the round's clients, a function of (seed, round); sorted, as the sum follows
    the order.

    Under differential privacy they come from the operating system's entropy instead, and are kept
    nowhere.
    """
    secret = (
        AGGREGATORS[config.aggregation.aggregator].private and not config.privacy.public_cohorts
    )
    rng = np.random.default_rng(None if secret else [config.seed, round_num])
    clients = config.partitioning.num_clients
    if config.training.sampling == "poisson":
        return np.flatnonzero(rng.random(clients) < config.cohort / clients).tolist()
    return sorted(rng.choice(clients, config.cohort, replace=False).tolist())


# for any number of cores, so that the sums, and the weights, do not depend on it
GROUPS = {
    "sums": 32,
    "rows": 10,
}


def group_clients(clients: Sequence[int], sizes: np.ndarray, needs: str) -> list[np.ndarray]:
    """Return `clients` as int64[g] arrays: each its own group, or groups of about as many examples
    each.

    TFF keeps a value for each group in memory and spends about a millisecond on it. `sizes` are the
    n_k of all clients, `needs` is what the aggregator must see.
    """
    count = GROUPS.get(needs, len(clients))
    if len(clients) <= count:
        return [np.array([client], np.int64) for client in clients]
    groups: list[list[int]] = [[] for _ in range(count)]
    # a heap: the group with the fewest images comes first
    filled = [(0, number) for number in range(count)]
    for client in sorted(clients, key=lambda client: (-sizes[client], client)):
        images, number = heapq.heappop(filled)
        groups[number].append(client)
        heapq.heappush(filled, (images + int(sizes[client]), number))
    return [np.array(sorted(group), np.int64) for group in groups]


def train_cohort(
    worker: Worker,
    process: Any,
    state: Any,
    clients: Sequence[int],
    sizes: np.ndarray,
    row: Aggregator,
) -> tuple[Any, list[dict[str, Any]]]:
    """Return (state, what each client reported) after a round of these clients, one of nobody
    included.

    A client that is left out, as its update is not finite, is left out everywhere: where TFF sees
    each client by itself its adaptive norms would count one of 0, so the round, a pure function, is
    done again without it.
    """
    groups = [
        group for own in worker.share(clients) for group in group_clients(own, sizes, row.needs)
    ]
    round_num = int(state.client_work.round) + 1
    if row.private and not groups:
        # the sum of nobody gets its noise too: the ledger counts it
        groups = [np.array([], np.int64)]
    if not groups:
        return state._replace(client_work=state.client_work._replace(round=np.int64(round_num))), []
    after, _, reports = worker.round(f"round {round_num}", process, state, groups)
    told = client_rows(groups, reports, Report._fields)
    finite = [report["client"] for report in told if report["finite"]]
    if row.needs == "each" and not row.private and len(finite) < len(told):
        after, _ = train_cohort(worker, process, state, finite, sizes, row)
    return after, told


def ledger(config: Config) -> privacy.Ledger | None:
    """Return the account of what rounds cost of privacy, None where the aggregator does not say."""
    if not AGGREGATORS[config.aggregation.aggregator].private:
        return None
    cohorts = partial(sample_clients, config) if config.privacy.public_cohorts else None
    clients = config.partitioning.num_clients
    sampling = config.training.sampling
    return privacy.Ledger(config.privacy, sampling, config.cohort, clients, cohorts)


def traffic(config: Config, weights: Any, sent: int, reported: int) -> dict[str, int]:
    """Return the bytes of a round in which `sent` clients get the weights and `reported` answer, as
    a network would.

    Down go the weights and the round's number, up an update as the aggregator encodes it and the
    report; beside them what the algorithm's own paper sends, as much as the weights in each
    direction, and an adaptive norm.
    """
    sizes = [math.prod(np.shape(w)) for w in weights.trainable]
    aggregator = AGGREGATORS[config.aggregation.aggregator]
    beside = 4 * sum(sizes) if ALGORITHMS[config.optimization.algorithm].sends_memory else 0
    beside += 4 if aggregator.adaptive else 0
    up = aggregator.num_bytes(sizes) + beside + 4 * len(Report._fields)
    return {"bytes_down": sent * (4 * sum(sizes) + beside + 8), "bytes_up": reported * up}


# == Evaluation ====================================================================================

EVALUATION_BATCH = 1000


@documented_settings()
def build_evaluator(config: Config, dataset: Dataset) -> Callable[[Any], Evaluation]:
    """Return evaluate(weights) -> Evaluation of TFF's ModelWeights on the whole test set."""
    model = build_model(config.training.model, dataset.num_classes, config.seed)
    split = dataset.test
    cuts = range(EVALUATION_BATCH, len(split.labels), EVALUATION_BATCH)
    parts = zip(
        np.split(split.images, cuts), np.split(split.labels.astype(np.int32), cuts), strict=True
    )
    batches = [(to_input(images), tf.constant(labels)) for images, labels in parts]

    @tf.function(autograph=False, reduce_retracing=True)
    def predict_batch(x: Any, y: Any) -> tuple[Any, Any]:
        logits = model(x, training=False)
        return tf.argmax(logits, axis=1), tf.nn.sparse_softmax_cross_entropy_with_logits(y, logits)

    @documented_settings()
    def evaluate(weights: Any) -> Evaluation:
        weights.assign_weights_to(model)
        predicted, losses = map(
            np.concatenate, zip(*[predict_batch(*batch) for batch in batches], strict=True)
        )
        return Evaluation(
            loss=float(losses.mean(dtype=np.float64)),
            accuracy=float(sklearn.metrics.accuracy_score(split.labels, predicted)),
            predictions=predicted.astype(np.uint8),
            confusion=sklearn.metrics.confusion_matrix(
                split.labels, predicted, labels=range(dataset.num_classes)
            ),
        )

    return evaluate


# == Plots: each takes data and returns a matplotlib Figure ========================================


def told(config: Config) -> dict[str, str]:
    """Return what a caption says of a run but for its data, by topic; rows that can be compared by
    their field."""
    training = own_values(config)
    aggregator = AGGREGATORS[config.aggregation.aggregator]
    return {
        "clients": f"{config.partitioning.num_clients} clients, {config.cohort} a round",
        "sampling": "Poisson sampling" if training.sampling == "poisson" else "",
        "partition": partitions.caption(PARTITIONERS[config.partition], config.flat()),
        "algorithm": algorithms.caption(
            config.optimization, training.client_lr, training.server_lr
        ),
        "aggregator": aggregators.caption(aggregator, config.flat(), ledger(config)),
        "model": training.model,
        "training": f"E = {training.local_epochs}, B = {training.batch_size or 'all'}",
        **adversity.captions(config.adversity),
        "seed": comparison.caption(config.seed, config.comparison.seeds),
    }


def caption(config: Config, dataset: Dataset) -> str:
    """Return what a plot was made on, in a line; of what is compared every row."""
    parts = told(config)
    if config.comparison.compare:
        field, names = compared(config)
        rows = [
            told(config.only_used(**{field: name}, compare="", seeds=1))[field] for name in names
        ]
        parts[field] = f"{field}s compared: {'; '.join(rows)}"
    return plots.joined([dataset.name, *parts.values()])


@default_style
def plot_convergence(records: Sequence[RoundRecord], note: str, target: float = 0) -> Figure:
    """Draw loss and accuracy against the round: the global model on the test set, the clients while
    they trained."""
    title = (
        f"Test accuracy {records[-1].test_accuracy:.2%} after round "
        f"{records[-1].round}{tell_epsilon(records[-1])}"
    )
    figure = plots.new_figure(9, 4.2, title, note)
    rounds = [record.round for record in records]
    marker = "o" if len(rounds) <= 50 else None
    for axes, quantity, scale in zip(
        figure.subplots(1, 2), ("loss", "accuracy"), (1, 100), strict=True
    ):
        lines = [("train", ORANGE, "--"), ("test", BLUE, "-")]
        if any(record.clients for record in records):
            own = [
                [scale * row[quantity] for row in record.clients if row["finite"]]
                for record in records
            ]
            low, high = ([pick(values, default=math.nan) for values in own] for pick in (min, max))
            axes.fill_between(
                rounds,
                low,
                high,
                color=ORANGE,
                alpha=0.15,
                lw=0,
                label="clients, lowest to highest",
            )
        else:
            del lines[0]
        for name, color, style in lines:
            values = [scale * getattr(record, f"{name}_{quantity}") for record in records]
            who = "clients while training, mean" if name == "train" else "global model, test set"
            axes.plot(rounds, values, style, color=color, marker=marker, ms=4, label=who)
        plots.whole_rounds(axes)
        plots.plain(axes)
    loss, accuracy = figure.axes
    loss.set_ylabel("cross-entropy (nats)")
    loss.set_yscale("log")  # a first round may be twenty times the last
    loss.legend(frameon=False, fontsize=9)
    accuracy.set_ylabel("accuracy (%)")
    if target:
        accuracy.axhline(
            100 * target, color=plots.GREY, lw=1, ls=":", label=f"target, {100 * target:.4g}%"
        )
        accuracy.legend(handles=accuracy.lines[-1:], frameon=False, fontsize=9)
    return figure


# == Main: the spine ===============================================================================


@dataclass(frozen=True)
class Result:
    """A run's outcome; `evaluation` is that of the last round, `folder` holds its files."""

    folder: Path
    records: list[RoundRecord]
    evaluation: Evaluation
    state: Any


class Experiment(NamedTuple):
    """All that rounds need: run_rounds(config, e.partition.sizes, e.process, e.evaluate)."""

    dataset: Dataset
    partition: Partition
    shards: Path
    process: Any
    evaluate: Callable[[Any], Evaluation]


def rows_in_use(config: Config) -> dict[str, Any]:
    """Return field -> the row of its table that the configuration names."""
    return {
        "model": MODELS[config.training.model],
        "partition": PARTITIONERS[config.partition],
        "algorithm": ALGORITHMS[config.optimization.algorithm],
        "client_optimizer": CLIENT_OPTIMIZERS[config.optimization.client_optimizer],
        "aggregator": AGGREGATORS[config.aggregation.aggregator],
        "attack": adversity.ATTACKS[config.adversity.attack],
    }


def check_rows(config: Config, dataset: Dataset, sizes: np.ndarray) -> None:
    """Raise UserError for rows that do not go together with each other, this model, or these
    clients' n_k."""
    algorithm = ALGORITHMS[config.optimization.algorithm](config.optimization, sizes)
    model = build_model(config.training.model, dataset.num_classes, config.seed)
    algorithms.check_memory(algorithm.rows(), model.count_params(), config.optimization.algorithm)
    if AGGREGATORS[config.aggregation.aggregator].private:
        algorithms.check_private(algorithm)
    next(privacy.epsilon_by_round(ledger(config), 1, 1))  # what the budget does not allow


def prepare(
    config: Config, dataset: Dataset | None = None, partition: Partition | None = None
) -> Experiment:
    """Return the experiment of this configuration, on its own data set and partition where none is
    given."""
    dataset = dataset or load_dataset(config.data)
    partition = partition or make_partition(dataset, config)
    check_rows(config, dataset, partition.sizes)
    shards = write_shards(dataset.train, partition, config)
    # from the folder that a worker on another host runs in
    seen = shards if config.run.alone else Path(shards.name)
    process = build_process(config, dataset.num_classes, seen, partition.sizes)
    return Experiment(dataset, partition, shards, process, build_evaluator(config, dataset))


def run(config: Config) -> Result:
    """Run one experiment, from data to plots.

    Raise UserError for the user's mistakes; Ctrl-C keeps the rounds done.
    """
    config = options.find_files(config)
    dataset = load_dataset(config.data)
    partition = make_partition(dataset, config)
    check_rows(config, dataset, partition.sizes)
    note = caption(config, dataset)
    rounds = config.training.rounds
    result = None
    private = bool(ledger(config))
    split = manifest(dataset, partition, config.partition, config.seed, private)
    name = default_name(config, dataset)
    rows = hash_rows(rows_in_use(config))
    with RunFolder.open(config, name, split, rows) as folder:
        say(f"{note}\n")
        remarks = [*tell_edited(), *published(config), *options.tell_unused(config)]
        if private:
            remarks += privacy.remark(ledger(config), rounds)
        else:
            remarks += [
                *dataset.remarks,
                *partitions.remark(partition.filled, len(dataset.train.labels), partition.sizes),
            ]
        for remark in remarks:
            notice(remark)
        experiment = prepare(config, dataset, partition)
        state, records = folder.load(
            [identity(config), partition.digest], experiment.process.state_type
        )
        if records:
            result = Result(
                folder.path, records, experiment.evaluate(state.global_model_weights), state
            )
        parts = (partition.sizes, experiment.process, experiment.evaluate, state)
        log = folder.log(private)
        over = reached(records, config.run.target_accuracy)
        places = {"log": log, "shards": experiment.shards, "journal": folder.journal}
        going_on = iter(()) if over else run_rounds(config, *parts, **places)
        try:
            for state, record, evaluation in Progress(
                rounds, len(records), timed=not private
            ).follow(going_on):
                folder.save_round(
                    record,
                    state,
                    partial(plot_confusion, evaluation.confusion, note, dataset.classes),
                )
                result = Result(folder.path, [*records, record], evaluation, state)
                say(record.line(rounds))
                if trouble := record.trouble(records, dataset.chance, last=record.round == rounds):
                    notice(f"round {record.round}: {trouble}")
                records = result.records
        except (KeyboardInterrupt, Exception):
            stopping.heard()
            with contextlib.suppress(UserError):  # what stopped the run is what the user must know
                if result:
                    save_result(folder, result, config, experiment, note)
            done = len(result.records) if result else 0
            notice(f"stopped after round {done}; {go_on(folder.path)}")
            raise
        summarize(*save_result(folder, result, config, experiment, note))
        if config.run.baselines:
            tools = baselines.Tools(
                prepare, partial(build_evaluator, config), partial(as_seen, config)
            )
            baselines.worth(
                config, own_values(config), experiment, result, folder, note, tools, log
            )
    return result


def save_result(
    folder: RunFolder, result: Result, config: Config, experiment: Experiment, note: str
) -> tuple[dict, list[Path]]:
    """Write metrics.json, the global model of the last round done, and the plots; return (metrics,
    what is written)."""
    dataset = experiment.dataset
    final = result.evaluation
    weights = result.state.global_model_weights
    note = plots.joined(
        [note, tell_epsilon(result.records[-1], separator=""), folder.program_note()]
    )
    target = config.run.target_accuracy
    about = {
        "dataset": dataset.name,
        "original_mnist": dataset.original,
        "config": config.but(resume="").flat(),
    }
    model = build_whole_model(config.training.model, dataset.num_classes, weights)
    pictures = {
        "client_partition.png": partial(
            plot_partition, experiment.partition.counts, note, dataset.classes
        ),
        "convergence_plot.png": partial(plot_convergence, result.records, note, target),
        "accuracy_by_megabytes.png": partial(plot_cost, result.records, note),
        "confusion_matrix.png": partial(plot_confusion, final.confusion, note, dataset.classes),
        "misclassified.png": partial(
            plot_misclassified, *dataset.test, final.predictions, note, dataset.classes
        ),
    }
    if ledger(config):
        del pictures["client_partition.png"]  # nothing about single clients leaves the run
    metrics = about | describe(weights.trainable, final, result.records, dataset.classes, target)
    return metrics, folder.finish(metrics, model, pictures, is_default_run(result, config, dataset))


def is_default_run(result: Result, config: Config, dataset: Dataset) -> bool:
    """Return whether this is the run without flags, done to its end: README shows its pictures,
    those in images/."""
    usual = Config()
    same = (
        identity(config) == identity(usual)
        and config.partition == usual.partition
        and dataset.original
    )
    elsewhere = (config.run.name, config.run.runs) != (usual.run.name, usual.run.runs)
    whole = (
        len(result.records) == config.training.rounds == Training.rounds
        and not config.run.target_accuracy
    )
    return same and whole and not elsewhere


def compare(config: Config) -> Path:
    """Run every row and seed that `config` compares; return the folder with the table and the plot
    of all."""
    config = options.find_files(config)
    dataset = load_dataset(config.data)
    for remark in options.tell_unused(config):
        notice(remark)
    return comparison.compare(config, caption(config, dataset), partial(check, dataset), run)


def check(dataset: Dataset, config: Config) -> tuple[str, str, dict[str, str]]:
    """Return (a run's default name, its partition's digest, the hashes of its rows).

    Raise UserError for what the run would be refused for.
    """
    partition = make_partition(dataset, config)
    check_rows(config, dataset, partition.sizes)
    return default_name(config, dataset), partition.digest, hash_rows(rows_in_use(config))


def main(config: Config) -> None:
    """Do what a command line asks for."""
    (compare if compared(config) else run)(config)


if __name__ == "__main__":
    gc.freeze()  # what is imported stays
    gc.enable()
    attempt(main, command)
    gc.freeze()  # the process ends: nothing is worth looking for
