"""The fault test: kill a random process of a run at a random moment, resume, and find no difference.

    python -m tests.programs.faults [--kills 20] [--ranks 1,2] [--seed 0] [--steps 20] [--restarts]

The cpu preset, made small, runs once undisturbed for each number of ranks. Then, N times: the same command
with --resume is started, one of its processes gets SIGKILL at a moment drawn evenly from the undisturbed
run's duration (starting, training, validating and saving alike), and the command is given again until it ends
by itself. Losses of all steps, the last line, and the last checkpoint's weights and optimizer state must be
the undisturbed run's to the last bit. With several ranks the others must end soon, and a message must name
the dead one. --restarts: nobody gives the command again; torchrun --max-restarts=3 goes on by itself. Exit
code 1 when anything differs.
"""

import argparse
import contextlib
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
BOUND = 30.0  # seconds in which the others must end when one has died
FLAGS = shlex.split("""
    --preset cpu --no-compile --resume --save_every 2 --model_dim 32 --head_dim 16 --micro_batches 8
    --val_seq_len 4096 --val_tokens 8192 --val_every 4
    --windows ssl --paired_heads p.. --value_embeds .01 --skips a.a --backout .b.
""")
# These sizes want no more, and moments should not depend on what else runs.
ENV = os.environ | {"OMP_NUM_THREADS": "1"}


def command(ranks: int, folder: Path, steps: int, restarts: bool = False) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    if restarts:
        launcher.append("--max-restarts=3")
    elif ranks == 1:
        launcher = []
    data = ROOT / "data" / "corpus"
    flags = [*FLAGS, "--data_dir", data, "--num_steps", steps, "--log_dir", folder]
    return [str(part) for part in [sys.executable, *launcher, ROOT / "train_gpt.py", *flags]]


class Run:
    """The command, started; its output in a file."""

    def __init__(self, ranks: int, folder: Path, steps: int, restarts: bool = False):
        self.torchrun = ranks > 1 or restarts
        self.began = time.monotonic()
        self.output = tempfile.TemporaryFile("w+")  # noqa: SIM115, read when the run is over
        self.process = subprocess.Popen(
            command(ranks, folder, steps, restarts), env=ENV, stdout=self.output, stderr=subprocess.STDOUT
        )

    def over(self) -> bool:
        return self.process.poll() is not None

    def pid_of(self, rank: int) -> int | None:
        """Of a rank, which is a child of torchrun, or the process itself."""
        if not self.torchrun:
            return self.process.pid
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # ended meanwhile
                parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
                if parent == self.process.pid and f"\0RANK={rank}\0" in "\0" + (path / "environ").read_text():
                    return int(path.name)
        return None

    def wait(self, seconds: float) -> str:
        """What it printed; it must end within so many seconds."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.terminate()
            self.process.wait(40)
            raise
        self.output.seek(0)
        return self.output.read()


def events(folder: Path) -> list[str]:
    """The lines of all logs of a folder (two: it died before it saved), without what depends on the time."""
    logs = sorted(folder.glob("*.txt"), key=lambda path: path.stat().st_mtime_ns)  # names have no order
    lines = "\n".join(path.read_text() for path in logs).splitlines()
    lines = [line for line in lines if re.match(r"step:\d", line)]
    return [re.sub(r" (train_time|step_avg|tokens_per_second|mfu):\S+", "", line) for line in lines]


def last_checkpoint(folder: Path) -> dict:
    path = max(folder.glob("*.pt"), key=lambda path: path.stat().st_mtime_ns)
    content = torch.load(path)
    flat = {f"model {name}": t for name, t in content["model"].items()}
    for name, state in content["optimizer"].items():
        flat |= {f"optimizer {name} {key}": t for key, t in state.items()}
    return flat | {name: content[name] for name in ("step", "tied", "loader", "tokens_seen")}


def differences(folder: Path, expected: Path) -> list[str]:
    """What in a folder's logs and last checkpoint is not as in the undisturbed run's."""
    ours, theirs = events(folder), events(expected)
    found = [f"line {line!r}" for line in sorted(set(ours) ^ set(theirs))]
    if ours[-1:] != theirs[-1:]:
        found.append(f"last line {ours[-1:]}, not {theirs[-1:]}")
    a, b = last_checkpoint(folder), last_checkpoint(expected)
    for name in sorted(a.keys() | b.keys()):
        if name not in a or name not in b or not same(a[name], b[name]):
            found.append(f"checkpoint: {name}")
    return found


def same(x: object, y: object) -> bool:
    return torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


def names_the_dead(output: str, rank: int) -> bool:
    """Whether torchrun said which process died, and of SIGKILL."""
    report = rf"rank\s*: {rank} \(local_rank: {rank}\)\s+exitcode\s*: -9 "
    return re.search(rf"{report}|exitcode: -9\) local_rank: {rank} ", output) is not None


def strike(run: Run, rank: int, moment: float) -> bool:
    """SIGKILL for a rank at a moment after the start, once it is there; False: the run was over first."""
    while not run.over():
        pid = run.pid_of(rank) if time.monotonic() - run.began >= moment else None
        if pid:
            try:
                os.kill(pid, signal.SIGKILL)
                return True
            except ProcessLookupError:
                return False
        time.sleep(0.002)
    return False


def step_reached(folder: Path) -> str:
    steps = [int(re.match(r"step:(\d+)", line)[1]) for line in events(folder)]
    saved = [int(path.stem[-6:]) for path in folder.glob("*.pt")]
    return f"step {max(steps, default=0):2d}, saved {max(saved, default=0):2d}"


def one_kill(
    ranks: int, steps: int, duration: float, expected: Path, rng: random.Random, restarts: bool
) -> tuple[str, list[str]]:
    """-> a line that says what happened, what was wrong with it."""
    while True:
        moment, rank = rng.uniform(0, duration), rng.randrange(ranks)
        folder = Path(tempfile.mkdtemp(dir=expected.parent))
        run = Run(ranks, folder, steps, restarts)
        if strike(run, rank, moment):
            break
        run.wait(BOUND)  # it was faster this time: draw again
        shutil.rmtree(folder)
    killed, wrong = time.monotonic(), []
    line = f"{ranks} rank(s): process {rank} killed at {killed - run.began:5.1f} s, {step_reached(folder)}"
    try:
        output = run.wait(10 * duration + 60 if restarts else BOUND)
        seconds = time.monotonic() - killed
        if run.torchrun:
            line += f"; {'all over' if restarts else 'others ended'} after {seconds:4.1f} s"
            if not names_the_dead(output, rank):
                wrong.append(f"nobody named process {rank}:\n{output}")
        if restarts:
            if run.process.returncode:
                wrong.append(f"torchrun gave up, exit code {run.process.returncode}:\n{output}")
        else:
            if run.process.returncode == 0:
                wrong.append("a killed run reported success")
            again = Run(ranks, folder, steps)
            output = again.wait(10 * duration + 60)
            if again.process.returncode:
                wrong.append(f"the resumed run failed:\n{output}")
    except subprocess.TimeoutExpired as error:
        wrong.append(f"not over after {error.timeout:.0f} s")
    wrong = wrong or differences(folder, expected)
    if not wrong:
        shutil.rmtree(folder)
    end = f"DIFFERENT: {'; '.join(wrong[:5])}" if wrong else "equal"
    return f"{line}; {end}", wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--ranks", default="1,2", help="numbers of processes, in turn")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=20, help="of a run")
    parser.add_argument("--restarts", action="store_true", help="torchrun --max-restarts=3 goes on by itself")
    args = parser.parse_args()
    rng, counts = random.Random(args.seed), [int(n) for n in args.ranks.split(",")]
    with tempfile.TemporaryDirectory(prefix="faults-", ignore_cleanup_errors=True) as folder:
        expected, durations = {}, {}
        for ranks in dict.fromkeys(counts):
            expected[ranks] = Path(folder) / f"undisturbed-{ranks}"
            expected[ranks].mkdir()
            run = Run(ranks, expected[ranks], args.steps, args.restarts)
            output = run.wait(600)
            if run.process.returncode:
                print(output, f"the undisturbed run with {ranks} rank(s) failed", sep="\n", file=sys.stderr)
                return 1
            durations[ranks] = time.monotonic() - run.began
            last = events(expected[ranks])[-1]
            print(f"{ranks} rank(s), undisturbed: {durations[ranks]:.1f} s, {last}", flush=True)
        equal = 0
        for n in range(args.kills):
            ranks = counts[n % len(counts)]
            line, wrong = one_kill(ranks, args.steps, durations[ranks], expected[ranks], rng, args.restarts)
            equal += not wrong
            print(f"{n + 1:2d}  {line}", flush=True)
    print(f"{equal} of {args.kills} killed runs ended bit for bit as the undisturbed one")
    return equal < args.kills


if __name__ == "__main__":
    sys.exit(main())
