#!/bin/sh
# The tests of models, losses and trainers with other versions of transformers and torch:
#
#     tests/sweeps/versions.sh [out] [NAME==VERSION[,NAME==VERSION...]] ...
#
# Without pairs: the oldest that pyproject.toml allows and the newest that the index has. Each set of
# packages is laid over the environment of `make test` (PYTHON, else .venv/bin/python), in a folder of
# its own and without what they depend on. torch comes from TORCH_INDEX alone, an index of CPU builds:
# other builds need gigabytes of libraries that no test uses. A set that cannot be had, or does not
# load, is said and passed over. FOLDERS and PYTEST_ARGS say what runs, and how.
set -u
root=$(cd "$(dirname "$0")/../.." && pwd)
absolute() { case $1 in /*) echo "$1" ;; *) echo "$PWD/$1" ;; esac; }
python=$(absolute "${PYTHON:-$root/.venv/bin/python}")
torch_index=${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}
out=$(absolute "${1:-$root/out/versions}")
[ $# -eq 0 ] || shift
folders=${FOLDERS:-tests/hf_distill/models tests/hf_distill/losses tests/hf_distill/trainers}
export HF_HUB_OFFLINE=1
cd "$root" || exit 2
mkdir -p "$out"

pip() { # with the index of the package that is named first, and its command after that
    case $1 in
    torch*) shift && PIP_CONFIG_FILE=/dev/null PIP_EXTRA_INDEX_URL= PIP_FIND_LINKS= \
        PIP_INDEX_URL=$torch_index "$python" -m pip --retries 0 "$@" ;;
    *) shift && "$python" -m pip "$@" ;;
    esac
}

newest() {
    pip "$1" index versions "$1" 2>/dev/null | sed -n '1s/.*(\(.*\)).*/\1/p'
}

if [ $# -eq 0 ]; then
    oldest=$(sed -n 's/^ *"transformers>=\([0-9.]*\).*/\1/p' pyproject.toml)
    set -- "transformers==$oldest.0" "transformers==$(newest transformers)"
    torch=$(newest torch)
    if [ -n "$torch" ]; then
        set -- "$@" "torch==$torch" "transformers==$oldest.0,torch==$torch"
    else
        echo "torch: no versions at $torch_index"
    fi
fi

status=0
for pins in "$@"; do
    name=$(echo "$pins" | tr -c 'a-zA-Z0-9.\n' '-')
    over=$out/$name
    ready=yes
    for pin in $(echo "$pins" | tr ',' ' '); do
        [ ! -e "$over/.$pin" ] || continue
        pip "$pin" install --quiet --no-deps --upgrade --target "$over" "$pin" \
            >"$out/$name.pip.log" 2>&1 && touch "$over/.$pin" || ready=no
    done
    path=$over:$root:${PYTHONPATH:-}
    found=$(PYTHONPATH=$path "$python" -c 'import torch, transformers
print("transformers", transformers.__version__, "torch", torch.__version__)' \
        2>>"$out/$name.pip.log" | tail -1)
    if [ $ready = no ] || [ -z "$found" ]; then
        echo "$pins: not to be had, see $out/$name.pip.log"
        continue
    fi
    PYTHONPATH=$path "$python" -m pytest -q -p no:cacheprovider ${PYTEST_ARGS:-} $folders \
        >"$out/$name.log" 2>&1 || status=1
    echo "$found: $(grep -E '[0-9]+ (passed|failed|error)' "$out/$name.log" | tail -1)"
done
exit $status
