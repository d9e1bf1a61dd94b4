"""What a round did, in a record."""

import json
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

from harness.comparing.completing import warn_of_reuse
from harness.reporting.results import class_report, describe_accuracy
from harness.storage.files import to_json
from harness.training.histories import (
    describe_reached,
    find_early_end,
    reached,
    rounds_to_target,
    stops_early,
)

import numpy as np
import pytest
from reference import evaluation_of
from runs import configure, make_record


def test_what_counts_as_trouble():
    record = partial(make_record, num_clients=2)
    good = record(0.9)
    assert (
        good.trouble([], 0.1, False)
        == ""
        == record(0.1).trouble([], 0.1, False)
        == record(0.5).trouble([good], 0.1, False)
    )
    assert "chance" in record(0.1).trouble([good], 0.1, False)
    assert "not finite" in record(0.1, loss=float("nan")).trouble([], 0.1, False)
    assert (
        "no client" in record(0.9, num_nonfinite=2).trouble([], 0.1, False)
        and record(0.9, num_nonfinite=1).trouble([], 0.1, False) == ""
    )


def test_a_run_that_never_leaves_chance_says_so():
    stuck = [make_record(0.1, number, loss=2.3 - 0.01 * number) for number in (1, 2, 3, 4)]
    said = [r.trouble(stuck[:place], 0.1, is_last=r.round == 4) for place, r in enumerate(stuck)]
    assert ["still at chance" in text for text in said] == [False, False, True, True]
    assert make_record(0.55, 3).trouble([], 0.5, is_last=True) == ""  # two classes
    assert "still at chance" in make_record(0.5, 3).trouble([], 0.5, is_last=True)


def test_a_model_that_does_not_change_says_so():
    """As where Krum chooses an update of zeros for ever: more rounds would not help."""
    same = [make_record(0.1, number) for number in (1, 2, 3)]
    assert "the global model did not change" in same[1].trouble(same[:1], 0.1, False)
    assert same[2].trouble(same[:2], 0.1, False) == ""  # it lasts
    assert "the global model did not change" in same[2].trouble(same[:2], 0.1, True)


def test_what_helps_at_chance_is_not_always_a_smaller_rate():
    """Noise hides what is learned, for a while; and a few steps teach nothing at any rate."""
    plain = make_record(0.1, 3)
    assert "; try a smaller --client-lr" in plain.trouble([], 0.1, False)
    private = replace(plain, epsilon=3.0)
    text = private.trouble([], 0.1, False)
    assert (
        "with this much noise, learning may take more rounds" in text and "--client-lr" not in text
    )
    few = replace(plain, train={"loss": 2.3, "steps": 1.0})
    assert "few local steps so far, 3 by each client: more rounds may help" in few.trouble(
        [], 0.1, False
    )


def test_a_target_that_was_reached_says_how_to_go_on():
    records = [make_record(accuracy, number) for number, accuracy in enumerate([0.5, 0.8, 0.9], 1)]
    assert describe_reached(records, 0.8) == (
        "the target accuracy 80.00% was reached in round 2; to continue, raise "
        "--target-accuracy, or add --after-target continue"
    )


def test_what_lasts_is_told_when_it_begins_and_at_the_end():
    records = [
        make_record(accuracy, number)
        for number, accuracy in enumerate([0.9, 0.1, 0.1, 0.5, 0.1, 0.1, 0.1], 1)
    ]
    said = [
        r.trouble(records[:place], 0.1, is_last=r.round == 7) for place, r in enumerate(records)
    ]
    assert [number for number, text in enumerate(said, 1) if "fell back to chance" in text] == [
        2,
        5,
        7,
    ]
    assert not any(text for text in said if "fell back" not in text)


def test_a_fall_to_chance_is_told_of_two_labels_too():
    """One of which 62 % of the test images have."""
    earlier = [make_record(accuracy, number) for number, accuracy in enumerate([0.62, 0.95], 1)]
    assert "fell back to chance" in make_record(0.62, 3).trouble(earlier, 0.62, is_last=False)
    assert not make_record(0.9, 3).trouble(earlier, 0.62, is_last=False)


@pytest.mark.parametrize("flags", [{"stop_after": 2}, {"target_accuracy": 0.8}, {"stop_after": 9}])
def test_the_round_of_an_early_end_is_the_first_prefix_that_stops(flags):
    run = configure(**flags).run
    accuracies = [0.5, 0.7, 0.7, 0.75, 0.6, 0.7, 0.9, 0.8, 0.9, 0.85]
    records = [make_record(accuracy, number) for number, accuracy in enumerate(accuracies, 1)]
    for length in range(1, len(records) + 1):
        ends = [end for end in range(1, length) if stops_early(records[:end], run)]
        assert find_early_end(records[:length], run) == (ends[0] if ends else 0)


def test_flags_that_come_too_late_for_a_finished_run_are_told(capsys):
    """A comparison uses it as it is: its third round was the second after its best."""
    records = [make_record(accuracy, number) for number, accuracy in enumerate([0.9, 0.8, 0.8], 1)]
    records.append(make_record(0.95, 4))
    flags = configure(stop_after=2, save_every=2, save_clients=True)
    warn_of_reuse(records, flags.run)
    said = capsys.readouterr().err
    assert "stop_after=2 would have ended this run after round 3; its 4 rounds are used" in said
    assert said.count("has no effect on this run") == 2
    warn_of_reuse(records, configure(stop_after=3, target_accuracy=0.96).run)
    assert capsys.readouterr().err == ""


def test_json_puts_a_list_of_numbers_on_a_line_and_changes_no_text():
    content = {"data": 'a [1   2].npz "[3,  4]', "numbers": [1, 2.5], "names": ["[1,  2]"]}
    text = to_json(content)
    assert json.loads(text) == content and '"numbers": [ 1, 2.5 ]' in text


def test_classes_without_test_images_are_in_no_mean():
    confusion = np.array([[3, 0, 0], [0, 0, 0], [0, 0, 3]])
    report = class_report(evaluation_of(confusion), range(3))
    assert report["macro avg"]["f1-score"] == 1 and "1" not in report


def test_a_label_may_be_called_as_a_line_of_the_report():
    report = class_report(evaluation_of(np.diag([3, 4])), ["accuracy", "macro avg"])
    assert report["accuracy"] == 1 and report["macro avg"]["support"] == 7
    assert report["accuracy (label)"]["support"] == 3
    metrics = {"test_accuracy": 1.0, "test_images": 7, "dataset": "x", "report": report}
    said = describe_accuracy(metrics | {"classes": ["accuracy", "macro avg"]})
    assert "lowest F1: accuracy (label) (100.00%), macro avg (label) (100.00%)" in said


def test_rounds_to_a_target_by_hand():
    """The best so far, a straight line between rounds: 0.6 at round 2 and 0.8 at round 4 cross 0.7
    at round 3.5."""
    curve = [0.4, 0.6, 0.5, 0.8]
    assert rounds_to_target(curve, 0.7) == pytest.approx(3.5) and rounds_to_target(
        curve, 0.5
    ) == pytest.approx(1.5)
    assert rounds_to_target(curve, 0.3) == 1 and rounds_to_target(curve, 0.8) == 4
    assert rounds_to_target(curve, 0.9) is None and rounds_to_target(curve, 0) is None
    records = [SimpleNamespace(test_accuracy=accuracy) for accuracy in curve]
    assert [reached(records, target) for target in (0, 0.8, 0.9)] == [False, True, False]
