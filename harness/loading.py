"""Functions of variants/ by name, imported when they are used."""

from __future__ import annotations

import importlib
from typing import Any


def load(name: str) -> Any:
    """Return what "module:name" stands for: a function of a module of variants/."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(f"variants.{module}"), attribute)
