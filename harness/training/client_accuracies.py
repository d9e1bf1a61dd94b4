"""How the global model, and its own, serve each client: its accuracies, and figures of all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from harness.training.records import Evaluation

import numpy as np

# Names in Evaluation.correct: of the images that clients hold out, by the global model and by each
# client's own.
OWN_TESTS = "client_test"
PERSONAL = "personal_test"
COLUMNS = {OWN_TESTS: "own_test_accuracy", PERSONAL: "personal_accuracy"}


def accuracies_of_parts(correct: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """Return each client's accuracy float64[K], of bool[N] in the clients' order.

    NaN for a client without images.
    """
    parts = np.split(correct, np.cumsum(sizes)[:-1])
    return np.array([part.mean() if len(part) else math.nan for part in parts])


def summarize_accuracies(of_whom: str, accuracies: np.ndarray) -> dict[str, float]:
    """Return a round's columns on accuracies float64[K]: their mean, and that of the worst tenth.

    `of_whom` is "client" for client_accuracy and client_worst10. NaN are left out.
    """
    return {
        f"{of_whom}_accuracy": float(np.nanmean(accuracies)),
        f"{of_whom}_worst10": worst_tenth(accuracies),
    }


def worst_tenth(accuracies: np.ndarray) -> float:
    """Return the mean of the lowest 10 % of accuracies float64[K], at least of one; NaN left out.

    NaN if there is none.
    """
    measured = np.sort(accuracies[~np.isnan(accuracies)])
    return (
        float(measured[: max(1, round(0.1 * len(measured)))].mean()) if len(measured) else math.nan
    )


def gini(values: np.ndarray) -> float:
    """Return the Gini coefficient of values >= 0: 0 if all are equal, towards 1 if one has all."""
    if not values.sum():
        return 0.0
    ranks = 2 * np.arange(1, len(values) + 1) - len(values) - 1
    return float((ranks * np.sort(values)).sum() / (len(values) * values.sum()))


def label_skews(counts: np.ndarray) -> np.ndarray:
    """Return float64[K]: the total-variation distance of each client's labels to those of all.

    `counts` int64[K,C] are the clients' labels.
    """
    shares = counts / counts.sum(axis=1, keepdims=True)
    return np.abs(shares - counts.sum(axis=0) / counts.sum()).sum(axis=1) / 2


def accuracies_on_label_mix(
    num_right: np.ndarray, num_tested: np.ndarray, counts: np.ndarray
) -> np.ndarray:
    """Return float64[K]: each client's accuracy on test images in the proportions of its labels.

    It is sum_c p_k(c) * recall(c), exact. `num_tested` int64[C] are the test images of each label,
    `num_right` those classified correctly, `counts` int64[K,C] the clients' labels. Labels without
    test images are left out; NaN for a client that has no others.
    """
    recalls = num_right / np.maximum(num_tested, 1)
    held = counts * (num_tested > 0)
    with np.errstate(invalid="ignore"):
        return held @ recalls / held.sum(axis=1)


def describe_clients(evaluation: Evaluation, partition: Any) -> list[dict[str, Any]]:
    """Return the rows of clients.csv, one a client.

    Its number of training images and labels, the total-variation distance of its labels to those of
    all clients, and its accuracies by the global model and by its own.
    """
    counts = partition.counts
    right = evaluation.labels[evaluation.predictions == evaluation.labels]
    num_right = np.bincount(right, minlength=counts.shape[1])
    num_tested = np.bincount(evaluation.labels, minlength=counts.shape[1])
    on_label_mix = accuracies_on_label_mix(num_right, num_tested, counts)
    rows = [
        {
            "client": client,
            "images": int(of_labels.sum()),
            "labels": int((of_labels > 0).sum()),
            "skew": float(skew),
            "label_mix_accuracy": float(accuracy),
        }
        for client, (of_labels, skew, accuracy) in enumerate(
            zip(counts, label_skews(counts), on_label_mix, strict=True)
        )
    ]
    sizes = [len(part) for part in partition.test_indices]
    for name, column in COLUMNS.items():
        if name not in evaluation.correct:
            continue
        accuracies = accuracies_of_parts(evaluation.correct[name], sizes)
        for row, size, accuracy in zip(rows, sizes, accuracies, strict=True):
            row["test_images"] = size
            row[column] = float(accuracy)
    return rows
