"""McMahan et al. 2017, table 1, run again: rounds until the test accuracy is 97 % (2NN) or 99 %
(CNN).

    # rates, momenta, on 10,000 held-out training images; results/paper_rates.csv
    python benchmarks/paper.py --tune
    # the cells; results/paper.json, in two hours
    python benchmarks/paper.py
    python benchmarks/paper.py --cells 2nn-iid 2nn-noniid --seeds 0

Every run is a preset of the script in runs/paper. One that is there is read, one that was stopped
goes on.
"""

import csv
import sys
from operator import itemgetter
from typing import NamedTuple

import numpy as np
from once import commits, once
from published import published
from results import ROOT, arguments, dagger, made_by, mean_sd, parse, read, write

RATES = ROOT / "benchmarks" / "results" / "paper_rates.csv"


class Cell(NamedTuple):
    """`flags` of the run; the names of published figures, the paper's and others'; flags to choose
    from; seeds to run.

    `chosen_by` are the flags that the choice of the rate adds.
    """

    title: str
    flags: str
    paper: tuple[str, ...]
    elsewhere: str
    tries: tuple[str, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    chosen_by: str = ""


CNN_IID = ("mcmahan cnn-iid", "mcmahan cnn-iid, table 2")
MOMENTA = (
    "--algorithm fedavgm --server-momentum 0.5 --server-lr 1 --client-optimizer momentum "
    "--client-lr 0.02"
)


def client_lr(*rates: float) -> tuple[str, ...]:
    """Return the flags that try these rates of the clients."""
    return tuple(f"--client-lr {rate}" for rate in rates)


CELLS = {
    "2nn-iid": Cell(
        "2NN, IID, B = 10",
        "--preset mcmahan-2nn-iid",
        ("mcmahan 2nn-iid",),
        "fedlab 2nn-iid",
        client_lr(0.05, 0.1, 0.2, 0.3, 0.4),
    ),
    "2nn-noniid": Cell(
        "2NN, two shards, B = 10",
        "--preset mcmahan-2nn-noniid",
        ("mcmahan 2nn-noniid",),
        "fedlab 2nn-noniid",
        client_lr(0.05, 0.1, 0.2, 0.3),
    ),
    "2nn-iid-all": Cell(
        "2NN, IID, B = ∞",
        "--preset mcmahan-2nn-iid --batch-size 0 --client-lr 0.5",
        ("mcmahan 2nn-iid-all",),
        "fedlab 2nn-iid-all",
        client_lr(0.2, 0.5, 1.0),
    ),
    "2nn-noniid-all": Cell(
        "2NN, two shards, B = ∞",
        "--preset mcmahan-2nn-noniid --batch-size 0 --client-lr 0.5",
        ("mcmahan 2nn-noniid-all",),
        "fedlab 2nn-noniid-all",
        client_lr(0.2, 0.5, 1.0),
    ),
    "cnn-iid": Cell(
        "CNN, IID, B = 10",
        "--preset mcmahan-cnn-iid",
        CNN_IID,
        "flfedavgr cnn-iid",
        (
            *client_lr(
                0.1, 0.15, 0.2, 0.25
            ),  # the preset's is the best of these, as the paper's own choice was
            "--server-lr 1.5",
            "--server-lr 2",
            "--server-lr 2 --client-lr 0.1",
            "--weight-decay 5e-4",
            "--client-schedule cosine --lr-horizon 20",
            "--client-optimizer momentum --client-lr 0.02",
            "--algorithm fedavgm --server-momentum 0.5 --server-lr 1",
            MOMENTA,
        ),
        (0, 1, 2, 3, 4),
        # 99 % is out of reach on these images: the last ten rounds decide
        chosen_by="--target-accuracy 0 --rounds 20",
    ),
    "cnn-iid-momenta": Cell(  # the best of all that were tried there
        "CNN, IID, B = 10, with server and client momentum",
        f"--preset mcmahan-cnn-iid {MOMENTA}",
        CNN_IID,
        "",
        (),
        (0, 1, 2, 3, 4),
    ),
    "cnn-noniid": Cell(
        "CNN, two shards, B = 10",
        "--preset mcmahan-cnn-noniid",
        ("mcmahan cnn-noniid", "mcmahan cnn-noniid, table 2"),
        "",
        client_lr(0.1, 0.2),
        (0,),
        chosen_by="--rounds 12",  # four minutes a rate
    ),
}


def tune(names: list[str]) -> None:
    """Write what each choice comes to on held-out images, seed 0.

    The presets have the rate with the fewest rounds to the target, or where none gets there the
    best mean accuracy of the last ten rounds; within a round of it the lower.
    """
    with RATES.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["cell"] not in names]
    for name in names:
        for tried in CELLS[name].tries:
            flags = f"{CELLS[name].flags} {tried} --holdout 10000 --seed 0 {CELLS[name].chosen_by}"
            metrics = once(
                "paper", f"tune-{name}-{tried.replace('--', '').replace(' ', '-')}", flags
            )
            accuracies = [row["test_accuracy"] for row in metrics["rounds"]]
            rows.append(
                {
                    "cell": name,
                    "flags": tried,
                    "rounds_to_target": metrics["rounds_to_target"],
                    "best": max(accuracies),
                    "last_ten": round(np.mean(accuracies[-10:]), 5),
                }
            )
            print(rows[-1], flush=True)
    with RATES.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def measure(
    names: list[str], seeds: list[int] | None, earlier: dict[str, list[dict]]
) -> list[dict]:
    """Each cell with its runs, those of other seeds by the same flags from `earlier`."""
    rows = []
    for name in names:
        cell = CELLS[name]
        runs = [
            one
            for one in earlier.get(name, [])
            if seeds and one["seed"] not in seeds and one["flags"] == cell.flags
        ]
        for seed in seeds or cell.seeds:
            metrics = once("paper", f"{name}-seed{seed}", f"{cell.flags} --seed {seed}")
            runs.append(
                {
                    "seed": seed,
                    "flags": cell.flags,
                    "rounds": metrics["rounds_to_target"],
                    "seconds": metrics["seconds"],
                    "sha256": metrics["weights_sha256"],
                    "rate": metrics["config"]["client_lr"],
                    **made_by(),
                    "commits": commits([metrics]),
                }
            )
            print(f"{name}: {runs[-1]}", file=sys.stderr, flush=True)
        rows.append({"cell": name, "runs": sorted(runs, key=itemgetter("seed"))})
    return rows


def table(rows: list[dict]) -> str:
    """The cells as Markdown; one without a run says so."""
    lines = [
        "| cell | rate | paper | elsewhere | ours, rounds, mean ± sd | seeds | s a run |",
        "| --- " * 7 + "|",
    ]
    found = {row["cell"]: row["runs"] for row in rows}
    for name, cell in CELLS.items():
        runs = found.get(name, [])
        paper = ", ".join(f"{published()[figure]['mean']:,}" for figure in cell.paper)
        other = elsewhere(cell)
        if not runs:
            lines.append(f"| {cell.title} | – | {paper} | {other} | not run | – | – |")
            continue
        lines.append(
            f"| {cell.title}{dagger(runs)} | {runs[0]['rate']:g} | {paper} | {other} | "
            f"**{rounds_of(runs)}** | "
            f"{', '.join(str(one['seed']) for one in runs)} | {seconds_of(runs)} |"
        )
    return "\n".join([*lines, "", slower(found)])


def elsewhere(cell: Cell) -> str:
    """Another's published run of the cell, with how it differs: FedLab's has five local epochs
    where ours has one."""
    if not cell.elsewhere:
        return "–"
    figure = published()[cell.elsewhere]
    return (
        f"{figure['source']['repository'].partition('/')[2]} {figure['mean']:,} "
        f"({figure['differs']})"
    )


def seconds_of(runs: list[dict]) -> str:
    """The mean seconds of a run, on each machine by itself."""
    found = {}
    for one in runs:
        found.setdefault(one["machine"].partition(",")[0], []).append(one["seconds"])
    means = {machine: f"{np.mean(seconds):,.0f}" for machine, seconds in found.items()}
    if len(means) == 1:
        return next(iter(means.values()))
    return "; ".join(f"{mean} ({machine})" for machine, mean in means.items())


def rounds_of(runs: list[dict]) -> str:
    """Rounds to the target, mean ± sd over the runs' seeds."""
    rounds = [one["rounds"] for one in runs]
    if None in rounds:
        return "not reached"
    return mean_sd(rounds, 0)


def slower(found: dict[str, list[dict]]) -> str:
    """What takes more rounds than table 1 prints, in a sentence.

    The paper's are one run each, not to be tested.
    """
    said = []
    for name, runs in found.items():
        cell = CELLS[name]
        rounds = [one["rounds"] for one in runs]
        if None in rounds:
            said.append(f"{cell.title}, which does not always get there")
        elif np.mean(rounds) > published()[cell.paper[0]]["mean"]:
            figures = " and ".join(f"{published()[figure]['mean']:,}" for figure in cell.paper)
            each = ", ".join(f"{one:.1f}" for one in rounds)
            said.append(
                f"{cell.title}: {rounds_of(runs)} over {len(rounds)} seeds ({each}) for {figures}, "
                "one run each"
            )
    return f"More rounds than the paper: {'; '.join(said) or 'no cell'}."


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--tune", action="store_true", help="choose the rates, and measure nothing")
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS))
    parser.add_argument("--seeds", nargs="+", type=int)
    options = parse(parser)
    if options.tune:
        return tune(options.cells)
    earlier = read("paper").get("rows", [])
    rows = measure(options.cells, options.seeds, {row["cell"]: row["runs"] for row in earlier})
    kept = [row for row in earlier if row["cell"] not in options.cells]
    rows = sorted(kept + rows, key=lambda row: list(CELLS).index(row["cell"]))
    write("paper", {"rows": rows})
    print(table(rows))


if __name__ == "__main__":
    main()
