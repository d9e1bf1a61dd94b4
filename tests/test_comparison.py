"""--compare and --seeds: one plot, one tidy table, and no run done twice."""

import itertools
import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import federated_learning as fl
from harness.cli.fields import UserError
from harness.comparing import completing, latex, outcomes, overlay
from harness.comparing.comparison import format_rate
from harness.comparing.significance import (
    compare_outcomes,
    detectable_difference,
    format_differences,
    holm,
    paired_test,
)
from harness.comparing.summary import Rates
from harness.comparing.sweep import Row, compared_rows, join_compared
from harness.reporting import comparison_plots, drawing
from harness.reporting.results import format_rounds_to_target
from harness.training.histories import rounds_to_target

import numpy as np
import pytest
import scipy.stats
from runs import (
    NO_FIGURES,
    ON_DIGITS,
    call_script,
    caption_of_rows,
    configure,
    make_record,
    read_csv,
    read_metrics,
    start,
    wait_for_round,
)

FLAGS = (*ON_DIGITS, "--rounds", "2", "--local-epochs", "1", *NO_FIGURES)


def table(folder, which="*"):
    (path,) = (folder / "runs").glob(f"compare-{which}/comparison.csv")
    return read_csv(path)


COMPARED = (*FLAGS, "--compare", "fedavg,scaffold", "--seeds", "2")


@pytest.fixture(scope="module")
def two_by_two(tmp_path_factory):
    """(the folder in which COMPARED ran, what it said)"""
    folder = tmp_path_factory.mktemp("compared")
    return folder, call_script(folder, *COMPARED)


@pytest.fixture
def compared(two_by_two, tmp_path):
    """A copy of that folder, and what was said."""
    shutil.copytree(two_by_two[0], tmp_path, dirs_exist_ok=True)
    return tmp_path, two_by_two[1]


@pytest.mark.slow
def test_a_comparison_is_its_runs_in_one_table_and_nothing_runs_twice(compared):
    tmp_path, done = compared
    assert done.returncode == 0 and "[4/4] scaffold, seed 1" in done.stdout, done.stderr
    rows = table(tmp_path)
    assert [(row["algorithm"], row["seed"], row["round"]) for row in rows] == [
        (name, seed, round_num)
        for name in ("fedavg", "scaffold")
        for seed in "01"
        for round_num in "12"
    ]
    assert (
        call_script(
            tmp_path, *FLAGS, "--name", "alone", "--seed", "1", "--algorithm", "scaffold"
        ).returncode
        == 0
    )
    alone = list(read_csv(tmp_path / "runs" / "alone" / "metrics.csv"))
    for ours, theirs in zip(rows[-2:], alone, strict=True):
        assert {**theirs, "seconds": ours["seconds"]} == {name: ours[name] for name in theirs}
    last, other = (
        [
            100 * float(row["test_accuracy"])
            for row in rows
            if row["algorithm"] == name and row["round"] == "2"
        ]
        for name in ("fedavg", "scaffold")
    )
    assert f"{np.mean(last):.2f}% ± {np.std(last, ddof=1):.2f}%" in done.stdout
    told = format_differences({"fedavg": last, "scaffold": other}, "fedavg", "points")
    assert f"rounds{told['scaffold']}\n" in done.stdout
    splits = {
        seed: {
            json.loads(path.read_text())["hash"]
            for path in (tmp_path / "runs").glob(f"*/*-seed{seed}/partition.json")
        }
        for seed in "01"
    }
    # the same split for both algorithms
    assert [len(hashes) for hashes in splits.values()] == [
        1,
        1,
    ]
    (interrupted,) = (tmp_path / "runs").glob("*/scaffold-seed0")
    (interrupted / "metrics.json").unlink()
    (interrupted / "checkpoints" / "round-000002.npz").unlink()
    again = call_script(tmp_path, *COMPARED)
    assert again.returncode == 0 and again.stdout.count("finished earlier, reused") == 3, (
        again.stderr
    )
    assert again.stdout.count("round 2/2") == 1 and "round 1/2" not in again.stdout
    assert [row | {"seconds": 0} for row in table(tmp_path)] == [
        row | {"seconds": 0} for row in rows
    ]


def test_the_comparisons_plot_draws_means_and_standard_deviations():
    curves = {"one": np.array([[0.5, 0.8], [0.7, 0.9]]), "two": np.array([[0.1, 0.2]] * 2)}
    figure = comparison_plots.plot_comparison(curves, "note")
    first, second = figure.axes[0].lines
    assert first.get_ydata() == pytest.approx([40, 15]) and second.get_ydata() == pytest.approx(
        [90, 80]
    )
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        f"one: 15.00 ± {5 * np.sqrt(2):.2f} %",
        "two: 80.00 ± 0.00 %",
    ]


def test_eleven_rows_are_eleven_lines():
    """Each with a colour, a marker and dashes that no other has together, and none as its
    neighbour."""
    styles = [tuple(drawing.style_of(number).values()) for number in range(308)]
    assert len(set(styles)) == 308
    for one, next_one in itertools.pairwise(styles):
        assert not set(one) & set(next_one)


def finished(seconds, **changes):
    """A run that is done, of two rounds that took so long."""
    records = [replace(make_record(0.5), seconds=seconds)] * 2
    return completing.Single(Row("a", changes), fl.Config(), records)


def test_the_time_of_a_comparison_is_told_by_its_runs_that_are_done():
    """Runs of 2 * 30 and 2 * 60 s: the mean is 90 s, four runs take 6 minutes."""
    waiting = completing.Single(Row("a", {}), fl.Config(), None)
    work = completing.describe_work
    assert work([waiting] * 4) == "4 runs left of 4"
    some = [finished(30.0), finished(60.0), *[waiting] * 4]
    assert work(some) == "4 runs left of 6, about 6 min"
    assert work([finished(math.nan), waiting]) == "1 run left of 2"  # a private run tells no time
    assert work([finished(30.0)]) == "0 runs left of 1"
    assert [completing.format_time(s) for s in (7.2, 300, 9000)] == ["7 s", "5 min", "2.5 h"]


def check_overlay(folder, rows, capsys):
    """That the runs of `rows`, (label, their folders by seed), are overlaid as their own tables
    have it; returns their folders as --compare takes them."""
    together = ",".join(str(run) for _, runs in rows for run in runs)
    fl.main(fl.parse(["--compare", together, "--name", "both", "--figures", "svg"]))
    said = capsys.readouterr().out
    both = folder / "runs" / "both"
    summary = read_csv(both / "summary.csv")
    assert [row["compared"] for row in summary] == [label for label, _ in rows]
    for row, (label, runs) in zip(summary, rows, strict=True):
        ends = [read_metrics(folder / run) for run in runs]
        mean = np.mean([100 * end["test_accuracy"] for end in ends])
        assert float(row["mean"]) == pytest.approx(mean) and row["seeds"] == "2"
        assert re.search(rf"^{label}.* test accuracy {mean:.2f}%", said, re.MULTILINE)
    assert b"<svg" in (both / "comparison.svg").read_bytes()
    return together


def test_finished_runs_are_overlaid(compared, tmp_path, monkeypatch, capsys):
    """Two seeds of two algorithms: rows by what differs, the seeds together."""
    monkeypatch.chdir(tmp_path)
    runs = sorted(path.relative_to(tmp_path) for path in tmp_path.glob("runs/*/*-seed?"))
    together = check_overlay(tmp_path, [("fedavg", runs[:2]), ("scaffold", runs[2:])], capsys)
    fl.main(fl.parse(["--compare", together, "--table-columns", "mean,personal"]))
    assert "the column personal of --table-columns is empty" in capsys.readouterr().err
    fl.main(fl.parse(["--compare", together.rpartition(",")[0], "--name", "three"]))
    assert "vs fedavg" not in capsys.readouterr().out  # their seeds differ: nothing to pair
    with pytest.raises(UserError, match="is a comparison, not a run"):
        fl.parse("--resume runs/both")
    with pytest.raises(UserError, match="for a grid give --compare twice"):
        fl.parse("--compare fedavg,alpha=1")
    with pytest.raises(UserError, match="is the same run as"):
        fl.main(fl.parse(["--compare", f"{runs[0]},{runs[0]}/"]))
    with pytest.raises(UserError, match="contains no run; give folders"):
        fl.parse(["--compare", "x/" + "y" * 300])
    with pytest.raises(UserError, match="is not a choice of"):
        fl.parse(["--compare", "y" * 300])
    with pytest.raises(UserError, match="'runs/none' contains no run; give folders"):
        fl.parse(["--compare", f"{runs[0]},runs/none"])
    (tmp_path / runs[0] / "metrics.json").unlink()
    with pytest.raises(
        UserError, match=f"{runs[0].name}' is not finished; continue it with --resume"
    ):
        fl.main(fl.parse(["--compare", together]))


@pytest.mark.thorough
def test_runs_of_two_rates_are_overlaid(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for rate in ("0.1", "0.3"):
        for seed in ("0", "1"):
            own = ["--client-lr", rate, "--seed", seed, "--name", f"{rate}-{seed}"]
            fl.run(fl.parse([*FLAGS, *own]))
    rows = [
        (f"client lr {rate}", [f"runs/{rate}-{seed}" for seed in (0, 1)]) for rate in (0.1, 0.3)
    ]
    check_overlay(tmp_path, rows, capsys)


@pytest.mark.parametrize(
    ("rows", "names"),
    [
        ([{}, {"algorithm": "fedprox"}], ["fedavg", "fedprox"]),
        (
            [{"algorithm": "fedprox"}, {"byzantine": 2, "attack": "backdoor"}],
            ["fedprox", "fedavg, backdoor, byzantine 2"],
        ),
        ([{"rounds": 3}, {"rounds": 4}], ["rounds 3", "rounds 4"]),
        (
            [{"client_lr": 0.1, "rounds": 3}, {"client_lr": 0.1, "rounds": 4}, {"client_lr": 0.3}],
            ["client lr 0.1, rounds 3", "client lr 0.1, rounds 4", "client lr 0.3, rounds 5"],
        ),
        ([{"data": "a.npz"}, {"data": "b.npz"}], ["mine", "other"]),
    ],
)
def test_rows_of_finished_runs_are_called_by_what_differs(rows, names):
    """Without fields that have no effect, such as the attack of nobody; in LaTeX as elsewhere."""
    runs = [
        overlay.Done(Path(name), configure(**row).effective(), "MNIST", "", "", [])
        for name, row in zip(("mine-seed0", "other-seed0", "third-seed0"), rows, strict=False)
    ]
    settings = overlay.row_settings(runs, fl.Config())
    assert overlay.name_rows(runs, settings, [2] * len(runs)) == names


def test_finished_runs_on_two_given_splits_are_two_rows():
    def made_on(split, seed):
        config = configure(partition_file="x.json", seed=seed)
        return overlay.Done(Path(f"{split}-seed{seed}"), config, "MNIST", "data", split, [])

    assert made_on("a", 0).kind == made_on("a", 1).kind != made_on("b", 0).kind


def test_the_best_is_bold_only_after_the_same_rounds():
    rows = [{"mean": 90.0, "sd": 0.5, "rounds": 3.0}, {"mean": 91.0, "sd": 0.5, "rounds": 4.0}]
    assert latex.outcome_cells(rows, 0) == [r"$90.0 \pm 0.5$", r"$91.0 \pm 0.5$"]
    rows[0]["rounds"] = 4.0
    assert latex.outcome_cells(rows, 0)[1] == r"$\mathbf{91.0 \pm 0.5}$"
    rows = [row | {"seeds": 2} for row in rows]
    assert latex.describe_outcome(rows, 0).startswith(r"Test accuracy (\%) after 4 rounds, mean")
    rows[0]["rounds"] = 2.0
    assert latex.describe_outcome(rows, 0).startswith(r"Test accuracy (\%) after 2 to 4 rounds, ")


def test_a_difference_is_tested_seed_by_seed():
    """Student's t of d = 1, 2, 3 is 2 / (1 / sqrt 3); with two degrees of freedom p = 1 - t /
    sqrt(2 + t ** 2)."""
    t = 2 * np.sqrt(3)
    assert paired_test([5, 6, 7], [6, 8, 10]) == pytest.approx((2, 1 - t / np.sqrt(2 + t**2)))
    assert paired_test([5, 6], [5, 6]) == (0, 1)
    difference, p = paired_test([5, 6], [4, 5])
    assert difference == -1 and math.isnan(p)  # equal differences have no spread to test with

    def told(own, other):
        return format_differences({"a": own, "b": other}, "a", "points")["b"]

    assert (
        told([5, 6, 7], [6, 8, 10])
        == "; +2.00 points vs a (95 % CI -0.48 to +4.48), no significant difference over 3 seeds "
        "(paired t-test, p 0.074; power 0.8 needs 3.3 points)"
    )
    assert told([5, 6, 7], [6, 7.1, 8]).startswith(
        "; +1.03 points vs a (95 % CI +0.89 to +1.18), significant over 3 seeds (paired t-test, p 0"
    )
    assert (
        told([5, 6], [4, 5]) == ("; -1.00 points vs a for every seed, so not testable")
        and told([5], [6]) == ""
    )


def test_the_interval_is_students_and_the_detectable_difference_is_found_in_four_of_five_cases():
    """4.303 is the 97.5 % quantile of Student's t with two degrees of freedom; 20,000 experiments
    of normal differences are tested one by one."""
    found = compare_outcomes({"a": [5, 6, 7], "b": [6, 8, 10]}, "a")["b"]
    assert found.half_width == pytest.approx(4.303 / 3**0.5, abs=1e-3)  # the sd of 1, 2, 3 is 1
    rng = np.random.default_rng(0)
    for num_seeds in (2, 3, 10):
        true_mean = detectable_difference(1.0, num_seeds)
        experiments = rng.normal(true_mean, 1, (20_000, num_seeds))
        ps = scipy.stats.ttest_1samp(experiments, 0, axis=1).pvalue
        assert (ps < 0.05).mean() == pytest.approx(0.8, abs=0.01)
    assert found.detectable == pytest.approx(detectable_difference(1.0, 3))
    same = compare_outcomes({"a": [97.03, 96.82], "b": [97.13, 96.92]}, "a")["b"]
    assert math.isnan(same.p) and math.isnan(same.half_width)  # up to the last bits


def test_several_rows_are_told_apart_by_holms_correction():
    """Holm 1979: the smallest of m times m, the next times m - 1, ..., never less than the one
    before, at most 1."""
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1, 1] and holm([]) == []
    first, second, third = holm([0.03, math.nan, 0.04])  # two tests
    assert (first, third) == pytest.approx((0.06, 0.06)) and math.isnan(second)
    rows = {
        "a": [5, 6, 7, 8],
        "b": [6, 7.1, 8.2, 9],
        "c": [5.4, 6.6, 7.1, 8.5],
        "d": [5, 6, 7.1, 7.9],
    }
    alone = {name: paired_test(rows["a"], rows[name])[1] for name in "bcd"}
    told = format_differences(rows, "a", "points")
    assert alone["c"] < 0.05 < 2 * alone["c"]  # by itself it would be told apart
    assert (
        ", no significant difference over 4 seeds (paired t-test, Holm over 3 rows, p 0.0"
        in told["c"]
    )
    assert ", significant over 4 seeds" in told["b"]


def test_rows_are_told_against_the_usual_one_where_every_seed_has_an_end():
    ends = {"x": [1.0, 2.0], "usual": [3.0, 5.0], "y": [1.0, None]}
    assert set(outcomes.differences_to_base(ends, "usual", "rounds")) == {"x"}
    assert set(outcomes.differences_to_base(ends, "x", "rounds")) == {"usual"}
    assert outcomes.differences_to_base({"y": ends["y"], "x": ends["x"]}, "y", "rounds") == {}


def test_rounds_to_a_target_are_compared_by_the_seeds_that_get_there():
    """0.6 is crossed half-way from 0.5 to 0.7 (round 1.5), and with the first 0.9 (a quarter from
    0.5 to it: 1.25)."""
    curves = {
        "fast": [np.array([0.5, 0.7]), np.array([0.5, 0.9])],
        "half": [np.array([0.5, 0.7]), np.array([0.1, 0.2])],
    }
    needed = {
        name: [rounds_to_target(curve, 0.6) for curve in several]
        for name, several in curves.items()
    }
    told = {name: format_rounds_to_target(several) for name, several in needed.items()}
    assert told == {
        "fast": f"1.4 ± {0.25 / np.sqrt(2):.1f} rounds",
        "half": "1.5 rounds; not reached: seed 1",
    }
    assert format_rounds_to_target([None, None]) == "not reached"
    figure = comparison_plots.plot_rounds_to_target(curves, needed, 0.6, "note")
    *lines, target = figure.axes[0].lines
    assert (
        lines[1].get_ydata() == pytest.approx([50, 10])
        and len(lines) == 4
        and set(target.get_ydata()) == {40}
    )
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        *(f"{name}: {told[name]}" for name in curves),
        "target: error 40 %",
    ]


def test_a_comparison_to_a_target_tells_rounds(tmp_path, monkeypatch, capsys):
    """Each run ends where it gets there, and none is cut to the length of another."""
    monkeypatch.chdir(tmp_path)
    fl.compare(
        fl.parse(
            [*FLAGS, "--rounds", "8", "--compare", "fedavg,fedsgd", "--target-accuracy", "0.8"]
        )
    )
    said = capsys.readouterr().out
    rows = table(tmp_path)
    for name in ("fedavg", "fedsgd"):
        curve = [float(row["test_accuracy"]) for row in rows if row["algorithm"] == name]
        rounds = format_rounds_to_target([rounds_to_target(curve, 0.8)])
        assert f"{name}  target accuracy 80.00%: {rounds}" in said
        assert (len(curve) < 8) == (name == "fedavg") and (curve[-1] >= 0.8) == (name == "fedavg")
    lower = fl.compare(
        fl.parse(
            [*FLAGS, "--rounds", "8", "--compare", "fedavg,fedsgd", "--target-accuracy", "0.7"]
        )
    )
    # the runs are there already, the picture is another
    assert len(list(lower.parent.glob("compare-*"))) == 2


def test_a_comparison_is_not_run_as_one_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words, function in [
        ("--compare fedavg,fedprox --seeds 3", "fl.compare"),
        ("--seeds 2", "fl.compare"),
        ("--list runs", "fl.main"),
    ]:
        with pytest.raises(UserError, match=f"call {function}"):
            fl.run(fl.parse(words))
    with pytest.raises(UserError, match="call fl.main"):
        fl.run(fl.Config().replace(version=True))
    with pytest.raises(UserError, match="compares nothing"):
        fl.compare(fl.Config())
    assert list(tmp_path.iterdir()) == []


def test_a_rate_is_named_where_a_label_names_the_servers():
    names = ["fedavg (server lr 0.5)", "scaffold (server lr 0.5)", "fedavg (client lr 0.3)"]
    rates = {name: Rates(0.05 * place, 0.5, 16) for place, name in enumerate(names, 1)}
    assert [format_rate(name, rates) for name in names] == [" (lr 0.05)", " (lr 0.1)", ""]


def test_what_is_compared_stands_in_the_caption(digits):
    caption = caption_of_rows("--dataset digits --compare mean,median --seeds 3 --seed 4", digits)
    assert "aggregators compared: mean; median ·" in caption and "seeds 4 to 6" in caption
    assert [row.changes for row in compared_rows(configure(seeds=2)).rows] == [
        {"algorithm": "fedavg"}
    ] and compared_rows(fl.Config()) is None
    with pytest.raises(UserError, match="drop one of them"):
        configure(compare="fedavg,fedprox", resume="runs/x")


def test_a_budget_that_allows_no_round_is_a_mistake(tmp_path):
    flags = (*ON_DIGITS, "--aggregator", "dp", "--epsilon-budget", "0.1")
    done = call_script(tmp_path, *flags)
    assert (
        done.returncode == 2
        and "epsilon_budget=0.1 allows no round" in done.stderr.splitlines()[-1]
    )


def test_a_name_that_another_comparison_has_is_not_overwritten(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = " ".join(FLAGS).replace("--rounds 2", "--rounds 1") + " --name mine"
    first = fl.compare(fl.parse(f"{flags} --compare fedavg,fedprox"))
    table = (first / "comparison.csv").read_bytes()
    assert fl.compare(fl.parse(f"{flags} --compare fedavg,fedprox")) == first  # the same comparison
    assert (first / "comparison.csv").read_bytes() == table
    other = fl.compare(fl.parse(f"{flags} --compare fedavg,fedsgd"))
    assert other.name == "mine-2" and (first / "comparison.csv").read_bytes() == table


REFUSED = {
    "--partition iid,labels-per-client --num-clients 4 --labels-per-client 2": (
        "leave some of the 10 labels without a holder"
    ),
    "--algorithm fedavg,scaffold --model cnn --num-clients 500": ("GiB, more than 1 GiB"),
    "--aggregator mean,dp --epsilon-budget 0.001": "allows no round",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_all_runs_are_checked_before_the_first_begins(tmp_path, monkeypatch, flags):
    monkeypatch.chdir(tmp_path)
    _, names, *others = flags.split()
    with pytest.raises(UserError, match=REFUSED[flags]):
        fl.compare(fl.parse(["--dataset", "digits", "--model", "mlp", *others, "--compare", names]))
    assert list(tmp_path.iterdir()) == []


def test_equal_rows_are_called_the_same():
    told = format_differences({"a": [90.0, 91.0], "b": [90.0, 91.0]}, "a", "points")
    assert told == {"b": "; identical to a for every seed"}


def test_a_target_that_nobody_reaches_leaves_the_accuracy():
    records = [make_record(accuracy, number) for number, accuracy in enumerate([0.5, 0.7, 0.6], 1)]
    runs = {"fedavg": [records, [make_record(0.8)]]}
    _, texts, _ = outcomes.compare_rounds_to_target(runs, 0.95, "caption", {"fedavg": [0, 1]})
    assert texts["fedavg"] == (
        "target accuracy 95.00%: not reached; highest test accuracy 75.00% ± 7.07%"
    )


@pytest.mark.slow
def test_ctrl_c_in_a_comparison_says_that_the_same_command_goes_on(tmp_path):
    flags = (*FLAGS[:-3], "1000", "--compare", "fedavg,scaffold")
    process = start(tmp_path, *flags)
    wait_for_round(process)
    process.send_signal(2)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert errors.splitlines()[-1].endswith("; run the same command to continue"), errors


def test_values_of_a_field_and_grids_are_rows():
    rates = compared_rows(configure(compare="client_lr=0.05,0.1"))
    assert [row.label for row in rates.rows] == ["client lr 0.05", "client lr 0.1"]
    assert [row.changes for row in rates.rows] == [{"client_lr": 0.05}, {"client_lr": 0.1}]
    assert rates.base == "client lr 0.05"  # None, the default, is none of them
    words = ["--compare", "algorithm=scaffold,fedavg", "--seed", "3", "--compare=alpha=0.1,0.5"]
    assert join_compared(words) == [
        *("--seed", "3", "--compare"),
        "algorithm=scaffold,fedavg;alpha=0.1,0.5",
    ]
    config = fl.parse(words)
    grid = compared_rows(config)
    assert config.seed == 3 and grid.fields == ("algorithm", "alpha")
    assert [row.label for row in grid.rows] == [
        f"{name}, alpha {alpha}" for name in ("scaffold", "fedavg") for alpha in (0.1, 0.5)
    ]
    # which algorithm is better is asked for each alpha
    assert {grid.base[row.label] for row in grid.rows} == {
        row.label for row in grid.rows if row.changes["algorithm"] == "fedavg"
    }
    assert grid.base["scaffold, alpha 0.1"] == "fedavg, alpha 0.1"
    clients = compared_rows(configure(compare="num_clients=5,10"))
    assert clients.rows[0][:2] == ("num clients 5", {"num_clients": 5})
    close = compared_rows(configure(compare="client_lr=0.12345678,0.12345679"))
    assert len({row.label for row in close.rows}) == 2
    both = configure(aggregator="dp", num_clients=20, compare="public_cohorts=True,False")
    assert [row.changes["public_cohorts"] for row in compared_rows(both).rows] == [True, False]
    with pytest.raises(UserError, match="--compare needs a value"):
        fl.parse("--compare --seeds 3")


THREE = ("num_clients", "shards_per_client", "local_epochs")


@pytest.mark.parametrize(
    ("compare", "said"),
    [
        ("seed=1,2", "'seed' is not a field that a comparison can change"),
        ("data=a,b", "'data' is not a field that a comparison can change"),
        ("alpha=0.1,x", "alpha='x' is not a number; it must be a number from"),
        ("alpha=0.1,0.1", "has two rows 'alpha 0.1'; give each row once"),
        ("alpha=0.1;alpha=0.2", "names a field twice"),
        ("alpha=0.1,0.10", "has two rows 'alpha 0.1'"),
        ("alpha=1,1.0", "has two rows 'alpha 1'"),
        ("rounds=5,10", "'rounds' is not a field that a comparison can change"),
        (";;", "compare=';;' names nothing"),
        ("model=a/own.py:f,b/own.py:f", "two rows 'own.py:f'; .*functions different names"),
        ("a/own.py:f,b/own.py:f", "name the field too, such as algorithm=a/own.py:f"),
        ("own.py:prox,fedavg", "name the field too, such as algorithm=own.py:prox"),
        ("num_clients=" + ",".join(map(str, range(1, 300))), "makes 299 runs; choose at most 200"),
        (
            ";".join(f"{field}={','.join(map(str, range(1, 1000)))}" for field in THREE),
            "makes 997,002,999 runs; choose at most 200",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(compare, said):
    with pytest.raises(UserError, match=said):
        configure(compare=compare)


@pytest.mark.slow
def test_a_grid_runs_each_of_its_cells_once(compared):
    """One of them, fedavg at the default alpha, is there from another comparison."""
    tmp_path, _ = compared
    flags = (*FLAGS, "--compare", "fedavg,fedprox", "--compare", "alpha=0.5,1")
    done = call_script(tmp_path, *flags, "--prox-mu", "0.1")
    assert done.returncode == 0 and "has no effect" not in done.stderr, done.stderr
    assert "[4/4] fedprox, alpha 1, seed 0" in done.stdout
    assert done.stdout.count("finished earlier, reused") == 1
    rows = table(tmp_path, "*alpha*")
    cells = {(row["algorithm"], float(row["alpha"])) for row in rows}
    assert cells == {("fedavg", 0.5), ("fedavg", 1), ("fedprox", 0.5), ("fedprox", 1)}
    again = call_script(tmp_path, *FLAGS, "--compare", "alpha=1,0.5")
    assert again.stdout.count("finished earlier, reused") == 2, again.stdout


@pytest.mark.slow
def test_two_equal_comparisons_at_once_share_their_runs(tmp_path):
    """As a job array begins them: each run is made once, and both have the whole table."""
    flags = (*FLAGS, "--compare", "fedavg,fedprox", "--seeds", "2", "--num-clients", "3")
    processes = [start(tmp_path, *flags) for _ in range(2)]
    ends = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], ends
    assert len(list(tmp_path.glob("runs/*/*-seed?"))) == 4
    assert sum(out.count("round 2/2") for out, _ in ends) == 4
    for out, _ in ends:
        assert "wrote comparison.csv" in out
    assert len(table(tmp_path)) == 8


@pytest.mark.slow
def test_after_the_target_all_rounds_are_trained_if_asked_for(tmp_path):
    """The table then has the rounds to the target and the accuracy after all rounds, and a run that
    stopped at its target is continued."""
    flags = ("--dataset", "digits", "--model", "logreg", "--num-clients", "2", "--figures", "none")
    flags += ("--rounds", "6", "--target-accuracy", "0.6")
    stopped = call_script(tmp_path, *flags, "--compare", "fedavg,fedprox", "--name", "stopped")
    assert stopped.returncode == 0 and "after 6 rounds" not in stopped.stdout
    done = call_script(
        tmp_path, *flags, "--compare", "fedavg,fedprox", "--after-target", "continue"
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("fed")]
    assert len(lines) == 2
    for line in lines:
        assert "target accuracy 60.00%:" in line and "rounds; test accuracy" in line
        assert "after 6 rounds" in line
    (folder,) = (path for path in (tmp_path / "runs").glob("compare-*"))
    rows = read_csv(folder / "summary.csv")
    assert [row["rounds"] for row in rows] == ["6.0", "6.0"]
    assert all(float(row["rounds_to_target"]) < 6 and float(row["mean"]) > 60 for row in rows)
