"""DistillKit's dumps say what its own library reads from them.

The bytes are those that DistillKit 1.0.0 (commit a61c2e7) has made of the same three tokens, and
the values those that it reads back, rounded to 4 digits here.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from datasets import Dataset

from hf_distill.cache import DistillKitLogProbs
from hf_distill.cache.distillkit import unpack_bits

VOCAB, K = 61, 8
TOP_IDS = [
    [59, 45, 23, 29, 58, 28, 13, 14],
    [8, 28, 1, 35, 6, 16, 5, 25],
    [60, 12, 0, 5, 54, 3, 25, 42],
]
VALUES = [
    [-0.296, -2.5126, -3.411, -3.9443, -4.0751, -4.3383, -4.6417, -4.8835],
    [-0.968, -1.4974, -2.463, -2.8107, -3.5227, -3.8726, -3.8808, -4.0235],
    [-1.6487, -1.8194, -1.8772, -2.9461, -3.0969, -3.3912, -3.3915, -3.7238],
]
PACKED_IDS = ["eed5dde9c34e", "21c063190159", "f0c005d8366a"]
COMMON: dict[str, Any] = {"d": VOCAB, "k": K, "error_diffusion": False}
MADE: dict[str, tuple[dict[str, Any], list[str], list[list[float]]]] = {
    "curve": (
        {
            "exact_k": 2,
            "exact_dtype": "bfloat16",
            "polynomial_terms": [0, 1, "sqrt"],
            "term_dtype": "float32",
            "residual_bins": [],
            "delta_encoding": False,
        },
        [
            "98be21c0fe515bc02c3f2dbeb80e86be",
            "78bfc0bfb1571ac01a3ab6bd0ca611bf",
            "d3bfe9bf25c1f2bf71f2153e05298dbf",
        ],
        [
            [-0.2969, -2.5156, -3.4269, -3.8579, -4.1355, -4.3879, -4.6273, -4.8583],
            [-0.9688, -1.5, -2.4116, -3.0695, -3.3942, -3.664, -3.9054, -4.1287],
            [-1.6484, -1.8203, -1.8965, -2.8529, -3.1633, -3.3674, -3.5164, -3.6303],
        ],
    ),
    "delta": (
        {
            "exact_k": 2,
            "exact_dtype": "float32",
            "polynomial_terms": [0, 1],
            "term_dtype": "float16",
            "residual_bins": [
                {"scale_dtype": "float16", "element_bits": 5, "num_elements": 3},
                {"scale_dtype": "float32", "element_bits": 1, "num_elements": 2},
            ],
            "delta_encoding": True,
            "error_diffusion": True,
        },
        [
            "0b8e97beb0dc0dc05bb9062f1c252c7e40e99d3d80",
            "c1cd77bfe78807bf82ba0631f02447cc208e353e40",
            "4607d3bfa0db2ebe02b72e2a6f29c82820607a3e40",
        ],
        [
            [-0.296, -2.5126, -3.4016, -3.9412, -4.0918, -4.355, -4.6626, -4.7832],
            [-0.968, -1.4974, -2.4652, -2.8321, -3.5245, -4.0443, -4.0526, -4.0809],
            [-1.6487, -1.8194, -1.8754, -2.9442, -3.1157, -3.6534, -3.6538, -3.8503],
        ],
    ),
    "bins": (
        {
            "exact_k": 1,
            "exact_dtype": "float32",
            "polynomial_terms": None,
            "term_dtype": "float32",
            "residual_bins": [{"scale_dtype": "float32", "element_bits": 8, "num_elements": 7}],
            "delta_encoding": False,
        },
        [
            "0b8e97be47451c3d3e2719150e0600",
            "c1cd77bfb8c0003d50322710050500",
            "4607d3bf1253ee3c413f1b160b0b00",
        ],
        [
            [-0.296, -2.518, -3.3955, -3.9297, -4.0823, -4.3493, -4.6545, -4.8835],
            [-0.968, -1.5088, -2.4518, -2.7976, -3.5206, -3.8664, -3.8664, -4.0235],
            [-1.6487, -1.8328, -1.891, -2.9383, -3.0838, -3.4038, -3.4038, -3.7238],
        ],
    ),
    "exp": (
        {
            "exact_k": 3,
            "exact_dtype": "float16",
            "polynomial_terms": [0, 1, "exp"],
            "term_dtype": "float32",
            "residual_bins": [{"scale_dtype": "bfloat16", "element_bits": 12, "num_elements": 4}],
            "delta_encoding": False,
            "normalize_t": True,
        },
        [
            "bcb406c1d2c242fb65c08ad9d6be3062a7beb03738afff8bf04a",
            "bebbfdbdedc04d7b99c0bec68cc04444f63f9138b7b285540fff",
            "98be47bf82bf113535c0aaac08bf8824f7bd443887e9e9027fff",
        ],
        [
            [-0.2959, -2.5117, -3.4102, -3.9443, -4.0752, -4.3383, -4.6417, -4.9018],
            [-0.9678, -1.4971, -2.4629, -2.8107, -3.5227, -3.8725, -3.8812, -3.9657],
            [-1.6484, -1.8193, -1.877, -2.9461, -3.0969, -3.3911, -3.3916, -3.6933],
        ],
    ),
}
IDS = [3, 59, 28, 0]  # of each position the first entry or another
ROUNDED = {"delta": 1e-3}  # it adds up in float16
Row = dict[str, Any]


def read_bytes(texts: list[str]) -> list[list[int]]:
    return [list(bytes.fromhex(text)) for text in texts]


def write(folder: Path, row: Row, config: dict[str, Any] | None = None) -> Path:
    folder.mkdir()
    Dataset.from_list([row]).to_parquet(folder / "data_0.parquet")
    if config is not None:
        (folder / "compression_config.yaml").write_text(yaml.safe_dump(COMMON | config))
    return folder


def compressed(name: str) -> Row:
    packed = {"bytepacked_indices": PACKED_IDS, "compressed_logprobs": MADE[name][1]}
    return {"input_ids": IDS} | {k: read_bytes(v) for k, v in packed.items()}


def columns(source: DistillKitLogProbs) -> Any:
    source.start(VOCAB)
    assert len(source) == 1
    assert source.rows[0] == {"input_ids": IDS, "labels": [-100, *IDS[1:]]}
    return source.top_columns(IDS, np.arange(1, len(IDS)))


@pytest.mark.parametrize("name", MADE)
def test_compressed(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "dump", compressed(name), MADE[name][0])
    found = columns(DistillKitLogProbs(path, K, "a model"))
    assert found.ids.tolist() == TOP_IDS
    atol = ROUNDED.get(name, 1e-4)
    np.testing.assert_allclose(found.log_probs, MADE[name][2], rtol=0, atol=atol)
    fewer = columns(DistillKitLogProbs(path / "data_0.parquet", 3, "a model"))
    np.testing.assert_array_equal(fewer.log_probs, found.log_probs[:, :3])


def test_values_follow_the_order_of_the_ids(tmp_path: Path) -> None:
    """A curve that rises is cut: the ids are stored from the most probable one on."""
    numbers = np.array([-2.0, -3.0, 0.5], "<f4")  # one exact value, then -3 + 0.5 t
    row = {"input_ids": [3, 5], "compressed_logprobs": [list(numbers.tobytes())]}
    row["bytepacked_indices"] = [read_bytes(PACKED_IDS)[0]]
    curve = {"exact_k": 1, "polynomial_terms": [0, 1], "delta_encoding": False}
    source = DistillKitLogProbs(write(tmp_path / "dump", row, curve), K, "a model")
    source.start(VOCAB)
    found = source.top_columns([3, 5], np.array([1]))
    assert found.log_probs.tolist() == [[-2.0, *[-3.0] * (K - 1)]]
    assert found.ids.tolist() == TOP_IDS[:1]


def test_raw_values(tmp_path: Path) -> None:
    """Places that vLLM has not filled have -inf, and any id."""
    ids, values = [list(x) for x in TOP_IDS], [list(x) for x in VALUES]
    ids[1][-1], values[1][-1] = 2**40, -np.inf
    row = {"input_ids": IDS, "token_ids": ids, "top_values": values}
    found = columns(DistillKitLogProbs(write(tmp_path / "dump", row), K, "a model"))
    assert found.ids.tolist() == [TOP_IDS[0], [*TOP_IDS[1][:-1], -1], TOP_IDS[2]]
    np.testing.assert_array_equal(found.log_probs, values)


CENTRED = {"packed_indices": [[1]], "exact_values": [[1.0]], "coeffs": [[1.0]]}
SHORT = {"input_ids": IDS, "bytepacked_indices": [[1]] * 3, "compressed_logprobs": [[1]] * 3}
WRONG: list[tuple[Row, dict[str, Any] | None, str]] = [
    (
        {"input_ids": IDS} | CENTRED,
        None,
        "has logits less their mean .* the mass of the rest is lo",
    ),
    ({"input_ids": IDS}, None, "must have columns input_ids and bytepacked_indices and compress"),
    (compressed("bins"), None, r"need the compression_config\.yaml that they were written with"),
    (compressed("bins"), {"exact_k": 9}, "0 <= exact_k <= k <= d must hold, got 9, 8, 61"),
    (compressed("bins"), {}, "must describe a compression: KeyError"),
    (compressed("bins"), {"exact_k": 1, "exact_dtype": "int8"}, "KeyError.*int8"),
    (compressed("bins"), {"exact_k": 1, "polynomial_terms": ["cos"]}, "got cos"),
    (compressed("bins"), MADE["bins"][0] | {"exact_k": 4}, "at most k - exact_k elements together"),
    (SHORT, MADE["bins"][0], r"\(6, 15\) bytes of ids and of log-probabilities .* got \(1, 1\)"),
    (compressed("bins"), MADE["bins"][0] | {"d": 17}, r"\(5, 15\) bytes of ids"),
]


@pytest.mark.parametrize(("row", "config", "words"), WRONG)
def test_dumps_that_are_wrong(
    tmp_path: Path, row: Row, config: dict[str, Any] | None, words: str
) -> None:
    path = write(tmp_path / "dump", row, config)
    with pytest.raises(ValueError, match=words):
        columns(DistillKitLogProbs(path, K, "a model"))


def test_a_config_elsewhere(tmp_path: Path) -> None:
    path = write(tmp_path / "dump", compressed("curve"))
    config = tmp_path / "training.yaml"
    config.write_text(yaml.safe_dump({"logprob_compressor": COMMON | MADE["curve"][0]}))
    found = columns(DistillKitLogProbs(path, K, "a model", config=config))
    assert found.ids.tolist() == TOP_IDS
    config.write_text("3")
    with pytest.raises(ValueError, match=r"training\.yaml must be a mapping, got int"):
        DistillKitLogProbs(path, K, "a model", config=config)


@pytest.mark.parametrize("bits", [1, 3, 8, 17, 63])
def test_bits(bits: int) -> None:
    """Against text: numbers in base 2, one behind the other."""
    rng = np.random.default_rng(bits)
    numbers = rng.integers(0, 2**bits, (4, 11), dtype=np.int64)
    texts = ["".join(f"{x:0{bits}b}" for x in row) for row in numbers.tolist()]
    padded = [text + "0" * (-len(text) % 8) for text in texts]
    packed = [[int(text[i : i + 8], 2) for i in range(0, len(text), 8)] for text in padded]
    assert (unpack_bits(np.array(packed, np.uint8), bits, 11) == numbers).all()
