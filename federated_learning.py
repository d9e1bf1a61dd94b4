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
    python federated_learning.py --compare fedavg,fedprox,scaffold  # one plot, the same split and seed
    python federated_learning.py --help                             # every flag

Randomness is a pure function of (seed, round, client): the same command gives the same weights, bit for bit.

[1] McMahan et al. 2017, Communication-Efficient Learning of Deep Networks from Decentralized Data (AISTATS)
[2] Yurochkin et al. 2019, Bayesian Nonparametric Federated Learning of Neural Networks (ICML)
[3] Reddi et al. 2021, Adaptive Federated Optimization (ICLR)
The papers of what only a flag reaches stand in variants/__init__.py.
"""

from __future__ import annotations

import contextlib
import csv
import ctypes
import dataclasses
import errno
import fcntl
import hashlib
import heapq
import importlib.util
import inspect
import io
import itertools
import json
import math
import os
import platform
import re
import select
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import typing
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
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
    import psutil
    import tqdm
    import tyro

    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # read when TensorFlow and gRPC load, by us or by somebody else
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    figures, ticker, sklearn = lazy("matplotlib.figure"), lazy("matplotlib.ticker"), lazy("sklearn")
    tf, tff = lazy("tensorflow"), lazy("tensorflow_federated")
    adversity, algorithms = lazy("variants.adversity"), lazy("variants.algorithms")
    partitions, privacy = lazy("variants.partitions"), lazy("variants.privacy")
    robust, rows_of = lazy("variants.robust"), lazy("variants.rows")
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

    holdout: whole(0, 50_000) = 0
    """Training images held out, and evaluated on in place of the test set: for choosing hyper-parameters."""

    partition: one_of(PARTITIONERS) = "dirichlet"
    """How the training images are split over the clients. iid: shuffled and dealt out. shards: sorted by label,
    `shards_per_client` pieces a client [McMahan et al. 2017]. dirichlet: each label's images in proportions drawn from
    Dirichlet(alpha) [Yurochkin et al. 2019]. labels-per-client: images of exactly `labels_per_client` labels each
    [Li et al. 2022]. quantity: sizes by a power law, labels IID. feature: IID, but each client's images are rotated
    and made noisy in its own way [Li et al. 2022]. file: as `partition_file` says."""
    alpha: real(0.001, 1e6) = 0.5
    """Dirichlet concentration; smaller is more skewed. Used by dirichlet."""
    shards_per_client: whole(1, 1000) = 2
    """Label-sorted shards that a client gets. Used by shards."""
    labels_per_client: whole(1, MAX_CLASSES) = 2
    """Labels of which a client holds images, k. Used by labels-per-client."""
    size_exponent: real(0, 10) = 1.0
    """The client of size rank r holds images in proportion to r ** -size_exponent; 0: equal. Used by quantity."""
    rotation: real(0, 180) = 45.0
    """Degrees by which the first client's images are turned one way, and the last one's the other. Used by feature."""
    noise: real(0, 255) = 0.0
    """Standard deviation, in grey levels, of the noise on the last client's images; the first has none. Used by
    feature."""
    partition_file: str = ""
    """A partition.json, of a run or another program, whose split is used as it is. Implies `--partition file`."""
    num_clients: whole(1, 60_000) = 10
    """Clients, K."""
    clients_per_round: whole(0, 60_000) = 0
    """Clients drawn for each round, m; 0: all."""
    sampling: one_of(["fixed", "poisson"]) = "fixed"
    """fixed: clients_per_round of them without replacement. poisson: each by itself, so many on average."""

    model: one_of(MODELS) = "small-cnn"
    """The network that every client trains. mlp: 784-128-10. 2nn, cnn: McMahan's. small-cnn: two 5x5 convolutions."""
    algorithm: one_of(ALGORITHMS) = "fedavg"
    """What clients and server do with the gradients and the updates. fedavg, fedsgd (one step on the whole shard)
    [McMahan et al. 2017]. fedprox [Li et al. 2020]. fedavgm: server momentum [Hsu et al. 2019]. fedadagrad, fedadam,
    fedyogi: adaptive servers [Reddi et al. 2021]. fednova: updates by their steps [Wang et al. 2020]. scaffold: control
    variates [Karimireddy et al. 2020]. mimelite: the server's momentum on the clients [Karimireddy et al. 2021]."""
    aggregator: one_of(AGGREGATORS) = "mean"
    """How the clients' updates become one. mean: weighted by their numbers of examples. clipping, zeroing: the same of
    updates whose norm is cut, or that are dropped where they are very large, both adaptively [Andrew et al. 2021].
    median, trimmed-mean [Yin et al. 2018], krum, multi-krum [Blanchard et al. 2017]: unweighted, against attackers.
    compressed: in 8 bits [Suresh et al. 2017]. secure: the sums of secure aggregation [Bonawitz et al. 2017]; here
    that is its arithmetic, not its cryptography. dp: unweighted, clipped and noisy [McMahan et al. 2018]."""
    trim: real(0, 0.49) = 0.3
    """Share of the clients that trimmed-mean drops at each end of every coordinate."""
    tolerated: whole(0, 30_000) = 3
    """Attackers among a round's clients, f, that krum and multi-krum are to withstand; they need 2 f + 3 clients."""
    noise_multiplier: real(0.01, 1000) = 0.5
    """Standard deviation of dp's noise over the norm that it clips to, z; below 0.1 clients_per_round."""
    delta: real(1e-15, 0.5) = 1e-5
    """The delta for which dp's epsilon is told after each round."""
    epsilon_budget: real(0, 1e6) = 0.0
    """With dp, no round is begun that would bring epsilon above this; 0: no limit."""
    rounds: whole(1, 100_000) = 5
    """Rounds of communication, T."""
    local_epochs: whole(1, 1000) = 3
    """Passes that a client makes over its shard in a round, E."""
    batch_size: whole(0, 60_000) = 16
    """Examples in a local batch, B; 0: the client's whole shard."""
    client_lr: real(0, 1000) = 0.0
    """Learning rate of the clients' SGD; 0: the algorithm's own, which is 0.2 but 0.1 of scaffold and 0.0005 of
    mimelite: the momentum that mimelite holds still through a round suits few local steps, not the default's 1,100."""
    client_schedule: one_of(SCHEDULES) = "constant"
    """How the clients' learning rate changes with the round t. exponential: lr_decay ** (t - 1). inverse-sqrt: t **
    -0.5. cosine: from 1 to 0 over `lr_horizon` rounds."""
    server_lr: real(0, 1000) = 0.0
    """Learning rate of the server's optimizer; 0: the algorithm's own, which for plain averaging is 1."""
    server_schedule: one_of(SCHEDULES) = "constant"
    """The same as client_schedule, for the server's learning rate."""
    lr_decay: real(0, 1) = 0.99
    """Factor from round to round of an exponential schedule."""
    lr_horizon: whole(1, 100_000) = 100
    """Rounds in which a cosine schedule gets to 0."""
    server_momentum: real(0, 0.9999) = 0.9
    """Momentum, beta, of fedavgm and mimelite."""
    prox_mu: real(0, 1000) = 0.001
    """Weight, mu, of fedprox's pull back to the round's first weights; 0 is fedavg."""

    dropout: real(0, 1) = 0.0
    """Probability that a client of a round, which has got the weights, does not report."""
    stragglers: real(0, 1) = 0.0
    """Probability that a client of a round does but a random share of its local steps."""
    byzantine: whole(0, 60_000) = 0
    """Clients that attack in every round that they are drawn for."""
    attack: one_of(ATTACKS) = "sign-flip"
    """What they do. label-flip: train on label 9 - l for l. sign-flip: send their update backwards. scaled: send it
    `attack_scale` times. gaussian: send noise of `attack_scale` times its size. nan: send NaN."""
    attack_scale: real(0, 1e6) = 10.0
    """How large the attacks scaled and gaussian are."""

    seed: whole(0, 2**31 - 1) = 0
    """Seed of the split, the initial weights, the sampling of clients and the order of the batches."""
    compare: str = ""
    """Names of algorithms, or partitions, aggregators, models or attacks, with commas between: each is run, on the same
    split and seed, and one plot shows all. A run that is already there is not run again."""
    seeds: whole(1, 1000) = 1
    """Seeds that are run and compared, from `seed` on: plot and table show mean and standard deviation."""
    resume: str = ""
    """Folder of a run to go on with where it stopped, or to extend by a larger --rounds; all else is as it was."""
    runs: str = "runs"
    """Folder in which the run's own folder is made."""
    name: str = ""
    """Name of the run's folder; by default made of data, partition, algorithm, model and seed."""
    cache: str = ".cache"
    """Folder in which the clients' shard files are kept and reused."""
    patience: real(1, 86_400) = 60
    """Seconds without any progress after which TFF's worker counts as hung, and the round is done again."""
    tensorboard: bool = False
    """Also write each round's figures and confusion matrix as TensorBoard events: tensorboard --logdir runs."""

    def __post_init__(self) -> None:
        """Raises UserError for a value of the wrong type or range, or a clash of two."""
        for field, hint in typing.get_type_hints(Config, include_extras=True).items():
            object.__setattr__(self, field, check_value(field, getattr(self, field), hint))
        if self.partition_file and self.partition in (Config.partition, "file"):
            object.__setattr__(self, "partition", "file")
        if bool(self.partition_file) != (self.partition == "file"):
            raise UserError(f"partition={self.partition!r} with partition_file={self.partition_file!r:.60}; "
                            "choose partition='file' with a file, or another without")  # fmt: skip
        if self.comparing and self.resume:
            raise UserError(f"resume={self.resume!r:.60} does not go with compare or seeds, which resume their runs by "
                            "themselves; drop one of the two")  # fmt: skip
        for field, value in ALGORITHMS[self.algorithm].fixed.items():
            if getattr(self, field) not in (value, getattr(Config, field)):
                raise UserError(f"{field}={getattr(self, field)} clashes with algorithm={self.algorithm!r}, which is "
                                f"defined by {field}={value}; drop one of the two")  # fmt: skip
            object.__setattr__(self, field, value)
        if self.clients_per_round > self.num_clients:
            raise UserError(f"clients_per_round={self.clients_per_round} exceeds num_clients={self.num_clients}; "
                            f"choose 1..{self.num_clients}, or 0 for all")  # fmt: skip
        if self.byzantine > self.num_clients:
            raise UserError(f"byzantine={self.byzantine} exceeds num_clients={self.num_clients}; "
                            f"choose 0..{self.num_clients}")  # fmt: skip
        if complaint := AGGREGATORS[self.aggregator].complaint(self):
            raise UserError(complaint)
        if ALGORITHMS[self.algorithm].normalized and AGGREGATORS[self.aggregator].sees == "rows":
            raise UserError(f"aggregator={self.aggregator!r} does not go with algorithm={self.algorithm!r}, whose mean "
                            "number of steps is a weighted one; choose another of the two")  # fmt: skip
        if self.dataset == "digits" and self.data:
            raise UserError(f"data={self.data!r} replaces mnist and dataset='digits' is built in; drop one of the two")
        if self.name and (self.name in (".", "..") or set(self.name) & set("/\0") or len(self.name.encode()) > 200):
            raise UserError(f"name={self.name[:50]!r} is not a folder's name; choose up to 200 letters, digits, - or _")

    @property
    def cohort(self) -> int:
        """Clients that train in a round, m."""
        return self.clients_per_round or self.num_clients

    @property
    def local_lr(self) -> float:
        """Learning rate of the clients' SGD."""
        return self.client_lr or ALGORITHMS[self.algorithm].client_lr

    @property
    def comparing(self) -> tuple[str, list[str]] | None:
        """(field, its values) that are to be compared; None for a single run."""
        tables = {"algorithm": ALGORITHMS, "partition": PARTITIONERS, "aggregator": AGGREGATORS, "model": MODELS,
                  "attack": ATTACKS}  # fmt: skip
        names = [name.strip() for name in self.compare.split(",")] if self.compare else [self.algorithm]
        field = next((field for field, table in tables.items() if set(names) <= set(table)), None)
        if field is None or len(set(names)) < len(names):
            raise UserError(f"compare={self.compare!r:.60} does not name different rows of one table, with commas "
                            f"between; choose from {', '.join(tables)}, such as fedavg,fedprox")  # fmt: skip
        return (field, names) if self.compare or self.seeds > 1 else None


SIDE_FIELDS = {
    "resume",
    "runs",
    "name",
    "cache",
    "patience",
    "tensorboard",
    "epsilon_budget",
    "compare",
    "seeds",
}  # these change none of a run's numbers


def check_value(field: str, value: Any, hint: Any) -> Any:
    """`value` in the type that `hint`, an annotation of `Config`, asks for. Raises UserError where it is not that."""
    choices = typing.get_args(hint) if typing.get_origin(hint) is Literal else ()
    cure = f"choose {', '.join(choices)}" if choices else "give a text without a null character"
    if hint is bool:
        valid, cure = isinstance(value, bool), "choose True or False"
    elif hint is str or choices:
        valid = isinstance(value, str) and "\0" not in value and (not choices or value in choices)
    else:
        kind, span, _ = typing.get_args(hint)
        number = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
        valid = number and span.low <= value <= span.high
        cure = f"choose a {'whole ' if kind is int else ''}number in {span.low:g}..{span.high:g}"
        value = kind(value) if valid else value
    if not valid:
        raise UserError(f"{field}={value!r:.60} is not possible; {cure}")
    return value


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
    path = config.data or os.environ.get("FL_DATA", "")
    if config.dataset == "digits":
        dataset = make_dataset("scikit-learn digits (not MNIST)", load_digits())
    elif path:
        dataset = make_dataset("MNIST", read_npz(Path(path).expanduser()))
    else:
        dataset = make_dataset("MNIST", read_npz(MNIST_FILE), must_be_original=True)
    return hold_out(dataset, config.holdout) if config.holdout else dataset


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


def hold_out(dataset: Dataset, count: int) -> Dataset:
    """`count` training images take the test set's place, the same for every seed; the test set is not looked at."""
    total = len(dataset.train.labels)
    if count >= total:
        raise UserError(f"holdout={count} leaves none of the {total} training images; choose 0..{total - 1}")
    order = np.random.default_rng(0).permutation(total)
    test, train = (
        Split(dataset.train.images[chosen], dataset.train.labels[chosen]) for chosen in np.split(order, [count])
    )
    if len(np.unique(train.labels)) != dataset.num_classes:
        raise UserError(f"holdout={count} leaves no training image of some label; choose less")
    name = f"{dataset.name}, evaluated on {count:,} training images held out"
    return Dataset(name, train, test, False, hashlib.sha256(f"{dataset.digest} {count}".encode()).hexdigest())


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


class Partitioner(NamedTuple):
    """A row of PARTITIONERS: split(labels, config, rng) -> K index arrays; `title` is what the plots call it.

    `shift(images, client, config)`, where there is one, changes a client's images before they go into its shard.
    """

    title: str
    split: Callable[[np.ndarray, Config, np.random.Generator], list[np.ndarray]]
    shift: Callable[[np.ndarray, int, Config], np.ndarray] | None = None


PARTITIONERS = {
    "iid": Partitioner("IID", split_iid),
    "shards": Partitioner("{shards_per_client} shards a client", split_shards),
    "dirichlet": Partitioner("Dirichlet({alpha:g})", split_dirichlet),
    "labels-per-client": Partitioner("{labels_per_client} labels a client", lambda *a: partitions.split_by_label(*a)),
    "quantity": Partitioner("sizes by power law ({size_exponent:g})", lambda *a: partitions.split_by_size(*a)),
    "feature": Partitioner(
        "IID, rotated by ±{rotation:g}°, noise to {noise:g}", split_iid, lambda *a: partitions.shift_features(*a)
    ),
    "file": Partitioner("split of {partition_file}", lambda *a: partitions.read_split(*a)),
}


@dataclass(frozen=True)
class Partition:
    """parts: K arrays int64[n_k] of training indices, disjoint, none empty; counts int64[K,C].

    They cover all images, but where a file says otherwise.
    """

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
    row = PARTITIONERS[config.partition]
    try:
        split = row.split(labels, config, np.random.default_rng(config.seed))
    except ValueError as error:  # a request that cannot be met
        raise UserError(str(error)) from error
    parts = [np.sort(part).astype(np.int64) for part in fill_empty(split)]
    counts = np.stack([np.bincount(labels[part], minlength=dataset.num_classes) for part in parts])  # (K, C)
    digest = hashlib.sha256(dataset.digest.encode())
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part.tobytes())
    if row.shift:
        digest.update(repr((row.title.format(**vars(config)), config.seed)).encode())
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
FOOTER_BYTES = 8  # FarmHash64 of the records, by which the worker knows a damaged file


def write_shards(dataset: Dataset, partition: Partition, config: Config) -> Path:
    """The folder of the shard files, `<client>.bin`: uint8[n_k,785] and a footer. Writes those not there and whole.

    Its name carries the partition's hash, so a shard of another split is never read.
    """
    folder = Path(config.cache).expanduser().absolute() / f"shards-{partition.digest}"
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    shift = PARTITIONERS[config.partition].shift
    for client, part in enumerate(partition.parts):
        images = dataset.train.images[part]
        pixels = (shift(images, client, config) if shift else images).reshape(len(part), -1)
        records = np.concatenate([pixels, dataset.train.labels[part, None]], axis=1).ravel()
        content = records.tobytes() + fingerprint(records).numpy().tobytes()
        path = folder / f"{client}.bin"
        if not path.exists() or path.read_bytes() != content:
            write_file(path, content)
    return folder


def fingerprint(data: Any) -> Any:
    """FarmHash64 of uint8[n], as uint8[8]; the same here and in the worker. Against accidents, not attackers."""
    return tf.fingerprint(data[tf.newaxis])[0]


def read_shard(path: Any) -> Any:
    """uint8[n_k,785] of a shard file, in the worker's graph; fails where the file is missing or damaged."""
    content = tf.io.decode_raw(tf.io.read_file(path), tf.uint8)
    records, footer = content[:-FOOTER_BYTES], content[-FOOTER_BYTES:]
    whole = tf.reduce_all(tf.equal(fingerprint(records), footer))
    checked = tf.debugging.Assert(whole, ["damaged shard file (deleted, it is made again):", path])
    with tf.control_dependencies([checked]):
        return tf.reshape(records, [-1, RECORD_BYTES])


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns a failure to write `path` (disk full, read-only, gone) into one line that names it."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {error.filename or path}: {error.strerror}; "
                        "free space or choose another folder") from error  # fmt: skip


def write_file(path: Path, data: bytes | str, sync: bool = False) -> None:
    """`path` holds all of `data`, or what it held before, whenever we are killed; with `sync` a power cut too."""
    part = path.with_name(f".{os.getpid()}-{path.name}")
    with writing(path):
        try:
            with open(part, "wb") as file:
                file.write(data.encode() if isinstance(data, str) else data)
                if sync:
                    file.flush()
                    os.fsync(file.fileno())
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


def build_layers(config: Config, num_classes: int) -> list[Any]:
    """The layers of the model's row and the logits, without weights yet."""
    return [*MODELS[config.model](), tf.keras.layers.Dense(num_classes)]


def build_model(config: Config, num_classes: int) -> Any:
    """A Keras model of the row with its initial weights, a function of the seed alone: Glorot uniform, zero biases."""
    model = tf.keras.Sequential([tf.keras.Input((IMAGE_SIDE, IMAGE_SIDE, 1)), *build_layers(config, num_classes)])
    weights = []
    for position, weight in enumerate(model.get_weights()):
        glorot = tf.keras.initializers.GlorotUniform(seed=config.seed + 2**31 * position)
        weights.append(glorot(weight.shape).numpy() if weight.ndim > 1 else np.zeros_like(weight))
    model.set_weights(weights)
    return model


def predict(config: Config, num_classes: int, weights: Sequence[Any], x: Any) -> Any:
    """Logits float32[n,C] of the same layers with the tensors `weights` in their variables' places, in a graph.

    TFF's functional_model_from_keras does this inside a tf.function of its own, whose border hides from oneDNN which
    max-pooling a gradient belongs to: 1.4 x the time.
    """
    given = iter(weights)
    with tf.variable_creator_scope(lambda _, **about: next(given)):
        for layer in build_layers(config, num_classes):
            x = layer(x)
    return x


def differentiate(config: Config, num_classes: int, weights: Sequence[Any], x: Any, y: Any) -> tuple[Any, Any, Any]:
    """(gradients of the mean cross-entropy, cross-entropies float32[n] in nats, logits) of a batch with labels y."""
    with tf.GradientTape() as tape:
        tape.watch(weights)
        logits = predict(config, num_classes, weights, x)
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(y, logits)
        loss = tf.reduce_mean(losses)
    return tape.gradient(loss, weights), losses, logits


def to_input(pixels: Any) -> Any:
    """uint8[n,784] or [n,28,28] -> float32[n,28,28,1] in 0..1."""
    return tf.reshape(tf.cast(pixels, tf.float32) / 255, [-1, IMAGE_SIDE, IMAGE_SIDE, 1])


# ======================================================================================================================
# Federated process: next(state, client ids) is one round
# ======================================================================================================================


NOT_INLINED = "_noinline"  # TensorFlow's attribute of a function that keeps its graph to itself


def build_local_training(config: Config, num_classes: int, adjust: Callable) -> Callable:
    """local_training(initial, records, key, context, rate, budget) -> (weights, means): a client's SGD, pure in these.

    It is one graph loop. `initial` are the trainable weights, `records` uint8[n_k,785], `key` int64[2], `rate` the
    learning rate, `budget` the examples to train on: E * n_k, or less for a straggler. `means` are loss and accuracy
    over the examples as they were trained on, float32. `adjust(gradients, weights, initial, context, config)` is an
    algorithm's place to change the gradients.
    """
    optimizer = tff.learning.optimizers.build_sgdm(config.local_lr)

    def step(state, weights, initial, context, x, y):
        gradients, losses, logits = differentiate(config, num_classes, weights, x, y)
        gradients = adjust(gradients, weights, initial, context, config)
        hits = tf.cast(tf.equal(tf.argmax(logits, axis=1, output_type=tf.int32), y), tf.float32)
        return *optimizer.next(state, weights, gradients), tf.reduce_sum(losses), tf.reduce_sum(hits)

    if any(isinstance(layer, tf.keras.layers.MaxPool2D) for layer in build_layers(config, num_classes)):
        # In a graph without the loop oneDNN matches every max-pooling with its gradient, in the loop only by luck.
        step = tf.function(step, experimental_attributes={NOT_INLINED: True})

    @tf.function
    def local_training(initial, records, key, context, rate, budget):
        pixels, labels = records[:, :-1], tf.cast(records[:, -1], tf.int32)
        size = tf.shape(records)[0]
        batch = config.batch_size or size
        weights = initial
        state = optimizer.initialize(tf.nest.map_structure(lambda w: tf.TensorSpec(w.shape, w.dtype), initial))
        state = optimizer.set_hparams(state, {"learning_rate": rate})
        loss_sum = correct = 0.0
        for epoch in tf.range(-(-budget // size)):
            epoch_key = tf.random.experimental.stateless_fold_in(key, tf.cast(epoch, tf.int64))
            order = tf.random.experimental.stateless_shuffle(tf.range(size), epoch_key)
            order = order[: budget - epoch * size]
            for start in tf.range(0, tf.size(order), batch):
                tf.autograph.experimental.set_loop_options(parallel_iterations=1)
                chosen = order[start : start + batch]
                x, y = to_input(tf.gather(pixels, chosen)), tf.gather(labels, chosen)
                state, weights, losses, hits = step(state, weights, initial, context, x, y)
                loss_sum += losses
                correct += hits
        seen = tf.cast(budget, tf.float32)
        return weights, {"loss": loss_sum / seen, "accuracy": correct / seen}

    return local_training


def count_steps(config: Config, size: Any, budget: Any) -> Any:
    """SGD steps of a client of `size` examples that trains on `budget` of them, tau_k, int32."""
    batch = config.batch_size or size
    return budget // size * (-(-size // batch)) + (-(-(budget % size) // batch))


class GroupResult(NamedTuple):
    """What leaves a group of clients: `update` is the mean of w - w_k weighted by n_k, `weight` the sum of the n_k.

    For an aggregator that sees rows, they are float32[g,d] and float32[g], a row a client. `steps` is the mean number
    of local steps, weighted. `reports` float32[g,5] has a row a client with the columns REPORT, `results` float32[g,d]
    what the algorithm's memory gets, or float32[g,0]. Clients whose weights are not finite are in the reports alone.
    A group of one client is a client.
    """

    update: Any
    weight: Any
    steps: Any
    reports: Any
    results: Any


REPORT = ("examples", "loss", "accuracy", "steps", "finite")


def keep_gradients(gradients: Any, weights: Any, initial: Any, context: Any, config: Config) -> Any:
    """Plain SGD on each client."""
    return gradients


class Algorithm(NamedTuple):
    """A row of ALGORITHMS: what the clients do to their gradients, and what the server does with the mean update.

    `server(learning rate, config)` is a TFF optimizer; `server_lr` and `client_lr` are the rates where the user names
    none, `fixed` are fields of the configuration that the algorithm is defined by. `normalized`: updates are divided by
    the clients' numbers of steps, and their mean is multiplied by the mean number. `memory()` is a Memory of
    variants/algorithms.py: what the server keeps for the clients from round to round.
    """

    adjust: Callable = keep_gradients
    server: Callable = lambda rate, config: tff.learning.optimizers.build_sgdm(rate)
    server_lr: float = 1.0
    client_lr: float = 0.2
    normalized: bool = False
    memory: Callable[[], Any] | None = None
    fixed: dict[str, Any] = {}


def adaptive(build: str, **settings: float) -> Callable[[float, Config], Any]:
    """A server optimizer of Reddi et al. 2021 with their beta_1 = 0.9, beta_2 = 0.99 and tau = 1e-3."""
    return lambda rate, config: getattr(tff.learning.optimizers, build)(rate, **settings)


ALGORITHMS = {
    # w <- w - 1.0 * sum_k (n_k / n) (w - w_k) = sum_k (n_k / n) w_k  (McMahan et al. 2017, Algorithm 1)
    "fedavg": Algorithm(),
    # the same with one step on the whole shard: w <- w - client_lr * sum_k (n_k / n) g_k  (the same, section 2)
    "fedsgd": Algorithm(fixed={"local_epochs": 1, "batch_size": 0}),
    "fedprox": Algorithm(lambda *a: algorithms.pull_back(*a)),
    "fedavgm": Algorithm(  # Hsu et al. 2019
        server=lambda rate, config: tff.learning.optimizers.build_sgdm(rate, config.server_momentum), server_lr=0.3
    ),
    "fedadagrad": Algorithm(
        server=adaptive("build_adagrad", initial_preconditioner_value=1e-6, epsilon=1e-6), server_lr=0.03
    ),
    "fedadam": Algorithm(server=adaptive("build_adam", beta_1=0.9, beta_2=0.99, epsilon=1e-3), server_lr=0.1),
    "fedyogi": Algorithm(server=adaptive("build_yogi", beta_1=0.9, beta_2=0.99, epsilon=1e-3), server_lr=0.1),
    # w <- w - tau * sum_k (n_k / n) (w - w_k) / tau_k, tau = sum_k (n_k / n) tau_k  (Wang et al. 2020, section 4)
    "fednova": Algorithm(normalized=True),
    "mimelite": Algorithm(
        lambda *a: algorithms.correct_drift(*a), client_lr=0.0005, memory=lambda: algorithms.MIMELITE
    ),
    "scaffold": Algorithm(lambda *a: algorithms.correct_drift(*a), client_lr=0.1, memory=lambda: algorithms.SCAFFOLD),
}

SCHEDULES: dict[str, Callable[[Any, Config], Any]] = {  # round 1, 2, ... as float32 -> factor of the learning rate
    "constant": lambda t, config: tf.ones_like(t),
    "exponential": lambda t, config: config.lr_decay ** (t - 1),
    "inverse-sqrt": lambda t, config: tf.math.rsqrt(t),
    "cosine": lambda t, config: 0.5 + 0.5 * tf.cos(math.pi * tf.minimum((t - 1) / config.lr_horizon, 1)),
}


class Attack(NamedTuple):
    """A row of ATTACKS: what an attacker trains on in the place of its records, and sends in that of its update."""

    records: Callable = lambda records, num_classes: records
    update: Callable = lambda update, key, config: update


ATTACKS = {
    "label-flip": Attack(records=lambda *a: adversity.flip_labels(*a)),
    "sign-flip": Attack(update=lambda *a: adversity.flip_sign(*a)),
    "scaled": Attack(update=lambda *a: adversity.scale(*a)),
    "gaussian": Attack(update=lambda *a: adversity.gaussian(*a)),
    "nan": Attack(update=lambda *a: adversity.not_a_number(*a)),
}


class Aggregator(NamedTuple):
    """A row of AGGREGATORS: a TFF aggregation factory, and what it must see.

    "sums": the clients' weighted sums will do, and many clients come as few groups. "each": every client by itself.
    "rows": all the updates of a group as float32[g,d]. `num_bytes` are those of an update whose tensors have so many
    elements. `epsilon(config, rounds)` is what rounds cost of privacy. `about` is said beside the aggregator's name,
    `complaint` is what is wrong with a configuration for it.
    """

    factory: Callable[[Config], Any]
    sees: str
    num_bytes: Callable[[list[int]], int] = lambda sizes: 4 * sum(sizes)
    epsilon: Callable[[Config, int], float] | None = None
    about: Callable[[Config], str] = lambda config: ""
    complaint: Callable[[Config], str] = lambda config: ""


def krum_complaint(config: Config) -> str:
    """Where too few clients are in a round, what to do."""
    most = (config.cohort - 3) // 2
    return "" if config.tolerated <= most else (
        f"tolerated={config.tolerated} of {config.cohort} clients a round is more than {config.aggregator} can "
        f"withstand; choose at most {max(most, 0)}, or more clients"
    )  # fmt: skip


def dp_complaint(config: Config) -> str:
    """Where TFF cannot spread the noise over so few clients, or epsilon would not count all that leaves them."""
    algorithm = ALGORITHMS[config.algorithm]
    if algorithm.memory or algorithm.normalized:
        return (f"algorithm={config.algorithm!r} sends more than the update to which aggregator='dp' adds noise, and "
                "epsilon would be false; choose another of the two")  # fmt: skip
    return "" if config.noise_multiplier < 0.1 * config.cohort else (
        f"noise_multiplier={config.noise_multiplier} is too high for {config.cohort} clients a round; choose less than "
        f"{0.1 * config.cohort:g}, or more clients"
    )  # fmt: skip


AGGREGATORS = {
    "mean": Aggregator(lambda config: tff.aggregators.MeanFactory(no_nan_division=True), "sums"),
    "clipping": Aggregator(lambda config: tff.learning.robust_aggregator(zeroing=False), "each"),
    "zeroing": Aggregator(lambda config: tff.learning.robust_aggregator(clipping=False), "each"),
    "median": Aggregator(lambda config: robust.RowRule(robust.median), "rows"),
    "trimmed-mean": Aggregator(
        lambda config: robust.RowRule(lambda rows: robust.trimmed_mean(rows, config.trim)), "rows"
    ),
    "krum": Aggregator(
        lambda config: robust.RowRule(lambda rows: robust.krum(rows, config.tolerated)),
        "rows",
        complaint=krum_complaint,
    ),
    "multi-krum": Aggregator(
        lambda config: robust.RowRule(lambda rows: robust.krum(rows, config.tolerated, chosen=0)),
        "rows",
        complaint=krum_complaint,
    ),
    "compressed": Aggregator(
        lambda config: tff.learning.compression_aggregator(zeroing=False, clipping=False, stochastic=False),
        "each",
        lambda sizes: sum(size + 8 if size > 20_000 else 4 * size for size in sizes),  # 8: a tensor's lowest, highest
    ),
    "secure": Aggregator(
        lambda config: tff.aggregators.MeanFactory(  # of n_k * update and n_k, in these bounds in 32 bits
            tff.aggregators.SecureSumFactory(1e5, -1e5), tff.aggregators.SecureSumFactory(1e5, 0.0)
        ),
        "each",
        about=lambda config: "the arithmetic of secure sums, without the cryptography",
    ),
    "dp": Aggregator(
        lambda config: tff.aggregators.as_weighted_aggregator(
            tff.learning.dp_aggregator(config.noise_multiplier, config.cohort, zeroing=False)
        ),
        "each",
        epsilon=lambda *a: privacy.epsilon(*a),
        about=lambda config: privacy.assumption(config),
        complaint=dp_complaint,
    ),
}


class ClientState(NamedTuple):
    """The part of the process's state that is the clients': the number of rounds done, and the algorithm's memory."""

    round: Any
    memory: Any


def build_client(config: Config, num_classes: int, shards: Path, sizes: np.ndarray) -> Callable:
    """train(initial, memory, round_num, client) -> (update, weight, steps, report, result): a client's part of a round.

    `update` is a tuple of initial - trained, all 0 and with weight 0 where it is not finite; `weight` float32 n_k;
    `report` float32[5]; `result` float32[d] for the algorithm's memory, or float32[0].
    """
    algorithm = ALGORITHMS[config.algorithm]
    memory_row, schedule = algorithm.memory and algorithm.memory(), SCHEDULES[config.client_schedule]
    local_training = build_local_training(config, num_classes, algorithm.adjust)
    shares = (sizes / sizes.sum()).astype(np.float32)
    attack, attackers = ATTACKS[config.attack], adversity.attackers(config) if config.byzantine else None

    def gradient_of(weights, records):
        x, y = to_input(records[:, :-1]), tf.cast(records[:, -1], tf.int32)
        return differentiate(config, num_classes, weights, x, y)[0]

    def train(initial, memory, round_num, client):
        records = read_shard(tf.strings.join([f"{shards}/", tf.strings.as_string(client), ".bin"]))
        seed = tf.constant(config.seed, tf.int64)
        key = tf.random.experimental.stateless_fold_in(tf.stack([seed, client]), round_num)
        size = tf.shape(records)[0]
        budget = size * config.local_epochs
        if config.stragglers:
            budget = adversity.straggle(budget, key, config)
        if config.byzantine:
            attacks = tf.reduce_any(tf.equal(client, attackers))
            records = tf.cond(attacks, lambda: attack.records(records, num_classes), lambda: records)
        rate = config.local_lr * schedule(tf.cast(round_num, tf.float32), config)
        context = memory_row.context(memory, client, shares, config) if memory_row else ()
        trained, means = local_training(initial, records, key, context, rate, budget)
        update = tuple(old - new for old, new in zip(initial, trained, strict=True))
        steps = tf.cast(count_steps(config, size, budget), tf.float32)
        result = tf.zeros([0])
        if memory_row:
            result = memory_row.result(context, initial, trained, steps, rate, lambda: gradient_of(initial, records))
        if algorithm.normalized:
            update = tuple(u / steps for u in update)
        if config.byzantine:
            update = tf.cond(attacks, lambda: attack.update(update, key, config), lambda: update)
        finite = tf.reduce_all([tf.reduce_all(tf.math.is_finite(u)) for u in update])
        update = tuple(tf.where(finite, u, 0) for u in update)
        examples = tf.cast(size, tf.float32)
        report = tf.stack([examples, means["loss"], means["accuracy"], steps, tf.cast(finite, tf.float32)])
        return update, tf.where(finite, examples, 0), steps, report, result  # a client that diverged has no weight

    return tf.autograph.experimental.do_not_convert(train)


def build_group(train_client: Callable, stacked: bool, result_size: int) -> Callable:
    """train_clients(initial, memory, round_num, clients int64[g]) -> GroupResult, one client after the other.

    Updates are summed as they come, so that memory and messages do not grow with their number, or stacked as rows.
    """

    @tf.function
    def train_clients(initial, memory, round_num, clients):
        count = tf.size(clients)
        total, weight, steps_sum = tuple(tf.zeros_like(w) for w in initial), 0.0, 0.0
        size = sum(w.shape.num_elements() for w in initial) if stacked else 0
        reports = tf.TensorArray(tf.float32, count, element_shape=[len(REPORT)])
        results = tf.TensorArray(tf.float32, count, element_shape=[result_size])
        rows = tf.TensorArray(tf.float32, count, element_shape=[size])
        for position in tf.range(count):
            tf.autograph.experimental.set_loop_options(parallel_iterations=1)
            update, examples, steps, report, result = train_client(initial, memory, round_num, clients[position])
            if stacked:
                rows = rows.write(position, algorithms.flatten(update))
            else:
                total = tuple(t + examples * u for t, u in zip(total, update, strict=True))
            weight += examples
            steps_sum += examples * steps
            reports = reports.write(position, report)
            results = results.write(position, result)
        steps_mean, reports = tf.math.divide_no_nan(steps_sum, weight), reports.stack()
        if stacked:
            update, weight = rows.stack(), reports[:, REPORT.index("examples")] * reports[:, REPORT.index("finite")]
        else:
            update = tuple(tf.math.divide_no_nan(t, weight) for t in total)
        return GroupResult(update, weight, steps_mean, reports, results.stack())

    return train_clients


def build_process(config: Config, num_classes: int, shards: Path, sizes: np.ndarray) -> Any:
    """TFF IterativeProcess: next(state, groups) -> (state, measurements, the reports of each group).

    `groups` are int64[g] arrays of client ids, a group a client where every update must be seen (`group_clients`);
    `sizes` the n_k of all clients. `state` is a tff LearningAlgorithmState whose `client_work` is a ClientState: all
    randomness of a round comes from (seed, round, client), so `next` is a pure function of its arguments.
    """
    tf.get_logger().setLevel("CRITICAL")  # some of TFF's aggregators make hundreds of harmless lines
    templates = tff.learning.templates
    algorithm, aggregator = ALGORITHMS[config.algorithm], AGGREGATORS[config.aggregator]
    initial = tff.learning.models.ModelWeights(tuple(build_model(config, num_classes).get_weights()), ())
    parameters = sum(w.size for w in initial.trainable)
    memory_rows = algorithm.memory().rows(config) if algorithm.memory else 0
    result_size, stacked = parameters if memory_rows else 0, aggregator.sees == "rows"
    gibibytes = 4 * memory_rows * parameters / 2**30
    if gibibytes > 1:
        raise UserError(f"num_clients={config.num_clients} of {parameters:,} parameters are {gibibytes:.1f} GiB that "
                        f"algorithm={config.algorithm!r} keeps; choose at most {2**28 // parameters} clients, or a "
                        "smaller model")  # fmt: skip
    train_clients = build_group(build_client(config, num_classes, shards, sizes), stacked, result_size)
    server_lr = config.server_lr or algorithm.server_lr
    server = algorithm.server(server_lr, config)

    @tff.tensorflow.computation
    def initial_weights():
        return tf.nest.map_structure(tf.constant, initial)

    @tff.tensorflow.computation
    def initial_clients():
        return ClientState(tf.constant(0, tf.int64), tf.zeros([memory_rows, result_size]))

    weights_type, clients_type = initial_weights.type_signature.result, initial_clients.type_signature.result
    group_type = tff.TensorType(np.int64, [None])

    @tff.tensorflow.computation(clients_type)
    def begin_round(clients):
        return ClientState(clients.round + 1, clients.memory)

    @tff.tensorflow.computation(weights_type, clients_type, group_type)
    def train_group(weights, state, clients):
        return train_clients(tuple(weights.trainable), state.memory, state.round, clients)

    trained_type = train_group.type_signature.result
    aggregate = aggregator.factory(config).create(trained_type.update, trained_type.weight)
    finalize = templates.build_apply_optimizer_finalizer(server, weights_type)

    @tff.federated_computation
    def initialize():
        return tff.federated_zip(
            templates.LearningAlgorithmState(
                tff.federated_eval(initial_weights, tff.SERVER),
                (),
                tff.federated_eval(initial_clients, tff.SERVER),
                aggregate.initialize(),
                finalize.initialize(),
            )
        )

    # What only some rows use has no types given here: TFF traces it where it is used.

    @tff.tensorflow.computation
    def set_server_rate(optimizer_state, clients):
        factor = SCHEDULES[config.server_schedule](tf.cast(clients.round, tf.float32), config)
        return server.set_hparams(optimizer_state, {"learning_rate": factor * server_lr})

    @tff.tensorflow.computation
    def from_row(row):
        return algorithms.unflatten(row, initial.trainable)

    @tff.tensorflow.computation
    def times(update, factor):
        return tf.nest.map_structure(lambda u: factor * u, update)

    @tff.tensorflow.computation
    def remember(clients, ids, reports, results):
        kept = reports[:, REPORT.index("finite")] > 0
        ids, examples, results = (
            tf.boolean_mask(rows, kept) for rows in (ids, reports[:, REPORT.index("examples")], results)
        )
        updated = algorithm.memory().update(clients.memory, ids, examples, results, config)
        return ClientState(clients.round, tf.where(tf.reduce_any(kept), updated, clients.memory))

    @tff.federated_computation(initialize.type_signature.result, tff.FederatedType(group_type, tff.CLIENTS))
    def next_round(state, groups):
        clients = tff.federated_map(begin_round, state.client_work)
        sent = tff.federated_broadcast(state.global_model_weights), tff.federated_broadcast(clients)
        trained = tff.federated_map(train_group, (*sent, groups))
        mean = aggregate.next(state.aggregator, trained.update, trained.weight)
        update, optimizer_state = mean.result, state.finalizer
        if stacked:
            update = tff.federated_map(from_row, update)
        if algorithm.normalized:
            update = tff.federated_map(times, (update, tff.federated_mean(trained.steps, trained.weight)))
        if config.server_schedule != "constant":
            optimizer_state = tff.federated_map(set_server_rate, (optimizer_state, clients))
        new = finalize.next(optimizer_state, state.global_model_weights, update)
        if memory_rows:
            sent_back = rows_of.gather(tff.federated_zip((groups, trained.reports, trained.results)))
            clients = tff.federated_map(remember, (clients, *sent_back))
        state = templates.LearningAlgorithmState(new.result, (), clients, mean.state, new.state)
        return tff.federated_zip(state), mean.measurements, trained.reports

    return tff.templates.IterativeProcess(initialize, next_round, next_is_multi_arg=True)


# ======================================================================================================================
# Worker: TFF's C++ executor, a process whose life is ours
# ======================================================================================================================

START_SECONDS = 30
ATTEMPTS = 3  # at a round, each on a fresh worker


class RunFailed(Exception):
    """The run cannot go on, through no mistake of the user's: one line, exit code 1; it can be resumed."""


class WorkerLost(Exception):
    """TFF's worker ended, or hung and was ended, while it was needed. (TFF itself would ask it again, without end.)"""


def guard(parent: int, door: int, binary: str, isolated: str) -> None:
    """Runs TFF's worker, hides it, and relays the listening Unix socket `door` to it: the body of a bare Python.

    TFF's worker listens on all interfaces, lets anybody in, runs any graph it is sent, and stays when its user ends.
    In a network namespace of its own only this process reaches it; and the kernel kills this process when its parent
    ends, however that is, `kill -9` included, and the worker when this process ends. (A preexec_fn of the parent would
    do for that, but may deadlock in a process with threads, which TensorFlow makes of ours.)
    """
    libc = ctypes.CDLL(None, use_errno=True)

    def die_with(process: int) -> None:
        libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != process:  # it has ended already
            os._exit(1)

    port = 8000  # in a namespace of its own every port is free
    if isolated:
        try:
            user, group = os.getuid(), os.getgid()
            if libc.unshare(0x10000000 | 0x40000000):  # CLONE_NEWUSER | CLONE_NEWNET
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
            maps = {"setgroups": "deny", "uid_map": f"{user} {user} 1", "gid_map": f"{group} {group} 1"}
            for name, text in maps.items():
                with open(f"/proc/self/{name}", "w") as file:
                    file.write(text)
            with socket.socket() as any_socket:  # SIOCSIFFLAGS: the loopback interface is up
                fcntl.ioctl(any_socket, 0x8914, b"lo".ljust(16, b"\0") + (1).to_bytes(24, "little"))
        except OSError as error:
            print(f"cannot isolate the worker ({error.strerror})", flush=True)
            os._exit(1)
    else:
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
    die_with(parent)
    me = os.getpid()
    worker = subprocess.Popen(
        [binary, f"--port={port}"], stdin=subprocess.DEVNULL, stdout=2, preexec_fn=lambda: die_with(me)
    )

    def relay() -> None:
        with socket.socket(fileno=door) as listener:
            while True:
                outside, inside = listener.accept()[0], socket.create_connection(("127.0.0.1", port))
                inside.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                for source, sink in ((outside, inside), (inside, outside)):
                    threading.Thread(target=pump, args=(source, sink), daemon=True).start()

    def pump(source: socket.socket, sink: socket.socket) -> None:
        buffer = memoryview(bytearray(1 << 20))
        try:
            while size := source.recv_into(buffer):
                sink.sendall(buffer[:size])
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            sink.close()

    while worker.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            break
        except OSError:
            time.sleep(0.02)
    threading.Thread(target=relay, daemon=True).start()
    print(worker.pid, flush=True)
    os._exit(worker.wait() and 1)


def compile_for_worker(computation: Any) -> Any:
    """TFF's native form of a computation. TFF's own way inlines every function, those marked NOT_INLINED too.

    Secure sums become plain ones, as TFF has no cryptography of its own to run them.
    """
    content = tff.framework.serialize_computation(computation).SerializeToString()
    if b"federated_secure_sum" in content:
        computation = tff.backends.test.replace_secure_intrinsics_with_bodies(computation)
    if NOT_INLINED.encode() not in content:
        return tff.backends.native.desugar_and_transform_to_native(computation)
    module = "tensorflow_federated.python.core.environments.tensorflow_backend.tensorflow_tree_transformations"
    block, _ = importlib.import_module(module).replace_intrinsics_with_bodies(computation.to_building_block())
    grappler = tf.compat.v1.ConfigProto()
    options = grappler.graph_options.rewrite_options
    options.memory_optimization = options.constant_folding = options.AGGRESSIVE
    options.arithmetic_optimization = options.loop_optimization = options.AGGRESSIVE
    options.function_optimization = options.OFF
    plain = tff.framework.ConcreteComputation(
        computation_proto=block.proto, context_stack=tff.framework.get_context_stack()
    )
    return tff.backends.native.transform_to_native_form(plain, grappler_config=grappler)


GUARD_CODE = f"""import ctypes, fcntl, os, signal, socket, subprocess, sys, threading, time
{inspect.getsource(guard)}
guard(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])"""  # read now: the file may be edited while a run goes on


class Worker(grpc.UnaryUnaryClientInterceptor):
    """TFF's worker as a context manager: TFF computations called inside run in it, and it never outlives us.

    `bytes_sent` counts what went to it. A worker that does nothing about a request for `patience` seconds of wall time
    is ended. WorkerLost is raised where it ends before its time; `restart` gives a fresh one.
    """

    def __init__(self, clients_at_once: int, log: str | Path = os.devnull, patience: float = 60):
        cores = len(os.sched_getaffinity(0))
        self.threads = max(1, cores // clients_at_once)  # within one op; clients train side by side as it is
        self.log, self.patience, self.bytes_sent = log, patience, 0
        self._requests: set[object] = set()  # those that wait for an answer

    def __enter__(self) -> Worker:
        self._reason = "ended"
        try:
            channel = self._start(isolated=True)
        except PermissionError as error:
            notice(f"{error}: others on this machine's network can reach TFF's worker while it runs")
            channel = self._start(isolated=False)
        self._context = tff.framework.get_context_stack().install(self._build_context(channel))
        self._context.__enter__()
        threading.Thread(target=self._watch, args=(self.process, self.pid), daemon=True).start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._end()  # first: a worker still training after Ctrl-C would keep TFF's threads, and so our exit, waiting
        self._context.__exit__(*error)

    def restart(self) -> None:
        """A fresh worker in the place of a lost one."""
        self.__exit__(None, None, None)
        self.__enter__()

    def _start(self, isolated: bool) -> grpc.Channel:
        """Starts guard and worker, and gives a channel to them that is open."""
        binary = Path(tff.__file__).parent / "data" / "worker_binary"
        bare_python = [sys.executable, "-ISc", GUARD_CODE]
        threads = {"TF_NUM_INTRAOP_THREADS": str(self.threads), "TF_CPP_MIN_LOG_LEVEL": "2"}
        with tempfile.TemporaryDirectory(prefix="fl-") as folder, socket.socket(socket.AF_UNIX) as door:  # mode 0700
            door.bind(f"{folder}/door")
            door.listen()
            with open(self.log, "ab") as log:
                self.process = subprocess.Popen(
                    [*bare_python, str(os.getpid()), str(door.fileno()), str(binary), "yes" if isolated else ""],
                    stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, pass_fds=[door.fileno()],
                    env={**os.environ, **threads}, start_new_session=True,  # the terminal's Ctrl-C comes to us alone
                )  # fmt: skip
            try:
                self.pid = self._wait_until_ready()
                options = {"max_send_message_length": -1, "max_receive_message_length": -1, "enable_http_proxy": 0,
                           "client_idle_timeout_ms": 2**31 - 1}  # fmt: skip
                options = [(f"grpc.{name}", value) for name, value in options.items()]
                channel = grpc.insecure_channel(f"unix:{folder}/door", options)
                grpc.channel_ready_future(channel).result(START_SECONDS)
            except BaseException as error:
                self.process.kill()
                self.process.wait()
                if isinstance(error, grpc.FutureTimeoutError):
                    raise RunFailed(f"TFF's worker did not answer in {START_SECONDS} s; see {self.log}") from error
                raise
        # The folder is gone now: nobody else gets in. The channel is never closed: TFF's stub subscribes to it, and
        # closing prints an error from gRPC's thread.
        return grpc.intercept_channel(channel, self)

    def _wait_until_ready(self) -> int:
        """The worker's process id, as the guard tells it once the worker answers."""
        poll = select.poll()  # unlike select, it takes any file descriptor
        poll.register(self.process.stdout, select.POLLIN)
        with self.process.stdout as answer:
            line = answer.readline().decode().strip() if poll.poll(1000 * START_SECONDS) else ""
        if line.startswith("cannot"):
            raise PermissionError(line)
        if not line:
            raise RunFailed(f"TFF's worker did not start; see {self.log}")
        return int(line)

    def _end(self) -> None:
        """Ends worker and guard."""
        if self.process.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(5)  # the guard ends with the worker
        self.process.kill()
        self.process.wait()

    def _build_context(self, channel: grpc.Channel) -> Any:
        """TFF's native execution context with this worker as its executor."""
        stub = tff.framework.RemoteExecutorGrpcStub(channel)

        class Executor(tff.framework.RemoteExecutor):
            """Sends a computation once, where TFF sends it again for each call of it: 5 ms and 130 kB a round."""

            async def create_value(self, value: Any, type_spec: Any = None) -> Any:
                if not isinstance(type_spec, tff.FunctionType):
                    return await super().create_value(value, type_spec)
                if id(value) not in self.sent:
                    self.sent[id(value)] = value, await super().create_value(value, type_spec)
                return self.sent[id(value)][1]

        def connect(cardinalities: dict[Any, int]) -> Any:
            executor = Executor(stub)
            executor.sent = {}
            executor.set_cardinalities({tff.CLIENTS: 0, **cardinalities})
            return executor

        return tff.framework.SyncExecutionContext(
            executor_fn=tff.framework.ResourceManagingExecutorFactory(connect),
            compiler_fn=compile_for_worker,
            transform_args=tff.tensorflow.transform_args,
            transform_result=tff.tensorflow.transform_result,
        )

    def intercept_unary_unary(self, continuation: Callable, details: Any, request: Any) -> Any:
        """Sees every request to the worker: counts its bytes, and ends the wait for a worker that has ended."""
        self.bytes_sent += request.ByteSize()
        self._requests.add(request_id := object())
        try:
            call = continuation(details, request)
        finally:
            self._requests.discard(request_id)
        if call.code() is not grpc.StatusCode.OK:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(1)
                raise WorkerLost(f"TFF's worker {self._reason}; see {self.log}")
        return call

    def _watch(self, process: subprocess.Popen, pid: int) -> None:
        """Ends a worker that spends no processor time on a request for `patience` seconds."""
        spent, since = -1.0, time.monotonic()
        while process.poll() is None:
            with contextlib.suppress(psutil.Error):
                now = sum(psutil.Process(pid).cpu_times()[:2])
                if now != spent or not self._requests:
                    spent, since = now, time.monotonic()
                elif time.monotonic() - since > self.patience:
                    self._reason = f"hung for {self.patience:g} s and was ended"
                    os.kill(pid, signal.SIGKILL)
            time.sleep(min(0.5, self.patience / 4))


# ======================================================================================================================
# Evaluation
# ======================================================================================================================

EVALUATION_BATCH = 1000


@dataclass(frozen=True)
class Evaluation:
    """loss: mean cross-entropy in nats; accuracy in 0..1; predictions uint8[N]; confusion int64[C,C], rows true."""

    loss: float
    accuracy: float
    predictions: np.ndarray
    confusion: np.ndarray


def build_evaluator(model: Any, split: Split, num_classes: int) -> Callable[[Any], Evaluation]:
    """evaluate(weights) -> Evaluation on the whole split, with TFF's ModelWeights put into the Keras `model`."""

    @tf.function(autograph=False)
    def predict(images: Any, labels: Any) -> tuple[Any, Any]:
        logits = model(to_input(images), training=False)
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(tf.cast(labels, tf.int32), logits)
        return tf.argmax(logits, axis=1), losses

    batches = tf.data.Dataset.from_tensor_slices((split.images, split.labels)).batch(EVALUATION_BATCH)

    def evaluate(weights: Any) -> Evaluation:
        weights.assign_weights_to(model)
        predicted, losses = (np.concatenate(parts) for parts in zip(*(predict(x, y) for x, y in batches), strict=True))
        confusion = sklearn.metrics.confusion_matrix(split.labels, predicted, labels=range(num_classes))
        return Evaluation(
            loss=float(losses.mean(dtype=np.float64)),
            accuracy=float(sklearn.metrics.accuracy_score(split.labels, predicted)),
            predictions=predicted.astype(np.uint8),
            confusion=confusion,
        )

    return evaluate


# ======================================================================================================================
# Rounds
# ======================================================================================================================


@dataclass(frozen=True)
class RoundRecord:
    """What one round did. Losses are mean cross-entropies in nats; the training figures are the clients' own.

    `train_loss` is the mean over the clients' examples, as they were trained on. `clients` has a row a client of the
    round: client, examples (n_k), loss, accuracy, local steps, and finite: False where its update was left out.
    `dropped` counts those that got the weights and did not report. `bytes_down` and `bytes_up` are those of what the
    server sends and gets, `epsilon` what all rounds so far cost of privacy, None where the aggregator does not say.
    """

    round: int
    train_loss: float
    train_accuracy: float
    test_loss: float
    test_accuracy: float
    left_out: int
    dropped: int
    bytes_down: int
    bytes_up: int
    epsilon: float | None
    seconds: float
    clients: list[dict[str, Any]]

    def trouble(self, earlier: Sequence[RoundRecord], num_classes: int) -> str:
        """What has gone wrong with the global model in this round, in words; nothing as a rule."""
        chance = 1.5 / num_classes
        if not math.isfinite(self.test_loss):
            return "the test loss is not finite; a smaller --client-lr may help"
        if self.test_accuracy < chance and max((record.test_accuracy for record in earlier), default=0) > 2 * chance:
            return "the test accuracy fell back to chance; a smaller --client-lr may help"
        if not self.clients:
            return "no client reported; the weights stay as they were"
        nobody = self.left_out == len(self.clients)
        return "no client's update was finite; a smaller --client-lr may help" if nobody else ""

    def line(self, rounds: int) -> str:
        """The round in one aligned line of the terminal."""
        number = f"{self.round:{len(str(rounds))}}/{rounds}"
        left_out = f"   {self.left_out} not finite, left out" if self.left_out else ""
        dropped = f"   {self.dropped} dropped out" if self.dropped else ""
        privacy_spent = "" if self.epsilon is None else f"   ε {self.epsilon:.2f}"
        return (
            f"round {number}   train loss {self.train_loss:7.4f}   test loss {self.test_loss:7.4f}   "
            f"test accuracy {self.test_accuracy:7.2%}   {self.seconds:6.2f} s"
            f"{privacy_spent}{dropped}{left_out}"
        )


def sample_clients(config: Config, round_num: int) -> list[int]:
    """The round's clients: a function of (seed, round); sorted, as the sum follows the order."""
    rng = np.random.default_rng([config.seed, round_num])
    if config.sampling == "poisson":
        return np.flatnonzero(rng.random(config.num_clients) < config.cohort / config.num_clients).tolist()
    return sorted(rng.choice(config.num_clients, config.cohort, replace=False).tolist())


def drop_out(config: Config, round_num: int, clients: Sequence[int]) -> list[int]:
    """Those of `clients` that report, each with probability 1 - dropout: a function of (seed, round, client)."""
    luck = np.random.default_rng([config.seed, round_num, 1]).random(config.num_clients)
    return [client for client in clients if luck[client] >= config.dropout]


def traffic(config: Config, weights: Any, sent: int, reported: int) -> dict[str, int]:
    """Bytes of a round in which `sent` clients get the weights and `reported` answer: what a network would carry.

    Down go the weights and the round's number, up an update as the aggregator encodes it and the report; an
    algorithm's memory adds as much as the weights in each direction.
    """
    sizes = [math.prod(np.shape(w)) for w in weights.trainable]
    memory = 4 * sum(sizes) if ALGORITHMS[config.algorithm].memory else 0
    up = AGGREGATORS[config.aggregator].num_bytes(sizes) + memory + 4 * len(REPORT)
    return {"bytes_down": sent * (4 * sum(sizes) + memory + 8), "bytes_up": reported * up}


GROUPS = {"sums": 32, "rows": 10}  # for any number of cores, so that the sums, and the weights, do not depend on it


def group_clients(clients: Sequence[int], sizes: np.ndarray, sees: str) -> list[np.ndarray]:
    """`clients` as int64[g] arrays: each its own group, or groups of about as many examples where there are many.

    TFF keeps a value for each group in memory and spends about a millisecond on it. `sizes` are the n_k of all clients,
    `sees` is what the aggregator must see.
    """
    count = GROUPS.get(sees, len(clients))
    if len(clients) <= count:
        return [np.array([client], np.int64) for client in clients]
    groups: list[list[int]] = [[] for _ in range(count)]
    filled = [(0, number) for number in range(count)]  # a heap: the group with the fewest images comes first
    for client in sorted(clients, key=lambda client: (-sizes[client], client)):
        images, number = heapq.heappop(filled)
        groups[number].append(client)
        heapq.heappush(filled, (images + int(sizes[client]), number))
    return [np.array(sorted(group), np.int64) for group in groups]


def run_rounds(
    config: Config,
    sizes: np.ndarray,
    process: Any,
    evaluate: Callable[[Any], Evaluation],
    state: Any = None,
    log: str | Path = os.devnull,
) -> Iterator[tuple[Any, RoundRecord, Evaluation]]:
    """Yields (state, record, evaluation) after each round from that of `state` on; without one, from the first.

    `sizes` are the clients' n_k. TFF's worker lives as long as the generator. Raises RunFailed where a round cannot be
    done.
    """
    row = AGGREGATORS[config.aggregator]
    with Worker(min(config.cohort, GROUPS.get(row.sees, config.cohort)), log, config.patience) as worker:
        first = persist(worker, 0, process.initialize)  # needed or not: a TFF that was never used prints at our exit
        state = first if state is None else state
        for round_num in range(int(state.client_work.round) + 1, config.rounds + 1):
            epsilon = row.epsilon(config, round_num) if row.epsilon else None
            if epsilon and 0 < config.epsilon_budget < epsilon:
                if round_num == 1:
                    raise UserError(f"epsilon_budget={config.epsilon_budget:g} allows no round, as the first costs "
                                    f"{epsilon:.2f}; choose more, or more noise_multiplier")  # fmt: skip
                return notice(f"round {round_num} would bring ε to {epsilon:.2f}, above epsilon_budget="
                              f"{config.epsilon_budget:g}; the run ends before it")  # fmt: skip
            began = time.perf_counter()
            drawn = sample_clients(config, round_num)
            reporting = drop_out(config, round_num, drawn)
            groups = group_clients(reporting, sizes, row.sees)
            if reporting:
                state, _, reports = persist(worker, round_num, lambda t=state, ids=groups: process.next(t, ids))
            else:
                clients = state.client_work._replace(round=np.int64(round_num))
                state, reports = state._replace(client_work=clients), []
            evaluation = evaluate(state.global_model_weights)
            record = make_record(
                round_num,
                client_rows(groups, reports),
                evaluation,
                dropped=len(drawn) - len(reporting),
                **traffic(config, state.global_model_weights, len(drawn), len(reporting)),
                epsilon=epsilon,
                seconds=round(time.perf_counter() - began, 3),
            )
            yield state, record, evaluation


def persist(worker: Worker, round_num: int, train: Callable[[], Any]) -> Any:
    """train(), and again on a fresh worker where that is lost: a round is a pure function of state and clients."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return train()
        except WorkerLost as lost:
            if attempt == ATTEMPTS:
                raise RunFailed(f"round {round_num}: {lost}; {ATTEMPTS} times in this round") from lost
            notice(f"round {round_num}: {lost}; doing the round again on a fresh one")
            worker.restart()
        except grpc.RpcError as error:  # the worker's own error, such as a shard file that it cannot read
            reason = error.details().partition("\n")[0].removeprefix("Failed to run computation: ")
            raise RunFailed(f"round {round_num}: TFF's worker cannot train: {reason}") from error


def client_rows(groups: list[np.ndarray], reports: list[np.ndarray]) -> list[dict[str, Any]]:
    """What each client of the round reported, in the order of the ids."""
    rows = [
        {"client": int(client), **dict(zip(REPORT, map(float, row), strict=True)), "finite": bool(row[-1])}
        for group, report in zip(groups, reports, strict=True)
        for client, row in zip(group, report, strict=True)
    ]
    return sorted(rows, key=lambda row: row["client"])


def make_record(round_num: int, clients: list[dict[str, Any]], evaluation: Evaluation, **figures: Any) -> RoundRecord:
    """The round's record, from the clients' own reports, the evaluation of the new global model, and its figures."""
    kept = [row for row in clients if row["finite"]]

    def mean(figure: str) -> float:
        """Over the clients kept, weighted by n_k."""
        return float(np.average([r[figure] for r in kept], weights=[r["examples"] for r in kept])) if kept else math.nan

    return RoundRecord(
        round=round_num,
        train_loss=mean("loss"),
        train_accuracy=mean("accuracy"),
        test_loss=evaluation.loss,
        test_accuracy=evaluation.accuracy,
        left_out=len(clients) - len(kept),
        clients=clients,
        **figures,
    )


# ======================================================================================================================
# Plots: each takes data and returns a matplotlib Figure
# ======================================================================================================================

BLUE, ORANGE, GREY = "#0b6fa4", "#d1495b", "#5c6770"
ANNOTATED = 20  # rows and columns up to which a cell carries its number


def caption(config: Config, dataset: Dataset) -> str:
    """What a plot was made on: data set, partition, clients, training, trouble, seed; what is compared by its name."""
    field, _ = config.comparing or ("", [])
    about = AGGREGATORS[config.aggregator].about(config)
    last = config.seed + config.seeds - 1
    parts = {
        "dataset": dataset.name,
        "clients": f"{config.num_clients} clients, {config.cohort} a round",
        "sampling": "Poisson sampling" if config.sampling == "poisson" else "",
        "partition": PARTITIONERS[config.partition].title.format(**vars(config)),
        "algorithm": f"{config.algorithm}, lr {config.local_lr:g}",
        "aggregator": f"{config.aggregator}{about and f': {about}'}",
        "model": config.model,
        "training": f"E = {config.local_epochs}, B = {config.batch_size or 'all'}",
        "dropout": f"dropout {config.dropout:g}" if config.dropout else "",
        "stragglers": f"stragglers {config.stragglers:g}" if config.stragglers else "",
        "attack": f"{config.byzantine} attackers ({config.attack})" if config.byzantine else "",
        "seed": f"seed {config.seed}" if config.seeds == 1 else f"seeds {config.seed} to {last}",
    }
    if config.compare:
        parts[field] = f"{field}s compared"
    return " · ".join(filter(None, parts.values()))


def new_figure(width: float, height: float, title: str, note: str) -> Any:
    """A Figure with its title, and in small print below it what it was made on."""
    figure = figures.Figure(figsize=(width, height), dpi=150, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
    figure.supxlabel("\n".join(textwrap.wrap(note, int(17 * width))), x=0.01, ha="left", fontsize=8, color=GREY)
    return figure


def plain(axes: Any, ticks: Literal["major", "both"] = "major") -> None:
    """A faint grid at those ticks, and no frame above and on the right."""
    axes.grid(alpha=0.3, which=ticks)
    axes.spines[["top", "right"]].set_visible(False)


def plot_convergence(records: Sequence[RoundRecord], note: str) -> Any:
    """Loss and accuracy against the round: the global model on the test set, the clients while they trained."""
    figure = new_figure(9, 4.2, f"Test accuracy {records[-1].test_accuracy:.2%} after round {records[-1].round}", note)
    rounds = [record.round for record in records]
    marker = "o" if len(rounds) <= 50 else None
    panels = zip(figure.subplots(1, 2), ("loss", "accuracy"), (1, 100), strict=True)
    for axes, quantity, scale in panels:
        own = [[scale * row[quantity] for row in record.clients if row["finite"]] for record in records]
        low = [min(values, default=math.nan) for values in own]
        high = [max(values, default=math.nan) for values in own]
        axes.fill_between(rounds, low, high, color=ORANGE, alpha=0.15, lw=0, label="clients, lowest to highest")
        for name, color, style in (("train", ORANGE, "--"), ("test", BLUE, "-")):
            values = [scale * getattr(record, f"{name}_{quantity}") for record in records]
            who = "clients while training, mean" if name == "train" else "global model, test set"
            axes.plot(rounds, values, style, color=color, marker=marker, ms=4, label=who)
        axes.set_xlabel("round")
        axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
        plain(axes)
    loss, accuracy = figure.axes
    loss.set_ylabel("cross-entropy (nats)")
    loss.set_yscale("log")  # a first round may be twenty times the last
    loss.legend(frameon=False, fontsize=9)
    accuracy.set_ylabel("accuracy (%)")
    return figure


def plot_cost(records: Sequence[RoundRecord], note: str) -> Any:
    """Test accuracy against the megabytes that clients and server have sent, 10^6 bytes, a point a round."""
    megabytes = np.cumsum([record.bytes_down + record.bytes_up for record in records]) / 1e6
    shares = 100 * sum(record.bytes_up for record in records) / max(1e6 * megabytes[-1], 1)
    figure = new_figure(
        7, 4.2, f"{megabytes[-1]:,.1f} MB in {len(records)} rounds", f"{note} · {shares:.0f} % of the bytes go up"
    )
    axes = figure.subplots()
    accuracy = [100 * record.test_accuracy for record in records]
    axes.plot(megabytes, accuracy, color=BLUE, marker="o" if len(records) <= 50 else None, ms=4)
    axes.set(xlabel="sent down and up so far (MB)", ylabel="test accuracy (%)", xlim=(0, None))
    plain(axes)
    return figure


def plot_comparison(curves: dict[str, np.ndarray], note: str) -> Any:
    """Test error against the round on a log scale, a line a name: `curves` are accuracies float[seeds,rounds]."""
    seeds = len(next(iter(curves.values())))
    figure = new_figure(9, 4.8, f"Test error, {f'mean ± sd of {seeds} seeds' if seeds > 1 else 'one seed'}", note)
    axes = figure.subplots()
    for (name, accuracies), marker in zip(curves.items(), itertools.cycle("os^vDPX*<>")):
        errors, rounds = 100 * (1 - accuracies), np.arange(1, accuracies.shape[1] + 1)
        mean = errors.mean(axis=0)
        label = f"{name}: {100 - mean[-1]:.2f} %"
        if seeds > 1:
            spread = errors.std(axis=0, ddof=1)
            label = f"{name}: {100 - mean[-1]:.2f} ± {spread[-1]:.2f} %"
            axes.fill_between(rounds, np.maximum(mean - spread, mean / 10), mean + spread, alpha=0.15, lw=0)
        axes.plot(rounds, mean, marker=marker, ms=4, markevery=max(1, len(rounds) // 10), label=label)
    axes.set(xlabel="round", ylabel="test error (%)", yscale="log")
    axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axes.yaxis.set_minor_formatter(
        ticker.FuncFormatter(lambda value, _: f"{value:g}" if f"{value:g}"[0] in "25" else "")
    )
    plain(axes, "both")
    figure.legend(frameon=False, fontsize=9, title="accuracy after the last round", loc="outside right center")
    return figure


def plot_matrix(axes: Any, matrix: np.ndarray, shade: np.ndarray, shade_name: str) -> None:
    """`matrix` int64[rows,columns] as cells shaded by `shade`; each carries its number where there are few."""
    image = axes.imshow(shade, cmap="Blues", aspect="auto", interpolation="nearest", vmin=0)
    axes.figure.colorbar(image, ax=axes, label=shade_name, fraction=0.05, pad=0.02)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(ticker.MaxNLocator(ANNOTATED, integer=True, steps=[1, 2, 5, 10]))
    if max(matrix.shape) <= ANNOTATED:
        for (row, column), count in np.ndenumerate(matrix):
            dark = shade[row, column] > 0.55 * shade.max()
            text = f"{count:,}" if count else "·"
            axes.text(column, row, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")


def plot_confusion(confusion: np.ndarray, note: str) -> Any:
    """Confusion matrix int64[C,C]: counts, shaded by the share of errors in the row, so that errors show."""
    total, right = confusion.sum(), np.trace(confusion)
    figure = new_figure(7, 6.4, f"{total - right:,} of {total:,} test images misclassified", note)
    axes = figure.subplots()
    shares = 100 * confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    errors = np.where(np.eye(len(confusion), dtype=bool), 0, shares)
    plot_matrix(axes, confusion, errors, "errors (% of the true label's images)")
    axes.set(xlabel="predicted label", ylabel="true label")
    return figure


def plot_partition(counts: np.ndarray, note: str) -> Any:
    """Label counts int64[K,C]: a row a client, a column a label."""
    measured = skew(counts)
    title = f"{counts.shape[0]} clients of {counts.sum(axis=1).min():,} to {counts.sum(axis=1).max():,} images"
    skewness = (
        f"distance to the pooled labels {measured['mean_total_variation']:.2f} (total variation, mean) · "
        f"effective classes {measured['effective_classes']:.1f} of {counts.shape[1]} · "
        f"Gini coefficient of the sizes {measured['size_gini']:.2f}"
    )
    figure = new_figure(7, 5.2, title, f"{note} · {skewness}")
    axes = figure.subplots()
    plot_matrix(axes, counts, counts, "images")
    axes.set(xlabel="label", ylabel="client")
    return figure


def plot_misclassified(split: Split, evaluation: Evaluation, note: str, most: int = 18) -> Any:
    """The first images of `split` that the global model gets wrong, each with its index, true and predicted label."""
    wrong = np.flatnonzero(evaluation.predictions != split.labels)
    figure = new_figure(9, 4.6, f"The first {min(most, len(wrong))} of {len(wrong):,} misclassified images", note)
    for axes, index in itertools.zip_longest(figure.subplots(3, most // 3).flat, wrong[:most]):
        axes.axis("off")
        if index is not None:
            axes.imshow(split.images[index], cmap="gray_r", vmin=0, vmax=255)
            axes.set_title(f"#{index}: {split.labels[index]}, not {evaluation.predictions[index]}", fontsize=8)
    return figure


# ======================================================================================================================
# Run folder: what a run writes, and what a resumed one reads
# ======================================================================================================================

CHECKPOINTS_KEPT = 3


def open_folder(config: Config, dataset: Dataset, partition: Partition) -> Path:
    """The run's own folder with config.json and partition.json in it: a new one, or that of the run to resume."""
    if config.resume:
        folder = Path(config.resume).expanduser()
        if read_json(folder / "partition.json").get("hash") != partition.digest:
            raise UserError(f"resume={config.resume!r}: its data or its partition.json has changed; restore it")
        return folder
    name = config.name or default_name(config, dataset)
    runs = Path(config.runs).expanduser()
    with writing(runs):
        runs.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=".new-", dir=runs))
        made.chmod(0o755)
    write_file(made / "config.json", to_json(vars(config)))
    write_file(made / "partition.json", to_json(manifest(dataset, partition, config)))
    for number in itertools.count(1):
        folder = runs / (name if number == 1 else f"{name}-{number}")
        try:
            return made.rename(folder)  # at once, with both files in it, or not at all where the name is taken
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise UserError(f"cannot make {folder}: {error.strerror}; choose another folder") from error


def default_name(config: Config, dataset: Dataset) -> str:
    """What a run's folder is called where the user does not say."""
    data = "other" if config.dataset == "mnist" and not dataset.original else config.dataset
    return "-".join([data, config.partition, config.algorithm, config.model, f"seed{config.seed}"])


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """The run's folder for this run alone. Raises UserError where another run has it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"{folder} is in use by a run that is going on; wait for its end") from error
        yield
    finally:
        os.close(descriptor)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises UserError where there is none."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not JSON"
        raise UserError(f"cannot read {path} ({reason}); resume takes the folder of a run") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object; resume takes the folder of a run")
    return content


def read_config(folder: Path) -> Config:
    """The configuration of the run in `folder`, checked as a new one is."""
    fields = read_json(folder / "config.json")
    unknown = fields.keys() ^ Config.__dataclass_fields__.keys()
    if unknown:
        raise UserError(f"{folder / 'config.json'}: the field {min(unknown)!r} is unknown or missing; restore the file")
    try:
        return Config(**{**fields, "resume": str(folder)})
    except UserError as error:
        raise UserError(f"{folder / 'config.json'}: {error}") from error


def check_resumed(config: Config, saved: Config) -> None:
    """Raises UserError where a run is to be resumed with another configuration than its own."""
    for field in sorted(Config.__dataclass_fields__.keys() - SIDE_FIELDS - {"rounds"}):
        ours, theirs = getattr(config, field), getattr(saved, field)
        if ours != theirs:
            raise UserError(
                f"{field}={ours!r} differs from {theirs!r} of {config.resume}; drop the flag, or start a new run"
            )
    if config.rounds < saved.rounds:
        raise UserError(
            f"rounds={config.rounds} is fewer than the {saved.rounds} of {config.resume}; choose more, or drop it"
        )


def checkpoint_key(config: Config, partition: Partition, process: Any) -> str:
    """What a checkpoint belongs to: the configuration, but how many rounds; the split; the state's names and shapes."""
    fields = {name: value for name, value in vars(config).items() if name not in SIDE_FIELDS | {"rounds"}}
    return json.dumps([fields, partition.digest, str(process.state_type)], sort_keys=True)


def save_round(folder: Path, record: RoundRecord, state: Any, key: str) -> None:
    """Adds the round to metrics.csv and rounds.jsonl, then saves the state, from which the next round can start."""
    row = csv_row(record)
    append(folder / "metrics.csv", ("" if record.round > 1 else csv_line(row)) + csv_line(row.values()))
    append(folder / "rounds.jsonl", json.dumps(vars(record)) + "\n")
    leaves = {f"leaf{number}": np.asarray(leaf) for number, leaf in enumerate(tf.nest.flatten(state))}
    npz = io.BytesIO()
    np.savez(npz, key=np.array(key), **leaves)
    checkpoints = folder / "checkpoints"
    with writing(checkpoints):
        checkpoints.mkdir(exist_ok=True)
        write_file(checkpoints / f"round-{record.round:06d}.npz", npz.getvalue(), sync=True)
        for old in list_checkpoints(folder)[CHECKPOINTS_KEPT:]:
            old.unlink()


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoint files of a run, the newest first."""
    return sorted((folder / "checkpoints").glob("round-*.npz"), reverse=True)


def load_progress(folder: Path, process: Any, key: str) -> tuple[Any, list[RoundRecord]]:
    """(state, records) of the newest whole checkpoint, or (None, []); cuts the run's tables to its rounds."""
    state, records = None, []
    for path in list_checkpoints(folder):
        try:
            state = read_checkpoint(path, process, key)
            break
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            notice(f"{path} is damaged ({str(error)[:80]}); going back to the one before it")
    if state is not None:
        records = read_records(folder / "rounds.jsonl", int(state.client_work.round))
    if state is not None or (folder / "rounds.jsonl").exists():
        write_file(folder / "rounds.jsonl", "".join(json.dumps(vars(record)) + "\n" for record in records))
        rows = [csv_row(record) for record in records]
        write_file(folder / "metrics.csv", "".join(map(csv_line, [*rows[:1], *(row.values() for row in rows)])))
    return state, records


def read_checkpoint(path: Path, process: Any, key: str) -> Any:
    """The state in a checkpoint. No code is run from the file. Raises UserError where it belongs to another run."""
    specs = tff.types.type_to_tf_tensor_specs(process.state_type.member)
    with np.load(path, allow_pickle=False) as npz:
        if npz["key"].item() != key:
            raise UserError(
                f"{path} is of another configuration, split or model; remove it or restore the run's folder"
            )
        leaves = [npz[f"leaf{number}"] for number in range(len(tf.nest.flatten(specs)))]
    for leaf, spec in zip(leaves, tf.nest.flatten(specs), strict=True):
        if leaf.shape != tuple(spec.shape) or leaf.dtype != spec.dtype.as_numpy_dtype:
            raise ValueError(f"{leaf.dtype}{list(leaf.shape)} in the place of {spec}")
    return tf.nest.pack_sequence_as(specs, leaves)


def read_records(path: Path, rounds: int) -> list[RoundRecord]:
    """The records of rounds 1..`rounds`. Raises UserError where the file does not hold them."""
    try:
        records = [RoundRecord(**json.loads(line)) for line in path.read_text().splitlines()[:rounds]]
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}); restore it") from error
    if [record.round for record in records] != list(range(1, rounds + 1)):
        raise UserError(f"{path} does not hold rounds 1..{rounds}; restore it")
    return records


def append(path: Path, text: str) -> None:
    """Adds `text` to the file in one write, so that a kill leaves all or nothing of it."""
    with writing(path):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(descriptor, text.encode())
        finally:
            os.close(descriptor)


def csv_row(record: RoundRecord) -> dict[str, float]:
    """The record's figures of the round as a whole: all but the clients' own."""
    return {name: value for name, value in vars(record).items() if name != "clients"}


def csv_line(values: Iterable[Any]) -> str:
    """One line of a CSV file, with its end."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(values)
    return text.getvalue()


def to_json(content: Any) -> str:
    """Indented, but a list of numbers on one line."""
    text = json.dumps(content, indent=1)
    return re.sub(r"\[[-\d\s,.eE+]*\]", lambda numbers: " ".join(numbers[0].split()), text) + "\n"


def write_events(events: Any, record: RoundRecord, confusion: Any) -> None:
    """Adds the round's figures and its confusion matrix to the TensorBoard `events`."""
    with events.as_default(step=record.round):
        for name, value in csv_row(record).items():
            if value is not None:
                tf.summary.scalar(name, value)
        tf.summary.image("confusion matrix", tf.io.decode_png(to_png(confusion))[None])
    events.flush()


def save_result(
    result: Result, model: Any, config: Config, dataset: Dataset, partition: Partition, images: Path
) -> list[Path]:
    """Writes the plots, metrics.json and the global model of the last round done; the paths of these."""
    final, note = result.evaluation, caption(config, dataset)
    metrics = {
        "dataset": dataset.name,
        "original_mnist": dataset.original,
        "config": vars(config),
        "versions": {"python": platform.python_version(), "tensorflow": tf.__version__, "tff": tff.__version__},
        "weights_sha256": weights_sha256(result.state),
        "test_accuracy": final.accuracy,
        "test_loss": final.loss,
        "confusion": final.confusion.tolist(),
        "report": class_report(dataset, final),
        "rounds": [vars(record) for record in result.records],
    }
    result.state.global_model_weights.assign_weights_to(model)
    files = {
        images / "client_partition.png": to_png(plot_partition(partition.counts, note)),
        images / "convergence_plot.png": to_png(plot_convergence(result.records, note)),
        images / "accuracy_by_megabytes.png": to_png(plot_cost(result.records, note)),
        images / "confusion_matrix.png": to_png(plot_confusion(final.confusion, note)),
        images / "misclassified.png": to_png(plot_misclassified(dataset.test, final, note)),
        result.folder / "metrics.json": to_json(metrics),
        result.folder / "global_model.keras": keras_bytes(model, result.folder),
    }
    for path, content in files.items():
        write_file(path, content)
    return list(files)


def keras_bytes(model: Any, folder: Path) -> bytes:
    """The Keras model as a .keras file's bytes, by way of a file in `folder`: Keras knows no other."""
    with writing(folder), tempfile.TemporaryDirectory(prefix=".keras-", dir=folder) as made:
        path = Path(made) / ".model.keras"
        model.save(path)
        return path.read_bytes()


def weights_sha256(state: Any) -> str:
    """SHA-256 of the global model's weights: their float32 bytes in layer order."""
    return hashlib.sha256(b"".join(np.asarray(w).tobytes() for w in state.global_model_weights.trainable)).hexdigest()


def class_report(dataset: Dataset, evaluation: Evaluation) -> dict[str, Any]:
    """scikit-learn's classification report: precision, recall, F1 and support of each class, and their means."""
    return sklearn.metrics.classification_report(
        dataset.test.labels,
        evaluation.predictions,
        labels=range(dataset.num_classes),
        output_dict=True,
        zero_division=0,
    )


def to_png(figure: Any) -> bytes:
    """The figure as a PNG file's bytes, the same for the same figure."""
    png = io.BytesIO()
    figure.savefig(png, metadata={"Software": None})
    return png.getvalue()


# ======================================================================================================================
# Main: the spine
# ======================================================================================================================


class Terminated(KeyboardInterrupt):
    """SIGTERM: ends a run as Ctrl-C does."""


@dataclass(frozen=True)
class Result:
    """A run's outcome; `evaluation` is that of the last round, `folder` holds its files."""

    folder: Path
    records: list[RoundRecord]
    evaluation: Evaluation
    state: Any


def run(config: Config) -> Result:
    """One experiment from data to plots. Raises UserError for the user's mistakes; Ctrl-C keeps the rounds done."""
    dataset = load_dataset(config)
    partition = make_partition(dataset, config)
    folder = open_folder(config, dataset, partition)
    images = plots_folder(config, dataset, folder)
    note = caption(config, dataset)
    with lock(folder), Progress(config.rounds) as progress:
        say(f"{note}\n")
        # a resumed run may have more rounds
        write_file(folder / "config.json", to_json({**vars(config), "resume": ""}))
        shards = write_shards(dataset, partition, config)
        process = build_process(config, dataset.num_classes, shards, partition.sizes)
        model = build_model(config, dataset.num_classes)
        evaluate = build_evaluator(model, dataset.test, dataset.num_classes)
        key = checkpoint_key(config, partition, process)
        start, records = load_progress(folder, process, key)
        progress.start_from(len(records))
        result = Result(folder, records, evaluate(start.global_model_weights), start) if records else None
        events = tf.summary.create_file_writer(str(folder)) if config.tensorboard else None
        saving = (model, config, dataset, partition, images)
        try:
            for state, record, evaluation in run_rounds(
                config, partition.sizes, process, evaluate, start, folder / "worker.log"
            ):
                save_round(folder, record, state, key)
                result = Result(folder, [*records, record], evaluation, state)
                trouble = record.trouble(records, dataset.num_classes)
                records.append(record)
                progress.line(record.line(config.rounds))
                if trouble:
                    notice(f"round {record.round}: {trouble}")
                if events:
                    write_events(events, record, plot_confusion(evaluation.confusion, note))
        except (KeyboardInterrupt, RunFailed, UserError):
            with contextlib.suppress(UserError):  # what stopped the run is what the user must know
                if result:
                    save_result(result, *saving)
            done = len(result.records) if result else 0
            notice(f"stopped after round {done}; python federated_learning.py --resume {folder} goes on")
            raise
        written = save_result(result, *saving)
    summarize(result, dataset, written)
    return result


def plots_folder(config: Config, dataset: Dataset, folder: Path) -> Path:
    """Where the plots go: the run's own folder, but images/ for the default run on MNIST."""
    plain = dataclasses.replace(config, **{field: getattr(Config, field) for field in SIDE_FIELDS})
    images = Path("images") if plain == Config() and dataset.original else folder
    with writing(images):
        images.mkdir(exist_ok=True)
    return images


def compare(config: Config) -> Path:
    """Runs every value and seed that `config` compares, each but once; the folder with comparison.csv and its plot.

    comparison.csv is tidy: a row a run and round, with the columns of metrics.csv and what was compared.
    """
    field, names = config.comparing
    dataset = load_dataset(config)
    runs = [(name, config.seed + number) for name in names for number in range(config.seeds)]
    rows, curves = [], {name: [] for name in names}
    for number, (name, seed) in enumerate(runs, 1):
        say(f"\n[{number}/{len(runs)}] {field} {name}, seed {seed}")
        single = dataclasses.replace(config, **{field: name}, seed=seed, compare="", seeds=1, name="")
        records = run_once(single, dataset)
        rows += [{field: name, "seed": seed, **csv_row(record)} for record in records]
        curves[name].append([record.test_accuracy for record in records])
    rounds = min(len(curve) for several in curves.values() for curve in several)  # a privacy budget may end a run
    folder = Path(config.runs).expanduser() / (
        config.name or f"compare-{config.compare or 'seeds'}-{fingerprint_of(config, dataset)}"
    )
    table = {name: np.array([curve[:rounds] for curve in several]) for name, several in curves.items()}
    with writing(folder):
        folder.mkdir(exist_ok=True)
    write_file(folder / "comparison.csv", "".join(map(csv_line, [rows[0], *(row.values() for row in rows)])))
    write_file(folder / "comparison.png", to_png(plot_comparison(table, caption(config, dataset))))
    say("")
    for name, values in table.items():
        spread = f" ± {values[:, -1].std(ddof=1):.2%}" if config.seeds > 1 else ""
        say(f"{name:20} test accuracy {values[:, -1].mean():.2%}{spread} after {rounds} rounds")
    say(f"\nwrote {folder / 'comparison.csv'}\nwrote {folder / 'comparison.png'}")
    return folder


def fingerprint_of(config: Config, dataset: Dataset) -> str:
    """Eight digits of a hash of all that a run's numbers depend on."""
    fields = {name: value for name, value in vars(config).items() if name not in SIDE_FIELDS}
    return hashlib.sha256(json.dumps([fields, dataset.digest], sort_keys=True).encode()).hexdigest()[:8]


def run_once(config: Config, dataset: Dataset) -> list[RoundRecord]:
    """The records of the run of just this configuration: read where it is there, resumed where it was stopped."""
    name = f"{default_name(config, dataset)}-{config.aggregator}-{fingerprint_of(config, dataset)}"
    config = dataclasses.replace(config, name=name)
    folder = Path(config.runs).expanduser() / config.name
    if folder.exists():
        config = dataclasses.replace(config, resume=str(folder))
        check_resumed(config, read_config(folder))
        if (folder / "metrics.json").exists():
            rounds = len(read_json(folder / "metrics.json")["rounds"])
            if rounds == config.rounds:
                say(f"{folder} is there already")
                return read_records(folder / "rounds.jsonl", rounds)
    return run(config).records


def summarize(result: Result, dataset: Dataset, written: list[Path]) -> None:
    """The closing lines: what came out, on what, and where it lies."""
    report = class_report(dataset, result.evaluation)
    means = report["macro avg"]
    classes = sorted(range(dataset.num_classes), key=lambda label: report[str(label)]["f1-score"])
    hardest = ", ".join(f"{label} ({report[str(label)]['f1-score']:.2%})" for label in classes[:3])
    say(
        f"\nfinal test accuracy {result.evaluation.accuracy:.2%} on {dataset.name}, {len(dataset.test.labels):,} test "
        f"images, after {len(result.records)} rounds\nmean over classes: precision {means['precision']:.2%}, recall "
        f"{means['recall']:.2%}, F1 {means['f1-score']:.2%}; lowest F1: {hardest}\n"
        f"weights sha256 {weights_sha256(result.state)}\n"
    )
    tables = [result.folder / name for name in ("config.json", "partition.json", "metrics.csv")]
    for path in [*written, *tables]:
        say(f"wrote {path}")


def say(text: str) -> None:
    """Prints a line, above the progress display; whoever closes our output early (`| head`) does not end the run."""
    try:
        tqdm.tqdm.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def notice(text: str) -> None:
    """A line for the user on stderr, above the progress display."""
    tqdm.tqdm.write(f"notice: {text}", file=sys.stderr)
    sys.stderr.flush()


class Progress:
    """A live display of rounds done and seconds spent on stderr while rounds run; nothing where that is no terminal."""

    def __init__(self, rounds: int):
        self.bar = tqdm.tqdm(desc="rounds", unit="round", total=rounds, leave=False, disable=None, dynamic_ncols=True)
        self.over = threading.Event()

    def __enter__(self) -> Progress:
        threading.Thread(target=self._refresh, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.over.set()
        self.bar.close()

    def _refresh(self) -> None:
        """TFF's `next` says nothing until it is done; the clock goes on."""
        while not self.over.wait(0.2):
            self.bar.refresh()

    def start_from(self, done: int) -> None:
        """The rounds that a resumed run had done already."""
        self.bar.initial = self.bar.n = done

    def line(self, text: str) -> None:
        """A finished round's line."""
        say(text)
        self.bar.update()


def terminate(*_: Any) -> None:
    """Handler of SIGTERM."""
    raise Terminated


def parse(argv: Sequence[str] | None, default: Config | None = None) -> Config:
    """The configuration that the command line asks for; what it does not name is that of `default`."""
    about = __doc__.split("\n")[0]
    return tyro.cli(Config, args=argv, default=default, prog="federated_learning.py", description=about)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Exit code 0; 2 for a user's mistake; 1 for a failure; 130 on Ctrl-C and 143 on SIGTERM."""
    signal.signal(signal.SIGTERM, terminate)
    try:
        config = parse(argv)
        if config.resume:
            saved = read_config(Path(config.resume).expanduser())
            config = parse(argv, default=saved)
            check_resumed(config, saved)
        (compare if config.comparing else run)(config)
    except UserError as error:
        print(f"federated_learning.py: {error}", file=sys.stderr)
        return 2
    except RunFailed as error:
        print(f"federated_learning.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        return 143 if isinstance(error, Terminated) else 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
