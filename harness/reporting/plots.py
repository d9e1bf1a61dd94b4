"""Figures of a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from harness.reporting.captions import describe_loss
from harness.reporting.drawing import (
    BLUE,
    GREY,
    ORANGE,
    are_words,
    draw_band,
    fonts_for,
    label_tick,
    least_error,
    log_scale,
    new_figure,
    place_legend,
    plain,
    shorten,
    style_of,
    whole_rounds,
)
from harness.reporting.figure_form import FORM, default_style
from harness.reporting.results import pluralize, skew
from harness.training.histories import megabytes_so_far, simulated_so_far
from harness.training.records import Evaluation, RoundRecord, format_epsilon

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

MOST_LINES = 500  # of a partition's figure, which has some 570 pixels for them
MOST_LABELS = 40  # of which a confusion matrix is drawn
MOST_INSIDE = 2  # lines that a legend below the curves of the accuracies has room for
CLEAR_LOSS = 0.05  # of accuracy, that a client would notice
ANNOTATED = 20  # rows and columns up to which a cell carries its number
MOST_LETTERS = 64  # of the numbers in a row of cells


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
        axis.set_major_locator(
            MaxNLocator(ANNOTATED, integer=True, steps=[1, 2, 5, 10], min_n_ticks=1)
        )
    for axis, names in ((axes.xaxis, columns), (axes.yaxis, rows)):
        if names:
            axis.set_major_formatter(FuncFormatter(partial(label_tick, names)))
            axis.set_tick_params(labelfontfamily=fonts_for(names))
    if len(columns) > ANNOTATED or are_words(columns):
        axes.tick_params("x", rotation=90)
    letters = len(f"{int(matrix.max()):,}") * matrix.shape[1]
    if max(matrix.shape) <= ANNOTATED and letters <= MOST_LETTERS:
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
    num_clients = len(counts)
    group = -(-num_clients // MOST_LINES)
    name = f"images, mean of {group} clients" if group > 1 else "images"
    plot_matrix(axes, counts, pool_rows(counts, group), name, classes)
    last = num_clients - 0.5
    axes.images[0].set_extent((-0.5, counts.shape[1] - 0.5, last, -0.5))
    axes.set(xlabel="label", ylabel="client")
    return figure


def pool_rows(counts: np.ndarray, group: int) -> np.ndarray:
    """Return the means of each `group` rows of int64[K,C], the last of what is left.

    A figure with more rows than pixels would leave some out.
    """
    if group == 1:
        return counts
    starts = np.arange(0, len(counts), group)
    sizes = np.diff([*starts, len(counts)])
    return np.add.reduceat(counts, starts) / sizes[:, None]


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
        draw_band(axes, rounds, lowest, highest, color=ORANGE, label=band)
        means = [scale * record.train.get(name, math.nan) for record in records]
        label = "clients while training, mean"
        axes.plot(rounds, means, "--", color=ORANGE, marker=marker, ms=4, label=label)
    tested = [scale * getattr(record, f"test_{name}") for record in records]
    label = "global model, test set"
    axes.plot(rounds, tested, "-", color=BLUE, marker=marker, ms=4, label=label)
    whole_rounds(axes)
    plain(axes)


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
def plot_convergence(
    records: Sequence[RoundRecord], caption: str, target: float = 0, own_loss: str = ""
) -> Figure:
    """Draw loss and accuracy by round: of the global model on the test set, of clients in training.

    The band is from the lowest to the highest client. `target` is a test accuracy, 0 for none;
    `own_loss` says what the clients minimize, if it is not the plain cross-entropy.
    """
    last = records[-1]
    title = f"Test accuracy {last.test_accuracy:.2%} after round {last.round}"
    if last.private:
        title = f"{title}, {format_epsilon(last)}"
    is_crowded = len(last.extra_accuracies) + bool(target) > MOST_INSIDE
    figure = new_figure(12 if is_crowded else 9, 4.2, title, caption)
    loss_axes, accuracy_axes = figure.subplots(1, 2)
    draw_quantity(loss_axes, records, "loss", 1)
    draw_quantity(accuracy_axes, records, "accuracy", 100)
    loss_axes.set_ylabel(
        f"clients: {own_loss};\nglobal model: cross-entropy (nats)"
        if own_loss
        else "cross-entropy (nats)"
    )
    if not loss_axes.dataLim.ymin <= 0:  # a custom loss may be negative
        log_scale(loss_axes)  # a first round may be twenty times the last
    accuracy_axes.set_ylabel("accuracy (%)")
    lines = draw_extra(accuracy_axes, records)
    if target:
        label = f"target, {100 * target:.4g}%"
        lines.append(accuracy_axes.axhline(100 * target, color=GREY, lw=1, ls=":", label=label))
    if is_crowded or FORM.get().is_narrow:
        handles = [*loss_axes.get_legend_handles_labels()[0], *lines]
        place_legend(figure, handles=handles)
        return figure
    loss_axes.legend(frameon=False, fontsize=9)
    if lines:
        low, high = accuracy_axes.get_ylim()
        low -= 0.08 * (len(lines) + 1) * (high - low)  # the legend is below the curves
        ticks = [tick for tick in accuracy_axes.get_yticks() if max(low, 0) <= tick <= 100]
        accuracy_axes.set(yticks=ticks, ylim=(low, high))
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
    fonts = fonts_for(classes)
    height = images.shape[1]
    width = images.shape[2]
    # The grid of images fills the figure's width; above and below it are title and caption.
    text_inches = 0.28
    around = 0.95 + 3 * text_inches
    inches = min(9 * 3 * height / (columns * 1.6 * width), 11) + around
    title = f"The first {min(most, len(wrong))} of {len(wrong):,} misclassified images"
    figure = new_figure(9, inches, title, caption)
    axes = figure.subplots()  # one for all: 18 of them would take a second
    axes.axis("off")
    size = figure.get_size_inches()
    pixels_per_inch = max(columns * 1.6 * width / size[0], 3 * height / max(size[1] - around, 0.5))
    gap = text_inches * pixels_per_inch
    pitch = size[0] * pixels_per_inch / columns
    for place, index in enumerate(wrong[:most]):
        row, column = divmod(place, columns)
        left = (column + 0.5) * pitch - width / 2
        top = row * (height + gap)
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
            left + width / 2,
            top - gap / 8,
            text,
            ha="center",
            fontsize=8,
            family=fonts,
            in_layout=False,
        )
    axes.set(xlim=(0, columns * pitch), ylim=(3 * height + 2 * gap, -gap))
    return figure


@default_style
def plot_baselines(rows: Sequence[dict[str, Any]], caption: str) -> Figure:
    """Draw the test error by passes over the images: federated, all in one place, each alone.

    `rows` are those of baselines.csv.
    """
    figure = new_figure(9, 4.8, "What federation is worth", caption)
    axes = figure.subplots()
    log_scale(axes)
    plain(axes, "both")
    least = least_error(np.array([100 * (1 - row["test_accuracy"]) for row in rows]))
    for name, title, color, style in (
        ("centralized", "centralized", GREY, "--"),
        ("federated", "federated", BLUE, "-"),
        ("alone", "each alone", ORANGE, "-."),
    ):
        errors_at: dict[float, list[float]] = {}
        for row in rows:
            if row["learner"] == name:
                error = 100 * (1 - row["test_accuracy"])
                errors_at.setdefault(row["epochs"], []).append(error)
        epochs = list(errors_at)
        mean = [float(np.mean(errors)) for errors in errors_at.values()]
        marker = "o" if len(epochs) <= 50 else None
        label = f"{title}: {mean[-1]:.2f} %"
        shown = np.maximum(mean, least)
        axes.plot(epochs, shown, style, color=color, marker=marker, ms=4, label=label)
        if name == "alone":
            lowest = [max(min(errors), least) for errors in errors_at.values()]
            highest = [max(errors) for errors in errors_at.values()]
            band = "clients alone, lowest to highest"
            draw_band(axes, epochs, lowest, highest, color=color, label=band)
    axes.set(xlabel="local epochs, passes over the images", ylabel="test error (%)", xlim=(0, None))
    place_legend(figure, title="final error")
    return figure


@default_style
def plot_gain(rows: Sequence[Any], caption: str) -> Figure:
    """Draw what the global model, and the same after a local epoch, bring each client, against its
    label skew.

    `rows` are those of clients.csv; gains are over the client's own model, on its own label mix.
    """
    losers = sum(row.gain < 0 for row in rows)
    clearly = sum(row.gain < -CLEAR_LOSS for row in rows)
    title = f"Who gains: {losers} of {len(rows)} clients do worse with the global model"
    if losers:
        title += f", {clearly} by more than {100 * CLEAR_LOSS:g} points"
    figure = new_figure(9, 4.8, title, caption)
    axes = figure.subplots()
    skews = [row.skew for row in rows]
    gains = [100 * row.gain for row in rows]
    tuned = [100 * (row.tuned_accuracy - row.own_accuracy) for row in rows]
    axes.axhline(0, color=GREY, lw=1)
    axes.vlines(skews, gains, tuned, color=GREY, lw=0.7, alpha=0.6)
    axes.scatter(skews, gains, color=BLUE, s=28, label="the global model", zorder=3)
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
    most = np.nanmax(np.abs([1, *tuned, *gains]))
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
    own_loss = describe_loss(experiment.config.training)
    figures: dict[str, Callable[[], Figure]] = {
        "convergence_plot.png": partial(
            plot_convergence, result.records, caption, target, own_loss
        ),
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
