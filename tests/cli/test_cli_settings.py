"""Engine flags are the fields of `EncoderConfig`, and nothing else."""

from __future__ import annotations

import inspect
import json
from dataclasses import fields

import pytest

from vitgraph.commands.settings import config_from_flags, with_encoder_flags
from vitgraph.config import EncoderConfig
from vitgraph.errors import ConfigError


def test_every_field_becomes_a_flag():
    @with_encoder_flags()
    def command(config: EncoderConfig, model: str) -> None: ...

    names = list(inspect.signature(command).parameters)
    assert names == ["model", *(f.name for f in fields(EncoderConfig)), "compilation_config"]


def test_no_flags_is_the_default_config():
    assert config_from_flags({f.name: None for f in fields(EncoderConfig)}) == EncoderConfig()


def test_values_of_every_kind():
    given = {"graph": False, "budgets": "256, 64,128", "max_items": 3, "attention": "sdpa", "lazy": True}
    expected = EncoderConfig(graph=False, budgets=(64, 128, 256), max_items=3, attention="sdpa", lazy=True)
    assert config_from_flags(given) == expected


def test_vllm_names_in_json():
    text = json.dumps(
        {
            "cudagraph_mm_encoder": True,
            "encoder_cudagraph_token_budgets": [512, 1024],
            "encoder_cudagraph_max_vision_items_per_batch": 4,
            "encoder_cudagraph_max_frames_per_batch": 16,
        }
    )
    config = config_from_flags({"compilation_config": text})
    assert config == EncoderConfig(graph=True, budgets=(512, 1024), max_items=4, max_frames=16)


def test_json_from_a_file(tmp_path):
    path = tmp_path / "compilation.json"
    path.write_text('{"encoder_cudagraph_token_budgets": [64]}')
    assert config_from_flags({"compilation_config": str(path)}).budgets == (64,)


def test_flags_win_over_json_and_json_over_the_commands_defaults():
    text = '{"max_tokens": 256, "encoder_cudagraph_max_vision_items_per_batch": 4}'
    config = config_from_flags({"compilation_config": text, "max_items": 7}, {"max_tokens": 512, "min_tokens": 64})
    assert (config.max_tokens, config.max_items, config.min_tokens) == (256, 7, 64)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"budgets": "64,many"}, "--budgets takes whole numbers"),
        ({"budgets": "64,-1"}, "positive"),
        ({"compilation_config": "{"}, "not valid JSON"),
        ({"compilation_config": "/no/such/file.json"}, "neither a JSON object nor a readable file"),
        ({"compilation_config": '{"cudagraph_mode": "FULL"}'}, "unknown setting 'cudagraph_mode'"),
        ({"compilation_config": '{"graph": true, "cudagraph_mm_encoder": false}'}, "given twice"),
    ],
)
def test_bad_values_are_config_errors(flags, says):
    with pytest.raises(ConfigError, match=says):
        config_from_flags(flags)
