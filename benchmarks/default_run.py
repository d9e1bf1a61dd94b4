"""The default run and the preset `fast` with three seeds, side by side: README's first figures.

python benchmarks/default_run.py    # results/default_run.json, five minutes
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from machine import made_by
from once import ROOT

RESULTS = ROOT / "benchmarks" / "results" / "default_run.json"
SEEDS = (0, 1, 2)
FLAGS = ("", " --preset fast")


def table(result: dict) -> str:
    """The runs as Markdown, with their means."""
    lines = [
        "| command, seeds 0, 1, 2 | test accuracy (%) | mean ± sd | after round 1 | seconds |",
        "| --- " * 5 + "|",
    ]
    for flags in FLAGS:
        runs = [run for run in result["runs"] if run["flags"] == flags]
        last = [100 * run["test_accuracy"] for run in runs]
        first, seconds = (
            np.mean([run[name] for run in runs]) for name in ("after_round_1", "seconds")
        )
        each = ", ".join(f"{accuracy:.2f}" for accuracy in last)
        score = f"**{np.mean(last):.2f} ± {np.std(last, ddof=1):.2f}**"
        lines.append(
            f"| `federated_learning.py{flags}` | {each} | {score} | {100 * first:.1f} | "
            f"{seconds:.0f} |"
        )
    return "\n".join(
        [*lines, "", f"({result['machine']}; `python benchmarks/default_run.py` makes this table.)"]
    )


def measure(flags: str, seed: int) -> dict:
    """One run, its time from the command to the prompt."""
    with tempfile.TemporaryDirectory() as folder:
        place = [
            "--seed",
            str(seed),
            "--runs",
            folder,
            "--name",
            "run",
            "--cache",
            str(ROOT / ".cache"),
        ]
        script = str(ROOT / "federated_learning.py")
        began = time.perf_counter()
        subprocess.run([sys.executable, script, *flags.split(), *place], check=True, cwd=folder)
        seconds = round(time.perf_counter() - began, 1)
        metrics = json.loads((Path(folder) / "run" / "metrics.json").read_text())
    kept = {name: metrics[name] for name in ("test_accuracy", "weights_sha256")}
    first = metrics["rounds"][0]["test_accuracy"]
    return {"flags": flags, "seed": seed, **kept, "after_round_1": first, "seconds": seconds}


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    runs = [measure(flags, seed) for seed in SEEDS for flags in FLAGS]
    result = {**made_by(), "runs": runs}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
