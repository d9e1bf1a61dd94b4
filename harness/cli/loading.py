"""Functions by name, of variants/ or of a user's file, imported when they are used."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from harness.cli import own_files
from harness.cli.fields import UserError

# What parts are used by: a function is called, a TFF factory creates, a TFF optimizer steps.
USES = ("__call__", "create", "next")


def import_function(function: str | Callable, field: str = "") -> Any:
    """Return the function that "module:name" names in variants/; a function is itself.

    FILE.py:NAME is one of the user's own, given by the flag `field`.
    """
    if callable(function):
        return function
    if own_files.is_own(function):
        return own_files.load_function(function, field)
    module, _, name = function.partition(":")
    return getattr(importlib.import_module(f"variants.{module}"), name)


def change_parts(field: str, parts: Any, experiment: Any) -> Any:
    """Return the parts as the function that is chosen in this field changes them.

    Raises UserError if a user's own function returns something else.
    """
    function = import_function(experiment.config.chosen(field).function, field)
    changed = function(parts, experiment)
    name = experiment.config.to_dict()[field]
    if not isinstance(changed, type(parts)):
        raise UserError(
            f"{field}={name!r:.200} returns {type(changed).__name__}; return the parts, such as "
            "parts._replace(...)"
        )
    for part, before in parts._asdict().items():
        after = getattr(changed, part)
        needed = [use for use in USES if hasattr(before, use)]
        if not all(hasattr(after, use) for use in needed):
            raise UserError(
                f"{field}={name!r:.200} returns {part}={after!r:.60}, which cannot take the place "
                f"of a {type(before).__name__}; give another one, or leave {part} as it is"
            )
    return changed
