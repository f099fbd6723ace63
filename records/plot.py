"""Plot what logs say: losses against steps or time, and learned scalars by layer.

    python -m records.plot loss    GROUP... --out FILE.png [--x time] [--from 5500] [--to 6000] [--difference]
    python -m records.plot scalars GROUP... --out FILE.png [--keys x0_scale,resid_scale,input_scale]

A GROUP is a folder of logs or one log; NAME=PATH names it. Of a group with several runs loss draws the mean
and a band of one standard deviation, over the steps (or, against time, between the first and last second)
that all its runs have; --each draws every run, --difference what each differs from the first group, --smooth
20 means over 20 values, for training losses, say. scalars draws a line a scalar, the mean over a group's
runs, as in seed 004. The file's ending is its format. A picture that these tools made is replaced; another
file is not.
"""

import argparse
import math
import textwrap
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path

from cli import arguments, command, need, one_line, path_flag, text_flag
from records.files import (
    LOSS,
    MARK,
    check_output,
    extra,
    number_flag,
    say,
    warn,
    words_flag,
    write_whole,
)
from records.groups import named_paths
from records.reader import Run, read_logs
from records.stats import Sample

Curve = tuple[list[float], list[float]]  # x, loss
Points = tuple[list[float], list[float], list[float]]  # x, mean, deviation

MOST_DIRECT_LABELS = 7  # curves that are named at their ends; more get a legend beside the picture
OWN_PANEL = 4.0  # a difference that is so many times the next one's gets a panel of its own
STYLES = ("-", "--", ":", "-.")


def curve(run: Run, key: str, x: str) -> Curve:
    """x and loss of a run's validations; the last where one came twice."""
    steps, seconds, values = run.curve(key)
    points = dict(zip(steps if x == "step" else seconds, values, strict=True))
    kept = [(at, value) for at, value in points.items() if math.isfinite(at) and math.isfinite(value)]
    return [at for at, _ in kept], [value for _, value in kept]


def smoothed(points: Curve, count: int) -> Curve:
    """Each value the mean of the last `count`; at the beginning, of as many as there are."""
    x, values = points
    sums = [0.0, *accumulate(values)]
    begins = [max(0, n + 1 - count) for n in range(len(values))]
    return x, [(sums[n + 1] - sums[begin]) / (n + 1 - begin) for n, begin in enumerate(begins)]


def mean_and_deviation(samples: list[Sample]) -> tuple[list[float], list[float]]:
    return [one.mean for one in samples], [one.std if one.n > 1 else 0.0 for one in samples]


def by_step(curves: list[Curve]) -> Points:
    """Mean and deviation at the x that all curves have."""
    common = sorted(set.intersection(*(set(x) for x, _ in curves)))
    tables = [dict(zip(x, values, strict=True)) for x, values in curves]
    samples = [Sample.of([table[at] for table in tables]) for at in common]
    return common, *mean_and_deviation(samples)


def by_time(curves: list[Curve], points: int = 200) -> Points:
    """Runs are measured at different seconds.

    Each is read off the lines between its validations, at the same seconds.
    """
    numpy = extra("numpy")
    first, last = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
    grid = [float(at) for at in numpy.linspace(first, last, points)] if last > first else []
    samples = [Sample.of([float(numpy.interp(at, x, values)) for x, values in curves]) for at in grid]
    return grid, *mean_and_deviation(samples)


def window(points: Points, begin: float | None, end: float | None) -> Points:
    low, high = -math.inf if begin is None else begin, math.inf if end is None else end
    kept = [point for point in zip(*points, strict=True) if low <= point[0] <= high]
    x, mean, deviation = ([point[n] for point in kept] for n in range(3))
    return x, mean, deviation


def less_first(runs: list[Run], first: list[Run], key: str) -> list[Curve]:
    """Each run's loss less, at the same step, that of the first group's run of its seed, or the group's mean.

    Runs that read the same text rise and fall together; what is left is what differs.
    """
    curves = {id(run): curve(run, key, "step") for run in first}
    steps, mean, _ = by_step(list(curves.values()))
    by_mean = dict(zip(steps, mean, strict=True))
    by_seed = {run.seed: dict(zip(*curves[id(run)], strict=True)) for run in first if run.seed is not None}
    found = []
    for run in runs:
        other = by_seed.get(run.seed, by_mean)
        points = [(x, y - other[x]) for x, y in zip(*curve(run, key, "step"), strict=True) if x in other]
        found.append(([x for x, _ in points], [y for _, y in points]))
    return found


# ---- losses


@dataclass(frozen=True)
class Line:
    """What is drawn of a group: one line with a band, or, with --each, a line a run."""

    name: str
    runs: int
    lines: list[Points]
    is_measured: bool  # at its validations, not read off the lines between them

    @property
    def size(self) -> float:
        """The largest distance from 0."""
        return max((abs(y) for _, mean, _ in self.lines for y in mean), default=0.0)


def lines_of(groups: list[tuple[str, list[Run]]], args: argparse.Namespace) -> list[Line]:
    found = []
    for name, runs in groups:
        if args.difference:
            curves = less_first(runs, groups[0][1], args.loss)
        else:
            curves = [curve(run, args.loss, args.x) for run in runs]
        if args.smooth > 1:
            curves = [smoothed(one, args.smooth) for one in curves]
        curves = [one for one in curves if len(one[0]) > (0 if args.x == "step" else 1)]
        if not curves:
            warn(f"{name}: no run has {args.loss} against {args.x}")
            continue
        each = args.each or len(curves) == 1
        if each:
            lines = [(x, y, [0.0] * len(x)) for x, y in curves]
        else:
            lines = [by_step(curves) if args.x == "step" else by_time(curves)]
        if not lines[0][0]:
            warn(f"{name}: its runs have no {args.x} in common; --each draws them")
        lines = [window(line, args.begin, args.end) for line in lines]
        found.append(Line(name, len(curves), lines, each or args.x == "step"))
    drawn = any(line[0] for one in found for line in one.lines)
    need(drawn, f"nothing to draw: no {args.loss} between --from and --to")
    return found


def panels(lines: list[Line]) -> list[list[Line]]:
    """The lines of a picture of differences, in one panel or in two: the large ones above the small ones."""
    ordered = sorted((line for line in lines if line.size > 0), key=lambda line: -line.size)
    for n, (large, small) in enumerate(pairwise(ordered)):
        if large.size >= OWN_PANEL * small.size:
            above = [line for line in lines if line in ordered[: n + 1]]
            return [above, [line for line in lines if line not in above]]
    return [lines]


def colors(count: int) -> list:
    """So many colours that can be told apart: beyond ten in two shades, beyond twenty with other dashes."""
    pyplot = extra("matplotlib.pyplot")
    shades = pyplot.get_cmap("tab10" if count <= 10 else "tab20").colors
    return [shades[n % len(shades)] for n in range(count)]


def draw_line(axes, line: Line, color, style: str) -> None:
    for n, (x, mean, deviation) in enumerate(line.lines):
        marker = "." if line.is_measured and len(x) < 40 else None
        axes.plot(x, mean, color=color, linestyle=style, marker=marker, label=None if n else label_of(line))
        if any(deviation):
            low = [m - d for m, d in zip(mean, deviation, strict=True)]
            high = [m + d for m, d in zip(mean, deviation, strict=True)]
            axes.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)


def label_of(line: Line) -> str:
    return f"{line.name} ({line.runs} runs)" if line.runs > 1 else line.name


def draw_losses(panel_axes: list, panel_lines: list[list[Line]], args: argparse.Namespace) -> None:
    lines = [line for panel in panel_lines for line in panel]
    palette = colors(len(lines))
    for axes, panel in zip(panel_axes, panel_lines, strict=True):
        shown = []
        for line in panel:
            n = lines.index(line)
            draw_line(axes, line, palette[n], STYLES[n // len(set(palette)) % len(STYLES)])
            shown.append((line, palette[n]))
        if args.target is not None:
            axes.axhline(
                args.target, color="grey", linestyle="--", linewidth=1, label=f"target {args.target:g}"
            )
        if args.difference:
            axes.axhline(0, color="grey", linewidth=0.8)
        if args.log:
            time_axis(axes.xaxis)
        axes.set_xlabel(
            ("step" if args.x == "step" else "training time, seconds") + " (logarithmic)" * args.log
        )
        mean = f", mean of {args.smooth:g}" * (args.smooth > 1)
        axes.set_ylabel(f"{args.loss}, nats a token{mean}" + f"\nless that of {args.first}" * args.difference)
        axes.grid(alpha=0.3)
        name_curves(axes, shown, len(lines) <= MOST_DIRECT_LABELS, len(panel_axes))
    has_band = any(any(deviation) for line in lines for _, _, deviation in line.lines)
    if has_band:
        words = "line: mean of a group's runs; band: one standard deviation to each side"
        panel_axes[-1].annotate(
            words, (0, 0), (0, -46), "axes fraction", textcoords="offset points", fontsize="small"
        )


def name_curves(axes, shown: list[tuple[Line, object]], direct: bool, rows: int) -> None:
    """Names at the curves' ends, moved apart; or a legend beside the picture. The target keeps its word."""
    if not direct:
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), fontsize="small")
        return
    low, high = axes.get_ylim()
    lines_of_text = max(len(textwrap.wrap(label_of(line), 34)) for line, _ in shown)
    gap = (0.02 + 0.028 * lines_of_text) * (high - low) * (1.0 if rows == 1 else 1.5)
    ends = []
    for line, color in shown:
        points = [(x[-1], mean[-1]) for x, mean, _ in line.lines if x]
        if points:
            x, y = max(points)
            ends.append([x, y, y, line, color])
    ends.sort(key=lambda end: end[1])
    for before, end in pairwise(ends):
        end[2] = max(end[2], before[2] + gap)
    over = max(0.0, (ends[-1][2] if ends else low) - high)
    for x, y, label_y, line, color in ends:
        arrow = {
            "arrowstyle": "-",
            "color": color,
            "linewidth": 0.5,
            "relpos": (0, 0.5),
            "shrinkA": 1,
            "shrinkB": 0,
        }
        place = dict(
            xy=(x, y), xytext=(1.02, (label_y - over - low) / (high - low)), textcoords="axes fraction"
        )
        axes.annotate(
            textwrap.fill(label_of(line), 34),
            **place,
            color=color,
            va="center",
            fontsize="small",
            arrowprops=arrow,
        )
    handles, labels = axes.get_legend_handles_labels()
    targets = [(h, word) for h, word in zip(handles, labels, strict=True) if word.startswith("target ")]
    if targets:
        axes.legend([h for h, _ in targets], [word for _, word in targets])


def time_axis(axis) -> None:
    """A logarithmic axis whose ticks are plain numbers: 100, 200, 500."""
    ticker = extra("matplotlib.ticker")
    axis.axes.set_yscale("log") if axis.axis_name == "y" else axis.axes.set_xscale("log")
    axis.set_major_locator(ticker.LogLocator(base=10, subs=(1, 2, 5)))
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(ticker.NullFormatter())


# ---- learned scalars


def layer_scalars(runs: list[Run]) -> dict[str, list[Sample]]:
    """Name -> a sample over the runs for each layer. One with columns gives several: input_scale[0] .."""
    layers = max((len(run.scalars.get("resid_scale", [])) for run in runs), default=0)
    found: dict[str, list[list[float]]] = {}
    for run in runs:
        for name, values in run.scalars.items():
            columns = len(values) // layers if layers and len(values) % layers == 0 else 0
            for column in range(columns):
                label = name if columns == 1 else f"{name}[{column}]"
                found.setdefault(label, []).append(values[column::columns])
    return {
        name: [Sample.of(list(layer)) for layer in zip(*each, strict=True)]
        for name, each in found.items()
        if len(each) == len(runs) and len({len(values) for values in each}) == 1
    }


def draw_scalars(axes, groups: list[tuple[str, list[Run]]], keys: list[str] | None) -> None:
    """Only scalars that every layer has; those of some layers (skips, attention) have no place here."""
    drawn = []
    for n, (name, runs) in enumerate(groups):
        runs = [run for run in runs if run.scalars]
        scalars = layer_scalars(runs) if runs else {}
        if not scalars:
            warn(f"{name}: no learned scalars by layer in its logs")
        for key, samples in scalars.items():
            if keys and key.partition("[")[0] not in keys and key not in keys:
                continue
            label = key if len(groups) == 1 else f"{name}: {key}"
            drawn.append((label, samples, STYLES[n % len(STYLES)]))
    need(drawn, "nothing to draw: no such scalars in these logs")
    for (label, samples, style), color in zip(drawn, colors(len(drawn)), strict=True):
        mean, deviation = mean_and_deviation(samples)
        line = dict(label=label, linestyle=style, color=color, marker=".", capsize=2)
        axes.errorbar(range(len(samples)), mean, deviation, **line)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("layer")
    runs = len(groups[0][1])
    over = f"mean over {runs} runs" if len(groups) == 1 else "mean over a group's runs"
    axes.set_ylabel(f"{over}; bars: one standard deviation")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), fontsize="small")


# ---- pictures


def canvas(out: Path, rows: int = 1) -> tuple:
    """A figure and its axes (a list of them for several rows) for a picture that will be `out`."""
    need(out.suffix in (".png", ".svg", ".pdf"), f"--out {out}: ends in .png, .svg or .pdf")
    check_output(out)
    extra("matplotlib").use("Agg")
    pyplot = extra("matplotlib.pyplot")
    pyplot.rcParams["text.parse_math"] = False  # names of files are no formulas
    return pyplot.subplots(rows, figsize=(10, 5.5 if rows == 1 else 7.5), layout="constrained")


def save(figure, out: Path) -> None:
    mark = {"Software": MARK} if out.suffix == ".png" else {"Creator": MARK}
    write_whole(out, lambda path: figure.savefig(path, dpi=130, metadata=mark))
    extra("matplotlib.pyplot").close(figure)
    say(f"written: {out}")


def in_words(name: str) -> str:
    """A hypothesis's code with what it says behind it; another name as it is."""
    from records.hypotheses import HYPOTHESES

    said = {one.name: one.says for one in HYPOTHESES}
    return f"{name}: {said[name]}" if name in said else name


def question(args: argparse.Namespace) -> str:
    """The picture's title, unless --title gives one."""
    if args.title:
        return one_line(args.title)
    if args.what == "scalars":
        return "Which scalars did the layers learn?"
    if args.difference:
        return f"How far is each run's {args.loss} from that of {args.first}, at the same step?"
    return f"How fast does {args.loss} fall{'' if args.x == 'step' else ' in time'}?"


def flags() -> argparse.ArgumentParser:
    at = number_flag(-1e12, 1e12)
    parser = arguments(__doc__)
    parser.add_argument("what", choices=("loss", "scalars"))
    parser.add_argument("groups", nargs="+", metavar="GROUP")
    parser.add_argument(
        "--out", type=path_flag, required=True, metavar="FILE", help="picture, .png, .svg or .pdf"
    )
    parser.add_argument("--x", choices=("step", "time"), default="step")
    parser.add_argument("--log", action="store_true", help="of loss: a logarithmic axis of steps or time")
    parser.add_argument("--from", dest="begin", type=at, help="first step or second that is drawn")
    parser.add_argument("--to", dest="end", type=at, help="last one")
    parser.add_argument(
        "--loss", type=text_flag, default="val_loss", metavar="KEY", help="which loss of an event line"
    )
    parser.add_argument("--target", type=LOSS, help="a line at this loss")
    smooth = "means over so many values of a run, one after the other"
    parser.add_argument("--smooth", type=number_flag(1, 1e6, whole=True), default=1, metavar="N", help=smooth)
    parser.add_argument("--each", action="store_true", help="every run, not their mean")
    parser.add_argument(
        "--difference", action="store_true", help="from the first group, at each step, by seed"
    )
    parser.add_argument("--words", action="store_true", help="behind names of hypotheses what they are")
    parser.add_argument("--keys", type=words_flag, help="of scalars: which, with commas (default: all)")
    parser.add_argument(
        "--title", type=text_flag, default="", help="default: the question that the picture answers"
    )
    return parser


def main(argv: list[str]) -> None:
    args = flags().parse_intermixed_args(argv)
    need(
        not args.difference or args.x == "step",
        "--difference: of losses at the same step; leave --x time out",
    )
    groups = []
    for named in named_paths(args.groups):
        need(named.step is None, f"{named.name}: @{named.step} has no meaning here; --to ends the picture")
        groups.append((in_words(named.name) if args.words else named.name, read_logs([named.path], warn)))
    draw(groups, args)


def draw(groups: list[tuple[str, list[Run]]], args: argparse.Namespace) -> None:
    args.first = groups[0][0].partition(": ")[0]  # without what a hypothesis is
    if args.what == "scalars":
        figure, axes = canvas(args.out)
        draw_scalars(axes, groups, args.keys)
        figure.suptitle(question(args))
    else:
        need(groups[0][1] or not args.difference, f"{args.first}: no logs there")
        lines = lines_of(groups, args)
        panel_lines = panels(lines) if args.difference else [lines]
        figure, axes = canvas(args.out, len(panel_lines))
        panel_axes = [axes] if len(panel_lines) == 1 else list(axes)
        draw_losses(panel_axes, panel_lines, args)
        figure.suptitle(question(args))
    save(figure, args.out)


def difference_picture(groups: list[tuple[str, list[Run]]], out: Path, key: str, begin: float) -> None:
    """The picture of an ablation: how far the loss of each step is from the first group's."""
    wanted = ["loss", "x", "--out", str(out), "--loss", key, "--from", str(begin), "--difference"]
    draw(groups, flags().parse_args(wanted))


if __name__ == "__main__":
    command(main)
