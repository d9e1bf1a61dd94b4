"""Figures of a comparison: curves of several rows, over rounds, megabytes or seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from harness.reporting.drawing import (
    GREY,
    draw_band,
    least_error,
    log_scale,
    new_figure,
    place_legend,
    plain,
    plain_text,
    style_of,
    whole_rounds,
)
from harness.reporting.figure_form import FORM, default_style
from harness.reporting.plots import Cost
from harness.reporting.results import format_rounds_to_target, pluralize

import numpy as np
from matplotlib.figure import Figure


def outcome_of(accuracies: Any) -> Any:
    """Return, in percent, what a comparison's figure shows of accuracies: errors, unless asked."""
    is_accuracy = FORM.get().y == "accuracy"
    return 100 * np.asarray(accuracies) if is_accuracy else 100 * (1 - np.asarray(accuracies))


def outcome_name() -> str:
    """Return what a comparison's figure shows: "error" or "accuracy"."""
    return "accuracy" if FORM.get().y == "accuracy" else "error"


def style_outcome(axes: Any, measured: str = "test") -> None:
    """Name and scale the y axis of a comparison's figure; the x axis has no label yet."""
    axes.set_ylabel(f"{measured} {outcome_name()} (%)")
    if FORM.get().y == "error":
        log_scale(axes)
        plain(axes, "both")
    else:
        plain(axes)


def outcome_axes(figure: Figure, measured: str = "test") -> Any:
    """Return axes of the test error, or what --figure-y asks for."""
    axes = figure.subplots()
    style_outcome(axes, measured)
    return axes


class Spent(NamedTuple):
    """What the rows of a comparison have spent after each round."""

    cost: Cost
    of_rounds: dict[str, np.ndarray]  # name -> float64[rounds], the mean over the seeds


def least_drawn(curves: Mapping[str, Sequence[np.ndarray]]) -> float:
    """Return where an error of 0 is drawn: on a log scale, at half the least other one."""
    every = [outcome_of(accuracies) for of_seeds in curves.values() for accuracies in of_seeds]
    return least_error(np.concatenate(every)) if FORM.get().y == "error" else 0.0


def draw_curves(
    axes: Any,
    curves: Mapping[str, Sequence[np.ndarray]],
    styles: dict[str, dict[str, str]],
    spent: Spent | None,
    labels: dict[str, str],
) -> None:
    """Draw mean and band of each name's accuracies float[rounds] of each seed."""
    least = least_drawn(curves)
    for name, of_seeds in curves.items():
        style = styles[name]
        rounds = min(map(len, of_seeds))
        outcomes = outcome_of([accuracies[:rounds] for accuracies in of_seeds])
        places = spent.of_rounds[name][:rounds] if spent else np.arange(1, rounds + 1)
        mean = np.maximum(outcomes.mean(axis=0), least)
        if len(of_seeds) > 1:
            spread = outcomes.std(axis=0, ddof=1)
            lowest = np.maximum(mean - spread, mean / 10)  # above 0, for a log scale
            draw_band(axes, places, lowest, mean + spread, color=style["color"])
        marked = max(1, len(places) // 10)
        axes.plot(places, mean, **style, ms=4, markevery=marked, label=plain_text(labels[name]))
    if spent:
        axes.set(xlabel=spent.cost.label, xlim=(0, None))
    else:
        whole_rounds(axes)


def label_curves(curves: Mapping[str, Sequence[np.ndarray]], spent: Spent | None) -> dict[str, str]:
    """Return the legend's text of each name: mean ± sd over the runs' own last rounds."""
    labels = {}
    for name, of_seeds in curves.items():
        ends = outcome_of([accuracies[-1] for accuracies in of_seeds])
        label = f"{name}: {np.mean(ends):.2f} %"
        if len(of_seeds) > 1:
            label = f"{name}: {np.mean(ends):.2f} ± {np.std(ends, ddof=1):.2f} %"
        if spent:
            end = spent.of_rounds[name][min(map(len, of_seeds)) - 1]
            label += f", {end:,.1f} {spent.cost.unit}"
        labels[name] = label
    return labels


def count_seeds(curves: Mapping[str, Sequence[Any]]) -> str:
    """Return "3 seeds", or "1 to 3 seeds" where names have different numbers of them."""
    numbers = sorted({len(of_seeds) for of_seeds in curves.values()})
    if numbers[0] == numbers[-1]:
        return pluralize(numbers[0], "seed")
    return f"{numbers[0]} to {numbers[-1]} seeds"


@default_style
def plot_comparison(
    curves: Mapping[str, Sequence[np.ndarray]],
    caption: str,
    spent: Spent | None = None,
    panels: dict[str, tuple[str, str]] | None = None,
    measured: str = "test",
) -> Figure:
    """Draw the test error by round, a line a name, of the accuracies float[rounds] of each seed.

    The line goes as far as the shortest of a name's runs; its label has the mean over their own
    ends. The errors are drawn by what the names have `spent`, if that is given. `measured` is what
    the axis calls other accuracies than the test accuracy. `panels` has (line, panel) of each name
    in a grid of two fields: then each value of the second has axes of its own.
    """
    seeds = count_seeds(curves)
    over = "one seed" if seeds == "1 seed" else f"mean ± sd of {seeds}"
    title = f"{measured.capitalize()} {outcome_name()}, {over}"
    if panels:
        return plot_panels(curves, panels, spent, title, caption, measured)
    figure = new_figure(9, 4.8, title, caption)
    styles = {name: style_of(number) for number, name in enumerate(curves)}
    axes = outcome_axes(figure, measured)
    draw_curves(axes, curves, styles, spent, label_curves(curves, spent))
    lengths = {len(accuracies) for of_seeds in curves.values() for accuracies in of_seeds}
    end = "the last round" if len(lengths) == 1 else "each run's own last round"
    place_legend(figure, title=f"{outcome_name()} after {end}")
    return figure


MOST_IN_ROW = 4  # panels


def plot_panels(
    curves: Mapping[str, Sequence[np.ndarray]],
    panels: dict[str, tuple[str, str]],
    spent: Spent | None,
    title: str,
    caption: str,
    measured: str,
) -> Figure:
    """Draw a grid of two fields: axes for each value of the second, a colour for each of the first.

    For the arguments see `plot_comparison`.
    """
    lines = list(dict.fromkeys(line for line, _ in panels.values()))
    places = list(dict.fromkeys(panel for _, panel in panels.values()))
    columns = min(len(places), MOST_IN_ROW)
    num_rows = -(-len(places) // columns)
    figure = new_figure(max(2.6 * columns + 2, 7), 2.6 * num_rows + 1.4, title, caption)
    grid = figure.subplots(num_rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes, panel in zip(grid.flat, places, strict=False):
        names = [name for name in curves if panels[name][1] == panel]
        styles = {name: style_of(lines.index(panels[name][0])) for name in names}
        labels = {name: panels[name][0] for name in names}
        draw_curves(axes, {name: curves[name] for name in names}, styles, spent, labels)
        style_outcome(axes, measured)
        axes.set_title(plain_text(panel), fontsize=10)
        axes.label_outer()
    for axes in grid.flat[len(places) :]:
        axes.set_visible(False)
    handles: dict[str, Any] = {}
    for axes in grid.flat:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    num_columns = 3 if FORM.get().is_narrow else 1
    place_legend(figure, handles=handles.values(), labels=handles.keys(), ncols=num_columns)
    return figure


@default_style
def plot_rounds_to_target(
    curves: Mapping[str, Sequence[np.ndarray]],
    needed: Mapping[str, Sequence[float | None]],
    target: float,
    caption: str,
    seeds_of: Mapping[str, Sequence[int]] | None = None,
) -> Figure:
    """Draw the test error by round until it is that of the accuracy `target`, a line a seed.

    `curves` are accuracies float[rounds], `needed` the rounds to the target; a seed that did not
    get there has None.
    """
    title = f"Rounds to {100 * target:.4g} % test accuracy, {count_seeds(curves)}"
    figure = new_figure(9, 4.8, title, caption)
    axes = outcome_axes(figure)
    least = least_drawn(curves)
    for number, (name, of_seeds) in enumerate(curves.items()):
        own_seeds = seeds_of[name] if seeds_of else ()
        label = plain_text(f"{name}: {format_rounds_to_target(needed[name], own_seeds)}")
        for accuracies in of_seeds:
            rounds = np.arange(1, len(accuracies) + 1)
            drawn = np.maximum(outcome_of(accuracies), least)
            line = axes.plot(rounds, drawn, **style_of(number), lw=1.2)[0]
            line.set(markersize=4, markevery=max(1, len(accuracies) // 10))
            line.set_label(label)
            label = "_"  # one entry a name: matplotlib leaves this one out
    height = float(outcome_of(target))
    label = f"target: {outcome_name()} {height:.3g} %"
    axes.axhline(max(height, least), color=GREY, lw=1.5, ls=(0, (1, 3)), label=label)
    whole_rounds(axes)
    place_legend(figure, title="rounds to the target")
    return figure
