"""What llama.cpp makes of our GGUF files: the same logits, the same tokens of text, the same end of an answer.

For an environment of its own, since llama-cpp-python is built from source (10 minutes): `pip install -c
.ci/constraints.txt -e ".[test]" llama-cpp-python==0.3.36`, then this file with pytest. Its last tests are on a real
model and real text, which two variables name:

    GPTOSS_ORACLE_CHECKPOINT  a checkpoint that a CPU can run, with harmony's vocabulary and MXFP4 experts
    GPTOSS_ORACLE_CHATS       conversations that it knows something about, one per line, as training reads them
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_config, write_tiny

import gptoss_infer as gi
from gptoss_infer import harmony
from gptoss_infer.checkpoint.gguf import GgufTarget, write_gguf
from gptoss_infer.config import ModelConfig, RopeConfig

llama_cpp = pytest.importorskip("llama_cpp", reason="oracle: pip install llama-cpp-python (built from source, 10 min)")

CHECKPOINT, CHATS = os.environ.get("GPTOSS_ORACLE_CHECKPOINT"), os.environ.get("GPTOSS_ORACLE_CHATS")
on_real_text = pytest.mark.skipif(
    not (CHECKPOINT and CHATS), reason="GPTOSS_ORACLE_CHECKPOINT and GPTOSS_ORACLE_CHATS name no model and no text"
)
MAX_TOKENS = 1024


@contextmanager
def loaded(file: Path, *, vocab_only: bool = False) -> Iterator[Any]:
    parameters = llama_cpp.llama_model_default_params()
    parameters.vocab_only, parameters.n_gpu_layers = vocab_only, 0
    model = llama_cpp.llama_model_load_from_file(str(file).encode(), parameters)
    assert model, f"llama.cpp does not load {file}"
    yield model
    llama_cpp.llama_model_free(model)


@contextmanager
def context(model: Any) -> Iterator[Any]:
    """A context that computes in fp32 wherever the weights let it: no fp16 cache, no flash attention."""
    parameters = llama_cpp.llama_context_default_params()
    parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = MAX_TOKENS
    parameters.n_threads = parameters.n_threads_batch = 1
    parameters.type_k = parameters.type_v = llama_cpp.GGML_TYPE_F32
    parameters.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    made = llama_cpp.llama_init_from_model(model, parameters)
    assert made
    yield made
    llama_cpp.llama_free(made)


def logits(model: Any, made: Any, ids: list[int], past: int = 0) -> torch.Tensor:
    """(T, V) for the positions of `ids`, which follow `past` others."""
    batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for n, token in enumerate(ids):
        batch.token[n], batch.pos[n], batch.n_seq_id[n], batch.seq_id[n][0] = token, past + n, 1, 0
        batch.logits[n] = 1
    assert llama_cpp.llama_decode(made, batch) == 0
    size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    found = np.ctypeslib.as_array(llama_cpp.llama_get_logits(made), (len(ids), size)).copy()
    llama_cpp.llama_batch_free(batch)
    return torch.from_numpy(found)


def both_logits(directory: Path, to: GgufTarget, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ours in fp32, and llama.cpp's from the file of the same checkpoint."""
    write_gguf(directory, directory / "out.gguf", to, overwrite=True)
    with loaded(directory / "out.gguf") as model, context(model) as made:
        theirs = logits(model, made, ids)
    with torch.no_grad():
        return gi.load(directory, device="cpu", dtype=torch.float32)(torch.tensor([ids]))[0], theirs


YARN = RopeConfig(factor=8.0, original_max_position_embeddings=64, truncate=True)  # llama.cpp knows no other
CONFIGS = {
    "yarn": tiny_config(rope=YARN),
    "plain": tiny_config(rope=RopeConfig(factor=1.0, original_max_position_embeddings=512)),
    "layer types": tiny_config(rope=YARN, layer_types=("full_attention", "full_attention", "sliding_attention")),
    "groups of 3": tiny_config(rope=YARN, num_attention_heads=9, num_key_value_heads=3, sliding_window=7),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_logits_of_an_f32_file_are_ours(tmp_path: Path, config: ModelConfig) -> None:
    ids = torch.randint(0, 512, (120,), generator=torch.Generator().manual_seed(1)).tolist()
    ours, theirs = both_logits(write_tiny(tmp_path / "base", config), "gguf-f32", ids)
    # Sums of up to 128 products, each off by 2**-24 of its size or less, in one order or another: 8e-6 if all add up.
    assert float((ours - theirs).abs().max() / ours.std()) < 1e-5


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_logits_of_an_mxfp4_file_are_ours_up_to_activations_of_8_bits(tmp_path: Path, config: ModelConfig) -> None:
    ids = torch.randint(0, 512, (120,), generator=torch.Generator().manual_seed(1)).tolist()
    ours, theirs = both_logits(write_tiny(tmp_path / "base", config), "gguf", ids)
    # A normal block of 32 has its largest value at about 2.1 deviations. Rounded to 127 steps of that, a value is off
    # by 0.5% of a deviation: 1.2% after the 6 products of 3 layers, and as much again for bf16 in all others. The
    # median, since what is rounded may choose another expert.
    error = (ours - theirs).square().mean(-1).sqrt() / ours.std()
    assert float(error.median()) < 0.024


@pytest.fixture(scope="module")
def harmony_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("harmony")
    write_tiny(folder / "base", tiny_config(num_hidden_layers=1, vocab_size=201088))
    write_gguf(folder / "base", folder / "out.gguf", "gguf")
    return folder / "out.gguf"


def tokenized(vocabulary: Any, text: str) -> list[int]:
    data = text.encode()
    found = (llama_cpp.llama_token * (len(data) + 16))()
    count = llama_cpp.llama_tokenize(vocabulary, data, len(data), found, len(found), True, True)
    return list(found[:count])


def test_rendered_conversations_are_the_same_tokens_to_llama_cpp(harmony_file: Path) -> None:
    call = {"id": "1", "function": {"name": "weather", "arguments": {"city": "Zürich", "days": 3}}}
    parameters = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
    chat = {
        "messages": [
            {"role": "system", "content": "Be brief.\n\nUse tools."},
            {
                "role": "user",
                "content": "What's it like in Zürich? 12345.678 °C? \t 🙂\r\n\r\n  if x:\n    y()",
            },
            {"role": "assistant", "thinking": "They'd like it: I'll ask.", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "1", "content": '{"C": [4, 5, 6]}'},
            {"role": "assistant", "content": "4 °C, 東京よりも寒い."},
        ],
        "tools": [{"function": {"name": "weather", "parameters": parameters}}],
    }
    root = Path(__file__).parents[2]
    texts = [path.read_text(encoding="utf-8") for path in (root / "README.md", root / "LICENSE", Path(__file__))]
    chats = [chat, *({"messages": [{"role": "user", "content": text.replace("<|", "< |")}]} for text in texts)]
    with loaded(harmony_file, vocab_only=True) as model:
        vocabulary = llama_cpp.llama_model_get_vocab(model)
        assert not llama_cpp.llama_vocab_get_add_bos(vocabulary)
        for one in chats:
            ids = harmony.render(harmony.conversation_from_chat(one, date="2025-06-28"), completion=True).token_ids
            assert tokenized(vocabulary, harmony.decode(ids)) == ids


def test_llama_cpp_ends_a_generation_at_our_stop_tokens_and_at_no_other(harmony_file: Path) -> None:
    with loaded(harmony_file, vocab_only=True) as model:
        vocabulary = llama_cpp.llama_model_get_vocab(model)
        ends = [n for n in range(201088) if llama_cpp.llama_vocab_is_eog(vocabulary, n)]
        assert ends == sorted(harmony.STOP_TOKENS)
        assert llama_cpp.llama_vocab_eos(vocabulary) == harmony.RETURN


@cache
def real_text() -> list[tuple[list[int], int, torch.Tensor]]:
    """Conversations of 2,000 positions: ids, first position whose context no other conversation has, our top tokens."""
    assert CHECKPOINT
    assert CHATS
    model = gi.load(CHECKPOINT, device="cpu", dtype=torch.float32)
    first: list[int] = []
    found: list[tuple[list[int], int, torch.Tensor]] = []
    for line in Path(CHATS).read_text(encoding="utf-8").splitlines():
        ids = harmony.render(harmony.conversation_from_chat(json.loads(line), date=None)).token_ids[:MAX_TOKENS]
        shared = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(first, ids, strict=False))))
        with torch.no_grad():
            found.append((ids, shared, model(torch.tensor([ids]))[0].argmax(-1)))
        first = first or ids
        if sum(len(one) - start for one, start, _ in found) >= 2000:
            return found
    pytest.fail(f"{CHATS} has fewer than 2000 tokens")


def agreement(file: Path) -> float:
    """Share of positions at which llama.cpp's top token is ours."""
    same = total = 0
    with loaded(file) as model, context(model) as made:
        for ids, shared, ours in real_text():
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(made), True)
            theirs = logits(model, made, ids).argmax(-1)
            same += int((theirs == ours)[shared:].sum())
            total += len(ids) - shared
    print(f"{file.name}: {same} of {total} top tokens are ours")
    return same / total


@on_real_text
@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("to", "least"), [("gguf", 0.97), ("gguf-f32", 1.0)])
def test_top_tokens_on_real_text_are_ours(tmp_path: Path, to: GgufTarget, least: float) -> None:
    assert CHECKPOINT
    write_gguf(CHECKPOINT, tmp_path / f"{to}.gguf", to)
    assert agreement(tmp_path / f"{to}.gguf") >= least


@on_real_text
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_greedy_answer_of_an_f32_file_is_the_engines_and_ends_where_it_does(tmp_path: Path) -> None:
    assert CHECKPOINT
    text = harmony.encode("What is the capital of France?")
    question = [harmony.START, *harmony.encode("user"), harmony.MESSAGE, *text]
    header = [harmony.START, *harmony.encode("assistant"), harmony.CHANNEL, *harmony.encode("final"), harmony.MESSAGE]
    prompt = [*question, harmony.END, *header]
    engine = gi.Engine.from_checkpoint(CHECKPOINT, device="cpu", dtype=torch.float32)
    (ours,) = engine.generate([prompt], gi.SamplingParams(max_tokens=48, temperature=0.0))
    write_gguf(CHECKPOINT, tmp_path / "out.gguf", "gguf-f32")
    answer: list[int] = []
    with loaded(tmp_path / "out.gguf") as model, context(model) as made:
        vocabulary = llama_cpp.llama_model_get_vocab(model)
        step, past = prompt, 0
        while len(answer) < 48 and not (answer and llama_cpp.llama_vocab_is_eog(vocabulary, answer[-1])):
            answer.append(int(logits(model, made, step, past)[-1].argmax()))
            step, past = [answer[-1]], past + len(step)
    assert answer == list(ours.token_ids)
    assert ours.finish_reason == "stop"
