"""How the default's epochs and rate, and the preset `fast`, were chosen.

It was on 10,000 held-out training images, no test image looked at, with `small-cnn`, which the
default run had then; `lean-cnn` has been tried with the same values only.

    # the default's epochs and rate; results/tuning.csv, 25 minutes
    python benchmarks/tuning.py
    # client optimizers beside it; results/optimizers.csv, half an hour
    python benchmarks/tuning.py --optimizers

What is already in runs/tuning is not run again.
"""

import argparse
import csv
import itertools
from pathlib import Path

import numpy as np
from machine import made_by
from once import once

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "runs" / "tuning"
RESULTS = ROOT / "benchmarks" / "results"
SEEDS = (0, 1, 2)
GRID = {"local_epochs": (2, 3), "batch_size": (16,), "client_lr": (0.05, 0.1, 0.2)}
ADAM = "--client-optimizer adam --local-epochs 2"
OPTIMIZERS = [  # the best of some thirty tried with seed 0
    "--client-optimizer sgd",
    "--client-optimizer momentum --local-epochs 2 --batch-size 16 --client-lr 0.02",
    f"{ADAM} --batch-size 32 --client-lr 0.003",
    # `fast`: three times it still learns
    f"{ADAM} --batch-size 32 --client-lr 0.003 --client-schedule inverse-sqrt",
    f"{ADAM} --batch-size 32 --client-lr 0.005 --client-schedule inverse-sqrt",
    f"{ADAM} --batch-size 64 --client-lr 0.005 --client-schedule inverse-sqrt",
]


def measure(flags: str, seed: int) -> dict:
    """metrics.json of the default run with `flags`, which is made where it is not there."""
    name = "-".join([*flags.replace("--", "").split(), f"seed{seed}"])
    return once(RUNS / name, f"--model small-cnn {flags} --seed {seed} --holdout 10000")


def figures(flags: str) -> dict[str, float]:
    """Held-out accuracy in percent after the first and the last round, and the seconds that the
    rounds take."""
    runs = [[row for row in measure(flags, seed)["rounds"]] for seed in SEEDS]
    last, first = ([100 * run[place]["test_accuracy"] for run in runs] for place in (-1, 0))
    seconds = [sum(row["seconds"] for row in run) for run in runs]
    return {
        "mean": round(np.mean(last), 3),
        "sd": round(np.std(last, ddof=1), 3),
        "after_round_1": round(np.mean(first), 1),
        "seconds_of_rounds": round(np.mean(seconds), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--optimizers", action="store_true")
    rows = []
    if parser.parse_args().optimizers:
        path = RESULTS / "optimizers.csv"
        settings = [{"flags": flags} for flags in OPTIMIZERS]
    else:
        path = RESULTS / "tuning.csv"
        settings = [
            dict(zip(GRID, values, strict=True)) for values in itertools.product(*GRID.values())
        ]
    for setting in settings:
        words = [
            f"--{name.replace('_', '-')} {value:g}"
            for name, value in setting.items()
            if name != "flags"
        ]
        score = figures(setting.get("flags") or " ".join(words))
        rows.append({**setting, **score, **made_by()})
        print(rows[-1], flush=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(sorted(rows, key=lambda row: -row["mean"]))


if __name__ == "__main__":
    main()
