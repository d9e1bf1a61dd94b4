"""How the default's epochs and rate, and the preset `fast`, were chosen.

On 10,000 held-out training images, of other data a sixth; no test image looked at, three seeds.

    # both tables for the default network; results/tuning.json, half an hour
    python benchmarks/tuning.py
    # one of them, for another network
    python benchmarks/tuning.py --rates --models small-cnn

What this version has in runs/tuning is not run again.
"""

from results import arguments, dagger, made_by, mean_sd, parse, read, write

# isort: split
import federated_learning as fl
from variants.presets import PRESETS

import numpy as np
from once import num_held_out, once

SEEDS = (0, 1, 2)
MODEL = fl.Config().training.model
TRIED = {  # table -> the flags that it compares
    "rates": [  # around the default, one field at a time
        "--local-epochs 3 --client-lr 0.15",
        "--local-epochs 3 --client-lr 0.1",
        "--local-epochs 3 --client-lr 0.2",
        "--local-epochs 2 --client-lr 0.15",
    ],
    "optimizers": [  # the best of some thirty tried with seed 0
        "--client-optimizer momentum --local-epochs 2 --client-lr 0.02",
        PRESETS["fast"].flags,
        PRESETS["fast"].flags.replace("0.003", "0.005"),
        PRESETS["fast"].flags.replace("--client-schedule inverse-sqrt", ""),
    ],
}


def measure(model: str, flags: str, seed: int) -> dict:
    """metrics.json of the default run with `flags`, which is made where it is not there."""
    name = "-".join([model, *flags.replace("--", "").split(), f"seed{seed}"])
    flags = f"--model {model} {flags} --seed {seed} --holdout {num_held_out()}"
    return once("tuning", name, flags)


def make_row(table: str, model: str, flags: str) -> dict:
    """Held-out accuracies in percent after the first and the last round."""
    runs = [measure(model, flags, seed)["rounds"] for seed in SEEDS]
    return {
        "table": table,
        "model": model,
        "flags": flags,
        "last": [100 * rounds[-1]["test_accuracy"] for rounds in runs],
        "first": [100 * rounds[0]["test_accuracy"] for rounds in runs],
        **made_by(),
    }


def table(rows: list[dict]) -> str:
    """The rows as Markdown, a table each, the best first."""
    head = ["`--model`", "flags", "held-out accuracy", "after round 1"]
    tables = []
    for name in TRIED:
        lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
        chosen = [row for row in rows if row["table"] == name]
        if not chosen:
            continue
        for row in sorted(chosen, key=lambda row: (row["model"], -np.mean(row["last"]))):
            lines.append(
                f"| {row['model']}{dagger(row)} | `{row['flags']}` | {mean_sd(row['last'])} | "
                f"{np.mean(row['first']):.1f} |"
            )
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def main() -> None:
    parser = arguments(__doc__, takes_data=True)
    for name in TRIED:
        parser.add_argument(f"--{name}", action="append_const", dest="tables", const=name)
    parser.add_argument("--models", nargs="+", choices=fl.choices.MODELS, default=[MODEL])
    options = parse(parser)
    rows = read("tuning").get("rows", [])
    for name in options.tables or TRIED:
        for model in options.models:
            for flags in TRIED[name]:
                row = make_row(name, model, " ".join(flags.split()))
                same = (row["table"], row["model"], row["flags"])
                rows = [r for r in rows if (r["table"], r["model"], r["flags"]) != same] + [row]
                write("tuning", {"rows": rows})
    print(table(rows))


if __name__ == "__main__":
    main()
