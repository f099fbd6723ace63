"""The statistics of runs: t-tests of samples, Holm's correction, how many runs an effect needs."""

import math
import statistics
from dataclasses import dataclass

from records.files import extra

NO_SPREAD = 1e-9  # a deviation under this share of the mean is rounding, not variance: no test can use it
MOST_RUNS = 100_000


@dataclass(frozen=True)
class Sample:
    """Numbers, or what is known of them: how many, mean, deviation (n - 1; nan if there is just one)."""

    n: int
    mean: float
    std: float
    values: tuple[float, ...] = ()

    @staticmethod
    def of(values: list[float]) -> "Sample":
        if not values:
            return Sample(0, math.nan, math.nan)
        if not all(map(math.isfinite, values)):
            return Sample(len(values), math.nan, math.nan, tuple(values))
        std = statistics.stdev(values) if len(values) > 1 else math.nan
        return Sample(len(values), statistics.fmean(values), std, tuple(values))

    @property
    def varies(self) -> bool:
        return self.n > 1 and math.isfinite(self.std) and self.std > NO_SPREAD * max(1.0, abs(self.mean))


def below(sample: Sample, target: float) -> float:
    """p that a mean as low comes by chance if the true one is target: one-sided one-sample t-test.

    nan for one number, or numbers that do not vary.
    """
    if not sample.varies:
        return math.nan
    t = (sample.mean - target) / (sample.std / math.sqrt(sample.n))
    return float(extra("scipy.stats").t.cdf(t, sample.n - 1))


def welch(a: Sample, b: Sample) -> float:
    """p of Welch's t-test, two-sided; nan where one of the two has a single number, or neither varies."""
    known = min(a.n, b.n) > 1 and math.isfinite(a.mean + a.std + b.mean + b.std)
    if not known or not (a.varies or b.varies):
        return math.nan
    test = extra("scipy.stats").ttest_ind_from_stats
    return float(test(a.mean, a.std, a.n, b.mean, b.std, b.n, equal_var=False).pvalue)


def differences_by_seed(a: dict[int, float], b: dict[int, float]) -> Sample:
    """b less a, of the seeds that both have."""
    return Sample.of([b[seed] - a[seed] for seed in sorted(a.keys() & b.keys())])


def paired(a: dict[int, float], b: dict[int, float]) -> float:
    """p of a paired t-test over the seeds that both have, two-sided.

    nan for fewer than two, or differences that do not vary.
    """
    return unlike_zero(differences_by_seed(a, b))


def unlike_zero(sample: Sample) -> float:
    """p of a one-sample t-test against 0, two-sided; nan as `below`."""
    p = below(sample, 0)
    return math.nan if math.isnan(p) else min(1.0, 2 * min(p, 1 - p))


def holm(values: list[float]) -> list[float]:
    """Holm's correction for many tests; nan stays and does not count."""
    known = [n for n, p in enumerate(values) if not math.isnan(p)]
    order = sorted(known, key=lambda n: values[n])
    corrected, largest = list(values), 0.0
    for rank, n in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * values[n]))
        corrected[n] = largest
    return corrected


def stars(p: float) -> str:
    if p < 0.01:
        return "**"
    return "*" if p < 0.05 else ""


@dataclass(frozen=True)
class Slope:
    """How losses fall where a run is made longer: by value * ln(steps / baseline's steps), value < 0."""

    value: float
    error: float  # its standard error
    low: float  # the least and the largest ln(steps / baseline's steps) that it was fitted to
    high: float


def slope_of(points: list[tuple[float, float]]) -> Slope:
    """Least squares through the origin of (ln of the ratio of steps, change of the loss), a point a run."""
    squares = sum(x * x for x, _ in points)
    value = sum(x * y for x, y in points) / squares
    left = sum((y - value * x) ** 2 for x, y in points)
    error = math.sqrt(left / max(1, len(points) - 1) / squares)
    return Slope(value, error, min(x for x, _ in points), max(x for x, _ in points))


def in_steps(differences: Sample, slope: Slope, level: float = 0.95) -> tuple[float, float, float]:
    """What a change of losses is in steps: ln(steps / baseline's steps) with which the baseline has it too.

    differences: the changed run's loss less that of the baseline's run with the same seed. Returns the
    estimate and its limits at `level`, which hold the errors of both, to first order and as if independent.
    """
    x = differences.mean / slope.value
    error = math.hypot(differences.std / math.sqrt(differences.n), x * slope.error) / abs(slope.value)
    reach = float(extra("scipy.stats").t.ppf((1 + level) / 2, differences.n - 1)) * error
    return x, x - reach, x + reach


TESTS = {
    "two groups": "Welch's test of two groups of so many runs each, two-sided",
    "by seed": "paired test over so many shared seeds, two-sided; sd is that of the differences",
    "target": "whether the mean of so many runs is under a target, one-sided",
}


def power(test: str, n: int, effect: float, sd: float, alpha: float) -> float:
    """Chance that a test of n >= 2 runs finds an effect > 0 at level alpha, if losses scatter with sd."""
    scipy_stats = extra("scipy.stats")
    if test == "two groups":
        freedom, shift = 2 * n - 2, effect / (sd * math.sqrt(2 / n))
        limits = scipy_stats.t.ppf(1 - alpha / 2, welch_freedoms(n))
    else:
        freedom, shift = n - 1, effect / (sd / math.sqrt(n))
        limits = [scipy_stats.t.ppf(1 - (alpha if test == "target" else alpha / 2), freedom)]
    found = [float(value) for value in scipy_stats.nct.sf(limits, freedom, shift)]
    known = [
        value if math.isfinite(value) else float(shift > limit)
        for value, limit in zip(found, limits, strict=True)
    ]
    return statistics.fmean(known)


def welch_freedoms(n: int) -> list[float]:
    """The degrees of freedom that Welch's test of two groups of n >= 2 runs finds: 200, equally likely.

    They depend on how the two variances share their sum, which t does not depend on: a beta distribution.
    """
    places = [(k + 0.5) / 200 for k in range(200)]
    shares = extra("scipy.stats").beta.ppf(places, (n - 1) / 2, (n - 1) / 2)
    return [(n - 1) / (share**2 + (1 - share) ** 2) for share in shares]


def runs_needed(test: str, effect: float, sd: float, alpha: float, wanted: float) -> int | None:
    """The least n with that power; None if it is more than MOST_RUNS."""
    low, high = 1, 2
    while power(test, high, effect, sd, alpha) < wanted:
        low, high = high, 2 * high
        if high > MOST_RUNS:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        if power(test, middle, effect, sd, alpha) < wanted:
            low = middle
        else:
            high = middle
    return high
