"""Seconds a round and memory against the number of clients: ours, from 10 to 10,000, with 6 or 60
images each.

python benchmarks/scaling.py    # a minute; writes results/scaling.json and images/scaling.png
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

from results import ROOT, arguments, made_by, parse, write

# isort: split
import federated_learning as fl
from harness.reporting import drawing
from harness.reporting.figure_files import to_bytes
from harness.reporting.figure_form import default_style
from harness.reporting.results import describe_partition
from harness.storage.files import to_json

import psutil
from small import evaluate_nothing, first_images

PICTURE = ROOT / "images" / "scaling.png"
SIZES = {60: (10, 100, 1000), 6: (10, 100, 1000, 10_000)}  # images a client -> clients
ROUNDS = 9


def measure(num_clients: int, images: int) -> dict[str, float]:
    """Seconds of ROUNDS rounds of `num_clients` clients with so many images, after one to warm
    up."""
    config = fl.Config().replace(
        model="mlp",
        partition="iid",
        num_clients=num_clients,
        local_epochs=1,
        batch_size=32,
        rounds=ROUNDS + 1,
        cache=str(ROOT / ".cache"),
    )
    dataset = first_images(config, num_clients * images)
    began = time.perf_counter()
    experiment = fl.build_experiment(config, dataset)
    to_json(describe_partition(experiment))
    fl.write_shards(experiment)
    prepared = time.perf_counter() - began
    experiment = fl.prepare(experiment)
    evaluate_nothing(experiment)
    records = [record for _, record, _ in fl.run_rounds(experiment)]
    seconds = [record.seconds for record in records[1:]]
    return {
        "clients": num_clients,
        "images": images,
        "prepare_s": round(prepared, 2),
        "seconds": seconds,
    }


@default_style
def plot(result: dict) -> None:
    """Draw the result into images/scaling.png."""
    rows = result["rows"]
    note = (
        f"MNIST, IID · mlp, B = 32, E = 1, seed 0 · medians of {ROUNDS} rounds · "
        f"{result['machine']}"
    )
    figure = drawing.new_figure(8, 3.8, "Ten thousand clients: a round's seconds and memory", note)
    seconds, memory = figure.subplots(1, 2)
    for images, color, marker in ((6, drawing.BLUE, "o"), (60, drawing.ORANGE, "s")):
        own = [row for row in rows if row["images"] == images]
        clients = [row["clients"] for row in own]
        style = {"color": color, "marker": marker, "label": f"{images} images a client"}
        seconds.loglog(clients, [statistics.median(row["seconds"]) for row in own], **style)
        memory.semilogx(clients, [row["peak_mib"] for row in own], **style)
    seconds.set(xlabel="clients a round", ylabel="seconds a round")
    seconds.legend(frameon=False, fontsize=9)
    memory.set(
        xlabel="clients a round",
        ylabel="peak of the process tree (MiB)",
        ylim=(0, 1.1 * max(row["peak_mib"] for row in rows)),
    )
    for axes in (seconds, memory):
        drawing.plain(axes)
    PICTURE.write_bytes(to_bytes(figure))


def main() -> None:
    parser = arguments(__doc__)
    # one size, in a process of its own: clients, images
    parser.add_argument("--size", type=int, nargs=2, help=argparse.SUPPRESS)
    if size := parse(parser).size:
        return print(json.dumps(measure(*size)), flush=True)
    rows = []
    sizes = [(clients, number) for number, counts in SIZES.items() for clients in counts]
    for clients, images in sizes:
        child = psutil.Popen(
            [sys.executable, __file__, "--size", str(clients), str(images)],
            stdout=subprocess.PIPE,
            text=True,
        )
        peak = 0
        while child.poll() is None:  # the worker's peak must be read while it lives
            try:
                tree = [child, *child.children(recursive=True)]
                peak = max(peak, sum(process.memory_info().rss for process in tree))
            except psutil.NoSuchProcess:
                pass
            time.sleep(0.1)
        rows.append({**json.loads(child.stdout.read()), "peak_mib": peak >> 20})
        print(rows[-1], flush=True)
    result = {**made_by(), "rows": rows}
    write("scaling", result)
    plot(result)


if __name__ == "__main__":
    main()
