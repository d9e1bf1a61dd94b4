"""From the command to a test accuracy, start-up and evaluation of every round included: us and what
a user would pick.

    # once; the newer Python is for BlazeFL
    PATH=…/python3.13/bin:$PATH python benchmarks/peers.py --install
    # every work and peer, 3 seeds, 50 minutes
    python benchmarks/time_to_target.py
    # printed, not kept: all rows of a work are of one session
    python benchmarks/time_to_target.py --works 2nn --contenders ours fedjax

Writes results/time_to_target.json. All contenders have the split, initial weights, batch, rate and
epochs of our run with that seed, and sample clients by their own means. They run interleaved: seed
by seed, each as a process of its own.
"""

import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from results import ROOT, arguments, made_by, parse, read, write

# isort: split
import federated_learning as fl

from contenders import OURS, PEERS, Tree, check_installed, command_of, environment, export

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
    "default": ("the default run: 10 clients, Dirichlet(0.5), lean-cnn, rate 0.15", 0.985, ""),
}
TOO_SLOW = ("default", "floor-jax")  # it takes 7.8 s for a round of a sixth of the images
LIMIT = 180  # seconds, after which a contender is ended


def follow(tree: Tree, ended: threading.Event) -> None:
    """Look at a process and its children four times a second."""
    while not ended.wait(0.25):
        tree.look()


def run(command: list[str], folder: Path, target: float) -> dict:
    """Seconds to the line of the last round and to the end of the process, rounds, accuracy, CPU
    and memory.

    Ends the program if the contender fails.
    """
    began = time.perf_counter()
    with (folder / "errors.txt").open("w") as errors:
        process = subprocess.Popen(
            command,
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
            env=environment(),
        )
    tree = Tree(process.pid)
    ended = threading.Event()
    watcher = threading.Thread(target=follow, args=(tree, ended), daemon=True)
    figures = {}
    watcher.start()
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
    _, status, usage = os.wait4(process.pid, 0)
    figures["total_s"] = time.perf_counter() - began
    limit.cancel()
    ended.set()
    watcher.join()
    tree.kill()
    has_failed = status and figures["total_s"] < LIMIT and figures.get("accuracy", 0) < target
    if has_failed:  # which is something else than not to get there in time
        said = (folder / "errors.txt").read_text()[-2000:]
        raise SystemExit(f"{' '.join(command)} ended with status {status}:\n{said}")
    figures["cpu_s"] = max(sum(tree.cpu.values()), usage.ru_utime + usage.ru_stime)
    return {
        **{k: round(v, 4) for k, v in figures.items()},
        "peak_mib": round(sum(tree.mib.values())),
    }


def contest(work: str, names: list[str], seeds: list[int]) -> list[dict]:
    title, target, flags = WORKS[work]
    rows = [
        {"work": title, "target": target, "name": name, "runs": [], **made_by()} for name in names
    ]
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        more = f"--rounds 500 --target-accuracy {target} --cache {ROOT / '.cache'}"
        for seed in seeds:
            with_seed = f"{flags} --seed {seed}"
            file = export(fl.build_experiment(fl.parse(with_seed)), folder / f"work-{seed}.npz")
            for row in rows:
                command = [*OURS, *with_seed.split(), *more.split()]
                if row["name"] != "ours":
                    command = command_of(row["name"], file, "--target", str(target))
                figures = run(command, folder, target)
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
        ours = (median(row, "target_s") for row in same if row["name"] == "ours")
        own = next(ours, float("nan"))
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
    names = ["ours", *PEERS]
    parser = arguments(__doc__)
    parser.add_argument("--works", nargs="+", choices=WORKS, default=list(WORKS))
    parser.add_argument("--contenders", nargs="+", choices=names, default=names)
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    options = parse(parser)
    check_installed(options.contenders)
    is_whole = options.seeds == list(SEEDS) and options.contenders == names
    rows = read("time_to_target").get("rows", []) if is_whole else []
    for work in options.works:
        contenders = [name for name in options.contenders if (work, name) != TOO_SLOW]
        measured = contest(work, contenders, options.seeds)
        titles = {row["work"] for row in measured}
        rows = [row for row in rows if row["work"] not in titles] + measured
        if is_whole:  # all rows of a work are of one session
            write("time_to_target", {"rows": rows})
    print(table(rows))


if __name__ == "__main__":
    main()
