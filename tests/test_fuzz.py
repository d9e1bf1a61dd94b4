"""Whatever is in the files that the script reads: it is taken, or refused in one line.

`make test` tries 400 changes and `make thorough` 4,000, the same ones from run to run;
MUTATIONS=50000 python -m pytest tests/test_fuzz.py tries more.
"""

import gzip
import os
import random
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import federated_learning as fl
from harness.cli.fields import UserError
from harness.cli.saved_config import check_resumed, read_saved
from harness.comparing.completing import read_earlier
from harness.comparing.run_folders import find_folder
from harness.reporting.results import describe_run
from harness.storage.files import json_line, to_json
from harness.storage.run_folder import RunFolder
from harness.training.records import Evaluation, make_record
from variants import privacy

import numpy as np
import pytest
import tensorflow_federated as tff
from runs import configure

MUTATIONS = int(os.environ.get("MUTATIONS", "240"))
WEIGHTS = np.arange(3, dtype=np.float32)


class Progress(NamedTuple):
    round: Any


class State(NamedTuple):
    """As small as a state can be that has a round's number."""

    client_work: Any
    weights: Any


STATE_TYPE = tff.FederatedType(
    tff.to_type(State(Progress(np.int64), tff.TensorType(np.float32, [3]))), tff.SERVER
)
FLAGS = {
    "dataset": "digits",
    "model": "logreg",
    "num_clients": 4,
    "rounds": 2,
    "figures": "none",
}
VALUES = [
    "null",
    "true",
    "-1",
    "1e999",
    "0.5",
    '"x"',
    '"\\u001b[31m"',
    "[]",
    "{}",
    "[[[]]]",
    "9" * 400,
    "[" * 5000,
]


def mutate(content: bytes, rng: random.Random) -> bytes:
    """`content` with a byte or a stretch of it changed, or for JSON a value in the place of
    another."""
    place = rng.randrange(len(content))
    length = rng.choice([1, 1, 4, 50])
    tokens = list(re.finditer(rb'-?\d+(\.\d+)?(e-?\d+)?|"[^"]*"|null|true|false', content[:20_000]))
    if content[:1] == b"{" and tokens and rng.random() < 0.7:
        token = rng.choice(tokens)
        return content[: token.start()] + rng.choice(VALUES).encode() + content[token.end() :]
    before = content[:place]
    changed = content[place : place + length]
    after = content[place + length :]
    return rng.choice(
        [
            before + bytes(byte ^ 1 << rng.randrange(8) for byte in changed) + after,
            before + rng.randbytes(length) + after,
            before,
            before + after,
            before + changed + changed + after,
            before + bytes(length) + after,
        ]
    )


def with_small_state(config, digits):
    """An experiment whose process has a State."""
    experiment = fl.build_experiment(config, digits)
    vars(experiment)["process"] = SimpleNamespace(state_type=STATE_TYPE)
    return experiment


@pytest.fixture(scope="module", autouse=True)
def no_best_weights():
    """The small state has no model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "note_best", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory, digits, no_best_weights):
    """A run's folder and data files, each in all the forms that are read, and small."""
    folder = tmp_path_factory.mktemp("fuzz")
    few = {}
    config = configure(**FLAGS, cache=str(folder / "cache"))
    for part, split in (("train", digits.train), ("test", digits.test)):
        few |= {f"x_{part}": split.images[:40], f"y_{part}": split.labels[:40]}
    np.savez(folder / "data.npz", **few)
    np.savez_compressed(folder / "packed.npz", **few)
    (folder / "idx").mkdir()
    for name, array in zip(
        ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"),
        few.values(),
        strict=True,
    ):
        content = (
            bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()
        )
        (folder / "idx" / f"{name}-ubyte.gz").write_bytes(gzip.compress(content, mtime=0))
    evaluation = Evaluation(1.0, 0.5, np.zeros(2, np.uint8), np.arange(2, dtype=np.uint8), 10)
    rows = [
        {
            "client": 0,
            "examples": 3.0,
            "loss": float("nan"),
            "accuracy": 0.5,
            "steps": 1.0,
            "finite": True,
        }
    ]
    experiment = with_small_state(config.replace(runs=str(folder), name="run"), digits)
    with RunFolder.open(experiment) as run:
        run.load(experiment)
        figures = {"dropped": 0, "bytes_down": 1, "bytes_up": 1, "seconds": 1.0}
        names = fl.ClientMetrics._fields
        records = [make_record(number, rows, evaluation, names, **figures) for number in (1, 2)]
        for record in records:
            state = State(Progress(np.int64(record.round)), WEIGHTS)
            run.save_round(record, state)
    metrics = describe_run(experiment, [WEIGHTS], evaluation, records)
    (folder / "run" / "metrics.json").write_text(to_json(metrics))
    (folder / "run" / "rounds_begun.txt").write_text("1\n2\n")
    return folder


def count_rounds(folder: Path, _) -> None:
    """What epsilon is counted by."""
    assert privacy.read_journal(folder / "run" / "rounds_begun.txt", 3)


def go_on(folder: Path, digits) -> None:
    """What `--resume` reads."""
    saved = read_saved(str(folder / "run"), fl.Config())
    check_resumed(saved, saved)
    experiment = with_small_state(saved, digits)
    with RunFolder.open(experiment) as run:
        _, records = run.load(experiment)
    for record in records:
        record.line(5)
        record.trouble(records[:-1], 0.1, True)
        json_line(record.to_json())


def compare_again(folder: Path, _) -> None:
    """What `--compare` reads."""
    config = configure(**FLAGS, runs=str(folder), name="run")
    read_earlier(config.replace(cache=str(folder / "cache")))
    find_folder(folder, "comparison", {"values": ["a", "b"]})


def load(folder: Path, _) -> None:
    """What `--data` reads."""
    for name in ("data.npz", "packed.npz", "idx"):
        fl.load_dataset(configure(data=str(folder / name)).data)


def split_again(folder: Path, digits) -> None:
    """What `--partition-file` reads."""
    flags = {
        "dataset": "digits",
        "num_clients": 4,
        "partition_file": str(folder / "run" / "partition.json"),
    }
    fl.make_partition(digits, configure(**flags))


READERS = {
    "run/config.json": go_on,
    "run/partition.json": go_on,
    "run/rounds.jsonl": go_on,
    "run/program.json": go_on,
    "run/rounds_begun.txt": count_rounds,
    "run/checkpoints/round-000002.npz": go_on,
    "run/metrics.json": compare_again,
    "comparison/comparison.json": compare_again,
    "data.npz": load,
    "packed.npz": load,
    "idx/train-images-idx3-ubyte.gz": load,
    "idx/t10k-labels-idx1-ubyte.gz": load,
    "run/partition.json ": split_again,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_what_is_in_a_file_is_taken_or_refused_in_one_line(folder, digits, capsys, name):
    read = READERS[name]
    path = folder / name.strip()
    everything = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    read(folder, digits)  # as it is, nothing is refused
    whole = path.read_bytes()
    rng = random.Random(name)
    refused = 0
    for number in range(MUTATIONS // len(READERS) + 1):
        content = mutate(whole, rng)
        for other, before in everything.items():
            if other.read_bytes() != before:
                other.write_bytes(before)
        path.write_bytes(content)
        try:
            read(folder, digits)
        except UserError as error:
            refused += 1
            assert str(error).isprintable() and len(str(error)) < 700, (number, str(error))
        except Exception as error:
            raise AssertionError(
                f"mutation {number}: {error!r}, not one line; content {content[:300]!r}"
            ) from error
    path.write_bytes(whole)
    said = capsys.readouterr().err
    assert (refused > 0 or "using the previous checkpoint" in said) and "\x1b" not in said
