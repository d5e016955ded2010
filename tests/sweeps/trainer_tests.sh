#!/bin/sh
# Transformers' own trainer tests, with its Trainer exchanged for a DistillTrainer. They are not part
# of its packages, so say where its sources are:
#
#     git clone --depth 1 --branch v5.24.0 https://github.com/huggingface/transformers /tmp/transformers
#     tests/sweeps/trainer_tests.sh /tmp/transformers [out] [arguments of pytest]
#
# It needs the package parameterized besides those of `make test`. Three runs: with Trainer, with a
# DistillTrainer without a teacher, and with one whose teacher is a copy of the model. Printed is what
# fails in the others only. Tests that need the hub or an accelerator fail or are skipped in all.
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
sources=$1
out=${2:-$root/out/trainer_tests}
[ $# -lt 2 ] || shift
shift
mkdir -p "$out"
# other trainers, several processes or other hardware
skipped="distributed fsdp tpu seq2seq deepspeed context_parallel data_collator"
# two packages are named tests, so the plugin is found by its folder
export HF_HUB_OFFLINE=1 PYTHONPATH="$root/tests/sweeps:$root:${PYTHONPATH:-}"
cd "$sources"
ignored=""
for word in $skipped; do ignored="$ignored --ignore-glob=*$word*"; done
for mode in none alone teacher; do
    EXCHANGE=$mode OUTCOMES=$out/$mode.json "$python" -m pytest -q -p exchange \
        -p no:cacheprovider -W ignore $ignored tests/trainer "$@" >"$out/$mode.log" 2>&1 || true
done
status=0
for mode in alone teacher; do
    echo "== $mode"
    "$python" "$root/tests/sweeps/exchange.py" "$out/none.json" "$out/$mode.json" || status=1
done
exit $status
