"""List, watch, compare and export training logs of this field: ours, the public ones of any year, llm.c's.

    python -m records.logs FILE_OR_FOLDER... [--sort loss] [--where "loss<3.28"] [--last 5]
    python -m records.logs --follow LOG                  watch a run: last loss, rate, time left
    python -m records.logs diff LOG LOG                  configuration, hardware, versions, source of two runs
    python -m records.logs export LOGS... --out NAME     curves: NAME.csv, NAME.jsonl, or TensorBoard's

The list has a line a run. A run that stopped early, failed or is still running is shown with its last loss;
its `state` says so. What is no log is named with the reason and skipped. Nothing of a log is executed.
"""

import argparse
import math
import operator
import re
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cli import UserError, arguments, command, need, one_line, path_flag, text_flag
from records.diff import diff_text
from records.export import export
from records.files import STEP, number_flag, say, warn
from records.reader import Run, last_result, read_file, read_logs, read_paths, result
from records.tables import FORMATS, table

STILL_WRITTEN = 120  # seconds since a log's last change within which its run counts as running
POLL = 1.0  # seconds between two looks at a log that is followed


def state_of(run: Run, is_whole: bool) -> str:
    """finished, running, stopped, failed or interrupted. is_whole: it has a loss at its last planned step."""
    failure = run.failure()
    if is_whole and failure is None:
        return "finished"
    if failure is not None:
        return failure.partition(":")[0]
    return "running" if time.time() - changed_at(run.path) < STILL_WRITTEN else "stopped"


def changed_at(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


@dataclass(frozen=True)
class Row:
    """A line of the list: what is shown, and what it is sorted and filtered by."""

    cells: dict[str, str]
    values: dict[str, float | str]


def row_of(run: Run, step: int | None, key: str) -> Row:
    found, problem = result(run, step, key)
    is_whole = found is not None if step is None else result(run, key=key)[0] is not None
    state = state_of(run, is_whole)
    if found is None and step is None:
        found = last_result(run, key)
    memory = run.peak_memory
    planned = "" if run.planned is None else f"/{run.planned}"
    note = run.failure() or (problem or "")
    started = run.facts.get("started") or time.strftime(
        "%Y-%m-%dT%H:%M:%SZ", time.gmtime(changed_at(run.path))
    )
    values = {
        "run": run.label,
        "preset": run.preset or "-",
        "steps": float(run.last_step),
        "loss": found.loss if found else math.nan,
        "seconds": found.seconds if found else math.nan,
        "memory": math.nan if memory is None else float(memory),
        "hardware": run.hardware or "-",
        "started": started,
        "state": state,
    }
    cells = {name: str(value) for name, value in values.items()}
    cells["steps"] = f"{run.last_step}{planned}"
    cells["loss"] = found.text if found else "-"
    cells["seconds"] = f"{found.seconds:.3f}" if found and not math.isnan(found.seconds) else "-"
    cells["memory"] = "-" if memory is None else str(memory)
    cells["note"] = note
    return Row(cells, values)


COLUMNS = ("run", "preset", "steps", "loss", "seconds", "memory", "hardware", "started", "state")
COMPARISONS = {
    "<=": operator.le,
    ">=": operator.ge,
    "!=": operator.ne,
    "=": operator.eq,
    "<": operator.lt,
    ">": operator.gt,
    "~": lambda value, wanted: str(wanted) in str(value),
}


def condition(text: str) -> Callable[[Row], bool]:
    """The type of --where: `loss<3.28`, `state=failed`, `run~muon`; = != < <= > >= and ~ for "contains"."""
    found = re.fullmatch(r"\s*(\w+)\s*(<=|>=|!=|=|<|>|~)\s*(.+?)\s*", text)
    if not found or found[1] not in COLUMNS:
        shown, names = one_line(text, 60), ", ".join(COLUMNS)
        raise argparse.ArgumentTypeError(f"{shown!r}: give COLUMN<VALUE (or = != <= > >= ~), one of {names}")
    name, compare, wanted = found[1], COMPARISONS[found[2]], found[3]

    def keep(row: Row) -> bool:
        value = row.values[name]
        if isinstance(value, float) and found[2] != "~":
            return compare(value, limit)
        return compare(str(value), wanted)

    is_number = name in ("steps", "loss", "seconds", "memory") and found[2] != "~"
    try:
        limit = float(wanted) if is_number else math.nan
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{one_line(text, 60)!r}: {name} is compared with a number"
        ) from None
    return keep


def sort_key(name: str) -> Callable[[Row], tuple]:
    """Rows without the value come last."""

    def key(row: Row) -> tuple:
        value = row.values[name]
        return (isinstance(value, float) and math.isnan(value), value)

    return key


def list_runs(args: argparse.Namespace) -> str:
    rows = [row_of(run, args.step, args.loss) for run in read_logs(args.paths, warn)]
    for keep in args.where:
        rows = [row for row in rows if keep(row)]
    if args.last:
        rows = sorted(rows, key=sort_key("started"))[-args.last :]
    if args.sort:
        known = [row for row in rows if not sort_key(args.sort)(row)[0]]
        unknown = [row for row in rows if sort_key(args.sort)(row)[0]]
        rows = sorted(known, key=sort_key(args.sort), reverse=args.reverse) + unknown
    names = {"loss": args.loss, "memory": "peak MiB"}
    head = [names.get(name, name) for name in COLUMNS] + ["note"]
    cells = [[row.cells[name] for name in (*COLUMNS, "note")] for row in rows]
    return table(head, cells, args.format, left=(0, 1, 6, 7, 8, 9))


# ---- watching a run


def progress(run: Run) -> str:
    """One line: step, losses, rate, time left."""
    steps, seconds, _ = run.curve("train_time")
    if not steps:
        return f"{run.name}: no step yet"
    parts = [f"step {steps[-1]}" + ("" if run.planned is None else f" of {run.planned}")]
    for key in ("train_loss", "val_loss"):
        last = last_result(run, key)
        if last is not None:
            parts.append(
                f"{key} {last.text} (step {last.step})" if key == "val_loss" else f"{key} {last.text}"
            )
    back = max(0, len(steps) - 50)
    pace = (seconds[-1] - seconds[back]) / max(1, steps[-1] - steps[back])
    if pace > 0:
        parts.append(f"{1000 * pace:.0f} ms a step")
        if run.planned is not None:
            parts.append(f"{(run.planned - steps[-1]) * pace:.0f} s of training left")
    return f"{run.name}: " + ", ".join(parts)


def show_progress(line: str, is_terminal: bool) -> None:
    """On a terminal always the same line, else one below the other."""
    if not is_terminal:
        say(line)
        return
    columns = shutil.get_terminal_size().columns
    sys.stdout.write(f"\r\x1b[K{line[: columns - 1]}")
    sys.stdout.flush()


def follow(path: Path, patience: float) -> None:
    """Prints a line for each change of the log's last run, until it ends or is silent for so many seconds."""
    is_terminal = sys.stdout is not None and sys.stdout.isatty()
    end_of_line = "\n" if is_terminal else ""
    shown, changed = "", time.monotonic()
    while True:
        runs, problem = read_file(path)
        line = one_line(progress(runs[-1]) if runs else f"{path}: waiting ({problem})", 200)
        if line != shown:
            show_progress(line, is_terminal)
            shown, changed = line, time.monotonic()
        ended = bool(runs) and (runs[-1].failure() is not None or result(runs[-1])[0] is not None)
        if ended and (runs[-1].planned is not None or runs[-1].failure()):
            say(end_of_line + one_line(f"{runs[-1].name}: {runs[-1].failure() or 'finished'}", 300))
            return
        if time.monotonic() - changed >= patience:
            name = one_line(path.name)
            say(f"{end_of_line}{name}: no new line for {patience:g} s: the run has stopped, or is stuck")
            return
        time.sleep(min(POLL, patience))


# ---- the command


def flags() -> argparse.ArgumentParser:
    parser = arguments(__doc__)
    parser.add_argument("paths", nargs="+", type=path_flag, metavar="FILE_OR_FOLDER")
    parser.add_argument(
        "--step", type=STEP, metavar="N", help="read the loss at this step (default: the last)"
    )
    parser.add_argument(
        "--loss", type=text_flag, default="val_loss", metavar="KEY", help="which number of an event line"
    )
    parser.add_argument("--sort", choices=COLUMNS, help="by this column; --reverse for the largest first")
    parser.add_argument("--reverse", action="store_true")
    parser.add_argument(
        "--where",
        type=condition,
        action="append",
        default=[],
        metavar="TEST",
        help="only such: loss<3.28, run~muon",
    )
    parser.add_argument(
        "--last",
        type=number_flag(1, 10**9, whole=True),
        metavar="N",
        help="only the N that were started last",
    )
    parser.add_argument("--follow", action="store_true", help="watch one log until its run ends")
    parser.add_argument(
        "--patience",
        type=number_flag(0, 10**6),
        default=600.0,
        help="of --follow: seconds without a line (600)",
    )
    parser.add_argument(
        "--out", type=path_flag, metavar="NAME", help="of export: file, or folder for TensorBoard"
    )
    parser.add_argument(
        "--to", choices=("csv", "jsonl", "tensorboard"), help="of export (default: by NAME's ending)"
    )
    parser.add_argument("--format", choices=FORMATS, default="text")
    return parser


def pick_command(argv: list[str]) -> tuple[str, list[str]]:
    """`diff` and `export` are commands where they stand first, unless a file has that name."""
    if argv and argv[0] in ("diff", "export") and not Path(argv[0]).exists():
        return argv[0], argv[1:]
    return "list", argv


def one_run(path: Path) -> Run:
    runs = read_logs([path], warn)
    if len(runs) > 1:
        raise UserError(f"{path}: {len(runs)} runs there; give a log of one run")
    return runs[0]


def main(argv: list[str]) -> None:
    what, rest = pick_command(argv)
    args = flags().parse_intermixed_args(rest)
    need(what == "export" or not (args.out or args.to), f"{what}: --out and --to are of export")
    if what == "diff":
        need(len(args.paths) == 2, f"diff: give two logs, not {len(args.paths)}")
        say(diff_text(*map(one_run, args.paths)))
    elif what == "export":
        need(args.out, "export: give --out NAME.csv, NAME.jsonl, or with --to tensorboard a folder")
        runs = read_logs(args.paths, warn)
        say(export(runs, args.out, args.to))
    elif args.follow:
        need(len(args.paths) == 1 and not args.paths[0].is_dir(), "--follow: give one log")
        read_paths(args.paths)  # UserError if it is not there
        follow(args.paths[0], args.patience)
    else:
        say(list_runs(args))


if __name__ == "__main__":
    command(main)
