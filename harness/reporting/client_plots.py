"""Figures of how accuracies are distributed over the clients."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from harness.reporting.clients import TITLES
from harness.reporting.drawing import (
    BLUE,
    CYCLE,
    GREY,
    ORANGE,
    fonts_for,
    new_figure,
    place_legend,
    plain,
    plain_text,
)
from harness.reporting.figure_form import FORM, default_style
from harness.reporting.results import pluralize
from harness.training.client_accuracies import worst_tenth

import numpy as np
from matplotlib.figure import Figure

BY_OWN = "personal_accuracy"  # of TITLES
MOST_DOTS = 100  # clients up to which each is a dot


@default_style
def plot_client_accuracy(distributions: dict[str, np.ndarray], caption: str) -> Figure:
    """Draw the clients' accuracies in their order, with the mean and the worst tenth.

    `distributions` has the accuracies float64[K], 0..1, by a name of clients.TITLES.
    """
    most = max(map(len, distributions.values()))
    models = "The global model" + ", and their own," * (BY_OWN in distributions)
    title = f"{models} on each of {pluralize(most, 'client')}"
    figure = new_figure(9, 4.4, title, caption)
    axes = figure.subplots()
    for (name, accuracies), color in zip(
        distributions.items(), (BLUE, ORANGE, CYCLE[2]), strict=False
    ):
        percent = 100 * np.sort(accuracies)
        shares = 100 * (np.arange(len(percent)) + 0.5) / len(percent)
        worst = f"worst 10 %: {100 * worst_tenth(accuracies):.2f} %"
        label = f"{TITLES[name]}: mean {percent.mean():.2f} %, {worst}"
        if FORM.get().is_narrow:
            label = f"{TITLES[name]}: {percent.mean():.1f} %"
        marker = "o" if len(percent) <= MOST_DOTS else None
        axes.plot(shares, percent, color=color, marker=marker, ms=4, lw=1.3, label=label)
        axes.axhline(percent.mean(), color=color, lw=0.8, ls="--")
    axes.axvspan(0, 10, color=GREY, alpha=0.12, lw=0)
    place: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "ha": "center", "va": "top"}
    axes.annotate("worst 10 %", (5, 0.98), fontsize=8, color=GREY, rotation=90, **place)
    axes.set(xlabel="clients, from the worst to the best (%)", xlim=(0, 100))
    axes.set(ylabel="accuracy (%)")
    plain(axes)
    place_legend(figure, title="accuracy on")
    return figure


@default_style
def plot_clients_of_rows(
    accuracies_of: Mapping[str, Sequence[np.ndarray]], measured_on: str, caption: str
) -> Figure:
    """Draw a box for the clients' accuracies of each row of a comparison.

    `accuracies_of` has float64[K], 0..1, for each seed; a box has the clients of all seeds, from
    the lower to the upper quartile, with whiskers to the 10th and 90th percentile. `measured_on` is
    a value of clients.TITLES.
    """
    num_seeds = max(map(len, accuracies_of.values()))
    title = f"Accuracy over the clients, {pluralize(num_seeds, 'seed')}"
    figure = new_figure(9, 1.6 + 0.5 * len(accuracies_of), title, caption)
    axes = figure.subplots()
    names = list(accuracies_of)
    for place, name in enumerate(names):
        percent = 100 * np.concatenate(list(accuracies_of[name]))
        color = CYCLE[place % len(CYCLE)]
        axes.boxplot(
            [percent],
            positions=[place],
            orientation="horizontal",
            widths=0.55,
            whis=(10, 90),
            showmeans=True,
            patch_artist=True,
            boxprops={"facecolor": color, "alpha": 0.35, "edgecolor": color},
            medianprops={"color": color, "lw": 1.6},
            whiskerprops={"color": color},
            capprops={"color": color},
            flierprops={"marker": ".", "ms": 3, "mfc": color, "mec": color},
            meanprops={"marker": "D", "ms": 4, "mfc": "white", "mec": color},
        )
    axes.set_yticks(range(len(names)), map(plain_text, names), family=fonts_for(names))
    axes.invert_yaxis()
    note = "box: quartiles, whiskers: 10 to 90 %, diamond: mean"
    by_global = "" if measured_on == TITLES[BY_OWN] else ", by the global model"
    about = f"accuracy on {measured_on}{by_global} (%)"
    axes.set_xlabel(textwrap.fill(about, 32) if FORM.get().is_narrow else f"{about}\n{note}")
    plain(axes)
    return figure
