"""Whether a model's outputs are those of a causal LM: one for each token, of nothing after it.

Some tokens are exchanged. Outputs before them must not move; where they do, that may still be
rounding (experts that get other tokens, scales of quantized activations), and the gradient tells:
it is exactly zero through what a model does not read. Outputs that stand before those of the text
(of virtual tokens, which adapters put there) are counted on the way.

Shapes: B rows, T positions of the text, V vocabulary.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_distill.models.modes import evaluating, kept_rng, replaced_forward
from hf_distill.models.probe_rows import ProbeRow
from hf_distill.models.structure import causal_lm, input_embeddings, output_head

LEAK = 1e-5  # of a gradient; convolutions by Fourier transforms have some 1e-7 of rounding
STEP = 0.02  # of the embeddings, along the gradient
MOVE = 0.2  # of that of the exchanged token, where no gradient tells it from experts' rounding


def _name(model: nn.Module) -> str:
    return type(causal_lm(model)).__name__


@contextmanager
def narrow_head(lm: nn.Module, is_narrow: bool) -> Iterator[None]:
    """Let the head pass on its input, which is smaller than logits of a whole batch."""
    head = output_head(lm)
    if not is_narrow or not isinstance(head, nn.Module):
        yield
        return
    with replaced_forward(head, lambda hidden, *_, **__: hidden):
        yield


def logits_of(model: nn.Module, row: ProbeRow, inputs: Mapping[str, Any], whose: str) -> Tensor:
    """Return logits [B, front + T, V], in eval mode; if it samples, each call has the same noise.

    Raises:
        ValueError: the model gives no logits, or fewer than tokens.
    """
    lm, ids = causal_lm(model), row.ids
    with evaluating(model), kept_rng(ids.device), narrow_head(lm, not row.is_cut):
        torch.manual_seed(0)
        outputs = model(**inputs)
    logits = getattr(outputs, "logits", None)
    if not isinstance(logits, Tensor):
        raise ValueError(
            f"the {whose} must give logits of the next token, a {_name(model)} returns a "
            f"{type(outputs).__name__} without: load a model with its head "
            "(AutoModelForCausalLM, not AutoModel), and leave return_dict at True; models of "
            "sentence embeddings are trained by sentence-transformers' SentenceTransformerTrainer"
        )
    if logits.ndim < 3 or logits.shape[1] < ids.shape[1]:
        raise ValueError(
            f"the {whose} must give logits for each of a row's tokens, a {_name(model)} gives "
            f"{list(logits.shape)} for ids of {list(ids.shape)}"
        )
    return logits


def _exchange(row: ProbeRow, scored: Tensor | None) -> tuple[int, int, Tensor] | None:
    """Return row and position of the first token to exchange, and the ids with others in place."""
    ids = row.ids
    if row.is_cut:
        places = [(0, ids.shape[1] // 2)] if ids.shape[1] > 1 else []
    elif scored is None or ids.ndim != 2:
        places = []
    else:  # text for sure: what stands for an image is no label
        places = [(int(r), int(t) + 1) for r, t in scored[:, :-1].nonzero()[-1:]]
    if not places:
        return None
    at, position = places[0]
    others = ids[0] if row.is_cut or scored is None else ids[:, 1:][scored[:, :-1]]
    different = others[others != ids[at, position]]
    changed = ids.clone()
    end = ids.shape[1] if row.is_cut else position + 1
    other = different[0] if len(different) else (ids[at, position] - 1).abs()
    changed[at, position:end] = other
    return at, position, changed


def _moved(one: Tensor, other: Tensor) -> Tensor:
    """Return [T]: the largest move of each position's logits [T, V]; no number is no move."""
    return (one.float() - other.float()).abs().nan_to_num(0, 0, 0).flatten(1).amax(-1)


def _reads(model: nn.Module, row: ProbeRow, at: int, position: int, end: int) -> bool | None:
    """Return whether the gradient of outputs before `end` reaches tokens from `position` on.

    It returns None if the gradient of the tokens' embeddings is not known.
    """
    embeddings = input_embeddings(causal_lm(model))
    if embeddings is None:
        return None
    seen: list[Tensor] = []

    def total(change: Tensor | None = None) -> Tensor:
        """Return [] a weighted sum of the outputs before the end, embeddings moved by `change`."""
        seen.clear()

        def follow(_: Any, __: Any, output: Tensor) -> Tensor:
            moved = output if change is None else output + change
            seen.append(moved.detach().requires_grad_())
            return seen[-1]

        hook = embeddings.register_forward_hook(follow)
        try:
            logits = logits_of(model, row, row.inputs, "model")[at, :end].double()
        finally:
            hook.remove()
        generator = torch.Generator().manual_seed(0)
        return (logits * torch.randn(logits.shape, generator=generator).to(logits)).sum()

    with torch.enable_grad():
        here = total()
    if len(seen) != 1 or not here.requires_grad:
        return None
    (gradient,) = torch.autograd.grad(here, seen, allow_unused=True)
    is_time_first = gradient is not None and gradient.shape[:2] == row.ids.T.shape != row.ids.shape
    if gradient is None or not (is_time_first or gradient.shape[:2] == row.ids.shape):
        return None
    of_row = gradient.transpose(0, 1)[at] if is_time_first else gradient[at]
    sizes = of_row.float().abs().amax(-1)
    if not bool(sizes[position:].min() > LEAK * sizes[:position].max()):
        return False
    if any(p.dtype.itemsize < 4 for p in model.parameters()):
        return True  # a small change would drown in the rounding
    # what is rounded by a scale that tokens share moves in jumps, which the gradient does not tell
    change = torch.zeros_like(gradient)
    later = (change.transpose(0, 1) if is_time_first else change)[at, position:]
    later += STEP * seen[0].float().std() * of_row[position:].float().sign()
    told = float((gradient.double() * change.double()).sum())
    return abs(float(total(change) - here) - told) < abs(told) / 2


@torch.no_grad()
def find_front(
    model: nn.Module,
    row: ProbeRow,
    whose: str,
    scored: Tensor | None = None,
    sharded: bool = False,
) -> tuple[int, bool]:
    """Find how many outputs stand before that of a row's first token: those of virtual tokens.

    Args:
        model: with its adapters; without parallel wrapper unless its parameters lie in pieces.
        row: of a batch.
        whose: "student" or "teacher", for errors.
        scored: [B, T] bool, outputs that predict scored tokens; needed where the row is not cut.
        sharded: whether the parameters lie in pieces, so that processes must call it together.

    Returns:
        The number; and whether it is known that the model is causal: rows may have too few tokens.

    Raises:
        ValueError: the model gives no logits for each token, or some that depend on later tokens.
    """
    before = logits_of(model, row, row.inputs, whose)
    front = before.shape[1] - row.ids.shape[1]
    chosen = _exchange(row, scored)
    if chosen is None and not sharded:
        return front, False
    at, position, ids = chosen or (0, 0, row.ids)  # all processes call it as often
    after = logits_of(model, row, {**row.inputs, "input_ids": ids}, whose)
    moved, own = _moved(before[at], after[at]), front + position
    early = float(moved[:own].max()) if own else 0.0
    if early == 0.0:
        return front, True
    reads = early > MOVE * float(moved[own])
    told = None if sharded else _reads(model, row, at, position, own)
    # a large move that no gradient tells is of experts that dropped a token, say
    reads = reads if told is None else told
    if reads:
        raise ValueError(
            f"the {whose} must predict each token from those before it, but a {_name(model)}'s "
            f"logits before token {position} move by {early:.2g} when that token changes (its own "
            f"by {float(moved[own]):.2g}): it reads later tokens, as masked LMs and decoders with "
            "is_decoder=False do, and would be shown what it is to predict"
        )
    return front, True
