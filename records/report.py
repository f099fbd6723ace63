"""A report of runs or of an ablation in one HTML file, which needs no network.

    python -m records.report GROUP... --out report.html [--target 3.28] [--checkpoint FILE]

A GROUP is a folder of logs or one log; NAME=PATH names it. The first is the baseline. The report has the
table of groups, a line a run, curves to zoom into, learned scalars by layer, the configuration, and what
differs from the baseline: configuration, versions, source. --checkpoint adds samples that evals.sample
makes from it. Logs are shown, never run: what looks like markup in them is text. A report that this tool
made is replaced; another file is not.
"""

import argparse
import html
import json
import math
import subprocess
import sys
from pathlib import Path

from cli import UserError, arguments, command, need, one_line, path_flag, text_flag
from records.compare import PAIRS_NOTE, groups_note, groups_table, pairs_table
from records.diff import configuration_text, facts_text, source_text
from records.files import LOSS, MARK, STEP, check_output, extra, file_kind, say, warn, write_text
from records.groups import Group, comparison_warnings, group_of, named_paths
from records.logs import COLUMNS, row_of
from records.plot import layer_scalars
from records.reader import Run, read_paths
from records.tables import table

MOST_POINTS = 2000  # of a curve; longer ones are thinned
SAMPLE_SECONDS = 300  # that a checkpoint's samples may take
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75em; margin: 2em auto; padding: 0 1em; color: #222 }
h1 { font-size: 1.6em } h2 { font-size: 1.2em; margin-top: 2em; border-bottom: 1px solid #ddd }
pre { background: #f6f6f4; padding: .8em; overflow-x: auto; font-size: 12.5px; line-height: 1.4 }
.plot { height: 480px } summary { cursor: pointer; font-weight: 600 } .note { color: #555 }
"""
# Only what stands in this file may run or load: a log cannot bring anything in.
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
SCRIPT = """
for (const figure of JSON.parse(document.getElementById("figures").textContent))
  Plotly.newPlot(figure.id, figure.data, figure.layout, {responsive: true, displaylogo: false});
"""


def thin(values: list) -> list:
    """At most MOST_POINTS of them, the last one always."""
    stride = max(1, math.ceil(len(values) / MOST_POINTS))
    return values[::-1][::stride][::-1]


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def curve_figure(groups: list[Group], key: str, x: str) -> dict:
    """A line a run, a colour a group; a click on a group's name hides it."""
    traces = []
    for n, group in enumerate(groups):
        for m, run in enumerate(group.runs):
            points = thin(run.points(key))
            at = [point.step if x == "step" else finite(point.seconds) for point in points]
            traces.append(
                {
                    "x": at,
                    "y": [finite(point.value) for point in points],
                    "name": html.escape(one_line(group.name, 80)),
                    "text": html.escape(one_line(run.name, 80)),
                    "legendgroup": str(n),
                    "showlegend": m == 0,
                    "mode": "lines+markers" if len(points) < 40 else "lines",
                    "line": {"color": f"hsl({137 * n % 360}, 65%, 42%)", "width": 1.4},
                    "hovertemplate": "%{y:.4f} at %{x}<br>%{text}<extra></extra>",
                }
            )
    label = "step" if x == "step" else "training time, seconds"
    axes = {"xaxis": {"title": {"text": label}}, "yaxis": {"title": {"text": f"{key}, nats a token"}}}
    layout = axes | {"margin": {"t": 20}}
    return {"id": f"{key}-{x}", "data": traces, "layout": layout}


def scalars_figure(group: Group, number: int) -> dict | None:
    """Learned scalars by layer, the mean over a group's runs with its deviation."""
    runs = [run for run in group.runs if run.scalars]
    traces = []
    for key, samples in (layer_scalars(runs) if runs else {}).items():
        spread = [one.std if one.n > 1 else 0.0 for one in samples]
        traces.append(
            {
                "x": list(range(len(samples))),
                "y": [finite(one.mean) for one in samples],
                "error_y": {"type": "data", "array": [finite(one) for one in spread]},
                "name": html.escape(key),
                "mode": "lines+markers",
            }
        )
    layout = {
        "xaxis": {"title": {"text": "layer"}, "dtick": 1},
        "yaxis": {"title": {"text": "mean over runs"}},
    }
    return {"id": f"scalars-{number}", "data": traces, "layout": layout} if traces else None


def figures_of(groups: list[Group]) -> list[tuple[str, dict]]:
    """(title, figure)s, those that the logs have numbers for."""
    found = []
    for key, words in (("val_loss", "validation loss"), ("train_loss", "training loss")):
        for x, against in (("step", "steps"), ("time", "training time")):
            figure = curve_figure(groups, key, x)
            if any(value is not None for trace in figure["data"] for value in trace["x"]):
                found.append((f"How does the {words} fall with {against}?", figure))
    for number, group in enumerate(groups):
        figure = scalars_figure(group, number)
        if figure is not None:
            found.append((f"Which scalars did the layers of {group.name} learn?", figure))
    return found


def preformatted(text: str) -> str:
    return f"<pre>{html.escape(text)}</pre>"


def folded(title: str, text: str) -> str:
    return f"<details><summary>{html.escape(one_line(title, 200))}</summary>{preformatted(text)}</details>"


def runs_text(groups: list[Group]) -> str:
    names = [name for name in COLUMNS if name != "run"]
    rows = []
    for group in groups:
        for run in group.runs:
            cells = row_of(run, None, "val_loss").cells
            rows.append([group.name, run.label, *(cells[name] for name in names)])
    return table(["group", "run", *names], rows, left=(0, 1, 2, 7, 8, 9))


def differences(groups: list[Group]) -> list[str]:
    """Of each later group's first run against the baseline's first."""
    if not groups[0].runs:
        return []
    base = groups[0].runs[0]
    found = []
    for group in groups[1:]:
        if group.runs:
            run = group.runs[0]
            parts = [configuration_text(base, run), facts_text(base, run), source_text(base, run)]
            found.append(folded(f"{group.name} against {groups[0].name}", "\n\n".join(parts)))
    return found


def configuration(run: Run) -> str:
    if run.config is None:
        return "the log has no configuration of its own; it stands in the source"
    return "\n".join(one_line(f"{name} = {json.dumps(value)}", 400) for name, value in run.config.items())


def samples_text(checkpoint: Path) -> str:
    """What evals.sample prints for the checkpoint; it runs no code of the checkpoint's."""
    need(file_kind(checkpoint) == "file", f"--checkpoint {checkpoint}: no file there")
    words = [
        sys.executable,
        "-m",
        "evals.sample",
        str(checkpoint.absolute()),
        "--samples",
        "3",
        "--tokens",
        "80",
    ]
    root = Path(__file__).resolve().parent.parent
    try:
        done = subprocess.run(words, cwd=root, capture_output=True, timeout=SAMPLE_SECONDS)
    except subprocess.TimeoutExpired:
        raise UserError(f"--checkpoint {checkpoint}: no samples within {SAMPLE_SECONDS} s") from None
    errors = done.stderr.decode("utf-8", "replace").strip().splitlines()
    last = one_line(errors[-1], 300) if errors else f"exit code {done.returncode}"
    need(done.returncode == 0, f"--checkpoint {checkpoint}: no samples ({last})")
    return done.stdout.decode("utf-8", "replace")


def page(title: str, groups: list[Group], target: float | None, samples: str) -> str:
    script = extra("plotly.offline").get_plotlyjs()
    figures = figures_of(groups)
    data = json.dumps([figure for _, figure in figures]).replace("<", "\\u003c")
    notes = [groups_note(groups, target), *comparison_warnings(groups)]
    notes += [f"{group.name}: {line}" for group in groups for line in group.left_out]
    body = [f"<h1>{html.escape(title)}</h1>", "<h2>Groups</h2>", preformatted(groups_table(groups, target))]
    body += [f"<p class=note>{html.escape(one_line(note, 1000))}</p>" for note in notes]
    if len(groups) > 1:
        body += ["<h2>Pairs</h2>", preformatted(f"{pairs_table(groups, first=True)}\n\n{PAIRS_NOTE}")]
    body += ["<h2>Runs</h2>", preformatted(runs_text(groups)), "<h2>Curves</h2>"]
    for question, figure in figures:
        body += [f"<h3>{html.escape(question)}</h3>", f'<div class=plot id="{figure["id"]}"></div>']
    body += ["<h2>What differs from the baseline</h2>", *differences(groups)]
    body += ["<h2>Configuration</h2>"]
    body += [folded(group.name, configuration(group.runs[0])) for group in groups if group.runs]
    if samples:
        body += ["<h2>Samples</h2>", preformatted(samples)]
    head = (
        f'<meta charset="utf-8"><meta name="generator" content="{MARK}">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f'<title>{html.escape(title)}</title><link rel="icon" href="data:,"><style>{STYLE}</style>'
    )
    scripts = f'<script type="application/json" id="figures">{data}</script><script>{script}</script>'
    content = "\n".join(body)
    body_and_scripts = f"<body>{content}{scripts}<script>{SCRIPT}</script></body>"
    return f"<!doctype html><html><head>{head}</head>{body_and_scripts}</html>\n"


def flags() -> argparse.ArgumentParser:
    parser = arguments(__doc__)
    parser.add_argument("groups", nargs="+", metavar="GROUP")
    parser.add_argument("--out", type=path_flag, required=True, metavar="FILE", help="the report, .html")
    parser.add_argument("--target", type=LOSS, help="loss to be reached, 3.28 for short, 2.92 for medium")
    parser.add_argument(
        "--step", type=STEP, metavar="N", help="compare at this step (default: the last planned)"
    )
    parser.add_argument("--checkpoint", type=path_flag, metavar="FILE", help="show samples from it")
    parser.add_argument("--title", type=text_flag, default="Report of runs")
    return parser


def main(argv: list[str]) -> None:
    args = flags().parse_intermixed_args(argv)
    need(args.out.suffix in (".html", ".htm"), f"--out {args.out}: ends in .html")
    check_output(args.out)
    groups = []
    for named in named_paths(args.groups):
        step = args.step if named.step is None else named.step
        groups.append(group_of(named.name, read_paths([named.path], warn), step))
    need(any(group.runs for group in groups), "no log with a validation loss among " + ", ".join(args.groups))
    for module in ("plotly", "scipy.stats"):
        extra(module)
    samples = samples_text(args.checkpoint) if args.checkpoint else ""
    write_text(args.out, page(one_line(args.title, 200), groups, args.target, samples))
    say(f"written: {args.out}, {sum(len(group.runs) for group in groups)} runs")


if __name__ == "__main__":
    command(main)
