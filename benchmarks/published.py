"""Figures that others have published, each with its source and its setting:
results/published.json."""

from results import read


def published() -> dict[str, dict]:
    """The figures by their names."""
    return {figure["id"]: figure for figure in read("published")["published"]}
