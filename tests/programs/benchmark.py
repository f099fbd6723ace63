"""How fast training is here: seconds, tokens a second, share of the machine's matrix ceiling, peak memory.

    python -m tests.programs.benchmark [--runs 3] [FLAGS of train_gpt.py]

Without flags 20 steps of the cpu preset. Each run is a process of its own. The first may compile (outside the
clock); medians over runs, and the range.
"""

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FILE = Path(__file__).resolve().parents[2] / "train_gpt.py"
DEFAULT_FLAGS = ["--preset", "cpu", "--num_steps", "20", "--val_every", "0"]


def measure(flags: list[str]) -> dict[str, float]:
    """One run, its figures read from its own log lines."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        command = [sys.executable, str(FILE), *flags, "--log_dir", folder]
        result = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if result.returncode:
            sys.exit(result.returncode)
    last_step = [line for line in result.stdout.splitlines() if "train_loss:" in line][-1]

    def value(name: str, text: str = last_step) -> float:
        return float(re.search(rf"{name}: ?([\d.]+)", text)[1])

    return {
        "seconds in all": time.perf_counter() - began,
        "warm-up, seconds": value("warm-up", result.stdout),
        "training, seconds": value("train_time") / 1e3,
        "milliseconds a step": value("step_avg"),
        "tokens a second": value("tokens_per_second"),
        "share of the matrix ceiling": value("mfu"),
        "peak memory, MiB": value("peak_memory", result.stdout),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=3)
    args, flags = parser.parse_known_args()
    runs = [measure(flags or DEFAULT_FLAGS) for _ in range(args.runs)]
    print(f"{'median of ' + str(args.runs):>30} {'least':>10} {'most':>10}")
    for name in runs[0]:
        values = [run[name] for run in runs]
        print(f"{name:>30} {statistics.median(values):>10.2f} {min(values):>10.2f} {max(values):>10.2f}")


if __name__ == "__main__":
    main()
