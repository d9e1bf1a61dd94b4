"""The privacy accountant against dp-accounting called by hand, and a published figure."""

import dataclasses
import json
import math
import re
from functools import partial
from types import SimpleNamespace

import federated_learning as fl
from harness.cli.fields import UserError
from harness.cli.saved_config import read_saved
from harness.config.combinations import NOT_PRIVATE
from harness.engine.worker import LocalWorker
from harness.storage import run_folder
from harness.storage.files import to_json
from harness.storage.provenance import describe_program
from harness.training.dataset import KEYS
from harness.training.records import PUBLIC, RoundRecord
from variants import choices, privacy
from variants.sampling import draw_cohort

import dp_accounting
import numpy as np
import pytest
import scipy.stats
import tensorflow as tf
import tensorflow_federated as tff
from reference import accountant_of, replace_choice
from runs import NO_FIGURES, ON_DIGITS, call_script, configure, read_csv, read_metrics

OF_SINGLE_CLIENTS = {
    "unseen_clients": "--unseen-clients 0.2",
    "client_test": "--client-test 0.2",
    "save_clients": "--save-clients",
    "baselines": "--baselines",
    "tensorboard": "--tensorboard",
}


@pytest.mark.parametrize("field", NOT_PRIVATE)
def test_what_tells_of_single_clients_is_refused(field):
    flags = OF_SINGLE_CLIENTS[field]
    assert fl.parse(flags)
    with pytest.raises(UserError, match=f"{field}=.* cannot be combined with aggregator='dp'"):
        fl.parse(f"{flags} --aggregator dp --noise-multiplier 0.5")


POISSON = configure(
    aggregator="dp",
    num_clients=1000,
    clients_per_round=10,
    sampling="poisson",
    noise_multiplier=0.8,
    delta=1e-5,
)


def test_noise_of_the_updates_is_said_where_it_is_much_more_than_the_multiplier():
    """By Andrew et al. 2021, theorem 1: 1 / z ** 2 is the sum of that of the update, and of the
    count, whose noise is 0.05 m of what a client moves it by, 1 / 2."""

    def told(z, m):
        config = configure(
            aggregator="dp", num_clients=1000, clients_per_round=m, noise_multiplier=z
        )
        return accountant_of(config).noise_notices()

    assert told(0.5, 10) == told(4, 100) == []
    (notice,) = told(4, 50)
    (of_updates,) = re.findall(r"noise of ([\d.]+) times", notice)
    of_count = 0.05 * 50 / 0.5
    assert pytest.approx(1 / float(of_updates) ** 2 + 1 / of_count**2, rel=1e-2) == 1 / 4**2


def test_epsilon_is_dp_accountings():
    accountant = dp_accounting.rdp.RdpAccountant()
    accountant.compose(
        dp_accounting.PoissonSampledDpEvent(0.01, dp_accounting.GaussianDpEvent(0.8)), 1000
    )
    assert (
        accountant_of(POISSON).epsilon(range(1000))
        == accountant.get_epsilon(1e-5)
        == pytest.approx(3.695, abs=1e-3)
    )
    fixed = POISSON.replace(sampling="fixed")
    replace_one = dp_accounting.NeighboringRelation.REPLACE_ONE
    accountant = dp_accounting.rdp.RdpAccountant(neighboring_relation=replace_one)
    accountant.compose(
        dp_accounting.SampledWithoutReplacementDpEvent(
            1000, 10, dp_accounting.GaussianDpEvent(0.4)
        ),
        7,
    )
    assert (
        accountant_of(fixed).epsilon(range(7))
        == accountant.get_epsilon(1e-5)
        > accountant_of(POISSON).epsilon(range(7))
    )
    assert accountant_of(POISSON).epsilon([]) == 0


def renyi(alpha, q, sigma):
    """Renyi divergence of order alpha of a Poisson-sampled Gaussian (Mironov et al. 2019, equation
    9)."""
    terms = [
        math.comb(alpha, k) * (1 - q) ** (alpha - k) * q**k * math.exp((k * k - k) / (2 * sigma**2))
        for k in range(alpha + 1)
    ]
    return math.log(sum(terms)) / (alpha - 1)


def test_a_published_figure():
    """Abadi et al. 2016, section 3.2: q = 0.01, sigma = 4, delta = 1e-5, T = 10,000 steps give
    epsilon = 1.26.

    Theirs is the bound T * renyi + log(1 / delta) / (alpha - 1); ours, of the same divergences, the
    tighter one of Canonne et al. 2020, proposition 12.
    """
    orders = range(2, 65)
    log = math.log
    spent = {a: 10_000 * renyi(a, 0.01, 4) for a in orders}
    assert min(spent[a] + log(1e5) / (a - 1) for a in orders) == pytest.approx(1.26, abs=0.005)
    tighter = min(spent[a] + log((a - 1) / a) + (log(1e5) - log(a)) / (a - 1) for a in orders)
    config = POISSON.replace(
        clients_per_round=100, num_clients=10_000, noise_multiplier=4.0, rounds=10_000
    )
    assert accountant_of(config).epsilon(range(10_000)) == pytest.approx(tighter, rel=0.01)
    assert tighter < 1.26


def test_tffs_event_has_the_same_epsilon_but_only_in_python_floats(federation):
    """TFF's event holds float32, with which dp-accounting 0.4.3 silently counts the first Gaussian
    alone."""
    flags = {
        "num_clients": 20,
        "clients_per_round": 20,
        "noise_multiplier": 0.8,
        "aggregator": "dp",
    }
    process = federation(**flags).process
    state, _, _ = process.next(process.initialize(), [np.array([k]) for k in range(20)])
    event = tff.aggregators.differential_privacy.extract_dp_event_from_state(state.aggregator)
    gaussians = event.events
    assert all(not isinstance(g.noise_multiplier, float) for g in gaussians) and len(gaussians) == 2
    as_floats = dp_accounting.ComposedDpEvent(
        [dp_accounting.GaussianDpEvent(float(g.noise_multiplier)) for g in gaussians]
    )

    def epsilon(event):
        sampled = dp_accounting.PoissonSampledDpEvent(0.01, event)
        return dp_accounting.rdp.RdpAccountant().compose(sampled, 1000).get_epsilon(1e-5)

    assert epsilon(as_floats) == pytest.approx(
        accountant_of(POISSON).epsilon(range(1000)), rel=1e-3
    )
    # if it is no longer, the trap is gone, and this may go
    assert epsilon(event) < 0.8 * epsilon(as_floats)


def test_the_budget_ends_the_run_before_the_round_that_would_pass_it(federation, capsys):
    flags = {"num_clients": 30, "clients_per_round": 10, "aggregator": "dp", "rounds": 5}
    flags["sampling"] = "poisson"
    accountant = accountant_of(configure(**flags))
    spent = [accountant.epsilon(range(t)) for t in range(1, 6)]
    experiment = federation(**flags, epsilon_budget=(spent[1] + spent[2]) / 2)
    records = [record for _, record, _ in fl.run_rounds(experiment)]
    assert [record.epsilon for record in records] == spent[:2]
    assert f"ε {spent[1]:.2f}" in records[1].line(5)
    assert f"round 3 would raise ε to {spent[2]:.2f}" in capsys.readouterr().err
    assert not tf.math.is_nan(records[1].test_loss)


def test_public_cohorts_are_counted_without_amplification():
    config = POISSON.replace(
        public_cohorts=True, num_clients=20, clients_per_round=10, noise_multiplier=0.5
    )
    drawn = np.concatenate([draw_cohort(config, t, None) for t in range(1, 8)])
    times = int(np.bincount(drawn).max())
    accountant = dp_accounting.rdp.RdpAccountant()
    accountant.compose(dp_accounting.GaussianDpEvent(0.5), times)
    begun = range(1, 8)
    assert accountant_of(config).epsilon(begun) == accountant.get_epsilon(1e-5)
    assert accountant_of(config).epsilon(begun) > accountant_of(
        config.replace(public_cohorts=False)
    ).epsilon(begun)
    assert "public cohorts" in accountant_of(config).assumption()


def test_secret_cohorts_do_not_follow_from_the_seed(digits):
    config = POISSON.replace(clients_per_round=100)
    small = config.replace(dataset="digits", model="mlp", noise_multiplier=1.0)
    secret = fl.build_experiment(small, digits).parts
    draws = {tuple(secret.sample_clients(1)) for _ in range(5)}
    public = fl.build_experiment(small.replace(public_cohorts=True), digits).parts
    assert len(draws) == 5 and len({tuple(public.sample_clients(1)) for _ in range(5)}) == 1


def test_an_empty_cohort_gets_its_noise(federation):
    experiment = federation(aggregator="dp", num_clients=20, noise_multiplier=0.5)
    state = experiment.process.initialize()
    with LocalWorker(1) as worker:
        new, reports, _ = experiment.parts.train_cohort(worker, experiment, state, [])
    moved = np.concatenate([np.ravel(a) for a in new.global_model_weights.trainable])
    moved -= np.concatenate([np.ravel(a) for a in state.global_model_weights.trainable])
    # as in test_aggregators: the first norm is 0.1
    sigma = 0.1 * (0.5**-2 - (0.1 * 20) ** -2) ** -0.5 / 20
    assert reports == [] and moved.std() == pytest.approx(sigma, rel=0.05)


def test_what_attackers_send_is_clipped_as_all_is(federation):
    """So that epsilon holds with them: updates 1e6 times as large move the mean of 7 by no more
    than the norm, 0.1."""
    flags = {
        "num_clients": 7,
        "noise_multiplier": 0.02,
        "byzantine": 7,
        "attack": "scaled",
        "attack_scale": 1e6,
    }
    process = federation(aggregator="dp", **flags).process
    state = process.initialize()
    new, _, _ = process.next(state, [np.array([client]) for client in range(7)])
    moved = np.concatenate([np.ravel(a) for a in new.global_model_weights.trainable])
    moved -= np.concatenate([np.ravel(a) for a in state.global_model_weights.trainable])
    # the expected norm, as above
    noise = 0.1 * (0.02**-2 - (0.1 * 7) ** -2) ** -0.5 / 7 * math.sqrt(moved.size)
    assert noise < np.linalg.norm(moved) < 0.1 + 1.1 * noise


def test_delta_is_the_users():
    """A Gaussian of z = 2, once: its epsilon at two deltas, the one far below the other."""
    flags = {"aggregator": "dp", "num_clients": 30, "sampling": "poisson", "noise_multiplier": 2.0}
    epsilons = {
        delta: accountant_of(configure(**flags, delta=delta)).epsilon([1]) for delta in (1e-3, 1e-7)
    }
    for delta, epsilon in epsilons.items():
        accountant = dp_accounting.rdp.RdpAccountant().compose(dp_accounting.GaussianDpEvent(2.0))
        assert epsilon == accountant.get_epsilon(delta)
    assert epsilons[1e-3] < 0.7 * epsilons[1e-7]


@pytest.mark.parametrize("cohort", [10, 50, 90, 99])
def test_secret_cohorts_never_cost_more_than_a_client_in_every_round(cohort):
    """Renyi accounting of a fixed size is so loose that 29 rounds of 90 of 100 clients were told
    far above it."""
    flags = {
        "aggregator": "dp",
        "num_clients": 100,
        "clients_per_round": cohort,
        "noise_multiplier": 0.9,
    }
    accountant = dp_accounting.rdp.RdpAccountant(
        neighboring_relation=dp_accounting.NeighboringRelation.REPLACE_ONE
    )
    plain = accountant.compose(dp_accounting.GaussianDpEvent(0.45), 29).get_epsilon(1e-5)
    epsilon = accountant_of(configure(**flags)).epsilon(range(1, 30))
    assert epsilon <= plain and (epsilon < plain) == (cohort == 10)


class Killed(Exception):
    """What stops a run at a moment of its round."""


@pytest.mark.parametrize(
    "moment", ["before training", "after training", "between the tables", "before the checkpoint"]
)
def test_a_private_round_is_counted_as_often_as_its_noise_was_drawn(
    federation, tmp_path, monkeypatch, moment
):
    """Killed in round 2 and gone on with, again and again: epsilon is that of every round begun,
    never less."""
    draws = []
    train = fl.train_cohort

    def train_and_note(worker, experiment, state, clients):
        round_num = int(state.client_work.round) + 1
        if kills and moment == "before training" and round_num == 2:
            raise Killed
        draws.append(round_num)
        return train(worker, experiment, state, clients)

    monkeypatch.setattr(fl, "train_cohort", train_and_note)
    experiment = federation(aggregator="dp", num_clients=20, rounds=3)
    place = {
        "between the tables": (run_folder, "json_line"),
        "before the checkpoint": (run_folder, "to_array"),
        "before training": (run_folder, "append"),
        "after training": (run_folder, "csv_line"),
    }[moment]
    original = getattr(*place)
    (tmp_path / "partition.json").write_text("{}")
    program = describe_program(experiment.choice_hashes) | {"from_round": 1}
    (tmp_path / "program.json").write_text(to_json({"programs": [program]}))

    def go():
        folder = run_folder.RunFolder(tmp_path, experiment)
        start, records = folder.load(experiment)

        def stopping(*arguments, **named):
            if kills and draws[-1] == 2:
                raise Killed
            return original(*arguments, **named)

        monkeypatch.setattr(*place, stopping)
        for state, record, _ in fl.run_rounds(experiment, start, folder=folder):
            folder.save_round(record, state)
            records.append(record)
        return records

    kills = True
    with pytest.raises(Killed):
        go()
    kills = False
    monkeypatch.setattr(*place, original)
    records = go()
    journal = tmp_path / "rounds_begun.txt"
    begun = [int(line) for line in journal.read_text().split()]
    assert [record.round for record in records] == [1, 2, 3] and begun == [1, 2, 2, 3]
    assert draws == ([1, 2, 3] if moment == "before training" else [1, 2, 2, 3])
    (accountant,) = experiment.parts.callbacks
    assert records[-1].epsilon == accountant.epsilon(begun) > accountant.epsilon([1, 2, 3])
    journal.unlink()
    with pytest.raises(UserError, match="rounds_begun.txt lacks round 1, so epsilon is unknown"):
        longer = federation(aggregator="dp", num_clients=20, rounds=4)
        folder = run_folder.RunFolder(tmp_path, experiment)
        next(fl.run_rounds(longer, folder.load(experiment)[0], folder=folder))


def test_a_budget_spent_by_a_round_that_was_not_done_ends_the_next_run(tmp_path, monkeypatch):
    flags = {"dataset": "digits", "model": "logreg", "rounds": 2, "num_clients": 20}
    private = configure(**flags, aggregator="dp")
    accountant = accountant_of(private)
    between = (accountant.epsilon([1]) + accountant.epsilon([1, 1])) / 2
    config = configure(**flags, aggregator="dp", epsilon_budget=between)
    config = config.replace(runs=str(tmp_path / "runs"), cache=str(tmp_path), name="run")

    def kill(*arguments):
        raise Killed

    with monkeypatch.context() as killed, pytest.raises(Killed):
        killed.setattr(fl, "train_cohort", kill)
        fl.run(config)
    assert (tmp_path / "runs" / "run" / "rounds_begun.txt").read_text().split() == ["1"]
    with pytest.raises(UserError, match="allows no further round, and no round was completed"):
        fl.run(read_saved(str(tmp_path / "runs" / "run"), fl.Config()))


def test_a_round_for_which_no_time_is_left_is_not_begun(tmp_path):
    """The journal, by which epsilon is counted, has the round that was trained."""
    flags = {"dataset": "digits", "model": "logreg", "num_clients": 20, "aggregator": "dp"}
    config = configure(**flags, rounds=3, time_limit="0.001", figures="none", name="run")
    end = fl.run(config.replace(runs=str(tmp_path), cache=str(tmp_path)))
    assert len(end.records) == 1
    assert (end.folder / "rounds_begun.txt").read_text() == "1\n"


def test_rounds_begun_for_nothing_are_told(tmp_path, capsys):
    config = configure(num_clients=20, aggregator="dp", rounds=3)
    journal = tmp_path / "rounds_begun.txt"
    journal.write_text("1\n2\n")
    accountant = accountant_of(config)
    accountant.before_run(SimpleNamespace(journal=journal), 2)
    final = accountant.epsilon([1, 2, 2, 3])
    said = capsys.readouterr().err
    assert f"1 round begun, but not completed, will count too: ε will be {final:.2f}" in said


def test_what_a_private_run_tells_of_a_round_is_a_list_of_what_it_may():
    """README's errand "a metric": a field that somebody adds is not told unless it stands in
    PUBLIC."""

    @dataclasses.dataclass(frozen=True)
    class WithNorm(RoundRecord):
        update_norm: float = 2.7
        slowest: int = 3
        norms: list[float] = dataclasses.field(default_factory=lambda: [2.7])

    values = dict.fromkeys(RoundRecord.__dataclass_fields__, 1)
    values |= {"clients": [{"client": 3}], "train": {"loss": 0.3}, "epsilon": 0.5}
    record = WithNorm(**values).public()
    shown = {
        name
        for name, value in vars(record).items()
        if value not in (None, [], {}) and value == value
    }
    secret = {"seconds", "clients", "train", "dropped", "measured_bytes_up"}
    assert shown == set(PUBLIC) and secret.isdisjoint(PUBLIC)
    assert math.isnan(record.update_norm) and record.slowest is None and record.norms == []


@pytest.mark.parametrize("algorithm", ["scaffold", "feddyn", "mimelite", "fednova"])
def test_an_algorithm_that_sends_more_is_refused_whatever_its_name(digits, monkeypatch, algorithm):
    function = choices.ALGORITHMS[algorithm].function
    replace_choice(monkeypatch, choices.ALGORITHMS, "fedprox", function)
    config = configure(dataset="digits", aggregator="dp", algorithm="fedprox", num_clients=20)
    with pytest.raises(
        UserError, match="algorithm='fedprox': its clients also send .* epsilon would be false"
    ):
        fl.build_experiment(config, digits)
    with pytest.raises(UserError, match="epsilon would be false"):
        fl.run(config)


@pytest.mark.slow
def test_a_private_run_leaves_nothing_about_single_clients(tmp_path):
    flags = (*ON_DIGITS, "--rounds", "2", "--num-clients", "20", "--aggregator", "dp")
    done = call_script(tmp_path, *flags, "--name", "run")
    assert done.returncode == 0 and "train loss" not in done.stdout, done.stderr
    run = tmp_path / "runs" / "run"
    text = done.stdout + "".join(
        path.read_text() for path in run.iterdir() if path.suffix in (".json", ".jsonl", ".csv")
    )
    for word in ("indices", "label_counts", "skew", '"examples":', '"client"'):
        assert word not in text, word
    assert not re.search(r"\d s\b", done.stdout) and not (run / "worker.log").exists()
    # no date tells a round's time
    assert len({path.stat().st_mtime_ns for path in [run, *run.rglob("*")]}) == 1
    assert {row["seconds"] for row in read_csv(run / "metrics.csv")} == {"nan"}
    journal = (run / "rounds_begun.txt").read_text().split()
    spent = accountant_of(configure(aggregator="dp", num_clients=20)).epsilon(range(1, 3))
    assert journal == ["1", "2"] and f"(ε {spent:.2f}, δ 1e-05)-differential privacy" in done.stdout
    assert "which gives practically no protection" in done.stderr
    further = call_script(tmp_path, "--resume", str(run), "--rounds", "3", *NO_FIGURES)
    assert further.returncode == 0 and "damaged" not in further.stderr, further.stderr
    assert [
        line.split()[1] for line in further.stdout.splitlines() if line.startswith("round ")
    ] == ["3/3"]
    assert not (run / "client_partition.png").exists()
    for record in read_metrics(run)["rounds"]:
        assert record["clients"] == [] and "train_loss" not in record
        assert record["num_nonfinite"] is record["dropped"] is None


@pytest.mark.thorough
def test_a_target_epsilon_needs_less_noise_where_cohorts_are_secret():
    """Amplified by sampling: half of the clients come in a round."""
    flags = "--aggregator dp --sampling poisson --num-clients 100 --rounds 4 --target-epsilon 4"
    public, secret = (
        privacy.meet_target(config, partial(draw_cohort, config, sizes=None) if cohorts else None)
        for config, cohorts in (
            (fl.parse(f"{flags} --public-cohorts"), True),
            (fl.parse(f"{flags} --clients-per-round 50"), False),
        )
    )
    assert secret.privacy.noise_multiplier < public.privacy.noise_multiplier
    assert accountant_of(secret).epsilon(range(1, 5)) <= 4


def gaussian_delta(epsilon, z):
    """The delta of a Gaussian mechanism with noise z for sensitivity 1 (Balle and Wang 2018,
    theorem 8), exact."""
    cdf = scipy.stats.norm.cdf
    return cdf(1 / (2 * z) - epsilon * z) - np.exp(epsilon) * cdf(-1 / (2 * z) - epsilon * z)


def test_a_target_epsilon_is_kept_by_the_least_noise():
    """All clients in each of T rounds, neighbours one client more: T Gaussians of z are one of
    z / sqrt(T). By the closed form epsilon is below the target, by less than the Renyi bound's
    slack; a thousandth less noise would miss it."""
    flags = "--aggregator dp --sampling poisson --num-clients 100 --rounds 4 --public-cohorts"
    config = fl.parse(f"{flags} --target-epsilon 4 --delta 1e-5")
    found = privacy.meet_target(config, partial(draw_cohort, config, sizes=None))
    z = found.privacy.noise_multiplier
    assert accountant_of(found).epsilon(range(1, 5)) <= 4
    less = found.replace(noise_multiplier=z - 0.001)
    assert accountant_of(less).epsilon(range(1, 5)) > 4
    assert gaussian_delta(4, z / 2) < 1e-5 < gaussian_delta(4, 0.9 * z / 2)
    secret = found.replace(clients_per_round=50, public_cohorts=False)  # amplified by sampling
    assert accountant_of(secret.replace(noise_multiplier=0.8 * z)).epsilon(range(1, 5)) < 4
    built = fl.build_experiment(config.replace(dataset="digits", model="mlp"))
    assert built.config.privacy.noise_multiplier == z
    assert f"noise_multiplier={z:g} found for target_epsilon=4" in built.notices[-1]
    with pytest.raises(
        UserError, match="noise_multiplier=0.5 cannot be combined with target_epsilon=4"
    ):
        fl.parse(f"{flags} --target-epsilon 4 --noise-multiplier 0.5")
    other = config.replace(noise_multiplier=3)
    with pytest.raises(UserError, match="which needs .*; drop one of them"):
        privacy.meet_target(other, None)
    few = fl.parse("--aggregator dp --target-epsilon 0.5")
    with pytest.raises(UserError, match="needs more noise than 10 clients per round allow"):
        privacy.meet_target(few, None)
    with pytest.raises(UserError, match="target_epsilon=4.0 has no effect without"):
        fl.parse("--target-epsilon 4")


def test_epsilon_is_not_claimed_for_what_a_model_knew_before(digits, tmp_path, monkeypatch):
    """A private run from a model of the same images: epsilon would be that of its rounds alone."""
    monkeypatch.chdir(tmp_path)
    small = {"model": "logreg", "num_clients": 4, "rounds": 1, "local_epochs": 1, "figures": "none"}
    first = fl.run(configure(dataset="digits", **small, name="first"))
    model = str(first.folder / "global_model.keras")
    private = small | {"aggregator": "dp", "noise_multiplier": 0.3, "initial_model": model}
    with pytest.raises(
        UserError, match="cannot be combined with aggregator='dp': .* epsilon would be f"
    ):
        fl.build_experiment(configure(dataset="digits", **private), digits)
    with pytest.raises(UserError, match="trained on the same images"):  # though not on all of them
        fl.build_experiment(configure(dataset="digits", holdout=100, **private))
    arrays = (digits.train.images[:, ::-1], digits.train.labels, *digits.test)
    np.savez("turned.npz", **dict(zip(KEYS, arrays, strict=True)))
    turned = fl.build_dataset(*arrays)
    fl.build_experiment(configure(**private), turned)  # other images
    second = fl.run(configure(data="turned.npz", **small, initial_model=model, name="second"))
    further = private | {"initial_model": str(second.folder / "global_model.keras")}
    with pytest.raises(UserError, match="trained on the same images"):  # by way of the second
        fl.build_experiment(configure(dataset="digits", **further))
    (first.folder / "partition.json").unlink()  # of which nothing is known
    with pytest.raises(UserError, match="cannot be combined with aggregator='dp'"):
        fl.build_experiment(configure(**private), turned)
    with pytest.raises(
        UserError, match="save_clients=True cannot be combined with aggregator='secure'"
    ):
        fl.parse("--aggregator secure --save-clients")


def test_a_private_run_is_resumed_with_a_larger_budget(tmp_path, monkeypatch, capsys):
    """The flags of the saved run count in the checks of those that are given."""
    monkeypatch.chdir(tmp_path)
    flags = (
        "--dataset digits --model logreg --num-clients 20 --clients-per-round 10 --local-epochs 1"
    )
    private = f"{flags} --aggregator dp --public-cohorts --rounds 3 --figures none --name run"
    end = fl.run(fl.parse(f"{private} --epsilon-budget 30"))
    assert len(end.records) == 1
    more = fl.run(fl.parse("--resume runs/run --epsilon-budget 500"))
    assert len(more.records) == 3
    assert "exceeded" not in capsys.readouterr().err
    fl.run(fl.parse("--resume runs/run --epsilon-budget 30"))
    spent = f"the rounds so far have ε = {more.records[-1].epsilon:.2f}"
    assert f"epsilon_budget=30 is exceeded already: {spent}" in capsys.readouterr().err
    page = (more.folder / "report.html").read_text()
    assert "--rounds 3" in page and "--epsilon-budget 30" not in page
    with pytest.raises(UserError, match="noise_multiplier=0.9 differs from"):
        fl.parse("--resume runs/run --noise-multiplier 0.9")


def test_private_runs_of_a_comparison_add_up(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = "--dataset digits --model logreg --rounds 1 --local-epochs 1 --figures none"
    fl.compare(fl.parse(f"{flags} --aggregator dp --seeds 2 --public-cohorts"))
    runs = [json.loads(path.read_text()) for path in tmp_path.glob("runs/*/*/metrics.json")]
    total = sum(run["epsilon"] for run in runs)
    said = " ".join(capsys.readouterr().err.split())
    assert "2 private runs on the same clients are released here: their ε add" in said
    assert f"add up to {total:.2f}, and" in said


def test_a_target_that_the_most_noise_keeps_is_taken():
    """TFF adds less than 0.1 of the cohort, here 9.999: an epsilon just above its own is kept, one
    just below is refused."""
    flags = "--aggregator dp --sampling poisson --num-clients 100 --rounds 4 --public-cohorts"
    config = fl.parse(f"{flags} --target-epsilon 1")
    cohorts = partial(draw_cohort, config, sizes=None)
    least = accountant_of(config.replace(noise_multiplier=9.999)).epsilon(range(1, 5))
    found = privacy.meet_target(config.replace(target_epsilon=1.001 * least), cohorts)
    assert found.privacy.noise_multiplier > 9.9
    with pytest.raises(UserError, match="needs more noise"):
        privacy.meet_target(config.replace(target_epsilon=0.999 * least), cohorts)
