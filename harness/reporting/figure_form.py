"""The form of a run's figures: format, size, font and style, as the flags ask for."""

from __future__ import annotations

import contextvars
import functools
import logging
from typing import Any, NamedTuple

from harness.cli.fields import UserError
from harness.storage.files import briefly, expand_path

import matplotlib.style


class FigureForm(NamedTuple):
    """How a run's figures are drawn and written."""

    format: str = "png"
    has_caption: bool = True  # title and small print, which a paper has elsewhere
    size: tuple[float, float] | None = None  # inches; None: each figure's own
    font: float | None = None  # points, of all texts; None: each text's own
    style: str = ""  # path of a matplotlib style file
    y: str = "error"  # of a comparison's figure: error, error-linear or accuracy

    @property
    def is_drawn(self) -> bool:
        """Whether there are figures at all."""
        return self.format != "none"

    @property
    def is_narrow(self) -> bool:
        """Whether a figure has no room for a legend next to its axes."""
        return self.size is not None and self.size[0] < 6

    def file_name(self, name: str) -> str:
        """Return the name of a figure's file, which is given as a PNG's."""
        return f"{name.removesuffix('.png')}.{self.format}"


PLAIN = FigureForm()
FORM = contextvars.ContextVar("form of the figures that are being drawn", default=PLAIN)


def form_of(run: Any) -> FigureForm:
    """Return the form that the flags of the group Run ask for.

    Raises UserError for a style file that matplotlib cannot read.
    """
    style = str(expand_path(run.figure_style).absolute()) if run.figure_style else ""
    if style:
        log = logging.getLogger("matplotlib")
        was_disabled = log.disabled
        log.disabled = True  # it would print a line more
        try:
            with matplotlib.style.context(style):
                pass
        except Exception as error:
            raise UserError(
                f"figure_style={run.figure_style!r:.200} is not a matplotlib style file "
                f"({briefly(error)}); give a matplotlibrc or .mplstyle file"
            ) from error
        finally:
            log.disabled = was_disabled
    return FigureForm(run.figures, run.caption, run.inches, run.figure_font, style, run.figure_y)


def default_style(draw: Any) -> Any:
    """Decorate a function that draws: its style is matplotlib's default with --figure-style.

    The user's own matplotlibrc changes nothing, unless it is given.
    """

    @functools.wraps(draw)
    def drawn(*arguments: Any, **named: Any) -> Any:
        style = FORM.get().style
        with matplotlib.style.context(["default", style] if style else "default"):
            return draw(*arguments, **named)

    return drawn
