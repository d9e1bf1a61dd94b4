"""What a round did: a record, its line on the terminal, and what was wrong with it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, get_origin, get_type_hints

import numpy as np

# What a differentially private run may tell of a round: the noisy result, and what follows from the
# flags alone.
PUBLIC = ("round", "test_loss", "test_accuracy", "bytes_down", "bytes_up", "epsilon")
STUCK_ROUNDS = 3  # at chance from the start, after which the user is told


@dataclass(frozen=True)
class Evaluation:
    """loss: mean cross-entropy in nats; accuracy in 0..1; predictions uint8[N]; confusion
    int64[C,C], rows true."""

    loss: float
    accuracy: float
    predictions: np.ndarray
    confusion: np.ndarray


@dataclass(frozen=True)
class RoundRecord:
    """What one round did. Losses are mean cross-entropies in nats; the training figures are the
    clients' own.

    `train_loss` is the mean over the clients' examples, as they were trained on. `clients` has a
    row a client of the round: client, and its report by name; finite is False where its update was
    left out. `dropped` counts those that got the weights and did not report. `bytes_down` and
    `bytes_up` are those of what the server sends and gets, `wire_down` and `wire_up` those that
    went to and came from several hosts, as measured, None with one worker here; `epsilon` what all
    rounds begun so far cost of privacy, None where the aggregator does not say. A round under
    differential privacy tells what stands in PUBLIC, and nothing else; its bytes are those of the
    expected cohort.
    """

    round: int
    train_loss: float
    train_accuracy: float
    test_loss: float
    test_accuracy: float
    left_out: int | None
    dropped: int | None
    bytes_down: int
    bytes_up: int
    epsilon: float | None
    seconds: float
    clients: list[dict[str, Any]]
    wire_down: int | None = None
    wire_up: int | None = None

    @property
    def private(self) -> bool:
        """Whether the round was differentially private."""
        return self.epsilon is not None

    def published(self) -> RoundRecord:
        """Return the record with the fields in PUBLIC, and every other one blank.

        All else could tell of single clients or of who was drawn, be it by a figure without noise,
        by the bytes measured, or by the seconds, which grow with the images of those who train.
        """
        kinds = get_type_hints(type(self))
        hidden = {name: blank(kinds[name]) for name in vars(self) if name not in PUBLIC}
        return replace(self, **hidden)

    def figures(self) -> dict[str, Any]:
        """Return the figures of the round as a whole, by name: all but the clients' own."""
        return {name: value for name, value in vars(self).items() if name != "clients"}

    def trouble(self, earlier: Sequence[RoundRecord], chance: float, last: bool) -> str:
        """Return what has gone wrong with the global model: as a rule nothing, and what lasts only
        once and at the end.

        `chance` is the accuracy of always naming the most frequent test label, `last` whether no
        round follows.
        """
        text = self.diagnosis(earlier, chance, last)
        told = earlier[-1].diagnosis(earlier[:-1], chance, last=False) if earlier else ""
        return text if text != told or last else ""

    def diagnosis(self, earlier: Sequence[RoundRecord], chance: float, last: bool) -> str:
        """Return what is wrong with the global model after this round, whether it was told before
        or not."""
        lost = chance + 0.05 * (1 - chance)  # at chance, and a little
        before = [record.test_accuracy for record in earlier]
        if not math.isfinite(self.test_loss):
            return "the test loss is not finite; a smaller --client-lr may help"
        if self.test_accuracy < lost and max(before, default=0) > 2 * lost:
            return "the test accuracy fell back to chance; a smaller --client-lr may help"
        if self.left_out is not None and not self.clients:
            return "no client reported; the weights stay as they were"
        if self.left_out is not None and self.left_out == len(self.clients):
            return "no client's update was finite; a smaller --client-lr may help"
        stuck = all(accuracy < lost for accuracy in [*before, self.test_accuracy])
        if stuck and (last or self.round == STUCK_ROUNDS):
            more = "more rounds, " if last else ""
            return f"the test accuracy is still at chance; {more}a smaller --client-lr may help"
        return ""

    def line(self, rounds: int) -> str:
        """Return the round in one aligned line of the terminal."""
        return (
            f"round {self.round:{len(str(rounds))}}/{rounds}   "
            + ("" if self.left_out is None else f"train loss {self.train_loss:7.4f}   ")
            + f"test loss {self.test_loss:7.4f}   test accuracy {self.test_accuracy:7.2%}"
            + ("" if math.isnan(self.seconds) else f"   {self.seconds:6.2f} s")
            + tell_epsilon(self, separator="   ")
            + (f"   {self.dropped} dropped out" if self.dropped else "")
            + (f"   {self.left_out} not finite, left out" if self.left_out else "")
        )


def tell_epsilon(record: RoundRecord, separator: str = ", ") -> str:
    """Return the epsilon spent, behind `separator`; nothing of a run that is not private."""
    return f"{separator}ε {record.epsilon:.2f}" if record.private else ""


def blank(kind: Any) -> Any:
    """Return what stands for a hidden value of this type: NaN, an empty list, or None."""
    if kind is float:
        return math.nan
    return [] if get_origin(kind) is list else None


def read_record(row: dict[str, Any]) -> RoundRecord:
    """Return the record in a JSON object, where null stands for NaN.

    Raise ValueError where it holds something else.
    """
    record = {
        name: read_figure(name, row.get(name), kind)
        for name, kind in get_type_hints(RoundRecord).items()
    }
    return RoundRecord(**record)


def read_figure(name: str, value: Any, kind: Any) -> Any:
    """Return a record's field as the type `kind`. Raise ValueError where it is of another."""
    if name == "clients":
        kinds = {"client": int, "finite": bool}
        return [
            {key: read_figure(key, told, kinds.get(key, float)) for key, told in dict(row).items()}
            for row in value
        ]
    if kind is float and value is None:
        return math.nan
    if kind is float and type(value) is int:
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{name}={value!r:.20}")
    return value


def read_records(lines: Sequence[str], rounds: int) -> list[RoundRecord]:
    """Return the records of rounds 1..`rounds`.

    Raise an error of files.DAMAGE where the lines do not hold them.
    """
    records = [read_record(json.loads(line)) for line in lines[:rounds]]
    if [record.round for record in records] != list(range(1, rounds + 1)):
        raise ValueError("a round is missing")
    return records


def reached(records: Sequence[RoundRecord], target: float) -> bool:
    """Return whether a test accuracy of `target` was reached; 0 stands for none that could be."""
    return 0 < target <= max((record.test_accuracy for record in records), default=0)


def rounds_to_target(accuracies: Sequence[float], target: float) -> float | None:
    """Return after how many rounds the best test accuracy so far crossed `target`, None where it
    did not.

    As in McMahan et al. 2017, section 3: the curve is made monotone, and is a straight line between
    two rounds. What is reached by the first round counts as 1.
    """
    best = np.maximum.accumulate(accuracies)
    if not target or best[-1] < target:
        return None
    after = int(np.argmax(best >= target))  # from 0; all before are lower
    if after == 0:
        return 1.0
    return float(after + (target - best[after - 1]) / (best[after] - best[after - 1]))


def client_rows(
    groups: Sequence[np.ndarray], reports: Sequence[Any], names: Sequence[str]
) -> list[dict[str, Any]]:
    """Return what each client of the round reported, in the order of the ids.

    `groups` are int64[g] ids, `reports` float32[g,r] of each or float32[m,r] of all, with the
    columns `names`, of which `finite` becomes a bool.
    """
    rows = []
    every = reports if isinstance(reports, np.ndarray) else np.concatenate(reports)
    for client, row in zip(
        np.concatenate(groups).tolist(), np.asarray(every).tolist(), strict=True
    ):
        told = dict(zip(names, row, strict=True))
        rows.append({"client": client, **told, "finite": told["finite"] > 0})
    return sorted(rows, key=lambda row: row["client"])


def make_record(
    round_num: int, clients: list[dict[str, Any]], evaluation: Evaluation, **figures: Any
) -> RoundRecord:
    """Return the round's record, from the clients' own reports, the evaluation of the new model,
    and its figures."""
    kept = [row for row in clients if row["finite"]]

    def mean(figure: str) -> float:
        """Over the clients kept, weighted by n_k."""
        return (
            float(np.average([r[figure] for r in kept], weights=[r["examples"] for r in kept]))
            if kept
            else math.nan
        )

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
