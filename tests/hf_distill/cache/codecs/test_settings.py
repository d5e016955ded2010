import json

import pytest
import torch

from hf_distill.cache.codecs import Full, HeadSamples, Sampled, TopK, make_codec
from metal_ops import DivergenceSpec
from tests.hf_distill.cache.codecs.teachers import CODECS


@pytest.mark.parametrize("name", CODECS)
def test_a_codec_is_built_again_from_what_json_keeps(name: str) -> None:
    codec = CODECS[name]
    settings = json.loads(json.dumps(codec.settings()))
    again = make_codec(codec.name, settings)
    assert again == codec
    assert type(again) is type(codec)


def test_defaults() -> None:
    assert make_codec("head_samples") == HeadSamples()
    assert make_codec("topk", {"top_k": 7}) == TopK(7)


def test_power_sums_reach_both_ends_of_every_range() -> None:
    tenths = [i / 10 for i in range(3, 41)]
    for low, high in ((a, b) for a in tenths for b in tenths if a <= b):
        codec = HeadSamples(temperature_range=(low, high))
        assert {1 / low, 1 / high} <= {1.0, *codec.orders}
        assert 1.0 not in codec.orders
    codec = HeadSamples(temperature=0.7, temperature_range=(0.5, 3.5))  # 1 among them, rounded
    assert len(codec.orders) == 3


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("zip", {}, r"codec must be one of \('head_samples', .*, got 'zip'"),
        ("topk", {"num_samples": 3}, r"settings of topk must be among .*, got \['num_samples'\]"),
        ("topk", {"top_k": 0}, r"top_k must be in \[1, 255\], got 0"),
        ("topk", {"top_k": 256}, r"top_k must be in \[1, 255\], got 256"),
        ("topk", {"top_p": 0.0}, r"top_p must be None or in \(0, 1\], got 0.0"),
        ("topk", {"temperature": 0.0}, "temperature must be positive and finite, got 0.0"),
        ("topk", {"temperature_range": [2.0, 1.0]}, r"the smaller first, got \(2.0, 1.0\)"),
        ("topk", {"temperature_range": [0.0, 1.0]}, r"two positive numbers.*got \(0.0, 1.0\)"),
        ("head_samples", {"num_samples": 0}, r"num_samples must be in \[1, 255\], got 0"),
        ("head_samples", {"num_exact": 0}, "num_exact must be at least 1, got 0"),
        ("sampled", {"num_samples": 256}, r"num_samples must be in \[1, 255\], got 256"),
        ("full", {"format": "int4"}, "format must be one of .*, got 'int4'"),
    ],
)
def test_settings_out_of_range(name: str, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_codec(name, settings)


@pytest.mark.parametrize("codec", [HeadSamples(), Full("fp16")])
def test_arguments_of_encode_that_disagree(codec: HeadSamples | Full) -> None:
    logits = torch.zeros(4, 50)
    for lengths, keys, real_vocab in [
        ([3], [(0, 0)], 50),
        ([4], [(0, 0), (0, 1)], 50),
        ([4], [(0, 0)], 51),
        ([4], [(0, 0)], 0),
    ]:
        with pytest.raises(ValueError, match=r"logits must be|real_vocab must be|keys"):
            codec.encode(logits, lengths, keys, real_vocab)


@pytest.mark.parametrize(
    ("codec", "spec", "reason"),
    [
        (HeadSamples(), DivergenceSpec("reverse_kl"), None),
        (HeadSamples(), DivergenceSpec("jsd", temperature=2.0), None),
        (HeadSamples(), DivergenceSpec(temperature=2.5), "from 1 to 2, not 2.5: set temp"),
        (HeadSamples(), DivergenceSpec(temperature=0.5), "from 1 to 2, not 0.5: set temp"),
        (HeadSamples(), DivergenceSpec(support="student_topk", top_k=5), 'the codec "full"'),
        (HeadSamples(), DivergenceSpec(support="union", top_k=5), 'the codec "full"'),
        (HeadSamples(), DivergenceSpec(support="teacher_topk", top_k=16), None),
        (HeadSamples(), DivergenceSpec(support="teacher_topk", top_k=17), "top_k of at least 17"),
        (TopK(top_p=0.9), DivergenceSpec(support="teacher_topk", top_k=2), "a nucleus of 0.9"),
        (TopK(), DivergenceSpec(temperature=1.5), "from 1 to 1, not 1.5"),
        (TopK(), DivergenceSpec("reverse_kl"), None),
        (TopK(), DivergenceSpec(missing="renormalise"), None),
        (Sampled(), DivergenceSpec(), None),
        (Sampled(), DivergenceSpec("jsd"), None),
        (Sampled(), DivergenceSpec("reverse_kl"), "reverse_kl needs the teacher where"),
        (Sampled(), DivergenceSpec("jsd", beta=1.0), "reverse_kl needs the teacher where"),
        (Sampled(), DivergenceSpec(missing="renormalise"), "draws have no head"),
        (Sampled(), DivergenceSpec(support="teacher_topk", top_k=2), "0 entries are kept"),
        (Sampled(), DivergenceSpec(clip=1.0), "clip_level 'token'"),
        (Sampled(), DivergenceSpec(clip=1.0, clip_level="token"), None),
        (Full(), DivergenceSpec("reverse_kl", temperature=9.0), None),
        (Full(), DivergenceSpec(support="union", top_k=5), None),
    ],
)
def test_which_losses_a_cache_serves(
    codec: HeadSamples, spec: DivergenceSpec, reason: str | None
) -> None:
    answer = codec.serves(spec)
    assert (answer is None) == (reason is None)
    assert reason is None or reason in str(answer)
