"""Token ids in, token ids out: continuous batching over a paged cache. Of harmony it knows the stop tokens alone.

A step (`gptoss_infer.scheduler` plans it) computes one token of every sample that is generating and parts of waiting
prompts, in one flat batch; samples come and go between steps. The n samples of a prompt, and prompts that begin alike,
share the pages of what they have in common.

What a request yields depends on its prompt and parameters alone: random numbers are a function of seed and position.
Neighbours change results only as far as they change the rounding of logits, and with `deterministic` not even that:
prompts are cut where their own length says, and where the order of a sum depends on its neighbours (everywhere but in
the compiled kernels of a CPU) every chunk of every sample is computed on its own. That costs the sharing of weights
between samples, which is what batching is for; use it to find out what caused a difference.

Requests may name adapters, which come and go while the engine runs. A step computes those of each adapter together, one
adapter after the other, and reads the weights as often; keys and values are shared within an adapter alone.
"""

from __future__ import annotations

import functools
import itertools
import os
import sys
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from gptoss_infer import kernels, scheduler
from gptoss_infer.checkpoint import Checkpoint, resolve
from gptoss_infer.compiled import CompiledModel
from gptoss_infer.config import ModelConfig
from gptoss_infer.constraints import Constraint, Follower, allowed_tokens, follow
from gptoss_infer.errors import UsageError
from gptoss_infer.graphs import Graphs, why_no_graphs
from gptoss_infer.harmony import STOP_TOKENS
from gptoss_infer.harmony.vocabulary import VOCABULARY_SIZE
from gptoss_infer.loading import load, pick_device, show_progress
from gptoss_infer.model import GptOss
from gptoss_infer.pages import Kind, PagedCache, step_of
from gptoss_infer.sampling import Draws
from gptoss_infer.scheduler import Chunk, Limits, Pool, Scheduler
from gptoss_infer.tiled import tile_experts

FinishReason = Literal["stop", "length", "cancelled"]
STEP_TOKENS = {"cpu": 1024, "cuda": 8192}  # scores of attention and products of experts grow with it
PAGE_TOKENS = 64
CACHE_SHARE = {"cpu": 0.25, "cuda": 0.9}  # of the memory that is free, by default
BASE = "base"  # asks for no adapter
_NUMBERS = itertools.count(1)


def form_for(checkpoint: Checkpoint, device: str, dtype: torch.dtype) -> Literal["mxfp4", "bf16"]:
    """Return how `experts="auto"` holds the experts of a checkpoint."""
    if checkpoint.experts == "bf16" or pick_device(device).type != "cpu" or kernels.cpu_kernels() is not None:
        return checkpoint.experts
    config = checkpoint.config
    weights = 3 * config.num_hidden_layers * config.num_local_experts * config.hidden_size * config.intermediate_size
    return "bf16" if weights * dtype.itemsize < _free_bytes(torch.device("cpu")) / 2 else "mxfp4"


def _free_bytes(device: torch.device) -> int:
    if device.type == "cpu":
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return torch.cuda.mem_get_info(device)[0]


@dataclass(frozen=True)
class SamplingParams:
    """How to sample one prompt; sample i of n is drawn with seed + i."""

    max_tokens: int = 256
    temperature: float = 0.0  # 0 takes the most likely token
    top_p: float = 1.0
    top_k: int = 0  # 0 keeps all
    min_p: float = 0.0  # a share of the largest probability; 0 keeps all
    seed: int = 0
    n: int = 1
    logprobs: bool = False  # of the raw distribution: before temperature and top_p
    stop_token_ids: tuple[int, ...] = STOP_TOKENS
    constraint: Constraint | None = None  # what the turn may hold, such as JSON of a schema
    adapter: str | None = None  # a name given to `Engine.load_adapter`, or BASE; None takes what the engine came with

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        if self.max_tokens < 1 or self.n < 1:
            raise UsageError(f"max_tokens {self.max_tokens} and n {self.n} must be at least 1")
        if not (self.temperature >= 0 and 0 < self.top_p <= 1):  # NaN neither
            raise UsageError(f"temperature {self.temperature} must be >= 0 and top_p {self.top_p} in (0, 1]")
        if not (0 <= self.top_k < 2**31 and 0 <= self.min_p <= 1):
            raise UsageError(f"top_k {self.top_k} must be from 0 to 2^31 - 1 and min_p {self.min_p} in [0, 1]")
        if not -(2**63) <= self.seed <= 2**63 - self.n:
            raise UsageError(f"seed {self.seed} and those of all {self.n} samples must fit in 64 bits, with a sign")
        if self.constraint is not None and not set(STOP_TOKENS) <= set(self.stop_token_ids):
            raise UsageError(f"stop_token_ids {self.stop_token_ids} must hold {STOP_TOKENS} if there is a constraint")


@dataclass(frozen=True)
class Completion:
    """One sample: its tokens (the stop token included, when one was sampled) and why it ended."""

    prompt_index: int
    sample_index: int
    token_ids: list[int]
    logprobs: list[float] | None
    finish_reason: FinishReason


@dataclass(eq=False)
class Sample(scheduler.Sequence):
    """A sample that is being generated, or was."""

    params: SamplingParams = SamplingParams()
    prompt_index: int = 0
    sample_index: int = 0
    adapter: str | None = None  # what the model knows it by; None: none
    follower: Follower | None = None  # of its tokens, if they are constrained
    logprobs: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    @property
    def token_ids(self) -> list[int]:
        """What was generated so far."""
        return self.tokens[self.num_prompt :]

    def completion(self) -> Completion:
        """Return the sample once it ended."""
        assert self.finish_reason is not None, "completion of a running sample"
        logprobs = self.logprobs if self.params.logprobs else None
        return Completion(self.prompt_index, self.sample_index, self.token_ids, logprobs, self.finish_reason)


class Engine:
    """Generates with one model on one device. Not for several threads at once."""

    def __init__(
        self,
        model: GptOss,
        *,
        max_batch: int = 32,
        step_tokens: int | None = None,
        cache_tokens: int | None = None,
        page_tokens: int = PAGE_TOKENS,
        deterministic: bool = False,
    ) -> None:
        """Set aside the memory for keys and values.

        Args:
            max_batch: samples that generate at the same time.
            step_tokens: tokens computed at a time, rounded up to a page; by default 1,024 on a CPU, 8,192 on a GPU.
            cache_tokens: of all samples together; by default what fits in a quarter of a CPU's free memory, or in 90%
                of a GPU's, and no more than `max_batch` whole contexts.
            deterministic: see the module docstring.
        """
        self.model, self.max_batch, config = model, max_batch, model.config
        wanted = max(step_tokens or STEP_TOKENS[model.device.type], max_batch)
        step_tokens = -(-wanted // page_tokens) * page_tokens
        self.limits = Limits(max_batch, step_tokens, page_tokens, config.sliding_window, deterministic)
        dtype = model.lm_head.weight.dtype
        if cache_tokens is None:
            cache_tokens = _cache_tokens(config, self.limits, dtype, model.device)
        # Window layers: what every sample sees, as much again for kept prefixes, and a step's new tokens.
        num_pages: dict[Kind, int] = {
            "full": -(-cache_tokens // page_tokens),
            "window": max_batch * 2 * (self.limits.window_pages + 1) + step_tokens // page_tokens,
        }
        self.cache = PagedCache(config, num_pages, page_tokens, dtype, model.device)
        if model.adapters is not None:  # another engine's
            model.adapters.use(None)
        self.compiled = CompiledModel.of(model, self.cache)
        if self.compiled is not None:  # if not, a warning said why
            print_once(
                f"layers: compiled CPU kernels, {self.compiled.compiled.level}, {torch.get_num_threads()} threads"
            )
        self.graphs: Graphs | None = None
        if model.device.type != "cpu":
            print_once(f"attention: {_path(self.cache.why_no_kernels)}")
            print_once(f"norms, sampling: {_path(kernels.why_no_triton(model.lm_head.weight))}")
            why_not = why_no_graphs(model, self.cache)
            print_once(f"decoding: {'CUDA graphs' if why_not is None else f'step by step, because {why_not}'}")
            self.graphs = Graphs(model, self.cache) if why_not is None else None
        self.scheduler = Scheduler(self.limits, Pool(num_pages["full"]), Pool(num_pages["window"]))
        self.default_adapter: str | None = None
        self._keys: dict[str, str] = {}  # of adapters: what the model knows each by, another whenever a name is given

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
        deterministic: bool = False,
    ) -> Engine:
        """Load a checkpoint, and a PEFT adapter over it if given.

        Args:
            experts: how they are held in memory. `auto` keeps MXFP4 on a GPU, and on a CPU with compiled kernels; on a
                CPU without, where decoding an expert costs far more than multiplying a few tokens by it, it expands
                them if that takes less than half of the free memory.
        """
        opened = Checkpoint.open(resolve(checkpoint))
        form = form_for(opened, device, dtype) if experts == "auto" else experts
        model = load(opened, device=device, dtype=dtype, experts=form, progress=show_progress())
        if model.device.type == "cuda":
            print(tile_experts(model), file=sys.stderr)
        engine = cls(model, max_batch=max_batch, deterministic=deterministic)
        if adapter is not None:
            engine.load_adapter("adapter", adapter)
            engine.default_adapter = "adapter"
        return engine

    def load_adapter(self, name: str, adapter: str | Path) -> None:
        """Let requests ask for a PEFT adapter over the model by a name; those that run go on.

        Raises: UsageError for a name that is taken; DataError if any part of the adapter does not fit the model.
        """
        from gptoss_infer.lora import Adapters  # brings peft

        if name == BASE or name in self._keys:
            raise UsageError(f"there is an adapter {name!r} already; unload it first, or choose another name")
        if self.model.adapters is None:
            self.model.adapters = Adapters(self.model)
        key = f"adapter {next(_NUMBERS)}"  # of all engines over the model
        self.model.adapters.add(key, adapter)
        self._keys[name] = key

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter and free its memory. Raises: UsageError if there is none, or a request still needs it."""
        if self.model.adapters is None or name not in self._keys:
            raise UsageError(f"there is no adapter {name!r}; loaded are {', '.join(sorted(self._keys)) or 'none'}")
        key = self._keys[name]
        queued: list[Sample] = [*self.scheduler.running, *self.scheduler.waiting]  # type: ignore[list-item]
        if num_asking := sum(one.adapter == key for one in queued):
            raise UsageError(
                f"{num_asking} samples are being generated with adapter {name!r}; end or cancel them first"
            )
        self._use(None)
        self.model.adapters.remove(key)
        if self.compiled is not None:
            self.compiled.forget(key)
        del self._keys[name]
        if self.default_adapter == name:
            self.default_adapter = None

    def _use(self, adapter: str | None) -> None:
        """Compute with an adapter, whatever was computed with before, also by another engine over the model."""
        if self.model.adapters is not None:
            self.model.adapters.use(adapter)
        if self.compiled is not None:
            self.compiled.use(adapter)

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams]
    ) -> Iterator[Completion]:
        """Yield the completions of all prompts, in prompt order, n each.

        Raises: UsageError for a prompt that is empty, holds ids outside the vocabulary, leaves no room in the context,
            could outgrow the cache or ends in what its constraint does not allow, and for a constraint that cannot be
            enforced; MachineError for one without llguidance.
        """
        samples = self.add(prompts, params)
        try:
            for one in samples:
                while one.finish_reason is None:
                    self.step()
                yield one.completion()
        finally:
            self.cancel(samples)

    def as_completed(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams]
    ) -> Generator[Completion]:
        """Yield the completions of all prompts in the order in which they end. Raises as `generate` does."""
        samples = self.add(prompts, params)
        left = samples
        try:
            while left:
                ended = [one for one in left if one.finish_reason is not None]  # in whosever step that was
                left = [one for one in left if one.finish_reason is None]
                for one in ended:
                    yield one.completion()
                if left and not ended:
                    self.step()
        finally:
            self.cancel(samples)

    def stream(self, prompt: Sequence[int], params: SamplingParams) -> Iterator[int]:
        """Yield the token ids of one sample as they are generated."""
        samples = self.add([prompt], replace(params, n=1))
        try:
            shown = 0
            while shown < len(samples[0].token_ids) or samples[0].finish_reason is None:
                if shown == len(samples[0].token_ids):
                    self.step()
                    continue
                yield samples[0].token_ids[shown]
                shown += 1
        finally:
            self.cancel(samples)

    def add(self, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams]) -> list[Sample]:
        """Queue all samples of some prompts; `step` generates them. Raises as `generate` does, before any is queued."""
        config = self.model.config
        samples = make_samples(
            prompts,
            params,
            vocabulary=config.vocab_size,
            context=config.max_position_embeddings,
            adapters=[BASE, *self._keys],
        )
        if self.compiled is not None:
            self.compiled.check()
        most = self.scheduler.full.size * self.limits.page_tokens
        for one in samples:
            if one.max_tokens > most:
                raise UsageError(
                    f"prompt {one.prompt_index} may grow to {one.max_tokens} tokens; the cache holds {most}: lower "
                    "max_tokens, or give the engine more cache_tokens"
                )
        for one in samples:
            name = self.default_adapter if one.params.adapter is None else one.params.adapter
            one.adapter = None if name is None or name == BASE else self._keys[name]
            one.salt = (one.adapter or "").encode()
            self.scheduler.add(one)
        return samples

    def cancel(self, samples: Sequence[Sample]) -> None:
        """End those that have not ended, and free the pages of all."""
        for one in samples:
            one.finish_reason = one.finish_reason or "cancelled"
            self.scheduler.remove(one)

    @torch.inference_mode()
    def step(self) -> list[Sample]:
        """Compute one step; return the samples that have one more token. Nothing to do is no error."""
        chunks = self.scheduler.plan()
        grown = []
        for adapter, batch in self._batches(chunks):
            ending: list[Sample] = [chunk.sequence for chunk in batch if chunk.reaches_end]  # type: ignore[misc]
            self._use(adapter)
            logits = self._logits(batch, adapter)
            if ending:  # before anything is accounted for: a step that fails can be made again
                draw_next(ending, logits, None if self.compiled is None else self.compiled.compiled.argmax)
            self.scheduler.advance(batch)
            for one in ending:
                if one.finish_reason is not None:
                    self.scheduler.remove(one)
            grown += ending
        return grown

    def _batches(self, chunks: list[Chunk]) -> list[tuple[str | None, list[Chunk]]]:
        """Return what is computed together, and with which adapter."""
        by_adapter: dict[str | None, list[Chunk]] = {}
        for chunk in chunks:
            by_adapter.setdefault(chunk.sequence.adapter, []).append(chunk)  # type: ignore[attr-defined]
        if self.limits.deterministic and self.compiled is None:
            return [(adapter, [chunk]) for adapter, batch in by_adapter.items() for chunk in batch]
        return list(by_adapter.items())

    def _logits(self, batch: list[Chunk], adapter: str | None) -> Tensor:
        """Compute the tokens of a batch; return the logits of those that samples end with, (B, V)."""
        if self.compiled is not None:
            hidden = self.compiled.hidden(batch)
            return self.compiled.logits(hidden) if len(hidden) else hidden
        if self.graphs is not None and adapter is None and (logits := self.graphs.logits(batch)) is not None:
            return logits
        step = step_of(self.cache, batch, self.model.device)
        hidden = self.model.hidden(step.input_ids[None], step.positions[None], step)[0]  # (N, C)
        rows = [row for row, chunk in zip(step.last_rows, batch, strict=True) if chunk.reaches_end]
        return self.model.lm_head(hidden[rows]) if rows else hidden[:0]


def make_samples(
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams],
    *,
    vocabulary: int,
    context: int,
    adapters: Collection[str] = (),
) -> list[Sample]:
    """Return all samples of some prompts, in order, none begun; `context` is the longest that one may grow.

    Raises: UsageError for a prompt that is empty, holds ids outside the vocabulary or leaves no room in the context,
        has a constraint over another vocabulary than harmony's, or names another adapter than one of `adapters`.
    """
    each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
    if len(each) != len(prompts):
        raise UsageError(f"{len(prompts)} prompts but {len(each)} sampling parameters; give one, or one for each")
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise UsageError(f"prompt {index} is empty; a harmony prompt has at least a header")
        if min(prompt) < 0 or max(prompt) >= vocabulary:
            raise UsageError(f"prompt {index} holds token ids outside 0..{vocabulary - 1}; another vocabulary?")
        if len(prompt) >= context:
            raise UsageError(f"prompt {index} has {len(prompt)} tokens; the context holds {context}")
        if each[index].adapter is not None and each[index].adapter not in adapters:
            raise UsageError(
                f"prompt {index} asks for adapter {each[index].adapter!r}; known are {', '.join(adapters) or 'none'}"
            )
        if each[index].constraint is not None and vocabulary != VOCABULARY_SIZE:
            raise UsageError(
                f"prompt {index} has a constraint, which needs harmony's vocabulary of {VOCABULARY_SIZE} tokens; this "
                f"checkpoint has {vocabulary}"
            )
    return [
        Sample(
            tokens=list(prompt),
            num_prompt=len(prompt),
            max_tokens=min(len(prompt) + p.max_tokens, context),
            params=p,
            prompt_index=index,
            sample_index=number,
            follower=None if p.constraint is None else follow(p.constraint, prompt, f"prompt {index}"),
        )
        for index, (prompt, p) in enumerate(zip(prompts, each, strict=True))
        for number in range(p.n)
    ]


def draw_next(samples: Sequence[Sample], logits: Tensor, argmax: Callable[[Tensor], Tensor] | None = None) -> None:
    """Add the next token to each sample, drawn from logits (B, V), and say whether it was the last.

    argmax: a faster way to the ids (B,) where all that is wanted of every sample is its likeliest token.
    """
    wanted = any(one.params.logprobs for one in samples)
    allowed = allowed_tokens([one.follower for one in samples])  # while a GPU computes the logits
    allowed = None if allowed is None else allowed.to(logits.device)
    greedy = allowed is None and not wanted and all(one.params.temperature == 0 for one in samples)
    if argmax is not None and greedy:
        tokens, logprobs = argmax(logits), None
    else:
        tokens, logprobs = kernels.sample(logits, _draws(samples, logits.device), allowed, logprobs=wanted)
    values = [0.0] * len(samples) if logprobs is None else logprobs.tolist()
    for one, token, logprob in zip(samples, tokens.tolist(), values, strict=True):
        one.tokens.append(token)
        if one.params.logprobs:
            one.logprobs.append(logprob)
        if one.follower is not None and not one.follower.accept(token):
            one.finish_reason = "cancelled"  # its grammar led nowhere; a warning said so
        elif token in one.params.stop_token_ids:
            one.finish_reason = "stop"
        elif len(one.tokens) == one.max_tokens:
            one.finish_reason = "length"


def _draws(samples: Sequence[Sample], device: torch.device) -> Draws:
    """Return how each sample draws its next token."""
    params = [one.params for one in samples]

    def column(values: list[float] | list[int], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    zeros = [0] * len(samples)
    return Draws(
        temperature=column([p.temperature for p in params], torch.float32),
        top_k=column([p.top_k for p in params], torch.int64),
        top_p=column([p.top_p for p in params], torch.float32),
        min_p=column([p.min_p for p in params], torch.float32),
        seed=column([p.seed + one.sample_index for p, one in zip(params, samples, strict=True)], torch.int64),
        request=column(zeros, torch.int64),
        sample=column(zeros, torch.int64),
        position=column([len(one.tokens) for one in samples], torch.int64),
    )


@functools.cache
def print_once(line: str) -> None:
    """Print a line to stderr, unless it was before."""
    print(line, file=sys.stderr)


def _path(why_no_kernels: str | None) -> str:
    """Say which way a part goes on a GPU, and why if it is the slow one."""
    return "Triton kernels" if why_no_kernels is None else f"plain PyTorch, because {why_no_kernels}"


def _cache_tokens(config: ModelConfig, limits: Limits, dtype: torch.dtype, device: torch.device) -> int:
    """Return how many tokens to hold in the layers without a window, if nobody said."""
    budget = _free_bytes(device) * CACHE_SHARE[device.type]
    per_token = PagedCache.bytes_per_token(config, dtype)
    fits = int(budget / max(1, per_token["full"] + per_token["window"]))
    return max(limits.step_tokens, min(fits, limits.max_batch * config.max_position_embeddings))
