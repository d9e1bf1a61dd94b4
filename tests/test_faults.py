"""Each change that a run makes on the disk fails, is done by half, or the run is killed before or
after it.

Whatever it was, the run then goes on to the files of one that nothing happened to, bit for bit.
Training is left out: rounds are replayed from one real run, as they are a pure function of the
state that they start from.
"""

import errno
import os
from pathlib import Path

import federated_learning as fl
from harness.cli.fields import UserError
from harness.cli.saved_config import read_saved
from harness.reporting import figure_files, plots
from harness.reporting.results import weights_sha256
from harness.storage import callbacks, run_folder

import pytest
from runs import configure

CHANGES = ("open", "write", "fsync", "ftruncate", "mkdir", "rename", "replace", "unlink", "chmod")
GROWS = ("open", "write", "mkdir", "rename", "replace")  # what a full disk refuses
FAULTS = ("fails", "by half", "killed before", "killed after")
ROUNDS = 2


class Killed(BaseException):
    """As if by kill -9: nothing that follows reaches the disk."""


class Disk:
    """Stands between the script and the operating system's calls that change files below `root`,
    and counts them."""

    def __init__(self, monkeypatch, root):
        self.root = str(root)
        self.calls = []
        self.descriptors = set()
        self.real = {name: getattr(os, name) for name in CHANGES}
        self.at = -1
        self.fault = ""
        self.broken = ""
        for name in CHANGES:
            monkeypatch.setattr(os, name, self.between(name))

    def between(self, name):
        def call(where, *arguments, **keywords):
            reading = name == "open" and not arguments[0] & os.O_CREAT
            ours = (
                where in self.descriptors
                if isinstance(where, int)
                else os.fspath(where).startswith(self.root)
            )
            if reading or not ours:
                return self.real[name](where, *arguments, **keywords)
            return self.disturb(name, where, *arguments, **keywords)

        return call

    def disturb(self, name, where, *arguments, **keywords):
        self.calls.append(name)
        hit = len(self.calls) - 1 == self.at
        if self.broken == "killed" or (hit and self.fault == "killed before"):
            self.broken = "killed"
            raise Killed
        if hit and self.fault in ("fails", "by half"):
            self.broken = "full"
            if self.fault == "by half" and name == "write":
                return self.real[name](where, arguments[0][: len(arguments[0]) // 2])
        if self.broken == "full" and (hit or name in GROWS):
            raise OSError(errno.ENOSPC, "No space left on device", str(where))
        try:
            result = self.real[name](where, *arguments, **keywords)
        finally:
            if hit and self.fault == "killed after":
                self.broken = "killed"
                raise Killed
        if name == "open":
            self.descriptors.add(result)
        return result


@pytest.fixture(scope="module")
def rounds(digits, tmp_path_factory):
    """(configuration, its experiment, what its rounds yield), from a real run."""
    folder = tmp_path_factory.mktemp("rounds")
    config = configure(
        dataset="digits", model="mlp", num_clients=2, rounds=ROUNDS, name="run", cache=str(folder)
    )
    experiment = fl.build_prepared(config, digits)
    return config, experiment, list(fl.run_rounds(experiment))


@pytest.fixture
def go(rounds, monkeypatch, tmp_path):
    """go(name) makes a run in the folder `name`, or goes on with it, and returns what it leaves:
    name -> bytes."""
    config, experiment, yielded = rounds

    def replay(_, state=None, callbacks=(), folder=None):
        done = int(state.client_work.round) if state else 0
        if done:
            ours = state.global_model_weights
            theirs = yielded[done - 1][0].global_model_weights
            assert weights_sha256(ours.trainable) == weights_sha256(theirs.trainable)
        for outcome in yielded[done : config.training.rounds]:
            for callback in callbacks:
                callback.after_round(outcome)
            yield outcome

    def nothing(*_):
        """Drawing is what takes the time here."""

    monkeypatch.setattr(fl, "run_rounds", replay)
    monkeypatch.setattr(fl, "build_process", lambda *_: experiment.process)
    monkeypatch.setattr(fl, "build_evaluator", lambda *_: experiment.evaluate)
    monkeypatch.setattr(run_folder, "keras_bytes", lambda *_: b"a model")
    for module in (callbacks, run_folder, figure_files):
        monkeypatch.setattr(module, "to_bytes", lambda *_: b"a picture")
    monkeypatch.setattr(run_folder, "describe_provenance", lambda _: {"seconds": 1.0})
    for plot in (
        "plot_partition",
        "plot_convergence",
        "plot_cost",
        "plot_confusion",
        "plot_misclassified",
    ):
        monkeypatch.setattr(plots, plot, nothing)

    def run(name):
        root = tmp_path / name
        folder = root / "runs" / "run"
        config_here = config.replace(runs=str(root / "runs"), cache=str(root / "cache"))
        fl.run(read_saved(str(folder), fl.Config()) if folder.exists() else config_here)
        return {
            str(path.relative_to(root)): path.read_bytes().replace(str(root).encode(), b"")
            for path in sorted(root.rglob("*"))
            if path.is_file()
            and not any(part.startswith(".") for part in path.relative_to(root).parts)
        }

    return run


@pytest.mark.parametrize(
    ("every", "faults"),
    [
        pytest.param(47, FAULTS, id="few"),
        *(pytest.param(1, (fault,), id=fault, marks=pytest.mark.thorough) for fault in FAULTS),
    ],
)
def test_every_change_of_the_disk_may_go_wrong(go, tmp_path, monkeypatch, every, faults):
    """`make test` tries each 47th of them, `make thorough` all."""
    with monkeypatch.context() as patch:
        whole = Disk(patch, tmp_path)
        expected = go("whole")
    assert (
        len(whole.calls) > 60
        and {"runs/run/metrics.json", "runs/run/checkpoints/round-000002.npz"} < expected.keys()
    )
    for number, fault in enumerate(faults):
        for at in range(number, len(whole.calls), every):
            name = whole.calls[at]
            if fault == "by half" and name != "write":
                continue
            root = tmp_path / f"{fault.replace(' ', '-')}-{at}"
            with monkeypatch.context() as patch:
                disk = Disk(patch, tmp_path)
                disk.at = at
                disk.fault = fault
                try:
                    go(root.name)
                except UserError as error:
                    assert "cannot " in str(error) and "\n" not in str(error), (fault, at)
                except Killed:
                    pass
                assert disk.broken, (fault, at)
            assert go(root.name) == expected, (fault, at, name)
            assert Path(root / "runs" / "run" / "metrics.json").exists()
