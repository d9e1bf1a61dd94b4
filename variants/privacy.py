"""The epsilon ledger of central differential privacy: what the rounds begun so far can tell about
any one client.

Cohorts come from the operating system's entropy and are kept nowhere, as amplification by sampling
rests on that; with `--public-cohorts` they follow the seed, and epsilon is counted without it.
`--epsilon-budget` ends the run before the round that would pass it; algorithms that send more than
the update are refused. Dropouts, stragglers and attackers leave epsilon true: whatever a client
sends is clipped.

The noise has no seed: such a run does not repeat, and a round that is done again, after a kill or
from an earlier checkpoint, releases something new about the same clients. So a round is written to
the run's journal, rounds_begun.txt, before it begins, and epsilon counts it as often as it was
begun. It is that of one run: what two runs on the same clients release (two seeds, or two copies of
a folder that both go on) adds up.

A record of a private run holds what stands in harness.records.PUBLIC, and nothing about single
clients is written: no sizes, no training figures, no indices, no worker.log. The time of a round
tells how many images its cohort holds, and so who was drawn. It is in no file, on no line and in no
file's date (the date of the last change, which no program can set, tells the time of all rounds
together); but whoever watches the terminal, the processes or the shard files of this machine while
the run goes on can take it. Shards of one size would hide it (`--partition iid`), as would public
cohorts, whose epsilon does not rest on the secret.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from harness.command_line import notice
from harness.fields import UserError
from harness.files import append, read_bytes
from variants.options import Privacy

import dp_accounting
import numpy as np


class Ledger(NamedTuple):
    """What rounds cost: `sampling` "poisson" or "fixed", `cohort` m of `num_clients` K a round.

    cohorts(round) are a round's clients where they are public, as they follow from the seed; None
    where they are drawn from the operating system's entropy and never published, which is what
    amplification by sampling rests on.

    Dropouts, stragglers and clients whose update is not finite change nothing: a client moves a
    round's sum by no more than the norm that it is clipped to, whatever it sends, nothing included;
    and an empty cohort's sum gets its noise.
    """

    privacy: Privacy
    sampling: str
    cohort: int
    num_clients: int
    cohorts: Callable[[int], Sequence[int]] | None = None

    def events(self) -> tuple[list[dp_accounting.DpEvent], dp_accounting.NeighboringRelation]:
        """Return a round's event, each true, and what it means that two federations are neighbours.

        Every number is a Python float or int: TFF's own event holds float32 ones, of which
        dp-accounting 0.4.3 counts but the first. TFF releases the noisy sum of the clipped updates
        and, for the next clipping norm, the noisy share of updates below it, which together are one
        Gaussian of z (Andrew et al. 2021, theorem 1).

        poisson: clients come independently with probability m / K; neighbours differ by a client
        that is there or not. fixed: m of K without replacement; neighbours differ by a client
        replaced, which moves the sum by up to twice the norm that it is clipped to, so that the
        noise is worth z / 2.

        The first event is the Gaussian of a client that is drawn in every round. The second, where
        cohorts are secret, is amplified by sampling; Renyi accounting bounds a fixed size so
        loosely that this may be above the first.
        """
        z = float(self.privacy.noise_multiplier)
        poisson = self.sampling == "poisson"
        relations = dp_accounting.NeighboringRelation
        relation = relations.ADD_OR_REMOVE_ONE if poisson else relations.REPLACE_ONE
        noise = dp_accounting.GaussianDpEvent(z if poisson else z / 2)
        if self.cohorts:
            return [noise], relation
        if poisson:
            return [
                noise,
                dp_accounting.PoissonSampledDpEvent(self.cohort / self.num_clients, noise),
            ], relation
        sampled = dp_accounting.SampledWithoutReplacementDpEvent(
            self.num_clients, self.cohort, noise
        )
        return [noise, sampled], relation

    def epsilon(self, begun: Sequence[int]) -> float:
        """Return the epsilon of (epsilon, delta)-differential privacy of the rounds `begun`, by
        Renyi accounting.

        A round that was begun twice is counted twice, as its noise was drawn twice. Where cohorts
        are public it is the epsilon of the client that was drawn most often; where they are secret
        the lower of two bounds.
        """
        counted = len(begun)
        if self.cohorts and counted:
            drawn = np.concatenate([self.cohorts(round_num) for round_num in begun]).astype(
                np.int64
            )
            counted = int(np.bincount(drawn, minlength=1).max())
        if counted == 0:
            return 0.0
        events, neighbours = self.events()
        bounds = []
        for event in events:
            accountant = dp_accounting.rdp.RdpAccountant(neighboring_relation=neighbours)
            bounds.append(accountant.compose(event, counted).get_epsilon(self.privacy.delta))
        return float(min(bounds))

    def within_budget(
        self, first: int, last: int, journal: Path | None
    ) -> Iterator[tuple[int, float]]:
        """Yield (round, epsilon after it) from `first` to `last`, as far as the budget allows.

        A round is written to the journal, if there is one, before it begins. Raises UserError where
        the budget allows no round at all, or the journal lacks one that was done.
        """
        budget = self.privacy.epsilon_budget
        begun = read_journal(journal, first)
        for round_num in range(first, last + 1):
            epsilon = self.epsilon([*begun, round_num])
            if 0 < budget < epsilon:
                if not begun:
                    raise UserError(
                        f"epsilon_budget={budget:g} allows no round, as the first costs "
                        f"{epsilon:.2f}; choose more, or more noise_multiplier"
                    )
                reason = f"would bring ε to {epsilon:.2f}, above epsilon_budget={budget:g}"
                return notice(f"round {round_num} {reason}; the run ends before it")
            begun.append(round_num)
            if journal:
                append(journal, f"{round_num}\n", sync=True)
            yield round_num, epsilon

    def assumption(self) -> str:
        """Return what the figure rests on, for captions."""
        kind = "a client replaced, sampling of fixed size"
        if self.sampling == "poisson":
            kind = "a client added or removed, Poisson sampling"
        known = "public cohorts, no amplification" if self.cohorts else "cohorts secret"
        return f"(ε, {self.privacy.delta:g})-DP of clients, {kind}, {known}, Rényi accounting"


WEAK = 10.0  # an epsilon above it is a bound that protects hardly anybody


def remark(ledger: Ledger | None, rounds: int) -> list[str]:
    """Return what the user should know of the epsilon of so many rounds, before they are done."""
    if (
        ledger is None
        or (end := ledger.epsilon(range(1, rounds + 1))) <= WEAK
        or ledger.privacy.epsilon_budget
    ):
        return []
    cure = (
        "more clients (--num-clients, --clients-per-round) with a larger --noise-multiplier lower "
        "it"
    )
    return [
        f"ε will be {end:.1f} after {rounds} rounds, a bound that protects hardly anybody; {cure}"
    ]


def read_journal(journal: Path | None, first: int) -> list[int]:
    """Return the rounds that were begun before round `first`, each as often as it was; without a
    journal, once each.

    Raises UserError where the journal lacks one of them: epsilon could not be told.
    """
    if journal is None:
        return list(range(1, first))
    try:
        begun = (
            [int(line) for line in read_bytes(journal).decode().splitlines()]
            if journal.exists()
            else []
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"{journal} cannot be read, so epsilon is not known; restore it, or start a new run"
        ) from error
    missing = set(range(1, first)) - set(begun)
    if missing:
        raise UserError(
            f"{journal} lacks round {min(missing)}, so epsilon is not known; restore it, or start "
            "a new run"
        )
    return begun


def epsilon_by_round(
    ledger: Ledger | None, first: int, last: int, journal: Path | None = None
) -> Iterator[tuple[int, float | None]]:
    """Yield (round, epsilon after it) from `first` to the last that the budget allows; None without
    a ledger."""
    if ledger:
        yield from ledger.within_budget(first, last, journal)
    else:
        yield from ((round_num, None) for round_num in range(first, last + 1))
