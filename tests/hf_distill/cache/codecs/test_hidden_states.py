"""Hidden states that are stored and read again, and arrays that no encoder wrote."""

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_distill.cache.codecs import HiddenStates, make_codec
from metal_ops import DivergenceSpec

WIDTH, LENGTHS = 24, [3, 0, 5]
BOTH = [HiddenStates("bf16"), HiddenStates("int8")]


def states(tokens: int = 8, seed: int = 0) -> Tensor:
    """Some units are a hundred times as large as others, as in trained models."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(0, 2, WIDTH)
    return torch.randn(tokens, WIDTH, generator=generator) * sizes


def encode(codec: HiddenStates, hidden: Tensor, lengths: list[int]) -> list[dict[str, np.ndarray]]:
    return codec.encode(hidden, lengths, [(0, i) for i in range(len(lengths))], 50)


def test_bfloat16_is_kept_bit_for_bit() -> None:
    hidden = states().bfloat16()
    read = HiddenStates().decode(encode(HiddenStates(), hidden, LENGTHS), LENGTHS, WIDTH)
    assert read.dtype == torch.bfloat16
    assert torch.equal(read, hidden)
    rounded = HiddenStates().decode(encode(HiddenStates(), states(), LENGTHS), LENGTHS, WIDTH)
    assert torch.equal(rounded, states().bfloat16())


def test_eight_bits_are_off_by_half_a_step_of_the_token() -> None:
    hidden, codec = states(), HiddenStates("int8")
    hidden[4] = 0.0
    hidden[5] *= 1e-3  # a scale of its own
    read = codec.decode(encode(codec, hidden, LENGTHS), LENGTHS, WIDTH)
    steps = hidden.abs().amax(-1, keepdim=True) / 127
    assert bool(((read - hidden).abs() <= 0.5001 * steps).all())
    assert float((read - hidden)[5].abs().max()) > 0.3 * float(steps[5])  # and it is rounded
    assert torch.equal(read[4], hidden[4])


@pytest.mark.parametrize("codec", BOTH)
def test_a_row_is_the_same_with_whatever_rows_it_is_encoded(codec: HiddenStates) -> None:
    hidden = states()
    together = encode(codec, hidden, LENGTHS)
    for index, (start, stop) in enumerate([(0, 3), (3, 3), (3, 8)]):
        (alone,) = encode(codec, hidden[start:stop], [stop - start])
        assert list(alone) == list(together[index]) == list(codec.arrays(50))
        for name, dtype in codec.arrays(50).items():
            assert alone[name].dtype == dtype == together[index][name].dtype
            assert alone[name].tobytes() == together[index][name].tobytes()
    size = {"bf16": 2 * WIDTH, "int8": WIDTH + 4}[codec.format]
    assert sum(x.nbytes for x in together[2].values()) == 5 * size


@pytest.mark.parametrize("codec", [*BOTH, HiddenStates("int8", rank=5)])
def test_settings_build_the_codec_again(codec: HiddenStates) -> None:
    assert make_codec("hidden_states", codec.settings()) == codec
    assert codec.serves(DivergenceSpec("reverse_kl", temperature=9.0)) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"format": "fp16"}, "format must be one of .*, got 'fp16'"),
        ({"rank": 0}, "rank must be at least 1, or None, got 0"),
    ],
)
def test_settings_out_of_range(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_codec("hidden_states", settings)


@pytest.mark.parametrize("codec", BOTH)
def test_what_cannot_be_stored_is_refused(codec: HiddenStates) -> None:
    for value in (torch.nan, torch.inf):
        hidden = states()
        hidden[1, 3] = value
        with pytest.raises(ValueError, match="hidden states must be finite"):
            encode(codec, hidden, LENGTHS)
    for lengths, count in (([3], 1), ([8], 2)):
        with pytest.raises(ValueError, match="hidden states must be"):
            codec.encode(states(), lengths, [(0, 0)] * count, 50)


@pytest.mark.parametrize(
    ("codec", "name", "value", "message"),
    [
        (BOTH[0], "hidden_bf16", 0x7FC0, "hidden states must be finite"),
        (BOTH[0], "hidden_bf16", 0xFF80, "hidden states must be finite"),
        (BOTH[1], "hidden_scale", np.nan, "hidden_scale must be at least 0"),
        (BOTH[1], "hidden_scale", -1.0, "hidden_scale must be at least 0"),
        (BOTH[1], "hidden_scale", np.inf, "hidden states must be finite"),
    ],
)
def test_values_that_no_teacher_has(
    codec: HiddenStates, name: str, value: float, message: str
) -> None:
    (row,) = encode(codec, states(), [8])
    codec.decode([row], [8], WIDTH)
    changed = row[name].copy()
    changed[0] = value
    with pytest.raises(ValueError, match=message):
        codec.decode([{**row, name: changed}], [8], WIDTH)


@pytest.mark.parametrize("codec", BOTH)
def test_arrays_that_do_not_fit(codec: HiddenStates) -> None:
    (row,) = encode(codec, states(), [8])
    name = f"hidden_{codec.format}"
    with pytest.raises(ValueError, match=rf"{name} of row 0 must be .* \[{8 * 23}\]"):
        codec.decode([row], [8], 23)
    with pytest.raises(ValueError, match=f"row 0 has no array '{name}'"):
        codec.decode([{}], [8], WIDTH)
    with pytest.raises(ValueError, match="one length per row, 1, got 2"):
        codec.decode([row], [4, 4], WIDTH)
    assert codec.decode([], [], WIDTH).shape == (0, WIDTH)
