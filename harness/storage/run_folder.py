"""A run's folder: opened once, written each round, closed once.

The run can be continued after a kill at any moment. A round's row is written first and its
checkpoint last; `load` goes back to the last checkpoint that the tables reach.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import shlex
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from harness.cli.fields import UserError
from harness.cli.flags import to_flag
from harness.cli.output import warn
from harness.cli.run_options import identity
from harness.cli.saved_config import check_resumed, read_saved
from harness.config.configuration import environment_data
from harness.engine import stopping
from harness.reporting import report
from harness.reporting.figure_files import draw_files, remove_outdated, to_bytes
from harness.reporting.figure_form import form_of
from harness.reporting.results import describe_partition, pluralize
from harness.storage.files import (
    append,
    briefly,
    csv_line,
    csv_table,
    expand_path,
    io_errors_as_user_errors,
    json_line,
    lock,
    make_folder,
    one_line,
    read_bytes,
    read_json,
    read_lines,
    to_json,
    write_file,
    write_files,
)
from harness.storage.provenance import (
    PROGRAMS,
    describe_program,
    describe_provenance,
    program_hash,
    read_programs,
    same_program,
)
from harness.storage.run_names import (
    default_name,
    make_resume_hint,
    make_run_folder,
    script_command,
)
from harness.training.histories import best_record
from harness.training.records import RoundRecord, read_records

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

CHECKPOINTS_KEPT = 3
# What is done to configured data when it is read, and not to a data set that is given in Python.
ON_READING = ("test_share", "image_size", "transpose", "validation")


def check_given_dataset(config: Any) -> None:
    """Raise UserError for fields that a data set given in Python would leave without effect."""
    fields = list(ON_READING)
    # FL_DATA, which every command has, may be the path; of a resumed run, that of another day.
    if config.data.data != environment_data() and not config.run.resume:
        fields.append("data")
    for field in fields:
        value = config.to_dict()[field]
        if value != config.defaults()[field]:
            raise UserError(
                f"{field}={value!r:.200} has no effect on dataset=, which is used as it is; give "
                "fl.build_dataset the images to train and to evaluate on, or drop it"
            )


def check_held_out(config: Any, dataset: Any) -> None:
    """Raise UserError for --holdout on a data set of which nothing was held out."""
    if config.data.holdout and dataset.places is None:
        raise UserError(
            f"holdout={config.data.holdout} has no effect on dataset=, which is used as it is; "
            "give fl.build_dataset the images to train and to evaluate on, or drop it"
        )


class RunFolder:
    """The files of one run."""

    def __init__(self, path: Path, experiment: Any, resume_hint: str = "", given: str = ""):
        """The folder itself says which programs made its rounds so far.

        `given` are arguments of fl.run that no command can repeat, such as ", dataset=dataset".
        """
        self.path = path
        self.resume_hint = resume_hint
        self.given = given
        self.is_private = experiment.config.is_private
        self.program = describe_program(experiment.choice_hashes)
        self.programs = read_programs(path)
        self.opened = time.perf_counter()
        self.form = form_of(experiment.config.run)
        self.config = experiment.config
        self.best_accuracy = -1.0
        # What a checkpoint belongs to, and the shapes of the state in it; `load` sets them.
        self.key = ""
        self.specs: Any = ()

    def what_next(self) -> str:
        """Return how to continue the run, if its folder still exists."""
        if (self.path / "config.json").exists():
            return self.resume_hint
        return f"its folder {one_line(str(self.path))} was removed, so nothing is left of it"

    @property
    def seconds(self) -> float | None:
        """How long the folder has been open; None of a private run, whose times are not told."""
        return None if self.is_private else time.perf_counter() - self.opened

    @property
    def log(self) -> Path:
        """Where TFF's worker prints to; of a private run nowhere: it may name a client's file."""
        return Path(os.devnull) if self.is_private else self.path / "worker.log"

    @property
    def journal(self) -> Path:
        """The file in which a private run notes each round that it begins."""
        return self.path / "rounds_begun.txt"

    @classmethod
    @contextlib.contextmanager
    def open(cls, experiment: Any, resume_hint: str = "", given: str = "") -> Iterator[RunFolder]:
        """Hold the run's folder: a new one, or that of the run to resume.

        `resume_hint` says how to continue the run if it is stopped; default: --resume. Raises
        UserError if the folder belongs to another configuration, program or split, or is in use.
        """
        config = experiment.config
        if "dataset=" in given:
            check_given_dataset(config)
        partition = describe_partition(experiment)
        if config.run.resume:
            path = expand_path(config.run.resume)
            saved = read_saved(config.run.resume, type(config)())
            check_resumed(config, saved, experiment.choice_hashes)
            check_partition(config.run.resume, read_json(path / "partition.json"), partition)
        else:
            program = describe_program(experiment.choice_hashes) | {"from_round": 1}
            files = {
                "config.json": to_json(config.to_dict()),
                "partition.json": to_json(partition),
                PROGRAMS: to_json({"programs": [program]}),
            }
            name = config.run.name or default_name(config, experiment.dataset)
            # A comparison's run has a name of its own: another process may be making it.
            path = make_run_folder(expand_path(config.run.runs), name, files, bool(resume_hint))
        resume_hint = resume_hint or make_resume_hint(path, given)
        text = f"notice: stopped before any new round finished; {resume_hint}"
        with stopping.last_words(text), lock(path, warn):
            yield cls(path, experiment, resume_hint, given)

    def load(self, experiment: Any) -> tuple[Any, list[RoundRecord]]:
        """Return (state, records) of the newest checkpoint that the tables reach.

        They are (None, []) if no round was done.
        """
        state_type = experiment.process.state_type
        self.specs = tff.types.type_to_tf_tensor_specs(state_type.member)
        belongs_to = [identity(experiment.config), experiment.partition.digest, str(state_type)]
        self.key = json.dumps(belongs_to, sort_keys=True)
        lines = read_lines(self.path / "rounds.jsonl")
        problem = ""
        for checkpoint in self.checkpoints():
            try:
                state = self.read_checkpoint(checkpoint)
                done = int(checkpoint.stem.removeprefix("round-"))
                if int(state.client_work.round) != done:
                    problem = (
                        f"{checkpoint} contains the state after round {state.client_work.round}, "
                        "which contradicts its name; remove or rename it"
                    )
                    warn(f"{problem}; using the previous checkpoint")
                    continue
            except UserError:
                raise
            except Exception as error:  # a damaged file raises a dozen kinds
                warn(f"{checkpoint} is damaged ({briefly(error)}); using the previous checkpoint")
                continue
            try:
                records = read_records(lines, done)
            except Exception as error:
                problem = (
                    f"{self.path / 'rounds.jsonl'} does not contain rounds 1..{done} "
                    f"({briefly(error)}); restore it"
                )
                continue
            self.write_tables(records)
            self.write_config()
            self.note_program(done)
            self.find_best(records, state)
            return state, records
        if problem:
            raise UserError(problem)
        if lines:
            warn(
                f"{self.path / 'checkpoints'} has no checkpoint of the "
                f"{pluralize(len(lines), 'round')} done; starting again with round 1"
            )
        self.write_tables([])
        self.write_config()
        self.note_program(0)
        return None, []

    def write_config(self) -> None:
        """Write the configuration; a resumed run may have more rounds now."""
        updated = self.config.replace(resume="", accept_changes=False)
        write_file(self.path / "config.json", to_json(updated.to_dict()))

    def note_program(self, done: int) -> None:
        """Add this program to the run's list if it makes the rounds after the first `done`."""
        programs = [program for program in self.programs if program["from_round"] <= max(done, 1)]
        if not programs or done == 0:
            programs = [self.program | {"from_round": 1}]
        last = programs[-1]
        is_same = same_program(last, self.program)
        same_processor = last["processor"] == self.program["processor"]
        if is_same and not same_processor:
            warn(
                f"{self.path} was started on {last['processor']}; the last bits may differ on "
                "this processor"
            )
        if not is_same or not same_processor:
            programs.append(self.program | {"from_round": done + 1})
        self.programs = programs
        write_file(self.path / PROGRAMS, to_json({"programs": programs}))

    def program_note(self) -> str:
        """Return what captions say of a run that another program went on with, else nothing."""
        pairs = itertools.pairwise(self.programs)
        rounds = [str(new["from_round"] - 1) for old, new in pairs if not same_program(old, new)]
        return f"program changed after round {', '.join(rounds)}" if rounds else ""

    def write_tables(self, records: list[RoundRecord]) -> None:
        """Make rounds.jsonl and metrics.csv hold these records and nothing else."""
        lines = [json_line(record.to_json()) for record in records]
        write_file(self.path / "rounds.jsonl", "".join(lines), sync=True)
        write_file(self.path / "metrics.csv", csv_table(record.figures() for record in records))

    def save_round(
        self, record: RoundRecord, state: Any, build_model: Callable | None = None
    ) -> None:
        """Add the round to the tables, then save the state that the next round starts from.

        build_model(weights) makes the Keras model of TFF's ModelWeights.
        """
        ended = self.path / "metrics.json"
        with io_errors_as_user_errors(ended, "--runs"):
            ended.unlink(missing_ok=True)  # of the run's earlier end, which this round goes past
        figures = record.figures()
        header = csv_line(figures) if record.round == 1 else ""
        append(self.path / "metrics.csv", header + csv_line(figures.values()))
        # As durable as the checkpoint, which is of no use without it.
        append(self.path / "rounds.jsonl", json_line(record.to_json()), sync=True)
        self.write_checkpoint(record.round, state)
        if record.test_accuracy > self.best_accuracy:
            self.note_best(record, state)
        save_every = self.config.run.save_every
        if save_every and record.round % save_every == 0:
            folder = self.path / "models"
            make_folder(folder)
            content = keras_bytes(build_model(state.global_model_weights), self.path)
            write_file(folder / f"round-{record.round:06d}.keras", content)
        if self.is_private:
            self.hide_times()
        stopping.save_first()

    @property
    def best(self) -> Path:
        """The file with the weights of the best round so far."""
        return self.path / "checkpoints" / "best.npz"

    def note_best(self, record: RoundRecord, state: Any) -> None:
        """Keep the weights of the best round so far."""
        weights = state.global_model_weights
        npz = io.BytesIO()
        arrays = {f"weight{number}": np.asarray(w) for number, w in enumerate(weights.trainable)}
        np.savez(npz, round=np.array(record.round), **arrays)
        write_file(self.best, npz.getvalue())
        self.best_accuracy = record.test_accuracy

    def find_best(self, records: Sequence[RoundRecord], state: Any) -> None:
        """Set what later rounds must be better than, after `records` were loaded.

        A kill may have come between a checkpoint and the best weights: then they are the state's.
        """
        best = best_record(records)
        self.best_accuracy = best.test_accuracy
        if self.read_best(best.round) is None and best.round == records[-1].round:
            self.note_best(best, state)

    def read_best(self, round_num: int) -> Any:
        """Return the ModelWeights of the best round, None unless it is `round_num`."""
        try:
            with np.load(io.BytesIO(read_bytes(self.best)), allow_pickle=False) as npz:
                if npz["round"].item() != round_num:
                    return None
                weights = [npz[f"weight{number}"] for number in range(len(npz.files) - 1)]
        except Exception:  # it is missing, or a damaged file, which raises a dozen kinds
            return None
        return tff.learning.models.ModelWeights(weights, [])

    def remove_clients(self) -> None:
        """Remove the models that clients sent in an earlier last round."""
        for path in (self.path / "clients").glob("client-*.keras"):
            with io_errors_as_user_errors(path):
                path.unlink()

    def save_client(self, client: int, model: Any) -> None:
        """Write the model that a client sent in the last round."""
        folder = self.path / "clients"
        make_folder(folder)
        write_file(folder / f"client-{client:06d}.keras", keras_bytes(model, self.path))

    def write_checkpoint(self, round_num: int, state: Any) -> None:
        """Write the state, and remove all but the newest checkpoints."""
        leaves = {
            f"leaf{number}": to_array(leaf) for number, leaf in enumerate(tf.nest.flatten(state))
        }
        program = np.array(program_hash(self.program))
        npz = io.BytesIO()
        np.savez(npz, key=np.array(self.key), program=program, **leaves)
        folder = self.path / "checkpoints"
        make_folder(folder)
        write_file(folder / f"round-{round_num:06d}.npz", npz.getvalue(), sync=True)
        with io_errors_as_user_errors(folder):
            for old in self.checkpoints()[CHECKPOINTS_KEPT:]:
                old.unlink()

    def hide_times(self) -> None:
        """Give all files the date of the run's start.

        The dates of a private run's rounds would tell how many images their cohorts have.
        """
        start = (self.path / "partition.json").stat().st_mtime_ns
        for path in [self.path, *self.path.rglob("*")]:
            os.utime(path, ns=(start, start))

    def checkpoints(self) -> list[Path]:
        """Return the checkpoint files, the newest first."""
        return sorted((self.path / "checkpoints").glob("round-*.npz"), reverse=True)

    def read_checkpoint(self, path: Path) -> Any:
        """Return the state in a checkpoint. No code is run from it.

        Raises UserError if it belongs to another run.
        """
        specs = tf.nest.flatten(self.specs)
        with np.load(io.BytesIO(read_bytes(path)), allow_pickle=False) as npz:
            if npz["key"].item() != self.key:
                raise UserError(
                    f"{path} belongs to another configuration, split or model; remove it or "
                    "restore the run's folder"
                )
            if npz["program"].item() not in map(program_hash, self.programs):
                raise UserError(
                    f"{path} was made by a program that {PROGRAMS} does not list; restore the "
                    "run's folder"
                )
            leaves = [from_array(npz[f"leaf{number}"], spec) for number, spec in enumerate(specs)]
        return tf.nest.pack_sequence_as(self.specs, leaves)

    def finish(
        self,
        metrics: dict,
        weights: Any,
        build_model: Callable,
        figures: dict[str, Callable],
        caption: str,
        tables: dict[str, str],
    ) -> list[Path]:
        """Write metrics.json, the Keras models, the plots and report.html; return the paths.

        `weights` are the last round's, build_model(weights) makes a model. `figures` are functions
        that draw, `tables` the texts of more files.
        """
        provenance = describe_provenance(None if self.is_private else self.opened)
        made_by = {
            "provenance": provenance,
            "program_note": self.program_note(),
            "programs": self.programs,
        }
        write_file(self.path / "metrics.json", to_json(metrics | made_by))
        last_model = keras_bytes(build_model(weights), self.path)
        write_file(self.path / "global_model.keras", last_model)
        best = self.read_best(metrics["best_round"])
        if best is not None:
            is_last = metrics["best_round"] == metrics["rounds"][-1]["round"]
            model = last_model if is_last else keras_bytes(build_model(best), self.path)
            write_file(self.path / "best_model.keras", model)
        write_files(self.path, tables)
        drawn = self.draw(figures, provenance)
        self.write_report(metrics | made_by, caption, figures, drawn)
        if self.is_private:
            self.hide_times()
        models = ["global_model.keras", *(["best_model.keras"] if best is not None else [])]
        names = ["report.html", "metrics.json", *models, "config.json", "partition.json"]
        return [*drawn, *(self.path / name for name in [*names, "metrics.csv", *tables])]

    def write_report(
        self,
        metrics: dict[str, Any],
        caption: str,
        figures: dict[str, Callable],
        drawn: Sequence[Path],
    ) -> None:
        """Write the run's page, with its pictures; those that no page can show are drawn again."""
        if self.form.format in report.MEDIA:
            pictures = {path.name: read_bytes(path) for path in drawn}
        else:
            written = {path.stem for path in drawn}
            pictures = {
                name: to_bytes(draw())
                for name, draw in figures.items()
                if name.removesuffix(".png") in written
            }
        config = self.config.replace(resume="")
        more = {"resume": str(self.path), **report.fields_to_continue(metrics, config)}
        words = [f"{to_flag(field)} {shlex.quote(str(value))}" for field, value in more.items()]
        repeated = config.replace(**report.fields_to_repeat(metrics, config))
        again = report.command_of(repeated, script_command())
        go_on = f"{script_command()} {' '.join(words)}"
        if self.given:
            again = f"fl.run(fl.Config().replace(**{report.changes_of(repeated)}){self.given})"
            changes = ", ".join(f"{field}={value!r}" for field, value in more.items())
            go_on = f"fl.run(config.replace({changes}){self.given})"
        commands = {"Reproduce": again, "Continue": one_line(go_on)}
        if config.privacy.target_epsilon and "rounds" in more:
            del commands["Continue"]  # the noise is for these rounds, all of which are done
        partition = read_json(self.path / "partition.json")
        page = report.to_html(caption, metrics, partition, pictures, commands)
        write_file(self.path / "report.html", page)

    def draw(
        self, figures: dict[str, Callable], provenance: dict[str, Any] | None = None
    ) -> list[Path]:
        """Write the plots into the run's folder; return the paths.

        Their metadata has the provenance, or at least the processor.
        """
        written = write_files(self.path, draw_files(figures, self.form, provenance))
        remove_outdated(self.path, figures, written)
        return written


def to_array(leaf: Any) -> np.ndarray:
    """Return a leaf of TFF's state as a checkpoint holds it; a text, which dp has, as its bytes."""
    return np.frombuffer(leaf, np.uint8) if isinstance(leaf, bytes) else np.asarray(leaf)


def from_array(array: np.ndarray, spec: tf.TensorSpec) -> Any:
    """Return the leaf that `to_array` got. Raises ValueError if it does not fit `spec`."""
    is_text = spec.dtype == tf.string and spec.shape.rank == 0
    if is_text:
        fits = array.dtype == np.uint8
    else:
        fits = array.dtype == spec.dtype.as_numpy_dtype and array.shape == tuple(spec.shape)
    if not fits:
        raise ValueError(f"{array.dtype}{list(array.shape)} in the place of {spec}")
    return array.tobytes() if is_text else array


COMPARED = ("hash", "dataset_sha256", "classes", "label_counts", "indices")


def check_partition(folder: str, saved: dict[str, Any], ours: dict[str, Any]) -> None:
    """Raise UserError if the split in a run's folder differs from the one to continue with.

    Keys that an earlier version did not write are not compared, except the hash.
    """
    comparable = [key for key in COMPARED if key != "indices" or "indices_of" in saved]
    cure = "the run's own data (--data; in Python dataset=)"
    if "file" in (saved.get("partition"), ours.get("partition")):
        cure = f"{cure} and split (--partition-file; in Python partition=)"
    for key in comparable:
        if saved.get(key) != ours.get(key) and (key in saved or key == "hash"):
            raise UserError(
                f"resume={folder!r:.200}: its data or its partition.json has changed ({key}); "
                f"restore it, or give {cure}"
            )


def keras_bytes(model: Any, folder: Path) -> bytes:
    """Return the bytes of the Keras model's .keras file, by way of a file in `folder`."""
    with (
        io_errors_as_user_errors(folder),
        tempfile.TemporaryDirectory(prefix=".keras-", dir=folder) as made,
    ):
        path = Path(made) / ".model.keras"
        model.save(path)
        return path.read_bytes()
