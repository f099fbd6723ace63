"""Plot what logs say: losses against steps or time, and learned scalars by layer.

    python records/plot.py loss    GROUP... --out FILE.png [--x step|time] [--from 5500] [--to 6000] [--difference]
    python records/plot.py scalars GROUP... --out FILE.png [--keys x0_scale resid_scale input_scale]

A GROUP is a folder of logs or one log; NAME=PATH names it. Of a group with several runs loss draws the mean and a band of
one deviation, over the steps (or, against time, between the first and last second) that all its runs have; --each draws
every run, --difference what each differs from the first group. scalars draws a line a scalar, the mean over a group's
runs, as in seed 004; the file's ending is its format.
"""

import math
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
from records.compare import Sample, named_place, seed_of  # noqa: E402
from records.logs import Run, UserError, arguments, command, extra, need, read_places, warn  # noqa: E402

Curve = tuple[list[float], list[float]]  # x, loss
Points = tuple[list[float], list[float], list[float]]  # x, mean, deviation


def curve(run: Run, key: str, x: str) -> Curve:
    """x and loss of a run's validations; the last where one came twice."""
    steps, seconds, values = run.curve(key)
    points = dict(zip(steps if x == "step" else seconds, values))
    kept = [(at, value) for at, value in points.items() if math.isfinite(at) and math.isfinite(value)]
    return [at for at, _ in kept], [value for _, value in kept]


def by_step(curves: list[Curve]) -> Points:
    """Mean and deviation at the x that all curves have."""
    common = sorted(set.intersection(*(set(x) for x, _ in curves)))
    tables = [dict(zip(x, values)) for x, values in curves]
    samples = [Sample.of([table[at] for table in tables]) for at in common]
    return common, [one.mean for one in samples], [one.std if one.n > 1 else 0.0 for one in samples]


def by_time(curves: list[Curve], points: int = 200) -> Points:
    """Runs are measured at different seconds: each is read off the lines between its validations, at the same seconds."""
    numpy = extra("numpy")
    first, last = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
    grid = [float(at) for at in numpy.linspace(first, last, points)] if last > first else []
    samples = [Sample.of([float(numpy.interp(at, x, values)) for x, values in curves]) for at in grid]
    return grid, [one.mean for one in samples], [one.std if one.n > 1 else 0.0 for one in samples]


def window(points: Points, begin: float | None, end: float | None) -> Points:
    kept = [p for p in zip(*points) if (begin is None or p[0] >= begin) and (end is None or p[0] <= end)]
    return tuple(map(list, zip(*kept))) if kept else ([], [], [])


def less_first(runs: list[Run], first: list[Run], key: str) -> list[Curve]:
    """Each run's loss less, at the same step, that of the first group's run of its seed, or the group's mean without one.
    Runs that read the same text rise and fall together; what is left is what differs."""
    mean = dict(zip(*by_step([curve(run, key, "step") for run in first])[:2]))
    by_seed = {seed_of(run): dict(zip(*curve(run, key, "step"))) for run in first if seed_of(run) is not None}
    found = []
    for run in runs:
        other = by_seed.get(seed_of(run), mean)
        points = [
            (step, value - other[step]) for step, value in zip(*curve(run, key, "step")) if step in other
        ]
        found.append(([step for step, _ in points], [value for _, value in points]))
    return found


def draw_losses(axes, groups: list[tuple[str, list[Run]]], args) -> None:
    drawn = 0
    for name, runs in groups:
        curves = (
            less_first(runs, groups[0][1], args.loss)
            if args.difference
            else [curve(run, args.loss, args.x) for run in runs]
        )
        curves = [one for one in curves if len(one[0]) > 1 or one[0] and args.x == "step"]
        if not curves:
            warn(f"{name}: no run has {args.loss} against {args.x}")
            continue
        measured = args.each or len(curves) == 1 or args.x == "step"  # not read off lines between validations
        if args.each or len(curves) == 1:
            lines = [(*one, [0.0] * len(one[0])) for one in curves]
        else:
            lines = [by_step(curves) if args.x == "step" else by_time(curves)]
        if not lines[0][0]:
            warn(f"{name}: its runs have no {args.x} in common; --each draws them")
        color = None
        for n, line in enumerate(lines):
            x, mean, deviation = window(line, args.begin, args.end)
            label = f"{name} ({len(curves)} runs)" if len(curves) > 1 else name
            marker = "." if measured and len(x) < 40 else None
            [shown] = axes.plot(x, mean, color=color, marker=marker, label=None if n else label)
            color = shown.get_color()
            if any(deviation):
                low, high = ([m + sign * d for m, d in zip(mean, deviation)] for sign in (-1, 1))
                axes.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
            drawn += len(x)
    need(drawn, f"nothing to draw: no {args.loss} between --from and --to")
    if args.target is not None:
        axes.axhline(args.target, color="grey", linestyle="--", linewidth=1, label=f"target {args.target:g}")
    axes.set_xlabel("step" if args.x == "step" else "training time, seconds")
    axes.set_ylabel(f"{args.loss}, nats a token" + f", less that of {groups[0][0]}" * args.difference)
    axes.legend()


def layer_scalars(runs: list[Run]) -> dict[str, list[Sample]]:
    """Name -> a sample over the runs for each layer. A scalar with columns gives one for each: input_scale[0] .."""
    layers = max((len(run.scalars.get("resid_scale", [])) for run in runs), default=0)
    found: dict[str, list[list[float]]] = {}
    for run in runs:
        for name, values in run.scalars.items():
            columns = len(values) // layers if layers and len(values) % layers == 0 else 0
            for column in range(columns):
                label = name if columns == 1 else f"{name}[{column}]"
                found.setdefault(label, []).append(values[column::columns])
    return {
        name: [Sample.of(list(at)) for at in zip(*each)]
        for name, each in found.items()
        if len(each) == len(runs)
    }


def draw_scalars(axes, groups: list[tuple[str, list[Run]]], keys: list[str] | None) -> None:
    """Only scalars that every layer has; those of some layers (skips, attention) have no place on this axis."""
    styles, drawn = ["-", "--", ":", "-."], 0
    for n, (name, runs) in enumerate(groups):
        runs = [run for run in runs if run.scalars]
        scalars = layer_scalars(runs) if runs else {}
        for key, samples in scalars.items():
            if keys and key.partition("[")[0] not in keys and key not in keys:
                continue
            label = key if len(groups) == 1 else f"{name}: {key}"
            axes.errorbar(
                range(len(samples)),
                [one.mean for one in samples],
                [one.std if one.n > 1 else 0.0 for one in samples],
                label=label,
                linestyle=styles[n % 4],
                marker=".",
                capsize=2,
            )
            drawn += 1
        if not scalars:
            warn(f"{name}: no learned scalars by layer in its logs")
    need(drawn, "nothing to draw: no such scalars in these logs")
    axes.set_xlabel("layer")
    axes.set_ylabel(f"mean over {len(groups[0][1])} runs" if len(groups) == 1 else "mean over runs")
    axes.legend(fontsize="small")


def canvas(out: Path) -> tuple:
    """A figure and its axes for a picture that will be `out`."""
    extra("matplotlib").use("Agg")
    pyplot = extra("matplotlib.pyplot")
    need(out.suffix in (".png", ".svg", ".pdf"), f"--out {out}: ends in .png, .svg or .pdf")
    return pyplot.subplots(figsize=(9, 5.5), layout="constrained")


def save(figure, out: Path) -> None:
    try:
        figure.savefig(out, dpi=150)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror})") from None
    print(f"written: {out}")


def main(argv: list[str]) -> None:
    parser = arguments(__doc__)
    parser.add_argument("what", choices=("loss", "scalars"))
    parser.add_argument("groups", nargs="+", metavar="GROUP")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="picture, .png, .svg or .pdf")
    parser.add_argument("--x", choices=("step", "time"), default="step")
    parser.add_argument("--from", dest="begin", type=float, help="first step or second that is drawn")
    parser.add_argument("--to", dest="end", type=float, help="last one")
    parser.add_argument(
        "--loss", default="val_loss", metavar="KEY", help="which loss of an event line (default val_loss)"
    )
    parser.add_argument("--target", type=float, help="a line at this loss")
    parser.add_argument("--each", action="store_true", help="every run, not their mean")
    parser.add_argument(
        "--difference", action="store_true", help="from the first group, at each step, by seed"
    )
    parser.add_argument("--keys", nargs="+", help="of scalars: which (default: all that every layer has)")
    parser.add_argument("--title", default="")
    args = parser.parse_args(argv)
    need(
        not args.difference or args.x == "step",
        "--difference: of losses at the same step; leave --x time out",
    )
    groups = [(name, read_places([path], warn)) for name, path in map(named_place, args.groups)]
    figure, axes = canvas(args.out)
    if args.what == "loss":
        draw_losses(axes, groups, args)
    else:
        draw_scalars(axes, groups, args.keys)
    axes.grid(alpha=0.3)
    axes.set_title(args.title)
    save(figure, args.out)


if __name__ == "__main__":
    command(main)
