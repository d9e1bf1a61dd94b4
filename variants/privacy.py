"""The epsilon ledger of central differential privacy: what the rounds done so far can tell about any one client.

Cohorts come from the operating system's entropy and are kept nowhere, as amplification by sampling rests on that; with
`--public-cohorts` they follow the seed, and epsilon is counted without it. `--epsilon-budget` ends the run before the
round that would pass it; algorithms that send more than the update are refused. Nothing about single clients is
written: no sizes, no training figures, no indices. Dropouts, stragglers and attackers leave epsilon true: whatever a
client sends is clipped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from harness.command_line import notice
from harness.fields import UserError
from variants.options import Privacy

import dp_accounting
import numpy as np


class Ledger(NamedTuple):
    """What rounds cost: `sampling` "poisson" or "fixed", `cohort` m of `num_clients` K a round.

    cohorts(round) are a round's clients where they are public, as they follow from the seed; None where they are drawn
    from the operating system's entropy and never published, which is what amplification by sampling rests on.

    Dropouts, stragglers and clients whose update is not finite change nothing: a client moves a round's sum by no more
    than the norm that it is clipped to, whatever it sends, nothing included; and an empty cohort's sum gets its noise.
    """

    privacy: Privacy
    sampling: str
    cohort: int
    num_clients: int
    cohorts: Callable[[int], Sequence[int]] | None = None

    def event(self) -> tuple[dp_accounting.DpEvent, dp_accounting.NeighboringRelation]:
        """Return a round's event, and what it means that two federations are neighbours.

        Every number is a Python float or int: TFF's own event holds float32 ones, of which dp-accounting 0.4.3 counts
        but the first. TFF releases the noisy sum of the clipped updates and, for the next clipping norm, the noisy
        share of updates below it, which together are one Gaussian of z (Andrew et al. 2021, theorem 1).

        poisson: clients come independently with probability m / K; neighbours differ by a client that is there or not.
        fixed: m of K without replacement; neighbours differ by a client replaced, which moves the sum by up to twice
        the norm that it is clipped to, so that the noise is worth z / 2.
        """
        z, poisson = float(self.privacy.noise_multiplier), self.sampling == "poisson"
        relations = dp_accounting.NeighboringRelation
        relation = relations.ADD_OR_REMOVE_ONE if poisson else relations.REPLACE_ONE
        noise = dp_accounting.GaussianDpEvent(z if poisson else z / 2)
        if self.cohorts:
            return noise, relation
        if poisson:
            return dp_accounting.PoissonSampledDpEvent(self.cohort / self.num_clients, noise), relation
        return dp_accounting.SampledWithoutReplacementDpEvent(self.num_clients, self.cohort, noise), relation

    def epsilon(self, rounds: int) -> float:
        """Return the epsilon of (epsilon, delta)-differential privacy after `rounds` rounds, by Renyi accounting.

        Where cohorts are public it is that of the client that was drawn most often.
        """
        counted = rounds
        if self.cohorts and rounds:
            drawn = np.concatenate([self.cohorts(round_num) for round_num in range(1, rounds + 1)]).astype(np.int64)
            counted = int(np.bincount(drawn, minlength=1).max())
        if counted == 0:
            return 0.0
        event, neighbours = self.event()
        accountant = dp_accounting.rdp.RdpAccountant(neighboring_relation=neighbours)
        return float(accountant.compose(event, counted).get_epsilon(self.privacy.delta))

    def within_budget(self, first: int, last: int) -> Iterator[tuple[int, float]]:
        """Yield (round, epsilon after it) from `first` to `last`, as far as the budget allows.

        Raises UserError where it allows no round at all.
        """
        budget = self.privacy.epsilon_budget
        for round_num in range(first, last + 1):
            epsilon = self.epsilon(round_num)
            if 0 < budget < epsilon:
                if round_num == 1:
                    raise UserError(
                        f"epsilon_budget={budget:g} allows no round, as the first costs {epsilon:.2f}; choose more, or "
                        "more noise_multiplier"
                    )
                reason = f"would bring ε to {epsilon:.2f}, above epsilon_budget={budget:g}"
                return notice(f"round {round_num} {reason}; the run ends before it")
            yield round_num, epsilon

    def assumption(self) -> str:
        """Return what the figure rests on, for captions."""
        kind = "a client replaced, sampling of fixed size"
        if self.sampling == "poisson":
            kind = "a client added or removed, Poisson sampling"
        known = "public cohorts, no amplification" if self.cohorts else "cohorts secret"
        return f"(ε, {self.privacy.delta:g})-DP of clients, {kind}, {known}, Rényi accounting"


def epsilon_by_round(ledger: Ledger | None, first: int, last: int) -> Iterator[tuple[int, float | None]]:
    """Yield (round, epsilon after it) from `first` to the last that the budget allows; None without a ledger."""
    if ledger:
        yield from ledger.within_budget(first, last)
    else:
        yield from ((round_num, None) for round_num in range(first, last + 1))
