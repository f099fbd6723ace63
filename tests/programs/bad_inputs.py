"""Bad inputs, generated, on every command: each must be refused in one line, and nothing may be spoiled.

    python -m tests.programs.bad_inputs [--seed 0] [--cases 1500] [--only COMMAND]

A case is a command line, the files it meets and what stands in standard input. Another seed makes others.
Each runs in a fork of this process, in a folder of its own. It is refused (exit code 2, one line on stderr)
or harmless (exit code 0, where the input may be fine, as a log with a line changed). All else is a failure: a
traceback, another exit code, more lines, a hang, a file of the user's that was changed or is gone, half a
file left behind, a control character for the terminal, or the environment's secret in the output or a file.

Prints a table, then each failure with a command line that repeats it; its folders are kept then. Exit code 1
if any case failed. Not tried as root: files without permission, which root may read.
"""

import contextlib
import io
import os
import re
import shutil
import signal
import stat
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from cli import arguments, command, need, shell_word
from records.tables import table

ROOT = Path(__file__).resolve().parents[2]
SECRET = "hf_planted" + 24 * "x"
SETTINGS = {"HF_HUB_OFFLINE": "1", "PIP_NO_INDEX": "1", "HF_TOKEN": SECRET, "CUDA_VISIBLE_DEVICES": ""}
LIMIT = 60.0  # seconds, more is a hang
MOST_MEMORY = 2**35  # bytes of addresses, so that a size that nobody checks cannot take the machine
LARGEST_FILE = 2**28
SHOWN = 1500  # characters of an output in the report


@dataclass(frozen=True)
class Special:
    """What stands in a folder besides files with bytes: kind is folder, fifo or link (to `target`)."""

    kind: str
    target: str = ""


FOLDER, FIFO = Special("folder"), Special("fifo")


@dataclass(frozen=True)
class Case:
    """words: the command line behind the command's name. files: by their path in the folder in which it runs.
    codes: exit codes that are right for it. may_make: a file or folder that may be there after a refusal, if
    it is empty. control: it prints what a model writes, control characters included.
    """

    command: str
    kind: str
    words: tuple[str, ...]
    files: dict[str, bytes | Special] = field(default_factory=dict)
    codes: tuple[int, ...] = (2,)
    stdin: bytes = b""
    may_make: str = ""
    control: bool = False


@dataclass
class Outcome:
    code: int | None  # None: it hung
    stdout: bytes
    stderr: bytes
    problems: list[str]


# ----- A folder before and after


def make_files(folder: Path, files: dict[str, bytes | Special]) -> None:
    folder.mkdir(parents=True)
    for name, content in files.items():
        path = os.path.join(folder, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        if isinstance(content, bytes):
            with open(path, "wb") as file:
                file.write(content)
        elif content.kind == "folder":
            os.makedirs(path, exist_ok=True)
        elif content.kind == "fifo":
            os.mkfifo(path)
        else:
            os.symlink(content.target, path)


def look(folder: Path) -> dict[str, object]:
    """What stands below a folder: a file's bytes, a link's target, the kind of all else."""
    found: dict[str, object] = {}
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = os.path.join(parent, name)
            mode = os.lstat(path).st_mode
            if stat.S_ISREG(mode):
                with open(path, "rb") as file:
                    content: object = file.read()
            else:
                content = os.readlink(path) if stat.S_ISLNK(mode) else stat.S_IFMT(mode)
            found[os.path.relpath(path, folder)] = content
    return found


def spoiled(case: Case, code: int | None, before: dict[str, object], after: dict[str, object]) -> list[str]:
    """What of a folder is not as it may be after the command."""
    problems = []
    for name, content in before.items():
        if name not in after:
            problems.append(f"{name!r} is gone")
        elif after[name] != content:
            problems.append(f"{name!r} was changed")
    new = sorted(set(after) - set(before))
    allowed = os.path.normpath(case.may_make) if case.may_make else ""
    for name in new:
        is_empty = after[name] in (b"", stat.S_IFDIR)
        if code == 2 and not (is_empty and is_within(allowed, name)):
            problems.append(f"refused, but {name!r} was made")
        if code == 0 and (name.endswith(".part") or after[name] == b""):
            problems.append(f"half a file is left: {name!r}")
    problems += [f"the secret stands in {name!r}" for name in new if has_secret(after[name])]
    return problems


def is_within(allowed: str, name: str) -> bool:
    """Whether `name` is the folder that the user named, or one that leads to it."""
    return bool(allowed) and (allowed == name or allowed.startswith(f"{name}/"))


def has_secret(content: object) -> bool:
    return isinstance(content, bytes) and SECRET.encode() in content


# ----- One case


def judge(case: Case, main: Callable[[], object], folder: Path, limit: float = LIMIT) -> Outcome:
    """Runs main() as the case's command in `folder`, which is made, and says what is wrong with it."""
    here, temporary = folder / "here", folder / "tmp"
    make_files(here, case.files)
    temporary.mkdir()
    before = look(here)
    names = {name: folder / name for name in ("stdin", "stdout", "stderr")}
    names["stdin"].write_bytes(case.stdin)
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        become(case, main, here, temporary, names)
    code = wait_for(child, limit)
    outcome = Outcome(code, names["stdout"].read_bytes(), names["stderr"].read_bytes(), [])
    outcome.problems += wrong_ending(case, outcome)
    outcome.problems += spoiled(case, code, before, look(here))
    for report in temporary.glob("traceback-*.txt"):
        outcome.problems.append(report.read_text(errors="replace")[-SHOWN:])
    return outcome


def become(case: Case, main: Callable[[], object], here: Path, temporary: Path, names: dict) -> None:
    """The child: the case's command, until it ends."""
    code = 99
    try:
        os.setsid()
        limit_resources()
        os.chdir(here)
        for number, name in enumerate(("stdin", "stdout", "stderr")):
            handle = os.open(
                names[name], os.O_RDONLY if number == 0 else os.O_RDWR | os.O_CREAT | os.O_APPEND
            )
            os.dup2(handle, number)
            os.close(handle)
        sys.stdin = io.TextIOWrapper(io.FileIO(0, closefd=False), encoding="utf-8")
        sys.stdout = io.TextIOWrapper(io.BufferedWriter(io.FileIO(1, "w", closefd=False)), encoding="utf-8")
        sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
        tempfile.tempdir = str(temporary)
        os.environ |= SETTINGS | {"TMPDIR": str(temporary)}
        sys.argv = [str(ROOT / (case.command.split()[0].replace(".py", "").replace(".", "/") + ".py"))]
        sys.argv += case.words
        code = main() or 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def limit_resources() -> None:
    import resource

    for kind, most in ((resource.RLIMIT_AS, MOST_MEMORY), (resource.RLIMIT_FSIZE, LARGEST_FILE)):
        resource.setrlimit(kind, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def wait_for(child: int, limit: float) -> int | None:
    """A child's exit code (-n: signal n); None after `limit` seconds, when it and its children are killed."""
    began, pause = time.monotonic(), 0.001
    while time.monotonic() - began < limit:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(pause)
        pause = min(1.5 * pause, 0.05)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def wrong_ending(case: Case, outcome: Outcome) -> list[str]:
    """What is wrong with an exit code and with what was printed."""
    if outcome.code is None:
        return ["it hung"]
    problems = []
    if outcome.code not in case.codes:
        problems.append(f"exit code {outcome.code}, not {' or '.join(map(str, case.codes))}")
    text = outcome.stderr.decode("utf-8", "replace")
    if "Traceback (most recent call last)" in text:
        problems.append("a traceback")
    if "a bug of this program" in text or "by a bug of" in text:
        problems.append("a bug")
    lines = text.strip().splitlines()
    if outcome.code == 2 and len(lines) != 1:
        problems.append(f"{len(lines)} lines on stderr, not 1")
    for name, output in (("stdout", outcome.stdout), ("stderr", outcome.stderr)):
        if not case.control and re.search(rb"[\x00-\x08\x0b-\x1f\x7f]|\xc2[\x80-\x9f]", output):
            problems.append(f"a control character in {name}")
        if SECRET.encode() in output:
            problems.append(f"the secret in {name}")
    return problems


# ----- The report


@dataclass
class Tally:
    tried: int = 0
    refused: int = 0
    harmless: int = 0
    failed: int = 0


def tally_table(tallies: dict[tuple[str, str], Tally]) -> str:
    head = ["command", "kind of input", "tried", "refused", "harmless", "failed"]
    rows = []
    for (name, kind), tally in sorted(tallies.items()):
        rows.append([name, kind, tally.tried, tally.refused, tally.harmless, tally.failed])
    rows.append(["all", "", *(sum(row[column] for row in rows) for column in range(2, 6))])
    return table(head, [[str(cell) for cell in row] for row in rows], left=(0, 1))


def command_line(case: Case, folder: Path) -> str:
    """What repeats a case in the folder that is kept for it."""
    start = {"train_gpt.py": f"python {ROOT}/train_gpt.py", "run.sh": f"{ROOT}/run.sh"}
    name = case.command.split()[0]
    settings = " ".join(f"{name}={value}" for name, value in {"PYTHONPATH": ROOT, **SETTINGS}.items())
    words = " ".join(map(shell_word, case.words))
    stdin = f"<{folder}/stdin" if case.stdin else "</dev/null"
    return f"cd {folder}/here && env {settings} {start.get(name, f'python -m {name}')} {words} {stdin}"


def describe(case: Case, outcome: Outcome, folder: Path) -> str:
    """A failure, and how to see it again: its folder is made anew."""
    shutil.rmtree(folder, ignore_errors=True)
    make_files(folder / "here", case.files)
    (folder / "stdin").write_bytes(case.stdin)
    said = outcome.stderr.decode("utf-8", "replace")[-SHOWN:]
    lines = [f"{case.command}, {case.kind}: {'; '.join(outcome.problems)}"]
    lines += [f"    stderr: {ascii(line)}" for line in said.splitlines()]
    return "\n".join([*lines, f"    {command_line(case, folder)}"])


def try_all(cases: list[Case], mains: dict[str, Callable[[], object]], place: Path) -> list[str]:
    """Runs them and prints the table -> the failures, described."""
    from tqdm import tqdm

    tallies: dict[tuple[str, str], Tally] = {}
    failures, seconds = [], Counter()
    for number, case in enumerate(tqdm(cases, unit="case", disable=None)):
        folder, began = place / f"{number:05d}", time.monotonic()
        outcome = judge(case, mains[case.command.split()[0]], folder)
        seconds[case.command] += time.monotonic() - began
        tally = tallies.setdefault((case.command, case.kind), Tally())
        tally.tried += 1
        if outcome.problems:
            tally.failed += 1
            failures.append(describe(case, outcome, folder))
            continue
        tally.refused += outcome.code != 0
        tally.harmless += outcome.code == 0
        shutil.rmtree(folder)
    print(tally_table(tallies))
    slowest = ", ".join(f"{name} {count:.0f}" for name, count in seconds.most_common(5))
    print(f"{sum(seconds.values()):.0f} seconds, most of them: {slowest}")
    return failures


def parse(argv: list[str]):
    parser = arguments(__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of the generated cases (default 0)")
    parser.add_argument("--cases", type=int, default=1500, help="how many (default 1500)")
    parser.add_argument(
        "--only", metavar="COMMAND", help="cases of one command, as in the table's first column"
    )
    args = parser.parse_intermixed_args(argv)
    need(1 <= args.cases <= 10**6, f"--cases {args.cases}: must lie between 1 and 1000000")
    return args


def main(argv: list[str]) -> int:
    args = parse(argv)
    place = Path(tempfile.mkdtemp(prefix="bad-inputs-"))
    os.environ |= SETTINGS | {"HF_HOME": str(place / "hub"), "MPLCONFIGDIR": str(place / "matplotlib")}
    from tests.programs.bad_input_cases import World, generate, mains

    world = World(place / "world")
    before = look(place / "world")
    cases = generate(world, args.seed, args.cases, args.only)
    failures = try_all(cases, mains(), place / "cases")
    if look(place / "world") != before:
        failures.append(f"files that all cases share were changed: {place}/world")
    for failure in failures:
        print(f"\n{failure}")
    if not failures:
        shutil.rmtree(place)
    return 1 if failures else 0


if __name__ == "__main__":
    command(main)
