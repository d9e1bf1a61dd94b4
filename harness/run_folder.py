"""A run's own folder: opened once, written once a round, closed once. It is handed all that it
writes.

A kill at any moment leaves a state to go on from: the tables get a round's row first, its
checkpoint comes last, and `load` goes back to the newest checkpoint whose rounds the tables hold,
and cuts them there.
"""

from __future__ import annotations

import contextlib
import errno
import io
import itertools
import json
import os
import shlex
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from harness import SCRIPT, stopping
from harness.command_line import check_resumed, notice, printable, read_saved
from harness.fields import UserError
from harness.files import (
    DAMAGE,
    append,
    briefly,
    csv_line,
    csv_table,
    json_line,
    lock,
    numbered,
    place,
    read_bytes,
    read_json,
    to_json,
    write_file,
    writing,
)
from harness.plots import to_png
from harness.program import PROGRAMS, describe_program, program_hash, read_programs, same_program
from harness.records import RoundRecord, read_records

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

CHECKPOINTS_KEPT = 3


class RunFolder:
    """The files of one run."""

    def __init__(self, path: Path, tensorboard: bool, rows: dict[str, str] | None = None):
        """`rows` are the hashes of the rows in use; the folder itself says what programs made its
        rounds so far."""
        self.path = path
        self.program = describe_program(rows or {})
        self.programs = read_programs(path) if (path / PROGRAMS).exists() else []
        self.events = tf.summary.create_file_writer(str(path)) if tensorboard else None
        self.key = ""
        self.specs = ()
        self.journal = path / "rounds_begun.txt"  # of a private run

    def log(self, private: bool) -> Path:
        """Return where TFF's worker writes what it prints: of a private run nowhere, as it may name
        a client's file."""
        return Path(os.devnull) if private else self.path / "worker.log"

    @classmethod
    @contextlib.contextmanager
    def open(
        cls, config: Any, name: str, manifest: dict, rows: dict[str, str]
    ) -> Iterator[RunFolder]:
        """Hold the run's folder: a new one with config.json and partition.json in it, or that of
        the run to resume.

        `rows` are the hashes of the rows in use.
        """
        run = config.run
        if run.resume:
            path = place(run.resume)
            check_resumed(config, read_saved(run.resume, type(config)()), rows)
            if read_json(path / "partition.json").get("hash") != manifest["hash"]:
                raise UserError(
                    f"resume={run.resume!r:.200}: its data or its partition.json has changed; "
                    "restore it, or name the data by --data"
                )
        else:
            programs = [describe_program(rows) | {"from_round": 1}]
            files = {
                "config.json": to_json(config.flat()),
                "partition.json": to_json(manifest),
                PROGRAMS: to_json({"programs": programs}),
            }
            path = make_folder(place(run.runs), run.name or name, files)
        line = f"notice: stopped before a new round was done; {go_on(path)}"
        with stopping.saying(line), lock(path):
            # It may have more rounds now.
            write_file(
                path / "config.json", to_json(config.but(resume="", accept_changes=False).flat())
            )
            yield cls(path, run.tensorboard, rows)

    def load(self, identity: list, state_type: Any) -> tuple[Any, list[RoundRecord]]:
        """Return (state, records) of the newest checkpoint that the tables reach, (None, []) where
        nothing was done.

        `identity` is what a checkpoint belongs to beside the state's names and shapes in
        `state_type`, a TFF type.
        """
        self.specs = tff.types.type_to_tf_tensor_specs(state_type.member)
        self.key = json.dumps([*identity, str(state_type)], sort_keys=True)
        lines = read_lines(self.path / "rounds.jsonl")
        wrong = ""
        for checkpoint in self.checkpoints():
            try:
                state = self.read_checkpoint(checkpoint)
                done = int(checkpoint.stem.removeprefix("round-"))
            except DAMAGE as error:
                notice(
                    f"{checkpoint} is damaged ({briefly(error)}); going back to the one before it"
                )
                continue
            try:
                records = read_records(lines, done)
            except DAMAGE as error:
                wrong = (
                    f"{self.path / 'rounds.jsonl'} does not hold rounds 1..{done} "
                    f"({briefly(error)}); restore it"
                )
                continue
            self.write_tables(records)
            self.note_program(done)
            return state, records
        if wrong:
            raise UserError(wrong)
        self.write_tables([])
        self.note_program(0)
        return None, []

    def note_program(self, done: int) -> None:
        """Add this program to the run's list where the rounds after the `done` are the first of its
        own."""
        programs = [program for program in self.programs if program["from_round"] <= max(done, 1)]
        if not programs or done == 0:
            programs = [self.program | {"from_round": 1}]
        elif (
            not same_program(programs[-1], self.program)
            or programs[-1]["processor"] != self.program["processor"]
        ):
            if same_program(programs[-1], self.program):
                notice(
                    f"{self.path} was begun on {programs[-1]['processor']}; the last bits may "
                    "differ on this one"
                )
            programs.append(self.program | {"from_round": done + 1})
        self.programs = programs
        write_file(self.path / PROGRAMS, to_json({"programs": programs}))

    def program_note(self) -> str:
        """Return what is said of a run that was gone on with by another program; of any other
        nothing."""
        pairs = itertools.pairwise(self.programs)
        rounds = [str(new["from_round"] - 1) for old, new in pairs if not same_program(old, new)]
        return f"program changed after round {', '.join(rounds)}" if rounds else ""

    def made_by(self) -> dict[str, Any]:
        """Return what metrics.json says of the program."""
        return {"program_note": self.program_note(), "programs": self.programs}

    def write_tables(self, records: list[RoundRecord]) -> None:
        """Make rounds.jsonl and metrics.csv hold these records and nothing else."""
        write_file(
            self.path / "rounds.jsonl", "".join(json_line(vars(record)) for record in records)
        )
        write_file(self.path / "metrics.csv", csv_table(record.figures() for record in records))

    def save_round(self, record: RoundRecord, state: Any, confusion_plot: Callable) -> None:
        """Add the round to the tables, then save the state, from which the next round can start."""
        row = record.figures()
        header = csv_line(row) if record.round == 1 else ""
        append(self.path / "metrics.csv", header + csv_line(row.values()))
        append(self.path / "rounds.jsonl", json_line(vars(record)))
        leaves = {
            f"leaf{number}": to_array(leaf) for number, leaf in enumerate(tf.nest.flatten(state))
        }
        npz = io.BytesIO()
        np.savez(
            npz, key=np.array(self.key), program=np.array(program_hash(self.program)), **leaves
        )
        folder = self.path / "checkpoints"
        with writing(folder):
            folder.mkdir(exist_ok=True)
            path = folder / f"round-{record.round:06d}.npz"
            write_file(path, npz.getvalue(), sync=True)
            for old in self.checkpoints()[CHECKPOINTS_KEPT:]:
                old.unlink()
        if record.private:
            self.hide_times()
        stopping.save_first()
        if self.events:
            write_events(self.events, record.round, row, confusion_plot)

    def hide_times(self) -> None:
        """Give all files the date of the run's start: those of a private round tell how many images
        its cohort has."""
        began = (self.path / "partition.json").stat().st_mtime_ns
        for path in [self.path, *self.path.rglob("*")]:
            os.utime(path, ns=(began, began))

    def checkpoints(self) -> list[Path]:
        """Return the checkpoint files, the newest first."""
        return sorted((self.path / "checkpoints").glob("round-*.npz"), reverse=True)

    def read_checkpoint(self, path: Path) -> Any:
        """Return the state in a checkpoint.

        No code is run from it. Raise UserError where it belongs to another run.
        """
        specs = tf.nest.flatten(self.specs)
        with np.load(io.BytesIO(read_bytes(path)), allow_pickle=False) as npz:
            if npz["key"].item() != self.key:
                reason = (
                    "is of another configuration, split or model; remove it or restore the run's "
                    "folder"
                )
                raise UserError(f"{path} {reason}")
            if npz["program"].item() not in map(program_hash, self.programs):
                raise UserError(
                    f"{path} is of a program that {PROGRAMS} does not name; restore the run's "
                    "folder"
                )
            leaves = [from_array(npz[f"leaf{number}"], spec) for number, spec in enumerate(specs)]
        return tf.nest.pack_sequence_as(self.specs, leaves)

    def finish(
        self, metrics: dict, model: Any, pictures: dict[str, Callable], shown: bool
    ) -> list[Path]:
        """Write metrics.json, the Keras model and the pictures, if they are to be `shown` also into
        ./images.

        Return the paths. `pictures` are functions that draw: one that fails is a notice, as all
        that matters is there by then.
        """
        write_file(self.path / "metrics.json", to_json(metrics | self.made_by()))
        write_file(self.path / "global_model.keras", keras_bytes(model, self.path))
        folders = [self.path, *([Path("images")] if shown else [])]
        drawn = self.draw(pictures, folders)
        if metrics["epsilon"] is not None:
            self.hide_times()
        names = (
            "metrics.json",
            "global_model.keras",
            "config.json",
            "partition.json",
            "metrics.csv",
        )
        return [*drawn, *(self.path / name for name in names)]

    def draw(self, pictures: dict[str, Callable], folders: Sequence[Path] = ()) -> list[Path]:
        """Write the pictures into `folders`, or the run's own, as far as they can be drawn; return
        the paths."""
        drawn = []
        for folder in folders:
            with writing(folder):
                folder.mkdir(exist_ok=True)
        for name, draw in pictures.items():
            try:
                png = to_png(draw())
            except Exception as error:
                notice(f"{name} cannot be drawn ({briefly(error)}); all else is written")
                continue
            for folder in folders or [self.path]:
                write_file(folder / name, png)
                drawn.append(folder / name)
        return drawn


def to_array(leaf: Any) -> np.ndarray:
    """Return a leaf of TFF's state as a checkpoint holds it: a text, such as those in dp's state,
    as its bytes."""
    return np.frombuffer(leaf, np.uint8) if isinstance(leaf, bytes) else np.asarray(leaf)


def from_array(array: np.ndarray, spec: Any) -> Any:
    """Return the leaf that `to_array` was given, of the tf.TensorSpec.

    Raise ValueError where it is of another.
    """
    text = spec.dtype == tf.string and spec.shape.rank == 0
    wanted = (None, np.uint8) if text else (tuple(spec.shape), spec.dtype.as_numpy_dtype)
    if array.dtype != wanted[1] or wanted[0] not in (None, array.shape):
        raise ValueError(f"{array.dtype}{list(array.shape)} in the place of {spec}")
    return array.tobytes() if text else array


def default_name(config: Any, dataset: Any) -> str:
    """Return what a run's folder is called where the user does not say; `dataset` has
    `original`."""
    data = (
        "other" if config.data.dataset == "mnist" and not dataset.original else config.data.dataset
    )
    parts = [data, config.partition, config.optimization.algorithm, config.training.model]
    return "-".join([*parts, f"seed{config.seed}"])


def go_on(path: Path) -> str:
    """Return how a stopped run goes on."""
    return printable(f"python {SCRIPT} --resume {shlex.quote(str(path))} goes on")


def make_folder(runs: Path, name: str, files: dict[str, str]) -> Path:
    """Make a new folder in `runs` with these files in it, all at once; a name that is taken gets
    -2, -3, ..."""
    with writing(runs):
        runs.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=".new-", dir=runs))
        made.chmod(0o777 & ~current_umask())
    for file, text in files.items():
        write_file(made / file, text)
    for folder in numbered(runs / name):
        try:
            # with all files in it, or not at all where the name is taken
            return made.rename(folder)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise UserError(
                    f"cannot make {folder}: {error.strerror}; choose another folder"
                ) from error
    raise AssertionError("unreachable")


def current_umask() -> int:
    """Return the umask, as Linux tells it without changing it."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("Umask:")[2].split()[0], 8)


def read_lines(path: Path) -> list[str]:
    """Return the lines of a table, none where it is missing or cannot be read."""
    try:
        return read_bytes(path).decode().splitlines()
    except (OSError, ValueError):
        return []


def write_events(
    events: Any, round_num: int, row: dict[str, Any], confusion_plot: Callable
) -> None:
    """Add the round's figures and its confusion matrix to the TensorBoard `events`."""
    with events.as_default(step=round_num):
        for name, value in row.items():
            if value is not None:
                tf.summary.scalar(name, value)
        tf.summary.image("confusion matrix", tf.io.decode_png(to_png(confusion_plot()))[None])
    events.flush()


def keras_bytes(model: Any, folder: Path) -> bytes:
    """Return the Keras model as a .keras file's bytes, by way of a file in `folder`: Keras knows no
    other."""
    with writing(folder), tempfile.TemporaryDirectory(prefix=".keras-", dir=folder) as made:
        path = Path(made) / ".model.keras"
        model.save(path)
        return path.read_bytes()
