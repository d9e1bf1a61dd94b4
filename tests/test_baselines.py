"""The baselines: rounds of one client are local training, told exactly and kept as they come; who
gains, by hand."""

import json
import signal
import sys
from types import SimpleNamespace

import federated_learning as fl
from harness.cli.fields import UserError
from harness.reporting import plots
from harness.training.records import examples_trained_on
from variants import baselines
from variants.partitions import rotate_and_add_noise

import numpy as np
import pytest
from reference import largest_difference, network, numpy_local, weights_of
from runs import NO_FIGURES, ON_DIGITS, SCRIPT, call_script, configure, read_csv, start

FLAGS = (*ON_DIGITS, "--rounds", "2", "--num-clients", "3", "--name", "run")


@pytest.fixture
def learners(federation):
    """make(**flags) -> (baselines by (kind, client), the experiments they are of, the
    federation's)."""

    def make(rounds=2, **flags):
        experiment = federation(**flags)
        epochs = experiment.config.training.local_epochs
        made = []

        def build(*arguments):
            made.append(fl.build_prepared(*arguments))
            return made[-1]

        sizes = experiment.partition.sizes
        reports = [
            [
                {"client": k, "examples": sizes[k], "steps": epochs * -(-int(sizes[k]) // 16)}
                for k in fl.sample_clients(experiment.config, t)
            ]
            for t in range(1, rounds + 1)
        ]
        records = [SimpleNamespace(clients=clients) for clients in reports]
        found = baselines.build_baselines(experiment, records, build)
        return {(one.kind, one.client): one for one in found}, made, experiment

    return make


@pytest.mark.parametrize(
    "kind, client, at", [("centralized", -1, 0), ("alone", 1, 1), ("tuned", 2, 2)]
)
def test_learning_by_oneself_equals_numpys(learners, worker, kind, client, at):
    """Each round is the client's local epochs from its own last weights; tuning one epoch from the
    global model."""
    flags = {"client_lr": 0.05, "local_epochs": 2, "algorithm": "fedavgm", "aggregator": "median"}
    found, made, federated = learners(**flags)
    experiment = made[at]
    config = experiment.config
    start = federated.process.initialize().global_model_weights
    weights = [w.astype(float) for w in weights_of(experiment.process.initialize())]
    steps = [step[:2] for step in found[kind, client].train(worker, start)]
    assert len(steps) == config.training.local_epochs == (1 if kind == "tuned" else 2)
    for round_num, (accuracy, trained) in enumerate(steps, 1):
        weights, _ = numpy_local(
            config, experiment.shard_folder, max(client, 0), round_num, weights
        )
        assert largest_difference(trained.trainable, weights) < 2e-5
        assert accuracy == federated.evaluate(trained).accuracy
    if kind == "centralized":
        assert experiment.partition.sizes.tolist() == [federated.partition.sizes.sum()]


@pytest.mark.parametrize(
    ("flags", "rate"),
    [
        ({"algorithm": "mimelite"}, 0.2),
        ({"algorithm": "scaffold"}, 0.2),
        ({"algorithm": "scaffold", "client_lr": 0.01}, 0.01),
        ({"client_lr": 0.3}, 0.3),
        ({"algorithm": "fedprox"}, 0.2),
        ({"algorithm": "fedadam", "client_optimizer": "adam"}, 0.001),
    ],
)
def test_who_learns_alone_has_the_runs_rate_or_fedavgs_default(flags, rate):
    """mimelite's default of 0.0005 left clients alone at 16 % where they get 43, and turned who
    gains around."""
    config = configure(model="mlp", **flags).effective()
    assert baselines.plain_training(config)["client_lr"] == rate
    lean = configure(model="lean-cnn", **flags).effective()
    assert baselines.plain_training(lean)["client_lr"] == (0.15 if rate == 0.2 else rate)


def test_baselines_that_diverge_are_told_and_keep_the_model_before(tmp_path, monkeypatch, capsys):
    """Of one round each: what is alone stays at its initial weights, tuned ones at the global."""
    monkeypatch.chdir(tmp_path)
    words = "--dataset digits --model logreg --rounds 1 --local-epochs 1 --num-clients 2"
    words += " --client-lr 1000 --weight-decay 1 --baselines"
    done = call_script(tmp_path, *words.split(), *NO_FIGURES)
    assert done.returncode == 0
    assert "5 of the baselines' 5 rounds led to weights that are not finite" in done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    for row in read_csv(folder / "clients.csv"):
        assert row["tuned_accuracy"] == row["global_accuracy"]


def test_as_long_is_as_many_passes_over_the_images(learners):
    """Baselines have the rounds of E passes that come nearest to those of the clients drawn."""
    found, _, experiment = learners(rounds=20, num_clients=4, clients_per_round=1)
    sizes = experiment.partition.sizes
    drawn = [fl.sample_clients(experiment.config, t)[0] for t in range(1, 21)]
    rounds = round(sizes[drawn].sum() / sizes.sum())
    assert found["centralized", -1].rounds == found["alone", 3].rounds == rounds


def test_passes_are_counted_as_they_were_done():
    """100 images in batches of 16 are seven steps an epoch: nine steps are one epoch and two
    batches; batch size 0 is the whole shard."""
    reports = [
        {"examples": 100.0, "steps": 21.0},
        {"examples": 100.0, "steps": 9.0},
        {"examples": 20.0, "steps": 1.0},
    ]
    done = [examples_trained_on(report, 16) for report in reports]
    assert done == [300, 132, 16]
    assert examples_trained_on({"examples": 20.0, "steps": 3.0}, 0) == 60
    records = [SimpleNamespace(clients=reports), SimpleNamespace(clients=reports[2:])]
    assert baselines.passes_so_far(records, 240, 16) == pytest.approx([448 / 240, 464 / 240])


def test_a_client_that_sees_shifted_images_is_asked_on_such(learners, worker, digits):
    found, made, experiment = learners(partition="feature", rotation=80, noise=60)
    seen = rotate_and_add_noise(digits.test.images, 2, 3, 0, 80.0, 60.0)
    weights = experiment.process.initialize().global_model_weights
    model = fl.build_model(network("2nn"), 0)
    predicted = model(fl.to_input(seen)).numpy().argmax(axis=1)
    assert np.mean(found["alone", 2].evaluate_own(weights).predictions == predicted) > 0.99
    assert (found["alone", 2].evaluate(weights).predictions != predicted).mean() > 0.02
    gathered = made[0].dataset.train
    first = digits.train.images[experiment.partition.indices[0]]
    assert (gathered.images[: len(first)] == rotate_and_add_noise(first, 0, 3, 0, 80.0, 60.0)).all()
    assert (np.bincount(gathered.labels) == experiment.partition.counts.sum(axis=0)).all()


def test_accuracy_on_a_label_mix_is_that_on_images_in_this_mix():
    """Three images of label 0, of which two are right, and two of label 1, one right; the client
    has 3 : 4 of them."""
    confusion = np.array([[2, 1, 0], [0, 1, 1], [0, 0, 0]])
    assert baselines.accuracy_on_label_mix(confusion, np.array([3, 4, 0])) == pytest.approx(
        (3 * 2 / 3 + 4 * 1 / 2) / 7
    )
    mixed = baselines.mix_rows(confusion, np.array([3, 4, 0]))
    assert np.allclose(mixed, [[1000 * 2 / 7, 1000 / 7, 0], [0, 2000 / 7, 2000 / 7], [0, 0, 0]])


def rows_of_three_clients():
    done = {
        (kind, client): {"confusion": np.array([[right, 10 - right], [2, 8]])}
        for kind, rights in (("alone", (9, 5, 7)), ("tuned", (8, 8, 8)))
        for client, right in enumerate(rights)
    }
    counts = np.array([[10, 0], [10, 10], [0, 10]])
    return baselines.find_gains(counts, [np.array([[6, 4], [1, 9]])] * 3, done)


def test_who_gains_and_how_skewed_they_are():
    first, second, third = rows_of_three_clients()
    assert (first.skew, second.skew) == (0.5, 0) and first.images == 10
    assert (first.global_accuracy, first.own_accuracy, first.tuned_accuracy) == pytest.approx(
        (0.6, 0.9, 0.8)
    )
    assert (second.global_accuracy, second.own_accuracy) == (
        pytest.approx(0.75),
        pytest.approx(0.65),
    )
    assert [row.gain for row in (first, second, third)] == pytest.approx([-0.3, 0.1, 0.1])


def test_the_pictures_show_the_rows():
    gain = plots.plot_gain(rows_of_three_clients(), "note")
    _, points, _ = gain.axes[0].collections  # the lines between a client's two points come first
    assert (
        np.allclose(points.get_offsets(), [(0.5, -30), (0, 10), (0.5, 10)])
        and "1 of 3" in gain.get_suptitle()
    )
    rows = [
        {"learner": "federated", "epochs": 3.0 * n, "test_accuracy": 1 - 0.1 / n} for n in (1, 2)
    ]
    rows += [{"learner": "centralized", "epochs": 3, "test_accuracy": 0.99}]
    rows += [
        {"learner": "alone", "epochs": 3, "test_accuracy": accuracy} for accuracy in (0.4, 0.8)
    ]
    lines = {
        line.get_label().partition(":")[0]: line
        for line in plots.plot_baselines(rows, "note").axes[0].lines
    }
    assert lines["federated"].get_xydata().tolist() == [
        [3, pytest.approx(10)],
        [6, pytest.approx(5)],
    ]
    assert lines["each alone"].get_ydata() == pytest.approx([40])


@pytest.mark.parametrize(
    "flags", [{"aggregator": "dp"}, {"compare": "fedavg,fedprox"}, {"seeds": 2}]
)
def test_what_baselines_do_not_go_with(flags):
    with pytest.raises(UserError, match="baselines=True cannot be combined with"):
        configure(baselines=True, **flags)


@pytest.mark.slow
def test_a_run_tells_what_it_is_worth_and_goes_on_where_it_was_stopped(tmp_path):
    done = call_script(tmp_path, *FLAGS, *NO_FIGURES, "--baselines")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "run"
    tables = {name: (folder / name).read_bytes() for name in ("baselines.csv", "clients.csv")}
    rows = read_csv(folder / "baselines.csv")
    assert [row["learner"] for row in rows] == ["federated"] * 2 + ["centralized"] * 2 + [
        "alone"
    ] * 6
    assert [float(row["epochs"]) for row in rows[:4]] == [3, 6, 3, 6]
    last = [float(row["test_accuracy"]) for row in rows if row["epochs"] in ("6", "6.0")]
    for name, accuracy in zip(
        ("federated", "centralized", "alone"), (last[0], last[1], np.mean(last[2:])), strict=True
    ):
        assert any(
            line.split()[:2] == [name, f"{accuracy:.2%}".rstrip(",")]
            or line.startswith(f"{name} ")
            and f"{accuracy:.2%}" in line
            for line in done.stdout.splitlines()
        )
    store = folder / "baselines.jsonl"
    lines = store.read_text().splitlines(keepends=True)
    assert len(lines) == 7
    store.write_text("".join(lines[:3]) + lines[3][:40])  # as kill -9 leaves it
    for name in tables:
        (folder / name).unlink()
    again = call_script(tmp_path, "--resume", "runs/run", "--baselines", "--figures", "png")
    assert again.returncode == 0, again.stderr
    assert (folder / "baselines.png").stat().st_size > 10_000
    assert {name: (folder / name).read_bytes() for name in tables} == tables
    assert store.read_text() == "".join(lines)


def test_a_client_whose_labels_no_test_image_has_is_left_out(digits, tmp_path, capsys):
    (images, labels) = digits.train
    (x, y) = digits.test
    few = labels < 3
    tested = (y == 0) | (y == 2)
    np.savez(
        tmp_path / "no1.npz",
        x_train=images[few],
        y_train=labels[few],
        x_test=x[tested],
        y_test=y[tested],
    )
    flags = {
        "model": "mlp",
        "rounds": 1,
        "num_clients": 3,
        "partition": "labels-per-client",
        "labels_per_client": 1,
    }
    places = {
        "data": str(tmp_path / "no1.npz"),
        "runs": str(tmp_path),
        "cache": str(tmp_path),
        "name": "run",
    }
    fl.run(configure(**flags, **places, baselines=True))
    said = capsys.readouterr()
    rows = read_csv(tmp_path / "run" / "clients.csv")
    (unknown,) = (row for row in rows if row["global_accuracy"] == "nan")
    known = [100 * float(row["global_accuracy"]) for row in rows if row != unknown]
    assert unknown["gain"] == "nan" and "no test image has their labels: 1 client;" in said.err
    assert (
        f"global model         {np.mean(known):.2f}% ± {np.std(known):.2f}, worst {min(known):.2f}%"
        in said.out
    )
    assert "of 2 clients do worse with the global model" in said.out
    (tmp_path / "only1.json").write_text(
        json.dumps({"indices": [np.flatnonzero(labels[few] == 1).tolist()]})
    )
    flags = {
        "model": "mlp",
        "rounds": 1,
        "num_clients": 1,
        "partition_file": str(tmp_path / "only1.json"),
    }
    with pytest.raises(
        UserError, match="baselines=True: no test image has a label that any client holds"
    ):
        fl.run(configure(**flags, **places, baselines=True))


@pytest.mark.thorough
def test_stopped_in_the_baselines_it_says_how_to_go_on(tmp_path):
    process = start(tmp_path, *FLAGS, "--baselines", "--local-epochs", "100")
    for line in process.stdout:
        if line.startswith("baselines:"):
            break
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert stderr.splitlines()[-1].startswith(
        f"notice: the baselines are not finished; to continue: {sys.executable} {SCRIPT} --resume"
    )
    assert (tmp_path / "runs" / "run" / "metrics.json").exists()


@pytest.mark.parametrize("rounds", [1, pytest.param(2, marks=pytest.mark.thorough)])
def test_the_time_limit_is_that_of_run_and_baselines(tmp_path, monkeypatch, capsys, rounds):
    """The first round always fits, and nothing after it in a millisecond."""
    monkeypatch.chdir(tmp_path)
    flags = {"dataset": "digits", "model": "logreg", "num_clients": 2, "local_epochs": 1}
    config = configure(**flags, rounds=rounds, figures="none", name="run", baselines=True)
    end = fl.run(config.replace(time_limit="0.001"))
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("notice: time limit of 0.001 s: the baselines are not finished; to cont")
    assert len(end.records) == 1 and end.is_cut and not (end.folder / "baselines.csv").exists()
    if rounds == 1:  # a command without new rounds trains one baseline
        again = fl.run(config.replace(resume="runs/run", time_limit="0.001"))
        assert again.is_cut and not (end.folder / "baselines.csv").exists()
        assert len((end.folder / baselines.STORE).read_text().splitlines()) == 1
    else:
        again = fl.run(config.replace(resume="runs/run"))
        assert not again.is_cut and (end.folder / "baselines.csv").exists()
        assert len(again.records) == rounds


def test_the_worst_are_a_tenth_of_the_clients():
    """Of twenty with 1, 2, ..., 20 % the worst two have 1.5 % on average."""
    gains = [
        baselines.Gain(k, 10, 0.0, 0.01 * (k + 1), 0.01 * (k + 1), 0.01 * (k + 1), 0.0)
        for k in range(20)
    ]
    trained = {("centralized", -1): {"accuracies": [0.9]}, ("alone", 0): {"accuracies": [0.5]}}
    said = baselines.describe_learners(0.8, gains, trained, 3.0, 3)
    assert said.count("worst 1.50%") == 3
    assert "federated            80.00%, 3.0 passes over all images\n" in said


@pytest.mark.slow
def test_the_axis_of_baselines_is_what_was_passed_over(tmp_path, monkeypatch):
    """Two rounds of one client of four with a quarter of the images: half of an epoch each."""
    monkeypatch.chdir(tmp_path)
    flags = {"dataset": "digits", "model": "mlp", "partition": "iid", "num_clients": 4}
    flags |= {"rounds": 2, "clients_per_round": 1, "local_epochs": 2, "figures": "none"}
    end = fl.run(configure(**flags, baselines=True))
    rows = read_csv(end.folder / "baselines.csv")
    federated = [float(row["epochs"]) for row in rows if row["learner"] == "federated"]
    assert federated == pytest.approx([0.5, 1.0], abs=0.01)
