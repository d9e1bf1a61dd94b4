"""What several hosts cost and change: workers on this machine in their place, so without a network
between.

    python benchmarks/hosts.py    # five minutes; results/hosts.json

Seconds, bytes and processor time of a round on 1, 2 and 3 workers; and how far the weights of two
and three are from those of one, algorithm by algorithm and aggregator by aggregator.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator

from results import ROOT, arguments, made_by, parse, write

# isort: split
import federated_learning as fl
from harness.engine.worker import LocalWorker

import numpy as np
import psutil
import tensorflow as tf
import tensorflow_federated as tff
from small import evaluate_nothing, first_images

COUNTS = (1, 2, 3)
ROUNDS = 7
WORKS = {  # the model, and images a client of ten
    "mlp, 10 clients x 6,000 images, B = 32, E = 1": ("mlp", 6000, 32),
    "cnn, 10 clients x 300 images, B = 10, E = 1": ("cnn", 300, 10),
}
SMALL = {"dataset": "digits", "model": "mlp", "rounds": 3, "num_clients": 6, "local_epochs": 2}
KRUM = {"tolerated": 1}
ROWS = [
    {"algorithm": name}
    | ({"latency": 1.0} if made.needs_clock else {})
    | ({"client_test": 0.2} if made.function.startswith("personal:") else {})
    for name, made in fl.choices.ALGORITHMS.items()
    if name != "fedsgd"
]
ROWS += [{"algorithm": "fedsgd", "local_epochs": 1}]
ROWS += [
    {"aggregator": name} | (KRUM if "krum" in name else {})
    for name in fl.choices.AGGREGATORS
    if name not in ("mean", "dp")
]
ROWS += [{"model": "small-cnn"}, {"model": "small-cnn", "algorithm": "scaffold"}]


def states(config: fl.Config, dataset: fl.Dataset | None = None) -> Iterator:
    """Yields (state, record) after each round, without evaluation."""
    experiment = fl.build_prepared(config, dataset)
    evaluate_nothing(experiment)
    for state, record, _ in fl.run_rounds(experiment):
        yield state, record


def cost(work: str, count: int) -> dict:
    """Medians over ROUNDS rounds after one to warm up."""
    model, images, batch = WORKS[work]
    config = fl.Config().replace(
        model=model,
        partition="iid",
        local_epochs=1,
        batch_size=batch,
        client_lr=0.05,
        rounds=ROUNDS + 1,
        cache=str(ROOT / ".cache"),
        workers=",".join(["localhost"] * count),
    )
    dataset = first_images(config, 10 * images)
    rows = []
    spent = []
    for _, record in states(config, dataset):
        rows.append(record)
        tree = [psutil.Process(), *psutil.Process().children(recursive=True)]
        spent.append(sum(sum(process.cpu_times()[:2]) for process in tree))
    return {
        "work": work,
        "workers": count,
        "seconds": [row.seconds for row in rows[1:]],
        "cpu_s": round((spent[-1] - spent[0]) / ROUNDS, 3),
        "measured_bytes_down": rows[-1].measured_bytes_down,
        "measured_bytes_up": rows[-1].measured_bytes_up,
    }


def megabyte() -> float:
    """Seconds that the coordinator spends on a megabyte to a worker and one back, the median of 20
    of 6.6 MB."""
    values = np.ones(1_663_370, np.float32)  # as many as the cnn has parameters

    @tff.tensorflow.computation(tff.TensorType(np.float32, values.shape))
    def back(x):
        return tf.identity(x)

    seconds = []
    with LocalWorker(1) as worker:
        for _ in range(21):
            began = time.perf_counter()
            worker.call("back", back, values)
            seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:]) / (values.nbytes / 1e6)


def difference(row: dict, count: int, folder: str) -> float:
    """The largest difference of a weight after SMALL's rounds on `count` workers from those of
    one."""
    weights = []
    for workers in (1, count):
        config = fl.Config().replace(
            **{**SMALL, **row, "workers": ",".join(["localhost"] * workers), "cache": folder}
        )
        weights.append(
            [np.asarray(w) for w in list(states(config))[-1][0].global_model_weights.trainable]
        )
    return max(float(np.abs(a - b).max()) for a, b in zip(*weights, strict=True))


def cost_table(rows: list[dict]) -> str:
    """Seconds, bytes and processor time as Markdown."""
    lines = ["| work | workers | s / round, median | CPU-s | MB down | MB up |", "| --- " * 6 + "|"]
    for row in rows:
        wire = [
            f"{row[way] / 1e6:.2f}" if row[way] else "–"
            for way in ("measured_bytes_down", "measured_bytes_up")
        ]
        median = statistics.median(row["seconds"])
        lines.append(
            f"| {row['work']} | {row['workers']} | {median:.3f} | {row['cpu_s']:.2f} | "
            f"{' | '.join(wire)} |"
        )
    return "\n".join(lines)


def row_table(rows: list[dict]) -> str:
    """Differences as Markdown."""
    lines = ["| row | two workers | three |", "| --- " * 3 + "|"]
    return "\n".join(
        [*lines, *(f"| {row['row']} | {row['two']:.0e} | {row['three']:.0e} |" for row in rows)]
    )


TREE = 32  # hosts that one host merges for
MILLION = 1_000_000
HOSTS = (1, 10, 100, 1000)


def calculation(result: dict, scaling: list[dict]) -> str:
    """A round of a million clients of 6 images on so many hosts like this, from the measured costs,
    as Markdown."""
    largest = scaling[-1]
    client = statistics.median(largest["seconds"]) / largest["clients"]
    lines = [
        "| hosts | training (s) | merging at one coordinator (s) | in a tree of 32 (s) |",
        "| --- " * 4 + "|",
    ]
    (two,) = (
        row for row in result["costs"] if row["work"].startswith("mlp") and row["workers"] == 2
    )
    each = two["measured_bytes_down"] / 2 / 1e6 * result["s_per_megabyte"]
    for hosts in HOSTS:
        levels = max(1, math.ceil(math.log(hosts, TREE)))
        tree = levels * min(hosts, TREE) * each
        lines.append(
            f"| {hosts:,} | {MILLION * client / hosts:,.2f} | {hosts * each:,.2f} | {tree:,.2f} |"
        )
    most = math.sqrt(MILLION * client / each)
    told = (
        f"A client costs {1000 * client:.2f} ms (`scaling.json`), a megabyte there and back "
        f"{1000 * result['s_per_megabyte']:.1f} ms of the coordinator's time "
        f"(measured without a network; a link of 1 Gbit/s adds 16 ms), `mlp`'s "
        f"weights {two['measured_bytes_down'] / 2e6:.2f} MB. "
        f"Beyond some {most:,.0f} hosts a round waits for the coordinator; a tree, in which hosts "
        "merge for 32 others, would do, as merges may be grouped in any way."
    )
    return "\n".join([*lines, "", *textwrap.wrap(told, 120)])


def main() -> None:
    parser = arguments(__doc__)
    # one work and count, in a process of its own
    parser.add_argument("--cost", nargs=2, help=argparse.SUPPRESS)
    if one := parse(parser).cost:
        return print(json.dumps(cost(one[0], int(one[1]))), flush=True)
    costs = []
    rows = []
    for work in WORKS:
        for count in COUNTS:
            command = [sys.executable, __file__, "--cost", work, str(count)]
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
            costs.append(json.loads(done.stdout))
            print(costs[-1], flush=True)
    for row in ROWS:
        with tempfile.TemporaryDirectory() as folder:
            name = ", ".join(value for value in row.values() if isinstance(value, str))
            rows.append(
                {
                    "row": name,
                    "two": difference(row, 2, folder),
                    "three": difference(row, 3, folder),
                }
            )
            print(rows[-1], flush=True)
    result = {**made_by(), "costs": costs, "rows": rows, "s_per_megabyte": round(megabyte(), 5)}
    write("hosts", result)


if __name__ == "__main__":
    main()
