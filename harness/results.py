"""What came out in the end: figures by class, the weights' identity, metrics.json, the closing
lines."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.command_line import say
from harness.records import rounds_to_target

import numpy as np
import scipy.stats
import sklearn.metrics
import tensorflow as tf
import tensorflow_federated as tff

NOISE = 0.05  # with a p below it two rows are told apart


def weights_sha256(weights: Sequence[Any]) -> str:
    """Return SHA-256 of the model's weights: their float32 bytes in layer order."""
    return hashlib.sha256(b"".join(np.asarray(w).tobytes() for w in weights)).hexdigest()


def skew(counts: np.ndarray) -> dict[str, float]:
    """Return how far label counts int64[K,C] are from IID: 0, C and 0 for clients that are alike
    and balanced.

    The mean total-variation distance of a client's label distribution to the pooled one, the mean
    effective number of classes (the exponential of the entropy in nats), and the Gini coefficient
    of the clients' sizes.
    """
    shares = counts / counts.sum(axis=1, keepdims=True)
    pooled = counts.sum(axis=0) / counts.sum()
    logs = np.log(shares, where=shares > 0, out=np.zeros_like(shares))
    sizes = np.sort(counts.sum(axis=1))
    ranks = 2 * np.arange(1, len(sizes) + 1) - len(sizes) - 1
    return {
        "mean_total_variation": float(np.abs(shares - pooled).sum(axis=1).mean() / 2),
        "effective_classes": float(np.exp(-(shares * logs).sum(axis=1)).mean()),
        "size_gini": float((ranks * sizes).sum() / (len(sizes) * sizes.sum())),
    }


def manifest(dataset: Any, partition: Any, kind: str, seed: int, private: bool) -> dict[str, Any]:
    """Return what partition.json holds: what was split how and, but for differential privacy, what
    each client has.

    `dataset` has name, digest and classes, `partition` parts, counts, filled and digest; `kind` is
    the row's name.
    """
    indices = [part.tolist() for part in partition.parts]
    of_clients = {
        "filled_clients": partition.filled,
        "skew": skew(partition.counts),
        "label_counts": partition.counts.tolist(),
        "indices": indices,
    }
    return {
        "dataset": dataset.name,
        "dataset_sha256": dataset.digest,
        "classes": list(dataset.classes),  # the labels as they were given, whose places are ours
        "partition": kind,
        "seed": seed,
        "hash": partition.digest,
        **({} if private else of_clients),
    }


def class_report(confusion: np.ndarray, classes: Sequence[int]) -> dict[str, Any]:
    """Return scikit-learn's report on a confusion matrix int64[C,C], rows true: by class, and
    means.

    Classes without test images are left out, of the means too.
    """
    true, predicted = (
        np.repeat(places.ravel(), confusion.ravel()) for places in np.indices(confusion.shape)
    )
    tested = np.flatnonzero(confusion.sum(axis=1))
    names = [str(classes[place]) for place in tested]
    return sklearn.metrics.classification_report(
        true, predicted, labels=tested, target_names=names, output_dict=True, zero_division=0
    )


def describe(
    weights: Sequence[Any],
    evaluation: Any,
    records: Sequence[Any],
    classes: Sequence[int],
    target: float = 0,
) -> dict[str, Any]:
    """Return what metrics.json holds of the outcome; `evaluation` has accuracy, loss and
    confusion."""
    return {
        "versions": {
            "python": platform.python_version(),
            "tensorflow": tf.__version__,
            "tff": tff.__version__,
        },
        "weights_sha256": weights_sha256(weights),
        "test_accuracy": evaluation.accuracy,
        "test_loss": evaluation.loss,
        "epsilon": records[-1].epsilon,
        "confusion": evaluation.confusion.tolist(),
        "target_accuracy": target or None,
        "rounds_to_target": rounds_to_target([record.test_accuracy for record in records], target),
        "classes": list(classes),
        "report": class_report(evaluation.confusion, classes),
        "rounds": [vars(record) for record in records],
    }


def counted(number: int, noun: str) -> str:
    """Return "5 rounds", or of one "1 round"."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def with_fields(name: str, fields: dict[str, Any]) -> str:
    """Return a row's name with the fields that it uses, for captions: "krum, tolerated 3"."""
    return ", ".join(
        [name, *(f"{field.replace('_', ' ')} {value:g}" for field, value in fields.items())]
    )


def tell_privacy(epsilon: float | None, delta: float) -> str:
    """Return the closing line on differential privacy, if there is any."""
    if epsilon is None:
        return ""
    return f"\n(ε {epsilon:.2f}, δ {delta:g})-differential privacy of each client's data as a whole"


def tell_target(target: float | None, rounds: float | None) -> str:
    """Return the closing line on the target accuracy, if there is one."""
    if not target:
        return ""
    return f"\ntarget accuracy {target:.2%} " + (
        f"after {rounds:.1f} rounds" if rounds else "not reached"
    )


def tell_last(accuracies: np.ndarray) -> str:
    """Return the last of float[seeds,rounds], mean ± sd over the seeds."""
    spread = f" ± {accuracies[:, -1].std(ddof=1):.2%}" if len(accuracies) > 1 else ""
    return f"test accuracy {accuracies[:, -1].mean():.2%}{spread}"


def tell_rounds(needed: Sequence[float | None]) -> str:
    """Return how many rounds the seeds needed to the target, None without end: mean ± sd of those
    that got there."""
    there = [rounds for rounds in needed if rounds]
    if not there:
        return "not reached"
    spread = f" ± {np.std(there, ddof=1):.1f}" if len(there) > 1 else ""
    share = f", {len(there)} of {len(needed)} seeds" if len(there) < len(needed) else ""
    return f"{np.mean(there):.1f}{spread} rounds{share}"


def paired(own: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """Return (mean of other - own, p of the paired t-test) over float[seeds] each.

    Where all differ by the same, there is no spread to test with: p is 0, or 1 if the difference is
    0.
    """
    difference = np.subtract(other, own)
    if np.ptp(difference) < 1e-9:
        return float(difference.mean()), float(abs(difference[0]) < 1e-9)
    return float(difference.mean()), float(scipy.stats.ttest_rel(other, own).pvalue)


def holm(ps: Sequence[float]) -> list[float]:
    """Return the p of several tests made together, each adjusted by Holm (1979), in the order
    given."""
    order = np.argsort(ps, kind="stable")
    adjusted = np.empty(len(ps))
    steps = [(len(ps) - rank) * ps[test] for rank, test in enumerate(order)]
    adjusted[order] = np.minimum(1, np.maximum.accumulate(steps))
    return adjusted.tolist()


def tell_differences(ends: dict[str, Sequence[float]], first: str, unit: str) -> dict[str, str]:
    """Return row -> how far it is from the row `first`, seed by seed, and whether so many seeds
    tell the two apart.

    `ends` are figures float[seeds] by row. With three rows and more each p is adjusted for all of
    them; of one seed nothing can be said.
    """
    others = [name for name in ends if name != first]
    tests = [paired(ends[first], ends[name]) for name in others]
    adjusted = holm([p for _, p in tests])
    method = "paired t-test" + (f", Holm over {len(others)} rows" if len(others) > 1 else "")
    seeds = len(ends[first])
    told = {}
    for name, (mean, p), adjusted_p in zip(others, tests, adjusted, strict=True):
        start = f"; {mean:+.2f} {unit} vs {first}"
        if seeds < 2:
            told[name] = ""
        elif p in (0, 1):
            told[name] = f"{start} with every seed"
        else:
            verdict = "told apart" if adjusted_p < NOISE else "not told apart"
            told[name] = f"{start}, {verdict} by {seeds} seeds ({method}, p {adjusted_p:.2g})"
    return told


def summarize(metrics: dict[str, Any], written: Sequence[Path]) -> None:
    """Say what came out, on what, and where it lies: the closing lines."""
    report = metrics["report"]
    total = np.sum(metrics["confusion"])
    means = report["macro avg"]
    scores = {
        label: report[label]["f1-score"]
        for label in map(str, metrics["classes"])
        if label in report
    }
    hardest = sorted(scores, key=scores.get)[:3]
    say(
        f"\nfinal test accuracy {metrics['test_accuracy']:.2%} on {metrics['dataset']}, {total:,} "
        "test images, after "
        f"{counted(len(metrics['rounds']), 'round')}\nmean over classes: precision "
        f"{means['precision']:.2%}, recall {means['recall']:.2%}, F1 {means['f1-score']:.2%}; "
        "lowest F1: "
        + ", ".join(f"{label} ({scores[label]:.2%})" for label in hardest)
        + tell_privacy(metrics["epsilon"], metrics["config"]["delta"])
        + tell_target(metrics["target_accuracy"], metrics["rounds_to_target"])
        + f"\nweights sha256 {metrics['weights_sha256']}\n"
    )
    for path in written:
        say(f"wrote {path}")
