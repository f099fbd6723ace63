"""Read training logs: this project's, the GPT speedrun's public ones, llm.c's. Nothing in them is executed.

    from pathlib import Path
    from records.reader import read_paths, result

    for run in read_paths([Path("logs")]):
        steps, seconds, losses = run.curve("val_loss")
        final, problem = result(run)

What counts as an event: a line that begins with `step:N` or `s:N`, N in digits, with a loss or a time and a
number behind it. The source at the top of a log may hold lines that look the same; it is left out
(see split_parts). Logs in a record's folder have none: theirs is the train_gpt.py, of that record or another
of the track, whose sha256 their header names.
"""

import bisect
import contextlib
import functools
import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cli import need, one_line, os_reason
from records.files import file_kind

MOST = 1e15  # a number beyond it, of either sign, is none of a run
LARGEST = 256 * 2**20  # bytes; no log is larger
SUFFIXES = (".txt", ".log", ".out", ".stdout")  # of files in a folder that may be logs
SEPARATOR = b"=" * 100 + b"\n"
SOURCE_BEGINS = re.compile(rb'\n(?=(?:"""|\'\'\'|#!|import [a-z_]|from [\w.]+ import ))')
EVENT = re.compile(
    rb"\n(?:step:(?P<step>\d{1,12})(?:/(?P<planned>\d{1,12}))?(?= )|s:(?P<llm_c_step>\d{1,12})(?= )"
    rb"|resumed: from step (?P<resumed>\d{1,12})(?!\d))(?P<rest>[^\n]{0,4000})"
)
PAIR = re.compile(r"(?:^|\s)([A-Za-z_]\w{0,63}):\s?([^\s:]+)(?=\s|$)", re.ASCII)
NUMBER = re.compile(
    r"([-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?|nan|[-+]?inf)(ms|s|us|min|[KMG]iB)?", re.IGNORECASE | re.ASCII
)
SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0}
LLM_C = {"tel": "val_loss", "trl": "train_loss", "hel": "hellaswag"}  # llm.c's names
CURVES = re.compile(rb"(?:loss|train_time|tel|trl):\s?(?:[-+.\d]|nan|inf)")
PEAK_MEMORY = re.compile(rb"\n(?:peak_memory:|peak memory allocated: ?)(\d{1,9}) ?MiB")
GPU_ROW = re.compile(r"^\|\s+\d+\s+(NVIDIA [\w ./-]{1,40}?)\s{2,}", re.MULTILINE)  # of nvidia-smi's table
ENDS = re.compile(rb"\n(?:((?:failed|interrupted): [^\n]{0,300})|resumed: from step \d{1,12}(?!\d))")
RESUME_CHANGE = re.compile(rb"\nresumed: (source|torch|hardware) changed([^\n]{0,300})")
APPENDED_FILE = re.compile(r"\n-{20,100}\n# ?([\w./-]{1,100})\n-{20,100}\n")


@dataclass(frozen=True)
class Point:
    """One number of an event line."""

    step: int
    seconds: float  # training time there; nan where the log has no times
    value: float
    text: str  # the value as the log has it


@dataclass
class Run:
    """One run of a log. `body` are the bytes from its first event on, from which curves are read."""

    path: Path
    name: str  # the file's stem; with #2, #3 .. behind it for later runs of a file
    body: bytes = field(repr=False)
    last_step: int = 0
    planned: int | None = None  # steps of a whole run by its own lines; llm.c's do not say
    header: str = field(default="", repr=False)
    source: str | None = field(default=None, repr=False)
    is_cut: bool = False  # the file's last line has no end

    @property
    def label(self) -> str:
        """The file's path; with #2, #3 .. behind it for later runs of a file."""
        return f"{self.path}{self.name[len(self.path.stem) :]}"

    def events(self, wanted: tuple[bytes, ...] = (b":",)) -> list[tuple[int, bytes]]:
        """(step, rest of the line) of each event that has one of the `wanted` words.

        What a resumed run did again is left out.
        """
        is_wanted = re.compile(b"|".join(map(re.escape, wanted))).search
        found: list[tuple[int, bytes]] = []
        for match in EVENT.finditer(self.body):
            if match["resumed"] is not None:
                drop_repeated(found, int(match["resumed"]))
                continue
            rest = match["rest"]
            if not is_wanted(rest):
                continue
            if self.is_cut and match.end() == len(self.body):
                rest = whole_pairs(rest)
            if CURVES.search(rest):
                found.append((int(match["step"] or match["llm_c_step"]), rest))
        return found

    def points(self, key: str) -> list[Point]:
        """The event lines' numbers of that name, in the log's order."""
        names = [name for name, meaning in LLM_C.items() if meaning == key] + [key]
        wanted = tuple(f"{name}:".encode() for name in names)
        found = []
        for step, rest in self.events(wanted):
            pairs = raw_pairs(rest)
            value = to_number(pairs.get(key, ""))
            if value is None:
                continue
            seconds = to_number(pairs.get("train_time", ""))
            known = seconds is not None and math.isfinite(seconds)
            found.append(Point(step, seconds if known else math.nan, value, pairs[key]))
        return found

    def curve(self, key: str) -> tuple[list[int], list[float], list[float]]:
        """Steps, seconds and values of a number of the event lines."""
        points = self.points(key)
        return [p.step for p in points], [p.seconds for p in points], [p.value for p in points]

    @property
    def facts(self) -> dict[str, str]:
        """The header's `name: value` lines."""
        return dict(re.findall(r"^([a-z][\w -]{0,40}): ?(.*)$", self.header, re.MULTILINE))

    @property
    def config(self) -> dict | None:
        """The configuration of this project's logs, one JSON line of the header."""
        return self._header_json(r"^config:(\{.*\})$")

    @property
    def preset(self) -> str | None:
        found = re.search(r"^preset:(\S+) overrides:", self.header, re.MULTILINE)
        return found[1] if found else None

    @property
    def overrides(self) -> dict | None:
        return self._header_json(r"^preset:\S+ overrides:(\{.*\})$")

    def _header_json(self, pattern: str) -> dict | None:
        found = re.search(pattern, self.header, re.MULTILINE)
        value = load_json(found[1]) if found else None
        return value if isinstance(value, dict) else None

    @property
    def seed(self) -> int | None:
        """Where the log names one."""
        seed = (self.config or {}).get("seed")
        return seed if type(seed) is int else None

    @property
    def hardware(self) -> str | None:
        """Our logs' own line, or the GPUs that nvidia-smi's table in a public log lists."""
        if "hardware" in self.facts:
            return self.facts["hardware"]
        names = GPU_ROW.findall(self.header)
        return f"{len(names)} x {names[0]}" if names and len(set(names)) == 1 else "; ".join(names) or None

    @property
    def versions(self) -> str | None:
        if "versions" in self.facts:
            return self.facts["versions"]
        found = re.findall(r"\bRunning (Python|PyTorch) (\S{1,40})", self.header)
        return ", ".join(f"{name} {version}" for name, version in found) or None

    @property
    def peak_memory(self) -> int | None:
        """MiB."""
        found = PEAK_MEMORY.findall(self.body)
        return int(found[-1]) if found else None

    @property
    def scalars(self) -> dict[str, list[float]]:
        """The learned scalars of the last block, `scalars:NAME [values]`, the last of each name."""
        found = {}
        for name, text in re.findall(rb"\nscalars:(\w{1,80}) (\[[^\n]{0,100000}\])", self.body):
            values = as_floats(load_json(text.decode("utf-8", "replace")))
            if values is not None:
                found[name.decode()] = values
        return found

    @property
    def resume_changes(self) -> list[tuple[str, str]]:
        """What a resumed run found changed: ("source" | "torch" | "hardware", its line)."""
        found = RESUME_CHANGE.findall(self.body)
        return [
            (what.decode(), f"{what.decode()} changed{rest.decode('utf-8', 'replace')}")
            for what, rest in found
        ]

    def failure(self) -> str | None:
        """What the log itself says about a run that did not get to its end, and was not resumed since."""
        found = ENDS.findall(self.body)
        return found[-1].decode("utf-8", "replace") or None if found else None


def drop_repeated(found: list[tuple[int, bytes]], resumed_at: int) -> None:
    """A run goes on from a step: later steps, and the validation at that one, come again."""
    while found and (
        found[-1][0] > resumed_at or found[-1][0] == resumed_at and b"val_loss:" in found[-1][1]
    ):
        found.pop()


def load_json(text: str) -> object:
    """None for what is no JSON, nested too deep, or holds integers of thousands of digits."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def as_floats(values: object) -> list[float] | None:
    """A list of JSON numbers as floats, none beyond MOST, else None."""
    if not isinstance(values, list) or not all(type(value) in (int, float) for value in values):
        return None
    try:
        floats = [float(value) for value in values]
    except OverflowError:  # an integer of 400 digits
        return None
    return None if any(math.isfinite(value) and abs(value) > MOST for value in floats) else floats


def whole_pairs(rest: bytes) -> bytes:
    """A file's last line may end within its last number, which then counts only if its unit follows."""
    return rest if re.search(rb"\d(?:ms|s)$", rest) else rest.rpartition(b" ")[0]


def raw_pairs(rest: bytes) -> dict[str, str]:
    """` tel:4.1 train_time:15301ms` -> {"val_loss": "4.1", "train_time": "15301ms"}."""
    return {LLM_C.get(key, key): text for key, text in PAIR.findall(rest.decode("utf-8", "replace"))}


def to_number(text: str) -> float | None:
    """A number, times in seconds; None for everything else, and beyond MOST. nan and inf are numbers."""
    number = NUMBER.fullmatch(text)
    if number is None or not (number[2] is None or number[2] in SECONDS):
        return None
    value = float(number[1]) * SECONDS.get(number[2], 1.0)
    is_digits = any(map(str.isdigit, number[1]))
    return None if is_digits and abs(value) > MOST else value


def source_files(source: str) -> dict[str, str]:
    """The files that a log's source holds, by name: "" is the training script.

    Some logs append others, each behind its name between two lines of dashes.
    """
    parts = APPENDED_FILE.split(source)
    names = ["", *parts[1::2]]
    return {name: text.strip("\n") + "\n" for name, text in zip(names, parts[::2], strict=True)}


def split_parts(data: bytes) -> list[tuple[str, bytes]]:
    """A file's bytes -> ("source" | "text", part) in their order, none lost.

    Lines of 100 `=` part source, header and events. Source begins where a line begins as Python files do and
    ends at the next such line; where the header names the sha256 of the source, as ours does, at the one line
    that makes that true, so that not even source with such a line and events behind it is taken for a log.
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
        first = bisect.bisect(ends, begin)
        later = ends[first : first + 8]  # a bound, as a file may hold thousands
        if begin > position:
            parts.append(("text", data[position:begin]))
        nearest = later[0] if later else len(data)
        end = next((end for end in later if named_hash(data, begin, end)), nearest)
        parts.append(("source", data[begin:end]))
        position = end
    return parts


def without_source(data: bytes, known: Container[str] | None = None) -> bytes:
    """A log's bytes from its header on, which names the sha256 of the source above it; else all of them.

    known: the hashes of sources that may go; None: any.
    """
    parts = split_parts(data)
    kinds = [kind for kind, _ in parts]
    if kinds[:1] != ["source"] or kinds.count("source") > 1 or b"\r" in data:
        return data
    end = len(parts[0][1])
    named = named_hash(b"\n" + data, 0, end)
    return data[end:] if named and (known is None or named in known) else data


def known_sources(track: Path) -> dict[str, str]:
    """sha256 -> the source, of the train_gpt.py of each record of a track: a record's logs leave it out."""
    found = {}
    for path in track.glob("[!.]*/train_gpt.py"):
        with contextlib.suppress(OSError):
            status = path.stat()
            if stat.S_ISREG(status.st_mode) and status.st_size <= LARGEST:
                digest, source = hashed_source(path, status.st_size, status.st_mtime_ns)
                found[digest] = source
    return found


@functools.lru_cache(maxsize=256)
def hashed_source(path: Path, _size: int, _mtime_ns: int) -> tuple[str, str]:
    """(sha256, text) of a file, which is read again when it has changed."""
    data = path.read_bytes()
    return hashlib.sha256(data).hexdigest(), data.decode("utf-8", "replace").rstrip("\n")


def named_hash(data: bytes, begin: int, end: int) -> str | None:
    """The sha256 of the source from begin to end, if the header behind it names it."""
    named = re.compile(rb"source_sha256:([0-9a-f]{64})\n").match(data, end + 1 + len(SEPARATOR))
    if named is None:
        return None
    digest = hashlib.sha256(data[begin + 1 : end] + b"\n").hexdigest()
    return digest if digest == named[1].decode() else None


@dataclass
class Start:
    """Where a run begins within a part of a file, and what its lines say of its steps."""

    position: int
    planned: int | None = None
    last_step: int = 0


def find_starts(part: bytes) -> list[Start]:
    """A new run begins where the step falls, unless a line says that the run was resumed."""
    starts: list[Start] = []
    for match in EVENT.finditer(part):
        is_resume = match["resumed"] is not None
        counts = bool(starts) if is_resume else CURVES.search(match["rest"])
        if not counts:
            continue
        step = int(match["step"] or match["llm_c_step"] or match["resumed"])
        if not starts or (step < starts[-1].last_step and not is_resume):
            starts.append(Start(match.start()))
        if match["planned"]:
            starts[-1].planned = int(match["planned"])
        starts[-1].last_step = step
    return starts


def split_runs(data: bytes, path: Path) -> list[Run]:
    """The runs of a file's bytes."""
    runs: list[Run] = []
    source, header = None, ""
    for kind, part in split_parts(data):
        if kind == "source":
            source, header = part[1:].decode("utf-8", "replace"), ""
            continue
        starts = find_starts(part)
        before = part[: starts[0].position] if starts else part
        header += before.replace(SEPARATOR, b"").decode("utf-8", "replace")
        ends = [start.position for start in starts[1:]] + [len(part)] * bool(starts)
        for start, end in zip(starts, ends, strict=True):
            name = path.stem if not runs else f"{path.stem}#{len(runs) + 1}"
            body = part[start.position : end]
            runs.append(Run(path, name, body, start.last_step, start.planned, header, source))
    if runs:
        runs[-1].is_cut = not data.endswith(b"\n")
    return runs


def read_file(path: Path) -> tuple[list[Run], str | None]:
    """The runs of a file, or none and why not."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            return [], "not a file"
        if status.st_size > LARGEST:
            return [], f"larger than {LARGEST >> 20} MiB"
        data = path.read_bytes()
    except OSError as error:
        return [], os_reason(error)
    if not data:
        return [], "empty"
    runs = split_runs(data, path)
    record = path.absolute().parent.parent
    if any(run.source is None for run in runs) and file_kind(record / "train_gpt.py") == "file":
        sources = known_sources(record.parent)
        for run in runs:
            run.source = run.source or sources.get(run.facts.get("source_sha256", ""))
    if runs:
        return runs, None
    only_source = any(kind == "source" for kind, _ in split_parts(data))
    return [], "source, but no events" if only_source else "no log: no line has a step and a loss or a time"


def find_files(path: Path, warn: Callable[[str], None] | None = None) -> list[Path]:
    """A file itself, or what may be a log in a folder: nothing hidden, nothing behind a link to a folder."""
    if file_kind(path) != "folder":
        return [path]
    return sorted(walk(path, warn or (lambda line: None)))


def walk(top: Path, warn: Callable[[str], None]) -> Iterator[Path]:
    def unreadable(error: OSError) -> None:
        warn(f"{error.filename}: skipped ({os_reason(error)})")

    for folder, subfolders, names in os.walk(top, onerror=unreadable):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in subfolders:
            if os.path.islink(os.path.join(folder, name)):
                warn(f"{os.path.join(folder, name)}: skipped (a link to a folder)")
        for name in [*names, *subfolders]:
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                yield Path(folder, name)


def read_paths(paths: list[Path], warn: Callable[[str], None] | None = None) -> list[Run]:
    """The runs of files and folders; warn(line) is told of what is no log. UserError if a path is missing."""
    runs, seen = [], set()
    for path in paths:
        need(file_kind(path) != "missing", f"{one_line(str(path), 300)}: not there")
        for file in find_files(path, warn):
            if file in seen:  # named twice, or inside a folder that is named too
                continue
            seen.add(file)
            found, problem = read_file(file)
            runs += found
            if problem and warn:
                warn(f"{file}: skipped ({problem})")
    return runs


def read_logs(paths: list[Path], warn: Callable[[str], None]) -> list[Run]:
    """As read_paths; UserError, with the first reasons, if there is no log at all."""
    told: list[str] = []
    runs = read_paths(paths, told.append)
    names = ", ".join(map(str, paths))
    reasons = f": {'; '.join(told[:3])}" if told else ""
    need(runs, one_line(f"no log among {names}", 600) + reasons)
    for line in told:
        warn(line)
    return runs


@dataclass
class Result:
    """What a run is judged by."""

    step: int
    loss: float
    seconds: float  # nan where the log has no times
    text: str = field(default="", compare=False)  # the loss as the log has it


def result(run: Run, step: int | None = None, key: str = "val_loss") -> tuple[Result | None, str | None]:
    """The value of `key` at `step`, or at the end; or None and why there is none."""
    points = run.points(key)
    if not points:
        return None, f"has no {key}"
    if step is None:
        step = points[-1].step
        if run.planned is not None and step < run.planned:
            return None, f"stops at step {step} of {run.planned}; --step {step} reads it there"
    found = [point for point in points if point.step == step]
    if not found:
        nearest = min((point.step for point in points), key=lambda other: abs(other - step))
        return None, f"has no {key} at step {step}, the nearest is {nearest}"
    last = found[-1]
    return Result(step, last.value, last.seconds, last.text), None


def last_result(run: Run, key: str = "val_loss") -> Result | None:
    """The last value of `key`, wherever the run stopped."""
    points = run.points(key)
    return Result(points[-1].step, points[-1].value, points[-1].seconds, points[-1].text) if points else None
