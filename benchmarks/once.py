"""Runs of the script that are made once by each version of it: one that is there is read, one that
was stopped goes on."""

import functools
import json
import subprocess
import sys
import time
from pathlib import Path

from results import ROOT, data_name, runs_of

# isort: split
import federated_learning as fl
from harness.comparing.commands import MOST_HELD_OUT
from harness.storage.provenance import digest


@functools.cache
def num_held_out() -> int:
    """Training images that rates are chosen on: 10,000 of MNIST's, of other data a sixth."""
    if not data_name():
        return 10_000
    config = fl.Config().with_absolute_paths()
    return min(len(fl.load_dataset(config.data).train.labels) // 6, MOST_HELD_OUT)


def folder_of(table: str, name: str, asked: object) -> Path:
    """The folder of a table's run, by what is asked of it too: with other flags it is another."""
    digits = digest(str(asked).replace(str(ROOT), ""))[:8]  # the same wherever the project is
    return runs_of(table) / f"{name}-{digits}"


def once(table: str, name: str, flags: str) -> dict:
    """metrics.json of a table's run with `flags`, and its `seconds`: of all parts, where it was
    stopped, but for parts that were killed at once."""
    folder = folder_of(table, name, flags)
    seconds = folder.with_name(f"{folder.name}.seconds")  # written when it is done
    command = [sys.executable, str(ROOT / "federated_learning.py"), "--cache", str(ROOT / ".cache")]
    place = ["--runs", str(folder.parent), "--name", folder.name]
    # A folder's name says what the program computes: what else has changed does not matter.
    resumed = ["--resume", str(folder), "--accept-changes"]
    command += resumed if folder.exists() else [*flags.split(), *place]
    if not seconds.exists():
        print(f"{folder.name}: {flags}", file=sys.stderr, flush=True)
        so_far = folder.with_name(f"{folder.name}.seconds-so-far")
        is_begun = folder.exists() and so_far.exists()
        spent = float(so_far.read_text()) if is_begun else 0.0
        began = time.perf_counter()
        try:
            done = subprocess.run(command, stdout=subprocess.DEVNULL)
        finally:
            so_far.parent.mkdir(parents=True, exist_ok=True)
            so_far.write_text(f"{spent + time.perf_counter() - began:.1f}\n")
        if done.returncode:
            sys.exit(done.returncode)  # the program has said why
        so_far.rename(seconds)
    return {
        **json.loads((folder / "metrics.json").read_text()),
        "seconds": float(seconds.read_text()),
    }


def commits(runs: list[dict]) -> list[str]:
    """The commits of the programs that made these runs, by their metrics."""
    made_by = {str(program["commit"]) for metrics in runs for program in metrics["programs"]}
    return sorted(made_by)
