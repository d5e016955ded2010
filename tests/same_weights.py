"""Trains tiny models for 20 steps and prints hashes: python -m tests.same_weights.

For changes that must change no number. Before the change:

    python -m tests.same_weights --write before.json

and after it, on the same machine with the same torch:

    python -m tests.same_weights --compare before.json

which ends with status 1 and names every run, and every metric, that is not the same bit for bit.
"""

import argparse
import hashlib
import importlib
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

HIDDEN = {"hidden_layers": "uniform", "data": "ids"}
OPSD = {"opsd": True, "teacher": "base", "data": "hints"}
TAID = {"t_start": 0.2, "step_size": 0.05, "momentum": 0.5}
WEIGHTS = {"entropy": 1.0, "number": 2.0, "punctuation": 0.5, "space": 0.5, "special": 0.1}
WEIGHTS |= {"reasoning": 3.0, "markers": ["think", "yes"]}
EVALUATED = {"eval_strategy": "steps", "eval_steps": 10}

# Arguments of `tests.tiny_runs.make`
RUNS: dict[str, dict[str, Any]] = {
    "no-teacher": {"teacher": None, "alpha": 0.0},
    "kd": {},
    "kd-evaluated": {"data": "text", **EVALUATED},
    "kd-accumulated": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "kd-soft-only": {"alpha": 1.0, "temperature_scaling": "none", "temperature": 1.5},
    "kd-hard-only": {"alpha": 0.0},
    "kd-reverse": {"divergence": "reverse_kl", "lr_scheduler_type": "linear"},
    "kd-jsd": {
        "divergence": "jsd",
        "beta": "linear:0.9->0.1@20",
        "temperature": "cosine:4.0->1.0@20",
    },
    "kd-progressive": {"temperature": "linear:4.0->1.0@20", "alpha": "linear:1.0->0.0@15"},
    "kd-logits": {"label_smoothing_factor": 0.1, **EVALUATED},
    "kd-logits-jsd": {"label_smoothing_factor": 0.1, "divergence": "jsd", "beta": 0.3},
    "kd-token-weights": {
        "data": "ids-and-tokenizer",
        "token_weights": WEIGHTS,
        "gradient_accumulation_steps": 2,
        **EVALUATED,
    },
    "kd-weights-of-rows": {"data": "ids-weighted", "token_weights": {"number": 2.0}},
    "kd-clip": {"clip": {"bound": 0.02, "level": "vocab_entry"}},
    "kd-clip-token": {"clip": {"bound": 0.06, "level": "token_rescale"}, "divergence": "jsd"},
    "kd-policy-gradient": {
        "divergence": "policy_gradient",
        "clip": {"bound": 3.0, "level": "token"},
        "temperature": 1.0,
    },
    "kd-k3": {"divergence": "k3", "temperature": 1.0},
    "kd-padded-vocabulary": {"data": "text", "teacher": "other-padded"},
    "kd-softcap": {"student": "gemma2", "teacher": "other-gemma2"},
    "kd-lora": {"student": "lora-dropout"},
    "kd-bf16": {"student": "llama-bf16", "teacher": "other-bf16"},
    "kd-autocast": {"bf16": True},
    "kd-checkpointing": {"student": "llama-dropout", "activation_checkpointing": True},
    "hidden-projections": {
        **HIDDEN,
        "teacher": "other-wide",
        "hidden_weight": "linear:1.0->0.1@20",
        **EVALUATED,
    },
    "hidden-cosine": {
        **HIDDEN,
        "hidden": {"loss": "cosine"},
        "hidden_layers": [[1, 2], [2, 3]],
        "teacher": "other-deep",
        "hidden_weight": 1.0,
    },
    "hidden-attention": {
        **HIDDEN,
        "student": "llama-eager",
        "teacher": "other-eager",
        "hidden": {"loss": "l1", "attention_weight": 0.5},
        "label_smoothing_factor": 0.1,
    },
    "hidden-taid": {**HIDDEN, "teacher": "other-deep", "taid": TAID},
    "taid": {"taid": TAID, **EVALUATED},
    "taid-logits": {"taid": TAID, "label_smoothing_factor": 0.1},
    "taid-linear": {"taid": {"adaptive": False}, "gradient_accumulation_steps": 2},
    "uld": {
        "data": "letters",
        "teacher": "other-letters",
        "divergence": "uld",
        "temperature": 1.0,
        "alpha": 0.6,
        **EVALUATED,
    },
    "cached": {"teacher": "cached-default"},
    "cached-full": {"data": "text", "teacher": "cached-full"},
    "cached-topk": {
        "data": "text",
        "teacher": "cached-topk",
        "divergence": "jsd",
        "temperature": 1.0,
    },
    "cached-sampled": {
        "data": "text",
        "teacher": "cached-sampled",
        "temperature": 1.0,
        "label_smoothing_factor": 0.1,
    },
    "routed": {"teacher": "routed", **EVALUATED},
    "routed-logits": {"teacher": "routed", "label_smoothing_factor": 0.1},
    "classifier": {"student": "bert", "teacher": "other-bert", "data": "classes", **EVALUATED},
    "classifier-smoothing": {
        "student": "bert",
        "teacher": "other-bert",
        "data": "classes",
        "label_smoothing_factor": 0.1,
        "gradient_accumulation_steps": 2,
    },
    "classifier-llama": {
        "student": "llama-classifier",
        "teacher": "other-llama-classifier",
        "data": "classes",
        "alpha": "linear:1.0->0.2@20",
    },
    "opsd-base": {**OPSD, **EVALUATED},
    "opsd-ema": {**OPSD, "teacher": "ema", "self_teacher": {"ema_decay": 0.9}},
    "opsd-live": {**OPSD, "teacher": "live", "data": "chats"},
    "opsd-lora": {**OPSD, "student": "lora"},
    "opsd-lora-scale": {
        **OPSD,
        "student": "lora",
        "teacher": "lora_scale",
        "self_teacher": {"lora_scale": "linear:0.0->0.8@20"},
    },
    "opsd-other-teacher": {**OPSD, "teacher": "other", "clip": {"bound": 0.1}, "alpha": 0.7},
    "opsd-anchor": {**OPSD, "anchor_weight": 0.5, "gradient_accumulation_steps": 2},
    "opsd-steps-per-rollout": {
        **OPSD,
        "rollout": {"steps_per_rollout": 2, "importance_clip": 1.2, "temperature": 1.0},
    },
    "opsd-mixed-rollouts": {
        **OPSD,
        "student": "talkative",
        "rollout": {"on_policy_fraction": 0.5, "batch_size": 2, "temperature": 0.0},
        "hidden_layers": "last",
        "hidden_weight": 0.3,
    },
    "opsd-environment": {
        **OPSD,
        "student": "talkative",
        "data": "environment",
        "teacher": "ema",
        "rollout": {"num_completions": 2, "max_turns": 2},
        "token_weights": {"entropy": 1.0},
    },
    "opsd-dropped-hints": {**OPSD, "data": "dropped-hints", "on_policy": False},
    "opsd-off-policy": {**OPSD, "on_policy": False, "alpha": 0.8, **EVALUATED},
    "opsd-off-policy-cached": {**OPSD, "on_policy": False, "teacher": "cached-default"},
}


def run(name: str, tiny_runs: Any) -> dict[str, Any]:
    """Train one of the runs; its hashes, and for messages the values behind them.

    Args:
        name: of the run.
        tiny_runs: the module `tests.tiny_runs`.

    Returns:
        weights, metrics: hashes. sum: of the weights' absolute values. each: for every metric its
        hash and its last value.
    """
    with tempfile.TemporaryDirectory() as folder:
        trained = tiny_runs.train(tiny_runs.make(Path(folder), **RUNS[name]))
    logs = [json.dumps(log, sort_keys=True) for log in trained.logs]
    values: dict[str, list[str]] = {}
    for log in trained.logs:
        for metric, value in log.items():
            values.setdefault(metric, []).append(value)
    return {
        "weights": trained.digest,
        "metrics": digest(*logs),
        "sum": trained.total,
        "each": {metric: [digest(*x), x[-1]] for metric, x in sorted(values.items())},
    }


def digest(*texts: str) -> str:
    """The first 16 hexadecimal digits of the texts' sha256."""
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    """What is not the same in two results of one run."""
    if before["weights"] != after["weights"]:
        yield f"weights (sum of absolute values {before['sum']!r}, now {after['sum']!r})"
    gone = (None, None)
    for metric in sorted(before["each"].keys() | after["each"].keys()):
        one, other = (x["each"].get(metric, gone) for x in (before, after))
        if list(one) != list(other):
            yield f"{metric} (at the end {one[1]}, now {other[1]})"
    if before["metrics"] != after["metrics"] and before["each"] == after["each"]:
        yield "the logs, in which metrics stand together otherwise"


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=RUNS, default=list(RUNS))
    parser.add_argument("--list", action="store_true", help="print the names, run nothing")
    parser.add_argument("--write", metavar="FILE", type=Path, help="hashes as JSON")
    parser.add_argument("--compare", metavar="FILE", type=Path, help="that --write has written")
    return parser


def main() -> int:
    """Run the command line; returns the exit status."""
    options = make_parser().parse_args()
    if options.list:
        print("\n".join(RUNS))
        return 0
    before = None if options.compare is None else json.loads(options.compare.read_text())
    tiny_runs = importlib.import_module("tests.tiny_runs")  # slow, and --list needs none of it
    tiny_runs.prepare()
    found: dict[str, dict[str, Any]] = {}
    wrong = []
    for name in options.only:
        start = time.perf_counter()
        try:
            found[name] = result = run(name, tiny_runs)
        except Exception as error:
            wrong.append(f"{name}: {type(error).__name__}: {error}")
            print(f"{name:24s} failed", flush=True)
            continue
        seconds = time.perf_counter() - start
        print(f"{name:24s} {result['weights']} {result['metrics']} {seconds:5.1f} s", flush=True)
        if before is not None and name not in before:
            wrong.append(f"{name}: not in {options.compare}")
        elif before is not None:
            wrong += [f"{name}: {x}" for x in differences(before[name], result)]
    if before is not None and options.only == list(RUNS):
        wrong += [f"{name}: in {options.compare} only" for name in before if name not in RUNS]
    if options.write is not None:
        options.write.write_text(json.dumps(found, indent=1) + "\n")
    if before is not None:
        print(f"{len(found)} runs, {len(wrong)} differences")
    print("\n".join(wrong), file=sys.stderr, end="\n" if wrong else "")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
