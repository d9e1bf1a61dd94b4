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


# The modules that take a minute and more: they begin, lest one ends alone.
LONG = {
    "test_notebook.py",
    "test_faults.py",
    "test_hosts.py",
    "test_run_folder.py",
    "test_command_line.py",
    "test_worker.py",
    "test_program.py",
    "test_comparison.py",
}


# What does for another row, or at another moment, what a test of `make test` does for one of its
# kind: function -> the ids of these rows, without any all of them.
MORE_OF_A_KIND = {
    "test_a_cheap_cell_of_the_results_again": (),
    "test_a_client_whose_labels_no_test_image_has_is_left_out": (),
    "test_a_killed_coordinator_leaves_nothing_on_any_host": (),
    "test_a_name_that_another_comparison_has_is_not_overwritten": (),
    "test_a_pipe_behind_the_script_ends_with_it": (),
    "test_a_private_round_is_counted_as_often_as_its_noise_was_drawn": (
        "before training",
        "between the tables",
    ),
    "test_ctrl_c_in_a_comparison_says_that_the_same_command_goes_on": (),
    "test_earlier_cells_of_a_notebook_change_nothing_and_stay_as_they_were": (),
    "test_every_row_goes_on_from_its_checkpoint_with_equal_bits": ("fedadam", "zeroing"),
    "test_only_what_clients_need_travels": ("fedavg-1", "fedadam-1", "feddyn-4"),
    "test_output_that_goes_nowhere": (),
    "test_randomness_is_there_and_a_function_of_the_seed": ("rotation",),
    "test_rounds_equal_tffs_own": ("mimelite", "fedprox"),
    "test_rounds_equal_tffs_own_fedavg_on_the_same_batches": ("small-cnn-0.01", "lenet-0.01"),
    "test_schedules_change_the_learning_rates": ("exponential-factors0", "inverse-sqrt-factors1"),
    "test_signal_leaves_no_worker": ("2-130",),
    "test_two_runs_at_once_in_one_folder": (),
    "test_two_workers_train_what_one_does": (
        "fedadam",
        "scaffold-3",
        "clipping",
        "adam-0.5-1-nan",
        "cosine",
    ),
    "test_what_is_lost_is_done_again_and_the_end_is_the_same": ("kill_worker-ended",),
}


def pytest_collection_modifyitems(items):
    """Marks `slow` what starts a process or builds a TFF one: `make quick` leaves it out.

    The long modules begin.
    """
    items.sort(key=lambda item: item.path.name not in LONG)
    for item in items:
        name, _, row = item.name.removesuffix("]").partition("[")
        if name in MORE_OF_A_KIND and row in (MORE_OF_A_KIND[name] or [row]):
            item.add_marker(pytest.mark.thorough)
        names = set(item.function.__code__.co_names)
        if STARTERS & names or (STARTED | BUILDERS) & set(item.fixturenames):
            item.add_marker(pytest.mark.slow)
