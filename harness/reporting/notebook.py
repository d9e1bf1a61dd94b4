"""Notebook helpers: a progress bar instead of a run's output, and a drawing of a round."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterator

from harness.reporting.drawing import BLUE, GREY, ORANGE, new_figure
from harness.reporting.figure_form import default_style

import tqdm
from matplotlib.figure import Figure


class RoundCounter(io.StringIO):
    """A stream that keeps what is printed, and moves a bar for each round's line."""

    def __init__(self, bar: tqdm.tqdm):
        super().__init__()
        self.bar = bar

    def write(self, text: str) -> int:
        """Keep the text, and count its rounds."""
        self.bar.update(sum(line.startswith("round ") for line in text.splitlines()))
        return super().write(text)

    @property
    def closing_lines(self) -> str:
        """The last lines that were printed: a comparison's table, or a run's result."""
        blocks = self.getvalue().strip().split("\n\n")
        return blocks[-2] if len(blocks) > 1 else blocks[-1]


@contextlib.contextmanager
def quietly(rounds: int, what: str) -> Iterator[RoundCounter]:
    """Show a progress bar of this many rounds instead of printed output, and pass it to `as`."""
    with tqdm.tqdm(total=rounds, desc=what, unit="round", file=sys.stderr, mininterval=1) as bar:
        counter = RoundCounter(bar)
        with contextlib.redirect_stdout(counter):
            yield counter


@default_style
def plot_round() -> Figure:
    """Draw one round of federated averaging: who sends what to whom."""
    figure = new_figure(9, 4.2, "One round of federated averaging", "McMahan et al. 2017")
    axes = figure.subplots()
    axes.set(xlim=(0, 12), ylim=(0, 6))
    axes.axis("off")

    def box(x: float, y: float, text: str, color: str) -> None:
        style = {"boxstyle": "round,pad=0.5", "fc": "white", "ec": color, "lw": 1.8}
        axes.text(x, y, text, ha="center", va="center", fontsize=10, bbox=style)

    def arrow(start: tuple[float, float], end: tuple[float, float], color: str) -> None:
        style = {"arrowstyle": "-|>", "color": color, "lw": 1.4, "shrinkA": 6, "shrinkB": 6}
        axes.annotate("", end, start, arrowprops=style)

    server = (6, 5.2)
    box(*server, "server: global model w\n3. averages:  w  ←  Σ (n_k / n) w_k", BLUE)
    for x, name in ((1.8, "client 1"), (6, "client 2"), (10.2, "client K")):
        box(x, 1.2, f"{name}\n2. local SGD on its own\nn_k images:  w  →  w_k", ORANGE)
        shift = (x - 6) * 0.35
        arrow((5.7 + shift, 4.6), (x - 0.35, 2.0), BLUE)
        arrow((x + 0.35, 2.0), (6.3 + shift, 4.6), ORANGE)
    axes.text(8.1, 1.2, "…", fontsize=16, color=GREY)
    axes.text(2.1, 3.6, "1. sends w", color=BLUE, fontsize=10, ha="center")
    text = "sends w − w_k and n_k;\nits images never leave"
    axes.text(9.7, 3.9, text, color=ORANGE, fontsize=10, ha="left")
    return figure
