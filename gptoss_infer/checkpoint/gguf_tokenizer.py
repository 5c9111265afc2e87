"""What a GGUF file says of text: harmony's vocabulary as llama.cpp's BPE wants it, stop tokens, the chat template.

llama.cpp ends a generation at <|return|>, <|call|> and <|endoftext|>, which it finds by their spelling, and Ollama at
`eos_token_ids`. Under the name `gpt-4o` llama.cpp splits text as o200k_base does, except around some letters that are
not ASCII: only token ids of ours are sure to be the prompt that was trained. It also reads <|start|>, <|message|>,
<|channel|>, <|constrain|> and <|end|> in a user's text as control tokens, asked to or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gptoss_infer.checkpoint.gguf_file import Value
from gptoss_infer.config import read_json
from gptoss_infer.errors import DataError
from gptoss_infer.harmony import vocabulary

# llama.h, enum llama_token_type.
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
START_OF_TEXT = 199998
END_OF_PROMPT = 200018  # the last id that o200k_base or harmony names, other than as reserved
# What the format consists of; the other control tokens are a reserve that a fine-tune may name.
FORMAT_TOKENS = (
    vocabulary.END_OF_TEXT, vocabulary.RETURN, vocabulary.CONSTRAIN, vocabulary.CHANNEL, vocabulary.START,
    vocabulary.END, vocabulary.MESSAGE, vocabulary.CALL,
)  # fmt: skip


def tokenizer_metadata(directory: Path, vocab_size: int) -> dict[str, Value]:
    """Return the tokenizer's keys for a model of `vocab_size` ids: harmony's, or none where those do not fit.

    Reads the names of added tokens from `directory`/tokenizer.json, if it is there; ids without a name are `[PADn]`.
    """
    if vocab_size < vocabulary.VOCABULARY_SIZE:
        return {"tokenizer.ggml.model": "none"}  # llama.cpp then takes and gives token ids only
    sequences = vocabulary.byte_sequences()
    spelled = [_spell(sequence) for sequence in sequences]
    tokens = spelled + [f"[PAD{token}]" for token in range(len(spelled), vocab_size)]
    types = [NORMAL] * len(spelled) + [UNUSED] * (vocab_size - len(spelled))
    for token, (name, kind) in named_tokens(directory, vocab_size).items():
        tokens[token], types[token] = name, kind
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-4o",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array(types, np.int32),
        "tokenizer.ggml.merges": [f"{spelled[left]} {spelled[right]}" for left, right in merges(sequences)],
        "tokenizer.ggml.bos_token_id": np.uint32(START_OF_TEXT),
        "tokenizer.ggml.eos_token_id": np.uint32(vocabulary.RETURN),
        "tokenizer.ggml.eos_token_ids": np.array(vocabulary.STOP_TOKENS, np.int32),
        "tokenizer.ggml.padding_token_id": np.uint32(vocabulary.END_OF_TEXT),
        "tokenizer.ggml.add_bos_token": np.bool_(False),
    }


def _spell(sequence: bytes) -> str:
    return "".join(map(_ALPHABET.__getitem__, sequence))


def _byte_characters() -> list[str]:
    """Return GPT-2's character for every byte: itself if printable in Latin-1, else the next from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


_ALPHABET = _byte_characters()


def merges(sequences: Sequence[bytes]) -> list[tuple[int, int]]:
    """Return the pairs of ids that BPE merges, first merges first, for tokens in the order of their ranks.

    A vocabulary of ranks merges any two neighbours whose bytes together are a token, the token of least rank first. As
    a list of pairs that is every cut of every token into two tokens.
    """
    rank = {sequence: n for n, sequence in enumerate(sequences)}
    pairs: list[tuple[int, int]] = []
    for sequence in sequences:
        cuts = ((sequence[:n], sequence[n:]) for n in range(1, len(sequence)))
        pairs += sorted((rank[left], rank[right]) for left, right in cuts if left in rank and right in rank)
    return pairs


def named_tokens(directory: Path, vocab_size: int) -> dict[int, tuple[str, int]]:
    """Return spelling and type of the tokens that are no text: harmony's, and those that a fine-tune added or named."""
    named = {token: (vocabulary.decode([token]), CONTROL) for token in range(START_OF_TEXT, END_OF_PROMPT)}
    named[END_OF_PROMPT] = ("<|endofprompt|>", CONTROL)
    file = directory / "tokenizer.json"
    if not file.exists():
        return named
    for added in _added_tokens(file):
        token, name = added["id"], added["content"]
        if not START_OF_TEXT <= token < vocab_size or (token in FORMAT_TOKENS and name != named[token][0]):
            expected = named[token][0] if token in FORMAT_TOKENS else f"an id from {START_OF_TEXT} to {vocab_size - 1}"
            raise DataError(
                f"{file}: added token {name!r} has id {token}, expected {expected}; is tokenizer.json from another "
                "model? Without the file, the tokens are harmony's"
            )
        named[token] = (name, CONTROL if added.get("special", True) else USER_DEFINED)
    return named


def _added_tokens(file: Path) -> list[dict[str, Any]]:
    added = read_json(file).get("added_tokens", [])
    try:
        assert all(isinstance(one["id"], int) and isinstance(one["content"], str) for one in added)
    except (AssertionError, KeyError, TypeError):
        raise DataError(f"{file}: added_tokens is no list of objects with id and content; fetch it again") from None
    return added


def chat_template(directory: Path) -> str | None:
    """Return the checkpoint's Jinja template, from its own file or from tokenizer_config.json; None if it has none."""
    file = directory / "chat_template.jinja"
    if file.exists():
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{file} is not UTF-8 text ({error}); fetch it again") from None
    config = directory / "tokenizer_config.json"
    template = read_json(config).get("chat_template") if config.exists() else None
    return template if isinstance(template, str) else None
