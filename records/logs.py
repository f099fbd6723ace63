"""Read training logs of the GPT speedrun: this project's, the public ones of any year, llm.c's. Nothing in them is executed.

    python records/logs.py FILE_OR_FOLDER... [--step N] [--loss val_loss] [--format text|markdown|csv]

One line a run: steps, last validation loss, time. What is no log is named with the reason and skipped.

What counts as an event: a line that begins with `step:N` or `s:N`, N in digits, with a loss or a time and a number behind.
The source at the top of a log may hold lines that look the same; it is left out (see split_parts).
"""

import argparse
import bisect
import hashlib
import json
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
from records.tables import FORMATS, table  # noqa: E402

LARGEST = 256 * 2**20  # bytes; no log is larger
SEPARATOR = b"=" * 100 + b"\n"
SOURCE_BEGINS = re.compile(rb'\n(?=(?:"""|\'\'\'|#!|import [a-z_]|from [\w.]+ import ))')
EVENT = re.compile(
    rb"\n(?:step:(\d{1,12})(?:/(\d{1,12}))?(?= )|s:(\d{1,12})(?= )|resumed: from step (\d{1,12})(?!\d))"
    rb"([^\n]{0,4000})"
)  # step, of how many; llm.c's step; a resumed run's; the rest
PAIR = re.compile(r"(?:^|\s)([A-Za-z_]\w{0,63}):\s?([^\s:]+)(?=\s|$)", re.ASCII)
NUMBER = re.compile(
    r"([-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?|nan|[-+]?inf)(ms|s|us|min|[KMG]iB)?", re.IGNORECASE | re.ASCII
)
SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0}
LLM_C = {"tel": "val_loss", "trl": "train_loss", "hel": "hellaswag"}  # llm.c's names
CURVES = re.compile(rb"(?:loss|train_time|tel|trl):\s?(?:[-+.\d]|nan|inf)")


class UserError(Exception):
    """Something a user can put right. The message is one line: the file, flag or value, and what to do. Exit code 2."""


def need(condition: object, message: str) -> None:
    if not condition:
        raise UserError(message)


def extra(module: str):
    """Imports one of requirements.txt's packages, or says how to get it."""
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = module.partition(".")[0]
        raise UserError(f"{name} is missing ({error}); pip install -r records/requirements.txt") from None


def command(main: Callable[[list[str]], int | None]) -> None:
    """Runs a command's main(argv). A UserError is one line and exit code 2; a closed pipe (| head) is no error."""
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(141)
    except KeyboardInterrupt:
        sys.exit(130)


def arguments(doc: str) -> argparse.ArgumentParser:
    """A parser whose help is the module's docstring and whose errors are UserErrors."""
    parser = argparse.ArgumentParser(
        description=doc, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = _flag_error
    return parser


def _flag_error(message: str) -> None:
    raise UserError(f"{message} (--help lists the flags)")


@dataclass
class Run:
    """One run of a log. `events` are the bytes from its first event on; the curves are read from them when asked for."""

    path: Path
    name: str  # the file's stem; with #2, #3 .. behind it for later runs of a file
    events: bytes = field(repr=False)
    last_step: int = 0
    planned: int | None = None  # steps of a whole run by its own lines; llm.c's do not say
    header: str = field(default="", repr=False)
    source: str | None = field(default=None, repr=False)
    cut: bool = False  # the file's last line has no end

    def lines(self) -> list[tuple[int, bytes]]:
        """(step, rest of the line) of each event that stands: what a resumed run did again is left out."""
        found: list[tuple[int, bytes]] = []
        for match in EVENT.finditer(self.events):
            step, _, other, resumed, rest = match.groups()
            if (
                resumed is not None
            ):  # it goes on from there: later steps, and the validation there, come again
                at = int(resumed)
                while found and (found[-1][0] > at or found[-1][0] == at and b"val_loss:" in found[-1][1]):
                    found.pop()
                continue
            if self.cut and match.end() == len(self.events):
                rest = whole_pairs(rest)
            if CURVES.search(rest):
                found.append((int(step or other), rest))
        return found

    def curve(self, key: str) -> tuple[list[int], list[float], list[float]]:
        """Steps, seconds (nan where the log has no times) and values of a number that stands in event lines."""
        names = [name for name, meaning in LLM_C.items() if meaning == key] + [key]
        wanted = tuple(f"{name}:".encode() for name in names)
        steps, seconds, values = [], [], []
        for step, rest in self.lines():
            if not any(name in rest for name in wanted):
                continue
            pairs = parse_pairs(rest)
            if isinstance(pairs.get(key), float):
                steps.append(step)
                taken = pairs.get("train_time")
                seconds.append(taken if isinstance(taken, float) else math.nan)
                values.append(pairs[key])
        return steps, seconds, values

    @property
    def facts(self) -> dict[str, str]:
        """The header's `name: value` lines."""
        return dict(re.findall(r"^([a-z][\w -]{0,40}): ?(.*)$", self.header, re.MULTILINE))

    @property
    def config(self) -> dict | None:
        """The configuration of this project's logs, one JSON line of the header."""
        return self._json(r"^config:(\{.*\})$")

    @property
    def preset(self) -> str | None:
        found = re.search(r"^preset:(\S+) overrides:", self.header, re.MULTILINE)
        return found[1] if found else None

    @property
    def overrides(self) -> dict | None:
        return self._json(r"^preset:\S+ overrides:(\{.*\})$")

    def _json(self, pattern: str) -> dict | None:
        found = re.search(pattern, self.header, re.MULTILINE)
        value = load_json(found[1]) if found else None
        return value if isinstance(value, dict) else None

    @property
    def scalars(self) -> dict[str, list[float]]:
        """The learned scalars of the last block, `scalars:NAME [values]`, the last of each name."""
        found = {}
        for name, text in re.findall(rb"\nscalars:(\w{1,80}) (\[[^\n]{0,100000}\])", self.events):
            values = load_json(text.decode("utf-8", "replace"))
            if isinstance(values, list) and all(type(v) in (int, float) for v in values):
                found[name.decode()] = [float(v) for v in values]
        return found

    def failure(self) -> str | None:
        """What the log itself says about a run that did not get to its end."""
        found = re.findall(rb"\n((?:failed|interrupted): [^\n]{0,300})", self.events)
        return found[-1].decode("utf-8", "replace") if found else None


def load_json(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def whole_pairs(rest: bytes) -> bytes:
    """A line that ends with its file may have been cut within its last number: that one counts only if its unit follows."""
    return rest if re.search(rb"\d(?:ms|s)$", rest) else rest.rpartition(b" ")[0]


def parse_pairs(rest: bytes) -> dict[str, float | str]:
    """` val_loss:4.1 train_time:15301ms handoff:keep` -> numbers as floats (times in seconds), the rest as strings."""
    pairs: dict[str, float | str] = {}
    for key, text in PAIR.findall(rest.decode("utf-8", "replace")):
        number = NUMBER.fullmatch(text)
        if number and (number[2] is None or number[2] in SECONDS):
            pairs[LLM_C.get(key, key)] = float(number[1]) * SECONDS.get(number[2], 1.0)
        else:
            pairs[LLM_C.get(key, key)] = text
    return pairs


def split_parts(data: bytes) -> list[tuple[str, bytes]]:
    """A file's bytes -> ("source" | "text", part) in their order, none lost.

    Lines of 100 `=` part source, header and events. Source begins where a line begins as Python files do and ends at the
    next such line; where the header names the sha256 of the source, as ours does, at the one line that makes that true,
    so that not even source which holds such a line and events behind it is taken for a log.
    """
    data = b"\n" + data.replace(b"\r\n", b"\n")
    ends = [match.start() for match in re.finditer(rb"\n={100}(?=\n)", data)]
    parts, position = [], 0
    while position < len(data):
        begins = SOURCE_BEGINS.search(data, position)
        if begins is None:
            parts.append(("text", data[position:]))
            break
        begin = begins.start()
        later = ends[
            (first := bisect.bisect(ends, begin)) : first + 8
        ]  # a bound, as a file may hold thousands
        if begin > position:
            parts.append(("text", data[position:begin]))
        end = next((end for end in later if _hash_fits(data, begin, end)), later[0] if later else len(data))
        parts.append(("source", data[begin:end]))
        position = end
    return parts


def _hash_fits(data: bytes, begin: int, end: int) -> bool:
    named = re.compile(rb"source_sha256:([0-9a-f]{64})\n").match(data, end + 1 + len(SEPARATOR))
    return bool(named) and hashlib.sha256(data[begin + 1 : end] + b"\n").hexdigest() == named[1].decode()


def split_runs(data: bytes, path: Path) -> list[Run]:
    """The runs of a file's bytes. A new one begins where the step falls, unless a line says that the run was resumed."""
    runs: list[Run] = []
    source, header = None, ""
    cut = not data.endswith(b"\n")
    for kind, part in split_parts(data):
        if kind == "source":
            source, header = part[1:].decode("utf-8", "replace"), ""
            continue
        starts, last = [], math.inf  # of each run: where it begins, steps planned, last step
        for match in EVENT.finditer(part):
            step, planned, other, resumed, rest = match.groups()
            if not starts if resumed is not None else not CURVES.search(rest):
                continue
            number = int(step or other or resumed)
            if not starts or number < last and resumed is None:
                starts.append([match.start(), None, 0])
            starts[-1][1:] = int(planned) if planned else starts[-1][1], number
            last = number
        header += (
            part[: starts[0][0] if starts else len(part)].replace(SEPARATOR, b"").decode("utf-8", "replace")
        )
        for (begin, planned, last), (end, *_) in zip(starts, starts[1:] + [[len(part)]]):
            name = path.stem if not runs else f"{path.stem}#{len(runs) + 1}"
            runs.append(Run(path, name, part[begin:end], last, planned, header, source))
    if runs:
        runs[-1].cut = cut
    return runs


def read_file(path: Path) -> tuple[list[Run], str | None]:
    """The runs of a file, or none and why not."""
    try:
        if not path.is_file():
            return [], "not a file"
        if path.stat().st_size > LARGEST:
            return [], f"larger than {LARGEST >> 20} MiB"
        data = path.read_bytes()
    except OSError as error:
        return [], error.strerror or type(error).__name__
    if not data:
        return [], "empty"
    runs = split_runs(data, path)
    if runs:
        return runs, None
    only_source = any(kind == "source" for kind, _ in split_parts(data))
    return [], "source, but no events" if only_source else "no log: no line has a step and a loss or a time"


def find_files(place: Path) -> list[Path]:
    """A file itself, or what a folder holds that may be a log (.txt, .log, .out), not in hidden folders or READMEs."""
    if not place.is_dir():
        return [place]
    found = (path for pattern in ("*.txt", "*.log", "*.out") for path in place.rglob(pattern))
    return sorted(
        path for path in found if not any(part.startswith(".") for part in path.relative_to(place).parts)
    )


def read_places(places: list[Path], warn: Callable[[str], None] | None = None) -> list[Run]:
    """The runs of files and folders. warn(line) is told of each file that is no log. UserError if a place is not there."""
    runs = []
    for place in places:
        need(place.exists(), f"{place}: not there")
        for path in find_files(place):
            found, problem = read_file(path)
            runs += found
            if problem and warn:
                warn(f"{path}: skipped ({problem})")
    return runs


def warn(line: str) -> None:
    print(line, file=sys.stderr)


@dataclass
class Result:
    """What a run is judged by."""

    step: int
    loss: float
    seconds: float  # nan where the log has no times


def result(run: Run, step: int | None = None, key: str = "val_loss") -> tuple[Result | None, str | None]:
    """The value of `key` at `step`, or at the end; or None and why there is none."""
    steps, seconds, values = run.curve(key)
    if not steps:
        return None, f"has no {key}"
    if step is None:
        if run.planned is not None and steps[-1] < run.planned:
            return None, f"stops at step {steps[-1]} of {run.planned}; --step {steps[-1]} reads it there"
        step = steps[-1]
    if step not in steps:
        near = min(steps, key=lambda other: abs(other - step))
        return None, f"has no {key} at step {step}, the nearest is {near}"
    at = len(steps) - 1 - steps[::-1].index(step)
    return Result(step, values[at], seconds[at]), None


def main(argv: list[str]) -> None:
    parser = arguments(__doc__)
    parser.add_argument("places", nargs="+", type=Path, metavar="FILE_OR_FOLDER")
    parser.add_argument(
        "--step", type=int, metavar="N", help="read the loss at this step (default: the last planned)"
    )
    parser.add_argument(
        "--loss", default="val_loss", metavar="KEY", help="which number of an event line (default val_loss)"
    )
    parser.add_argument("--format", choices=FORMATS, default="text")
    args = parser.parse_args(argv)
    rows = []
    for run in read_places(args.places, warn):
        found, problem = result(run, args.step, args.loss)
        of = f"/{run.planned}" if run.planned is not None else ""
        rows.append(
            [
                run.name,
                run.preset or "-",
                f"{run.last_step}{of}",
                f"{found.loss:.4f}" if found else "-",
                f"{found.seconds:.3f}" if found else "-",
                problem or run.failure() or "",
            ]
        )
    need(rows, "no log among " + ", ".join(map(str, args.places)))
    print(table(["run", "preset", "steps", args.loss, "seconds", "note"], rows, args.format, left=(0, 1, 5)))


if __name__ == "__main__":
    command(main)
