"""The tools that a user might choose instead: their environments, their work, their processes.

Each has a script in peers/, which knows nothing of TensorFlow and reads its work from a file. Its
environment is .peers/<first word of the script's name>, which `python benchmarks/peers.py
--install` makes.
"""

import contextlib
import os
import sys
from pathlib import Path

import numpy as np
import psutil
from results import ROOT

OURS = [sys.executable, str(ROOT / "federated_learning.py")]
SCRIPTS = ROOT / "benchmarks" / "peers"
PEERS = {
    "floor-jax": "jax_floor.py",
    "torch-loop": "torch_loop.py",
    "flower": "flower.py",
    "fedjax": "fedjax_loop.py",
    "pfl-research": "pfl_loop.py",
    "blazefl": "blazefl_threads.py",
    "fluke": "fluke_loop.py",
}


def environment() -> dict[str, str]:
    """The environment of a contender; after `parse`, which takes the user's FL_DATA out of it."""
    return {**os.environ, "PYTHONPATH": str(SCRIPTS)}


def python_of(name: str) -> Path:
    """The Python of a peer's environment."""
    return ROOT / ".peers" / PEERS[name].partition("_")[0].removesuffix(".py") / "bin" / "python"


def check_installed(names: list[str]) -> None:
    """End the program if the environment of a peer among `names` is not there."""
    missing = [name for name in names if name in PEERS and not python_of(name).exists()]
    if missing:
        raise SystemExit(
            f"{', '.join(missing)} not installed; first: python benchmarks/peers.py --install"
        )


def command_of(name: str, work: Path, *more: str) -> list[str]:
    """The command that starts a peer with its work."""
    return [str(python_of(name)), str(SCRIPTS / PEERS[name]), str(work), *more]


def paddings_of(model) -> list[str]:
    """The padding of each convolution of a Keras model, "same" or "valid"."""
    return [layer.padding for layer in model.layers if "conv" in layer.name]


def export(experiment, path: Path) -> Path:
    """Write the work of our run to a file: images, split, initial weights, settings."""
    dataset = experiment.dataset
    partition = experiment.partition
    training = experiment.config.training
    paddings = paddings_of(experiment.build_model())
    weights = {f"weight{number}": w for number, w in enumerate(experiment.initial_weights)}
    np.savez(
        path,
        images=dataset.train.images,
        labels=dataset.train.labels,
        test_images=dataset.test.images,
        test_labels=dataset.test.labels,
        indices=np.concatenate(partition.indices),
        sizes=partition.sizes,
        paddings=np.array(paddings, str),
        batch=training.batch_size,
        rate=training.client_lr,
        epochs=training.local_epochs,
        cohort=training.clients_per_round or len(partition.indices),
        seed=experiment.config.seed,
        **weights,
    )
    return path


class Tree:
    """A process and its children: their CPU-seconds, and the peaks of their memory in MiB."""

    def __init__(self, pid: int):
        self.root = psutil.Process(pid)
        self.cpu: dict[psutil.Process, float] = {}
        self.mib: dict[psutil.Process, float] = {}

    def look(self) -> None:
        """Note what the processes that live now have used so far."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in [self.root, *self.root.children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess, FileNotFoundError, IndexError):
                    self.cpu[process] = sum(process.cpu_times()[:2])
                    status = Path(f"/proc/{process.pid}/status").read_text()
                    self.mib[process] = int(status.partition("VmHWM:")[2].split()[0]) / 1024

    def cpu_seconds(self) -> float:
        """CPU-seconds so far."""
        self.look()
        return sum(self.cpu.values())

    def peak_mib(self) -> float:
        """The sum of the processes' peaks so far."""
        self.look()
        return sum(self.mib.values())

    def kill(self) -> None:
        """End what is left: TFF's own context and Flower's engine leave processes behind."""
        for process in self.cpu:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
