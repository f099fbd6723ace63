"""Compare groups of runs as the seeds' tables do.

    python -m records.compare groups      GROUP GROUP...         time and loss of each; the first: baseline
    python -m records.compare steps       GROUP...               how many steps fewer still reach the target
    python -m records.compare pairs       GROUP GROUP...         each with each; --first: the first with each
    python -m records.compare crossing    GROUP... --level 2.92  when runs cross a loss, the earliest first
    python -m records.compare side        RUN RUN...             the validations of single runs, side by side
    python -m records.compare power [GROUP] --effect 0.002       how many runs find such a difference
    python -m records.compare leaderboard FOLDER --target 3.28   a folder's record folders, the fastest first

A GROUP is a folder of logs, one log, or a file with raw numbers: as `groups --numbers` prints them, or a
README with lists such as `losses = [3.27, 3.28]`. NAME=PATH names it, PATH@STEP reads its losses at that
step.

Times: Welch's t-test against the first group, two-sided. Losses: one-sided one-sample t-test, whether the
mean is under --target (the speedrun's 3.28 or 2.92); without --target a Welch test against the first group,
two-sided. Deviations are those of a sample (n - 1). `**` p < 0.01, `*` p < 0.05. Times are in seconds, or
in the unit of a file of numbers.
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import combinations

from cli import arguments, command, need, show_notes, text_flag
from records.files import DIGITS, LOSS, STEP, number_flag, say, warn
from records.groups import (
    Group,
    comparison_warnings,
    group_of,
    named_path,
    named_paths,
    numbers_text,
    read_groups,
)
from records.leaderboard import leaderboard
from records.reader import Point, Run, read_logs
from records.stats import (
    MOST_RUNS,
    TESTS,
    Sample,
    below,
    differences_by_seed,
    holm,
    paired,
    runs_needed,
    stars,
    welch,
)
from records.tables import FORMATS, table

MOST_ROWS = 40  # of `side`
POWERS = (0.5, 0.8, 0.9, 0.99)


@dataclass(frozen=True)
class Style:
    """How a table is printed: one of FORMATS, digits of times, losses and p."""

    form: str = "text"
    digits: int = 2
    loss_digits: int = 4
    p_digits: int = 4

    def time(self, value: float) -> str:
        return number(value, self.digits)

    def loss(self, value: float) -> str:
        return number(value, self.loss_digits)

    def p(self, value: float) -> str:
        return number(value, self.p_digits)


def number(value: float, digits: int) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def loss_test(group: Group, first: Group, target: float | None) -> float:
    """p that a group's losses are under the target, or, without one, differ from the first group's."""
    if target is not None:
        return below(group.losses, target)
    return math.nan if group is first else welch(group.losses, first.losses)


def groups_table(groups: list[Group], target: float | None, style: Style = Style()) -> str:
    """Seed 000's first table: each group's times and losses, against the first group and the target."""
    first, rows = groups[0], []
    for group in groups:
        time_p = math.nan if group is first else welch(group.times, first.times)
        loss_p = loss_test(group, first, target)
        rows.append(
            [
                group.name,
                group.count,
                group.steps_text,
                style.time(group.times.mean),
                style.time(group.times.std),
                style.time(group.times.mean - first.times.mean),
                style.p(time_p),
                style.loss(group.losses.mean),
                style.loss(group.losses.std),
                style.loss(group.losses.mean - first.losses.mean),
                style.p(loss_p),
                stars(loss_p),
            ]
        )
    columns = ["time μ", "time σ", "time Δ", "time p", "loss μ", "loss σ", "loss Δ", "loss p", "sig"]
    return table(["group", "runs", "steps", *columns], rows, style.form, left=(0, 11))


def groups_note(groups: list[Group], target: float | None) -> str:
    if target is not None:
        return (
            f"loss p decides: the target counts as reached at p < 0.01, one-sided t-test of mean < {target:g}"
        )
    if len(groups) == 1:
        return "one group: nothing to test without --target"
    if all(group.by_seed for group in groups):
        return "`pairs` decides, paired by the seeds that logs name. loss p: Welch's test against the first"
    return "loss p decides: Welch's test against the first group"


def steps_table(groups: list[Group], target: float | None, style: Style = Style()) -> str:
    """Seed 000's second table: groups by their number of steps, the most first; Δ against the first line."""
    ordered = sorted(groups, key=lambda group: -group.steps[0])
    rows = []
    for group in ordered:
        p = loss_test(group, ordered[0], target)
        rows.append(
            [
                str(group.steps[0]),
                str(group.steps[0] - ordered[0].steps[0]),
                group.count,
                style.time(group.times.mean),
                style.time(group.times.std),
                style.loss(group.losses.mean),
                style.loss(group.losses.std),
                style.p(p),
                stars(p),
            ]
        )
    head = ["steps", "Δ", "runs", "time μ", "time σ", "loss μ", "loss σ", "loss p", "sig"]
    return table(head, rows, style.form, left=(8,))


def by_steps(groups: list[Group], key: str = "val_loss") -> list[Group]:
    """The runs of all groups, grouped anew by the steps they were planned for; raw numbers stay."""
    runs: dict[int, list[Run]] = {}
    for run in [run for group in groups for run in group.runs]:
        runs.setdefault(run.planned or run.last_step, []).append(run)
    made = [group_of(f"{steps} steps", found, key=key) for steps, found in runs.items()]
    return made + [group for group in groups if not group.runs and group.losses.n]


def pairs_table(groups: list[Group], style: Style = Style(), first: bool = False) -> str:
    """Every two groups, or the first with each: Welch's test of losses and times, a paired one of losses.

    The paired test is over the seeds that both groups' logs name, as is `Δ by seed`; `loss Δ` is of means
    over all runs. Each test is Holm-corrected for the number of pairs.
    """
    pairs = list(combinations(groups, 2))
    if first:
        pairs = pairs[: len(groups) - 1]
    plain = [welch(a.losses, b.losses) for a, b in pairs]
    times = [welch(a.times, b.times) for a, b in pairs]
    by_seed = [paired(a.by_seed, b.by_seed) for a, b in pairs]
    plain_holm, times_holm, by_seed_holm = holm(plain), holm(times), holm(by_seed)
    rows = []
    for n, (a, b) in enumerate(pairs):
        differences = differences_by_seed(a.by_seed, b.by_seed)
        rows.append(
            [
                a.name,
                b.name,
                style.loss(b.losses.mean - a.losses.mean),
                style.p(plain[n]),
                style.p(plain_holm[n]),
                stars(plain_holm[n]),
                str(differences.n),
                style.loss(differences.mean),
                style.p(by_seed[n]),
                style.p(by_seed_holm[n]),
                stars(by_seed_holm[n]),
                style.time(b.times.mean - a.times.mean),
                style.p(times[n]),
                style.p(times_holm[n]),
            ]
        )
    losses = ["loss Δ", "p", "p Holm", "sig", "seeds", "Δ by seed", "p by seed"]
    losses += ["p by seed Holm", "sig"]
    head = ["group", "against it", *losses, "time Δ", "time p", "time p Holm"]
    return table(head, rows, style.form, left=(0, 1, 5, 10))


PAIRS_NOTE = (
    "p by seed Holm decides where seeds are shared: runs of one seed begin alike and read the same text,\n"
    "and a paired test sees more; else p Holm decides. Holm: corrected for the number of lines.\n"
    "loss Δ is of the means of all runs, Δ by seed of the shared seeds alone"
)


@dataclass(frozen=True)
class Crossing:
    step: float
    seconds: float


def crossing(run: Run, level: float, key: str = "val_loss") -> Crossing | None:
    """Where a run's loss first is at or under level, on the line between two validations; None: never."""
    before = None
    for point in run.points(key):
        if not point.value <= level:
            before = point
            continue
        if before is None or not math.isfinite(before.value):
            return Crossing(float(point.step), point.seconds)
        share = (before.value - level) / (before.value - point.value)
        step = before.step + share * (point.step - before.step)
        return Crossing(step, before.seconds + share * (point.seconds - before.seconds))
    return None


def crossing_table(groups: list[Group], level: float, style: Style = Style(), key: str = "val_loss") -> str:
    """Seed 003's list: the groups in the order in which their runs cross a loss.

    The largest share of runs that cross comes first, then the least mean time, or step where logs have no
    times.
    """
    ranked = []
    for group in groups:
        crossings = [crossing(run, level, key) for run in group.runs]
        found = [one for one in crossings if one is not None]
        steps = Sample.of([one.step for one in found])
        times = Sample.of([one.seconds for one in found if not math.isnan(one.seconds)])
        share = len(found) / len(group.runs)
        speed = steps.mean if math.isnan(times.mean) else times.mean
        cells = [group.name, f"{len(found)} of {len(group.runs)}", number(times.mean, style.digits)]
        cells += [number(times.std, style.digits), number(steps.mean, 1), number(steps.std, 1)]
        ranked.append((-share, speed if found else math.inf, cells))
    ranked.sort(key=lambda row: row[:2])
    rows = [[str(rank), *cells] for rank, (_, _, cells) in enumerate(ranked, start=1)]
    head = ["", "group", f"runs under {level:g}", "seconds μ", "σ", "step μ", "step σ"]
    return table(head, rows, style.form, left=(1,))


def side_table(runs: list[tuple[str, Run]], style: Style = Style(), key: str = "val_loss") -> str:
    """The validations that all runs have: losses, times, and what they differ from the first run's."""
    curves = [{point.step: point for point in run.points(key)} for _, run in runs]
    common = sorted(set.intersection(*(set(curve) for curve in curves)))
    names = ", ".join(name for name, _ in runs)
    need(common, f"{names}: no step at which all of them have {key}")
    stride = math.ceil(len(common) / MOST_ROWS)
    shown = [step for n, step in enumerate(reversed(common)) if n % stride == 0][::-1]
    head = ["step"]
    for n, (name, _) in enumerate(runs):
        head += [f"{name}: loss", *(["loss Δ"] if n else []), "time", *(["time Δ"] if n else [])]
    rows = []
    for step in shown:
        row, first = [str(step)], curves[0][step]
        for n, curve in enumerate(curves):
            point = curve[step]
            loss_change = [style.loss(point.value - first.value)] if n else []
            time_change = [style.time(point.seconds - first.seconds)] if n else []
            row += [point.text, *loss_change, style.time(point.seconds), *time_change]
        rows.append(row)
    rows += last_row(curves, common[-1], style)
    return table(head, rows, style.form, left=())


def last_row(curves: list[dict[int, Point]], step: int, style: Style) -> list[list[str]]:
    """Where runs end at different steps: each one's end."""
    ends = [curve[max(curve)] for curve in curves]
    if all(end.step == step for end in ends):
        return []
    row = ["end"]
    for n, end in enumerate(ends):
        loss_change = [style.loss(end.value - ends[0].value)] if n else []
        time_change = [style.time(end.seconds - ends[0].seconds)] if n else []
        row += [f"{end.text} at {end.step}", *loss_change, style.time(end.seconds), *time_change]
    return [row]


def power_table(effect: float, sd: float, alpha: float, style: Style = Style()) -> str:
    """For each test, how many runs find an effect with a chance of 50, 80, 90, 99 %."""
    rows = []
    for test, words in TESTS.items():
        needed = [runs_needed(test, effect, sd, alpha, wanted) for wanted in POWERS]
        rows.append([test, *(f"> {MOST_RUNS}" if n is None else str(n) for n in needed), words])
    head = ["test", *(f"{100 * wanted:.0f} %" for wanted in POWERS), "what it is"]
    return table(head, rows, style.form, left=(0, len(head) - 1))


# ---- the command

USES = {  # flags of each comparison, beyond --format, --digits, --loss_digits and --p_digits
    "groups": {"target", "step", "loss", "numbers"},
    "steps": {"target", "loss", "numbers"},
    "pairs": {"first", "step", "loss", "numbers"},
    "crossing": {"level", "loss"},
    "side": {"loss"},
    "power": {"effect", "sd", "alpha", "step", "loss"},
    "leaderboard": {"target", "step", "loss"},
}


def flags() -> argparse.ArgumentParser:
    parser = arguments(__doc__)
    parser.add_argument("what", choices=tuple(USES))
    parser.add_argument("groups", nargs="*", metavar="GROUP")
    parser.add_argument("--target", type=LOSS, help="loss to be reached, 3.28 for short, 2.92 for medium")
    parser.add_argument("--level", type=LOSS, help="of crossing: the loss to be crossed")
    parser.add_argument(
        "--first", action="store_true", help="pairs: only the first group with each of the others"
    )
    parser.add_argument(
        "--step", type=STEP, metavar="N", help="compare at this step (default: the last planned)"
    )
    parser.add_argument(
        "--loss", type=text_flag, metavar="KEY", help="which loss of an event line (default val_loss)"
    )
    parser.add_argument("--numbers", action="store_true", help="print the raw numbers, too")
    parser.add_argument("--effect", type=number_flag(1e-9, 1e6), help="of power: the difference to be found")
    parser.add_argument(
        "--sd", type=number_flag(1e-9, 1e6), help="of power: deviation (default: the GROUP's)"
    )
    parser.add_argument("--alpha", type=number_flag(1e-9, 0.5), help="of power: p that counts (default 0.01)")
    parser.add_argument("--format", choices=FORMATS, default="text")
    parser.add_argument("--digits", type=DIGITS, default=2, help="of times (default 2)")
    parser.add_argument("--loss_digits", type=DIGITS, default=4, help="of losses (default 4)")
    parser.add_argument("--p_digits", type=DIGITS, default=4, help="of p (default 4)")
    return parser


def check_flags(args: argparse.Namespace) -> None:
    """UserError for a flag that this comparison would ignore."""
    for name in set().union(*USES.values()) - USES[args.what]:
        given = getattr(args, name)
        is_given = given is not None and given is not False
        need(not is_given, f"{args.what}: --{name} has no meaning here; leave it out")
    need(args.groups or args.what == "power", f"{args.what}: give groups (--help says what they are)")


def style_of(args: argparse.Namespace) -> Style:
    return Style(args.format, args.digits, args.loss_digits, args.p_digits)


def show(text: str, note: str, form: str) -> None:
    """A table; what is to be known of it under it, or, where a program reads it, on stderr."""
    if form == "csv":
        say(text)
        warn(note)
        show_notes()
    else:
        say(f"{text}\n\n{note}" if note else text)


def main_groups(args: argparse.Namespace) -> None:
    """groups, steps and pairs."""
    key, style = args.loss or "val_loss", style_of(args)
    groups = read_groups(args.groups, args.step, key)
    if args.what == "steps":
        groups = by_steps(groups, key)
        lacking = [group.name for group in groups if len(group.steps) != 1]
        need(not lacking, f"steps: {', '.join(lacking)}: a group of numbers needs a line `steps = N`")
        show(steps_table(groups, args.target, style), "", args.format)
    elif args.what == "pairs":
        need(len(groups) > 1, "pairs: give at least two groups")
        show(pairs_table(groups, style, args.first), PAIRS_NOTE, args.format)
    else:
        show(groups_table(groups, args.target, style), groups_note(groups, args.target), args.format)
    for line in comparison_warnings(groups):
        warn(f"note: {line}")
    show_notes()
    if args.numbers:
        say("\n" + numbers_text(groups))


def main_crossing(args: argparse.Namespace) -> None:
    need(args.level is not None, "crossing: give --level, the loss to be crossed")
    groups = []
    for named in named_paths(args.groups):
        need(named.step is None, f"crossing: {named.name}: @{named.step} has no meaning here; leave it out")
        runs = read_logs([named.path], warn)
        groups.append(Group(named.name, Sample.of([]), Sample.of([]), runs=runs))
    say(crossing_table(groups, args.level, style_of(args), args.loss or "val_loss"))


def main_side(args: argparse.Namespace) -> None:
    need(len(args.groups) > 1, "side: give at least two logs")
    runs = []
    for named in named_paths(args.groups):
        found = read_logs([named.path], warn)
        need(len(found) == 1, f"{named.name}: {len(found)} runs there; side takes logs of one run each")
        runs.append((named.name, found[0]))
    say(side_table(runs, style_of(args), args.loss or "val_loss"))


def main_power(args: argparse.Namespace) -> None:
    need(args.effect is not None, "power: give --effect, the difference that is to be found")
    need(
        (args.sd is None) == bool(args.groups),
        "power: give either --sd or one GROUP, whose deviation is taken",
    )
    sd = args.sd
    if sd is None:
        groups = read_groups(args.groups, args.step, args.loss or "val_loss")
        need(len(groups) == 1, f"power: {len(groups)} groups; give one, or --sd")
        sample = groups[0].losses
        need(sample.varies, f"{groups[0].name}: its losses have no deviation; give --sd")
        sd = sample.std
    alpha = args.alpha or 0.01
    found = f"a difference of {args.effect:g} at p < {alpha:g}, sd {sd:.4g}"
    note = f"runs (of each group) that find {found}, with that chance"
    show(power_table(args.effect, sd, alpha, style_of(args)), note, args.format)


def main_leaderboard(args: argparse.Namespace) -> None:
    need(len(args.groups) == 1, "leaderboard: give one folder, whose folders are records")
    named = replace(named_path(args.groups[0]))
    head, rows, left = leaderboard(
        named.path, args.target, args.step or named.step, args.loss or "val_loss", style_of(args)
    )
    say(table(head, rows, args.format, left=left))


MAINS: dict[str, Callable[[argparse.Namespace], None]] = {
    "groups": main_groups,
    "steps": main_groups,
    "pairs": main_groups,
    "crossing": main_crossing,
    "side": main_side,
    "power": main_power,
    "leaderboard": main_leaderboard,
}


def main(argv: list[str]) -> None:
    args = flags().parse_intermixed_args(argv)
    check_flags(args)
    MAINS[args.what](args)


if __name__ == "__main__":
    command(main)
