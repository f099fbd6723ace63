"""What another busy process costs a training on the same cores, by how long threads spin when they wait.

    python -m tests.programs.busy_machine [--spin default 0 1000 10000] [--rounds 3] [FLAGS of train_gpt.py]

Trains the preset cpu for some steps alone, and beside a process that keeps one core busy, in turns; prints
milliseconds a step: medians of the rounds. --spin: values of GOMP_SPINCOUNT, which libgomp reads; default:
as train_gpt.py is; libgomp: what libgomp does where nothing is set.
"""

import contextlib
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from cli import arguments, command, need

ROOT = Path(__file__).resolve().parents[2]
STEPS, FIRST = 16, 4  # of a run; the first ones are not counted


def main(argv: list[str]) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--spin", nargs="+", default=["libgomp", "default"], metavar="N")
    parser.add_argument("--rounds", type=int, default=3)
    args, flags = parser.parse_known_args(argv)
    for spin in args.spin:
        known = spin in ("libgomp", "default") or re.fullmatch(r"\d{1,12}", spin, re.ASCII)
        need(known, f"--spin {spin}: give default, libgomp, or a number")
    need(args.rounds > 0, f"--rounds {args.rounds}: must be positive")
    times: dict[tuple[str, bool], list[float]] = {}
    for _ in range(args.rounds):
        for busy in (False, True):
            for spin in args.spin:
                with busy_process() if busy else contextlib.nullcontext():
                    ms = milliseconds(spin, flags)
                times.setdefault((spin, busy), []).append(ms)
                print(f"spin {spin}, {'one core busy' if busy else 'alone'}: {ms:.0f} ms a step", flush=True)
    print(
        f"\n{'spin':>10} {'alone':>10} {'one core busy':>15} {'times':>7}   ms a step, {args.rounds} rounds"
    )
    for spin in args.spin:
        alone, beside = (statistics.median(times[spin, busy]) for busy in (False, True))
        print(f"{spin:>10} {alone:10.0f} {beside:15.0f} {beside / alone:7.2f}")


@contextlib.contextmanager
def busy_process():
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def milliseconds(spin: str, flags: list[str]) -> float:
    """Of a step."""
    unset = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS"}
    env = {name: value for name, value in os.environ.items() if name not in unset}
    if spin == "libgomp":
        # What libgomp does by itself: spins so often, or 1,000 times where there are more threads than cores.
        env["GOMP_SPINCOUNT"] = "300000"
    elif spin != "default":
        env["GOMP_SPINCOUNT"] = spin
    with tempfile.TemporaryDirectory() as folder:
        run = [sys.executable, str(ROOT / "train_gpt.py"), "--preset", "cpu", "--num_steps", str(STEPS)]
        run += ["--val_every", "0", "--save_every", "0", "--val_tokens", "32768", "--log_dir", folder, *flags]
        done = subprocess.run(run, cwd=ROOT, env=env, capture_output=True, text=True)
    times = dict(re.findall(rf"step:(\d+)/{STEPS} train_time:(\d+)ms", done.stdout))
    last = (done.stderr.strip().splitlines() or ["no step"])[-1]
    need(str(STEPS) in times, f"train_gpt.py: {last}")
    return (int(times[str(STEPS)]) - int(times[str(FIRST)])) / (STEPS - FIRST)


if __name__ == "__main__":
    command(main)
