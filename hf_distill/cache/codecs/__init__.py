"""Codecs: what is stored of a teacher's distribution."""

from collections.abc import Mapping
from typing import Any

from hf_distill.cache.codecs.full import Full
from hf_distill.cache.codecs.head_samples import HeadSamples
from hf_distill.cache.codecs.hidden_states import HiddenStates
from hf_distill.cache.codecs.protocol import Arrays, Codec
from hf_distill.cache.codecs.sampled import Sampled
from hf_distill.cache.codecs.topk import TopK

__all__ = [
    "CODECS",
    "Arrays",
    "Codec",
    "Full",
    "HeadSamples",
    "HiddenStates",
    "Sampled",
    "TopK",
    "make_codec",
]

CODECS: dict[str, type[Codec]] = {
    c.name: c for c in (HeadSamples, TopK, Sampled, Full, HiddenStates)
}


def make_codec(name: str, settings: Mapping[str, Any] | None = None) -> Codec:
    """Build the codec of that name.

    Args:
        name: "head_samples", "topk", "sampled", "full" or "hidden_states".
        settings: its arguments, as `Codec.settings` gives them; those left out have their default.

    Raises:
        ValueError: the name or a setting is unknown, or a value is out of range.
    """
    if name not in CODECS:
        raise ValueError(f"codec must be one of {tuple(CODECS)}, got {name!r}")
    known = CODECS[name]().settings()
    unknown = sorted(set(settings or {}) - set(known))
    if unknown:
        raise ValueError(f"settings of {name} must be among {sorted(known)}, got {unknown}")
    return CODECS[name](**(settings or {}))
