"""What a user types or feeds to records/: one case of each kind, on each command where it can occur."""

import json
import math
import os
import re
import subprocess
import sys

import pytest
from conftest import CLEAN_ENV, ROOT, assert_user_error, run_command
from test_records_record import folder as record_folder  # noqa: F401, a fixture
from test_records_record import package, write_run

from cli import UserError
from records import (
    ablate,
    compare,
    embeddings,
    export,
    files,
    groups,
    logs,
    plot,
    reader,
    record,
    report,
    rules,
    worth,
)

RUN = (
    "".join(f"step:{step}/4 train_time:{step}s train_loss:{5 - step / 2:.3f}\n" for step in range(5))
    + "step:4/4 val_loss:3.21050 train_time:4s\n"
)


@pytest.fixture
def log(tmp_path):
    path = tmp_path / "run.txt"
    path.write_text(RUN)
    return path


def command(module: str, *argv: object) -> list:
    return [sys.executable, "-m", f"records.{module}", *argv]


# ---- values that no run can mean, flags that have no meaning


@pytest.mark.parametrize(
    "main, argv, words",
    [
        (compare.main, ["groups", "{log}", "--target", "nan"], "--target: 'nan'"),
        (compare.main, ["groups", "{log}", "--target", "1e999"], "--target"),
        (compare.main, ["groups", "{log}", "--digits", "99"], "--digits"),
        (compare.main, ["steps", "{log}", "--step", "3"], "steps: --step has no meaning here"),
        (compare.main, ["pairs", "{log}", "{log}", "--target", "3"], "pairs: --target has no meaning here"),
        (compare.main, ["groups", ""], "an empty name"),
        (compare.main, ["groups"], "give groups"),
        (compare.main, ["power", "--effect", "0", "--sd", "1"], "--effect"),
        (compare.main, ["power", "--effect", "0.1"], "either --sd or one GROUP"),
        (logs.main, [""], "names no file or folder"),
        (logs.main, ["{log}", "--step", "-3"], "--step"),
        (logs.main, ["{log}", "--where", "loss<abc"], "compared with a number"),
        (logs.main, ["{log}", "--where", "size<3"], "COLUMN"),
        (logs.main, ["diff", "{log}"], "two logs"),
        (plot.main, ["loss", "{log}", "--out", ""], "--out: '' names no file or folder"),
        (plot.main, ["loss", "{log}", "--out", "x.png", "--from", "nan"], "--from: 'nan'"),
        (plot.main, ["scalars", "{log}", "--out", "x.png", "--keys", "a,,b"], "--keys"),
        (record.main, ["verify", "x", "--reviewed", "99", "--by", "me"], "--reviewed: '99'"),
        (record.main, ["verify", ""], "names no file or folder"),
        (record.main, ["history", "--track", "cpu", "--target", "nan"], "--target"),
        (ablate.main, ["001-H0", "--out", "x", "--launch", ""], "--launch: empty"),
        (ablate.main, ["001-H0", "--out", "x", "--launch", "'"], "--launch"),
        (ablate.main, ["001-H0", "--out", ""], "--out: '' names no file or folder"),
        (embeddings.main, ["x.pt", "--top", "0"], "--top"),
        (report.main, ["{log}", "--out", ""], "--out: '' names no file or folder"),
    ],
)
def test_values_that_no_run_can_mean(main, argv, words, log, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=words):
        main([word.format(log=log) for word in argv])
    assert [path.name for path in tmp_path.iterdir()] == ["run.txt"]


@pytest.mark.parametrize(
    "lines, words",
    [
        ("loss_summary = [-3, 3.2, 0.1]", "n is -3"),
        ("loss_summary = [2.5, 3.2, 0.1]", "n is 2.5"),
        ("loss_summary = [3, nan, 0.1]", "mean nan"),
        ("loss_summary = [3, 3.2, -0.1]", "deviation -0.1"),
        ("losses = [3.2, nan]", "not finite"),
        (f"losses = [{'9' * 400}, 3]", "not finite"),
        ("losses = [3.2, x]", "no list of numbers"),
        ("losses = [1e308, -1e308, 3]", "1e.308 is no number of a run"),
        ("losses = [3, 4]\n  times = [1.1e15, 3]", "time: 1.1e.15 is no number of a run"),
        ("loss_summary = [3, 1e308, 1e300]", "mean 1e.308"),
        ("loss_summary = [3, 3.2, 1e300]", "deviation 1e.300"),
        ("losses = " + "[" * 1000 + "3" + "]" * 1000, "neither a log nor a file of numbers"),
    ],
)
def test_numbers_of_a_file_that_are_none(lines, words, tmp_path):
    (tmp_path / "n.txt").write_text(f"A:\n  {lines}\n")
    with pytest.raises(UserError, match=words):
        compare.main(["groups", str(tmp_path / "n.txt")])


def test_numbers_of_logs_that_no_run_can_have_are_missing(tmp_path, capsys):
    for n, (loss, seconds) in enumerate(
        (("1e308", "4s"), ("-1e16", "4s"), ("3.1", "1e308s"), ("3.2", "infs"))
    ):
        text = RUN.replace("3.21050 train_time:4s", f"{loss} train_time:{seconds}")
        (tmp_path / f"{n}.txt").write_text(text + f"scalars:resid_scale [1e308, {n}]\n")
    runs = reader.read_paths([tmp_path])
    assert [len(run.points("val_loss")) for run in runs] == [0, 0, 1, 1]
    assert all(run.scalars == {} for run in runs)
    group = groups.group_of("a", runs)
    assert (group.losses.values, group.times.n, len(group.left_out)) == ((3.1, 3.2), 0, 2)
    logs.main([str(tmp_path)])
    for argv in (["groups"], ["side", "--loss", "train_loss"], ["crossing", "--level", "4"]):
        compare.main([argv[0], *(str(run.path) for run in runs[2:]), *argv[1:]])
    plot.main(
        ["loss", str(tmp_path), "--loss", "train_loss", "--x", "time", "--out", str(tmp_path / "x.png")]
    )
    assert reader.to_number("1e15") == 1e15 and reader.to_number("1e400") is None
    assert reader.to_number("-inf") == -math.inf and reader.to_number("9e14min") is None


def test_worth_of_runs_without_steps(tmp_path):
    text = "losses = [3, 3.1, 3.3]\n  seeds = [1, 2, 3]\n  steps = "
    for base, length in ((0, 9), (9, 0)):
        (tmp_path / "n.txt").write_text(
            f"base:\n  {text}{base}\nlong:\n  {text}{length}\nother:\n  {text}{base}\n"
        )
        with pytest.raises(UserError, match="has 0 steps"):
            worth.main([str(tmp_path / "n.txt"), "--lengths", "long"])


def test_a_file_of_many_open_lists_is_read_quickly(tmp_path):
    assert groups.read_numbers("losses = [1,\n" * 70_000, tmp_path) == []
    with pytest.raises(UserError, match="more than 500 groups"):
        groups.read_numbers("losses = [1]\n" * 70_000, tmp_path)


def test_flags_may_stand_before_between_and_after(log, capsys):
    for argv in (
        ["--target", "4", "groups", log],
        ["groups", "--target", "4", log],
        ["groups", log, "--target", "4"],
    ):
        compare.main([str(word) for word in argv])
    shown = capsys.readouterr().out
    assert shown.count("3.2105") == 3
    logs.main(["--sort", "loss", str(log)])
    with pytest.raises(UserError, match="its parent is no track"):
        record.main(["--reviewed", "1", "--by", "me", "verify", str(log.parent)])


# ---- what the operating system answers

MODULES = {
    "logs": ["{}"],
    "compare": ["groups", "{}"],
    "plot": ["loss", "{}", "--out", "x.png"],
    "report": ["{}", "--out", "x.html"],
    "record": ["verify", "{}"],
    "embeddings": ["{}"],
}
MAINS = dict(logs=logs, compare=compare, plot=plot, report=report, record=record, embeddings=embeddings)


@pytest.mark.parametrize("module", MODULES)
def test_paths_that_cannot_be_read(module, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe.txt")
    os.symlink("b", "a")
    os.symlink("a", "b")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bytes.txt").write_bytes(bytes(range(256)) * 20)
    before = sorted(path.name for path in tmp_path.iterdir())
    for path in ("x" * 5000, "no/such", "pipe.txt", "a", "empty", "bytes.txt", "bytes.txt/x"):
        with pytest.raises(UserError) as error:
            MAINS[module].main([word.format(path) for word in MODULES[module]])
        assert path[:100] in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_links_to_folders_are_not_followed(log, tmp_path, capsys):
    (tmp_path / "sub").mkdir()
    os.symlink(tmp_path, tmp_path / "sub" / "up")
    assert [run.name for run in reader.read_paths([tmp_path], files.warn)] == ["run"]
    assert "a link to a folder" in capsys.readouterr().err


def test_notes_are_a_part_of_the_line_that_refuses(tmp_path):
    write(tmp_path / "a" / "0.txt", ["3.1"], step=0)
    (tmp_path / "a" / "1.txt").write_text("")
    words = [sys.executable, "-m", "records.compare", "power", tmp_path / "a", "--effect", "0.1"]
    assert_user_error(run_command(words), "its losses have no deviation", "1.txt: skipped (empty)")


@pytest.mark.parametrize("module", ["compare", "plot", "logs"])
def test_a_loss_whose_name_is_no_text(module, log):
    words = [word.format(log) for word in MODULES[module]] + ["--loss", "\udcff"]
    with pytest.raises(UserError, match="is not UTF-8 text"):
        MAINS[module].main(words)


@pytest.mark.parametrize("name", ["x.png", "x.svg", "x.pdf"])
def test_a_picture_replaces_only_a_picture_of_ours_and_is_whole_or_not_there(
    name, log, tmp_path, monkeypatch
):
    out, argv = tmp_path / name, ["loss", str(log), "--loss", "train_loss", "--out", str(tmp_path / name)]
    plot.main(argv)
    plot.main(argv)
    out.write_bytes(b"mine")
    with pytest.raises(UserError, match="none of these tools made it"):
        plot.main(argv)
    assert out.read_bytes() == b"mine"
    out.unlink()
    out.mkdir()
    with pytest.raises(UserError, match="there is a folder of that name"):
        plot.main(argv)
    out.rmdir()

    def full(path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="No space left on device"):
        files.write_whole(out, full)
    assert [path.name for path in tmp_path.iterdir()] == ["run.txt"]


def test_exports_replace_nothing(log, tmp_path):
    (tmp_path / "x.csv").write_text("mine")
    with pytest.raises(UserError, match="is there already"):
        logs.main(["export", str(log), "--out", str(tmp_path / "x.csv")])
    assert (tmp_path / "x.csv").read_text() == "mine"


def test_closed_and_full_standard_output(log):
    lines = f"{sys.executable} -m records.logs {log}"
    for shell, code in ((f"{lines} >&-", 0), (f"{lines} > /dev/full", 2)):
        done = subprocess.run(shell, shell=True, cwd=ROOT, env=CLEAN_ENV, capture_output=True, text=True)
        assert (done.returncode, "Traceback" in done.stderr, "bug" in done.stderr) == (code, False, False), (
            done
        )
    process = subprocess.Popen(command("logs", "--help"), cwd=ROOT, env=CLEAN_ENV, stdout=subprocess.PIPE)
    process.stdout.close()
    assert process.wait() in (0, 141)


def test_the_same_without_asserts_and_docstrings(log):
    for option in ("-O", "-OO"):
        words = [sys.executable, option, "-m", "records.compare", "groups", log]
        assert_user_error(run_command([*words, "--target", "nan"]), "--target")
        assert "3.2105" in run_command(words).stdout
    assert "--target" in run_command([sys.executable, "-OO", "-m", "records.compare", "--help"]).stdout


# ---- what text can hold


def test_names_are_made_harmless(tmp_path, capsys):
    name = "\x1b]0;title\x07\x1b[31m|<b>`x`[y](http://z)"
    (tmp_path / f"{name.replace('/', '_')}.txt").write_text(RUN)
    (tmp_path / os.fsdecode(b"bad\xff.txt")).write_text(RUN.replace("3.21050", "3.3"))
    for form in ("text", "markdown", "csv"):
        logs.main([str(tmp_path), "--format", form])
        compare.main(["groups", f"{name}={tmp_path}", "--format", form])
    shown = capsys.readouterr()
    assert "\x1b" not in shown.out + shown.err and "\x07" not in shown.out + shown.err
    assert "\\|&lt;b>\\`x\\`\\[y\\](" in shown.out


def test_names_in_files_of_numbers_and_heads_are_made_harmless(tmp_path, capsys):
    path, bad = tmp_path / "n.txt", "\x1b[31mred\x07"
    numbers = "\n  losses = [{}, 3.1, 3.3]\n  seeds = [1, 2, 3]\n  steps = {}\n"
    path.write_text("".join(bad + f"{n}:" + numbers.format(4 - n, 90 + n) for n in range(4)))
    log = tmp_path / f"{bad}|.txt"
    log.write_text(RUN)
    (tmp_path / f"stopped{bad}.txt").write_text(RUN.replace("/4", "/5") + "failed: \x1b[31m\n")
    compare.main(["pairs", str(path), "--numbers"])
    worth.main([str(path), "--lengths", " [31mred 1", "--numbers"])
    compare.main(["side", str(log), str(log), "--format", "markdown"])
    logs.main(["diff", str(log), str(log)])
    compare.main(["groups", str(tmp_path), str(log)])
    shown = capsys.readouterr()
    assert "\x1b" not in shown.out + shown.err and "\x07" not in shown.out + shown.err
    assert " \\[31mred \\|.txt: loss |" in shown.out and " [31mred 0 at 90 steps" in shown.out
    groups_of = [groups.group_of("x", reader.read_paths([tmp_path]), tell=lambda _: None)]
    assert groups_of[0].left_out and "\x1b" not in "".join(groups_of[0].left_out)


def test_a_header_that_means_harm(tmp_path, capsys):
    deep = "[" * 1000 + "]" * 1000
    head = f'import x\n{"=" * 100}\nconfig:{{"seed": [1], "deep": {deep}, "huge": {"9" * 400}}}\n'
    head += f'hardware: \x1b[31m{"h" * 5000}\npreset:cpu overrides:{{"seed": {{}}}}\n{"=" * 100}\n'
    (tmp_path / "a.txt").write_text(head + f"scalars:x [{'9' * 400}, 1]\n" + RUN)
    (tmp_path / "b.txt").write_text(head.replace(deep, "3") + RUN + f"scalars:x [{'9' * 400}, 1]\n")
    runs = reader.read_paths([tmp_path])
    assert [run.seed for run in runs] == [None, None] and [run.scalars for run in runs] == [{}, {}]
    assert export.run_rows(runs)[1]["config.huge"] == int("9" * 400)
    logs.main(["diff", str(tmp_path / "a.txt"), str(tmp_path / "b.txt")])
    logs.main([str(tmp_path)])
    assert "\x1b" not in capsys.readouterr().out


def test_sources_nested_too_deep_are_no_python():
    source = "x = " + "(" * 500 + "1" + ")" * 500
    submission = rules.Submission("cpu", source, None, None, [], 1.0)
    assert rules.rule_compiler(submission)[0].state == "fail"
    attributes = "x" + ".y" * 900
    assert rules.compiler_flags(attributes) == []


# ---- wrong numbers without a word


def write(path, losses: list[str], head: str = "", step: int = 9) -> None:
    path.parent.mkdir(exist_ok=True)
    lines = [f"step:{n}/{step} val_loss:{loss} train_time:{n}s" for n, loss in enumerate(losses)]
    path.write_text(head + "\n".join(lines) + "\n")


def test_copies_do_not_count_as_runs(tmp_path, capsys):
    for n in range(3):
        write(tmp_path / "a" / f"{n}.txt", [f"{9 - i + n / 100:.4f}" for i in range(10)])
    for n in range(3, 9):
        (tmp_path / "a" / f"{n}.txt").write_text((tmp_path / "a" / "0.txt").read_text())
    compare.main(["groups", str(tmp_path / "a"), "--target", "3.28", "--format", "csv"])
    shown = capsys.readouterr()
    assert shown.out.splitlines()[1].split(",")[1] == "3 of 9"
    assert "3 left out, it has every loss of 0: a copy" in shown.err


def test_a_run_that_ends_with_nan_is_said_and_no_p_comes_of_it(tmp_path, capsys):
    for n, loss in enumerate(["3.2", "3.1", "nan"]):
        write(tmp_path / "a" / f"{n}.txt", [loss], f'config:{{"seed": {n}}}\n', step=0)
    compare.main(["groups", str(tmp_path / "a"), "--target", "3.28", "--format", "csv"])
    shown = capsys.readouterr()
    assert (
        shown.out.splitlines()[1].startswith("a,2 of 3,0,")
        and "2 left out, it ends with a val_loss of nan" in shown.err
    )


def test_a_group_that_has_nothing_does_not_end_the_others(tmp_path, capsys):
    write(tmp_path / "a" / "0.txt", ["3.2"], step=0)
    write(tmp_path / "b" / "0.txt", ["3.2"], "", step=5)
    compare.main(["groups", str(tmp_path / "a"), str(tmp_path / "b"), "--format", "csv"])
    shown = capsys.readouterr()
    assert shown.out.splitlines()[2].startswith("b,0 of 1,-,") and "stops at step 0 of 5" in shown.err


def test_mixed_steps_hardware_and_sources_are_said(tmp_path, capsys):
    line = "=" * 100
    for n, steps in enumerate((9, 8)):
        losses = [f"{9 - i + n / 100:.4f}" for i in range(steps + 1)]
        head = f"import a{n}\n{line}\nhardware: machine {n}\n{line}\n"
        write(tmp_path / "a" / f"{n}.txt", losses, head, step=steps)
    compare.main(["groups", str(tmp_path / "a")])
    notes = capsys.readouterr().err
    for words in (
        "2 different steps, 8..9",
        "of 2 different sources",
        "different hardware",
        "machine 0 | machine 1",
    ):
        assert words in notes


def test_crossing_by_most_runs_first(tmp_path, capsys):
    for n in range(4):
        write(tmp_path / "all" / f"{n}.txt", ["9", "8", "7", f"2.{n}"], step=3)
        write(tmp_path / "one" / f"{n}.txt", ["9", "1.0" if n == 0 else f"8.{n}"], step=1)
    compare.main(
        ["crossing", str(tmp_path / "one"), str(tmp_path / "all"), "--level", "3", "--format", "csv"]
    )
    rows = [line.split(",")[1:3] for line in capsys.readouterr().out.splitlines()[1:]]
    assert rows == [["all", "4 of 4"], ["one", "1 of 4"]]


# ---- records


def test_a_package_keeps_every_log_also_of_one_name(record_folder, tmp_path):  # noqa: F811, the fixture
    for kind in ("this", "baseline"):
        for n in range(5):
            path = record_folder / kind / f"{n}.txt"
            (record_folder / kind / str(n)).mkdir()
            path.rename(record_folder / kind / str(n) / "seed.txt")
    assert record.main(package(record_folder)) == 0
    made = record_folder.parents[1] / "new" / "cpu" / "2026-05-01_Next"
    for kind in ("this", "baseline"):
        kept = sorted(path.read_bytes() for path in (made / kind).iterdir())
        given = [path.read_bytes() for path in (record_folder / kind).rglob("*.txt")]
        if kind == "this":  # the record has their source
            given = list(map(reader.without_source, given))
        assert kept == sorted(given) and len(kept) == 5


def test_a_package_that_fails_leaves_nothing_and_takes_nothing(record_folder, tmp_path, monkeypatch):  # noqa: F811
    track = record_folder.parents[1] / "new" / "cpu"
    theirs = track / ".2026-05-01_Next.part"
    theirs.mkdir(parents=True)
    (theirs / "mine").write_text("x")

    def full(*paths):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(record.shutil, "copystat", full)
    with pytest.raises(UserError, match="2026-05-01_Next: cannot be written .No space left"):
        record.main(package(record_folder))
    assert [path.name for path in track.iterdir()] == [theirs.name] and (theirs / "mine").exists()


@pytest.mark.parametrize(
    "line, rule",
    [
        ("resumed: source changed, sha256 was 12ab, is 34cd", "rule 5"),
        ("resumed: torch changed, was 2.12, is 2.13", "rule 5"),
        ("resumed: hardware changed, was A, is B", "rule 5"),
    ],
)
def test_a_run_that_was_resumed_with_something_else_does_not_count(line, rule, record_folder, capsys):  # noqa: F811
    path = record_folder / "this" / "2.txt"
    last = path.read_text().splitlines()[-1]
    path.write_text(
        path.read_text().replace(last, f"resumed: from step 0 with 1 process(es)\n{line}\n{last}")
    )
    assert record.main(["verify", str(record_folder), "--target", "4.2"]) == 1
    assert f"{rule}  fail  2: resumed, {line.removeprefix('resumed: ')}" in capsys.readouterr().out


def test_a_baseline_that_is_named(record_folder, capsys):  # noqa: F811
    later = record_folder.with_name("2026-04-01_Later")
    later.mkdir()
    for n in range(5):
        started = f"2026-03-01T0{n}:45:00Z"
        write_run(later / "this" / f"{n}.txt", 4.17 + n / 1000, 207_000 + n, started=started)
    (later / "train_gpt.py").write_text((record_folder / "train_gpt.py").read_text())
    (later / "BASELINE").write_text("2026-03-01_Faster/this\n")
    assert record.main(["verify", str(later), "--target", "4.2"]) == 0, capsys.readouterr().out
    for text in ("../../../etc", "2026-03-01_Faster/this/..", "", "x" * 900, "2026-02-01_Other/this"):
        (later / "BASELINE").write_text(text)
        with pytest.raises(UserError, match="BASELINE"):
            record.main(["verify", str(later), "--target", "4.2"])
    (later / "BASELINE").unlink()
    argv = package(later, "--records", str(record_folder.parents[1]), "--date", "2026-03-09")
    argv[argv.index("--baseline") + 1] = str(record_folder / "this")
    capsys.readouterr()
    assert record.main(argv) == 0, capsys.readouterr().out
    made = record_folder.with_name("2026-03-09_Next")
    assert (made / "BASELINE").read_text() == "2026-03-01_Faster/this\n" and not (made / "baseline").exists()
    assert "baseline=records/cpu/2026-03-01_Faster/this" in (made / "README.md").read_text()


def test_config_and_numbers_of_records_are_checked(record_folder, capsys):  # noqa: F811
    path = record_folder / "this" / "2.txt"
    text = path.read_text()
    path.write_text(re.sub(r"val_loss:4[.\d]*", "val_loss:nan", text))
    with pytest.raises(UserError, match="2: ends with a val_loss of nan"):
        record.main(["verify", str(record_folder)])
    path.write_text(text.replace('"muon_lr": 0.03', f'"muon_lr": {json.dumps([[1]])}'))
    assert record.main(["verify", str(record_folder), "--target", "4.2"]) == 1
    assert "differs from 0's in muon_lr" in capsys.readouterr().out
