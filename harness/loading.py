"""Functions of variants/ by name, imported when they are used."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any


def import_function(function: str | Callable) -> Any:
    """Return the function that "module:name" names in variants/; a function is itself."""
    if callable(function):
        return function
    module, _, name = function.partition(":")
    return getattr(importlib.import_module(f"variants.{module}"), name)
