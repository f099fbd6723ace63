#!/usr/bin/env bash
# ./run.sh [FLAGS]        sets up what is missing (Python packages, data) and trains; FLAGS go to train_gpt.py
# ./run.sh sample PROMPT  text from the newest checkpoint in logs/; further arguments go to evals/sample.py
# ./run.sh test [ARGS]    sets up what tests need and runs them; ARGS go to pytest
# Works from any folder. What is there already is not made again.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

fail() { echo "run.sh: error: $*" >&2; exit 2; }

recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

# The active virtual environment, else .venv beside this file.
choose_python() {
    if [ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
        python=$(command -v python3 || command -v python) || fail "the active environment has no python3; deactivate it"
        recent "$python" || fail "the active environment's Python is older than 3.11; deactivate it or make a newer one"
        return
    fi
    python=$here/.venv/bin/python
    [ -f "$here/.venv/complete" ] && return
    local base
    for base in python3 python3.14 python3.13 python3.12 python3.11 none; do
        recent "$base" && break
    done
    [ "$base" != none ] || fail "no Python 3.11 or newer found; install one, or activate an environment that has it"
    echo "run.sh: making .venv with $("$base" --version)" >&2
    "$base" -m venv --clear "$here/.venv" || fail "$base -m venv failed; on Debian and Ubuntu: apt install python3-venv"
    touch "$here/.venv/complete"
}

# install FILE...: pip runs only when these files are not the ones that were installed last.
install() {
    local file stamp
    for file in "$@"; do
        stamp=$("$python" -c 'import sys; print(sys.prefix)')/installed-$(basename "$(dirname "$file")")-requirements.txt
        cmp -s "$file" "$stamp" && continue
        echo "run.sh: installing ${file#"$here"/}" >&2
        "$python" -m pip install -q --disable-pip-version-check -r "$file" || fail "pip could not install $file; its message stands above"
        cp "$file" "$stamp"
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
if [ "${1:-}" = test ]; then
    shift
    install "$here/requirements.txt" "$here/records/requirements.txt" "$here/evals/requirements.txt" "$here/tests/requirements.txt"
    exec "$python" -m pytest -n auto --dist worksteal "$here/tests" "$@"
fi
install "$here/requirements.txt"
if [ "${1:-}" = sample ]; then
    shift
    exec "$python" "$here/evals/sample.py" "$here/logs" "$@"
fi
case " $* " in
    *" -h "* | *" --help "*) exec "$python" "$here/train_gpt.py" --help ;;
esac
"$python" "$here/data/prepare.py" "$@"
processes=$(count_processes "$@")
if [ "$processes" -eq 1 ]; then
    case " $* " in
        *" --preset "* | *" --log_dir "*) ;;
        *) echo "run.sh: when the run is over, try: ./run.sh sample \"The king\"" >&2 ;;
    esac
    exec "$python" "$here/train_gpt.py" "$@"
fi
exec "$python" -m torch.distributed.run --standalone --nproc_per_node="$processes" "$here/train_gpt.py" "$@"
