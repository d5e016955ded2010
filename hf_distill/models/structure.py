"""What a Transformers model is: without its wrappers, its kind, head and vocabulary."""

import logging
import weakref
from collections.abc import Iterable
from enum import StrEnum
from typing import Any, cast

import torch
from accelerate.utils import extract_model_from_parallel
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

logger = logging.getLogger(__name__)


_inside: weakref.WeakKeyDictionary[nn.Module, weakref.ref[nn.Module]] = weakref.WeakKeyDictionary()


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model without its parallel wrapper; adapters stay."""
    # a step asks many times, and looking for compiled regions visits every module
    known = _inside.get(model)
    bare = None if known is None else known()
    if bare is None:
        bare = extract_model_from_parallel(model)
        _inside[model] = weakref.ref(bare)
    return bare


def as_called(model: nn.Module) -> nn.Module:
    """Return the model as it must be called: FSDP 1 joins its root's pieces in the wrapper only."""
    return model if isinstance(model, FullyShardedDataParallel) else unwrap(model)


def causal_lm(model: nn.Module) -> nn.Module:
    """Return the Transformers model itself, without parallel wrapper and PEFT wrapper."""
    model = unwrap(model)
    return model.get_base_model() if isinstance(model, PeftModel) else model


def is_sharded(model: nn.Module) -> bool:
    """Return whether processes hold parameters in pieces (FSDP 1 and 2, DeepSpeed ZeRO-3)."""
    wrapped = any(isinstance(m, FSDPModule | FullyShardedDataParallel) for m in model.modules())
    return wrapped or any(hasattr(p, "ds_id") for p in model.parameters())


def in_pieces(weight: Tensor) -> bool:
    """Return whether a tensor lies in pieces on several processes."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor  # noqa: PLC0415 - slow, and seldom used

    return isinstance(weight, DTensor)


def output_head(lm: nn.Module) -> Any:
    """Return the model's output embeddings, a module, or None."""
    getter = getattr(lm, "get_output_embeddings", None)
    return None if getter is None else getter()


def input_embeddings(lm: nn.Module) -> nn.Module | None:
    """Return the module that looks up the tokens' embeddings, or None if it is not known."""
    getter = getattr(lm, "get_input_embeddings", None)
    try:
        found = None if getter is None else getter()
    except NotImplementedError:  # Transformers finds them by their name
        return None
    return found if isinstance(found, nn.Module) else None


def vocab_size(lm: nn.Module) -> int | None:
    """Return the number of logits per position, or per row; None if the model does not say."""
    if kind_of(lm).has_classes:
        return cast(Any, lm.config).num_labels
    head = output_head(lm)
    if isinstance(head, nn.Linear):
        return head.out_features
    config = getattr(lm, "config", None)
    return None if config is None else getattr(config.get_text_config(), "vocab_size", None)


def generation_end_ids(lm: nn.Module) -> list[int]:
    """Return ids at which a model's generation config ends a completion: none, one or several."""
    ids = getattr(getattr(lm, "generation_config", None), "eos_token_id", None)
    if ids is None:
        return []
    return list(ids) if isinstance(ids, list | tuple) else [ids]


class Kind(StrEnum):
    """Says of what a model gives logits."""

    CAUSAL = "causal LM"  # of the next token, at each position
    ROWS = "sequence classifier"  # of the classes of a row
    MASKED = "masked LM"  # of the token at each position
    PLACES = "token classifier"  # of the classes of each position
    SEQ2SEQ = "sequence to sequence model"  # of the decoder's next token

    @property
    def has_classes(self) -> bool:
        """Return whether logits are of classes and not of tokens."""
        return self in (Kind.ROWS, Kind.PLACES)


NAMES = {  # how Transformers ends the names of their classes
    "ForSequenceClassification": Kind.ROWS,
    "ForMaskedLM": Kind.MASKED,
    "ForTokenClassification": Kind.PLACES,
}


def named_kind(names: Iterable[str]) -> Kind | None:
    """Return the kind that the first telling name of a model's classes says, or None."""
    found = (kind for name in names for end, kind in NAMES.items() if name.endswith(end))
    return next(found, None)


def kind_of(model: nn.Module) -> Kind:
    """Return the kind of a Transformers model, unwrapped; what is not known is a causal LM."""
    said = named_kind(cls.__name__ for cls in type(model).__mro__)
    if said is not None:
        return said
    config = getattr(model, "config", None)
    named = any(name in type(model).__name__ for name in _OTHERS)
    if getattr(config, "is_encoder_decoder", False) and not named:
        return Kind.SEQ2SEQ if output_head(model) is not None else Kind.CAUSAL
    return Kind.CAUSAL


def is_classifier(model: nn.Module) -> bool:
    """Return whether a Transformers model, unwrapped, gives one row of class logits per text."""
    return kind_of(model) == Kind.ROWS


# how names of classes begin or end whose loss is not that of the next token
_OTHERS = [
    name
    for name, loss in LOSS_MAPPING.items()
    if loss is not ForCausalLMLoss and name.startswith("For") and name not in NAMES
]


def check_kind(model: nn.Module, whose: str) -> None:
    """Check that a model is of a kind that can be distilled, as far as its class and config tell.

    Models of unknown kind pass: their class may have any name. What they compute is looked at with
    the first batch, see `models.causality`.

    Args:
        model: without wrappers.
        whose: "student" or "teacher", for errors.

    Raises:
        ValueError: its class is one of Transformers for another task, or it is an encoder-decoder
            without a head.
    """
    if kind_of(model) != Kind.CAUSAL:
        return
    name = type(model).__name__
    if any(other in name for other in _OTHERS):
        *most, last = Kind
        raise ValueError(f"the {whose} must be a {', a '.join(most)} or a {last}, got a {name}")
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"the {whose} must give logits, got an encoder-decoder without a head ({name})"
        )


def check_same_kind(student: nn.Module, teacher: nn.Module) -> None:
    """Check that student and teacher, unwrapped, are of one kind, and that it can be distilled.

    Raises:
        ValueError: they are not, or as `check_kind`.
    """
    check_kind(teacher, "teacher")
    kinds = [f"a {kind_of(x)} ({type(x).__name__})" for x in (student, teacher)]
    if kind_of(student) != kind_of(teacher):
        raise ValueError(
            f"student and teacher must be of one kind, got {kinds[0]} as student and {kinds[1]} as "
            "teacher"
        )


def check_classes(student: nn.Module, teacher: nn.Module) -> None:
    """Check that student and teacher, unwrapped, are both classifiers of the same classes.

    They are of rows, or of positions. Names are compared where both configs have some (not LABEL_0,
    LABEL_1, ...), in any case of letters. Other names only give a warning: they may be synonyms.

    Raises:
        ValueError: their numbers of classes differ, or a class that both name has another number;
            the message names both sides.
    """
    kinds = type(student).__name__, type(teacher).__name__
    mine, theirs = cast(Any, student.config), cast(Any, teacher.config)
    if mine.num_labels != theirs.num_labels:
        raise ValueError(
            f"student and teacher must have the same classes, got {mine.num_labels} for the "
            f"student ({kinds[0]}) and {theirs.num_labels} for the teacher ({kinds[1]})"
        )
    names, others = _class_names(mine), _class_names(theirs)
    if names and others and names != others:
        _check_order(names, others)
    sizes = [getattr(c.get_text_config(), "vocab_size", None) for c in (mine, theirs)]
    if None not in sizes and sizes[0] != sizes[1]:
        logger.warning(
            "student and teacher have vocabularies of %s and %s entries; both read the same token "
            "ids, so they need one tokenizer",
            *sizes,
        )


def _class_names(config: Any) -> list[str]:
    """Return the classes' names in order, or none if they are those that Transformers makes up."""
    names = [str(config.id2label.get(i)) for i in range(config.num_labels)]
    return [] if names == [f"LABEL_{i}" for i in range(len(names))] else names


def _check_order(names: list[str], others: list[str]) -> None:
    folded, of_other = ([name.casefold() for name in each] for each in (names, others))
    shared = set(folded) & set(of_other)
    if any(folded.index(name) != of_other.index(name) for name in shared):
        raise ValueError(
            "student and teacher must number their classes alike, got id2label "
            f"{names} for the student and {others} for the teacher"
        )
    if folded != of_other:
        logger.warning(
            "student and teacher name their classes differently: %s and %s; their numbers are "
            "taken to mean the same",
            names,
            others,
        )
