"""Seconds of one FedAvg round, ours against a floor, TFF's stock ways and a Keras loop: side by
side, interleaved.

    # every work, 15 rounds each; writes results/round_time.json
    python benchmarks/round_time.py
    # the one work of the table's first part, printed only
    python benchmarks/round_time.py --works mlp

Each contender is a process of its own, with the thread settings its users have, and does the same
work: the same IID clients, model, initial weights, learning rate, batch size and one local epoch in
an order of its own. The driver asks them for a round in turn, so that a noisy minute hits all of
them, and starts all of them anew after some rounds, as processes of one program differ, too: with
convolutions it is decided at the start whether TensorFlow finds the fast gradient. The CPU-seconds
and the memory are those of the contender's whole process tree; the memory is the sum of its
processes' peaks. Test accuracies must agree to a point.
"""

import argparse
import contextlib
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from results import ROOT, arguments, made_by, parse, write

# isort: split
import federated_learning as fl
from harness.engine.worker import LocalWorker

import numpy as np
from contenders import (
    PEERS,
    Tree,
    check_installed,
    command_of,
    environment,
    export,
    paddings_of,
    python_of,
)
from small import first_images

ROUNDS = 5  # of a process, after one that does not count
STARTS = 3  # processes of each contender, one after the other
CLIENTS = 10
WORKS = {  # images a client, and what differs from the default configuration
    "mlp": (6000, {"model": "mlp", "batch_size": 32}),
    "lean-cnn": (1000, {"model": "lean-cnn", "batch_size": 16}),
    "cnn": (300, {"model": "cnn", "batch_size": 10}),
    "colour": (1000, {"model": "lean-cnn", "batch_size": 16}),
}


def in_colours(split: fl.Split) -> fl.Split:
    """MNIST's digits as synthetic images uint8[n,32,32,3], each in a colour of its own."""
    padded = np.pad(split.images, [(0, 0), (2, 2), (2, 2), (0, 0)])
    colours = np.random.default_rng(0).uniform(0.3, 1, (len(padded), 1, 1, 3))
    return fl.Split((padded * colours).astype(np.uint8), split.labels)


class Work:
    """What every contender gets: configuration, clients' images and labels, shard files, a model to
    evaluate with."""

    def __init__(self, name: str):
        images, changes = WORKS[name]
        config = fl.Config().replace(
            partition="iid", local_epochs=1, cache=str(ROOT / ".cache"), **changes
        )
        dataset = first_images(config, images * CLIENTS)
        if name == "colour":
            train = in_colours(dataset.train)
            test = in_colours(dataset.test)
            dataset = replace(dataset, train=train, test=test, digest=f"{dataset.digest} colour")
        experiment = fl.build_prepared(config, dataset)
        self.experiment = experiment
        self.config = experiment.config
        self.training = experiment.config.training
        self.dataset = experiment.dataset
        self.partition = experiment.partition
        self.shards = experiment.shard_folder
        self.process = experiment.process

    def client_arrays(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """(images float32[n,H,W,channels] in 0..1, labels int32[n]) of each client."""
        train = self.dataset.train
        return [
            (
                train.images[part].astype(np.float32) / 255,
                train.labels[part].astype(np.int32),
            )
            for part in self.partition.indices
        ]

    def keras_model(self):
        return fl.build_model(self.experiment.network, self.config.seed)

    def accuracy(self, weights: list[np.ndarray]) -> float:
        # now: TFF's own way spoils models made before
        evaluate = fl.build_evaluator(self.experiment.network, self.dataset)
        return evaluate(
            fl.tff.learning.models.ModelWeights([np.asarray(w) for w in weights], [])
        ).accuracy


# Each contender is a generator: it sets up, then does a round each time it is asked, and yields the
# global weights.


def floor(work: Work) -> Iterator[list[np.ndarray]]:
    """A hand-written TensorFlow graph loop a client, clients on two Python threads, mean in NumPy:
    no TFF at all."""
    tf = fl.tf
    batch = work.training.batch_size
    paddings = paddings_of(work.keras_model())

    def logits_of(weights, x):
        for place, (kernel, bias) in enumerate(zip(weights[::2], weights[1::2], strict=True)):
            last = kernel is weights[-2]
            if len(kernel.shape) == 4:
                convolved = tf.nn.conv2d(x, kernel, 1, paddings[place].upper())
                x = tf.nn.max_pool2d(tf.nn.relu(convolved + bias), 2, 2, "VALID")
            else:
                x = tf.reshape(x, [-1, kernel.shape[0]]) @ kernel + bias
                x = x if last else tf.nn.relu(x)
        return x

    @tf.function
    def train(weights, pixels, labels):
        order = tf.random.shuffle(tf.range(tf.shape(labels)[0]))
        for start in tf.range(0, tf.shape(labels)[0], batch):
            tf.autograph.experimental.set_loop_options(parallel_iterations=1)
            chosen = order[start : start + batch]
            x = tf.cast(tf.gather(pixels, chosen), tf.float32) / 255
            with tf.GradientTape() as tape:
                tape.watch(weights)
                losses = tf.nn.sparse_softmax_cross_entropy_with_logits(
                    tf.gather(labels, chosen), logits_of(weights, x)
                )
                loss = tf.reduce_mean(losses)
            gradients = tape.gradient(loss, weights)
            weights = tuple(
                w - work.training.client_lr * g for w, g in zip(weights, gradients, strict=True)
            )
        return weights

    train_set = work.dataset.train
    data = [
        (
            tf.constant(train_set.images[p]),
            tf.constant(train_set.labels[p].astype(np.int32)),
        )
        for p in work.partition.indices
    ]
    weights = tuple(tf.constant(w) for w in work.keras_model().get_weights())
    with ThreadPoolExecutor(2) as pool:
        while True:
            trained = list(pool.map(lambda client, w=weights: train(w, *client), data))
            weights = tuple(
                tf.constant(np.mean([w.numpy() for w in layer], axis=0))
                for layer in zip(*trained, strict=True)
            )
            yield list(weights)


def ours(work: Work) -> Iterator[list[np.ndarray]]:
    with LocalWorker(CLIENTS):
        state = work.process.initialize()
        while True:
            state, _, _ = work.process.next(
                state, [np.array([client]) for client in range(CLIENTS)]
            )
            yield list(state.global_model_weights.trainable)


def stock(work: Work):
    """TFF's own FedAvg, as its tutorials build it."""
    tf = fl.tf
    optimizers = fl.tff.learning.optimizers
    shape = work.experiment.network.image_shape
    batch = (tf.TensorSpec([None, *shape], tf.float32), tf.TensorSpec([None], tf.int32))
    loss = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return fl.tff.learning.algorithms.build_weighted_fed_avg(
        fl.tff.learning.models.functional_model_from_keras(work.keras_model(), loss, batch),
        client_optimizer_fn=optimizers.build_sgdm(work.training.client_lr),
        server_optimizer_fn=optimizers.build_sgdm(1.0),
    )


def stock_tff(work: Work) -> Iterator[list[np.ndarray]]:
    """TFF's FedAvg by client id: the worker reads the shard files, and batches them by tf.data."""
    tf = fl.tf
    tff = fl.tff
    batch = work.training.batch_size

    def scaled(images, labels):
        return fl.to_input(images), labels

    @tff.tensorflow.computation(tff.TensorType(np.int64))
    def client_dataset(client):
        shard = fl.shards.read_shard(work.shards, client, work.experiment.network.image_shape)
        examples = tf.data.Dataset.from_tensor_slices(tuple(shard))
        return examples.shuffle(len(work.partition.indices[0])).batch(batch).map(scaled)

    process = tff.simulation.compose_dataset_computation_with_learning_process(
        client_dataset, stock(work)
    )
    return learning_process(process, list(range(CLIENTS)))


def usual_tff(work: Work) -> Iterator[list[np.ndarray]]:
    """TFF's FedAvg as most code has it: each client's tensors as a tf.data.Dataset, passed to
    `next`."""
    data = [
        fl.tf.data.Dataset.from_tensor_slices(arrays)
        .shuffle(len(arrays[1]))
        .batch(work.training.batch_size)
        for arrays in work.client_arrays()
    ]
    return learning_process(stock(work), data)


def learning_process(process, clients) -> Iterator[list[np.ndarray]]:
    """Rounds of a TFF LearningProcess in TFF's own default context."""
    state = process.initialize()
    while True:
        state = process.next(state, clients).state
        yield list(state.global_model_weights.trainable)


def keras_fit(work: Work) -> Iterator[list[np.ndarray]]:
    """What the popular scripts do: a freshly compiled Keras model a client, `fit`, mean in
    NumPy."""
    weights = work.keras_model().get_weights()
    arrays = work.client_arrays()
    while True:
        trained = []
        for x, y in arrays:
            model = work.keras_model()
            model.set_weights(weights)
            loss = fl.tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)
            model.compile(fl.tf.keras.optimizers.SGD(work.training.client_lr), loss)
            model.fit(x, y, batch_size=work.training.batch_size, epochs=1, verbose=0)
            trained.append(model.get_weights())
        weights = [np.mean(layer, axis=0) for layer in zip(*trained, strict=True)]
        yield weights


CONTENDERS = {
    "floor": floor,
    "ours": ours,
    "stock-tff": stock_tff,
    "usual-tff": usual_tff,
    "keras-fit": keras_fit,
}


def contend(name: str, work_name: str) -> None:
    """A contender's process: a round for each line read, and the test accuracy at the end."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    work = Work(work_name)
    rounds = CONTENDERS[name](work)
    weights = None
    for line in sys.stdin:
        if line.strip() == "end":
            print(work.accuracy(weights), file=answers, flush=True)
            break
        began = fl.time.perf_counter()
        weights = next(rounds)
        print(fl.time.perf_counter() - began, file=answers, flush=True)
    rounds.close()


THREADS = {"floor": {"TF_NUM_INTRAOP_THREADS": "1"}}  # its two clients at a time have the two cores


class Contender:
    """The driver's side: starts the process, asks for rounds, and reads its tree's CPU time and
    memory."""

    def __init__(self, name: str, work: str, file: Path):
        """`file` has the work, for a peer."""
        self.name = name
        self.seconds = []
        self.cpu = []
        self.accuracy = math.nan
        command = [sys.executable, __file__, "--contender", name, "--works", work]
        if name in PEERS:
            command = command_of(name, file)
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**environment(), **THREADS.get(name, {})},
        )
        self.tree = Tree(self.process.pid)

    def ask(self, what: str) -> float:
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(what + "\n")
            self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"{self.name} ended with exit status {self.process.wait()}")
        return float(answer)

    def round(self) -> None:
        before = self.tree.cpu_seconds()
        self.seconds.append(self.ask("round"))
        self.cpu.append(self.tree.cpu_seconds() - before)

    def evaluate(self) -> None:
        """Note the test accuracy; no round comes after it."""
        self.accuracy = self.ask("end")

    def end(self) -> None:
        self.tree.look()
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5)
        self.tree.kill()


def interleave(work: str, names: list[str], rounds: int, file: Path) -> list[Contender]:
    """The contenders after `rounds` rounds of one process each, in turn, after one to warm up."""
    with contextlib.ExitStack() as stack:
        contenders = []
        for name in names:
            contenders.append(Contender(name, work, file))
            stack.callback(contenders[-1].end)
        for contender in contenders:
            contender.ask("round")
        for number in range(rounds):
            for contender in contenders:
                contender.round()
            print(f"{work}: round {number + 1}/{rounds}", file=sys.stderr)
        for contender in contenders:
            contender.evaluate()
    return contenders


def measure(work: str, names: list[str], rounds: int) -> list[dict]:
    """Rows of the result: `rounds` rounds of each of STARTS processes of each contender."""
    starts = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "work.npz"
        if PEERS.keys() & {*names}:
            export(Work(work).experiment, file)
        for start in range(STARTS):
            print(f"{work}: start {start + 1}/{STARTS}", file=sys.stderr)
            starts.append(interleave(work, names, rounds, file))
    rows = [
        {
            "name": name,
            "work": title(work),
            "seconds": [round(s, 4) for c in contenders for s in c.seconds],
            "cpu_s": round(statistics.median(cpu for c in contenders for cpu in c.cpu), 3),
            "peak_mib": round(max(c.tree.peak_mib() for c in contenders)),
            "accuracy": round(statistics.median(c.accuracy for c in contenders), 4),
        }
        for name, contenders in zip(names, zip(*starts, strict=True), strict=True)
    ]
    accuracies = [row["accuracy"] for row in rows]
    if max(accuracies) - min(accuracies) > 0.01:
        raise SystemExit(
            f"{work}: not the same work, accuracies are {dict(zip(names, accuracies, strict=True))}"
        )
    return rows


def title(work: str) -> str:
    images, changes = WORKS[work]
    return f"{work}, {CLIENTS} clients x {images:,} images, B = {changes['batch_size']}, E = 1"


def table(rows: list[dict]) -> str:
    """The rows as Markdown, times relative to the floor and to ours."""
    lines = [
        "| work | contender | s / round, median (min to max) | × floor | × ours | CPU-s | peak "
        "MiB | accuracy |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        same = {
            r["name"]: statistics.median(r["seconds"]) for r in rows if r["work"] == row["work"]
        }
        seconds = same[row["name"]]
        spread = f"{min(row['seconds']):.3f} to {max(row['seconds']):.3f}"
        floor = seconds / same.get("floor", math.nan)
        own = seconds / same.get("ours", math.nan)
        lines.append(
            f"| {row['work']} | {row['name']} | {seconds:.3f} ({spread}) | {floor:.2f} | {own:.2f} "
            f"| {row['cpu_s']:.2f} | {row['peak_mib']:,} | {row['accuracy']:.2%} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--works", nargs="+", choices=WORKS, default=list(WORKS))
    parser.add_argument(
        "--contenders",
        nargs="+",
        choices=[*CONTENDERS, *PEERS],
        help="by default all but the peers, and floor-jax on mlp where it is installed",
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    options = parse(parser)
    if options.contender:
        return contend(options.contender, options.works[0])
    asked = options.contenders or []
    if "colour" in options.works and PEERS.keys() & {*asked}:
        parser.error("the peers take no colour images; give them other --works")
    check_installed(asked)
    rows = []
    for work in options.works:
        names = ["floor", "ours", "stock-tff"]  # the others take minutes a round with convolutions
        if work == "mlp":
            names = [*CONTENDERS, *(["floor-jax"] if python_of("floor-jax").exists() else [])]
        rows += measure(work, options.contenders or names, options.rounds)
    if options.works == list(WORKS) and not options.contenders and options.rounds == ROUNDS:
        write("round_time", {**made_by(), "rows": rows})
    print(table(rows))


if __name__ == "__main__":
    main()
