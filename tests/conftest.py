"""Fixtures: digits, a worker, and small federations on both."""

import contextlib
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
# before TensorFlow: it quiets that, here and in the tests' processes
import federated_learning as fl
from harness.engine.worker import LocalWorker

import psutil
import pytest
from reference import tanh_layers
from runs import SCRIPT, configure

# these tests go on behind nohup or &: what they start would
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignore Ctrl-C too, as it should


@pytest.fixture(scope="session")
def digits():
    return fl.load_dataset(configure(dataset="digits").data)


@pytest.fixture(scope="session")
def mnist():
    return fl.load_dataset(fl.Config().data)


@pytest.fixture(scope="module")
def worker():
    with LocalWorker(3) as worker:
        yield worker


@pytest.fixture
def federation(worker, digits, tmp_path, monkeypatch):
    """make(**flags) -> the experiment on digits; the model 2nn is a small one with tanh."""

    def make(**flags):
        monkeypatch.setitem(fl.MODELS, "2nn", tanh_layers)
        small = {"dataset": "digits", "model": "2nn", "num_clients": 3, "cache": str(tmp_path)}
        return fl.build_experiment(configure(**small | flags), digits)

    return make


@pytest.fixture(autouse=True)
def nothing_goes_on():
    """Ends the runs of a test that failed before it could: they would slow all others down."""
    yield
    for process in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if str(SCRIPT) in process.cmdline():
                process.kill()


BUILDERS = {"federation", "learners", "trained"}  # fixtures that build a TFF process
STARTERS = {"run_script", "run_code", "start", "started", "command", "subprocess", "Popen"}
STARTERS |= {"NotebookClient", "KernelManager", "compare", "rounds_of", "run"}
STARTED = {
    "copy",
    "whole",
    "half",
    "twice",
    "undisturbed",
    "own",
    "go",
    "learners",
    "pair",
}  # fixtures


LONG = {"test_notebook.py", "test_faults.py", "test_hosts.py"}  # with a test of minutes


def pytest_collection_modifyitems(items):
    """Marks `slow` what starts a process or builds a TFF one: `make quick` leaves it out.

    The long modules begin, lest one ends alone.
    """
    items.sort(key=lambda item: item.path.name not in LONG)
    for item in items:
        names = set(item.function.__code__.co_names)
        if STARTERS & names or (STARTED | BUILDERS) & set(item.fixturenames):
            item.add_marker(pytest.mark.slow)
