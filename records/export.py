"""Curves of logs for other tools: rows for pandas, CSV, JSON lines, TensorBoard's event files.

import pandas
from pathlib import Path
from records.export import curve_rows, run_rows
from records.reader import read_paths

runs = read_paths([Path("logs")])
curves = pandas.DataFrame(curve_rows(runs))    # run, step, seconds, train_loss, val_loss, ..
summary = pandas.DataFrame(run_rows(runs))     # a row a run: loss, seconds, hardware, configuration
"""

import csv
import json
import math
import os
import shutil
import tempfile
from pathlib import Path

from cli import UserError, need, one_line, os_reason
from records.files import current_umask, extra, file_kind, write_whole
from records.reader import Run, last_result, raw_pairs, to_number

PLAIN = (str, int, float, bool, type(None))


def curve_rows(runs: list[Run]) -> list[dict]:
    """A dict an event line: run, step, seconds, and every number of the line under the log's name for it."""
    rows = []
    for run in runs:
        for step, rest in run.events():
            numbers = {key: to_number(text) for key, text in raw_pairs(rest).items()}
            known = {key: value for key, value in numbers.items() if value is not None}
            seconds = known.pop("train_time", math.nan)
            rows.append({"run": run.label, "step": step, "seconds": seconds} | known)
    return rows


def run_rows(runs: list[Run]) -> list[dict]:
    """A dict a run: its last validation loss, what the header says, its configuration as `config.NAME`."""
    rows = []
    for run in runs:
        last = last_result(run)
        row = {
            "run": run.label,
            "steps": run.last_step,
            "planned_steps": run.planned,
            "val_loss": last.loss if last else math.nan,
            "seconds": last.seconds if last else math.nan,
            "peak_memory_mib": run.peak_memory,
            "preset": run.preset,
            "hardware": run.hardware,
            "versions": run.versions,
            "failure": run.failure(),
        }
        config = run.config or {}
        row |= {f"config.{name}": value for name, value in config.items() if isinstance(value, PLAIN)}
        rows.append(row)
    return rows


def export(runs: list[Run], out: Path, to: str | None) -> str:
    """Writes the curves; a line on what was written. UserError if something is there already."""
    kinds = {".csv": "csv", ".jsonl": "jsonl"}
    to = to or kinds.get(out.suffix.lower())
    need(to, f"--out {out}: ends in .csv or .jsonl, or give --to")
    kind = file_kind(out)
    need(kind == "missing", f"--out {out}: is there already (a {kind}); give another name or remove it")
    if to == "tensorboard":
        return write_tensorboard(runs, out)
    rows = curve_rows(runs)
    write_whole(out, lambda path: (write_csv if to == "csv" else write_jsonl)(rows, path))
    return f"written: {out}, {len(rows)} lines of {len(runs)} runs"


def write_csv(rows: list[dict], path: Path) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="", encoding="utf-8", errors="replace") as file:
        writer = csv.DictWriter(file, names, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def write_jsonl(rows: list[dict], path: Path) -> None:
    """What is no finite number is null, as JSON has none."""
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            known = {name: None if is_not_finite(value) else value for name, value in row.items()}
            file.write(json.dumps(known) + "\n")


def is_not_finite(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def write_tensorboard(runs: list[Run], out: Path) -> str:
    """A folder a run under `out`, for `tensorboard --logdir out`: whole or not at all."""
    extra("tensorboard")
    summary_writer = extra("torch.utils.tensorboard").SummaryWriter
    part = None
    try:
        part = Path(tempfile.mkdtemp(prefix=".part-", dir=out.parent))
        part.chmod(0o777 & ~current_umask())
        for run, name in zip(runs, folder_names(runs), strict=True):
            with summary_writer(str(part / name)) as writer:
                write_run(run, writer)
        os.rename(part, out)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({os_reason(error)})") from None
    finally:
        if part is not None:
            shutil.rmtree(part, ignore_errors=True)
    return f"written: {out}, {len(runs)} runs; tensorboard --logdir {out}"


def folder_names(runs: list[Run]) -> list[str]:
    """The runs' names, made safe for a folder, each once."""
    found: list[str] = []
    for run in runs:
        name = (
            "".join(c if c.isalnum() or c in "._-" else "_" for c in one_line(run.name, 100)).lstrip(".")
            or "run"
        )
        twins = sum(other == name or other.startswith(f"{name}~") for other in found)
        found.append(f"{name}~{twins + 1}" if twins else name)
    return found


def write_run(run: Run, writer) -> None:
    for row in curve_rows([run]):
        for name, value in row.items():
            if name not in ("run", "step") and math.isfinite(value):
                writer.add_scalar(name, value, row["step"])
    if run.config is not None:
        writer.add_text("config", f"```\n{json.dumps(run.config, indent=1)}\n```")
