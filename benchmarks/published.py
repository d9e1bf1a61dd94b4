"""Figures that others have published, each with its source and its setting:
results/published.json."""

import json
from pathlib import Path

FILE = Path(__file__).resolve().parent / "results" / "published.json"


def published() -> dict[str, dict]:
    """The figures by their names."""
    return {figure["id"]: figure for figure in json.loads(FILE.read_text())["published"]}
