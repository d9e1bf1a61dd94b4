"""How the defaults were chosen: accuracy on 10,000 held-out training images, no test image looked at.

python benchmarks/tuning.py        # about 25 minutes on 2 cores; what is already in runs/tuning is not run again
"""

import csv
import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "runs" / "tuning"
RESULTS = ROOT / "benchmarks" / "results" / "tuning.csv"
SEEDS = (0, 1, 2)
GRID = {"local_epochs": (2, 3), "batch_size": (16,), "client_lr": (0.05, 0.1, 0.2)}


def accuracy(setting: dict[str, float], seed: int) -> float:
    """Held-out accuracy of the default run with `setting`, in percent; read from its folder where that is there."""
    name = "-".join([*(f"{value:g}" for value in setting.values()), f"seed{seed}"])
    metrics = RUNS / name / "metrics.json"
    if not metrics.exists():
        flags = [word for key, value in setting.items() for word in ("--" + key.replace("_", "-"), str(value))]
        place = ["--seed", str(seed), "--holdout", "10000", "--runs", str(RUNS), "--name", name]
        script = [sys.executable, str(ROOT / "federated_learning.py")]
        subprocess.run([*script, *flags, *place], check=True, stdout=subprocess.DEVNULL)
    return 100 * json.loads(metrics.read_text())["test_accuracy"]


def main() -> None:
    rows = []
    for values in itertools.product(*GRID.values()):
        setting = dict(zip(GRID, values, strict=True))
        figures = [accuracy(setting, seed) for seed in SEEDS]
        rows.append({**setting, "mean": round(np.mean(figures), 3), "sd": round(np.std(figures, ddof=1), 3)})
        print(rows[-1], flush=True)
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(sorted(rows, key=lambda row: -row["mean"]))


if __name__ == "__main__":
    main()
