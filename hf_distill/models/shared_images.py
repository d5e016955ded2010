"""The features of a batch's images, computed once where student and teacher are one model.

A self-teacher reads the images that the student reads. Where nothing that makes their features is
trained, both would compute the same.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]

FEATURES = "get_image_features"  # the method of Transformers' models
PLAIN = int | float | str | None  # arguments that are compared by their values


class SharedImages:
    """Keeps the image features of one step of a model.

    Args:
        lm: the student, without wrappers and adapters.

    Attributes:
        num_shared: how often features were used again.
    """

    def __init__(self, lm: nn.Module) -> None:
        inner = getattr(lm, "model", None)
        reads = isinstance(inner, nn.Module) and hasattr(inner, FEATURES)
        self._inner: Any = inner if reads else None
        self._decoder = cast(Any, lm).get_decoder() if reads else None
        self._own: Any = None  # the method, while another stands in its place
        self._known: tuple[Any, list[Any], Any] | None = None
        self.num_shared = 0

    @property
    def can_be_shared(self) -> bool:
        """Return whether the features are the same for student and teacher at each call."""
        if self._inner is None or self._decoder in (None, self._inner):
            return False
        decoder = set(self._decoder.modules())
        tower = [x for x in self._inner.modules() if x is not self._inner and x not in decoder]
        own = [*tower, self._inner]  # which may have a parameter behind rows of patches
        return not any(map(_is_random, tower)) and not any(
            p.requires_grad for x in own for p in x.parameters(recurse=False)
        )

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Inside the block the features of the images that were last seen are kept."""
        if self._own is not None or not self.can_be_shared:
            yield
            return
        inner, replaced = self._inner, vars(self._inner).get(FEATURES)
        self._own = getattr(inner, FEATURES)
        setattr(inner, FEATURES, self._asked)
        try:
            yield
        finally:
            self._known = self._own = None
            delattr(inner, FEATURES)
            if replaced is not None:
                setattr(inner, FEATURES, replaced)

    def _asked(self, *args: Any, **kwargs: Any) -> Any:
        given = [*args, *kwargs.values()]
        if not all(isinstance(x, Tensor | PLAIN) for x in given):
            return self._own(*args, **kwargs)
        key = tuple(map(_key, given)), tuple(kwargs), _autocast_dtype(given)
        if self._known is not None and self._known[0] == key:
            self.num_shared += 1
        else:  # what is given stays, so that no other has its id
            self._known = key, given, self._own(*args, **kwargs)
        return self._known[2]


def _is_random(module: nn.Module) -> bool:
    """Return whether adapters, or the mode of training, can change what a module says."""
    config = vars(getattr(module, "config", None) or object)
    drops = any("drop" in name and isinstance(x, float) and x > 0 for name, x in config.items())
    drops = drops or (isinstance(module, nn.Dropout) and module.p > 0)
    return drops or isinstance(module, BaseTunerLayer | _BatchNorm)


def _key(x: Any) -> Any:
    return (id(x), x._version) if isinstance(x, Tensor) else x


def _autocast_dtype(given: list[Any]) -> torch.dtype | None:
    kinds = {x.device.type for x in given if isinstance(x, Tensor)}
    on = [kind for kind in kinds if torch.is_autocast_enabled(kind)]
    return torch.get_autocast_dtype(on[0]) if on else None
