"""The training loop: LoRA factors of a frozen MXFP4 model, on one process or under `accelerate launch`.

A step: pick the batch, sum the loss over this process's micro-batches divided by the labelled tokens of the whole
batch, add the gradients of all processes, clip, step, log. What a step does depends on (recipe, data, step) alone,
which is what makes a resumed run bitwise equal to an undisturbed one.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from gptoss_infer.errors import Terminated
from gptoss_infer.model import GptOss
from gptoss_train import checkpoints
from gptoss_train.checkpoints import Position
from gptoss_train.data import CHANNELS, Dataset, Sample, batch_indices, steps_per_epoch
from gptoss_train.loss import Unembedding
from gptoss_train.metrics import MetricsLog
from gptoss_train.optim import learning_rate, make_optimizer
from gptoss_train.progress import Progress
from gptoss_train.recipe import Recipe
from gptoss_train.trackers import Trackers


@dataclass
class Trainer:
    """A model with attached factors, its data, and where the run is written."""

    recipe: Recipe
    model: GptOss
    factors: dict[str, nn.Parameter]  # trainable, by name
    train: Dataset
    validation: Dataset | None
    run_dir: Path
    fingerprint: str
    accelerator: Accelerator

    def __post_init__(self) -> None:
        self.optimizer = make_optimizer(list(self.factors.values()), self.recipe.optim)
        self.unembedding = Unembedding.of(self.model.lm_head.weight)
        batch_size = self.recipe.train.batch_size
        per_epoch = steps_per_epoch(len(self.train.samples), batch_size)
        self.total_steps = self.recipe.train.max_steps or per_epoch * (self.recipe.train.epochs or 0)

    def run(self) -> Position:
        """Train to the end, from the newest checkpoint if there is one; return where training stands.

        Raises: Terminated after SIGTERM, once the current step is done and saved.
        """
        position = self._resume()
        main = self.accelerator.is_main_process
        with ExitStack() as stack:
            terminated = stack.enter_context(_deferred_sigterm())
            self.log = stack.enter_context(_open_log(self.run_dir, position.step)) if main else None
            if main:
                stack.enter_context(self._trackers())
            progress = stack.enter_context(Progress(self.total_steps, start_step=position.step)) if main else None
            if position.step == 0:
                self._validate(0)
            for step in range(position.step, self.total_steps):
                started = time.perf_counter()
                values, tokens = self._step(step)
                position = Position(step + 1, position.tokens + tokens, self.fingerprint)
                values["train/tokens_per_s"] = tokens / (time.perf_counter() - started)
                values["train/tokens"] = position.tokens
                self._record(position.step, values)
                if progress is not None:
                    progress.update(position.step, values["train/loss"], values["train/tokens_per_s"])
                if self._due(position.step, self.recipe.train.eval_every):
                    self._validate(position.step)  # before saving: what a checkpoint stands for is on record
                stop = self._any(bool(terminated))
                if stop or self._due(position.step, self.recipe.checkpoint.every_steps):
                    self._save(position)
                if stop:
                    raise Terminated
        if self._any(bool(terminated)):  # it came after the last step, while the log and the trackers closed
            raise Terminated
        return position

    def _due(self, step: int, every: int) -> bool:
        return step == self.total_steps or (every > 0 and step % every == 0)

    def _any(self, flag: bool) -> bool:
        """Whether any process raised the flag: all must leave the loop at the same step."""
        if self.accelerator.num_processes == 1:
            return flag
        total = self.accelerator.reduce(torch.tensor(float(flag), device=self.accelerator.device), "sum")
        return bool(total > 0)

    def _step(self, step: int) -> tuple[dict[str, float], int]:
        """Do one optimizer step; return its metrics and the tokens it saw, both over all processes."""
        settings = self.recipe.train
        indices = batch_indices(len(self.train.samples), settings.batch_size, settings.seed, step)
        batch = [self.train.samples[i] for i in indices]
        num_labels = sum(sample.num_labels for sample in batch)
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        torch.manual_seed((settings.seed * 1_000_003 + step) * 1009 + rank)  # of dropout
        self.model.train()
        sums = torch.zeros(2, len(CHANNELS) + 1, dtype=torch.float64)  # loss and labels per channel code
        for micro in _chunks(batch[rank::world], settings.micro_batch_size):
            losses, channels = self._losses(micro)
            (losses.sum() / num_labels).backward()
            sums += channel_sums(losses, channels)
        norm = self._reduce_gradients()
        sums = self._sum_over_processes(sums)
        rate = learning_rate(step, self.total_steps, self.recipe.optim)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        values = {**named_losses("train", sums), "train/lr": rate, "train/grad_norm": norm, "train/labels": num_labels}
        return values, sum(sample.num_tokens for sample in batch)

    def _losses(self, samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
        """Return losses (n,) and channel codes (n,) of the labelled tokens of some samples, run as one padded batch."""
        device = self.accelerator.device
        longest = max(sample.num_tokens for sample in samples) - 1
        input_ids = torch.zeros(len(samples), longest, dtype=torch.int64)
        targets, channels = torch.zeros_like(input_ids), torch.zeros(len(samples), longest, dtype=torch.uint8)
        for row, sample in enumerate(samples):
            length = sample.num_tokens - 1
            input_ids[row, :length], targets[row, :length] = sample.token_ids[:-1], sample.token_ids[1:]
            channels[row, :length] = sample.channels[1:]
        labelled = channels > 0  # (B, T)
        hidden = self.model.hidden(input_ids.to(device))  # (B, T, C)
        losses = self.unembedding.losses(hidden[labelled.to(device)], targets[labelled].to(device))
        return losses, channels[labelled]

    def _reduce_gradients(self) -> float:
        """Add the gradients of all processes and clip them; return their norm before clipping."""
        parameters = list(self.factors.values())
        for parameter in parameters:
            if parameter.grad is None:  # this process had no sample of a small last batch
                parameter.grad = torch.zeros_like(parameter)
        if self.accelerator.num_processes > 1:
            flat = torch.cat([parameter.grad.flatten() for parameter in parameters if parameter.grad is not None])
            flat = self.accelerator.reduce(flat, "sum")
            for parameter, grad in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
                parameter.grad = grad.view_as(parameter)
        limit = self.recipe.optim.max_grad_norm
        return float(nn.utils.clip_grad_norm_(parameters, limit if limit > 0 else float("inf")))

    def _sum_over_processes(self, values: Tensor) -> Tensor:
        if self.accelerator.num_processes == 1:
            return values
        return self.accelerator.reduce(values.to(self.accelerator.device), "sum").cpu()

    @torch.no_grad()
    def _validate(self, step: int) -> None:
        """Record the mean loss of the validation data, in all and per channel."""
        if self.validation is None:
            return
        self.model.eval()
        sums = torch.zeros(2, len(CHANNELS) + 1, dtype=torch.float64)
        mine = self.validation.samples[self.accelerator.process_index :: self.accelerator.num_processes]
        for micro in _chunks(mine, self.recipe.train.micro_batch_size):
            sums += channel_sums(*self._losses(micro))
        self._record(step, named_losses("val", self._sum_over_processes(sums)), always=True)

    def _record(self, step: int, values: dict[str, float], *, always: bool = False) -> None:
        if self.log is not None and (always or self._due(step, self.recipe.log.every_steps)):
            self.log.log(step, values)

    def _resume(self) -> Position:
        """Return the position of the newest checkpoint, its factors and moments restored; 0 if there is none."""
        root = self.run_dir / "checkpoints"
        found = checkpoints.load_latest(root, list(self.factors), self.optimizer, self.fingerprint)
        if found is not None and self.accelerator.is_main_process:
            print(f"resuming from step {found.step} of {self.total_steps}", file=sys.stderr)
        return found or Position(0, 0, self.fingerprint)

    def _save(self, position: Position) -> None:
        if self.accelerator.is_main_process:
            assert self.log is not None, "the main process logs"
            self.log.sync()
            root, keep = self.run_dir / "checkpoints", self.recipe.checkpoint.keep
            checkpoints.save(root, position, list(self.factors), self.optimizer, keep)
        self.accelerator.wait_for_everyone()

    def _trackers(self) -> Trackers:
        log = self.recipe.log
        return Trackers(
            log.trackers,
            run_dir=self.run_dir,
            metrics=self.run_dir / "metrics.jsonl",
            project=log.project,
            name=log.name or self.run_dir.name,
            config=self.recipe.model_dump(),
            wandb_mode=log.wandb_mode,
        )


def channel_sums(losses: Tensor, channels: Tensor) -> Tensor:
    """Return (2, codes) fp64: the sum of losses and the number of labels per channel code."""
    codes, size = channels.long(), len(CHANNELS) + 1
    weights = losses.detach().double().cpu()
    return torch.stack([torch.bincount(codes, weights, minlength=size), torch.bincount(codes, minlength=size).double()])


def named_losses(prefix: str, sums: Tensor) -> dict[str, float]:
    """Return the mean loss per labelled token, over all channels and for each that occurs."""
    losses, counts = sums
    values = {f"{prefix}/loss": float(losses.sum() / counts.sum())}
    for code, name in enumerate(CHANNELS, start=1):
        if counts[code] > 0:
            values[f"{prefix}/loss_{name}"] = float(losses[code] / counts[code])
    return values


def _chunks(samples: Sequence[Sample], size: int) -> Iterator[Sequence[Sample]]:
    for start in range(0, len(samples), size):
        yield samples[start : start + size]


@contextmanager
def _open_log(run_dir: Path, step: int) -> Iterator[MetricsLog]:
    """Open metrics.jsonl, without the records of steps that will be done again."""
    with MetricsLog(run_dir / "metrics.jsonl") as log:
        rewound = log.rewind(step if step else -1)  # a run that starts over also repeats its validation at step 0
        if rewound.dropped:
            print(f"{rewound.dropped} records after step {step} moved to {log.superseded.name}", file=sys.stderr)
        yield log


@contextmanager
def _deferred_sigterm() -> Iterator[list[bool]]:
    """Yield a list that SIGTERM makes true, so that the step in progress is finished and saved; a second one kills."""
    received: list[bool] = []

    def handler(signum: int, frame: FrameType | None) -> None:
        received.append(True)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        print("SIGTERM: saving after this step; send it again to stop at once", file=sys.stderr)

    previous = signal.signal(signal.SIGTERM, handler)
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, previous)
