"""Generation by `transformers`' model, cache and loop, as `engine` does it with ours: what another implementation says.

    engine = TransformersEngine.from_checkpoint("openai/gpt-oss-20b", device="cuda", dtype=torch.bfloat16)

The choice of the next token alone is ours: `engine.draw_next` takes it from transformers' logits, by the noise of each
sample's seed and position. So a sample depends on its prompt, parameters and seed, not on what it is batched with, and
equals the engine's own as far as the logits do; transformers' own sampler has one random stream for a whole batch. What
is left of the batch are roundings of the logits. Prompts of unequal length are padded on the left and masked.

The package transformers is imported here alone, and in functions: nothing else needs it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from gptoss_infer.checkpoint import Checkpoint, resolve
from gptoss_infer.engine import Completion, Sample, SamplingParams, draw_next, make_samples
from gptoss_infer.errors import MachineError, UsageError
from gptoss_infer.loading import pick_device

MAX_BATCH = 8


class TransformersEngine:
    """Generates with a model of transformers, `max_batch` samples at a time. Not for several threads at once."""

    def __init__(self, model: Any, *, max_batch: int = MAX_BATCH) -> None:
        """Take a GptOssForCausalLM as loaded, in whatever precision and place."""
        self.model, self.max_batch = model, max_batch

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: str,
        *,
        device: str = "auto",
        dtype: torch.dtype = torch.bfloat16,
        max_batch: int = MAX_BATCH,
    ) -> TransformersEngine:
        """Load a checkpoint in Hugging Face's layout with eager attention; MXFP4 experts are expanded to `dtype`.

        Raises: UsageError for another layout; MachineError without transformers.
        """
        opened = Checkpoint.open(resolve(checkpoint))
        if opened.layout != "hf":
            raise UsageError(f"{checkpoint} is in layout {opened.layout}, which transformers does not read; first "
                             "gptoss-infer convert it --to hf")  # fmt: skip
        try:
            from transformers import GptOssConfig, GptOssForCausalLM
            from transformers.utils.quantization_config import Mxfp4Config
        except ImportError as error:
            raise MachineError(f"transformers cannot be imported ({error}); pip install transformers") from error
        config = GptOssConfig.from_pretrained(opened.directory)
        config.pad_token_id = None  # nothing is trained here; where a config names none, one outside of it is assumed
        quantization: dict[str, Any] = {}
        if opened.experts == "mxfp4":
            quantization["quantization_config"] = Mxfp4Config(dequantize=True)
        model: Any = GptOssForCausalLM.from_pretrained(
            opened.directory,
            config=config,
            dtype=dtype,
            attn_implementation="eager",
            local_files_only=True,
            **quantization,
        )
        return cls(model.to(pick_device(device)).eval(), max_batch=max_batch)

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams]
    ) -> Iterator[Completion]:
        """Yield the completions of all prompts, in prompt order, n each. Raises as `engine.Engine.generate` does."""
        config = self.model.config
        samples = make_samples(prompts, params, vocabulary=config.vocab_size, context=config.max_position_embeddings)
        for start in range(0, len(samples), self.max_batch):
            batch = samples[start : start + self.max_batch]
            self._run(batch)
            for one in batch:
                yield one.completion()

    @torch.inference_mode()
    def _run(self, batch: Sequence[Sample]) -> None:
        """Generate a batch to its end."""
        from transformers import GenerationConfig

        longest = max(one.num_prompt for one in batch)
        input_ids = torch.zeros(len(batch), longest, dtype=torch.int64)
        mask = torch.zeros_like(input_ids)
        for row, one in enumerate(batch):
            input_ids[row, longest - one.num_prompt :] = torch.tensor(one.tokens)
            mask[row, longest - one.num_prompt :] = 1

        def choose(_: Tensor, logits: Tensor) -> Tensor:
            """Scores of which the largest is the drawn token; an ended row goes on with anything until all have."""
            running = [row for row, one in enumerate(batch) if one.finish_reason is None]
            if running:
                draw_next([batch[row] for row in running], logits[running])
            scores = torch.full_like(logits, -torch.inf)
            scores[range(len(batch)), [one.tokens[-1] for one in batch]] = 0
            return scores

        def ended(input_ids: Tensor, *_: Any, **__: Any) -> Tensor:
            return torch.tensor([one.finish_reason is not None for one in batch], device=input_ids.device)

        most = max(one.max_tokens - one.num_prompt for one in batch)
        settings = self.model.generation_config
        self.model.generation_config = GenerationConfig()  # or its penalties and end tokens would have a say
        try:
            self.model.generate(
                input_ids.to(self.model.device),
                attention_mask=mask.to(self.model.device),
                generation_config=GenerationConfig(max_new_tokens=most, do_sample=False, pad_token_id=0),
                logits_processor=[choose],
                stopping_criteria=[ended],
            )
        finally:
            self.model.generation_config = settings
