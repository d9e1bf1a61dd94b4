"""Where the seconds of a run go, from the command to the last file: the default run, or another by
its flags.

    python benchmarks/startup.py                            # the default run
    python benchmarks/startup.py --model mlp --rounds 2     # any flags of the script

Writes the default run's table to results/startup.json.
"""

# ruff: noqa: E402  the clock starts first
import time

began = time.perf_counter()
import collections
import gc
import json
import os
import sys
import tempfile

from results import ROOT, made_by, write

# isort: split
gc.disable()  # as the script does while it imports
import federated_learning as fl
from harness.engine.worker import LocalWorker
from harness.storage import saving

SPINE = [
    "load_dataset",
    "make_partition",
    "write_shards",
    "build_model",
    "build_process",
    "build_evaluator",
]


def main() -> None:
    spent = collections.Counter()
    spent["imports: TensorFlow, TFF, the script"] = time.perf_counter() - began
    gc.freeze()
    gc.enable()
    first_round = []

    def timed(name, function):
        def call(*arguments, **keywords):
            start = time.perf_counter()
            try:
                return function(*arguments, **keywords)
            finally:
                spent[name] += time.perf_counter() - start

        return call

    def first(function):
        def call(*arguments):
            first_round.append(time.perf_counter() - began)
            return function(*arguments)

        return call

    for name in SPINE:
        setattr(fl, name, timed(name, getattr(fl, name)))
    saving.save_result = timed("save_result", saving.save_result)
    LocalWorker.__enter__ = timed("worker's start", LocalWorker.__enter__)
    build_evaluator = fl.build_evaluator
    fl.build_evaluator = lambda *arguments: timed("rounds: evaluation", build_evaluator(*arguments))
    LocalWorker.call = timed("rounds: training", first(LocalWorker.call))
    fl.RunFolder.save_round = timed("save_round", fl.RunFolder.save_round)
    os.environ.pop("FL_DATA", None)  # the user's own is no part of a table
    with tempfile.TemporaryDirectory() as folder:
        flags = sys.argv[1:]
        fl.main(fl.parse([*flags, "--runs", folder, "--cache", str(ROOT / ".cache")]))
    total = time.perf_counter() - began
    spent["everything else"] = total - sum(spent.values())
    rows = {name: round(seconds, 2) for name, seconds in spent.items()}
    times = {
        "first_round_starts_after_s": round(first_round[0], 2),
        "total_s": round(total, 2),
        "seconds": rows,
    }
    result = {**made_by(), **times}
    print(json.dumps(result, indent=1))
    if not flags:
        write("startup", result)


if __name__ == "__main__":
    main()
