"""Which rows of a comparison differ: paired tests over the seeds, with Holm's correction."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import scipy.optimize
import scipy.stats

SIGNIFICANT = 0.05  # with a p below it two rows are told apart


def varies(difference: np.ndarray) -> bool:
    """Return whether paired differences float[seeds] have a variance to test with."""
    smallest = max(1e-9, 1e-6 * np.abs(difference).max())
    return len(difference) > 1 and bool(np.ptp(difference) >= smallest)


def paired_test(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """Return (mean of second - first, p of the paired t-test), for float[seeds] each.

    If all seeds differ by the same amount, p is NaN: there is no variance to test with. If none
    differs, p is 1.
    """
    difference = np.subtract(second, first)
    if not varies(difference):
        return float(difference.mean()), 1.0 if np.abs(difference).max() < 1e-9 else math.nan
    return float(difference.mean()), float(scipy.stats.ttest_rel(second, first).pvalue)


def half_width_of_mean(values: Sequence[float] | np.ndarray) -> float:
    """Return half the width of the 95 % interval of the mean of float[n], n > 1, by Student's t."""
    quantile = scipy.stats.t.ppf(1 - SIGNIFICANT / 2, len(values) - 1)
    return float(quantile * np.std(values, ddof=1) / math.sqrt(len(values)))


POWER = 0.8


def detectable_difference(sd: float, num_seeds: int) -> float:
    """Return the true mean difference that the paired t-test finds with a probability of POWER.

    `sd` is the standard deviation of the differences over the seeds, as float. The test is
    two-sided at the level SIGNIFICANT; its power follows from the noncentral t distribution
    (Cohen 1988, Statistical Power Analysis, chapter 2).
    """
    freedom = num_seeds - 1
    critical = scipy.stats.t.ppf(1 - SIGNIFICANT / 2, freedom)

    def lacking(noncentrality: float) -> float:
        above = scipy.stats.nct.sf(critical, freedom, noncentrality)
        below = scipy.stats.nct.cdf(-critical, freedom, noncentrality)
        return float(above + below) - POWER

    return float(scipy.optimize.brentq(lacking, 0.1, 30) * sd / math.sqrt(num_seeds))


def holm(ps: Sequence[float]) -> list[float]:
    """Adjust p-values of simultaneous tests by Holm (1979), in their order; NaN does not count."""
    adjusted = np.full(len(ps), math.nan)
    tests = np.flatnonzero(~np.isnan(ps))
    order = tests[np.argsort(np.asarray(ps)[tests], kind="stable")]
    steps = [(len(order) - rank) * ps[test] for rank, test in enumerate(order)]
    adjusted[order] = np.minimum(1, np.maximum.accumulate(steps)) if steps else []
    return adjusted.tolist()


class Difference(NamedTuple):
    """How far a row is from another, seed by seed."""

    mean: float
    p: float  # of the paired t-test; NaN if it is not testable
    adjusted_p: float  # by Holm's correction over all rows
    half_width: float  # of the 95 % interval of the mean; NaN if it is not testable
    detectable: float  # the least true difference that is found with power 0.8; NaN likewise


# The name of the row that all others are held against; of a grid, name -> such a row.
Base = str | dict[str, str]


def base_of(name: str, base: Base) -> str:
    """Return the name of the row that this one is held against."""
    return base if isinstance(base, str) else base[name]


def compare_outcomes(outcomes: Mapping[str, Sequence[float]], base: Base) -> dict[str, Difference]:
    """Return name -> its difference to its base, where that is another of the names.

    `outcomes` are float[seeds].
    """
    names = [name for name in outcomes if base_of(name, base) in outcomes.keys() - {name}]
    tests = [paired_test(outcomes[base_of(name, base)], outcomes[name]) for name in names]
    adjusted = holm([p for _, p in tests])
    found = {}
    for name, (mean, p), adjusted_p in zip(names, tests, adjusted, strict=True):
        difference = np.subtract(outcomes[name], outcomes[base_of(name, base)])
        half_width = math.nan
        detectable = math.nan
        if varies(difference):
            half_width = half_width_of_mean(difference)
            sd = float(np.std(difference, ddof=1))
            detectable = detectable_difference(sd, len(difference))
        found[name] = Difference(mean, p, adjusted_p, half_width, detectable)
    return found


def format_differences(
    outcomes: Mapping[str, Sequence[float]], base: Base, unit: str
) -> dict[str, str]:
    """Return name -> how far it is from its base, seed by seed, and if the seeds tell them apart.

    `outcomes` has float[seeds] by name. Of two tests and more each p is adjusted for all of them.
    Of one seed nothing can be said.
    """
    tests = compare_outcomes(outcomes, base)
    num_tested = sum(not math.isnan(test.p) for test in tests.values())
    method = "paired t-test" + (f", Holm over {num_tested} rows" if num_tested > 1 else "")
    texts = {}
    for name, test in tests.items():
        num_seeds = len(outcomes[name])
        own_base = base_of(name, base)
        difference = f"; {test.mean:+.2f} {unit} vs {own_base}"
        is_significant = test.adjusted_p < SIGNIFICANT
        if num_seeds < 2:
            texts[name] = ""
        elif not np.subtract(outcomes[name], outcomes[own_base]).any():
            texts[name] = f"; identical to {own_base} for every seed"
        elif math.isnan(test.p):
            texts[name] = f"{difference} for every seed, so not testable"
        else:
            low = test.mean - test.half_width
            high = test.mean + test.half_width
            verdict = "significant" if is_significant else "no significant difference"
            found = f"{method}, p {test.adjusted_p:.2g}"
            if not is_significant:
                found += f"; power 0.8 needs {test.detectable:.2g} {unit}"
            texts[name] = (
                f"{difference} (95 % CI {low:+.2f} to {high:+.2f}), {verdict} over {num_seeds} "
                f"seeds ({found})"
            )
    return texts
