"""How skewed each partition is: on MNIST's labels, with 10 and 100 clients, by three seeds.

    python benchmarks/skew.py    # results/skew.json, a minute

Each figure is the mean over the seeds: the clients' distance to the pooled labels (total variation,
0 to 1), their effective number of labels (the exponential of the entropy, 1 to 10), and the Gini
coefficient of their sizes (0: all equal).
"""

from results import arguments, data_name, made_by, parse, write

# isort: split
import federated_learning as fl
from harness.reporting.results import skew

import numpy as np

SEEDS = (0, 1, 2)
CLIENTS = (10, 100)
PARTITIONS = {  # flags: whose it is
    "iid": "",
    "shards": "McMahan et al. 2017",
    "dirichlet": "Yurochkin et al. 2019",
    "dirichlet --alpha 0.1": "the same",
    "capped-dirichlet": "NIID-Bench's code (Li et al. 2022)",
    "client-dirichlet": "Hsu et al. 2019; FedDyn",
    "labels-per-client": "this project; equally many holders per label",
    "random-labels": "NIID-Bench's code",
    "lognormal-labels": "FedProx's code (Li et al. 2020), with 1,000 clients",
    "quantity": "this project; a power law",
    "dirichlet-quantity": "NIID-Bench's code",
    "feature": "this project, labels IID; noise only: Li et al. 2022",
}
FIGURES = {
    "mean_total_variation": "distance",
    "effective_classes": "labels",
    "size_gini": "Gini",
}


def measure(flags: str, clients: int, dataset: fl.Dataset) -> dict[str, float]:
    """The mean of each figure over the seeds."""
    config = fl.parse(f"--partition {flags} --num-clients {clients}")
    skews = [skew(fl.make_partition(dataset, config.replace(seed=seed)).counts) for seed in SEEDS]
    return {name: float(np.mean([skew[name] for skew in skews])) for name in FIGURES}


def table(rows: list[dict]) -> str:
    """The rows as Markdown."""
    names = [f"{name}, K = {clients}" for clients in CLIENTS for name in FIGURES.values()]
    lines = [f"| `--partition` | source | {' | '.join(names)} |", "| --- " * (2 + len(names)) + "|"]
    for row in rows:
        cells = [
            f"{row[str(clients)][name]:.{1 if name == 'effective_classes' else 2}f}"
            for clients in CLIENTS
            for name in FIGURES
        ]
        lines.append(f"| `{row['flags']}` | {row['whose']} | {' | '.join(cells)} |")
    data = data_name() or "MNIST"
    note = f"({data}, means of seeds 0 to 2; `python benchmarks/skew.py` makes this table.)"
    return "\n".join([*lines, "", note])


def main() -> None:
    parse(arguments(__doc__, takes_data=True))
    config = fl.Config()
    dataset = fl.load_dataset(config.with_absolute_paths().data)
    rows = [
        {"flags": flags, "whose": whose}
        | {str(clients): measure(flags, clients, dataset) for clients in CLIENTS}
        for flags, whose in PARTITIONS.items()
    ]
    write("skew", {**made_by(), "rows": rows})
    print(table(rows))


if __name__ == "__main__":
    main()
