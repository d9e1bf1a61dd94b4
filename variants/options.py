"""The flags that only variants use, by theme, and the pairs of flags that do not go together. No TensorFlow here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from harness.fields import Probability, Rate, Rounds, Scale, SomeClients, Theme, UserError, real, whole

Schedule = Literal["constant", "exponential", "inverse-sqrt", "cosine"]


@dataclass(frozen=True)
class Optimization(Theme):
    """What single algorithms and schedules of the learning rates use."""

    server_momentum: real(0, 0.9999) = 0.9
    """Momentum, beta, of fedavgm and mimelite."""
    prox_mu: Rate = 0.001
    """Weight, mu, of fedprox's pull back to the round's first weights; 0 is fedavg."""
    dyn_alpha: real(0.0001, 1000) = 0.01
    """Weight, alpha, of feddyn's pull back to the round's first weights; the server's correction is worth 1 / alpha."""
    client_schedule: Schedule = "constant"
    """How the clients' learning rate changes with the round t. exponential: lr_decay ** (t - 1). inverse-sqrt:
    t ** -0.5. cosine: from 1 to 0 over `lr_horizon` rounds."""
    server_schedule: Schedule = "constant"
    """The same as client_schedule, for the server's learning rate."""
    lr_decay: Probability = 0.99
    """Factor from round to round of an exponential schedule."""
    lr_horizon: Rounds = 100
    """Rounds in which a cosine schedule gets to 0."""


@dataclass(frozen=True)
class Robustness(Theme):
    """Aggregators that withstand attackers."""

    trim: real(0, 0.49) = 0.3
    """Share of the clients that trimmed-mean drops at each end of every coordinate."""
    tolerated: whole(0, 30_000) = 3
    """Attackers among a round's clients, f, that krum and multi-krum are to withstand; they need 2 f + 3 clients."""


@dataclass(frozen=True)
class Privacy(Theme):
    """Differential privacy, with --aggregator dp."""

    noise_multiplier: real(0.01, 1000) = 0.5
    """Standard deviation of dp's noise over the norm that it clips to, z; below 0.1 clients_per_round."""
    delta: real(1e-15, 0.5) = 1e-5
    """The delta for which dp's epsilon is told after each round."""
    epsilon_budget: Scale = 0.0
    """With dp, no round is begun that would bring epsilon above this; 0: no limit."""


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
    """What they do. label-flip: train on label 9 - l for l. sign-flip: send their update backwards. scaled: send it
    `attack_scale` times. gaussian: send noise of `attack_scale` times its size. nan: send NaN."""
    attack_scale: Scale = 10.0
    """How large the attacks scaled and gaussian are."""


FIXED = {"fedsgd": {"local_epochs": 1, "batch_size": 0}}  # the fields that an algorithm is defined by
SENDS_MORE = ("fednova", "mimelite", "scaffold", "feddyn")  # than the update


def check_pairs(chosen: dict[str, Any], cohort: int, default: Any) -> None:
    """Raise UserError where flags do not go together. `chosen` is field -> value, `cohort` is m."""
    algorithm, aggregator = chosen["algorithm"], chosen["aggregator"]
    for field, value in FIXED.get(algorithm, {}).items():
        if chosen[field] not in (value, getattr(default, field)):
            raise UserError(
                f"{field}={chosen[field]} clashes with algorithm={algorithm!r}, which is defined by {field}={value}; "
                "drop one of the two"
            )
    if aggregator in ("krum", "multi-krum"):
        check_krum(aggregator, cohort, chosen["tolerated"])
    if aggregator == "dp":
        check_privacy(algorithm, cohort, chosen["noise_multiplier"])
    if aggregator in ("median", "trimmed-mean", "krum", "multi-krum") and algorithm == "fednova":
        raise UserError(
            f"aggregator={aggregator!r} does not go with algorithm={algorithm!r}, whose mean number of steps is a "
            "weighted one; choose another of the two"
        )


def check_krum(aggregator: str, cohort: int, tolerated: int) -> None:
    """Raise UserError where too few clients are in a round."""
    most = (cohort - 3) // 2
    if tolerated > most:
        raise UserError(
            f"tolerated={tolerated} of {cohort} clients a round is more than {aggregator} can withstand; choose at "
            f"most {max(most, 0)}, or more clients"
        )


def check_privacy(algorithm: str, cohort: int, noise_multiplier: float) -> None:
    """Raise UserError where epsilon would not count all that clients send, or TFF cannot spread the noise."""
    if algorithm in SENDS_MORE:
        raise UserError(
            f"algorithm={algorithm!r} sends more than the update to which aggregator='dp' adds noise, and epsilon "
            "would be false; choose another of the two"
        )
    if noise_multiplier >= 0.1 * cohort:
        raise UserError(
            f"noise_multiplier={noise_multiplier} is too high for {cohort} clients a round; choose less than "
            f"{0.1 * cohort:g}, or more clients"
        )
