"""Offline distillation: a teacher's answers on disk, and a teacher that reads them."""

from hf_distill.cache.arrays import ArrayLogProbs
from hf_distill.cache.codecs import (
    Codec,
    Full,
    HeadSamples,
    HiddenStates,
    Sampled,
    TopK,
    make_codec,
)
from hf_distill.cache.datasets import default_collator, load_data
from hf_distill.cache.distillkit import DistillKitLogProbs
from hf_distill.cache.errors import (
    CacheConfigMismatch,
    CacheCorrupt,
    CacheError,
    CacheIncomplete,
    FormatVersionError,
    RowMismatch,
    TeacherMismatch,
    TemperatureOutOfRange,
    TokenizerMismatch,
    UnsupportedDivergence,
    VocabSizeMismatch,
)
from hf_distill.cache.from_log_probs import LogProbs, cache_log_probs
from hf_distill.cache.manifest import Manifest
from hf_distill.cache.reader import CacheReader
from hf_distill.cache.recorded import RecordedLogProbs
from hf_distill.cache.teacher import CachedCollator, CachedTeacher
from hf_distill.cache.writer import cache_teacher

__all__ = [
    "ArrayLogProbs",
    "CacheConfigMismatch",
    "CacheCorrupt",
    "CacheError",
    "CacheIncomplete",
    "CacheReader",
    "CachedCollator",
    "CachedTeacher",
    "Codec",
    "DistillKitLogProbs",
    "FormatVersionError",
    "Full",
    "HeadSamples",
    "HiddenStates",
    "LogProbs",
    "Manifest",
    "RecordedLogProbs",
    "RowMismatch",
    "Sampled",
    "TeacherMismatch",
    "TemperatureOutOfRange",
    "TokenizerMismatch",
    "TopK",
    "UnsupportedDivergence",
    "VocabSizeMismatch",
    "cache_log_probs",
    "cache_teacher",
    "default_collator",
    "load_data",
    "make_codec",
]
