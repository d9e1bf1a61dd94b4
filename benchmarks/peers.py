"""A round of FedAvg by us and by what a user would pick instead: the same work, in the same run.

    # each peer's own pinned environment, in .peers (12 GB, ten minutes)
    python benchmarks/peers.py --install
    # 9 rounds each, interleaved; writes results/peers.json
    python benchmarks/peers.py

Two works: a 784-128-10 network, and the default network with the default batch. Every peer trains
from the same initial weights on the same split with the same batch and rate (contenders.py exports
them). Their test accuracies must agree to a point before a time counts.
"""

import shutil
import subprocess
import sys

from results import ROOT, arguments, made_by, parse, write

# isort: split
import round_time
from contenders import PEERS, check_installed

REQUIREMENTS = ROOT / "benchmarks" / "peers" / "requirements"
PYTHON = {"blazefl": "python3.13"}  # where a peer wants a newer one than TFF
CONTENDERS = ["ours", "floor", *PEERS]


def install() -> None:
    """Makes .peers/<name> from requirements/<name>.txt, where it is not there."""
    for pins in sorted(REQUIREMENTS.glob("*.txt")):
        environment = ROOT / ".peers" / pins.stem
        if not environment.exists():
            print(f"installing {pins.stem}", flush=True)
            python = PYTHON.get(pins.stem, sys.executable)
            if shutil.which(python) is None:
                raise SystemExit(f"{pins.stem} needs {python} on the PATH; install it")
            subprocess.run([python, "-m", "venv", environment], check=True)
            pip = [
                environment / "bin" / "pip",
                "--disable-pip-version-check",
                "install",
                "--quiet",
                "--no-deps",
            ]
            subprocess.run([*pip, "-r", pins], check=True)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument(
        "--install", action="store_true", help="make the peers' environments, and measure nothing"
    )
    parser.add_argument("--rounds", type=int, default=9)
    options = parse(parser)
    if options.install:
        return install()
    check_installed(CONTENDERS)
    rows = []
    for work in ("mlp", "lean-cnn"):
        rows += round_time.measure(work, CONTENDERS, options.rounds)
    write("peers", {**made_by(), "rows": rows})
    print(round_time.table(rows))


if __name__ == "__main__":
    main()
