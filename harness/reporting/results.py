"""Results of a run: partition.json, metrics.json, the closing lines."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.cli.output import print_line
from harness.reporting.clients import format_clients
from harness.storage.files import one_line
from harness.training.client_accuracies import gini, label_skews
from harness.training.histories import best_record, rounds_to_target, seconds_to_target
from harness.training.records import MOST_IN_MATRIX, few_images_of_many_labels

import numpy as np
import sklearn.metrics
import tensorflow as tf
import tensorflow_federated as tff

INDICES_OF = "all training images"  # which the indices in partition.json count


def weights_sha256(weights: Sequence[Any]) -> str:
    """Return SHA-256 of the model's weights: their float32 bytes in layer order."""
    return hashlib.sha256(b"".join(np.asarray(w).tobytes() for w in weights)).hexdigest()


def skew(counts: np.ndarray) -> dict[str, float]:
    """Return how far label counts int64[K,C] are from IID; 0, C and 0 for clients that are alike.

    The mean total-variation distance of a client's label distribution to the pooled one, the mean
    effective number of classes (the exponential of the entropy in nats), and the Gini coefficient
    of the clients' sizes.
    """
    shares = counts / counts.sum(axis=1, keepdims=True)
    logs = np.log(shares, where=shares > 0, out=np.zeros_like(shares))
    return {
        "mean_total_variation": float(label_skews(counts).mean()),
        "effective_classes": float(np.exp(-(shares * logs).sum(axis=1)).mean()),
        "size_gini": gini(counts.sum(axis=1)),
    }


def describe_partition(experiment: Any) -> dict[str, Any]:
    """Return what partition.json holds: what was split and how.

    And what each client has, unless the run is private.
    """
    config = experiment.config
    dataset = experiment.dataset
    partition = experiment.partition
    content = {
        "dataset": dataset.name,
        "dataset_sha256": dataset.digest,
        "classes": list(dataset.classes),  # the labels as they were given; ours are their places
        "partition": config.partition_name,
        "seed": config.seed,
        "hash": partition.digest,
        "changes_images": bool(config.chosen("partition").change_images),
    }
    if not config.is_private:
        content["topped_up_clients"] = partition.num_filled_clients
        # A client's images, those that it holds out included; so it can be split again.
        whole = whole_parts(partition)
        counts = [
            np.bincount(dataset.train.labels[part], minlength=dataset.num_classes) for part in whole
        ]
        content["skew"] = skew(np.stack(counts))
        content["label_counts"] = [of_client.tolist() for of_client in counts]
        # of the training images as the data have them, whatever was held out of them
        content["indices_of"] = INDICES_OF
        content["indices"] = [to_places(dataset, part) for part in whole]
        if partition.test_indices:
            content["test_indices"] = [to_places(dataset, part) for part in partition.test_indices]
    return content


def whole_parts(partition: Any) -> list[np.ndarray]:
    """Return each client's images, int64[n]: those it trains on and those it holds out."""
    if not partition.test_indices:
        return partition.indices
    both = zip(partition.indices, partition.test_indices, strict=True)
    return [np.union1d(own, held_out) for own, held_out in both]


def to_places(dataset: Any, indices: np.ndarray) -> list[int]:
    """Return where these training images are in the data as they are, before --holdout."""
    return (indices if dataset.places is None else dataset.places[indices]).tolist()


def name_in_report(label: Any) -> str:
    """Return what a label is called in the report; "accuracy" and the like are lines of its own."""
    taken = ("accuracy", "micro avg", "macro avg", "weighted avg")
    return f"{label} (label)" if label in taken else str(label)


def class_report(evaluation: Any, classes: Sequence[int]) -> dict[str, Any]:
    """Return scikit-learn's report on an evaluation, by class and in the mean.

    Classes without test images are left out, of the means too.
    """
    tested = np.unique(evaluation.labels)
    with few_images_of_many_labels():
        return sklearn.metrics.classification_report(
            evaluation.labels,
            evaluation.predictions,
            labels=tested,
            target_names=[name_in_report(classes[place]) for place in tested],
            output_dict=True,
            zero_division=0,
        )


# Keys of metrics.json, of a run or of an evaluation, next to which are those of --metrics.
METRICS_KEYS = frozenset(
    {
        *("dataset", "original_mnist", "dataset_sha256", "classes", "config", "evaluated_run"),
        *("weights_sha256", "test_accuracy", "test_loss", "test_images", "confusion", "report"),
        *("epsilon", "best_round", "best_accuracy", "best_chosen_on", "target_accuracy"),
        *("rounds_to_target", "seconds_to_target", "rounds", "client_accuracy"),
        *("versions", "provenance", "program_note", "programs"),
    }
)


def describe_model(dataset: Any, weights: Sequence[Any], evaluation: Any) -> dict[str, Any]:
    """Return what metrics.json holds of a model with these weights, by its evaluation."""
    is_small = dataset.num_classes <= MOST_IN_MATRIX
    return {
        "dataset": dataset.name,
        "weights_sha256": weights_sha256(weights),
        "test_accuracy": evaluation.accuracy,
        "test_loss": evaluation.loss,
        "test_images": len(evaluation.labels),
        "confusion": evaluation.confusion.tolist() if is_small else None,
        "classes": list(dataset.classes),
        "report": class_report(evaluation, dataset.classes),
        **evaluation.metrics,
    }


def describe_run(
    experiment: Any, weights: Sequence[Any], evaluation: Any, records: Sequence[Any]
) -> dict[str, Any]:
    """Return what metrics.json holds of a run with these final weights and this evaluation."""
    dataset = experiment.dataset
    target = experiment.config.run.target_accuracy
    accuracies = [record.test_accuracy for record in records]
    versions = {"python": platform.python_version(), "tensorflow": tf.__version__}
    return {
        "original_mnist": dataset.is_mnist,
        "config": {**experiment.config.to_dict(), "resume": ""},
        "versions": {**versions, "tff": tff.__version__},
        **describe_model(dataset, weights, evaluation),
        "epsilon": records[-1].epsilon,
        "best_round": best_record(records).round,
        "best_accuracy": max(accuracies),
        "best_chosen_on": chosen_on(experiment.config.data),
        "target_accuracy": target or None,
        "rounds_to_target": rounds_to_target(accuracies, target),
        "seconds_to_target": seconds_to_target(records, target),
        "rounds": [record.to_json() for record in records],
    }


def describe_evaluation(
    dataset: Any, weights: Sequence[Any], evaluation: Any, source: Path
) -> dict[str, Any]:
    """Return what metrics.json holds of a model that was evaluated without training."""
    about = {"dataset_sha256": dataset.digest, "evaluated_run": str(source)}
    return about | describe_model(dataset, weights, evaluation)


def chosen_on(data: Any) -> str:
    """Return the images that tell which round is the best; `data` is the group of flags."""
    is_test_set = not data.holdout and not data.validation
    return "the test set" if is_test_set else "images other than the test set"


def pluralize(number: int, noun: str) -> str:
    """Return "5 rounds", or "1 round"."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def format_privacy(epsilon: float | None, delta: float) -> str:
    """Return the closing line on differential privacy, or nothing."""
    if epsilon is None:
        return ""
    return f"\n(ε {epsilon:.2f}, δ {delta:g})-differential privacy of each client's data as a whole"


def format_best(metrics: dict[str, Any]) -> str:
    """Return the closing line on the best round, nothing if it is the last one."""
    if metrics["best_accuracy"] == metrics["test_accuracy"]:
        return ""
    caution = ", so do not report it" if metrics["best_chosen_on"] == "the test set" else ""
    return (
        f"\nbest round: {metrics['best_round']} ({metrics['best_accuracy']:.2%}), chosen on "
        f"{metrics['best_chosen_on']}{caution} (best_model.keras)"
    )


def format_target(target: float | None, rounds: float | None, seconds: float | None) -> str:
    """Return the closing line on the target accuracy, or nothing."""
    if not target:
        return ""
    outcome = f"after {rounds:.1f} rounds" if rounds else "not reached"
    if seconds is not None:
        outcome += f" and {seconds:,.1f} simulated seconds"
    return f"\ntarget accuracy {target:.2%} {outcome}"


def format_accuracy(accuracies: Sequence[float] | np.ndarray) -> str:
    """Return the mean ± sd over the seeds of accuracies float[seeds]."""
    spread = f" ± {np.std(accuracies, ddof=1):.2%}" if len(accuracies) > 1 else ""
    return f"test accuracy {np.mean(accuracies):.2%}{spread}"


def format_rounds_to_target(rounds: Sequence[float | None], seeds: Sequence[int] = ()) -> str:
    """Return the rounds that the seeds needed, their mean ± sd if all of them reached the target.

    A seed that did not has None. Then a mean of the others would be one of the fast seeds alone,
    so each is shown, and those that did not are named by `seeds`, by default 0, 1, ...
    """
    reached = [needed for needed in rounds if needed is not None]
    if not reached:
        return "not reached"
    if len(reached) == len(rounds):
        spread = f" ± {np.std(reached, ddof=1):.1f}" if len(reached) > 1 else ""
        return f"{np.mean(reached):.1f}{spread} rounds"
    late = [
        str(seed)
        for seed, needed in zip(seeds or range(len(rounds)), rounds, strict=True)
        if needed is None
    ]
    shown = ", ".join(f"{needed:.1f}" for needed in reached)
    return f"{shown} rounds; not reached: seed {', '.join(late)}"


def describe_accuracy(metrics: dict[str, Any]) -> str:
    """Return the closing lines on a model: its accuracy, its means over classes, its weights."""
    report = metrics["report"]
    means = report["macro avg"]
    labels = [name for name in map(name_in_report, metrics["classes"]) if name in report]
    hardest = sorted(labels, key=lambda label: report[label]["f1-score"])[:3]
    # The name of data with images held out says what these are.
    kind = "images" if ", evaluated on " in metrics["dataset"] else "test images"
    f1_scores = [f"{label} ({report[label]['f1-score']:.2%})" for label in hardest]
    return (
        f"test accuracy {metrics['test_accuracy']:.2%} on {metrics['dataset']}, "
        f"{metrics['test_images']:,} {kind}{after(metrics)}\n"
        f"mean over classes: precision {means['precision']:.2%}, recall {means['recall']:.2%}, "
        f"F1 {means['f1-score']:.2%}; lowest F1: {', '.join(f1_scores)}"
    )


def after(metrics: dict[str, Any]) -> str:
    """Return after how many rounds a model is as it is, nothing where none were done."""
    return f", after {pluralize(len(metrics['rounds']), 'round')}" if "rounds" in metrics else ""


def print_summary(
    metrics: dict[str, Any],
    written: Sequence[Path],
    seconds: float | None,
    is_one_of_many: bool = False,
) -> None:
    """Print what came out, on what, and where it lies; of a comparison's run only the last.

    `seconds` is how long it took, None for a private run.
    """
    if is_one_of_many:
        print_line(f"wrote {one_line(str(written[0].parent))}/")
        return
    print_line(
        f"\nfinal {describe_accuracy(metrics)}"
        + format_privacy(metrics["epsilon"], metrics["config"]["delta"])
        + format_best(metrics)
        + format_target(
            metrics["target_accuracy"], metrics["rounds_to_target"], metrics["seconds_to_target"]
        )
        + format_clients(metrics.get("client_accuracy", {}))
        + f"\nweights sha256 {metrics['weights_sha256']}"
        + f"{format_seconds(metrics['rounds'], seconds)}\n"
    )
    print_written(written)


def format_seconds(rounds: Sequence[dict[str, Any]], seconds: float | None) -> str:
    """Return how long this command took, and all rounds; nothing of a private run."""
    if seconds is None:
        return ""
    in_rounds = sum(record["seconds"] for record in rounds)
    all_rounds = f"{pluralize(len(rounds), 'round')} {in_rounds:.1f} s"
    simulated = [record["simulated_seconds"] for record in rounds]
    clock = "" if None in simulated else f"; simulated {sum(simulated):,.1f} s"
    return f"\ntime: {seconds:.1f} s excluding imports; {all_rounds}{clock}"


def print_written(written: Sequence[Path]) -> None:
    """Print what lies in which folder."""
    in_folder: dict[Path, list[str]] = {}
    for path in written:
        in_folder.setdefault(path.parent, []).append(path.name)
    for folder, names in in_folder.items():
        print_line(f"wrote {one_line(str(folder))}/: {', '.join(names)}")
