"""What another busy process costs a training on the same cores, by how long threads spin when they wait.

    python -m tests.programs.busy_machine [--spin default 0 1000 10000] [--rounds 3] [FLAGS of train_gpt.py]

Trains the preset cpu for some steps alone, then beside a process that keeps one core busy, with each value of
--spin in turns; prints milliseconds a step: medians of steps, then of the rounds. --spin: values of
GOMP_SPINCOUNT, which libgomp reads; default: as train_gpt.py is; libgomp: what libgomp does where nothing is
set.
"""

import contextlib
import os
import re
import statistics
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

from cli import arguments, command, need

ROOT = Path(__file__).resolve().parents[2]
FIRST, STEPS = 4, 12  # steps that are not counted, and steps that are, alone and beside


def main(argv: list[str]) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--spin", nargs="+", default=["libgomp", "default"], metavar="N")
    parser.add_argument("--rounds", type=int, default=3)
    args, flags = parser.parse_known_args(argv)
    for spin in args.spin:
        known = spin in ("libgomp", "default") or re.fullmatch(r"\d{1,12}", spin, re.ASCII)
        need(known, f"--spin {spin}: give default, libgomp, or a number")
    need(args.rounds > 0, f"--rounds {args.rounds}: must be positive")
    times: dict[str, list[tuple[float, float]]] = {spin: [] for spin in args.spin}
    for _ in range(args.rounds):
        for spin in args.spin:
            alone, beside = milliseconds(spin, flags)
            times[spin].append((alone, beside))
            print(f"spin {spin}: {alone:.0f} ms a step alone, {beside:.0f} beside", flush=True)
    print(
        f"\n{'spin':>10} {'alone':>10} {'one core busy':>15} {'times':>7}   ms a step, {args.rounds} rounds"
    )
    for spin in args.spin:
        alone, beside = map(statistics.median, zip(*times[spin], strict=True))
        print(f"{spin:>10} {alone:10.0f} {beside:15.0f} {beside / alone:7.2f}")


@contextlib.contextmanager
def busy_process():
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def milliseconds(spin: str, flags: list[str]) -> tuple[float, float]:
    """Of a step, (alone, beside a busy process), in one run that is ended then."""
    unset = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS"}
    env = {name: value for name, value in os.environ.items() if name not in unset}
    if spin == "libgomp":
        # What libgomp does by itself: spins so often, or 1,000 times where there are more threads than cores.
        env["GOMP_SPINCOUNT"] = "300000"
    elif spin != "default":
        env["GOMP_SPINCOUNT"] = spin
    with tempfile.TemporaryDirectory() as folder:
        run = [sys.executable, str(ROOT / "train_gpt.py"), "--preset", "cpu", "--save_every", "0"]
        run += ["--val_every", "0", "--val_tokens", "32768", "--log_dir", folder, *flags]
        clock, errors = [], Path(folder, "stderr")
        with (
            errors.open("w") as stderr,
            subprocess.Popen(
                run, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=stderr, text=True
            ) as training,
            contextlib.ExitStack() as others,
        ):
            others.callback(training.kill)  # whatever ends this
            for line in training.stdout:
                match = re.match(r"step:\d+/\d+ train_time:(\d+)ms .*train_loss", line)
                if not match:
                    continue
                clock.append(int(match[1]))
                if len(clock) == FIRST + STEPS:
                    others.enter_context(busy_process())
                elif len(clock) == 2 * (FIRST + STEPS):
                    break
        last = (errors.read_text().strip().splitlines() or ["it ended"])[-1]
        need(len(clock) == 2 * (FIRST + STEPS), f"train_gpt.py, after {len(clock)} steps: {last}")
    steps = [after - before for before, after in pairwise(clock)]
    return statistics.median(steps[FIRST - 1 : FIRST + STEPS - 1]), statistics.median(steps[-STEPS:])


if __name__ == "__main__":
    command(main)
