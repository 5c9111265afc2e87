"""Token ids in, token ids out: batched generation with a KV cache. Knows nothing of text; of harmony, the stop tokens.

What a request yields depends on its prompt and parameters alone: every sample draws from its own seeded generator, so
batch size and neighbours change results only as far as they change the rounding of the logits.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from gptoss_infer.cache import KVCache
from gptoss_infer.checkpoint import Checkpoint, resolve
from gptoss_infer.errors import UsageError
from gptoss_infer.harmony import STOP_TOKENS
from gptoss_infer.loading import load, pick_device
from gptoss_infer.model import GptOss

FinishReason = Literal["stop", "length", "cancelled"]
PREFILL_CHUNK_TOKENS = 512  # bounds attention scores to (B, H, 512, S)


def _form_for(checkpoint: Checkpoint, device: str, dtype: torch.dtype) -> Literal["mxfp4", "bf16"]:
    """Return how `auto` holds the experts of a checkpoint."""
    if checkpoint.experts == "bf16" or pick_device(device).type != "cpu":
        return checkpoint.experts
    config = checkpoint.config
    weights = 3 * config.num_hidden_layers * config.num_local_experts * config.hidden_size * config.intermediate_size
    free_bytes = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return "bf16" if weights * dtype.itemsize < free_bytes / 2 else "mxfp4"


@dataclass(frozen=True)
class SamplingParams:
    """How to sample one prompt; sample i of n is drawn with seed + i."""

    max_tokens: int = 256
    temperature: float = 0.0  # 0 takes the most likely token
    top_p: float = 1.0
    seed: int = 0
    n: int = 1
    logprobs: bool = False  # of the raw distribution: before temperature and top_p
    stop_token_ids: tuple[int, ...] = STOP_TOKENS

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        if self.max_tokens < 1 or self.n < 1:
            raise UsageError(f"max_tokens {self.max_tokens} and n {self.n} must be at least 1")
        if not (self.temperature >= 0 and 0 < self.top_p <= 1):  # NaN neither
            raise UsageError(f"temperature {self.temperature} must be >= 0 and top_p {self.top_p} in (0, 1]")


@dataclass(frozen=True)
class Completion:
    """One sample: its tokens (the stop token included, when one was sampled) and why it ended."""

    prompt_index: int
    sample_index: int
    token_ids: list[int]
    logprobs: list[float] | None
    finish_reason: FinishReason


@dataclass
class _Sequence:
    """A sample being generated."""

    prompt: list[int]
    params: SamplingParams
    prompt_index: int
    sample_index: int
    generator: torch.Generator
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def completion(self) -> Completion:
        assert self.finish_reason is not None, "completion of a running sequence"
        logprobs = self.logprobs if self.params.logprobs else None
        return Completion(self.prompt_index, self.sample_index, self.token_ids, logprobs, self.finish_reason)


class Engine:
    """Generates with one model on one device, `max_batch` sequences at a time."""

    def __init__(self, model: GptOss, *, max_batch: int = 32) -> None:
        self.model, self.max_batch = model, max_batch

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: str,
        *,
        adapter: str | None = None,
        device: str = "auto",
        dtype: torch.dtype = torch.bfloat16,
        experts: Literal["mxfp4", "bf16", "auto"] = "auto",
        max_batch: int = 32,
    ) -> Engine:
        """Load a checkpoint, and a PEFT adapter over it if given.

        Args:
            experts: how they are held in memory. `auto` keeps MXFP4 on a GPU; on a CPU, where decoding an expert costs
                far more than multiplying a few tokens by it, it expands them if that takes less than half of the free
                memory.
        """
        opened = Checkpoint.open(resolve(checkpoint))
        form = _form_for(opened, device, dtype) if experts == "auto" else experts
        model = load(opened, device=device, dtype=dtype, experts=form)
        if adapter is not None:
            from gptoss_infer.lora import load_adapter  # brings peft

            load_adapter(model, adapter)
        return cls(model, max_batch=max_batch)

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams]
    ) -> Iterator[Completion]:
        """Yield the completions of all prompts, in prompt order, n each.

        Raises: UsageError for a prompt that is empty, holds ids outside the vocabulary or leaves no room in the
            context.
        """
        sequences = self._sequences(prompts, params)
        for start in range(0, len(sequences), self.max_batch):
            batch = sequences[start : start + self.max_batch]
            for _ in self._run(batch):
                pass
            yield from (sequence.completion() for sequence in batch)

    def stream(self, prompt: Sequence[int], params: SamplingParams) -> Iterator[int]:
        """Yield the token ids of one sample as they are generated."""
        sequences = self._sequences([prompt], replace(params, n=1))
        for _ in self._run(sequences):
            yield sequences[0].token_ids[-1]

    def _sequences(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[_Sequence]:
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise UsageError(f"{len(prompts)} prompts but {len(each)} sampling parameters; give one, or one for each")
        config = self.model.config
        for index, prompt in enumerate(prompts):
            if not prompt:
                raise UsageError(f"prompt {index} is empty; a harmony prompt has at least a header")
            if min(prompt) < 0 or max(prompt) >= config.vocab_size:
                raise UsageError(
                    f"prompt {index} holds token ids outside 0..{config.vocab_size - 1}; another vocabulary?"
                )
            if len(prompt) >= config.max_position_embeddings:
                raise UsageError(
                    f"prompt {index} has {len(prompt)} tokens; the context holds {config.max_position_embeddings}"
                )
        return [
            _Sequence(list(prompt), p, index, sample, torch.Generator().manual_seed(p.seed + sample))
            for index, (prompt, p) in enumerate(zip(prompts, each, strict=True))
            for sample in range(p.n)
        ]

    @torch.inference_mode()
    def _run(self, batch: list[_Sequence]) -> Iterator[None]:
        """Generate all of `batch` to its end; yields after every token."""
        device = self.model.device
        cache = KVCache(self.model.config, len(batch), self.model.lm_head.weight.dtype, device)
        logits = self.model.lm_head(self._prefill(batch, cache)).float()  # (B, V)
        running = batch
        while True:
            tokens = [self._sample(sequence, row) for sequence, row in zip(running, logits, strict=True)]
            yield
            rows = [i for i, sequence in enumerate(running) if sequence.finish_reason is None]
            if not rows:
                return
            if len(rows) < len(running):
                cache.keep(torch.tensor(rows, device=device))
                running = [running[i] for i in rows]
                tokens = [tokens[i] for i in rows]
            positions = torch.tensor([len(s.prompt) + len(s.token_ids) - 1 for s in running], device=device)
            num_keys = int(positions.max()) + 1
            cache.reserve(num_keys)
            ids = torch.tensor(tokens, device=device)
            logits = self.model(ids[:, None], positions[:, None], cache, num_keys)[:, -1].float()  # (B, V)

    def _prefill(self, batch: list[_Sequence], cache: KVCache) -> Tensor:
        """Run the prompts, right-padded, in chunks; return the hidden state of each one's last token, (B, C)."""
        device = self.model.device
        lengths = torch.tensor([len(sequence.prompt) for sequence in batch], device=device)
        longest = int(lengths.max())
        ids = torch.zeros(len(batch), longest, dtype=torch.int64, device=device)
        for row, sequence in enumerate(batch):
            ids[row, : len(sequence.prompt)] = torch.tensor(sequence.prompt, device=device)
        last = torch.empty(
            len(batch), self.model.config.hidden_size, dtype=self.model.lm_head.weight.dtype, device=device
        )
        for start in range(0, longest, PREFILL_CHUNK_TOKENS):
            end = min(start + PREFILL_CHUNK_TOKENS, longest)
            cache.reserve(end)
            positions = torch.arange(start, end, device=device).expand(len(batch), -1)
            hidden = self.model.hidden(ids[:, start:end], positions, cache, end)  # (B, T, C)
            here = ((lengths > start) & (lengths <= end)).nonzero().flatten()
            last[here] = hidden[here, lengths[here] - 1 - start]
        return last

    def _sample(self, sequence: _Sequence, logits: Tensor) -> int:
        """Draw the next token of one sequence from (V,) fp32 logits, record it, and say whether it was the last."""
        params = sequence.params
        token = draw(logits, params.temperature, params.top_p, sequence.generator)
        sequence.token_ids.append(token)
        if params.logprobs:
            sequence.logprobs.append(float(logits[token] - logits.logsumexp(-1)))
        room = self.model.config.max_position_embeddings - len(sequence.prompt)
        if token in params.stop_token_ids:
            sequence.finish_reason = "stop"
        elif len(sequence.token_ids) >= min(params.max_tokens, room):
            sequence.finish_reason = "length"
        return token


def draw(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """Return a token id from (V,) fp32 logits: the most likely at temperature 0, else by inverse CDF over the nucleus.

    The nucleus is the smallest set of most likely tokens whose probability reaches `top_p`.
    """
    if temperature == 0:
        return int(logits.argmax())
    probabilities, ids = (logits / temperature).softmax(-1).sort(descending=True)
    cumulative = probabilities.double().cumsum(-1)
    size = int((cumulative < top_p).sum()) + 1 if top_p < 1 else len(ids)
    total = cumulative[min(size, len(ids)) - 1]
    point = torch.rand((), generator=generator, dtype=torch.float64).to(logits.device) * total
    index = min(int(torch.searchsorted(cumulative, point)), len(ids) - 1)
    return int(ids[index])
