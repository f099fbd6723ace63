"""How every command ends, tried on a small one: exit codes, one line on stderr, closed and full streams."""

import argparse
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import CLEAN_ENV, ROOT, assert_user_error

import cli

COMMAND = """
import sys, time
if "slow_import" in sys.argv:
    print("importing", flush=True)
    time.sleep(60)
if "missing" in sys.argv:
    import no_such_package
import cli
from cli import UserError, arguments, command, need

def main(argv):
    what = argv[0]
    if what == "user":
        raise UserError("--x 3: too many\\n\\x1b[31mlines")
    if what == "bug":
        raise KeyError("ours")
    if what == "file":
        open("/nowhere/at/all")
    if what == "package":
        import no_such_package
    if what == "wait":
        try:
            print("waiting", flush=True)
            time.sleep(60)
        finally:
            print("cleaned up", flush=True)
    if what == "much":
        for n in range(100_000):
            print(n)
    if what == "help":
        arguments("What it does.").parse_args(["--help"])
    if what == "flag":
        arguments("What it does.").parse_args(["--hel"])
    if what == "no value":
        parser = arguments("What it does.")
        parser.add_argument("--tokens", type=int)
        parser.parse_intermixed_args(["--tokens=--"])
    if what in ("noted", "noted, refused"):
        cli.note("a.txt: skipped\\n(empty)")
        need(what == "noted", "b: nothing there")
    if what == "surrogate":
        print("caf\\udce9 \u6771")
    if what == "opens":
        with open(argv[1], "w") as file:
            print("printed")
            file.write("written")
    return 3 if what == "three" else None

command(main, "interrupted: run it again")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    (folder / "things").mkdir()
    (folder / "things" / "__init__.py").write_text("import cli\n")
    (folder / "things" / "do.py").write_text(COMMAND)
    return folder


def start(folder: Path, *argv, **options) -> subprocess.Popen:
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) | options
    env = CLEAN_ENV | {"PYTHONPATH": str(ROOT), "TMPDIR": str(folder)} | pipes.pop("env", {})
    words = [sys.executable, "-m", "things.do", *map(str, argv)]
    return subprocess.Popen(words, cwd=folder, env=env, **pipes)


def run(folder: Path, *argv, **options) -> subprocess.CompletedProcess:
    process = start(folder, *argv, **options)
    out, err = process.communicate(timeout=30)
    return subprocess.CompletedProcess(argv, process.returncode, out, err)


@pytest.mark.parametrize(
    "what, words",
    [
        ("user", ["do.py: error: --x 3: too many", "lines"]),
        ("file", ["/nowhere/at/all: No such file"]),
        ("package", ["no_such_package is not installed", "requirements.txt"]),
        ("missing", ["no_such_package is not installed", "requirements.txt"]),
        ("flag", ["--hel", "--help lists the flags"]),
        ("no value", ["--tokens=--: -- is no value"]),
        ("noted, refused", ["error: b: nothing there (a.txt: skipped (empty))"]),
    ],
)
def test_what_a_user_can_put_right_is_one_line_and_2(folder, what, words):
    done = run(folder, what)
    assert_user_error(done, *words)
    assert "\x1b" not in done.stderr


def test_a_bug_is_one_line_with_the_place_of_its_traceback(folder):
    done = run(folder, "bug")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert "a bug of this program: KeyError: 'ours'" in done.stderr
    assert "KeyError" in Path(done.stderr.split("report it with ")[1].strip()).read_text()


@pytest.mark.parametrize("what, code", [("nothing", 0), ("three", 3), ("help", 0)])
def test_the_code_is_what_main_returns(folder, what, code):
    done = run(folder, what)
    assert (done.returncode, done.stderr) == (code, "")
    assert ("What it does." in done.stdout) == (what == "help")


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("when", ["slow_import", "wait"])
def test_signals_end_it_quietly_also_while_it_imports(folder, number, code, when):
    process = start(folder, when)
    process.stdout.readline()
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == code
    told = when == "wait" and number == signal.SIGINT
    assert err == ("do.py: interrupted: run it again\n" if told else "")
    assert out == ("cleaned up\n" if when == "wait" else "")


def test_a_closed_pipe_ends_it_quietly(folder):
    process = start(folder, "much")
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait(timeout=30) == 141


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.parametrize("what", ["much", "opens"])
def test_a_full_disk_behind_its_output_is_the_users_to_put_right(folder, what):
    with open("/dev/full", "w") as full:
        done = run(folder, what, folder / "x", stdout=full)
    assert_user_error(done, "the output: No space left on device")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_swallow_what_is_printed_and_nothing_else(folder, closed):
    line = f'"$0" -m things.do "$1" "$2" {closed}'
    for what, code in (("opens", 0), ("user", 2), ("bug", 1)):
        words = ["bash", "-c", line, sys.executable, what, str(folder / "file")]
        env = CLEAN_ENV | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, timeout=30)
        assert done.returncode == code, done.stderr
    assert (folder / "file").read_text() == "written"


def test_what_a_terminal_cannot_show_becomes_a_question_mark(folder):
    done = run(folder, "surrogate", env={"PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stdout) == (0, "caf? ?\n")


def test_notes_are_said_where_nothing_is_refused(folder):
    done = run(folder, "noted")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "a.txt: skipped (empty)\n")


def test_text_of_a_flag_is_utf8():
    assert cli.text_flag("caf\u00e9") == "caf\u00e9"
    with pytest.raises(argparse.ArgumentTypeError, match="is not UTF-8"):
        cli.text_flag("caf\udce9")


def test_words_of_a_message_stay_on_one_line():
    assert cli.one_line("a\nb\x1b[0m\u202e") == "a b [0m "
    assert cli.one_line("x" * 50, limit=10) == "xxxxxxx..."
    assert len(cli.shown("y" * 5000)) < 300
    assert cli.os_reason(OSError(36, "File name too long")) == "File name too long; give a shorter name"


@pytest.mark.parametrize("name", ["data", "evals", "records"])
def test_every_folder_of_commands_imports_cli_first(name):
    lines = (ROOT / name / "__init__.py").read_text().splitlines()
    assert lines[2].startswith("import cli")
