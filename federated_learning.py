#!/usr/bin/env python3
"""Federated learning on MNIST: FedAvg over non-IID clients through TensorFlow Federated, in one readable script.

    config -> data -> partition -> shard files -> federated process (TFF) -> rounds -> evaluation -> plots, model
                                       ^                 | client ids, weights |
                                       +-- read only by the worker that trains -+

Federated averaging [1, Algorithm 1]; `build_process` says the same with TFF's templates:

    w <- initial weights
    for round t = 1, 2, ...:
        S <- clients_per_round of the num_clients clients, drawn from (seed, t)
        for each client k in S, on its own shard:             # in TFF's worker, clients side by side
            w_k <- w after local_epochs of SGD on batches of batch_size
        w <- sum over k in S of (n_k / n) w_k                 # n_k examples on client k, n on all of S

    python federated_learning.py                                    # 10 clients, Dirichlet(0.5), 5 rounds
    python federated_learning.py --partition shards --rounds 50     # McMahan's pathological non-IID split
    python federated_learning.py --help                             # every flag

Randomness is a pure function of (seed, round, client): the same command gives the same weights, bit for bit.

[1] McMahan et al. 2017, Communication-Efficient Learning of Deep Networks from Decentralized Data (AISTATS)
[2] Yurochkin et al. 2019, Bayesian Nonparametric Federated Learning of Neural Networks (ICML)
[3] Reddi et al. 2021, Adaptive Federated Optimization (ICLR)
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import hashlib
import importlib.util
import io
import json
import math
import os
import platform
import shlex
import signal
import subprocess
import sys
import threading
import time
import typing
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple


def refuse(reason: str) -> None:
    """Ends the script with one line and exit code 2, or an import of it with an ImportError of that line."""
    if __name__ != "__main__":
        raise ImportError(reason)
    print(f"federated_learning.py: {reason}", file=sys.stderr)
    sys.exit(2)


def lazy(name: str) -> Any:
    """The module `name`, loaded at its first use: `--help` and a wrong flag answer at once, not after 6 seconds."""
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.find_spec(name)
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError(name=name)
    spec.loader = importlib.util.LazyLoader(spec.loader)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if sys.version_info[:2] != (3, 11) or sys.platform != "linux" or platform.machine() != "x86_64":
    refuse(
        f"Python {platform.python_version()} on {sys.platform} {platform.machine()} cannot run TensorFlow Federated "
        "0.87, which needs Python 3.11 on Linux x86-64; there, `make run` sets everything up"
    )
try:
    import grpc
    import numpy as np
    import portpicker
    import psutil
    import tqdm
    import tyro

    sklearn, plt = lazy("sklearn"), lazy("matplotlib.figure")
    tf, tff = lazy("tensorflow"), lazy("tensorflow_federated")
except ModuleNotFoundError as missing:
    refuse(f"{missing.name} is not installed; `make run` or `pip install --no-deps -r requirements.txt` installs it")


class UserError(Exception):
    """A mistake that the user can cure: printed as one line that names field, value and cure; exit code 2."""


# ======================================================================================================================
# Config: one experiment; the command line is made from it
# ======================================================================================================================


class Range(NamedTuple):
    """The closed interval that a number in `Config` must lie in."""

    low: float
    high: float


def whole(low: int, high: int) -> Any:
    """Annotation of a whole number in low..high, which `--help` shows."""
    return Annotated[int, Range(low, high), tyro.conf.arg(metavar=f"{low}..{high}")]


def real(low: float, high: float) -> Any:
    """Annotation of a real number in low..high, which `--help` shows."""
    return Annotated[float, Range(low, high), tyro.conf.arg(metavar=f"{low:g}..{high:g}")]


def one_of(table: Sequence[str] | dict[str, Any]) -> Any:
    """Annotation of a name in `table`: the one place where a variant's name is spelled is its table's row."""
    return Literal[tuple(table)]


@dataclass(frozen=True)
class Config:
    """One experiment. Every field is a flag (`clients_per_round` is `--clients-per-round`)."""

    dataset: one_of(["mnist", "digits"]) = "mnist"
    """mnist: data/mnist.npz beside the script. digits: scikit-learn's 1,797 8x8 digits, a run of seconds."""
    data: str = ""
    """Another .npz with Keras' keys x_train, y_train, x_test, y_test (or the environment variable FL_DATA)."""

    partition: one_of(PARTITIONERS) = "dirichlet"
    """How the training images are split over the clients. iid: shuffled and dealt out. shards: sorted by label,
    `shards_per_client` pieces a client [McMahan et al. 2017]. dirichlet: each label's images in proportions drawn from
    Dirichlet(alpha) [Yurochkin et al. 2019]."""
    alpha: real(0.001, 1e6) = 0.5
    """Dirichlet concentration; smaller is more skewed. Used by dirichlet."""
    shards_per_client: whole(1, 1000) = 2
    """Label-sorted shards that a client gets. Used by shards."""
    num_clients: whole(1, 60_000) = 10
    """Clients, K."""
    clients_per_round: whole(0, 60_000) = 0
    """Clients drawn for each round, m; 0: all."""

    model: one_of(MODELS) = "small-cnn"
    """The network that every client trains. mlp: 784-128-10. 2nn, cnn: McMahan's. small-cnn: two 5x5 convolutions."""
    algorithm: one_of(ALGORITHMS) = "fedavg"
    """What clients and server do with the gradients and the updates."""
    aggregator: one_of(AGGREGATORS) = "mean"
    """How the clients' updates become one; mean: weighted by their numbers of examples."""
    rounds: whole(1, 100_000) = 5
    """Rounds of communication, T."""
    local_epochs: whole(1, 1000) = 2
    """Passes that a client makes over its shard in a round, E."""
    batch_size: whole(0, 60_000) = 16
    """Examples in a local batch, B; 0: the client's whole shard."""
    client_lr: real(0, 1000) = 0.1
    """Learning rate of the clients' SGD."""

    seed: whole(0, 2**31 - 1) = 0
    """Seed of the split, the initial weights, the sampling of clients and the order of the batches."""
    runs: str = "runs"
    """Folder in which the run's own folder is made."""
    name: str = ""
    """Name of the run's folder; by default made of data, partition, algorithm, model and seed."""
    cache: str = ".cache"
    """Folder in which the clients' shard files are kept and reused."""

    def __post_init__(self) -> None:
        """Raises UserError for a value of the wrong type or range, or a clash of two."""
        for field, hint in typing.get_type_hints(Config, include_extras=True).items():
            check_value(field, getattr(self, field), hint)
        if self.clients_per_round > self.num_clients:
            raise UserError(f"clients_per_round={self.clients_per_round} exceeds num_clients={self.num_clients}; "
                            f"choose 1..{self.num_clients}, or 0 for all")  # fmt: skip
        if self.dataset == "digits" and self.data:
            raise UserError(f"data={self.data!r} replaces mnist and dataset='digits' is built in; drop one of the two")
        if self.name and (self.name in (".", "..") or set(self.name) & set("/\0") or len(self.name.encode()) > 200):
            raise UserError(f"name={self.name[:50]!r} is not a folder's name; choose up to 200 letters, digits, - or _")

    @property
    def cohort(self) -> int:
        """Clients that train in a round, m."""
        return self.clients_per_round or self.num_clients


PLACES = {"runs", "name", "cache"}  # the fields that say where a run lies, not what it computes


def check_value(field: str, value: Any, hint: Any) -> None:
    """Raises UserError unless `value` is what `hint`, an annotation of `Config`, asks for."""
    choices, span = (
        typing.get_args(hint),
        next((m for m in getattr(hint, "__metadata__", ()) if type(m) is Range), None),
    )
    if span is None:
        if not isinstance(value, str) or (choices and value not in choices):
            raise UserError(f"{field}={value!r} is unknown; choose {', '.join(choices) if choices else 'a text'}")
        return
    kinds = int if hint.__origin__ is int else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not span.low <= value <= span.high:
        what = "whole number" if kinds is int else "number"
        raise UserError(f"{field}={value!r} is not a {what} in range; choose {span.low:g}..{span.high:g}")


# ======================================================================================================================
# Data
# ======================================================================================================================

IMAGE_SIDE = 28
MAX_CLASSES = 100
MNIST_FILE = Path(__file__).resolve().parent / "data" / "mnist.npz"
MNIST_SHA256 = {
    "x_train": "741c988805d008ac6e4c904b69001ba184c24b2c540a4ef403f4c71b676cf757",
    "y_train": "1feba77c54802fa5339a11837ea4b2866434b83314ec45192930f1df69120c13",
    "x_test": "6d87418db22cc8025d05968bec9bd5c3932904b23485740db143a061a2c9d161",
    "y_test": "ddeff807876a9661a1110d45c266c86239a3a1b7d37da0c3716a7a683c852ff5",
}  # of each array's bytes; the keys are those of Keras' own mnist.npz


@dataclass(frozen=True)
class Split:
    """images uint8[N,28,28] in 0..255, labels uint8[N] in 0..C-1."""

    images: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Dataset:
    """A training and a test split; `name` stands in every plot, `original` says that all bytes are MNIST's own."""

    name: str
    train: Split
    test: Split
    original: bool
    digest: str  # SHA-256 over the four arrays

    @property
    def num_classes(self) -> int:
        """Labels are 0..C-1, C = 10 for MNIST."""
        return int(self.train.labels.max()) + 1


def load_dataset(config: Config) -> Dataset:
    """The data set that `config` asks for, checked. Raises UserError where it is missing or not well-formed."""
    if config.dataset == "digits":
        return make_dataset("scikit-learn digits (not MNIST)", load_digits())
    path = config.data or os.environ.get("FL_DATA", "")
    if not path:
        return make_dataset("MNIST", read_npz(MNIST_FILE), must_be_original=True)
    return make_dataset("MNIST", read_npz(Path(path).expanduser()))


def make_dataset(name: str, arrays: dict[str, np.ndarray], must_be_original: bool = False) -> Dataset:
    """Names what the four arrays are by their SHA-256. Raises UserError for a committed MNIST that has changed."""
    shas = {key: hashlib.sha256(array.tobytes()).hexdigest() for key, array in arrays.items()}
    changed = [key for key in shas if shas[key] != MNIST_SHA256[key]]
    if changed and must_be_original:
        raise UserError(f"{MNIST_FILE}: {changed[0]} is not MNIST's (its SHA-256 differs); restore the committed file")
    if changed and name == "MNIST":
        name = "not the original MNIST"
    train, test = Split(arrays["x_train"], arrays["y_train"]), Split(arrays["x_test"], arrays["y_test"])
    return Dataset(name, train, test, not changed, hashlib.sha256("".join(shas.values()).encode()).hexdigest())


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """The four arrays of an .npz with Keras' keys, as uint8. Raises UserError with what is wrong in the file."""
    try:
        with np.load(path, allow_pickle=False) as npz:
            absent = sorted(set(MNIST_SHA256) - set(npz.files))
            if absent:
                raise UserError(f"data={str(path)!r} has no array {absent[0]}; it needs {', '.join(MNIST_SHA256)}")
            arrays = {key: npz[key] for key in MNIST_SHA256}
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        reason = getattr(error, "strerror", None) or "truncated, or no .npz"
        raise UserError(f"data={str(path)!r} cannot be read ({reason}); give a whole .npz with Keras' keys") from error
    for part in ("train", "test"):
        check_arrays(f"data={str(path)!r}", part, arrays["x_" + part], arrays["y_" + part])
    present = np.unique(arrays["y_train"])
    top = int(max(present[-1], arrays["y_test"].max()))
    if len(present) != top + 1:
        lost = min(set(range(top + 1)) - set(present.tolist()))
        raise UserError(
            f"data={str(path)!r}: no image in y_train has label {lost}; labels must be 0..C-1, each present"
        )
    return {key: np.ascontiguousarray(array, np.uint8) for key, array in arrays.items()}


def check_arrays(source: str, part: str, images: np.ndarray, labels: np.ndarray) -> None:
    """Raises UserError unless images are uint8[n,28,28] with n > 0 and labels n whole numbers in 0..MAX_CLASSES-1."""
    if images.dtype != np.uint8:
        raise UserError(f"{source}: x_{part} is {images.dtype}; images must be uint8 in 0..255")
    if images.ndim != 3 or images.shape[1:] != (IMAGE_SIDE, IMAGE_SIDE) or len(images) == 0:
        raise UserError(
            f"{source}: x_{part} has shape {images.shape}; it must be (n, {IMAGE_SIDE}, {IMAGE_SIDE}), n > 0"
        )
    if labels.dtype.kind not in "ui":
        raise UserError(f"{source}: y_{part} is {labels.dtype}; labels must be whole numbers")
    if labels.shape != images.shape[:1]:
        raise UserError(f"{source}: y_{part} has shape {labels.shape}; it must be {images.shape[:1]}, a label an image")
    if labels.min() < 0 or labels.max() >= MAX_CLASSES:
        raise UserError(
            f"{source}: y_{part} spans {labels.min()}..{labels.max()}; labels must lie in 0..{MAX_CLASSES - 1}"
        )


def load_digits() -> dict[str, np.ndarray]:
    """scikit-learn's 1,797 digits, 8x8 in 0..16, as 28x28 in 0..255: each pixel three wide, a margin of two."""
    bunch = sklearn.datasets.load_digits()
    images = np.kron(bunch.images, np.ones((3, 3))) * (255 / 16)
    images = np.pad(images, [(0, 0), (2, 2), (2, 2)]).round().astype(np.uint8)
    parts = sklearn.model_selection.train_test_split(
        images, bunch.target.astype(np.uint8), test_size=0.2, random_state=0, stratify=bunch.target
    )
    return dict(zip(("x_train", "x_test", "y_train", "y_test"), parts, strict=True))


# ======================================================================================================================
# Partition: which images each client holds
# ======================================================================================================================


def split_iid(labels: np.ndarray, config: Config, rng: np.random.Generator) -> list[np.ndarray]:
    """Shuffled and dealt out: sizes differ by one at most, labels by chance only."""
    return np.array_split(rng.permutation(len(labels)), config.num_clients)


def split_shards(labels: np.ndarray, config: Config, rng: np.random.Generator) -> list[np.ndarray]:
    """Sorted by label, cut into K * shards_per_client pieces, dealt out at random (McMahan et al. 2017, section 3)."""
    pieces = np.array_split(np.argsort(labels, kind="stable"), config.num_clients * config.shards_per_client)
    dealt = rng.permutation(len(pieces)).reshape(config.num_clients, config.shards_per_client)
    return [np.concatenate([pieces[p] for p in row]) for row in dealt]


def split_dirichlet(labels: np.ndarray, config: Config, rng: np.random.Generator) -> list[np.ndarray]:
    """Each label's images go to the clients in shares drawn from Dirichlet(alpha) (Yurochkin et al. 2019)."""
    owner = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        images = rng.permutation(np.flatnonzero(labels == label))
        shares = rng.dirichlet(np.full(config.num_clients, config.alpha))
        cuts = (np.cumsum(shares)[:-1] * len(images)).round().astype(np.int64)
        owner[images] = np.searchsorted(cuts, np.arange(len(images)), side="right")
    return np.split(np.argsort(owner, kind="stable"), np.bincount(owner, minlength=config.num_clients).cumsum()[:-1])


PARTITIONERS = {"iid": split_iid, "shards": split_shards, "dirichlet": split_dirichlet}


@dataclass(frozen=True)
class Partition:
    """parts: K arrays int64[n_k] of training indices, disjoint, none empty, covering all; counts int64[K,C]."""

    parts: list[np.ndarray]
    counts: np.ndarray
    digest: str  # of the data set and of every client's indices: the shard files' name

    @property
    def sizes(self) -> np.ndarray:
        """Images a client, n_k, int64[K]."""
        return self.counts.sum(axis=1)


def make_partition(dataset: Dataset, config: Config) -> Partition:
    """The split of the training images over the clients: a function of data, partition flags and seed alone."""
    labels = dataset.train.labels
    if config.num_clients > len(labels):
        raise UserError(f"num_clients={config.num_clients} exceeds the {len(labels)} training images; "
                        f"choose 1..{len(labels)}")  # fmt: skip
    split = PARTITIONERS[config.partition](labels, config, np.random.default_rng(config.seed))
    parts = [np.sort(part).astype(np.int64) for part in fill_empty(split)]
    counts = np.stack([np.bincount(labels[part], minlength=dataset.num_classes) for part in parts])  # (K, C)
    digest = hashlib.sha256(dataset.digest.encode())
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part.tobytes())
    return Partition(parts, counts, digest.hexdigest()[:16])


def fill_empty(parts: list[np.ndarray]) -> list[np.ndarray]:
    """Gives each client that got nothing an image of the one that has the most: without data nobody takes part."""
    sizes = np.array([len(part) for part in parts])
    for empty in np.flatnonzero(sizes == 0):
        donor = int(sizes.argmax())
        parts[empty], parts[donor] = parts[donor][-1:], parts[donor][:-1]
        sizes[empty], sizes[donor] = 1, sizes[donor] - 1
    return parts


def skew(counts: np.ndarray) -> dict[str, float]:
    """How far label counts int64[K,C] are from IID: 0, C and 0 for clients that are alike and balanced.

    The mean total-variation distance of a client's label distribution to the pooled one, the mean effective number of
    classes (the exponential of the entropy in nats), and the Gini coefficient of the clients' sizes.
    """
    shares, pooled = counts / counts.sum(axis=1, keepdims=True), counts.sum(axis=0) / counts.sum()
    logs = np.log(shares, where=shares > 0, out=np.zeros_like(shares))
    sizes = np.sort(counts.sum(axis=1))
    ranks = 2 * np.arange(1, len(sizes) + 1) - len(sizes) - 1
    return {
        "mean_total_variation": float(np.abs(shares - pooled).sum(axis=1).mean() / 2),
        "effective_classes": float(np.exp(-(shares * logs).sum(axis=1)).mean()),
        "size_gini": float((ranks * sizes).sum() / (len(sizes) * sizes.sum())),
    }


def manifest(dataset: Dataset, partition: Partition, config: Config) -> dict[str, Any]:
    """What partition.json holds: what was split how, how skewed it came out, and every client's indices."""
    return {
        "dataset": dataset.name,
        "dataset_sha256": dataset.digest,
        "partition": config.partition,
        "seed": config.seed,
        "hash": partition.digest,
        "skew": skew(partition.counts),
        "label_counts": partition.counts.tolist(),
        "indices": [part.tolist() for part in partition.parts],
    }


# ======================================================================================================================
# Shards: each client's images in a file of its own, read only by the worker that trains
# ======================================================================================================================

RECORD_BYTES = IMAGE_SIDE * IMAGE_SIDE + 1  # 784 pixels and the label


def write_shards(dataset: Dataset, partition: Partition, config: Config) -> Path:
    """The folder of the shard files, `<client>.bin` of uint8[n_k,785]; writes those not there and whole already.

    Its name carries the partition's hash, so a shard of another split is never read.
    """
    folder = Path(config.cache).expanduser().absolute() / f"shards-{partition.digest}"
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for client, part in enumerate(partition.parts):
        pixels = dataset.train.images[part].reshape(len(part), -1)
        records = np.concatenate([pixels, dataset.train.labels[part, None]], axis=1).tobytes()
        path = folder / f"{client}.bin"
        if not path.exists() or path.read_bytes() != records:
            write_file(path, records)
    return folder


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns a failure to write `path` (disk full, read-only, gone) into one line that names it."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {error.filename or path}: {error.strerror}; "
                        "free space or choose another folder") from error  # fmt: skip


def write_file(path: Path, data: bytes | str) -> None:
    """`path` holds all of `data`, or what it held before, at whatever moment we are killed."""
    part = path.with_name(f".{os.getpid()}-{path.name}")
    with writing(path):
        try:
            part.write_bytes(data.encode() if isinstance(data, str) else data)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


# ======================================================================================================================
# Model: Keras layers from float32[n,28,28,1] in 0..1 to C logits
# ======================================================================================================================


def conv(filters: int) -> list[Any]:
    """A 5x5 convolution that keeps the size, then 2x2 max-pooling."""
    layers = tf.keras.layers
    return [layers.Conv2D(filters, 5, padding="same", activation="relu"), layers.MaxPool2D()]


def dense(*units: int, activation: str = "relu") -> list[Any]:
    """Flattened, then fully connected layers."""
    return [tf.keras.layers.Flatten(), *(tf.keras.layers.Dense(n, activation) for n in units)]


MODELS: dict[str, Callable[[], list[Any]]] = {  # the layers before the logits
    "mlp": lambda: dense(128),
    "2nn": lambda: dense(200, 200),  # McMahan et al. 2017, section 3
    "cnn": lambda: conv(32) + conv(64) + dense(512),  # the same
    "small-cnn": lambda: conv(16) + conv(32) + dense(128),
}


def build_model(config: Config, num_classes: int) -> Any:
    """A Keras model of the row with its initial weights, a function of the seed alone: Glorot uniform, zero biases."""
    layers = [tf.keras.Input((IMAGE_SIDE, IMAGE_SIDE, 1)), *MODELS[config.model](), tf.keras.layers.Dense(num_classes)]
    model = tf.keras.Sequential(layers)
    weights = []
    for position, weight in enumerate(model.get_weights()):
        glorot = tf.keras.initializers.GlorotUniform(seed=config.seed + 2**31 * position)
        weights.append(glorot(weight.shape).numpy() if weight.ndim > 1 else np.zeros_like(weight))
    model.set_weights(weights)
    return model


def to_input(pixels: Any) -> Any:
    """uint8[n,784] or [n,28,28] -> float32[n,28,28,1] in 0..1."""
    return tf.reshape(tf.cast(pixels, tf.float32) / 255, [-1, IMAGE_SIDE, IMAGE_SIDE, 1])


def loss_function() -> Any:
    """Mean cross-entropy of a batch, in nats."""
    return tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)


# ======================================================================================================================
# Federated process: next(state, client ids) is one round
# ======================================================================================================================


def build_local_training(model: Any, config: Config, adjust: Callable) -> Callable:
    """local_training(initial, records, key) -> (weights, sums): a client's SGD as one graph loop, pure in these.

    `initial` are the trainable weights, `records` uint8[n_k,785], `key` int64[2]. `sums` holds float32 sums over the
    examples as they were trained on: loss, correct, examples. `adjust(gradients, weights, initial)` is an algorithm's
    place to change the gradients. `model` is a TFF functional model.
    """
    optimizer = tff.learning.optimizers.build_sgdm(config.client_lr)

    @tf.function
    def local_training(initial, records, key):
        pixels, labels = records[:, :-1], tf.cast(records[:, -1], tf.int32)
        size = tf.shape(records)[0]
        batch = config.batch_size or size
        weights = initial
        state = optimizer.initialize(tf.nest.map_structure(lambda w: tf.TensorSpec(w.shape, w.dtype), initial))
        loss_sum = correct = 0.0
        for epoch in tf.range(config.local_epochs, dtype=tf.int64):
            epoch_key = tf.random.experimental.stateless_fold_in(key, epoch)
            order = tf.random.experimental.stateless_shuffle(tf.range(size), epoch_key)
            for start in tf.range(0, size, batch):
                tf.autograph.experimental.set_loop_options(parallel_iterations=1)
                chosen = order[start : start + batch]
                x, y = to_input(tf.gather(pixels, chosen)), tf.gather(labels, chosen)
                with tf.GradientTape() as tape:
                    tape.watch(weights)
                    logits = model.predict_on_batch((weights, ()), x, training=True)
                    loss = model.loss(logits, y)
                gradients = adjust(tape.gradient(loss, weights), weights, initial)
                state, weights = optimizer.next(state, weights, gradients)
                hits = tf.cast(tf.equal(tf.argmax(logits, axis=1, output_type=tf.int32), y), tf.float32)
                loss_sum += loss * tf.cast(tf.size(y), tf.float32)
                correct += tf.reduce_sum(hits)
        examples = tf.cast(size, tf.float32) * config.local_epochs
        return weights, {"loss": loss_sum, "correct": correct, "examples": examples}

    return local_training


class ClientResult(NamedTuple):
    """What leaves a client: `update` is w - w_k, `weight` n_k (both 0 if `finite` is False), the rest its report."""

    update: Any
    weight: Any
    report: Any


def keep_gradients(gradients: Any, weights: Any, initial: Any) -> Any:
    """FedAvg: plain SGD on each client."""
    return gradients


@dataclass(frozen=True)
class Algorithm:
    """A row of ALGORITHMS: what the clients do to their gradients, and the server's optimizer."""

    adjust: Callable[[Any, Any, Any], Any]
    server: Callable[[Config], Any]


ALGORITHMS = {
    # w <- w - 1.0 * sum_k (n_k / n) (w - w_k) = sum_k (n_k / n) w_k  (McMahan et al. 2017, Algorithm 1)
    "fedavg": Algorithm(keep_gradients, lambda config: tff.learning.optimizers.build_sgdm(1.0)),
}
AGGREGATORS: dict[str, Callable[[Config], Any]] = {  # TFF weighted aggregation factories
    "mean": lambda config: tff.aggregators.MeanFactory(no_nan_division=True),
}


def build_process(config: Config, num_classes: int, shards: Path) -> Any:
    """TFF IterativeProcess: next(state, client ids int64[m]) -> (state, measurements, a report for each id, in order).

    `state` is a tff LearningAlgorithmState whose `client_work` counts the rounds: all randomness of a round comes from
    (seed, round, client), so `next` is a pure function of its arguments.
    """
    templates, algorithm = tff.learning.templates, ALGORITHMS[config.algorithm]
    batch = (tf.TensorSpec([None, IMAGE_SIDE, IMAGE_SIDE, 1], tf.float32), tf.TensorSpec([None], tf.int32))
    model = tff.learning.models.functional_model_from_keras(build_model(config, num_classes), loss_function(), batch)
    initial = tff.learning.models.ModelWeights(tuple(model.initial_weights[0]), ())
    local_training = build_local_training(model, config, algorithm.adjust)
    number = tff.TensorType(np.int64)

    @tff.tensorflow.computation
    def initial_weights():
        return tf.nest.map_structure(tf.constant, initial)

    weights_type = initial_weights.type_signature.result

    @tff.tensorflow.computation(number)
    def next_number(round_num):
        return round_num + 1

    @tff.tensorflow.computation(weights_type, number, number)
    def train_client(weights, round_num, client):
        path = tf.strings.join([str(shards) + "/", tf.strings.as_string(client), ".bin"])
        records = tf.reshape(tf.io.decode_raw(tf.io.read_file(path), tf.uint8), [-1, RECORD_BYTES])
        key = tf.random.experimental.stateless_fold_in(
            tf.stack([tf.constant(config.seed, tf.int64), client]), round_num
        )
        before = tuple(weights.trainable)
        after, sums = local_training(before, records, key)
        finite = tf.reduce_all([tf.reduce_all(tf.math.is_finite(w)) for w in after])
        update = tuple(tf.where(finite, b - a, 0) for b, a in zip(before, after, strict=True))
        weight = tf.where(finite, tf.cast(tf.shape(records)[0], tf.float32), 0)  # a diverged client is left out
        return ClientResult(update, weight, {**sums, "finite": finite})

    broadcast = templates.build_broadcast_process(weights_type)
    aggregate = AGGREGATORS[config.aggregator](config).create(weights_type.trainable, tff.TensorType(np.float32))
    finalize = templates.build_apply_optimizer_finalizer(algorithm.server(config), weights_type)

    @tff.federated_computation
    def initialize():
        return tff.federated_zip(
            templates.LearningAlgorithmState(
                tff.federated_eval(initial_weights, tff.SERVER),
                broadcast.initialize(),
                tff.federated_value(np.int64(0), tff.SERVER),
                aggregate.initialize(),
                finalize.initialize(),
            )
        )

    @tff.federated_computation(initialize.type_signature.result, tff.FederatedType(number, tff.CLIENTS))
    def next_round(state, clients):
        round_num = tff.federated_map(next_number, state.client_work)
        sent = broadcast.next(state.distributor, state.global_model_weights)
        trained = tff.federated_map(train_client, (sent.result, tff.federated_broadcast(round_num), clients))
        mean = aggregate.next(state.aggregator, trained.update, trained.weight)
        new = finalize.next(state.finalizer, state.global_model_weights, mean.result)
        state = templates.LearningAlgorithmState(new.result, sent.state, round_num, mean.state, new.state)
        return tff.federated_zip(state), mean.measurements, trained.report

    return tff.templates.IterativeProcess(initialize, next_round, next_is_multi_arg=True)
