"""What is in a cache, and how far what it says is from the teacher.

Shapes: N scored tokens of some rows, V logits per token, K stored entries.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_distill.cache.errors import CacheCorrupt
from hf_distill.cache.fingerprints import Collator, Data
from hf_distill.cache.reader import CacheReader
from hf_distill.cache.teacher import CachedTeacher
from hf_distill.data import sides
from hf_distill.data.sides import Side
from hf_distill.data.turn_ends import tell_end_tokens
from hf_distill.losses.sparse_teacher import sparse_terms
from hf_distill.models.forward import Reader
from hf_distill.models.modes import evaluating
from hf_distill.models.structure import causal_lm, generation_end_ids
from metal_ops import DivergenceSpec, SparseTeacher, weighted_divergence

LEAST_TAIL = -15.0  # log of a mass below which its error says nothing: 3e-7


def describe(reader: CacheReader) -> list[str]:
    """Return a line for each thing that a user wants to know of a cache."""
    config, stats = reader.manifest.config, reader.manifest.stats
    teacher, codec, logits = (config.get(name) or {} for name in ("teacher", "codec", "logits"))
    tokenizer, data = config.get("tokenizer") or {}, config.get("dataset") or {}
    rows = {
        "cache": reader.path,
        "teacher": f"{teacher.get('name_or_path')} (revision {teacher.get('revision')}, "
        f"{teacher.get('dtype')}, weights {_short(teacher.get('weights_fingerprint'))})",
        "tokenizer": f"{tokenizer.get('name_or_path')} ({_short(tokenizer.get('sha256'))})",
        "vocabulary": f"{logits.get('real_vocab')} of {logits.get('logit_dim')} logits",
        "data": f"{data.get('num_rows')} rows ({_short(data.get('sha256'))})",
        "codec": f"{codec.get('name')} {codec.get('settings')}",
        "temperatures": f"written at {codec.get('temperature')}, read at "
        f"{codec.get('temperature_range')}",
        "tokens": f"{stats.get('tokens')}",
        "bytes/token": f"{_number(stats.get('bytes_per_token'))}",
        "mean entropy": f"{_number(stats.get('mean_entropy'))} nats",
        "mean tail mass": f"{_number(stats.get('mean_tail_mass'))}",
        "head": _head(codec.get("head"), stats),
        "shards": f"{len(reader.manifest.shards)} of up to {config.get('shard_rows')} rows",
    }
    return [f"{name:15s} {value}" for name, value in rows.items() if value]


def _head(about: Any, stats: Mapping[str, Any]) -> str:
    """Return what there is of the teacher's head, or nothing."""
    if not isinstance(about, dict):
        return ""
    kept = f"{about.get('width')} of {(about.get('shape') or [0])[-1]} hidden units"
    return f"{kept}, {about.get('dtype')}, {stats.get('head_bytes')} bytes, once"


def _short(digest: Any) -> str:
    return "unknown" if digest is None else f"sha256 {str(digest)[:12]}"


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "unknown"


@torch.no_grad()
def measure(
    teacher: CachedTeacher,
    model: nn.Module,
    data: Data,
    collator: Collator,
    num_rows: int = 16,
) -> dict[str, float]:
    """Measure how far the stored numbers are from a model's, on some rows, evenly spread.

    Args:
        teacher: the cache.
        model: the one that was cached, on any device; it is read in eval mode.
        data: the rows that were cached.
        collator: that of the writing.
        num_rows: how many rows, >= 1.

    Returns:
        `tokens`; `log_prob_error`, the largest difference of a stored log-probability; of a sparse
        codec `log_tail_error`, the same of the tail's log-mass where it is above e^-15, and
        `forward_kl_<T>` at both ends of the temperature range: the loss, in nats a token and
        without temperature², of a student that is the teacher, which should be 0.

    Raises:
        RowMismatch: the data are not those that were cached.
        CacheCorrupt: no row scores a token.
        ValueError: num_rows is less than 1.
    """
    if num_rows < 1:
        raise ValueError(f"num_rows must be at least 1, got {num_rows}")
    count = min(num_rows, len(data))
    reader, device = Reader("teacher"), next(model.parameters()).device
    collator = tell_end_tokens(collator, generation_end_ids(causal_lm(model)))
    found: list[dict[str, float]] = []
    for i in range(count):
        batch = collator([data[i * len(data) // count]])
        side = sides.teacher_side(batch, sides.student_side(batch))
        if not bool(side.predicts.any()):
            continue
        inputs = {name: x.to(device) for name, x in side.inputs.items()}
        side = Side(inputs, side.predicts.to(device))
        with evaluating(model):
            logits = reader.signal(model, side).dense()
        real = teacher.manifest.config["logits"]["real_vocab"]
        if not teacher.codec.of_hidden:
            logits[:, real:] = -torch.inf
        found.append(_errors(teacher, teacher.signal(model, side), logits.float()))
    if not found:
        raise CacheCorrupt(f"{teacher.reader.path}: {count} rows score no token")
    return _joined(found)


def _errors(teacher: CachedTeacher, signal: Any, logits: Tensor) -> dict[str, float]:
    """Return the errors over the tokens of one row."""
    stored_at = teacher.codec.temperature
    log_p = (logits / stored_at).log_softmax(-1)
    errors = {"tokens": float(len(logits))}
    if signal.sparse is None:
        real, said = log_p > -torch.inf, (signal.dense().float() / stored_at).log_softmax(-1)
        apart = (said - log_p)[real].abs().max()
        spec = DivergenceSpec("forward_kl", temperature=stored_at)
        weights = torch.ones(len(logits), device=logits.device)
        finite = logits.clamp_min(torch.finfo(torch.float32).min / 4)
        loss = weighted_divergence(finite, said * stored_at, spec, weights=weights).loss
        return errors | {"log_prob_error": float(apart), f"forward_kl_{stored_at:g}": float(loss)}
    sparse: SparseTeacher = signal.sparse
    known = sparse.ids >= 0
    if bool(known.any()):
        said = log_p.gather(-1, sparse.ids.clamp_min(0))
        errors["log_prob_error"] = float((sparse.log_probs - said)[known].abs().max())
        rest = log_p.scatter(-1, sparse.ids.clamp_min(0), -torch.inf).logsumexp(-1)
        large = rest > LEAST_TAIL
        if bool(known.all()) and bool(large.any()):
            errors["log_tail_error"] = float((sparse.log_tail - rest)[large].abs().max())
    for temperature in sorted(set(teacher.codec.temperature_range)):
        spec = DivergenceSpec("forward_kl", temperature=temperature)
        weights = torch.ones(len(logits), device=logits.device)
        finite = logits.clamp_min(torch.finfo(torch.float32).min / 4)
        terms = sparse_terms(finite, sparse, signal.tail, spec, weights)
        errors[f"forward_kl_{temperature:g}"] = float(terms.loss)
    return errors


def _joined(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the largest errors, the sum of tokens and the means of losses."""
    tokens = sum(each["tokens"] for each in found)
    joined = {"tokens": tokens}
    for name in {key: None for each in found for key in each if key != "tokens"}:
        values = [each[name] for each in found if name in each]
        joined[name] = sum(values) / tokens if name.startswith("forward_kl") else max(values)
    return joined
