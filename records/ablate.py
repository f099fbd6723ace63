"""Run hypotheses against each other: each with N seeds, interleaved, and the table at the end.

    python -m records.ablate --list [NAME...]
    python -m records.ablate NAME NAME... --out DIR [--on cpu] [--seeds 5] [--jobs 2] [-- FLAGS]

FLAGS are train_gpt.py's. A NAME is one of records/hypotheses.py, or the beginning of several: 003 is all of
seed 003, 003-no its removals. The first is the baseline. A round runs every hypothesis once, with one seed;
each round begins with another, so that a drift of the machine hits all alike. --jobs 2 runs two at once, each
with half of the cores to itself: then losses may be compared, times may not. The same command goes on after
an interruption: finished runs stay, the one that was cut is run again. More seeds or names may be added in
the same DIR. A run that diverges is kept as such and not repeated.

DIR/NAME/seedK.txt are the logs; DIR/table.txt, .md, .csv, pairs.txt and numbers.txt what compare.py makes
of them all, those of earlier calls too.
"""

import argparse
import fcntl
import hashlib
import json
import os
import queue
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from cli import UserError, arguments, command, need, one_line, os_reason, path_flag, shell_word, show_notes
from records.compare import PAIRS_NOTE, Style, groups_note, groups_table, pairs_table
from records.files import (
    LOSS,
    MARK,
    extra,
    file_kind,
    number_flag,
    read_text,
    say,
    warn,
    write_text,
)
from records.groups import Group, comparison_warnings, group_of, numbers_text
from records.plot import difference_picture, in_words
from records.reader import read_file, read_paths, result
from records.tables import FORMATS, table

ROOT = Path(__file__).resolve().parent.parent
MADE = ("table.txt", "table.md", "table.csv", "pairs.txt", "numbers.txt")  # in DIR
TARGETS = {"short": 3.28, "one-gpu": 3.28, "medium": 2.92}

Shares = Sequence[set[int]]  # cores, of each of the runs that are made at once; empty: all


class Trainings:
    """The processes that train now. Once it is over, no other begins."""

    def __init__(self) -> None:
        self.processes: set[subprocess.Popen] = set()
        self.over = False

    def add(self, process: subprocess.Popen) -> None:
        self.processes.add(process)
        if self.over:
            process.terminate()

    def end(self) -> None:
        self.over = True
        for process in list(self.processes):
            process.terminate()


@dataclass(frozen=True)
class Place:
    """Where runs are made: with what command, on which cores, under which lock."""

    launch: list[str]
    file: Path
    handle: int  # of the folder's lock
    trainings: Trainings
    cores: set[int]  # empty: all


@dataclass(frozen=True)
class Job:
    """One run. Its log is written in `folder` and moved to `log` when it is whole."""

    name: str
    seed: int
    flags: tuple[str, ...]
    steps: int
    out: Path
    edited: str = ""  # its source, where that is not train_gpt.py's own
    place: int = 0  # of its name among those that are asked for

    @property
    def log(self) -> Path:
        return self.out / self.name / f"seed{self.seed}.txt"

    @property
    def folder(self) -> Path:
        return self.out / ".running" / f"{self.name}-seed{self.seed}"


def as_flags(values: dict) -> tuple[str, ...]:
    return tuple(
        f"--{'' if value else 'no-'}{name}" if isinstance(value, bool) else f"--{name}={value}"
        for name, value in values.items()
    )


def plan(
    names: list[str], on: str, seeds: Sequence[int], out: Path, num_steps: int | None, more: list[str]
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
    source = read_text(ROOT / "train_gpt.py")
    edited = {one.name: source_of(one, source) if one.edits else "" for one in hypotheses}
    numbered = list(enumerate(hypotheses))
    for seed in seeds:
        first = seed % len(hypotheses)
        for place, one in numbered[first:] + numbered[:first]:
            given = (*flags[one.name], f"--seed={seed}")
            jobs.append(Job(one.name, seed, given, steps[one.name], out, edited[one.name], place))
    return jobs


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def read_plan(path: Path) -> tuple[str, dict]:
    """The hash of the source of a folder's runs, and the flags of each name."""
    try:
        known = json.loads(path.read_text())
        return known["source_sha256"], dict(known["flags"])
    except (ValueError, KeyError, TypeError, OSError, RecursionError):
        raise UserError(f"{path}: damaged; use another --out") from None


def check_tables(out: Path) -> None:
    """UserError where tables stand that no ablation made: they would be replaced."""
    theirs = [name for name in MADE if file_kind(out / name) != "missing"]
    if theirs and file_kind(out / "plan.json") == "missing":
        raise UserError(f"{out / theirs[0]}: is there, and no ablation made it; use another --out")


def check_plan(jobs: list[Job], out: Path, file: Path) -> None:
    """Runs in one folder can be compared: one train_gpt.py, and a name always with the same flags."""
    path, source = out / "plan.json", sha256(file.read_text())
    before, flags = read_plan(path) if path.exists() else (source, {})
    need(
        before == source,
        f"{out}: {file.name} has changed since its first run; use another --out, or put the file back",
    )
    for job in jobs:
        wanted = [*job.flags[:-1], *([f"source:{sha256(job.edited)}"] if job.edited else [])]
        ran = flags.setdefault(job.name, wanted)
        is_list = isinstance(ran, list) and all(isinstance(word, str) for word in ran)
        need(is_list, f"{path}: damaged; use another --out")
        remedy = "use another --out, or these flags and source"
        need(ran == wanted, f"{out}: {job.name} ran there with {shlex.join(ran)}; {remedy}")
    write_text(path, json.dumps({"source_sha256": source, "flags": flags}, indent=1))


def lock(out: Path) -> int:
    """One runner a folder. Its runs hold the lock too: none outlives a killed runner unseen."""
    try:
        handle = os.open(out / ".lock", os.O_RDWR | os.O_CREAT)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({os_reason(error)})") from None
    for wait in range(300):  # a run whose runner was killed needs a moment to end
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return handle
        except OSError:
            if wait == 10:
                warn(f"{out}: in use, waiting for up to half a minute")
            show_notes()
            time.sleep(0.1)
    raise UserError(
        f"{out}: another ablation, or a run of one that was killed, is still working there; wait or end it"
    )


def whole_log(job: Job) -> Path | None:
    """The log of a run that got to its end or diverged, but was not moved yet."""
    for path in job.folder.glob("*.txt"):
        runs, _ = read_file(path)
        if runs and (result(runs[-1])[0] or (runs[-1].failure() or "").startswith("failed: ")):
            return path
    return None


def keep(job: Job, path: Path) -> None:
    job.log.parent.mkdir(exist_ok=True)
    os.replace(path, job.log)
    shutil.rmtree(job.folder)


def begin_child(cores: set[int]):
    """What a child calls first: on Linux, SIGTERM when its parent is gone, however it went; its cores."""
    import ctypes

    prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None

    def prepare() -> None:
        if prctl is not None:
            prctl(1, signal.SIGTERM)  # 1: PR_SET_PDEATHSIG
        if cores:
            os.sched_setaffinity(0, cores)

    return prepare


def edited_path(job: Job) -> Path:
    return job.out / ".edited" / job.name / "train_gpt.py"


def write_edited(job: Job, file: Path) -> Path:
    """The job's edited source as a file, with the data that is beside train_gpt.py beside it, too."""
    path = edited_path(job)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(job.edited)
    data = path.parent / "data"
    if not data.is_symlink():
        data.symlink_to(file.parent / "data")
    return path


def core_shares(jobs: int) -> list[set[int]]:
    """The cores of this process, split among `jobs` runs; empty sets where a system pins no process."""
    if jobs == 1 or not hasattr(os, "sched_setaffinity"):
        return [set() for _ in range(jobs)]
    cores = sorted(os.sched_getaffinity(0))
    need(jobs <= len(cores), f"--jobs {jobs}: there are {len(cores)} cores, and each run wants one to itself")
    return [set(cores[i::jobs]) for i in range(jobs)]


def train(job: Job, file: Path, place: Place, bar) -> int:
    """Runs the job's training and moves the bar with its steps -> exit code. Its stderr goes to `errors`."""
    command_line = [*place.launch, str(file), *job.flags, f"--log_dir={job.folder}"]
    step = 0
    with (job.folder / "errors").open("w") as stderr:
        try:
            process = subprocess.Popen(
                command_line,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                errors="replace",
                pass_fds=[place.handle],
                preexec_fn=begin_child(place.cores),
                env=os.environ | ({"OMP_NUM_THREADS": str(len(place.cores))} if place.cores else {}),
            )
        except OSError as error:
            raise UserError(f"--launch {place.launch[0]}: cannot be started ({os_reason(error)})") from None
        place.trainings.add(process)
        try:
            for line in process.stdout:
                word = line[5:].partition("/")[0]
                if line.startswith("step:") and word.isdecimal() and int(word) > step:
                    bar.update(int(word) - step)
                    step = int(word)
            return process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise
        finally:
            place.trainings.processes.discard(process)


def run(job: Job, place: Place, bar) -> None:
    """Trains, and puts the log in its place. UserError if the run ended in a way that the next would, too."""
    shutil.rmtree(job.folder, ignore_errors=True)
    job.folder.mkdir(parents=True)
    code = train(job, write_edited(job, place.file) if job.edited else place.file, place, bar)
    path = whole_log(job)
    if path and code in (0, 1):
        keep(job, path)
        return
    errors = job.folder / "errors"
    last = errors.read_text(errors="replace").strip().splitlines()[-1:] or ["it said nothing"]
    raise UserError(
        f"{job.name}, seed {job.seed}, ended with code {code}: {last[0][:300]} (all of it: {errors}); "
        "the same command goes on"
    )


def describe(job: Job) -> str:
    runs, problem = read_file(job.log)
    found = result(runs[-1])[0] if runs else None
    if found is not None:
        return f"{job.name} seed {job.seed}: {found.loss:.4f} after {found.seconds:.1f} s"
    why = runs[-1].failure() or result(runs[-1])[1] if runs else problem
    return one_line(f"{job.name} seed {job.seed}: no result, {why}")


def run_all(jobs: list[Job], launch: list[str], file: Path, out: Path, shares: Shares = (set(),)) -> None:
    """What is left of the plan, as many runs at once as there are shares; one lock for the folder."""
    check_tables(out)
    handle = lock(out)
    try:
        check_plan(jobs, out, file)
        run_missing(jobs, launch, file, handle, shares)
    finally:
        os.close(handle)


def run_missing(jobs: list[Job], launch: list[str], file: Path, handle: int, shares: Shares) -> None:
    tqdm = extra("tqdm").tqdm
    tqdm.monitor_interval = 0  # it needs no thread of its own
    for job in jobs:
        path = None if job.log.exists() else whole_log(job)
        if path:
            keep(job, path)
    left = [job for job in jobs if not job.log.exists()]
    say(f"{len(jobs)} runs, {len(jobs) - len(left)} of them done")
    free: queue.SimpleQueue[set[int]] = queue.SimpleQueue()
    for cores in shares:
        free.put(cores)
    trainings = Trainings()
    with tqdm(total=sum(job.steps for job in left), unit="step", disable=None) as bar:

        def run_one(job: Job) -> None:
            if trainings.over:
                return
            cores = free.get()
            bar.set_description(f"{job.name} seed {job.seed}")
            try:
                run(job, Place(launch, file, handle, trainings, cores), bar)
            finally:
                free.put(cores)
            with tqdm.external_write_mode():
                say(describe(job))

        pool = ThreadPoolExecutor(len(shares))
        try:
            for done in as_completed([pool.submit(run_one, job) for job in left]):
                done.result()
        except BaseException as error:
            trainings.end()
            if isinstance(error, KeyboardInterrupt):
                warn("interrupted: the same command goes on")
            raise
        finally:
            pool.shutdown(cancel_futures=True)


def logs_of(name: str, out: Path) -> list[Path]:
    """The logs of a hypothesis, of all its seeds."""
    numbered = [(re.fullmatch(r"seed(\d{1,20})", path.stem), path) for path in (out / name).glob("seed*.txt")]
    return [path for _, path in sorted((int(found[1]), path) for found, path in numbered if found)]


def compare(jobs: list[Job], out: Path, target: float | None) -> str:
    """Writes the tables and the picture of the runs that are there; returns what is to be printed.

    The jobs' names come first, then the others that have runs in the folder.
    """
    plan_file = out / "plan.json"
    need(file_kind(plan_file) == "file", f"--out {out}: no ablation ran there (it has no plan.json)")
    places = {job.name: job.place for job in jobs}
    asked = sorted(places, key=places.__getitem__)  # the first seed's round may have begun with another
    others = [name for name in read_plan(plan_file)[1] if name not in asked and logs_of(name, out)]
    groups = [group_of(name, read_paths(logs_of(name, out), warn)) for name in asked + others]
    found = any(group.losses.n for group in groups[: len(asked)])
    need(found, f"--out {out}: no finished run of {', '.join(asked)} there")
    notes = [line for group in groups for line in left_out_lines(group)]
    notes += [groups_note(groups, target), *(f"note: {line}" for line in comparison_warnings(groups))]
    shown = "\n".join([groups_table(groups, target), "", *notes])
    for form, suffix in (("markdown", "md"), ("csv", "csv")):
        write_text(out / f"table.{suffix}", groups_table(groups, target, Style(form)) + "\n")
    write_text(out / "table.txt", shown + "\n")
    write_text(out / "numbers.txt", numbers_text(groups) + "\n")
    if len(groups) > 1:
        pairs = f"{pairs_table(groups, first=True)}\n\n{PAIRS_NOTE}"
        write_text(out / "pairs.txt", pairs + "\n")
        shown += f"\n\n{pairs}"
        draw(groups, out / "loss.png")
    return shown


def left_out_lines(group: Group) -> list[str]:
    return [f"{group.name}: {line}" for line in group.left_out]


def draw(groups: list[Group], path: Path) -> None:
    """How far each step's loss is from the first hypothesis's. A picture that is not ours stays."""
    key = (
        "train_loss"
        if all(run.points("train_loss") for group in groups for run in group.runs)
        else "val_loss"
    )
    named = [(in_words(group.name), group.runs) for group in groups if group.runs]
    mine = file_kind(path) == "missing" or MARK.encode() in path.read_bytes()
    if len(named) < 2 or not groups[0].runs or not mine:
        return
    try:
        difference_picture(named, path, key, begin=0)
    except UserError as error:  # runs of one step have nothing to draw
        warn(f"no picture: {error}")


def list_table(names: list[str], form: str) -> str:
    from records.hypotheses import BASELINES, HYPOTHESES, find

    rows = []
    for one in find(names) if names else HYPOTHESES:
        changed = one.flags | ({"num_steps": one.steps} if one.steps else {})
        words = [*as_flags(changed), *(["edit"] if one.edits else [])]
        flags = " ".join(words[:-1] + ["+ edit"] if one.edits and changed else words)
        needs = " ".join(f"--{name}" for name in one.needs)
        rows.append([one.name, BASELINES[one.seed].preset, one.says, flags, needs])
    head = ["name", "layers of", "what it is", "flags beyond its baseline", "needs"]
    count = f"\n{len(rows)} hypotheses" if form == "text" else ""
    return table(head, rows, form, left=(0, 1, 2, 3, 4)) + count


def flags() -> argparse.ArgumentParser:
    parser = arguments(__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--list", action="store_true", help="print the hypotheses and end")
    parser.add_argument("--out", type=path_flag, metavar="DIR", help="where logs and tables go")
    parser.add_argument(
        "--on", default="cpu", metavar="PRESET", help="whose sizes: cpu, short, medium, one-gpu"
    )
    parser.add_argument(
        "--seeds", type=number_flag(1, 1000, whole=True), default=5, help="runs of each (default 5)"
    )
    parser.add_argument(
        "--first_seed",
        type=number_flag(0, 10**6, whole=True),
        default=0,
        help="the first of their seeds (default 0)",
    )
    parser.add_argument(
        "--num_steps",
        type=number_flag(1, 10**9, whole=True),
        help="of the baseline; hypotheses with other steps keep their proportion",
    )
    parser.add_argument(
        "--target",
        type=LOSS,
        help="loss to be reached (default: the track's; none for cpu, whose ablations may be shorter)",
    )
    parser.add_argument(
        "--launch",
        default=shlex.quote(sys.executable),
        metavar="COMMAND",
        help="starts train_gpt.py, e.g. 'torchrun --standalone --nproc_per_node=8' (default: this Python)",
    )
    parser.add_argument(
        "--jobs",
        type=number_flag(1, 1000, whole=True),
        default=1,
        help="runs at once, each on cores of its own: their losses can be compared, not their times",
    )
    parser.add_argument("--dry_run", action="store_true", help="print the commands in their order and end")
    parser.add_argument("--table", action="store_true", help="only make the table of the runs that are done")
    parser.add_argument("--format", choices=FORMATS, default="text", help="of --list")
    return parser


def launch_words(text: str) -> list[str]:
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UserError(f"--launch {one_line(text, 100)}: {error}") from None
    need(words, "--launch: empty; give the command that starts train_gpt.py")
    return words


def make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: no folder can be made there ({os_reason(error)})") from None


def main(argv: list[str]) -> None:
    split = argv.index("--") if "--" in argv else len(argv)
    args, more = flags().parse_intermixed_args(argv[:split]), argv[split + 1 :]
    if args.list:
        say(list_table(args.names, args.format))
        return
    need(args.names and args.out, "give names and --out DIR, or --list")
    launch, out = launch_words(args.launch), args.out.absolute()
    shares = core_shares(args.jobs)
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    jobs = plan(args.names, args.on, seeds, out, args.num_steps, more)
    if args.dry_run:
        for job in jobs:
            file = edited_path(job) if job.edited else "train_gpt.py"
            say(" ".join(map(shell_word, [*launch, str(file), *job.flags])))
        return
    # What is missing is said now, not after the last run.
    for module in (
        "scipy.stats",
        "tqdm",
        "matplotlib",
    ):
        extra(module)
    if not args.table:
        make_folder(out)
        run_all(jobs, launch, ROOT / "train_gpt.py", out, shares)
    need(file_kind(out) == "folder", f"--out {args.out}: not there")
    say(compare(jobs, out, args.target if args.target is not None else TARGETS.get(args.on)))


if __name__ == "__main__":
    command(main)
