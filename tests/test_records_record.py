"""The rules of a record, each kept and each broken, and the folder that is written."""

import hashlib
import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
from conftest import ROOT, assert_user_error, run_command

from cli import UserError
from records import compare, record, rules
from records.reader import read_file, without_source

SOURCE = '''"""a submission"""
import torch
# ===== 4. Data: shards ======
def loader(): return 1
# ===== 5. Schedule: steps ===
rate = 1
'''
HARDWARE = "AMD EPYC, 2 cores; 1 process(es), 2 thread(s) each"


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def write_run(
    path: Path,
    loss: float,
    ms: int,
    *,
    source: str = SOURCE,
    started: str = "",
    overrides: dict | None = None,
    hardware: str = HARDWARE,
    config: dict | None = None,
    preset: str = "cpu",
    steps: int = 120,
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    overrides = {"seed": ms} if overrides is None else overrides
    config = {"preset": preset, "num_steps": 120, "muon_lr": 0.03} | overrides | (config or {})
    separator = "=" * 100
    path.write_text(
        "\n".join(
            [
                source.rstrip("\n"),
                separator,
                f"source_sha256:{sha256(source)}",
                f"config:{json.dumps(config)}",
                f"preset:{preset} overrides:{json.dumps(overrides)}",
                *([f"started: {started}"] if started else []),
                f"hardware: {hardware}",
                separator,
                "step:0/120 val_loss:8.0 train_time:0ms",
                f"step:{steps}/120 val_loss:{loss} train_time:{ms}ms step_avg:1.00ms",
            ]
        )
        + "\n"
    )


@pytest.fixture
def folder(tmp_path) -> Path:
    """A good record of the cpu track, five runs and five of the baseline in turns."""
    folder = tmp_path / "records" / "cpu" / "2026-03-01_Faster"
    for n in range(5):
        write_run(
            folder / "baseline" / f"{n}.txt",
            4.19 + n / 1000,
            211_000 + n,
            source=SOURCE.replace("rate = 1", "rate = 0"),
            started=f"2026-03-01T0{n}:00:00Z",
        )
        write_run(
            folder / "this" / f"{n}.txt", 4.18 + n / 1000, 209_000 + n, started=f"2026-03-01T0{n}:30:00Z"
        )
    (folder / "train_gpt.py").write_text(SOURCE)
    return folder


def verify(folder: Path, capsys, *more: str) -> tuple[int, str]:
    code = record.main(["verify", str(folder), "--target", "4.2", *more])
    return code, capsys.readouterr().out


def test_a_good_record_counts(folder, capsys):
    code, out = verify(folder, capsys)
    assert code == 0 and out.count("  ok  ") == len(out.splitlines()) == 7
    assert "mean 4.1820 of 5 runs, target 4.2, p = 0.0000" in out
    assert "2.000 s faster (211.002 to 209.002), p = 0.0000 by turns" in out


def test_times_of_runs_in_turns_are_compared_turn_by_turn(folder, capsys):
    """A machine that is slow for a while is so for both; without turns, one sees nothing then."""
    for n, slow in enumerate([1.0, 1.0, 1.4, 1.41, 1.39]):
        for name, seconds in (("baseline", 100 + n / 10), ("this", 90 + n / 7)):
            path = folder / name / f"{n}.txt"
            path.write_text(
                re.sub(r"train_time:2\d+ms", f"train_time:{1000 * slow * seconds:.0f}ms", path.read_text())
            )
    code, out = verify(folder, capsys)
    assert code == 0 and re.search(r"faster \(124.272 to 111.988\), p = 0.0000 by turns", out), out
    this, baseline = record.group("this", folder / "this"), record.group("baseline", folder / "baseline")
    assert len(rules.in_turns(this, baseline)) == 5
    (folder / "baseline" / "4.txt").unlink()
    one_less = record.group("baseline", folder / "baseline")
    assert rules.in_turns(this, one_less) == [] and rules.time_test(this, one_less)[1] == "by Welch's test"
    assert rules.time_test(this, one_less)[0] > 0.2


def rewrite(folder: Path, **changes) -> None:
    write_run(folder / "this" / "2.txt", 4.182, 209_002, started="2026-03-01T02:30:00Z", **changes)


def in_both(folder: Path, old: str, new: str) -> None:
    for path in (folder / "train_gpt.py", *folder.glob("this/*.txt")):
        path.write_text(
            path.read_text().replace(old, new).replace(sha256(SOURCE), sha256(SOURCE.replace(old, new)))
        )


def slower(folder: Path) -> None:
    for n in range(5):
        write_run(
            folder / "this" / f"{n}.txt", 4.18 + n / 1000, 212_000 + n, started=f"2026-03-01T0{n}:30:00Z"
        )


def high_losses(folder: Path) -> None:
    for n in range(5):
        write_run(
            folder / "this" / f"{n}.txt", 4.19 + n / 150, 209_000 + n, started=f"2026-03-01T0{n}:30:00Z"
        )


def one_after_the_other(folder: Path) -> None:
    for n in range(5):
        write_run(
            folder / "this" / f"{n}.txt", 4.18 + n / 1000, 209_000 + n, started=f"2026-03-02T0{n}:30:00Z"
        )


def set_times(folder: Path, name: str, text: str) -> None:
    for path in (folder / name).iterdir():
        path.write_text(re.sub(r"train_time:2\d+ms", f"train_time:{text}", path.read_text()))


BROKEN = {
    "data section": (
        lambda f: in_both(f, "return 1", "return 2"),
        "rule 1  look  section Data differs from the baseline's, 2 lines",
    ),
    "loss": (high_losses, "rule 2  fail  mean 4.2033"),
    "copy": (
        lambda f: shutil.copy(f / "this" / "1.txt", f / "this" / "6.txt"),
        "rule 2  fail  6 has every loss of 1",
    ),
    "one seed twice": (
        lambda f: rewrite(f, overrides={"seed": 209_001}),
        "rule 2  fail  2 has the seed of 1, 209001; each run needs its own",
    ),
    "a baseline of one seed twice": (
        lambda f: write_run(
            f / "baseline" / "2.txt",
            4.192,
            211_002,
            source=SOURCE.replace("rate = 1", "rate = 0"),
            overrides={"seed": 211_001},
            started="2026-03-01T02:00:00Z",
        ),
        "rule 4  fail  baseline's 2 has the seed of 1, 211001",
    ),
    "compiler flag": (
        lambda f: in_both(f, "rate = 1", "torch._inductor.config.coordinate_descent_tuning = True"),
        "rule 3  fail  compiler flags: torch._inductor.config.coordinate_descent_tuning",
    ),
    "no Python": (lambda f: in_both(f, "rate = 1", "rate = = 1"), "rule 3  fail  train_gpt.py is not Python"),
    "slower": (slower, "rule 4  fail  -1.000 s faster"),
    "no time": (
        lambda f: set_times(f, "this", "0ms"),
        "rule 4  fail  mean time 0.000 s: no run takes that",
    ),
    "a baseline of no time": (
        lambda f: set_times(f, "baseline", "-1s"),
        "rule 4  fail  baseline's: mean time",
    ),
    "times beyond all measure": (
        lambda f: set_times(f, "this", "1e308s"),
        "rule 4  fail  5 of 5 runs have no train_time",
    ),
    "other hardware": (
        lambda f: rewrite(f, hardware="AMD EPYC, 4 cores; 1 process(es)"),
        "rule 4  fail  runs on different hardware",
    ),
    "flattered baseline": (
        lambda f: write_run(
            f / "baseline" / "2.txt",
            4.192,
            211_002,
            overrides={"muon_lr": 0.05},
            started="2026-03-01T02:00:00Z",
        ),
        "rule 4  fail  baseline's 2: preset cpu, overrides muon_lr",
    ),
    "not interleaved": (
        one_after_the_other,
        "rule 4  fail  not interleaved by started: lines: 5 runs of one kind in a row",
    ),
    "override": (lambda f: rewrite(f, overrides={"muon_lr": 0.05}), "rule 5  fail  2: overrides muon_lr"),
    "hidden override": (
        lambda f: rewrite(f, config={"muon_lr": 0.05}),
        "rule 5  fail  2: its configuration differs from 0's in muon_lr",
    ),
    "contradiction": (
        lambda f: rewrite(f, config={"seed": 1}),
        "rule 5  fail  2: its configuration contradicts its overrides",
    ),
    "other source": (
        lambda f: rewrite(f, source=SOURCE + "x = 1\n"),
        "rule 5  fail  2: its source is not the submitted train_gpt.py",
    ),
    "other preset": (lambda f: rewrite(f, preset="short"), "rule 5  fail  2: preset short, the track is cpu"),
    "seed of the search": (
        lambda f: rewrite(f, overrides={"seed": 0}),
        "rule 5  fail  2: seed 0 is for choosing settings",
    ),
    "no header": (
        lambda f: (f / "this" / "2.txt").write_text("step:1/1 val_loss:4.182 train_time:209002ms\n"),
        "rule 5  fail  2: no source",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_each_rule_broken(name, folder, capsys):
    spoil, words = BROKEN[name]
    spoil(folder)
    code, out = verify(folder, capsys)
    assert code == 1 and words in out and out.splitlines()[-1].startswith("does not count")


def test_wrong_hash_of_the_source(folder, capsys):
    path = folder / "this" / "2.txt"
    path.write_text(path.read_text().replace("source_sha256:", "source_sha256:0"))
    assert "rule 5  fail  2: source_sha256 does not fit" in verify(folder, capsys)[1]


def test_tracks_have_their_hardware(folder, capsys):
    for path in folder.glob("*/*.txt"):
        path.write_text(path.read_text().replace("2 cores", "64 cores"))
    assert "rule 4  fail  the cpu track runs on two CPU cores" in verify(folder, capsys)[1]


def test_a_change_of_speed_alone_needs_no_p(folder, capsys):
    for n in range(5):
        write_run(folder / "this" / f"{n}.txt", 4.15 + n / 50, 209_000 + n, started=f"2026-03-01T0{n}:30:00Z")
    assert "rule 2  fail  mean 4.1900" in verify(folder, capsys)[1]
    code, out = verify(folder, capsys, "--speed_only")
    assert code == 0 and "waived: a change of speed alone" in out
    high_losses(folder)
    assert verify(folder, capsys, "--speed_only")[0] == 1  # the mean must reach the target all the same


def test_a_person_can_judge_what_a_program_cannot(folder, capsys):
    in_both(folder, "return 1", "return 2")
    assert verify(folder, capsys)[1].splitlines()[-1] == "does not count until a person has looked"
    code, out = verify(folder, capsys, "--reviewed", "1", "--by", "A. Person: only faster")
    assert code == 0 and "rule 1  ok" in out and "(reviewed)" in out
    with pytest.raises(UserError, match="--by"):
        verify(folder, capsys, "--reviewed", "1")


def test_order_by_files_times_where_logs_do_not_say(folder, capsys):
    for kind, shift in (("this", 0), ("baseline", 1)):
        for n, path in enumerate(sorted(folder.glob(f"{kind}/*.txt"))):
            path.write_text(re.sub("started: .*\n", "", path.read_text()))
            os.utime(path, (1e9 + 10 * n + shift, 1e9 + 10 * n + shift))
    assert (
        "rule 4  ok    interleaved with the baseline's runs, by the files' times" in verify(folder, capsys)[1]
    )
    for path in folder.glob("this/*.txt"):
        os.utime(path, (2e9, 2e9))
    assert "rule 4  look  not interleaved by the files' times" in verify(folder, capsys)[1]


def test_a_later_record_needs_the_runs_of_the_one_before(folder, capsys):
    later = folder.with_name("2026-04-01_Later")
    shutil.copytree(folder, later)
    assert (
        "rule 4  look  the baseline's runs are not of 2026-03-01_Faster/train_gpt.py"
        in verify(later, capsys)[1]
    )
    shutil.rmtree(later / "baseline")
    assert "rule 4  fail  no runs of the record before it, 2026-03-01_Faster" in verify(later, capsys)[1]
    first = folder.with_name("2026-02-01_First")
    later.rename(first)
    assert "rule 4  ok    first of its track" in verify(first, capsys)[1]


def test_a_track_begins_with_the_runs_of_its_yardstick(folder, capsys):
    """Two runs of cpu-adamw: the target is what they reached, so no p is asked, and the next baseline."""
    first = folder.with_name("2026-02-01_First")
    for n in range(2):
        for place in (first / "this", folder / "baseline"):
            write_run(
                place / f"{n}.txt",
                4.19 + n / 100,
                2_700_000 + n,
                preset="cpu-adamw",
                started=f"2026-03-01T0{2 * n}:00:00Z",
            )
    for n in range(2, 5):
        (folder / "baseline" / f"{n}.txt").unlink()
    shutil.copy2(folder / "train_gpt.py", first)
    seen = ["--reviewed", "1,4", "--by", "A: looked"]
    code, out = verify(first, capsys, *seen)
    assert code == 0 and "p = 0.2500, waived: the target is theirs" in out, out
    code, out = verify(folder, capsys, *seen)
    assert code == 0 and "rule 4  ok    2490.999 s faster" in out, out
    later = folder.with_name("2026-04-01_Later")  # but no later record is of it, nor measured by it
    shutil.copytree(folder, later)
    assert verify(later, capsys)[1].count("preset cpu-adamw, overrides none") == 2
    shutil.copytree(first / "this", later / "this", dirs_exist_ok=True)
    assert "preset cpu-adamw, the track is cpu" in verify(later, capsys)[1]


def test_the_tenth_record_of_a_day_comes_after_its_ninth(tmp_path):
    names = [
        "2026-02-01_Late",
        "2026-11-27_1-A",
        "2026-11-27_2-B",
        "2026-11-27_10-C",
        "2026-11-27_Named",
        "2026-12-01_1-D",
    ]
    for name in reversed(names):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train_gpt.py").touch()
    assert [folder.name for folder in record.records_in(tmp_path)] == names


@pytest.mark.parametrize(
    "folder", record.records_in(ROOT / "records" / "cpu"), ids=lambda folder: folder.name
)
def test_the_records_that_are_here_count(folder, capsys):
    reviewed = re.findall(r"^\| (\d) \| ok \| .*\(reviewed\) \|$", (folder / "README.md").read_text(), re.M)
    words = ["--reviewed", ",".join(reviewed), "--by", "whom the README names"] if reviewed else []
    assert record.main(["verify", str(folder), *words]) == 0, capsys.readouterr().out


def test_the_history_of_a_track(folder, capsys, tmp_path):
    """Oldest first; a time stands beside that of the record before it as it ran between these runs."""
    first = folder.with_name("2026-02-01_First")
    for n in range(2):
        write_run(first / "this" / f"{n}.txt", 4.19 + n / 100, 2_090_010 + n)
    shutil.copy2(folder / "train_gpt.py", first)
    shutil.copytree(folder, folder.with_name(".2026-01-01_Half.part"))  # of a package that was killed
    ask = ["history", "--track", "cpu", "--records", str(tmp_path / "records"), "--target", "4.2"]
    assert record.main([*ask, "--format", "csv", "--out", str(tmp_path / "h.png")]) == 0
    head, *rows, written = capsys.readouterr().out.splitlines()
    assert head == "date,record,runs,loss μ,loss σ,p under 4.2,time μ,time σ,x before,p,x first"
    assert rows == [
        "2026-02-01,First,2,4.1950,0.0071,0.2500,2090.0,0.0,-,-,1.0",
        "2026-03-01,Faster,5,4.1820,0.0016,0.0000,209.0,0.0,1.01,0.0000,1.0",
    ]
    assert written == f"written: {tmp_path / 'h.png'}" and (tmp_path / "h.png").read_bytes()[:4] == b"\x89PNG"
    set_times(folder, "this", "0ms")
    assert record.main([*ask, "--format", "csv", "--out", str(tmp_path / "h.png")]) == 0
    assert ",0.0,0.0,-," in capsys.readouterr().out
    for wrong, word in (
        (["history"], "--track"),
        ([*ask[:-4], "--records", str(tmp_path / "x")], "no record"),
        ([*ask, "--out", str(tmp_path / "h.doc")], "h.doc"),
    ):
        assert_user_error(run_command([sys.executable, "-m", "records.record", *wrong]), word)


def card_record(records: Path, name: str, card: str, seconds: int, before: int = 0) -> Path:
    """A record of the track one-gpu: five runs, between them five of `before` seconds, if given."""
    folder = records / "one-gpu" / name
    line = f"NVIDIA {card}; 1 process(es), 8 thread(s) each"
    for n in range(5):
        same = dict(hardware=line, preset="one-gpu", overrides={"seed": n, "join": 1 + n % 2})
        ms, hour = 1000 * seconds + n, f"2026-03-01T0{n}"
        write_run(folder / "this" / f"{n}.txt", 3.27 + n / 1000, ms, started=f"{hour}:30:00Z", **same)
        if before:
            ms, path = 1000 * before + n, folder / "baseline" / f"{n}.txt"
            write_run(path, 3.27 + n / 999, ms, started=f"{hour}:00:00Z", **same)
    (folder / "train_gpt.py").write_text(SOURCE)
    return folder


def test_on_one_gpu_each_kind_of_card_has_its_history(tmp_path, capsys):
    """The first record of a card needs no baseline, however many other cards have; the next one does."""
    records = tmp_path / "records"
    card_record(records, "2026-03-01_First", "H100", 700)
    small = card_record(records, "2026-03-02_Small", "RTX 4090", 3000)
    faster = card_record(records, "2026-03-03_Faster", "H100", 600, before=720)
    alone = card_record(records, "2026-03-04_Alone", "H100", 500)
    looked = ["--reviewed", "1", "--by", "me: the same stream"]  # of a source that is not this repository's
    for folder, code in ((small, 0), (faster, 0), (alone, 1)):
        assert record.main(["verify", str(folder), *looked]) == code, capsys.readouterr().out
    assert "no runs of the record before it, 2026-03-03_Faster" in capsys.readouterr().out
    ask = ["history", "--track", "one-gpu", "--records", str(records), "--format", "csv"]
    assert record.main([*ask, "--out", str(tmp_path / "h.png")]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.startswith("card,date,record,runs,")
    found = [(row.split(",")[0], row.split(",")[2], row.split(",")[-1]) for row in rows[:4]]
    assert found == [
        ("NVIDIA H100", "First", "1.0"),
        ("NVIDIA H100", "Faster", "1.2"),
        ("NVIDIA H100", "Alone", "-"),
        ("NVIDIA RTX 4090", "Small", "1.0"),
    ]


def test_a_cpu_is_no_card(folder, capsys):
    moved = folder.parent.parent / "one-gpu" / folder.name
    shutil.copytree(folder, moved)
    code, out = verify(moved, capsys)
    assert code == 1 and "the one-gpu track runs on one GPU of any kind, this ran on AMD EPYC" in out


@pytest.mark.parametrize(
    "source, flags",
    [
        ("torch.compile(f, dynamic=False, fullgraph=True)", []),
        ("torch._dynamo.config.recompile_limit = 64", []),
        ("import torch._dynamo\n'inductor'", []),
        ("torch.compile(f, mode='max-autotune')", ["torch.compile(mode=..)"]),
        ("partial(torch.compile, options={})", ["torch.compile(options=..)"]),
        ("torch.compile(f, **more)", ["torch.compile(None=..)"]),
        ("from torch._inductor import config", ["torch._inductor.config"]),
        ("import torch._dynamo as d", ["torch._dynamo"]),
        ("setattr(torch._inductor.config, 'x', 1)", ["torch._inductor.config"]),
        ("os.environ['TORCHINDUCTOR_MAX_AUTOTUNE'] = '1'", ["TORCHINDUCTOR_MAX_AUTOTUNE"]),
        ("with torch._functorch.config.patch(x=1): pass", ["torch._functorch.config.patch"]),
    ],
)
def test_compiler_flags(source, flags):
    assert rules.compiler_flags(source) == flags


def test_this_repositorys_own_source_keeps_the_rules():
    source = (ROOT / "train_gpt.py").read_text()
    assert (
        rules.compiler_flags(source) == []
        and "class Loader" in rules.data_section(source) < "class Schedule" * 99
    )


# ---- packaging


def package(folder: Path, *more: str) -> list[str]:
    return [
        "package",
        "--track",
        "cpu",
        "--name",
        "Next",
        "--date",
        "2026-05-01",
        "--target",
        "4.2",
        "--this",
        str(folder / "this"),
        "--baseline",
        str(folder / "baseline"),
        "--file",
        str(folder / "train_gpt.py"),
        "--records",
        str(folder.parents[1] / "new"),
        *more,
    ]


def test_a_log_without_its_source_has_the_one_that_it_names_and_no_other(folder, capsys):
    assert record.main(package(folder)) == 0
    made = folder.parents[1] / "new" / "cpu" / "2026-05-01_Next"
    log = made / "this" / "2.txt"
    assert read_file(log)[0][0].source == SOURCE.rstrip("\n")
    other = made.with_name("2026-06-01_Other")
    made.joinpath("train_gpt.py").rename(made / "moved.py")
    assert read_file(log)[0][0].source is None
    shutil.copytree(made, other)
    (other / "moved.py").rename(other / "train_gpt.py")
    (made / "train_gpt.py").write_text(SOURCE.replace("rate = 1", "rate = 3"))
    assert read_file(log)[0][0].source == SOURCE.rstrip("\n"), "another record of the track has it"
    assert record.main(["verify", str(made), "--target", "4.2"]) == 1
    assert "its source is not the submitted train_gpt.py" in capsys.readouterr().out
    shutil.rmtree(other)
    assert read_file(log)[0][0].source is None
    assert record.main(["verify", str(made), "--target", "4.2"]) == 1
    assert "no source" in capsys.readouterr().out


def test_only_a_source_whose_hash_the_header_names_is_left_out(folder):
    whole = (folder / "this" / "0.txt").read_bytes()
    rest = without_source(whole)
    assert whole == SOURCE.encode() + rest and rest.startswith(b"=" * 100)
    assert without_source(whole, {sha256(SOURCE)}) == rest and without_source(whole, set()) == whole
    for other in (
        whole.replace(b"rate = 1", b"rate = 2"),
        whole.replace(b"\n", b"\r\n"),
        rest,
        whole + whole,
        SOURCE.encode(),
        b"",
    ):
        assert without_source(other) == other


def test_a_package_is_a_record(folder, capsys, tmp_path):
    (tmp_path / "why.md").write_text("Because it is faster.")
    assert record.main(package(folder, "--text", str(tmp_path / "why.md"))) == 0
    made = folder.parents[1] / "new" / "cpu" / "2026-05-01_Next"
    assert sorted(p.name for p in made.iterdir()) == ["README.md", "baseline", "this", "train_gpt.py"]
    # The baseline's source is not in the track: it stays in the logs. Theirs is, so theirs name it alone.
    for old in sorted(folder.glob("*/*.txt")):
        new = made / old.relative_to(folder)
        whole = old.read_text()
        kept = whole if old.parent.name == "baseline" else whole.removeprefix(SOURCE)
        assert new.read_text() == kept and new.stat().st_mtime_ns == old.stat().st_mtime_ns
        assert [run.source for run in read_file(new)[0]] == [run.source for run in read_file(old)[0]]
    assert (made / "train_gpt.py").read_text() == SOURCE
    text = (made / "README.md").read_text()
    for words in (
        "# Next",
        "Because it is faster.",
        "| this | 5 | 120 | 209.002 | 0.002 | -2.000 | 0.0000 | 4.1820 |",
        "  losses = [4.18, 4.181, 4.182, 4.183, 4.184]",
        "records.record verify records/cpu/2026-05-01_Next",
        "| 5 | ok |",
    ):
        assert words in text, words
    assert verify(made, capsys)[0] == 0
    with pytest.raises(UserError, match="2026-05-01_Next: is there already"):
        record.main(package(folder))


def test_a_page_has_its_numbers_in_the_order_of_the_command_that_it_names(folder, capsys):
    """By seed, also where the logs had other names before they became the record's."""
    for n, path in enumerate(sorted(folder.glob("this/*.txt"))):
        (folder / "this" / str(10 - n)).mkdir()
        path.rename(folder / "this" / str(10 - n) / "seed.txt")
    assert record.main(package(folder)) == 0
    made = folder.parents[1] / "new" / "cpu" / "2026-05-01_Next"
    text = (made / "README.md").read_text()
    assert "losses = [4.18, 4.181, 4.182, 4.183, 4.184]" in text
    capsys.readouterr()
    compare.main(["groups", str(made / "baseline"), str(made / "this"), "--numbers"])
    assert capsys.readouterr().out.partition("\n\nbaseline:")[2].strip() in text


def test_what_does_not_count_is_not_written(folder, capsys):
    slower(folder)
    assert record.main(package(folder)) == 1 and "rule 4  fail" in capsys.readouterr().out
    assert not (folder.parents[1] / "new").exists()


def test_what_a_user_gets_wrong(folder, tmp_path):
    for argv, words in (
        (["verify"], "give the record's folder"),
        (["verify", str(tmp_path)], "its parent is no track"),
        (package(folder, "--name", "../x"), "letters, digits"),
        (package(folder, "--date", "2026-13-45"), "--date: '2026-13-45': give a day"),
        (package(folder, "--date", "2026-02-30"), "give a day of the calendar"),
        (package(folder, "--date", "20260201"), "give a day of the calendar"),
        (package(folder, "--this", str(tmp_path / "no")), "not there"),
        (package(folder, "--file", str(tmp_path / "no")), "cannot be read"),
        (package(folder)[:3], "give --track, --name"),
    ):
        with pytest.raises(UserError, match=words):
            record.main(argv)
    write_run(folder / "this" / "2.txt", 4.1, 3, steps=60)
    assert_user_error(
        run_command([sys.executable, "-m", "records.record", "verify", folder]),
        "2: stops at step 60 of 120",
    )
