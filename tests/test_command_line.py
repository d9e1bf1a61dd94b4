"""Trouble around a run: full disks, vanished folders, odd names, closed pipes.

Errors help, and nothing is lost.
"""

import errno
import json
import os
import random
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time

from harness.cli import command_line
from harness.cli.fields import UserError
from harness.storage import files
from variants import choices

import matplotlib.image
import numpy as np
import pytest
from reference import correcting, replace_choice
from runs import (
    MLP_ON_DIGITS,
    NO_FIGURES,
    ON_DIGITS,
    SCRIPT,
    SECONDS,
    call_script,
    command,
    gone,
    read_metrics,
    run_script,
    start,
    worker_of,
)

QUICK = (*ON_DIGITS, *NO_FIGURES, "--rounds", "2")
LONG = (*QUICK[:-1], "100000")


def started(folder, *flags, **options):
    """A run in `folder`, after its first round."""
    process = subprocess.Popen(
        command(*flags),
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )
    next(line for line in process.stdout if line.startswith("round "))
    return process


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kilobytes", "named"),
    [pytest.param(60, "shards-", marks=pytest.mark.thorough), (300, "checkpoints")],
)
def test_a_full_disk_ends_the_run_with_the_files_name(tmp_path, kilobytes, named):
    """A limit on the size of a file stands for the disk's: a shard, then a checkpoint, does not
    fit."""
    limit = kilobytes * 1024
    flags = (*MLP_ON_DIGITS, *NO_FIGURES, "--rounds", "2", "--name", "run")
    usual, highest = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, highest))
    try:
        done = call_script(tmp_path, *flags)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (usual, highest))
    last = done.stderr.splitlines()[-1]
    assert (
        done.returncode == 2
        and "cannot write" in last
        and named in last
        and "File too large" in last
    ), done.stderr
    assert "Traceback" not in done.stderr
    # The disk has room again. Without the shards no run had begun.
    begun = ("--resume", "runs/run") if named == "checkpoints" else flags
    again = call_script(tmp_path, *begun)
    assert again.returncode == 0 and "after 2 rounds" in again.stdout, again.stderr


@pytest.mark.thorough
def test_a_vanished_run_folder_ends_the_run_with_its_name(tmp_path):
    process = started(tmp_path, *LONG, "--name", "run")
    worker = worker_of(process)
    shutil.rmtree(tmp_path / "runs")
    _, errors = process.communicate(timeout=60)
    assert (
        process.returncode == 2
        and "runs/run" in errors.splitlines()[-1]
        and "Traceback" not in errors
    )
    assert gone(worker)


@pytest.mark.parametrize("place", ["runs", "cache"])
def test_an_unwritable_folder_is_refused(tmp_path, place):
    done = call_script(tmp_path, *QUICK, f"--{place}", "/proc/federated")
    assert done.returncode == 2 and "/proc/federated" in done.stderr.splitlines()[-1], done.stderr
    assert "Traceback" not in done.stderr


def test_a_file_in_the_place_of_a_folder_is_refused(tmp_path):
    (tmp_path / "runs").write_text("")
    done = call_script(tmp_path, *QUICK)
    assert done.returncode == 2 and "runs" in done.stderr and done.stderr.count("\n") == 1, (
        done.stderr
    )


@pytest.mark.parametrize(
    ("sent", "exit_code"),
    [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.thorough)],
)
def test_a_stopped_run_ends_in_seconds_and_says_how_to_go_on(tmp_path, sent, exit_code):
    made = tmp_path / "made"
    made.mkdir()
    environment = {**os.environ, "TMPDIR": str(made), "PYTHONDONTWRITEBYTECODE": ""}
    process = started(tmp_path, *LONG, "--name", "run", env=environment)
    process.stdout.close()  # nobody reads on, as behind `| head`: the run does not mind
    metrics = tmp_path / "runs" / "run" / "metrics.csv"
    before = len(metrics.read_text().splitlines())
    deadline = time.monotonic() + SECONDS
    while len(metrics.read_text().splitlines()) == before and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(sent)
    _, errors = process.communicate(timeout=10)  # 1 to 3 s, but other tests run beside this one
    assert process.returncode == exit_code
    (line,) = errors.splitlines()
    assert line.endswith(f"to continue: {sys.executable} {SCRIPT} --resume runs/run")
    assert list(made.iterdir()) == []  # AutoGraph's files among them
    rounds = len(metrics.read_text().splitlines()) - 1
    assert rounds >= before and f"stopped after round {rounds};" in line
    saved = json.loads(metrics.with_suffix(".json").read_text())
    assert len(saved["rounds"]) == rounds  # the model and the tables are of one round


@pytest.mark.slow
def test_divergence_is_announced_and_recorded(tmp_path, monkeypatch):
    infinite = correcting(lambda gradients, _: tuple(g * float("inf") for g in gradients))
    replace_choice(monkeypatch, choices.ALGORITHMS, "fedprox", infinite)
    done = call_script(tmp_path, *QUICK, "--name", "run", "--algorithm", "fedprox")
    assert done.returncode == 0 and done.stdout.count("10 not finite, left out") == 2, done.stderr
    assert done.stderr.count("no client's update was finite") == 2
    texts = [(tmp_path / "runs" / "run" / "metrics.json").read_text()]
    texts += (tmp_path / "runs" / "run" / "rounds.jsonl").read_text().splitlines()
    for text in texts:
        json.loads(text, parse_constant=pytest.fail)  # NaN is none of JSON's
    assert '"train_loss": null' in texts[0]
    metrics = read_metrics(tmp_path / "runs" / "run")
    assert [record["num_nonfinite"] for record in metrics["rounds"]] == [10, 10]


@pytest.mark.thorough
def test_odd_folders_and_a_home_that_cannot_be_written(tmp_path):
    (folder := tmp_path / "Föderiertes Lernen").mkdir()
    (temporary := tmp_path / f"a%20b#c?d{82 * 'x'}").mkdir()
    done = run_script(
        folder, *QUICK, "--name", "täglich 1", HOME="/proc/nobody", TMPDIR=str(temporary)
    )
    assert (
        done.returncode == 0 and (folder / "runs" / "täglich 1" / "global_model.keras").exists()
    ), done.stderr
    assert list(temporary.iterdir()) == []


@pytest.mark.slow
def test_two_runs_at_once_in_one_folder(tmp_path):
    both = [
        subprocess.Popen(command(*QUICK), cwd=tmp_path, stdout=subprocess.DEVNULL) for _ in range(2)
    ]
    assert [process.wait(SECONDS) for process in both] == [0, 0]
    runs = sorted((tmp_path / "runs").iterdir())
    assert [run.name for run in runs] == [
        "digits-dirichlet-fedavg-logreg-seed0",
        "digits-dirichlet-fedavg-logreg-seed0-2",
    ]
    shas = {read_metrics(run)["weights_sha256"] for run in runs}
    assert len(shas) == 1


def test_output_closed_early(tmp_path):
    line = f"{shlex.join(command(*QUICK, '--name', 'run'))} | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, timeout=SECONDS
    )
    assert done.stdout.splitlines()[-1] == "0" and "BrokenPipe" not in done.stderr
    assert (tmp_path / "runs" / "run" / "global_model.keras").exists()


def test_a_missing_or_odd_resume_folder_is_refused(tmp_path):
    for folder in ("nowhere", str(tmp_path), "/dev/null", "ümlaut"):
        done = call_script(tmp_path, "--resume", folder)
        assert done.returncode == 2 and folder in done.stderr and done.stderr.count("\n") == 1, (
            done.stderr
        )


def test_runs_are_stopped_at_any_moment_of_their_start(tmp_path):
    """STOPS=50 tries more moments: nothing swallows the signal, and no traceback comes."""
    moments = random.Random(3)
    for number in range(int(os.environ.get("STOPS", "3"))):
        (folder := tmp_path / str(number)).mkdir()
        process = start(folder, *LONG, "--name", "run")
        time.sleep(moments.uniform(0.1, 6))  # of which imports take 3 s, building the process 1 s
        sent, code = moments.choice([(signal.SIGINT, 130), (signal.SIGTERM, 143)])
        process.send_signal(sent)
        _, errors = process.communicate(timeout=10)
        assert process.returncode == code and errors.count("\n") <= 1, errors
        if "to continue:" in errors:  # and it does
            assert shlex.split(errors.partition("; ")[2])[:4] == command("--resume", "runs/run")


@pytest.mark.thorough
def test_a_signal_that_is_ignored_stays_ignored(tmp_path):
    """As nohup has it, and a shell for what it starts with &."""
    process = start(
        tmp_path, *QUICK, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)
    )
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    assert process.wait(SECONDS) == 0


@pytest.mark.parametrize(
    "closed",
    [
        ">/dev/full",
        *(
            pytest.param(closed, marks=pytest.mark.thorough)
            for closed in ("<&- >&- 2>&-", ">/dev/full 2>&1")
        ),
    ],
)
def test_output_that_goes_nowhere(tmp_path, closed):
    line = f"{shlex.join(command(*QUICK, '--name', 'run'))} {closed}"
    done = subprocess.run(
        ["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, timeout=SECONDS
    )
    assert done.returncode == 0 and (tmp_path / "runs" / "run" / "metrics.json").exists()
    told = (
        "notice: cannot write to standard output (No space left on device); "
        "further output is discarded\n"
    )
    assert done.stderr == (told if closed == ">/dev/full" else "")


@pytest.mark.thorough
def test_help_on_a_full_disk_is_one_line(tmp_path):
    line = f"{shlex.join(command('--help'))} >/dev/full"
    done = subprocess.run(
        ["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, timeout=SECONDS
    )
    assert (
        done.returncode == 1
        and done.stderr.count("\n") == 1
        and "cannot write to standard output" in done.stderr
    )


@pytest.mark.thorough
def test_output_that_is_not_utf_8(tmp_path):
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = run_script(tmp_path, *QUICK, "--rounds", "1", **ascii_only)
    assert done.returncode == 0 and "(not MNIST) ? 10 clients" in done.stdout, done.stderr
    assert run_script(tmp_path, "--help", **ascii_only).returncode == 0


@pytest.mark.thorough
def test_folders_that_are_not_utf_8(tmp_path):
    odd = os.fsdecode(b"r\xff")
    flags = (*QUICK, "--figures", "png", "--cache", f"{odd}/cache", "--name", "run")
    done = run_script(tmp_path, *flags, "--runs", odd)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert (tmp_path / odd / "run" / "metrics.json").exists()
    assert (tmp_path / odd / "run" / "confusion_matrix.png").exists()
    assert run_script(tmp_path, "--resume", f"{odd}/run", "--rounds", "3").returncode == 0


REFUSED = {
    ("--data", ""): "--data '' is empty",
    ("--data=",): "--data '' is empty",
    ("--resume", ""): "--resume '' is empty",
    ("--name", "a\x1b[31mb"): r"name='a\x1b[31mb'",
    ("--data-name", "a\nb"): r"data_name='a\nb'",
    ("--data", "pipe"): "not a regular file",
    ("--partition-file", "pipe"): "not a regular file",
    ("--partition-file", "deep.json"): "cannot be read",
    ("--data", "/dev/zero"): "not a regular file",
    ("--data", "~nosuchuser/x"): "No such file",
    ("--resume", "full"): "full/config.json (not a regular file)",
    ("--dataset", "digits", "--cache", "file"): "cannot write",
    ("--dataset", "digits", "--runs", "file"): "cannot write",
    ("--data", "."): "contains no data; give a folder",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_what_cannot_be_is_refused_in_one_line(tmp_path, flags):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "full").mkdir()
    os.mkfifo(tmp_path / "full" / "config.json")
    (tmp_path / "file").write_text("")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    done = call_script(tmp_path, *flags)
    assert (
        done.returncode == 2 and REFUSED[flags] in done.stderr and done.stderr.count("\n") == 1
    ), done.stderr
    assert done.stderr.rstrip("\n").isprintable()


@pytest.mark.thorough
def test_a_log_that_cannot_be_written_is_told_as_that(tmp_path):
    assert call_script(tmp_path, *QUICK, "--name", "run").returncode == 0
    (tmp_path / "runs" / "run" / "worker.log").unlink()
    (tmp_path / "runs" / "run" / "worker.log").mkdir()
    done = call_script(tmp_path, "--resume", "runs/run", "--rounds", "3")
    assert (
        done.returncode == 2
        and "worker.log: Is a directory" in done.stderr
        and "network" not in done.stderr
    )


@pytest.mark.thorough
def test_pictures_are_the_same_whatever_matplotlibs_settings(tmp_path):
    flags = ("--name", "run", "--figures", "png")
    (tmp_path / "matplotlibrc").write_text(
        "text.usetex: True\nsavefig.format: svg\nfont.size: 30\n"
    )
    odd = {
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "MATPLOTLIBRC": str(tmp_path / "matplotlibrc"),
    }
    runs = []
    for name, environment in (("plain", {}), ("odd", odd)):
        (folder := tmp_path / name).mkdir()
        done = run_script(folder, *QUICK, *flags, **environment)
        assert done.returncode == 0 and done.stderr == "", done.stderr
        runs.append(folder / "runs" / "run")
    pictures = sorted(path.name for path in runs[0].glob("*.png"))
    assert len(pictures) == 6
    for name in pictures:
        plain, odd_one = (matplotlib.image.imread(run / name) for run in runs)
        assert np.array_equal(plain, odd_one), name


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_a_mistaken_flag_is_told_under_any_encoding(tmp_path, encoding):
    done = run_script(tmp_path, "--lr", "0.1", PYTHONIOENCODING=encoding)
    line = "federated_learning.py: unknown flag --lr; use --client-lr\n"
    assert (done.returncode, done.stderr) == (2, line)


def test_no_room_for_temporary_files_is_told_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    done = call_script(tmp_path, *QUICK)
    assert done.returncode == 2 and "where TensorFlow keeps compiled functions" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_clock_that_no_zip_file_can_hold_is_told(monkeypatch):
    monkeypatch.setattr(time, "localtime", lambda *_: time.struct_time((1970, *[1] * 8)))
    with pytest.raises(UserError, match="the clock says 1970-01-01, a date that zip files"):
        files.check_clock()


@pytest.mark.parametrize(
    "error", [BlockingIOError(errno.EAGAIN, "full"), RuntimeError("can't start new thread")]
)
def test_a_limit_of_processes_is_one_line(capsys, error):
    def fail():
        raise error

    with pytest.raises(SystemExit) as leaving:
        command_line.run_or_exit(fail)
    assert leaving.value.code == 1
    assert "cannot create another process, thread or file" in capsys.readouterr().err


@pytest.mark.thorough
def test_percent_run_in_a_notebook_does_the_same(tmp_path):
    """There the streams are no files, and the kernel's signals are its own."""
    code = f"%run {SCRIPT} {' '.join(QUICK)} --name run"
    shell = [sys.executable, "-m", "IPython", "--colors=NoColor", "-c", code]
    done = subprocess.run(shell, cwd=tmp_path, capture_output=True, text=True, timeout=SECONDS)
    assert "final test accuracy" in done.stdout, done.stdout + done.stderr
    assert (tmp_path / "runs" / "run" / "metrics.json").exists()


@pytest.mark.thorough
def test_tensorboards_events_that_cannot_grow_are_told(tmp_path):
    """Each round adds 60 kB; its file may have 700, more than a checkpoint."""
    done = subprocess.run(
        command(*QUICK[:-1], "30", "--tensorboard", "--name", "run"),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (700_000, 700_000)),
    )
    assert done.stderr.count("TensorBoard events end before round ") == 1, done.stderr
    assert "their file in runs/run cannot grow; all other files are written" in done.stderr
    metrics = read_metrics(tmp_path / "runs" / "run")
    assert done.returncode == 0 and len(metrics["rounds"]) == 30
