"""The script as its users run it: by subprocess, on digits and on real MNIST."""

import ast
import concurrent.futures
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib

import federated_learning as fl
from harness.cli import flags
from harness.cli.fields import UserError
from variants import choices

import numpy as np
import pytest
from runs import (
    MLP_ON_DIGITS,
    NO_FIGURES,
    ROOT,
    SCRIPT,
    SECONDS,
    call_script,
    configure,
    gone,
    read_csv,
    read_metrics,
    run_code,
    run_script,
    start,
    worker_of,
)

ONEDNN = "TF_ENABLE_ONEDNN_OPTS"  # TensorFlow itself would take oneDNN with AVX-512 VNNI alone
QUICK = (*MLP_ON_DIGITS, "--rounds", "3", "--num-clients", "5", "--clients-per-round", "3")
NAME = "digits-dirichlet-fedavg-mlp-seed0-num_clients5-clients_per_round3"  # of its folder


@pytest.fixture(scope="module")
def twice(tmp_path_factory):
    """The same run twice in one folder, by a process of its own, whose worker ended with it, and
    in this one; and whether that worker had oneDNN."""
    folder = tmp_path_factory.mktemp("twice")
    plain = {name: value for name, value in os.environ.items() if name != ONEDNN}
    process = start(folder, *QUICK, env=plain)
    worker = worker_of(process)
    had_onednn = worker.environ()[ONEDNN]
    said, errors = process.communicate(timeout=SECONDS)
    assert gone(worker, 0.5)
    first = subprocess.CompletedProcess(QUICK, process.returncode, said, errors)
    return folder, [first, call_script(folder, *QUICK, *NO_FIGURES)], had_onednn


def test_a_run_says_and_writes_what_it_did(twice, digits):
    folder, (done, _), had_onednn = twice
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert had_onednn == "1"
    lines = done.stdout.splitlines()
    assert lines[0].startswith("scikit-learn digits (not MNIST)")
    rounds = [line for line in lines if line.startswith("round ")]
    # aligned
    assert len(rounds) == 3 and len({line.index("test accuracy") for line in rounds}) == 1
    run = folder / "runs" / NAME
    names = {path.name for path in run.iterdir()} - {"checkpoints", "rounds.jsonl", "worker.log"}
    plots = {
        "accuracy_by_megabytes.png",
        "client_accuracy.png",
        "client_partition.png",
        "confusion_matrix.png",
        "convergence_plot.png",
        "misclassified.png",
    }
    assert names == plots | {
        "clients.csv",
        "config.json",
        "metrics.csv",
        "metrics.json",
        "partition.json",
        "program.json",
        "global_model.keras",
        "best_model.keras",
        "report.html",
    }
    assert {path.name for path in folder.iterdir()} == {"runs", ".cache"}  # and nowhere else
    (wrote,) = [line for line in lines if line.startswith("wrote runs/")]
    for name in names - {"program.json"}:
        assert name in wrote

    metrics = read_metrics(run)
    assert metrics["dataset"] == "scikit-learn digits (not MNIST)" and not metrics["original_mnist"]
    assert [len(record["clients"]) for record in metrics["rounds"]] == [3, 3, 3]
    assert f"final test accuracy {metrics['test_accuracy']:.2%}" in done.stdout
    confusion = np.array(metrics["confusion"])
    assert confusion.sum() == 360 and np.trace(confusion) / 360 == pytest.approx(
        metrics["test_accuracy"]
    )
    # rows are the true labels
    assert confusion.sum(axis=1).tolist() == np.bincount(digits.test.labels).tolist()

    split = json.loads((run / "partition.json").read_text())
    partition = fl.make_partition(digits, configure(dataset="digits", num_clients=5))
    assert split["hash"] == partition.digest and split["label_counts"] == partition.counts.tolist()
    for record in metrics["rounds"]:
        for row in record["clients"]:
            assert row["examples"] == partition.sizes[row["client"]]


@pytest.mark.parametrize("kind", [np.uint8, np.float32])
def test_the_saved_model_scores_the_same_in_plain_keras(twice, digits, kind):
    """It takes what users have: raw pixels, 0..255."""
    import keras

    run = twice[0] / "runs" / NAME
    images = digits.test.images[..., None].astype(kind)
    logits = keras.models.load_model(run / "global_model.keras")(images)
    accuracy = np.mean(np.argmax(logits, axis=1) == digits.test.labels)
    assert accuracy == pytest.approx(read_metrics(run)["test_accuracy"])


def test_the_same_command_gives_the_same_numbers_in_a_folder_of_its_own(twice):
    import keras

    runs = [twice[0] / "runs" / f"{NAME}{suffix}" for suffix in ("", "-2")]
    tables = [read_csv(run / "metrics.csv") for run in runs]
    for row in [*tables[0], *tables[1]]:
        assert float(row.pop("seconds")) > 0
    assert len(tables[0]) == 3 and tables[0] == tables[1]
    first, second = (
        keras.models.load_model(run / "global_model.keras", compile=False).get_weights()
        for run in runs
    )
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.thorough
def test_tensorboard_events_hold_what_the_csv_holds(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = (*MLP_ON_DIGITS, "--rounds", "2", "--tensorboard", "--name", "events")
    assert call_script(tmp_path, *flags).returncode == 0
    run = tmp_path / "runs" / "events"
    events = EventAccumulator(str(run), size_guidance={"tensors": 0}).Reload()
    for row in read_csv(run / "metrics.csv"):
        # with dp, several hosts, or a norm that adapts
        assert row["epsilon"] == row["measured_bytes_up"] == row["clip_norm"] == ""
        for name in (name for name in row if row[name]):
            (value,) = [
                float(tensor_proto_value(event))
                for event in events.Tensors(name)
                if event.step == int(row["round"])
            ]
            assert value == pytest.approx(float(row[name]), rel=1e-6)
    pictures = events.Tensors("confusion matrix")
    assert [event.step for event in pictures] == [1, 2]
    assert all(event.tensor_proto.string_val[2].startswith(b"\x89PNG") for event in pictures)


def tensor_proto_value(event):
    import tensorflow as tf

    return tf.make_ndarray(event.tensor_proto)


@pytest.mark.slow
def test_real_mnist(tmp_path):
    flags = ("--model", "mlp", "--rounds", "2", "--local-epochs", "1", *NO_FIGURES)
    done = call_script(tmp_path, *flags)
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "runs").iterdir()
    metrics = read_metrics(run)
    assert (
        metrics["original_mnist"]
        and metrics["dataset"] == "MNIST"
        and np.sum(metrics["confusion"]) == 10_000
    )
    assert metrics["test_accuracy"] > 0.9
    assert sum(row["examples"] for row in metrics["rounds"][0]["clients"]) == 60_000


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variable", "flag"), [(False, True), pytest.param(True, False, marks=pytest.mark.thorough)]
)
def test_another_npz_is_taken_and_called_what_it_is(tmp_path, digits, monkeypatch, variable, flag):
    few = {}
    for part, split in (("train", digits.train), ("test", digits.test)):
        few["x_" + part] = split.images[split.labels < 4]
        few["y_" + part] = split.labels[split.labels < 4]
    np.savez(tmp_path / "few.npz", **few)
    flags = ("--data", "few.npz") if flag else ()
    if variable:
        monkeypatch.setenv("FL_DATA", "few.npz")
    done = call_script(tmp_path, *flags, *NO_FIGURES, "--model", "mlp", "--rounds", "1")
    assert done.returncode == 0 and done.stdout.startswith("few \u00b7"), done.stderr
    (run,) = (tmp_path / "runs").iterdir()
    assert np.array(read_metrics(run)["confusion"]).shape == (4, 4)


BAD_FLAGS = {
    "--rounds 0": "rounds=0",
    "--rounds 1.5": "1.5",
    "--rounds many": "rounds='many' is not an integer; it must be an integer from 1 to 100,000",
    "--rounds \u00b2": "rounds='\u00b2' is not an integer",
    "--rounds": "--rounds needs a value; give a number from 1 to 100,000",
    "--rounds --seed 1": "--rounds needs a value",
    "--model": "--model needs a value; choose logreg, mlp, 2nn, cnn, lean-cnn, small-cnn, lenet",
    "--seed -1": "seed=-1 is out of range; it must be an integer from 0 to 2,147,483,647",
    "--tensorboard yes": "unexpected argument 'yes'",
    "--tensorboard=yes": "--tensorboard takes no value; write --tensorboard or --no-tensorboard",
    "--no-rounds 1": "unknown flag --no-rounds; did you mean --rounds",
    "fedavg": "unexpected argument 'fedavg'",
    "-x": "unknown flag -x; see --help",
    "--alpha nan": "alpha=nan",
    "--alpha -1": "alpha=-1",
    "--partition sorted": "sorted",
    "--model resnet": "model='resnet' is not a valid value; this network is not built in; ",
    "--no-such-flag 1": "unknown flag --no-such-flag; see --help",
    "--algoritm fedavg": "unknown flag --algoritm; did you mean --algorithm?\n",
    "--lr 0.1": "unknown flag --lr; use --client-lr\n",
    "-lr 0.1": "unknown flag -lr; use --client-lr\n",
    "--frac 0.1": "unknown flag --frac; use --clients-per-round (a number, not a share)\n",
    "--num-users 3": "unknown flag --num-users; use --num-clients\n",
    "--E 3": "unknown flag --E; use --local-epochs\n",
    "--num-clients 0": "num_clients=0 means all owners of partition='natural'; choose 1 to ",
    "--dataset digits --min-images 144": "min_images=144 for each of 10 clients exceeds the",
    "--num-clients 5 --clients-per-round 6": "clients_per_round=6 exceeds num_clients=5",
    "--num-clients 1 --unseen-clients 0.5": "unseen_clients=0.5 of num_clients=1 leaves no client",
    "--unseen-clients 0.5 --byzantine 6": "num_clients=10, 5 of them never drawn; choose 0 to 5",
    "--num-clients 5 --over-select 10 --latency 1": "(5); choose a smaller over_select",
    "--num-clients 2 --aggregator krum --tolerated 0": "it needs 3; choose more clients",
    "--unseen-clients 0.5 --aggregator krum": "tolerated=3 attackers among 5 clients per round",
    "--algorithm fedbuff --latency 1 --aggregator krum": "at most 1, or a larger buffer_size",
    "--algorithm fedsgd --batch-size 16": "batch_size=16 contradicts algorithm='fedsgd'",
    "--dataset digits --num-clients 2000": "num_clients=2000 exceeds the 1437 training images",
    "--dataset digits --data x.npz": "drop one",
    "--data nowhere.npz": "nowhere.npz",
    "--name a/b": "name='a/b'",
}


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_a_bad_flag_gets_one_line_and_exit_code_2(tmp_path, flags):
    done = call_script(tmp_path, *flags.split(" "))
    assert done.returncode == 2 and BAD_FLAGS[flags] in done.stderr
    assert "Traceback" not in done.stderr and done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_help_names_every_field(tmp_path):
    done = run_script(tmp_path, "--help-all")
    assert done.returncode == 0
    for field in fl.Config().to_dict():
        assert "--" + field.replace("_", "-") in done.stdout


def test_help_is_one_screen_and_leads_to_each_theme(tmp_path, capsys):
    """Twenty-odd lines of 80 columns; five examples that parse; each theme's own flags."""
    with pytest.raises(SystemExit) as end:
        fl.parse("--help")
    lines = capsys.readouterr().out.splitlines()
    assert not end.value.code and len(lines) <= 40 and max(map(len, lines)) <= 80
    examples = [line.split("  ")[1] for line in lines if line.startswith("  --")]
    assert len(examples) == 4
    for example in examples:
        if "--resume" not in example:
            assert isinstance(fl.parse(example), fl.Config)
    groups = [name for name, value in vars(fl.Config()).items() if hasattr(value, "to_dict")]
    for name in groups:
        assert any(line.startswith(f"  {name} ") for line in lines), name
        with pytest.raises(SystemExit) as end:
            fl.parse(f"--help {name}")
        said = capsys.readouterr().out
        assert not end.value.code
        for field in getattr(fl.Config(), name).to_dict():
            assert re.search(rf"--{field.replace('_', '-')}[ ,]", said), field
    with pytest.raises(SystemExit) as end:
        fl.parse("--help privacy alpha --rounds 3")
    said = capsys.readouterr().out
    assert not end.value.code and "--delta" in said and "--size-spread" in said
    assert "--local-epochs " not in said
    for words in ("--help=partitioning", "--help alpha", "--help --alpha", "-h alpha --rounds 3"):
        with pytest.raises(SystemExit):
            fl.parse(words)
        assert "--size-spread 0..10" in capsys.readouterr().out, words
    with pytest.raises(
        UserError, match="'sweeps': neither a theme nor one of its flags; choose data, partition"
    ):
        fl.parse("--help sweeps")


FAKES = {
    "sys.version_info = (3, 12, 1, 'final', 0)": "needs Python 3.11 on Linux",
    "sys.platform = 'darwin'": "on darwin",
    "find = u.find_spec; "
    "u.find_spec = lambda name: None if name == 'tensorflow_federated' else find(name)": (
        "tensorflow_federated is not installed"
    ),
    "sys.modules['tyro'] = None": "tyro is not installed; `uv run federated_learning.py`",
}


@pytest.mark.parametrize("fake", FAKES)
def test_another_system_gets_one_line(tmp_path, fake):
    code = (
        f"import sys, runpy, importlib.util as u; {fake}; sys.argv = ['x']\n"
        f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    )
    done = run_code(tmp_path, code)
    assert done.returncode == 2 and FAKES[fake] in done.stderr and done.stderr.count("\n") == 1, (
        done.stderr
    )


PINNED = dict(
    re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
)


def test_the_block_for_uv_pins_what_the_requirements_pin():
    """PEP 723: the packages that the script imports itself, and what has to be put in the place of
    TFF's own pins."""
    block = SCRIPT.read_text().partition("# /// script\n")[2].partition("# ///\n")[0]
    told = tomllib.loads(re.sub("^# ?", "", block, flags=re.MULTILINE))
    listed = dict(entry.split("==") for entry in told["dependencies"])
    overrides = dict(entry.split("==") for entry in told["tool"]["uv"]["override-dependencies"])
    pinned = {name.replace("_", "-"): version for name, version in PINNED.items()}
    for name, version in (listed | overrides).items():
        assert pinned[name.replace("_", "-")] == version, name
    imported = {"sklearn": "scikit-learn", "grpc": "grpcio", "dp_accounting": "dp-accounting"}
    files = [SCRIPT, *(ROOT / "harness").rglob("*.py"), *(ROOT / "variants").glob("*.py")]
    tops = {
        name.partition(".")[0]
        for path in files
        for name in re.findall(r"^import ([\w.]+)", path.read_text(), re.M)
    }
    others = tops - set(sys.stdlib_module_names) - {"harness", "variants", "federated_learning"}
    assert {imported.get(name, name) for name in others} == set(listed)
    assert told["requires-python"] == "==3.11.*"


@pytest.mark.skipif(not shutil.which("uv"), reason="uv is not installed")
def test_uv_resolves_the_block(tmp_path):
    done = subprocess.run(
        ["uv", "pip", "compile", str(SCRIPT)], cwd=tmp_path, capture_output=True, text=True
    )
    assert (
        done.returncode == 0
        and f"tensorflow-federated=={PINNED['tensorflow_federated']}" in done.stdout
    ), done.stderr


def test_an_older_python_gets_as_far_as_the_line_that_refuses_it():
    for path in (
        SCRIPT,
        ROOT / "harness" / "__init__.py",
        ROOT / "harness" / "engine" / "stopping.py",
    ):
        ast.parse(path.read_text(), feature_version=(3, 8))


IMPORTED = """
import os, sys, threading, random, harness, numpy, tensorflow_federated, psutil
before = numpy.random.get_state()[1].tobytes(), random.getstate(), threading.active_count()
import federated_learning as fl
after = numpy.random.get_state()[1].tobytes(), random.getstate(), threading.active_count()
assert before == after and not os.listdir()
assert not psutil.Process().children() and 'matplotlib.pyplot' not in sys.modules
"""
FORKED = """
build = lambda: fl.build_experiment(fl.parse('--dataset digits --model mlp'))
build()
if os.fork() == 0:
    try: build()
    except fl.UserError as error: print(error, flush=True)
    os._exit(0)
os.wait()
"""


def test_importing_does_nothing_and_a_process_forked_after_a_run_is_told_to_be_spawned(tmp_path):
    done = run_code(tmp_path, IMPORTED + FORKED)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert "was forked from one in which TensorFlow has run" in done.stdout


def test_help_answers_at_once_with_a_line_a_choice(tmp_path):
    done = run_script(tmp_path, "--help-all", COLUMNS="100", PYTHONPROFILEIMPORTTIME="1")
    assert done.returncode == 0 and "numpy" in done.stderr
    # 3 s and more
    assert not any(slow in done.stderr for slow in ("tensorflow", "sklearn", "matplotlib", "scipy"))
    lines = [line.strip("│ ") for line in done.stdout.splitlines()]
    for field, table in (("partition", choices.PARTITIONS), ("algorithm", choices.ALGORITHMS)):
        start = next(n for n, line in enumerate(lines) if line.startswith(f"--{field} {{"))
        end = next(n for n in range(start + 1, len(lines)) if lines[n].startswith("--"))
        for name in table:
            assert any(line.startswith(f"- {name}: ") for line in lines[start:end]), name
    # a paragraph: no line ends long before the margin
    start = next(n for n, line in enumerate(lines) if line.startswith("--data PATH"))
    text = list(itertools.takewhile(lambda line: not line.startswith("--"), lines[start + 1 :]))
    assert min(map(len, text[:-1])) > 75
    for group in (
        "data",
        "partitioning",
        "training",
        "optimization",
        "aggregation",
        "privacy",
        "adversity",
        "comparison",
        "run",
    ):
        assert f"─ {group} options ─" in done.stdout


def test_parse_speaks_the_terminals_language():
    config = fl.parse("--algorithm scaffold --alpha 0.1")
    assert (
        config == configure(algorithm="scaffold", alpha=0.1)
        and config.optimization.algorithm == "scaffold"
    )


def test_flags_are_read_in_two_threads_at_once():
    """Reading changes no global state, such as a stream that is another thread's too."""

    def read(seed):
        if seed % 2:
            with pytest.raises(UserError, match="unknown flag --sed; did you mean --seed"):
                fl.parse(f"--sed {seed}")
            return seed
        return fl.parse(f"--seed {seed} --model mlp").seed

    errors = sys.stderr
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert list(pool.map(read, range(24))) == list(range(24))
    assert sys.stderr is errors


def test_flags_of_other_programs_lead_to_ours():
    types = fl.Config.types()
    for name, (field, _) in flags.ELSEWHERE.items():
        assert name not in types and field in types, name


def test_without_docstrings_flags_and_help_are_the_same():
    """python -OO leaves none."""
    bare = [sys.executable, "-OO", str(SCRIPT)]
    done = subprocess.run([*bare, "--help-all"], capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0 and "Local passes over the client's shard" in done.stdout
    done = subprocess.run([*bare, "--sed", "3"], capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 2 and done.stderr.endswith(
        "unknown flag --sed; did you mean --seed or --seeds?\n"
    )
