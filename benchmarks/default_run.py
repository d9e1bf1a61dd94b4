"""The default run with three seeds: README's first figures.

python benchmarks/default_run.py    # results/default_run.json, three minutes
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import round_time

RESULTS = round_time.ROOT / "benchmarks" / "results" / "default_run.json"
SEEDS = (0, 1, 2)


def table(result: dict) -> str:
    """The runs as Markdown, and their mean."""
    lines = ["| command | test accuracy | seconds |", "| --- | --- | --- |"]
    for run in result["runs"]:
        command = f"`python federated_learning.py --seed {run['seed']}`"
        lines.append(f"| {command} | {run['test_accuracy']:.2%} | {run['seconds']:.0f} |")
    accuracies = [100 * run["test_accuracy"] for run in result["runs"]]
    seconds = np.mean([run["seconds"] for run in result["runs"]])
    lines.append(f"| mean ± sd | **{np.mean(accuracies):.2f} ± {np.std(accuracies, ddof=1):.2f} %** | {seconds:.0f} |")
    return "\n".join([*lines, "", f"({result['machine']}; `python benchmarks/default_run.py` makes this table.)"])


def main() -> None:
    runs = []
    for seed in SEEDS:
        with tempfile.TemporaryDirectory() as folder:
            place = ["--runs", folder, "--name", "run", "--cache", str(round_time.ROOT / ".cache")]
            script = str(round_time.ROOT / "federated_learning.py")
            began = time.perf_counter()
            subprocess.run([sys.executable, script, "--seed", str(seed), *place], check=True, cwd=folder)
            seconds = round(time.perf_counter() - began, 1)
            metrics = json.loads((Path(folder) / "run" / "metrics.json").read_text())
        kept = {name: metrics[name] for name in ("test_accuracy", "weights_sha256")}
        runs.append({"seed": seed, **kept, "seconds": seconds})
    result = {"machine": round_time.machine(), "runs": runs}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
