"""README proves itself: its commands parse, its flags are the script's, its files exist."""

import re
import shlex
import subprocess

import federated_learning as fl

import pytest
import tyro
from runs import ROOT

README = (ROOT / "README.md").read_text()
TEXTS = README + fl.__doc__ + (ROOT / "Dockerfile").read_text()


def commands(start):
    """The lines of README's code blocks and of the script's docstring that start so, without comments."""
    found = re.findall(rf"^(?:#  )? *({start}.*)$", TEXTS, re.MULTILINE)
    return sorted({" ".join(shlex.split(line, comments=True)) for line in found})


@pytest.mark.parametrize("line", commands(r"python federated_learning\.py"))
def test_every_command_of_the_script_parses(line, capsys):
    flags = shlex.split(line.split("|")[0].split(">")[0])[2:]
    if "--help" in flags or any(flag.startswith("--tyro") for flag in flags):
        with pytest.raises(SystemExit) as end:
            tyro.cli(fl.Config, args=flags)
        assert not end.value.code
    else:
        assert isinstance(tyro.cli(fl.Config, args=flags), fl.Config)


@pytest.mark.parametrize("line", commands("make "))
def test_every_make_target_exists(line):
    subprocess.run(["make", "--dry-run", *shlex.split(line)[1:]], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.parametrize("line", commands("python benchmarks/"))
def test_every_benchmark_exists(line):
    assert (ROOT / shlex.split(line)[1]).is_file()


def test_every_flag_is_named_and_every_named_flag_exists():
    named = set(re.findall(r"`--([a-z][a-z-]*)", README))
    flags = {field.replace("_", "-") for field in fl.Config.__dataclass_fields__}
    assert flags - named == set()
    assert named - flags <= {"help", "install", "no-deps", "tyro-print-completion"}


def test_tables_are_those_of_the_results(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import readme

    assert readme.fill(README) == README  # else: python benchmarks/readme.py


def test_every_linked_file_exists():
    for path in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / path).exists(), path
