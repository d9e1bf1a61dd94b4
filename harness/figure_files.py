"""Figure files: PNG, PDF or SVG, with provenance in their metadata."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any, NamedTuple

from harness.command_line import warn
from harness.files import briefly, to_utf_8
from harness.plots import default_style
from harness.provenance import processor

import matplotlib
from matplotlib.figure import Figure

# Of a format: the field that holds a text, and the fields that it has else and we leave out.
TEXT_FIELD = {"png": "Description", "pdf": "Subject", "svg": "Description"}
OTHER_FIELDS = {"png": {"Software": None}, "pdf": {"CreationDate": None}, "svg": {"Date": None}}


class FigureForm(NamedTuple):
    """How a run's figures are written."""

    format: str = "png"
    has_caption: bool = True  # title and small print, which a paper has elsewhere

    @property
    def is_drawn(self) -> bool:
        """Whether there are figures at all."""
        return self.format != "none"

    def file_name(self, name: str) -> str:
        """Return the name of a figure's file, which is given as a PNG's."""
        return f"{name.removesuffix('.png')}.{self.format}"


PLAIN = FigureForm()


def form_of(run: Any) -> FigureForm:
    """Return the form that the flags of the group Run ask for."""
    return FigureForm(run.figures, run.caption)


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
    about = provenance or {"processor": processor()}
    text = "; ".join(f"{name}: {value}" for name, value in about.items() if value is not None)
    metadata = OTHER_FIELDS[form.format] | {TEXT_FIELD[form.format]: to_utf_8(text).decode()}
    content = io.BytesIO()
    with matplotlib.rc_context({"pdf.fonttype": 42}):  # TrueType: journals refuse Type 3
        figure.savefig(content, format=form.format, metadata=metadata)
    return content.getvalue()


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
    for name, draw in figures.items() if form.is_drawn else ():
        try:
            files[form.file_name(name)] = to_bytes(draw(), form, provenance)
        except Exception as error:
            warn(f"cannot draw {name} ({briefly(error)}); all other files are written")
    return files
