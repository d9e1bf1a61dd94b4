"""Baselines (--baselines): central training, and local training of each client.

Nothing here trains. A round of one client is local training, so each baseline is rounds of the
same process, by plain FedAvg with the run's own model and epochs; at the run's rate, or at FedAvg's
if the run's algorithm has another. Each baseline's rounds are as many as bring it nearest to the
passes that the federation made over all images: the examples that its clients trained on, divided
by the images of all clients. Stragglers, dropouts and a draw by size count as they were.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

from harness.cli.fields import UserError
from harness.cli.output import Progress, print_line, warn
from harness.config.conditions import default_client_lr
from harness.engine.ssh import HERE
from harness.engine.worker import LocalWorker
from harness.reporting import captions, plots
from harness.reporting.results import pluralize, print_written
from harness.storage.files import append, csv_table, json_line, read_bytes, write_file
from harness.storage.provenance import digest, program
from harness.training.client_accuracies import (
    accuracies_on_label_mix,
    describe_clients,
    worst_tenth,
)
from harness.training.dataset import Split
from harness.training.records import MOST_IN_MATRIX, examples_trained_on, name_reports

import numpy as np

STORE = "baselines.jsonl"
AS_SEEN = "test images changed as the client's own"
# What a client's own steps follow from, of the group Optimization. All other fields of the variants
# are at their defaults in the baselines: one that comes in later, too.
CLIENT_FIELDS = (
    "client_optimizer",
    "client_momentum",
    "weight_decay",
    "client_schedule",
    "warmup_steps",
    "lr_decay",
    "lr_horizon",
)
ONE_CLIENT = {"num_clients": 1, "partition": "iid", "partition_file": "", "min_images": 0}


class Baseline(NamedTuple):
    """Rounds of one client by itself.

    `kind` is "centralized" (all images in one place, client -1), "alone", or "tuned" (one round
    from the global model on). evaluate(weights) is on the common test images, evaluate_own(weights)
    on these as the client has them.
    """

    kind: str
    client: int
    rounds: int
    process: Any
    metric_names: Sequence[str]
    evaluate: Callable[[Any], Any]
    evaluate_own: Callable[[Any], Any]

    def train(self, worker: Any, weights: Any) -> Iterator[tuple[float, Any, bool]]:
        """Yield (test accuracy, weights, whether they are new) after each round.

        It begins with the process's own weights, a tuned one with the global `weights`. An update
        that is not finite is left out, as in any round.
        """
        state = worker.call(self.kind, self.process.initialize)
        if self.kind == "tuned":
            state = state._replace(global_model_weights=weights)
        chunks = [np.array([max(self.client, 0)], np.int64)]
        for _ in range(self.rounds):
            state, _, metrics = worker.call(self.kind, self.process.next, state, chunks)
            (report,) = name_reports(chunks, metrics, self.metric_names)
            model = state.global_model_weights
            yield self.evaluate(model).accuracy, model, report["finite"]


def plain_training(config: Any) -> dict[str, Any]:
    """Return the fields of the baselines' training: the run's epochs, batch and rate.

    Where the rate is the default of the run's algorithm, it is FedAvg's: mimelite's would leave a
    client alone with a four-hundredth of it.
    """
    training = config.training
    flat = config.to_dict()
    learning_rate = training.client_lr
    if learning_rate == default_client_lr(flat, config.tables):
        learning_rate = default_client_lr(flat | {"algorithm": "fedavg"}, config.tables)
    return {
        "client_lr": learning_rate,
        "local_epochs": training.local_epochs,
        "batch_size": training.batch_size,
    }


def plain_config(config: Any) -> Any:
    """Return the configuration of plain FedAvg by all clients of the run, in this machine."""
    kept = {
        "seed": config.seed,
        **config.data.to_dict(),
        **config.partitioning.to_dict(),
        **config.training.to_dict(),
        **config.run.to_dict(),
        **config.subset(CLIENT_FIELDS),
    }
    all_clients = {"clients_per_round": 0, "sampling": "fixed", "server_lr": None, "workers": HERE}
    all_clients["client_test"] = 0.0  # the run's partition leaves those images out already
    return type(config)().replace(**kept | all_clients | plain_training(config))


def passes_so_far(records: Sequence[Any], num_images: int, batch_size: int) -> np.ndarray:
    """Return how often the federation has passed over all its clients' images, float64[rounds]."""
    trained_on = [
        sum(examples_trained_on(report, batch_size) for report in record.clients)
        for record in records
    ]
    return np.cumsum(trained_on) / num_images


def build_baselines(
    experiment: Any, records: Sequence[Any], build_prepared: Callable
) -> list[Baseline]:
    """Return the baselines of an experiment whose rounds have these records.

    `build_prepared(config, dataset, partition)` is the script's: it builds each one's experiment.
    """
    config = experiment.config
    dataset = experiment.dataset
    partition = dataclasses.replace(experiment.partition, test_indices=())  # they hold nothing out
    num_clients = config.partitioning.num_clients
    batch_size = config.training.batch_size
    passes = passes_so_far(records, int(partition.sizes.sum()), batch_size)[-1]
    own_rounds = max(1, round(passes / config.training.local_epochs))
    plain = plain_config(config)
    client_images = [
        experiment.images_of_client(dataset.train.images[indices], client)
        for client, indices in enumerate(partition.indices)
    ]
    all_labels = dataset.train.labels[np.concatenate(partition.indices)]
    gathered = dataclasses.replace(
        dataset,
        train=Split(np.concatenate(client_images), all_labels),
        digest=f"{partition.digest} gathered",
    )
    central = build_prepared(plain.replace(**ONE_CLIENT), gathered)
    alone = build_prepared(plain, dataset, partition)
    tuned = build_prepared(plain.replace(local_epochs=1), dataset, partition)
    evaluate = experiment.evaluate
    names = central.parts.metrics_type._fields
    on_all = central.evaluate
    found = [Baseline("centralized", -1, own_rounds, central.process, names, on_all, on_all)]
    for client in range(num_clients):
        evaluate_own = evaluate
        test_images = experiment.images_of_client(dataset.test.images, client)
        if test_images is not dataset.test.images:
            own_test = Split(test_images, dataset.test.labels)
            own_data = dataclasses.replace(dataset, test=own_test)
            evaluate_own = experiment.build_evaluator(own_data)
        evaluators = (evaluate, evaluate_own)
        found.append(Baseline("alone", client, own_rounds, alone.process, names, *evaluators))
        found.append(Baseline("tuned", client, 1, tuned.process, names, *evaluators))
    return found


def check_num_classes(num_classes: int) -> None:
    """Raise UserError for more labels than baselines can have: each keeps a confusion matrix."""
    if num_classes > MOST_IN_MATRIX:
        raise UserError(
            f"baselines=True with {num_classes:,} labels needs tables that are too large; omit "
            f"it, or use data of at most {MOST_IN_MATRIX:,} labels"
        )


def accuracy_on_label_mix(confusion: np.ndarray, counts: np.ndarray) -> float:
    """Return a client's accuracy on test images in the proportions of its labels, int64[C]."""
    found = accuracies_on_label_mix(np.diag(confusion), confusion.sum(axis=1), counts[np.newaxis])
    return float(found[0])


Trained = dict[tuple[str, int], dict[str, Any]]  # (kind, client) -> a line of the store


def read_store(path: Path, after: int) -> Trained:
    """Return the baselines that this program has trained already for a run of `after` rounds."""
    trained = {}
    lines = read_bytes(path).decode(errors="replace").splitlines() if path.exists() else []
    for line in lines:
        try:
            entry = json.loads(line)
            confusion = np.array(entry["confusion"], np.int64)
            made_here = (entry["after"], entry["program"]) == (after, digest(program()))
            key = (entry["kind"], entry["client"])
        except Exception:  # the last line of a run that was killed: it is trained again
            continue
        if made_here:
            trained[key] = entry | {"confusion": confusion}
    kept = [
        json_line(entry | {"confusion": entry["confusion"].tolist()}) for entry in trained.values()
    ]
    write_file(path, "".join(kept))
    return trained


def train_baselines(
    baselines: list[Baseline],
    weights: Any,
    after: int,
    path: Path,
    worker: Any,
    deadline: float,
    at_least: int,
) -> Iterator[None]:
    """Train those that the file `path` does not hold yet, and add each; yield after each round.

    It ends before one that would pass the `deadline`, a perf_counter(), but not before it has
    trained `at_least` that number.
    """
    trained = read_store(path, after)
    num_trained = 0
    longest: dict[str, float] = {}  # seconds by kind
    for baseline in baselines:
        if (baseline.kind, baseline.client) in trained:
            yield from [None] * baseline.rounds
            continue
        began = time.perf_counter()
        if num_trained >= at_least and began + longest.get(baseline.kind, 0.0) > deadline:
            return
        accuracies = []
        num_left_out = 0
        for accuracy, after_round, is_new in baseline.train(worker, weights):
            accuracies.append(accuracy)
            own_weights = after_round
            num_left_out += not is_new
            yield
        entry = {
            "kind": baseline.kind,
            "client": baseline.client,
            "after": after,
            "accuracies": accuracies,
            "left_out": num_left_out,
            "program": digest(program()),
            "confusion": baseline.evaluate_own(own_weights).confusion.tolist(),
        }
        append(path, json_line(entry))
        num_trained += 1
        took = time.perf_counter() - began
        longest[baseline.kind] = max(took, longest.get(baseline.kind, 0.0))


class Gain(NamedTuple):
    """What taking part brings a client, a row of clients.csv.

    Accuracies, 0..1, are on test images in the client's label mix.
    """

    client: int
    images: int
    skew: float  # total-variation distance of its labels to all clients' labels
    global_accuracy: float  # of the global model
    own_accuracy: float  # of the model that it trains alone
    tuned_accuracy: float  # of the global model after a local epoch of its own
    gain: float  # global_accuracy - own_accuracy


def find_gains(
    counts: np.ndarray, confusions: Sequence[np.ndarray], trained: Trained
) -> list[Gain]:
    """Return a Gain for each client.

    `counts` int64[K,C] are the clients' labels, `confusions` the global model's on the test images
    as each client has them.
    """
    pooled = counts.sum(axis=0) / counts.sum()
    gains = []
    for client, (mix, confusion) in enumerate(zip(counts, confusions, strict=True)):
        global_accuracy = accuracy_on_label_mix(confusion, mix)
        own_accuracy = accuracy_on_label_mix(trained["alone", client]["confusion"], mix)
        tuned_accuracy = accuracy_on_label_mix(trained["tuned", client]["confusion"], mix)
        gains.append(
            Gain(
                client=client,
                images=int(mix.sum()),
                skew=float(np.abs(mix / mix.sum() - pooled).sum() / 2),
                global_accuracy=global_accuracy,
                own_accuracy=own_accuracy,
                tuned_accuracy=tuned_accuracy,
                gain=global_accuracy - own_accuracy,
            )
        )
    return gains


def learning_curves(
    records: Sequence[Any], passes: np.ndarray, local_epochs: int, trained: Trained
) -> list[dict[str, Any]]:
    """Return the rows of baselines.csv: test accuracy by passes over a learner's images.

    `passes` are the federation's after each round; a round of a baseline makes `local_epochs`
    passes over its own images.
    """
    names = ("learner", "client", "epochs", "test_accuracy")
    rows: list[tuple[Any, ...]] = [
        ("federated", "", float(done), record.test_accuracy)
        for record, done in zip(records, passes, strict=True)
    ]
    for (kind, client), entry in trained.items():
        if kind == "tuned":
            continue
        name = "" if client < 0 else client
        for number, accuracy in enumerate(entry["accuracies"], 1):
            rows.append((kind, name, local_epochs * number, accuracy))
    return [dict(zip(names, row, strict=True)) for row in rows]


def run_baselines(
    experiment: Any, result: Any, folder: Any, build_prepared: Callable, has_new_round: bool
) -> bool:
    """Train the baselines of a finished run; write their tables and figures, and print a summary.

    Results are stored as they come, so that a stopped command continues from there. The time limit
    is that of the run and its baselines. Returns whether all are trained.
    """
    config = experiment.config
    seconds = config.run.seconds_allowed or math.inf
    out_of_time = f"time limit of {seconds:g} s: the baselines are not finished"
    if result.is_cut:
        warn(f"{out_of_time}; {folder.what_next()}")
        return False
    counts = experiment.partition.counts
    after = len(result.records)
    weights = result.state.global_model_weights
    path = folder.path / STORE
    if not counts[:, np.unique(experiment.dataset.test.labels)].any():
        raise UserError(
            "baselines=True: no test image has a label that any client holds; omit it, or split "
            "other images"
        )
    try:
        baselines = build_baselines(experiment, result.records, build_prepared)
        num_rounds = sum(baseline.rounds for baseline in baselines)
        rate = plain_training(config)["client_lr"]
        print_line(
            f"baselines: {num_rounds:,} rounds of one client each, by plain FedAvg at rate {rate:g}"
        )
        # A command without new rounds trains one, so that resuming comes to an end.
        limits = (folder.opened + seconds, 0 if has_new_round else 1)
        with LocalWorker(1, folder.log, config.run.patience) as worker:
            training = train_baselines(baselines, weights, after, path, worker, *limits)
            for _ in Progress(num_rounds, 0).follow(training):
                pass
        trained = read_store(path, after)
        if len(trained) < len(baselines):
            warn(f"{out_of_time}; {folder.what_next()}")
            return False
        if num_left_out := sum(entry["left_out"] for entry in trained.values()):
            warn(
                f"{num_left_out} of the baselines' {num_rounds:,} rounds led to weights that are "
                "not finite, and were left out: the accuracies are those before them; choose a "
                "smaller --client-lr"
            )
        confusions = [
            baseline.evaluate_own(weights).confusion
            for baseline in baselines
            if baseline.kind == "alone"
        ]
        gains = find_gains(counts, confusions, trained)
        passes = passes_so_far(result.records, int(counts.sum()), config.training.batch_size)
        own_passes = config.training.local_epochs * baselines[0].rounds
        accuracy = result.records[-1].test_accuracy
        as_seen = f", {AS_SEEN}" if config.chosen("partition").change_images else ""
        print_line(
            describe_learners(
                accuracy, measured(gains), trained, passes[-1], own_passes, as_seen=as_seen
            )
        )
        print_written(write_baselines(experiment, result, folder, trained, gains, confusions))
    except (KeyboardInterrupt, Exception):
        warn(f"the baselines are not finished; {folder.what_next()}")
        raise
    return True


def measured(gains: Sequence[Gain]) -> list[Gain]:
    """Return the rows of the clients that have a label with test images."""
    return [gain for gain in gains if not math.isnan(gain.global_accuracy)]


def write_baselines(
    experiment: Any,
    result: Any,
    folder: Any,
    trained: Trained,
    gains: list[Gain],
    confusions: list[np.ndarray],
) -> list[Path]:
    """Write the two tables and the three plots; return their paths."""
    config = experiment.config
    classes = experiment.dataset.classes
    num_images = int(experiment.partition.sizes.sum())
    passes = passes_so_far(result.records, num_images, config.training.batch_size)
    curves = learning_curves(result.records, passes, config.training.local_epochs, trained)
    write_file(folder.path / "baselines.csv", csv_table(curves))
    rows = [
        row | gain._asdict()
        for row, gain in zip(
            describe_clients(result.evaluation, experiment.partition), gains, strict=True
        )
    ]
    write_file(folder.path / "clients.csv", csv_table(rows))
    num_left_out = len(gains) - len(measured(gains))
    if num_left_out:
        warn(
            "not shown in who gains, as no test image has their labels: "
            f"{pluralize(num_left_out, 'client')}; nan in clients.csv"
        )
    worst = min(measured(gains), key=attrgetter("global_accuracy")).client
    matrix = mix_rows(confusions[worst], experiment.partition.counts[worst])
    title = f"Client {worst}, the worst: {gains[worst].global_accuracy:.2%} on its own label mix"
    caption = captions.caption(experiment)
    rate = plain_training(config)["client_lr"]
    compared = f"{caption} · centralized and alone: plain FedAvg, lr {rate:g}"
    seen = f" · {AS_SEEN}" if config.chosen("partition").change_images else ""
    figures = {
        "baselines.png": partial(plots.plot_baselines, curves, compared),
        "gain.png": partial(plots.plot_gain, measured(gains), compared + seen),
        "worst_client.png": partial(
            plots.plot_mixed_confusion, matrix, title, caption + seen, classes
        ),
    }
    tables = [folder.path / "baselines.csv", folder.path / "clients.csv"]
    return [*folder.draw(figures), *tables]


def mix_rows(confusion: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return the confusion matrix float64[C,C] of 1,000 test images in the proportions of `counts`
    int64[C]."""
    with np.errstate(invalid="ignore"):
        shares = np.nan_to_num(confusion / confusion.sum(axis=1, keepdims=True))
    return 1000 * shares * (counts / counts.sum())[:, None]


def describe_learners(
    federated: float,
    gains: Sequence[Gain],
    trained: Trained,
    passes: float,
    own_passes: int,
    as_seen: str = "",
) -> str:
    """Return the closing lines: accuracies on the test set, then on each client's label mix.

    The federation made `passes` over all images, each baseline `own_passes` over its own; `as_seen`
    says that the test images are changed as the client's own are.
    """
    central = trained["centralized", -1]["accuracies"][-1]
    alone = [entry["accuracies"][-1] for (kind, _), entry in trained.items() if kind == "alone"]
    text = (
        f"\nfederated            {federated:.2%}, {passes:.1f} passes over all images\n"
        f"centralized          {central:.2%}, {own_passes} passes, all images in one place\n"
        f"alone                {np.mean(alone):.2%}, {own_passes} passes each, mean of "
        f"{pluralize(len(alone), 'client')} ({min(alone):.2%} to {max(alone):.2%})\n"
        f"on each client's own label mix{as_seen}, mean ± sd over clients and the mean of the "
        "worst 10 %:\n"
    )
    titles = {
        "global_accuracy": "global model",
        "own_accuracy": "local model",
        "tuned_accuracy": "fine-tuned (1 epoch)",
    }
    for field, title in titles.items():
        values = np.sort([getattr(gain, field) for gain in gains])
        worst = worst_tenth(values)
        text += f"{title:<21}{values.mean():.2%} ± {100 * values.std():.2f}, worst {worst:.2%}\n"
    num_losers = sum(gain.gain < 0 for gain in gains)
    num_clear = sum(gain.gain < -plots.CLEAR_LOSS for gain in gains)
    return (
        f"{text}{num_losers} of {len(gains)} clients do worse with the global model, "
        f"{num_clear} by more than {100 * plots.CLEAR_LOSS:g} points\n"
    )
