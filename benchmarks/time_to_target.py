"""From the command to a test accuracy, start-up and evaluation of every round included: us and what
a user would pick.

    # once; the newer Python is for BlazeFL
    PATH=…/python3.13/bin:$PATH python benchmarks/peers.py --install
    # every work and peer, 3 seeds, 40 minutes
    python benchmarks/time_to_target.py
    python benchmarks/time_to_target.py --works 2nn --contenders ours fedjax

Writes results/time_to_target.json. All contenders have the split, initial weights, batch, rate and
epochs of our run with that seed, and sample clients by their own means. They run interleaved: seed
by seed, each as a process of its own.
"""

import argparse
import contextlib
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import round_time
from machine import made_by

RESULTS = round_time.ROOT / "benchmarks" / "results" / "time_to_target.json"
SEEDS = (0, 1, 2)
CELL = (
    "--model 2nn --partition iid --num-clients 100 --clients-per-round 10 --local-epochs 1 "
    "--batch-size 10"
)
WORKS = {  # title, target, flags
    "2nn": (
        "McMahan et al.'s 2NN, IID: 100 clients, C = 0.1, E = 1, B = 10, rate 0.1",
        0.97,
        f"{CELL} --client-lr 0.1",
    ),
    "default": (
        "the default run with small-cnn: 10 clients, Dirichlet(0.5)",
        0.985,
        "--model small-cnn",
    ),
}
LIMIT = 180  # seconds, after which a contender is ended


def export(flags: str, seed: int, folder: Path) -> Path:
    """The work of our run with `flags`, as a file for the peers, which know nothing of
    TensorFlow."""
    fl = round_time.fl
    experiment = fl.build_experiment(fl.parse(f"{flags} --seed {seed}"))
    dataset = experiment.dataset
    partition = experiment.partition
    training = experiment.config.training
    weights = {f"weight{number}": w for number, w in enumerate(experiment.initial_weights)}
    path = folder / f"work-{seed}.npz"
    test = dataset.test
    np.savez(
        path,
        images=dataset.train.images,
        labels=dataset.train.labels,
        test_images=test.images,
        test_labels=test.labels,
        indices=np.concatenate(partition.indices),
        sizes=partition.sizes,
        batch=training.batch_size,
        rate=training.client_lr,
        epochs=training.local_epochs,
        cohort=training.clients_per_round or len(partition.indices),
        seed=seed,
        **weights,
    )
    return path


class Tree(threading.Thread):
    """Looks at a process and its children four times a second: their CPU-seconds and the peaks of
    their memory."""

    def __init__(self, pid: int):
        super().__init__(daemon=True)
        self.root = psutil.Process(pid)
        self.cpu = {}
        self.mib = {}
        self.ended = threading.Event()
        self.seen = set()

    def run(self) -> None:
        while not self.ended.wait(0.25):
            with contextlib.suppress(psutil.NoSuchProcess):
                for process in [self.root, *self.root.children(recursive=True)]:
                    with contextlib.suppress(psutil.NoSuchProcess, FileNotFoundError, IndexError):
                        self.seen.add(process)
                        self.cpu[process] = sum(process.cpu_times()[:2])
                        status = Path(f"/proc/{process.pid}/status").read_text()
                        self.mib[process] = int(status.partition("VmHWM:")[2].split()[0]) / 1024


def run(command: list[str], folder: Path) -> dict:
    """Seconds to the line of the last round and to the end of the process, rounds, accuracy, CPU
    and memory."""
    began = time.perf_counter()
    process = subprocess.Popen(
        command,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(round_time.ROOT / "benchmarks" / "peers")},
    )
    tree = Tree(process.pid)
    figures = {}
    tree.start()
    limit = threading.Timer(LIMIT, process.kill)
    limit.start()
    for line in process.stdout:  # "round 12/500 … accuracy 97.01%" is ours, "12 0.9701" a peer's
        ours = re.match(r"round +(\d+)/.* accuracy +([\d.]+)%", line)
        theirs = re.match(r"(\d+) ([\d.]+)$", line)
        if found := ours or theirs:
            accuracy = float(found[2]) / (100 if ours else 1)
            figures = {
                "target_s": time.perf_counter() - began,
                "rounds": int(found[1]),
                "accuracy": accuracy,
            }
    _, _, usage = os.wait4(process.pid, 0)
    figures["total_s"] = time.perf_counter() - began
    limit.cancel()
    tree.ended.set()
    tree.join()
    for left in tree.seen:  # Flower's engine leaves processes behind
        with contextlib.suppress(psutil.NoSuchProcess):
            left.send_signal(signal.SIGKILL)
    figures["cpu_s"] = max(sum(tree.cpu.values()), usage.ru_utime + usage.ru_stime)
    return {
        **{k: round(v, 4) for k, v in figures.items()},
        "peak_mib": round(sum(tree.mib.values())),
    }


def contest(work: str, names: list[str], seeds: list[int]) -> list[dict]:
    title, target, flags = WORKS[work]
    rows = [{"work": title, "target": target, "name": name, "runs": []} for name in names]
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        ours = [
            sys.executable,
            str(round_time.ROOT / "federated_learning.py"),
            *flags.split(),
            "--rounds",
            "500",
            "--target-accuracy",
            str(target),
            "--cache",
            str(round_time.ROOT / ".cache"),
        ]
        for seed in seeds:
            file = export(flags, seed, folder)
            for row in rows:
                command = [*ours, "--seed", str(seed)]
                if row["name"] != "ours":
                    script = (
                        round_time.ROOT / "benchmarks" / "peers" / round_time.PEERS[row["name"]]
                    )
                    python = str(round_time.peer_python(row["name"]))
                    command = [python, str(script), str(file), "--target", str(target)]
                figures = run(command, folder)
                if figures.get("accuracy", 0) < target:
                    figures["reached"] = False
                row["runs"].append({"seed": seed, **figures})
                print(f"{work} seed {seed} {row['name']}: {figures}", file=sys.stderr, flush=True)
    return rows


def table(rows: list[dict]) -> str:
    """The rows as Markdown, the fastest of a work first."""
    names = [
        "work",
        "contender",
        "s to the target, by seed",
        "s, median",
        "× ours",
        "s to the end",
        "rounds",
        "CPU-s",
        "peak MiB",
    ]
    lines = [f"| {' | '.join(names)} |", "| --- " * len(names) + "|"]

    def median(row, figure):
        return statistics.median(
            one[figure] if one.get("reached", True) else float("inf") for one in row["runs"]
        )

    for work in dict.fromkeys(row["work"] for row in rows):
        same = sorted(
            (row for row in rows if row["work"] == work), key=lambda row: median(row, "target_s")
        )
        own = next(median(row, "target_s") for row in same if row["name"] == "ours")
        for row in same:
            times = ", ".join(
                f"{one['target_s']:.1f}" if one.get("reached", True) else f"not in {LIMIT}"
                for one in row["runs"]
            )
            rounds = ", ".join(str(one.get("rounds", "none")) for one in row["runs"])
            s, end = (median(row, name) for name in ("target_s", "total_s"))
            median_s = (
                f"{s:.1f} | {s / own:.2f} | {end:.1f}"
                if s < LIMIT
                else f"> {LIMIT} | > {LIMIT / own:.1f} | –"
            )
            lines.append(
                f"| {work}, to {row['target']:.1%} | {row['name']} | {times} | {median_s} | "
                f"{rounds} | {statistics.median(one['cpu_s'] for one in row['runs']):.0f} | "
                f"{statistics.median(one['peak_mib'] for one in row['runs']):,.0f} |"
            )
    return "\n".join(lines)


def main() -> None:
    names = ["ours", *round_time.PEERS]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--works", nargs="+", choices=WORKS, default=list(WORKS))
    parser.add_argument("--contenders", nargs="+", choices=names, default=names)
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    options = parser.parse_args()
    missing = [
        n for n in options.contenders if n != "ours" and not round_time.peer_python(n).exists()
    ]
    if missing:
        raise SystemExit(
            f"{', '.join(missing)} not installed; first: python benchmarks/peers.py --install"
        )
    rows = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    for work in options.works:
        measured = contest(work, options.contenders, options.seeds)
        rows = [row for row in rows if row["work"] != WORKS[work][0]] + measured
        if options.contenders == names:
            RESULTS.write_text(json.dumps({**made_by(), "rows": rows}, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
