"""Which tokens end a reply: the tokenizer's, the model's, and what a chat template writes."""

import copy
import logging
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, cast

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from hf_distill.data.hints import Messages

logger = logging.getLogger(__name__)

STAND_IN = "stand-in-for-a-reply"
OPENING: Messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": STAND_IN}]
NEXT_TURN = {"role": "user", "content": "x"}


@dataclass(frozen=True)
class TurnEnds:
    """Holds the tokens that end replies.

    Attributes:
        ids: every one, the tokenizer's first.
        turn: the one that ends a reply of a dialogue, or None.
        opens_next: whether it is the first token of the user's next turn, so that the template
            writes it behind a reply only if something follows (GLM).
        text: what the template writes behind a reply whether or not another turn follows, if it
            ends replies with no token; None if it does, or if there is no template.
    """

    ids: tuple[int, ...] = ()
    turn: int | None = None
    opens_next: bool = False
    text: str | None = None

    @property
    def of_text(self) -> int | None:
        """Return the one that ends a completion of a text that is no chat, or None."""
        return self.ids[0] if self.ids else None

    @property
    def closing(self) -> int | None:
        """Return the one that a row gets behind its last reply where the template writes none."""
        if self.opens_next:
            return self.turn
        return None if self.text is None else self.of_text

    def end_of(self, reply: Sequence[int]) -> int | None:
        """Return where the reply at the beginning of some ids ends, end token included, or None.

        What a template writes behind the end token belongs to the next context. Content that holds
        such a token keeps it: the last one counts.
        """
        wanted = [self.turn] if self.turn in reply else self.ids
        found = [i for i, token in enumerate(reply) if token in wanted]
        return found[-1] + 1 if found else None


def tell_end_tokens(collator: Any, ids: Sequence[int]) -> Any:
    """Return a collator that knows, itself or inside, at which ids the student ends replies.

    It is logged where replies then have no end, see `warnings_of`.

    Args:
        collator: a `HintCollator`, one around it as its attribute `collator`, or any other, which
            stays as it is.
        ids: of the generation config.
    """
    if hasattr(collator, "with_end_tokens"):
        told = collator.with_end_tokens(ids)
        for text in told.end_warnings() if hasattr(told, "end_warnings") else ():
            logger.warning(text)
        return told
    inner = getattr(collator, "collator", None)
    told = None if inner is None else tell_end_tokens(inner, ids)
    if told is inner:
        return collator
    outer = copy.copy(collator)
    outer.collator = told
    return outer


def find_turn_ends(
    tokenizer: PreTrainedTokenizerBase,
    template_kwargs: Mapping[str, Any],
    told: Sequence[int] = (),
) -> TurnEnds:
    """Find the tokens that end a reply.

    The end of a turn is looked for in what the chat template writes behind a reply, whether or not
    another turn follows: a known end token (Llama 3, ChatML), else the last special token there
    (Gemma, Phi). If there is none, a known end token is looked for in what it writes behind the
    last reply only, and then in what it writes in front of the next turn.

    Args:
        tokenizer: with or without a chat template.
        template_kwargs: arguments of the template.
        told: end tokens of the model, as its generation config names them.
    """
    eos = cast("int | None", tokenizer.eos_token_id)
    known = tuple(dict.fromkeys(x for x in (eos, *told) if x is not None))
    last = _behind_reply(tokenizer, template_kwargs, [])
    if last is None:
        return TurnEnds(known, eos)
    followed = _behind_reply(tokenizer, template_kwargs, [NEXT_TURN]) or last
    common = _common_start(last, followed)

    def ids(text: str) -> list[int]:
        return cast(list[int], tokenizer(text, add_special_tokens=False)["input_ids"])

    always = ids(common)
    special = special_ids(tokenizer)
    for found, opens_next in (
        ([x for x in always if x in known][:1], False),
        ([x for x in always if x in special][-1:], False),
        ([x for x in ids(last) if x in known][:1], False),
        ([x for x in ids(followed) if x in known][:1], True),
    ):
        if found:
            return TurnEnds(tuple(dict.fromkeys((*known, *found))), found[0], opens_next)
    return TurnEnds(known, text=common)


def checked_ids(ids: Any) -> tuple[int, ...]:
    """Return token ids as a tuple.

    Args:
        ids: one or several.

    Raises:
        ValueError: they are none.
    """
    is_one = isinstance(ids, str | bytes) or not isinstance(ids, Iterable)
    several: Iterable[Any] = [ids] if is_one else ids
    try:
        return tuple(map(operator.index, several))
    except TypeError as error:
        raise ValueError(
            f"end tokens must be the id of a token, or a sequence of ids, got {ids!r}"
        ) from error


def warnings_of(ends: TurnEnds, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return what to tell of replies that nothing ends, or that a template ends with no token."""
    if not ends.ids:
        return [
            f"no end token is known: the tokenizer, a {type(tokenizer).__name__}, has no eos_token,"
            " its chat template writes none, and the model's generation config names none. "
            "Completions of the data get no end, and sampled ones go on to the most tokens "
            "allowed: set tokenizer.eos_token or model.generation_config.eos_token_id, or give the "
            "collator as HintCollator(...).with_end_tokens(token_id)"
        ]
    if ends.text is None:
        return []
    return [
        f"the chat template ends replies with the text {ends.text!r} and no end token: sampling "
        f"ends at {tokenizer.convert_ids_to_tokens(list(ends.ids))} only, and a completion of the "
        "data gets the first of them behind its last reply"
    ]


def _behind_reply(
    tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any], more: Messages
) -> str | None:
    """Return what the template writes behind a reply's content; None if it says nothing of that."""
    if tokenizer.chat_template is None and "chat_template" not in template_kwargs:
        return None
    try:
        text = tokenizer.apply_chat_template(
            [*OPENING, *more], tokenize=False, **dict(template_kwargs)
        )
    except TemplateError:  # a template of other dialogues than this one
        return None
    _, found, behind = str(text).partition(STAND_IN)
    return behind if found else None


def _common_start(one: str, other: str) -> str:
    same = takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return "".join(character for character, _ in same)


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the ids of all special tokens."""
    added = cast(Mapping[int, Any], getattr(tokenizer, "added_tokens_decoder", {}))
    return {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}
