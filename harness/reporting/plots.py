"""Figures of a run, and their common style: title, small print, grid, cells."""

from __future__ import annotations

import functools
import logging
import math
import re
import textwrap
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

from harness.cli.output import warn
from harness.reporting.figure_form import FORM, default_style
from harness.reporting.results import format_rounds_to_target, pluralize, skew
from harness.storage.files import one_line
from harness.training.records import (
    Evaluation,
    RoundRecord,
    format_epsilon,
    megabytes_so_far,
    simulated_so_far,
)

import numpy as np
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font
from matplotlib.ticker import FormatStrFormatter, FuncFormatter, MaxNLocator

BLUE = "#0b6fa4"
ORANGE = "#d1495b"
# Okabe and Ito's, which the colour-blind tell apart, without yellow, which is pale on white.
CYCLE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
GREY = "#5c6770"
MOST_LABELS = 40  # of which a confusion matrix is drawn
CLEAR_LOSS = 0.05  # of accuracy, that a client would notice
ANNOTATED = 20  # rows and columns up to which a cell carries its number


def new_figure(width: float, height: float, title: str, caption: str) -> Figure:
    """Return a Figure with its title, and in small print below it what it was made on.

    Sizes are inches.
    """
    form = FORM.get()
    size = form.size or (width, height)
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    fonts = fonts_for(title + caption)
    # Lines are broken for the figure's own width: smaller letters if it is smaller.
    title_size = form.font or 13
    columns = int(6.5 * size[0] * 13 / title_size)
    figure.suptitle(
        "\n".join(textwrap.wrap(title, max(columns, 20))),
        x=0.01,
        ha="left",
        fontsize=title_size,
        fontweight="bold",
        family=fonts,
    )
    # A lone $ would start a formula, and "E = 3" must not be broken.
    unbroken = caption.replace("$", r"\$").replace(" = ", "\xa0=\xa0").replace("seed ", "seed\xa0")
    note_size = form.font or 8
    broken = textwrap.wrap(unbroken, max(int(17 * size[0] * 8 / note_size), 20))
    lines = "\n".join(broken).replace("\xa0", " ")
    figure.supxlabel(lines, x=0.01, ha="left", fontsize=note_size, color=GREY, family=fonts)
    return figure


def fonts_for(text: str) -> list[str]:
    """Return the fonts for a text: matplotlib's own, and one installed that has what it lacks."""
    own = FontProperties()
    characters = {ord(char) for char in text if char.isprintable()}
    lacking = characters - get_font(findfont(own)).get_charmap().keys()
    return [*own.get_family(), *find_font(frozenset(lacking))] if lacking else own.get_family()


@functools.cache
def find_font(characters: frozenset[int]) -> list[str]:
    """Return the name of an installed font that has all these characters.

    If there is none, nothing; then a notice says so, and no library says more.
    """
    # A font without bold letters would have a line printed for each text.
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    for entry in fontManager.ttflist:
        if "Last Resort" in entry.name:  # it has a box for every character
            continue
        try:
            found = get_font(entry.fname).get_charmap().keys()
        except (OSError, RuntimeError):  # a damaged file
            continue
        if characters <= found:
            return [entry.name]
    shown = "".join(map(chr, sorted(characters)))[:20]
    warn(
        f"no installed font has {shown!r}, so plots show boxes; install one, such as fonts-noto-cjk"
    )
    warnings.filterwarnings("ignore", message=r"Glyph \d+ .* missing from")
    return []


def join_parts(parts: Iterable[str]) -> str:
    """Return a caption of these parts without empty ones; "1 labels" becomes "1 label"."""
    text = one_line(" · ".join(filter(None, parts)))
    return re.sub(r"(?<![\d.,])1 (client|label|shard|attacker)s\b", r"1 \1", text)


def plain(axes: Any, ticks: Literal["major", "both"] = "major") -> None:
    """Give the axes a faint grid at those ticks, and no frame above and on the right."""
    axes.grid(alpha=0.3, which=ticks)
    axes.spines[["top", "right"]].set_visible(False)


def whole_rounds(axes: Any) -> None:
    """Label the x axis with rounds: whole numbers."""
    axes.set_xlabel("round")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def label_minor_tick(axis: Any, value: float, _: int) -> str:
    """Return the label of a minor tick of a log axis: of 2 and 5, on a short axis of all."""
    low = axis.get_view_interval().min()
    high = axis.get_view_interval().max()
    labelled = "25" if high > 5 * low else "123456789"
    return f"{value:g}" if f"{value:e}"[0] in labelled else ""


def log_scale(axes: Any) -> None:
    """Give the axes a log scale in y, with plain numbers for its ticks."""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.yaxis.set_minor_formatter(FuncFormatter(partial(label_minor_tick, axes.yaxis)))


def label_of(names: Sequence[Any], place: float, _: int) -> str:
    """Return the name of a row or column, for its tick."""
    return shorten(names[round(place)], 16) if 0 <= round(place) < len(names) else ""


def shorten(name: Any, most: int) -> str:
    """Return a label's name cut to `most` letters; matplotlib sees no formula in it."""
    text = str(name)
    cut = text if len(text) <= most else f"{text[: most - 1].rstrip()}…"
    return cut.replace("$", r"\$")


def are_words(names: Sequence[Any]) -> bool:
    """Return whether the names of labels are longer than numbers are."""
    return any(len(str(name)) > 4 for name in names)


def plot_matrix(
    axes: Any,
    matrix: np.ndarray,
    shade: np.ndarray,
    shade_name: str,
    columns: Sequence = (),
    rows: Sequence = (),
) -> None:
    """Draw `matrix` int64[R,C] as cells shaded by `shade`; with few cells each has its number.

    `columns` and `rows` name them; without names they are numbered.
    """
    # At least 1 at the dark end: a single error of a thousand images is no dark cell.
    darkest = max(1, float(shade.max()))
    image = axes.imshow(
        shade, cmap="Blues", aspect="auto", interpolation="nearest", vmin=0, vmax=darkest
    )
    axes.figure.colorbar(image, ax=axes, label=shade_name, fraction=0.05, pad=0.02)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(ANNOTATED, integer=True, steps=[1, 2, 5, 10]))
    for axis, names in ((axes.xaxis, columns), (axes.yaxis, rows)):
        if names:
            axis.set_major_formatter(FuncFormatter(partial(label_of, names)))
    if len(columns) > ANNOTATED or are_words(columns):
        axes.tick_params("x", rotation=90)
    if max(matrix.shape) <= ANNOTATED:
        for (row, column), count in np.ndenumerate(matrix):
            dark = shade[row, column] > 0.55 * darkest
            text = f"{count:,}" if count else "·"
            axes.text(
                column,
                row,
                text,
                ha="center",
                va="center",
                fontsize=8,
                color="white" if dark else "black",
                in_layout=False,  # it stays in its cell
            )


@default_style
def plot_partition(counts: np.ndarray, caption: str, classes: Sequence[int] = ()) -> Figure:
    """Draw label counts int64[K,C]: a row a client, a column a label, of which `classes` are the
    names."""
    measured = skew(counts)
    few = counts.sum(axis=1).min()
    many = counts.sum(axis=1).max()
    sizes = f"{few:,} to {many:,} images" if few < many else f"{few:,} images each"
    title = f"{pluralize(counts.shape[0], 'client')} of {sizes}"
    skewness = (
        f"distance to the pooled labels {measured['mean_total_variation']:.2f} (mean total "
        f"variation) · effective classes {measured['effective_classes']:.1f} of {counts.shape[1]} "
        f"· Gini coefficient of the sizes {measured['size_gini']:.2f}"
    )
    figure = new_figure(7, 5.2, title, f"{caption} · {skewness}")
    axes = figure.subplots()
    plot_matrix(axes, counts, counts, "images", classes)
    axes.set(xlabel="label", ylabel="client")
    return figure


def draw_quantity(axes: Any, records: Sequence[RoundRecord], name: str, scale: float) -> None:
    """Draw the loss or the accuracy, times `scale`, by round."""
    rounds = [record.round for record in records]
    marker = "o" if len(rounds) <= 50 else None
    if any(record.clients for record in records):
        values = [
            [scale * report[name] for report in record.clients if report["finite"]]
            for record in records
        ]
        lowest = [min(of_round, default=math.nan) for of_round in values]
        highest = [max(of_round, default=math.nan) for of_round in values]
        band = "clients, lowest to highest"
        axes.fill_between(rounds, lowest, highest, color=ORANGE, alpha=0.15, lw=0, label=band)
        means = [scale * record.train.get(name, math.nan) for record in records]
        label = "clients while training, mean"
        axes.plot(rounds, means, "--", color=ORANGE, marker=marker, ms=4, label=label)
    tested = [scale * getattr(record, f"test_{name}") for record in records]
    label = "global model, test set"
    axes.plot(rounds, tested, "-", color=BLUE, marker=marker, ms=4, label=label)
    whole_rounds(axes)
    plain(axes)


MARKERS = "os^vDPX*<>p"
DASHES = ("-", "--", "-.", ":")


def style_of(number: int) -> dict[str, str]:
    """Return colour, marker and dashes of a comparison's line; 308 lines have different ones."""
    return {
        "color": CYCLE[number % len(CYCLE)],
        "marker": MARKERS[number % len(MARKERS)],
        "ls": DASHES[number % len(DASHES)],
    }


# Columns of a record beside the test accuracy: what their lines are called.
EXTRA_LABELS = {
    "attack_success": "test images with the trigger, classified as its target",
    "seen_accuracy": "images that clients train on",
    "unseen_accuracy": "images of clients never drawn",
    "client_accuracy": "clients' own images held out, mean",
    "client_worst10": "the same, worst 10 % of clients",
    "personal_accuracy": "the same by clients' own models, mean",
    "personal_worst10": "by own models, worst 10 % of clients",
    "unseen_personal_accuracy": "unseen clients' own test images, by own models, mean",
}


def draw_extra(axes: Any, records: Sequence[RoundRecord]) -> list[Any]:
    """Draw the accuracies on other images than the test set; return their lines."""
    rounds = [record.round for record in records]
    lines = []
    for number, name in enumerate(records[-1].extra_accuracies):
        values = [100 * record.extra_accuracies.get(name, math.nan) for record in records]
        style = style_of(number + 2)
        lines += axes.plot(rounds, values, **style, ms=4, label=EXTRA_LABELS[name])
    return lines


@default_style
def plot_convergence(records: Sequence[RoundRecord], caption: str, target: float = 0) -> Figure:
    """Draw loss and accuracy by round: of the global model on the test set, of clients in training.

    The band is from the lowest to the highest client. `target` is a test accuracy, 0 for none.
    """
    last = records[-1]
    title = f"Test accuracy {last.test_accuracy:.2%} after round {last.round}"
    if last.private:
        title = f"{title}, {format_epsilon(last)}"
    figure = new_figure(9, 4.2, title, caption)
    loss_axes, accuracy_axes = figure.subplots(1, 2)
    draw_quantity(loss_axes, records, "loss", 1)
    draw_quantity(accuracy_axes, records, "accuracy", 100)
    loss_axes.set_ylabel("cross-entropy (nats)")
    log_scale(loss_axes)  # a first round may be twenty times the last
    accuracy_axes.set_ylabel("accuracy (%)")
    lines = draw_extra(accuracy_axes, records)
    if target:
        label = f"target, {100 * target:.4g}%"
        lines.append(accuracy_axes.axhline(100 * target, color=GREY, lw=1, ls=":", label=label))
    if FORM.get().is_narrow:
        handles = [*loss_axes.get_legend_handles_labels()[0], *lines]
        figure.legend(handles=handles, frameon=False, fontsize=9, loc="outside lower center")
        return figure
    loss_axes.legend(frameon=False, fontsize=9)
    if lines:
        low, high = accuracy_axes.get_ylim()
        accuracy_axes.set_ylim(low - 0.08 * (len(lines) + 1) * (high - low))  # below the curves
        accuracy_axes.legend(handles=lines, frameon=False, fontsize=9, loc="lower right")
    return figure


def draw_confusion(
    figure: Figure, counts: np.ndarray, shares: np.ndarray, shares_name: str, classes: Sequence[int]
) -> Figure:
    """Draw counts int64[C,C], a row a true label, shaded by the shares of the errors alone."""
    axes = figure.subplots()
    errors = np.where(np.eye(len(counts), dtype=bool), 0, shares)  # so that errors show
    plot_matrix(axes, counts, errors, shares_name, classes, classes)
    axes.set(xlabel="predicted label", ylabel="true label")
    return figure


@default_style
def plot_confusion(evaluation: Evaluation, caption: str, classes: Sequence[int] = ()) -> Figure:
    """Draw the confusion matrix; errors are shaded by their share of the true label.

    Of many labels it has those that most errors are about.
    """
    wrong = (evaluation.labels != evaluation.predictions).sum()
    title = f"{wrong:,} of {len(evaluation.labels):,} test images misclassified"
    shown = evaluation.hardest_labels(MOST_LABELS)
    names = [classes[label] for label in shown] if classes else shown
    if len(shown) < evaluation.num_classes:
        caption = (
            f"{caption} · the {len(shown)} of {evaluation.num_classes:,} labels with the most "
            "errors"
        )
    figure = new_figure(7, 6.4, title, caption)
    confusion = evaluation.confusion_of(shown)
    num_images = np.bincount(evaluation.labels, minlength=evaluation.num_classes)[shown]
    shares = 100 * confusion / np.maximum(num_images[:, np.newaxis], 1)
    name = "colour: errors, % of the true label's images (diagonal not coloured)"
    if FORM.get().is_narrow:
        name = "colour: errors (% of the row)"
    return draw_confusion(figure, confusion, shares, name, names)


@default_style
def plot_mixed_confusion(
    mixed: np.ndarray, title: str, caption: str, classes: Sequence[int] = ()
) -> Figure:
    """Draw the confusion matrix float64[C,C] of 1,000 test images in a client's label mix."""
    note = f"{caption} · per 1,000 test images in the client's label mix"
    figure = new_figure(7, 6.4, title, note)
    counts = mixed.round().astype(int)
    return draw_confusion(figure, counts, mixed, "errors (of 1,000 images)", classes)


class Cost(NamedTuple):
    """What a federation has spent after each round, as an x axis."""

    label: str
    unit: str
    so_far: Callable[[Sequence[RoundRecord]], np.ndarray]  # records -> float64[rounds]


MEGABYTES = Cost("sent so far, down and up (MB)", "MB", megabytes_so_far)
SECONDS = Cost("simulated time (s)", "s", simulated_so_far)


@default_style
def plot_cost(
    records: Sequence[RoundRecord], caption: str, cost: Cost = MEGABYTES, target: float = 0
) -> Figure:
    """Draw test accuracy against what the federation has spent, a point a round."""
    spent = cost.so_far(records)
    rounds = pluralize(len(records), "round")
    title = f"{spent[-1]:,.1f} {cost.unit} in {rounds}"
    note = caption
    if cost is MEGABYTES:  # 10^6 bytes
        share = 100 * sum(record.bytes_up for record in records) / max(1e6 * spent[-1], 1)
        note = f"{caption} · {share:.0f} % of the bytes are uploads"
    figure = new_figure(7, 4.2, title, note)
    axes = figure.subplots()
    accuracies = [100 * record.test_accuracy for record in records]
    marker = "o" if len(records) <= 50 else None
    axes.plot(spent, accuracies, color=BLUE, marker=marker, ms=4)
    if target:
        axes.axhline(100 * target, color=GREY, lw=1.5, ls=(0, (1, 3)))
        axes.annotate(
            f"target {100 * target:.4g} %",
            (0.01, 100 * target),
            xycoords=("axes fraction", "data"),
            va="bottom",
            fontsize=8,
            color=GREY,
        )
    axes.set(xlabel=cost.label, ylabel="test accuracy (%)", xlim=(0, None))
    plain(axes)
    return figure


@default_style
def plot_misclassified(
    images: np.ndarray,
    labels: np.ndarray,
    predictions: np.ndarray,
    caption: str,
    classes: Sequence[int] = (),
) -> Figure:
    """Draw the first 18 of `images` uint8[N,H,W,channels] that are predicted wrong: index, true
    and predicted label."""
    columns = 6
    most = 3 * columns
    wrong = np.flatnonzero(predictions != labels)
    names = classes or range(2**16)
    height = images.shape[1]
    width = images.shape[2]
    # The grid of images fills the figure's width; above and below it are title and caption.
    inches = min(max(9 * (3.9 * height) / (columns * 1.6 * width), 1.5), 12) + 0.95
    title = f"The first {min(most, len(wrong))} of {len(wrong):,} misclassified images"
    figure = new_figure(9, inches, title, caption)
    axes = figure.subplots()  # one for all: 18 of them would take a second
    axes.axis("off")
    axes.set(xlim=(0, columns * 1.6 * width), ylim=(3.9 * height, -0.3 * height))
    for place, index in enumerate(wrong[:most]):
        row, column = divmod(place, columns)
        left = (1.6 * column + 0.3) * width
        top = 1.3 * row * height
        extent = (left, left + width, top + height, top)
        image = images[index]
        if image.shape[-1] == 1:
            image = image[..., 0]  # matplotlib takes grey ones without a channel
        axes.imshow(image, cmap="gray_r", vmin=0, vmax=255, extent=extent)
        true = shorten(names[labels[index]], 9)
        predicted = shorten(names[predictions[index]], 9)
        text = f"#{index}: a {true}, predicted {predicted}"
        if FORM.get().is_narrow or are_words(classes):
            text = f"{true} as {predicted}"
        axes.text(
            left + width / 2, top - height / 28, text, ha="center", fontsize=8, in_layout=False
        )
    axes.set(xlim=(0, columns * 1.6 * width), ylim=(3.9 * height, -0.3 * height))
    return figure


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


def error_axes(figure: Figure) -> Any:
    """Return axes of the test error on a log scale; the x axis has no label yet."""
    axes = figure.subplots()
    axes.set_ylabel("test error (%)")
    log_scale(axes)
    plain(axes, "both")
    return axes


def outside_legend(figure: Figure, title: str) -> None:
    """Place the legend of all lines next to the axes, or below them in a narrow figure.

    Long names are broken.
    """
    narrow = FORM.get().is_narrow
    place: Any = "outside lower center" if narrow else "outside right center"
    legend = figure.legend(frameon=False, fontsize=9, title=title, loc=place)
    for text in legend.get_texts():
        unbroken = text.get_text().replace(" %", "\xa0%").replace(" ± ", "\xa0±\xa0")
        text.set_text(textwrap.fill(unbroken, 60 if narrow else 40).replace("\xa0", " "))


class Spent(NamedTuple):
    """What the rows of a comparison have spent after each round."""

    cost: Cost
    of_rounds: dict[str, np.ndarray]  # name -> float64[rounds], the mean over the seeds


def draw_curves(
    axes: Any,
    curves: Mapping[str, Sequence[np.ndarray]],
    styles: dict[str, dict[str, str]],
    spent: Spent | None,
    labels: dict[str, str],
) -> None:
    """Draw mean and band of each name's accuracies float[rounds] of each seed."""
    for name, of_seeds in curves.items():
        style = styles[name]
        rounds = min(map(len, of_seeds))
        outcomes = outcome_of([accuracies[:rounds] for accuracies in of_seeds])
        places = spent.of_rounds[name][:rounds] if spent else np.arange(1, rounds + 1)
        mean = outcomes.mean(axis=0)
        if len(of_seeds) > 1:
            spread = outcomes.std(axis=0, ddof=1)
            lowest = np.maximum(mean - spread, mean / 10)  # a log scale has no 0
            axes.fill_between(places, lowest, mean + spread, color=style["color"], alpha=0.15, lw=0)
        every = max(1, len(places) // 10)
        axes.plot(places, mean, **style, ms=4, markevery=every, label=labels[name])
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
    numbers = sorted({len(of_seeds) for of_seeds in curves.values()})
    seeds = " to ".join(map(str, dict.fromkeys([numbers[0], numbers[-1]])))
    over = f"mean ± sd of {seeds} seeds" if numbers[-1] > 1 else "one seed"
    title = f"{measured.capitalize()} {outcome_name()}, {over}"
    if panels:
        return plot_panels(curves, panels, spent, title, caption)
    figure = new_figure(9, 4.8, title, caption)
    styles = {name: style_of(number) for number, name in enumerate(curves)}
    axes = outcome_axes(figure, measured)
    draw_curves(axes, curves, styles, spent, label_curves(curves, spent))
    lengths = {len(accuracies) for of_seeds in curves.values() for accuracies in of_seeds}
    end = "the last round" if len(lengths) == 1 else "each run's own last round"
    outside_legend(figure, f"{outcome_name()} after {end}")
    return figure


MOST_IN_ROW = 4  # panels


def plot_panels(
    curves: Mapping[str, Sequence[np.ndarray]],
    panels: dict[str, tuple[str, str]],
    spent: Spent | None,
    title: str,
    caption: str,
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
        style_outcome(axes)
        axes.set_title(panel, fontsize=10)
        axes.label_outer()
    for axes in grid.flat[len(places) :]:
        axes.set_visible(False)
    handles: dict[str, Any] = {}
    for axes in grid.flat:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    narrow = FORM.get().is_narrow
    figure.legend(
        handles.values(),
        handles.keys(),
        frameon=False,
        fontsize=9,
        loc="outside lower center" if narrow else "outside right center",
        ncols=3 if narrow else 1,
    )
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
    seeds = len(next(iter(curves.values())))
    title = f"Rounds to {100 * target:.4g} % test accuracy, {pluralize(seeds, 'seed')}"
    figure = new_figure(9, 4.8, title, caption)
    axes = outcome_axes(figure)
    for number, (name, of_seeds) in enumerate(curves.items()):
        own_seeds = seeds_of[name] if seeds_of else ()
        label = f"{name}: {format_rounds_to_target(needed[name], own_seeds)}"
        for accuracies in of_seeds:
            rounds = np.arange(1, len(accuracies) + 1)
            line = axes.plot(rounds, outcome_of(accuracies), **style_of(number), lw=1.2)[0]
            line.set(markersize=4, markevery=max(1, len(accuracies) // 10))
            line.set_label(label)
            label = "_"  # one entry a name: matplotlib leaves this one out
    height = float(outcome_of(target))
    label = f"target: {outcome_name()} {height:.3g} %"
    axes.axhline(height, color=GREY, lw=1.5, ls=(0, (1, 3)), label=label)
    whole_rounds(axes)
    outside_legend(figure, "rounds to the target")
    return figure


@default_style
def plot_baselines(rows: Sequence[dict[str, Any]], caption: str) -> Figure:
    """Draw the test error by passes over the images: federated, all in one place, each alone.

    `rows` are those of baselines.csv.
    """
    figure = new_figure(9, 4.8, "What federation is worth", caption)
    axes = error_axes(figure)
    for name, title, color, style in (
        ("centralized", "centralized", GREY, "--"),
        ("federated", "federated", BLUE, "-"),
        ("alone", "each alone", ORANGE, "-."),
    ):
        errors_at: dict[float, list[float]] = {}
        for row in rows:
            if row["learner"] == name:
                errors_at.setdefault(row["epochs"], []).append(100 * (1 - row["test_accuracy"]))
        epochs = list(errors_at)
        mean = [float(np.mean(errors)) for errors in errors_at.values()]
        marker = "o" if len(epochs) <= 50 else None
        label = f"{title}: {mean[-1]:.2f} %"
        axes.plot(epochs, mean, style, color=color, marker=marker, ms=4, label=label)
        if name == "alone":
            lowest = [min(errors) for errors in errors_at.values()]
            highest = [max(errors) for errors in errors_at.values()]
            band = "clients alone, lowest to highest"
            axes.fill_between(epochs, lowest, highest, color=color, alpha=0.15, lw=0, label=band)
    axes.set_xlabel("local epochs, passes over the images")
    outside_legend(figure, "final error")
    return figure


@default_style
def plot_gain(rows: Sequence[Any], caption: str) -> Figure:
    """Draw what the global model, and the same after a local epoch, bring each client, against its
    label skew.

    `rows` are those of clients.csv; gains are over the client's own model, on
    its own label mix.
    """
    losers = sum(row.gain < 0 for row in rows)
    clearly = sum(row.gain < -CLEAR_LOSS for row in rows)
    title = f"Who gains: {losers} of {len(rows)} clients do worse with the global model"
    if losers:
        title += f", {clearly} by more than {100 * CLEAR_LOSS:g} points"
    figure = new_figure(9, 4.8, title, caption)
    axes = figure.subplots()
    skews = [row.skew for row in rows]
    tuned = [100 * (row.tuned_accuracy - row.own_accuracy) for row in rows]
    axes.axhline(0, color=GREY, lw=1)
    axes.vlines(skews, [100 * row.gain for row in rows], tuned, color=GREY, lw=0.7, alpha=0.6)
    axes.scatter(
        skews,
        [100 * row.gain for row in rows],
        color=BLUE,
        s=28,
        label="the global model",
        zorder=3,
    )
    axes.scatter(
        skews,
        tuned,
        color=ORANGE,
        marker="^",
        s=28,
        label="the same, fine-tuned for one local epoch",
    )
    if len(rows) <= ANNOTATED:
        for row in rows:
            place = (row.skew, 100 * row.gain)
            axes.annotate(
                str(row.client),
                place,
                xytext=(5, 3),
                textcoords="offset points",
                fontsize=8,
                color=GREY,
            )
    axes.set(xlabel="the client's label skew (total-variation distance to all clients' labels)")
    axes.set(
        ylabel="gain over its local model, on its own\nlabel mix (percentage points, symmetric log)"
    )
    # a client whose own model never learned gains fifty times the others
    axes.set_yscale("symlog", linthresh=2)
    most = np.nanmax(np.abs([1, *tuned, *(100 * row.gain for row in rows)]))
    ticks = [tick for tick in (0, 1, 2, 5, 10, 20, 50, 100) if tick < 2.5 * most]
    axes.set_yticks(sorted({*ticks, *(-tick for tick in ticks)}))
    plain(axes)
    axes.margins(y=0.15)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.legend(frameon=False, fontsize=9)
    return figure


def evaluation_figures(
    dataset: Any, evaluation: Evaluation, caption: str
) -> dict[str, Callable[[], Figure]]:
    """Return file name -> a function that draws it, of the plots of an evaluation."""
    return {
        "confusion_matrix.png": partial(plot_confusion, evaluation, caption, dataset.classes),
        "misclassified.png": partial(
            plot_misclassified,
            dataset.test.images,
            dataset.test.labels,
            evaluation.predictions,
            caption,
            dataset.classes,
        ),
    }


def result_figures(experiment: Any, result: Any, caption: str) -> dict[str, Callable[[], Figure]]:
    """Return file name -> a function that draws it, of all plots of a run's result.

    A private run has no plot of its partition: nothing about single clients leaves it.
    """
    dataset = experiment.dataset
    target = experiment.config.run.target_accuracy
    figures: dict[str, Callable[[], Figure]] = {
        "convergence_plot.png": partial(plot_convergence, result.records, caption, target),
        "accuracy_by_megabytes.png": partial(plot_cost, result.records, caption),
        **evaluation_figures(dataset, result.evaluation, caption),
    }
    if experiment.config.is_private:
        return figures
    if result.records[-1].simulated_seconds is not None:
        by_seconds = partial(plot_cost, result.records, caption, SECONDS, target)
        figures["accuracy_by_seconds.png"] = by_seconds
    counts = experiment.partition.counts
    partition = partial(plot_partition, counts, caption, dataset.classes)
    return {"client_partition.png": partition, **figures}
