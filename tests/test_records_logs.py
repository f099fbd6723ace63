"""The log reader: every known format, several and resumed runs, cut files, and logs that mean harm."""

import csv
import hashlib
import json
import math
import os
import random
import sys
import time
from pathlib import Path

import pytest
from conftest import assert_user_error, run_command

from cli import UserError
from records import files, logs, reader

SEPARATOR = "=" * 100
SOURCE = '''"""
A run prints

step:1/2 val_loss:9.9999 train_time:9ms step_avg:9.00ms
s:7 tel:9.9999
"""
import sys
print(sys.argv)
'''


def read(tmp_path: Path, text: str | bytes, name: str = "a.txt") -> list[reader.Run]:
    path = tmp_path / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    runs, problem = reader.read_file(path)
    assert bool(runs) != bool(problem)
    return runs


def ours(events: str, source: str = SOURCE, **config) -> str:
    """A log as train_gpt.py writes it."""
    config = {"preset": "cpu", "seed": 3} | config
    return "\n".join(
        [
            source.rstrip("\n"),
            SEPARATOR,
            f"source_sha256:{hashlib.sha256(source.encode()).hexdigest()}",
            f"config:{json.dumps(config)}",
            'preset:cpu overrides:{"seed": 3}',
            "hardware: AMD EPYC, 2 cores; 1 process(es)",
            SEPARATOR,
            events,
        ]
    )


# ---- formats

FORMATS = {
    "ours": (
        ours(
            "warm-up: 9.8 s outside the clock, 1 kind(s) of step\n"
            "step:0/2 val_loss:8.3144 train_time:0ms step_avg:0.04ms val_bpb:3.5860 tokens:0\n"
            "step:1/2 train_time:1730ms step_avg:1730.49ms train_loss:12.4750 tokens_per_second:4734\n"
            "step:2/2 train_time:3522ms step_avg:1760.79ms train_loss:12.3776 tokens_per_second:4652\n"
            "peak_memory:2465MiB tokens:16384 mfu:0.436\n"
            "step:2/2 val_loss:4.2120 train_time:3522ms step_avg:1760.79ms val_bpb:1.8167 tokens:16384\n"
        ),
        [0, 2],
        [8.3144, 4.2120],
        [0.0, 3.522],
    ),
    "nan average": (
        f"import sys\n{SEPARATOR}\nRunning Python 3.12\n{SEPARATOR}\n"
        "step:0/1393 val_loss:10.8258 train_time:0ms step_avg:nanms\n"
        "step:1/1393 train_time:61ms step_avg:61.00ms\n"
        "step:1393/1393 val_loss:3.2788 train_time:179000ms step_avg:128.50ms\n",
        [0, 1393],
        [10.8258, 3.2788],
        [0.0, 179.0],
    ),
    "seconds": (
        "step:5960/5960 val_loss:2.9191 train_time:2145.235s step_avg:359.94ms\n",
        [5960],
        [2.9191],
        [2145.235],
    ),
    "train loss, then validation": (
        "step:1/10 train_loss:11.0123 train_time:200ms step_avg:200.00ms\n"
        "step:10/10 val_loss:3.5 train_time:2000ms step_avg:200.00ms\n",
        [10],
        [3.5],
        [2.0],
    ),
    "more pairs, some of them words": (
        "step:4/4 val_loss:3.3 train_time:9ms step_avg:2.25ms handoff:keep lr:1e-3 note:a:b phase:2ms\n",
        [4],
        [3.3],
        [0.009],
    ),
    "several losses": (
        "step:4/4 val_loss:3.3 val_avg_loss:3.2 val_ema_loss:3.1 train_time:9ms step_avg:2.25ms\n",
        [4],
        [3.3],
        [0.009],
    ),
    "blanks behind the colon": ("step:4/4 val_loss: 3.3 train_time: 9ms\n", [4], [3.3], [0.009]),
    "llm.c": (
        "s:0 tel:11.0037\ns:0 trl:11.0091\ns:1 trl:10.5 lr:0.000006 norm:15.3\n"
        "s:19560 tel:3.2722\ns:19560 hel:0.3101\n",
        [0, 19560],
        [11.0037, 3.2722],
        [math.nan, math.nan],
    ),
    "Windows line ends": (
        "step:0/1 val_loss:9.5 train_time:0ms\r\nstep:1/1 val_loss:3.5 train_time:7ms\r\n",
        [0, 1],
        [9.5, 3.5],
        [0.0, 0.007],
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_known_format(name, tmp_path):
    text, steps, losses, seconds = FORMATS[name]
    [run] = read(tmp_path, text)
    found = run.curve("val_loss")
    assert (found[0], found[2]) == (steps, losses) and found[1] == pytest.approx(seconds, nan_ok=True)
    assert reader.result(run)[0].loss == losses[-1]


def test_other_numbers_of_a_line(tmp_path):
    [run] = read(tmp_path, FORMATS["several losses"][0])
    assert [reader.result(run, key=key)[0].loss for key in ("val_avg_loss", "val_ema_loss")] == [3.2, 3.1]
    [run] = read(tmp_path, FORMATS["more pairs, some of them words"][0])
    assert run.curve("lr")[2] == [1e-3] and run.curve("phase")[2] == [0.002] and run.curve("handoff")[2] == []
    [run] = read(tmp_path, FORMATS["llm.c"][0])
    assert (
        run.curve("train_loss")[::2] == ([0, 1], [11.0091, 10.5])
        and run.planned is None
        and run.last_step == 19560
    )
    [run] = read(tmp_path, FORMATS["nan average"][0])
    assert math.isnan(run.curve("step_avg")[2][0]) and run.planned == 1393


def test_the_header_and_the_last_block_of_our_logs(tmp_path):
    [run] = read(
        tmp_path,
        ours(
            "step:2/2 train_time:3ms\nscalars:x0_scale [0.5, -0.25]\n"
            'scalars:bad [[1]]\nscalars:worse [1, "x"]\n'
            "step:2/2 val_loss:4.0 train_time:3ms\n"
        ),
    )
    assert run.source == SOURCE.rstrip("\n") and run.config["seed"] == 3 and run.preset == "cpu"
    assert run.overrides == {"seed": 3}
    assert run.facts["hardware"] == "AMD EPYC, 2 cores; 1 process(es)"
    assert run.facts["source_sha256"] == hashlib.sha256(SOURCE.encode()).hexdigest()
    assert run.scalars == {"x0_scale": [0.5, -0.25]}


# ---- several runs, stopped runs, resumed runs


def events(first: int, last: int, planned: int, shift: float = 0.0) -> str:
    return "".join(
        f"step:{i}/{planned} val_loss:{9 - i / 10 + shift:.4f} train_time:{i}ms\n"
        for i in range(first, last + 1)
    )


def test_a_new_run_begins_where_the_step_falls(tmp_path):
    runs = read(tmp_path, events(0, 4, 4) + events(0, 2, 6) + ours(events(0, 3, 3)) + events(3, 5, 5))
    assert [run.name for run in runs] == ["a", "a#2", "a#3"]
    assert [(run.last_step, run.planned) for run in runs] == [(4, 4), (2, 6), (5, 5)]
    assert [run.source is None for run in runs] == [True, True, False]
    assert [len(run.curve("val_loss")[0]) for run in runs] == [5, 3, 7]


def test_a_run_that_stops_early_is_read_where_it_is_asked_for(tmp_path):
    [run] = read(tmp_path, events(0, 4, 10))
    found, problem = reader.result(run)
    assert found is None and problem == "stops at step 4 of 10; --step 4 reads it there"
    assert reader.result(run, step=3)[0] == reader.Result(3, 8.7, 0.003)
    assert reader.result(run, step=9) == (None, "has no val_loss at step 9, the nearest is 4")
    assert reader.result(run, key="val_ema_loss") == (None, "has no val_ema_loss")


def test_a_resumed_run_is_one_run_and_what_it_did_twice_counts_once(tmp_path):
    [run] = read(
        tmp_path, events(0, 5, 6) + "resumed: from step 3 with 1 process(es)\n" + events(3, 6, 6, shift=1.0)
    )
    steps, _, losses = run.curve("val_loss")
    assert steps == [0, 1, 2, 3, 4, 5, 6]
    assert losses == pytest.approx([9.0, 8.9, 8.8, 9.7, 9.6, 9.5, 9.4])
    assert (run.last_step, run.planned) == (6, 6)


def test_a_failed_run_says_so(tmp_path):
    [run] = read(
        tmp_path, events(0, 5, 6) + "failed: the training loss is nan at step 6 (x); lower --muon_lr\n"
    )
    assert run.failure().startswith("failed: the training loss is nan at step 6")
    [run] = read(tmp_path, "step:1/1 val_loss:nan train_time:3ms\n")
    assert math.isnan(reader.result(run)[0].loss)


@pytest.mark.parametrize("word", ["failed: no memory", "interrupted: 6 of 8 steps done (SIGTERM)"])
def test_what_ended_a_run_that_was_resumed_since_is_no_failure(word, tmp_path, capsys):
    stopped, resumed = events(0, 6, 8) + f"{word}\n", "resumed: from step 4 with 1 process(es)\n"
    whole = stopped + resumed + events(5, 8, 8)
    [run] = read(tmp_path, whole)
    assert run.failure() is None and logs.row_of(run, None, "val_loss").cells["state"] == "finished"
    logs.main(["--follow", str(run.path), "--patience", "0"])
    assert capsys.readouterr().out.splitlines()[-1] == "a: finished"
    [run] = read(tmp_path, stopped + resumed + events(5, 6, 8))  # --follow waits for more
    logs.main(["--follow", str(run.path), "--patience", "0"])
    assert "no new line for 0 s" in capsys.readouterr().out
    [run] = read(tmp_path, stopped + resumed + events(5, 6, 8) + "failed: again\n")
    assert run.failure() == "failed: again"


# ---- what only looks like a log

IMITATION = "step:9/9 val_loss:0.0001 train_time:1ms step_avg:0.11ms\n"


@pytest.mark.parametrize(
    "source",
    [
        f'"""\n{IMITATION}"""\nimport sys\n',
        f'import sys\nTEXT = """\n{IMITATION}"""\n',
        f'#!/usr/bin/env python\n"""\n{IMITATION}"""\n',
        f'from pathlib import Path\nx = """\n{SEPARATOR}\n{IMITATION}{SEPARATOR}\n{IMITATION}"""\n',
    ],
)
def test_source_that_imitates_events_is_not_read(source, tmp_path):
    """The last has separators of its own."""
    [run] = read(tmp_path, ours(events(0, 3, 3), source))
    assert run.curve("val_loss")[0] == [0, 1, 2, 3] and run.source == source.rstrip("\n")
    assert read(tmp_path, source.split(SEPARATOR)[0]) == []  # half a file: the source alone


def test_lines_that_do_not_begin_with_an_event_are_none(tmp_path):
    lines = [
        "see step:1/2 val_loss:3.0 train_time:1ms",
        "  step:1/2 val_loss:3.0",
        "step:x/2 val_loss:3.0",
        "step:1/2",
        "step:1/2 val_loss:{loss}",
        "steps:1 val_loss:3.0",
        "step:1/2 hello:3",
        "s:1",
        f"step:{'1' * 5000} val_loss:3.0",
    ]
    assert read(tmp_path, "\n".join(lines) + "\n") == []


@pytest.mark.parametrize(
    "data, word",
    [
        (b"", "empty"),
        (random.Random(0).randbytes(100_000), "no log"),
        (b"\0" * 100_000, "no log"),
        (b"a" * 20_000_000, "no log"),
        (b"\n" * 1_000_000, "no log"),
        (b"step:1/2 " + b"x" * 20_000_000, "no log"),
        (SOURCE.encode(), "source, but no events"),
        ("Überschrift\n".encode("utf-16"), "no log"),
        (f"{SEPARATOR}\n".encode() * 100_000, "no log"),
        (f"import x\n{SEPARATOR}\nsource_sha256:{'0' * 64}\n".encode() * 5_000, "source, but no events"),
        (b"resumed: from step 5\n" * 100_000, "no log"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_log_is_named_quickly(data, word, tmp_path):
    (tmp_path / "x.txt").write_bytes(data)
    began = time.process_time()
    runs, problem = reader.read_file(tmp_path / "x.txt")
    assert runs == [] and word in problem
    assert time.process_time() - began < 3


def test_strange_events_do_not_stop_the_reader(tmp_path):
    deep = "[" * 100_000 + "]" * 100_000
    text = ours(
        "step:1/2 val_loss:1e999 train_time:1e400ms\nstep:1/2 val_loss:+5. x:" + "y" * 1_000_000 + "\n"
        f"scalars:a {deep}\nscalars:b [1e999]\nstep:2/2 val_loss:4.5 train_time:-3ms "
        + "k:1 " * 5000
        + "\n"
        + "resumed: from step 1\n" * 2000,
        config=deep,
    )
    text = text.replace('"config": "' + deep + '"', f'"config": {deep}')
    [run] = read(tmp_path, text)
    assert run.config is None and "a" not in run.scalars
    assert run.curve("val_loss")[0] == []  # resumed from 1: what came later is void
    [run] = read(tmp_path, text.partition("resumed")[0])
    assert run.curve("val_loss")[2] == [5.0, 4.5]  # 1e999 is none


def test_numbers_that_are_none(tmp_path):
    [run] = read(
        tmp_path,
        "step:1/2 val_loss:4.0 train_time:6x52ms\n"
        "step:2/2 val_loss:3.5 train_time:7ms k:\u0131nf l:\u0663 step_avg:1.2.3\n",
    )
    assert run.curve("val_loss")[1:] == (pytest.approx([math.nan, 0.007], nan_ok=True), [4.0, 3.5])
    assert run.curve("k")[2] == run.curve("l")[2] == run.curve("step_avg")[2] == []
    assert reader.result(run, step=1)[0].loss == 4.0


def test_a_cut_file_yields_no_number_that_the_whole_one_does_not_have(tmp_path):
    whole = ours(
        FORMATS["ours"][0].split(SEPARATOR + "\n")[2] + "s:3 tel:3.2722\n"
        "step:4/4 val_loss:3.1234 train_time:2145.235s\n"
    )
    [run] = reader.split_runs(whole.encode(), tmp_path)
    true = {
        key: set(zip(*run.curve(key), strict=True)) for key in ("val_loss", "train_loss", "tokens", "mfu")
    }
    read_losses = 0
    for length in range(len(SOURCE), len(whole)):
        for cut in reader.split_runs(whole.encode()[:length], tmp_path):
            for key, values in true.items():
                found = cut.curve(key)
                known = {(step, value) for step, _, value in values}
                assert set(zip(found[0], found[2], strict=True)) <= known, (length, key, found)
                read_losses += len(found[0])
    assert read_losses > 1000


def test_damaged_logs_never_crash_it(tmp_path):
    rng, whole = (
        random.Random(0),
        (ours(events(0, 20, 20)) + ours(events(0, 5, 9)) + FORMATS["llm.c"][0]).encode(),
    )
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(rng.randrange(1, 30)):
            at = rng.randrange(len(data))
            data[at : at + rng.randrange(3)] = rng.choice(
                [b"\n", b"\0", b":", b"x", b"step:", b"=" * 100, b"\xff", b"9" * 20]
            )
        for run in reader.split_runs(bytes(data), tmp_path):
            for key in ("val_loss", "train_time"):
                assert all(type(number) is float for numbers in run.curve(key)[1:] for number in numbers)
            run.config, run.overrides, run.scalars, run.facts, run.failure(), reader.result(run)


def test_nothing_in_a_log_is_executed(tmp_path):
    trap = tmp_path / "trap"
    code = f"import pathlib\npathlib.Path({str(trap)!r}).touch()\n"
    scalars = f"scalars:x [__import__('pathlib').Path({str(trap)!r}).touch()]\n"
    (tmp_path / "a.txt").write_text(ours(events(0, 2, 2) + scalars, code))
    [run], _ = reader.read_file(tmp_path / "a.txt")
    assert run.config and run.scalars == {} and reader.result(run)[0] and not trap.exists()


# ---- files and the command


def test_folders_pipes_and_large_files(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    (tmp_path / "folder.txt").mkdir()
    (tmp_path / ".running").mkdir()
    for place in ("b.txt", "a.log", "sub/c.out", "README.md", ".running/half.txt", "big.txt"):
        (tmp_path / place).write_text(events(0, 2, 2) * (40 if "big" in place else 1))
    os.mkfifo(tmp_path / "pipe.txt")
    monkeypatch.setattr(reader, "LARGEST", 1000)
    told: list[str] = []
    runs = reader.read_paths([tmp_path], told.append)
    assert [run.name for run in runs] == ["a", "b", "c"]
    reasons = sorted(line.partition(": ")[2] for line in told)
    assert reasons == ["skipped (larger than 0 MiB)", "skipped (not a file)", "skipped (not a file)"]


def test_the_command(tmp_path, capsys):
    (tmp_path / "a.txt").write_text(ours(events(0, 2, 2)))
    (tmp_path / "b.txt").write_text(events(0, 3, 9))
    (tmp_path / "c.txt").write_text("a shopping list\n")
    logs.main([str(tmp_path), "--format", "csv"])
    out, err = capsys.readouterr()
    rows = list(csv.reader(out.splitlines()))
    assert rows[0][:6] == ["run", "preset", "steps", "val_loss", "seconds", "peak MiB"]
    assert rows[1][:6] == [f"{tmp_path / 'a.txt'}", "cpu", "2/2", "8.8000", "0.002", "-"]
    assert rows[2][:6] == [f"{tmp_path / 'b.txt'}", "-", "3/9", "8.7000", "0.003", "-"]
    assert [row[-2] for row in rows[1:]] == ["finished", "running"]  # the file of b has just been written
    assert rows[2][-1] == "stops at step 3 of 9; --step 3 reads it there"
    assert err == f"{tmp_path / 'c.txt'}: skipped (no log: no line has a step and a loss or a time)\n"
    logs.main([str(tmp_path / "b.txt"), "--step", "3"])
    assert capsys.readouterr().out.splitlines()[2].split()[1:5] == ["-", "3/9", "8.7000", "0.003"]
    command = [sys.executable, "-m", "records.logs"]
    assert_user_error(run_command([*command, tmp_path / "nothing"]), "nothing: not there")
    assert_user_error(run_command([*command, tmp_path, "--stpe", "3"]), "--stpe", "--help")
    with pytest.raises(UserError, match="no log among .*c.txt"):
        logs.main([str(tmp_path / "c.txt")])


def test_a_missing_extra_says_how_to_get_it():
    with pytest.raises(
        UserError, match="no_such_package_here is missing.*pip install -r records/requirements.txt"
    ):
        files.extra("no_such_package_here")
