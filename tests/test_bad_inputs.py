"""The judge of tests/programs/bad_inputs.py finds what is planted, and lets pass what is right."""

import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest

import cli
from tests.programs.bad_inputs import FIFO, SECRET, Case, Special, judge


def refuse(*_) -> None:
    raise cli.UserError("in.txt: is no log; give one")


def fail(*_) -> None:
    raise RuntimeError("planted")


def hang() -> None:
    while True:
        time.sleep(1)


def overwrite() -> None:
    with open("in.txt", "w") as file:
        file.write("ours")
    cli.command(refuse)


def remove() -> None:
    os.unlink("in.txt")


def leave_half() -> None:
    with open("out.part", "w") as file:
        file.write("half")
    cli.command(refuse)


def tell_the_secret() -> None:
    print(os.environ["HF_TOKEN"])


def write_the_secret() -> None:
    with open("out", "w") as file:
        file.write(os.environ["HF_TOKEN"])


def say_too_much() -> None:
    print("note: more", file=sys.stderr)
    cli.command(refuse)


PLANTED = {
    "a traceback": (fail, "a traceback"),
    "a bug that cli.command reports": (lambda: cli.command(fail), "exit code 1, not 2 or 0"),
    "a hang": (hang, "it hung"),
    "a file overwritten": (overwrite, "'in.txt' was changed"),
    "a file removed": (remove, "'in.txt' is gone"),
    "half a file": (leave_half, "refused, but 'out.part' was made"),
    "the secret, printed": (tell_the_secret, "the secret in stdout"),
    "the secret, in a file": (write_the_secret, "the secret stands in 'out'"),
    "two lines": (say_too_much, "2 lines on stderr, not 1"),
    "another exit code": (lambda: 3, "exit code 3, not 2 or 0"),
    "an escape": (lambda: print("\x1b[31mred"), "a control character in stdout"),
    "a crash": (lambda: os.kill(os.getpid(), signal.SIGKILL), "exit code -9, not 2 or 0"),
}


def outcome_of(main, tmp_path, limit: float = 30, codes: tuple = (2, 0)):
    case = Case("records.logs", "planted", ("in.txt",), {"in.txt": b"theirs"}, codes)
    return judge(case, main, tmp_path / "case", limit)


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_found(name, tmp_path):
    main, words = PLANTED[name]
    outcome = outcome_of(main, tmp_path, limit=0.5 if main is hang else 30)
    assert any(words in problem for problem in outcome.problems), outcome


def test_what_is_refused_in_one_line_passes(tmp_path):
    outcome = outcome_of(lambda: cli.command(refuse), tmp_path)
    assert outcome.code == 2 and not outcome.problems, outcome
    assert outcome.stderr == b"logs.py: error: in.txt: is no log; give one\n"


def test_what_is_harmless_passes_only_where_it_may(tmp_path):
    assert outcome_of(lambda: print("fine"), tmp_path).problems == []
    refused = outcome_of(lambda: print("fine"), tmp_path / "other", codes=(2,))
    assert refused.problems == ["exit code 0, not 2"]


def test_the_command_meets_its_files_its_words_and_its_input(tmp_path):
    def look() -> None:
        assert sys.argv[1:] == ["--x", "\udcff"] and sys.stdin.read() == "typed"
        assert os.readlink("loop") == "loop" and os.environ["HF_TOKEN"] == SECRET
        assert Path("a/b").read_text() == "text" and not os.path.isfile("fifo")

    files = {"loop": Special("link", "loop"), "a/b": b"text", "fifo": FIFO}
    case = Case("data.text", "planted", ("--x", "\udcff"), files, (0,), stdin=b"typed")
    outcome = judge(case, look, tmp_path / "case")
    assert outcome.problems == [], outcome


def test_the_same_seed_damages_alike():
    from tests.programs.bad_input_cases import damaged, damaged_lines

    text = b"step:1/3 val_loss:3.2\n" * 9
    for damage in (damaged, damaged_lines):
        first, second = ([damage(text, random.Random(seed)) for seed in range(20)] for _ in range(2))
        assert first == second and len(set(first)) > 10
