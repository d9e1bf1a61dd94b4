"""The flags that only variants use, by theme, and the pairs of flags that do not go together.

No TensorFlow here.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from harness.fields import (
    Probability,
    Rate,
    Rounds,
    Scale,
    SomeClients,
    Theme,
    UserError,
    real,
    whole,
)
from harness.files import place

PartitionName = Literal[
    "iid",
    "shards",
    "dirichlet",
    "capped-dirichlet",
    "client-dirichlet",
    "labels-per-client",
    "random-labels",
    "quantity",
    "dirichlet-quantity",
    "feature",
    "natural",
    "file",
]
AlgorithmName = Literal[
    "fedavg",
    "fedsgd",
    "fedprox",
    "fedavgm",
    "fedadagrad",
    "fedadam",
    "fedyogi",
    "fednova",
    "mimelite",
    "scaffold",
    "feddyn",
]
AggregatorName = Literal[
    "mean",
    "clipping",
    "zeroing",
    "median",
    "trimmed-mean",
    "krum",
    "multi-krum",
    "compressed",
    "secure",
    "dp",
]
ClientOptimizerName = Literal["sgd", "momentum", "adagrad", "rmsprop", "adam", "yogi"]
Schedule = Literal["constant", "exponential", "inverse-sqrt", "cosine"]


@dataclass(frozen=True)
class Splits(Theme):
    """What single partitions use."""

    labels_per_client: whole(1, 100) = 2
    """Labels of which a client holds images, k. Used by labels-per-client and random-labels."""
    size_exponent: real(0, 10) = 1.0
    """The client of size rank r holds images in proportion to r ** -size_exponent; 0: equal. Used
    by quantity."""
    rotation: real(0, 180) = 45.0
    """Degrees by which the first client's images are turned one way, and the last one's the other.
    Used by feature."""
    noise: real(0, 255) = 0.0
    """Standard deviation, in grey levels, of the noise on the last client's images; the first has
    none. Used by feature."""
    partition_file: str = ""
    """A partition.json, of a run or another program, whose split is used as it is. Implies
    `--partition file`."""


@dataclass(frozen=True)
class Optimization(Theme):
    """The algorithm, and what single algorithms and schedules of the learning rates use."""

    algorithm: AlgorithmName = "fedavg"
    """What clients and server do with the gradients and the updates. fedavg, fedsgd (one step on
    the whole shard) [McMahan et al. 2017]. fedprox [Li et al. 2020]. fedavgm: server momentum [Hsu
    et al. 2019]. fedadagrad, fedadam, fedyogi: adaptive servers [Reddi et al. 2021]. fednova:
    updates by their steps [Wang et al. 2020]. scaffold: control variates [Karimireddy et al. 2020].
    mimelite: the server's momentum on the clients [Karimireddy et al. 2021]. feddyn: dynamic
    regularization [Acar et al. 2021]."""
    client_optimizer: ClientOptimizerName = "sgd"
    """TFF's optimizer of the clients' local steps. Each client has its own, which starts at 0 every
    round."""
    client_momentum: real(0, 0.9999) = 0.9
    """Momentum of the client optimizer momentum."""
    weight_decay: Rate = 0.0
    """Added to a local step's gradient: weight_decay * w, as of the loss weight_decay / 2 * |w| **
    2."""
    server_momentum: real(0, 0.9999) = 0.9
    """Momentum, beta, of fedavgm and mimelite."""
    server_epsilon: Rate = 0.0
    """Tau of fedadagrad, fedadam and fedyogi, which is added to the root of the second moment; 0:
    the algorithm's own, 1e-3 of fedadam and fedyogi and 1e-6, inside the root, of fedadagrad."""
    prox_mu: Rate = 0.001
    """Weight, mu, of fedprox's pull back to the round's first weights; 0 is fedavg."""
    dyn_alpha: real(0.0001, 1000) = 0.001
    """Weight, alpha, of feddyn's pull back to the round's first weights; the server's correction is
    worth 1 / alpha."""
    client_schedule: Schedule = "constant"
    """How the clients' learning rate changes with the round t. exponential: lr_decay ** (t - 1).
    inverse-sqrt: t ** -0.5. cosine: from 1 to 0 over `lr_horizon` rounds."""
    server_schedule: Schedule = "constant"
    """The same as client_schedule, for the server's learning rate."""
    lr_decay: Probability = 0.99
    """Factor from round to round of an exponential schedule."""
    lr_horizon: Rounds = 100
    """Rounds in which a cosine schedule gets to 0."""


@dataclass(frozen=True)
class Aggregation(Theme):
    """How the clients' updates become one."""

    aggregator: AggregatorName = "mean"
    """How the clients' updates become one. mean: weighted by their numbers of examples. clipping,
    zeroing: the same of updates whose norm is cut, or that are dropped where they are very large,
    both adaptively [Andrew et al. 2021]. median, trimmed-mean [Yin et al. 2018], krum, multi-krum
    [Blanchard et al. 2017]: unweighted, against attackers. compressed: in 8 bits [Suresh et al.
    2017]. secure: the sums of secure aggregation [Bonawitz et al. 2017]; here that is its
    arithmetic, not its cryptography. dp: unweighted, clipped and noisy [McMahan et al. 2018]."""
    trim: real(0, 0.49) = 0.3
    """Share of the clients that trimmed-mean drops at each end of every coordinate."""
    tolerated: whole(0, 30_000) = 3
    """Attackers among a round's clients, f, that krum and multi-krum are to withstand; they need 2
    f + 3 clients."""


@dataclass(frozen=True)
class Privacy(Theme):
    """Differential privacy, with --aggregator dp."""

    noise_multiplier: real(0.01, 1000) = 0.5
    """Standard deviation of dp's noise over the norm that it clips to, z; below 0.1
    clients_per_round."""
    delta: real(1e-15, 0.5) = 1e-5
    """The delta for which dp's epsilon is told after each round."""
    epsilon_budget: Scale = 0.0
    """With dp, no round is begun that would bring epsilon above this; 0: no limit."""
    public_cohorts: bool = False
    """With dp, draw cohorts from the seed, as without dp, so that they repeat; whoever knows the
    seed knows them, and epsilon is counted without amplification by sampling. By default they come
    from the operating system's entropy."""


@dataclass(frozen=True)
class Adversity(Theme):
    """Clients that do not do what they should."""

    dropout: Probability = 0.0
    """Probability that a client of a round, which has got the weights, does not report."""
    stragglers: Probability = 0.0
    """Probability that a client of a round does but a random share of its local steps."""
    byzantine: SomeClients = 0
    """Clients that attack in every round that they are drawn for."""
    attack: Literal["label-flip", "sign-flip", "scaled", "gaussian", "nan"] = "sign-flip"
    """What they do. label-flip: train on label 9 - l for l. sign-flip: send their update backwards.
    scaled: send it `attack_scale` times. gaussian: send noise of `attack_scale` times its size.
    nan: send NaN."""
    attack_scale: Scale = 10.0
    """How large the attacks scaled and gaussian are."""


def find_files(config: Any) -> Any:
    """Return the configuration with its files by absolute paths, FL_DATA's too: its run resumes
    from anywhere."""
    files = {"data": config.data.data, "partition_file": config.splits.partition_file}
    if not config.run.resume and config.data.dataset == "mnist":
        files["data"] = files["data"] or os.environ.get("FL_DATA", "")
    return config.but(**{name: str(place(path).absolute()) for name, path in files.items() if path})


class Use(NamedTuple):
    """A field has an effect only if one of the fields `deciding` holds one of `values`; without
    values, any at all."""

    deciding: tuple[str, ...]
    values: tuple[str, ...] = ()

    def holds(self, chosen: dict[str, Any], rows: Sequence[str]) -> bool:
        """Return whether it does in the fields `chosen`, or in one of the `rows` that are
        compared."""
        held = [chosen[name] for name in self.deciding]
        if self.values:
            return not set(self.values).isdisjoint([*held, *rows])
        return any(held)

    def __str__(self) -> str:
        flags = " or ".join(f"--{name.replace('_', '-')}" for name in self.deciding)
        return f"{flags} {' or '.join(self.values)}".strip()


BY_SCHEDULE = ("client_schedule", "server_schedule")
USES: dict[
    str, tuple[Use, ...]
] = {  # what else must be chosen for a field to have an effect; rows name it as a flag
    "alpha": (
        Use(
            ("partition",),
            ("dirichlet", "capped-dirichlet", "client-dirichlet", "dirichlet-quantity"),
        ),
    ),
    "shards_per_client": (Use(("partition",), ("shards",)),),
    "labels_per_client": (Use(("partition",), ("labels-per-client", "random-labels")),),
    "size_exponent": (Use(("partition",), ("quantity",)),),
    "rotation": (Use(("partition",), ("feature",)),),
    "noise": (Use(("partition",), ("feature",)),),
    "client_momentum": (Use(("client_optimizer",), ("momentum",)),),
    "server_momentum": (Use(("algorithm",), ("fedavgm", "mimelite")),),
    "server_epsilon": (Use(("algorithm",), ("fedadagrad", "fedadam", "fedyogi")),),
    "prox_mu": (Use(("algorithm",), ("fedprox",)),),
    "dyn_alpha": (Use(("algorithm",), ("feddyn",)),),
    "lr_decay": (Use(BY_SCHEDULE, ("exponential",)),),
    "lr_horizon": (Use(BY_SCHEDULE, ("cosine",)),),
    "trim": (Use(("aggregator",), ("trimmed-mean",)),),
    "tolerated": (Use(("aggregator",), ("krum", "multi-krum")),),
    "attack": (Use(("byzantine",)),),
    "attack_scale": (Use(("byzantine",)), Use(("attack",), ("scaled", "gaussian"))),
    "data_name": (Use(("data",)),),
    "transpose": (Use(("data",)),),
    "accept_changes": (Use(("resume",)),),
    **{
        field: (Use(("aggregator",), ("dp",)),) for field in vars(Privacy())
    },  # these are refused without it
}


def unused(chosen: dict[str, Any], default: dict[str, Any]) -> dict[str, str]:
    """Return field -> what it would need, of the fields that differ from the default and have no
    effect."""
    rows = [name.strip() for name in chosen["compare"].split(",")]
    chosen = chosen | ({"partition": "file"} if chosen["partition_file"] else {})
    found = {}
    for field, uses in USES.items():
        missing = [use for use in uses if not use.holds(chosen, rows)]
        if missing and chosen[field] != default[field]:
            found[field] = " and ".join(map(str, missing))
    return found


def without_unused(chosen: dict[str, Any], default: dict[str, Any]) -> dict[str, Any]:
    """Return the default of each field that has no effect: two configurations that differ by it
    alone are one."""
    fixed = FIXED.get(chosen["algorithm"], {}) if chosen["compare"] == "" else {}
    return {field: default[field] for field in (*unused(chosen, default), *fixed)}


def tell_unused(config: Theme) -> list[str]:
    """Return a remark on each flag that has no effect."""
    chosen = config.flat()
    default = type(config)().flat()
    return [
        f"{field}={chosen[field]} has no effect here: it needs {needed}"
        for field, needed in unused(chosen, default).items()
    ]


def check_private_flags(chosen: dict[str, Any]) -> None:
    """Raise UserError for a flag of privacy in a run that is not private: its user would believe
    that it is."""
    default = Privacy().flat()
    for field, needed in unused(chosen, {**chosen, **default}).items():
        if field in default:
            raise UserError(
                f"{field}={chosen[field]} has no effect without {needed}, and the run would not be "
                f"private; add it, or drop --{field.replace('_', '-')}"
            )


# Algorithms whose rule is derived for plain SGD on the clients; fednova has one for momentum too.
NEED_SGD = {
    "fednova": ("sgd", "momentum"),
    "scaffold": ("sgd",),
    "mimelite": ("sgd",),
    "feddyn": ("sgd",),
}
# the fields that an algorithm is defined by
FIXED = {"fedsgd": {"local_epochs": 1, "batch_size": 0}}


def check_pairs(chosen: dict[str, Any], default: dict[str, Any]) -> None:
    """Raise UserError where flags do not go together; both arguments are field -> value."""
    algorithm = chosen["algorithm"]
    aggregator = chosen["aggregator"]
    clients = chosen["num_clients"]
    if chosen["dataset"] == "digits" and chosen["data"]:
        raise UserError(
            f"data={chosen['data']!r} replaces mnist and dataset='digits' is built in; drop one of "
            "the two"
        )
    if not chosen["data_name"].isprintable():
        raise UserError(
            f"data_name={chosen['data_name']!r:.60} has what no plot can show; choose letters and "
            "digits"
        )
    another = chosen["partition"] not in ("file", default["partition"])
    if another if chosen["partition_file"] else chosen["partition"] == "file":
        raise UserError(
            f"partition={chosen['partition']!r} with "
            f"partition_file={chosen['partition_file']!r:.60}; choose partition='file' with a "
            "file, or another without"
        )
    for field, choice in (
        ("clients_per_round", f"1..{clients}, or 0 for all"),
        ("byzantine", f"0..{clients}"),
    ):
        if chosen[field] > clients:
            raise UserError(
                f"{field}={chosen[field]} exceeds num_clients={clients}; choose {choice}"
            )
    for field, value in FIXED.get(algorithm, {}).items():
        if chosen[field] not in (value, default[field]):
            raise UserError(
                f"{field}={chosen[field]} clashes with algorithm={algorithm!r}, which is defined "
                f"by {field}={value}; drop one of the two"
            )
    allowed = NEED_SGD.get(algorithm, (chosen["client_optimizer"],))
    if chosen["client_optimizer"] not in allowed:
        raise UserError(
            f"client_optimizer={chosen['client_optimizer']!r} does not go with "
            f"algorithm={algorithm!r}, whose rule is for {' and '.join(allowed)}; choose another "
            "of the two"
        )
    if algorithm == "mimelite" and chosen["weight_decay"]:
        raise UserError(
            f"weight_decay={chosen['weight_decay']:g} does not go with algorithm='mimelite', which "
            "sends gradients of the loss alone; drop one of the two"
        )
    check_private_flags(chosen)
    cohort = chosen["clients_per_round"] or clients
    if aggregator in ("krum", "multi-krum"):
        check_krum(aggregator, cohort, chosen["tolerated"])
    if aggregator == "dp":
        check_privacy(chosen, cohort)
    if chosen["baselines"] and (aggregator == "dp" or chosen["compare"] or chosen["seeds"] > 1):
        other = (
            "aggregator='dp', which tells nothing of single clients"
            if aggregator == "dp"
            else "compare or seeds"
        )
        raise UserError(f"baselines=True does not go with {other}; drop one of the two")
    if aggregator in ("median", "trimmed-mean", "krum", "multi-krum") and algorithm == "fednova":
        raise UserError(
            f"aggregator={aggregator!r} does not go with algorithm={algorithm!r}, whose mean "
            "number of steps is a weighted one; choose another of the two"
        )


def check_krum(aggregator: str, cohort: int, tolerated: int) -> None:
    """Raise UserError where too few clients are in a round."""
    most = (cohort - 3) // 2
    if tolerated > most:
        raise UserError(
            f"tolerated={tolerated} of {cohort} clients a round is more than {aggregator} can "
            f"withstand; choose at most {max(most, 0)}, or more clients"
        )


def check_privacy(chosen: dict[str, Any], cohort: int) -> None:
    """Raise UserError where TFF cannot spread the noise, or the run would write when each round was
    done."""
    noise_multiplier = chosen["noise_multiplier"]
    if noise_multiplier >= 0.1 * cohort:
        raise UserError(
            f"noise_multiplier={noise_multiplier} is too high for {cohort} clients a round; choose "
            f"less than {0.1 * cohort:g}, or more clients"
        )
    if chosen["tensorboard"]:
        raise UserError(
            "tensorboard=True does not go with aggregator='dp': its events carry the time of each "
            "round, which tells how many images the clients drawn have; drop one of the two"
        )
