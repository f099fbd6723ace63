"""The fault test: kill a random process of a run at a random moment, resume, and find no difference in the end.

    python tests/faults.py [--kills 20] [--ranks 1,2] [--seed 0] [--steps 20] [--restarts]

The cpu preset, made small, runs once undisturbed for each number of ranks. Then, N times: the same command with --resume is
started, one of its processes gets SIGKILL at a moment drawn evenly from the undisturbed run's duration (starting, training,
validating and saving alike), and the command is given again until it ends by itself. Losses of all steps, the last line,
and the last checkpoint's weights and optimizer state must be the undisturbed run's to the last bit. With several ranks the
others must end soon, and a message must name the dead one. --restarts: nobody gives the command again; torchrun
--max-restarts=3 goes on by itself. Exit code 1 when anything differs.
"""

import argparse
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
BOUND = 30.0  # seconds in which the others must end when one has died
FLAGS = [
    "--preset",
    "cpu",
    "--no-compile",
    "--data_dir",
    ROOT / "data" / "corpus",
    "--resume",
    "--save_every",
    2,
    "--model_dim",
    32,
    "--head_dim",
    16,
    "--micro_batches",
    8,
    "--val_seq_len",
    4096,
    "--val_tokens",
    8192,
    "--val_every",
    4,
    "--windows",
    "ssl",
    "--paired_heads",
    "p..",
    "--value_embeds",
    ".01",
    "--skips",
    "a.a",
    "--backout",
    ".b.",
]
ENV = os.environ | {
    "OMP_NUM_THREADS": "1"
}  # these sizes want no more, and moments should not depend on what else runs


def command(ranks: int, folder: Path, steps: int, restarts: bool = False) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    launcher = [*launcher, *["--max-restarts=3"] * restarts] if ranks > 1 or restarts else []
    flags = [*FLAGS, "--num_steps", steps, "--log_dir", folder]
    return [str(part) for part in [sys.executable, *launcher, ROOT / "train_gpt.py", *flags]]


class Run:
    """The command, started; its output in a file."""

    def __init__(self, ranks: int, folder: Path, steps: int, restarts: bool = False):
        self.torchrun = ranks > 1 or restarts
        self.began, self.output = time.monotonic(), tempfile.TemporaryFile("w+")
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
            try:
                parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
                if parent == self.process.pid and f"\0RANK={rank}\0" in "\0" + (path / "environ").read_text():
                    return int(path.name)
            except OSError:  # ended meanwhile
                pass
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
    """The lines of all logs of a folder without what depends on the time: one log, or more if it died before it saved."""
    logs = sorted(
        folder.glob("*.txt"), key=lambda path: path.stat().st_mtime_ns
    )  # their names say nothing of their order
    lines = "\n".join(path.read_text() for path in logs).splitlines()
    lines = [line for line in lines if re.match(r"step:\d", line)]
    return [re.sub(r" (train_time|step_avg|tokens_per_second|mfu):\S+", "", line) for line in lines]


def last_checkpoint(folder: Path) -> dict:
    path = max(folder.glob("*.pt"), key=lambda path: path.stat().st_mtime_ns)
    content = torch.load(path)
    flat = {f"{part} {name}": t for part in ("model", "optimizer") for name, t in content[part].items()}
    flat |= {
        f"{name} {key}": t
        for name, state in flat.items()
        if isinstance(state, dict)
        for key, t in state.items()
    }
    return {name: t for name, t in flat.items() if not isinstance(t, dict)} | {
        name: content[name] for name in ("step", "tied", "loader", "tokens_seen")
    }


def differences(folder: Path, expected: Path) -> list[str]:
    """What in a folder's logs and last checkpoint is not as in the undisturbed run's."""
    ours, theirs = events(folder), events(expected)
    found = [f"line {line!r}" for line in sorted(set(ours) ^ set(theirs))]
    if ours[-1:] != theirs[-1:]:
        found.append(f"last line {ours[-1:]}, not {theirs[-1:]}")
    a, b = last_checkpoint(folder), last_checkpoint(expected)
    same = lambda x, y: torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y  # noqa: E731
    return found + [
        f"checkpoint: {name}"
        for name in sorted(a.keys() | b.keys())
        if name not in a or name not in b or not same(a[name], b[name])
    ]


def names_the_dead(output: str, rank: int) -> bool:
    """Whether torchrun said which process died, and of SIGKILL."""
    return bool(
        re.search(
            rf"rank\s*: {rank} \(local_rank: {rank}\)\s+exitcode\s*: -9 |exitcode: -9\) local_rank: {rank} ",
            output,
        )
    )


def strike(run: Run, rank: int, moment: float) -> bool:
    """SIGKILL for a rank at a moment after the start, as soon as it is there; False: the run was over first."""
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
            wrong += [] if names_the_dead(output, rank) else [f"nobody named process {rank}:\n{output}"]
        if restarts:
            wrong += (
                [f"torchrun gave up, exit code {run.process.returncode}:\n{output}"]
                if run.process.returncode
                else []
            )
        else:
            wrong += ["a killed run reported success"] if run.process.returncode == 0 else []
            again = Run(ranks, folder, steps)
            output = again.wait(10 * duration + 60)
            wrong += [f"the resumed run failed:\n{output}"] if again.process.returncode else []
    except subprocess.TimeoutExpired as error:
        wrong.append(f"not over after {error.timeout:.0f} s")
    wrong = wrong or differences(folder, expected)
    if not wrong:
        shutil.rmtree(folder)
    return f"{line}; {'DIFFERENT: ' + '; '.join(wrong[:5]) if wrong else 'equal'}", wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
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
            print(
                f"{ranks} rank(s), undisturbed: {durations[ranks]:.1f} s, {events(expected[ranks])[-1]}",
                flush=True,
            )
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
