"""Every algorithm at its own best: rates tuned on held-out images with one budget for all, then
tested on new seeds.

    python benchmarks/algorithms.py                          # every budget; results/algorithms.json
    python benchmarks/algorithms.py --budgets mlp-5          # one of them

The rates of a row's grid are tried on 10,000 held-out training images, of other data on a sixth
(seed 0), and beyond the grid where its end is the best; the best is tested with seeds 1 to 3, and
compared with FedAvg's by a paired t-test over those seeds. What is in runs/algorithms is not run
again.
"""

import contextlib
import io
import itertools
import json
import sys
import textwrap

from results import ROOT, arguments, dagger, made_by, mean_sd, parse, read, write

# isort: split
import federated_learning as fl
from harness.comparing.significance import SIGNIFICANT, Difference, compare_outcomes

import numpy as np
from once import folder_of, num_held_out

SEEDS = (1, 2, 3)
BUDGETS = {
    "mlp-5": "--model mlp --rounds 5",
    "mlp-50": "--model mlp --rounds 50 --local-epochs 1",
    "small-cnn-5": "--model small-cnn --rounds 5 --local-epochs 1 --batch-size 32",
}
PLAIN = {"client_lr": (0.05, 0.1, 0.2, 0.4)}
ADAPTIVE = {"client_lr": (0.05, 0.2), "server_lr": (0.003, 0.01, 0.03, 0.1)}
GRIDS = {
    "fedavg": PLAIN,
    "fedprox": {**PLAIN, "prox_mu": (0.001, 0.01)},
    "fedavgm": {
        "client_lr": (0.05, 0.2),
        "server_lr": (0.1, 0.3, 1.0),
        "server_momentum": (0.5, 0.9),
    },
    "fedadagrad": {"client_lr": (0.05, 0.2), "server_lr": (0.01, 0.03, 0.1, 0.3)},
    "fedadam": ADAPTIVE,
    "fedyogi": ADAPTIVE,
    "fednova": PLAIN,
    "scaffold": PLAIN,
    "feddyn": {"client_lr": (0.05, 0.1, 0.2, 0.4), "dyn_alpha": (0.001, 0.01)},
    "mimelite": {"client_lr": (0.0005, 0.002, 0.01, 0.05, 0.2), "server_momentum": (0.0, 0.9)},
    "fedsgd": {"client_lr": (0.1, 0.2, 0.5, 1.0)},
}


def accuracy(
    budget: str, algorithm: str, rates: dict[str, float], seed: int, holdout: int
) -> float:
    """Final accuracy of a run, in percent; read from its folder where that is there."""
    words = [f"{value:g}" for value in rates.values()]
    name = "-".join([budget, algorithm, *words, f"seed{seed}", *(["held-out"] if holdout else [])])
    # fedsgd has a step a round, on the whole shard
    defined = fl.choices.ALGORITHMS[algorithm].required
    config = fl.parse(BUDGETS[budget]).replace(
        algorithm=algorithm, seed=seed, holdout=holdout, **rates, **defined
    )
    folder = folder_of("algorithms", name, config)
    metrics = folder / "metrics.json"
    if not metrics.exists():
        place = {"runs": str(folder.parent), "name": folder.name, "cache": str(ROOT / ".cache")}
        resumed = {"resume": str(folder), "accept_changes": True} if folder.exists() else {}
        with contextlib.redirect_stdout(io.StringIO()):
            fl.run(config.replace(**place, **resumed))
    return 100 * json.loads(metrics.read_text())["test_accuracy"]


def search(
    budget: str, algorithm: str, grid: dict[str, tuple[float, ...]]
) -> list[tuple[float, dict[str, float]]]:
    """(held-out accuracy, rates) of all that is tried, the best first.

    A best at an end of its learning rates has twice that rate, or half of it, tried too, until it
    is no end any more.
    """
    found: list[tuple[float, dict[str, float]]] = []
    waiting = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    while waiting:
        found += [
            (accuracy(budget, algorithm, rates, 0, num_held_out()), rates) for rates in waiting
        ]
        found.sort(key=lambda one: -one[0])
        best = found[0][1]
        tried = [rates for _, rates in found]
        waiting = []
        for name in (name for name in grid if name.endswith("_lr")):
            for end, factor in ((max, 2), (min, 0.5)):
                further = {**best, name: factor * best[name]}
                if best[name] == end(rates[name] for rates in tried) and further not in tried:
                    waiting.append(further)
    return found


def contest(budget: str) -> dict:
    rows = []
    for algorithm, grid in GRIDS.items():
        found = search(budget, algorithm, grid)
        best = found[0][1]
        tests = [accuracy(budget, algorithm, best, seed, 0) for seed in SEEDS]
        rows.append({"algorithm": algorithm, "tried": len(found), "rates": best, "tests": tests})
        print(budget, rows[-1], file=sys.stderr, flush=True)
    return {"budget": budget, "flags": BUDGETS[budget], **made_by(), "rows": rows}


def compare(result: dict) -> dict[str, Difference]:
    """algorithm -> how far it is from FedAvg, in points, tested over all of the budget."""
    return compare_outcomes({row["algorithm"]: row["tests"] for row in result["rows"]}, "fedavg")


def verdict(result: dict) -> str:
    """Which rows of a budget its seeds tell from FedAvg, in a sentence: by Holm's p."""
    kinds: dict[str, list[str]] = {"above": [], "below": [], "not told from": []}
    for name, found in compare(result).items():
        is_told = found.adjusted_p < SIGNIFICANT
        kind = ("above" if found.mean > 0 else "below") if is_told else "not told from"
        kinds[kind].append(name)
    parts = [f"{kind} FedAvg: {', '.join(names) or 'none'}" for kind, names in kinds.items()]
    return "\n".join(
        textwrap.wrap(f"- `{result['flags']}`: {'; '.join(parts)}.", 124, subsequent_indent="  ")
    )


def table(results: list[dict]) -> str:
    """The budgets as Markdown, the best row first, and which rows are told from FedAvg."""
    names = [
        "budget",
        "algorithm",
        "rates tried",
        "the best",
        f"test accuracy (%), seeds {SEEDS[0]} to {SEEDS[-1]}",
        "difference from FedAvg (points)",
        "detectable with power 0.8",
        "p (Holm)",
    ]
    lines = [f"| {' | '.join(names)} |", "| --- " * len(names) + "|"]
    for result in results:
        differences = compare(result)
        for row in sorted(result["rows"], key=lambda row: -np.mean(row["tests"])):
            rates = ", ".join(f"{name} {value:g}" for name, value in row["rates"].items())
            found = differences.get(row["algorithm"])
            tested = "– | – | –"
            if found and np.isnan(found.detectable):
                tested = "the same in each seed | – | –"
            elif found:
                p = f"{found.p:.2g} ({found.adjusted_p:.2g})"
                tested = f"{found.mean:+.2f} | {found.detectable:.2f} | {p}"
            lines.append(
                f"| `{result['flags']}`{dagger(result)} | {row['algorithm']} | {row['tried']} | "
                f"{rates} | {mean_sd(row['tests'])} | {tested} |"
            )
    return "\n".join([*lines, "", *map(verdict, results)])


def main() -> None:
    parser = arguments(__doc__, takes_data=True)
    parser.add_argument("--budgets", nargs="+", choices=BUDGETS, default=list(BUDGETS))
    options = parse(parser)
    earlier = read("algorithms").get("results", [])
    found = {result["budget"]: result for result in earlier}
    for budget in options.budgets:
        found[budget] = contest(budget)
        results = [found[name] for name in BUDGETS if name in found]
        write("algorithms", {"results": results})
    print(table(results))


if __name__ == "__main__":
    main()
