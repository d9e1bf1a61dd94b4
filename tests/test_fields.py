"""What fields may hold: a wrong value is refused in one line that names field, value and remedy."""

from pathlib import Path
from typing import get_args

import federated_learning as fl
from harness.cli.fields import UserError, choices_of, is_plain_text
from harness.cli.run_options import identity

import numpy as np
import pytest
from runs import configure

OLD = Path(__file__).parent / "data" / "run_of_225c0cd"  # on digits


def notices_of(config):
    """The notices on flags without effect."""
    return config.unused_notices()


def wrong_values(hint):
    """Values that no field of this type takes."""
    if hint is bool:
        return ["yes", 1, None]
    if is_plain_text(hint):
        return [3, None, "a\0b"]
    if choices_of(hint):
        return [value for value in ("no such", "", 3) if value not in choices_of(hint)]
    kind, span, _ = get_args(hint)
    beyond = [span.low - 1, span.high + 1, float("nan"), float("inf"), "five", True]
    return [*beyond, *([0.5] if kind in (int, int | None) else [])]


MORE = {  # of the right type, and wrong all the same
    "num_clients": [0],
    "clients_per_round": [11],
    "byzantine": [11],
    "compare": ["fedavg,median", "fedavg,fedavg", "fedavg,", "seed=1,2"],
    "dataset": ["cifar10", "MNIST"],
    "partition": ["noniid", "sorted", "file"],
    "model": ["resnet", "net.py", "net.py:", ":build"],
    "workers": ["", "a b", "-x,localhost", "a,,b"],
    "workers_cache": ["", "a b", "-x"],
    "target_accuracy": [97],
    "name": ["a/b", ".", "..", "x" * 201, "ü" * 101],
}
WRONG = [
    (field, value)
    for field, hint in fl.Config.types().items()
    if field != "resume"
    for value in [*wrong_values(hint), *MORE.get(field, [])]
]


@pytest.mark.parametrize(("field", "value"), WRONG)
def test_a_wrong_value_is_refused_with_field_value_and_cure(field, value):
    with pytest.raises(UserError) as error:
        configure(**{field: value})
    message = str(error.value)
    assert (
        message.startswith(f"{field}={value!r:.40}"[:40])
        and "\n" not in message
        and len(message) < 350
    )
    assert any(cure in message for cure in ("choose", "give", "drop", "must be", "use", "name")), (
        message
    )


UNUSED = {  # a field that has an effect in the second configuration, and none in the first
    "alpha": ({"partition": "iid"}, {"partition": "client-dirichlet"}),
    "shards_per_client": ({}, {"partition": "shards"}),
    "labels_per_client": ({}, {"partition": "random-labels"}),
    "size_exponent": ({"partition": "dirichlet-quantity"}, {"partition": "quantity"}),
    "noise": ({}, {"partition": "feature"}),
    "rotation": ({"partition": "shards"}, {"partition": "feature"}),
    "prox_mu": ({"algorithm": "feddyn"}, {"algorithm": "fedprox"}),
    "dyn_alpha": ({}, {"algorithm": "feddyn"}),
    "server_momentum": ({"algorithm": "fedadam"}, {"algorithm": "mimelite"}),
    "client_momentum": ({"client_optimizer": "adam"}, {"client_optimizer": "momentum"}),
    "warmup_steps": ({"client_schedule": "cosine"}, {"client_schedule": "warm-up"}),
    "lr_decay": ({"client_schedule": "cosine"}, {"server_schedule": "exponential"}),
    "lr_horizon": ({"client_schedule": "exponential"}, {"client_schedule": "cosine"}),
    "trim": ({"aggregator": "median"}, {"aggregator": "trimmed-mean"}),
    "tolerated": ({}, {"aggregator": "krum"}),
    "attack": ({}, {"byzantine": 1}),
    "attack_scale": ({"byzantine": 1}, {"byzantine": 1, "attack": "gaussian"}),
}
VALUES = {
    "warmup_steps": 7,
    "attack": "nan",
    "shards_per_client": 3,
    "labels_per_client": 3,
    "lr_horizon": 3,
    "tolerated": 2,
}


@pytest.mark.parametrize("field", UNUSED)
def test_a_flag_without_effect_is_told_and_is_no_part_of_what_a_run_is(field):
    without, used = (configure(**flags) for flags in UNUSED[field])
    value = VALUES.get(field, 0.25)
    assert identity(without.replace(**{field: value})) == identity(without)
    assert identity(used.replace(**{field: value})) != identity(used)
    (notice,) = notices_of(without.replace(**{field: value}))
    assert notice.startswith(f"{field}={value} has no effect without --")
    assert notices_of(used.replace(**{field: value})) == []


def test_a_flag_that_one_of_the_rows_compared_uses_has_an_effect():
    config = configure(compare="fedavg,fedprox", prox_mu=0.1)
    assert notices_of(config) == []
    plain, own = (config.effective(algorithm=name, compare="") for name in ("fedavg", "fedprox"))
    assert identity(plain) == identity(configure()) and own.optimization.prox_mu == 0.1
    private = configure(compare="mean,dp", noise_multiplier=0.3)
    assert private.effective(aggregator="mean", compare="") == configure().effective()
    assert private.effective(aggregator="dp", compare="").privacy.noise_multiplier == 0.3
    assert identity(configure(algorithm="fedsgd", local_epochs=1)) == identity(
        configure(algorithm="fedsgd")
    )


@pytest.mark.parametrize("field", ["noise_multiplier", "delta", "epsilon_budget", "public_cohorts"])
def test_a_flag_of_privacy_without_dp_is_refused(field):
    value = True if field == "public_cohorts" else 0.25
    with pytest.raises(
        UserError,
        match=f"^{field}={value} has no effect without --aggregator dp, .* not be private",
    ):
        configure(**{field: value})
    configure(**{field: value}, aggregator="dp")


def test_numbers_of_numpy_and_paths_are_values():
    config = configure(rounds=np.int64(2), alpha=np.float32(0.25), runs=Path("a"))
    assert config == configure(rounds=2, alpha=0.25, runs="a")
    with pytest.raises(UserError, match="rounds=2.5 is not an integer"):
        configure(rounds=np.float64(2.5))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('resume = "runs/a"', "resume cannot be set in a file; give it as a flag: --resume"),
        ("version = true", "version cannot be set in a file"),
        ("compare = []", r"compare=\[\] has no row; give tables such as"),
    ],
)
def test_what_a_file_cannot_ask_for_is_refused(tmp_path, text, said):
    (tmp_path / "run.toml").write_text(text)
    with pytest.raises(UserError, match=said):
        fl.parse(["--config", str(tmp_path / "run.toml")])


def test_data_that_are_named_are_evaluated_on_and_no_others(tmp_path, monkeypatch):
    """By a call or in a file as by flags; without a name it is the evaluated run's own, digits."""
    assert configure(evaluate=str(OLD)).data == configure(dataset="digits").data
    assert configure(evaluate=str(OLD), data="x.npz").data == configure(data="x.npz").data
    assert configure(evaluate=str(OLD), dataset="mnist").data == configure().data
    file = tmp_path / "run.toml"
    file.write_text('dataset = "mnist"\n')
    assert fl.parse(f"--config {file} --evaluate {OLD}").data == configure().data
    with pytest.raises(UserError, match="model='lean-cnn' is not that of .* which is 'logreg'"):
        fl.parse(f"--evaluate {OLD} --model lean-cnn")
    monkeypatch.setenv("FL_DATA", "x.npz")
    with pytest.raises(UserError, match="contradicts the environment variable FL_DATA"):
        fl.parse(["--config", str(file)])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--metrics", "--metrics needs a value; choose FILE.py:FUNCTION"),
        ("--no-caption=true", "--no-caption takes no value; write --caption or --no-caption"),
    ],
)
def test_a_cure_can_be_written(flags, said):
    with pytest.raises(UserError, match=said):
        fl.parse(flags)


def test_a_preset_is_a_text():
    with pytest.raises(UserError, match=r"preset=\['fast'\]"):
        configure(preset=["fast"])


def test_a_file_says_what_a_run_prints(tmp_path):
    (tmp_path / "run.toml").write_text('quiet = true\njson = true\ntime_limit = "1m"\n')
    run = fl.parse(["--config", str(tmp_path / "run.toml")]).run
    assert run.quiet and run.json and run.seconds_allowed == 60


def test_words_are_texts():
    with pytest.raises(UserError, match="3 is not a text; give flags and values as texts"):
        fl.parse(["--rounds", 3])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--dataset mnist --data x.npz", "dataset='mnist' contradicts data"),
        ("--sampling by-size --client-weighting examples", "contradicts sampling='by-size'"),
        ("--noise-multiplier 0.5", "and the run would not be private"),
        ("--tune client_lr=0.1,0.2 --tune client_lr=0.3,0.4", "names client_lr twice"),
        ("--tune aggregator=mean,dp --num-clients 20", "cannot be combined with private runs"),
        (
            "--aggregator dp --num-clients 7 --noise-multiplier 0.7",
            "too high for 7 clients per round; choose less than 0.7",
        ),
    ],
)
def test_contradictions_are_refused_of_default_values_too(flags, said):
    with pytest.raises(UserError, match=said):
        fl.parse(flags)


def test_the_environments_data_contradict_the_flag_mnist(monkeypatch):
    monkeypatch.setenv("FL_DATA", "x.npz")
    with pytest.raises(UserError, match="contradicts the environment variable FL_DATA"):
        fl.parse("--dataset mnist")
    assert fl.parse("--list runs --dataset mnist").data.dataset == "mnist"  # reads no data
