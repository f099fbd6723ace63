"""run.sh, with a stand-in for Python that notes what it is asked to do."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, assert_user_error

# Answers what run.sh asks Python about itself, and notes the rest; FAILS: a word of the call that is to fail.
PYTHON = """#!/bin/bash
case "$*" in
    *version_info*) exit "${OLD:-0}" ;;
    *sys.prefix*) echo "$PREFIX"; exit ;;
    *"pip --version"*) [ -n "${PIP:-}" ] || [ -e "$PREFIX/pip" ]; exit ;;
    *ensurepip*) [ -n "${ENSURE:-}" ] && touch "$PREFIX/pip"; exit ;;
esac
echo "$PWD|$PYTHONPATH|$*" >>"$PREFIX/calls"
case "$*" in
    *"${FAILS:-nothing at all}"*) echo warming up; echo "ERROR: no torch"; echo see above; exit 1 ;;
esac
"""


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A copy of the project, as far as run.sh looks at it, and an environment with the stand-in."""
    here = tmp_path / "the project"
    for name in ("run.sh", *(f"{folder}requirements.txt" for folder in ("", "records/", "evals/", "tests/"))):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, here / name)
    python = tmp_path / "env" / "bin" / "python3"
    python.parent.mkdir(parents=True)
    python.write_text(PYTHON)
    python.chmod(0o755)
    return here


def run(checkout: Path, *argv: str, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess:
    prefix = checkout.parent / "env"
    known = {"PATH": f"{prefix / 'bin'}:{os.environ['PATH']}", "VIRTUAL_ENV": str(prefix)}
    known |= {"PREFIX": str(prefix), "PIP": "1", "TMPDIR": str(prefix)}
    words = [str(checkout / "run.sh"), *argv]
    return subprocess.run(
        words, cwd=cwd or checkout, env=known | env, capture_output=True, text=True, timeout=60
    )


def calls(checkout: Path) -> list[str]:
    """What Python was asked to run, each call once."""
    file = checkout.parent / "env" / "calls"
    return [line.split("|")[2] for line in file.read_text().splitlines()] if file.exists() else []


def test_training_installs_once_prepares_data_and_trains(checkout):
    for _ in range(2):
        done = run(checkout, "--preset", "cpu", "--num_steps", "3")
        assert done.returncode == 0, done.stderr
    flags = "--preset cpu --num_steps 3"
    once = [f"-P -m data.prepare {flags}", f"{checkout}/train_gpt.py {flags}"]
    assert [line for line in calls(checkout) if "pip install" not in line] == once * 2
    [installed] = [line for line in calls(checkout) if "pip install" in line]
    assert installed.endswith(f"-r {checkout}/requirements.txt")  # no pin: this environment is its owner's
    assert "torch>=2.11" in (checkout / "requirements.txt").read_text()


@pytest.mark.parametrize("cdpath", ["", "/:/tmp:.."])
def test_it_works_from_any_folder_and_knows_where_the_project_is(checkout, cdpath, tmp_path):
    other = tmp_path / "other"
    (other / "data").mkdir(parents=True)  # a folder `data` of somebody else
    relative = subprocess.run(
        ["../the project/run.sh", "--preset=cpu"],
        cwd=other,
        env={
            "PATH": f"{tmp_path / 'env' / 'bin'}:{os.environ['PATH']}",
            "VIRTUAL_ENV": "x",
            "PREFIX": str(tmp_path / "env"),
            "PIP": "1",
            "CDPATH": cdpath,
        },
        capture_output=True,
        text=True,
    )
    assert relative.returncode == 0, relative.stderr
    lines = (tmp_path / "env" / "calls").read_text().splitlines()
    assert {line.split("|")[0] for line in lines} == {str(other)}  # relative names mean what they say
    assert {line.split("|")[1] for line in lines} == {str(checkout)}
    assert calls(checkout)[-1] == f"{checkout}/train_gpt.py --preset=cpu"


def test_it_may_be_called_by_way_of_links(checkout, tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "first").symlink_to(checkout / "run.sh")
    (tmp_path / "bin" / "speedrun").symlink_to("first")
    prefix = tmp_path / "env"
    env = {"PATH": f"{prefix / 'bin'}:{os.environ['PATH']}", "VIRTUAL_ENV": "x", "PREFIX": str(prefix)}
    done = subprocess.run([tmp_path / "bin" / "speedrun"], env=env | {"PIP": "1"}, cwd=tmp_path)
    assert done.returncode == 0 and calls(checkout)[-1] == f"{checkout}/train_gpt.py"
    assert sorted(os.listdir(tmp_path / "bin")) == ["first", "speedrun"]


def test_an_environment_whose_python_is_gone_is_made_again(checkout, tmp_path):
    """As after an update of the system's Python, which .venv links to."""
    (checkout / ".venv" / "bin").mkdir(parents=True)
    (checkout / ".venv" / "complete").touch()
    (checkout / ".venv" / "bin" / "python").symlink_to("/nowhere/python3")
    prefix = tmp_path / "env"
    env = {"PATH": f"{prefix / 'bin'}:{os.environ['PATH']}", "PREFIX": str(prefix), "PIP": "1"}
    subprocess.run([checkout / "run.sh"], env=env, cwd=tmp_path, capture_output=True)
    assert f"-m venv --clear {checkout}/.venv" in calls(checkout)


def test_sample_looks_where_training_writes(checkout, tmp_path):
    run(checkout, "sample", "--tokens", "3", "The king", cwd=tmp_path)
    (tmp_path / "logs").mkdir()
    run(checkout, "sample", cwd=tmp_path)
    found = [line for line in calls(checkout) if "evals.sample" in line]
    assert found == [f"-P -m evals.sample {checkout}/logs --tokens 3 The king", "-P -m evals.sample logs"]


def test_test_checks_the_format_first_and_format_applies_it(checkout):
    run(checkout, "test", "-k", "attention")
    checks = [f"-m ruff check -q {checkout}", f"-m ruff format -q --check {checkout}"]
    ran = [line for line in calls(checkout) if "pip install" not in line]
    assert ran == [*checks, "-m pytest -n auto --dist worksteal -k attention"]
    assert_user_error(run(checkout, "test", FAILS="--check"), "./run.sh format")
    run(checkout, "format")
    assert calls(checkout)[-2:] == [f"-m ruff format -q {checkout}", f"-m ruff check -q --fix {checkout}"]


def test_an_environment_without_pip_gets_it_or_a_word_on_it(checkout):
    assert_user_error(run(checkout, PIP=""), "has no pip", "uv pip install pip")
    assert calls(checkout) == []
    assert run(checkout, PIP="", ENSURE="1").returncode == 0


def test_what_fails_is_one_line(checkout):
    done = run(checkout, FAILS="pip install")
    assert done.returncode == 2
    assert [line for line in done.stderr.splitlines() if "installing" not in line] == [
        done.stderr.splitlines()[-1]
    ]
    assert f"pip install -r {checkout}/requirements.txt failed: ERROR: no torch (all of it: " in done.stderr
    assert "warming up" in Path(done.stderr.split("all of it: ")[1].split(")")[0]).read_text()
    assert_user_error(run(checkout, OLD="1"), "older than 3.11")
