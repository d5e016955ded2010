"""A cache of a teacher with another tokenizer."""

from pathlib import Path
from typing import Any

import pytest

from hf_distill import CrossTokenizerCollator, RoutedTeacher
from hf_distill.cache import CachedTeacher, Full, TokenizerMismatch, cache_teacher
from tests.hf_distill.trainers import models
from tests.hf_distill.trainers.letters import reader
from tests.hf_distill.trainers.test_cross_tokenizer import LETTERS, WORDS, distil


@pytest.mark.parametrize("is_routed", [False, True])
def test_a_cache_was_written_with_the_teachers_own_tokenizer(
    tmp_path: Path, is_routed: bool
) -> None:
    """A teacher by name has its tokenizer beside it, and the cache remembers which it was."""
    folder, path = str(tmp_path / "teacher"), tmp_path / "cache"
    reader().save_pretrained(folder)
    LETTERS.save_pretrained(folder)
    collator = CrossTokenizerCollator(WORDS, LETTERS)
    rows = models.problems()
    cache_teacher(folder, rows, path, codec=Full(), data_collator=collator)
    taught_by: Any = CachedTeacher(path)
    if is_routed:
        rows = [row | {"which": "one"} for row in rows]
        taught_by = RoutedTeacher({"one": taught_by}, "which")
    distil(tmp_path, None, taught_by, collator=collator, data=rows).train()
    with pytest.raises(TokenizerMismatch, match="tokenizer's sha256"):
        distil(tmp_path, None, CachedTeacher(path), collator=CrossTokenizerCollator(WORDS, WORDS))
