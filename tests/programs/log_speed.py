"""How fast `python -m records.logs` lists 1,700 logs of about 100 KB, every tenth one damaged.

    python -m tests.programs.log_speed [--logs 1700] [--kilobytes 100]

Half of a log is source, the rest events: a line a step, a validation every 125. Writing them is not timed.
"""

import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from cli import UserError, arguments, command, need

ROOT = Path(__file__).resolve().parents[2]


def write_log(path: Path, size: int, rng: random.Random, damaged: bool) -> None:
    source = (ROOT / "train_gpt.py").read_text()[: size // 2]
    steps = size // 2 // 60
    lines = [source, "=" * 100, "hardware: made up", "=" * 100]
    for step in range(1, steps + 1):
        taken = f"train_time:{61 * step}ms step_avg:61.00ms"
        lines.append(f"step:{step}/{steps} {taken} train_loss:{9 - step / steps + rng.random():.4f}")
        if step % 125 == 0 or step == steps:
            lines.append(f"step:{step}/{steps} val_loss:{9 - step / steps:.4f} {taken}")
    data = bytearray("\n".join(lines).encode() + b"\n")
    for _ in range(100 if damaged else 0):
        data[rng.randrange(len(data))] = rng.randrange(256)
    path.write_bytes(data)


def main(argv: list[str]) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--logs", type=int, default=1700)
    parser.add_argument("--kilobytes", type=int, default=100)
    args = parser.parse_intermixed_args(argv)
    for name, most in (("logs", 10**5), ("kilobytes", 10**5)):
        value = getattr(args, name)
        need(1 <= value <= most, f"--{name} {value}: must lie between 1 and {most}")
    with tempfile.TemporaryDirectory() as folder:
        rng = random.Random(0)
        for n in range(args.logs):
            write_log(Path(folder) / f"{n:05}.txt", args.kilobytes * 1000, rng, damaged=n % 10 == 9)
        megabytes = sum(path.stat().st_size for path in Path(folder).iterdir()) / 1e6
        began = time.perf_counter()
        words = [sys.executable, "-m", "records.logs", folder]
        done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
        seconds = time.perf_counter() - began
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise UserError(done.stderr)
    listed = len(done.stdout.splitlines()) - 2  # without the head
    print(
        f"{args.logs} logs, {megabytes:.0f} MB: {seconds:.1f} s, {listed} runs listed; "
        f"{usage.ru_utime + usage.ru_stime:.1f} s of processor time"
    )


if __name__ == "__main__":
    command(main)
