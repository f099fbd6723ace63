"""Check a record by the rules of records/README.md, and make its folder.

    python -m records.record verify  records/TRACK/DATE_NAME
    python -m records.record package --track TRACK --name NAME --this LOGS [--baseline LOGS] [--text why.md]
    python -m records.record history --track TRACK [--out FILE.png]

verify reads a record's folder: train_gpt.py, this/ (a log a run) and baseline/ (the runs of the record
before it, between its own). Where these are the very logs of the record before it, a file BASELINE names
that record's this/. package checks the same of logs anywhere and, if all is well, writes
records/TRACK/DATE_NAME with a README; else nothing. history prints a track's records, oldest first, and
draws them: each against the target, the one before and the first. Nothing of a log or of the submitted file
is executed. Exit code 0: counts; 1: does not, the reasons are printed.

What a program cannot judge (a changed data section, say) is marked `look`: a person looks, and says so with
--reviewed 1,4 --by "NAME: why".
"""

import argparse
import datetime
import hashlib
import math
import os
import re
import shutil
import tempfile
import time
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path

from cli import UserError, arguments, command, need, one_line, os_reason, path_flag, text_flag
from records.compare import Style, groups_table, number
from records.files import (
    LOSS,
    check_output,
    current_umask,
    file_kind,
    read_text,
    say,
    warn,
    words_flag,
)
from records.groups import Group, group_of, numbers_text
from records.plot import canvas, save, time_axis
from records.reader import known_sources, read_logs, result, without_source
from records.rules import ROOT, TRACKS, Finding, Submission, check, time_test
from records.stats import below
from records.tables import FORMATS, table


def counts(findings: list[Finding]) -> bool:
    return all(finding.state == "ok" for finding in findings)


def findings_table(findings: list[Finding], form: str = "text") -> str:
    if form == "text":  # no rule as long as the longest finding
        lines = [f"rule {one.rule}  {one.state:<4}  {one.words}" for one in findings]
        return "\n".join(one_line(line) for line in lines)
    rows = [[str(one.rule), one.state, one.words] for one in findings]
    return table(["rule", "", "found"], rows, form, left=(1, 2))


# ---- what is in a record's folder


def group(name: str, path: Path) -> Group:
    """The runs of a record, all of which count: none may be unfinished."""
    runs = read_logs([path], warn)
    for run in runs:
        found, problem = result(run)
        if found is not None and not math.isfinite(found.loss):
            problem = f"ends with a val_loss of {found.text}"
        need(problem is None, f"{path}: a record's runs all count, but {run.name}: {problem}")
    return group_of(name, runs, keep_copies=True)


def age(record: Path) -> list[str | int]:
    """Sorts records, oldest first, by their names: a date, then perhaps a number, of which 9 is before 10."""
    parts = re.split(r"([0-9]+)", record.name)  # texts and numbers by turns
    return [int(part) if n % 2 else part for n, part in enumerate(parts)]


def records_in(track: Path) -> list[Path]:
    """A track's records, oldest first."""
    return sorted((path.parent for path in track.glob("[!.]*/train_gpt.py")), key=age)


def card_of(logs: Group) -> str:
    """The kind of card, or of machine, that runs were on."""
    return (logs.runs[0].hardware or "unknown").partition(";")[0]


def earlier_records(folder: Path, this: Path) -> list[Path]:
    """This track's records before `folder`, which need not be there; on the card of the logs in `this`."""
    found = [path for path in records_in(folder.parent) if age(path) < age(folder)]
    track = TRACKS.get(folder.parent.name)
    if not found or track is None or not track.by_card:
        return found
    card = card_of(group("this", this))
    return [path for path in found if card_of(group(path.name, path / "this")) == card]


def baseline_of(folder: Path) -> Path | None:
    """The folder of a record's baseline: baseline/, or this/ of the record before if BASELINE names it."""
    named, own = folder / "BASELINE", folder / "baseline"
    if file_kind(named) == "missing":
        return own if file_kind(own) == "folder" else None
    need(file_kind(own) == "missing", f"{folder}: has BASELINE and baseline/; one of them must go")
    earlier = earlier_records(folder, folder / "this")
    need(earlier, f"{named}: there is no record before this one")
    wanted = f"{earlier[-1].name}/this"
    given = read_text(named, limit=1000).strip()
    need(
        given == wanted,
        f"{named}: says {one_line(given, 100)!r}; it can only name the record before, {wanted}",
    )
    return earlier[-1] / "this"


# ---- a track's history


def history(track: Path) -> list[tuple[Group, Group | None]]:
    """Each record's runs, and those of the record before it that ran between them."""
    found = []
    for path in records_in(track):
        baseline = baseline_of(path)
        found.append((group(path.name, path / "this"), group("baseline", baseline) if baseline else None))
    need(found, f"{track}: no records there")
    if track.name in TRACKS and TRACKS[track.name].by_card:
        found.sort(key=lambda record: card_of(record[0]))  # stable: oldest first of each
    return found


def speedups(records: list[tuple[Group, Group | None]], by_card: bool) -> list[tuple[float, float]]:
    """Of each record: how many times as fast as the one before it by runs side by side, and as the first.

    The second is a product of the first ones: records need not be of one machine.
    """
    found, so_far = [], {}
    for one, before in records:
        card = card_of(one) if by_card else ""
        gain = before.times.mean / one.times.mean if before and one.times.mean > 0 else math.nan
        so_far[card] = so_far[card] * gain if card in so_far else 1.0
        found.append((gain, so_far[card]))
    return found


def history_table(
    records: list[tuple[Group, Group | None]], target: float, form: str = "text", by_card: bool = False
) -> str:
    """Losses in nats a token, times in seconds.

    p: of a mean so far under the target, and of a time so unlike the baseline's.
    """
    rows = []
    for (one, before), (gain, in_all) in zip(records, speedups(records, by_card), strict=True):
        p = time_test(one, before)[0] if before else math.nan
        date, _, name = one.name.partition("_")
        card = [card_of(one)] if by_card else []
        rows.append(
            [
                *card,
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
                number(in_all, 1),
            ]
        )
    losses = ["loss μ", "loss σ", f"p under {target:g}"]
    names = ["card", "date", "record"] if by_card else ["date", "record"]
    head = [*names, "runs", *losses, "time μ", "time σ", "x before", "p", "x first"]
    return table(head, rows, form, left=tuple(range(len(names))))


def draw_history(records: list[tuple[Group, Group | None]], track: str, target: float, out: Path) -> None:
    """Each run's training time, a column a record; a line through the means. Time is logarithmic."""
    figure, axes = canvas(out)
    means = [one.times.mean for one, _ in records]
    cards = [card_of(one) if TRACKS[track].by_card else "" for one, _ in records]
    for card in dict.fromkeys(cards):
        places = [n for n in range(len(records)) if cards[n] == card]
        axes.plot(places, [means[n] for n in places], color="grey", linewidth=1, zorder=1)
    in_all = [times for _, times in speedups(records, TRACKS[track].by_card)]
    for n, (one, _) in enumerate(records):
        axes.scatter([n] * one.times.n, one.times.values, s=18)
        first = cards.index(cards[n])
        words = f"{one.times.mean:.1f} s" + (f"\n{cards[n]}" if cards[n] and first == n else "")
        words += f"\n{in_all[n]:.1f} x" if first < n else ""
        axes.annotate(words, (n, one.times.mean), (8, 8), textcoords="offset points")
    time_axis(axes.yaxis)
    labels = [one.name.replace("_", "\n", 1) for one, _ in records]
    if len(labels) > 6:  # side by side they would touch
        labels = ["\n\n" * (n % 2) + label for n, label in enumerate(labels)]
    axes.set_xticks(range(len(records)), labels, fontsize="small")
    axes.margins(x=max(1 / len(records), 0.13), y=0.15)  # room for the last one's words
    axes.set_ylabel("training time of a run, seconds (logarithmic); x: against the first")
    axes.set_title(f"How long does a run of the {track} track take to a validation loss of {target:g}?")
    axes.grid(alpha=0.3)
    save(figure, out)


# ---- packaging


def readme(folder: Path, s: Submission, findings: list[Finding], text: str, by: str, named: str) -> str:
    """named: what BASELINE says, or "" where the baseline's logs are copied."""
    groups = [s.baseline, s.this] if s.baseline else [s.this]
    record = f"records/{s.track}/{folder.name}"
    paths = {"this": f"{record}/this", "baseline": f"{record}/baseline"}
    if named:
        paths["baseline"] = f"baseline=records/{s.track}/{named}"
    compared = " ".join(paths[one.name] for one in groups)
    parts = [
        f"# {folder.name.partition('_')[2]}",
        text.strip(),
        f"Track `{s.track}`: {TRACKS[s.track].words}, validation loss {s.target:g}.",
        f"`python -m records.compare groups {compared} --target {s.target:g} --digits 3 --numbers`",
        groups_table(groups, s.target, Style("markdown", digits=3)),
        "```\n" + numbers_text(groups) + "\n```",
        f"`python -m records.record verify {record}`",
        findings_table(findings, "markdown"),
        f"Reviewed by {one_line(by)}" if by else "",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def log_names(paths: list[Path]) -> dict[Path, str]:
    """A name for each log, each once: its own, or, where two have the same, with their folders' before it."""
    names: dict[Path, str] = {path: path.name for path in paths}
    depth = 1
    while len(set(names.values())) < len(paths):
        depth += 1
        twins = [name for name in names.values() if list(names.values()).count(name) > 1]
        for path in paths:
            if names[path] in twins:
                parts = path.absolute().parts[1:]
                need(depth <= len(parts), f"{path}: its name cannot be told from another log's")
                names[path] = "-".join(parts[-depth:])
    return names


def digests(paths: list[Path]) -> list[str]:
    """Of logs, their sources left out, which their headers name."""
    return sorted(hashlib.sha256(without_source(path.read_bytes())).hexdigest() for path in paths)


def logs_of(one: Group) -> list[Path]:
    return sorted({run.path for run in one.runs})


def named_baseline(s: Submission) -> str:
    """What BASELINE may say: the record before, if its logs are the baseline's, byte for byte; else ""."""
    if s.baseline is None or not s.earlier:
        return ""
    theirs = s.earlier[-1] / "this"
    known = logs_of(group("this", theirs)) if theirs.is_dir() else []
    return f"{s.earlier[-1].name}/this" if digests(known) == digests(logs_of(s.baseline)) else ""


def write_record(folder: Path, s: Submission, text: str, named: str) -> None:
    """Whole or not at all: under a hidden name of its own until it is complete."""
    part = None
    known = {
        hashlib.sha256(s.source.encode("utf-8", "surrogateescape")).hexdigest(),
        *known_sources(folder.absolute().parent),
    }
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{folder.name[:100]}.", suffix=".part", dir=folder.parent))
        part.chmod(0o777 & ~current_umask())
        for one in [s.this] if named or s.baseline is None else [s.this, s.baseline]:
            copy_logs(one, part / one.name, known)
        if named:
            (part / "BASELINE").write_text(f"{named}\n")
        (part / "train_gpt.py").write_text(s.source, encoding="utf-8")
        (part / "README.md").write_text(text, encoding="utf-8")
        need(file_kind(folder) == "missing", f"{folder}: is there already")
        os.rename(part, folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({os_reason(error)})") from None
    finally:
        if part is not None:
            shutil.rmtree(part, ignore_errors=True)


def copy_logs(one: Group, folder: Path, known: Container[str]) -> None:
    """With their times, and without sources that the track's records hold, by their sha256."""
    folder.mkdir()
    names = log_names(logs_of(one))
    for path, name in names.items():
        (folder / name).write_bytes(without_source(path.read_bytes(), known))
        shutil.copystat(path, folder / name)
    copied = len(list(folder.iterdir()))
    assert copied == len(names), f"{copied} of {len(names)} logs in {folder}"


# ---- the command


def rule_numbers(text: str) -> set[int]:
    """The type of --reviewed."""
    words = words_flag(text)
    if not all(word in {"1", "2", "3", "4", "5"} for word in words):
        raise argparse.ArgumentTypeError(
            f"{one_line(text, 40)!r}: give rules, 1 to 5, with commas between them"
        )
    return {int(word) for word in words}


def date_flag(text: str) -> str:
    """The type of --date: a day that there is."""
    try:
        is_day = datetime.date.fromisoformat(text).isoformat() == text
    except ValueError:
        is_day = False
    if not is_day:
        raise argparse.ArgumentTypeError(f"{one_line(text, 40)!r}: give a day of the calendar, YYYY-MM-DD")
    return text


def flags() -> argparse.ArgumentParser:
    parser = arguments(__doc__)
    parser.add_argument("what", choices=("verify", "package", "history"))
    parser.add_argument("folder", nargs="?", type=path_flag, help="of verify")
    parser.add_argument("--track", choices=TRACKS, help="verify takes it from the folder's parent")
    parser.add_argument("--name", help="of package: a word or several in CamelCase, e.g. EvenLoad")
    today = time.strftime("%Y-%m-%d")
    parser.add_argument("--date", type=date_flag, default=today, help="of package (default: today)")
    parser.add_argument("--this", type=path_flag, metavar="LOGS", help="of package: folder of the runs' logs")
    parser.add_argument(
        "--baseline", type=path_flag, metavar="LOGS", help="of package: runs of the record before"
    )
    parser.add_argument("--file", type=path_flag, default=ROOT / "train_gpt.py", help="of package")
    parser.add_argument("--text", type=path_flag, metavar="FILE", help="of package: what was done and why")
    parser.add_argument(
        "--records", type=path_flag, default=ROOT / "records", help="where the tracks' folders are"
    )
    parser.add_argument("--target", type=LOSS, help="another than the track's")
    parser.add_argument(
        "--speed_only", action="store_true", help="a change of speed alone: rule 2 without its p"
    )
    parser.add_argument(
        "--reviewed",
        type=rule_numbers,
        default=set(),
        metavar="RULES",
        help="rules marked `look` that a person has judged, with commas",
    )
    parser.add_argument("--by", type=text_flag, default="", help="who, and why")
    parser.add_argument(
        "--out", type=path_flag, metavar="FILE", help="of history: picture, .png, .svg or .pdf"
    )
    parser.add_argument("--format", choices=FORMATS, default="text", help="of history's table")
    return parser


@dataclass(frozen=True)
class Paths:
    """A record's folder, its track, its train_gpt.py, its logs, the baseline's."""

    folder: Path
    track: str
    file: Path
    this: Path
    baseline: Path | None


def paths_of(args: argparse.Namespace) -> Paths:
    if args.what == "verify":
        need(args.folder, "verify: give the record's folder")
        need(file_kind(args.folder) == "folder", f"{args.folder}: is no folder; give the record's")
        folder = args.folder.resolve()
        track = args.track or folder.parent.name
        need(track in TRACKS, f"{folder}: its parent is no track ({', '.join(TRACKS)}); give --track")
        return Paths(folder, track, folder / "train_gpt.py", folder / "this", baseline_of(folder))
    need(args.track and args.name and args.this, "package: give --track, --name and --this")
    good_name = re.fullmatch(r"\w[\w.-]{0,99}", args.name, re.ASCII)
    need(good_name, f"--name {one_line(args.name, 100)}: up to 100 letters, digits, . _ -")
    folder = args.records.absolute() / args.track / f"{args.date}_{args.name}"
    need(file_kind(folder) == "missing", f"{folder}: is there already")
    return Paths(folder, args.track, args.file, args.this, args.baseline)


def target_of(args: argparse.Namespace, track: str) -> float:
    return TRACKS[track].target if args.target is None else args.target


def main_history(args: argparse.Namespace) -> int:
    need(args.track, "history: give --track")
    if args.out:
        check_output(args.out)
    records, target = history(args.records.absolute() / args.track), target_of(args, args.track)
    say(history_table(records, target, args.format, TRACKS[args.track].by_card))
    if args.out:
        draw_history(records, args.track, target, args.out)
    return 0


def main(argv: list[str]) -> int:
    args = flags().parse_intermixed_args(argv)
    need(not args.reviewed or args.by, "--reviewed: say --by whom and why")
    need(
        args.what == "verify" or args.folder is None, f"{args.what}: takes no folder (--help lists the flags)"
    )
    need(args.what == "history" or args.out is None, f"{args.what}: --out is of history")
    if args.what == "history":
        return main_history(args)
    paths = paths_of(args)
    s = Submission(
        paths.track,
        read_text(paths.file),
        group("this", paths.this),
        group("baseline", paths.baseline) if paths.baseline else None,
        earlier_records(paths.folder, paths.this),
        target_of(args, paths.track),
        args.speed_only,
        args.reviewed,
    )
    text = read_text(args.text) if args.text else ""
    findings = check(s)
    say(findings_table(findings))
    if not counts(findings):
        is_open = not any(finding.state == "fail" for finding in findings)
        say("does not count" + (" until a person has looked" if is_open else ""))
        return 1
    if args.what == "package":
        named = named_baseline(s)
        write_record(paths.folder, s, readme(paths.folder, s, findings, text, args.by, named), named)
        say(f"written: {paths.folder}")
    return 0


if __name__ == "__main__":
    command(main)
