"""GGUF files, judged by the gguf package's reader and dequantizer, OCP's tables and the tokenizers library.

What llama.cpp makes of them is in test_gguf_llama.py, which needs it built.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import random_tensors, tiny_config, write_tiny
from oracles import slow_decode
from safetensors.torch import load_file, save_file

from gptoss_infer import harmony, mxfp4
from gptoss_infer.checkpoint.convert import convert
from gptoss_infer.checkpoint.gguf import GgufTarget, ggml_blocks, write_gguf
from gptoss_infer.checkpoint.gguf_file import Entry, Group, Value, write_file
from gptoss_infer.checkpoint.gguf_tokenizer import named_tokens, tokenizer_metadata
from gptoss_infer.config import ModelConfig, RopeConfig
from gptoss_infer.errors import DataError, UsageError

gguf = pytest.importorskip("gguf", reason="oracle: pip install gguf (part of the test extra)")

SMALL = tiny_config(num_hidden_layers=2, vocab_size=64)
# The names of llama.cpp's converter -> ours.
LAYER = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight", "attn_q.bias": "self_attn.q_proj.bias",
    "attn_k.weight": "self_attn.k_proj.weight", "attn_k.bias": "self_attn.k_proj.bias",
    "attn_v.weight": "self_attn.v_proj.weight", "attn_v.bias": "self_attn.v_proj.bias",
    "attn_output.weight": "self_attn.o_proj.weight", "attn_output.bias": "self_attn.o_proj.bias",
    "attn_sinks.weight": "self_attn.sinks",
    "post_attention_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate_inp.weight": "mlp.router.weight", "ffn_gate_inp.bias": "mlp.router.bias",
    "ffn_down_exps.bias": "mlp.experts.down_proj_bias",
}  # fmt: skip
GLOBAL = {
    "token_embd.weight": "model.embed_tokens.weight", "output.weight": "lm_head.weight",
    "output_norm.weight": "model.norm.weight",
}  # fmt: skip
KEPT = ("token_embd.weight", "output.weight", "attn_q.weight", "attn_k.weight", "attn_v.weight", "attn_output.weight")


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "base", SMALL)


def expected_tensors(config: ModelConfig) -> dict[str, torch.Tensor]:
    """What a file of the random checkpoint must hold, in fp32, under GGUF's names."""
    tensors = random_tensors(config, "mxfp4")
    expected = {theirs: tensors[ours].float() for theirs, ours in GLOBAL.items()}
    for n in range(config.num_hidden_layers):
        layer = f"model.layers.{n}."
        expected |= {f"blk.{n}.{theirs}": tensors[layer + ours].float() for theirs, ours in LAYER.items()}
        blocks, scales = (tensors[f"{layer}mlp.experts.gate_up_proj_{part}"] for part in ("blocks", "scales"))
        both, bias = slow_decode(blocks, scales), tensors[f"{layer}mlp.experts.gate_up_proj_bias"].float()
        for start, name in ((0, "ffn_gate_exps"), (1, "ffn_up_exps")):  # even rows are the gate's
            expected[f"blk.{n}.{name}.weight"], expected[f"blk.{n}.{name}.bias"] = both[:, start::2], bias[:, start::2]
        blocks, scales = (tensors[f"{layer}mlp.experts.down_proj_{part}"] for part in ("blocks", "scales"))
        expected[f"blk.{n}.ffn_down_exps.weight"] = slow_decode(blocks, scales)
    return expected


def write(source: Path, to: GgufTarget = "gguf") -> Path:
    write_gguf(source, source.parent / f"{to}.gguf", to, overwrite=True)
    return source.parent / f"{to}.gguf"


def tensors_of(file: Path) -> dict[str, tuple[str, torch.Tensor]]:
    """Type and values of every tensor, as the gguf package reads them."""
    found = {}
    for tensor in gguf.GGUFReader(file).tensors:
        values = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
        found[tensor.name] = (tensor.tensor_type.name, values.reshape(*reversed([int(n) for n in tensor.shape])))
    return found


def metadata_of(file: Path) -> dict[str, Any]:
    return {key: field.contents() for key, field in gguf.GGUFReader(file).fields.items() if not key.startswith("GGUF.")}


def test_every_kind_of_value_is_read_back_from_a_file(tmp_path: Path) -> None:
    metadata: dict[str, Value] = {
        "text": "ü\n", "nothing": "", "texts": ["a", "", "東京"], "none": [], "count": np.uint32(2**32 - 1),
        "real": np.float32(0.1), "yes": np.bool_(True), "signed": np.array([-1, 2**31 - 1], np.int32),
        "reals": np.array([0.5, -2.0], np.float32), "flags": np.array([True, False]),
    }  # fmt: skip
    pieces = iter([(torch.arange(3.0),), (torch.arange(3.0, 5.0),)])
    write_file(tmp_path / "a.gguf", metadata, [Group((Entry("odd", (5,), "F32"),), pieces)])
    found = metadata_of(tmp_path / "a.gguf")
    assert found == {key: value.tolist() if hasattr(value, "tolist") else value for key, value in metadata.items()}
    assert torch.equal(tensors_of(tmp_path / "a.gguf")["odd"][1], torch.arange(5.0))
    assert (tmp_path / "a.gguf").stat().st_size % 32 == 0


@pytest.mark.parametrize("layout", ["hf", "original"])
def test_every_tensor_has_the_name_shape_type_and_values_that_llama_cpp_wants(
    tmp_path: Path, small: Path, layout: str
) -> None:
    source = small
    if layout == "original":
        convert(small, tmp_path / "original", "original")
        source = tmp_path / "original"
    found, expected = tensors_of(write(source)), expected_tensors(SMALL)
    assert found.keys() == expected.keys()
    assert len(found) == 19 * 2 + 3
    for name, (kind, values) in found.items():
        assert torch.equal(values, expected[name]), name  # shapes too; code 8, -0, equals 0
        is_expert = name.endswith("_exps.weight")
        assert kind == ("MXFP4" if is_expert else "BF16" if name.endswith(KEPT) else "F32"), name


@pytest.mark.parametrize("experts", ["mxfp4", "bf16"])
def test_an_f32_file_holds_every_value_exactly_from_mxfp4_and_from_bf16(
    tmp_path: Path, small: Path, experts: str
) -> None:
    source = small
    if experts == "bf16":
        convert(small, tmp_path / "bf16", "bf16")
        source = tmp_path / "bf16"
    file = write(source, "gguf-f32")
    found, expected = tensors_of(file), expected_tensors(SMALL)
    assert found.keys() == expected.keys()
    for name, (kind, values) in found.items():
        assert kind == "F32"
        assert torch.equal(values, expected[name]), name
    assert metadata_of(file)["general.file_type"] == gguf.LlamaFileType.ALL_F32


def test_repacked_blocks_mean_the_same_to_ggml_for_every_byte_and_every_scale() -> None:
    blocks = torch.arange(256, dtype=torch.uint8).repeat(255, 1).view(255, 16, 16)
    blocks = torch.stack([row[torch.randperm(16, generator=torch.Generator().manual_seed(n))] for n, row in
                          enumerate(blocks)])  # fmt: skip
    scales = torch.arange(255, dtype=torch.uint8).unsqueeze(1).expand(255, 16)
    packed = ggml_blocks(blocks, scales)
    assert packed.shape == (255, 16, 17)
    with np.errstate(over="ignore"):  # scale bytes 253 and 254 overflow, as they do in ours
        values = gguf.dequantize(packed.flatten(1).numpy(), gguf.GGMLQuantizationType.MXFP4)
    assert torch.equal(torch.from_numpy(values), mxfp4.decode(blocks, scales, torch.float32))


def test_weights_outside_the_experts_keep_the_dtype_they_are_stored_in(small: Path) -> None:
    tensors = random_tensors(SMALL, "mxfp4")
    half, single = "model.layers.0.self_attn.q_proj.weight", "lm_head.weight"
    changed = tensors | {half: tensors[half].half(), single: tensors[single].float() * 1.1}
    save_file(changed, small / "model.safetensors")
    found = tensors_of(write(small))
    for theirs, ours, kind in (("blk.0.attn_q.weight", half, "F16"), ("output.weight", single, "F32")):
        assert found[theirs][0] == kind
        assert torch.equal(found[theirs][1], changed[ours].float())


def test_every_hyperparameter_of_the_config_is_under_llama_cpps_key_in_its_type(small: Path) -> None:
    file = write(small)
    fields = gguf.GGUFReader(file).fields
    expected = {
        "general.architecture": "gpt-oss", "general.type": "model", "general.name": "gguf",
        "general.file_type": gguf.LlamaFileType.MOSTLY_MXFP4_MOE, "general.quantization_version": 2,
        "gpt-oss.block_count": 2, "gpt-oss.context_length": 512, "gpt-oss.embedding_length": 64,
        "gpt-oss.feed_forward_length": 96, "gpt-oss.expert_feed_forward_length": 96,
        "gpt-oss.expert_count": 6, "gpt-oss.expert_used_count": 2, "gpt-oss.vocab_size": 64,
        "gpt-oss.attention.head_count": 8, "gpt-oss.attention.head_count_kv": 2,
        "gpt-oss.attention.key_length": 16, "gpt-oss.attention.value_length": 16,
        "gpt-oss.attention.sliding_window": 16, "gpt-oss.attention.layer_norm_rms_epsilon": np.float32(1e-5),
        "gpt-oss.rope.freq_base": 150000.0, "gpt-oss.rope.scaling.type": "yarn", "gpt-oss.rope.scaling.factor": 8.0,
        "gpt-oss.rope.scaling.original_context_length": 64, "gpt-oss.rope.scaling.yarn_beta_fast": 32.0,
        "gpt-oss.rope.scaling.yarn_beta_slow": 1.0, "tokenizer.ggml.model": "none",
    }  # fmt: skip
    assert metadata_of(file) == expected
    for key, value in expected.items():
        kind = (
            "STRING" if isinstance(value, str) else "FLOAT32" if isinstance(value, (float, np.floating)) else "UINT32"
        )
        assert [one.name for one in fields[key].types] == [kind], key


def test_layer_types_are_written_where_they_are_not_what_llama_cpp_assumes(tmp_path: Path) -> None:
    kinds = ("full_attention", "full_attention", "sliding_attention")
    file = write(write_tiny(tmp_path / "a", tiny_config(vocab_size=64, layer_types=kinds)))
    assert metadata_of(file)["gpt-oss.attention.sliding_window_pattern"] == [False, False, True]


def test_the_model_cards_licence_is_the_files(small: Path) -> None:
    (small / "README.md").write_text("---\nlicense: apache-2.0\ntags:\n- a\n---\n# A model\nlicense: none\n")
    assert metadata_of(write(small))["general.license"] == "apache-2.0"


def test_the_chat_template_comes_from_either_file_of_the_checkpoint(small: Path) -> None:
    assert "tokenizer.chat_template" not in metadata_of(write(small))
    (small / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ 'config' }}"}))
    assert metadata_of(write(small))["tokenizer.chat_template"] == "{{ 'config' }}"
    (small / "chat_template.jinja").write_text("{{ 'ü' }}", encoding="utf-8")
    assert metadata_of(write(small))["tokenizer.chat_template"] == "{{ 'ü' }}"
    (small / "chat_template.jinja").write_text("{{ 'ü' }}", encoding="latin-1")
    with pytest.raises(DataError, match=r"chat_template\.jinja is not UTF-8 text"):
        write(small)


# The vocabulary


@pytest.fixture(scope="module")
def vocabulary() -> dict[str, Any]:
    """The tokenizer's keys of a model with harmony's vocabulary, of a checkpoint without tokenizer.json."""
    return dict(tokenizer_metadata(Path("nowhere"), 201088))


def test_the_vocabulary_is_that_of_published_files(vocabulary: dict[str, Any]) -> None:
    tokens, types = vocabulary["tokenizer.ggml.tokens"], vocabulary["tokenizer.ggml.token_type"]
    merges = vocabulary["tokenizer.ggml.merges"]
    # What llama.cpp logs for published files of gpt-oss (ggml-org/llama.cpp pull request 17609).
    assert (len(merges), merges[:3]) == (446189, ["Ġ Ġ", "Ġ ĠĠĠ", "ĠĠ ĠĠ"])
    assert len(tokens) == len(set(tokens)) == len(types) == 201088
    control = [tokens[n] for n in np.flatnonzero(types == gguf.TokenType.CONTROL)]
    assert control == [harmony.decode([n]) for n in range(199998, 200018)] + ["<|endofprompt|>"]
    assert list(np.flatnonzero(types == gguf.TokenType.UNUSED)) == list(range(200019, 201088))
    assert tokens[200019] == "[PAD200019]"
    expected = {
        "model": "gpt2", "pre": "gpt-4o", "bos_token_id": 199998, "eos_token_id": 200002, "padding_token_id": 199999,
        "add_bos_token": False,
    }  # fmt: skip
    assert {key: vocabulary[f"tokenizer.ggml.{key}"] for key in expected} == expected
    assert sorted(vocabulary["tokenizer.ggml.eos_token_ids"]) == [199999, 200002, 200012]


def test_tokens_and_merges_encode_as_openai_harmony_does(vocabulary: dict[str, Any]) -> None:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    tokens = {token: n for n, token in enumerate(vocabulary["tokenizer.ggml.tokens"][:199998])}
    merges = [tuple(pair.split(" ")) for pair in vocabulary["tokenizer.ggml.merges"]]
    bpe = Tokenizer(models.BPE(vocab=tokens, merges=merges))
    words = Regex(  # o200k_base's, as tiktoken states it
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
        r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    root = Path(__file__).parents[2]
    texts = [path.read_text(encoding="utf-8") for path in (root / "README.md", Path(__file__), root / "LICENSE")]
    for text in (*texts, "naïve Ωμέγα 東京タワー 🙂🙂 \t\t x=1234567890;\r\n\n" + " " * 70 + "=" * 50):
        assert bpe.encode(text).ids == harmony.encode(text)


@pytest.mark.slow  # the reader takes half a minute for 650,000 strings
def test_the_whole_vocabulary_is_read_back_from_a_file(
    tiny_harmony_checkpoint: Path, vocabulary: dict[str, Any]
) -> None:
    notes: list[str] = []
    file = tiny_harmony_checkpoint.parent / "out.gguf"
    write_gguf(tiny_harmony_checkpoint, file, "gguf", notify=notes.append)
    assert any("has no chat template" in line for line in notes)
    found = metadata_of(file)
    for key, value in vocabulary.items():
        assert found[key] == (value.tolist() if isinstance(value, np.ndarray) else value), key


def test_tokens_that_a_fine_tune_added_or_named_keep_their_names(tmp_path: Path) -> None:
    added = [
        {"id": 200013, "content": "<|mine|>", "special": True},
        {"id": 201088, "content": "<tag>", "special": False},
        {"id": harmony.CALL, "content": "<|call|>", "special": True},
    ]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    harmonys = named_tokens(tmp_path / "none", 201088)
    kinds = gguf.TokenType
    changed = {200013: ("<|mine|>", kinds.CONTROL), 201088: ("<tag>", kinds.USER_DEFINED)}
    assert named_tokens(tmp_path, 201096) == harmonys | changed


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ([{"id": 200002, "content": "<|eot|>"}], r"'<\|eot\|>' has id 200002, expected <\|return\|>"),
        ([{"id": 17, "content": "x"}], "'x' has id 17, expected an id from 199998 to 201087"),
        ([{"id": 201088, "content": "x"}], "'x' has id 201088, expected an id from 199998 to 201087"),
        ([{"id": "a", "content": "x"}], "added_tokens is no list of objects with id and content"),
        ({"id": 1}, "added_tokens is no list of objects with id and content"),
    ],
)
def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path, added: object, message: str) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    with pytest.raises(DataError, match=message):
        named_tokens(tmp_path, 201088)


# What is refused, and what is left when it is


def test_what_a_file_cannot_say_is_told(small: Path, tmp_path: Path) -> None:
    notes: list[str] = []
    write_gguf(small, tmp_path / "out.gguf", "gguf", notify=notes.append)
    assert notes[:2] == ["layer 1 of 2", "layer 2 of 2"]
    assert [line.split(":")[1].split(",")[0].strip() for line in notes[2:]] == [
        "vocab_size is 64",
        "llama.cpp rounds the ends of YaRN's ramp to whole dimensions",
    ]
    for rope in (RopeConfig(factor=1.0), RopeConfig(truncate=True)):
        notes.clear()
        config = tiny_config(num_hidden_layers=1, vocab_size=64, rope=rope)
        write_gguf(write_tiny(tmp_path / f"{rope.factor}", config), tmp_path / "b.gguf", "gguf", overwrite=True,
                   notify=notes.append)  # fmt: skip
        assert [line for line in notes if "YaRN" in line] == []


def test_bf16_experts_are_never_rounded_by_a_conversion(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "base", SMALL, "bf16")
    with pytest.raises(UsageError, match=r"holds bf16 experts, and --to gguf never rounds.*--to mxfp4.*--like BASE"):
        write_gguf(source, tmp_path / "out.gguf", "gguf")


@pytest.mark.parametrize("changes", [{"swiglu_limit": 6.0}, {"swiglu_alpha": 1.0}])
def test_an_activation_that_llama_cpp_does_not_have_is_refused(tmp_path: Path, changes: dict[str, float]) -> None:
    source = write_tiny(tmp_path / "base", SMALL)
    raw = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(raw | changes))
    with pytest.raises(DataError, match=f"{next(iter(changes.values()))}.*llama.cpp has 1.702 and 7.0"):
        write_gguf(source, tmp_path / "out.gguf", "gguf")


def test_a_scale_that_is_nan_is_an_error_naming_tensor_and_expert_and_leaves_nothing(
    tmp_path: Path, small: Path
) -> None:
    tensors = load_file(small / "model.safetensors")
    tensors["model.layers.1.mlp.experts.down_proj_scales"][4, 1, 0] = 255
    save_file(tensors, small / "model.safetensors")
    with pytest.raises(DataError, match=r"layers\.1\.mlp\.experts\.down_proj, expert 4 has scale byte 255"):
        write_gguf(small, tmp_path / "out.gguf", "gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_only_a_file_named_gguf_is_written_and_replaced_only_when_asked(tmp_path: Path, small: Path) -> None:
    with pytest.raises(UsageError, match=r"name must end in \.gguf"):
        write_gguf(small, tmp_path / "out", "gguf")
    (tmp_path / "folder.gguf").mkdir()
    with pytest.raises(UsageError, match="is a directory"):
        write_gguf(small, tmp_path / "folder.gguf", "gguf", overwrite=True)
    target = tmp_path / "new" / "out.gguf"
    write_gguf(small, target, "gguf-f32")
    before = target.read_bytes()
    with pytest.raises(UsageError, match="exists"):
        write_gguf(small, target, "gguf")
    assert target.read_bytes() == before
    write_gguf(small, target, "gguf", overwrite=True)
    assert len(target.read_bytes()) < len(before) / 2
    assert [path.name for path in target.parent.iterdir()] == ["out.gguf"]


def test_a_file_depends_on_the_tensors_alone_and_not_on_layout_or_shards(tmp_path: Path, small: Path) -> None:
    convert(small, tmp_path / "original", "original", max_shard_bytes=20_000)
    for n, source in enumerate((small, tmp_path / "original")):
        write_gguf(source, tmp_path / str(n) / "same.gguf", "gguf")
    assert (tmp_path / "0" / "same.gguf").read_bytes() == (tmp_path / "1" / "same.gguf").read_bytes()
