"""A finished run, read from its folder for use in Python."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from harness.cli import trust
from harness.cli.command_line import one_at_a_time
from harness.cli.fields import UserError
from harness.cli.saved_config import read_saved
from harness.storage.files import expand_path, read_json
from harness.storage.provenance import hash_rows, read_programs
from harness.training.dataset import check_dataset
from harness.training.records import Evaluation, RoundRecord, read_records

import numpy as np

try:
    import pandas
except ImportError:
    pandas = None


def to_table(rows: list[dict[str, Any]]) -> Any:
    """Return rows as a pandas.DataFrame, or as {column: array} where pandas is not installed.

    A value that a row lacks is NaN.
    """
    if pandas:
        return pandas.DataFrame(rows)
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: [row.get(name) for row in rows] for name in names}
    return {
        name: np.array([np.nan if value is None else value for value in values])
        for name, values in columns.items()
    }


def read_metrics(folder: Path) -> list[RoundRecord]:
    """Return the records in a run's metrics.json, or [] without such a file."""
    path = folder / "metrics.json"
    if not path.exists():
        return []
    try:
        lines = [json.dumps(row) for row in read_json(path)["rounds"]]
        return read_records(lines, len(lines))
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{path} does not contain the rounds; write it again with --resume, or restore it"
        ) from error


def read_finished(folder: Path) -> list[RoundRecord]:
    """Return the records of a run. Raises UserError if it was stopped before it wrote them."""
    records = read_metrics(folder)
    if not records:
        raise UserError(
            f"{str(folder)!r:.200} is not finished; continue it with --resume, or in Python with "
            "fl.run(run.config.replace(resume=str(run.folder)))"
        )
    return records


def check_classes(folder: Path, dataset: Any) -> None:
    """Raise UserError if a run's model names other labels than those of the data."""
    classes = read_json(folder / "metrics.json").get("classes")
    if classes != list(dataset.classes):
        raise UserError(
            f"evaluate={str(folder)!r:.200} was trained on the labels {classes!s:.60}, but "
            f"{dataset.name} has {list(dataset.classes)!s:.60}; give data with the same labels"
        )


def check_model(folder: Path, name: str, trained: Any, cure: str) -> None:
    """Raise UserError if a run's own model, read as `trained`, is another function by now."""
    made = read_programs(folder)[-1]["rows"].get("model")
    if made != hash_rows({"model": trained.network.build_hidden_layers})["model"]:
        raise UserError(f"model={name!r:.200} has changed since the run {str(folder)!r}; {cure}")


def in_places(indices: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Return where each of the indices int64[n] stands among the places int64[N], sorted."""
    order = np.argsort(places)
    return np.sort(order[np.searchsorted(places, indices, sorter=order)])


class SavedRun:
    """A run's results: `folder`, `config`, and what is read from its files when it is used."""

    def __init__(
        self,
        folder: str | Path,
        default: Any,
        load_dataset: Callable[[Any], Any],
        read_trained: Callable[[Path, Any, Any], Any],
        dataset: Any = None,
    ):
        """Read the configuration. Raises UserError for a folder without a run.

        `default` is the default configuration, and the functions are the script's; `dataset` is
        that of a run whose data came from Python.
        """
        self.load_dataset = load_dataset
        self.read_trained = read_trained
        self.given_dataset = dataset
        self.config = read_saved(str(folder or ""), default).replace(resume="")
        self.folder = expand_path(str(folder))

    def __repr__(self) -> str:
        return f"SavedRun({str(self.folder)!r})"

    @cached_property
    def records(self) -> list[RoundRecord]:
        """The records of all rounds."""
        return read_finished(self.folder)

    @property
    def history(self) -> Any:
        """A row for each round: the columns of metrics.csv, as a DataFrame or {column: array}."""
        return to_table([record.figures() for record in self.records])

    @cached_property
    def weights(self) -> list[np.ndarray]:
        """The final global weights, a float32 array for each tensor."""
        return list(self.trained.weights.trainable)

    @cached_property
    def trained(self) -> Any:
        """The network with its weights, the script's TrainedModel.

        A custom model's file is only executed if this user ran it before.
        """
        training = self.config.training
        if self.config.has_own_model:
            trust.check_file("model", training.model, str(self.folder))
        read_finished(self.folder)  # raises for a run that was stopped
        trained = self.read_trained(self.folder / "global_model.keras", training, self.dataset)
        if self.config.has_own_model:
            check_model(self.folder, training.model, trained, "restore it")
        return trained

    @property
    def network(self) -> Any:
        """The architecture."""
        return self.trained.network

    @cached_property
    def dataset(self) -> Any:
        """The run's own data. Raises UserError if the configured data are now others."""
        if self.given_dataset is not None:
            return self.given_dataset
        dataset = self.load_dataset(self.config.data)
        own = read_json(self.folder / "partition.json").get("dataset_sha256", dataset.digest)
        if own != dataset.digest:
            raise UserError(
                f"{str(self.folder)!r:.200} was trained on other data than {dataset.name}; give "
                "them with fl.load(folder, dataset=...)"
            )
        return dataset

    @cached_property
    def partition(self) -> list[np.ndarray]:
        """The images of `dataset.train` that each client trained on, int64[n_k].

        Raises UserError for a private run.
        """
        saved = read_json(self.folder / "partition.json")
        if "indices" not in saved:
            raise UserError(f"{str(self.folder)!r:.200} is private, and keeps no partition")
        try:
            held_out = saved.get("test_indices", [[]] * len(saved["indices"]))
            both = zip(saved["indices"], held_out, strict=True)
            parts = [np.setdiff1d(np.array(own, np.int64), tests) for own, tests in both]
        except (TypeError, ValueError) as error:
            raise UserError(
                f"{self.folder / 'partition.json'} has no lists of indices; restore the file"
            ) from error
        # The file counts all training images, the data set those that --holdout left.
        is_whole = self.config.data.holdout and "indices_of" in saved
        places = self.dataset.places if is_whole else None
        return parts if places is None else [in_places(part, places) for part in parts]

    def clients(self) -> Any:
        """Return a row for each client and round in which it reported.

        As a DataFrame or {column: array}, with the columns round, client, examples, train_loss,
        train_accuracy, steps, ...
        """
        return to_table(
            [
                {"round": record.round, **report}
                for record in self.records
                for report in record.reports()
            ]
        )

    def model(self) -> Any:
        """Return the Keras model: raw pixels [n,H,W,channels] in 0..255 to logits."""
        return self.trained.build_keras_model()

    @one_at_a_time()
    def evaluate(self, dataset: Any = None) -> Evaluation:
        """Evaluate the final model on a data set from build_dataset, by default on its own.

        Raises UserError for other labels than those it was trained on.
        """
        if dataset is not None:
            check_dataset(dataset)
            check_classes(self.folder, dataset)
        return self.trained.evaluate(dataset or self.dataset)
