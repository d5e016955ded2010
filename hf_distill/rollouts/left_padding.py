"""Which prompts may share a call of `generate`, so that each is continued as it is alone.

And whether a row may leave the call when its completion has ended, see `rollouts.decoding`.

It is tried out once for each model, on the logits of a few tokens: of a prompt that is padded on
the left, of the prompt alone, and of the forward that training runs. Where padding changes them,
prompts of one length share a call, and nothing is padded.

Shapes: B prompts of a call, T columns, V vocabulary.
"""

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    StoppingCriteriaList,
)

from hf_distill.models.position_trials import LENIENT, MOST_NOISE, PADDING, ROW, Said, Trial
from hf_distill.models.positions import positions_of
from hf_distill.models.structure import causal_lm, is_sharded
from hf_distill.rollouts.decoding import decode, leaving_refusal

logger = logging.getLogger(__name__)

NEW = 3  # tokens that are compared


ANY, OF_ONE_LENGTH, NONE = "any", "of one length", "none"


class LeftPadding(NamedTuple):
    """Says what is known of a model's `generate`.

    Attributes:
        share: which prompts may share a call: any, padded on the left; those of one length; none.
        first: the position of a row's first token, where `generate`, which counts from 0, must be
            told.
        limit: tokens that the model has learnt positions for, or None.
        stays: why a row that has ended must stay in its call, or None if it may leave.
    """

    share: str = ANY
    first: int = 0
    limit: int | None = None
    stays: str | None = None

    def with_images(self) -> "LeftPadding":
        """Return what holds beside images, of which a model may keep more than its cache."""
        return self._replace(stays="the model may keep more of images than its cache")

    def arguments(self, mask: Tensor) -> dict[str, Tensor]:
        """Return what `generate` is given besides ids and mask [B, T]."""
        if self.first == 0:
            return {}
        return {"position_ids": (mask.cumsum(-1) - 1).clamp_min(0) + self.first}

    def sharing(self, longest: int, wanted: int) -> str:
        """Return which prompts may share a call, lest a long one cut a short one's reply."""
        short = self.limit is not None and longest + wanted > self.limit
        return OF_ONE_LENGTH if short and self.share == ANY else self.share

    def new_tokens(self, wanted: int, width: int) -> int:
        """Return how many tokens can be sampled behind a prompt; the last is read by nobody."""
        return wanted if self.limit is None else max(1, min(wanted, self.limit - width + 1))


_KNOWN: WeakKeyDictionary[nn.Module, LeftPadding] = WeakKeyDictionary()


@torch.no_grad()
def left_padding(
    lm: nn.Module, prompts: Sequence[Sequence[int]], pad_token_id: int, device: torch.device
) -> LeftPadding:
    """Try out, at the first call, what a model that is ready to sample does.

    Args:
        lm: with its adapters, in eval mode, without a generation config of its own.
        prompts: of the first call; one of them is tried.
        pad_token_id: of the padding.
        device: of the model.

    Raises:
        ValueError: a prompt is longer than the learnt positions.
    """
    if not isinstance(causal_lm(lm), GenerationMixin):
        return LeftPadding()
    row = max(prompts, key=len, default=[])
    ids = torch.tensor([row if len(row) > 1 else [*row, 1, 2]], device=device)
    positions = positions_of(lm)
    positions.arguments(lm, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, "student")
    if lm not in _KNOWN:
        length = ROW if positions.limit is None else min(ROW, max(1, positions.limit // 4))
        plain = LeftPadding(ANY, positions.first, positions.limit)
        tried = _Generated(lm, ids[:, :length], pad_token_id, plain)
        _KNOWN[lm] = plain._replace(share=tried.share(), stays=tried.stays())
    return _KNOWN[lm]


class _Generated:
    """Continues a prompt [1, n] with a model, in several surroundings."""

    def __init__(self, lm: Any, ids: Tensor, pad_token_id: int, plain: LeftPadding) -> None:
        self.lm, self.ids, self.pad_token_id, self.plain = lm, ids, pad_token_id, plain
        self.kind = type(causal_lm(lm)).__name__
        self.tokens, alone = self.continued(ids, 0)
        whole = torch.cat([ids, self.tokens[None, :-1]], dim=1)
        self.truth = Trial(lm, causal_lm(lm), "input_ids", whole).read()
        self.truth.logits = self.truth.logits[-NEW:]
        self.limit = max(LENIENT, 8 * self.truth.eps)
        found = self.apart(self.tokens, alone)
        if found > self.limit:
            logger.warning(
                "rollouts: by `generate` the logits of a %s are %.1g of the largest one from those "
                "of its forward: completions are not quite the student's own",
                self.kind,
                found,
            )
        self.limit = max(self.limit, 4 * found if found <= MOST_NOISE else 0.0)

    def share(self) -> str:
        """Return which prompts may share a call."""
        other = self.ids.flip(1)
        columns = min(PADDING, self.ids.shape[1])
        fill = torch.full_like(self.ids[:, :columns], self.pad_token_id)
        longer = torch.cat([other[:, :columns], other], dim=1)
        padded = torch.cat([torch.cat([fill, self.ids], dim=1), longer])
        found = self.apart(*self.continued(padded, columns))
        if found <= self.limit and not is_sharded(self.lm):
            return ANY
        # where parameters are sharded all processes try the same, whatever they find
        beside = self.apart(*self.continued(torch.cat([self.ids, other]), 0))
        if found <= self.limit:
            return ANY
        share = OF_ONE_LENGTH if beside <= self.limit else NONE
        logger.info(
            "rollouts: prompts that share a call: %s, because a %s does not continue a prompt that "
            "is padded on the left as it does alone (%.1g of the largest logit apart; beside one "
            "of its length %.1g)",
            share,
            self.kind,
            found,
            beside,
        )
        return share

    def stays(self) -> str | None:
        """Return why a row that has ended must stay beside this one, or None if it may leave."""
        reason = leaving_refusal(self.lm, GenerationConfig())
        if reason is not None:
            return reason
        both = torch.cat([self.ids.flip(1), self.ids])
        seen: list[Tensor] = []

        def note(ids: Tensor, scores: Tensor) -> Tensor:
            seen.append(scores[1].clone())
            return scores

        def first_ends(ids: Tensor, scores: Any) -> Tensor:
            return torch.arange(2, device=ids.device) == 0

        try:
            made = self.lm.generate(
                input_ids=both,
                attention_mask=torch.ones_like(both),
                generation_config=self._greedy(),
                custom_generate=decode,
                logits_processor=LogitsProcessorList([note]),
                stopping_criteria=StoppingCriteriaList([first_ends]),
                **self.plain.arguments(torch.ones_like(both)),
            )
        except Exception as error:  # whatever a cache of another kind raises
            return f"without one of its rows the model raises {type(error).__name__}: {error}"
        found = self.apart(made[1, both.shape[1] :], torch.stack(seen).float())
        if found <= self.limit:
            return None
        return f"a row's logits are {found:.1g} of the largest apart once another has left"

    def _greedy(self) -> GenerationConfig:
        return GenerationConfig(
            max_new_tokens=NEW, do_sample=False, pad_token_id=self.pad_token_id, use_cache=True
        )

    def apart(self, tokens: Tensor, logits: Tensor) -> float:
        """Return how far logits [n, V] are from the forward's, while the tokens are the same."""
        same = 1 + int((tokens == self.tokens)[:-1].int().cumprod(0).sum())
        truth = Said(self.truth.logits[:same], [], 0.0)
        return Said(logits[:same], [], 0.0).apart(truth)

    def continued(self, ids: Tensor, padding: int) -> tuple[Tensor, Tensor]:
        """Return the most probable tokens [n] behind the first row, and their logits [n, V].

        Args:
            ids: [B, T].
            padding: columns of it in the first row.
        """
        mask = torch.ones_like(ids)
        mask[0, :padding] = 0
        config = self._greedy()
        config.update(output_logits=True, return_dict_in_generate=True)
        told = self.plain.arguments(mask)
        made = self.lm.generate(
            input_ids=ids, attention_mask=mask, generation_config=config, **told
        )
        logits = torch.stack([each[0] for each in made.logits])
        return made.sequences[0, ids.shape[1] :], logits.float()
