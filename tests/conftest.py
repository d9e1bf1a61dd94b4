"""Running the script as a user would, and finding TFF's worker among its children."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "federated_learning.py"
SECONDS = 240  # limit of any one command
sys.path.insert(0, str(ROOT))
import federated_learning as fl  # noqa: E402  (before TensorFlow: it quiets that, here and in the tests' processes)


def command(*flags: str) -> list[str]:
    return [sys.executable, str(SCRIPT), *flags]


def run_script(folder: Path, *flags: str, **environment: str) -> subprocess.CompletedProcess:
    """The script's run in `folder` with `flags`, its output captured."""
    return subprocess.run(
        command(*flags), cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True, timeout=SECONDS
    )


def worker_of(process: subprocess.Popen, besides: Sequence[psutil.Process] = ()) -> psutil.Process:
    """TFF's worker below a running process, once it is there; `besides` are those known already."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if "worker_binary" in " ".join(child.cmdline()[:1]) and child not in besides:
                    return child
        time.sleep(0.02)
    raise AssertionError("no worker appeared")


def gone(worker: psutil.Process, seconds: float = 5) -> bool:
    """Whether the process has ended within `seconds`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.02)
    return False


@pytest.fixture(scope="session")
def digits():
    return fl.load_dataset(fl.Config(dataset="digits"))


@pytest.fixture(scope="module")
def worker():
    with fl.Worker(clients_at_once=3) as worker:
        yield worker


@pytest.fixture
def federation(worker, digits, tmp_path, monkeypatch):
    """make(**flags) -> (config, partition, shards folder, process), on digits."""

    def make(**flags):
        # A smooth activation: with ReLU, a pre-activation near 0 flips between float32 and float64.
        monkeypatch.setitem(fl.MODELS, "tanh", lambda: fl.dense(16, activation="tanh"))
        flags = {"dataset": "digits", "model": "tanh", "num_clients": 3, "cache": str(tmp_path), **flags}
        config = fl.Config(**flags)
        partition = fl.make_partition(digits, config)
        shards = fl.write_shards(digits, partition, config)
        return config, partition, shards, fl.build_process(config, 10, shards, partition.sizes)

    return make
