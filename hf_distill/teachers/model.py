"""A teacher that is another model."""

import inspect
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils.hub import has_file
from transformers.utils.import_utils import is_bitsandbytes_available
from transformers.utils.peft_utils import find_adapter_config_file

from hf_distill.data.sides import Side
from hf_distill.models.forward import Reader
from hf_distill.models.layers import LayerWatcher
from hf_distill.models.modes import evaluating_each
from hf_distill.models.precision import follows_autocast, stored
from hf_distill.models.signals import Signal
from hf_distill.models.structure import (
    Kind,
    causal_lm,
    check_classes,
    check_same_kind,
    named_kind,
    vocab_size,
)
from hf_distill.run import Run
from hf_distill.teachers.base import Teacher
from hf_distill.teachers.model_in_pieces import cut_by_engine
from hf_distill.teachers.self_teacher import SELF_TEACHERS
from hf_distill.teachers.sharing import check_sharing, freeze

logger = logging.getLogger(__name__)

QUANTIZATIONS = ("8bit", "4bit")


def _dtype(value: str | torch.dtype) -> torch.dtype:
    dtype = getattr(torch, value, None) if isinstance(value, str) else value
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(
            f"dtype must be a floating-point dtype of torch or its name, got {value!r}"
        )
    return dtype


def _quantization_config(quantization: str, dtype: torch.dtype | None) -> BitsAndBytesConfig:
    if quantization not in QUANTIZATIONS:
        raise ValueError(f"quantization must be one of {QUANTIZATIONS}, got {quantization!r}")
    if not is_bitsandbytes_available():
        raise ImportError(
            f"quantization {quantization!r} needs the package bitsandbytes: "
            "pip install bitsandbytes"
        )
    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    # products in float32, the default of the config, would cost more than quantization saves
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=dtype or torch.bfloat16)


LOADERS: Mapping[Kind, Any] = {
    Kind.CAUSAL: AutoModelForCausalLM,
    Kind.ROWS: AutoModelForSequenceClassification,
    Kind.MASKED: AutoModelForMaskedLM,
    Kind.PLACES: AutoModelForTokenClassification,
    Kind.SEQ2SEQ: AutoModelForSeq2SeqLM,
}


def _named_kind(name: str, kwargs: dict[str, Any]) -> Kind:
    """Return the kind of model that what `from_pretrained` takes says."""
    config = kwargs.get("config")
    if config is None:
        where = ("cache_dir", "force_download", "token", "revision", "local_files_only")
        where = {key: kwargs[key] for key in where if key in kwargs}
        if find_adapter_config_file(name, subfolder=kwargs.get("subfolder", ""), **where):
            return Kind.CAUSAL  # the folder holds adapters, and no config of the model
        try:
            config, _ = AutoConfig.from_pretrained(name, return_unused_kwargs=True, **kwargs)
        except OSError:
            return Kind.CAUSAL  # loading the model will say what is missing
    said = named_kind(getattr(config, "architectures", None) or ())
    if said is not None:
        return said
    return Kind.SEQ2SEQ if getattr(config, "is_encoder_decoder", False) else Kind.CAUSAL


def _loaded_classifier(loader: Any, name: str, arguments: dict[str, Any]) -> nn.Module:
    model, report = loader.from_pretrained(name, output_loading_info=True, **arguments)
    missing = sorted(report["missing_keys"]) + sorted(map(str, report["mismatched_keys"]))
    if missing:
        raise ValueError(
            f"a teacher must be trained, but {name!r} has no weights for {missing[0]!r} "
            f"({len(missing)} such)"
        )
    return model


def _loaded(
    name: str, dtype: str | torch.dtype | None, quantization: str | None, kwargs: dict[str, Any]
) -> nn.Module:
    arguments = dict(kwargs)
    if dtype is not None:
        arguments["dtype"] = dtype = _dtype(dtype)
    if quantization is not None:
        arguments["quantization_config"] = _quantization_config(quantization, dtype)
    kind = _named_kind(name, kwargs)
    if kind.has_classes:
        return _loaded_classifier(LOADERS[kind], name, arguments)
    return LOADERS[kind].from_pretrained(name, **arguments)


def place_model(model: nn.Module, device: torch.device) -> None:
    """Move a model to a device, unless it was loaded onto one, or quantized there."""
    placed = getattr(model, "hf_device_map", None) or getattr(model, "is_quantized", False)
    if not placed:
        model.to(device)


WHERE = ("revision", "cache_dir", "local_files_only", "token")  # of a repository's files


def _tokenizer(name: str, kwargs: dict[str, Any]) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer that lies beside a model, or None."""
    where = {key: kwargs[key] for key in WHERE if key in kwargs}
    folder = kwargs.get("subfolder") or ""
    # without its files some classes come out with a handful of ids instead of an error
    if not has_file(name, os.path.join(folder, "tokenizer_config.json"), **where):
        return None
    more = {key: kwargs[key] for key in ("subfolder", "trust_remote_code") if key in kwargs}
    try:
        return AutoTokenizer.from_pretrained(name, **where, **more)
    except (ImportError, OSError, ValueError) as error:
        logger.warning("teacher %s: its tokenizer cannot be loaded: %s", name, error)
        return None


class ModelTeacher(Teacher):
    """Asks another causal LM or classifier, frozen. Its dtype need not be the student's.

    A trainer freezes it, but for modules and frozen parameters that it has in common with the
    student. Parameters that the student trains must not be among them.

    With `bf16` or `fp16` in the training arguments it computes under the student's autocast if it
    is stored in float32, or as the student is; one in 16 bits or quantized computes as it is.

    Args:
        model: a model, or what `AutoModelForCausalLM.from_pretrained` takes. A name is loaded by
            the class of the kind that its config says: `AutoModelForSequenceClassification`,
            `AutoModelForMaskedLM`, `AutoModelForTokenClassification` or `AutoModelForSeq2SeqLM`.
        dtype: the dtype in which a name is loaded, such as "bfloat16". None leaves it to
            `from_pretrained`.
        quantization: "8bit" or "4bit" quantizes a name's weights with bitsandbytes. None does not
            quantize them.
        tokenizer: the tokenizer of the model, which is compared with the student's. If it is None,
            the one beside a name's weights is used, and that of a model object is not known.
        **from_pretrained_kwargs: more arguments of `from_pretrained` for a name.

    Raises:
        ValueError: dtype or quantization is unknown, or one of the arguments for names is given
            with a model, which is taken as it is; or a classifier lacks some of its weights.
        ImportError: quantization needs bitsandbytes, which is not installed.
    """

    def __init__(
        self,
        model: nn.Module | str,
        dtype: str | torch.dtype | None = None,
        quantization: str | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **from_pretrained_kwargs: Any,
    ) -> None:
        self._tokenizer, self._beside = tokenizer, None
        self._common: list[nn.Module] = []  # modules that are the student's too
        self.is_asked_together = True  # by all processes, so that it may lie in pieces
        if isinstance(model, str):
            self._beside = (model, from_pretrained_kwargs)
            model = _loaded(model, dtype, quantization, from_pretrained_kwargs)
            model.eval().requires_grad_(False)
        else:
            given = {"dtype": dtype, "quantization": quantization}
            given = [k for k, v in given.items() if v is not None] + [*from_pretrained_kwargs]
            if given:
                raise ValueError(
                    f"{given[0]} is for a teacher given by name; a {type(model).__name__} is "
                    "taken as it is"
                )
        self.model: nn.Module = model  # frozen in `prepare`: a part of it may be the student's
        self._leaves_autocast = False

    @property
    def vocab_size(self) -> int | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Return how many logits a token has, or None if the model does not say."""
        return vocab_size(causal_lm(self.model))

    def check(self, run: Run) -> None:
        """Check that both are of one kind; of classifiers, that they have the same classes.

        Raises:
            ValueError: as `check_classes` and `check_same_kind`.
        """
        lm = causal_lm(self.model)
        check_same_kind(run.language_model, lm)
        if run.kind.has_classes:
            check_classes(run.language_model, lm)

    def inputs(self) -> Sequence[str]:
        """Return the names of its forward's inputs."""
        return tuple(inspect.signature(causal_lm(self.model).forward).parameters)

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """Return the tokenizer of its ids, loaded at the first call; None if it is not known."""
        if self._tokenizer is None and self._beside is not None:
            self._tokenizer, self._beside = _tokenizer(*self._beside), None
        return self._tokenizer

    def prepare(self, accelerator: Accelerator, student: nn.Module, refusal: str | None) -> None:
        """Freeze the model, and move it to the trainer's device unless it is placed.

        Raises:
            ValueError: it is the student's own object, or shares what the student trains.
        """
        check_sharing(self.model, student)
        place_model(self.model, accelerator.device)
        self._common = freeze(self.model, student)
        self._reader = Reader("teacher", refusal)
        self._choose_precision(accelerator, causal_lm(student))
        if self.is_asked_together:
            self._engine = cut_by_engine(accelerator, self.model, bool(self._common))

    def _choose_precision(self, accelerator: Accelerator, student: nn.Module) -> None:
        """Decide whether it computes under the run's autocast, if there is one."""
        if not accelerator.native_amp:
            return
        lm, autocast = causal_lm(self.model), accelerator.mixed_precision
        self._leaves_autocast = not follows_autocast(lm, student)
        how = "as it is, not" if self._leaves_autocast else "as the student does,"
        logger.info("teacher: stored in %s, computes %s in %s autocast", stored(lm), how, autocast)

    def _autocast(self) -> AbstractContextManager[Any]:
        if not self._leaves_autocast:
            return nullcontext()
        device = next(self.model.parameters()).device.type
        return torch.autocast(device, enabled=False)

    def watched_model(self, student: nn.Module) -> nn.Module:
        """Return the model whose layers `watch` numbers."""
        return self.model

    def watch(self, layers: Sequence[int], attention: bool) -> None:
        """Give signals these layers' states from now on, see `hf_distill.models.layers`."""
        self._reader.watch = LayerWatcher("teacher", layers, attention)

    def _in_eval_mode(self) -> AbstractContextManager[Any]:
        """Put what it shares with the student in eval mode; the rest of it is."""
        return evaluating_each(self._common) if self._common else nullcontext()

    def signal(self, student: nn.Module, side: Side) -> Signal:
        """Return the frozen model's view of its side of the batch."""
        with self._in_eval_mode(), self._autocast():
            return self._reader.signal(self.model, side, alone=not self._common)


def _named(name: str) -> ModelTeacher:
    try:
        return ModelTeacher(name)
    except OSError as error:
        own = "" if name not in SELF_TEACHERS else f"; the student itself is SelfTeacher({name!r})"
        raise OSError(
            f"teacher must be a folder of a model or the name of one on the Hub, got {name!r}; "
            f"look at its spelling, and whether the Hub can be reached{own}: {error}"
        ) from error


def as_teacher(teacher: Teacher | nn.Module | str | os.PathLike[str]) -> Teacher:
    """Make a teacher of a model, or a name or folder that `from_pretrained` takes; keep a teacher.

    Raises:
        ValueError: the folder holds a teacher cache.
        TypeError: it is something else.
        OSError: there is no model of this name.
    """
    if isinstance(teacher, str | os.PathLike):
        teacher = os.fspath(teacher)
        if os.path.isfile(os.path.join(teacher, "shards", "shard-00000.json")):
            raise ValueError(
                f"{teacher} is a teacher cache, not a model: give CachedTeacher({teacher!r})"
            )
    if isinstance(teacher, str):
        return _named(teacher)
    if isinstance(teacher, nn.Module):
        return ModelTeacher(teacher)
    if isinstance(teacher, list | tuple | dict):
        raise TypeError(
            "teacher must be one teacher: several are a RoutedTeacher({name: teacher, ...}, column "
            f"of the names), got a {type(teacher).__name__} of {len(teacher)}"
        )
    if not isinstance(teacher, Teacher):
        raise TypeError(
            "teacher must be a model, a name for from_pretrained, or an instance of a subclass of "
            f"hf_distill.teachers.Teacher, got a {type(teacher).__name__}"
        )
    return teacher
