"""The five rules of a record, as functions of a submission. Nothing of a log or of its source is executed."""

import ast
import difflib
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

from records.files import read_text
from records.groups import Group, fingerprint, same_seeds, source_hash
from records.reader import Run
from records.stats import Sample, below, unlike_zero, welch

ROOT = Path(__file__).resolve().parent.parent
P_LIMIT = 0.01
FREE_FLAGS = {"seed", "log_dir", "join"}  # name a run, and change nothing that it computes but its rounding
MOST_DIFFERENCES = 20_000  # lines of a data section that are compared one by one


@dataclass(frozen=True)
class Track:
    hardware: str  # what the log's `hardware:` line must have, a regular expression
    words: str
    target: float  # validation loss, nats a token
    yardstick: str = ""  # the preset whose own loss became the target; its runs are the track's first record
    by_card: bool = False  # a history for each kind of card: a record is faster than the last on its own
    search_seed: int | None = None  # what settings are chosen with; it proves nothing


TRACKS = {
    "short": Track(r"H100.*; 8 process", "8 x H100", 3.28),
    "medium": Track(r"H100.*; 8 process", "8 x H100", 2.92),
    "one-gpu": Track(r"^(?!.*\bcores;).*; 1 process", "one GPU of any kind", 3.28, by_card=True),
    "cpu": Track(r"\b2 cores;", "two CPU cores", 3.59, yardstick="cpu-adamw", search_seed=0),
}


@dataclass
class Submission:
    """What is to be judged."""

    track: str
    source: str
    this: Group
    baseline: Group | None
    earlier: list[Path]  # folders of this track's earlier records
    target: float
    speed_only: bool = False
    reviewed: set[int] = field(default_factory=set)

    @property
    def is_yardstick(self) -> bool:
        return not self.earlier and all(run.preset == TRACKS[self.track].yardstick for run in self.this.runs)

    def presets(self, group: Group) -> set[str]:
        """What these runs may be of: the track's preset; the runs of its first record, of its yardstick."""
        begins = len(self.earlier) <= (1 if group is self.baseline else 0)
        return {self.track, TRACKS[self.track].yardstick} - {""} if begins else {self.track}

    @property
    def reference(self) -> str:
        """The source that this one changes: the baseline's, or, for a first record, this repository's."""
        source = self.baseline.runs[0].source if self.baseline else None
        return source or read_text(ROOT / "train_gpt.py")


@dataclass(frozen=True)
class Finding:
    rule: int
    state: str  # "ok", "fail", or "look": a person has to judge
    words: str


# ---- rule 1: the token streams are untouched


def data_section(source: str) -> str | None:
    """From the heading `# === 4. Data` (with or without a number) to the next heading of that kind."""
    found = re.search(r"^#[ =-]*(?:\d+\. )?Data\b.*?(?=^#[ ]?[=-]{3,}|\Z)", source, re.MULTILINE | re.DOTALL)
    return found[0] if found else None


def rule_streams(s: Submission) -> list[Finding]:
    mine, theirs = data_section(s.source), data_section(s.reference)
    if mine is None or theirs is None:
        return [Finding(1, "look", "no section Data found to compare")]
    if mine == theirs:
        return [Finding(1, "ok", "section Data is the baseline's")]
    before, after = theirs.splitlines(), mine.splitlines()
    if max(len(before), len(after)) > MOST_DIFFERENCES:
        return [Finding(1, "look", "section Data differs from the baseline's")]
    changed = sum(
        line[0] in "+-" for line in difflib.unified_diff(before, after, n=0) if line[:3] not in ("+++", "---")
    )
    return [Finding(1, "look", f"section Data differs from the baseline's, {changed} lines of difference")]


# ---- rule 2: the loss


def rule_loss(s: Submission) -> list[Finding]:
    losses = s.this.losses
    p = below(losses, s.target)
    words = f"mean {losses.mean:.4f} of {losses.n} runs, target {s.target:g}, p = {p:.4f}"
    if not losses.mean <= s.target:
        found = [Finding(2, "fail", words)]
    elif s.speed_only:
        found = [Finding(2, "ok", f"{words}, waived: a change of speed alone")]
    elif s.is_yardstick:
        found = [Finding(2, "ok", f"{words}, waived: the target is theirs")]
    else:
        found = [Finding(2, "ok" if p < P_LIMIT else "fail", words)]
    found += [Finding(2, "fail", f"{line}; each run needs its own") for line in same_seeds(s.this.runs)]
    return found + copies(s.this.runs)


def copies(runs: list[Run]) -> list[Finding]:
    """A test over copies would prove anything."""
    found, known = [], {}
    for run in runs:
        twin = known.setdefault(fingerprint(run), run.name)
        if twin != run.name:
            found.append(
                Finding(2, "fail", f"{run.name} has every loss of {twin}: a copy, or the same --seed")
            )
    return found


# ---- rule 3: no compiler flags


def dotted(node: ast.AST) -> str:
    """`a.b.c` of an attribute chain, else ''."""
    names = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    names.append(node.id if isinstance(node, ast.Name) else "")
    return ".".join(reversed(names))


COMPILER = r"\b_(?:inductor|dynamo|functorch)\b"
COMPILE_KEYWORDS = ("mode", "options", "backend", None)  # None: **more


def compiler_flags(source: str) -> list[str]:
    """What a source does to its compilers beyond calling them. recompile_limit changes no generated code."""
    tree, found = ast.parse(source), []
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and id(node) not in inner:
            name = dotted(node)
            if re.search(COMPILER + r"\.config\b(?!\.recompile_limit$)", name):
                found.append(name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found += renamed_compilers(node)
        elif isinstance(node, ast.Call):
            found += compile_keywords(node)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found += re.findall(r"\b(?:TORCHINDUCTOR|TORCHDYNAMO|TORCH_COMPILE)_\w+", node.value)
    return sorted(set(found))


def renamed_compilers(node: ast.Import | ast.ImportFrom) -> list[str]:
    """Imports of a compiler's parts under another name, under which they could not be followed."""
    module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
    names = [
        f"{module}.{alias.name}".strip(".")
        for alias in node.names
        if isinstance(node, ast.ImportFrom) or alias.asname
    ]
    return [name for name in names if re.search(COMPILER, name)]


def compile_keywords(node: ast.Call) -> list[str]:
    """Of torch.compile(..) and partial(torch.compile, ..)."""
    if not any(dotted(called) == "torch.compile" for called in [node.func, *node.args[:1]]):
        return []
    return [f"torch.compile({word.arg}=..)" for word in node.keywords if word.arg in COMPILE_KEYWORDS]


def rule_compiler(s: Submission) -> list[Finding]:
    try:
        flags = compiler_flags(s.source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return [Finding(3, "fail", f"train_gpt.py is not Python ({type(error).__name__})")]
    if flags:
        return [Finding(3, "fail", f"compiler flags: {', '.join(flags)}")]
    return [Finding(3, "ok", "no compiler flags")]


# ---- rule 4: faster, side by side on the same hardware


def longest_row(labels: list[bool]) -> int:
    longest = row = 0
    for n, label in enumerate(labels):
        row = row + 1 if n and label == labels[n - 1] else 1
        longest = max(longest, row)
    return longest


def interleaved(this: list[Run], baseline: list[Run]) -> Finding:
    """By the logs' `started:` lines, or, where they have none, by the files' times."""
    known = all("started" in run.facts for run in this + baseline)

    def when(run: Run) -> str | int:
        return run.facts["started"] if known else run.path.stat().st_mtime_ns

    order = sorted([(when(run), True) for run in this] + [(when(run), False) for run in baseline])
    longest = longest_row([is_this for _, is_this in order])
    most = -(-max(len(this), len(baseline)) // min(len(this), len(baseline))) + 1
    by = "started: lines" if known else "the files' times"
    if longest <= most:
        return Finding(4, "ok", f"interleaved with the baseline's runs, by {by}")
    words = f"not interleaved by {by}: {longest} runs of one kind in a row"
    return Finding(4, "fail" if known else "look", words)


def time_test(this: Group, baseline: Group) -> tuple[float, str]:
    """p that the times of two groups differ, two-sided, and the test's name.

    Equally many runs made in turns are compared turn by turn, a t-test of the logarithm of their ratio: what
    slows a machine for a while slows both runs of a turn. Others by Welch's test.
    """
    turns = in_turns(this, baseline)
    if turns:
        return unlike_zero(Sample.of([math.log(a) - math.log(b) for a, b in turns])), "by turns"
    return welch(this.times, baseline.times), "by Welch's test"


def in_turns(this: Group, baseline: Group) -> list[tuple[float, float]]:
    """Seconds of the first run of each, of the second of each, ..; [] if their order is no such turns."""
    groups, runs = (this, baseline), this.runs + baseline.runs
    counts = {n for group in groups for n in (len(group.runs), group.times.n)}  # times: where logs have one
    if len(counts) > 1 or min(counts) < 3 or not all("started" in run.facts for run in runs):
        return []
    if (
        interleaved(this.runs, baseline.runs).state != "ok"
        or min(this.times.values + baseline.times.values) <= 0
    ):
        return []
    ordered = []
    for group in groups:
        timed = zip((run.facts["started"] for run in group.runs), group.times.values, strict=True)
        ordered.append([seconds for _, seconds in sorted(timed)])
    return list(zip(*ordered, strict=True))


def rule_hardware(s: Submission) -> Finding:
    groups = [s.this, s.baseline] if s.baseline else [s.this]
    hardware = sorted({run.facts.get("hardware", "unknown") for group in groups for run in group.runs})
    track = TRACKS[s.track]
    if len(hardware) > 1:
        return Finding(4, "fail", "runs on different hardware: " + " | ".join(hardware))
    if not re.search(track.hardware, hardware[0]):
        return Finding(4, "fail", f"the {s.track} track runs on {track.words}, this ran on {hardware[0]}")
    return Finding(4, "ok", f"hardware: {hardware[0]}")


def rule_baseline(s: Submission, baseline: Group) -> list[Finding]:
    """The baseline's runs are those of the record before, of the track's preset, of one source each."""
    found = []
    if s.earlier:
        before = read_text(s.earlier[-1] / "train_gpt.py").rstrip("\n")
        if any((run.source or "").rstrip("\n") != before for run in baseline.runs):
            found.append(
                Finding(4, "look", f"the baseline's runs are not of {s.earlier[-1].name}/train_gpt.py")
            )
    for run in baseline.runs:
        more = sorted(set(run.overrides or {}) - FREE_FLAGS)
        if run.preset not in s.presets(baseline) or more:
            words = f"baseline's {run.name}: preset {run.preset}, overrides {', '.join(more) or 'none'}"
            found.append(Finding(4, "fail", words))
        if run.facts.get("source_sha256", source_hash(run)) != source_hash(run):
            found.append(Finding(4, "fail", f"baseline's {run.name}: source_sha256 does not fit its source"))
        found += [
            Finding(4, "fail", f"baseline's {run.name}: resumed, {line}") for _, line in run.resume_changes
        ]
    found += [Finding(4, "fail", f"baseline's {line}") for line in same_seeds(baseline.runs)]
    return found


def rule_times(group: Group, whose: str) -> list[Finding]:
    """Each run has a time, and their mean is one that a run can take."""
    found = []
    if group.times.n < group.losses.n:
        words = f"{group.losses.n - group.times.n} of {group.losses.n} runs have no train_time"
        found.append(Finding(4, "fail", whose + words))
    if group.times.mean <= 0:
        found.append(Finding(4, "fail", f"{whose}mean time {group.times.mean:.3f} s: no run takes that"))
    return found


def rule_faster(s: Submission) -> list[Finding]:
    found = [rule_hardware(s), *rule_times(s.this, "")]
    if s.baseline is None and s.earlier:
        words = f"no runs of the record before it, {s.earlier[-1].name}; give --baseline"
        return [*found, Finding(4, "fail", words)]
    if s.baseline is None:
        return [*found, Finding(4, "ok", "first of its track")]
    found += rule_times(s.baseline, "baseline's: ") + rule_baseline(s, s.baseline)
    before, after = s.baseline.times.mean, s.this.times.mean
    gain, (p, test) = before - after, time_test(s.this, s.baseline)
    words = f"{gain:.3f} s faster ({before:.3f} to {after:.3f}), p = {p:.4f} {test}"
    if not gain > 0:
        found.append(Finding(4, "fail", words))
    else:
        found.append(Finding(4, "ok" if p < 0.05 else "look", words))
    return [*found, interleaved(s.this.runs, s.baseline.runs)]


# ---- rule 5: each run is the preset, of one source


def rule_preset(s: Submission) -> list[Finding]:
    found: list[Finding] = []
    for run in s.this.runs:
        found += [Finding(5, "fail", f"{run.name}: {words}") for words in run_problems(run, s)]
    found += differing_configs(s.this.runs)
    words = f"{len(s.this.runs)} runs, each the preset without overrides, of this train_gpt.py"
    return found or [Finding(5, "ok", words)]


def run_problems(run: Run, s: Submission) -> list[str]:
    config, overrides = run.config, run.overrides
    if run.source is None or config is None or overrides is None:
        return ["no source, configuration or overrides in the log"]
    found = []
    if run.source.rstrip("\n") != s.source.rstrip("\n"):
        found.append("its source is not the submitted train_gpt.py")
    elif run.facts.get("source_sha256") != source_hash(run):
        found.append("source_sha256 does not fit the source")
    found += [f"resumed, {line}" for _, line in run.resume_changes]
    if run.preset not in s.presets(s.this) or config.get("preset") != run.preset:
        found.append(f"preset {run.preset}, the track is {s.track}")
    more = sorted(set(overrides) - FREE_FLAGS)
    if more:
        found.append(f"overrides {', '.join(more)}")
    if not s.is_yardstick and config.get("seed") == TRACKS[s.track].search_seed:
        found.append(f"seed {TRACKS[s.track].search_seed} is for choosing settings: prove with others")
    if any(config.get(name) != value for name, value in overrides.items()):
        found.append("its configuration contradicts its overrides")
    return found


def differing_configs(runs: list[Run]) -> list[Finding]:
    known = [(run.name, run.config) for run in runs if run.config is not None]
    found = []
    for name, config in known[1:]:
        first_name, first = known[0]
        differing = [key for key in sorted({**config, **first}) if config.get(key) != first.get(key)]
        differing = [key for key in differing if key not in FREE_FLAGS]
        if differing:
            words = f"{name}: its configuration differs from {first_name}'s in {', '.join(differing)}"
            found.append(Finding(5, "fail", words))
    return found


RULES = (rule_streams, rule_loss, rule_compiler, rule_faster, rule_preset)


def check(s: Submission) -> list[Finding]:
    """What the five rules say. `look` becomes `ok` for the rules that a person has reviewed."""
    found = []
    for finding in [finding for rule in RULES for finding in rule(s)]:
        if finding.state == "look" and finding.rule in s.reviewed:
            finding = Finding(finding.rule, "ok", f"{finding.words} (reviewed)")
        found.append(finding)
    return found
