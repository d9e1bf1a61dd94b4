"""The page of a run, report.html: result, figures, rounds, clients.

All is in the file, so it can be sent by mail. It reads what metrics.json and partition.json hold,
which of a private run is nothing about single clients. Its text is in report.html.jinja.
"""

from __future__ import annotations

import base64
import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.cli.flags import to_flag
from harness.cli.saved_config import OF_ONE_COMMAND
from harness.training.histories import find_early_end, stops_early
from harness.training.records import DURING_TRAINING, read_record

import jinja2

MEDIA = {"png": "image/png", "svg": "image/svg+xml"}
HIDDEN = ("finite", "clients", "measured_bytes_down", "measured_bytes_up")


def cell(value: Any, name: str) -> str:
    """Return a value as a reader wants it: accuracies and shares in percent."""
    if value is None:
        return "–"
    if isinstance(value, float):
        if math.isnan(value):
            return "–"
        is_share = any(word in name for word in ("accuracy", "share", "success", "worst10"))
        return f"{value:.2%}" if is_share else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


ENVIRONMENT = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
)
ENVIRONMENT.filters["cell"] = cell


def to_html(
    title: str,
    metrics: dict[str, Any],
    partition: dict[str, Any],
    pictures: dict[str, bytes],
    commands: dict[str, str],
) -> str:
    """Return the page. `metrics` and `partition` are what their files hold.

    `pictures` are file name -> bytes of PNG or SVG, `commands` what each is for -> it.
    """
    epsilon = metrics["epsilon"]
    about = {
        "weights (SHA-256)": metrics["weights_sha256"],
        "best round": f"{metrics['best_round']}, {metrics['best_accuracy']:.2%} on "
        f"{metrics['best_chosen_on']}",
        **metrics["provenance"],
    }
    is_clean = about.pop("clean", None)
    about["working tree clean"] = is_clean if is_clean is None else ("no", "yes")[is_clean]
    rounds = [
        {name: value for name, value in row.items() if name not in HIDDEN and value is not None}
        for row in metrics["rounds"]
    ]
    return ENVIRONMENT.get_template("report.html.jinja").render(
        title=title,
        score=f"{metrics['test_accuracy']:.2%}",
        privacy=f", ε {epsilon:.2f}" if epsilon else "",
        count=f"{len(rounds)} round{'s' * (len(rounds) != 1)}",
        pictures=[to_picture(*item) for item in pictures.items()],
        rounds=rounds,
        clients=tabulate_clients(metrics["rounds"][-1]["clients"], partition),
        commands=commands,
        provenance=about,
        config=metrics["config"],
    )


def to_picture(name: str, content: bytes) -> dict[str, str]:
    """Return what the page needs of a picture, which it contains."""
    stem, _, kind = name.rpartition(".")
    data = base64.b64encode(content).decode()
    return {"text": stem.replace("_", " "), "media": MEDIA[kind], "data": data}


def tabulate_clients(
    reports: Sequence[dict[str, Any]], partition: dict[str, Any]
) -> list[dict[str, Any]]:
    """Return a row for each client: its images, its labels, and what it reported of the last round.

    Nothing of a private run.
    """
    counts = partition.get("label_counts", [])
    held_out = partition.get("test_indices", [])
    reported = {report["client"]: report for report in reports}
    rows = []
    for client, of_labels in enumerate(counts):
        held = [(count, label) for label, count in enumerate(of_labels) if count]
        most, commonest = max(held, default=(0, 0))
        rows.append(
            {
                "client": client,
                "images": sum(of_labels),
                "labels": len(held),
                "most frequent label": partition["classes"][commonest],
                "share": most / max(sum(of_labels), 1),
            }
        )
        if held_out:
            rows[-1]["of them held out"] = len(held_out[client])
        report = reported.get(client, {})
        for name in next(iter(reported.values()), {}):
            if name not in ("client", "examples", *HIDDEN):
                title = f"train {name}" if name in DURING_TRAINING else name.replace("_", " ")
                rows[-1][f"{title} (last round)"] = report.get(name)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return rows as a sortable HTML table, for a notebook."""
    macros: Any = ENVIRONMENT.get_template("table.html.jinja").module
    return macros.table(rows)


def changes_of(config: Any) -> dict[str, Any]:
    """Return field -> value of all that makes the run again: not its name, or its time limit."""
    changed = config.overridden_fields() | config.changed()
    if config.privacy.target_epsilon:
        changed.pop("noise_multiplier", None)  # which was found for it
    if "owner_choice" in config.chosen("partition").fields:  # whose default is all owners
        changed["num_clients"] = config.partitioning.num_clients
    return {
        field: value
        for field, value in changed.items()
        if field not in OF_ONE_COMMAND and field != "name" and value is not None
    }


def command_of(config: Any, script: str) -> str:
    """Return the command that makes the run of a configuration again."""
    words = []
    for field, value in changes_of(config).items():
        if isinstance(value, bool):
            words.append(to_flag(field) if value else f"--no-{to_flag(field)[2:]}")
        else:
            text = repr(value) if isinstance(value, float) else str(value)
            # A value that begins as a flag does is one with the flag.
            is_like_a_flag = text.startswith("-")
            words += [f"{to_flag(field)}={text}"] if is_like_a_flag else [to_flag(field), text]
    return " ".join([script, shlex.join(words)]).strip()


def fields_to_repeat(metrics: dict[str, Any], config: Any) -> dict[str, Any]:
    """Return field -> value by which a new run ends where this one did.

    They differ from the configuration's if the run was stopped, or was resumed with a flag that
    would have ended it earlier.
    """
    done = len(metrics["rounds"])
    may_stop = config.run.target_accuracy or config.run.stop_after
    history = [read_record(row) for row in metrics["rounds"]] if may_stop else []
    budget = config.privacy.epsilon_budget
    fields: dict[str, Any] = {}
    if find_early_end(history, config.run):
        fields["stop_after"] = 0
        if config.run.target_accuracy:
            fields["after_target"] = "continue"
    if budget and (metrics["epsilon"] or 0) > budget:
        fields["epsilon_budget"] = 0.0
    if done < config.training.rounds and (fields or not stops_early(history, config.run)):
        fields["rounds"] = done
        fields["target_epsilon"] = 0.0  # the noise multiplier that met it for all rounds is given
    return fields


def fields_to_continue(metrics: dict[str, Any], config: Any) -> dict[str, Any]:
    """Return field -> value by which a finished run, resumed, trains more rounds.

    `metrics` are those of metrics.json.
    """
    fields: dict[str, Any] = {}
    rounds = config.training.rounds
    done = len(metrics["rounds"])
    if done == rounds:
        fields["rounds"] = 2 * rounds
    if config.run.after_target == "stop" and metrics["rounds_to_target"] is not None:
        fields["after_target"] = "continue"
    if 0 < config.run.stop_after <= done - metrics["best_round"]:
        fields["stop_after"] = 0
    if config.privacy.epsilon_budget:
        fields["epsilon_budget"] = 2 * config.privacy.epsilon_budget
    return fields
