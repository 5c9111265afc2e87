"""Write a checkpoint as one GGUF file for llama.cpp, and what is built on it: Ollama, LM Studio.

`gguf`: MXFP4 experts with their bytes rearranged, never rounded; attention, embedding and unembedding in their stored
dtype; norms, biases, sinks and router as F32, as in llama.cpp's own conversions. `gguf-f32`: every weight as F32, for
comparing results: with MXFP4 weights, llama.cpp's CPU path rounds what it multiplies them with to 8 bits.

A checkpoint with bf16 experts becomes `gguf-f32` only. As MXFP4 they would have to be rounded, which is the work of
`quantize` and needs its choices. llama.cpp also reads bf16 experts, but that is three times the bytes to keep and to
read for every token; who wants another quantization of llama.cpp's can make it from the F32 file.

What GGUF has no key for is refused (another clamp of SwiGLU), or only told where all GGUF files of gpt-oss share it
(the ends of YaRN's ramp). Sources: llama.cpp's loader and graph for `gpt-oss`, ggml.h; names of its converter.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import numpy as np
import torch
from torch import Tensor

from gptoss_infer import mxfp4
from gptoss_infer.checkpoint.atomic import atomic_file
from gptoss_infer.checkpoint.gguf_file import FORMS, Entry, Group, Kind, Value, write_file
from gptoss_infer.checkpoint.gguf_tokenizer import chat_template, tokenizer_metadata
from gptoss_infer.checkpoint.layouts import expected_shapes
from gptoss_infer.checkpoint.reader import Checkpoint
from gptoss_infer.config import ModelConfig, alternating
from gptoss_infer.errors import DataError, UsageError
from gptoss_infer.harmony.vocabulary import VOCABULARY_SIZE

GgufTarget = Literal["gguf", "gguf-f32"]
# llama.cpp's constants, which no key changes.
SWIGLU_ALPHA, SWIGLU_LIMIT = 1.702, 7.0
# llama.h, enum llama_ftype.
FILE_TYPES = {"gguf": 38, "gguf-f32": 0}  # MOSTLY_MXFP4_MOE, ALL_F32
QUANTIZATION_VERSION = 2  # ggml.h, GGML_QNT_VERSION
PIECE_ROWS = 8192  # of a tensor that are converted at a time

# Ours -> GGUF's, for tensors that keep their dtype, and for those that become F32.
GLOBAL_WEIGHTS = {"model.embed_tokens.weight": "token_embd.weight", "lm_head.weight": "output.weight"}
WEIGHTS = {f"self_attn.{ours}_proj.weight": f"attn_{theirs}.weight"
           for ours, theirs in {"q": "q", "k": "k", "v": "v", "o": "output"}.items()}  # fmt: skip
FLOATS = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.bias": "attn_q.bias",
    "self_attn.k_proj.bias": "attn_k.bias",
    "self_attn.v_proj.bias": "attn_v.bias",
    "self_attn.o_proj.bias": "attn_output.bias",
    "self_attn.sinks": "attn_sinks.weight",
    "post_attention_layernorm.weight": "post_attention_norm.weight",
    "mlp.router.weight": "ffn_gate_inp.weight",
    "mlp.router.bias": "ffn_gate_inp.bias",
}
# Rows of gate_up_proj alternate between what are two tensors in GGUF.
EXPERTS = {"gate_up_proj": ("ffn_gate_exps", "ffn_up_exps"), "down_proj": ("ffn_down_exps",)}
LOW_NIBBLES = 0x0F0F0F0F0F0F0F0F


def write_gguf(
    source: str | Path,
    target: Path,
    to: GgufTarget,
    *,
    overwrite: bool = False,
    notify: Callable[[str], object] = lambda _: None,
) -> None:
    """Write `source` as the file `target`; complete or absent.

    Args:
        notify: told how far it is, in a line per layer, and what the file cannot say.
    Raises: UsageError if experts would have to be rounded, `target` is no name of a GGUF file, or it exists and
        `overwrite` is False; DataError if GGUF cannot express the model.
    """
    if target.suffix != ".gguf":
        raise UsageError(f"the target is {target}; --to {to} writes one file, whose name must end in .gguf")
    checkpoint = Checkpoint.open(source)
    if checkpoint.experts == "bf16" and to == "gguf":
        raise UsageError(
            f"{source} holds bf16 experts, and --to gguf never rounds. Round them with `convert --to mxfp4` first, "
            "best with --like BASE, the MXFP4 checkpoint they came from; or use --to gguf-f32, which is exact and large"
        )
    _check_expressible(checkpoint.config, str(checkpoint.directory))
    with atomic_file(target, overwrite=overwrite) as file:
        metadata = {**_metadata(checkpoint, target.stem, to), **_text_metadata(checkpoint)}
        write_file(file, metadata, list(_Tensors(checkpoint, to, notify).groups()))
    for line in _notes(checkpoint, metadata):
        notify(line)


def _check_expressible(config: ModelConfig, source: str) -> None:
    got = (config.swiglu_alpha, config.swiglu_limit)
    if got != (SWIGLU_ALPHA, SWIGLU_LIMIT):
        raise DataError(
            f"{source}: swiglu_alpha and swiglu_limit are {got[0]} and {got[1]}; llama.cpp has {SWIGLU_ALPHA} and "
            f"{SWIGLU_LIMIT} and no key for others: this model cannot be a GGUF file"
        )


def _metadata(checkpoint: Checkpoint, name: str, to: GgufTarget) -> dict[str, Value]:
    """Return what describes the file and the model; numbers in the types that llama.cpp asks for."""
    config, rope = checkpoint.config, checkpoint.config.rope
    integers = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "expert_feed_forward_length": config.intermediate_size,
        "expert_count": config.num_local_experts,
        "expert_used_count": config.num_experts_per_tok,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.sliding_window": config.sliding_window,
        "rope.scaling.original_context_length": rope.original_max_position_embeddings,
        "vocab_size": config.vocab_size,
    }
    floats = {
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": rope.theta,
        # A factor of 1 is plain RoPE. What YaRN multiplies cosines with is llama.cpp's own 0.1 ln(factor) + 1.
        "rope.scaling.factor": rope.factor,
        "rope.scaling.yarn_beta_fast": rope.beta_fast,
        "rope.scaling.yarn_beta_slow": rope.beta_slow,
    }
    metadata: dict[str, Value] = {
        "general.architecture": "gpt-oss",
        "general.type": "model",
        "general.name": name,
        "general.file_type": np.uint32(FILE_TYPES[to]),
        "general.quantization_version": np.uint32(QUANTIZATION_VERSION),
        "gpt-oss.rope.scaling.type": "yarn",
    }
    license_name = _license(checkpoint.directory)
    if license_name is not None:
        metadata["general.license"] = license_name
    metadata |= {f"gpt-oss.{key}": np.uint32(value) for key, value in integers.items()}
    metadata |= {f"gpt-oss.{key}": np.float32(value) for key, value in floats.items()}
    if config.layer_types != alternating(config.num_hidden_layers):  # what llama.cpp assumes unless told
        sliding = [kind == "sliding_attention" for kind in config.layer_types]
        metadata["gpt-oss.attention.sliding_window_pattern"] = np.array(sliding)
    return metadata


def _license(directory: Path) -> str | None:
    """Return the licence that the checkpoint's model card states in its front matter, such as apache-2.0."""
    card = directory / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.exists() else ""
    front_matter = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    found = re.search(r"^license: *([\w.-]+) *$", front_matter[1], re.MULTILINE) if front_matter else None
    return found[1] if found else None


def _text_metadata(checkpoint: Checkpoint) -> dict[str, Value]:
    metadata = tokenizer_metadata(checkpoint.directory, checkpoint.config.vocab_size)
    template = chat_template(checkpoint.directory)
    return metadata if template is None else metadata | {"tokenizer.chat_template": template}


def _notes(checkpoint: Checkpoint, metadata: dict[str, Value]) -> Iterator[str]:
    """Yield what whoever runs the file should know."""
    config = checkpoint.config
    if config.vocab_size < VOCABULARY_SIZE:
        yield (
            f"note: vocab_size is {config.vocab_size}, less than harmony's {VOCABULARY_SIZE}: the file has no "
            "tokenizer, llama.cpp takes token ids only"
        )
    elif "tokenizer.chat_template" not in metadata:
        yield (
            f"note: {checkpoint.directory} has no chat template, without which servers assume ChatML, a format that "
            "gpt-oss does not know. Put chat_template.jinja of openai/gpt-oss-20b there and convert again, or give it "
            "to llama-server with --chat-template-file"
        )
    if config.rope.factor != 1 and not config.rope.truncate:
        yield (
            "note: llama.cpp rounds the ends of YaRN's ramp to whole dimensions, which this model does not: logits "
            "differ somewhat, more in long contexts, as with every GGUF file of gpt-oss"
        )


@dataclass(frozen=True)
class _Tensors:
    """Every tensor of the file as a promise of its values."""

    checkpoint: Checkpoint
    to: GgufTarget
    notify: Callable[[str], object]

    def groups(self) -> Iterator[Group]:
        """Yield the tensors in the order of the model."""
        for name, target in GLOBAL_WEIGHTS.items():
            yield self._dense(name, (target,), self._kind(name))
        yield self._dense("model.norm.weight", ("output_norm.weight",), "F32")
        for n in range(self.checkpoint.config.num_hidden_layers):
            ours, theirs = f"model.layers.{n}", f"blk.{n}"
            for name, target in WEIGHTS.items():
                yield self._dense(f"{ours}.{name}", (f"{theirs}.{target}",), self._kind(f"{ours}.{name}"))
            for name, target in FLOATS.items():
                yield self._dense(f"{ours}.{name}", (f"{theirs}.{target}",), "F32")
            for weight, targets in EXPERTS.items():
                biases = tuple(f"{theirs}.{target}.bias" for target in targets)
                yield self._dense(f"{ours}.mlp.experts.{weight}_bias", biases, "F32")
                yield self._experts(n, weight, tuple(f"{theirs}.{target}.weight" for target in targets))

    def _kind(self, name: str) -> Kind:
        """Return the type of a weight outside the experts."""
        stored = self.checkpoint.stored[self.checkpoint.slots[name].name].dtype  # safetensors and GGUF name them alike
        return "F32" if self.to == "gguf-f32" else cast(Kind, stored)

    def _dense(self, name: str, targets: tuple[str, ...], kind: Kind) -> Group:
        """Return a tensor under its new name, or one whose columns alternate between `targets`."""
        shape = expected_shapes(self.checkpoint.config, self.checkpoint.experts)[name]
        step = len(targets)
        dealt = shape if step == 1 else (shape[0], shape[1] // step)

        def pieces() -> Iterator[tuple[Tensor, ...]]:
            for rows in self.checkpoint.tensor(name).split(PIECE_ROWS):
                columns = (rows,) if step == 1 else tuple(rows[:, n::step] for n in range(step))
                yield tuple(part.to(FORMS[kind].dtype) for part in columns)

        return Group(tuple(Entry(target, dealt, kind) for target in targets), pieces())

    def _experts(self, layer: int, weight: str, targets: tuple[str, ...]) -> Group:
        """Return the experts of a layer, whose rows alternate between `targets`; an expert at a time."""
        config, step = self.checkpoint.config, len(targets)
        e, c, i = config.num_local_experts, config.hidden_size, config.intermediate_size
        kind: Kind = "F32" if self.to == "gguf-f32" else "MXFP4"
        shape = (e, i, c) if weight == "gate_up_proj" else (e, c, i)

        def pieces() -> Iterator[tuple[Tensor, ...]]:
            if weight == "gate_up_proj":
                self.notify(f"layer {layer + 1} of {config.num_hidden_layers}")
            for expert in range(e):
                rows = self._expert(layer, weight, expert)
                yield tuple(rows[n::step] for n in range(step))

        return Group(tuple(Entry(target, shape, kind) for target in targets), pieces())

    def _expert(self, layer: int, weight: str, expert: int) -> Tensor:
        """Return one expert's rows: fp32 (out, in), or bytes as ggml has them, (out, G, 17)."""
        if self.to == "gguf-f32":
            return self.checkpoint.expert(layer, weight, expert)
        blocks, scales = self.checkpoint.expert_blocks(layer, weight, expert)
        if bool((scales == mxfp4.SCALE_NAN).any()):
            raise DataError(
                f"{self.checkpoint.directory}: model.layers.{layer}.mlp.experts.{weight}, expert {expert} has scale "
                f"byte {mxfp4.SCALE_NAN}, which is NaN, and which llama.cpp reads as a number; the weights are damaged"
            )
        return ggml_blocks(blocks, scales)


def ggml_blocks(blocks: Tensor, scales: Tensor) -> Tensor:
    """Return MXFP4 as ggml stores it: per block its scale byte, then byte j with elements j (low nibble) and j + 16.

    Args:
        blocks: uint8 (..., G, 16), byte j with elements 2j (low nibble) and 2j + 1.
        scales: uint8 (..., G).
    Returns: uint8 (..., G, 17). Codes and scale bytes mean the same in both.
    Source: block_mxfp4 in ggml-common.h and its quantizer in ggml-quants.c.
    """
    mxfp4.check_pair(blocks, scales)
    halves = blocks.contiguous().view(torch.int64)  # (..., G, 2): elements 0 to 15 and 16 to 31, eight bytes at a time
    first, second = halves[..., 0], halves[..., 1]
    even = (first & LOW_NIBBLES) | ((second & LOW_NIBBLES) << 4)  # elements 0, 2, ... with 16, 18, ...
    odd = ((first >> 4) & LOW_NIBBLES) | (second & ~LOW_NIBBLES)
    packed = torch.empty(*scales.shape, 1 + mxfp4.BLOCK // 2, dtype=torch.uint8)
    packed[..., 0] = scales
    packed[..., 1::2] = even.unsqueeze(-1).view(torch.uint8)
    packed[..., 2::2] = odd.unsqueeze(-1).view(torch.uint8)
    return packed
