"""How many steps a change is worth: the share of the baseline's steps that gives the same loss.

    python -m records.worth GROUP GROUP... --lengths GROUP... [--out FILE.png] [--public GAINS.csv]

GROUPs are those of records.compare, the baseline first; --lengths are the baseline with other numbers of
steps, a group for each: names of some of the GROUPs, or further ones. Groups are compared by the seeds that
they share, and a difference of losses becomes steps by the slope that --lengths show, on ln(steps). --out
draws what is printed.

--public lays published gains beside: a CSV file with the columns `group`, `kind`, `gain` and `public`: a
group's name; `add` (it has the change) or `remove` (it lacks it); how many percent of its steps the change
saved there at equal loss; where that stands. Further columns are not read. Printed are the ideas in the order
of their published gains, with ours by the same measure, then Spearman's and Kendall's rank correlation with p
by permutation, and the 95 % interval of Spearman's from a bootstrap over the ideas, in which ours vary by
their errors once more, so that it is rather too wide.
"""

import argparse
import csv
import io
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from cli import UserError, arguments, command, need, one_line, path_flag, show_notes, text_flag
from records.compare import number
from records.files import extra, read_text, say, warn
from records.groups import Group, comparison_warnings, numbers_text, read_groups
from records.plot import canvas, in_words, save
from records.stats import Sample, Slope, differences_by_seed, holm, in_steps, paired, slope_of, stars
from records.tables import FORMATS, table

COLUMNS = ("group", "kind", "gain", "public")  # of a file of published gains
DRAWS = 10_000  # of the bootstrap; a fifth as many permutations
MOST_IDEAS = 1000
MOST_LN = 50.0  # of a ratio of steps: what is beyond is no number of steps any more


@dataclass(frozen=True)
class Worth:
    """A group against the baseline: its losses by seed, and ln(steps / baseline's steps) that equals it."""

    name: str
    differences: Sample
    p: float  # of a paired test
    p_holm: float
    x: float
    low: float
    high: float
    is_beyond: bool  # outside of the lengths that were run


def baseline_slope(first: Group, lengths: list[Group]) -> Slope:
    """From the first group's runs and the same with other numbers of steps. UserError if that is not so."""
    points = []
    for group in lengths:
        need(
            len(first.steps) == len(group.steps) == 1 and group.steps != first.steps,
            f"{group.name} has {group.steps_text} steps, {first.name} {first.steps_text}; "
            "--lengths are the first group with another number of steps each",
        )
        for one in (first, group):
            need(one.steps[0] > 0, f"{one.name} has 0 steps; --lengths compares runs of 1 or more")
        x = math.log(group.steps[0] / first.steps[0])
        points += [(x, difference) for difference in differences_by_seed(first.by_seed, group.by_seed).values]
    need(len(points) > 1, f"--lengths share fewer than two seeds with {first.name}")
    slope = slope_of(points)
    need(slope.value < 0, f"{first.name} does not get better with more steps; nothing to compare with")
    return slope


def worth_of(first: Group, others: list[Group], slope: Slope) -> list[Worth]:
    found = []
    values = [paired(first.by_seed, group.by_seed) for group in others]
    for group, p, p_holm in zip(others, values, holm(values), strict=True):
        differences = differences_by_seed(first.by_seed, group.by_seed)
        assert differences.n > 1, f"{group.name}: {differences}"
        x, low, high = (max(-MOST_LN, min(MOST_LN, value)) for value in in_steps(differences, slope))
        is_beyond = not min(slope.low, 0) <= x <= max(slope.high, 0)
        found.append(Worth(group.name, differences, p, p_holm, x, low, high, is_beyond))
    return found


def worth_table(found: list[Worth], form: str = "text") -> str:
    rows = []
    for one in found:
        numbers = [number(v, 4) for v in (one.differences.mean, one.differences.std, one.p, one.p_holm)]
        share, low, high = (number(100 * math.exp(x), 1) for x in (one.x, one.low, one.high))
        share = "~" * one.is_beyond + share
        rows.append([one.name, str(one.differences.n), *numbers, stars(one.p_holm), share, low, high])
    head = ["group", "seeds", "loss Δ", "σ of Δ", "p by seed", "p Holm", "sig", "as good as % of steps"]
    return table([*head, "from", "to"], rows, form, left=(0, 6))


def worth_note(first: Group, lengths: list[Group], slope: Slope) -> str:
    steps = ", ".join(group.steps_text for group in sorted(lengths, key=lambda group: group.steps))
    return (
        f"{first.name} at {first.steps_text} steps, and at {steps}: 1 % more steps lower its loss by "
        f"{-slope.value / 100:.5f} (± {slope.error / 100:.5f})\n"
        "as good as %: the share of the first group's steps that gives the same loss, and its 95 % limits;\n"
        "~ outside of what was run. p Holm decides, a paired test by seed, corrected for the number of lines"
    )


def draw_worth(found: list[Worth], first: Group, title: str, out: Path) -> None:
    """A line a group: the share of steps, with its limits; the least above."""
    figure, axes = canvas(out)
    figure.set_figheight(1.6 + 0.3 * len(found))
    ordered = sorted(found, key=lambda one: one.x)
    for row, one in enumerate(ordered):
        share, low, high = (100 * math.exp(x) for x in (one.x, one.low, one.high))
        sure = one.p_holm < 0.01
        color = ("tab:red" if one.x < 0 else "tab:green") if sure else "grey"
        axes.plot([low, high], [row, row], color=color, linewidth=2, solid_capstyle="butt")
        axes.plot([share], [row], "o", color=color, markerfacecolor=color if sure else "white")
    axes.axvline(100, color="black", linewidth=0.8)
    axes.set_yticks(range(len(ordered)), [in_words(one.name) for one in ordered], fontsize="small")
    axes.set_ylim(len(ordered) - 0.5, -0.5)
    axes.set_xlabel(f"as good as {first.name} with so many percent of its steps")
    note = "bars: 95 % limits; filled: p < 0.01, paired by seed and corrected by Holm"
    figure.supxlabel(note, fontsize="small")
    axes.grid(alpha=0.3, axis="x")
    figure.suptitle(title or "How many steps is each change worth?")
    save(figure, out)


# ---- published gains


@dataclass(frozen=True)
class Idea:
    group: str
    removes: bool
    gain: float  # percent of steps, published
    public: str  # where


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


@dataclass(frozen=True)
class Saving:
    """Percent of steps that an idea saves here, and its limits, as gains are published."""

    idea: Idea
    here: float
    low: float
    high: float


def savings(ideas: list[Idea], worths: list[Worth]) -> list[Saving]:
    """Of the ideas that have a group, those that saved most there first."""
    found, by_name = [], {one.name: one for one in worths}
    for idea in sorted((idea for idea in ideas if idea.group in by_name), key=lambda idea: -idea.gain):
        one = by_name[idea.group]
        here, *limits = (100 * (1 - math.exp(x if idea.removes else -x)) for x in (one.x, one.low, one.high))
        found.append(Saving(idea, here, min(limits), max(limits)))
    need(len(found) > 3, f"{len(found)} published ideas have a group here; ranks want four or more")
    return found


def correlations(theirs: list[float], ours: list[float], errors: list[float]) -> dict[str, float]:
    """Spearman's rho and Kendall's tau, their p by permutation, and the limits of rho."""
    scipy_stats, random = extra("scipy.stats"), np.random.default_rng(0)
    theirs, ours, errors = (np.array(values) for values in (theirs, ours, errors))
    found = {}
    for name, statistic in (("rho", scipy_stats.spearmanr), ("tau", scipy_stats.kendalltau)):
        found[name] = float(statistic(theirs, ours).statistic)
        shuffled = [statistic(theirs, random.permutation(ours)).statistic for _ in range(DRAWS // 5)]
        found[f"{name} p"] = (1 + np.sum(np.abs(shuffled) >= abs(found[name]) - 1e-12)) / (1 + len(shuffled))
    drawn = []
    for _ in range(DRAWS):
        chosen = random.integers(len(ours), size=len(ours))
        noisy = ours[chosen] + errors[chosen] * random.standard_normal(len(ours))
        if len(set(theirs[chosen])) > 1:
            drawn.append(np.corrcoef(*map(scipy_stats.rankdata, (theirs[chosen], noisy)))[0, 1])
    found["rho low"], found["rho high"] = np.percentile(drawn, (2.5, 97.5))
    return found


def beside_published(found: list[Saving], ideas: list[Idea], form: str) -> str:
    ranks = extra("scipy.stats").rankdata([-one.here for one in found])
    rows = []
    for one, rank in zip(found, ranks, strict=True):
        kind = "remove" if one.idea.removes else "add"
        shown = [number(value, 1) for value in (one.idea.gain, one.here, one.low, one.high)]
        rows.append([one.idea.group, kind, *shown, f"{rank:g}", one.idea.public])
    head = ["group", "kind", "there %", "here %", "from", "to", "rank here", "public"]
    r = correlations(
        [one.idea.gain for one in found],
        [one.here for one in found],
        [(one.high - one.low) / 4 for one in found],
    )
    lines = [
        f"{len(found)} ideas; Spearman's rho {r['rho']:.2f} (95 % from {r['rho low']:.2f} to "
        f"{r['rho high']:.2f}), p {r['rho p']:.4f}; Kendall's tau {r['tau']:.2f}, p {r['tau p']:.4f}"
    ]
    known = {one.idea.group for one in found}
    missing = [idea.group for idea in ideas if idea.group not in known]
    lines += [f"without numbers here: {', '.join(missing)}"] * bool(missing)
    return "\n".join([table(head, rows, form, left=(0, 1, 7)), "", *lines])


def draw_published(found: list[Saving], title: str, out: Path) -> None:
    """A point an idea: what it saved there, and what it saves here, with its limits."""
    figure, axes = canvas(out)
    figure.set_figheight(7)
    for n, one in enumerate(reversed(found)):
        there = one.idea.gain
        axes.plot([there, there], [one.low, one.high], color="grey", linewidth=1)
        axes.plot([there], [one.here], "o", color="tab:blue")
        label = one.idea.group.partition("-")[2] or one.idea.group
        place = dict(textcoords="offset points", va="center", ha="left" if n % 2 else "right")
        axes.annotate(label, (there, one.here), (7 if n % 2 else -7, 0), **place, fontsize="small")
    reach = max(max(abs(one.idea.gain), abs(one.here)) for one in found)
    axes.plot([0, reach], [0, reach], color="black", linewidth=0.8, label="the same here as there")
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set_xscale("symlog", linthresh=1)
    axes.set_yscale("symlog", linthresh=1)
    axes.set_xlim(min(0.0, *(one.idea.gain for one in found)) - 0.2, 1.5 * reach)
    axes.set_xlabel("percent of steps saved there, as published")
    axes.set_ylabel("percent of steps saved here, and 95 % limits")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(extra("matplotlib.ticker").FuncFormatter(lambda value, _: f"{value:g}"))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.suptitle(title or "Do changes save here what they saved there?")
    save(figure, out)


# ---- the command


def flags() -> argparse.ArgumentParser:
    parser = arguments(__doc__)
    parser.add_argument("groups", nargs="+", metavar="GROUP")
    parser.add_argument("--lengths", nargs="+", required=True, metavar="GROUP")
    parser.add_argument("--public", type=path_flag, metavar="GAINS", help="published gains, a CSV file")
    parser.add_argument("--out", type=path_flag, metavar="FILE", help="a picture, .png, .svg or .pdf")
    parser.add_argument("--title", type=text_flag, default="", help="default: the picture's question")
    parser.add_argument("--loss", type=text_flag, default="val_loss", metavar="KEY", help="which loss")
    parser.add_argument("--numbers", action="store_true", help="print the raw numbers, too")
    parser.add_argument("--format", choices=FORMATS[:2], default="text")
    return parser


def main(argv: list[str]) -> None:
    args = flags().parse_intermixed_args(argv)
    ideas = read_ideas(args.public) if args.public else None
    groups = read_groups(args.groups, None, args.loss)
    named = {group.name: group for group in groups}
    further = [g for text in args.lengths if text not in named for g in read_groups([text], None, args.loss)]
    lengths = [named[text] for text in args.lengths if text in named] + further
    found = groups + further
    for group in found:
        need(group.by_seed, f"{group.name}: its runs name no seeds, or one twice")
    first, others = groups[0], []
    for group in [group for group in groups[1:] if group.name not in args.lengths]:
        if differences_by_seed(first.by_seed, group.by_seed).n > 1:
            others.append(group)
        else:
            warn(f"{group.name}: fewer than two seeds in common with {first.name}; left out")
    need(others, "give at least two groups besides --lengths, the baseline first")
    slope = baseline_slope(first, lengths)
    worths = worth_of(first, others, slope)
    if ideas is None:
        text = f"{worth_table(worths, args.format)}\n\n{worth_note(first, lengths, slope)}"
        draw = partial(draw_worth, worths, first)
    else:
        saved = savings(ideas, worths)
        text, draw = beside_published(saved, ideas, args.format), partial(draw_published, saved)
    say(text)
    for line in comparison_warnings(found):
        warn(f"note: {line}")
    show_notes()
    if args.numbers:
        say("\n" + numbers_text(found))
    if args.out:
        draw(one_line(args.title), args.out)


if __name__ == "__main__":
    command(main)
