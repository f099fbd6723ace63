"""The bad inputs of bad_inputs.py: what is made once, what damages it, each command's cases without end."""

import argparse
import copy
import csv
import importlib
import io
import itertools
import json
import math
import random
import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from unittest import mock

import matplotlib.pyplot  # noqa: F401, each case is a fork: what is imported here is imported once
import numpy as np
import plotly.offline  # noqa: F401
import safetensors.torch
import scipy.stats  # noqa: F401
import torch

import cli
import train_gpt as tg
from data.bpe import PATTERN  # noqa: F401, imports tiktoken
from tests.programs.bad_inputs import FIFO, FOLDER, ROOT, Case, Special, judge

Files = dict[str, bytes | Special]
Cases = Iterator[Case]

MODULES = (
    *("data.text", "data.prepare", "data.fineweb", "data.corpus"),
    *("evals.loss", "evals.hellaswag", "evals.sample", "evals.export", "evals.plan"),
    *("records.record", "records.compare", "records.logs", "records.plot", "records.report"),
    *("records.ablate", "records.embeddings", "records.worth"),
)
VOCAB_SIZE = 300
PUBLIC_GAINS = (ROOT / "records/numbers/public_gains.csv").read_bytes()
WORTH = ("w.txt", "--lengths", "short", "--out", "w.png")
PUBLIC = ("w.txt", "--lengths", "short", "--public", "g.csv")
BASE = (
    *("--preset", "cpu", "--no-compile", "--no-warmup", "--vocab_size", str(VOCAB_SIZE)),
    *("--bos_id", str(VOCAB_SIZE - 1), "--model_dim", "32", "--head_dim", "16", "--num_steps", "3"),
    *("--batch_mul", "0.0625", "--val_tokens", "256", "--val_seq_len", "256", "--val_every", "0"),
    *("--spectral", "0", "--bigram_rows", "1", "--bigram_signs", "0", "--save_every", "1"),
)


def mains() -> dict[str, Callable[[], object]]:
    """What each command does in the fork of its case."""
    torch.set_num_threads(1)  # before a fork: threads do not live on in it
    found: dict[str, Callable[[], object]] = {"train_gpt.py": tg.main, "run.sh": run_sh}
    for name in MODULES:
        module = importlib.import_module(name)
        found[name] = lambda module=module: cli.command(module.main)
    return found


def run_sh() -> int:
    import sys

    return subprocess.run([ROOT / "run.sh", *sys.argv[1:]]).returncode


# ----- What is made once


class World:
    """A text, its shards, a run's log, its checkpoint and its export, as the commands make them."""

    def __init__(self, place: Path):
        self.place = place
        text = "\n\n".join(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))
        self.text = text[:30_000].encode()
        words = ("data", "in.txt", "--vocab", f"train:{VOCAB_SIZE}", "--val_tokens", "3000", "--jobs", "1")
        self.data = self.make("data.text", words, {"in.txt": self.text}) / "data"
        (self.data / ".text.json").unlink()  # it names this machine's folders
        run = self.make("train_gpt.py", (*BASE, "--data_dir", str(self.data)), {}) / "logs"
        (log,) = run.glob("*.txt")
        self.run_id = log.stem
        source, *rest = log.read_text().split(tg.Log.SEPARATOR)
        self.log = tg.Log.SEPARATOR.join([source[:300] + "\n", *rest])
        checkpoint = max(run.glob("*.pt"))
        self.checkpoint_name, self.checkpoint = checkpoint.name, checkpoint.read_bytes()
        self.content = torch.load(checkpoint, weights_only=True)
        self.path = checkpoint
        self.vocab = (self.data / "vocab.tiktoken").read_bytes()
        self.token_bytes = (self.data / "token_bytes.npy").read_bytes()
        self.shards = {path.name: path.read_bytes() for path in self.data.glob("*.bin")}
        self.export = self.make("evals.export", (str(checkpoint), "export"), {}) / "export"
        self.weights = (self.export / "model.safetensors").read_bytes()

    def make(self, name: str, words: tuple[str, ...], files: Files) -> Path:
        folder = self.place / name
        outcome = judge(Case(name, "", words, files, codes=(0,)), mains()[name], folder, limit=300)
        assert not outcome.problems, (name, outcome)
        return folder / "here"

    def shard_files(self, folder: str) -> Files:
        files: Files = {f"{folder}/{name}": content for name, content in self.shards.items()}
        return files | {
            f"{folder}/vocab.tiktoken": self.vocab,
            f"{folder}/token_bytes.npy": self.token_bytes,
        }

    def a_log(self, rng: random.Random, seed: int = 0) -> bytes:
        """A log of the same configuration with other losses."""

        def other(match: re.Match) -> str:
            return f"{match[1]}:{float(match[2]) + rng.gauss(0, 0.01):.4f}"

        text = re.sub(r"((?:train|val)_loss):([\d.]+)", other, self.log)
        return text.replace('"seed": 0', f'"seed": {seed}').encode()

    def log_files(self, rng: random.Random, folder: str, count: int = 3) -> Files:
        return {f"{folder}/{n}.txt": self.a_log(rng, n) for n in range(count)}


# ----- What damages anything

NOT_NUMBERS = (
    "nan",
    "NaN",
    "-nan",
    "inf",
    "-inf",
    "Infinity",
    "1e400",
    "-1e400",
    "",
    " ",
    "words",
    "1,5",
    "½",
)
NOT_NUMBERS += (
    "0x10",
    "true",
    "None",
    "--",
    "1 2",
    "\x1b[31m1",
    "1\n2",
    "\udcff",
    "\udcff1",
    "9" * 5000,
    "1.5.2",
)
ODD_NUMBERS = (
    "-1",
    "-0",
    "0",
    "1.5",
    "-2.5",
    "1e3",
    "1e-400",
    "1e308",
    "9" * 400,
    "-" + "9" * 30,
    "٣٣",
    "1_000",
)
ODD_WORDS = (
    "",
    " ",
    "words",
    "\x1b[31mred",
    "a\nb",
    "\udcff\udcfe",
    "9" * 400,
    "w" * 5000,
    "<b>",
    "../../x",
    "ü" * 50,
)
ODD_WORDS += (
    "--",
    "-",
    "%s%n",
    "{0}",
    "$(id)",
    "nan",
    "None",
    "[" * 1000,
    "\u202e",
    "a\x00b".replace("\x00", "\x01"),
)


def is_finite_number(text: str, kind: type) -> bool:
    """Whether int or float takes it for a number that a run can have."""
    try:
        return math.isfinite(kind(text)) if kind is float else kind(text) is not None
    except (ValueError, OverflowError):
        return False


def damaged(data: bytes, rng: random.Random) -> bytes:
    """The same, spoiled somewhere."""
    place, other = (rng.randrange(len(data) + 1) for _ in range(2))
    first, last = sorted((place, other))
    noise = rng.randbytes(rng.choice((1, 4, 100, 5000)))
    kinds = (
        lambda: data[:place],
        lambda: flipped(data, rng),
        lambda: data[:first] + data[last:],
        lambda: data[:last] + data[first:],
        lambda: data[:place] + noise + data[place:],
        lambda: data[:place] + noise + data[place + len(noise) :],
        lambda: data[:first] + bytes(last - first) + data[last:],
        lambda: data + noise,
        lambda: noise + data,
        lambda: b"\xef\xbb\xbf" + data,
        lambda: b"",
        lambda: noise,
        lambda: data + data,
        lambda: bytes(len(data)),
    )
    return rng.choice(kinds)()


def flipped(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 8, 100))):
        if changed:
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


ODD_LINES = (
    *(b"step:99999999999999999999/3 val_loss:1.0 train_time:5ms", b"step:3/3 val_loss:nan train_time:240ms"),
    *(
        b"step:3/3 val_loss:1e400 train_time:-1ms",
        b"step:-1/3 val_loss:3.0",
        b"step:" + b"9" * 400 + b"/1 val_loss:2",
    ),
    *(
        b"step:3/0 val_loss:3.1 train_time:1ms",
        b"\x1b[2J\x1b[31mred",
        b"\x00\x00\x00",
        b"\xff\xfe\xfd",
        b"=" * 100,
    ),
    *(
        b"config:{",
        b"config:" + b"[" * 3000,
        b'config:{"seed": 1e400, "num_steps": -3}',
        b"config:null",
        b"config:[1]",
    ),
    *(b'config:{"seed": {"a": [null]}, "stages": 7}', b"failed: \x1b]0;title\x07", b"val_loss:", b"step:"),
    *(
        b"started: " + b"\xe2\x80\xae" * 20,
        b"hardware: " + b"h" * 10000,
        b"peak_memory:" + b"9" * 400 + b"MiB",
    ),
    *(
        b"scalars:resid_scale [nan, 1e400, x]",
        b"scalars:x0_scale []",
        b"s:1 tel:nan",
        b"preset:<script> overrides:{}",
    ),
    *(
        "step:٣/٣ val_loss:٣".encode(),
        b"losses = [3.2, nan, 1e400]",
        b"times = [-1, 0]",
        b"steps = 99999999999999999",
    ),
    *(
        b"losses = [[3]]",
        b"losses = [" + b"9" * 400 + b"]",
        b"loss_summary = [-3, 1, 1]",
        b"# " + b"x" * 5000,
        b"\r",
    ),
)


def damaged_lines(text: bytes, rng: random.Random) -> bytes:
    """The same text, spoiled at some of its lines."""
    lines = text.split(b"\n")
    for _ in range(rng.choice((1, 1, 3, 10))):
        place, other = rng.randrange(len(lines)), rng.randrange(len(lines))
        kind = rng.randrange(8)
        if kind == 0:
            lines.insert(place, rng.choice(ODD_LINES))
        elif kind == 1:
            number = rng.choice(NOT_NUMBERS + ODD_NUMBERS).encode("utf-8", "surrogateescape")
            lines[place] = re.sub(rb"\d+(\.\d+)?", lambda _, number=number: number, lines[place], count=1)
        elif kind == 2:
            lines[place], lines[other] = lines[other], lines[place]
        elif kind == 3:
            lines.insert(place, lines[other])
        elif kind == 4:
            lines[place] = damaged(lines[place], rng)
        elif kind == 5:
            lines[place] += lines[other]
        elif kind == 6 and len(lines) > 1:
            del lines[place]
        else:
            lines[place] = lines[place].replace(b":", rng.choice((b"::", b": ", b"", b"=")), 1)
    ends = rng.choice((b"\n", b"\n", b"\n", b"\r\n", b"\r"))
    return rng.choice((b"", b"", b"", b"\xef\xbb\xbf")) + ends.join(lines)


def odd_value(rng: random.Random) -> object:
    """A value of another kind than what stands there, as a checkpoint or JSON may hold it."""
    values = (
        None,
        "",
        "\x1b[31mx",
        [],
        {},
        -1,
        2**70,
        math.nan,
        -math.inf,
        True,
        [[]],
        {"a": 1},
        "9" * 400,
        0,
        1.5,
    )
    return rng.choice(values)


def odd_json(value: object, rng: random.Random) -> object:
    """A JSON value with one of its parts replaced, taken out or added."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        name = rng.choice(list(value))
        kind = rng.randrange(4)
        if kind == 0:
            return {key: part for key, part in value.items() if key != name}
        if kind == 1:
            return value | {rng.choice(ODD_WORDS): odd_value(rng)}
        return value | {name: odd_json(value[name], rng)}
    if isinstance(value, list) and value and rng.random() < 0.7:
        place = rng.randrange(len(value))
        return [*value[:place], odd_json(value[place], rng), *value[place + 1 :]]
    return odd_value(rng)


# ----- Files and folders that are none

Place = tuple[str, Files]
NO_INPUTS: tuple[Place, ...] = (
    ("missing", {}),
    ("missing/x", {}),
    ("file/x", {"file": b"x"}),
    ("loop", {"loop": Special("link", "loop")}),
    ("dangling", {"dangling": Special("link", "nowhere")}),
    ("n" * 300, {}),
    ("d/" * 2500 + "x", {}),
    ("", {}),
    ("fifo", {"fifo": FIFO}),
    ("/dev/null", {}),
    ("\udcff\x1b[31m", {}),
    ("folder", {"folder": FOLDER}),
    ("empty", {"empty": b""}),
    ("empty\x1b[31m\udcff", {"empty\x1b[31m\udcff": b""}),
    ("noise.txt", {"noise.txt": bytes(range(256)) * 4}),
)
NO_OUTPUTS: tuple[Place, ...] = (
    ("file", {"file": b"theirs"}),
    ("file/x", {"file": b"theirs"}),
    ("loop", {"loop": Special("link", "loop")}),
    ("n" * 300, {}),
    ("", {}),
    ("fifo", {"fifo": FIFO}),
    ("/dev/full", {}),
    ("/dev/full/x", {}),
    ("/proc/x/y", {}),
)


# ----- Commands with a parser: each flag, each file and folder


@dataclass(frozen=True)
class Use:
    """A command line that works: what stands at the places `inputs` and `outputs` of words names a file or
    folder that is read or made. files: what it reads, beside what the world has."""

    command: str
    words: tuple[str, ...]
    files: Files = field(default_factory=dict)
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()
    codes: tuple[int, ...] = (0, 2)  # where an input may be fine

    @property
    def module(self) -> str:
        return self.command.split()[0]

    def case(self, kind: str, words: tuple[str, ...] | None = None, **changes) -> Case:
        words, files = self.words if words is None else words, self.files | changes.pop("files", {})
        named = words[self.outputs[0]] if self.outputs and len(words) > self.outputs[0] else ""
        control = self.module == "evals.sample"
        given = dict(may_make=named, control=control) | changes
        return Case(self.command, kind, words, files, **given)


def uses(world: World, rng: random.Random) -> list[Use]:
    """Every command that has a parser of its own, with what it needs."""
    logs = world.log_files(rng, "a") | world.log_files(rng, "b")
    return [*uses_of_data_and_evals(world, rng), *uses_of_records(world, logs), *uses_of_compare(logs)]


def uses_of_data_and_evals(world: World, rng: random.Random) -> list[Use]:
    model, vocab = str(world.path), str(world.data / "vocab.tiktoken")
    text, items = {"in.txt": world.text[:8000]}, {"items.jsonl": hellaswag_items(rng)}
    own = ("out", "in.txt", "--vocab", "train:270", "--val_tokens", "500", "--jobs", "1")
    given = ("out", "in.txt", "--vocab", vocab, "--val_tokens", "500", "--jobs", "1")
    return [
        Use("data.text", own, text, (1,), (0,)),
        Use("data.text (vocabulary)", given, text, (3,), (0,)),
        Use("data.fineweb", ("1", "--out", "out"), {}, (), (2,), (2,)),
        Use("data.corpus", ("--out", "out"), {}, (), (1,), (2,)),
        Use("evals.loss", (model, "in.txt", "--vocab", vocab, "--tokens", "60"), text, (0, 1, 3)),
        Use("evals.hellaswag", (model, "items.jsonl", "--vocab", vocab), items, (0, 1, 3)),
        Use("evals.sample", (model, "The king", "--vocab", vocab, "--tokens", "3"), {}, (0, 3)),
        Use("evals.export", (model, "out", "--vocab", vocab), {}, (0, 3), (1,)),
    ]


def uses_of_records(world: World, logs: Files) -> list[Use]:
    named = ("--track", "cpu", "--name", "N", "--records", "r")
    package = ("package", *named, "--this", "a", "--text", "t.md")
    history = ("history", "--track", "cpu", "--records", ".", "--out", "h.png")
    verify = ("verify", "cpu/2026-01-01_X", "--records", ".")
    one_record = record({name: content for name, content in logs.items() if name.startswith("a/")})
    plot = ("loss", "a", "b", "--out", "p.svg", "--loss", "train_loss")
    dry_run = ("000-H0", "--on", "cpu", "--dry_run", "--out", "o", "--seeds", "1")
    return [
        Use("records.record verify", verify, one_record, (1,), (), (0, 1, 2)),
        Use("records.record package", package, logs | {"t.md": b"why"}, (8, 10), (), (0, 1, 2)),
        Use("records.record history", history, one_record, (4,), (6,)),
        Use("records.logs", ("a",), logs, (0,)),
        Use("records.logs diff", ("diff", "a/0.txt", "b/1.txt"), logs, (1, 2)),
        Use("records.logs export", ("export", "a", "--out", "curves.csv"), logs, (1,), (3,)),
        Use("records.plot", plot, logs, (1, 2), (4,)),
        Use("records.report", ("a", "b", "--out", "r.html"), logs, (0, 1), (3,)),
        Use("records.ablate --dry_run", dry_run),
        Use("records.ablate --list", ("--list",)),
        Use("records.embeddings", (str(world.path),), {}, (0,)),
    ]


def worth_numbers() -> bytes:
    """A baseline, it with other numbers of steps, and the ideas that somebody published, for `worth`."""
    groups = {"base": (0.0, 100), "short": (0.1, 80)}
    ideas = csv.DictReader(io.StringIO(PUBLIC_GAINS.decode()))
    groups |= {row["group"]: (float(row["gain"]) / 200, 100) for row in ideas}
    lines = []
    for n, (name, (change, steps)) in enumerate(groups.items()):
        losses = [4 + change + seed / 50 + n * seed % 3 / 1000 for seed in (1, 2, 3)]
        lines += [f"{name}:", f"  losses = {losses}", "  seeds = [1, 2, 3]", f"  steps = {steps}"]
    return "\n".join(lines).encode() + b"\n"


def uses_of_compare(logs: Files) -> list[Use]:
    files = logs | {"numbers.txt": (ROOT / "records/numbers/seed_000.txt").read_bytes()}
    return [
        Use("records.compare groups", ("groups", "a", "b"), files, (1, 2)),
        Use("records.compare steps", ("steps", "numbers.txt"), files, (1,)),
        Use("records.compare pairs", ("pairs", "a", "b"), files, (1, 2)),
        Use("records.compare crossing", ("crossing", "a", "b", "--level", "6"), files, (1, 2)),
        Use("records.compare power", ("power", "a", "--effect", "0.01"), files, (1,)),
        Use("records.compare side", ("side", "a/0.txt", "b/1.txt"), files, (1, 2)),
        Use("records.compare leaderboard", ("leaderboard", "."), files, (1,)),
        Use("records.worth", WORTH, {"w.txt": worth_numbers()}, (0, 2), (4,)),
        Use("records.worth --public", PUBLIC, {"w.txt": worth_numbers(), "g.csv": PUBLIC_GAINS}, (0, 2, 4)),
    ]


def record(logs: Files) -> Files:
    files: Files = {f"cpu/2026-01-01_X/this/{name[2:]}": content for name, content in logs.items()}
    return files | {
        "cpu/2026-01-01_X/train_gpt.py": (ROOT / "train_gpt.py").read_bytes(),
        "cpu/2026-01-01_X/README.md": b"# X",
    }


def parser_of(module: str) -> argparse.ArgumentParser | None:
    """The parser of a command, as its main makes it."""

    class Found(Exception):
        pass

    def find(self, *_):
        raise Found(self)

    with mock.patch.object(argparse.ArgumentParser, "parse_intermixed_args", find):
        try:
            importlib.import_module(module).main(["groups"])
        except Found as found:
            return found.args[0]
    raise AssertionError(f"{module}: no parser")


def shuffled_for_ever(things: list, rng: random.Random) -> Iterator:
    while True:
        yield from rng.sample(things, len(things))


def flag_cases(use: Use, rng: random.Random) -> Cases:
    """Each flag of a command with values that it cannot have."""
    parser = parser_of(use.module)
    named = [one for one in parser._actions if one.option_strings and "--help" not in one.option_strings]
    for action in shuffled_for_ever(named, rng):
        name = action.option_strings[0]
        if action.nargs == 0:
            yield use.case("value of a switch", (*use.words, f"{name}={rng.choice(ODD_WORDS)}"))
            continue
        kind = action.type if action.type in (int, float) else None
        if action.choices:
            value, codes = rng.choice(ODD_WORDS + NOT_NUMBERS), (2,)
        elif kind or "number_flag" in getattr(action.type, "__qualname__", ""):
            value = rng.choice(NOT_NUMBERS + ODD_NUMBERS)
            codes = use.codes if is_finite_number(value, kind or float) else (2,)
        elif action.type is cli.path_flag:
            place, files = rng.choice(NO_INPUTS)
            yield use.case(
                "file or folder",
                (*use.words, f"{name}={place}"),
                files=files,
                codes=use.codes,
                may_make=place,
            )
            continue
        else:
            value, codes = rng.choice(ODD_WORDS + NOT_NUMBERS), use.codes
        words = (f"{name}={value}",) if rng.random() < 0.7 else (name, value)
        yield use.case("value of a flag", (*use.words, *words), codes=codes if len(words) == 1 else use.codes)


def unknown_flag_cases(use: Use, rng: random.Random) -> Cases:
    """Flags that are none, or lack their value."""
    parser = parser_of(use.module)
    takes = [one.option_strings[0] for one in parser._actions if one.option_strings and one.nargs is None]
    while True:
        kind = rng.randrange(4)
        if kind == 0:
            yield use.case("flag without value", (*use.words, rng.choice(takes) if takes else "--nothing"))
        elif kind == 1:
            yield use.case("unknown flag", (*use.words, f"--{rng.choice(ODD_WORDS)}unknown"))
        elif kind == 2:
            yield use.case("unknown flag", (f"-{rng.choice('qxzQ')}", *use.words))
        elif use.module not in ("data.fineweb", "data.corpus"):  # these would begin, in the project's folder
            yield use.case("no arguments", ())


def path_cases(use: Use, rng: random.Random) -> Cases:
    """Each file and folder of a command line, as one that is none."""
    places = [(place, NO_INPUTS) for place in use.inputs] + [(place, NO_OUTPUTS) for place in use.outputs]
    for at, kinds in shuffled_for_ever(places, rng):
        name, files = rng.choice(kinds)
        words = [*use.words]
        words[at] = name
        is_input = kinds is NO_INPUTS
        kind = "input that is none" if is_input else "output that cannot be"
        several = use.module in ("records.compare", "records.report", "records.plot")  # one may be empty
        fine = is_input and (name == "folder" or at == 10 or several)  # at 10: package's --text, any text
        yield use.case(kind, tuple(words), files=files, codes=use.codes if fine else (2,))


# ----- train_gpt.py


def train_value_cases(world: World, rng: random.Random) -> Cases:
    """Every field of Config that is a number, with what no run can mean."""
    base = (*BASE, "--data_dir", str(world.data))
    numbers = [f for f in fields(tg.Config) if f.type in (int, float)]
    for f in shuffled_for_ever(numbers, rng):
        low, high = f.metadata["low"], f.metadata["high"]
        beyond = (str(high * 2 + 1), str(low - 1), str(-(10**30)), str(10**30))
        value = rng.choice(NOT_NUMBERS + ODD_NUMBERS + 3 * beyond)
        fine = is_finite_number(value, f.type) and low <= f.type(value) <= high
        command = rng.choice(("train_gpt.py", "train_gpt.py", "train_gpt.py", "data.prepare"))
        yield Case(
            command,
            "value of a flag",
            (*base, f"--{f.name}={value}"),
            codes=(0, 2) if fine else (2,),
            may_make="logs",
        )


def train_bound_cases(world: World, rng: random.Random) -> Cases:
    """Every field of Config at its bounds, which a run may have, but not this one, perhaps."""
    base = (*BASE, "--data_dir", str(world.data))
    numbers = [f for f in fields(tg.Config) if f.type in (int, float)]
    for f in shuffled_for_ever(numbers, rng):
        value = rng.choice((f.metadata["low"], f.metadata["high"]))
        yield Case("train_gpt.py", "value at a bound", (*base, f"--{f.name}={value}"), codes=(0, 1, 2))


def train_word_cases(world: World, rng: random.Random) -> Cases:
    """Every field of Config that is a word or a switch."""
    base = (*BASE, "--data_dir", str(world.data))
    words = [f for f in fields(tg.Config) if f.type in (str, bool)]
    for f in shuffled_for_ever(words, rng):
        value = rng.choice(ODD_WORDS + NOT_NUMBERS)
        is_free = f.type is str and not f.metadata.get("choices") and f.name != "preset"
        if f.name in ("data_dir", "log_dir"):
            value, files = rng.choice(NO_INPUTS if f.name == "data_dir" else NO_OUTPUTS)
            codes = (2,)
        else:
            files, codes = {}, (0, 2) if is_free else (2,)
        yield Case(
            "train_gpt.py",
            f"word of a flag, --{f.name}" if f.name.endswith("_dir") else "word of a flag",
            (*base, f"--{f.name}={value}"),
            files,
            codes,
        )


def train_flag_cases(world: World, rng: random.Random) -> Cases:
    """No flags at all: unknown ones, cut ones, words."""
    names = [f.name for f in fields(tg.Config) if f.type in (int, float, str)]
    while True:
        name = rng.choice(names)
        bad = (
            (f"--{name}",),
            (f"--{name[:-1]}", "1"),
            (name,),
            (f"-{name}", "1"),
            (f"--no-{name}",),
            ("--", "x"),
        )
        odd = rng.choice(ODD_WORDS)
        words = rng.choice((*bad, (odd or "x",), (f"--{odd}unknown",)))
        command = rng.choice(("train_gpt.py", "data.prepare"))
        yield Case(command, "unknown flag", (*BASE, "--data_dir", str(world.data), *words))


def shard_cases(world: World, rng: random.Random) -> Cases:
    """Shards, their vocabulary and its lengths, damaged."""
    words = (*BASE, "--data_dir", "d")
    while True:
        files = world.shard_files("d")
        name = rng.choice(sorted(files))
        data = files[name]
        kind = name[2:].split("_")[1] if name.endswith(".bin") else name[2:]
        if name.endswith(".bin") and rng.random() < 0.6:
            changed, codes = odd_shard(data, rng)
        else:
            changed = damaged_lines(data, rng) if "vocab" in name else damaged(data, rng)
            codes = (0, 2)
        if "vocab" in name:
            del files["d/token_bytes.npy"]
            yield Case("data.prepare", "damaged vocabulary", words, files | {name: changed}, (0, 2))
            continue
        yield Case("train_gpt.py", f"damaged {kind}", words, files | {name: changed}, codes)
        if name.endswith(".bin"):
            model, vocab = str(world.path), str(world.data / "vocab.tiktoken")
            loss = (model, "x.bin", "--vocab", vocab, "--tokens", "100")
            yield Case("evals.loss", "damaged shard", loss, {"x.bin": changed}, codes)


def odd_shard(data: bytes, rng: random.Random) -> tuple[bytes, tuple[int, ...]]:
    """A shard that no run can read, and the exit codes for it."""
    header, tokens = np.frombuffer(data[:1024], "<i4").copy(), np.frombuffer(data[1024:], "<u2").copy()
    kind = rng.randrange(6)
    if kind == 0:
        header[rng.randrange(3)] = rng.choice((0, -1, 7, 2**31 - 1, len(tokens) + 1, len(tokens) - 1))
    elif kind == 1:
        tokens[rng.randrange(len(tokens))] = rng.choice((VOCAB_SIZE, 2**16 - 1))
    elif kind == 2:
        tokens[tokens == VOCAB_SIZE - 1] = 0
    elif kind == 3:
        header[2], tokens = 0, tokens[:0]
    elif kind == 4:
        return data[: 1024 + rng.randrange(len(data) - 1024) - 1], (2,)
    else:
        return data + b"\0", (2,)
    return header.tobytes() + tokens.tobytes(), (2,)


# ----- Checkpoints


def saved(content: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def odd_tensor(t: torch.Tensor, rng: random.Random) -> object:
    spoiled = t.clone().double()
    spoiled.view(-1)[rng.randrange(max(t.numel(), 1))] = rng.choice((math.nan, math.inf, -math.inf))
    others = (
        lambda: t.reshape(-1)[:-1],
        lambda: t.unsqueeze(0),
        lambda: torch.zeros(0),
        lambda: torch.zeros(()).expand(t.shape),
        lambda: t.to(torch.complex64),
        lambda: t.to(torch.int64),
        lambda: t.to_sparse(),
        lambda: torch.zeros(t.shape, device="meta"),
        lambda: odd_value(rng),
    )
    return spoiled.to(t.dtype) if t.is_floating_point() and rng.random() < 0.4 else rng.choice(others)()


def odd_checkpoint(world: World, rng: random.Random) -> object:
    """A checkpoint whose file is whole and whose content is not a run's."""
    content = copy.deepcopy(world.content)
    kind = rng.randrange(8)
    if kind == 0:
        del content[rng.choice(list(content))]
    elif kind == 1:
        content[rng.choice(list(content))] = odd_value(rng)
    elif kind == 2:
        content["config"] = json.dumps(odd_json(json.loads(content["config"]), rng))
    elif kind == 3:
        name = rng.choice(list(content["model"]))
        content["model"][name] = odd_tensor(content["model"][name], rng)
    elif kind == 4:
        state = content["optimizer"][rng.choice(list(content["optimizer"]))]
        name = rng.choice(list(state))
        state[name] = (
            odd_tensor(state[name], rng) if isinstance(state[name], torch.Tensor) else odd_value(rng)
        )
    elif kind == 5:
        numbers = (-1, 0, 4, 10**9, 10**30, math.nan, math.inf, True, "3")
        content[rng.choice(("step", "clock", "tokens_seen", "flops", "average", "saved_at", "format"))] = (
            rng.choice(numbers)
        )
    elif kind == 6:
        content["run_id"] = rng.choice(
            ("../../x", "/tmp/x", "", ".", "a\nb", "x" * 300, "\x1b[31m", "a/b", "\u202e")
        )
    else:
        part = content[rng.choice(("model", "optimizer"))]
        odd = rng.choice(list(part))
        part[rng.choice((odd + "x", 7, "\x1b[31m"))] = part.pop(odd)
    return content if rng.random() < 0.97 else rng.choice(([], None, [content], "text", torch.zeros(3)))


def checkpoint_cases(world: World, rng: random.Random) -> Cases:
    """Checkpoints, damaged in the file or in what it says, for resuming and for all of evals."""
    resume = (*BASE, "--resume", "--data_dir", str(world.data), "--log_dir", "l")
    path, vocab = f"l/{world.checkpoint_name}", str(world.data / "vocab.tiktoken")
    evals = {
        "evals.loss": ("l", "--vocab", vocab, "--tokens", "60"),
        "evals.sample": (path, "The king", "--vocab", vocab, "--tokens", "3"),
        "evals.export": (path, "out", "--vocab", vocab),
        "evals.hellaswag": (path, "items.jsonl", "--vocab", vocab),
        "records.embeddings": (path,),
        "train_gpt.py": resume,
    }
    items = {"items.jsonl": hellaswag_items(rng)}
    for command in itertools.cycle(["train_gpt.py", *evals]):
        kind, content = "damaged checkpoint", damaged(world.checkpoint, rng)
        if rng.random() < 0.7:
            kind, content = "checkpoint of another content", saved(odd_checkpoint(world, rng))
        files: Files = {path: content} | (items if command == "evals.hellaswag" else {})
        yield Case(command, kind, evals[command], files, (0, 2), control=command == "evals.sample")


def export_cases(world: World, rng: random.Random) -> Cases:
    """What evals.export wrote, damaged or with other words in it."""
    vocab = str(world.data / "vocab.tiktoken")
    with safetensors.safe_open(io_file(world), framework="pt") as file:
        about, weights = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    while True:
        content = damaged(world.weights, rng)
        if rng.random() < 0.6:
            changed = about | {"config": json.dumps(odd_json(json.loads(about["config"]), rng))}
            if rng.random() < 0.5:
                changed = about | {rng.choice(list(about)): rng.choice(ODD_NUMBERS)}
            content = safetensors.torch.save(weights, metadata=changed)
        words = ("e", "in.txt", "--vocab", vocab, "--tokens", "60")
        files: Files = {"e/model.safetensors": content, "in.txt": world.text[:1000]}
        yield Case("evals.loss", "damaged export", words, files, (0, 2))


def io_file(world: World) -> Path:
    return world.export / "model.safetensors"


# ----- Logs and numbers


def log_cases(world: World, rng: random.Random) -> Cases:
    """Logs, spoiled line by line, for all of records."""
    numbers = (ROOT / "records/numbers/seed_000.txt").read_bytes()
    commands = (
        ("records.logs", ("a",)),
        ("records.logs", ("a", "--sort", "loss", "--where", "loss<9", "--format", "csv")),
        ("records.logs diff", ("diff", "a/0.txt", "a/1.txt")),
        ("records.logs export", ("export", "a", "--out", "c.csv")),
        ("records.logs export", ("export", "a", "--out", "c.jsonl")),
        ("records.logs --follow", ("--follow", "a/0.txt", "--patience", "0")),
        ("records.compare groups", ("groups", "a", "b", "--target", "6", "--numbers")),
        ("records.compare pairs", ("pairs", "a", "b")),
        ("records.compare crossing", ("crossing", "a", "b", "--level", "6")),
        ("records.compare side", ("side", "a/0.txt", "a/1.txt")),
        ("records.compare leaderboard", ("leaderboard", ".")),
        ("records.compare power", ("power", "a", "--effect", "0.01")),
        ("records.plot", ("loss", "a", "b", "--out", "p.svg", "--difference", "--loss", "train_loss")),
        ("records.plot", ("scalars", "a", "--out", "p.png")),
        ("records.report", ("a", "b", "--out", "r.html")),
        ("records.record verify", ("verify", "cpu/2026-01-01_X")),
        (
            "records.record package",
            ("package", "--track", "cpu", "--name", "N", "--this", "a", "--records", "r"),
        ),
        ("records.record history", ("history", "--track", "cpu", "--records", ".")),
        ("records.compare groups", ("groups", "n.txt", "a", "--numbers")),
        ("records.compare steps", ("steps", "n.txt", "--target", "3.28")),
        ("records.compare pairs", ("pairs", "n.txt")),
        ("records.worth", WORTH),
        ("records.worth --public", PUBLIC),
    )
    for command, words in shuffled_for_ever(list(commands), rng):
        files = world.log_files(rng, "a") | world.log_files(rng, "b")
        spoiled = rng.sample(sorted(files), rng.choice((1, 1, 3, 6)))
        for name in spoiled:
            files[name] = damaged_lines(files[name], rng) if rng.random() < 0.8 else damaged(files[name], rng)
        kind = "damaged log"
        if "n.txt" in words:
            kind, files["n.txt"] = "damaged numbers", damaged_lines(numbers, rng)
        elif "w.txt" in words:
            kind, files = "damaged numbers", {"w.txt": worth_numbers(), "g.csv": PUBLIC_GAINS}
            odd = rng.choice(sorted(files) if "g.csv" in words else ["w.txt"])
            files[odd] = damaged_lines(files[odd], rng)
        elif command.startswith("records.record") and words[0] != "package":
            files = record({name: content for name, content in files.items() if name.startswith("a/")})
        codes = (0, 1, 2) if command.startswith("records.record") else (0, 2)
        yield Case(command, kind, words, files, codes)


# ----- Texts and JSON lines


def hellaswag_items(rng: random.Random) -> bytes:
    rows = []
    for n in range(3):
        endings = [f"goes {word} the house." for word in ("to", "by", "over", "under")]
        rows.append(json.dumps({"ctx": f"The king {n}", "endings": endings, "label": rng.randrange(4)}))
    return "\n".join(rows).encode() + b"\n"


def odd_row(row: dict, rng: random.Random) -> bytes:
    """A line of JSON that is none, or holds something else."""
    nested = rng.choice((10, 1000, 100_000))
    lines = (
        lambda: json.dumps(odd_json(row, rng)).encode(),
        lambda: json.dumps(odd_json(row, rng)).encode(),
        lambda: damaged(json.dumps(row).encode(), rng),
        lambda: b"[" * nested + b"]" * nested,
        lambda: b'{"text": ' * nested + b"1" + b"}" * nested,
        lambda: b'{"text": ' + b"9" * 5000 + b"}",
        lambda: b'{"text": "\\ud800"}',
        lambda: b'{"text": "\xff"}',
        lambda: b"null",
        lambda: b'{"text": "a", "text": 1}',
        lambda: b"",
    )
    return rng.choice(lines)()


def json_cases(world: World, rng: random.Random) -> Cases:
    """JSON lines for data.text and hellaswag."""
    model, vocab = str(world.path), str(world.data / "vocab.tiktoken")
    documents = [
        {"text": text.decode(errors="replace"), "id": n}
        for n, text in enumerate(world.text.split(b"\n\n")[:60])
    ]
    for command in itertools.cycle(("data.text", "evals.hellaswag")):
        rows = (
            documents
            if command == "data.text"
            else [json.loads(line) for line in hellaswag_items(rng).splitlines()]
        )
        lines = [json.dumps(row).encode() for row in rows]
        for _ in range(rng.choice((1, 1, 2, 5))):
            lines[rng.randrange(len(lines))] = odd_row(rng.choice(rows), rng)
        data = rng.choice((b"", b"", b"\xef\xbb\xbf")) + rng.choice((b"\n", b"\n", b"\r\n", b"\n\n")).join(
            lines
        )
        if command == "data.text":
            words = ("out", "x.jsonl", "--vocab", vocab, "--jobs", "1", "--val_tokens", "200")
            yield Case(command, "JSON lines", words, {"x.jsonl": data}, (0, 2), may_make="out")
        else:
            yield Case(command, "JSON lines", (model, "x.jsonl", "--vocab", vocab), {"x.jsonl": data}, (0, 2))


MAGIC = (
    b"%PDF-1.4",
    b"PK\x03\x04",
    b"PAR1\x15",
    b"\x1f\x8b\x08",
    b"BZh91AY",
    b"\xff\xfe",
    b"\x7fELF",
    b"\x93NUMPY",
)


def odd_text(world: World, rng: random.Random) -> bytes:
    text = world.text[: rng.choice((0, 1, 300, 8000))]
    kinds = (
        lambda: damaged(text, rng),
        lambda: damaged_lines(text, rng),
        lambda: b" " * 10**6,
        lambda: b"\n" * 10**5 + text,
        lambda: b"a" * 300_000,
        lambda: b"<|endoftext|>" * 1000,
        lambda: rng.choice(MAGIC) + text,
        lambda: text + "\u2028\x85\ufeff\u202e".encode() * 100,
        lambda: text.replace(b" ", b"\x1b[31m"),
        lambda: b"\xed\xa0\x80" + text,
        lambda: text.decode(errors="replace").encode("utf-16"),
        lambda: "👨‍👩‍👧".encode() * 5000,
    )
    return rng.choice(kinds)()


def text_cases(world: World, rng: random.Random) -> Cases:
    """Texts, as files of any ending, in folders, packed, and in standard input."""
    model, vocab = str(world.path), str(world.data / "vocab.tiktoken")
    more = ("--vocab", vocab, "--jobs", "1", "--val_tokens", "200")
    while True:
        text = odd_text(world, rng)
        name = rng.choice(
            ("x.txt", "x.md", "x.jsonl", "x.json", "x.txt.gz", "x.bz2", "x.txt.xz", "x", "x\x1b[31m.txt")
        )
        kind = rng.randrange(5)
        if kind == 0:
            yield Case(
                "evals.loss", "text", (model, name, "--vocab", vocab, "--tokens", "500"), {name: text}, (0, 2)
            )
        elif kind == 1:
            yield Case("data.text", "text in standard input", ("out", "-", *more), {}, (0, 2), text, "out")
        elif kind == 2:
            files = {
                f"in/{name}": text,
                "in/good.txt": world.text[:3000],
                "in/loop": Special("link", "."),
                "in/f.txt": FIFO,
            }
            yield Case("data.text", "folder", ("out", "in", *more), files, (0, 2), may_make="out")
        elif kind == 3:
            words = (
                model,
                text.decode("utf-8", "surrogateescape").replace("\0", " ")[:2000],
                "--vocab",
                vocab,
                "--tokens",
                "2",
            )
            yield Case("evals.sample", "prompt", words, {}, (0, 2), control=True)
        else:
            yield Case("data.text", "text", ("out", name, *more), {name: text}, (0, 2), may_make="out")


def begun_cases(world: World, rng: random.Random) -> Cases:
    """A folder that data.text has begun, or that others made: it must not be spoiled."""
    vocab = str(world.data / "vocab.tiktoken")
    words = ("out", "in.txt", "--vocab", vocab, "--jobs", "1")
    state = (
        json.loads((world.place / "state.json").read_bytes()) if (world.place / "state.json").exists() else {}
    )
    while True:
        name = rng.choice(
            (".text.json", "vocab.tiktoken", "token_bytes.npy", "text_val_000000.bin", "README.md")
        )
        content = (
            json.dumps(odd_json(state, rng)).encode() if name == ".text.json" else damaged(world.vocab, rng)
        )
        files = {f"out/{name}": content, "in.txt": world.text[:5000]}
        yield Case("data.text", "folder of somebody's", words, files, (2,) if name != "README.md" else (0,))


# ----- evals.plan, run.sh


def plan_cases(world: World, rng: random.Random) -> Cases:
    numbers = [f for f in fields(tg.Config) if f.type in (int, float)]
    presets, orders = (
        (*tg.PRESETS, *ODD_WORDS),
        ("8xH100", "H100", "0xH100", "-1xH100", "8xB9", "٣xH100", "9999xH100", *ODD_WORDS),
    )
    while True:
        f, value = rng.choice(numbers), rng.choice(NOT_NUMBERS + ODD_NUMBERS)
        kind = rng.randrange(3)
        if kind == 0:
            yield Case(
                "evals.plan", "preset and GPUs", (rng.choice(presets), rng.choice(orders)), codes=(0, 2)
            )
        elif kind == 1:
            yield Case(
                "evals.plan",
                "value at a bound",
                ("short", "8xH100", f"--{f.name}={f.metadata['high']}"),
                codes=(0, 2),
            )
        else:
            bad = not is_finite_number(value, f.type)
            yield Case(
                "evals.plan",
                "value of a flag",
                ("short", "8xH100", f"--{f.name}={value}"),
                codes=(2,) if bad else (0, 2),
            )


RUN_SH = (
    (*("--preset", "cpu", "--num_steps", "many"),),
    ("--preset", "\x1b[31mnone"),
    ("--preset=cpu", "--unknown"),
    ("sample", "--tokens", "nan", "The king"),
    ("sample", "--tokens"),
    ("smaple",),
    ("--preset", "cpu", "--data_dir", ""),
    ("",),
)


def run_sh_cases(world: World, rng: random.Random) -> Cases:
    # Its first call in an environment says that it installs: not in a case.
    subprocess.run([ROOT / "run.sh", *RUN_SH[0]], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for words in shuffled_for_ever(list(RUN_SH), rng):
        yield Case("run.sh", "flags", words)


# ----- All of them


def generate(world: World, seed: int, count: int, only: str | None) -> list[Case]:
    """So many cases, of all generators by their weights, the same for the same seed."""
    rng = random.Random(seed)
    found: list[tuple[float, Cases]] = []
    for weight, make in (
        *((14, train_value_cases), (4, train_bound_cases), (4, train_word_cases), (4, train_flag_cases)),
        *((7, shard_cases), (12, checkpoint_cases), (2, export_cases), (12, log_cases), (5, json_cases)),
        *((6, text_cases), (2, begun_cases), (4, plan_cases), (0.3, run_sh_cases)),
    ):
        found.append((weight, make(world, random.Random(rng.random()))))
    for use in uses(world, rng):
        weight = 0.15 if use.command == "data.corpus" else 1
        found.append((weight, flag_cases(use, random.Random(rng.random()))))
        found.append((weight / 3, unknown_flag_cases(use, random.Random(rng.random()))))
        if use.inputs or use.outputs:
            found.append((weight, path_cases(use, random.Random(rng.random()))))
    weights, cases = [weight for weight, _ in found], [cases for _, cases in found]
    right = []  # else what is refused may be refused for something else
    for use in uses(world, rng):
        does_not_count = (1,) if use.command in ("records.record verify", "records.record package") else ()
        right.append(use.case("nothing wrong", codes=(*use.codes[:1], *does_not_count)))

    chosen = [case for case in right if is_wanted(case, only)][:count]
    tries = 0
    while len(chosen) < count:
        case = next(rng.choices(cases, weights)[0])
        tries += 1
        cli.need(tries < 10**5 or chosen, f"--only {only}: no such command")
        if is_wanted(case, only):
            chosen.append(case)
    return chosen


def is_wanted(case: Case, only: str | None) -> bool:
    return only is None or only in (case.command, case.command.split()[0])
