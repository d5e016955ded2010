"""What a model is without its wrappers."""

import gc
import weakref

from torch import nn

from hf_distill.models import structure
from hf_distill.models.structure import unwrap


def wrapped(model: nn.Module) -> nn.Module:
    return nn.DataParallel(model)


def test_a_wrapper_is_looked_through_once(monkeypatch):
    calls = []
    extract = structure.extract_model_from_parallel
    monkeypatch.setattr(
        structure, "extract_model_from_parallel", lambda model: calls.append(1) or extract(model)
    )
    model = nn.Linear(2, 2)
    wrapper = wrapped(model)
    assert all(unwrap(each) is model for each in (wrapper, model) * 3)
    assert len(calls) == 2, "one look at each of the two objects"


def test_what_was_unwrapped_is_not_kept_alive():
    model = nn.Linear(2, 2)
    wrapper = wrapped(model)
    assert unwrap(wrapper) is unwrap(model) is model
    seen = weakref.ref(model)
    del model, wrapper
    gc.collect()
    assert seen() is None


def test_another_model_at_the_same_place_is_itself():
    for _ in range(3):
        model = nn.Linear(2, 2)
        assert unwrap(model) is model
        assert unwrap(wrapped(model)) is model
