"""A round of FedAvg by us and by what a user would pick instead: the same work, in the same run.

    # each peer's own pinned environment, in .peers (12 GB, ten minutes)
    python benchmarks/peers.py --install
    # 15 rounds each, interleaved; writes results/peers.json
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
    """Makes .peers/<name> from requirements/<name>.txt, where it is not there.

    One that needs a Python which this machine lacks is named at the end.
    """
    lacking = []
    for pins in sorted(REQUIREMENTS.glob("*.txt")):
        environment = ROOT / ".peers" / pins.stem
        if environment.exists():
            continue
        python = PYTHON.get(pins.stem, sys.executable)
        if shutil.which(python) is None:
            lacking.append(f"{pins.stem} needs {python} on the PATH")
            continue
        print(f"installing {pins.stem}", flush=True)
        try:
            subprocess.run([python, "-m", "venv", environment], check=True)
            pip = [environment / "bin" / "pip", "--disable-pip-version-check", "install"]
            subprocess.run([*pip, "--quiet", "--no-deps", "-r", pins], check=True)
        except BaseException:
            shutil.rmtree(environment, ignore_errors=True)  # half of one counts as none
            raise
    if lacking:
        raise SystemExit(f"{'; '.join(lacking)}; install that Python, and run this again")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument(
        "--install", action="store_true", help="make the peers' environments, and measure nothing"
    )
    parser.add_argument("--rounds", type=int, default=round_time.ROUNDS)
    options = parse(parser)
    if options.install:
        return install()
    check_installed(CONTENDERS)
    rows = []
    for work in ("mlp", "lean-cnn"):
        rows += round_time.measure(work, CONTENDERS, options.rounds)
    if options.rounds == round_time.ROUNDS:
        write("peers", {**made_by(), "rows": rows})
    print(round_time.table(rows))


if __name__ == "__main__":
    main()
