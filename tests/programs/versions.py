"""Which versions of Python, torch and Triton the project runs with: a table, a row an environment.

    python -m tests.programs.versions PYTHON... [--null]

Each PYTHON is that of an environment that has requirements.txt and tests/requirements.txt. In it run
the tests of the kernels, in Triton's interpreter and compiled ahead of time, slow ones too, and the one test
that trains and resumes on one and on two processes. --null: where torch is a CUDA build, the preset short on
the null device, too, which compiles for minutes. Exit code 1 if anything fails.
"""

import json
import os
import re
import subprocess
from pathlib import Path

from cli import UserError, arguments, command, need, one_line, shown

ROOT = Path(__file__).resolve().parents[2]
KERNELS = [
    f"tests/test_{name}.py" for name in ("attention_kernel", "head_kernel", "lookup_kernel", "matrix_kernels")
]
FACTS = """
import json, platform
import torch, triton
import train_gpt
print(json.dumps([platform.python_version(), torch.__version__, triton.__version__]))
"""
HEAD = [
    "Python",
    "torch",
    "Triton",
    "in the interpreter",
    "compiled ahead of time",
    "trains, resumes",
    "null device",
]


def main(argv: list[str]) -> int:
    parser = arguments(__doc__)
    parser.add_argument("pythons", nargs="+", metavar="PYTHON")
    parser.add_argument("--null", action="store_true", help="the null device too")
    args = parser.parse_args(argv)
    print(line(HEAD), line(["---"] * len(HEAD)), sep="\n", flush=True)
    failed = False
    for python in args.pythons:
        cells = row(python, args.null)
        print(line(cells), flush=True)
        failed |= any("fails" in cell for cell in cells)
    return int(failed)


def line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def row(python: str, null: bool) -> list[str]:
    try:
        done = run(python, "-c", FACTS)
    except OSError as error:
        raise UserError(f"{shown(python)}: cannot be started ({error.strerror})") from None
    lines = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()
    need(done.returncode == 0, f"{shown(python)}: {one_line(lines[-1], 200)}")
    versions = json.loads(done.stdout.splitlines()[-1])
    return [
        *versions,
        tested(python, "tests/test_interpreter.py"),
        tested(python, *KERNELS),
        tested(python, "tests/test_new_parameter.py"),
        on_null_device(python) if null and "+cu" in versions[1] else "-",
    ]


def run(*words: str) -> subprocess.CompletedProcess:
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=3600)


def tested(python: str, *files: str) -> str:
    """How many tests passed; which fails first."""
    done = run(python, "-m", "pytest", "-q", "-m", "slow or not slow", "-p", "no:cacheprovider", *files)
    counts = dict(
        reversed(pair.split()) for pair in re.findall(r"\d+ (?:passed|failed|skipped|error)", done.stdout)
    )
    if done.returncode == 0:
        skipped = f", {counts['skipped']} skipped" if "skipped" in counts else ""
        return f"{counts['passed']} pass{skipped}"
    first = re.search(r"^(?:FAILED|ERROR) \S+?::(\S+)", done.stdout, re.MULTILINE)
    reason = first[1] if first else one_line((done.stderr or done.stdout).strip()[-200:])
    return f"{counts.get('failed', 'it')} fails of {sum(map(int, counts.values()))}: {reason}"


def on_null_device(python: str) -> str:
    done = run(python, "tests/null_device.py", "--presets", "short", "--ranks", "1")
    if done.returncode == 0 and "skipped" not in done.stdout:
        return "passes"
    return f"fails: {one_line((done.stdout + done.stderr).strip().splitlines()[-1], 200)}"


if __name__ == "__main__":
    command(main)
