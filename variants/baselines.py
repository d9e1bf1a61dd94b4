"""What a federation is worth (`--baselines`): all images in one place, each client alone, and who
gains.

Nothing here trains: a round of one client is local training, so each baseline is rounds of the same
process, by plain FedAvg with the run's own model and epochs, and its rate or, where its algorithm
has another, FedAvg's. A run of T rounds with m of K clients passes T * m / K times its local epochs
over the images; so does each baseline.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

from harness import plots, stopping
from harness.command_line import Progress, notice, say
from harness.fields import UserError
from harness.files import DAMAGE, append, csv_table, json_line, read_bytes, write_file
from harness.hosts import HERE
from harness.program import digest, program
from harness.results import counted
from harness.run_folder import go_on
from harness.worker import Worker
from variants.algorithms import ALGORITHMS, CLIENT_OPTIMIZERS, Algorithm
from variants.datasets import Split
from variants.options import Adversity

import numpy as np

STORE = "baselines.jsonl"
PLAIN = {
    "algorithm": "fedavg",
    "aggregator": "mean",
    "clients_per_round": 0,
    "sampling": "fixed",
    "server_lr": 0.0,
}
PLAIN |= {"server_schedule": "constant", "workers": HERE, **vars(Adversity())}
ONE = {"num_clients": 1, "partition": "iid", "partition_file": "", "min_images": 0}


class Learner(NamedTuple):
    """Rounds of a client by itself: `kind` centralized, alone or tuned, `client` -1 for all images
    in one place.

    evaluate(weights) is on the common test images, own(weights) on those as this client sees them.
    """

    kind: str
    client: int
    rounds: int
    process: Any
    evaluate: Callable
    own: Callable

    def train(self, worker: Any, weights: Any) -> Iterator[tuple[float, Any]]:
        """Yield (test accuracy, weights) after each round, from `weights` on; from the process's
        own without them."""
        state = worker.call(self.kind, self.process.initialize)
        state = state if weights is None else state._replace(global_model_weights=weights)
        for _ in range(self.rounds):
            group = [np.array([max(self.client, 0)], np.int64)]
            state, _, _ = worker.call(self.kind, self.process.next, state, group)
            yield self.evaluate(state.global_model_weights).accuracy, state.global_model_weights


class Tools(NamedTuple):
    """The script's own means: prepare(config, dataset, partition) -> an Experiment,
    evaluator(dataset) -> evaluate.

    see(images, client) -> the images as this client sees them.
    """

    prepare: Callable
    evaluator: Callable
    see: Callable


def plain_training(config: Any, training: Any) -> dict[str, Any]:
    """Return the fields of the baselines' training: the run's epochs and batches, at a rate that is
    right for SGD.

    That is the run's own where its algorithm takes FedAvg's, else FedAvg's default: mimelite's
    would leave a client alone with a four-hundredth of it.
    """
    rate = training.client_lr
    if ALGORITHMS[config.optimization.algorithm].client_lr != Algorithm.client_lr:
        rate = CLIENT_OPTIMIZERS[config.optimization.client_optimizer].rate or Algorithm.client_lr
    return {
        "client_lr": rate,
        "local_epochs": training.local_epochs,
        "batch_size": training.batch_size,
    }


def build_learners(
    config: Any, training: Any, experiment: Any, rounds: int, tools: Tools
) -> list[Learner]:
    """Return who learns by itself: all images in one place, and each client alone and from the
    global model on.

    `rounds` are those of the federation, `training` its flags with the algorithm's own rates.
    """
    dataset = experiment.dataset
    partition = experiment.partition
    clients = config.partitioning.num_clients
    as_long = max(1, round(rounds * config.cohort / clients))
    plain = config.but(**PLAIN, **plain_training(config, training))
    images = [
        tools.see(dataset.train.images[part], client) for client, part in enumerate(partition.parts)
    ]
    every = Split(np.concatenate(images), dataset.train.labels[np.concatenate(partition.parts)])
    gathered = dataclasses.replace(dataset, train=every, digest=f"{partition.digest} gathered")
    one = tools.prepare(plain.but(**ONE), gathered, None)
    alone = tools.prepare(plain, dataset, partition)
    tuned = tools.prepare(plain.but(local_epochs=1), dataset, partition)
    learners = [Learner("centralized", -1, as_long, one.process, one.evaluate, one.evaluate)]
    for client in range(clients):
        test = Split(tools.see(dataset.test.images, client), dataset.test.labels)
        same = test.images is dataset.test.images
        own = (
            experiment.evaluate
            if same
            else tools.evaluator(dataclasses.replace(dataset, test=test))
        )
        learners += [
            Learner("alone", client, as_long, alone.process, experiment.evaluate, own),
            Learner("tuned", client, 1, tuned.process, experiment.evaluate, own),
        ]
    return learners


def recall(confusion: np.ndarray) -> np.ndarray:
    """Return the recall float64[C] of each class of a confusion matrix int64[C,C], rows true; NaN
    without images."""
    with np.errstate(invalid="ignore"):
        return np.diag(confusion) / confusion.sum(axis=1)


def on_mix(confusion: np.ndarray, counts: np.ndarray) -> float:
    """Return the accuracy on test images in the proportions of label counts int64[C]: sum_c p(c) *
    recall(c), exact.

    Labels that the test set does not have are left out; NaN where the client has no others.
    """
    tested = confusion.sum(axis=1) > 0
    return (
        float(np.average(recall(confusion)[tested], weights=counts[tested]))
        if counts[tested].any()
        else math.nan
    )


def read_store(path: Path, after: int) -> dict[tuple[str, int], dict]:
    """Return (kind, client) -> what was learned after this many rounds, of a run that was stopped
    here before."""
    found = {}
    try:
        for line in read_bytes(path).decode().splitlines():
            row = json.loads(line)
            if (row["after"], row["program"]) == (after, digest(program())):
                found[row["kind"], row["client"]] = {
                    **row,
                    "confusion": np.array(row["confusion"], np.int64),
                }
    except DAMAGE:
        pass  # the last line of a run that was killed: it is learned again
    write_file(
        path,
        "".join(
            json_line({**row, "confusion": row["confusion"].tolist()}) for row in found.values()
        ),
    )
    return found


def learn(
    learners: list[Learner], weights: Any, after: int, path: Path, worker: Any
) -> Iterator[None]:
    """Train those that `path` does not hold yet, and add each to it; yield after each round."""
    done = read_store(path, after)
    for learner in learners:
        if (learner.kind, learner.client) in done:
            yield from [None] * learner.rounds
            continue
        accuracies = []
        last = None
        for accuracy, trained in learner.train(
            worker, weights if learner.kind == "tuned" else None
        ):
            accuracies.append(accuracy)
            last = trained
            yield
        row = {
            "kind": learner.kind,
            "client": learner.client,
            "after": after,
            "accuracies": accuracies,
        }
        row["program"] = digest(program())
        append(path, json_line({**row, "confusion": learner.own(last).confusion.tolist()}))


class Gain(NamedTuple):
    """What taking part brings a client, a row of clients.csv: accuracies 0..1 on test images in its
    label mix.

    `skew` is the total-variation distance of its labels to all clients', `federated` the global
    model, `alone` its own, `tuned` the global model after a local epoch of its own; `gain`
    federated - alone.
    """

    client: int
    images: int
    skew: float
    federated: float
    alone: float
    tuned: float
    gain: float


def gains(
    counts: np.ndarray, confusions: Sequence[np.ndarray], done: dict[tuple[str, int], dict]
) -> list[Gain]:
    """Return each client's row: label counts int64[K,C], the global model's confusion for each,
    what was learned."""
    pooled = counts.sum(axis=0) / counts.sum()
    rows = []
    for client, (mix, confusion) in enumerate(zip(counts, confusions, strict=True)):
        skew = float(np.abs(mix / mix.sum() - pooled).sum() / 2)
        federated = on_mix(confusion, mix)
        alone, tuned = (on_mix(done[kind, client]["confusion"], mix) for kind in ("alone", "tuned"))
        rows.append(Gain(client, int(mix.sum()), skew, federated, alone, tuned, federated - alone))
    return rows


def curves(
    records: Sequence[Any], epochs: float, local_epochs: int, done: dict[tuple[str, int], dict]
) -> list[dict]:
    """Return the rows of baselines.csv: each learner's test accuracy after so many passes over the
    images it has.

    A round of the federation passes `epochs` times over all images on average, one of a lone
    learner `local_epochs`.
    """
    rows = [
        {
            "learner": "federated",
            "client": "",
            "epochs": epochs * record.round,
            "test_accuracy": record.test_accuracy,
        }
        for record in records
    ]
    for (kind, client), row in done.items():
        for number, accuracy in enumerate(row["accuracies"] if kind != "tuned" else (), 1):
            name = "" if client < 0 else client
            rows.append(
                {
                    "learner": kind,
                    "client": name,
                    "epochs": local_epochs * number,
                    "test_accuracy": accuracy,
                }
            )
    return rows


def worth(
    config: Any,
    training: Any,
    experiment: Any,
    result: Any,
    folder: Any,
    note: str,
    tools: Tools,
    log: Path,
) -> None:
    """Train the baselines of a run that is done, write their tables and pictures, and say what they
    tell.

    What is learned is kept as it comes: a run that is stopped goes on from there.
    """
    records = result.records
    weights = result.state.global_model_weights
    path = folder.path / STORE
    if not experiment.partition.counts[:, np.unique(experiment.dataset.test.labels)].any():
        raise UserError(
            "baselines=True: no test image has a label that a client holds; drop it, or split "
            "other images"
        )
    try:
        learners = build_learners(config, training, experiment, len(records), tools)
        total = sum(learner.rounds for learner in learners)
        rate = plain_training(config, training)["client_lr"]
        say(f"baselines: {total:,} rounds of one client each, by plain FedAvg at rate {rate:g}")
        with Worker(1, log, config.run.patience) as worker:
            for _ in Progress(total, 0).follow(
                learn(learners, weights, len(records), path, worker)
            ):
                pass
        done = read_store(path, len(records))
        confusions = [
            learner.own(weights).confusion for learner in learners if learner.kind == "alone"
        ]
        rows = gains(experiment.partition.counts, confusions, done)
        share = config.cohort / config.partitioning.num_clients
        lines = curves(records, training.local_epochs * share, training.local_epochs, done)
        write_file(folder.path / "baselines.csv", csv_table(lines))
        write_file(folder.path / "clients.csv", csv_table(row._asdict() for row in rows))
        measured = [row for row in rows if not math.isnan(row.federated)]
        if len(measured) < len(rows):
            left = counted(len(rows) - len(measured), "client")
            notice(
                f"left out of who gains, with labels that no test image has: {left}; nan in "
                "clients.csv"
            )
        worst = min(measured, key=attrgetter("federated")).client
        mixed = mix_rows(confusions[worst], experiment.partition.counts[worst])
        name = f"Client {worst}, the worst: {rows[worst].federated:.2%} on its own label mix"
        pictures = {
            "baselines.png": partial(plots.plot_baselines, lines, note),
            "gain.png": partial(plots.plot_gain, measured, note),
            "worst_client.png": partial(
                plots.plot_mixed_confusion, mixed, name, note, experiment.dataset.classes
            ),
        }
        say(describe(records[-1].test_accuracy, measured, done))
        tables = [folder.path / "baselines.csv", folder.path / "clients.csv"]
        for written in [*folder.draw(pictures), *tables]:
            say(f"wrote {written}")
    except (KeyboardInterrupt, Exception):
        stopping.heard()
        notice(f"the baselines are not done; {go_on(folder.path)}")
        raise


def mix_rows(confusion: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return the confusion matrix float64[C,C] of 1,000 test images in the proportions of `counts`
    int64[C]."""
    with np.errstate(invalid="ignore"):
        shares = np.nan_to_num(confusion / confusion.sum(axis=1, keepdims=True))
    return 1000 * shares * (counts / counts.sum())[:, None]


def describe(federated: float, rows: Sequence[Gain], done: dict[tuple[str, int], dict]) -> str:
    """Return the closing lines: federated, centralized and alone on the test set, then who gains on
    its own labels."""
    together = done["centralized", -1]["accuracies"][-1]
    alone = [row["accuracies"][-1] for (kind, _), row in done.items() if kind == "alone"]
    who = f"mean of {counted(len(alone), 'client')}"
    text = (
        f"\nfederated      {federated:.2%}\n"
        f"centralized    {together:.2%}, all images in one place, as many local epochs\n"
        f"alone          {np.mean(alone):.2%}, {who} ({min(alone):.2%} to {max(alone):.2%})\n"
        "on each client's own label mix, mean ± sd over clients and the mean of the worst 10 %:\n"
    )
    for name, title in (
        ("federated", "global model"),
        ("alone", "its own"),
        ("tuned", "global, tuned"),
    ):
        values = np.sort([getattr(row, name) for row in rows])
        worst = values[: max(1, round(0.1 * len(values)))].mean()
        text += f"{title:<15}{values.mean():.2%} ± {100 * values.std():.2f}, worst {worst:.2%}\n"
    losers = sum(row.gain < 0 for row in rows)
    return text + f"{losers} of {len(rows)} clients lose by taking part\n"
