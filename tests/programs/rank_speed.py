"""Training speed of 1, 2, 4 and 8 processes on this machine's cores: milliseconds a step.

    python -m tests.programs.rank_speed [--repeats 3] [FLAGS of train_gpt.py]

Without flags 6 steps of the cpu preset. All take the same eight micro-batches a step; one process uses as
many threads as there are cores. Repeats alternate between the numbers of processes, so that what else the
machine does meets all of them; medians. The first run may compile (outside the clock).
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

FILE = Path(__file__).resolve().parents[2] / "train_gpt.py"
PROCESSES = (1, 2, 4, 8)


def milliseconds_a_step(processes: int, flags: list[str]) -> tuple[float, str]:
    """Of one run, and the log's line on its hardware."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    launcher = torchrun if processes > 1 else []
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, *launcher, str(FILE), *flags, "--log_dir", folder]
        result = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True)
    if result.returncode:
        sys.exit(result.returncode)
    hardware = re.search(r"hardware: .*; (.*)", result.stdout)[1]
    return float(re.findall(r"step_avg:([\d.]+)ms", result.stdout)[-1]), hardware


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3)
    args, flags = parser.parse_known_args()
    flags = ["--preset", "cpu", "--micro_batches", "8", *(flags or ["--num_steps", "6", "--val_every", "0"])]
    times: dict[int, list[float]] = {processes: [] for processes in PROCESSES}
    threads = {}
    for _ in range(args.repeats):
        for processes in PROCESSES:
            ms, threads[processes] = milliseconds_a_step(processes, flags)
            times[processes].append(ms)
    print(f"{'':>32} {'ms a step':>10} {'least':>9} {'most':>9} {'speed, of one':>14}")
    alone = statistics.median(times[1])
    for processes, values in times.items():
        median = statistics.median(values)
        spread = f"{min(values):>9.1f} {max(values):>9.1f}"
        print(f"{threads[processes]:>32} {median:>10.1f} {spread} {alone / median:>14.2f}")


if __name__ == "__main__":
    main()
