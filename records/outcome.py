"""Runs a training, then says what came of it: what run.sh calls on a terminal.

    python -m records.outcome [FLAGS of train_gpt.py]

The training has the terminal to itself. After a whole run a few lines follow: its result, beside its track's
target and last record; where the log is; how to sample from it.
"""

import argparse
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from cli import command, one_line
from records.files import say
from records.groups import group_of
from records.reader import Run, read_paths, result
from records.record import card_of, records_in
from records.rules import FREE_FLAGS, ROOT, TRACKS


def main(argv: list[str]) -> int:
    began = time.time()
    code = train([sys.executable, str(ROOT / "train_gpt.py"), *argv])
    if code == 0:
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        parser.add_argument("--log_dir", type=Path, default=Path("logs"))
        folder = parser.parse_known_args(argv)[0].log_dir
        for line in outcome(folder, began):
            say(line)
    return code


def train(run: list[str]) -> int:
    """Its exit code. Ctrl-C reaches it from the terminal; SIGTERM is handed on."""
    process = subprocess.Popen(run)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, _: process.send_signal(number))
    code = process.wait()
    return 128 - code if code < 0 else code


def outcome(folder: Path, began: float) -> list[str]:
    """Of the newest run in the folder, if it was written to since."""
    files = [path for path in folder.glob("*.txt") if path.stat().st_mtime >= began - 1]
    runs = read_paths([max(files, key=lambda path: path.stat().st_mtime)]) if files else []
    found = result(runs[-1])[0] if runs else None
    if found is None:
        return []
    run = runs[-1]
    lines = [f"result: {found.text} after {in_words(found.seconds)}{beside_track(run, found.loss)}"]
    lines.append(f"log: {one_line(str(run.path))}")
    if list(folder.glob(f"{run.path.stem}.step*.pt")):
        at_home = folder == Path("logs")
        sample = f"{os.path.relpath(ROOT)}/run.sh sample"
        other = f"python -m evals.sample {shlex.quote(str(folder.absolute()))}"
        lines.append(f'sample: {sample if at_home else other} "The king"')
    return lines


def in_words(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "a time that the log does not say"
    return f"{seconds:.1f} s" if seconds < 600 else f"{seconds / 60:.1f} minutes"


def beside_track(run: Run, loss: float) -> str:
    """'' for a run that is no track's."""
    name = run.preset or ""
    track = TRACKS.get(name)
    if track is None:
        return ""
    changed = sorted(set(run.overrides or {}) - FREE_FLAGS)
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        return f" (the track {name} is run without --{', --'.join(changed[:3])}{more})"
    reached = "reached" if loss <= track.target else "not reached"
    return f"; the target of the track {name} is {track.target:g}: {reached}{last_record(name)}"


def last_record(track: str) -> str:
    folders = records_in(ROOT / "records" / track)
    if not folders:
        return ""
    runs = read_paths([folders[-1] / "this"])
    record = group_of(folders[-1].name, runs, keep_copies=True, tell=lambda _: None)
    if not record.times.n:
        return ""
    loss, seconds = record.losses.mean, record.times.mean
    title, card = record.name.partition("_")[2], one_line(card_of(record), 60)
    return f"\nlast record: {loss:.4f} after {seconds:.1f} s, {title}, on {card}"


if __name__ == "__main__":
    command(main)
