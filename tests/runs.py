"""Configurations, runs of the script as a user starts them, what they leave, and TFF's worker among
their children."""

import contextlib
import csv
import io
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from unittest import mock

import federated_learning as fl
from harness.cli import command_line
from harness.cli.run_options import SINGLE
from harness.comparing import comparison
from harness.comparing.sweep import compared_rows
from harness.storage.saved_run import SavedRun
from harness.training.records import RoundRecord
from variants import choices

import numpy as np
import psutil

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "federated_learning.py"
SECONDS = 240  # limit of any one command
ON_DIGITS = ("--dataset", "digits", "--model", "logreg")  # built in half a second
MLP_ON_DIGITS = ("--dataset", "digits", "--model", "mlp")  # where layers or names matter
NO_FIGURES = ("--figures", "none")  # of a test that does not look at them: two seconds a run


def configure(**flags) -> fl.Config:
    """The default configuration with these fields."""
    return fl.Config().replace(**flags)


def with_needs(row: dict) -> dict:
    """A row's fields, and those without which its algorithm is refused: a clock, or images of each
    client's own."""
    chosen = choices.ALGORITHMS[row.get("algorithm", "fedavg")]
    fields = dict(row)
    if chosen.needs_clock:
        fields["latency"] = 1.0
    if chosen.function.startswith("personal:"):
        fields["client_test"] = 0.2
    return fields


def make_record(accuracy, round_num=1, loss=2.3, num_nonfinite=0, num_clients=1):
    """A round's record with this test accuracy."""
    return RoundRecord(
        round=round_num,
        clients=[{"client": client} for client in range(num_clients)],
        train={"loss": 1.0, "accuracy": 0.5},
        test_loss=loss,
        test_accuracy=accuracy,
        num_nonfinite=num_nonfinite,
        dropped=0,
        bytes_down=0,
        bytes_up=0,
        epsilon=None,
        seconds=1.0,
    )


def caption_of_rows(flags, dataset):
    """The caption of a comparison."""
    config = fl.parse(flags)
    compared = compared_rows(config)
    rows = [config.effective(**row.changes, **SINGLE) for row in compared.rows]
    experiments = [fl.build_experiment(row, dataset) for row in rows]
    return comparison.compared_caption(config, compared, experiments)


def command(*flags: str) -> list[str]:
    return [sys.executable, str(SCRIPT), *flags]


def run_script(folder: Path, *flags: str, **environment: str) -> subprocess.CompletedProcess:
    """The script's run in `folder` with `flags`, its output captured."""
    return subprocess.run(
        command(*flags),
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )


def call_script(folder: Path, *flags: str, **environment: str) -> subprocess.CompletedProcess:
    """The same in this process, which has TensorFlow already: for what isn't about the process
    itself."""
    out = io.StringIO()
    err = io.StringIO()
    with (
        contextlib.chdir(folder),
        mock.patch.dict(os.environ, environment),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            command_line.run_or_exit(fl.main, command_line.run_or_exit(fl.parse, flags))
            code = 0
        except SystemExit as leaving:
            code = leaving.code
    return subprocess.CompletedProcess(flags, code, out.getvalue(), err.getvalue())


def read_metrics(folder: Path) -> dict:
    """What metrics.json of a run, or an evaluation, has."""
    return json.loads((folder / "metrics.json").read_text())


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file."""
    with path.open() as file:
        return list(csv.DictReader(file))


def check_saved(result: fl.Result) -> SavedRun:
    """That a run's saved model predicts as the run did; returns the run as fl.load has it."""
    saved = fl.load(result.folder)
    assert saved.evaluate().accuracy == result.evaluation.accuracy
    images = saved.dataset.test.images.astype(np.float32)
    assert np.array_equal(np.argmax(saved.model()(images), 1), result.evaluation.predictions)
    return saved


def run_code(folder: Path, code: str, *words: str) -> subprocess.CompletedProcess:
    """What Python does with `code` in `folder`; the script can be imported."""
    return subprocess.run(
        [sys.executable, "-c", code, *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )


def start(folder: Path, *flags: str, **options) -> subprocess.Popen:
    """A run in `folder` that is going on."""
    return subprocess.Popen(
        command(*flags),
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def wait_for_round(process: subprocess.Popen) -> None:
    """Reads the run's lines until one of a round; then rounds are going on."""
    for line in process.stdout:
        if line.startswith("round "):
            return
    raise AssertionError(process.stderr.read())


@contextlib.contextmanager
def after_first_round(folder: Path, act: Callable[[], None]) -> Iterator[None]:
    """Calls `act` in a thread once a run in `folder`, which goes on in this process, has one."""
    over = threading.Event()

    def watch():
        while not over.wait(0.01):
            if any(path.stat().st_size for path in folder.glob("runs/*/rounds.jsonl")):
                return act()

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def worker_of(process: subprocess.Popen, besides: Sequence[psutil.Process] = ()) -> psutil.Process:
    """TFF's worker below a running process, once it is there; `besides` are those known already."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        if found := find_worker(process.pid, besides):
            return found
        time.sleep(0.02)
    raise AssertionError("no worker appeared")


def find_worker(pid: int, besides: Sequence[psutil.Process] = ()) -> psutil.Process | None:
    """TFF's worker below the process, if it is there."""
    for child in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "worker_binary" in " ".join(child.cmdline()[:1]) and child not in besides:
                return child
    return None


def gone(process: psutil.Process, seconds: float = 5) -> bool:
    """Whether the process has ended within `seconds`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if process.status() == psutil.STATUS_ZOMBIE or not process.is_running():
                return True
        except psutil.NoSuchProcess:  # it ended between two questions
            return True
        time.sleep(0.02)
    return False
