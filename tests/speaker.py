"""A checkpoint that speaks harmony without having been trained: its weights are written by hand.

Each known token has a direction of its own, and the unembedding says what may follow it. Attention adds what occurred
before: in the first layer among the last 16 tokens, by which a message knows its channel (after analysis the model goes
on, a final message ends in <|return|>, a call in <|call|>); in the second anywhere, by which the reasoning effort
chooses the first word. Greedy it answers `<|channel|>final<|message|> yes<|return|>` at effort low, " no" at medium,
" sun" at high; sampled, also with analysis first, and with calls of `functions.f`.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import torch
from conftest import tiny_config
from safetensors.torch import save_file

from gptoss_infer.checkpoint.layouts import expected_shapes
from gptoss_infer.config import to_hf_json
from gptoss_infer.harmony import CALL, CHANNEL, CONSTRAIN, END, MESSAGE, RETURN, START, encode

WORDS = (" yes", " no", " sun", " moon", " red", " blue", " cat", " dog")


def write_speaker(directory: Path) -> Path:
    """Write the checkpoint in Hugging Face's layout."""
    config = tiny_config(num_hidden_layers=2, vocab_size=201088)
    tensors = {}
    for name, shape in expected_shapes(config, "mxfp4").items():
        is_code = name.endswith(("_blocks", "_scales"))
        tensors[name] = torch.zeros(shape, dtype=torch.uint8 if is_code else torch.bfloat16)
        if name.endswith("norm.weight"):
            tensors[name] += 1
        if name.endswith("sinks"):
            tensors[name] -= 10_000
    # By layer: what attention listens for, and the direction that it then adds.
    heard = [
        {"analysis": 60, "final": 61, "comment": 62},
        {" low": 57, " medium": 58, " high": 59},
    ]  # and where, by layer
    direction: dict[int, int] = {}
    embedding, unembedding = tensors["model.embed_tokens.weight"], tensors["lm_head.weight"]
    embedding[:, 0] = 1  # all the tokens it does not know

    def token(text: str | int) -> int:
        (found,) = [text] if isinstance(text, int) else encode(text)
        if found not in direction:
            direction[found] = len(direction) + 1
            embedding[found] = 0
            embedding[found, direction[found]] = 1
        return found

    def may_follow(first: str | int, second: str | int, weight: float = 4.0) -> None:
        before, after = token(first), token(second)
        unembedding[after, direction[before]] = weight

    def heard_favours(word: str, second: str | int, weight: float) -> None:
        unembedding[token(second), (heard[0] | heard[1])[word]] = weight

    may_follow("assistant", CHANNEL)
    may_follow(CHANNEL, "final")
    may_follow(CHANNEL, "analysis", 3.9)
    may_follow(CHANNEL, "comment", 3.8)
    heard_favours("analysis", "analysis", -4)  # once is enough
    for first, second in (("analysis", MESSAGE), ("final", MESSAGE)):
        may_follow(first, second)
    call = ["comment", "ary", " to", "=", "functions", ".f", " ", CONSTRAIN, "json", MESSAGE]
    for first, second in itertools.pairwise(call):
        may_follow(first, second)
    may_follow(MESSAGE, "{}", 3.0)
    heard_favours("comment", "{}", 4)
    may_follow("{}", CALL)
    for number, word in enumerate(WORDS):
        may_follow(MESSAGE, word, 4 - 0.02 * number)
        may_follow(word, RETURN, 3.5)
        may_follow(word, END, 3.5)
        for other, next_word in enumerate(WORDS):
            may_follow(word, next_word, 4.3 - 0.02 * other)
    heard_favours("final", RETURN, 4)
    heard_favours("analysis", END, 3)
    for effort, word in zip(heard[1], WORDS, strict=False):
        heard_favours(effort, word, 2)
    may_follow(END, START)
    may_follow(START, "assistant")
    for layer, columns in enumerate(heard):
        value, output = (tensors[f"model.layers.{layer}.self_attn.{name}_proj.weight"] for name in "vo")
        for row, (word, column) in enumerate(columns.items()):
            value[row, direction[token(word)]] = 1
            output[column, row] = 1
    directory.mkdir(parents=True)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(to_hf_json(config, quantized=True)))
    return directory
