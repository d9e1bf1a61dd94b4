"""A round of FedAvg by us and by what a user would pick instead: the same work, in the same run.

    # each peer's own pinned environment, in .peers (12 GB, ten minutes)
    python benchmarks/peers.py --install
    # 9 rounds each, interleaved; writes results/peers.json
    python benchmarks/peers.py

Every peer trains the same 784-128-10 network from the same initial weights on the same split with
the same batch and rate (round_time.py exports them). Their test accuracies must agree to a point
before a time counts.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import round_time
from machine import made_by

REQUIREMENTS = round_time.ROOT / "benchmarks" / "peers" / "requirements"
RESULTS = round_time.ROOT / "benchmarks" / "results" / "peers.json"
PYTHON = {"blazefl": "python3.13"}  # where a peer wants a newer one than TFF
CONTENDERS = ["ours", "floor", *round_time.PEERS]


def install() -> None:
    """Makes .peers/<name> from requirements/<name>.txt, where it is not there."""
    for pins in sorted(REQUIREMENTS.glob("*.txt")):
        environment = round_time.ROOT / ".peers" / pins.stem
        if not environment.exists():
            print(f"installing {pins.stem}", flush=True)
            subprocess.run(
                [PYTHON.get(pins.stem, sys.executable), "-m", "venv", environment], check=True
            )
            pip = [
                environment / "bin" / "pip",
                "--disable-pip-version-check",
                "install",
                "--quiet",
                "--no-deps",
            ]
            subprocess.run([*pip, "-r", pins], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--install", action="store_true", help="make the peers' environments, and measure nothing"
    )
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    if options.install:
        return install()
    missing = [name for name in round_time.PEERS if not round_time.peer_python(name).exists()]
    if missing:
        raise SystemExit(
            f"{', '.join(missing)} not installed; first: python {Path(__file__).name} --install"
        )
    rows = round_time.measure("mlp", CONTENDERS, options.rounds)
    RESULTS.write_text(json.dumps({**made_by(), "rows": rows}, indent=1) + "\n")
    print(round_time.table(rows))


if __name__ == "__main__":
    main()
