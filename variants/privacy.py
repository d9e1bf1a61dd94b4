"""The epsilon ledger of central differential privacy: what the rounds done so far can tell about any one client."""

import functools
from typing import Any

import dp_accounting


def round_event(config: Any) -> tuple[dp_accounting.DpEvent, dp_accounting.NeighboringRelation]:
    """A round's event, and what it means that two federations are neighbours.

    Every number is a Python float or int: TFF's own event holds float32 ones, of which dp-accounting 0.4.3 counts but
    the first. TFF releases the noisy sum of the clipped updates and, for the next clipping norm, the noisy share of
    updates below it, which together are one Gaussian of `noise_multiplier` z (Andrew et al. 2021, theorem 1).

    poisson: clients come independently with probability m / K; neighbours differ by a client that is there or not.
    fixed: m of K without replacement; neighbours differ by a client replaced, which moves the sum by up to twice the
    norm that it is clipped to, so that the noise is worth z / 2.
    """
    z = float(config.noise_multiplier)
    if config.sampling == "poisson":
        event = dp_accounting.PoissonSampledDpEvent(
            config.cohort / config.num_clients, dp_accounting.GaussianDpEvent(z)
        )
        return event, dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE
    event = dp_accounting.SampledWithoutReplacementDpEvent(
        config.num_clients, config.cohort, dp_accounting.GaussianDpEvent(z / 2)
    )
    return event, dp_accounting.NeighboringRelation.REPLACE_ONE


@functools.lru_cache
def epsilon(config: Any, rounds: int) -> float:
    """The epsilon of (epsilon, `config.delta`)-differential privacy after `rounds` rounds, by Renyi accounting."""
    if rounds == 0:
        return 0.0
    event, neighbours = round_event(config)
    accountant = dp_accounting.rdp.RdpAccountant(neighboring_relation=neighbours)
    return float(accountant.compose(event, rounds).get_epsilon(config.delta))


def assumption(config: Any) -> str:
    """In words, what the figure rests on."""
    kind = "a client replaced, sampling of fixed size"
    if config.sampling == "poisson":
        kind = "a client added or removed, Poisson sampling"
    return f"(ε, {config.delta:g})-DP of clients, {kind}, Rényi accounting"
