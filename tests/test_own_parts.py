"""What a user brings: arrays, a model in a file, a function for each round, fields in a file."""

import json
import os
import random
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import federated_learning as fl
from harness import SCRIPT
from harness.cli import command_line
from harness.cli.fields import UserError
from harness.storage.provenance import ROOT, hash_rows
from variants import choices, models

import numpy as np
import pytest
import tensorflow as tf
from reference import replace_choice
from runs import SECONDS, call_script, check_saved, configure, read_metrics, run_script

OWN = """
import tensorflow as tf
L = tf.keras.layers
UNITS = 8
def build():
    return [L.Flatten(), L.Dense(UNITS, "relu"), L.Dropout(0.5)]
def sequential():
    return tf.keras.Sequential([L.Flatten(), L.Dense(UNITS, "relu"), L.Dropout(0.5)])
def with_state():
    return [L.Flatten(), L.BatchNormalization()]
def nothing():
    pass
def fails():
    return 1 / 0
"""


@pytest.fixture
def net(tmp_path):
    path = tmp_path / "net.py"
    path.write_text(OWN)
    return path


@pytest.mark.slow
def test_a_model_of_ones_own_is_trained_as_a_row_is(net, tmp_path, monkeypatch, digits):
    """The same layers in the table MODELS give the same weights; so does a Sequential of them."""
    monkeypatch.chdir(tmp_path)
    flags = {"dataset": "digits", "num_clients": 2, "rounds": 1, "local_epochs": 1}
    module = {}
    exec(OWN, module)
    replace_choice(monkeypatch, choices.MODELS, "mlp", module["build"])
    ends = [
        fl.run(configure(**flags, model=model, name=name, figures="none"))
        for model, name in [
            ("mlp", "row"),
            ("net.py:build", "file"),
            (f"{net}:sequential", "sequential"),
        ]
    ]
    ours = [read_metrics(end.folder)["weights_sha256"] for end in ends]
    assert len(set(ours)) == 1
    assert json.loads((ends[1].folder / "config.json").read_text())["model"] == f"{net}:build"


def test_a_model_that_cannot_be_is_one_line(net, digits):
    for name, message in [
        ("with_state", "keeps state (moving_mean, moving_variance)"),
        ("nothing", "returns NoneType; return a Keras model, or a list of Keras layers"),
        ("fails", "raised ZeroDivisionError (division by zero)"),
        ("absent", "the file has no function absent"),
    ]:
        with pytest.raises(UserError) as refused:
            fl.build_experiment(configure(dataset="digits", model=f"{net}:{name}"), digits)
        assert message in str(refused.value) and "net.py" in str(refused.value)
    net.write_text("import nothing_of_this_name")
    for path, message in [(net, "its file raised"), (net.with_name("no.py"), "cannot be read")]:
        with pytest.raises(UserError, match=message):
            models.load_own(f"{path}:build")
    with pytest.raises(
        UserError, match="did you mean lenet. choose logreg, .*, lenet, FILE.py:FUNCTION"
    ):
        fl.parse("--model lennet")


def test_a_file_without_its_function_is_told_what_to_add():
    with pytest.raises(UserError, match="name its function too, such as net.py:build"):
        fl.parse("--model net.py")


def test_an_edited_file_is_another_model(net):
    """Also where the function itself stays: it uses what stands beside it."""

    def row():
        return hash_rows({"model": models.load_own(f"{net}:build")})

    before = row()
    assert before == row()
    net.write_text(OWN.replace("UNITS = 8", "UNITS = 9"))
    assert row() != before


def test_arrays_and_a_function_for_each_round(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (90, 6, 5, 3)).astype(np.uint8)
    labels = np.arange(90) % 3
    dataset = fl.build_dataset(images[:60], labels[:60], images[60:], labels[60:], "noise")
    seen = []
    config = configure(model="logreg", num_clients=2, rounds=2)
    end = fl.run(config, dataset=dataset, on_round=seen.append)
    assert seen == end.records and len(seen) == 2
    assert read_metrics(end.folder)["dataset"] == "noise"
    numbers = seen[0].numbers()
    assert numbers["test_accuracy"] == seen[0].test_accuracy and None not in numbers.values()


def test_a_file_has_the_fields_and_flags_win(tmp_path):
    """TOML, flat or in tables, and a run's config.json; what one run resumed is not taken over."""
    toml = tmp_path / "run.toml"
    toml.write_text('seed = 3\nrounds = 7\n[data]\ndataset = "digits"\n[training]\nclient_lr = 1\n')
    config = fl.parse(["--config", str(toml), "--rounds", "2"])
    assert (config.seed, config.training.rounds, config.training.client_lr) == (3, 2, 1)
    toml.write_bytes(b"\xef\xbb\xbfseed = 4\n")  # as Windows' editors begin a file
    assert fl.parse(f"--config {toml}").seed == 4
    toml.write_text("seed = 3\nrounds = 7\n")
    saved = tmp_path / "config.json"
    saved.write_text(json.dumps({**config.to_dict(), "resume": "runs/x", "alpha": 0.1}))
    again = fl.parse(f"--config {saved}")
    assert again.partitioning.alpha == 0.1 and again.run.resume == ""
    preset = fl.parse(f"--config {toml} --preset mcmahan-2nn-iid")
    assert preset.training.model == "2nn" and preset.training.rounds == 1500 and preset.seed == 3
    for text, message in [
        ("rouns = 2", "run.toml: unknown flag --rouns; did you mean --rounds or --runs?"),
        ("learning_rate = 1", "unknown flag --learning_rate; use --client-lr"),
        ("rounds = 0", "run.toml: rounds=0 is out of range"),
        ("rounds = ", "run.toml is not valid TOML"),
        (
            "[fedprox]\nprox_mu = 1",
            "[fedprox] is not a group of fields; choose data, partitioning,",
        ),
        ("[data]\nclient_lr = 1", "[data] has no field client_lr; move it"),
        ("rounds = 3\n[training]\nrounds = 4", "rounds is given twice"),
        ("x = " + "[" * 5000, "run.toml is not valid TOML"),
        ("seed = " + "9" * 6000, "run.toml is not valid TOML"),
    ]:
        toml.write_text(text)
        with pytest.raises(UserError) as refused:
            fl.parse(f"--config {toml}")
        assert message in str(refused.value)
    with pytest.raises(UserError, match="cannot read no.toml"):
        fl.parse("--config no.toml")
    with pytest.raises(UserError, match="cannot be combined with --resume"):
        fl.parse(f"--config {saved} --resume runs/x")


def test_help_beside_a_preset_says_what_it_sets(capsys):
    with pytest.raises(SystemExit):
        fl.parse("--preset mcmahan-2nn-iid --help")
    first = capsys.readouterr().out.splitlines()[:2]
    assert first[0].startswith("--preset mcmahan-2nn-iid: McMahan et al. 2017")
    assert first[1].startswith("sets --num-clients 100 --clients-per-round 10")


@pytest.mark.slow
def test_the_version_is_told_at_once(tmp_path):
    done = call_script(tmp_path, "--version")
    assert done.returncode == 0 and "tensorflow 2.14.1" in done.stdout
    assert re.match(rf"{SCRIPT} \d+\.\d+, commit ", done.stdout)


def run_code(code, folder, python=sys.executable, **environment):
    words = [python, "-c", code]
    env = os.environ | environment
    return subprocess.run(
        words, cwd=folder, capture_output=True, text=True, timeout=SECONDS, env=env
    )


@pytest.mark.slow
def test_a_module_called_variants_that_comes_first_is_named(tmp_path):
    (tmp_path / "variants.py").write_text("")
    done = run_code("import federated_learning", tmp_path, PYTHONPATH=str(ROOT))
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ImportError: `import variants` finds") and "rename it" in last


TRACKED = """
import federated_learning as fl
import mlflow

mlflow.set_tracking_uri("file:mlruns")
config = fl.parse("--dataset digits --model mlp --rounds 2")
with mlflow.start_run() as run:
    mlflow.log_params(config.to_dict())
    fl.run(config, on_round=lambda record: mlflow.log_metrics(record.numbers(), record.round))
history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "test_accuracy")
print([(point.step, point.value) for point in history])
"""


@pytest.mark.thorough
@pytest.mark.timeout(600)
def test_mlflow_gets_every_round_and_the_checkout_is_installed_by_pip(tmp_path):
    """By MLflow's own package, in an environment of its own, from a folder that is not ours."""
    environment = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    pip = [environment / "bin" / "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "mlflow-skinny==3.17.2"], check=True)
    subprocess.run([*pip, "--no-deps", "-e", ROOT], check=True)
    packages = os.path.dirname(os.path.dirname(np.__file__))  # TensorFlow's pins come first
    done = run_code(
        TRACKED,
        tmp_path,
        environment / "bin" / "python",
        PYTHONPATH=packages,
        MLFLOW_ALLOW_FILE_STORE="true",
    )
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    rounds = read_metrics(folder)["rounds"]
    expected = [(record["round"], record["test_accuracy"]) for record in rounds]
    assert done.stdout.splitlines()[-1] == str(expected)


MODEL_FILES = {
    "import sys\nsys.exit(0)": "calls sys.exit(0)",
    "import argparse\np = argparse.ArgumentParser()\np.add_argument('x')\np.parse_args()": (
        "calls sys.exit(2)"
    ),
    "raise KeyboardInterrupt": "raises KeyboardInterrupt",
    "raise GeneratorExit": "raised GeneratorExit",
    "def build():\n    import sys\n    sys.exit(3)": "calls sys.exit(3)",
    "def build():\n    raise KeyboardInterrupt": "raises KeyboardInterrupt",
}


@pytest.mark.slow
@pytest.mark.parametrize("text", MODEL_FILES)
def test_a_model_file_does_not_end_the_script_in_silence(tmp_path, text):
    (tmp_path / "net.py").write_text(text + "\n")
    flags = ("--dataset", "digits", "--rounds", "1", "--model", "net.py:build")
    done = run_script(tmp_path, *flags)
    assert done.returncode == 2, done.stderr
    assert MODEL_FILES[text] in done.stderr and done.stderr.count("\n") == 1, done.stderr


EXTRA = """
from __future__ import annotations
import argparse
import sys
from dataclasses import dataclass, field
import helper
import tensorflow as tf

@dataclass
class Sizes:
    units: int = helper.UNITS
    more: list[int] = field(default_factory=list)

PARSER = argparse.ArgumentParser()
PARSER.add_argument("--verbose", action="store_true")
PARSER.parse_args()
SEEN = sys.argv

def build():
    return [tf.keras.layers.Flatten(), tf.keras.layers.Dense(Sizes().units, "relu")]
"""


def test_a_model_file_is_loaded_as_an_import_would(tmp_path, digits, monkeypatch):
    """With dataclasses whose annotations are texts, a module beside it, and argparse at its top."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "net.py").write_text(EXTRA)
    (tmp_path / "helper.py").write_text("UNITS = 7\n")
    config = configure(dataset="digits", model=f"{tmp_path / 'net.py'}:build")
    shapes = [weight.shape for weight in fl.build_experiment(config, digits).initial_weights]
    assert shapes == [(784, 7), (7,), (7, 10), (10,)]


KINDS = """
import itertools
import tensorflow as tf
L = tf.keras.layers
COUNT = itertools.count(5)

class Scaled(L.Layer):
    def build(self, shape):
        self.g = self.add_weight("g", (shape[-1],), initializer="ones")
    def call(self, x):
        return x * self.g

class Drawn(L.Layer):
    def build(self, shape):
        self.h = self.add_weight("h", (2,), initializer=lambda s, dtype=None: tf.random.normal(s))
    def call(self, x):
        return x

class Adds(L.Layer):
    def call(self, x):
        self.add_loss(tf.reduce_mean(x))
        return x

def logits(): return [L.Flatten(), L.Dense(16, "tanh"), L.Dense(10)]
def hidden(): return [L.Flatten(), L.Dense(16, "tanh")]
def relu(): return [L.Flatten(), L.Dense(10, "relu")]
def dropout(): return [L.Flatten(), L.Dense(10), L.Dropout(0.5)]
def convolutional(): return [L.Conv2D(10, 3), L.GlobalAveragePooling2D()]
def softmax(): return [L.Flatten(), L.Dense(10, "softmax")]
def softmax_layer(): return [L.Flatten(), L.Dense(10), L.Softmax()]
def sigmoid(): return [L.Flatten(), L.Dense(10, "sigmoid")]
def not_flat(): return [L.Conv2D(4, 3)]
def half(): return [L.Flatten(), L.Dense(8, dtype="mixed_float16")]
def input_first(): return [L.InputLayer((28, 28, 1)), L.Flatten()]
def frozen(): return [L.Flatten(), L.Dense(8, trainable=False)]
def none(): return []
def other_each_time(): return [L.Flatten(), L.Dense(next(COUNT))]
def lstm(): return [L.Reshape((28, 28)), L.LSTM(8, recurrent_dropout=0.2, dropout=0.1)]
def scaled(): return [L.Flatten(), Scaled()]
def drawn(): return [L.Flatten(), Drawn()]
def adds(): return [L.Flatten(), Adds(), L.Dense(4)]
"""
LAST = [(16, 10), (10,)]


@pytest.mark.parametrize(
    ("name", "last"),
    [
        ("logits", LAST),
        ("hidden", LAST),
        ("relu", [(10, 10), (10,)]),
        ("dropout", [(10, 10), (10,)]),
        ("convolutional", [(3, 3, 1, 10), (10,)]),
        ("softmax", "ends in a softmax, but local training expects logits"),
        ("softmax_layer", "ends in a softmax"),
        ("sigmoid", "ends in a sigmoid"),
        ("not_flat", "ends in 26x26x4 values per image, but one row per image is needed; add"),
        ("half", "computes in float16; leave its dtype at the default"),
        ("input_first", "returns an InputLayer in its list; leave it out"),
        ("frozen", "is frozen .trainable=False., but all layers are trained; leave it trainable"),
        ("none", "returns no layer; return a Keras model"),
        ("other_each_time", "its function returns different layers on each call"),
        ("lstm", [(8, 10), (10,)]),
        ("scaled", [(784, 10), (10,)]),
        ("drawn", "has no Keras initializer that can be seeded"),
        ("adds", [(4, 10), (10,)]),
    ],
)
def test_what_a_function_returns_is_taken_or_refused_for_its_reason(tmp_path, digits, name, last):
    """A function that ends in a value for each label has its logits; no second layer is put on
    top."""
    (tmp_path / "net.py").write_text(KINDS)
    config = configure(dataset="digits", model=f"{tmp_path / 'net.py'}:{name}", num_clients=2)
    config = config.replace(cache=str(tmp_path))
    if isinstance(last, str):
        with pytest.raises(UserError) as refused:
            fl.build_experiment(config, digits)
        assert re.search(last, str(refused.value))
        return
    experiment = fl.build_experiment(config, digits)
    assert [weight.shape for weight in experiment.initial_weights][-2:] == last
    fl.build_process(experiment)  # it can be trained


@pytest.mark.slow
def test_two_runs_in_two_threads_are_one_after_the_other(tmp_path, monkeypatch):
    """And leave Python's random numbers, descriptors and threads as they were."""
    monkeypatch.chdir(tmp_path)
    flags = {
        "dataset": "digits",
        "model": "logreg",
        "num_clients": 2,
        "rounds": 1,
        "local_epochs": 1,
    }
    config = configure(**flags, figures="none")

    def digest(end):
        return read_metrics(end.folder)["weights_sha256"]

    alone = digest(fl.run(config.replace(name="alone")))
    before = random.getstate()
    descriptors = len(os.listdir("/proc/self/fd"))
    threads = threading.active_count()
    with ThreadPoolExecutor(2) as pool:
        ends = list(pool.map(fl.run, [config.replace(name=name) for name in ("one", "two")]))
    assert {digest(end) for end in ends} == {alone}
    assert random.getstate() == before
    assert len(os.listdir("/proc/self/fd")) <= descriptors and threading.active_count() <= threads


def test_errors_are_one_line_in_a_notebook():
    """IPython asks an error how it is shown."""
    for error in (UserError("alpha=0"), command_line.RunFailed("round 3"), command_line.Stopped()):
        (line,) = error._render_traceback_()
        assert line.startswith(type(error).__name__) and str(error) in line


def test_a_data_set_from_python_is_used_as_it_is(tmp_path, monkeypatch, digits):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="holdout=10 has no effect on dataset="):
        fl.run(configure(model="logreg", holdout=10), dataset=digits)
    with pytest.raises(UserError, match="holdout=10 has no effect on dataset="):
        fl.build_experiment(configure(model="logreg", holdout=10), digits)
    with pytest.raises(UserError, match=r"data='.*other.npz' has no effect on dataset="):
        fl.run(configure(model="logreg", data="other.npz"), dataset=digits)
    with pytest.raises(UserError, match="5 is not a command line"):
        fl.parse(5)
    with pytest.raises(UserError, match="dataset=5 is not a data set"):
        fl.compare(configure(compare="fedavg,fedprox", tune="client_lr=0.1,0.2"), dataset=5)
    monkeypatch.setenv("FL_DATA", "other.npz")  # of a saved run its own data are read
    assert configure(resume="runs/a").with_absolute_paths().data.data == ""


@pytest.mark.parametrize("how", ["returns False", "raises StopRun"])
def test_a_function_of_each_round_ends_the_run_with_all_its_files(tmp_path, monkeypatch, how):
    """After the second of five rounds; the run is then continued."""
    monkeypatch.chdir(tmp_path)
    config = configure(
        dataset="digits", model="logreg", num_clients=2, local_epochs=1, figures="none", name="run"
    )

    def stop(record):
        if record.round == 2 and how == "raises StopRun":
            raise fl.StopRun
        return record.round < 2

    end = fl.run(config, on_round=stop)
    assert [record.round for record in end.records] == [1, 2]
    metrics = read_metrics(end.folder)
    assert len(metrics["rounds"]) == 2 and (end.folder / "global_model.keras").exists()
    resumed = fl.run(fl.parse("--resume runs/run"))
    assert [record.round for record in resumed.records] == [1, 2, 3, 4, 5]


def test_a_split_from_python_is_trained_on_and_resumed(tmp_path, monkeypatch, digits):
    """Lists, arrays, or a dict of them; anything else is refused in one line."""
    monkeypatch.chdir(tmp_path)
    config = configure(dataset="digits", model="logreg", local_epochs=1, rounds=1, figures="none")
    for name, split in {
        "lists": [[0, 5, 2], list(range(10, 40))],
        "arrays": [np.array([0, 2, 5]), np.arange(10, 40)],
        "dict": {"a": [5, 2, 0], "b": range(10, 40)},
    }.items():
        end = fl.run(config.replace(name=name), partition=split)
        saved = json.loads((end.folder / "partition.json").read_text())
        assert saved["indices"] == [[0, 2, 5], list(range(10, 40))]
        assert saved["partition"] == "file"
    resumed = fl.run(fl.parse("--resume runs/lists --rounds 2"))
    assert len(resumed.records) == 2
    for wrong, message in [
        ([[0, 1], [1, 2]], "gives an image to two clients, or twice to one"),
        ([[0, 10**6]], "outside the 1437 images; .* the indices given with partition="),
        ([[0], [0.5]], r"client 1 has \[0.5\], not a list of integers"),
        ([[0], []], "client 1 has .*, at least one"),
        ([[0, -1]], "client 0 has .*not a list of integers"),
        ([0, 1], "client 0 has 0, not a list of integers"),
        ([[[0], [1, 2]]], "not a list of integers"),
        ([object()], "not a list of integers"),
        ([], "partition has no client"),
        ("iid", "partition='iid' is not a list of index arrays"),
        (([client] for client in range(2)), "is not a list of index arrays"),
        ({"a": [0], 1: [1]}, "keys that cannot be sorted"),
        (np.array(5), "is not a list of index arrays"),
    ]:
        with pytest.raises(UserError, match=message):
            fl.run(config, partition=wrong)


def test_what_is_no_argument_of_a_function_is_one_line(digits):
    """A configuration in place of an experiment, one callback in place of a list, ..."""
    config = configure(dataset="digits", model="logreg")
    experiment = fl.build_experiment(config, digits)
    arrays = (digits.train.images, digits.train.labels, digits.test.images, digits.test.labels)
    for call, message in [
        (lambda: fl.prepare(config), "is not an experiment; give fl.build_experiment"),
        (lambda: next(fl.run_rounds(config)), "is not an experiment; give fl.build_experiment"),
        (lambda: next(fl.run_rounds(experiment, None, None)), "callbacks=None is not a list"),
        (lambda: next(fl.run_rounds(experiment, None, [print])), "classes derived from fl.Call"),
        (lambda: fl.build_experiment(config, digits, [[0], [0]]), "gives an image to two clients"),
        (lambda: fl.build_experiment(config, digits, 3), "partition=3 is not a list of index arr"),
        (lambda: fl.build_experiment(config, arrays), "is not a data set"),
        (lambda: fl.build_experiment("--rounds 3"), "is not a configuration; give fl.parse"),
        (lambda: fl.run(None), "config=None is not a configuration; give fl.parse"),
        (lambda: fl.run(config, on_round=3), "on_round=3 is not a function"),
        (lambda: fl.build_dataset(*arrays, name=3), "name=3 is not a text"),
        (lambda: fl.build_dataset(*arrays, name=" "), "name=' ' is empty"),
        (lambda: fl.build_dataset(*arrays[:2], None, None), "x_test=None is not an array"),
        (lambda: fl.build_dataset([[1, 2], [3]], *arrays[1:]), "x_train is not an array"),
        (lambda: fl.parse("--name 'x"), "cannot be divided into flags"),
        (lambda: fl.load(""), "no run is named; give the folder of a run"),
        (lambda: fl.load(None), "no run is named; give the folder of a run"),
        (lambda: fl.evaluate_saved(config), "no run is named; give the folder of a run"),
    ]:
        with pytest.raises(UserError, match=message):
            call()


@pytest.mark.slow
def test_scripts_get_one_line_of_json_and_a_time_limit(tmp_path):
    """A run, an evaluation and a comparison; a limit ends a run that --resume then continues."""
    flags = ("--dataset", "digits", "--model", "logreg", "--num-clients", "2", "--figures", "none")
    quiet = ("--quiet", "--json")
    one = (*flags, "--rounds", "1", "--name", "run", "--time-limit", "0.001")
    done = call_script(tmp_path, *one, *quiet)
    assert "no further round fits" not in done.stderr  # there is none
    said = json.loads(done.stdout)
    metrics = read_metrics(tmp_path / "runs" / "run")
    assert said == {
        "folder": "runs/run",
        "test_accuracy": metrics["test_accuracy"],
        "weights_sha256": metrics["weights_sha256"],
        "rounds": 1,
        "epsilon": None,
    }
    done = call_script(tmp_path, "--evaluate", "runs/run", "--figures", "none", *quiet)
    assert json.loads(done.stdout)["weights_sha256"] == metrics["weights_sha256"]
    done = call_script(tmp_path, *flags, "--rounds", "1", "--compare", "fedavg,fedprox", *quiet)
    assert json.loads(done.stdout)["finished"] and "folder" in json.loads(done.stdout)
    limited = (*flags, "--rounds", "100000", "--name", "limited", "--time-limit", "1s")
    done = call_script(tmp_path, *limited)
    assert done.returncode == 0 and "time limit of 1 s: no further round fits" in done.stderr
    rounds = len((tmp_path / "runs" / "limited" / "rounds.jsonl").read_text().splitlines())
    more = str(rounds + 1)
    done = call_script(
        tmp_path,
        "--resume",
        "runs/limited",
        "--rounds",
        "100000",
        *quiet[:1],
        "--time-limit",
        "0.001",
    )
    assert done.returncode == 0 and f"after round {more}; to continue:" in done.stderr
    done = call_script(tmp_path, *flags, "--time-limit", "soon")
    assert done.returncode == 2 and "time_limit='soon' is not a time" in done.stderr


NOTEBOOK = """
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance(colors="NoColor")
for cell in (
    "import federated_learning as fl",
    "flags = '--dataset digits --model mlp --rounds 2 --client-lr 90 --figures none --quiet'",
    "config = fl.parse(flags).replace(partition='shards')",
    "fl.run(config)",
    "fl.run(config, dataset=3)",
    "def stop(record):\\n    raise KeyboardInterrupt\\nfl.run(config, on_round=stop)",
    "partition = [range(700), range(700, 1400)]",
    "fl.run(config.replace(name='split'), partition=partition, on_round=stop)",
    "config = config.replace(quiet=False)",
    "fl.run(config.replace(resume='runs/split'), partition=partition)",
):
    shell.run_cell(cell)
"""


def test_a_notebook_reads_fields_calls_and_single_lines(tmp_path):
    done = run_code(NOTEBOOK, tmp_path, PYTHONPATH=str(ROOT))
    text = done.stdout + done.stderr
    assert "smaller client_lr" in text and "--client-lr" not in text.replace("'--", "")
    assert "<Result of 2 rounds: test accuracy" in text
    assert "UserError: dataset=3 is not a data set; give fl.build_dataset(...)" in text
    assert "to continue: fl.run(config.replace(resume='runs/" in text
    assert "Stopped: after round 1" in text and "Traceback" not in text
    # Without the split the run would be refused.
    assert "fl.run(config.replace(resume='runs/split'), partition=partition)" in text
    assert "wrote runs/split/" in text


ENDS = """
import tensorflow as tf
L = tf.keras.layers

def chain():
    x = L.Input((28, 28, 1))
    return tf.keras.Model(x, L.Dense(16, activation="relu")(L.Flatten()(x)))

def layers():
    return [L.Flatten(), L.Dense(16, activation="relu")]

def built():
    return tf.keras.Sequential([L.Input((28, 28, 1)), L.Flatten(), L.Dense(16, activation="relu")])

def branches():
    "Made in another order than Keras lists the weights; with max-pooling and dropout."
    x = L.Input((28, 28, 1))
    y = L.Conv2D(4, 3, padding="same", activation="relu")(x)
    late = L.Conv2D(2, 1, padding="same")(x)
    z = L.Conv2D(4, 3, padding="same")(y)
    y = L.Concatenate()([L.Add()([y, z]), late])
    return tf.keras.Model(x, L.Flatten()(L.ReLU()(L.MaxPool2D(4)(L.Dropout(0.3)(y)))))

def nested():
    x = L.Input((13, 13, 4))
    skip = tf.keras.Model(x, L.Add()([x, L.Conv2D(4, 3, padding="same")(x)]))
    return [tf.keras.Sequential([L.Conv2D(4, 3), L.MaxPool2D()]), skip, L.Flatten()]

class Net(tf.keras.Model):
    def __init__(self):
        super().__init__()
        self.flat = L.Flatten()
        self.hidden = L.Dense(16, activation="relu")
    def call(self, x):
        return self.hidden(self.flat(x))

class Steep(L.Layer):
    "Four times its input where that has a sum of more than 30: AutoGraph converts both."
    def call(self, x):
        if tf.reduce_sum(x) > 30:
            for _ in tf.range(2):
                x = 2 * x
        return x

def conditional():
    x = L.Input((28, 28, 1))
    y = Steep()(L.Dense(8, activation="relu")(L.Flatten()(x)))
    return [tf.keras.Model(x, y), Steep(), L.Dense(10)]

class Eager(L.Layer):
    def call(self, x):
        return tf.constant(2 * x.numpy())

def eager():
    return [L.Flatten(), Eager()]

def recurrent():
    return [L.Reshape((7, 112)), L.LSTM(8, dropout=0.2, recurrent_dropout=0.2)]

def logits():
    x = L.Input((28, 28, 1))
    return tf.keras.Model(x, L.Dense(10)(L.Flatten()(x)))

def softmax():
    x = L.Input((28, 28, 1))
    return tf.keras.Model(x, L.Dense(10, activation="softmax")(L.Flatten()(x)))

def function():
    x = L.Input((28, 28, 1))
    return tf.keras.Model(x, tf.nn.softmax(L.Dense(10)(L.Flatten()(x))))

def two():
    x = L.Input((28, 28, 1))
    return tf.keras.Model(x, [x, x])

def small():
    x = L.Input((8, 8, 1))
    return tf.keras.Model(x, L.Flatten()(x))

once = chain()

def same():
    return once
"""
SMALL_RUN = {
    "dataset": "digits",
    "num_clients": 3,
    "rounds": 2,
    "local_epochs": 1,
    "client_lr": 0.1,
}


@pytest.fixture
def ends(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ends.py").write_text(ENDS)
    return tmp_path


def trained_weights(model, **fields):
    config = configure(**SMALL_RUN, figures="none", model=f"ends.py:{model}", **fields)
    result = fl.run(config)
    return result, [np.asarray(w) for w in result.state.global_model_weights.trainable]


@pytest.mark.parametrize("name", ["chain", "built", "Net"])
def test_a_model_is_trained_as_its_layers_are(ends, name):
    _, expected = trained_weights("layers")
    _, found = trained_weights(name)
    assert all(np.array_equal(one, other) for one, other in zip(expected, found, strict=True))


@pytest.mark.parametrize("name", ["branches", "recurrent", "conditional"])
def test_a_step_of_a_model_of_ones_own_is_keras_own(ends, digits, name):
    """One client, one step on the whole shard, without dropout: w - lr * Keras' gradient."""
    undropped = ENDS.replace("L.Dropout(0.3)(y)", "y")
    undropped = undropped.replace(", dropout=0.2, recurrent_dropout=0.2", "")
    (ends / "ends.py").write_text(undropped)
    config = configure(
        dataset="digits",
        num_clients=1,
        partition="iid",
        rounds=1,
        batch_size=0,
        local_epochs=1,
        client_lr=0.1,
        model=f"ends.py:{name}",
        figures="none",
    )
    experiment = fl.build_experiment(config)
    model = fl.build_model(experiment.network, seed=0)
    x = fl.to_input(digits.train.images)
    with tf.GradientTape() as tape:
        logits = model(x, training=True)
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(
            tf.constant(digits.train.labels, tf.int32), logits
        )
        loss = tf.reduce_mean(losses)
    gradients = tape.gradient(loss, model.weights)
    expected = [w - 0.1 * g for w, g in zip(model.get_weights(), gradients, strict=True)]
    found = fl.run(config).state.global_model_weights.trainable
    for one, other in zip(expected, found, strict=True):
        assert np.allclose(one, other, atol=2e-6)


@pytest.mark.parametrize("name", ["branches", "nested", "recurrent", "logits", "Net"])
def test_models_of_any_kind_are_trained_saved_and_resumed(ends, name):
    result, _ = trained_weights(name)
    config = configure(**{**SMALL_RUN, "rounds": 3}, figures="none", model=f"ends.py:{name}")
    resumed = fl.run(config.replace(resume=str(result.folder)))
    whole = fl.run(config)
    ends_of = [run.state.global_model_weights.trainable for run in (resumed, whole)]
    assert all(map(np.array_equal, *ends_of))
    saved = check_saved(whole)
    if name == "logits":  # no other Dense layer is put on top
        assert len(saved.weights) == 2


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("softmax", "ends in a softmax"),
        ("function", "ends in a softmax"),
        ("two", "has 1 inputs and 2 outputs; return a model with one of each"),
        ("small", "cannot process images of 28x28x1"),
        ("same", "layers that are already built; create new"),
        ("eager", "its layers raise AttributeError .* no attribute 'numpy'"),
    ],
)
def test_models_that_cannot_be_trained_are_one_line(ends, name, said):
    with pytest.raises(UserError, match=said):
        trained_weights(name)


def test_a_model_from_python(ends, digits):
    def build():
        x = tf.keras.Input((28, 28, 1))
        return tf.keras.Model(x, tf.keras.layers.Flatten()(x))

    config = configure(**SMALL_RUN, figures="none")
    result = fl.run(config, model=build)
    assert "build" in result.folder.name and "python" not in result.folder.name
    more = fl.run(config.replace(rounds=3, resume=str(result.folder)), model=build)
    assert len(more.records) == 3
    assert fl.load(result.folder).evaluate().accuracy == more.evaluation.accuracy

    def other():
        return [tf.keras.layers.Flatten(), tf.keras.layers.Dense(3)]

    other.__name__ = "build"
    with pytest.raises(UserError, match=r"has changed since that run \(model\)"):
        fl.run(config.replace(rounds=4, resume=str(result.folder)), model=other)
    with pytest.raises(UserError, match="model=3 is not a function"):
        fl.run(config, model=3)
    with pytest.raises(UserError, match="was given in another Python session"):
        fl.run(config.replace(model="python:gone"))
