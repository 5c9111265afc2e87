"""What an export costs: held-out loss per channel of base, merge and export, and how far the export's answers are off.

The merge is the base with its adapter unmerged, which is exact. All is computed in fp32: activations rounded to bf16
would move losses by as much as small fine-tunes do. The models are in memory one after another; of the merge only final
hidden states are kept, so that the divergence to it needs no second model: KL(merge || export) in nats per labelled
token, from both models' full distributions. Used by `gptoss_train.export` and by the study.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from gptoss_infer.adapter import Adapter
from gptoss_infer.checkpoint import Checkpoint
from gptoss_infer.loading import load
from gptoss_infer.lora import disabled, load_adapter
from gptoss_infer.model import GptOss
from gptoss_train.data import CHANNELS, PackedBatch, Sample, pack
from gptoss_train.loss import Unembedding
from gptoss_train.packing import plan_epoch

TILE_ROWS = 64  # tokens whose full distributions exist at a time: 51 MB each in fp32, for all 201,088 tokens


Measured = dict[str, dict[str, dict[str, float]]]  # set of samples -> base, merge, export, compared -> name -> value


class Runtime(NamedTuple):
    """How the models compute."""

    device: str
    pack_tokens: int


@dataclass(frozen=True)
class Losses:
    """Losses of the labelled tokens of one set of samples, in the order of its packs."""

    losses: Tensor  # fp32 (n,), nats
    channels: Tensor  # uint8 (n,): codes of `data.CHANNELS`, from 1
    likeliest: Tensor  # bool (n,): whether no token is likelier
    samples: Tensor  # int64 (n,): which sample a label belongs to

    def means(self) -> dict[str, float]:
        """Return the mean loss, over all and per channel that occurs, and the share of samples that are `exact`.

        Exact is a sample whose every label is the likeliest token: decoded greedily, the model writes just that.
        """
        values = {"loss": float(self.losses.double().mean()), "exact": self.exact()}
        for code, name in enumerate(CHANNELS, start=1):
            if bool((self.channels == code).any()):
                values[f"loss_{name}"] = float(self.losses[self.channels == code].double().mean())
        return values

    def exact(self) -> float:
        """Return the share of samples that greedy decoding writes as they are."""
        wrong = torch.zeros(int(self.samples.max()) + 1, dtype=torch.bool)
        wrong[self.samples[~self.likeliest]] = True
        return 1 - float(wrong[self.samples.unique()].double().mean())


class _Measurement(NamedTuple):
    losses: Losses
    hidden: list[Tensor]  # final hidden states at labelled positions, (n, C) a pack, on the CPU
    divergence: float  # from the merge, in nats per labelled token; 0 if it was not asked for


@dataclass(frozen=True)
class Reference:
    """What is kept of base and merge to compare exports with, per set of samples."""

    runtime: Runtime
    packs: dict[str, list[PackedBatch]]
    base: dict[str, Losses]
    merge: dict[str, Losses]
    hidden: dict[str, list[Tensor]]  # the merge's final hidden states at labelled positions, (n, C) a pack, on the CPU

    @classmethod
    def of(
        cls, checkpoint: Checkpoint, adapter: Adapter | Path, samples: Mapping[str, list[Sample]], runtime: Runtime
    ) -> Reference:
        """Run the base without and with its adapter over every set of samples."""
        packs = {name: _packs(some, runtime.pack_tokens) for name, some in samples.items()}
        model = _load(checkpoint, runtime)
        load_adapter(model, adapter)
        with disabled(model):
            base = {name: _losses(model, some).losses for name, some in packs.items()}
        found = {name: _losses(model, some) for name, some in packs.items()}
        merge = {name: one.losses for name, one in found.items()}
        return cls(runtime, packs, base, merge, {name: one.hidden for name, one in found.items()})

    def measure(self, model: GptOss) -> Measured:
        """Return losses of base, merge and this export, and its divergence, per set of samples."""
        found: Measured = {}
        for name, packs in self.packs.items():
            losses, _, divergence = _losses(model, packs, self.hidden[name])
            base, merge, export = (x.means() for x in (self.base[name], self.merge[name], losses))
            gain = base["loss"] - merge["loss"]
            found[name] = {
                "base": base,
                "merge": merge,
                "export": export,
                "compared": {
                    "labels": float(len(losses.losses)),
                    "loss_increase": export["loss"] - merge["loss"],
                    "gain": gain,
                    "kl_to_merge": divergence,
                },
            }
            if gain > 0:  # of what the fine-tune was for; on other data there is none to keep
                found[name]["compared"]["gain_kept"] = (base["loss"] - export["loss"]) / gain
        return found

    def measure_directory(self, directory: Path) -> Measured:
        """Load an export and return what `measure` returns."""
        return self.measure(_load(Checkpoint.open(directory), self.runtime))


def _load(checkpoint: Checkpoint, runtime: Runtime) -> GptOss:
    return load(checkpoint, device=runtime.device, dtype=torch.float32, experts=checkpoint.experts)


def _packs(samples: list[Sample], pack_tokens: int) -> list[PackedBatch]:
    pack_tokens = max(pack_tokens, max(sample.num_inputs for sample in samples))
    steps = plan_epoch([sample.num_inputs for sample in samples], pack_tokens, 1, 0, 0)
    return [pack([samples[i] for i in indices]) for step in steps for indices in step]


@torch.no_grad()
def _losses(model: GptOss, packs: list[PackedBatch], merge: list[Tensor] | None = None) -> _Measurement:
    """Measure all labelled tokens; with the merge's hidden states, also the divergence from it."""
    model.eval()
    unembedding = Unembedding.of(model.lm_head.weight)
    losses, channels, likeliest, numbers, kept = [], [], [], [], []
    count, divergence = 0, 0.0
    for index, batch in enumerate(packs):
        labelled = batch.channels > 0
        hidden = model.hidden(batch.input_ids[None].to(model.device), batch.positions[None])[0]  # (N, C)
        hidden = hidden[labelled.to(model.device)]  # (n, C)
        rows = unembedding.row_of(batch.targets[labelled].to(model.device)).unsqueeze(1)  # (n, 1)
        for start in range(0, len(hidden), TILE_ROWS):
            part = slice(start, start + TILE_ROWS)
            log_p, top = _distribution(hidden[part], unembedding)
            losses.append(unembedding.of_one(log_p.gather(1, rows[part]), rows[part]).neg().flatten().cpu())
            likeliest.append((top == rows[part, 0]).cpu())
            if merge is not None:
                theirs, _ = _distribution(merge[index][part].to(hidden.device), unembedding)
                divergence += float(theirs.exp().mul_(theirs - log_p).sum(dtype=torch.float64))
        number = (batch.positions == 0).cumsum(0) + count
        count = int(number[-1])
        numbers.append(number[labelled])
        channels.append(batch.channels[labelled])
        kept.append(hidden.cpu())
    found = Losses(torch.cat(losses), torch.cat(channels), torch.cat(likeliest), torch.cat(numbers))
    return _Measurement(found, kept, divergence / max(1, len(found.losses)))


def _distribution(hidden: Tensor, unembedding: Unembedding) -> tuple[Tensor, Tensor]:
    """Return log p (n, U) of all distinct rows, equal tokens taken together, and the row with the largest logit."""
    logits = (hidden @ unembedding.rows.T).float()
    top = logits.argmax(-1)
    return (logits if unembedding.log_counts is None else logits.add_(unembedding.log_counts)).log_softmax(-1), top
