#!/usr/bin/env bash
# Transformers: a tensor parallel model's pieces hold the whole weights on a CPU, if they are cut by rows.
#
# A good engineer would guess: with tp_size=2 each process holds half of every weight that is cut, so
# that a CPU process needs half of the memory.
# What happens: from_pretrained reads the rows of a process as a view of the whole tensor of the file.
# Where the dtype asked for is the file's, the view is kept: pieces cut along their first axis (q, k,
# v, gate, up, embeddings, head: most of a model) keep the storage of the whole weight alive. With
# another dtype the conversion makes a copy, and the piece is all that is held. On a GPU the move
# makes that copy.
# Versions: transformers 5.24.0, safetensors 0.8.0, torch 2.13.0 (CPU, two gloo processes).
# Seen on 2026-12-01, of pieces of a float32 checkpoint:
#   dtype float32: lm_head.weight piece 256 KiB, held 512 KiB
#   dtype float32: model.layers.0.self_attn.q_proj.weight piece 8 KiB, held 16 KiB
#   dtype float32: model.layers.0.self_attn.o_proj.weight piece 8 KiB, held 8 KiB
#   dtype bfloat16: each piece is all that is held
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0
"$work/venv/bin/pip" install --quiet numpy==2.3.5 accelerate==1.15.0 transformers==5.24.0 safetensors==0.8.0
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
cat > "$work/run.py" <<'PYTHON'
import sys

import torch
import torch.distributed as dist
from torch.multiprocessing import start_processes
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.distributed import DistributedConfig

HEAD = "lm_head.weight"
Q, O = (f"model.layers.0.self_attn.{x}_proj.weight" for x in "qo")


def sizes(folder, dtype):
    given = DistributedConfig(tp_size=2)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype, distributed_config=given)
    found = {}
    for name, p in model.named_parameters():
        piece = p.to_local() if hasattr(p, "to_local") else p.data
        found[name] = piece.nbytes, piece.untyped_storage().nbytes()
    return found


def work(rank, store, folder):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    if rank == 0:
        config = LlamaConfig(
            vocab_size=2048, hidden_size=64, intermediate_size=128, num_hidden_layers=1,
            num_attention_heads=4, num_key_value_heads=4,
        )
        LlamaForCausalLM(config).save_pretrained(folder)
    dist.barrier()
    same, cast = (sizes(folder, x) for x in (torch.float32, torch.bfloat16))
    if rank == 0:
        for name in (HEAD, Q, O):
            piece, held = same[name]
            print(f"dtype float32: {name} piece {piece // 1024} KiB, held {held // 1024} KiB")
        for name, times in ((HEAD, 2), (Q, 2), (O, 1)):
            piece, held = same[name]
            assert held == times * piece, f"changed: {name}: a piece of {piece} holds {held}"
        assert all(piece == held for piece, held in cast.values()), f"changed: {cast}"
        print("dtype bfloat16: each piece is all that is held")
    dist.destroy_process_group()


if __name__ == "__main__":
    start_processes(work, sys.argv[1:], nprocs=2, start_method="spawn")
PYTHON
"$work/venv/bin/python" "$work/run.py" "$work/store" "$work/model" 2> >(grep -v Warning >&2)
