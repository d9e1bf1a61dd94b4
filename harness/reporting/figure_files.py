"""Figure files: PNG, PDF or SVG, with provenance in their metadata."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from harness.cli.output import warn
from harness.reporting.figure_form import FORM, PLAIN, FigureForm, default_style
from harness.storage.files import briefly, io_errors_as_user_errors, to_utf_8
from harness.storage.provenance import processor

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

# Of a format: the field that holds a text, and the fields that it has else and we leave out.
TEXT_FIELD = {"png": "Description", "pdf": "Subject", "svg": "Description"}
OTHER_FIELDS = {"png": {"Software": None}, "pdf": {"CreationDate": None}, "svg": {"Date": None}}


@default_style
def to_bytes(
    figure: Figure, form: FigureForm = PLAIN, provenance: dict[str, Any] | None = None
) -> bytes:
    """Return the figure as a file's bytes. `provenance` goes into its metadata, else the processor.

    A date is there only as provenance: that of the file may say when a private run's round was.
    """
    if not form.has_caption:  # a paper has its own, and its title
        figure.suptitle("")
        figure.supxlabel("")
    if form.font:
        set_font(figure, form.font)
    about = provenance or {"processor": processor()}
    text = "; ".join(f"{name}: {value}" for name, value in about.items() if value is not None)
    metadata = OTHER_FIELDS[form.format] | {TEXT_FIELD[form.format]: to_utf_8(text).decode()}
    content = io.BytesIO()
    with matplotlib.rc_context({"pdf.fonttype": 42}):  # TrueType: journals refuse Type 3
        if form.format == "png" and not form.style:
            # the same bytes as savefig's, which lays the figure out twice
            FigureCanvasAgg(figure).print_png(content, metadata=metadata)
        else:
            figure.savefig(content, format=form.format, metadata=metadata)
    return content.getvalue()


def set_font(figure: Figure, points: float) -> None:
    """Give all texts of a figure this size; numbers in cells stay smaller than their cells."""
    for text in figure.findobj(Text):
        smaller = 1.0 if text.get_in_layout() else 0.6
        text.set_fontsize(smaller * points)


def draw_files(
    figures: dict[str, Callable[[], Figure]],
    form: FigureForm,
    provenance: dict[str, Any] | None = None,
) -> dict[str, bytes]:
    """Draw the figures and return their files, name -> bytes; none with --figures none.

    `figures` has what draws each by its name, which is given as a PNG's. One that fails is a
    notice: all that matters is written by then.
    """
    files = {}
    token = FORM.set(form)
    try:
        for name, draw in figures.items() if form.is_drawn else ():
            try:
                files[form.file_name(name)] = to_bytes(draw(), form, provenance)
            except Exception as error:
                warn(f"cannot draw {name} ({briefly(error)}); all other files are written")
    finally:
        FORM.reset(token)
    return files


def remove_outdated(folder: Path, names: Iterable[str], written: Sequence[Path]) -> None:
    """Remove figures of an earlier part of a run or comparison that were not drawn again.

    `names` are those of all its figures, which were drawn in another format then, or are not drawn
    any more.
    """
    for name in names:
        for ending in TEXT_FIELD:
            path = (folder / name).with_suffix(f".{ending}")
            if path not in written:
                with io_errors_as_user_errors(path):
                    path.unlink(missing_ok=True)
