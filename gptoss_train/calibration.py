"""What the experts read, on average: the sidecar that lets an export cancel the mean of its rounding errors.

Rounding an expert's weight W + D to Q shifts its output by (Q - W - D) x. The mean of that shift over the tokens that
the expert sees is (Q - W - D) E[x], a constant, which its 16-bit bias can take back for free. So the first moment of
each expert's inputs is what is kept: E (C + I) numbers a layer, 18 MB for gpt-oss-20b and 106 MB for 120b in fp32,
where second moments would be 51 GB and 306 GB.

Collected from the tuned model (base and adapter) over training data, in forward passes at the end of a run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from gptoss_infer.adapter import EXPERTS, Target, save_tensors
from gptoss_infer.config import ModelConfig
from gptoss_infer.errors import DataError
from gptoss_infer.experts import Shown
from gptoss_infer.model import GptOss
from gptoss_train.data import Sample, pack, some_of
from gptoss_train.packing import plan_epoch

FILE = "calibration.safetensors"
MIN_TOKENS = 64  # an expert that saw fewer keeps its bias: its mean would be mostly chance


@dataclass(frozen=True)
class Calibration:
    """Mean inputs of every expert's projections, and how many tokens they are over."""

    tokens: Tensor  # int64 (layers, E)
    means: dict[str, Tensor]  # of adapter.EXPERTS: fp32 (layers, E, in)

    def mean(self, target: Target, expert: int) -> Tensor | None:
        """Return an expert's mean input (in,), or None if it saw too few tokens."""
        if int(self.tokens[target.layer, expert]) < MIN_TOKENS:
            return None
        return self.means[target.weight][target.layer, expert]

    def save(self, path: Path) -> None:
        """Write it as one safetensors file."""
        save_tensors(path, {"tokens": self.tokens, **{name: mean.contiguous() for name, mean in self.means.items()}})

    @classmethod
    def load(cls, path: Path, config: ModelConfig) -> Calibration:
        """Read what `save` wrote.

        Raises: DataError if the file is missing, damaged or of another model.
        """
        try:
            tensors = load_file(path)
        except (FileNotFoundError, SafetensorError) as error:
            raise DataError(f"{path} is missing or damaged ({error}); collect it again with --calibrate DATA") from None
        experts = (config.num_hidden_layers, config.num_local_experts)
        shapes = {"tokens": experts, "gate_up_proj": (*experts, config.hidden_size)}
        shapes["down_proj"] = (*experts, config.intermediate_size)
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if found != shapes:
            raise DataError(f"{path} holds {found}, expected {shapes}; was it collected from another model?")
        return cls(tensors["tokens"], {name: tensors[name] for name in EXPERTS})


def mean_shift(asked: Tensor, written: Tensor, mean: Tensor) -> Tensor:
    """Return the (out,) that makes the output of `written` that of `asked`, both (out, in), at the mean input (in,)."""
    return (asked - written) @ mean


class Inputs:
    """Adds up what every expert reads: a watcher for `GptOss.hidden`."""

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        experts = (config.num_hidden_layers, config.num_local_experts)
        self.tokens = torch.zeros(experts, dtype=torch.int64)
        sizes = {"gate_up_proj": config.hidden_size, "down_proj": config.intermediate_size}
        self.sums = {name: torch.zeros(*experts, size, device=device) for name, size in sizes.items()}

    def routed(self, layer: int, chosen: Tensor, counts: list[int]) -> None:
        """Count tokens per expert."""
        self.tokens[layer] += torch.tensor(counts)

    def computed(self, layer: int, shown: Shown) -> None:
        """Add what a chunk of experts read."""
        for name, rows in (("gate_up_proj", shown.inputs), ("down_proj", shown.hidden)):
            sums = torch.stack([part.sum(0, dtype=torch.float32) for part in rows.split(shown.counts)])
            self.sums[name][layer, shown.experts] += sums

    def result(self) -> Calibration:
        """Return the means so far."""
        counts = self.tokens.clamp_min(1).unsqueeze(-1)
        return Calibration(self.tokens, {name: sums.cpu() / counts for name, sums in self.sums.items()})


@torch.no_grad()
def collect(model: GptOss, samples: Sequence[Sample], pack_tokens: int, max_tokens: int) -> Calibration:
    """Run whole packs of samples through the model until `max_tokens` were seen, and return the means.

    Args:
        samples: training data, of which a random part is taken, packed as in training.
        max_tokens: an expert sees k / E of them, a rare one far fewer.
    """
    chosen = some_of(samples, max_tokens)
    model.eval()
    inputs = Inputs(model.config, model.device)
    for step in plan_epoch([sample.num_inputs for sample in chosen], pack_tokens, 1, 0, 0):
        for indices in step:
            batch = pack([chosen[i] for i in indices])
            model.hidden(batch.input_ids[None].to(model.device), batch.positions[None], watch=inputs)
    return inputs.result()
