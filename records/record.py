"""Check a record by the rules of records/README.md, and make its folder.

    python records/record.py verify  records/TRACK/DATE_NAME
    python records/record.py package --track TRACK --name NAME --this LOGS [--baseline LOGS] [--file train_gpt.py]
    python records/record.py history --track TRACK [--out FILE.png]

verify reads a record's folder: train_gpt.py, this/ (a log a run) and baseline/ (the runs of the record before it).
package checks the same of logs anywhere and, if all is well, writes records/TRACK/DATE_NAME with a README; else nothing.
history prints a track's records, oldest first, and draws them: each against the target, the one before and the first.
Nothing of a log or of the submitted file is executed. Exit code 0: counts; 1: does not, the reasons stand in the table.

What a program cannot judge (a changed data section, say) is marked `look`: a person looks, and says so with
--reviewed 1 4 --by "NAME: why".
"""

import argparse
import ast
import difflib
import hashlib
import os
import re
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
from records.compare import Group, below, group_of, groups_table, number, numbers_text, welch  # noqa: E402
from records.logs import Run, UserError, arguments, command, need, read_places, result, warn  # noqa: E402
from records.plot import canvas, save  # noqa: E402
from records.tables import FORMATS, table  # noqa: E402

P_LIMIT = 0.01


@dataclass(frozen=True)
class Track:
    hardware: str  # what the log's `hardware:` line must have, a regular expression
    words: str
    target: float  # validation loss, nats a token
    yardstick: str = ""  # the preset whose own loss became the target; its runs are the track's first record


TRACKS = {
    "short": Track(r"H100.*; 8 process", "8 x H100", 3.28),
    "medium": Track(r"H100.*; 8 process", "8 x H100", 2.92),
    "cpu": Track(r"\b2 cores;", "two CPU cores", 3.77, yardstick="cpu-adamw"),
}
FREE_FLAGS = {"seed", "log_dir"}  # name a run, and change nothing that it computes


@dataclass
class Submission:
    """What is to be judged."""

    track: str
    source: str
    this: Group
    baseline: Group | None
    earlier: list[Path]  # folders of this track's earlier records
    target: float
    speed_only: bool = False
    reviewed: set[int] = field(default_factory=set)

    @property
    def is_yardstick(self) -> bool:
        return not self.earlier and all(run.preset == TRACKS[self.track].yardstick for run in self.this.runs)

    def presets(self, group: Group) -> set[str]:
        """What these runs may be of: the track's preset; the runs of its first record, of its yardstick."""
        begins = len(self.earlier) <= (1 if group is self.baseline else 0)
        return {self.track, TRACKS[self.track].yardstick} - {""} if begins else {self.track}

    @property
    def reference(self) -> str:
        """The source that this one is a change of: the baseline's, or, for a track's first record, this repository's."""
        source = self.baseline.runs[0].source if self.baseline else None
        return source or (ROOT / "train_gpt.py").read_text()


Finding = tuple[int, str, str]  # rule, "ok" | "fail" | "look", what was found


def data_section(source: str) -> str | None:
    found = re.search(r"^#[ =]*4\. Data.*?(?=^#[ =]*5\. )", source, re.MULTILINE | re.DOTALL)
    return found[0] if found else None


def rule_streams(s: Submission) -> list[Finding]:
    mine, theirs = data_section(s.source), data_section(s.reference)
    if mine is None or theirs is None:
        return [(1, "look", "no section 4 (Data) found to compare")]
    if mine != theirs:
        changed = sum(line[0] in "+-" for line in difflib.ndiff(theirs.splitlines(), mine.splitlines()))
        return [(1, "look", f"section 4 (Data) differs from the baseline's, {changed} lines of difference")]
    return [(1, "ok", "section 4 (Data) is the baseline's")]


def rule_loss(s: Submission) -> list[Finding]:
    losses, found = s.this.losses, []
    p = below(losses, s.target)
    words = f"mean {losses.mean:.4f} of {losses.n} runs, target {s.target:g}, p = {p:.4f}"
    if not losses.mean <= s.target:
        found.append((2, "fail", words))
    elif s.speed_only or s.is_yardstick:
        found.append(
            (
                2,
                "ok",
                words
                + ", waived: "
                + ("a change of speed alone" if s.speed_only else "the target is theirs"),
            )
        )
    else:
        found.append((2, "ok" if p < P_LIMIT else "fail", words))
    same: dict[tuple, str] = {}
    for run in s.this.runs:  # a test over copies would prove anything
        twin = same.setdefault((*run.curve("val_loss")[2], *run.curve("train_loss")[2]), run.name)
        if twin != run.name:
            found.append((2, "fail", f"{run.name} has every loss of {twin}: a copy, or the same --seed"))
    return found


def dotted(node: ast.AST) -> str:
    """`a.b.c` of an attribute chain, else ''."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def compiler_flags(source: str) -> list[str]:
    """What a source does to its compilers beyond calling them. recompile_limit changes no generated code."""
    tree, found = ast.parse(source), []
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    internals = r"\b_(?:inductor|dynamo|functorch)\b"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and id(node) not in inner:
            if re.search(internals + r"\.config\b(?!\.recompile_limit$)", dotted(node)):
                found.append(dotted(node))
        elif isinstance(node, (ast.Import, ast.ImportFrom)):  # under another name they could not be followed
            names = [
                f"{getattr(node, 'module', None) or ''}.{alias.name}"
                for alias in node.names
                if isinstance(node, ast.ImportFrom) or alias.asname
            ]
            found += [name.strip(".") for name in names if re.search(internals, name)]
        elif isinstance(node, ast.Call):
            called = [node.func, *node.args[:1]]  # torch.compile(..) and partial(torch.compile, ..)
            if any(dotted(f) == "torch.compile" for f in called):
                found += [
                    f"torch.compile({word.arg}=..)"
                    for word in node.keywords
                    if word.arg in ("mode", "options", "backend", None)
                ]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found += re.findall(r"\b(?:TORCHINDUCTOR|TORCHDYNAMO|TORCH_COMPILE)_\w+", node.value)
    return sorted(set(found))


def rule_compiler(s: Submission) -> list[Finding]:
    try:
        flags = compiler_flags(s.source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return [(3, "fail", f"train_gpt.py is not Python ({type(error).__name__})")]
    return [(3, "fail", f"compiler flags: {', '.join(flags)}")] if flags else [(3, "ok", "no compiler flags")]


def longest_row(labels: list[bool]) -> int:
    longest = row = 0
    for n, label in enumerate(labels):
        row = row + 1 if n and label == labels[n - 1] else 1
        longest = max(longest, row)
    return longest


def interleaved(this: list[Run], baseline: list[Run]) -> Finding:
    """By the logs' `started:` lines, or, where they have none, by the files' times."""
    known = all("started" in run.facts for run in this + baseline)
    when = (lambda run: run.facts["started"]) if known else (lambda run: run.path.stat().st_mtime_ns)
    order = sorted([(when(run), True) for run in this] + [(when(run), False) for run in baseline])
    most = -(-max(len(this), len(baseline)) // min(len(this), len(baseline))) + 1
    longest, by = (
        longest_row([label for _, label in order]),
        "started: lines" if known else "the files' times",
    )
    if longest <= most:
        return 4, "ok", f"interleaved with the baseline's runs, by {by}"
    return 4, "fail" if known else "look", f"not interleaved by {by}: {longest} runs of one kind in a row"


def rule_faster(s: Submission) -> list[Finding]:
    hardware = {
        run.facts.get("hardware", "unknown") for group in (s.this, s.baseline) if group for run in group.runs
    }
    found: list[Finding] = [(4, "ok", f"hardware: {next(iter(hardware))}")]
    if len(hardware) > 1:
        found = [(4, "fail", "runs on different hardware: " + " | ".join(sorted(hardware)))]
    elif not re.search(TRACKS[s.track].hardware, *hardware):
        found = [
            (
                4,
                "fail",
                f"the {s.track} track runs on {TRACKS[s.track].words}, this ran on {next(iter(hardware))}",
            )
        ]
    if s.baseline is None:
        first = not s.earlier
        return found + [
            (4, "ok", "first of its track")
            if first
            else (4, "fail", f"no runs of the record before it, {s.earlier[-1].name}; give --baseline")
        ]
    if s.earlier:
        before = (s.earlier[-1] / "train_gpt.py").read_text(errors="replace").rstrip("\n")
        if any((run.source or "").rstrip("\n") != before for run in s.baseline.runs):
            found.append((4, "look", f"the baseline's runs are not of {s.earlier[-1].name}/train_gpt.py"))
    for run in s.baseline.runs:
        more = sorted(set(run.overrides or {}) - FREE_FLAGS)
        if run.preset not in s.presets(s.baseline) or more:
            found.append(
                (
                    4,
                    "fail",
                    f"baseline's {run.name}: preset {run.preset}, overrides {', '.join(more) or 'none'}",
                )
            )
    gain, p = s.baseline.times.mean - s.this.times.mean, welch(s.this.times, s.baseline.times)
    words = f"{gain:.3f} s faster ({s.baseline.times.mean:.3f} to {s.this.times.mean:.3f}), Welch p = {p:.4f}"
    found.append((4, "fail" if not gain > 0 else "ok" if p < 0.05 else "look", words))
    return found + [interleaved(s.this.runs, s.baseline.runs)]


def rule_preset(s: Submission) -> list[Finding]:
    found, configs = [], []
    for run in s.this.runs:
        config, overrides = run.config, run.overrides
        if run.source is None or config is None or overrides is None:
            found.append((5, "fail", f"{run.name}: no source, configuration or overrides in the log"))
            continue
        if run.source.rstrip("\n") != s.source.rstrip("\n"):
            found.append((5, "fail", f"{run.name}: its source is not the submitted train_gpt.py"))
        elif run.facts.get("source_sha256") != hashlib.sha256(s.source.encode()).hexdigest():
            found.append((5, "fail", f"{run.name}: source_sha256 does not fit the source"))
        if run.preset not in s.presets(s.this) or config.get("preset") != run.preset:
            found.append((5, "fail", f"{run.name}: preset {run.preset}, the track is {s.track}"))
        more = {name: value for name, value in overrides.items() if name not in FREE_FLAGS}
        if more:
            found.append((5, "fail", f"{run.name}: overrides {', '.join(sorted(more))}"))
        configs.append((run.name, {name: value for name, value in config.items() if name not in FREE_FLAGS}))
        if any(config.get(name) != value for name, value in overrides.items()):
            found.append((5, "fail", f"{run.name}: its configuration contradicts its overrides"))
    for name, config in configs[1:]:
        differing = sorted(
            key for key in config.keys() | configs[0][1].keys() if config.get(key) != configs[0][1].get(key)
        )
        if differing:
            found.append(
                (
                    5,
                    "fail",
                    f"{name}: its configuration differs from {configs[0][0]}'s in {', '.join(differing)}",
                )
            )
    return found or [
        (5, "ok", f"{len(s.this.runs)} runs, each the preset without overrides, of this train_gpt.py")
    ]


def check(s: Submission) -> list[Finding]:
    """What the five rules say. `look` becomes `ok` for the rules that a person has reviewed."""
    found = [
        finding
        for rule in (rule_streams, rule_loss, rule_compiler, rule_faster, rule_preset)
        for finding in rule(s)
    ]
    return [
        (rule, "ok", f"{words} (reviewed)")
        if state == "look" and rule in s.reviewed
        else (rule, state, words)
        for rule, state, words in found
    ]


def counts(findings: list[Finding]) -> bool:
    return all(state == "ok" for _, state, _ in findings)


def findings_table(findings: list[Finding], form: str = "text") -> str:
    rows = [[f"{rule}", state, words] for rule, state, words in findings]
    if form == "text":  # no rule as long as the longest finding
        return "\n".join(f"rule {rule}  {state:<4}  {words}" for rule, state, words in rows)
    return table(["rule", "", "found"], rows, form, left=(1, 2))


def group(name: str, place: Path) -> Group:
    runs = read_places([place], warn)
    need(runs, f"{place}: no logs there")
    unfinished = [
        f"{run.name}: {problem}" for run, problem in ((run, result(run)[1]) for run in runs) if problem
    ]
    need(not unfinished, f"{place}: a record's runs all count, but {'; '.join(unfinished)}")
    return group_of(name, runs)


def read_source(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}: cannot be read ({getattr(error, 'strerror', None) or 'not UTF-8'})"
        ) from None


def records_in(track: Path) -> list[Path]:
    """A track's records, oldest first: by their names, which begin with a date."""
    return sorted(path.parent for path in track.glob("[!.]*/train_gpt.py"))


def earlier_records(folder: Path) -> list[Path]:
    """This track's records before `folder`, which need not be there."""
    return [path for path in records_in(folder.parent) if path.name < folder.name]


def history(track: Path) -> list[tuple[Group, Group | None]]:
    """Each record's runs, and those of the record before it that ran between them."""
    found = [
        (
            group(path.name, path / "this"),
            group("baseline", path / "baseline") if (path / "baseline").is_dir() else None,
        )
        for path in records_in(track)
    ]
    need(found, f"{track}: no records there")
    return found


def history_table(records: list[tuple[Group, Group | None]], target: float, form: str = "text") -> str:
    """Losses in nats a token, times in seconds; p: of a mean so far under the target, and of a time so unlike the baseline's."""
    rows, first = [], records[0][0].times.mean
    for one, before in records:
        gain, p = (
            (before.times.mean / one.times.mean, welch(one.times, before.times))
            if before
            else (float("nan"),) * 2
        )
        date, _, name = one.name.partition("_")
        rows.append(
            [
                date,
                name,
                str(one.losses.n),
                number(one.losses.mean, 4),
                number(one.losses.std, 4),
                number(below(one.losses, target), 4),
                number(one.times.mean, 1),
                number(one.times.std, 1),
                number(gain, 2),
                number(p, 4),
                number(first / one.times.mean, 1),
            ]
        )
    head = [
        "date",
        "record",
        "runs",
        "loss μ",
        "loss σ",
        f"p under {target:g}",
        "time μ",
        "time σ",
        "x before",
        "p",
        "x first",
    ]
    return table(head, rows, form, left=(0, 1))


def draw_history(records: list[tuple[Group, Group | None]], track: str, out: Path) -> None:
    """Each run's training time, a column a record; a line through the means. The axis of time is logarithmic."""
    figure, axes = canvas(out)
    means = [one.times.mean for one, _ in records]
    axes.plot(range(len(records)), means, color="grey", linewidth=1, zorder=1)
    for n, (one, _) in enumerate(records):
        axes.scatter([n] * one.times.n, one.times.values, s=18)
        axes.annotate(
            f"{one.times.mean:.1f} s, x {means[0] / one.times.mean:.1f}",
            (n, one.times.mean),
            (8, 8),
            textcoords="offset points",
        )
    axes.set_yscale("log")
    axes.set_xticks(range(len(records)), [one.name.replace("_", "\n", 1) for one, _ in records])
    axes.margins(x=0.25)
    axes.set_ylabel("training time of a run, seconds")
    axes.set_title(f"records of the {track} track")
    axes.grid(alpha=0.3)
    save(figure, out)


def readme(folder: Path, s: Submission, findings: list[Finding], text: str, by: str) -> str:
    groups = [s.baseline, s.this] if s.baseline else [s.this]
    place = f"records/{s.track}/{folder.name}"
    compared = " ".join(f"{place}/{one.name}" for one in groups)
    parts = [
        f"# {folder.name.partition('_')[2]}",
        text.strip(),
        f"Track `{s.track}`: {TRACKS[s.track].words}, validation loss {s.target:g}.",
        f"`python records/compare.py groups {compared} --target {s.target:g} --digits 3 --numbers`",
        groups_table(groups, s.target, "markdown", digits=3),
        "```\n" + numbers_text(groups) + "\n```",
        f"`python records/record.py verify {place}`",
        findings_table(findings, "markdown"),
        f"Reviewed by {by}" if by else "",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def write_record(folder: Path, s: Submission, text: str) -> None:
    """Whole or not at all: under a hidden name until it is complete."""
    part = folder.with_name(f".{folder.name}.part")
    try:
        shutil.rmtree(part, ignore_errors=True)
        for one in filter(None, (s.this, s.baseline)):
            (part / one.name).mkdir(parents=True)
            for path in sorted({run.path for run in one.runs}):
                shutil.copy2(path, part / one.name / path.name)  # with its time
        (part / "train_gpt.py").write_text(s.source)
        (part / "README.md").write_text(text)
        os.replace(part, folder)
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        raise UserError(f"{folder}: cannot be written ({error.strerror})") from None


def flags() -> argparse.ArgumentParser:
    parser = arguments(__doc__)
    parser.add_argument("what", choices=("verify", "package", "history"))
    parser.add_argument("folder", nargs="?", type=Path, help="of verify")
    parser.add_argument(
        "--track", choices=TRACKS, help="of package and history; verify takes it from the folder's parent"
    )
    parser.add_argument("--name", help="of package: a word or several in CamelCase, e.g. EvenLoad")
    parser.add_argument("--date", default=time.strftime("%Y-%m-%d"), help="of package (default: today)")
    parser.add_argument("--this", type=Path, metavar="LOGS", help="of package: folder of the runs' logs")
    parser.add_argument(
        "--baseline", type=Path, metavar="LOGS", help="of package: the runs of the record before it"
    )
    parser.add_argument(
        "--file", type=Path, default=ROOT / "train_gpt.py", help="of package (default: this repository's)"
    )
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help="of package: what was done and why, for the README"
    )
    parser.add_argument(
        "--records", type=Path, default=ROOT / "records", help="where the tracks' folders are"
    )
    parser.add_argument("--target", type=float, help="another than the track's")
    parser.add_argument(
        "--speed_only", action="store_true", help="a change of speed alone: rule 2 without its p"
    )
    parser.add_argument(
        "--reviewed",
        type=int,
        nargs="+",
        default=[],
        metavar="RULE",
        help="rules marked `look` that a person has judged",
    )
    parser.add_argument("--by", default="", help="who, and why")
    parser.add_argument("--out", type=Path, metavar="FILE", help="of history: picture, .png, .svg or .pdf")
    parser.add_argument("--format", choices=FORMATS, default="text", help="of history's table")
    return parser


def places(args: argparse.Namespace) -> tuple[Path, str, Path, Path, Path | None]:
    """The record's folder, its track, its train_gpt.py, its logs, the baseline's."""
    if args.what == "verify":
        need(args.folder, "verify: give the record's folder")
        folder = args.folder.resolve()
        track, baseline = args.track or folder.parent.name, folder / "baseline"
        need(track in TRACKS, f"{folder}: its parent is no track ({', '.join(TRACKS)}); give --track")
        return (
            folder,
            track,
            folder / "train_gpt.py",
            folder / "this",
            baseline if baseline.is_dir() else None,
        )
    need(args.track and args.name and args.this, "package: give --track, --name and --this")
    need(
        re.fullmatch(r"\d{4}-\d\d-\d\d", args.date) and re.fullmatch(r"\w[\w.-]*", args.name),
        f"--date {args.date} --name {args.name}: YYYY-MM-DD, and letters, digits, . _ -",
    )
    folder = args.records.resolve() / args.track / f"{args.date}_{args.name}"
    need(not folder.exists(), f"{folder}: is there already")
    return folder, args.track, args.file, args.this, args.baseline


def target_of(args: argparse.Namespace, track: str) -> float:
    return TRACKS[track].target if args.target is None else args.target


def main(argv: list[str]) -> int:
    args = flags().parse_args(argv)
    need(not args.reviewed or args.by, "--reviewed: say --by whom and why")
    if args.what == "history":
        need(args.track, "history: give --track")
        records = history(args.records.resolve() / args.track)
        print(history_table(records, target_of(args, args.track), args.format))
        if args.out:
            draw_history(records, args.track, args.out)
        return 0
    folder, track, file, this, baseline = places(args)
    s = Submission(
        track,
        read_source(file),
        group("this", this),
        group("baseline", baseline) if baseline else None,
        earlier_records(folder),
        target_of(args, track),
        args.speed_only,
        set(args.reviewed),
    )
    text = read_source(args.text) if args.text else ""
    findings = check(s)
    print(findings_table(findings))
    if not counts(findings):
        print(
            "does not count"
            + (" until a person has looked" if not any(f[1] == "fail" for f in findings) else "")
        )
        return 1
    if args.what == "package":
        write_record(folder, s, readme(folder, s, findings, text, args.by))
        print(f"written: {folder}")
    return 0


if __name__ == "__main__":
    command(main)
