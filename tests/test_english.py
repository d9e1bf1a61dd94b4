"""Messages, help and docs are in plain English: the habits that made them hard to read are gone."""

import ast
import re

import pytest
from runs import ROOT

PROGRAM = [ROOT / "federated_learning.py"]
PROGRAM += sorted([*(ROOT / "harness").rglob("*.py"), *(ROOT / "variants").glob("*.py")])
NAMES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md", "data/README.md")
DOCS = [ROOT / name for name in NAMES]
DOCS += sorted((ROOT / "docs").glob("*.md"))
HABITS = (
    r"\bis no (?!longer|route|variance)",
    r"\b(is|are|was) told\b",
    r"\b(goes|go|going) on\b",
    r"\bbeside\b",
    r"\banew\b",
    r"\bso (many|much)\b",
    r"\bas (many|much)\b(?! as)",
    r"\bmend(ed|s)?\b",
    r"\bof the two\b",
    r"\bone's own\b",
    r"\bmade again\b",
    r"\bdone again\b",
    r"\bheed",
)
ALLOWED = {  # where the word is right
    "data/mnist.npz beside the script",
}


def texts_of(path):
    """The texts that a person may see: strings, help and docstrings; of a page, its lines."""
    if path.suffix == ".md":
        return re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL).splitlines()
    nodes = ast.walk(ast.parse(path.read_text()))
    return [
        " ".join(node.value.split())
        for node in nodes
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]


@pytest.mark.parametrize("path", [*PROGRAM, *DOCS], ids=lambda path: str(path.relative_to(ROOT)))
def test_texts_are_free_of_old_habits(path):
    found = [
        (habit, text)
        for text in texts_of(path)
        for habit in HABITS
        if re.search(habit, text) and text not in ALLOWED
    ]
    assert found == []
