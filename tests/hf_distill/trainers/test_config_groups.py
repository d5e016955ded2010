"""Groups of settings: from Python, YAML and command lines."""

import dataclasses
import json
from pathlib import Path

import pytest
import yaml
from transformers import HfArgumentParser
from trl.scripts.utils import TrlParser

from hf_distill import OPSDConfig, Schedule
from hf_distill.rollouts.config import RolloutConfig


def config(**changes) -> OPSDConfig:
    return OPSDConfig(output_dir="out", report_to="none", **changes)


EXPECTED = RolloutConfig(temperature=0.3, generation_kwargs={"top_k": 5})
GIVEN = {"temperature": 0.3, "generation_kwargs": {"top_k": 5}}


@pytest.mark.parametrize("value", [EXPECTED, GIVEN, json.dumps(GIVEN)], ids=["own", "dict", "json"])
def test_a_group_is_given_in_three_ways(value):
    assert config(rollout=value).rollout == EXPECTED


def test_the_argument_parser_reads_groups():
    words = ["--output_dir", "out", "--rollout", json.dumps(GIVEN), "--clip", '{"bound": 0.5}']
    (parsed,) = HfArgumentParser(OPSDConfig).parse_args_into_dataclasses(words)
    assert parsed.rollout == EXPECTED
    assert parsed.divergence_spec().clip == 0.5


@pytest.mark.parametrize("parser", [HfArgumentParser, TrlParser])
def test_yaml_reads_groups(tmp_path: Path, parser: type):
    path = tmp_path / "settings.yaml"
    path.write_text(yaml.safe_dump({"output_dir": "out", "rollout": GIVEN}))
    made = parser(OPSDConfig)
    if parser is TrlParser:
        (parsed,) = made.parse_args_and_config(["--config", str(path)])
    else:
        (parsed,) = made.parse_yaml_file(path)
    assert parsed.rollout == EXPECTED
    assert parsed.self_teacher.ema_decay == 0.995


def test_a_config_is_written_as_json_and_made_again():
    made = config(rollout=GIVEN, clip={"bound": 0.5})
    written = json.loads(made.to_json_string())
    assert written["rollout"] == dataclasses.asdict(EXPECTED)
    assert written["rollout"].items() >= GIVEN.items()
    again = OPSDConfig(**{name: written[name] for name in ("rollout", "clip", "output_dir")})
    assert (again.rollout, again.clip) == (made.rollout, made.clip)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ("{", ValueError, "rollout must be a JSON object such as .*, got '{'"),
        ("3", TypeError, "rollout must be a RolloutConfig or a mapping such as .*, got 3"),
        ({"temprature": 1.0}, ValueError, "rollout has no field 'temprature'; it has temperature,"),
    ],
)
def test_what_is_no_group(value, error: type, message: str):
    with pytest.raises(error, match=message):
        config(rollout=value)


@pytest.mark.parametrize("scale", [0.25, "0.25", "linear:0.0->1.0@100"])
def test_a_scale_of_adapters_may_follow_training(scale: float | str):
    made = config(teacher="lora_scale", self_teacher={"lora_scale": scale}).make_teacher()
    assert made.lora_scale == Schedule.parse(scale)
    with pytest.raises(ValueError, match=r"lora_scale must stay in \[0, 1\], got 1.5"):
        config(self_teacher={"lora_scale": 1.5})
