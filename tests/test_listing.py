"""--list: the runs of a folder, by what lies there."""

import json
import math
import os

import federated_learning as fl
from harness.files import csv_table, to_json
from harness.listing import print_runs

import pytest
from runs import call_script, configure, make_record


def make_run(folder, config, accuracies, finished=True, **figures):
    """What a run leaves of which --list tells."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(to_json(config.effective().to_dict()))
    records = [make_record(accuracy, number) for number, accuracy in enumerate(accuracies, 1)]
    (folder / "metrics.csv").write_text(csv_table(r.figures() | figures for r in records))
    if finished:
        (folder / "metrics.json").write_text("{}")


def lines_of(capsys):
    return [line.split("  ") for line in capsys.readouterr().out.splitlines()]


def test_a_run_is_a_line_with_what_differs_from_the_default(tmp_path, capsys):
    make_run(tmp_path / "a", configure(), [0.5, 0.9, 0.95, 0.96, 0.97])
    slow = configure(model="mlp", alpha=0.1, client_lr=0.05, rounds=3, name="b")
    make_run(tmp_path / "b", slow, [0.5, 0.6], finished=False)
    scaffold = configure(algorithm="scaffold", model="mlp", target_accuracy=0.5)
    make_run(tmp_path / "c", scaffold, [0.5])
    private = configure(aggregator="dp", num_clients=20, rounds=1)
    make_run(tmp_path / "d", private, [0.2], epsilon=12.34, seconds="nan")
    split = configure(partition_file="/there/split.json", num_clients=7)
    make_run(tmp_path / "f", split.replace(partition="file"), [0.5])
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "config.json").write_text("[1]")
    (tmp_path / "no-run").mkdir()
    compared = {"values": ["fedavg", "fedprox"], "seeds": 2}
    for name in ("0-compared", "0-begun"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "comparison.json").write_text(to_json(compared))
    (tmp_path / "0-compared" / "summary.csv").write_text("")
    (tmp_path / "0-evaluated").mkdir()
    evaluated = {"evaluated_run": "/there/a", "dataset": "USPS", "test_accuracy": 0.5}
    (tmp_path / "0-evaluated" / "metrics.json").write_text(to_json(evaluated))
    print_runs(str(tmp_path), fl.Config())
    header, *lines = [[cell.strip() for cell in line if cell] for line in lines_of(capsys)]
    assert header[:3] == ["folder", "non-default settings", "rounds"]
    assert lines == [
        ["a", "nothing", "5/5", "97.00%", "5", "finished"],
        ["b", "alpha 0.1, model mlp, rounds 3, client_lr 0.05", "2/3", "60.00%", "2"]
        + ["stopped or still running"],
        ["c", "model mlp, algorithm scaffold", "1/5", "50.00%", "1", "ended early"],
        ["d", "num_clients 20, rounds 1, aggregator dp", "1/1", "20.00%", "12.3", "finished"],
        ["e", "cannot be read"],
        ["f", "partition_file split.json, partition file, num_clients 7", "1/5", "50.00%", "1"]
        + ["ended early"],
        ["0-begun", "comparison of fedavg, fedprox, 2 seeds", "stopped or still running"],
        ["0-compared", "comparison of fedavg, fedprox, 2 seeds", "finished"],
        ["0-evaluated", "evaluation on USPS", "50.00%", "finished"],
    ]


def test_list_alone_is_that_of_the_folder_runs():
    assert fl.parse("--list").run.list == fl.parse("--list --seed 1").run.list == "runs"
    assert fl.parse("--list there").run.list == fl.parse("--list=there").run.list == "there"


@pytest.mark.parametrize("folder", ["nowhere", ".", "x" * 300])
def test_a_folder_without_runs_is_a_mistake(tmp_path, folder):
    done = call_script(tmp_path, "--list", folder)
    assert done.returncode == 2
    assert f"list='{folder[:190]}" in done.stderr and done.stderr.count("\n") == 1
    assert done.stderr.endswith(" contains no run; give the folder of --runs\n")


def test_one_folder_that_cannot_be_read_hides_no_other(tmp_path, capsys):
    """A pipe as metrics.csv, a link to /dev/zero, rounds without end."""
    config = fl.Config().to_dict()
    for name in ("pipe", "zero", "endless", "good"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    os.mkfifo(tmp_path / "pipe" / "metrics.csv")
    (tmp_path / "zero" / "metrics.csv").symlink_to("/dev/zero")
    endless = json.dumps(config | {"rounds": math.inf})
    (tmp_path / "endless" / "config.json").write_text(endless)
    fl.main(fl.parse(["--list", str(tmp_path)]))
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    for name in ("pipe", "zero", "endless"):
        assert lines[name].endswith("cannot be read")
    assert "stopped" in lines["good"]
