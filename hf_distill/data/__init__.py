"""Data: rows and batches, hints in them, and which of their tokens are scored."""

from hf_distill.data.batches import build_batch, pad, unpad
from hf_distill.data.contrast import Contrast
from hf_distill.data.cross_tokenizer_collator import CrossTokenizerCollator
from hf_distill.data.episodes import Attempt, Episode
from hf_distill.data.hint_collator import HintCollator
from hf_distill.data.hint_masking import HintMasking
from hf_distill.data.hints import Hint
from hf_distill.data.sides import Side, student_side, teacher_side
from hf_distill.data.span_collator import SpanCollator
from hf_distill.data.token_weights import TokenWeightsConfig

__all__ = [
    "Attempt",
    "Contrast",
    "CrossTokenizerCollator",
    "Episode",
    "Hint",
    "HintCollator",
    "HintMasking",
    "Side",
    "SpanCollator",
    "TokenWeightsConfig",
    "build_batch",
    "pad",
    "student_side",
    "teacher_side",
    "unpad",
]
