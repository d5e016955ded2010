"""cache_teacher: run a teacher once over a data set and keep what it says.

The unit is a shard of consecutive rows. Which rows a shard has, and how they are put into batches,
depends on the data and the settings alone, so that its bytes depend neither on the number of
processes nor on interruptions.
"""

import datetime
import logging
import math
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import transformers
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hf_distill.cache import fingerprints, progress
from hf_distill.cache.codecs import Codec, HeadSamples, make_codec
from hf_distill.cache.datasets import default_collator
from hf_distill.cache.encoder import Encoder, RowEncoder, sums_of
from hf_distill.cache.errors import CacheCorrupt, CacheError
from hf_distill.cache.fingerprints import Collator, Data
from hf_distill.cache.hidden_encoder import with_head
from hf_distill.cache.launches import only_one_writes
from hf_distill.cache.manifest import MANIFEST, Manifest, config_hash
from hf_distill.cache.processes import Part, num_copies, part_of
from hf_distill.cache.server_encoder import server_encoder
from hf_distill.cache.shard import write_shard
from hf_distill.data.turn_ends import tell_end_tokens
from hf_distill.models.forward import Reader
from hf_distill.models.pieces import release
from hf_distill.models.structure import causal_lm, generation_end_ids, is_sharded, vocab_size
from hf_distill.models.tokenizers import num_ids
from hf_distill.teachers import HiddenStateTeacher, ModelTeacher, Teacher, place_model

logger = logging.getLogger(__name__)

SHARD_BYTES = 2**26  # what a shard should have, about: a crash loses less than one per process
MAX_SHARD_ROWS = 4096
SHARDS = 16  # at least so many, if they have so many rows each
WAIT = datetime.timedelta(days=7)  # of processes for the slowest; the default is 10 minutes


def _teacher(model: nn.Module | str | Teacher, revision: str | None) -> nn.Module:
    """Return the model to run."""
    if isinstance(model, str):
        given: dict[str, Any] = {} if revision is None else {"revision": revision}
        return ModelTeacher(model, **given).model
    if isinstance(model, nn.Module):
        return model
    if isinstance(model, ModelTeacher):
        return model.model
    raise ValueError(
        "a teacher to cache must be a model, a name or a ModelTeacher, whose logits can be read; "
        f"got a {type(model).__name__}"
    )


def _tokenizer(
    model: Any, given: Any, collator: Collator | None, revision: str | None
) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer: the given one, the collator's, or that of the teacher's name."""
    found = given or getattr(collator, "tokenizer", None)
    if found is None and isinstance(model, str):
        found = AutoTokenizer.from_pretrained(model, revision=revision)
    return found


def _nominal_bytes(encoder: RowEncoder) -> float:
    """Return a token's bytes, from made-up logits: shards are sized before there are any."""
    width = encoder.width
    logits = torch.linspace(0, 30, width).expand(4, width)
    (arrays,) = encoder.codec.encode(logits, [4], [(0, 0)], min(encoder.real_vocab, width))
    return sum(x.nbytes for x in arrays.values()) / 4


def _shard_rows(data: Data, collator: Collator, bytes_per_token: float) -> int:
    """Return a shard's rows: a power of two for about SHARD_BYTES, or less for SHARDS shards."""
    count = min(fingerprints.PROBED_ROWS, len(data))
    probed = [data[i * len(data) // count] for i in range(count)]
    tokens = sum(len(row.positions) for row in fingerprints.collated(collator, probed)) / count
    rows = SHARD_BYTES / max(tokens * bytes_per_token, 1)
    rows = min(rows, MAX_SHARD_ROWS, max(SHARDS, len(data) // SHARDS))
    return 2 ** int(np.log2(max(rows, 1)))


@contextmanager
def _writing(cache: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CacheError(
            f"{cache} could not be written: {error}. Shards that are complete stay; run the same "
            "again to write the others"
        ) from error


@contextmanager
def _alone(cache: Path, state: PartialState) -> Iterator[None]:
    """Let no other launch write inside the block; the main process sees to it."""
    with ExitStack() as stack:
        if state.is_main_process:
            with _writing(cache):
                stack.enter_context(only_one_writes(cache))
        yield


def _versions() -> dict[str, str]:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"torch": str(torch.__version__), "transformers": transformers.__version__, "time": now}


def checked(
    path: str | os.PathLike[str],
    data: Data,
    batch_size: int,
    shard_rows: int | None,
    verify: str,
) -> Path:
    """Return the folder, if the arguments are in range."""
    if "://" in os.fspath(path):
        raise ValueError(f"a cache is written to this machine and copied from it, got {path!r}")
    for name, value in (("batch_size", batch_size), ("shard_rows", shard_rows)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if verify not in progress.VERIFY:
        raise ValueError(f"verify must be one of {progress.VERIFY}, got {verify!r}")
    if not hasattr(data, "__getitem__") or not hasattr(data, "__len__"):
        raise ValueError(f"the dataset must give rows by number, got a {type(data).__name__}")
    if not len(data):
        raise ValueError("the dataset must have at least one row, got none")
    return Path(path)


def _vocabulary(model: nn.Module, tokenizer: PreTrainedTokenizerBase | None) -> tuple[int, int]:
    """Return (logits per token, how many of them belong to the tokenizer)."""
    vocab = vocab_size(causal_lm(model))
    if vocab is None:
        raise ValueError(f"the number of logits of a {type(model).__name__} must be known")
    ids = num_ids(tokenizer) if tokenizer is not None else vocab
    return vocab, min(ids, vocab)


def _codec_identity(encoder: RowEncoder) -> dict[str, Any]:
    codec = encoder.codec
    return {
        "name": codec.name,
        "settings": codec.settings(),
        "seed": encoder.seed,
        "temperature": codec.temperature,
        # None: no limit
        "temperature_range": [x if math.isfinite(x) else None for x in codec.temperature_range],
        **encoder.codec_notes(),
    }


def _log_choice(cache: Path, encoder: RowEncoder, missing: Sequence[int]) -> None:
    shards = -(-len(encoder.data) // encoder.shard_rows)
    logger.info(
        "cache %s: codec %s %s, %d of %d logits per token, %d rows in %d shards of %d, "
        "%d shards to write",
        cache,
        encoder.codec.name,
        encoder.codec.settings(),
        encoder.real_vocab,
        encoder.vocab,
        len(encoder.data),
        shards,
        encoder.shard_rows,
        len(missing),
    )


def _write(cache: Path, encoder: RowEncoder, part: Part, digest: str, state: PartialState) -> None:
    """Write some shards, and show how it goes."""
    total = sum(len(encoder.rows(number)) for number in part.numbers)
    began, tokens_done, bytes_done = time.monotonic(), 0, 0
    notes = {"rank": state.process_index, "world": state.num_processes}
    notes |= {"host": socket.gethostname(), "device": str(state.device)}
    with tqdm(total=total, unit="row", desc="cache", disable=not state.is_main_process) as bar:
        for number in part.numbers:
            rows = encoder.shard(number)
            if not part.writes:
                continue
            by = notes | _versions() | {"batch_size": encoder.batch_size}
            with _writing(cache):
                entry = write_shard(cache, number, rows, digest, sums=sums_of(rows), written_by=by)
            tokens_done, bytes_done = tokens_done + entry.tokens, bytes_done + entry.bytes
            speed = tokens_done / (time.monotonic() - began)
            size = bytes_done / max(tokens_done, 1)
            bar.set_postfix_str(f"{speed:,.0f} tokens/s, {size:.0f} bytes/token")
            bar.update(len(rows))
        for _ in range(part.idle_rounds):
            encoder.wait()


def _configuration(
    encoder: RowEncoder, teacher: dict[str, Any], tokenizer: PreTrainedTokenizerBase | None
) -> dict[str, Any]:
    """Return what the cache is of, all that its bytes depend on."""
    config = {
        "teacher": teacher,
        "tokenizer": fingerprints.tokenizer_identity(tokenizer),
        "logits": {"logit_dim": encoder.vocab, "real_vocab": encoder.real_vocab},
        "dataset": fingerprints.dataset_identity(encoder.data),
        "collator": fingerprints.collator_identity(encoder.collator, encoder.data),
        "codec": _codec_identity(encoder),
        "shard_rows": encoder.shard_rows,
    }
    return fingerprints.plain(config)


def _begin(
    cache: Path, encoder: RowEncoder, config: dict[str, Any], overwrite: bool, verify: str
) -> list[int]:
    """Make the folder ready; returns the numbers of the shards that are missing."""
    missing = progress.begin(cache, config, overwrite, verify)
    try:
        encoder.lay_down(cache, len(missing) == progress.num_shards(config), verify)
    except CacheCorrupt:
        if not overwrite:
            raise
        progress.delete(cache)
        missing = progress.begin(cache, config, overwrite, verify)
        encoder.lay_down(cache, True, verify)
    return missing


def write_all(
    cache: Path,
    encoder: RowEncoder,
    teacher: Callable[[], dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase | None,
    state: PartialState,
    *,
    overwrite: bool,
    verify: str,
    copies: int = 1,
) -> Manifest:
    """Write the shards that are missing, each process some of them, and then the manifest.

    Args:
        cache: the folder.
        encoder: makes the rows; its `shard_rows` of 0 chooses shards of about 64 MiB.
        teacher: says what the teacher is, for the manifest. Every process calls it.
        tokenizer: of the teacher, or None.
        state: of this process.
        overwrite: see `cache_teacher`.
        verify: see `cache_teacher`.
        copies: how many processes make the same rows, see `processes.num_copies`.

    Raises:
        CacheConfigMismatch, CacheError, ValueError: see `cache_teacher`.
    """
    identity = teacher()
    with _alone(cache, state):
        plan: list[Any] = [None, None]
        if state.is_main_process:
            rows = encoder.shard_rows or (None if overwrite else progress.shard_rows(cache))
            if not rows:
                rows = _shard_rows(encoder.data, encoder.collator, _nominal_bytes(encoder))
            config = _configuration(replace(encoder, shard_rows=rows), identity, tokenizer)
            config = progress.going_on(cache, config)
            with _writing(cache):
                plan = [config, _begin(cache, encoder, config, overwrite, verify)]
        # one process looks: another would see shards that a third has just written
        config, missing = broadcast_object_list(plan)
        encoder = replace(encoder, shard_rows=config["shard_rows"])
        _log_choice(cache, encoder, missing)
        encoder.probe()
        encoder.pick_up(cache)
        part = part_of(missing, state, copies)
        _write(cache, encoder, part, config_hash(config), state)
        state.wait_for_everyone()
        if state.is_main_process:
            with _writing(cache):
                progress.finish(cache, config, _versions())
        state.wait_for_everyone()
        return Manifest.read((cache / MANIFEST).read_bytes(), str(cache / MANIFEST))


def process_state() -> PartialState:
    """Return the process state: that of the script's Accelerator, if it has one."""
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=WAIT)


def cache_teacher(
    model: nn.Module | str | Teacher,
    dataset: Data,
    path: str | os.PathLike[str],
    *,
    codec: Codec | str | None = None,
    data_collator: Collator | None = None,
    processing_class: PreTrainedTokenizerBase | None = None,
    batch_size: int = 8,
    shard_rows: int | None = None,
    seed: int = 0,
    overwrite: bool = False,
    verify: str = "size",
    teacher_revision: str | None = None,
) -> Manifest:
    """Write what a teacher says of every scored token of a data set.

    Run it in one process or, under `accelerate launch`, in several. Each has the whole teacher, or
    its pieces of one that was loaded with `distributed_config=DistributedConfig(fsdp_size=...)` or
    `tp_size`: then all processes of the launch must call this together. Under tensor parallelism
    all make the same rows, whose values are those of a whole teacher to rounding.

    A launch waits until another that writes into the folder has ended, and goes on from there. What
    an interrupted run has finished is kept: the same call goes on, also with another number of
    processes or another batch size.

    Args:
        model: a causal LM, a name for `from_pretrained`, or a `ModelTeacher`, which can load a name
            in a dtype or quantized. A model is left as it was, but on the accelerator. Or a
            `HiddenStateTeacher`, whose server is asked.
        dataset: the rows, which are read by their numbers.
        path: the cache's folder, on this machine.
        codec: says what is stored: a codec, or the name of one with its defaults. None is
            `HeadSamples()`.
        data_collator: the data collator of the training. None chooses one by the columns, see
            `default_collator`. If the collator has hints, the hinted teacher is cached.
        processing_class: the tokenizer. None takes that of the collator or of the teacher's name.
            Logits of ids that it does not have are padding of the vocabulary, and are left out.
        batch_size: the maximum number of rows in one forward of the teacher.
        shard_rows: the number of rows in a shard. None chooses shards of about 64 MiB.
        seed: the seed of the draws, at least 0. Each row has its own random numbers.
        overwrite: whether a cache of something else in the folder is deleted.
        verify: says how shards of an earlier run are checked: "size" compares their sizes, and
            "full" their sha256 too.
        teacher_revision: the revision of the repository of a name. For a model, it is only
            recorded.

    Returns:
        The manifest.

    Raises:
        CacheConfigMismatch: the folder has a cache of something else; the message names the first
            setting that differs.
        CacheError: a file could not be written.
        ValueError: an argument is out of range, or rows cannot be cached.
    """
    cache = checked(path, dataset, batch_size, shard_rows, verify)
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")
    state = process_state()
    tokenizer = _tokenizer(model, processing_class, data_collator, teacher_revision)
    rows: dict[str, Any] = {
        "data": dataset,
        "collator": data_collator or default_collator(dataset, tokenizer),
        "codec": make_codec(codec) if isinstance(codec, str) else codec or HeadSamples(),
        "seed": seed,
        "batch_size": batch_size,
        "shard_rows": shard_rows or 0,
    }
    given: dict[str, Any] = {"overwrite": overwrite, "verify": verify}
    if isinstance(model, HiddenStateTeacher):
        real_vocab = 0 if tokenizer is None else num_ids(tokenizer)
        asking = server_encoder(model, tokenizer, real_vocab=real_vocab, **rows)
        told = lambda: dict(model.about.teacher)
        return write_all(cache, asking, told, tokenizer, state, **given)
    teacher = _teacher(model, teacher_revision)
    copies, in_pieces = num_copies(teacher, state.num_processes), is_sharded(teacher)
    if in_pieces:
        release(teacher)
    device = cast(torch.device, state.device)
    place_model(teacher, device)
    vocab, real_vocab = _vocabulary(teacher, tokenizer)
    rows["collator"] = tell_end_tokens(rows["collator"], generation_end_ids(causal_lm(teacher)))
    encoder = Encoder(
        **rows,
        vocab=vocab,
        real_vocab=real_vocab,
        model=teacher,
        device=device,
        reader=Reader("teacher"),
        in_pieces=in_pieces,
    )

    if encoder.codec.of_hidden:
        encoder = with_head(encoder)

    def about() -> dict[str, Any]:
        return fingerprints.teacher_identity(teacher, teacher_revision)

    return write_all(cache, encoder, about, tokenizer, state, **given, copies=copies)
