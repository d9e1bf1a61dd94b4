"""Round records: metrics, terminal lines, and diagnosis of problems."""

from __future__ import annotations

import contextlib
import json
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, get_origin, get_type_hints

import numpy as np
import sklearn.metrics

# What a differentially private run may publish of a round: the noisy result, and what follows from
# the flags alone.
PUBLIC = (
    *("round", "test_loss", "test_accuracy", "metrics"),
    *("bytes_down", "bytes_up", "epsilon", "clip_norm"),
)
# Columns of accuracies on other images than the test set: what a round's line calls them.
EXTRA = {
    "attack_success": "backdoor success",
    "seen_accuracy": "training clients",
    "unseen_accuracy": "unseen clients",
    "client_accuracy": "own test images",
    "client_worst10": "worst 10 % of clients",
    "personal_accuracy": "own models",
    "personal_worst10": "worst 10 % of clients, own models",
    "unseen_personal_accuracy": "unseen clients, own models",
}
# Of these columns, those of the clients' own models.
OWN_MODELS = "personal_accuracy"
WORST_OWN = "personal_worst10"
# What a client measures while it trains, on its own images: in files these are train_loss, ...
DURING_TRAINING = ("loss", "accuracy")
STUCK_ROUNDS = 3  # at chance from the start, after which the user is told
FEW_STEPS = 20  # of a client in all rounds, by which nothing is learned at any rate
MOST_IN_MATRIX = 2000  # labels of which a confusion matrix is kept: 4 million numbers


@contextlib.contextmanager
def few_images_of_many_labels() -> Iterator[None]:
    """Silence scikit-learn, which takes many labels for a mistake."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The number of unique classes is greater")
        yield


@dataclass(frozen=True)
class Evaluation:
    """The global model on the test set."""

    loss: float  # mean cross-entropy in nats
    accuracy: float  # 0..1
    labels: np.ndarray  # [N] of an unsigned type, the true ones
    predictions: np.ndarray  # likewise
    num_classes: int
    extra_accuracies: dict[str, float] = field(
        default_factory=dict
    )  # accuracies on other images, by name
    # Set of other images -> bool[n]: whether each of them is classified correctly
    correct: dict[str, np.ndarray] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)  # --metrics', by column

    @cached_property
    def confusion(self) -> np.ndarray:
        """The confusion matrix int64[C,C], a row a true label."""
        return self.confusion_of(range(self.num_classes))

    def confusion_of(self, labels: Sequence[int]) -> np.ndarray:
        """Return the part of the confusion matrix that these labels are the rows and columns of."""
        known = np.isin(self.labels, labels) & np.isin(self.predictions, labels)
        with few_images_of_many_labels():
            return sklearn.metrics.confusion_matrix(
                self.labels[known], self.predictions[known], labels=list(labels)
            )

    def hardest_labels(self, most: int) -> list[int]:
        """Return the labels that most errors are about, as the true one or as the predicted one.

        They are sorted, at most `most`, and all labels if there are no more.
        """
        if self.num_classes <= most:
            return list(range(self.num_classes))
        wrong = self.labels != self.predictions
        about = np.concatenate([self.labels[wrong], self.predictions[wrong]])
        num_errors = np.bincount(about, minlength=self.num_classes)
        return np.sort(np.argsort(-num_errors, kind="stable")[:most]).tolist()


@dataclass(frozen=True)
class RoundRecord:
    """What one round did: a row of metrics.csv and of metrics.json.

    `train` has the mean over the clients' examples of each metric that clients report; it becomes
    the columns train_loss, train_accuracy, ... A round under differential privacy has only the
    fields in PUBLIC.
    """

    round: int
    train: dict[str, float]
    test_loss: float  # cross-entropy in nats
    test_accuracy: float
    num_nonfinite: int | None  # clients left out, as their update was not finite
    dropped: int | None  # clients that got the weights and did not report
    bytes_down: int  # what the server sends, as in `communication_cost`
    bytes_up: int
    epsilon: float | None  # spent by all rounds begun so far; None without privacy
    seconds: float
    clients: list[dict[str, Any]]  # what each reported, by name, with its id as `client`
    measured_bytes_down: int | None = None  # to several hosts; None with one worker here
    measured_bytes_up: int | None = None
    extra_accuracies: dict[str, float] = field(
        default_factory=dict
    )  # 0..1, of the columns in EXTRA
    clip_norm: float | None = None  # an adaptive aggregator's after the round, such as dp's
    metrics: dict[str, float] = field(default_factory=dict)  # --metrics', by column
    simulated_seconds: float | None = None  # of the clock's; None without one

    @property
    def private(self) -> bool:
        """Whether the round was differentially private."""
        return self.epsilon is not None

    def public(self) -> RoundRecord:
        """Return the record with the fields in PUBLIC, and every other one blank.

        All else could tell of single clients, or of who was drawn: a figure without noise, the
        bytes measured, the seconds, which grow with the images of those who train.
        """
        types = get_type_hints(type(self))
        hidden = {name: blank(types[name]) for name in vars(self) if name not in PUBLIC}
        return replace(self, **hidden)

    def numbers(self) -> dict[str, float]:
        """Return name -> value of the figures that there are, as an experiment tracker takes it."""
        return {name: value for name, value in self.figures().items() if value is not None}

    def figures(self) -> dict[str, Any]:
        """Return column -> value: all but what single clients reported."""
        columns: dict[str, Any] = {}
        for name, value in vars(self).items():
            if name == "train":
                columns |= {f"train_{metric}": mean for metric, mean in value.items()}
            elif name in ("extra_accuracies", "metrics"):
                columns |= value
            elif name != "clients":
                columns[name] = value
        return columns

    def to_json(self) -> dict[str, Any]:
        """Return the record as JSON content, from which `read_record` makes it again."""
        return self.figures() | {"clients": self.reports()}

    def reports(self) -> list[dict[str, Any]]:
        """Return what each client reported, named as in files: train_accuracy, ..."""
        return [
            {f"train_{k}" if k in DURING_TRAINING else k: v for k, v in report.items()}
            for report in self.clients
        ]

    def trouble(self, earlier: Sequence[RoundRecord], chance: float, is_last: bool) -> str:
        """Return what is wrong with the global model, or "".

        A lasting problem is reported once, and again after the last round. `chance` is the accuracy
        of always predicting the most frequent test label.
        """
        text = self.diagnosis(earlier, chance, is_last)
        before = ""
        if earlier:
            before = earlier[-1].diagnosis(earlier[:-1], chance, is_last=False)
        return text if text != before or is_last else ""

    def diagnosis(self, earlier: Sequence[RoundRecord], chance: float, is_last: bool) -> str:
        """Return what is wrong with the global model after this round, reported before or not."""
        near_chance = chance + 0.05 * (1 - chance)
        far_from_chance = min(2 * near_chance, (1 + chance) / 2)
        accuracies = [record.test_accuracy for record in earlier]
        if not math.isfinite(self.test_loss):
            return "the test loss is not finite; try a smaller --client-lr"
        if self.test_accuracy < near_chance and max(accuracies, default=0) > far_from_chance:
            return "the test accuracy fell back to chance; try a smaller --client-lr"
        if self.num_nonfinite is not None and not self.clients:
            return "no client reported; the weights are unchanged"
        if self.num_nonfinite is not None and self.num_nonfinite == len(self.clients):
            return "no client's update was finite; try a smaller --client-lr"
        if self.is_unchanged_since(earlier):
            return (
                "the global model did not change: the aggregated update is 0; check the "
                "aggregator, the attackers and the learning rates"
            )
        is_stuck = all(accuracy < near_chance for accuracy in [*accuracies, self.test_accuracy])
        if is_stuck and (is_last or self.round == STUCK_ROUNDS):
            return f"the test accuracy is still at chance; {self.cure_of_chance(earlier, is_last)}"
        return ""

    def is_unchanged_since(self, earlier: Sequence[RoundRecord]) -> bool:
        """Return whether the test set shows the same model as after the round before."""
        if not earlier or self.private:
            return False
        before = earlier[-1]
        return (before.test_loss, before.test_accuracy) == (self.test_loss, self.test_accuracy)

    def cure_of_chance(self, earlier: Sequence[RoundRecord], is_last: bool) -> str:
        """Return a suggestion for a model that has been at chance since the first round."""
        if self.private and self.clip_norm and self.clip_norm > (earlier or [self])[0].clip_norm:
            return (
                f"updates are clipped to an adaptive norm, now {self.clip_norm:.2g} and still "
                "growing; more rounds may help"
            )
        if self.private:
            return (
                "with this much noise, learning may take more rounds, or more --clients-per-round"
            )
        steps = self.round * self.train.get("steps", math.inf)
        if steps < FEW_STEPS:
            return f"few local steps so far, {steps:.0f} by each client: more rounds may help"
        more = "more rounds, " if is_last else ""
        return f"try {more}a smaller --client-lr"

    def line(self, rounds: int) -> str:
        """Return the round as one aligned line of the terminal."""
        parts = [f"round {self.round:{len(str(rounds))}}/{rounds}"]
        if "loss" in self.train:
            parts.append(f"train loss {self.train['loss']:7.4f}")
        parts.append(f"test loss {self.test_loss:7.4f}")
        parts.append(f"test accuracy {self.test_accuracy:7.2%}")
        for name, accuracy in self.extra_accuracies.items():
            if name.endswith("worst10"):  # of the column before it
                parts[-1] += f" (worst 10 % {accuracy:.2%})"
            else:
                parts.append(f"{EXTRA[name]} {accuracy:7.2%}")
        parts += [f"{name.replace('_', ' ')} {value:.4g}" for name, value in self.metrics.items()]
        if self.simulated_seconds is not None:
            parts.append(f"simulated {self.simulated_seconds:,.2f} s")
        if not math.isnan(self.seconds):
            parts.append(f"{self.seconds:6.2f} s")
        if self.private:
            parts.append(format_epsilon(self))
        if self.dropped:
            parts.append(f"{self.dropped} did not report")
        if self.num_nonfinite:
            parts.append(f"{self.num_nonfinite} not finite, left out")
        return "   ".join(parts)


def format_epsilon(record: RoundRecord) -> str:
    """Return the epsilon spent, or nothing of a run that is not private."""
    return f"ε {record.epsilon:.2f}" if record.private else ""


def blank(kind: Any) -> Any:
    """Return the stand-in for a withheld value of a type: NaN, an empty list or dict, or None."""
    if kind is float:
        return math.nan
    return get_origin(kind)() if get_origin(kind) in (list, dict) else None


def read_record(row: dict[str, Any]) -> RoundRecord:
    """Return the record in a JSON object of `RoundRecord.to_json`; null stands for NaN.

    Raises ValueError if it holds something else.
    """
    fields: dict[str, Any] = {}
    for name, kind in get_type_hints(RoundRecord).items():
        if name == "train":
            metrics = [column for column in row if column.startswith("train_")]
            fields[name] = {
                column.removeprefix("train_"): read_value(column, row[column], float)
                for column in metrics
            }
        elif name == "extra_accuracies":
            columns = [column for column in EXTRA if column in row]
            fields[name] = {column: read_value(column, row[column], float) for column in columns}
        elif name == "metrics":
            known = {*get_type_hints(RoundRecord), *EXTRA}
            own = [column for column in row if column not in known]
            others = [column for column in own if not column.startswith("train_")]
            fields[name] = {column: read_value(column, row[column], float) for column in others}
        elif name == "clients":
            fields[name] = [read_client(client) for client in row["clients"]]
        else:
            fields[name] = read_value(name, row.get(name), kind)
    return check_ranges(RoundRecord(**fields))


def check_ranges(record: RoundRecord) -> RoundRecord:
    """Return the record. Raises ValueError for an accuracy outside 0..1, or a count below 0."""
    shares = {"test_accuracy": record.test_accuracy, **record.extra_accuracies}
    if "accuracy" in record.train:
        shares["train_accuracy"] = record.train["accuracy"]
    for name, value in shares.items():
        if value < 0 or value > 1:
            raise ValueError(f"{name}={value!r:.20} is outside 0..1")
    for name in ("bytes_down", "bytes_up", "seconds", "num_nonfinite", "dropped", "epsilon"):
        if (getattr(record, name) or 0) < 0:
            raise ValueError(f"{name}={getattr(record, name)!r:.20} is below 0")
    return record


def read_client(report: dict[str, Any]) -> dict[str, Any]:
    """Return a client's report in a JSON object. Raises ValueError if it holds something else."""
    types = {"client": int, "finite": bool}
    return {
        name.removeprefix("train_"): read_value(name, value, types.get(name, float))
        for name, value in dict(report).items()
    }


def read_value(name: str, value: Any, kind: Any) -> Any:
    """Return a field's value as the type `kind`. Raises ValueError if it is of another."""
    if kind is float and value is None:
        return math.nan
    if kind is float and type(value) is int:
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{name}={value!r:.20}")
    return value


def read_records(lines: Sequence[str], rounds: int) -> list[RoundRecord]:
    """Return the records of rounds 1..`rounds`. Raises an error if the lines do not hold them."""
    records = [read_record(json.loads(line)) for line in lines[:rounds]]
    if [record.round for record in records] != list(range(1, rounds + 1)):
        raise ValueError("a round is missing")
    return records


def examples_trained_on(report: dict[str, Any], batch_size: int) -> float:
    """Return on how many examples a client trained in a round, by its report.

    A straggler's last batch counts as a whole one.
    """
    size = report["examples"]
    batch = batch_size or size
    epochs, steps = divmod(report["steps"], math.ceil(size / batch))
    return epochs * size + min(steps * batch, size)


def name_reports(
    chunks: Sequence[np.ndarray], metrics: Any, names: Sequence[str]
) -> list[dict[str, Any]]:
    """Return a dict for each client of the round, with what it reported by name.

    `chunks` are int64[g] ids, `metrics` their rows, float32[g,r] of each chunk or float32[m,r] of
    all. `finite` becomes a bool.
    """
    clients = np.concatenate(chunks).tolist()
    rows = metrics if isinstance(metrics, np.ndarray) else np.concatenate(metrics)
    reports = []
    for client, row in zip(clients, np.asarray(rows).tolist(), strict=True):
        report = dict(zip(names, row, strict=True))
        reports.append({"client": client, **report, "finite": report["finite"] > 0})
    return sorted(reports, key=lambda report: report["client"])


NORMS = ("clip", "clipping_norm", "zeroing_norm")  # what TFF calls them


def find_norm(measurements: Any) -> float | None:
    """Return the adaptive norm in an aggregator's measurements; None if it has none."""
    if not isinstance(measurements, dict):
        return None
    for name, value in measurements.items():
        found = float(value) if name in NORMS else find_norm(value)
        if found is not None:
            return found
    return None


def make_record(
    round_num: int,
    reports: list[dict[str, Any]],
    evaluation: Evaluation,
    metrics: Sequence[str],
    measured: Any = None,
    **figures: Any,
) -> RoundRecord:
    """Return the round's record.

    `metrics` names what clients report. Each but `examples` and `finite` becomes a mean over the
    examples of the clients whose update was finite.
    """
    counted = [report for report in reports if report["finite"]]
    examples = [report["examples"] for report in counted]
    train = {}
    for metric in metrics:
        if metric not in ("examples", "finite"):
            values = [report[metric] for report in counted]
            train[metric] = float(np.average(values, weights=examples)) if values else math.nan
    return RoundRecord(
        round=round_num,
        train=train,
        test_loss=evaluation.loss,
        test_accuracy=evaluation.accuracy,
        extra_accuracies=evaluation.extra_accuracies,
        metrics=evaluation.metrics,
        num_nonfinite=len(reports) - len(counted),
        epsilon=None,
        clip_norm=find_norm(measured),
        clients=reports,
        **figures,
    )


def client_traffic(parts: Any, num_parameters: int) -> tuple[int, int]:
    """Return the bytes that a client receives in a round, and those that it sends."""
    travels = num_parameters - parts.kept_parameters
    down = 4 * travels + parts.message_bytes + 8
    up = parts.update_bytes + parts.message_bytes + 4 * len(parts.metrics_type._fields)
    return down, up


def communication_cost(experiment: Any, num_sent: int, num_reported: int) -> dict[str, int]:
    """Return the bytes of a round, as a network would carry them.

    `num_sent` clients receive the weights and the round's number; `num_reported` send an update, as
    the aggregator encodes it, and their metrics. An algorithm may send as much as the weights in
    addition, and an adaptive norm goes both ways; what clients keep does not travel. A private run
    counts its expected cohort.
    """
    if experiment.config.is_private:
        num_sent = experiment.config.cohort_size
        num_reported = experiment.config.cohort_size
    down, up = client_traffic(experiment.parts, experiment.num_parameters)
    return {"bytes_down": num_sent * down, "bytes_up": num_reported * up}
