"""Comparisons that are one command of the program each, three seeds: personal models, synchronous
and asynchronous rounds on a simulated clock, FedProx with stragglers.

    # about 40 minutes on 2 cores; finished runs in runs/ are kept
    python benchmarks/compared.py
    python benchmarks/compared.py personal --data ~/fashion-mnist
"""

import csv
import json
import os
import shlex
import subprocess
import sys

from results import ROOT, arguments, data_name, made_by, parse, read, write

CLIENTS = "--model mlp --num-clients 100 --clients-per-round 10 --seeds 3"
# Name -> flags, and the columns of summary.csv that the table shows.
COMPARISONS = {
    "personal": (
        "--compare fedavg,fedper,fedrep,ditto,apfl --fine-tune-epochs 1 --client-test 0.2 "
        f"--partition labels-per-client --rounds 50 {CLIENTS}",
        "mean,sd,own_images,personal,personal_sd,personal_worst10,personal_difference,"
        "personal_p_holm",
    ),
    "clock": (
        "--compare fedavg,fedavg(over_select=1.3),fedbuff(buffer_size=10),fedbuff(buffer_size=5) "
        "--device-speed lognormal:1 --bandwidth 1e6 --latency 0.1 "
        f"--target-accuracy 0.97 --rounds 1000 {CLIENTS}",
        "rounds_to_target,rounds_to_target_sd,seconds_to_target,megabytes_to_target,"
        "examples_to_target",
    ),
    "fedprox": (
        "--preset fedprox-mnist --compare drop_stragglers=True,False --compare prox_mu=0,1 "
        "--seeds 3",
        "mean,sd,difference,versus,p,p_holm,detectable",
    ),
}


def compare(name: str) -> dict:
    """The rows of a comparison's summary.csv, and where they are from."""
    flags, columns = COMPARISONS[name]
    folder_name = "-".join(filter(None, ["benchmark", name, data_name()]))
    shown_data = f" --data {shlex.quote(os.environ['FL_DATA'])}" if data_name() else ""
    command = [sys.executable, str(ROOT / "federated_learning.py"), *flags.split()]
    run = ["--name", folder_name, "--figures", "none", "--table-columns", columns, "--json"]
    done = subprocess.run([*command, *run], check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    # Of a name that another version or other data have, the program makes another folder.
    folder = ROOT / json.loads(done.stdout.splitlines()[-1])["folder"]
    with (folder / "summary.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {
        "command": f"python federated_learning.py {quote(flags)}{shown_data}",
        "rows": rows,
        "markdown": (folder / "summary.md").read_text().strip(),
        **made_by(),
    }


def quote(flags: str) -> str:
    """The flags with the list of --compare in quotes, where it has brackets."""
    words = [f'"{word}"' if "(" in word else word for word in flags.split()]
    return " ".join(words)


def table(results: dict, name: str) -> str:
    """A comparison's command and its table."""
    found = results[name]
    return f"```sh\n{found['command']}\n```\n\n{found['markdown']}\n\n({found['machine']}.)"


def main() -> None:
    parser = arguments(__doc__, takes_data=True)
    parser.add_argument("names", nargs="*", default=list(COMPARISONS), metavar="name")
    names = parse(parser).names
    for name in names:
        if name not in COMPARISONS:
            parser.error(f"{name!r} is not a comparison; choose from {', '.join(COMPARISONS)}")
    results = read("compared")
    for name in names:
        results[name] = compare(name)
        write("compared", results)
        print(table(results, name))


if __name__ == "__main__":
    main()
