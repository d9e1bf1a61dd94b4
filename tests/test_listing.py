"""--list: the runs of a folder, by what lies there."""

import json
import math
import os

import federated_learning as fl
from harness.cli.listing import list_runs, print_list
from harness.storage.files import csv_table, to_json

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
    listed = list_runs(str(tmp_path), fl.Config())
    assert [(*line[:4], *line[5:]) for line in listed] == [
        ("a", 5, 5, 0.97, 5, "finished", ""),
        ("b", 2, 3, 0.6, 2, "unfinished", "alpha 0.1, model mlp, rounds 3, client_lr 0.05"),
        ("c", 1, 5, 0.5, 1, "ended early", "model mlp, algorithm scaffold"),
        ("d", 1, 1, 0.2, None, "finished", "num_clients 20, rounds 1, aggregator dp"),
        ("e", None, None, None, None, "cannot be read", ""),
        ("f", 1, 5, 0.5, 1, "ended early")
        + ("partition_file split.json, partition file, num_clients 7",),
        ("0-begun", *4 * (None,), "unfinished", "comparison of fedavg, fedprox, 2 seeds"),
        ("0-compared", *4 * (None,), "finished", "comparison of fedavg, fedprox, 2 seeds"),
        ("0-evaluated", None, None, 0.5, None, "finished", "evaluation on USPS"),
    ]
    assert listed[3].epsilon == 12.34
    print_list(listed)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split("  ")[0] == "folder" and "    model mlp, algorithm scaffold" in lines
    assert lines[1].split() == [
        "a",
        "5/5",
        "97.00%",
        "5",
        "finished",
    ]


def test_a_list_is_100_columns_wide_and_json_has_everything(tmp_path, capsys):
    name = "long" * 30
    make_run(tmp_path / name, configure(rounds=100_000, model="mlp", alpha=0.1), [0.5])
    values = {"values": [f"fedavg, alpha {number}" for number in range(20)], "finished": False}
    (tmp_path / "compared").mkdir()
    (tmp_path / "compared" / "comparison.json").write_text(to_json(values))
    (tmp_path / "compared" / "summary.csv").write_text("")  # a partial one
    fl.main(fl.parse(["--list", str(tmp_path)]))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100 and "comparison of fedavg, alpha 0," in lines[4]
    fl.main(fl.parse(["--list", str(tmp_path), "--json"]))
    printed = capsys.readouterr().out
    fl.main(fl.parse(["--list", str(tmp_path), "--json", "--quiet"]))
    assert capsys.readouterr().out == printed
    fl.main(fl.parse(["--list", str(tmp_path), "--quiet"]))
    assert capsys.readouterr().out == ""
    run, compared = json.loads(printed)
    assert run["folder"] == name and run["test_accuracy"] == 0.5 and run["of_rounds"] == 100_000
    assert compared["state"] == "unfinished" and compared["settings"].endswith("alpha 19")


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
    assert "unfinished" in lines["good"]
