"""Tuning: the value of a field for each row of a comparison, chosen on held-out images.

Every row gets the same values of each field that it uses and does not set itself, with seeds that
the comparison does not use.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from harness.cli.fields import UserError
from harness.cli.output import print_line, warn
from harness.comparing.comparison import Finished, Tuning, compare
from harness.comparing.summary import needed_rounds
from harness.comparing.sweep import Compared, Row, candidates_of_rows
from harness.comparing.terms import label_of, label_settings
from harness.reporting.results import format_accuracy, pluralize
from harness.training.histories import has_own_models, own_accuracies

import numpy as np

LARGEST_SEED = 2**31 - 1
BY_OWN_MODELS = "by the clients' own models, on their test images"


def tune(
    config: Any,
    compared: Compared,
    build: Callable[[Any], Any],
    run: Callable,
    deadline: float,
) -> tuple[Compared, Tuning]:
    """Return the rows with the values that are best on held-out images, and how they were found.

    `config` has the number of images held out, `build` and `run` use them: see comparison.compare,
    whose folder runs/NAME-tuning is.
    """
    num_seeds = config.comparison.seeds
    first_seed = config.seed + num_seeds  # the comparison uses the seeds before it
    if first_seed + num_seeds - 1 > LARGEST_SEED:
        raise UserError(
            f"seed={config.seed} leaves no {pluralize(num_seeds, 'seed')} for tuning; choose a "
            "smaller seed"
        )
    candidates = candidates_of_rows(config, compared)
    fields = tuple(dict.fromkeys(field for tried in candidates.values() for field in tried[0]))
    trials = [
        make_trial(row, chosen) for row in compared.rows for chosen in candidates.get(row.label, ())
    ]
    print_line(
        f"tuning {' and '.join(fields)} with {config.data.holdout:,} training images held out, "
        f"seeds {first_seed} to {first_seed + num_seeds - 1}"
    )
    on_held_out = config.replace(
        seed=first_seed, name=f"{config.run.name or 'compare'}-tuning", baselines=False
    )
    all_fields = (*compared.fields, *(field for field in fields if field not in compared.fields))
    folder, finished = compare(on_held_out, Compared(all_fields, trials, ""), build, run, deadline)
    tried = []
    settings = {}
    for row in compared.rows:
        if row.label not in candidates:
            print_line(f"{row.label}: not tuned; it sets {' and '.join(fields)} or does not use it")
            continue
        ranks = [
            rank(finished, make_trial(row, chosen).label, config.run.target_accuracy)
            for chosen in candidates[row.label]
        ]
        best = ranks.index(max(ranks))  # of equal ones the first
        settings[row.label] = candidates[row.label][best]
        tell_choice(row, candidates[row.label], best, finished)
        for number, chosen in enumerate(candidates[row.label]):
            trial = describe_trial(row, chosen, finished, config.run.target_accuracy)
            tried.append(trial | {"chosen": int(number == best)})
    print_line(f"wrote all trials into {folder}\n")
    tuned = [apply(row, settings.get(row.label, {})) for row in compared.rows]
    of_label = [row.label for row in tuned]
    rows = [  # another row may have been given what was found for this one
        row._replace(label=f"{row.label}, tuned")
        if of_label.count(row.label) > 1 and old.label in settings
        else row
        for row, old in zip(tuned, compared.rows, strict=True)
    ]
    labels = {old.label: new.label for old, new in zip(compared.rows, rows, strict=True)}
    base = compared.base
    new_base = (
        labels[base]
        if isinstance(base, str)
        else {labels[label]: labels[of_label] for label, of_label in base.items()}
    )
    names = " and ".join(field.replace("_", " ") for field in fields)
    by_models = name_exceptions(settings, compared, finished)
    caption = (
        f"{names} tuned on {config.data.holdout:,} training images held out{by_models}, seeds "
        f"{first_seed} to {first_seed + num_seeds - 1}"
    )
    return Compared(all_fields, rows, new_base), Tuning(caption, tried)


def name_exceptions(settings: dict[str, Any], compared: Compared, finished: Finished) -> str:
    """Return, in parentheses, which rows' values were chosen on other images; nothing for none."""
    names = [
        row.label
        for row in compared.rows
        if row.label in settings
        and has_models(finished, make_trial(row, settings[row.label]).label)
    ]
    return f" ({', '.join(names)}: {BY_OWN_MODELS})" if names else ""


def make_trial(row: Row, chosen: dict[str, Any]) -> Row:
    """Return the row of the tuning's own comparison that tries these settings on a row."""
    label = label_settings(chosen)
    return Row(
        f"{row.label}, {label}",
        row.changes | chosen,
        {"row": row.label, "tuned": label},
        {"row": row.changes, "tuned": chosen},
    )


def apply(row: Row, chosen: dict[str, Any]) -> Row:
    """Return a row with the settings that were chosen for it."""
    if not chosen:
        return row
    return row._replace(
        label=f"{row.label} ({label_settings(chosen)})", changes=row.changes | chosen
    )


def has_models(finished: Finished, label: str) -> bool:
    """Return whether the clients of a trial have models of their own, by which it is judged."""
    return has_own_models({label: finished.records_of[label]})


def judged_accuracies(finished: Finished, label: str) -> list[float]:
    """Return the accuracy by which a trial is judged, after its last round, of each seed.

    Where clients have models of their own, it is theirs, on their own test images.
    """
    runs = finished.records_of[label]
    if has_models(finished, label):
        return [float(own_accuracies(records)[-1]) for records in runs]
    return [records[-1].test_accuracy for records in runs]


def rank(finished: Finished, label: str, target: float) -> tuple[float, float, float]:
    """Return what is highest for the best trial.

    That is the mean accuracy over the seeds. With a target accuracy, which is one of the global
    model, it is first the number of seeds that reach it, then the fewest rounds that they need.
    """
    accuracy = float(np.mean(judged_accuracies(finished, label)))
    if not target or has_models(finished, label):
        return 0, 0, accuracy
    needed = needed_rounds(finished.records_of[label], target)
    reached = [rounds for rounds in needed if rounds is not None]
    return len(reached), -float(np.mean(reached or [0])), accuracy


def describe_trial(
    row: Row, chosen: dict[str, Any], finished: Finished, target: float
) -> dict[str, Any]:
    """Return a row of tuning.csv."""
    label = make_trial(row, chosen).label
    accuracies = judged_accuracies(finished, label)
    return {
        "row": row.label,
        **chosen,
        "seeds": " ".join(map(str, finished.seeds_of[label])),
        "measured": BY_OWN_MODELS if has_models(finished, label) else "on the images held out",
        "mean": float(np.mean(accuracies)),
        "sd": float(np.std(accuracies, ddof=1)) if len(accuracies) > 1 else "",
        "rounds": max(map(len, finished.records_of[label])),
        **target_columns(finished, label, target),
    }


def target_columns(finished: Finished, label: str, target: float) -> dict[str, Any]:
    """Return the columns of tuning.csv by which a trial is judged if there is a target accuracy."""
    if not target or has_models(finished, label):
        return {}
    num_reached, negative_rounds, _ = rank(finished, label, target)
    return {
        "reached": num_reached,
        "rounds_to_target": -negative_rounds if num_reached else "",
    }


def tell_choice(row: Row, candidates: list[dict[str, Any]], best: int, finished: Finished) -> None:
    """Print what was chosen for a row; warn if a better value may lie outside those tried."""
    chosen = candidates[best]
    label = make_trial(row, chosen).label
    accuracies = judged_accuracies(finished, label)
    by = BY_OWN_MODELS if has_models(finished, label) else "on the images held out"
    accuracy = format_accuracy(accuracies).removeprefix("test ")
    print_line(f"{row.label}: {label_settings(chosen)} chosen, {accuracy} {by}")
    for field, value in chosen.items():
        values = [of_trial[field] for of_trial in candidates]
        is_number = all(isinstance(one, int | float) and type(one) is not bool for one in values)
        if not is_number or len(set(values)) < 3:
            continue
        if value in (min(values), max(values)):
            end = "largest" if value == max(values) else "smallest"
            warn(
                f"{row.label}: {label_of(field, value)} is the {end} value tried; a better one may "
                "lie beyond it"
            )
