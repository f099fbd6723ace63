"""Run hypotheses against each other: each with N seeds, interleaved, and the table at the end.

    python records/ablate.py --list [NAME...]
    python records/ablate.py NAME NAME... --out DIR [--on cpu] [--seeds 5] [--num_steps N] [-- FLAGS of train_gpt.py]

A NAME is one of records/hypotheses.py, or the beginning of several: 003 is all of seed 003, 003-no its removals. The first
is the baseline. A round runs every hypothesis once, with one seed; each round begins with another, so that a drift of the
machine hits all alike. The same command goes on after an interruption: finished runs stay, the one that was cut is run
again. More seeds or names may be added in the same DIR. A run that diverges is kept as such and not repeated.

DIR/NAME/seedK.txt are the logs; DIR/table.txt, .md, .csv, pairs.txt and numbers.txt what compare.py makes of them.
"""

import fcntl
import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
from records.compare import group_of, groups_table, numbers_text, pairs_table  # noqa: E402
from records.logs import UserError, arguments, command, extra, need, read_file, read_places, result, warn  # noqa: E402
from records.tables import FORMATS, table  # noqa: E402

TARGETS = {"short": 3.28, "one-gpu": 3.28, "medium": 2.92}


@dataclass(frozen=True)
class Job:
    """One run. Its log is written in `place` and moved to `log` when it is whole."""

    name: str
    seed: int
    flags: tuple[str, ...]
    steps: int
    out: Path
    edited: str = ""  # its source, where that is not train_gpt.py's own

    @property
    def log(self) -> Path:
        return self.out / self.name / f"seed{self.seed}.txt"

    @property
    def place(self) -> Path:
        return self.out / ".running" / f"{self.name}-seed{self.seed}"


def as_flags(values: dict) -> tuple[str, ...]:
    return tuple(
        f"--{'' if value else 'no-'}{name}" if isinstance(value, bool) else f"--{name}={value}"
        for name, value in values.items()
    )


def plan(
    names: list[str], on: str, seeds: int, out: Path, num_steps: int | None, more: list[str]
) -> list[Job]:
    """The runs in their order. UserError for whatever train_gpt.py would refuse, before anything runs."""
    from records.hypotheses import find, flags_on, source_of, tg

    hypotheses, jobs = find(names), []
    for one in [one for one in hypotheses if one.needs]:
        lacks = f"{one.name}: train_gpt.py has no flag {', '.join('--' + name for name in one.needs)} yet"
        need(one.name not in names, lacks)
        warn(f"{lacks}; left out")
        hypotheses.remove(one)
    flags = {
        one.name: (f"--preset={on}", *as_flags(flags_on(one, on, num_steps)), *more) for one in hypotheses
    }
    try:
        steps = {name: tg.parse_config(list(given))[0].num_steps for name, given in flags.items()}
    except tg.UserError as error:
        raise UserError(str(error)) from None
    source = (ROOT / "train_gpt.py").read_text()
    edited = {one.name: source_of(one, source) if one.edits else "" for one in hypotheses}
    for seed in range(seeds):
        first = seed % len(hypotheses)
        for one in hypotheses[first:] + hypotheses[:first]:
            jobs.append(
                Job(
                    one.name,
                    seed,
                    (*flags[one.name], f"--seed={seed}"),
                    steps[one.name],
                    out,
                    edited[one.name],
                )
            )
    return jobs


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def check_plan(jobs: list[Job], out: Path, file: Path) -> None:
    """Runs in one folder can be compared: one train_gpt.py, and a name always with the same flags."""
    path, source = out / "plan.json", sha256(file.read_text())
    try:
        known = json.loads(path.read_text()) if path.exists() else {"source_sha256": source, "flags": {}}
        before, flags = known["source_sha256"], dict(known["flags"])
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: damaged; use another --out") from None
    need(
        before == source,
        f"{out}: {file.name} has changed since its first run; use another --out, or put the file back",
    )
    for job in jobs:
        wanted = [*job.flags[:-1], *([f"source:{sha256(job.edited)}"] if job.edited else [])]
        need(
            flags.setdefault(job.name, wanted) == wanted,
            f"{out}: {job.name} ran there with {shlex.join(flags[job.name])}; use another --out, or these flags and source",
        )
    part = path.with_name(".plan.json.part")
    part.write_text(json.dumps({"source_sha256": source, "flags": flags}, indent=1))
    os.replace(part, path)


def lock(out: Path) -> int:
    """One runner a folder. Its runs hold the lock too, so that one which outlives a killed runner is not run beside."""
    handle = os.open(out / ".lock", os.O_RDWR | os.O_CREAT)
    for wait in range(300):  # a run whose runner was killed needs a moment to end
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return handle
        except OSError:
            if wait == 10:
                warn(f"{out}: in use, waiting for up to half a minute")
            time.sleep(0.1)
    raise UserError(
        f"{out}: another ablation, or a run of one that was killed, is still working there; wait or end it"
    )


def whole_log(job: Job) -> Path | None:
    """The log of a run that got to its end or diverged, but was not moved yet."""
    for path in job.place.glob("*.txt"):
        runs, _ = read_file(path)
        if runs and (result(runs[-1])[0] or (runs[-1].failure() or "").startswith("failed: ")):
            return path
    return None


def keep(job: Job, path: Path) -> None:
    job.log.parent.mkdir(exist_ok=True)
    os.replace(path, job.log)
    shutil.rmtree(job.place)


def die_with_parent():
    """What a child calls first: on Linux, SIGTERM when its parent is gone, however it went."""
    import ctypes

    prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None
    return lambda: prctl and prctl(1, signal.SIGTERM)


def edited_place(job: Job) -> Path:
    return job.out / ".edited" / job.name / "train_gpt.py"


def write_edited(job: Job, file: Path) -> Path:
    """The job's edited source as a file, with the data that is beside train_gpt.py beside it, too."""
    place = edited_place(job)
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(job.edited)
    if not (place.parent / "data").is_symlink():
        (place.parent / "data").symlink_to(file.parent / "data")
    return place


def run(job: Job, launch: list[str], file: Path, handle: int, bar) -> None:
    """Trains, and puts the log in its place. UserError if the run ended in a way that the next would, too."""
    shutil.rmtree(job.place, ignore_errors=True)
    job.place.mkdir(parents=True)
    errors, at = job.place / "errors", 0
    file = write_edited(job, file) if job.edited else file
    with errors.open("w") as stderr:
        process = subprocess.Popen(
            [*launch, str(file), *job.flags, f"--log_dir={job.place}"],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            errors="replace",
            pass_fds=[handle],
            preexec_fn=die_with_parent(),
        )
        try:
            for line in process.stdout:
                step = line[5:].partition("/")[0]
                if line.startswith("step:") and step.isdecimal() and int(step) > at:
                    bar.update(int(step) - at)
                    at = int(step)
            code = process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise
    path = whole_log(job)
    if path and code in (0, 1):
        keep(job, path)
        return
    last = errors.read_text(errors="replace").strip().splitlines()[-1:] or ["it said nothing"]
    raise UserError(
        f"{job.name}, seed {job.seed}, ended with code {code}: {last[0][:300]} (all of it: {errors}); "
        "the same command goes on"
    )


def describe(job: Job) -> str:
    runs, problem = read_file(job.log)
    found, problem = result(runs[-1]) if runs else (None, problem)
    return f"{job.name} seed {job.seed}: " + (
        f"{found.loss:.4f} after {found.seconds:.1f} s"
        if found
        else f"no result, {runs[-1].failure() if runs else problem}"
    )


def run_all(jobs: list[Job], launch: list[str], file: Path, out: Path) -> None:
    """What is left of the plan; one lock for the folder."""
    handle = lock(out)
    try:
        check_plan(jobs, out, file)
        run_missing(jobs, launch, file, handle)
    finally:
        os.close(handle)


def run_missing(jobs: list[Job], launch: list[str], file: Path, handle: int) -> None:
    tqdm = extra("tqdm").tqdm
    tqdm.monitor_interval = 0  # no thread: children are forked
    for job in jobs:
        path = None if job.log.exists() else whole_log(job)
        if path:
            keep(job, path)
    left = [job for job in jobs if not job.log.exists()]
    print(f"{len(jobs)} runs, {len(jobs) - len(left)} of them done", flush=True)
    with tqdm(total=sum(job.steps for job in left), unit="step", disable=None) as bar:
        for job in left:
            bar.set_description(f"{job.name} seed {job.seed}")
            try:
                run(job, launch, file, handle, bar)
            except KeyboardInterrupt:
                warn(f"interrupted in {job.name}, seed {job.seed}: the same command goes on")
                raise
            tqdm.write(describe(job), file=sys.stdout)
            sys.stdout.flush()


def compare(jobs: list[Job], out: Path, target: float | None) -> str:
    """Writes and returns the table of the runs that are there."""
    names = list(dict.fromkeys(job.name for job in jobs))
    paths = {
        name: sorted({job.log for job in jobs if job.name == name and job.log.exists()}) for name in names
    }
    groups = [group_of(name, read_places(paths[name], warn)) for name in names]
    for form, suffix in zip(FORMATS, ("txt", "md", "csv")):
        (out / f"table.{suffix}").write_text(groups_table(groups, target, form) + "\n")
    if len(groups) > 1:
        (out / "pairs.txt").write_text(pairs_table(groups, first=True) + "\n")
    (out / "numbers.txt").write_text(numbers_text(groups) + "\n")
    return groups_table(groups, target)


def list_table(names: list[str], form: str) -> str:
    from records.hypotheses import BASELINES, HYPOTHESES, find

    rows = []
    for one in find(names) if names else HYPOTHESES:
        baseline = BASELINES[one.seed]
        flags = " ".join(as_flags(one.flags | ({"num_steps": one.steps} if one.steps else {})))
        flags += (" + edit" if flags else "edit") if one.edits else ""
        rows.append([one.name, baseline.preset, one.says, flags, " ".join("--" + name for name in one.needs)])
    head = ["name", "layers of", "what it is", "flags beyond its baseline", "needs"]
    return table(head, rows, form, left=(0, 1, 2, 3, 4)) + (
        f"\n{len(rows)} hypotheses" if form == "text" else ""
    )


def on_signal(number: int, _frame) -> None:
    raise KeyboardInterrupt


def main(argv: list[str]) -> None:
    parser = arguments(__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--list", action="store_true", help="print the hypotheses and end")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where logs and tables go")
    parser.add_argument(
        "--on", default="cpu", metavar="PRESET", help="whose sizes: cpu (default), short, medium, one-gpu"
    )
    parser.add_argument("--seeds", type=int, default=5, help="runs of each (default 5)")
    parser.add_argument(
        "--num_steps", type=int, help="of the baseline; hypotheses with other steps keep their proportion"
    )
    parser.add_argument(
        "--target", type=float, help="loss to be reached (default: the track's; cpu has none)"
    )
    parser.add_argument(
        "--launch",
        default=sys.executable,
        metavar="COMMAND",
        help="starts train_gpt.py, e.g. 'torchrun --standalone --nproc_per_node=8' (default: this Python)",
    )
    parser.add_argument("--dry_run", action="store_true", help="print the commands in their order and end")
    parser.add_argument("--table", action="store_true", help="only make the table of the runs that are done")
    parser.add_argument("--format", choices=FORMATS, default="text", help="of --list")
    split = argv.index("--") if "--" in argv else len(argv)
    args, more = parser.parse_args(argv[:split]), argv[split + 1 :]
    if args.list:
        print(list_table(args.names, args.format))
        return
    need(args.names and args.out, "give names and --out DIR, or --list")
    need(
        args.seeds >= 1 and (args.num_steps is None or args.num_steps >= 1),
        "--seeds and --num_steps: at least 1",
    )
    out, train = args.out.resolve(), ROOT / "train_gpt.py"
    jobs = plan(args.names, args.on, args.seeds, out, args.num_steps, more)
    if args.dry_run:
        for job in jobs:
            file = edited_place(job) if job.edited else "train_gpt.py"
            print(shlex.join([*shlex.split(args.launch), str(file), *job.flags]))
        return
    extra("scipy.stats"), extra("tqdm")  # what is missing is said now, not after the last run
    if not args.table:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {args.out}: no folder can be made there ({error.strerror})") from None
        signal.signal(signal.SIGTERM, on_signal)
        run_all(jobs, shlex.split(args.launch), train, out)
    need(out.is_dir(), f"--out {args.out}: not there")
    print(compare(jobs, out, args.target if args.target is not None else TARGETS.get(args.on)))


if __name__ == "__main__":
    command(main)
