"""Which ids a tokenizer has, whether two have the same, and logits without padded entries.

Shapes: N tokens, V vocabulary.
"""

from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hf_distill.heads import Signal
from metal_ops import SparseTeacher


def num_ids(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the tokenizer's largest id: its length, if it leaves no id out."""
    return max(tokenizer.get_vocab().values()) + 1


def described(tokenizer: PreTrainedTokenizerBase) -> str:
    """A tokenizer in words: where it is from, its class and its number of ids."""
    kind = type(tokenizer).__name__
    return f"{str(tokenizer.name_or_path)!r} ({kind}, {num_ids(tokenizer)} ids)"


def difference(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> str | None:
    """The first token, in the order of ids, that two tokenizers do not give one id; or None."""
    if one is other:
        return None
    mine, theirs = one.get_vocab(), other.get_vocab()
    if mine == theirs:
        return None
    token = min(
        (token for token in mine.keys() | theirs.keys() if mine.get(token) != theirs.get(token)),
        key=lambda token: (min(x[token] for x in (mine, theirs) if token in x), token),
    )
    ids = ("no token" if x.get(token) is None else f"id {x[token]}" for x in (mine, theirs))
    first, second = ids
    return f"{token!r} is {first} of the one, {second} of the other"


def check_same(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, rule: str) -> None:
    """Every token must have one id.

    Args:
        one: a tokenizer.
        other: another.
        rule: what asks for it, a clause that begins the error.

    Raises:
        ValueError: naming both tokenizers and the first token in which they differ.
    """
    found = difference(one, other)
    if found is not None:
        raise ValueError(f"{rule}, got {described(one)} and {described(other)}: {found}")


def without_padding(signal: Signal, size: int) -> Signal:
    """A signal about the first `size` entries of the vocabulary only, renormalised over them.

    Of a sparse signal the known entries from there on are left out, and the others grow by their
    mass; what of the tail's mass lies there is not known and stays, as do its power sums up to that
    factor.
    """
    if signal.sparse is not None:
        return replace(signal, sparse=_without_padding(signal.sparse, size))
    if signal.head is not None:
        return replace(signal, head=signal.head.first(size))
    assert signal.logits is not None
    return replace(signal, logits=signal.logits[..., :size])


def _masked(ids: Tensor, size: int, *values: Tensor) -> tuple[Tensor, ...]:
    """Ids with -1, and values with -inf, at ids from `size` on."""
    beyond = ids >= size
    return ids.masked_fill(beyond, -1), *(x.masked_fill(beyond, -torch.inf) for x in values)


def _without_padding(known: SparseTeacher, size: int) -> SparseTeacher:
    beyond = (known.ids >= size).any(-1)
    ids, log_probs = _masked(known.ids, size, known.log_probs)
    log_probs = log_probs.masked_fill(ids < 0, -torch.inf)
    kept = torch.cat([log_probs, known.log_tail[..., None]], dim=-1).logsumexp(-1)
    # a sum that rounds to something else than 1 is no reason to change what loses no entry
    kept = torch.where(beyond, kept, 0.0)
    samples, powers = known.samples, known.powers
    if samples is not None:
        drawn, drawn_probs, log_weights = _masked(
            samples.ids, size, samples.log_probs, samples.log_weights
        )
        samples = samples._replace(
            ids=drawn, log_probs=drawn_probs - kept[..., None], log_weights=log_weights
        )
    if powers is not None:
        orders = torch.tensor(powers.orders, dtype=kept.dtype, device=kept.device)
        powers = powers._replace(log_sums=powers.log_sums - orders * kept[..., None])
    return known._replace(
        ids=ids,
        log_probs=log_probs - kept[..., None],
        log_tail=known.log_tail - kept,
        samples=samples,
        powers=powers,
    )
