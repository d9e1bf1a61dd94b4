"""The table of a comparison, by hand."""

import csv
import dataclasses

from harness.comparison import compare_accuracies, cost_figures
from harness.files import csv_table
from harness.results import holm
from harness.summary import COLUMNS, ROW, describe_spread, summarize, to_latex, to_markdown

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
RATES = {"fedavg": (0.2, 1.0), "fedprox": (0.1, 1.0), "median": (0.2, 1.0)}


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
        for column in ("rounds_to_target", "megabytes_to_target", "megabytes", "p", "difference"):
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
    rates = dict.fromkeys(records_of, (0.1, 1.0))
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


def test_the_same_table_in_three_forms():
    rows = summarize(RECORDS, RATES, "fedavg", 0)
    written = list(csv.DictReader(csv_table(rows).splitlines()))
    assert float(written[0]["mean"]) == pytest.approx(92) and written[0]["p"] == ""
    markdown = to_markdown(rows).splitlines()
    assert markdown[0].startswith("| compared | seeds | rounds | client lr | server lr |")
    assert markdown[2].startswith("| fedavg | 3 | 2 | 0.2 | 1 | 92.00 | 2.00 | 87.03 | 96.97 |")
    assert len({line.count("|") for line in markdown}) == 1 and "target" not in markdown[0]
    latex = to_latex(rows, "digits, 3 seeds")
    assert latex.startswith("% digits, 3 seeds\n\\begin{tabular}{l" + "r" * 13 + "}\n\\toprule\n")
    assert "compared & seeds" in latex and "test accuracy (\\%)" in latex
    assert (
        "fedavg & 3 & 2 & 0.2 & 1 & 92.00 & 2.00 & 87.03 & 96.97 &  &  &  &  & 0.0 \\\\\n" in latex
    )
    assert np.ptp([line.count("&") for line in latex.splitlines() if "&" in line]) == 0


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
    rates = dict.fromkeys(records_of, (0.1, 1.0))
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
    rates = dict.fromkeys(records_of, (0.1, 1.0))
    assert [row["megabytes"] for row in summarize(records_of, rates, "a", 0)] == [2, 2.04]
    assert list(cost_figures(records_of, "caption")) == ["comparison_by_megabytes.png"]
    close = {"a": of_megabytes(2, 2), "b": of_megabytes(2.01, 2.01)}
    assert cost_figures(close, "caption") == {}


def test_each_column_of_a_row_has_a_heading():
    """Of a comparison to a target, with an epsilon, and of one without."""
    for target in (0.0, 0.5):
        rows = summarize({"a": [[make_record(0.6)]]}, {"a": (0.1, 1.0)}, "", target)
        assert rows[0].keys() - {ROW} <= COLUMNS.keys()
