"""The record folders of a folder as one table, ours and those of the public archives."""

import math
from pathlib import Path

from cli import UserError, need, one_line, os_reason
from records.files import file_kind, warn
from records.groups import Group, NamedPath, group_of, read_numbers_file
from records.reader import SUFFIXES, read_paths
from records.stats import below, stars


def folders_in(folder: Path) -> list[Path]:
    """Its folders by name, hidden ones and links left out."""
    try:
        found = sorted(folder.iterdir())
    except OSError as error:
        raise UserError(f"{one_line(str(folder), 300)}: cannot be read ({os_reason(error)})") from None
    return [
        path for path in found if path.is_dir() and not path.is_symlink() and not path.name.startswith(".")
    ]


def has_logs(folder: Path) -> bool:
    return any(path.suffix.lower() in SUFFIXES for path in folder.iterdir())


def record_groups(record: Path, step: int | None, key: str) -> list[Group]:
    """A record folder's groups of runs.

    They are `this/` in ours; in the public archives the logs that lie in it, or, without any, each
    subfolder that has some. Of a record without logs the raw numbers of its README are taken.
    """
    if (record / "this").is_dir():
        folders = [record / "this"]
    elif has_logs(record):
        folders = [record]
    else:
        folders = [folder for folder in folders_in(record) if has_logs(folder)]
    groups = []
    for folder in folders:
        own = folder == record or folder.name == "this"
        name = record.name if own else f"{record.name}/{folder.name}"
        paths = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in SUFFIXES]
        group = group_of(name, read_paths(paths, warn), step, key)
        groups += [group] if group.losses.n or group.left_out else []
    return groups or readme_groups(record)


def readme_groups(record: Path) -> list[Group]:
    for path in sorted(record.glob("*.md")):
        try:
            groups = read_numbers_file(NamedPath(record.name, path))
        except UserError:  # a README without lists is no mistake
            continue
        for group in groups:
            group.name = record.name if len(groups) == 1 else f"{record.name}: {group.name}"
        return groups
    return []


def leaderboard(
    folder: Path, target: float | None, step: int | None, key: str, style
) -> tuple[list[str], list[list[str]], tuple[int, ...]]:
    """Head, rows, columns of words. Those that reach the target come first, by mean time."""
    need(file_kind(folder) == "folder", f"{folder}: no folder of record folders")
    groups = []
    for record in folders_in(folder):
        try:
            groups += record_groups(record, step, key)
        except OSError as error:
            warn(f"{record}: skipped ({os_reason(error)})")
    need(groups, f"{folder}: no record folder there has logs, or lists of numbers in a README")
    rows = []
    for rank, group in enumerate(sorted(groups, key=lambda group: order(group, target)), start=1):
        p = below(group.losses, target) if target is not None else math.nan
        rows.append(
            [
                str(rank),
                group.name,
                group.count,
                group.steps_text,
                style.time(group.times.mean),
                style.time(group.times.std),
                style.loss(group.losses.mean),
                style.loss(group.losses.std),
                style.p(p),
                stars(p),
                "logs" if group.runs or group.left_out else "README",
            ]
        )
    under = "p" if target is None else f"p under {target:g}"
    head = ["", "record", "runs", "steps", "time μ", "time σ", "loss μ", "loss σ", under, "sig", "from"]
    return head, rows, (1, 9, 10)


def order(group: Group, target: float | None) -> tuple[bool, float, str]:
    reaches = target is None or group.losses.mean <= target
    return not reaches, math.inf if math.isnan(group.times.mean) else group.times.mean, group.name
