"""The default run and the preset `fast` with three seeds, side by side: README's first figures.

    python benchmarks/default_run.py                     # results/default_run.json, eight minutes
    python benchmarks/default_run.py --against COMMIT    # its rounds, and those of that commit

With --against the default run of both programs is made in turn, with each seed; results has it
under "against".
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from results import ROOT, arguments, made_by, mean_sd, parse, read, write

SEEDS = (0, 1, 2)
FLAGS = ("", " --preset fast")


def table(result: dict) -> str:
    """The runs as Markdown, with their means."""
    seeds = dict.fromkeys(str(run["seed"]) for run in result["runs"])
    head = f"command, seeds {', '.join(seeds)}"
    lines = [
        f"| {head} | test accuracy (%) | mean ± sd | after round 1 | median (s) |",
        "| --- " * 5 + "|",
    ]
    for flags in FLAGS:
        runs = [run for run in result["runs"] if run["flags"] == flags]
        last = [100 * run["test_accuracy"] for run in runs]
        first = np.mean([run["after_round_1"] for run in runs])
        seconds = np.median([run["seconds"] for run in runs])
        each = ", ".join(f"{accuracy:.2f}" for accuracy in last)
        score = f"**{mean_sd(last)}**"
        lines.append(
            f"| `federated_learning.py{flags}` | {each} | {score} | {100 * first:.1f} | "
            f"{seconds:.0f} |"
        )
    return "\n".join(
        [*lines, "", f"({result['machine']}; `python benchmarks/default_run.py` makes this table.)"]
    )


def measure(flags: str, seed: int, root: Path = ROOT) -> dict:
    """One run of the program in `root`: accuracies, and its time from the command to the prompt."""
    with tempfile.TemporaryDirectory() as folder:
        place = ["--runs", folder, "--name", "run", "--cache", str(root / ".cache")]
        words = [*flags.split(), "--seed", str(seed), *place]
        script = str(root / "federated_learning.py")
        began = time.perf_counter()
        subprocess.run([sys.executable, script, *words], check=True, cwd=folder)
        seconds = round(time.perf_counter() - began, 1)
        metrics = json.loads((Path(folder) / "run" / "metrics.json").read_text())
    rounds = metrics["rounds"]
    return {
        "flags": flags,
        "seed": seed,
        "test_accuracy": metrics["test_accuracy"],
        "weights_sha256": metrics["weights_sha256"],
        "after_round_1": rounds[0]["test_accuracy"],
        "seconds": seconds,
        "seconds_of_rounds": round(sum(record["seconds"] for record in rounds), 1),
    }


def compare(commit: str, seeds: list[int]) -> dict:
    """The default run here and at `commit`, in turn, and the ratio of their rounds' seconds."""
    with tempfile.TemporaryDirectory() as folder:
        other = Path(folder) / "program"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--detach", str(other), commit], check=True)
        try:
            ours = []
            theirs = []
            for seed in seeds:
                theirs.append(measure("", seed, other))
                ours.append(measure("", seed))
        finally:
            subprocess.run([*git, "remove", "--force", str(other)], check=True)
    spent = [sum(run["seconds_of_rounds"] for run in runs) for runs in (ours, theirs)]
    ratio = round(spent[0] / spent[1], 3)
    print(f"rounds of the default: {ratio} of those of {commit}")
    return {"commit": commit, "ratio_of_rounds": ratio, "ours": ours, "theirs": theirs}


def main() -> None:
    parser = arguments(__doc__, takes_data=True)
    parser.add_argument("--against", metavar="COMMIT", default="")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    options = parse(parser)
    result = read("default_run")
    if options.against:
        result["against"] = made_by() | compare(options.against, options.seeds)
    else:
        runs = [measure(flags, seed) for seed in options.seeds for flags in FLAGS]
        result |= {**made_by(), "runs": runs}
    if options.against or options.seeds == list(SEEDS):
        write("default_run", result)
    if not options.against:
        print(table(result))


if __name__ == "__main__":
    main()
