"""The table of a comparison, by hand."""

import csv
import dataclasses
import math
import shutil
import subprocess

from harness.cli.fields import UserError
from harness.comparing.latex import name_settings
from harness.comparing.outcomes import compare_accuracies, cost_figures
from harness.comparing.significance import holm
from harness.comparing.summary import Rates, describe_spread, summarize
from harness.comparing.tables import COLUMNS, ROW, check_columns, find_empty, to_latex, to_markdown
from harness.storage.files import csv_table

import numpy as np
import pytest
import scipy.stats
from runs import make_record


def runs(*accuracies):
    """A run of two rounds for each final accuracy."""
    return [[make_record(0.5, 1), make_record(accuracy, 2)] for accuracy in accuracies]


RECORDS = {
    "fedavg": runs(0.90, 0.92, 0.94),
    "fedprox": runs(0.91, 0.94, 0.95),
    "median": runs(0.80, 0.90, 0.85),
}
RATES = {name: Rates(0.1 if name == "fedprox" else 0.2, 1.0, 16) for name in RECORDS}


def test_a_row_has_mean_interval_difference_and_p():
    fedavg, fedprox, median = summarize(RECORDS, RATES, "fedavg", 0)
    assert (fedavg["compared"], fedavg["seeds"], fedavg["rounds"]) == ("fedavg", 3, 2)
    assert (fedprox["client_lr"], fedprox["server_lr"]) == (0.1, 1.0)
    assert fedavg["mean"] == pytest.approx(92) and fedavg["sd"] == pytest.approx(2)
    # 4.303: Student's t with two degrees of freedom, in every table
    assert fedavg["high"] - 92 == pytest.approx(4.303 * 2 / 3**0.5, abs=1e-3)
    assert 92 - fedavg["low"] == pytest.approx(fedavg["high"] - 92)
    assert fedavg["difference"] is fedavg["p"] is fedavg["p_holm"] is None
    assert fedprox["difference"] == pytest.approx(4 / 3)
    ps = [
        scipy.stats.ttest_rel([91, 94, 95], [90, 92, 94]).pvalue,
        scipy.stats.ttest_rel([80, 90, 85], [90, 92, 94]).pvalue,
    ]
    assert [fedprox["p"], median["p"]] == pytest.approx(ps)
    assert [fedprox["p_holm"], median["p_holm"]] == pytest.approx(holm(ps))
    assert fedavg["reached"] is fedavg["rounds_to_target"] is fedavg["epsilon"] is None


def test_a_mean_to_a_target_leaves_no_seed_out():
    """One of fedavg's seeds reaches 0.93 (at 43/44 between the rounds), two of fedprox's; all reach
    0.7, half-way from 0.5 to 0.9 and so on."""
    fedavg, fedprox, _ = summarize(
        RECORDS, RATES, "fedavg", 0.93, dict.fromkeys(RECORDS, [4, 5, 6])
    )
    assert (fedavg["reached"], fedprox["reached"]) == (1, 2)
    assert (fedavg["not_reached"], fedprox["not_reached"]) == ("4 5", "4")
    for row in (fedavg, fedprox):
        for column in ("rounds_to_target", "megabytes_to_target", "p", "difference"):
            assert row[column] is None, column
    fedavg, fedprox, _ = summarize(RECORDS, RATES, "fedavg", 0.7)
    needed = {
        name: [1 + 0.2 / (accuracy - 0.5) for accuracy in ends]
        for name, ends in {"fedavg": (0.90, 0.92, 0.94), "fedprox": (0.91, 0.94, 0.95)}.items()
    }
    assert fedavg["rounds_to_target"] == pytest.approx(np.mean(needed["fedavg"]))
    difference = np.subtract(needed["fedprox"], needed["fedavg"])
    assert fedprox["rounds_difference"] == pytest.approx(difference.mean())
    assert fedprox["p"] == pytest.approx(scipy.stats.ttest_1samp(difference, 0).pvalue)
    assert fedprox["difference"] is None and fedprox["not_reached"] is None


def test_runs_that_end_at_different_rounds_are_not_tested():
    """As to a target: each accuracy is that of its own end, the megabytes are those up to the
    target, 1 + 1 a round."""
    records_of = {
        name: [
            [
                dataclasses.replace(make_record(accuracy, n), bytes_down=10**6, bytes_up=10**6)
                for n, accuracy in enumerate(curve, 1)
            ]
            for curve in curves
        ]
        for name, curves in {
            "fast": ([0.5, 0.9], [0.6, 0.92]),
            "slow": ([0.1, 0.2, 0.3, 0.95], [0.1, 0.2, 0.96, 0.9]),
        }.items()
    }
    rates = dict.fromkeys(records_of, Rates(0.1, 1.0, 16))
    fast, slow = summarize(records_of, rates, "fast", 0)
    assert (fast["mean"], slow["mean"]) == pytest.approx((91, 92.5))
    assert (fast["rounds"], slow["rounds"], slow["difference"], slow["p"]) == (2, 4, None, None)
    fast, slow = summarize(records_of, rates, "fast", 0.9)
    assert (fast["mean"], slow["mean"]) == pytest.approx((91, 92.5))
    assert (fast["megabytes_to_target"], slow["megabytes_to_target"]) == (4, (8 + 6) / 2)
    assert slow["rounds_difference"] == pytest.approx(
        np.mean([3 + 0.6 / 0.65, 2 + 0.7 / 0.76]) - np.mean([2, 1 + 0.3 / 0.32])
    )


def test_one_seed_has_no_spread_and_no_p():
    assert describe_spread([90.0]) == {"mean": 90.0, "sd": None, "low": None, "high": None}
    single = {name: records[:1] for name, records in RECORDS.items()}
    _, fedprox, _ = summarize(single, RATES, "fedavg", 0)
    assert fedprox["difference"] == pytest.approx(1) and fedprox["p"] is None


def test_other_images_and_a_users_metrics_have_columns():
    """Means over the seeds; a row without them has none, and no name hides another column."""

    def ended(success, metrics):
        record = make_record(0.5)
        return [dataclasses.replace(record, extra_accuracies=success, metrics=metrics)]

    records_of = {
        "plain": [ended({}, {"balanced": 0.5, "mean": 3.0}) for _ in range(2)],
        "attacked": [
            ended({"attack_success": share}, {"balanced": share}) for share in (0.25, 0.75)
        ],
    }
    plain, attacked = summarize(records_of, dict.fromkeys(records_of, RATES["fedavg"]), "plain", 0)
    assert (plain["attack_success"], attacked["attack_success"]) == (None, 50)
    assert plain["balanced"] == attacked["balanced"] == 0.5
    assert (plain["mean"], plain["metric_mean"], attacked["metric_mean"]) == (50, 3.0, None)
    head, _, *lines = to_markdown([plain, attacked]).splitlines()
    assert head.endswith("| backdoor success (%) | balanced | metric\\_mean |".replace("\\", ""))
    assert lines[1].endswith("| 50.00 | 0.5 |  |")
    check_columns("mean,balanced,metric_mean", ["balanced", "mean"])
    chosen = to_markdown([plain, attacked], "mean,balanced,other").splitlines()
    assert chosen[0] == "| compared | test accuracy (%) | balanced |"
    assert find_empty([plain, attacked], "balanced,other") == ["other"]


def test_a_metric_may_be_called_as_it_likes():
    run = [dataclasses.replace(make_record(0.5), metrics={"precision": math.nan, "compared": 2.0})]
    (row,) = summarize({"a": [run]}, {"a": RATES["fedavg"]}, "", 0)
    assert row["compared"] == "a" and row["metric_compared"] == 2
    assert to_markdown([row], "precision").splitlines()[-1] == "| a | nan |"


def test_the_same_table_in_three_forms():
    rows = summarize(RECORDS, RATES, "fedavg", 0)
    written = list(csv.DictReader(csv_table(rows).splitlines()))
    assert float(written[0]["mean"]) == pytest.approx(92) and written[0]["p"] == ""
    markdown = to_markdown(rows).splitlines()
    assert markdown[0].startswith("| compared | seeds | rounds | client lr | server lr |")
    assert markdown[2].startswith("| fedavg | 3 | 2 | 0.2 | 1 | 92.00 | 2.00 | 87.03 | 96.97 |")
    assert len({line.count("|") for line in markdown}) == 1 and "target" not in markdown[0]
    assert to_markdown(rows, "mean,p").splitlines()[0] == "| compared | test accuracy (%) | p |"
    with pytest.raises(UserError, match="'speed' is not a column of summary.csv; choose from"):
        check_columns("mean,speed", ["balanced"])
    latex = to_latex(rows, "digits, 50 %", "tab_1")
    head = r" & accuracy (\%) & difference (95\,\% CI) & $p$ (Holm) \\"
    assert head in latex and r"\label{tab:tab_1}" in latex and "digits, 50 \\%." in latex
    assert r"fedavg & $92.0 \pm 2.0$ &  &  \\" in latex
    assert r"fedprox & $\mathbf{93.3 \pm 2.1}$ & $+1.33$ ($-0.10$, $+2.77$) & 0.11 \\" in latex
    chosen = to_latex(rows, "digits", columns="mean,seeds")
    assert r"fedavg & 92.00 & 3 \\" in chosen


def test_a_grid_is_a_papers_table_that_compiles(tmp_path):
    """Its columns are the values of the second field; the best of each is in bold."""
    records_of = {
        "fedavg, alpha 0.1": runs(0.70, 0.72),
        "fedavg, alpha 1": runs(0.90, 0.92),
        "scaffold, alpha 0.1": runs(0.80, 0.84),
        "scaffold, alpha 1": runs(0.85, 0.86),
    }
    rates = dict.fromkeys(records_of, Rates(0.1, 1.0, 16))
    names = {"fedavg": "FedAvg", "scaffold": "SCAFFOLD"}
    places = [
        (name_settings({"algorithm": algorithm}, names, ""), name_settings({"alpha": a}, names, ""))
        for algorithm in names
        for a in (0.1, 1.0)
    ]
    latex = to_latex(summarize(records_of, rates, "", 0), "digits", "grid", places=places)
    assert latex.splitlines()[6:11] == [
        r" & $\alpha = 0.1$ & $\alpha = 1$ \\",
        r"\midrule",
        r"FedAvg & $71.0 \pm 1.4$ & $\mathbf{91.0 \pm 1.4}$ \\",
        r"SCAFFOLD & $\mathbf{82.0 \pm 2.8}$ & $85.5 \pm 0.7$ \\",
        r"\bottomrule",
    ]
    to_target = to_latex(
        summarize(records_of, rates, "", 0.71), "digits", "x", target=0.71, places=places
    )
    # 0.71 is crossed at 1 + 0.21 / 0.4 and so on; one seed of FedAvg at 0.1 ends at 0.70
    assert r"FedAvg & $> 2$ (1/2) & $\mathbf{1.5 \pm 0.0}$ \\" in to_target
    assert name_settings({"model": "/a_b/net.py:build"}, {}, "") == r"net.py:build"
    if not shutil.which("pdflatex"):
        pytest.skip("no pdflatex here: the tables are not compiled")
    page = "\\documentclass{article}\\usepackage{booktabs}\\begin{document}"
    (tmp_path / "page.tex").write_text(f"{page}{latex}{to_target}\\end{{document}}")
    words = ["pdflatex", "-halt-on-error", "page.tex"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stdout[-500:]


def test_work_to_a_target_is_counted_up_to_its_round():
    """Two clients a round of 2 and 3 steps on 20 and 48 images in batches of 16; the second of
    three rounds reaches 0.8: 10 steps, and 2 * (20 + 48) examples (of one pass each)."""
    clients = [{"examples": 20.0, "steps": 2.0}, {"examples": 48.0, "steps": 3.0}]
    run = [
        dataclasses.replace(make_record(accuracy, number), clients=clients)
        for number, accuracy in enumerate([0.5, 0.8, 0.9], 1)
    ]
    (row,) = summarize({"a": [run]}, {"a": Rates(0.1, 1.0, 16)}, "", 0.8)
    assert (row["steps_to_target"], row["examples_to_target"]) == (10, 136)
    (row,) = summarize({"a": [run]}, {"a": Rates(0.1, 1.0, 16)}, "", 0.95)
    assert (row["steps_to_target"], row["reached"], row["censored_at"]) == (None, 0, 3)


def test_a_row_that_has_fewer_columns_leaves_the_others_empty():
    """As a private run's, beside one that tells what its clients reported."""
    text = csv_table([{"a": 1, "b": 2}, {"b": 3, "c": 4}])
    assert text == "a,b,c\n1,2,\n,3,4\n" and csv_table([]) == ""


def test_cost_is_drawn_where_the_rows_send_different_amounts():
    """Two megabytes a round, and four: after two rounds four and eight."""
    records_of = {
        name: [
            [dataclasses.replace(record, bytes_down=half, bytes_up=half) for record in records]
            for records in RECORDS[name]
        ]
        for name, half in (("fedavg", 1_000_000), ("fedprox", 2_000_000))
    }
    fedavg, fedprox = summarize(records_of, RATES, "fedavg", 0)
    assert (fedavg["megabytes"], fedprox["megabytes"]) == (4, 8)
    figures = cost_figures(records_of, "digits")
    first, second = figures["comparison_by_megabytes.png"]().axes[0].lines
    assert first.get_xdata().tolist() == [2, 4] and second.get_xdata().tolist() == [4, 8]
    assert first.get_ydata().tolist() == pytest.approx([50, 8])
    assert first.get_label() == "fedavg: 8.00 ± 2.00 %, 4.0 MB"
    assert cost_figures({name: records_of["fedavg"] for name in ("a", "b")}, "digits") == {}


def test_rows_are_tested_by_their_last_round_and_not_by_their_best():
    """Both fell from 0.99: by the best they are equal, by the last fedprox is a point ahead."""
    curves = {"fedavg": ([0.99, 0.90], [0.99, 0.92]), "fedprox": ([0.99, 0.91], [0.99, 0.931])}
    records_of = {
        name: [[make_record(value, n) for n, value in enumerate(curve, 1)] for curve in of_seeds]
        for name, of_seeds in curves.items()
    }
    rates = dict.fromkeys(records_of, Rates(0.1, 1.0, 16))
    _, fedprox = summarize(records_of, rates, "fedavg", 0)
    assert fedprox["mean"] == pytest.approx(92.05)
    assert fedprox["difference"] == pytest.approx(1.05)
    _, texts, outcomes = compare_accuracies(records_of, "caption")
    assert outcomes["fedprox"] == pytest.approx([91, 93.1]) and "92.05%" in texts["fedprox"]


def of_megabytes(*each):
    """A run of one round with this number of megabytes for each seed."""
    return [
        [dataclasses.replace(make_record(0.9), bytes_down=int(1e6 * number), bytes_up=0)]
        for number in each
    ]


def test_megabytes_are_the_mean_of_the_seeds_and_drawn_where_they_differ_by_a_percent():
    records_of = {"a": of_megabytes(1, 3), "b": of_megabytes(2.04, 2.04)}
    rates = dict.fromkeys(records_of, Rates(0.1, 1.0, 16))
    assert [row["megabytes"] for row in summarize(records_of, rates, "a", 0)] == [2, 2.04]
    assert list(cost_figures(records_of, "caption")) == ["comparison_by_megabytes.png"]
    close = {"a": of_megabytes(2, 2), "b": of_megabytes(2.01, 2.01)}
    assert cost_figures(close, "caption") == {}


def test_each_column_of_a_row_has_a_heading():
    """Of a comparison to a target, with an epsilon, and of one without."""
    for target in (0.0, 0.5):
        rows = summarize({"a": [[make_record(0.6)]]}, {"a": Rates(0.1, 1.0, 16)}, "", target)
        assert rows[0].keys() - {ROW} <= COLUMNS.keys()
