"""What all figures share: size, title, small print, fonts, colours, axes and legends."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import textwrap
import unicodedata
import warnings
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, Literal

from harness.cli.output import warn
from harness.reporting.figure_form import FORM

import numpy as np
from matplotlib.figure import Figure
from matplotlib.font_manager import (
    FontProperties,
    findfont,
    findSystemFonts,
    fontManager,
    get_font,
)
from matplotlib.ticker import FormatStrFormatter, FuncFormatter, MaxNLocator

BLUE = "#0b6fa4"
ORANGE = "#d1495b"
# Okabe and Ito's, which the colour-blind tell apart, without yellow, which is pale on white.
CYCLE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
GREY = "#5c6770"


def new_figure(width: float, height: float, title: str, caption: str) -> Figure:
    """Return a Figure with its title, and in small print below it what it was made on.

    Sizes are inches.
    """
    form = FORM.get()
    size = form.size or (width, height)
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    fonts = fonts_for([title, caption])
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


def fonts_for(texts: Iterable[Any]) -> list[str]:
    """Return the fonts for texts: matplotlib's own, and one installed that has what it lacks."""
    own = FontProperties()
    characters = {ord(char) for text in texts for char in str(text) if char.isprintable()}
    lacking = characters - get_font(findfont(own)).get_charmap().keys()
    return [*own.get_family(), *find_font(frozenset(lacking))] if lacking else own.get_family()


@functools.cache
def find_font(characters: frozenset[int]) -> list[str]:
    """Return the name of an installed font that has all these characters.

    If there is none, nothing; then a notice says so, and no library says more.
    """
    # A font without bold letters would have a line printed for each text.
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    listed = {entry.fname for entry in fontManager.ttflist}
    for path in {*findSystemFonts()} - listed:  # installed since matplotlib made its list
        with contextlib.suppress(OSError, RuntimeError):  # a damaged file
            fontManager.addfont(path)
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


def plain(axes: Any, ticks: Literal["major", "both"] = "major") -> None:
    """Give the axes a faint grid at those ticks, and no frame above and on the right."""
    axes.grid(alpha=0.3, which=ticks)
    axes.spines[["top", "right"]].set_visible(False)


def draw_band(axes: Any, places: Any, lowest: Any, highest: Any, **style: Any) -> None:
    """Shade from `lowest` to `highest` [n] at each of the places [n]; a single one is a bar."""
    width = 0 if len(places) > 1 else 6
    axes.fill_between(places, lowest, highest, alpha=0.15, lw=width, **style)


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


def label_tick(names: Sequence[Any], place: float, _: int) -> str:
    """Return the name of a row or column, for its tick."""
    return shorten(names[round(place)], 16) if 0 <= round(place) < len(names) else ""


def count_columns(text: str) -> int:
    """Return the width of a text in letters; a Chinese character is as wide as two."""
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)


def shorten(name: Any, most: int) -> str:
    """Return a label's name cut to the width of `most` letters; matplotlib sees no formula in
    it."""
    cut = str(name)
    if count_columns(cut) > most:
        while count_columns(cut) > most - 1:
            cut = cut[:-1]
        cut = f"{cut.rstrip()}…"
    return cut.replace("$", r"\$")


def plain_text(name: str) -> str:
    """Return a line's name as the legend shows it: without a formula, and never left out.

    Matplotlib leaves out names that begin with an underscore.
    """
    escaped = name.replace("$", r"\$")
    return f" {escaped}" if escaped.startswith("_") else escaped


def least_error(errors: np.ndarray) -> float:
    """Return half the least error above 0, where a log scale shows those of 0."""
    above = errors[errors > 0]
    return float(above.min()) / 2 if len(above) else 0.01


def are_words(names: Sequence[Any]) -> bool:
    """Return whether the names of labels are longer than numbers are."""
    return any(count_columns(str(name)) > 4 for name in names)


MARKERS = "os^vDPX*<>p"
DASHES = ("-", "--", "-.", ":")


def style_of(number: int) -> dict[str, str]:
    """Return colour, marker and dashes of a comparison's line; 308 lines have different ones."""
    return {
        "color": CYCLE[number % len(CYCLE)],
        "marker": MARKERS[number % len(MARKERS)],
        "ls": DASHES[number % len(DASHES)],
    }


LETTER = 0.6  # width of a letter, of its size
LINE = 1.5  # height of a line, likewise
SMALL = 7.0  # points
HANDLE = 6  # letters in the place of a legend's line sample


def break_names(legend: Any, letters: int) -> None:
    """Break the names in a legend into lines of at most that number of letters."""
    fonts = fonts_for(text.get_text() for text in legend.get_texts())
    for text in legend.get_texts():
        text.set_family(fonts)
        unbroken = text.get_text().replace(" %", "\xa0%").replace(" ± ", "\xa0±\xa0")
        text.set_text(textwrap.fill(unbroken, letters).replace("\xa0", " "))


def place_legend(figure: Figure, **options: Any) -> None:
    """Draw a legend next to the axes, or in a narrow figure between them and the caption.

    Long names are broken. `options` are those of Figure.legend.
    """
    narrow = FORM.get().is_narrow
    size = FORM.get().font or 9
    place: Any = "outside lower center" if narrow else "outside right center"
    legend = figure.legend(frameon=False, fontsize=size, loc=place, **options)
    longest = max((len(text.get_text()) for text in legend.get_texts()), default=0)
    num_columns = int(figure.get_size_inches()[0] * 72 / (size * LETTER * (longest + HANDLE)))
    if narrow and num_columns > 1:
        legend.remove()
        in_columns = {"ncols": num_columns, "columnspacing": 1.0, **options}
        legend = figure.legend(frameon=False, fontsize=size, loc=place, **in_columns)
    break_names(legend, 60 if narrow else 40)
    if not narrow and legend.get_window_extent().height > 0.9 * figure.bbox.height:
        # Of many rows, a line each, in letters that are small enough.
        num_lines = len(legend.get_texts()) + 3
        fitting = 0.9 * 72 * figure.get_size_inches()[1] / (LINE * num_lines)
        legend.remove()
        smaller = {"fontsize": min(SMALL, fitting), "title_fontsize": SMALL, **options}
        legend = figure.legend(frameon=False, loc=place, **smaller)
        break_names(legend, 60)
    # Matplotlib's layout puts both legend and caption at the lower edge: so the caption gets empty
    # lines above, and the legend is drawn there.
    captions = [text for text in figure.texts if text.get_text() == figure.get_supxlabel() != ""]
    for caption in captions if narrow and FORM.get().has_caption else ():
        height = caption.get_window_extent().height
        line_height = height / (1 + caption.get_text().count("\n"))
        num_lines = math.ceil(legend.get_window_extent().height / line_height)
        caption.set_text("\n" * num_lines + caption.get_text())
        share = height / figure.bbox.height
        legend.set_bbox_to_anchor((0, share, 1, 1 - share), figure.transFigure)
