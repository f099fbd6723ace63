"""Groups of runs: from logs, or from files of raw numbers as the seeds and public READMEs write them."""

import hashlib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from cli import UserError, need, one_line, os_reason
from records.files import file_kind, warn
from records.reader import MOST, NUMBER, Result, Run, read_file, read_paths, result
from records.stats import Sample

FEW_POINTS = 5  # losses by which copies are told; runs with fewer may agree in them by chance
LARGEST_NUMBERS = 2**20  # bytes of a file of raw numbers
MOST_GROUPS = 500  # of a file of raw numbers
LONGEST_NAME = 200  # characters of a group's
FAR_ABOVE = 4000  # characters above a list in which its name is looked for


@dataclass
class Group:
    name: str
    losses: Sample
    times: Sample
    by_seed: dict[int, float] = field(default_factory=dict)  # where logs name seeds, and none comes twice
    steps: tuple[int, ...] = ()  # at which its runs were read, each once
    runs: list[Run] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)  # a line for each run that has no result

    @property
    def count(self) -> str:
        """ "5", or "4 of 5" where one has no result."""
        total = self.losses.n + len(self.left_out)
        return f"{self.losses.n} of {total}" if self.left_out else str(total)

    @property
    def steps_text(self) -> str:
        if not self.steps:
            return "-"
        first, last = min(self.steps), max(self.steps)
        return str(first) if first == last else f"{first}..{last}"


def group_of(
    name: str,
    runs: list[Run],
    step: int | None = None,
    key: str = "val_loss",
    keep_copies: bool = False,
    tell: Callable[[str], None] = warn,
) -> Group:
    """Runs without a result are left out and told of, as are copies of other runs unless they are kept.

    The others stand in the order of their seeds, whatever their files are called; see in_order.
    """
    group = Group(name, Sample.of([]), Sample.of([]))
    results, known = [], {}
    for run in runs:
        found, problem = result(run, step, key)
        if found is not None and not math.isfinite(found.loss):
            problem = f"ends with a {key} of {found.text}"
        elif found is not None and not keep_copies:
            twin = known.setdefault(fingerprint(run), run.name)
            if twin != run.name:
                problem = f"has every loss of {twin}: a copy, or the same seed again"
        if problem is not None:
            why = f" ({run.failure()})" if run.failure() else ""
            group.left_out.append(one_line(f"{run.name} left out, it {problem}{why}"))
            tell(f"{name}: {group.left_out[-1]}")
            continue
        results.append((run, found))
    results = in_order(results)
    group.runs, results = [run for run, _ in results], [found for _, found in results]
    group.losses = Sample.of([one.loss for one in results])
    group.times = Sample.of([one.seconds for one in results if not math.isnan(one.seconds)])
    group.steps = tuple(sorted({one.step for one in results}))
    seeds = [run.seed for run in group.runs]
    if None not in seeds and len(set(seeds)) == len(seeds):
        group.by_seed = {seed: one.loss for seed, one in zip(seeds, results, strict=True)}
    return group


def in_order(results: list[tuple[Run, Result]]) -> list[tuple[Run, Result]]:
    """By seed, then by start, as far as all runs' logs say it; else as they are."""
    for key in (lambda pair: pair[0].facts.get("started"), lambda pair: pair[0].seed):  # sorted() is stable
        if all(key(pair) is not None for pair in results):
            results = sorted(results, key=key)
    return results


def same_seeds(runs: list[Run]) -> list[str]:
    """A line for each run whose seed an earlier one has: the two are no independent runs."""
    found, known = [], {}
    for run in runs:
        twin = known.setdefault(run.seed, run) if run.seed is not None else run
        if twin is not run:
            found.append(f"{run.name} has the seed of {twin.name}, {run.seed}")
    return found


def fingerprint(run: Run) -> tuple:
    """What two runs have in common only if one is a copy of the other, or the same run again."""
    points = run.points("val_loss") + run.points("train_loss")
    losses = tuple(point.text for point in points)
    if len(losses) >= FEW_POINTS:
        return losses
    return (*losses, *(repr(point.seconds) for point in points))


def comparison_warnings(groups: list[Group]) -> list[str]:
    """What a reader of a table has to know: mixed steps, hardware, sources; runs that stand in two groups."""
    found = []
    for group in groups:
        if len(group.steps) > 1:
            found.append(
                f"{group.name}: its runs are read at {len(group.steps)} different steps, {group.steps_text}"
            )
        found += [
            f"{group.name}: {words}; pairs by seed leave the group out" for words in same_seeds(group.runs)
        ]
        sources = {run.source for run in group.runs if run.source is not None}
        if len(sources) > 1:
            found.append(f"{group.name}: its runs are of {len(sources)} different sources")
    hardware = {run.hardware for group in groups for run in group.runs if run.hardware}
    if len(hardware) > 1:
        shown = " | ".join(sorted(hardware))
        found.append(f"runs on different hardware, so times do not compare: {shown}")
    known: dict[tuple, tuple[str, str]] = {}
    for group in groups:
        for run in group.runs:
            name, twin = known.setdefault(fingerprint(run), (group.name, run.name))
            if name != group.name:
                found.append(f"{group.name}: {run.name} has every loss of {name}'s {twin}: a copy?")
    return [one_line(line) for line in found]


# ---- raw numbers

LIST = re.compile(
    r"^(?P<indent>[ \t]*)(?P<key>[a-z]\w{0,63})[ \t]*=[ \t]*\[(?P<body>[^\[\]]{0,1000000})\]", re.MULTILINE
)
KEY = re.compile(
    r"(?:(?P<loss>(?:val_)?loss(?:es)?|accs?)|(?P<time>(?:train_)?times?))(?P<kind>_summary|)(?P<of>_\w+)?"
    r"|(?P<seed>seeds)"
)
STEPS = re.compile(r"^[ \t]*steps *= *(\d{1,12})\s*$", re.MULTILINE)
HEADING = re.compile(r"#{1,6} [^=(]+")  # not a comment of Python such as `# p=0.0084`
CODE = re.compile(r"(?:for|if|def|with|while|class|import|from|print|else|try)\b|[`]|.*[(=]")


def read_numbers(text: str, path: Path) -> list[Group]:
    """Groups of raw numbers: `losses = [..]` and `times = [..]`, under a line `NAME:` or at a line's start.

    Or, where only that is known, `loss_summary = [n, mean, deviation]` and `time_summary`; `steps = N` and
    `seeds = [..]`, one for each loss, if wanted. `val_losses` and `accs`, as public READMEs write it, are
    losses. Numbers are read, nothing is executed.
    """
    groups: list[dict] = []
    for match in LIST.finditer(text):
        key = KEY.fullmatch(match["key"])
        body = re.sub(r"#[^\n]*", "", match["body"])
        if key is None or not body.strip() or re.search(r"\bfor\b", body):
            continue
        name = one_line(group_name(text, match, key["of"], path), LONGEST_NAME)
        kind = "seed" if key["seed"] else ("loss" if key["loss"] else "time") + key["kind"]
        if not groups or groups[-1]["name"] != name or kind in groups[-1]:
            groups.append({"name": name, "begin": match.start()})
            need(len(groups) <= MOST_GROUPS, f"{path}: more than {MOST_GROUPS} groups of numbers; give fewer")
        groups[-1][kind] = list_of_numbers(body, f"{path}: {name}: {match['key']}")
    ends = [group["begin"] for group in groups[1:]] + [len(text)] * bool(groups)
    made = []
    for group, end in zip(groups, ends, strict=True):
        steps = STEPS.search(text, group["begin"], end)
        losses, times = (sample_of(group, kind, f"{path}: {group['name']}") for kind in ("loss", "time"))
        if losses.n:
            by_seed = seeds_of(group, losses, f"{path}: {group['name']}")
            made.append(Group(group["name"], losses, times, by_seed, (int(steps[1]),) if steps else ()))
    return number_twins(made)


def number_twins(groups: list[Group]) -> list[Group]:
    """Several groups under one heading get #2, #3 .. behind its name."""
    count: dict[str, int] = {}
    for group in groups:
        count[group.name] = count.get(group.name, 0) + 1
        if count[group.name] > 1:
            group.name = f"{group.name} #{count[group.name]}"
    return groups


def group_name(text: str, match: re.Match, suffix: str | None, path: Path) -> str:
    """The name of a list's group.

    That is the line above an indented block; else the list's own suffix, the last heading or line `NAME:`,
    the file.
    """
    if suffix:
        return suffix.strip("_")
    before = text[max(0, match.start() - FAR_ABOVE) : match.start()].splitlines()
    for line in reversed(before):
        if not line.strip() or line[0] in " \t":
            continue
        is_above = match["indent"] and not LIST.match(line)
        is_label = line.rstrip().endswith(":") and not CODE.match(line)
        if is_above or is_label or HEADING.fullmatch(line):
            return line.strip("# ").rstrip(":")
    return path.stem


def list_of_numbers(body: str, where: str) -> list[float]:
    values = []
    for word in body.replace("\n", " ").split(","):
        if not word.strip():
            continue
        number = NUMBER.fullmatch(word.strip())
        need(number and number[2] is None, f"{where} is no list of numbers")
        values.append(float(number[1]))
    return values


def sample_of(group: dict, kind: str, where: str) -> Sample:
    """From the raw numbers, or else from their summary."""
    if kind in group:
        need(all(map(math.isfinite, group[kind])), f"{where}: {kind}: a number that is not finite")
        largest = max(group[kind], key=abs, default=0.0)
        need(abs(largest) <= MOST, f"{where}: {kind}: {largest:g} is no number of a run")
        return Sample.of(group[kind])
    summary = group.get(f"{kind}_summary")
    if summary is None:
        return Sample.of([])
    need(len(summary) == 3, f"{where}: {kind}_summary wants [n, mean, deviation]")
    n, mean, std = summary
    whole = math.isfinite(n) and n == int(n) and 1 <= n <= 1e9
    need(whole, f"{where}: {kind}_summary: n is {n:g}; give the number of runs, 1 or more")
    known = abs(mean) <= MOST and (n == 1 or 0 <= std <= MOST)
    need(
        known,
        f"{where}: {kind}_summary: mean {mean:g}, deviation {std:g}; give finite ones, up to {MOST:g}, "
        "no deviation under 0",
    )
    return Sample(int(n), mean, std if n > 1 else math.nan)


def seeds_of(group: dict, losses: Sample, where: str) -> dict[int, float]:
    """Seed -> loss; {} where no seeds stand."""
    seeds = group.get("seed", [])
    whole = all(0 <= seed < 2**63 and seed == int(seed) for seed in seeds)
    need(whole and len(set(seeds)) == len(seeds), f"{where}: seeds: give whole numbers, each once")
    many = len(losses.values)
    need(len(seeds) in (0, many), f"{where}: {len(seeds)} seeds for {many} losses")
    return {int(seed): loss for seed, loss in zip(seeds, losses.values[: len(seeds)], strict=True)}


def numbers_text(groups: list[Group]) -> str:
    """The raw numbers, as read_numbers reads them."""
    blocks = []
    for group in groups:
        lines = [f"{one_line(group.name)}:"]
        for word, plural, sample in (("loss", "losses", group.losses), ("time", "times", group.times)):
            if sample.values:
                values = ", ".join(repr(round(value, 6)) for value in sample.values)
                lines.append(f"  {plural} = [{values}]")
            elif sample.n:
                lines.append(f"  {word}_summary = [{sample.n}, {sample.mean!r}, {sample.std!r}]")
        if group.by_seed:
            lines.append(f"  seeds = [{', '.join(map(str, group.by_seed))}]")
        if len(group.steps) == 1:
            lines.append(f"  steps = {group.steps[0]}")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


# ---- what a command line names


@dataclass(frozen=True)
class NamedPath:
    name: str
    path: Path
    step: int | None = None


def named_path(text: str) -> NamedPath:
    """`PATH`, `NAME=PATH`, `PATH@STEP` or `NAME=PATH@STEP`; without a name the path's last part is it."""
    need(text, "an empty name: give folders of logs, logs, or a file of numbers")
    candidates = [("", text)]
    candidates += [(text[: match.start()], text[match.end() :]) for match in re.finditer("=", text)]
    for name, rest in candidates:
        at = re.fullmatch(r"(.+)@(\d{1,12})", rest, re.DOTALL)
        for path, step in ((rest, None), (at[1], int(at[2])) if at else ("", None)):
            if path and file_kind(Path(path)) != "missing":
                return NamedPath(one_line(name or Path(path).absolute().name, 80), Path(path), step)
    path = text.rpartition("=")[2]
    raise UserError(f"{one_line(path, 300)}: not there; give folders of logs, logs, or a file of numbers")


def read_groups(texts: list[str], step: int | None, key: str) -> list[Group]:
    """The groups that a command line names, in its order. UserError if none has a result."""
    groups: list[Group] = []
    paths: list[Path | None] = []  # of a file of numbers, whose groups have their names from it: None
    told: list[str] = []  # one line if that is an error, else a warning each
    for named in map(named_path, texts):
        numbers = read_numbers_file(named)
        if numbers:
            groups += numbers
            paths += [None] * len(numbers)
            continue
        runs = read_paths([named.path], told.append)
        if not runs:
            told.append(f"{named.name}: no logs there")
        at = step if named.step is None else named.step
        groups.append(group_of(named.name, runs, at, key, tell=told.append))
        paths.append(named.path)
    for group, name in zip(groups, told_apart([group.name for group in groups], paths), strict=True):
        group.name = name
    shown = ", ".join(group.name for group in groups)
    reasons = f" ({'; '.join(told[:3])})" if told else ""
    need(
        any(group.losses.n for group in groups),
        f"{shown}: no run there has the {key} that is asked for{reasons}",
    )
    for line in told:
        warn(line)
    return groups


def named_paths(texts: list[str]) -> list[NamedPath]:
    """What a command line names, in its order; each place with a name of its own."""
    found = [named_path(text) for text in texts]
    names = told_apart([one.name for one in found], [one.path for one in found])
    return [replace(one, name=name) for one, name in zip(found, names, strict=True)]


def told_apart(names: list[str], paths: list[Path | None]) -> list[str]:
    """The names; such as several records' this/, with as many folders before them as tell them apart.

    Only a name that is its path's last part changes.
    """
    places = [
        tuple(one_line(part, 80) for part in path.absolute().parts[1:]) if path else () for path in paths
    ]
    found = list(names)
    for depth in range(2, max(map(len, places), default=0) + 1):
        known: dict[str, set] = {}
        for n, name in enumerate(found):
            known.setdefault(name, set()).add(places[n] or n)
        for n, place in enumerate(places):
            if len(known[found[n]]) > 1 and place[-1:] == (names[n],):
                found[n] = one_line("/".join(place[-depth:]), LONGEST_NAME)
    return found


def read_numbers_file(named: NamedPath) -> list[Group]:
    """The groups of a file of raw numbers; [] for a folder or a log."""
    path = named.path
    if file_kind(path) != "file":
        return []
    try:
        small = path.stat().st_size < LARGEST_NUMBERS
        text = path.read_bytes().decode("utf-8", "replace") if small else ""
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({os_reason(error)})") from None
    if path.suffix.lower() != ".md" and read_file(path)[0]:
        return []
    numbers = read_numbers(text, path)
    need(numbers or read_file(path)[0], f"{path}: neither a log nor a file of numbers")
    return numbers


def source_hash(run: Run) -> str | None:
    """The sha256 of the source that a log holds, its last line ended as train_gpt.py ends it."""
    if run.source is None:
        return None
    return hashlib.sha256((run.source.rstrip("\n") + "\n").encode("utf-8", "surrogateescape")).hexdigest()
