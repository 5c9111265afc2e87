"""config.json in every spelling, and the messages for what it must not say."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoss_infer.config import ModelConfig, RopeConfig, load_config, parse_config, to_hf_json, to_original_json
from gptoss_infer.errors import DataError

CONFIG = tiny_config()
HF = to_hf_json(CONFIG, quantized=True)
ORIGINAL = to_original_json(CONFIG)
# As published with openai/gpt-oss-20b, in the original/ folder (model card and reference code).
PUBLISHED_ORIGINAL = {
    "num_hidden_layers": 24, "num_experts": 32, "experts_per_token": 4, "vocab_size": 201088, "hidden_size": 2880,
    "intermediate_size": 2880, "swiglu_limit": 7.0, "head_dim": 64, "num_attention_heads": 64,
    "num_key_value_heads": 8, "sliding_window": 128, "initial_context_length": 4096, "rope_theta": 150000,
    "rope_scaling_factor": 32.0, "rope_ntk_alpha": 1, "rope_ntk_beta": 32,
}  # fmt: skip


def test_both_spellings_written_are_read_back_equal() -> None:
    assert parse_config(HF) == CONFIG
    assert parse_config(ORIGINAL) == CONFIG
    plain = replace(CONFIG, rope=RopeConfig(factor=1.0, original_max_position_embeddings=1024))
    assert parse_config(to_hf_json(plain, quantized=False)) == plain
    assert parse_config(json.loads(json.dumps(HF))) == CONFIG


def test_the_published_original_config_equals_transformers_defaults() -> None:
    from transformers import GptOssConfig

    stock = GptOssConfig(num_hidden_layers=24, num_local_experts=32)
    config = parse_config(stock.to_dict() | {"model_type": "gpt_oss"})
    assert config == parse_config(PUBLISHED_ORIGINAL)
    assert config.max_position_embeddings == 131072


def test_transformers_reads_what_is_written_here_with_the_same_meaning() -> None:
    from transformers import GptOssConfig

    stock = GptOssConfig(**to_hf_json(CONFIG, quantized=False))
    assert parse_config(stock.to_dict()) == CONFIG


def test_rope_nested_by_transformers_5_and_flat_by_earlier_ones_mean_the_same() -> None:
    nested = {key: value for key, value in HF.items() if key not in ("rope_scaling", "rope_theta")}
    nested["rope_parameters"] = HF["rope_scaling"] | {"rope_theta": HF["rope_theta"]}
    assert parse_config(nested) == CONFIG


def test_a_config_without_any_rope_is_refused_because_transformers_would_assume_yarn() -> None:
    for rope in ({}, {"rope_scaling": None}, {"rope_parameters": {}}):
        raw = {key: value for key, value in HF.items() if key != "rope_scaling"} | rope
        with pytest.raises(DataError, match="says nothing of RoPE"):
            parse_config(raw)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "missing hidden_size"),
        ({"num_hidden_layers": "three"}, "num_hidden_layers is 'three', expected an integer"),
        ({"num_hidden_layers": 3.0}, "num_hidden_layers is 3.0, expected an integer"),
        ({"head_dim": True}, "head_dim is True, expected an integer"),
        ({"head_dim": 15}, "head_dim is 15; rotary embedding needs an even number"),
        ({"vocab_size": 0}, "vocab_size is 0, expected at least 1"),
        ({"num_key_value_heads": 3}, "num_attention_heads 8 is no multiple of num_key_value_heads 3"),
        ({"num_experts_per_tok": 7, "experts_per_token": 7}, "num_experts_per_tok 7 exceeds num_local_experts 6"),
        ({"layer_types": ["sliding_attention"]}, "layer_types has 1 entries, num_hidden_layers is 3"),
        ({"layer_types": ["chunked_attention"] * 3}, "layer_types is .*chunked.*expected one of"),
        ({"layer_types": 3}, "layer_types is 3"),
        ({"layer_types": [["a"]] * 3}, "layer_types is"),
        ({"model_type": "llama"}, "model_type is 'llama'; gpt-oss has 'gpt_oss'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True"),
        ({"attention_bias": False}, "attention_bias is False"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps is 'small', expected a number"),
        ({"swiglu_limit": None}, "swiglu_limit is None, expected a number"),
        ({"swiglu_limit": float("nan")}, "swiglu_limit is nan, expected a number"),
        ({"swiglu_limit": 10**400}, "swiglu_limit is 1000.* expected a number"),
        ({"rope_theta": -1}, "RoPE's theta is -1.0, expected more than 0"),
        ({"rope_scaling": "yarn"}, "RoPE is 'yarn', expected an object"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "llama3.* is not supported; expected .*yarn"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "factor is None, expected a number"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 8, "mscale": 2}}, "mscale.* is not supported"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 8, "short_factor": [1]}}, "short_factor.* is not supported"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": "8"}}, "factor is '8', expected a number"),
    ],
    ids=str,
)  # fmt: skip
def test_a_value_that_no_gpt_oss_has_is_refused_with_file_key_and_value(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(HF | change))
    with pytest.raises(DataError, match=rf"config\.json: .*{message}"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "is missing"), (b"", "is not JSON"), (b"{", "is not JSON"), (b"\xff", "is not JSON"),
     (b"[]", "holds a list"), (b"[" * 100_000, "is not JSON")],
    ids=lambda value: str(value)[:12],
)  # fmt: skip
def test_a_config_that_is_no_json_object_is_refused_with_its_path(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(DataError, match=rf"config\.json {message}"):
        load_config(tmp_path)


anything = st.recursive(
    st.none() | st.booleans() | st.integers(-10, 10**6) | st.floats() | st.text(max_size=5),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=5,
)


@settings(max_examples=500, deadline=None)
@given(data=st.data())
def test_any_value_under_any_key_gives_a_config_or_a_data_error(data: st.DataObject) -> None:
    raw = dict(data.draw(st.sampled_from([HF, ORIGINAL])))
    if data.draw(st.booleans()) and "rope_scaling" in raw:
        key = data.draw(st.sampled_from(sorted(raw["rope_scaling"])))
        raw["rope_scaling"] = raw["rope_scaling"] | {key: data.draw(anything)}
    else:
        raw[data.draw(st.sampled_from(sorted(raw)))] = data.draw(anything)
    try:
        result: object = parse_config(raw, "config.json")
    except DataError as error:
        result = str(error)
    assert isinstance(result, ModelConfig) or result.startswith("config.json: ")


def test_what_the_original_spelling_cannot_say_is_refused() -> None:
    kinds = ("full_attention", "sliding_attention", "full_attention")
    for config in (
        replace(CONFIG, layer_types=kinds),
        replace(CONFIG, rope=replace(CONFIG.rope, truncate=True)),
        replace(CONFIG, rms_norm_eps=1e-6),
    ):
        with pytest.raises(DataError, match=r"cannot express this model.*Keep the hf layout"):
            to_original_json(config)
