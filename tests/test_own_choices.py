"""FILE.py:FUNCTION in place of a choice: algorithms, aggregators, splits and metrics of a user."""

import shutil
from pathlib import Path

import federated_learning as fl
from harness.cli.fields import UserError
from harness.engine.execution import convert
from harness.reporting.results import METRICS_KEYS
from harness.storage.files import reason_of

import numpy as np
import pytest
import tensorflow as tf
from runs import NO_FIGURES, ON_DIGITS, call_script, configure, read_csv, read_metrics

FLAGS = (*ON_DIGITS, "--rounds", "2", "--local-epochs", "1", *NO_FIGURES)
OLD = Path(__file__).parent / "data" / "run_of_225c0cd"
OWN = '''
import numpy as np
import tensorflow as tf
from sklearn.metrics import balanced_accuracy_score
from variants.aggregators import coordinate_median, see_all_updates
from variants.algorithms import fedprox

def blocks(labels, num_clients, rng):
    return np.array_split(np.arange(len(labels)), num_clients)

def prox(parts, experiment):
    """FedProx itself, called from outside."""
    return fedprox(parts, experiment)

def median(parts, experiment):
    return coordinate_median(parts, experiment)

def more(labels, predictions):
    hits = np.sum(labels == predictions)
    return {"balanced": balanced_accuracy_score(labels, predictions), "hits": hits}

def broken(*arguments):
    return arguments[0] / "a"

def nothing(*arguments, **named):
    return None

def by_client(labels, num_clients, rng):
    return {k: part for k, part in enumerate(np.array_split(np.arange(len(labels)), num_clients))}

def ragged(labels, num_clients, rng):
    return [[[1, 2], [3]]] * num_clients

def too_few(labels, num_clients, rng):
    return [np.arange(3)]

def twice(labels, num_clients, rng):
    return [np.arange(3)] * num_clients

def floats(labels, num_clients, rng):
    return [np.array([k + 0.5]) for k in range(num_clients)]

def outside(labels, num_clients, rng):
    return [np.array([len(labels) + k]) for k in range(num_clients)]

def called_loss(labels, predictions):
    return {"test_loss": 1}

def a_list(labels, predictions):
    return [1, 2]

def greedy(labels, predictions):
    labels[:] = 0
    predictions[:] = 0
    return 1.0

def one_by_one(labels, num_clients, rng):
    yield from np.array_split(np.arange(len(labels)), num_clients)

def no_aggregator(parts, experiment):
    return parts._replace(aggregator=None)

def sends_more(parts, experiment):
    return parts._replace(message_size=3)

def all_report(parts, experiment):
    return parts._replace(find_reporting=lambda clients, round_num: [*range(10)])

def no_optimizer(parts, experiment):
    return parts._replace(client_optimizer=3)

def empty(labels, num_clients, rng):
    return [np.arange(0)] * num_clients

def unseeded(labels, num_clients, rng):
    return np.array_split(np.random.permutation(len(labels)), num_clients)

def huge(labels, predictions):
    return 10**400

def complex_number(labels, predictions):
    return np.complex128(1)

def relu():
    return [tf.keras.layers.Flatten(), tf.keras.layers.Dense(8, "relu")]

from variants.wrapping import Corrected

def halved(parts, experiment):
    def rule(gradients, weights):
        norm = tf.linalg.global_norm(gradients)
        if norm > 5:
            return tuple(g / 2 for g in gradients)
        return gradients
    return parts._replace(client_optimizer=Corrected(parts.client_optimizer, rule))

def misspelt(parts, experiment):
    def rule(gradients, weights):
        return gradient
    return parts._replace(client_optimizer=Corrected(parts.client_optimizer, rule))

def scarce(labels, num_clients, rng):
    return [np.arange(k, 4, num_clients) for k in range(num_clients)]

def called_report(labels, predictions):
    return {"report": 1}

def capped(parts, experiment):
    def build(optimizer):
        client_update = parts.build_client_update(optimizer)
        def capped_update(broadcast, task):
            output = client_update(broadcast, task)
            if output.weight > 100:
                return output._replace(weight=100.0)
            return output
        return capped_update
    return parts._replace(build_client_update=build)
'''


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    (tmp_path / "own.py").write_text(OWN)
    return tmp_path


@pytest.mark.parametrize(
    ("own", "built_in"),
    [
        (("--algorithm", "own.py:prox"), ("--algorithm", "fedprox")),
        (("--aggregator", "own.py:median"), ("--aggregator", "median")),
        (
            ("--algorithm", "own.py:prox", "--aggregator", "own.py:median"),
            ("--algorithm", "fedprox", "--aggregator", "median"),
        ),
    ],
)
def test_the_same_function_from_a_file_makes_the_same_numbers(here, own, built_in):
    rate = ("--client-lr", "0.1")
    call_script(here, *FLAGS, *rate, *own, "--name", "own")
    call_script(here, *FLAGS, *rate, *built_in, "--prox-mu", "0.001", "--name", "ours")
    hashes = {read_metrics(here / "runs" / name)["weights_sha256"] for name in ("own", "ours")}
    assert len(hashes) == 1


def test_a_split_may_be_yielded_and_a_metric_may_change_what_it_gets(here):
    ends = []
    for more in ({}, {"partition": "own.py:one_by_one", "metrics": "own.py:greedy"}):
        config = fl.parse(FLAGS).replace(**{"partition": "own.py:blocks"} | more)
        ends.append(fl.run(config).evaluation)
    plain, greedy = ends
    assert plain.accuracy == greedy.accuracy and greedy.metrics == {"greedy": 1.0}
    assert np.array_equal(plain.labels, greedy.labels)


def test_a_model_is_evaluated_as_it_was_trained(here):
    """Another network of the same shapes has the run's weights, and other figures."""
    flags = ("--dataset", "digits", "--rounds", "1", "--local-epochs", "1", *NO_FIGURES)
    call_script(here, *flags, "--model", "own.py:relu", "--name", "a")
    evaluation = fl.load("runs/a").evaluate()
    (here / "own.py").write_text(OWN.replace('"relu"', '"sigmoid"'))
    call_script(here, *flags, "--model", "own.py:relu", "--name", "b")
    refused = call_script(here, "--evaluate", "runs/a", *NO_FIGURES)
    assert refused.returncode == 2 and "has changed since the run 'runs/a'" in refused.stderr
    with pytest.raises(UserError, match="has changed since the run"):
        fl.load("runs/a").evaluate()
    named = ("--evaluate", "runs/a", "--model", "own.py:relu", "--name", "now", *NO_FIGURES)
    assert call_script(here, *named).returncode == 0
    assert read_metrics(here / "runs" / "now")["test_accuracy"] != evaluation.accuracy


@pytest.mark.parametrize("asked", ["--seeds 2", "--baselines", "--compare fedavg,fedprox"])
def test_an_evaluation_trains_nothing(tmp_path, asked):
    done = call_script(tmp_path, "--evaluate", str(OLD), *asked.split())
    assert done.returncode == 2 and "which trains nothing; drop one of them" in done.stderr


def test_a_run_with_an_algorithm_of_a_file_has_baselines(here):
    flags = ("--num-clients", "2", "--algorithm", "own.py:prox", "--baselines", "--name", "own")
    done = call_script(here, *FLAGS, *flags)
    assert done.returncode == 0 and "centralized" in done.stdout, done.stderr


def test_a_split_of_a_file_is_the_clients(here, digits):
    partition = fl.make_partition(digits, configure(partition="own.py:blocks", num_clients=4))
    expected = np.array_split(np.arange(len(digits.train.labels)), 4)
    assert all(map(np.array_equal, partition.indices, expected))


def test_metrics_are_columns_everywhere(here):
    call_script(here, *FLAGS, "--metrics", "own.py:more", "--name", "a")
    run = fl.load("runs/a")
    evaluation = run.evaluate()
    recalls = np.diag(evaluation.confusion) / evaluation.confusion.sum(axis=1)
    last = read_metrics(here / "runs" / "a")["rounds"][-1]
    assert last["balanced"] == pytest.approx(recalls.mean())
    assert last["hits"] == np.trace(evaluation.confusion)
    rows = read_csv(here / "runs" / "a" / "metrics.csv")
    assert float(rows[-1]["hits"]) == last["hits"]
    assert list(run.history["hits"])[-1] == last["hits"]
    # A single number is called as its function; the run resumes with the same columns.
    call_script(here, *FLAGS, "--metrics", "own.py:balanced_accuracy_score", "--name", "b")
    done = call_script(here, "--resume", "runs/b", "--rounds", "3", *NO_FIGURES)
    assert done.returncode == 0, done.stderr
    rounds = read_metrics(here / "runs" / "b")["rounds"]
    assert [0 < row["balanced_accuracy_score"] <= 1 for row in rounds] == [True] * 3
    call_script(here, "--evaluate", "runs/b", "--metrics", "own.py:more")
    (folder,) = (here / "runs").glob("evaluate-*")
    assert read_metrics(folder)["hits"] > 0
    for written in (here / "runs" / "a", folder):  # no name of ours is free for a metric
        assert read_metrics(written).keys() - METRICS_KEYS == {"balanced", "hits"}


def test_a_private_run_has_metrics_of_the_test_set(here):
    flags = ("--aggregator", "dp", "--public-cohorts", "--metrics", "own.py:more")
    call_script(here, *FLAGS, *flags, "--name", "a")
    assert "balanced" in read_metrics(here / "runs" / "a")["rounds"][0]


def test_choices_of_files_are_compared_and_resumed_from_elsewhere(here):
    flags = (*FLAGS, "--compare", "algorithm=fedavg,own.py:prox", "--name", "c")
    done = call_script(here, *flags)
    assert done.returncode == 0, done.stderr
    names = {path.parent.name for path in here.glob("runs/c/*/metrics.json")}
    assert names == {"fedavg-seed0", "own.py-prox-seed0"}
    (here / "elsewhere").mkdir()
    run = here / "runs/c/own.py-prox-seed0"
    done = call_script(here / "elsewhere", "--resume", str(run), "--rounds", "3", *NO_FIGURES)
    assert done.returncode == 0, done.stderr
    # Another content is another program.
    (here / "own.py").write_text(OWN + "\nx = 1\n")
    done = call_script(here, "--resume", str(run), "--rounds", "4", "--algorithm", "own.py:prox")
    assert (
        done.returncode == 2
        and "a file given to it, has changed since that run (algorithm" in done.stderr
    )


@pytest.mark.parametrize("field", ["partition", "algorithm", "aggregator", "metrics"])
def test_a_file_that_a_folder_from_elsewhere_names_is_not_run(here, monkeypatch, field):
    names = {"partition": "blocks", "algorithm": "prox", "aggregator": "median", "metrics": "more"}
    own = f"own.py:{names[field]}"
    call_script(here, *FLAGS, f"--{field}", own, "--name", "a")
    shutil.rmtree(here / "state")
    (here / "own.py").write_text(f"open('mark', 'w')\n{OWN}")
    done = call_script(here, "--resume", "runs/a", "--rounds", "3")
    assert done.returncode == 2 and not (here / "mark").exists()
    assert "own.py' as its " + field in done.stderr or "has changed" in done.stderr


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--algorithm own.py:broken", r"raised TypeError \(.*\) in line 23; fix it"),
        ("--algorithm own.py:nothing", "returns NoneType; return the parts"),
        ("--aggregator own.py:nothing", "returns NoneType; return the parts"),
        ("--aggregator own.py:missing", "has no function missing"),
        (
            "--aggregator own.py:no_aggregator",
            "returns aggregator=None, which cannot take",
        ),
        (
            "--algorithm own.py:no_optimizer",
            "returns client_optimizer=3, which cannot",
        ),
        (
            "--algorithm own.py:sends_more --aggregator dp --public-cohorts",
            "changes message_size, on which the privacy of aggregator='dp' rests",
        ),
        (
            "--algorithm own.py:all_report --aggregator dp --public-cohorts",
            "changes find_reporting, on which the privacy of aggregator='dp' rests",
        ),
        ("--aggregator gone.py:f", "cannot be read"),
        ("--aggregator own.py", "name its function too"),
        ("--partition own.py:nothing", "returns NoneType; return an index array"),
        ("--partition own.py:by_client", "returns dict; return an index array"),
        ("--partition own.py:ragged", "returns list; return an index array"),
        ("--partition own.py:too_few", "returns 1 arrays for num_clients=10"),
        ("--partition own.py:twice", "gives an image to two clients"),
        ("--partition own.py:floats", "not 1-D integer indices"),
        ("--partition own.py:outside", "returns indices outside 0 to 1436"),
        ("--partition own.py:empty", "gives 0 images to 10 clients; return at least one for each"),
        ("--partition own.py:scarce", "gives 4 images to 10 clients; return at least one for each"),
        ("--partition own.py:unseeded", "another split on each call; .* from the generator"),
        ("--partition python:split", "partition='python:split' is not a file; give FILE.py"),
        ("--loss python:f", "loss='python:f' is not a file; give FILE.py:FUNCTION"),
        ("--metrics own.py:called_loss", "'test_loss', a name in the files of a run"),
        ("--metrics own.py:called_report", "'report', a name in the files of a run"),
        ("--metrics own.py:a_list", "returns list for a_list; return a number"),
        ("--metrics own.py:huge", "returns an integer for huge that no float can hold"),
        ("--metrics own.py:complex_number", "returns complex128 for complex_number"),
        ("--metrics own.py:nothing", "returns NoneType for nothing; return a number"),
        ("--metrics accuracy", "choose"),
    ],
)
def test_mistakes_in_files_are_one_line(here, flag, said):
    """Found before the first round: no run's folder is made."""
    with pytest.raises(UserError, match=said):
        fl.run(fl.parse([*FLAGS, *flag.split(), "--name", "wrong"]))
    assert not (here / "runs" / "wrong").exists()


def test_a_step_of_a_file_may_have_an_if_and_its_mistakes_are_one_line(here):
    """The rule of a step is called while TensorFlow makes a graph."""
    config = configure(dataset="digits", algorithm="own.py:halved", client_lr=0.5)
    optimizer = fl.build_experiment(config).parts.client_optimizer

    @tf.function(autograph=False)
    def step(gradient):
        state = optimizer.initialize([tf.TensorSpec([2])])
        return optimizer.next(state, (tf.constant([1.0, 1.0]),), (gradient,))[1][0]

    assert np.allclose(step(tf.constant([6.0, 8.0])), [1 - 1.5, 1 - 2])
    assert np.allclose(step(tf.constant([0.6, 0.8])), [1 - 0.3, 1 - 0.4])
    done = call_script(here, *FLAGS, "--algorithm", "own.py:misspelt")
    line = OWN[: OWN.index("return gradient\n")].count("\n") + 1
    assert done.returncode == 2
    assert f"own.py:{line} raised NameError" in done.stderr.splitlines()[-1]


def test_an_error_in_converted_code_keeps_its_reason():
    """AutoGraph raises IndexError and the like as a StagingError, below its own traceback."""

    def miscounted(x):
        return x + [1.0][3]

    def overlong(x):
        return x[:, 2]

    for function, reason in (
        (miscounted, "IndexError: list index out of range"),
        (overlong, "Index out of range using input dim 1; input has only 1 dims"),
    ):
        with pytest.raises(Exception, match="in user code") as raised:
            tf.function(convert(function), autograph=False)(tf.zeros(2))
        assert reason_of(raised.value) == reason
    assert (
        reason_of(ValueError("the first line\nand the second")) == "the first line and the second"
    )


def test_a_client_update_of_a_file_may_have_an_if(here):
    config = configure(dataset="digits", model="logreg", num_clients=2, cache=str(here))
    split = [range(100), range(100, 250)]
    outputs = []
    for algorithm in ("fedavg", "own.py:capped"):
        experiment = fl.build_prepared(config.replace(algorithm=algorithm), partition=split)
        clients = tf.range(2, dtype=tf.int64)
        outputs.append([experiment.train_client(experiment.broadcast(None), k) for k in clients])
    assert [[float(output.weight) for output in row] for row in outputs] == [[100, 150], [100, 100]]
    for plain, capped in zip(*outputs, strict=True):
        assert np.array_equal(plain.update[0], capped.update[0]) and np.any(plain.update[0])


def test_a_function_of_a_file_may_read_the_fields_of_what_it_replaces(here):
    """prox_mu is FedProx's; the user's own prox calls it, with the value that is given."""
    flags = ("--client-lr", "0.1", "--prox-mu", "0.5")
    own = call_script(here, *FLAGS, *flags, "--algorithm", "own.py:prox", "--name", "own")
    assert "has no effect" not in own.stderr
    call_script(here, *FLAGS, *flags, "--algorithm", "fedprox", "--name", "ours")
    hashes = {read_metrics(here / "runs" / name)["weights_sha256"] for name in ("own", "ours")}
    assert len(hashes) == 1
    uniform = ("--aggregator", "own.py:median", "--client-weighting", "uniform")
    assert "has no effect" not in call_script(here, *FLAGS, *uniform, "--name", "u").stderr
    with pytest.raises(UserError, match="and the run would not be private"):
        fl.parse("--aggregator own.py:median --noise-multiplier 1")
