"""Flower's niid_bench on MNIST and ours: the same splits, image for image, with fewer local epochs
in all.

    # all splits and rows; results/niid_bench.json
    python benchmarks/niid_bench.py
    # some of them
    python benchmarks/niid_bench.py --splits two-labels one-label
    # its own 50 rounds of 10 epochs: a quarter of an hour a run
    python benchmarks/niid_bench.py --rows "fedavg, as Flower's"

Flower's baseline does 50 rounds of 10 local epochs over 10 clients; ours 10 rounds of 3, or what
EXTRA says: five algorithms with its network (lenet), and one step a round with Adam on the
server. Flower prints the best of all rounds; results has that and the
last. A run in runs/niid_bench is read, one that was stopped goes on.
"""

import sys

from results import arguments, dagger, faults, made_by, mean_sd, parse, read, write

# isort: split
import federated_learning as fl
from harness.reporting.results import describe_partition
from harness.storage.files import to_json

import numpy as np
from once import commits, folder_of, once
from published import published

SEEDS = (0, 1, 2)
SPLITS = {  # the flags of Flower's splits
    "iid": "--partition iid",
    "dirichlet": "--partition capped-dirichlet --alpha 0.5 --min-images 10",
    "two-labels": "--partition random-labels --labels-per-client 2",
    "one-label": "--partition random-labels --labels-per-client 1",
}
# of its one split; its runs differ by their initial weights and the order of the batches
FLOWERS_SEED = 42
PRINTED = ("FedAvg", "SCAFFOLD", "FedProx", "FedNova")
LENET = "--model lenet --client-lr 0.1 --algorithm"
# Flower's own settings, without SCAFFOLD, which refuses momentum
FLOWERS = (
    "--model lenet --client-optimizer momentum --client-lr 0.01 --weight-decay 1e-5 --algorithm"
)
ROWS = {
    "fedavg": f"{LENET} fedavg",
    "fedprox": f"{LENET} fedprox --prox-mu 0.01",
    "scaffold": f"{LENET} scaffold",
    "fednova": f"{LENET} fednova",
    "feddyn": f"{LENET} feddyn --dyn-alpha 0.01",
    "fedadam, one step": "--model lenet --client-lr 1 --server-lr 0.02 --algorithm fedadam",
    "fedavg, as Flower's": f"{FLOWERS} fedavg",
    "fedprox, as Flower's": f"{FLOWERS} fedprox --prox-mu 0.01",
    "fednova, as Flower's": f"{FLOWERS} fednova",
}
AS_FLOWERS = [name for name in ROWS if name.endswith("as Flower's")]
OURS = "--rounds 10 --local-epochs 3 --batch-size 32"
# Few local steps between two means: with one label a client forgets all others within some ten of
# them.
TWO_LABELS = "--rounds 50 --local-epochs 1"
ONE_LABEL = "--rounds 30 --local-epochs 1 --batch-size 600"
ONE_STEP = "--rounds 100 --local-epochs 1 --batch-size 0"
EXTRA = {
    **{("two-labels", name): TWO_LABELS for name in ROWS},
    ("two-labels", "scaffold"): f"{TWO_LABELS} --client-lr 0.02",
    **{("one-label", name): ONE_LABEL for name in ROWS},
    **{(split, "fedadam, one step"): ONE_STEP for split in SPLITS},
    **{
        (split, name): "--rounds 50 --local-epochs 10 --batch-size 64"
        for split in SPLITS
        for name in AS_FLOWERS
    },
}


def split_flags(split: str) -> str:
    """The flags by which a run has Flower's very split, whatever its own seed: that of a
    partition.json."""
    drawn_by = f"{SPLITS[split]} --seed {FLOWERS_SEED}"
    path = folder_of("niid_bench", f"split-{split}", drawn_by).with_suffix(".json")
    if not path.exists():
        config = fl.parse(drawn_by)
        dataset = fl.load_dataset(config.data)
        experiment = fl.build_experiment(config, dataset)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(to_json(describe_partition(experiment)))
    return f"--partition-file {path}"


def cell(tests: list[float]) -> str:
    """Mean ± sd, or what one seed gave; says how many seeds there are, if not those of SEEDS."""
    number = {len(SEEDS): "", 1: ", one seed"}
    return mean_sd(tests) + number.get(len(tests), f", {len(tests)} seeds")


def table_of(names: list[str], found: dict[tuple[str, str], dict]) -> list[str]:
    """The lines of a table of these rows of ours, a column each, by split."""
    lines = [f"| {' | '.join(['split', *names])} |", "| --- " * (1 + len(names)) + "|"]
    for split in SPLITS:
        cells = []
        for name in names:
            row = found.get((split, name))
            best = f" (best {cell(row['best'])})" if row and "best" in row else ""
            cells.append(f"{cell(row['tests'])}{best}{dagger(row)}" if row else "not run")
        lines.append(f"| {split} | {' | '.join(cells)} |")
    return lines


def table(rows: list[dict]) -> str:
    """Flower's four rows as it prints them, then ours after the last round, and as Flower counts,
    in the best."""
    found = {(row["split"], row["row"]): row for row in rows}
    theirs = published()
    names = ["split", *(f"Flower, {name}" for name in PRINTED)]
    lines = [f"| {' | '.join(names)} |", "| --- " * len(names) + "|"]
    for split in SPLITS:
        figures = [theirs[f"flower {split} {name}"] for name in PRINTED]
        cells = [f"{figure['mean']:.2f} ± {figure['spread']:.2f}" for figure in figures]
        lines.append(f"| {split} | {' | '.join(cells)} |")
    for split in SPLITS:
        cells = [f"{theirs[f'earlier flower {split} {name}']['mean']:.1f}" for name in PRINTED]
        lines.append(f"| {split}, earlier, one run | {' | '.join(cells)} |")
    as_flowers = [name for name in AS_FLOWERS if any((split, name) in found for split in SPLITS)]
    lines += ["", *table_of([name for name in ROWS if name not in AS_FLOWERS], found)]
    lines += ["", *table_of(as_flowers, found)]
    return "\n".join([*lines, "", above(found)])


def above(found: dict[tuple[str, str], dict]) -> str:
    """Where our best row is above each of Flower's cells, both counted by the best round, and where
    it is not. A row of one seed says too little for that, and is named as such."""
    theirs = published()
    said = []
    for split in SPLITS:
        ours = {
            name: np.mean(row["best"])
            for (where, name), row in found.items()
            if where == split and len(row.get("best", [])) > 1
        }
        if ours:
            highest = max(
                theirs[f"{edition}flower {split} {name}"]["mean"]
                for edition in ("", "earlier ")
                for name in PRINTED
            )
            name = max(ours, key=ours.get)
            which = "above" if ours[name] > highest else "not above"
            single = {
                row: run["best"][0]
                for (where, row), run in found.items()
                if where == split and len(run.get("best", [])) == 1
            }
            more = [
                f" ({row}: {best:.2f} with the only seed run)"
                for row, best in single.items()
                if best > ours[name]
            ]
            said.append(f"{split}: {name} {ours[name]:.2f}, {which} {highest:.2f}{''.join(more)}")
    return (
        "Our best row of three seeds, of those whose best round is recorded, against Flower's "
        "highest cell, by the best round of each: "
        f"{'; '.join(said)}."
    )


def flags_of(split: str, name: str) -> str:
    """The flags of a row of ours, on the split that these draw with Flower's seed."""
    return f"{SPLITS[split]} {ROWS[name]} {OURS} {EXTRA.get((split, name), '')}".strip()


def run_row(split: str, name: str, seeds: list[int]) -> dict:
    """A row of ours by these seeds: accuracies in percent after the last and in the best round."""
    flags = flags_of(split, name)
    folder = f"{split}-{name.replace(',', '').replace(' ', '-')}"
    given = split_flags(split) + flags.removeprefix(SPLITS[split])
    runs = [once("niid_bench", f"{folder}-seed{seed}", f"{given} --seed {seed}") for seed in seeds]
    rounds = [[record["test_accuracy"] for record in metrics["rounds"]] for metrics in runs]
    return {
        "split": split,
        "row": name,
        "flags": flags,
        "seed_of_split": FLOWERS_SEED,
        "seeds": seeds,
        "tests": [100 * metrics["test_accuracy"] for metrics in runs],
        "best": [100 * max(accuracies) for accuracies in rounds],
        **made_by(),
        "commits": commits(runs),
    }


def with_earlier(made: dict, earlier: list[dict]) -> dict:
    """A row with the other seeds of those in the results, if they are of the same experiment, by
    an equivalent program on the same machine.
    """
    rows = [row for row in earlier if is_same(row, made) and not faults([row, made])]
    by_seed = {
        seed: (test, best)
        for row in [*rows, made]
        for seed, test, best in zip(row["seeds"], row["tests"], row["best"], strict=True)
    }
    seeds = sorted(by_seed)
    return made | {
        "seeds": seeds,
        "tests": [by_seed[seed][0] for seed in seeds],
        "best": [by_seed[seed][1] for seed in seeds],
        "commits": sorted({commit for row in [*rows, made] for commit in row["commits"]}),
    }


def is_same(row: dict, other: dict) -> bool:
    """Whether two rows are of one experiment, however its flags are written."""
    has_same_flags = fl.parse(row["flags"]) == fl.parse(other["flags"])
    return has_same_flags and row["seed_of_split"] == other["seed_of_split"]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--splits", nargs="+", choices=SPLITS, default=list(SPLITS))
    parser.add_argument(
        "--rows", nargs="+", choices=ROWS, default=[row for row in ROWS if "as Flower" not in row]
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    options = parse(parser)
    rows = read("niid_bench").get("rows", [])
    for split in options.splits:
        for name in options.rows:
            made = run_row(split, name, options.seeds)
            same = [row for row in rows if (row["split"], row["row"]) == (split, name)]
            rows = [row for row in rows if row not in same] + [with_earlier(made, same)]
            print(rows[-1], file=sys.stderr, flush=True)
            write("niid_bench", {"rows": rows})
    print(table(rows))


if __name__ == "__main__":
    main()
