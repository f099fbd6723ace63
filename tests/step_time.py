"""Where the time of a training step goes on a CPU, and what the machine could do at best.

    python tests/step_time.py [--steps N] [FLAGS of train_gpt.py]

Prints the rate of large matrix products and of reading memory, the model's FLOPs a step, and a mean step by phase and
kind of work. The profiler adds a few percent, so shares are meant, not milliseconds. No log is written, nothing is saved.
"""

import argparse
import contextlib
import io
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile, record_function

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
import train_gpt as tg  # noqa: E402
from data.shards import arguments, command  # noqa: E402
from train_gpt import need  # noqa: E402

PHASES = (
    "forward",
    "backward",
    "optimizer",
)  # what of a step is in neither range: backward, which is no function's
KINDS = ("matrix products", "compiled loops", "other operators")
MATRIX_PRODUCTS = {"aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm"}


def main(argv: list[str]) -> None:
    parser = arguments(__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--steps", type=int, default=10, help="measured steps, after three more")
    args, rest = parser.parse_known_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        cfg, _ = tg.parse_config(["--log_dir", folder, "--save_every", "0", *rest])
        need(
            args.steps > 0 and args.steps % cfg.adam_every == 0,
            f"--steps {args.steps}: must be a multiple of --adam_every "
            f"{cfg.adam_every}, so that Adam has its share",
        )
        need(cfg.device == "cpu", f"--device {cfg.device}: only steps on a CPU are taken apart here")
        need(
            cfg.num_steps >= args.steps + 3,
            f"--num_steps {cfg.num_steps}: must be at least --steps and three more",
        )
        with contextlib.redirect_stdout(io.StringIO()):
            run = tg.Run(cfg, {})
            run.warm_up()
        print("\n".join([*machine(run), *taken_apart(run, args.steps)]))


def machine(run: "tg.Run") -> list[str]:
    """bfloat16 only where the hardware multiplies it, or this run wants it: elsewhere a product takes minutes."""
    own = {torch.float32, run.model.dtype, tg.pick_dtype(replace(run.cfg, dtype="auto"))}
    dtypes = [dtype for dtype in (torch.bfloat16, torch.float32) if dtype in own]
    rates = {dtype: tg.matrix_ceiling(run.ranks.device, dtype) / 1e9 for dtype in dtypes}
    return [
        f"{torch.get_num_threads()} threads; a product of two 2048 x 2048 matrices: "
        + ", ".join(
            f"{rate:.0f} GFLOP/s in {str(dtype).removeprefix('torch.')}" for dtype, rate in rates.items()
        ),
        f"reading 1 MiB again and again: {read_rate(2**20):.0f} GB/s, 256 MiB: {read_rate(2**28):.0f} GB/s",
    ]


def read_rate(size: int) -> float:
    """GB/s of summing so many bytes; the best of some, as for the matrix ceiling."""
    x, best = torch.ones(size // 4), 0.0
    until = time.perf_counter() + 0.5
    while time.perf_counter() < until:
        began = time.perf_counter()
        x.sum()
        best = max(best, size / (time.perf_counter() - began) / 1e9)
    return best


def taken_apart(run: "tg.Run", steps: int) -> list[str]:
    """A table of milliseconds a step, by phase and kind of work."""
    forward, optimize = run.model.forward, run.optimizer.step

    def named(name, function):
        def call(*args, **kwargs):
            with record_function(name):
                return function(*args, **kwargs)

        return call

    run.model.forward, run.optimizer.step = named("forward", forward), named("optimizer", optimize)
    run.clock.start()
    take = lambda step: run.train_step(step, run.schedule.windows(step))  # noqa: E731
    for step in range(3):
        take(step)
    times, flops_before = [], run.flops
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for step in range(3, steps + 3):
            began = time.perf_counter()
            take(step)
            times.append(time.perf_counter() - began)
    flops, mean = (run.flops - flops_before) / steps, float(np.mean(times))
    table = by_phase_and_kind(profiler.events(), steps)
    lines = [
        f"a step: median {1e3 * np.median(times):.0f} ms, mean {1e3 * mean:.0f}; {flops / 1e9:.1f} GFLOP of the model, "
        f"{flops / mean / run.ceiling:.3f} of the ceiling that this run measured ({run.ceiling / 1e9:.0f} GFLOP/s)",
        f"{'ms a step':18}" + "".join(f"{phase:>12}" for phase in PHASES) + f"{'sum':>12}",
    ]
    for kind in KINDS:
        row = [table[phase, kind] for phase in PHASES]
        lines.append(f"{kind:18}" + "".join(f"{ms:12.1f}" for ms in (*row, sum(row))))
    sums = [sum(table[phase, kind] for kind in KINDS) for phase in PHASES]
    return [*lines, f"{'sum':18}" + "".join(f"{ms:12.1f}" for ms in (*sums, sum(sums)))]


def by_phase_and_kind(events: list, steps: int) -> Counter:
    """(phase, kind) -> milliseconds a step in which an operator of this kind, and none that it calls, was at work."""
    ranges = {name: [e.time_range for e in events if e.name == name] for name in ("forward", "optimizer")}
    table: Counter = Counter()
    for event in events:
        if event.name in ranges:
            continue
        inside = (
            name
            for name, spans in ranges.items()
            for span in spans
            if span.start <= event.time_range.start < span.end
        )
        kind = (
            KINDS[0]
            if event.name in MATRIX_PRODUCTS
            else KINDS[1]
            if event.name.startswith("## Call CompiledFxGraph")
            else KINDS[2]
        )
        table[next(inside, "backward"), kind] += event.self_cpu_time_total / 1e3 / steps
    return table


if __name__ == "__main__":
    command(main)
