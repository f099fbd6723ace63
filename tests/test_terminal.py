"""A run as a terminal shows it: one live line, what matters above it, at the end what came of it."""

import os
import pty
import re
import shutil
import subprocess
import sys
import time

import pytest
from conftest import CLEAN_ENV, ROOT
from test_robustness import ONE_PROCESS
from test_run import SMALL, the_log

import train_gpt as tg
from records import outcome
from records.record import records_in
from records.rules import TRACKS

WIDTH = 79


def on_terminal(command: list, cwd, **env: str) -> tuple[int, str]:
    """Exit code, and what a terminal of WIDTH columns was sent."""
    ours, theirs = pty.openpty()
    env = CLEAN_ENV | {"TERM": "xterm", "COLUMNS": str(WIDTH), "LINES": "24"} | env
    process = subprocess.Popen(
        [str(part) for part in command], cwd=cwd, env=env, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    sent = b""
    try:
        while part := os.read(ours, 65536):
            sent += part
    except OSError:  # Linux's way to say that nobody writes any more
        pass
    os.close(ours)
    return process.wait(60), sent.decode().replace("\r\n", "\n")


@pytest.fixture(scope="module")
def watched(tmp_path_factory, corpus_dir):
    """(folder, what was sent) of a short run by the command that run.sh gives a terminal."""
    folder = tmp_path_factory.mktemp("watched")
    flags = [*SMALL, "--data_dir", corpus_dir, "--num_steps", 3, "--val_every", 2, "--save_every", 3]
    run = [sys.executable, "-m", "records.outcome", *flags]
    code, sent = on_terminal(run, folder, PYTHONPATH=str(ROOT))
    assert code == 0, sent
    return folder, sent


def test_steps_share_a_line_and_validations_have_their_own(watched):
    folder, sent = watched
    lines = [line.rpartition("\x1b[K")[2] for line in sent.split("\n")]  # as they stay
    assert [line for line in lines if "train_loss" in line or "left" in line] == []
    assert len([line for line in lines if re.match(r"step:[023]/3 val_loss:\d", line)]) == 3
    live = [part for part in re.split(r"\r\x1b\[K|\n", sent) if "left" in part]
    assert [
        re.match(r"step (\d)/3   loss \d\.\d{3}   \d:\d\d left   [\d,]+ tok", part)[1] for part in live
    ] == list("123")
    assert all(len(part) < WIDTH for part in live)
    logged = [line for line in the_log(folder / "logs")[2] if "train_loss:" in line]
    assert len(logged) == 3, "the log has a line for each step"


def test_at_the_end_stands_what_came_of_it(watched):
    folder, sent = watched
    *_, result, log, sample = sent.rstrip("\n").split("\n")
    final = re.search(r"step:3/3 val_loss:(\S+)", sent)[1]
    assert re.match(rf"result: {final} after \d+\.\d s \(the track cpu is run without --backout, ", result)
    [path] = (folder / "logs").glob("*.txt")
    assert log == f"log: {path.relative_to(folder)}"
    assert sample == f'sample: {os.path.relpath(ROOT, folder)}/run.sh sample "The king"'


def test_nothing_is_said_of_a_run_that_failed(tmp_path):
    code, sent = on_terminal(
        [sys.executable, "-m", "records.outcome", "--num_stepz", 3], tmp_path, PYTHONPATH=str(ROOT)
    )
    assert code == 2 and len(sent.strip().split("\n")) == 1 and "--num_stepz" in sent


def test_a_run_of_a_track_stands_beside_its_target_and_last_record(tmp_path):
    record = next(records_in(ROOT / "records" / "cpu")[-1].glob("this/*.txt"))
    shutil.copy(record, tmp_path)
    result, log = outcome.outcome(tmp_path, began=time.time() - 60)
    first, second = result.split("\n")
    reached = rf"; the target of the track cpu is {TRACKS['cpu'].target:g}: reached"
    assert re.fullmatch(rf"result: \d\.\d{{4}} after \d+\.\d s{reached}", first)
    name = record.parent.parent.name.partition("_")[2]
    assert re.match(rf"last record: \d\.\d{{4}} after \d+\.\d s, {re.escape(name)}, on ", second)
    assert log == f"log: {tmp_path / record.name}"
    os.utime(tmp_path / record.name, (0, 0))
    assert outcome.outcome(tmp_path, began=time.time()) == [], "another run's log"


def test_nothing_is_drawn_where_no_terminal_is(monkeypatch, capfd):
    """Nor under torchrun, nor on one that cannot go back in a line."""
    for name, value, terminal in (
        ("TERM", "dumb", True),
        ("TORCHELASTIC_RUN_ID", "x", True),
        ("TERM", "xterm", False),
    ):
        with monkeypatch.context() as patch:
            patch.setenv("TERM", "xterm")
            patch.setenv(name, value)
            patch.setattr(sys.stdout, "isatty", lambda terminal=terminal: terminal, raising=False)
            live = tg.LiveLine(ONE_PROCESS)
            live.show("step 1")
            live.clear()
            assert not live.shown and capfd.readouterr().out == ""
