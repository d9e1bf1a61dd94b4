"""--jobs: several runs of a comparison at once, each in a process of its own."""

import json
import signal
import time

import federated_learning as fl
from harness.cli.fields import UserError
from harness.comparing.sweep import compared_rows

import pytest
from runs import NO_FIGURES, ON_DIGITS, call_script, configure, start

FLAGS = (*ON_DIGITS, "--local-epochs", "1", *NO_FIGURES, "--compare", "fedavg,scaffold")


def hashes(folder):
    """Folder -> hash of the weights, of a comparison's finished runs."""
    files = folder.glob("*-seed*/metrics.json")
    return {path.parent.name: json.loads(path.read_text())["weights_sha256"] for path in files}


def all_begun(folder, num_runs):
    """Whether this number of runs have begun their third round, and so saved a round for sure."""
    files = list(folder.glob("*/rounds.jsonl"))
    return len(files) == num_runs and all(path.read_text().count("\n") > 1 for path in files)


def test_two_jobs_make_the_same_numbers_as_one(tmp_path):
    flags = (*FLAGS, "--rounds", "2")
    output = call_script(tmp_path, *flags, "--jobs", "2", "--name", "two", "--runs", "a").stdout
    assert "[2/2] " in output and "finished earlier" not in output
    assert output.count("test accuracy") == 2 + 2  # a line a run, and one a row
    call_script(tmp_path, *flags, "--name", "one", "--runs", "b")
    of_two = hashes(tmp_path / "a" / "two")
    assert len(of_two) == 2 and of_two == hashes(tmp_path / "b" / "one")
    tables = [(tmp_path / path / "summary.csv").read_text() for path in ("a/two", "b/one")]
    assert tables[0] == tables[1]


def test_a_stopped_comparison_ends_its_jobs_and_continues(tmp_path):
    flags = (*FLAGS, "--rounds", "1500", "--seeds", "2", "--jobs", "2", "--name", "mine")
    process = start(tmp_path, *flags)
    runs = tmp_path / "runs" / "mine"
    until = time.monotonic() + 100
    while not all_begun(runs, 2) and time.monotonic() < until:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopped with 4 runs left; run the same command to continue" in errors
    # Both jobs have ended, and said so: nobody writes into their files any more.
    for number in (1, 2):
        assert "stopped after round" in (runs / f"job-{number}.log").read_text()
    assert len(list(runs.glob("*/rounds.jsonl"))) == 2
    before = [path.read_text() for path in sorted(runs.glob("*/rounds.jsonl"))]
    time.sleep(1)
    assert before == [path.read_text() for path in sorted(runs.glob("*/rounds.jsonl"))]


@pytest.mark.parametrize("more", [(), ("--tune", "client_lr=0.01,0.1")])
@pytest.mark.parametrize("jobs", ["1", "2"])
def test_the_runs_of_a_comparison_share_a_time_limit(tmp_path, jobs, more):
    """A run that it ends is not finished, and has no row; without the limit all is completed."""
    flags = (*FLAGS, *more, "--rounds", "2", "--jobs", jobs, "--name", "mine")
    limited = call_script(tmp_path, *flags, "--time-limit", "0.01", "--json")
    assert limited.returncode == 0
    assert json.loads(limited.stdout.splitlines()[-1])["finished"] is False
    left = 4 if more else 2
    said = f"time_limit=0.01 has passed with {left} runs left; run the same command to continue"
    assert said in limited.stderr
    folder = tmp_path / "runs" / ("mine-tuning" if more else "mine")
    assert not json.loads((folder / "comparison.json").read_text())["finished"]
    assert not (folder / "summary.csv").exists() and not hashes(folder)
    if not more:
        whole = call_script(tmp_path, *flags, "--time-limit", "1h")
        assert whole.returncode == 0 and "has passed" not in whole.stderr
        assert len(hashes(folder)) == 2 and (folder / "summary.csv").exists()


def test_a_run_that_the_limit_of_a_comparison_ends_has_no_row(tmp_path):
    flags = (*FLAGS, "--rounds", "100000", "--time-limit", "3", "--name", "mine")
    done = call_script(tmp_path, *flags)
    assert done.returncode == 0
    assert "no further round fits after round" in done.stderr
    assert "time_limit=3 has passed with 2 runs left" in done.stderr
    assert not (tmp_path / "runs" / "mine" / "summary.csv").exists()


@pytest.mark.parametrize("compare", ["", "runs"])
def test_jobs_are_for_several_runs(tmp_path, monkeypatch, compare):
    monkeypatch.chdir(tmp_path)
    if compare:
        (tmp_path / "runs" / "a").mkdir(parents=True)
        (tmp_path / "runs" / "a" / "config.json").write_text("{}")
        compare = "runs/a"
    with pytest.raises(UserError, match="jobs=2 is for a comparison"):
        compared_rows(configure(jobs=2, compare=compare))


def test_images_from_python_are_not_in_other_processes(digits):
    with pytest.raises(UserError, match="jobs=2 cannot be combined with dataset="):
        fl.compare(configure(jobs=2, seeds=2), dataset=digits)
