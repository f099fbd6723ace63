"""Compare groups of runs as the seeds' tables do.

    python records/compare.py groups   GROUP GROUP...            time and loss of each; the first group is the baseline
    python records/compare.py steps    GROUP...                  how many steps fewer still reach the target
    python records/compare.py pairs    GROUP GROUP...            each group against each, or, with --first, the first against each
    python records/compare.py crossing GROUP... --level 2.92     when runs cross a loss, the earliest first

A GROUP is a folder of logs, one log, or a file with raw numbers as `groups --numbers` prints them; NAME=PATH names it.

Times: Welch's t-test against the first group, two-sided. Losses: one-sided one-sample t-test, whether the mean is under
--target (the speedrun's 3.28 or 2.92); without --target a Welch test against the first group, two-sided. Deviations
are those of a sample (n - 1). `**` p < 0.01, `*` p < 0.05. Times are in seconds, or in the unit of a file of numbers.
"""

import json
import math
import re
import statistics
import sys
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
from records.logs import Run, arguments, command, extra, need, read_file, read_places, result, warn  # noqa: E402
from records.tables import FORMATS, table  # noqa: E402


@dataclass(frozen=True)
class Sample:
    """Numbers, or what is known of them: how many, their mean and their deviation (n - 1; nan if there is just one)."""

    n: int
    mean: float
    std: float
    values: tuple[float, ...] = ()

    @staticmethod
    def of(values: list[float]) -> "Sample":
        if not values:
            return Sample(0, math.nan, math.nan)
        finite = all(map(math.isfinite, values))
        std = statistics.stdev(values) if finite and len(values) > 1 else math.nan
        return Sample(len(values), statistics.fmean(values) if finite else math.nan, std, tuple(values))


def below(sample: Sample, target: float) -> float:
    """p that a mean as low comes by chance if the true one is target: one-sided one-sample t-test; nan for one number."""
    if sample.n < 2 or not math.isfinite(sample.std):
        return math.nan
    distance, error = sample.mean - target, sample.std / math.sqrt(sample.n)
    if error == 0:
        return math.nan if distance == 0 else float(distance > 0)
    return float(extra("scipy.stats").t.cdf(distance / error, sample.n - 1))


def welch(a: Sample, b: Sample) -> float:
    """p of Welch's t-test, two-sided; nan where one of the two has a single number, or neither varies."""
    if min(a.n, b.n) < 2 or not a.std + b.std > 0:
        return math.nan
    return float(
        extra("scipy.stats")
        .ttest_ind_from_stats(a.mean, a.std, a.n, b.mean, b.std, b.n, equal_var=False)
        .pvalue
    )


def paired(a: dict[int, float], b: dict[int, float]) -> float:
    """p of a paired t-test over the seeds that both have, two-sided; nan for fewer than two, or equal differences."""
    differences = Sample.of([b[seed] - a[seed] for seed in sorted(a.keys() & b.keys())])
    return (
        min(1.0, 2 * min(below(differences, 0), 1 - below(differences, 0))) if differences.n > 1 else math.nan
    )


def holm(values: list[float]) -> list[float]:
    """Holm's correction for many tests; nan stays and does not count."""
    order = sorted((n for n, p in enumerate(values) if not math.isnan(p)), key=lambda n: values[n])
    corrected, largest = list(values), 0.0
    for place, n in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - place) * values[n]))
        corrected[n] = largest
    return corrected


def stars(p: float) -> str:
    return "**" if p < 0.01 else "*" if p < 0.05 else ""


@dataclass
class Group:
    name: str
    losses: Sample
    times: Sample
    by_seed: dict[int, float] = field(
        default_factory=dict
    )  # loss of each seed, where logs tell and no seed comes twice
    steps: int | None = None  # that its runs were read at, if that is one number
    runs: list[Run] = field(default_factory=list)


def seed_of(run: Run) -> int | None:
    """Where its log names one."""
    return (run.config or {}).get("seed")


def group_of(name: str, runs: list[Run], step: int | None = None, key: str = "val_loss") -> Group:
    """Runs that do not have the step are left out, with a word."""
    found, seeds = [], []
    for run in runs:
        one, problem = result(run, step, key)
        if one is None:
            warn(f"{name}: {run.name} left out, it {problem}")
            continue
        found.append((run, one))
        seeds.append(seed_of(run))
    by_seed = (
        {seed: one.loss for seed, (_, one) in zip(seeds, found)} if len(set(seeds)) == len(seeds) else {}
    )
    steps = {one.step for _, one in found}
    times = [one.seconds for _, one in found if not math.isnan(one.seconds)]
    return Group(
        name,
        Sample.of([one.loss for _, one in found]),
        Sample.of(times),
        by_seed,
        steps.pop() if len(steps) == 1 else None,
        [run for run, _ in found],
    )


NUMBERS = re.compile(
    r"^ *(losses|times|loss_summary|time_summary) *= *(\[[^\]]{0,1000000}\])\s*$", re.MULTILINE
)


def read_numbers(text: str, path: Path) -> list[Group]:
    """Groups as the seeds write them: a line `NAME:`, then indented `losses = [..]` and `times = [..]`, or, where only that
    is known, `loss_summary = [n, mean, deviation]` and `time_summary`; `steps = N` if wanted. No other line counts."""
    groups = []
    for name, block in re.findall(r"^(\S[^\n]*)\n((?:[ \t][^\n]*(?:\n|\Z))+)", text, re.MULTILINE):
        found: dict[str, list[float]] = {}
        for key, numbers in NUMBERS.findall(block):
            try:
                found[key] = [float(value) for value in json.loads(numbers)]
            except (ValueError, TypeError):
                need(False, f"{path}: {name}: {key} is no list of numbers")
        samples = []
        for key in ("loss", "time"):
            summary = found.get(f"{key}_summary")
            need(
                summary is None or len(summary) == 3,
                f"{path}: {name}: {key}_summary wants [n, mean, deviation]",
            )
            samples.append(
                Sample(int(summary[0]), *summary[1:])
                if summary
                else Sample.of(found.get({"loss": "losses", "time": "times"}[key], []))
            )
        steps = re.search(r"^ *steps *= *(\d{1,12})\s*$", block, re.MULTILINE)
        if samples[0].n:
            groups.append(Group(name.strip().rstrip(":"), *samples, steps=int(steps[1]) if steps else None))
    return groups


def named_place(text: str) -> tuple[str, Path]:
    """`NAME=PATH`, or a path, whose last part is then the name."""
    name, _, path = text.rpartition("=") if not Path(text).exists() else ("", "", text)
    need(Path(path).exists(), f"{path}: not there; give folders of logs, logs, or a file of numbers")
    return name or Path(path).resolve().name, Path(path)


def read_groups(places: list[str], step: int | None, key: str) -> list[Group]:
    """The groups that a command line names, in its order."""
    groups = []
    for place in places:
        name, path = named_place(place)
        if path.is_file() and path.stat().st_size < 2**20 and not read_file(path)[0]:
            numbers = read_numbers(path.read_text(errors="replace"), path)
            need(numbers, f"{path}: neither a log nor a file of numbers")
            groups += numbers
            continue
        group = group_of(name, read_places([path], warn), step, key)
        need(group.losses.n, f"{path}: no run there has the {key} that is asked for")
        groups.append(group)
    return groups


def number(value: float, digits: int) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def loss_test(group: Group, first: Group, target: float | None) -> float:
    """p of a group's losses: of being under the target, or, without one, of differing from the first group's."""
    if target is not None:
        return below(group.losses, target)
    return math.nan if group is first else welch(group.losses, first.losses)


def groups_table(groups: list[Group], target: float | None, form: str = "text", digits: int = 2) -> str:
    """Seed 000's first table: each group's times and losses, against the first group and the target."""
    first, rows = groups[0], []
    for group in groups:
        same = group is first
        loss_p = loss_test(group, first, target)
        rows.append(
            [
                group.name,
                str(group.losses.n),
                number(group.times.mean, digits),
                number(group.times.std, digits),
                number(group.times.mean - first.times.mean, digits),
                number(math.nan if same else welch(group.times, first.times), 4),
                number(group.losses.mean, 4),
                number(group.losses.std, 4),
                number(group.losses.mean - first.losses.mean, 4),
                number(loss_p, 4),
                stars(loss_p),
            ]
        )
    head = [
        "group",
        "runs",
        "time μ",
        "time σ",
        "time Δ",
        "time p",
        "loss μ",
        "loss σ",
        "loss Δ",
        "loss p",
        "sig",
    ]
    return table(head, rows, form, left=(0, 10))


def steps_table(groups: list[Group], target: float | None, form: str = "text", digits: int = 2) -> str:
    """Seed 000's second table: groups by their number of steps, the most first; Δ against the first line."""
    ordered = sorted(groups, key=lambda group: -(group.steps or 0))
    rows = []
    for group in ordered:
        p = loss_test(group, ordered[0], target)
        rows.append(
            [
                str(group.steps),
                str(group.steps - ordered[0].steps),
                str(group.losses.n),
                number(group.times.mean, digits),
                number(group.times.std, digits),
                number(group.losses.mean, 4),
                number(group.losses.std, 4),
                number(p, 4),
                stars(p),
            ]
        )
    head = ["steps", "Δ", "runs", "time μ", "time σ", "loss μ", "loss σ", "loss p", "sig"]
    return table(head, rows, form, left=(8,))


def by_steps(groups: list[Group], key: str = "val_loss") -> list[Group]:
    """The runs of all groups, grouped anew by the number of steps that they were planned for; numbers without logs stay."""
    runs: dict[int, list[Run]] = {}
    for run in [run for group in groups for run in group.runs]:
        runs.setdefault(run.planned or run.last_step, []).append(run)
    return [group_of(f"{steps} steps", found, key=key) for steps, found in runs.items()] + [
        g for g in groups if not g.runs
    ]


def pairs_table(groups: list[Group], form: str = "text", digits: int = 2, first: bool = False) -> str:
    """Every two groups, or the first with each: Welch's test of losses and of times, and a paired one of losses by seed,
    where logs name it; each Holm-corrected for the number of pairs. Runs of one seed begin alike and read the same text:
    the paired test sees more."""
    pairs = [(groups[0], group) for group in groups[1:]] if first else list(combinations(groups, 2))
    plain, times = ([welch(getattr(a, of), getattr(b, of)) for a, b in pairs] for of in ("losses", "times"))
    seeds, rows = [paired(a.by_seed, b.by_seed) for a, b in pairs], []
    for (a, b), p, p_holm, s, s_holm, t, t_holm in zip(
        pairs, plain, holm(plain), seeds, holm(seeds), times, holm(times)
    ):
        rows.append(
            [
                a.name,
                b.name,
                number(b.losses.mean - a.losses.mean, 4),
                number(p, 4),
                number(p_holm, 4),
                stars(p_holm),
                number(s, 4),
                number(s_holm, 4),
                stars(s_holm),
                number(b.times.mean - a.times.mean, digits),
                number(t, 4),
                number(t_holm, 4),
            ]
        )
    head = [
        "group",
        "against it",
        "loss Δ",
        "p",
        "p Holm",
        "sig",
        "p by seed",
        "p by seed Holm",
        "sig",
        "time Δ",
        "time p",
        "time p Holm",
    ]
    return table(head, rows, form, left=(0, 1, 5, 8))


def crossing(run: Run, level: float, key: str = "val_loss") -> tuple[float, float] | None:
    """(step, seconds) at which a run's loss first is at or under level, on the line between two validations; None: never."""
    before = None
    for step, seconds, value in zip(*run.curve(key)):
        if value <= level:
            if before is None or before[2] == value:
                return float(step), seconds
            share = (before[2] - level) / (before[2] - value)
            return before[0] + share * (step - before[0]), before[1] + share * (seconds - before[1])
        before = (step, seconds, value)
    return None


def crossing_table(groups: list[Group], level: float, form: str = "text", key: str = "val_loss") -> str:
    """Seed 003's list: the groups in the order in which their runs cross a loss, by mean time (by step without times)."""
    rows = []
    for group in groups:
        found = [at for at in (crossing(run, level, key) for run in group.runs) if at]
        steps, times = Sample.of([at[0] for at in found]), Sample.of([at[1] for at in found])
        order = (times.mean if not math.isnan(times.mean) else steps.mean) if found else math.inf
        rows.append(
            (
                order,
                [
                    group.name,
                    f"{len(found)} of {len(group.runs)}",
                    number(times.mean, 2),
                    number(times.std, 2),
                    number(steps.mean, 1),
                    number(steps.std, 1),
                ],
            )
        )
    ordered = [
        [str(place), *row] for place, (_, row) in enumerate(sorted(rows, key=lambda row: row[0]), start=1)
    ]
    return table(
        ["", "group", f"runs under {level:g}", "seconds μ", "σ", "step μ", "step σ"], ordered, form, left=(1,)
    )


def numbers_text(groups: list[Group]) -> str:
    """The raw numbers, as read_numbers reads them."""
    blocks = []
    for group in groups:
        lines = [f"{group.name}:"]
        for word, plural, sample in (("loss", "losses", group.losses), ("time", "times", group.times)):
            if sample.values:
                lines.append(f"  {plural} = {json.dumps([round(value, 6) for value in sample.values])}")
            elif sample.n:
                lines.append(f"  {word}_summary = {json.dumps([sample.n, sample.mean, sample.std])}")
        blocks.append("\n".join(lines + ([f"  steps = {group.steps}"] if group.steps is not None else [])))
    return "\n\n".join(blocks)


def main(argv: list[str]) -> None:
    parser = arguments(__doc__)
    parser.add_argument("what", choices=("groups", "steps", "pairs", "crossing"))
    parser.add_argument("groups", nargs="+", metavar="GROUP")
    parser.add_argument("--target", type=float, help="loss to be reached, 3.28 for short, 2.92 for medium")
    parser.add_argument("--level", type=float, help="of crossing")
    parser.add_argument(
        "--first", action="store_true", help="pairs: only the first group with each of the others"
    )
    parser.add_argument(
        "--step", type=int, metavar="N", help="compare at this step (default: the last planned)"
    )
    parser.add_argument(
        "--loss", default="val_loss", metavar="KEY", help="which loss of an event line (default val_loss)"
    )
    parser.add_argument("--format", choices=FORMATS, default="text")
    parser.add_argument("--digits", type=int, default=2, help="of times (default 2)")
    parser.add_argument("--numbers", action="store_true", help="print the raw numbers, too")
    args = parser.parse_args(argv)
    need(0 <= args.digits <= 12, f"--digits {args.digits}: 0 to 12")
    if args.what == "crossing":
        need(args.level is not None, "crossing: give --level, the loss to be crossed")
        groups = [
            Group(name, Sample.of([]), Sample.of([]), runs=read_places([path], warn))
            for name, path in map(named_place, args.groups)
        ]
        for group in groups:
            need(group.runs, f"{group.name}: no logs there")
        print(crossing_table(groups, args.level, args.format, args.loss))
        return
    groups = read_groups(args.groups, args.step, args.loss)
    if args.what == "groups":
        print(groups_table(groups, args.target, args.format, args.digits))
    elif args.what == "steps":
        groups = by_steps(groups, args.loss)
        need(
            all(group.steps is not None for group in groups),
            "steps: a group of numbers needs a line `steps = N`",
        )
        print(steps_table(groups, args.target, args.format, args.digits))
    else:
        need(len(groups) > 1, "pairs: give at least two groups")
        print(pairs_table(groups, args.format, args.digits, args.first))
    if args.numbers:
        print("\n" + numbers_text(groups))


if __name__ == "__main__":
    command(main)
