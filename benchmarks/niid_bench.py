"""Flower's niid_bench on MNIST and ours: the same splits, with fewer local epochs in all.

    python benchmarks/niid_bench.py                                  # all splits and rows; results/niid_bench.json
    python benchmarks/niid_bench.py --splits two-labels one-label    # some of them

Flower's baseline does 50 rounds of 10 local epochs over 10 clients; ours 10 rounds of 3, or what
BESIDE says: five algorithms with its network (lenet), FedAvg with the script's own, and one step a
round with Adam on the server. A run in runs/niid_bench is read, one that was stopped goes on.
"""

import argparse
import json
import sys

import numpy as np
from machine import machine
from once import ROOT, once

RUNS = ROOT / "runs" / "niid_bench"
RESULTS = ROOT / "benchmarks" / "results" / "niid_bench.json"
SEEDS = (0, 1, 2)
SPLITS = {  # flags, what Flower's baseline prints for FedAvg (%), and its best row of one seed
    "iid": ("--partition iid", "99.09 ± 0.05", "99.2, FedProx"),
    "dirichlet": ("--partition capped-dirichlet --alpha 0.5 --min-images 10", "98.89 ± 0.07", "99.0, FedProx"),
    "two-labels": ("--partition random-labels --labels-per-client 2", "96.86 ± 0.30", "96.7, FedProx"),
    "one-label": ("--partition random-labels --labels-per-client 1", "19 ± 12", "81.3, FedProx"),
}
LENET = "--model lenet --client-lr 0.1 --algorithm"
ROWS = {
    "fedavg": f"{LENET} fedavg",
    "fedprox": f"{LENET} fedprox --prox-mu 0.01",
    "scaffold": f"{LENET} scaffold",
    "fednova": f"{LENET} fednova",
    "feddyn": f"{LENET} feddyn --dyn-alpha 0.01",
    "fedavg, small-cnn": "--client-lr 0.1",
    "fedadam, one step": "--model lenet --client-lr 1 --server-lr 0.02 --algorithm fedadam",
}
OURS = "--rounds 10 --local-epochs 3 --batch-size 32"
# Chosen on 10,000 held-out training images, seed 0: few local steps between two means, as with one label a client
# forgets all others within some ten of them.
TWO_LABELS = "--rounds 50 --local-epochs 1"
ONE_LABEL = "--rounds 30 --local-epochs 1 --batch-size 600"
ONE_STEP = "--rounds 100 --local-epochs 1 --batch-size 0"
BESIDE = {
    **{("two-labels", name): TWO_LABELS for name in ROWS},
    ("two-labels", "scaffold"): f"{TWO_LABELS} --client-lr 0.02",  # at 0.1 it falls back to chance
    **{("one-label", name): ONE_LABEL for name in ROWS},
    ("one-label", "fedavg, small-cnn"): f"{ONE_LABEL} --client-lr 0.2",
    **{(split, "fedadam, one step"): ONE_STEP for split in SPLITS},
}


def table(rows: list[dict]) -> str:
    """The splits as Markdown, a column a row of ours."""
    names = ["split", "Flower, FedAvg", "Flower, best", *ROWS]
    lines = [f"| {' | '.join(names)} |", "| --- " * len(names) + "|"]
    found = {(row["split"], row["row"]): row["tests"] for row in rows}
    for split, (_, printed, best) in SPLITS.items():
        cells = []
        for name in ROWS:
            tests = found.get((split, name))
            cells.append(f"{np.mean(tests):.2f} ± {np.std(tests, ddof=1):.2f}" if tests else "not run")
        lines.append(f"| {split} | {printed} | {best} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--splits", nargs="+", choices=SPLITS, default=list(SPLITS))
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    options = parser.parse_args()
    rows = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    for split in options.splits:
        for name in options.rows:
            flags = f"{SPLITS[split][0]} {ROWS[name]} {OURS} {BESIDE.get((split, name), '')}".strip()
            folder = f"{split}-{name.replace(',', '').replace(' ', '-')}"
            runs = [once(RUNS / f"{folder}-seed{seed}", f"{flags} --seed {seed}") for seed in SEEDS]
            rows = [row for row in rows if (row["split"], row["row"]) != (split, name)]
            tests = [100 * metrics["test_accuracy"] for metrics in runs]
            rows.append({"split": split, "row": name, "flags": flags, "tests": tests,
                         "machine": machine()})  # fmt: skip
            print(rows[-1], file=sys.stderr, flush=True)
            RESULTS.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
