"""What attackers do to each aggregator: test accuracy after five rounds, mean ± sd over three
seeds.

    # about 12 minutes on 2 cores; what is in results/adversity.json is kept
    python benchmarks/adversity.py

Ten clients with the `mlp`, IID as robust rules assume, and in the default split, where honest
clients differ too.
"""

import itertools

from results import ROOT, arguments, current, dagger, made_by, mean_sd, parse, read, write

# isort: split
import federated_learning as fl

AGGREGATORS = ("mean", "median", "trimmed-mean", "krum", "clipping")
CASES = [(0, "none"), *((count, attack) for attack in fl.choices.ATTACKS for count in (1, 3))]
SEEDS = (0, 1, 2)
FLAGS = "--model mlp --local-epochs 1"


def outcome(
    partition: str, aggregator: str, byzantine: int, attack: str, seed: int
) -> tuple[float, float | None]:
    """Test accuracy after the last round and a backdoor's success, in percent."""
    attacked = {"byzantine": byzantine, "attack": attack} if byzantine else {}
    config = fl.parse(FLAGS).replace(
        partition=partition,
        aggregator=aggregator,
        seed=seed,
        cache=str(ROOT / ".cache"),
        **attacked,
    )
    experiment = fl.build_experiment(config)
    *_, (_, record, _) = fl.run_rounds(experiment)
    success = record.extra_accuracies.get("attack_success")
    return 100 * record.test_accuracy, None if success is None else 100 * success


def cell(row: dict) -> str:
    """Mean ± sd of the accuracies, and of a backdoor's success."""
    text = mean_sd(row["accuracies"], 1)
    if None not in row.get("successes", [None]):
        text += f"; {mean_sd(row['successes'], 0)}"
    return text + dagger(row)


def table(rows: list[dict]) -> str:
    """The rows as Markdown: a line an attack, a column an aggregator."""
    lines = [
        f"| split | attackers of 10 | {' | '.join(AGGREGATORS)} |",
        "| --- " * (2 + len(AGGREGATORS)) + "|",
    ]
    for partition in dict.fromkeys(row["partition"] for row in rows):
        for byzantine, attack in CASES:
            cells = [
                cell(row)
                for aggregator in AGGREGATORS
                for row in rows
                if (row["partition"], row["aggregator"], row["byzantine"], row["attack"])
                == (partition, aggregator, byzantine, attack)
            ]
            who = f"{byzantine}, {attack}" if byzantine else "0"
            lines.append(f"| {partition} | {who} | {' | '.join(cells)} |")
    return "\n".join(lines)


def place_of(row: dict) -> tuple:
    """What a row is about."""
    return row["partition"], row["byzantine"], row["attack"], row["aggregator"]


def main() -> None:
    parse(arguments(__doc__, takes_data=True))
    rows = read("adversity").get("rows", [])
    asked = {"flags": FLAGS, "seeds": list(SEEDS)}
    done = {place_of(row) for row in current(rows) if asked.items() <= row.items()}
    for partition, (byzantine, attack), aggregator in itertools.product(
        ("iid", "dirichlet"), CASES, AGGREGATORS
    ):
        row = {
            **asked,
            "partition": partition,
            "byzantine": byzantine,
            "attack": attack,
            "aggregator": aggregator,
        }
        if place_of(row) not in done:
            figures = [outcome(partition, aggregator, byzantine, attack, seed) for seed in SEEDS]
            row["accuracies"] = [round(accuracy, 2) for accuracy, _ in figures]
            row["successes"] = [success and round(success, 2) for _, success in figures]
            rows = [other for other in rows if place_of(other) != place_of(row)]
            rows.append({**row, **made_by()})
            print(rows[-1], flush=True)
            write("adversity", {"rows": rows})
    print(table(rows))


if __name__ == "__main__":
    main()
