"""Trouble around a run: full disks, vanished folders, odd names, closed pipes. Errors help, and nothing is lost."""

import json
import resource
import shlex
import shutil
import signal
import subprocess

import federated_learning as fl
from harness.fields import UserError
from harness.records import RoundRecord

import numpy as np
import pytest
from runs import SECONDS, command, configure, gone, run_code, run_script, worker_of

QUICK = ("--dataset", "digits", "--model", "mlp", "--rounds", "2")
LONG = (*QUICK[:-1], "100000")


def started(folder, *flags, **options):
    """A run in `folder`, after its first round."""
    process = subprocess.Popen(
        command(*flags), cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )
    next(line for line in process.stdout if line.startswith("round "))
    return process


@pytest.mark.parametrize(("kilobytes", "named"), [(60, "shards-"), (300, "checkpoints")])
def test_a_full_disk_ends_the_run_with_the_files_name(tmp_path, kilobytes, named):
    """A limit on the size of a file stands for the disk's: a shard, then a checkpoint, does not fit."""
    limit = kilobytes * 1024
    done = subprocess.run(
        command(*QUICK, "--name", "run"), cwd=tmp_path, capture_output=True, text=True, timeout=SECONDS,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and "cannot write" in last and named in last and "File too large" in last, done.stderr
    assert "Traceback" not in done.stderr
    again = run_script(tmp_path, "--resume", "runs/run")  # the disk has room again
    assert again.returncode == 0 and "after 2 rounds" in again.stdout, again.stderr


def test_a_vanished_run_folder_ends_the_run_with_its_name(tmp_path):
    process = started(tmp_path, *LONG, "--name", "run")
    worker = worker_of(process)
    shutil.rmtree(tmp_path / "runs")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2 and "runs/run" in errors.splitlines()[-1] and "Traceback" not in errors
    assert gone(worker)


@pytest.mark.parametrize("place", ["runs", "cache"])
def test_an_unwritable_folder_is_refused(tmp_path, place):
    done = run_script(tmp_path, *QUICK, f"--{place}", "/proc/federated")
    assert done.returncode == 2 and "/proc/federated" in done.stderr.splitlines()[-1], done.stderr
    assert "Traceback" not in done.stderr


def test_a_file_in_the_place_of_a_folder_is_refused(tmp_path):
    (tmp_path / "runs").write_text("")
    done = run_script(tmp_path, *QUICK)
    assert done.returncode == 2 and "runs" in done.stderr and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize(("sent", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_ends_in_five_seconds_and_says_how_to_go_on(tmp_path, sent, exit_code):
    process = started(tmp_path, *LONG, "--name", "run")
    process.send_signal(sent)
    _, errors = process.communicate(timeout=5)
    assert process.returncode == exit_code
    (line,) = errors.splitlines()
    assert line.endswith("python federated_learning.py --resume runs/run goes on")
    rounds = len((tmp_path / "runs" / "run" / "metrics.csv").read_text().splitlines()) - 1
    assert f"stopped after round {rounds};" in line
    metrics = json.loads((tmp_path / "runs" / "run" / "metrics.json").read_text())
    assert len(metrics["rounds"]) == rounds  # the model and the tables are of one round


def test_divergence_is_announced_and_recorded(tmp_path):
    code = (
        "import sys, federated_learning as fl\n"
        "class Infinite(fl.Algorithm):\n"
        "    def correct(self, gradients, *_): return tuple(g * float('inf') for g in gradients)\n"
        "fl.ALGORITHMS['fedprox'] = Infinite\n"
        "fl.main(fl.parse(sys.argv[1:]))"
    )
    done = run_code(tmp_path, code, *QUICK, "--name", "run", "--algorithm", "fedprox")
    assert done.returncode == 0 and done.stdout.count("10 not finite, left out") == 2, done.stderr
    assert done.stderr.count("no client's update was finite") == 2
    metrics = json.loads((tmp_path / "runs" / "run" / "metrics.json").read_text())
    assert [record["left_out"] for record in metrics["rounds"]] == [10, 10]


def test_what_counts_as_trouble():
    def record(accuracy, loss=1.0, left_out=0):
        return RoundRecord(1, 1.0, 0.5, loss, accuracy, left_out, 0, 0, 0, None, 1.0, [{"client": 0}, {"client": 1}])

    good = record(0.9)
    assert good.trouble([], 10) == "" == record(0.1).trouble([], 10) == record(0.5).trouble([good], 10)
    assert "chance" in record(0.1).trouble([good], 10)
    assert "not finite" in record(0.1, loss=float("nan")).trouble([], 10)
    assert "no client" in record(0.9, left_out=2).trouble([], 10) and record(0.9, left_out=1).trouble([], 10) == ""


def test_a_folder_with_a_space_and_an_umlaut(tmp_path):
    folder = tmp_path / "Föderiertes Lernen"
    folder.mkdir()
    done = run_script(folder, *QUICK, "--name", "täglich 1")
    assert done.returncode == 0 and (folder / "runs" / "täglich 1" / "global_model.keras").exists(), done.stderr


def test_home_unwritable(tmp_path):
    assert run_script(tmp_path, *QUICK, HOME="/proc/nobody").returncode == 0


def test_two_runs_at_once_in_one_folder(tmp_path):
    both = [subprocess.Popen(command(*QUICK), cwd=tmp_path, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait(SECONDS) for process in both] == [0, 0]
    runs = sorted((tmp_path / "runs").iterdir())
    assert [run.name for run in runs] == ["digits-dirichlet-fedavg-mlp-seed0", "digits-dirichlet-fedavg-mlp-seed0-2"]
    shas = {json.loads((run / "metrics.json").read_text())["weights_sha256"] for run in runs}
    assert len(shas) == 1


def test_output_closed_early(tmp_path):
    line = f"{shlex.join(command(*QUICK, '--name', 'run'))} | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, timeout=SECONDS)
    assert done.stdout.splitlines()[-1] == "0" and "BrokenPipe" not in done.stderr
    assert (tmp_path / "runs" / "run" / "global_model.keras").exists()


WRONG = [(field, value) for field, values in {
    "num_clients": [0, -1, 60_001, 2.5, "10", None, True, float("nan")],
    "clients_per_round": [-1, 11, 1.0],
    "rounds": [0, 100_001, "five"],
    "local_epochs": [0, 1001],
    "batch_size": [-1, 60_001, 16.5],
    "client_lr": [-0.1, float("nan"), float("inf"), "fast"],
    "alpha": [0, -1, float("nan"), 1e7],
    "shards_per_client": [0, 1001],
    "compare": ["fedavg,median", "fedavg,fedavg", "fedavg,", 3],
    "seeds": [0, 1001],
    "sampling": ["with replacement"],
    "delta": [0, 1],
    "epsilon_budget": [-1],
    "dropout": [-0.1, 1.1],
    "stragglers": [2, "half"],
    "byzantine": [-1, 11],
    "attack": ["ddos"],
    "attack_scale": [-1],
    "trim": [-0.1, 0.5],
    "tolerated": [-1],
    "noise_multiplier": [0],
    "client_schedule": ["linear"],
    "server_schedule": [""],
    "server_lr": [-1],
    "lr_decay": [1.1],
    "lr_horizon": [0],
    "server_momentum": [1],
    "dyn_alpha": [0, -1, "x"],
    "prox_mu": [-1, float("inf")],
    "labels_per_client": [0, 101],
    "size_exponent": [-1, 11],
    "rotation": [-1, 181, float("nan")],
    "noise": [-1, 256],
    "partition_file": [7, "a\0b"],
    "seed": [-1, 2**31, 0.5],
    "holdout": [-1, 50_001],
    "patience": [0, float("nan")],
    "dataset": ["cifar10", "", "MNIST", 3],
    "partition": ["sorted", "", "file"],
    "model": ["resnet"],
    "algorithm": ["sgd"],
    "aggregator": ["krumm"],
    "data": [7, "a\0b"],
    "name": ["a/b", ".", "..", "a\0b", "x" * 201, "ü" * 101],
    "runs": ["\0"],
    "cache": [None],
    "tensorboard": ["yes", 1],
}.items() for value in values]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), WRONG)
def test_a_wrong_value_is_refused_with_field_value_and_cure(field, value):
    with pytest.raises(UserError) as error:
        configure(**{field: value})
    message = str(error.value)
    assert message.startswith(f"{field}={value!r:.40}"[:40]) and "\n" not in message and len(message) < 250
    assert any(cure in message for cure in ("choose", "give", "drop")), message


def test_there_are_more_than_forty_wrong_values():
    assert len(WRONG) > 40 and {field for field, _ in WRONG} == fl.Config().flat().keys() - {"resume"}


def test_a_missing_or_odd_resume_folder_is_refused(tmp_path):
    for folder in ("nowhere", str(tmp_path), "/dev/null", "ümlaut"):
        done = run_script(tmp_path, "--resume", folder)
        assert done.returncode == 2 and folder in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_more_clients_than_images_are_refused(tmp_path):
    few = {"x_train": np.zeros((4, 28, 28), np.uint8), "y_train": np.arange(4, dtype=np.uint8)}
    np.savez(tmp_path / "few.npz", **few, x_test=few["x_train"], y_test=few["y_train"])
    dataset = fl.load_dataset(configure(data=str(tmp_path / "few.npz")).data)
    with pytest.raises(UserError, match="num_clients=5 exceeds the 4 training images; choose 1..4"):
        fl.make_partition(dataset, configure(num_clients=5))
