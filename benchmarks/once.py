"""Runs of the script that are made once by each version of it: one that is there is read, one that
was stopped goes on."""

import json
import subprocess
import sys
import time

from results import ROOT, runs_of


def once(table: str, name: str, flags: str) -> dict:
    """metrics.json of a table's run with `flags`, and its `seconds`: of the last part, where it was
    stopped."""
    folder = runs_of(table) / name
    seconds = folder.with_name(f"{folder.name}.seconds")  # written when it is done
    command = [sys.executable, str(ROOT / "federated_learning.py"), "--cache", str(ROOT / ".cache")]
    place = ["--runs", str(folder.parent), "--name", folder.name]
    command += ["--resume", str(folder)] if folder.exists() else [*flags.split(), *place]
    if not seconds.exists():
        print(f"{folder.name}: {flags}", file=sys.stderr, flush=True)
        began = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds.write_text(f"{time.perf_counter() - began:.1f}\n")
    return {
        **json.loads((folder / "metrics.json").read_text()),
        "seconds": float(seconds.read_text()),
    }


def commits(runs: list[dict]) -> list[str]:
    """The commits of the programs that made these runs, by their metrics."""
    made_by = {str(program["commit"]) for metrics in runs for program in metrics["programs"]}
    return sorted(made_by)
