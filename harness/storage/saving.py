"""Saving: each round as it is completed, and the result at the end."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from harness.cli.command_line import Stopped
from harness.cli.output import print_line, warn
from harness.reporting import captions, clients, plots, results
from harness.reporting.client_plots import plot_client_accuracy
from harness.storage.callbacks import (
    Callback,
    EarlyStopping,
    OnRound,
    PrintRounds,
    TensorBoard,
    TimeLimit,
)
from harness.storage.files import csv_table, read_json
from harness.storage.run_folder import RunFolder
from harness.training import records
from harness.training.client_accuracies import describe_clients
from harness.training.records import Evaluation, RoundRecord
from harness.training.settings import pinned_keras_settings

import tensorflow as tf
import tensorflow_federated as tff


@dataclass(frozen=True)
class Result:
    """A run's outcome after its last round: the folder with its files, the records of all rounds,
    the evaluation and the state of TFF's process."""

    folder: Path
    records: list[RoundRecord]
    evaluation: Evaluation
    state: Any
    is_cut: bool = False  # whether --time-limit ended it, or its baselines

    def __repr__(self) -> str:
        """Return a line for a notebook, without the arrays."""
        rounds = results.pluralize(len(self.records), "round")
        accuracy = f"{self.evaluation.accuracy:.2%}"
        return f"<Result of {rounds}: test accuracy {accuracy}, in {str(self.folder)!r}>"


class SaveRounds(Callback):
    """Saves each round, and the result after the last one, in a run's folder."""

    def __init__(self, folder: RunFolder, experiment: Any):
        """Go on with the rounds that the folder has."""
        self.folder = folder
        self.experiment = experiment
        self.state, self.records = folder.load(experiment)
        self.evaluation: Evaluation | None = None
        self.state_before: Any = None  # the last round that was done here
        self.has_new_round = False
        self.time_limit: TimeLimit | None = None
        if self.records:
            self.evaluation = experiment.evaluate_state(self.state)

    def after_round(self, outcome: Any) -> None:
        """Write the round's lines and its checkpoint."""
        build_model = self.experiment.build_saved_model
        self.folder.save_round(outcome.record, outcome.state, build_model)
        self.state_before = self.state
        self.state = outcome.state
        self.evaluation = outcome.evaluation
        self.records = [*self.records, outcome.record]
        self.has_new_round = True

    @property
    def result(self) -> Result:
        """The run's outcome so far, after at least one round."""
        is_cut = self.time_limit is not None and self.time_limit.has_passed
        return Result(self.folder.path, self.records, self.evaluation, self.state, is_cut)

    @contextlib.contextmanager
    def kept_if_stopped(self) -> Iterator[None]:
        """Save the result so far if Ctrl-C or an error ends the rounds inside, and say so."""
        try:
            yield
        except (KeyboardInterrupt, Exception) as error:
            num_done = len(self.records)
            with contextlib.suppress(Exception):  # what stopped the run is what the user must know
                if num_done:
                    save_result(self.folder, self.experiment, self.result)
            warn(f"stopped after round {num_done}; {self.folder.what_next()}")
            if isinstance(error, KeyboardInterrupt):
                raise Stopped(f"after round {num_done}") from None
            raise

    def finish(self, is_compared: bool) -> Result:
        """Write the result's files, print a summary, and return the result."""
        result = self.result
        if self.experiment.config.run.save_clients:
            if self.has_new_round:
                report = result.records[-1].clients
                save_clients(self.folder, self.experiment, self.state_before, report)
            else:
                warn("no new round was trained, so save_clients=True saved no client models")
        metrics, paths = save_result(self.folder, self.experiment, result)
        results.print_summary(metrics, paths, self.folder.seconds, is_one_of_many=is_compared)
        return result


def save_result(folder: RunFolder, experiment: Any, result: Result) -> tuple[dict, list[Path]]:
    """Write metrics.json, the global model after the last round and the best, and the plots.

    Returns (what metrics.json holds, the paths of all files written).
    """
    weights = result.state.global_model_weights
    caption = captions.join_parts(
        [
            captions.caption(experiment),
            records.format_epsilon(result.records[-1]),
            folder.program_note(),
        ]
    )
    metrics = results.describe_run(experiment, weights.trainable, result.evaluation, result.records)
    figures = plots.result_figures(experiment, result, caption)
    tables = {}
    if not folder.is_private:
        rows = describe_clients(result.evaluation, experiment.partition)
        tables["clients.csv"] = csv_table(rows)
        if distributions := clients.distributions(rows):
            figures["client_accuracy.png"] = partial(plot_client_accuracy, distributions, caption)
        metrics["client_accuracy"] = clients.summarize_clients(rows)
    paths = folder.finish(metrics, weights, experiment.build_saved_model, figures, caption, tables)
    return metrics, paths


@pinned_keras_settings()
def save_clients(
    folder: RunFolder, experiment: Any, state: Any, reports: Sequence[dict[str, Any]]
) -> None:
    """Save what each client sent in the round after `state`, None for the first, as models.

    The clients are trained once more, here, by the same function of (seed, round, client); the last
    bits may be others than the worker's. A client whose update was not finite sent nothing that
    counted, and has no model.
    """
    broadcast = experiment.broadcast(state)
    folder.remove_clients()
    for client in sorted({report["client"] for report in reports if report["finite"]}):
        output = experiment.train_client(broadcast, tf.constant(client, tf.int64))
        own = [w - u for w, u in zip(broadcast.weights, output.update, strict=True)]
        sent = tff.learning.models.ModelWeights([w.numpy() for w in own], [])
        folder.save_client(client, experiment.build_saved_model(sent))


def open_run(folder: RunFolder, experiment: Any) -> SaveRounds:
    """Print what the run is and what the user should know, and load the rounds that are done."""
    print_line(f"{captions.caption(experiment)}\n")
    for notice in experiment.notices:
        warn(notice)
    return SaveRounds(folder, experiment)


def make_callbacks(
    saver: SaveRounds, experiment: Any, on_round: Callable[[RoundRecord], Any] | None
) -> list[Callback]:
    """Return what a run does after each round: save it, print it, and what flags ask for."""
    run = experiment.config.run
    folder = saver.folder
    callbacks = [saver, PrintRounds(experiment, saver.records)]
    if run.tensorboard:
        callbacks.append(TensorBoard(folder.path, partial(draw_confusion, experiment)))
    if on_round:
        callbacks.append(OnRound(on_round))
    callbacks.append(EarlyStopping(run, saver.records))
    if run.time_limit:
        saver.time_limit = TimeLimit(run.seconds_allowed, folder.opened, folder.resume_hint)
        callbacks.append(saver.time_limit)
    return callbacks


def to_json_line(made: Result | Path | list[dict[str, Any]]) -> str:
    """Return what --json prints of a run's result, of the folder of a comparison or an evaluation,
    or of predictions."""
    if isinstance(made, list):
        return json.dumps(made)
    folder = made if isinstance(made, Path) else made.folder
    found = {}
    if (folder / "metrics.json").exists():
        metrics = read_json(folder / "metrics.json")
        found = {
            "test_accuracy": metrics["test_accuracy"],
            "weights_sha256": metrics["weights_sha256"],
        }
        if "rounds" in metrics:
            found |= {"rounds": len(metrics["rounds"]), "epsilon": metrics["epsilon"]}
    if isinstance(made, Result) and made.is_cut:
        found["finished"] = False
    if (folder / "comparison.json").exists():
        found = {"finished": read_json(folder / "comparison.json").get("finished", True)}
    return json.dumps({"folder": str(folder)} | found)


def draw_confusion(experiment: Any, evaluation: Evaluation) -> Any:
    """Return the Figure of an evaluation's confusion matrix."""
    caption = captions.caption(experiment)
    return plots.plot_confusion(evaluation, caption, experiment.dataset.classes)
