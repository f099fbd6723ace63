#!/usr/bin/env bash
# ./run.sh [FLAGS]        sets up what is missing (Python packages, data) and trains; FLAGS go to train_gpt.py
# ./run.sh sample PROMPT  text from the newest checkpoint in logs/; flags of `python -m evals.sample` too
# ./run.sh test [ARGS]    checks the format and runs the tests; ARGS go to pytest
# ./run.sh format         applies the formatter and the linter
# Works from any folder: logs/ is the current folder's, and so is a data/ that holds the preset's data; else data/
# is the project's. What is there is not made again.
set -euo pipefail
script=${BASH_SOURCE[0]}
while [ -L "$script" ]; do # called by way of a link: the project is where the link leads
    link=$(readlink -- "$script")
    case "$link" in
        /*) script=$link ;;
        *) script=$(dirname -- "$script")/$link ;;
    esac
done
here=$(CDPATH='' cd -- "$(dirname -- "$script")" && pwd)
export PYTHONPATH=$here${PYTHONPATH:+:$PYTHONPATH}
pin="" # what a fresh .venv gets; in an environment of the user's own, requirements.txt alone decides

fail() { echo "run.sh: error: $*" >&2; exit 2; }

recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

# quietly WHAT COMMAND...: its output is shown only if it fails, as one line.
quietly() {
    local what=$1 log
    shift
    log=$(mktemp)
    if ! "$@" >"$log" 2>&1; then
        fail "$what failed: $(grep -m 1 -i error "$log" || tail -n 1 "$log") (all of it: $log)"
    fi
    rm -f "$log"
}

# The active virtual environment, else .venv beside this file.
choose_python() {
    if [ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
        python=$(command -v python3 || command -v python) || fail "the active environment has no python3; deactivate it"
        recent "$python" || fail "the active environment's Python is older than 3.11; deactivate it or make a newer one"
        return
    fi
    python=$here/.venv/bin/python
    pin="torch==2.13.0"
    [ -f "$here/.venv/complete" ] && recent "$python" && return
    local base
    for base in python3 python3.14 python3.13 python3.12 python3.11 none; do
        recent "$base" && break
    done
    [ "$base" != none ] || fail "no Python 3.11 or newer found; install one, or activate an environment that has it"
    echo "run.sh: making .venv with $("$base" --version)" >&2
    quietly "$base -m venv (on Debian and Ubuntu: apt install python3-venv)" "$base" -m venv --clear "$here/.venv"
    touch "$here/.venv/complete"
}

# Environments that uv makes have no pip.
ensure_pip() {
    "$python" -m pip --version >/dev/null 2>&1 && return
    "$python" -m ensurepip --default-pip >/dev/null 2>&1 && return
    fail "$python has no pip: run \`uv pip install pip\`, or deactivate this environment"
}

# install FILE...: pip runs only when these files are not the ones that were installed last.
install() {
    local file stamp wanted
    for file in "$@"; do
        stamp=$("$python" -c 'import sys; print(sys.prefix)')/installed-$(basename "$(dirname "$file")")-requirements.txt
        wanted=$(cat "$file" && echo "$pin")
        [ "$wanted" = "$(cat "$stamp" 2>/dev/null || true)" ] && continue
        ensure_pip
        echo "run.sh: installing ${file#"$here"/}" >&2
        quietly "pip install -r $file" "$python" -m pip install -q --disable-pip-version-check -r "$file" ${pin:+"$pin"}
        { echo "$wanted" >"$stamp"; } 2>/dev/null || true # an environment that may not be written: pip asks again
    done
}

# One process for each GPU (1, 2, 4 or 8: they share a step's micro-batches evenly); one where none is used.
count_processes() {
    local gpus=0 n flags=" $* "
    flags=${flags//=/ }
    case "$flags" in
        *" --preset cpu"* | *" --preset one-gpu "* | *" --device cpu "*) ;;
        *) [ -e /dev/nvidiactl ] && gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())') ;;
    esac
    for n in 8 4 2 1; do
        [ "$gpus" -ge "$n" ] && break
    done
    echo "$n"
}

choose_python
case "${1:-}" in
    format)
        install "$here/tests/requirements.txt"
        "$python" -m ruff format -q "$here"
        exec "$python" -m ruff check -q --fix "$here"
        ;;
    test)
        shift
        install "$here"/{,records/,evals/,tests/}requirements.txt
        "$python" -m ruff check -q "$here" || fail "the linter's findings stand above; ./run.sh format mends most"
        "$python" -m ruff format -q --check "$here" || fail "files are not formatted; ./run.sh format does it"
        cd "$here" # `pytest tests/test_x.py` means the project's
        exec "$python" -m pytest -n auto --dist worksteal "$@"
        ;;
    sample)
        shift
        install "$here/requirements.txt"
        logs=logs # where a run that was started here has left them
        [ -d "$logs" ] || logs=$here/logs
        exec "$python" -P -m evals.sample "$logs" "$@"
        ;;
esac
case " $* " in
    *" -h "* | *" --help "*) install "$here/requirements.txt" && exec "$python" "$here/train_gpt.py" --help ;;
esac
install "$here/requirements.txt"
"$python" -P -m data.prepare "$@" # -P: a folder `data` of the current folder is another
processes=$(count_processes "$@")
if [ "$processes" -eq 1 ] && [ -t 1 ]; then # somebody watches: what came of it is said at the end
    exec "$python" -P -m records.outcome "$@"
elif [ "$processes" -eq 1 ]; then
    exec "$python" "$here/train_gpt.py" "$@"
fi
exec "$python" -m torch.distributed.run --standalone --nproc_per_node="$processes" "$here/train_gpt.py" "$@"
