"""Does a small run predict a large one? Published gains beside the worth of the same changes here.

    python -m records.transfer GAINS NUMBERS --lengths GROUP... [--format markdown]

GAINS is a CSV file with the columns `group`, `kind`, `gain` and `public`: the name of a group in NUMBERS;
`add` (that group has the change) or `remove` (it lacks it); how many percent of its steps the change saved
there at equal loss; where that stands. Further columns are not read. NUMBERS and --lengths are those of
`python -m records.compare worth`; the first group is the baseline.

Prints the ideas in the order of their published gains, with ours by the same measure and its 95 % limits,
then Spearman's and Kendall's rank correlation with p by permutation, and the 95 % interval of Spearman's from
a bootstrap over the ideas, in which ours vary by their errors once more, so that it is rather too wide.
"""

import csv
import io
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cli import UserError, arguments, command, need, one_line, path_flag
from records.compare import baseline_slope, number, shared_differences
from records.files import extra, read_text, say
from records.groups import Group, read_groups
from records.stats import Sample, Slope, worth
from records.tables import FORMATS, table

COLUMNS = ("group", "kind", "gain", "public")
DRAWS = 10_000
MOST_IDEAS = 1000


@dataclass(frozen=True)
class Idea:
    group: str
    removes: bool
    gain: float  # percent of steps, published
    public: str  # where


@dataclass(frozen=True)
class Worth:
    """Percent of steps that an idea saves here: estimate, and its 95 % limits."""

    gain: float
    low: float
    high: float


def read_ideas(path: Path) -> list[Idea]:
    rows = csv.DictReader(io.StringIO(read_text(path)), strict=True)
    ideas: list[Idea] = []
    try:
        missing = [name for name in COLUMNS if name not in (rows.fieldnames or ())]
        need(not missing, f"{path}: no column {', '.join(missing)} in its first line")
        for row in rows:
            where = f"{path}, line {rows.line_num}"
            group, kind, gain, public = (one_line(row[name] or "") for name in COLUMNS)
            need(kind in ("add", "remove"), f"{where}: kind is {kind!r}; give add or remove")
            ideas.append(Idea(group, kind == "remove", percent(gain, where), public))
            need(len(ideas) <= MOST_IDEAS, f"{path}: more than {MOST_IDEAS} lines; give fewer")
    except csv.Error as error:
        raise UserError(f"{path}: no CSV file ({error})") from None
    names = [idea.group for idea in ideas]
    twice = sorted({name for name in names if names.count(name) > 1})
    need(not twice, f"{path}: {', '.join(twice)} stands there twice")
    return ideas


def percent(text: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    need(-1000 < value < 100, f"{where}: gain is {text!r}; give percent of steps, under 100")
    return value


def saved(removes: bool, x: float) -> float:
    """Percent of steps that an idea saves, from ln(steps / baseline's) of the group that has or lacks it."""
    return 100 * (1 - math.exp(x if removes else -x))


def worth_here(idea: Idea, first: Group, group: Group, slope: Slope) -> Worth:
    differences = Sample.of(list(shared_differences(first, group).values()))
    need(differences.n > 1, f"{group.name}: fewer than two seeds in common with {first.name}")
    gain, *limits = (saved(idea.removes, x) for x in worth(differences, slope))
    return Worth(gain, min(limits), max(limits))


def correlations(public: list[float], here: list[Worth], seed: int = 0) -> dict[str, float]:
    """Spearman's rho and Kendall's tau, their p by permutation, and the limits of rho."""
    scipy_stats, random = extra("scipy.stats"), np.random.default_rng(seed)
    ours = np.array([one.gain for one in here])
    theirs = np.array(public)
    found = {}
    for name, statistic in (("rho", scipy_stats.spearmanr), ("tau", scipy_stats.kendalltau)):
        found[name] = float(statistic(theirs, ours).statistic)
        shuffled = [statistic(theirs, random.permutation(ours)).statistic for _ in range(DRAWS // 5)]
        found[f"{name} p"] = (1 + np.sum(np.abs(shuffled) >= abs(found[name]) - 1e-12)) / (1 + len(shuffled))
    errors = np.array([(one.high - one.low) / 4 for one in here])
    drawn = []
    for _ in range(DRAWS):
        chosen = random.integers(len(ours), size=len(ours))
        noisy = ours[chosen] + errors[chosen] * random.standard_normal(len(ours))
        if len(set(theirs[chosen])) > 1:
            ranks = scipy_stats.rankdata(theirs[chosen]), scipy_stats.rankdata(noisy)
            drawn.append(np.corrcoef(*ranks)[0, 1])
    found["rho low"], found["rho high"] = np.percentile(drawn, (2.5, 97.5))
    return found


def compared(ideas: list[Idea], first: Group, groups: dict[str, Group], slope: Slope, form: str) -> str:
    known = sorted((idea for idea in ideas if idea.group in groups), key=lambda idea: -idea.gain)
    need(len(known) > 3, f"{len(known)} ideas stand in both files; a rank correlation wants four or more")
    here = [worth_here(idea, first, groups[idea.group], slope) for idea in known]
    ranks = extra("scipy.stats").rankdata([-one.gain for one in here])
    rows = []
    for idea, one, rank in zip(known, here, ranks, strict=True):
        shown = [number(value, 1) for value in (idea.gain, one.gain, one.low, one.high)]
        rows.append([idea.group, "remove" if idea.removes else "add", *shown, f"{rank:g}", idea.public])
    head = ["group", "kind", "there %", "here %", "from", "to", "rank here", "public"]
    found = correlations([idea.gain for idea in known], here)
    note = (
        f"{len(known)} ideas; Spearman's rho {found['rho']:.2f} (95 % from {found['rho low']:.2f} to "
        f"{found['rho high']:.2f}), p {found['rho p']:.4f}; Kendall's tau {found['tau']:.2f}, "
        f"p {found['tau p']:.4f}"
    )
    missing = [idea.group for idea in ideas if idea.group not in groups]
    return "\n".join(
        [
            table(head, rows, form, left=(0, 1, 7)),
            "",
            note,
            *([f"without numbers here: {', '.join(missing)}"] if missing else []),
        ]
    )


def main(argv: list[str]) -> None:
    parser = arguments(__doc__)
    parser.add_argument("gains", type=path_flag, metavar="GAINS")
    parser.add_argument("groups", nargs="+", metavar="NUMBERS", help="or folders of logs; the baseline first")
    parser.add_argument("--lengths", nargs="+", required=True, metavar="GROUP")
    parser.add_argument("--format", choices=FORMATS[:2], default="text")
    args = parser.parse_intermixed_args(argv)
    ideas = read_ideas(args.gains)
    found = read_groups(args.groups, None, "val_loss")
    named = {group.name: group for group in found}
    missing = [name for name in args.lengths if name not in named]
    need(not missing, f"--lengths {' '.join(missing)}: no such group in {' '.join(args.groups)}")
    for group in found:
        need(group.by_seed, f"{group.name}: its runs name no seeds, or one twice")
    slope = baseline_slope(found[0], [named[name] for name in args.lengths])
    say(compared(ideas, found[0], named, slope, args.format))


if __name__ == "__main__":
    command(main)
