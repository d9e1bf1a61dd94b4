#!/usr/bin/env python3
# /// script
# requires-python = "==3.11.*"
# dependencies = [
#   "dp-accounting==0.4.3", "grpcio==1.74.0", "h5py==3.16.0", "matplotlib==3.11.2",
#   "numpy==1.25.2", "scikit-learn==1.7.2", "scipy==1.9.3", "tensorflow==2.14.1",
#   "tensorflow_federated==0.87.0", "tqdm==4.70.1", "tyro==1.0.17",
# ]
# [tool.uv]  # versions that TFF's own pins forbid or lost
# override-dependencies = ["jax==0.4.20", "jaxlib==0.4.20", "typing-extensions==4.16.0"]
# ///
"""Federated learning on MNIST: FedAvg on non-IID clients through TensorFlow Federated (TFF).

    config -> data -> partition -> shards -> federated process -> rounds -> evaluation -> plots

Federated averaging [1, Algorithm 1], and the function that does each line:

    1  w <- initial weights                                     # build_model
    2  for round t = 1, 2, ...:                                 # run_rounds
    3      S <- clients_per_round of the num_clients clients    # sample_clients
    4      for each client k in S, on its own shard:            # build_summed_training
    5          w_k <- w after local_epochs of SGD on batches    # build_local_training
    6      w <- sum over k in S of (n_k / n) w_k                # there, and in build_process

TFF's worker, a process of its own, trains. It gets client ids and weights, and reads the shards, a
file for each client, itself. Letters in comments and docstrings: K clients, m of them in a round;
n_k examples on client k, n on all clients in S; g clients in a chunk (see make_chunks); C labels;
d parameters of the model.

    python federated_learning.py                                  # 10 clients, 5 rounds
    python federated_learning.py --partition shards --rounds 50   # McMahan's non-IID split
    python federated_learning.py --compare fedavg,fedprox         # one plot, same split and seed
    python federated_learning.py --help                           # the themes of the flags

Randomness is a pure function of (seed, round, client), except for the noise and the cohorts of a
private run: the same command gives the same weights, bit for bit. variants/ holds the choices of
the flags, with FedAvg's base class; harness/ holds what keeps a run: files, worker, command line.

[1] McMahan et al. 2017, Communication-Efficient Learning of Deep Networks from Decentralized
    Data (AISTATS)
[2] Yurochkin et al. 2019, Bayesian Nonparametric Federated Learning of Neural Networks (ICML)
The papers of the other algorithms are listed in variants/__init__.py.
"""

from __future__ import annotations

import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
if __name__ == "__main__" and HERE not in sys.path:  # as PYTHONSAFEPATH has it
    sys.path.insert(0, HERE)

# First: from here on Ctrl-C gives no traceback.
from harness import command_line, listing, trust, usage

# isort: split
import contextlib
import gc
import hashlib
import heapq
import json
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from harness.command_line import print_line, warn
from harness.fields import (
    ConfigGroup,
    Count,
    CountOrZero,
    NumClients,
    OptionalRate,
    Rounds,
    UserError,
    choice,
    float_range,
    int_range,
)
from harness.flags import split_off
from harness.options import Comparison, Run, identity
from harness.sweep import compared_rows, join_compared, overlaid_folders
from variants import options, presets

import numpy as np

# == Config: one experiment; the command line is made from it ======================================


@dataclass(frozen=True)
class Data(ConfigGroup):
    """The images that are learned, and those that the global model is evaluated on."""

    dataset: choice(options.DATASETS) = "mnist"
    """A data set that is there already."""
    data: str = ""
    """Other images in place of MNIST, of any size, grey or in colours: an .npz with the arrays
    x_train, y_train, x_test and y_test, such as CIFAR-10's, or train_images and so on, such as
    MedMNIST's; or a folder with four IDX files, such as Fashion-MNIST's, gzipped or not. The
    environment variable FL_DATA does the same."""
    data_name: str = ""
    """What plots and lines call the data of --data, such as Fashion-MNIST."""
    transpose: bool = False
    """Exchange rows and columns of the images of --data; EMNIST's files need that."""
    holdout: int_range(0, 50_000) = 0
    """Training images that are held out and evaluated on in place of the test set, for choosing
    hyper-parameters."""
    validation: bool = False
    """Evaluate on the validation images that the file of --data has, such as MedMNIST's, in place
    of its test set, for choosing hyper-parameters."""


@dataclass(frozen=True)
class Partitioning(ConfigGroup):
    """Which clients there are, and which images each has."""

    partition: choice(options.PARTITIONS) = "dirichlet"
    """How the training images are split over the clients."""
    num_clients: NumClients = 10
    """Clients, K. With --partition natural the default is 0, all owners."""
    min_images: CountOrZero = 0
    """Images that every client has at least: the split is drawn again until every client has so
    many. 0: a client without images is given one, from the client with the most."""
    alpha: float_range(0.001, 1e6) = 0.5
    """Concentration of the Dirichlet splits; smaller is more skewed."""
    shards_per_client: Count = 2
    """Label-sorted pieces that a client gets. Used by shards."""
    labels_per_client: int_range(1, 65_536) = 2
    """Labels that a client has images of, k. Used by labels-per-client, random-labels and
    lognormal-labels."""
    size_spread: float_range(0, 10) = 2.0
    """Standard deviation of the logarithm of the sizes. Used by lognormal-labels."""
    size_exponent: float_range(0, 10) = 1.0
    """The client of size rank r has images in proportion to r ** -size_exponent; 0: all equal.
    Used by quantity."""
    rotation: float_range(0, 180) = 45.0
    """Degrees by which the first client's images are turned one way, and the last one's the other.
    Used by feature."""
    noise: float_range(0, 255) = 0.0
    """Standard deviation, in grey levels, of the noise on the last client's images; the first has
    none. Used by feature."""
    owner_choice: Literal["largest", "random"] = "largest"
    """Which owners are clients, if these are fewer: those with the most images, or some at random.
    Used by natural."""
    unseen_clients: float_range(0, 0.9) = 0.0
    """Share of the clients that are never drawn. Each round tells the accuracy on their images, and
    on the images that the other clients train on: those are new to the model neither as images nor
    as clients, so the gap between both is not that of new clients alone."""
    partition_file: str = ""
    """A partition.json, of a run or another program, whose split is used. Implies
    `--partition file`."""


@dataclass(frozen=True)
class Training(ConfigGroup):
    """What every algorithm uses: the network, who trains, how long and at which rates.

    What only some algorithms use is in the group Optimization.
    """

    model: choice(options.MODELS, options.OWN_MODEL, "FILE.py:FUNCTION") = "lean-cnn"
    """The clients' network. FILE.py:FUNCTION is one of your own: the function returns new Keras
    layers, those before the logits, in each call."""
    initial_model: str = ""
    """A .keras file of this network, such as a run's global_model.keras, whose weights the global
    model starts from. By default they follow from the seed."""
    rounds: Rounds = 5
    """Rounds of communication, T."""
    clients_per_round: CountOrZero = 0
    """Clients drawn for each round, m; 0: all."""
    sampling: Literal["fixed", "poisson", "by-size"] = "fixed"
    """fixed: clients_per_round of them, without replacement. poisson: each client independently,
    clients_per_round on average. by-size: clients_per_round draws with replacement, in proportion
    to the clients' images, and then a plain mean [Li et al. 2020]."""
    local_epochs: Count = 3
    """Passes that a client makes over its shard in a round, E."""
    local_steps: CountOrZero = 0
    """Local steps that each client makes in a round, in place of local_epochs; 0: as many as these
    take."""
    batch_size: CountOrZero = 16
    """Examples in a local batch, B; 0: the client's whole shard."""
    client_lr: OptionalRate = None
    """Learning rate of the clients' local steps. The default is the client optimizer's or, for sgd,
    0.2, but 0.15 for lean-cnn, 0.1 for scaffold, 0.05 for digits and 0.0005 for mimelite."""
    server_lr: OptionalRate = None
    """Learning rate of the server's optimizer. By default the algorithm's: 1 for plain averaging,
    0.3 for fedavgm, 0.03 for fedadagrad, 0.1 for fedadam and fedyogi."""


@dataclass(frozen=True)
class Config(ConfigGroup):
    """One experiment. Each field of its groups is a flag: client_lr is --client-lr."""

    seed: int_range(0, 2**31 - 1) = 0
    """Seed of the split, the initial weights, the clients drawn and the order of the batches."""
    preset: choice(presets.PRESETS) = "none"
    """The flags of a known experiment; flags beside it win."""
    data: Data = Data()
    partitioning: Partitioning = Partitioning()
    training: Training = Training()
    optimization: options.Optimization = options.Optimization()
    aggregation: options.Aggregation = options.Aggregation()
    privacy: options.Privacy = options.Privacy()
    adversity: options.Adversity = options.Adversity()
    comparison: Comparison = Comparison()
    run: Run = Run()

    def __post_init__(self) -> None:
        """Raise UserError if fields do not go together."""
        super().__post_init__()
        options.check_combination(self.to_dict(), self.defaults())
        compared_rows(self)

    def replace(self, **changes: Any) -> Config:
        """Return a copy with other values in these fields.

        First come the fields that a preset sets, and the data of the run that --evaluate names.
        """
        implied = presets.preset_fields(changes.get("preset"), parse)
        if changes.get("evaluate"):
            super().replace(evaluate=changes["evaluate"])  # refuses what is no text
            saved = command_line.read_saved(changes["evaluate"], Config())
            implied |= saved.data.to_dict()
        return super().replace(**implied | changes)

    def effective(self, **changes: Any) -> Config:
        """Return a copy with these changes, and then with the values that are really in use.

        Default rates are filled in, and a field that has no effect is at its default. Two
        configurations that make the same run have the same effective copy.
        """
        chosen = self.to_dict() | changes
        return self.replace(**changes | options.effective_values(chosen, self.defaults()))

    @property
    def partition_name(self) -> str:
        """The partition in use: a partition_file implies "file"."""
        return "file" if self.partitioning.partition_file else self.partitioning.partition

    @property
    def partition_fields(self) -> dict[str, Any]:
        """The fields that this partition uses, by name."""
        return self.subset(options.PARTITIONS[self.partition_name].fields)

    @property
    def cohort_size(self) -> int:
        """Clients that train in a round, m; with Poisson sampling on average."""
        drawn = self.partitioning.num_clients - self.num_unseen
        return self.training.clients_per_round or drawn

    @property
    def num_unseen(self) -> int:
        """Clients that are never drawn."""
        partitioning = self.partitioning
        return options.num_unseen(partitioning.unseen_clients, partitioning.num_clients)


def parse(words: str | Sequence[str] | None = None) -> Config:
    """Return the configuration that a command line asks for; `words` None is the terminal's.

    A flag that is not given has its default. With --resume it has the saved run's value, and which
    run that is, only a first reading tells: so the flags are read twice. Raises UserError.
    """
    word_list = shlex.split(words) if isinstance(words, str) else words
    given = list(sys.argv[1:] if word_list is None else word_list)
    presets.explain_preset(given)
    usage.answer_help(Config(), given)
    flags = join_compared(options.insert_implied_flags(presets.insert_preset_flags(given)))
    base = command_line.read_config_file(given, Config())
    evaluated = split_off(given, "evaluate")[0]
    names_data = any(split_off(given, field)[0] for field in ("dataset", "data"))
    if evaluated and not base and not names_data:
        base = Config().replace(evaluate=evaluated[-1])
    config = command_line.read_flags(Config, flags, default=base)
    options.check_given_noise(config.to_dict(), given)
    if config.run.resume:
        saved = command_line.read_saved(config.run.resume, Config())
        config = command_line.read_flags(Config, flags, default=saved)
        command_line.check_resumed(config, saved)
    if not split_off(given, "model")[0]:
        trust.check_model(config.training.model, config.run.resume or config.run.config)
    return config


def check_paths(config: Config) -> None:
    """Raise UserError for a file, or a run's folder, that a flag names and that is not there."""
    options.check_files(config.to_dict())
    for folder in filter(None, [config.run.evaluate, *overlaid_folders(config.comparison.compare)]):
        command_line.read_saved(str(folder), Config())


def answer_at_once(config: Config) -> None:
    """Do what --version or --list asks for, without TensorFlow."""
    if config.run.version:
        command_line.print_version()
    else:
        listing.print_runs(config.run.list, Config())


# The command line is read before TensorFlow is imported: --help and a wrong flag are answered at
# once. Garbage collection is off during the imports that follow, as it would go through them again
# and again; the end of this file switches it on.
if __name__ == "__main__":
    parsed_config = command_line.run_or_exit(parse)
    if parsed_config.run.version or parsed_config.run.list:
        command_line.run_or_exit(answer_at_once, parsed_config)
        sys.exit()
    command_line.run_or_exit(check_paths, parsed_config)
    command_line.tell_loading()
    gc.disable()

from harness import comparison, overlay, plots, program, records, results, run_folder, shards
from harness.engine.multi_host import check_hosts, start_workers
from harness.engine.worker import NOT_INLINED
from harness.figure_files import form_of
from harness.files import check_clock, check_temporary_folder, expand_path
from harness.records import Evaluation, RoundRecord
from harness.run_folder import RunFolder
from harness.settings import documented_settings
from variants import (
    adversity,
    aggregators,
    algorithms,
    baselines,
    beside,
    captions,
    datasets,
    layers,
    models,
    partitions,
    privacy,
)
from variants.aggregators import Aggregator, CohortInfo
from variants.algorithms import Algorithm
from variants.datasets import Dataset, Split
from variants.partitions import Partitioner

import tensorflow as tf
import tensorflow_federated as tff

# == Data ==========================================================================================

MNIST_FILE = Path(__file__).resolve().parent / "data" / "mnist.npz"


def load_mnist() -> Dataset:
    """Return MNIST, from the file beside the script. Raises UserError if that is not MNIST."""
    arrays = datasets.read_npz(MNIST_FILE)
    arrays |= {key: arrays[key][..., np.newaxis] for key in ("x_train", "x_test")}
    dataset = datasets.make_dataset("MNIST", arrays)
    if not dataset.original:
        raise UserError(
            f"{MNIST_FILE} is not MNIST (its SHA-256 differs); restore the committed file"
        )
    return dataset


# A table: what a choice of a flag stands for. Most have their default row in this file, and the
# others in a module of variants/.
DATASETS = {"mnist": load_mnist, **datasets.ROWS}
build_dataset = datasets.build_dataset  # of arrays of one's own, for run(config, dataset=...)


def load_dataset(data: Data) -> Dataset:
    """Return the data set that is asked for. Raises UserError if it is missing or malformed."""
    datasets.check_test_set(data)
    if data.data:
        dataset = datasets.load_files(data.data, data.data_name, data.transpose, data.validation)
    else:
        dataset = DATASETS[data.dataset]()
    if data.holdout:
        dataset = datasets.hold_out(dataset, data.holdout)
    return dataset


# == Partition: which training images each client has ==============================================


def split_dirichlet(
    labels: np.ndarray, num_clients: int, rng: np.random.Generator, alpha: float
) -> list[np.ndarray]:
    """Split each label over the clients in shares drawn from Dirichlet(alpha) [2].

    `labels` are uint8[N] or uint16[N]. Returns K index arrays int64[n_k], some perhaps empty.
    """
    owner = np.empty(len(labels), np.int64)  # the client of each image
    for label in np.unique(labels):
        images = rng.permutation(np.flatnonzero(labels == label))
        shares = rng.dirichlet(np.full(num_clients, alpha))
        cuts = (np.cumsum(shares)[:-1] * len(images)).round().astype(np.int64)
        owner[images] = np.searchsorted(cuts, np.arange(len(images)), side="right")
    images_by_client = np.argsort(owner, kind="stable")
    sizes = np.bincount(owner, minlength=num_clients)
    return np.split(images_by_client, sizes.cumsum()[:-1])


PARTITIONERS = {
    "dirichlet": Partitioner("Dirichlet({alpha:g})", split_dirichlet),
    **partitions.ROWS,
}


@dataclass(frozen=True)
class Partition:
    """The split: `indices` are K arrays int64[n_k] of training images, disjoint, none empty.

    Together they are all training images, except in a split that was read from a file.
    """

    indices: list[np.ndarray]
    counts: np.ndarray  # int64[K,C], a client's images by label
    num_topped_up: int  # clients that had got no image, and were given one
    digest: str  # of the data set and the indices; it names the shard files

    @property
    def sizes(self) -> np.ndarray:
        """The clients' numbers of images, n_k, int64[K]."""
        return self.counts.sum(axis=1)


def hash_partition(dataset: Dataset, indices: Sequence[np.ndarray], config: Config) -> str:
    """Return 16 hexadecimal digits that stand for all that the shard files hold."""
    digest = hashlib.sha256(dataset.digest.encode())
    for part in indices:
        digest.update(len(part).to_bytes(8, "little") + part.tobytes())
    if PARTITIONERS[config.partition_name].change_images:
        program_file = program.file_hash("variants/partitions.py")
        changed_by = [config.partition_name, config.partition_fields, config.seed, program_file]
        digest.update(json.dumps(changed_by, sort_keys=True).encode())
    return digest.hexdigest()[:16]


def make_partition(dataset: Dataset, config: Config) -> Partition:
    """Split the training images, a function of the data, the partition's fields and the seed."""
    labels = dataset.train.labels
    num_clients = config.partitioning.num_clients
    if num_clients > len(labels):
        raise UserError(
            f"num_clients={num_clients} exceeds the {len(labels)} training images; choose "
            f"1..{len(labels)}"
        )
    min_images = config.partitioning.min_images
    if min_images * num_clients > len(labels):
        raise UserError(
            f"min_images={min_images} for each of {num_clients} clients is more than the "
            f"{len(labels)} training images; choose at most {len(labels) // num_clients}"
        )
    partitioner = PARTITIONERS[config.partition_name]
    # A partition that changes the clients' images, by rotation or noise, has its fields for that.
    split_fields = {} if partitioner.change_images else config.partition_fields
    if partitioner.by_dataset:
        split_fields["dataset"] = dataset
    draw = partial(partitioner.split, labels, num_clients, **split_fields)
    split, num_topped_up = partitions.draw_split(draw, config.seed, min_images)
    indices = [np.sort(part).astype(np.int64) for part in split]
    counts = [np.bincount(labels[part], minlength=dataset.num_classes) for part in indices]
    partitions.verify_partition_file(
        config.partitioning.partition_file, dataset, counts, PARTITIONERS
    )
    digest = hash_partition(dataset, indices, config)
    return Partition(indices, np.stack(counts), num_topped_up, digest)


# == Model: Keras layers from images float32[n,H,W,channels] in 0..1 to C logits ===================


def build_lean_cnn() -> list[Any]:
    """Return the default network's layers before the logits, 153,930 parameters with them."""
    return [
        *models.conv(16, size=5, padding="valid"),
        *models.conv(32, size=3),
        *models.dense(128),
    ]


# Each row returns new layers, those before the logits.
MODELS: dict[str, Callable[[], list[Any]]] = {"lean-cnn": build_lean_cnn, **models.ROWS}


class Network(NamedTuple):
    """A row of MODELS by its name, and what goes in and comes out: a model without weights yet."""

    name: str
    build_hidden_layers: Callable[[], list[Any]]
    image_shape: tuple[int, int, int]  # height, width, channels
    num_classes: int
    has_logits: bool = False  # whether the last hidden layer gives the logits already

    def build_layers(self) -> list[Any]:
        """Return new Keras layers, the last of which gives the logits."""
        hidden = self.build_hidden_layers()
        layers.check_new(self.name, hidden)
        return hidden if self.has_logits else [*hidden, tf.keras.layers.Dense(self.num_classes)]


@documented_settings()
def make_network(name: str, build_hidden_layers: Callable, dataset: Dataset) -> Network:
    """Return the network for these data. Raises UserError if a user's layers cannot be one."""
    network = Network(name, build_hidden_layers, dataset.image_shape, dataset.num_classes)
    if name in MODELS:
        return network
    has_logits = layers.end_in_logits(
        name, build_hidden_layers, dataset.image_shape, dataset.num_classes
    )
    return network._replace(has_logits=has_logits)


def to_input(images: Any) -> Any:
    """Turn images uint8[n,H,W,channels] into float32 in 0..1."""
    return tf.cast(images, tf.float32) / 255


@documented_settings()  # float32, graphs, ..., instead of the user's own settings of Keras
def build_model(network: Network, seed: int) -> Any:
    """Line 1: return a Keras model with its initial weights, a function of network and seed.

    They come from the layers' own initializers; Keras' default is Glorot uniform, zero biases.
    """
    with layers.refuse_wrong_size(network.name, network.image_shape) as initializers:
        inputs = tf.keras.Input(network.image_shape)
        model = tf.keras.Sequential([inputs, *network.build_layers()])
    layers.check_layers(network.name, model)
    model.set_weights(layers.initial_weights(model, initializers, seed))
    return model


@documented_settings()
def build_saved_model(network: Network, weights: Any) -> Any:
    """Return the Keras model that is saved, with TFF's ModelWeights `weights`.

    It takes raw pixels [n,H,W,channels] in 0..255, so that whoever loads it need not know our
    scaling.
    """
    model = build_model(network, seed=0)
    weights.assign_weights_to(model)
    pixels = tf.keras.Input(network.image_shape)
    return tf.keras.Sequential([pixels, tf.keras.layers.Rescaling(1 / 255), *model.layers])


def forward(network: Network, weights: Sequence[Any], x: Any, key: Any) -> Any:
    """Return the logits float32[n,C] of a batch in training, with the tensors `weights`.

    Layers such as Dropout drop by chance, a function of `key` int64[2].
    """
    # New Keras layers would make variables. Here they get our tensors instead, in their order.
    # TFF's own way to do this, functional_model_from_keras, takes 1.4 times as long a step: it
    # wraps the model in a function, in which oneDNN cannot match a max-pooling with its gradient.
    next_weight = iter(weights)
    with tf.variable_creator_scope(lambda _, **made: layers.fit(next(next_weight), made)):
        for position, layer in enumerate(network.build_layers()):
            x = layers.train_layer(layer, x, key, position)
    return x


def loss_and_gradients(
    network: Network, weights: Sequence[Any], x: Any, y: Any, key: Any
) -> tuple[Any, Any, Any]:
    """Return (cross-entropies float32[n] in nats, logits, gradients of their mean) of a batch."""
    with tf.GradientTape() as tape:
        tape.watch(weights)
        logits = forward(network, weights, x, key)
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(y, logits)
        mean_loss = tf.reduce_mean(losses)
    return losses, logits, tape.gradient(mean_loss, weights)


# == Experiment: what the names of a configuration stand for, resolved once =======================


def weighted_mean(config: Config, cohort: CohortInfo) -> Any:
    """Line 6: return TFF's factory for the mean of the updates w - w_k, weighted by n_k.

    The server subtracts it from w: w - sum_k (n_k / n) (w - w_k) = sum_k (n_k / n) w_k. It needs
    neither argument; other rows of AGGREGATORS do.
    """
    return tff.aggregators.MeanFactory(no_nan_division=True)


ALGORITHMS = {"fedavg": Algorithm, **algorithms.ROWS}
# "summed" is what the aggregator takes: see NUM_CHUNKS.
AGGREGATORS = {"mean": Aggregator(weighted_mean, update_format="summed"), **aggregators.ROWS}
CLIENT_OPTIMIZERS = {"sgd": algorithms.build_sgd, **algorithms.OPTIMIZER_ROWS}


@dataclass(frozen=True)
class Experiment:
    """A run, ready to start: its configuration, its data, and the rows of the tables it uses.

    `build_experiment` makes it; nothing looks a name up in a table again. What is costly is made
    when it is first asked for.
    """

    config: Config  # with its effective values
    dataset: Dataset
    partition: Partition
    partitioner: Partitioner
    network: Network
    algorithm: Algorithm
    client_optimizer: Any  # TFF's
    aggregator: Aggregator
    behaviour: adversity.ClientBehaviour  # of dropouts, stragglers and attackers
    accountant: privacy.PrivacyAccountant | None  # of a differentially private run
    row_hashes: dict[str, str]  # field -> hash of its row: a resumed run must have the same rows
    remarks: list[str]  # what the user should know before the run begins

    def images_of_client(self, images: np.ndarray, client: int) -> np.ndarray:
        """Return images uint8[n,H,W,channels] as the client has them.

        Some partitions change them.
        """
        config = self.config
        if self.partitioner.change_images is None:
            return images
        num_clients = config.partitioning.num_clients
        return self.partitioner.change_images(
            images, client, num_clients, config.seed, **config.partition_fields
        )

    @cached_property
    def initial_weights(self) -> tuple[np.ndarray, ...]:
        """The global model's first weights (line 1), one float32 array per tensor."""
        model = build_model(self.network, self.config.seed)
        file = self.config.training.initial_model
        return tuple(layers.read_weights(file, model) if file else model.get_weights())

    @property
    def num_parameters(self) -> int:
        """The model's parameters, d."""
        return sum(weights.size for weights in self.initial_weights)

    @cached_property
    def shard_folder(self) -> Path:
        """The folder of the clients' shard files, written unless they are there already."""
        return write_shards(self)

    def check(self) -> None:
        """Raise UserError for what would stop the run, while there is nothing of it yet.

        That is what this machine lacks, what a host refuses, and what no process can be made of.
        """
        check_clock()
        check_temporary_folder()
        _ = self.host_folders
        _ = self.process

    @cached_property
    def host_folders(self) -> dict[str, Any]:
        """Host -> its folder for worker and shards, of the other machines that train."""
        return check_hosts(self.config.run)

    @cached_property
    def process(self) -> Any:
        """TFF's iterative process, one step of which is a round."""
        return build_process(self)

    @cached_property
    def evaluate(self) -> Callable[[Any], Evaluation]:
        """evaluate(weights) -> Evaluation of TFF's ModelWeights on the test set."""
        return build_evaluator(self.network, self.dataset, beside.find_splits(self))


# == Shards: each client's images in a file, which only the worker that trains this client reads ===


def write_shards(experiment: Experiment) -> Path:
    """Write each client's shard file, unless it is there already; return their folder.

    The folder's name carries the partition's hash, so a shard of another split is never read.
    """
    train = experiment.dataset.train
    partition = experiment.partition
    folder = shards.make_folder(experiment.config.run.cache, partition.digest)
    for client, indices in enumerate(partition.indices):
        images = experiment.images_of_client(train.images[indices], client)
        shards.write_shard(folder, client, images, train.labels[indices])
    return folder


# == A round, from the inside out: who trains, local training, client, chunk, process, the loop ====
# (To read it from the outside in, begin at run_rounds.)


def sample_clients(
    config: Config,
    round_num: int,
    sizes: np.ndarray | None = None,
    rng: np.random.Generator | None = None,
) -> list[int]:
    """Line 3: draw the round's clients, by default a function of (seed, round).

    They are sorted, as the last bits of a sum depend on its order. Drawn by their `sizes` int64[K]
    a client may come twice, and counts twice. A private run with secret cohorts passes an `rng`
    that the operating system seeded.
    """
    if rng is None:
        rng = np.random.default_rng([config.seed, round_num])
    clients = adversity.drawn_clients(config)  # by default all
    if config.training.sampling == "poisson":
        return clients[rng.random(len(clients)) < config.cohort_size / len(clients)].tolist()
    if config.training.sampling == "by-size":
        shares = sizes[clients] / sizes[clients].sum()
        return sorted(rng.choice(clients, config.cohort_size, p=shares).tolist())
    return sorted(rng.choice(clients, config.cohort_size, replace=False).tolist())


# TFF keeps a value in memory for each of its clients, and spends about a millisecond on it. So we
# give it chunks of our clients as its clients, if the aggregator allows it. A chunk sends, by the
# aggregator's update_format:
#   "summed"      the weighted mean of its clients' updates
#   "stacked"     its clients' updates as rows; the server stacks those of all chunks to a matrix
#   "per_client"  the update of its only client: every client is a chunk
# The numbers are fixed, whatever the number of cores: the last bits of a sum depend on its parts.
NUM_CHUNKS = {"summed": 32, "stacked": 10}


def make_chunks(clients: Sequence[int], sizes: np.ndarray, update_format: str) -> list[np.ndarray]:
    """Cut the round's clients into chunks int64[g] with about the same number of examples.

    `sizes` are the n_k of all clients, `update_format` is the aggregator's.
    """
    num_chunks = NUM_CHUNKS.get(update_format, len(clients))
    if len(clients) <= num_chunks:
        return [np.array([client], np.int64) for client in clients]
    chunks: list[list[int]] = [[] for _ in range(num_chunks)]
    fullness = [(0, chunk) for chunk in range(num_chunks)]  # a heap: the emptiest comes first
    for client in sorted(clients, key=lambda client: (-sizes[client], client)):
        num_examples, chunk = heapq.heappop(fullness)
        chunks[chunk].append(client)
        heapq.heappush(fullness, (num_examples + int(sizes[client]), chunk))
    return [np.array(sorted(chunk), np.int64) for chunk in chunks]


class ClientTask(NamedTuple):
    """What a client does in a round, in the worker's graph."""

    client: Any  # int64
    round_num: Any  # int64, from 1
    key: Any  # int64[2], of all its randomness in this round
    shard: shards.Shard  # its images uint8[n_k,H,W,channels] and labels int32[n_k]
    num_visits: Any  # int32, examples to train on in all epochs: E * n_k, less for a straggler
    learning_rate: Any  # float32
    server_message: Any  # what the algorithm sends beside the weights


def client_key(seed: int, client: Any, round_num: Any) -> Any:
    """Return the key int64[2] of all that is random on a client in a round."""
    seed_and_client = tf.stack([tf.constant(seed, tf.int64), client])
    return tf.random.experimental.stateless_fold_in(seed_and_client, tf.cast(round_num, tf.int64))


def count_visits(training: Training, size: Any) -> Any:
    """Return on how many examples, int32, a client with `size` of them trains in a round.

    In an epoch the last batch may be smaller.
    """
    if not training.local_steps:
        return size * training.local_epochs
    batch_size = training.batch_size or size
    steps_of_epoch = -(-size // batch_size)  # rounded up
    epochs = training.local_steps // steps_of_epoch
    return epochs * size + training.local_steps % steps_of_epoch * batch_size


def rate_factor(step: Any, num_steps: Any) -> Any:
    """Return what multiplies a client's learning rate in local step 0, 1, ... of `num_steps`.

    Edit this for a schedule within a round; both arguments are float32 tensors, and so is what you
    return, such as tf.minimum(1.0, (step + 1) / 20) for a warm-up. The plain number 1.0 stands for
    a constant rate. Algorithms get the sum of the factors.
    """
    return 1.0


def is_rate_constant() -> bool:
    """Return whether `rate_factor` is the number 1.0. Raises UserError for another number."""
    factor = rate_factor(tf.constant(0.0), tf.constant(1.0))
    if tf.is_tensor(factor):
        return False
    if factor != 1.0:
        raise UserError(
            f"rate_factor returns {factor!r}, which is neither 1.0 nor a tensor made of step and "
            "num_steps; for another constant rate choose --client-lr"
        )
    return True


class LocalResult(NamedTuple):
    """What local training gives; loss and accuracy are means over the examples, as trained on."""

    weights: Any
    loss: Any  # float32, cross-entropy in nats
    accuracy: Any  # float32, 0..1
    num_steps: Any  # float32
    sum_of_factors: Any  # float32, of the learning rate over the steps: num_steps if constant


def build_train_step(experiment: Experiment) -> Callable[..., tuple[Any, Any, Any, Any]]:
    """Return train_step(state, weights, initial, task, x, y, key): one step of SGD.

    It returns (optimizer's state, weights, sum of the losses, number predicted right).
    """
    network = experiment.network
    optimizer = experiment.client_optimizer

    @tf.autograph.experimental.do_not_convert  # what has no loop is built in half the time
    def train_step(state, weights, initial, task, x, y, key):
        losses, logits, gradients = loss_and_gradients(network, weights, x, y, key)
        gradients = experiment.algorithm.local_gradients(
            gradients, weights, initial, task.server_message
        )
        state, weights = optimizer.next(state, weights, gradients)
        predicted = tf.argmax(logits, axis=1, output_type=tf.int32)
        num_correct = tf.reduce_sum(tf.cast(tf.equal(predicted, y), tf.float32))
        return state, weights, tf.reduce_sum(losses), num_correct

    if not models.has_max_pooling(network.build_layers()):
        return train_step
    # The step stays a function of its own in the worker's graph: inlined into the loop, oneDNN may
    # not find the max-pooling that a gradient belongs to.
    return tf.function(train_step, autograph=False, experimental_attributes={NOT_INLINED: True})


def build_local_training(experiment: Experiment) -> Callable[[Any, ClientTask], LocalResult]:
    """Return local_training(initial weights, task) -> LocalResult: a client's SGD in a round.

    It is one graph loop over epochs and batches, so that the worker runs it without us.
    """
    training = experiment.config.training
    optimizer = experiment.client_optimizer
    train_step = build_train_step(experiment)
    is_random = layers.are_random(experiment.network.build_layers())
    rate_is_constant = is_rate_constant()
    experiment.algorithm.check_rate(rate_is_constant)
    fold_in = tf.random.experimental.stateless_fold_in

    @tf.autograph.experimental.do_not_convert
    def new_optimizer_state(initial, learning_rate):
        specs = tf.nest.map_structure(lambda w: tf.TensorSpec(w.shape, w.dtype), initial)
        state = optimizer.initialize(specs)
        return optimizer.set_hparams(state, {"learning_rate": learning_rate})

    @tf.function
    def local_training(initial, task):  # line 5: w_k <- w after local_epochs of SGD on batches
        images = task.shard.images
        labels = task.shard.labels
        size = tf.size(labels)
        batch_size = training.batch_size or size
        num_epochs = -(-task.num_visits // size)  # rounded up: a straggler's last one is cut
        num_steps = tf.cast(
            algorithms.count_steps(training.batch_size, size, task.num_visits), tf.float32
        )
        state = new_optimizer_state(initial, task.learning_rate)
        weights = initial
        loss_sum = 0.0
        num_correct = 0.0
        step = 0.0
        sum_of_factors = 0.0
        for epoch in tf.range(num_epochs):
            epoch_key = fold_in(task.key, tf.cast(epoch, tf.int64))
            shuffled = tf.random.experimental.stateless_shuffle(tf.range(size), epoch_key)
            order = shuffled[: task.num_visits - epoch * size]
            for start in tf.range(0, tf.size(order), batch_size):
                tf.autograph.experimental.set_loop_options(parallel_iterations=1)
                batch = order[start : start + batch_size]
                x = to_input(tf.gather(images, batch))
                y = tf.gather(labels, batch)
                # Without Dropout or the like no step uses its key.
                step_key = fold_in(epoch_key, tf.cast(start, tf.int64)) if is_random else epoch_key
                if not rate_is_constant:
                    factor = rate_factor(step, num_steps)
                    rate = {"learning_rate": factor * task.learning_rate}
                    state = optimizer.set_hparams(state, rate)
                    sum_of_factors += factor
                    step += 1.0
                state, weights, loss, correct = train_step(
                    state, weights, initial, task, x, y, step_key
                )
                loss_sum += loss
                num_correct += correct
        if rate_is_constant:
            sum_of_factors = num_steps
        visits = tf.cast(task.num_visits, tf.float32)
        return LocalResult(
            weights, loss_sum / visits, num_correct / visits, num_steps, sum_of_factors
        )

    return local_training


class ClientMetrics(NamedTuple):
    """What a client reports of its round, float32 each; metrics.json has it for each client.

    A round's record has the mean over the clients' examples of every field but `examples` and
    `finite`, as train_loss, train_accuracy, ...; of one that you add too.
    """

    examples: Any  # n_k
    finite: Any  # 1, or 0 if its update was left out
    loss: Any  # cross-entropy in nats, mean over its examples as they were trained on
    accuracy: Any  # 0..1, likewise
    steps: Any  # of SGD


class ClientOutput(NamedTuple):
    """What a client sends to the server.

    Some algorithms keep vectors float32[d] at the server from round to round, such as SCAFFOLD's
    control variates. This is their memory. The server sends a client a message made from it, and
    the client's own message changes it. FedAvg has no memory and no messages.
    """

    update: Any  # a tuple, w - w_k, all 0 if it is not finite
    weight: Any  # float32, n_k or 1, or 0 if the update is not finite
    effective_steps: Any  # float32, FedNova's |a_k|_1; the number of steps in plain SGD
    metrics: ClientMetrics
    message: Any  # float32[d] for the algorithm's memory, or float32[0]


def build_client_update(experiment: Experiment) -> Callable[..., ClientOutput]:
    """Return client_update(initial weights, memory, round_num, client) -> ClientOutput."""
    config = experiment.config
    algorithm = experiment.algorithm
    behaviour = experiment.behaviour
    training = config.training
    schedule = config.optimization.client_schedule
    local_training = build_local_training(experiment)
    # On another host the shards are in a folder of this name, in the worker's working directory.
    folder = experiment.shard_folder
    if not config.run.single_worker:
        folder = Path(folder.name)

    def client_update(initial, memory, round_num, client):
        own_shard = shards.read_shard(folder, client, experiment.network.image_shape)
        size = tf.size(own_shard.labels)
        key = client_key(config.seed, client, round_num)
        factor = algorithms.schedule(schedule, tf.cast(round_num, tf.float32), config.optimization)
        task = ClientTask(
            client=client,
            round_num=round_num,
            key=key,
            shard=behaviour.shard(client, own_shard, key),
            num_visits=behaviour.num_visits(count_visits(training, size), key),
            learning_rate=training.client_lr * factor,
            server_message=algorithm.server_message(memory, client),
        )

        def shard_gradient():
            x = to_input(task.shard.images)
            return loss_and_gradients(experiment.network, initial, x, task.shard.labels, key)[2]

        trained = local_training(initial, task)
        update = tuple(old - new for old, new in zip(initial, trained.weights, strict=True))
        message = algorithm.client_message(
            task.server_message,
            initial,
            trained.weights,
            trained.sum_of_factors,
            task.learning_rate,
            shard_gradient,
        )
        effective_steps = algorithm.effective_steps(trained.sum_of_factors)
        if algorithm.normalize_by_steps:
            update = tuple(u / effective_steps for u in update)
        update = behaviour.update(client, update, key)
        finite = tf.reduce_all([tf.reduce_all(tf.math.is_finite(u)) for u in update])
        update = tuple(tf.where(finite, u, 0) for u in update)
        examples = tf.cast(size, tf.float32)
        metrics = ClientMetrics(
            examples=examples,
            finite=tf.cast(finite, tf.float32),
            loss=trained.loss,
            accuracy=trained.accuracy,
            steps=trained.num_steps,
        )
        by_examples = config.aggregation.client_weighting == "examples"
        weight = tf.where(finite, examples if by_examples else 1.0, 0)
        return ClientOutput(update, weight, effective_steps, metrics, message)

    return tf.autograph.experimental.do_not_convert(client_update)


class SummedChunk(NamedTuple):
    """What a chunk of clients sends to an aggregator that takes weighted means."""

    update: Any  # a tuple, the mean of the clients' updates by their weights, n_k or 1
    weight: Any  # float32, the sum of these; clients without a finite update don't count
    effective_steps: Any  # float32, the weighted mean of the clients'
    metrics: Any  # float32[g,r], a row of ClientMetrics for each client
    messages: Any  # float32[g,d] for the algorithm's memory, or float32[g,0]


def build_summed_training(client_update: Callable, message_size: int) -> Callable[..., SummedChunk]:
    """Return train_chunk(initial weights, memory, round_num, clients int64[g]) -> SummedChunk.

    `message_size` is that of a client's message, d or 0. Updates are added as they come: what the
    worker holds of them does not grow with the number of clients.
    """

    @tf.function
    def train_chunk(initial, memory, round_num, clients):  # line 4: for each client k in S
        num_clients = tf.size(clients)
        update_sum = tuple(tf.zeros_like(w) for w in initial)
        weight_sum = 0.0
        steps_sum = 0.0
        metrics = tf.TensorArray(
            tf.float32, num_clients, element_shape=[len(ClientMetrics._fields)]
        )
        messages = tf.TensorArray(tf.float32, num_clients, element_shape=[message_size])
        for place in tf.range(num_clients):
            tf.autograph.experimental.set_loop_options(parallel_iterations=1)
            output = client_update(initial, memory, round_num, clients[place])
            update_sum = tuple(
                s + output.weight * u for s, u in zip(update_sum, output.update, strict=True)
            )
            weight_sum += output.weight
            steps_sum += output.weight * output.effective_steps
            metrics = metrics.write(place, tf.stack(output.metrics))
            messages = messages.write(place, output.message)
        # line 6, within the chunk
        mean = tuple(tf.math.divide_no_nan(s, weight_sum) for s in update_sum)
        mean_steps = tf.math.divide_no_nan(steps_sum, weight_sum)
        return SummedChunk(mean, weight_sum, mean_steps, metrics.stack(), messages.stack())

    return train_chunk


def build_initial_state(experiment: Experiment) -> tuple[Any, Any]:
    """Return TFF computations of the initial weights (line 1) and the algorithm's initial state."""
    weights = tff.learning.models.ModelWeights(experiment.initial_weights, ())
    slots = experiment.algorithm.memory_slots()
    slot_size = experiment.num_parameters if slots else 0

    @tff.tensorflow.computation
    def initial_weights():
        return tf.nest.map_structure(tf.constant, weights)

    @tff.tensorflow.computation
    def initial_algorithm_state():
        return algorithms.AlgorithmState(tf.constant(0, tf.int64), tf.zeros([slots, slot_size]))

    return initial_weights, initial_algorithm_state


def build_chunk_training(experiment: Experiment, weights_type: Any, state_type: Any) -> Any:
    """Return a TFF computation: (weights, algorithm's state, clients int64[g]) -> what they send.

    Where the aggregator allows it, TFF sees many of our clients as one (`make_chunks`).
    """
    client_update = build_client_update(experiment)
    slot_size = state_type.memory.shape[1]
    if experiment.aggregator.update_format == "stacked":
        train_clients = aggregators.build_stacked_training(
            client_update, slot_size, experiment.num_parameters, len(ClientMetrics._fields)
        )
    else:
        train_clients = build_summed_training(client_update, slot_size)

    @tff.tensorflow.computation(weights_type, state_type, tff.TensorType(np.int64, [None]))
    def train_chunk(weights, state, clients):
        return train_clients(tuple(weights.trainable), state.memory, state.round, clients)

    return train_chunk


@documented_settings()
def build_process(experiment: Experiment) -> Any:
    """Return a TFF IterativeProcess: next(state, chunks) -> (state, measurements, client metrics).

    `chunks` are the int64[g] ids of `make_chunks`. `state` is TFF's LearningAlgorithmState: the
    global model's weights, nothing, an AlgorithmState (TFF calls it client_work), the aggregator's
    state and the server optimizer's. `next` is a pure function, except for a private run's noise.
    """
    tf.get_logger().setLevel("CRITICAL")  # some of TFF's aggregators print hundreds of lines
    config = experiment.config
    algorithm = experiment.algorithm
    is_stacked = experiment.aggregator.update_format == "stacked"
    has_memory = algorithm.memory_slots() > 0
    # One worker returns each chunk's metrics as it is; partial results of hosts can only be merged.
    gathers_metrics = has_memory or not config.run.single_worker
    LearningAlgorithmState = tff.learning.templates.LearningAlgorithmState

    initial_weights, initial_algorithm_state = build_initial_state(experiment)
    weights_type = initial_weights.type_signature.result
    state_type = initial_algorithm_state.type_signature.result
    train_chunk = build_chunk_training(experiment, weights_type, state_type)
    chunk_type = train_chunk.type_signature.result
    cohort = CohortInfo(config.cohort_size, int(experiment.partition.sizes.max()))
    factory = experiment.aggregator.build(config, cohort)
    aggregate = factory.create(chunk_type.update, chunk_type.weight)
    optimizer = algorithm.server_optimizer(config.training.server_lr)
    finalize = tff.learning.templates.build_apply_optimizer_finalizer(optimizer, weights_type)
    server = algorithms.build_server_steps(
        algorithm, optimizer, config.training.server_lr, experiment.initial_weights, ClientMetrics
    )

    @tff.federated_computation
    def initialize():
        weights = tff.federated_eval(initial_weights, tff.SERVER)
        algorithm_state = tff.federated_eval(initial_algorithm_state, tff.SERVER)
        state = LearningAlgorithmState(
            weights, (), algorithm_state, aggregate.initialize(), finalize.initialize()
        )
        return tff.federated_zip(state)

    chunks_type = tff.FederatedType(tff.TensorType(np.int64, [None]), tff.CLIENTS)

    # FedAvg is: count the round, broadcast, train, aggregate, finalize. The rest is for others.
    @tff.federated_computation(initialize.type_signature.result, chunks_type)
    def next_round(state, chunks):
        algorithm_state = tff.federated_map(server.begin_round, state.client_work)
        weights = tff.federated_broadcast(state.global_model_weights)
        trained = tff.federated_map(
            train_chunk, (weights, tff.federated_broadcast(algorithm_state), chunks)
        )
        # line 6, over the chunks
        aggregated = aggregate.next(state.aggregator, trained.update, trained.weight)
        update = (
            tff.federated_map(server.from_flat, aggregated.result)
            if is_stacked
            else aggregated.result
        )
        optimizer_state = state.finalizer
        if algorithm.normalize_by_steps:
            mean_steps = tff.federated_mean(trained.effective_steps, trained.weight)
            update = tff.federated_map(server.multiply, (update, mean_steps))
        if config.optimization.server_schedule != "constant":
            optimizer_state = tff.federated_map(server.set_rate, (optimizer_state, algorithm_state))
        if gathers_metrics:  # at the server, those of all chunks and hosts in one array
            gathered = aggregators.gather(
                tff.federated_zip((chunks, trained.metrics, trained.messages))
            )
            algorithm_state = tff.federated_map(server.update_memory, (algorithm_state, *gathered))
        update = tff.federated_map(server.server_step, (update, algorithm_state))
        new = finalize.next(optimizer_state, state.global_model_weights, update)
        state = LearningAlgorithmState(new.result, (), algorithm_state, aggregated.state, new.state)
        metrics = gathered[1] if gathers_metrics else trained.metrics
        return tff.federated_zip(state), aggregated.measurements, metrics

    return tff.templates.IterativeProcess(initialize, next_round, next_is_multi_arg=True)


def train_cohort(
    worker: Any, experiment: Experiment, state: Any, clients: Sequence[int]
) -> tuple[Any, list[dict[str, Any]], Any]:
    """Lines 4 to 6: train the clients from the state's weights, and aggregate.

    Returns the next state, one dict per client of what it reported, in the order of their ids, and
    what the aggregator measured.
    """
    aggregator = experiment.aggregator
    sizes = experiment.partition.sizes
    round_num = int(state.client_work.round) + 1
    if aggregator.update_format == "stacked":
        # Drawn by size a client may come twice. Two equal updates would be each other's neighbours
        # and outvote others, so a rule that looks at all updates gets each client's once.
        clients = sorted(set(clients))
    chunks = [
        chunk
        for clients_of_host in worker.assign(clients)
        for chunk in make_chunks(clients_of_host, sizes, aggregator.update_format)
    ]
    if aggregator.private and not chunks:
        chunks = [np.array([], np.int64)]  # noise is added all the same: the accountant counts it
    if not chunks:
        algorithm_state = state.client_work._replace(round=np.int64(round_num))
        return state._replace(client_work=algorithm_state), [], None
    name = f"round {round_num}"
    next_state, measured, metrics = worker.run_round(name, experiment.process, state, chunks)
    reports = records.name_metrics(chunks, metrics, ClientMetrics._fields)
    finite = [report["client"] for report in reports if report["finite"]]
    # A client whose update is not finite sends zeros, with weight 0. An aggregator that looks at
    # each client's norm would count them. So the round is done again, from the same state, without
    # these clients; what they reported stays in the record.
    if aggregator.sends_norm and not aggregator.private and len(finite) < len(reports):
        next_state, _, measured = train_cohort(worker, experiment, state, finite)
    return next_state, reports, measured


def run_rounds(
    experiment: Experiment,
    state: Any = None,
    log: str | Path = os.devnull,
    journal: Path | None = None,
    earlier: Sequence[RoundRecord] = (),
) -> Iterator[tuple[Any, RoundRecord, Evaluation]]:
    """Yield (state, record, evaluation) after each round that follows `state`, else from the first.

    TFF's worker lives as long as the generator, and prints to `log`. A private run notes in its
    `journal` each round that it begins. `earlier` are the records of the rounds before. Raises
    RunFailed if a round cannot be done.
    """
    config = experiment.config
    accountant = experiment.accountant
    evaluate = experiment.evaluate  # built here, before the first round's clock starts
    most_chunks = NUM_CHUNKS.get(experiment.aggregator.update_format, config.cohort_size)
    done = list(earlier)
    rng = privacy.secret_rng(accountant)  # None if the cohorts follow from the seed
    with start_workers(experiment, min(config.cohort_size, most_chunks), log) as worker:
        if state is None:
            state = worker.call("round 0", experiment.process.initialize)  # line 1
        first = int(state.client_work.round) + 1
        begun = privacy.read_journal(journal, first) if accountant else []
        for round_num in range(first, config.training.rounds + 1):  # line 2
            epsilon = None
            if accountant:
                epsilon = accountant.begin_round(round_num, begun, journal)
                if epsilon is None:  # its budget allows no more
                    return
            start = time.perf_counter()
            cohort = sample_clients(config, round_num, experiment.partition.sizes, rng)  # line 3
            reporting = adversity.drop_out(cohort, config, round_num, client_key)
            state, reports, measured = train_cohort(
                worker, experiment, state, reporting
            )  # lines 4 to 6
            evaluation = evaluate(state.global_model_weights)
            record = records.make_record(
                round_num,
                reports,
                evaluation,
                ClientMetrics._fields,
                dropped=len(cohort) - len(reporting),
                epsilon=epsilon,
                clip_norm=records.find_norm(measured),
                seconds=round(time.perf_counter() - start, 3),
                **records.communication_cost(
                    experiment, len(cohort), len(reporting), len(ClientMetrics._fields)
                ),
                **worker.measured_bytes(),
            )
            done.append(record)
            yield state, record.public() if accountant else record, evaluation
            if records.is_over(done, config.run):
                return


# == Evaluation ====================================================================================

EVALUATION_BATCH = 1000


@documented_settings()
def build_evaluator(
    network: Network, dataset: Dataset, others: dict[str, Split] | None = None
) -> Callable[[Any], Evaluation]:
    """Return evaluate(weights) -> Evaluation of TFF's ModelWeights on the whole test set.

    `others` are more images, by the name of the column that has the accuracy on them.
    """
    model = build_model(network, seed=0)
    batch_shape = [None, *network.image_shape]
    signature = [tf.TensorSpec(batch_shape, tf.float32), tf.TensorSpec([None], tf.int32)]

    @tf.function(autograph=False, input_signature=signature)
    def evaluate_batch(x: Any, y: Any) -> tuple[Any, Any]:
        logits = model(x, training=False)
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(y, logits)
        return tf.argmax(logits, axis=1), losses

    # Traced now: once `build_process` has made layers in graphs of its own, this model fails.
    evaluate_batch.get_concrete_function()

    def predict(split: Split) -> tuple[np.ndarray, np.ndarray]:
        """Return (predictions [N], cross-entropies float32[N])."""
        results = []
        for start in range(0, len(split.labels), EVALUATION_BATCH):
            batch = slice(start, start + EVALUATION_BATCH)
            y = tf.constant(split.labels[batch], tf.int32)
            results.append(evaluate_batch(to_input(split.images[batch]), y))
        predictions = np.concatenate([predicted for predicted, _ in results])
        losses = np.concatenate([loss for _, loss in results])
        return predictions.astype(split.labels.dtype), losses

    @documented_settings()
    def evaluate(weights: Any) -> Evaluation:
        weights.assign_weights_to(model)
        test = dataset.test
        predictions, losses = predict(test)
        return Evaluation(
            loss=float(losses.mean(dtype=np.float64)),
            accuracy=float(np.mean(predictions == test.labels)),
            labels=test.labels,
            predictions=predictions,
            num_classes=dataset.num_classes,
            beside={
                name: float(np.mean(predict(split)[0] == split.labels))
                for name, split in (others or {}).items()
            },
        )

    return evaluate


# == Main: an experiment is built, run, and saved ==================================================


def check_experiment(experiment: Experiment) -> None:
    """Raise UserError for rows that don't go together, or a budget that allows no round."""
    algorithms.check_memory(experiment.algorithm, experiment.num_parameters)
    algorithms.check_aggregator(experiment.algorithm, experiment.aggregator)
    algorithms.check_sampling(experiment.algorithm, experiment.config.training.sampling)
    if experiment.config.run.baselines:
        baselines.check_labels(experiment.dataset.num_classes)
    if experiment.accountant:
        experiment.accountant.check_budget()


def remarks_on_data(
    dataset: Dataset,
    partition: Partition,
    accountant: privacy.PrivacyAccountant | None,
    rounds: int,
) -> list[str]:
    """Return what the user should know of the data and the split, or of a private run's epsilon.

    A private run tells nothing of its data here: that could be about single clients.
    """
    if accountant:
        return accountant.remarks(rounds)
    return [*dataset.remarks, *partitions.remarks(partition, len(dataset.train.labels))]


def build_experiment(
    config: Config, dataset: Dataset | None = None, partition: Partition | None = None
) -> Experiment:
    """Resolve a configuration, on its own data and split unless others are given.

    Raises UserError for what does not go together.
    """
    chosen = config.to_dict()
    config = config.effective(**options.absolute_paths(chosen))
    if dataset is None:
        dataset = load_dataset(config.data)
    if config.partitioning.num_clients == 0:
        config = config.replace(num_clients=partitions.count_owners(dataset.owners))
    if partition is None:
        partition = make_partition(dataset, config)
    optimization = config.optimization
    rows = {
        "model": models.find(config.training.model, MODELS),
        "partition": PARTITIONERS[config.partition_name],
        "algorithm": ALGORITHMS[optimization.algorithm],
        "client_optimizer": CLIENT_OPTIMIZERS[optimization.client_optimizer],
        "aggregator": AGGREGATORS[config.aggregation.aggregator],
        "attack": adversity.ATTACKS[config.adversity.attack],
    }
    if config.training.initial_model:
        rows["initial_model"] = layers.hash_weights(config.training.initial_model)
    accountant = None
    if rows["aggregator"].private:
        cohorts = partial(sample_clients, config) if config.privacy.public_cohorts else None
        config = privacy.meet_target(config, cohorts)
        accountant = privacy.PrivacyAccountant(config, cohorts)
        results.check_private_origin(config.training.initial_model, dataset)
    experiment = Experiment(
        config=config,
        dataset=dataset,
        partition=partition,
        partitioner=rows["partition"],
        network=make_network(config.training.model, rows["model"], dataset),
        algorithm=rows["algorithm"](config, partition.sizes),
        client_optimizer=rows["client_optimizer"](config.training.client_lr, optimization),
        aggregator=rows["aggregator"],
        behaviour=adversity.ClientBehaviour(config, rows["attack"], dataset.num_classes),
        accountant=accountant,
        row_hashes=program.hash_rows(rows),
        remarks=[
            *program.edited_remarks(),
            *presets.preset_remarks(config, Config()),
            *options.unused_remarks(chosen, Config.defaults()),
            *options.horizon_remarks(config.to_dict()),
            *results.origin_remarks(config.training.initial_model, dataset),
            *remarks_on_data(dataset, partition, accountant, config.training.rounds),
        ],
    )
    check_experiment(experiment)
    return experiment


@dataclass(frozen=True)
class Result:
    """A run's outcome after its last round: the folder with its files, the records of all rounds,
    the evaluation and the state of TFF's process."""

    folder: Path
    records: list[RoundRecord]
    evaluation: Evaluation
    state: Any


def is_default_run(experiment: Experiment, num_rounds: int) -> bool:
    """Return whether this is the run without flags, done to its end: README shows its pictures."""
    config = experiment.config
    default = Config()
    same_numbers = identity(config) == identity(default)
    same_split = config.partition_name == default.partition_name
    same_folder = (config.run.name, config.run.runs) == (default.run.name, default.run.runs)
    is_done = num_rounds == default.training.rounds == config.training.rounds
    has_target = config.run.target_accuracy > 0
    as_shown = form_of(config.run) == form_of(default.run)
    original = experiment.dataset.original
    same_run = same_numbers and same_split and same_folder and original
    return same_run and is_done and as_shown and not has_target


def save_result(folder: RunFolder, experiment: Experiment, result: Result) -> tuple[dict, list]:
    """Write metrics.json, the global model after the last round and the best, and the plots.

    Returns (what metrics.json holds, the paths of all files written).
    """
    weights = result.state.global_model_weights
    caption = plots.join_parts(
        [
            captions.caption(experiment),
            records.format_epsilon(result.records[-1]),
            folder.program_note(),
        ]
    )
    metrics = results.describe(experiment, weights.trainable, result.evaluation, result.records)
    build_model_of = partial(build_saved_model, experiment.network)
    figures = plots.result_figures(experiment, result, caption)
    for_readme = is_default_run(experiment, len(result.records))
    return metrics, folder.finish(metrics, weights, build_model_of, figures, caption, for_readme)


@documented_settings()
def save_clients(
    folder: RunFolder, experiment: Experiment, state: Any, record: RoundRecord
) -> None:
    """Save what each client of the record's round sent, as models.

    `state` is that before the round, None for the first. The clients are trained once more, here,
    by the same function of (seed, round, client); the last bits may be others than the worker's.
    A client whose update was not finite sent nothing that counted, and has no model.
    """
    client_update = tf.function(build_client_update(experiment), autograph=False)
    slots = experiment.algorithm.memory_slots()
    memory = np.zeros([slots, experiment.num_parameters if slots else 0], np.float32)
    weights = experiment.initial_weights
    if state is not None:
        memory = state.client_work.memory
        weights = state.global_model_weights.trainable
    initial = tuple(map(tf.constant, weights))
    round_num = tf.constant(record.round, tf.int64)
    folder.remove_clients()
    for client in sorted({report["client"] for report in record.clients if report["finite"]}):
        output = client_update(
            initial, tf.constant(memory), round_num, tf.constant(client, tf.int64)
        )
        scale = output.effective_steps if experiment.algorithm.normalize_by_steps else 1.0
        own = [old - scale * u for old, u in zip(initial, output.update, strict=True)]
        sent = tff.learning.models.ModelWeights([w.numpy() for w in own], [])
        folder.save_client(client, build_saved_model(experiment.network, sent))


def print_round(experiment: Experiment, record: RoundRecord, earlier: list[RoundRecord]) -> None:
    """Print a round's line, and a notice of what seems wrong with it after those before."""
    rounds = experiment.config.training.rounds
    print_line(record.line(rounds))
    trouble = record.trouble(earlier, experiment.dataset.chance, record.round == rounds)
    if trouble:
        warn(f"round {record.round}: {trouble}")


@command_line.one_at_a_time()
def run(
    config: Config,
    how_to_go_on: str = "",
    *,
    dataset: Dataset | None = None,
    on_round: Callable[[RoundRecord], Any] | None = None,
) -> Result:
    """Run one experiment, from data to plots. Ctrl-C keeps the rounds that are done.

    `how_to_go_on` says what continues a run that was stopped; by default it is --resume. `dataset`
    is one of `build_dataset`, in place of the configuration's. `on_round` gets the record of each
    new round, once the round is saved. Raises UserError for the user's mistakes, and RunFailed if a
    round cannot be done.
    """
    command_line.check_single(config)
    experiment = build_experiment(config, dataset)
    config = experiment.config
    caption = captions.caption(experiment)
    build_model_of = partial(build_saved_model, experiment.network)
    result = None
    before = None  # the state before the last round
    has_new_round = False
    experiment.check()
    with RunFolder.open(experiment, how_to_go_on, dataset is not None) as folder:
        print_line(f"{caption}\n")
        for remark in experiment.remarks:
            warn(remark)
        state, earlier_records = folder.load(experiment)
        if earlier_records:
            evaluation = experiment.evaluate(state.global_model_weights)
            result = Result(folder.path, earlier_records, evaluation, state)
        new_rounds = iter(())
        if records.is_over(earlier_records, config.run):
            print_line(records.describe_end(earlier_records, config.run))
        else:
            new_rounds = run_rounds(experiment, state, folder.log, folder.journal, earlier_records)
        progress = command_line.Progress(
            config.training.rounds, len(earlier_records), timed=not experiment.accountant
        )
        try:
            for state, record, evaluation in progress.follow(new_rounds):
                draw_confusion = partial(
                    plots.plot_confusion, evaluation, caption, experiment.dataset.classes
                )
                folder.save_round(record, state, draw_confusion, build_model_of)
                earlier = result.records if result else []
                before = result.state if result else None
                has_new_round = True
                result = Result(folder.path, [*earlier, record], evaluation, state)
                print_round(experiment, record, earlier)
                if on_round:
                    on_round(record)
        except (KeyboardInterrupt, Exception) as error:
            with contextlib.suppress(Exception):  # what stopped the run is what the user must know
                if result:
                    save_result(folder, experiment, result)
            num_done = len(result.records) if result else 0
            warn(f"stopped after round {num_done}; {folder.what_next()}")
            if isinstance(error, KeyboardInterrupt):
                raise command_line.Stopped(f"after round {num_done}") from None
            raise
        if result is None:  # the privacy budget was spent by rounds that were begun and not done
            raise UserError(
                f"epsilon_budget={config.privacy.epsilon_budget:g} allows no further round, and "
                "none was done; choose more, or start a new run"
            )
        if config.run.save_clients and not has_new_round:
            warn("no new round was done: save_clients=True saves no clients' models")
        elif config.run.save_clients:
            save_clients(folder, experiment, before, result.records[-1])
        metrics, paths = save_result(folder, experiment, result)
        results.print_summary(metrics, paths, folder.seconds, is_one_of_many=bool(how_to_go_on))
        if config.run.baselines:
            baselines.run_baselines(experiment, result, folder, build_experiment, build_evaluator)
    return result


@command_line.one_at_a_time()
def compare(config: Config) -> Path:
    """Run every choice and seed that is compared; return the folder with the table and the plot.

    Raises UserError if the configuration compares nothing, and for what `run` refuses.
    """
    if compared_rows(config) is None:
        raise UserError(
            f"compare={config.comparison.compare!r:.60} with seeds=1 leaves nothing to compare; "
            "give choices such as compare='fedavg,fedprox', or seeds=3"
        )
    config = config.replace(**options.absolute_paths(config.to_dict()))
    dataset = load_dataset(config.data)
    for remark in options.unused_remarks(config.to_dict(), Config.defaults()):
        warn(remark)
    build = partial(build_experiment, dataset=dataset)
    return comparison.compare(config, captions.compared_caption(config, build), build, run)


@command_line.one_at_a_time()
def evaluate_saved(config: Config) -> Path:
    """Evaluate the model of the run that --evaluate names on the configuration's data.

    Return the folder with metrics.json and the plots. Raises UserError for data with other images
    or labels than those that the model was trained on.
    """
    saved = command_line.read_saved(config.run.evaluate, Config())
    source = expand_path(config.run.evaluate)
    dataset = load_dataset(config.replace(**options.absolute_paths(config.to_dict())).data)
    results.check_classes(source, dataset)
    name = saved.training.model
    if name not in MODELS:  # that folder may be somebody else's, and would have us run its file
        if config.training.model in MODELS:
            trust.check_model(name, config.run.evaluate)
        else:
            name = config.training.model
    network = make_network(name, models.find(name, MODELS), dataset)
    file = str(source / "global_model.keras")
    weights = layers.read_weights(file, build_model(network, seed=0))
    evaluate = build_evaluator(network, dataset)
    evaluation = evaluate(tff.learning.models.ModelWeights(weights, []))
    origin = results.describe_origin(source, dataset)
    caption = plots.join_parts([dataset.name, f"the model of {source.name}{origin}"])
    return run_folder.write_evaluation(config, saved, dataset, evaluation, weights, caption)


def main(config: Config) -> None:
    """Do what a command line asks for."""
    if config.run.version or config.run.list:
        answer_at_once(config)
        return
    check_paths(config)
    if config.run.evaluate:
        evaluate_saved(config)
    elif overlaid_folders(config.comparison.compare):
        overlay.overlay(config, Config())
    elif compared_rows(config):
        compare(config)
    else:
        run(config)


if __name__ == "__main__":
    gc.freeze()  # what is imported stays
    gc.enable()
    command_line.run_or_exit(main, parsed_config)
    gc.freeze()  # spares a last collection: the process ends
