"""What differs between two runs, by their logs: configuration, hardware, versions, embedded source."""

import difflib
import json

from cli import one_line
from records.reader import Run, last_result, source_files
from records.tables import table

LONGEST = 20_000  # lines of a source that is compared; more would take minutes
FACTS = ("preset", "hardware", "versions", "started", "precision", "compile", "parameters", "operators")


def diff_text(a: Run, b: Run) -> str:
    parts = [results_text(a, b), configuration_text(a, b), facts_text(a, b), source_text(a, b)]
    return "\n\n".join(parts)


def results_text(a: Run, b: Run) -> str:
    rows = []
    for run in (a, b):
        last = last_result(run)
        loss = [str(last.step), last.text, f"{last.seconds:.3f}"] if last else ["-", "-", "-"]
        rows.append([run.label, *loss, str(run.peak_memory or "-")])
    return table(["run", "step", "val_loss", "seconds", "peak MiB"], rows)


def configuration_text(a: Run, b: Run) -> str:
    if a.config is None or b.config is None:
        return "configuration: not in both logs"
    names = [name for name in {**a.config, **b.config} if a.config.get(name) != b.config.get(name)]
    if not names:
        return "configuration: the same"
    rows = [[name, as_json(a.config, name), as_json(b.config, name)] for name in names]
    return "configuration:\n" + table(["field", a.name, b.name], rows, left=(0, 1, 2))


def as_json(config: dict, name: str) -> str:
    return json.dumps(config[name]) if name in config else "-"


def fact(run: Run, name: str) -> str:
    known = {"preset": run.preset, "hardware": run.hardware, "versions": run.versions}
    return known.get(name) or run.facts.get(name) or "-"


def facts_text(a: Run, b: Run) -> str:
    rows = [[name, fact(a, name), fact(b, name)] for name in FACTS]
    rows = [row for row in rows if row[1] != row[2]]
    if not rows:
        return "hardware, versions: the same"
    return "header:\n" + table(["", a.name, b.name], rows, left=(0, 1, 2))


def source_text(a: Run, b: Run) -> str:
    """A unified diff of each file that the logs hold: the training script, then what was appended to it."""
    if a.source is None or b.source is None:
        return "source: not in both logs"
    files_a, files_b = source_files(a.source), source_files(b.source)
    parts = []
    for name in {**files_a, **files_b}:
        shown = name or "training script"
        text = file_diff(
            files_a.get(name, ""), files_b.get(name, ""), f"{a.name}: {shown}", f"{b.name}: {shown}"
        )
        parts.append(text or f"source, {shown}: the same")
    return "\n".join(parts)


def file_diff(text_a: str, text_b: str, name_a: str, name_b: str) -> str:
    lines_a, lines_b = text_a.splitlines(), text_b.splitlines()
    if max(len(lines_a), len(lines_b)) > LONGEST:
        same = "the same" if text_a == text_b else "different"
        return one_line(f"source, {name_a} and {name_b}: {same}; over {LONGEST} lines, not shown")
    lines = difflib.unified_diff(lines_a, lines_b, name_a, name_b, lineterm="")
    return "\n".join(one_line(line.expandtabs(4), 2000) for line in lines)
