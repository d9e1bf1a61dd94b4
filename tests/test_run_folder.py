"""Nothing is lost: killed and resumed equals uninterrupted, damage is noticed, another run's files
are refused.

KILLS=20 python -m pytest tests/test_run_folder.py kills the script at 20 random moments after its
imports, not one.
"""

import errno
import html
import io
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import federated_learning as fl
from harness.cli import saved_config
from harness.cli.fields import UserError
from harness.cli.saved_config import read_saved
from harness.reporting.results import weights_sha256
from harness.storage import files, run_names
from harness.storage.files import lock, to_json
from harness.storage.provenance import describe_program
from harness.storage.run_folder import CHECKPOINTS_KEPT, RunFolder
from harness.storage.run_names import default_name
from harness.training.shards import FOOTER_BYTES, fingerprint
from variants import choices

import numpy as np
import psutil
import pytest
from runs import (
    NO_FIGURES,
    ON_DIGITS,
    SECONDS,
    after_first_round,
    call_script,
    command,
    configure,
    gone,
    read_csv,
    read_metrics,
    start,
    with_needs,
)

FLAGS = (*ON_DIGITS, *NO_FIGURES, "--num-clients", "4", "--clients-per-round", "3")
ROUNDS = 6
KILLS = int(os.environ.get("KILLS", "1"))


def outcome(run: Path):
    """What must be equal: the table without its seconds, each client's report, and the weights."""
    metrics = read_metrics(run)
    rows = read_csv(run / "metrics.csv")
    for row in [*rows, *metrics["rounds"]]:
        del row["seconds"]
    return rows, metrics["rounds"], metrics["weights_sha256"]


def test_a_folders_name_has_what_is_not_as_by_default(digits):
    """A rate counts if it is not that of the algorithm; an unused flag, and rounds, never."""
    start = "digits-dirichlet-fedavg-mlp-seed0"
    for flags, name in (
        ("--rounds 7 --prox-mu 0.5 --target-accuracy 0.9", start),
        ("--alpha 0.1", f"{start}-alpha0.1"),
        ("--aggregator median --client-lr 0.1", f"{start}-client_lr0.1-aggregator-median"),
        ("--client-lr 0.05", start),  # of digits
        ("--algorithm scaffold", "digits-dirichlet-scaffold-mlp-seed0"),
        ("--drop-stragglers --stragglers 0.5", f"{start}-stragglers0.5-drop_stragglers"),
        ("--workers localhost,hostA", start),
        ("--seed 2", "digits-dirichlet-fedavg-mlp-seed2"),
    ):
        config = fl.parse(f"--dataset digits --model mlp {flags}")
        assert default_name(config.effective(), digits) == name
    many = "--client-momentum 0.85 --client-optimizer momentum --weight-decay 0.001 "
    many += "--local-epochs 7 --batch-size 100 --min-images 3 --stragglers 0.123 --dropout 0.123"
    name = default_name(fl.parse(f"--dataset digits --model mlp {many}").effective(), digits)
    assert len(name) <= 130 and name.endswith("-and-more")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(folder of an uninterrupted run, the seconds that it took without imports)"""
    folder = tmp_path_factory.mktemp("whole")
    began = time.monotonic()
    done = call_script(folder, *FLAGS, "--rounds", str(ROUNDS), "--name", "run")
    assert (
        done.returncode == 0
        and "weights sha256 " + outcome(folder / "runs" / "run")[2] in done.stdout
    )
    return folder / "runs" / "run", time.monotonic() - began


@pytest.fixture
def half(whole, tmp_path):
    """A copy of the whole run, as if its last three rounds had not been."""
    run = tmp_path / "runs" / "run"
    shutil.copytree(whole[0], run)
    for name in (
        "metrics.json",
        "global_model.keras",
        *(f"checkpoints/round-{n:06d}.npz" for n in (5, 6)),
    ):
        (run / name).unlink()
    return run


def test_killed_and_resumed_equals_uninterrupted(whole, tmp_path):
    moments = random.Random(7)
    codes = []
    for number in range(KILLS):
        folder = tmp_path / str(number)
        folder.mkdir()
        process = subprocess.Popen(
            command(*FLAGS, "--rounds", str(ROUNDS), "--name", "run", "--figures", "png"),
            cwd=folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while process.poll() is None and not any(folder.glob("runs/*")):
            time.sleep(0.02)
        time.sleep(moments.uniform(0, whole[1]))
        below = (
            psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        )
        process.kill()
        codes.append(process.wait())
        run = folder / "runs" / "run"
        for path in folder.rglob("*"):
            if path.is_file() and not path.name.startswith("."):
                check_whole(path)
        flags = (
            ("--resume", str(run), *NO_FIGURES)
            if run.exists()
            else (*FLAGS, "--rounds", str(ROUNDS), "--name", "run")
        )
        done = call_script(folder, *flags)
        assert done.returncode == 0, done.stderr
        assert outcome(run) == outcome(whole[0])
        assert all(gone(child) for child in below)
    assert -signal.SIGKILL in codes  # else it had ended by itself each time


def check_whole(path: Path):
    """Fails where a file under its final name is cut short."""
    content = path.read_bytes()
    if path.suffix == ".json":
        json.loads(content)
    elif path.suffix == ".jsonl":
        assert all(json.loads(line) for line in content.decode().splitlines()) and content[-1:] in (
            b"",
            b"\n",
        )
    elif path.suffix in (".npz", ".keras"):
        assert zipfile.ZipFile(path).testzip() is None
    elif path.suffix == ".png":
        assert content.endswith(b"IEND\xaeB`\x82")
    elif path.suffix == ".csv":
        assert content[-1:] in (b"", b"\n")  # empty before the first round
        assert len({line.count(b",") for line in content.splitlines()}) <= 1
    elif path.suffix == ".bin":
        records, footer = np.split(np.frombuffer(content, np.uint8), [-FOOTER_BYTES])
        assert np.array_equal(fingerprint(records), footer)


def test_a_run_goes_on_where_it_stopped_and_can_be_extended(whole, half, tmp_path):
    done = call_script(tmp_path, "--resume", str(half))
    assert done.returncode == 0, done.stderr
    assert [line.split()[1] for line in done.stdout.splitlines() if line.startswith("round ")] == [
        "5/6",
        "6/6",
    ]
    assert outcome(half) == outcome(whole[0])
    longer = call_script(tmp_path, "--resume", str(half), "--rounds", "7")
    assert (
        longer.returncode == 0
        and len(outcome(half)[0]) == 7
        and outcome(half)[0][:6] == outcome(whole[0])[0]
    )
    assert len(list((half / "checkpoints").glob("round-*"))) == CHECKPOINTS_KEPT


def test_a_damaged_checkpoint_is_noticed_and_the_one_before_taken(whole, half, tmp_path):
    shutil.copy(half / "checkpoints" / "round-000004.npz", tmp_path / "good.npz")
    damaged = half / "checkpoints" / "round-000005.npz"
    content = (tmp_path / "good.npz").read_bytes()
    middle = len(content) // 2
    damaged.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    (half / "checkpoints" / "round-000006.npz").write_bytes(content[: len(content) // 3])
    done = call_script(tmp_path, "--resume", str(half))
    assert done.returncode == 0 and done.stderr.count("using the previous checkpoint") == 2
    assert outcome(half) == outcome(whole[0])


OWN = "--model logreg --num-clients 4 --local-epochs 1 --figures none"


@pytest.fixture
def own(tmp_path, digits, monkeypatch):
    """A folder with data of one's own and a split, and a run of two rounds on them by relative
    paths."""
    (here := tmp_path / "here").mkdir()
    monkeypatch.chdir(here)
    (images, labels) = digits.train
    (x, y) = digits.test
    np.savez("data.npz", x_train=images, y_train=labels, x_test=x, y_test=y)
    np.savez("other.npz", x_train=images[::-1], y_train=labels[::-1], x_test=x, y_test=y)
    parts = [part.tolist() for part in np.array_split(np.arange(len(labels)), 4)]
    Path("split.json").write_text(json.dumps({"indices": parts}))
    whole = fl.run(
        fl.parse(f"{OWN} --rounds 3 --data data.npz --partition-file split.json --name whole")
    )
    fl.run(fl.parse(f"{OWN} --rounds 2 --data data.npz --partition-file split.json --name run"))
    return here, weights_sha256(whole.state.global_model_weights.trainable)


@pytest.mark.thorough
def test_a_run_goes_on_wherever_its_data_and_split_have_moved(own, tmp_path, monkeypatch):
    here, expected = own
    (there := tmp_path / "there").mkdir()
    monkeypatch.chdir(there)
    with pytest.raises(UserError, match="splits other data .* give the same --dataset, --data"):
        fl.run(fl.parse(f"--resume {here}/runs/run --rounds 3 --data {here}/other.npz"))
    shutil.copytree(here / "runs" / "run", there / "again")
    # from another folder, and the run moved
    resumed = fl.run(fl.parse("--resume again --rounds 3"))
    assert weights_sha256(resumed.state.global_model_weights.trainable) == expected
    (here / "data.npz").rename(there / "moved.npz")
    (here / "split.json").unlink()
    with pytest.raises(
        UserError, match="data.npz' cannot be read .*; give the data's new path with --data"
    ):
        fl.main(fl.parse(f"--resume {here}/runs/run --rounds 3"))
    resumed = fl.run(fl.parse(f"--resume {here}/runs/run --rounds 3 --data moved.npz"))
    assert weights_sha256(resumed.state.global_model_weights.trainable) == expected


@pytest.mark.thorough
def test_data_of_the_environment_are_kept_with_the_run(own, tmp_path, monkeypatch):
    monkeypatch.setenv("FL_DATA", "data.npz")
    first = fl.run(fl.parse(f"{OWN} --rounds 1 --name of-environment"))
    monkeypatch.delenv("FL_DATA")
    monkeypatch.chdir(tmp_path)
    assert len(fl.run(fl.parse(f"--resume {own[0] / first.folder} --rounds 2")).records) == 2


@pytest.mark.parametrize(
    "flags",
    [
        "--alpha 0.4",
        "--seed 1",
        "--model 2nn",
        "--num-clients 5",
        "--client-lr 0.3",
        "--dataset mnist",
        "--rounds 3",
    ],
)
def test_another_configuration_is_refused(half, tmp_path, flags):
    before = {path: path.read_bytes() for path in half.rglob("*") if path.is_file()}
    done = call_script(tmp_path, "--resume", str(half), *flags.split())
    field = flags.split()[0].removeprefix("--").replace("-", "_")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and field in done.stderr, (
        done.stderr
    )
    assert {path: path.read_bytes() for path in half.rglob("*") if path.is_file()} == before


def test_another_configuration_is_refused_in_python_too(half):
    config = fl.parse(f"--resume {half}")
    for field, value, named in (
        ("seed", 1, "seed=1 "),
        ("client_lr", 0.3, "client_lr=0.3 "),
        ("rounds", 3, "--rounds 3 "),
    ):
        with pytest.raises(UserError, match=f"^{named}.* of {half}"):
            fl.run(config.replace(**{field: value}))


class Bomb:
    """Unpickling it makes a file."""

    def __reduce__(self):
        return (open, ("exploded", "w"))


def npz_bytes(**arrays):
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def test_hostile_and_foreign_files_are_refused_and_run_no_code(half, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    newest = half / "checkpoints" / "round-000004.npz"
    with np.load(newest) as npz:
        good = dict(npz)
    bombs = {
        "a pickle": pickle.dumps(Bomb()),
        "a pickled array": npz_bytes(**{**good, "leaf0": np.array([Bomb()], dtype=object)}),
        "other shapes": npz_bytes(**{**good, "leaf0": good["leaf0"][:10]}),
        "other types": npz_bytes(**{**good, "leaf0": good["leaf0"].astype(np.float64)}),
        "missing leaves": npz_bytes(key=good["key"]),
    }
    (number,) = (name for name, leaf in good.items() if leaf.dtype == np.int64 and leaf == 4)
    before = npz_bytes(**{**good, number: np.array(3)})
    bombs["another round's"] = before
    experiment = fl.build_prepared(fl.parse(f"--resume {half} --rounds 6"))
    for what, content in bombs.items():
        newest.write_bytes(content)
        (half / "checkpoints" / "round-000003.npz").write_bytes(before)  # taken instead
        with RunFolder.open(experiment) as folder:
            state, records = folder.load(experiment)
        assert "previous checkpoint" in capsys.readouterr().err, what
        assert state.client_work.round == 3 and len(records) == 3, what
        assert not (tmp_path / "exploded").exists(), what
        for path in (half / "checkpoints").iterdir():
            path.unlink()
    with RunFolder.open(experiment) as folder:
        assert folder.load(experiment) == (None, [])
    said = capsys.readouterr().err
    assert "no checkpoint of the 3 rounds done; starting again with round 1" in said
    newest.write_bytes(npz_bytes(**{**good, "key": np.array("another run's")}))
    done = call_script(tmp_path, "--resume", str(half))
    assert (
        done.returncode == 2
        and "to another configuration" in done.stderr
        and done.stderr.count("\n") == 1
    )


def test_a_finished_run_that_trains_further_is_unfinished(whole, tmp_path):
    """If it is killed then, it is no run that ended early, whose model --evaluate would take."""
    run = tmp_path / "runs" / "run"
    shutil.copytree(whole[0], run)
    experiment = fl.build_prepared(fl.parse(f"--resume {run} --rounds 99"))
    with RunFolder.open(experiment) as folder:
        state, records = folder.load(experiment)
        assert (run / "metrics.json").exists()
        folder.save_round(replace(records[-1], round=len(records) + 1), state)
    assert not (run / "metrics.json").exists()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("config.json", "{", "not JSON"),
        ("config.json", "[]", "not contain a JSON object"),
        ("config.json", '{"rounds": 5}', "unknown or missing"),
        ("partition.json", '{"hash": "0000"}', "has changed"),
        ("rounds.jsonl", '{"round": 1}\n', "rounds.jsonl"),
        ("partition.json", None, "has changed (classes)"),
    ],
)
def test_a_damaged_run_folder_is_refused_in_one_line(half, tmp_path, name, content, said):
    if content is None:
        content = json.dumps(json.loads((half / name).read_text()) | {"classes": ["a"]})
    (half / name).write_text(content)
    done = call_script(tmp_path, "--resume", str(half))
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1, (
        done.stderr
    )


def test_a_run_that_is_going_on_is_not_resumed(half, tmp_path):
    before = (half / "config.json").read_bytes()
    with lock(half, print):
        done = call_script(tmp_path, "--resume", str(half), "--rounds", "9")
    assert (
        done.returncode == 2
        and "in use by another run" in done.stderr
        and done.stderr.count("\n") == 1
    )
    assert (half / "config.json").read_bytes() == before
    with lock(half, print):  # free again
        pass


def test_a_shard_damaged_between_rounds_ends_the_run_with_its_name(tmp_path):

    def damage_shard():
        (shard,) = (tmp_path / ".cache").glob("*/3.bin")
        shard.write_bytes(shard.read_bytes()[: 784 * 5])

    with after_first_round(tmp_path, damage_shard):
        done = call_script(tmp_path, *FLAGS, "--rounds", "100000", "--name", "run")
    lines = done.stderr.splitlines()
    assert done.returncode == 1 and len(lines) == 2, done.stderr
    assert (
        lines[0].endswith("--resume runs/run")
        and "/3.bin" in lines[1]
        and "damaged shard" in lines[1]
    )


ROWS = [{"algorithm": "scaffold"}, {"client_optimizer": "adam"}]
ROWS += [{"algorithm": name} for name in choices.ALGORITHMS if name != "scaffold"]
# the noise of dp has no seed
ROWS += [{"aggregator": name} for name in choices.AGGREGATORS if name not in ("mean", "dp")]
# of state; what others keep is like these
KINDS = {"scaffold", "fedadam", "zeroing"}


def row_name(row):
    return "-".join(row.values())


def marks(row):
    """`make quick` does scaffold, which keeps the most, `make test` a row of each kind, `make
    thorough` all."""
    name = row_name(row)
    return [
        mark
        for mark, few in ((pytest.mark.slow, {"scaffold"}), (pytest.mark.thorough, KINDS))
        if name not in few
    ]


@pytest.mark.parametrize(
    "flags", [pytest.param(row, marks=marks(row), id=row_name(row)) for row in ROWS]
)
def test_every_row_goes_on_from_its_checkpoint_with_equal_bits(federation, tmp_path, flags):
    fields = {"num_clients": 10, "clients_per_round": 9, "rounds": 3, **with_needs(flags)}
    experiment = federation(**fields)

    def sha(state):
        return weights_sha256(state.global_model_weights.trainable)

    whole = list(fl.run_rounds(experiment))
    state, record, _ = whole[0]
    program = describe_program(experiment.choice_hashes) | {"from_round": 1}
    (tmp_path / "program.json").write_text(to_json({"programs": [program]}))
    folder = RunFolder(tmp_path, experiment)
    assert folder.load(experiment) == (None, [])
    folder.save_round(record, state)
    loaded, records = folder.load(experiment)
    resumed = list(fl.run_rounds(experiment, loaded))
    assert len(records) == 1 and [record.round for _, record, _ in resumed] == [2, 3]
    assert sha(resumed[-1][0]) == sha(whole[-1][0]) != sha(state)


@pytest.mark.thorough
def test_refusals_on_a_loaded_machine_say_one_line_and_no_more(half, tmp_path):
    """8 refused runs that have imported TFF, four at a time: its finalizers print nothing when
    Python ends."""
    (half / "rounds.jsonl").write_text('{"round": 1}\n')
    for _ in range(2):
        together = []
        for number in range(4):
            copy = tmp_path / "copies" / str(number)
            shutil.copytree(half, copy, dirs_exist_ok=True)
            together.append(start(tmp_path, "--resume", str(copy)))
        for process in together:
            _, errors = process.communicate(timeout=SECONDS)
            assert (
                process.returncode == 2 and errors.count("\n") == 1 and "rounds.jsonl" in errors
            ), errors


def test_a_run_ends_at_its_target_and_goes_on_to_a_higher_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = "--dataset digits --model logreg --num-clients 4 --rounds 6 --name run --figures none"
    run = fl.run(fl.parse(f"{flags} --target-accuracy 0.85"))
    reached = [record.test_accuracy for record in run.records]
    assert 1 < len(reached) < 6 and max(reached[:-1]) < 0.85 <= reached[-1]
    metrics = read_metrics(run.folder)
    assert len(reached) - 1 < metrics["rounds_to_target"] <= len(reached)
    again = fl.run(fl.parse(f"--resume {run.folder}"))
    assert len(again.records) == len(reached)  # it is reached already
    further = fl.run(fl.parse(f"--resume {run.folder} --target-accuracy 1"))
    accuracies = [record.test_accuracy for record in further.records]
    assert len(accuracies) == 6 and accuracies[: len(reached)] == reached
    assert read_metrics(run.folder)["rounds_to_target"] is None


def test_a_run_that_is_older_than_a_flag_about_files_is_read(tmp_path):
    """Such a flag changes no numbers; one that does makes another run of it."""
    fields = configure(seed=3).to_dict()
    del fields["list"]
    (tmp_path / "config.json").write_text(to_json(fields))
    assert read_saved(str(tmp_path), fl.Config()).seed == 3
    del fields["alpha"]
    (tmp_path / "config.json").write_text(to_json(fields))
    with pytest.raises(UserError, match="the field 'alpha' is unknown or missing"):
        read_saved(str(tmp_path), fl.Config())


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EBADF, errno.ENOSYS])
def test_a_file_system_without_locks_is_told_and_used(tmp_path, monkeypatch, number):
    """As of some NFS and FUSE mounts: nobody is said to be in the folder."""

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    told = []
    with lock(tmp_path, told.append):
        pass
    assert len(told) == 1 and os.strerror(number) in told[0] and "in use" not in told[0]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS])
def test_a_file_system_that_cannot_flush_is_written_to(tmp_path, monkeypatch, number):
    def refuse(_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.os, "fsync", refuse)
    files.write_file(tmp_path / "a", "text", sync=True)
    files.append(tmp_path / "a", " and more", sync=True)
    assert (tmp_path / "a").read_text() == "text and more"


def test_a_folder_that_may_not_be_written_names_its_flag(tmp_path):
    def refuse(number, flag):
        with pytest.raises(UserError) as refused, files.io_errors_as_user_errors(tmp_path, flag):
            raise OSError(number, os.strerror(number))
        return str(refused.value)

    denied = refuse(errno.EACCES, "--cache")
    assert denied.endswith("Permission denied; choose a writable folder with --cache")
    assert "free some space, or choose another folder" in refuse(errno.ENOSPC, "")


def test_a_run_that_cannot_be_resumed_stays_as_it_was(half):
    lines = (half / "rounds.jsonl").read_text()
    (half / "rounds.jsonl").write_text(lines[40:])
    before = {path: path.read_bytes() for path in half.iterdir() if path.is_file()}
    with pytest.raises(UserError, match="does not contain rounds 1..4 .*; restore it"):
        fl.run(fl.parse(f"--resume {half} --rounds 9"))
    assert before == {path: path.read_bytes() for path in half.iterdir() if path.is_file()}


def test_a_folder_that_was_removed_is_not_said_to_go_on(half, tmp_path):
    config = fl.parse(f"--resume {half}")
    with RunFolder.open(fl.build_experiment(config)) as folder:
        assert folder.what_next().startswith("to continue: ")
        shutil.rmtree(half)
        assert "was removed" in folder.what_next() and "--resume" not in folder.what_next()
        half.mkdir()


def test_a_run_on_arrays_names_the_call_that_goes_on(tmp_path, monkeypatch, digits):
    """No command can make or resume it; its page says so too."""
    monkeypatch.chdir(tmp_path)
    config = configure(model="logreg", num_clients=2, rounds=1, local_epochs=1, figures="none")
    dataset = fl.build_dataset(*digits.train, *digits.test, name="mine")
    end = fl.run(config, dataset=dataset)
    page = html.unescape((end.folder / "report.html").read_text())
    assert f"fl.run(config.replace(resume='{end.folder}', rounds=2), dataset=dataset)" in page
    assert "--resume" not in page
    layers = fl.find_model("logreg")
    end = fl.run(
        config.replace(dataset="digits"), model=layers, partition=[range(99), range(99, 300)]
    )
    page = html.unescape((end.folder / "report.html").read_text())
    call = f"fl.run(config.replace(resume='{end.folder}', rounds=2), model="
    assert call in page and ", partition=partition)" in page.split(call)[1].splitlines()[0]


def test_a_disk_that_fills_up_leaves_no_half_made_folder(tmp_path, monkeypatch):
    def fail(path, *_, **__):
        raise UserError(f"cannot write {path}")

    monkeypatch.setattr(run_names, "write_file", fail)
    with pytest.raises(UserError, match="cannot write"):
        run_names.make_run_folder(tmp_path / "runs", "name", {"config.json": "{}"})
    assert list((tmp_path / "runs").iterdir()) == []


OLD = Path(__file__).parent / "data" / "run_of_225c0cd"


@pytest.mark.slow
def test_a_run_of_an_older_version_is_read(tmp_path, capsys, monkeypatch):
    """Listed, evaluated, overlaid and resumed, though its configuration lacks fields of today."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(OLD, tmp_path / "runs" / "old")
    metrics = read_metrics(OLD)
    assert set(fl.Config().to_dict()) > set(metrics["config"])
    fl.main(fl.parse("--list runs"))
    assert f"2/2     {metrics['test_accuracy']:.2%}" in capsys.readouterr().out
    fl.main(fl.parse("--evaluate runs/old --figures none --name ev"))
    evaluated = read_metrics(tmp_path / "runs" / "ev")
    assert evaluated["weights_sha256"] == metrics["weights_sha256"]
    assert evaluated["test_accuracy"] == metrics["test_accuracy"]
    flags = "--dataset digits --model logreg --num-clients 3 --local-epochs 1 --client-lr 0.05"
    new = fl.run(fl.parse(f"{flags} --rounds 3 --figures none --name new"))
    again = read_metrics(new.folder)
    assert again["rounds"][1]["test_accuracy"] == metrics["test_accuracy"]  # the same numbers
    with pytest.raises(UserError, match="a file given to it, has changed since that run"):
        fl.parse("--resume runs/old --rounds 3")
    # From Python nothing but --resume reads the run's own configuration.
    with pytest.raises(UserError, match=r"differs from .*; give fl.parse\(\['--resume', 'runs/new"):
        fl.run(fl.Config().replace(dataset="digits", resume="runs/new"))
    words = "--resume runs/old --rounds 3 --accept-changes --figures none"
    resumed = fl.run(fl.parse(words))
    weights = resumed.state.global_model_weights.trainable
    assert weights_sha256(weights) == again["weights_sha256"]
    fl.run(fl.parse(f"{flags} --rounds 3 --figures none --name other --seed 1"))
    fl.main(fl.parse("--compare runs/old,runs/other --figures none --name both"))
    assert (tmp_path / "runs" / "both" / "summary.csv").exists()


@pytest.mark.parametrize("field", ["initial_model", "partition_file", "metrics"])
def test_files_of_the_first_round_are_not_added_on_resuming(tmp_path, monkeypatch, field):
    """A caption would say that the run began from them; --accept-changes is about the program."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("{}")
    saved = configure(resume="runs/a")
    value = "file" if field != "metrics" else "own.py:f"
    resumed = saved.replace(accept_changes=True, **{field: value})
    monkeypatch.setattr(saved_config, "read_programs", lambda folder: [{"rows": {}}])
    with pytest.raises(UserError, match=f"^{field}='{value}' differs from '' .*; drop the flag"):
        saved_config.check_resumed(resumed, saved)
    with pytest.raises(UserError, match=f"^{field}='' differs from '{value}' .*; give "):
        saved_config.check_resumed(saved, resumed)
