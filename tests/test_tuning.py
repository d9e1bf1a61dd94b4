"""--tune: each row's value is chosen on held-out images, and the rows are trained with it."""

from typing import get_args

import federated_learning as fl
from harness.cli.fields import UserError
from harness.comparing import tuning
from harness.comparing.commands import MOST_HELD_OUT
from harness.comparing.comparison import Finished
from harness.comparing.sweep import Row, candidates_of_rows, compared_rows

import pytest
from runs import (
    NO_FIGURES,
    ON_DIGITS,
    call_script,
    configure,
    make_record,
    read_csv,
    read_metrics,
)

FLAGS = (*ON_DIGITS, "--rounds", "2", "--local-epochs", "1", *NO_FIGURES)


def candidates(**fields):
    """label -> the settings that are tried on a row."""
    config = configure(**fields)
    return candidates_of_rows(config, compared_rows(config))


def test_no_more_is_held_out_than_the_flag_allows():
    _, span, _ = get_args(fl.Config.types()["holdout"])
    assert span.high == MOST_HELD_OUT


def test_rows_are_tuned_by_the_fields_that_they_use_and_do_not_set():
    tried = candidates(compare="fedavg,fedprox", tune="prox_mu=0.1,1")
    assert tried == {"fedprox": [{"prox_mu": 0.1}, {"prox_mu": 1.0}]}
    tried = candidates(compare="fedavg(client_lr=0.3),scaffold", tune="client_lr=0.1,0.2")
    assert tried == {"scaffold": [{"client_lr": 0.1}, {"client_lr": 0.2}]}
    tried = candidates(compare="fedavg,fedprox", tune="client_lr=0.1,0.2;prox_mu=0.1,1")
    # for FedAvg the two values of prox_mu are one trial
    assert [len(of_row) for of_row in tried.values()] == [2, 4]
    assert candidates(tune="client_lr=0.1,0.2") == {
        "fedavg": [{"client_lr": 0.1}, {"client_lr": 0.2}]
    }


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"tune": "client_lr"}, "'client_lr' changes nothing|could not|is not a number"),
        ({"tune": "rounds=1,2"}, "does not begin with a field of the training"),
        ({"tune": "client_lr=0.1,1", "partition_file": "a.json"}, "combined with partition_file"),
        ({"tune": "alpha=0.1,1"}, "does not begin with a field of the training"),
        ({"tune": "client_lr=0.1,x"}, "client_lr"),
        ({"tune": "client_lr=0.1"}, "changes nothing in the rows"),
        ({"tune": "prox_mu=0.1,1"}, "changes nothing in the rows"),
        (
            {"tune": "client_lr=0.1,0.2", "compare": "mean,dp"},
            "cannot be combined with private runs .of row 'dp'",
        ),
        ({"tune": "client_lr=0.1,0.2", "resume": "runs/a"}, "resume their runs automatically"),
        ({"tune": "client_lr=0.1,0.2", "seeds": 150}, "makes 300 runs"),
    ],
)
def test_a_tuning_that_cannot_be_made_is_refused_before_anything_runs(fields, said):
    with pytest.raises(UserError, match=said):
        compared_rows(configure(**fields))


def test_a_configuration_that_tunes_is_more_than_one_run():
    with pytest.raises(UserError, match=r"tune='client_lr=0.1,0.2' asks for more than one run"):
        fl.run(configure(tune="client_lr=0.1,0.2"))


def test_the_best_value_on_held_out_images_is_trained_and_evaluated_on_the_test_set(
    tmp_path,
):
    compare = ["--compare", "fedavg,scaffold(client_lr=0.1)", "--name", "mine"]
    compare += ["--tune", "client_lr=0.001,0.1,0.02"]
    output = call_script(tmp_path, *FLAGS, *compare)
    means = {}
    for rate in ("0.001", "0.1", "0.02"):
        run = read_metrics(tmp_path / f"runs/mine-tuning/fedavg-client-lr{rate}-seed1")
        means[rate] = run["rounds"][-1]["test_accuracy"]
    assert max(means, key=means.get) == "0.1"
    for row in read_csv(tmp_path / "runs/mine/tuning.csv"):
        assert float(row["mean"]) == pytest.approx(means[row["client_lr"]])
        assert row["chosen"] == str(int(row["client_lr"] == "0.1"))
        assert row["seeds"] == "1"
    assert "fedavg: client lr 0.1 is the largest value tried" in output.stderr
    assert "scaffold (client lr 0.1): not tuned" in output.stdout
    summary = read_csv(tmp_path / "runs/mine/summary.csv")
    assert [row["client_lr"] for row in summary] == ["0.1", "0.1"]
    assert (
        "client lr tuned on 239 training images" in (tmp_path / "runs/mine/summary.tex").read_text()
    )

    # The rows' own runs are those of the same command without the tuning.
    call_script(tmp_path, *FLAGS, "--client-lr", "0.1", "--name", "plain")
    plain = read_metrics(tmp_path / "runs/plain")
    tuned = read_metrics(tmp_path / "runs/mine/fedavg-client-lr0.1-seed0")
    assert tuned["weights_sha256"] == plain["weights_sha256"]
    assert tuned["rounds"][-1]["test_accuracy"] == plain["rounds"][-1]["test_accuracy"]

    # Once more: all runs are reused.
    output = call_script(tmp_path, *FLAGS, *compare)
    assert output.stdout.count("finished earlier, reused") == 3 + 2


def test_trials_are_judged_by_all_of_their_seeds():
    """Of equal numbers of seeds that reach a target, the fewest rounds decide; else the mean."""
    row = Row("fedavg", {"algorithm": "fedavg"}, {}, {})
    trials = [{"client_lr": 0.1}, {"client_lr": 0.2}]
    first, second = (tuning.make_trial(row, trial).label for trial in trials)
    ends = {first: [(0.2, 0.9), (0.5, 0.8)], second: [(0.85, 0.7), (0.1, 0.84)]}
    records_of = {
        label: [[make_record(one, 1), make_record(two, 2)] for one, two in of_seeds]
        for label, of_seeds in ends.items()
    }
    seeds_of = {label: [2, 3] for label in ends}
    finished = Finished(records_of, {}, "", [], seeds_of, {}, {})
    assert tuning.rank(finished, first, 0)[-1] == pytest.approx(0.85)
    assert tuning.rank(finished, first, 0) > tuning.rank(finished, second, 0)
    assert tuning.rank(finished, second, 0.8)[:2] == (2, pytest.approx(-(1 + 1 + 0.7 / 0.74) / 2))
    assert tuning.rank(finished, second, 0.8) > tuning.rank(finished, first, 0.8)
    described = tuning.describe_trial(row, trials[0], finished, 0)
    assert described["seeds"] == "2 3" and described["mean"] == pytest.approx(0.85)
    assert described["sd"] == pytest.approx(0.1 / 2**0.5)


def test_a_data_set_from_python_is_held_out_too(tmp_path, monkeypatch, digits):
    monkeypatch.chdir(tmp_path)
    config = fl.parse([*FLAGS, "--tune", "client_lr=0.001,0.1", "--holdout", "300"])
    config = config.replace(rounds=1, name="mine", holdout=0)
    folder = fl.compare(config.replace(target_accuracy=0.3), dataset=digits)
    slow, fast = read_csv(folder / "tuning.csv")
    assert [slow["client_lr"], fast["client_lr"]] == ["0.001", "0.1"]
    assert (slow["reached"], slow["rounds_to_target"]) == ("0", "")
    assert (fast["reached"], fast["rounds_to_target"]) == ("1", "1.0")
    (summary,) = read_csv(folder / "summary.csv")
    assert summary["client_lr"] == "0.1"


def test_a_row_that_gets_the_value_of_another_stays_a_row_of_its_own(tmp_path):
    compare = ("--compare", "fedavg,fedavg(client_lr=0.1)", "--tune", "client_lr=0.001,0.1")
    done = call_script(tmp_path, *FLAGS, *compare, "--name", "mine")
    assert done.returncode == 0, done.stderr
    rows = read_csv(tmp_path / "runs/mine/summary.csv")
    assert [row["compared"] for row in rows] == [
        "fedavg (client lr 0.1), tuned",
        "fedavg (client lr 0.1)",
    ]
    assert rows[0]["mean"] == rows[1]["mean"]


def test_a_field_that_a_row_does_not_use_is_not_chosen_for_it():
    tried = candidates(compare="fedavg,fedprox", tune="client_lr=0.1,0.2;prox_mu=0.01,1")
    assert tried["fedavg"] == [{"client_lr": 0.1}, {"client_lr": 0.2}]


def test_a_schedules_field_is_tuned_with_the_schedule():
    tried = candidates(tune="client_schedule=constant,exponential;lr_decay=0.9,0.5")
    assert len(tried["fedavg"]) == 3  # constant, and exponential with each decay
