"""Where the time of a training step goes on a CPU, and what the machine could do at best.

    python -m tests.programs.step_time [--steps N] [--stage 3] [FLAGS of train_gpt.py]

Prints the rate of large matrix products and of reading memory, a step's time and the model's FLOPs, and a
mean step by phase and kind of work. The profiler adds its own, so there shares are meant, not milliseconds.
No log is written, nothing is saved.
"""

import os
import re
from pathlib import Path

# Threads that wait spin as long as in a run, which sets this before libgomp is loaded.
if __name__ == "__main__" and "OMP_WAIT_POLICY" not in os.environ:
    source = (Path(__file__).resolve().parents[2] / "train_gpt.py").read_text(encoding="utf-8")
    os.environ.setdefault("GOMP_SPINCOUNT", re.search(r'"GOMP_SPINCOUNT", "(\d+)"', source)[1])

import contextlib
import io
import tempfile
import time
from collections import Counter
from collections.abc import Callable

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile, record_function

import train_gpt as tg
from cli import arguments, command, need

PHASES = ("forward", "backward", "optimizer")  # in neither of the other two: backward, which is no function's
KINDS = ("matrix products", "compiled loops", "other operators")
MATRIX_PRODUCTS = {"aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm"}


def main(argv: list[str]) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--steps", type=int, default=10, help="timed steps, after three more")
    parser.add_argument("--stage", type=int, default=1, help="of the schedule, 1 is the first (default)")
    args, rest = parser.parse_known_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        cfg, _ = tg.parse_config(["--log_dir", folder, "--save_every", "0", *rest])
        whole = args.steps > 0 and args.steps % cfg.adam_every == 0
        share = f"must be a multiple of --adam_every {cfg.adam_every}, so that Adam has its share"
        need(whole, f"--steps {args.steps}: {share}")
        need(cfg.device == "cpu", f"--device {cfg.device}: only steps on a CPU are taken apart here")
        need(1 <= args.stage <= len(cfg.stages), f"--stage {args.stage}: there are {len(cfg.stages)}")
        first, end = [0, *tg.Schedule(cfg).ends][args.stage - 1 : args.stage + 1]
        enough = end - first >= 2 * args.steps + 3
        need(enough, f"--num_steps {cfg.num_steps}: a stage must have at least twice --steps and three more")
        with contextlib.redirect_stdout(io.StringIO()):
            trainer = tg.Trainer(cfg, {})
            tg.warm_up(trainer)
        print("\n".join([*machine_rates(trainer), *take_apart(trainer, first, args.steps)]))


def machine_rates(trainer: tg.Trainer) -> list[str]:
    """bfloat16 only where the hardware multiplies it, or this run wants it: emulated, it takes minutes."""
    rates = []
    for dtype in (torch.bfloat16, torch.float32):
        if dtype == torch.bfloat16 and trainer.model.dtype != dtype and not tg.multiplies_bfloat16("cpu"):
            continue
        rate = tg.matrix_ceiling(trainer.env.device, dtype, 2048, trainer.machine.synchronize) / 1e9
        rates.append(f"{rate:.0f} GFLOP/s in {str(dtype).removeprefix('torch.')}")
    small, large = read_rate(2**20), read_rate(2**28)
    return [
        f"{torch.get_num_threads()} threads; a product of two 2048 x 2048 matrices: {', '.join(rates)}",
        f"reading 1 MiB again and again: {small:.0f} GB/s, 256 MiB: {large:.0f} GB/s",
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


def named(name: str, function: Callable) -> Callable:
    """function, whose time a profile shows under a name."""

    def call(*args, **kwargs):
        with record_function(name):
            return function(*args, **kwargs)

    return call


def take_apart(trainer: tg.Trainer, first: int, steps: int) -> list[str]:
    """Three steps from `first` on, then so many that are timed, then as many profiled, by phase and kind.

    Apart, since the profiler slows long steps down, some of them to twice the time.
    """
    trainer.clock.start()
    for step in range(first, first + 3):
        trainer.train_step(step)
    times, flops_before = [], trainer.flops
    for step in range(first + 3, first + 3 + steps):
        began = time.perf_counter()
        trainer.train_step(step)
        times.append(time.perf_counter() - began)
    flops = (trainer.flops - flops_before) / steps
    mean, ceiling = float(np.mean(times)), trainer.progress.ceiling
    trainer.model.forward = named("forward", trainer.model.forward)
    trainer.optimizer.step = named("optimizer", trainer.optimizer.step)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for step in range(first + 3 + steps, first + 3 + 2 * steps):
            trainer.train_step(step)
    table = by_phase_and_kind(profiler.events(), steps)
    share = (
        f"{flops / mean / ceiling:.3f} of the ceiling that this run measured ({ceiling / 1e9:.0f} GFLOP/s)"
    )
    lines = [
        f"a step: median {1e3 * np.median(times):.0f} ms, mean {1e3 * mean:.0f}; "
        f"{flops / 1e9:.1f} GFLOP of the model, {share}",
        f"{'ms a step':18}" + "".join(f"{phase:>12}" for phase in PHASES) + f"{'sum':>12}",
    ]
    for kind in KINDS:
        row = [table[phase, kind] for phase in PHASES]
        lines.append(f"{kind:18}" + "".join(f"{ms:12.1f}" for ms in (*row, sum(row))))
    sums = [sum(table[phase, kind] for kind in KINDS) for phase in PHASES]
    return [*lines, f"{'sum':18}" + "".join(f"{ms:12.1f}" for ms in (*sums, sum(sums)))]


def by_phase_and_kind(events: list, steps: int) -> Counter:
    """(phase, kind) -> milliseconds a step in which an operator of this kind (not what it calls) ran."""
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
        table[next(inside, "backward"), kind_of(event.name)] += event.self_cpu_time_total / 1e3 / steps
    return table


def kind_of(operator: str) -> str:
    if operator in MATRIX_PRODUCTS:
        return KINDS[0]
    return KINDS[1] if operator.startswith("## Call CompiledFxGraph") else KINDS[2]


if __name__ == "__main__":
    command(main)
