"""The training loop: LoRA factors of a frozen MXFP4 model, on one process or under `accelerate launch`.

A step: take its packs, sum the loss over this process's packs divided by the labelled tokens of all (weighted by
channel, if the recipe says so), add the gradients of all processes, clip, step, log. What a step does depends on
(recipe, data, step) alone, which is what makes a resumed run bitwise equal to an undisturbed one.
"""

from __future__ import annotations

import functools
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

from gptoss_infer.adapter import Target
from gptoss_infer.checkpoint import Checkpoint
from gptoss_infer.errors import Terminated
from gptoss_infer.loading import DTYPES, load
from gptoss_infer.lora import all_targets, attach, disabled, factors_of, round_experts
from gptoss_infer.model import GptOss
from gptoss_infer.model import Watch as WatchProtocol
from gptoss_infer.tiled import tile_for_training
from gptoss_train import checkpoints
from gptoss_train.checkpoints import Position
from gptoss_train.data import CHANNELS, Dataset, PackedBatch, pack
from gptoss_train.devices import peak_flops
from gptoss_train.flops import LoraShape, mfu, step_flops
from gptoss_train.health import Choices, Watch, adapter_norms
from gptoss_train.loss import Unembedding
from gptoss_train.metrics import MetricsLog
from gptoss_train.optim import learning_rate, make_optimizer, set_learning_rate
from gptoss_train.packing import Plan, plan_epoch
from gptoss_train.progress import Progress, peak_memory_bytes
from gptoss_train.recipe import Recipe
from gptoss_train.trackers import Trackers


@dataclass
class Trainer:
    """A model with attached factors, its data, and where the run is written."""

    recipe: Recipe
    model: GptOss
    targets: list[Target]  # attached
    train: Dataset
    validation: Dataset | None
    run_dir: Path
    fingerprint: str
    accelerator: Accelerator

    def __post_init__(self) -> None:
        recipe, device = self.recipe, self.accelerator.device
        settings = recipe.train
        if settings.deterministic:
            torch.use_deterministic_algorithms(True)
        self.factors = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer = make_optimizer(self.factors, recipe.optim)
        self.unembedding = Unembedding.of(self.model.lm_head.weight)
        if self.accelerator.is_main_process:
            why_plain = self.unembedding.why_plain()
            print(f"loss: {f'plain PyTorch, because {why_plain}' if why_plain else 'Triton kernels'}", file=sys.stderr)
        lengths = [sample.num_inputs for sample in self.train.samples]
        self.plan = Plan(lengths, settings.pack_tokens, settings.batch_tokens // settings.pack_tokens, settings.seed)
        self.total_steps = settings.max_steps or self.plan.total_steps(settings.epochs or 0)
        factors = {str(name): factor for name, factor in recipe.loss.channel_weights.items()}
        self.channel_weights = torch.tensor([1.0, *(factors.get(name, 1.0) for name in CHANNELS)], device=device)
        self.writer = checkpoints.Writer(
            self.run_dir / "checkpoints", recipe.checkpoint.keep, background=recipe.checkpoint.background
        )
        self.base_choices: Choices | None = None
        self.scaling = recipe.lora.alpha / (recipe.lora.rank**0.5 if recipe.lora.rslora else recipe.lora.rank)
        lora = LoraShape.of(recipe.lora, self.model.config)
        self.flops = functools.partial(step_flops, self.model.config, lora=lora, recompute=settings.recompute)
        self.peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None

    def run(self) -> Position:
        """Train to the end, from the newest checkpoint if there is one; return where training stands.

        Raises: Terminated or KeyboardInterrupt after SIGTERM or Ctrl-C, once the current step is done and saved.
        """
        position = self._resume()
        main = self.accelerator.is_main_process
        with ExitStack() as stack:
            received = stack.enter_context(_deferred_signals())
            self.log = stack.enter_context(_open_log(self.run_dir, position.step)) if main else None
            if main:
                stack.enter_context(self._trackers())
            stack.callback(self.writer.wait)
            progress = stack.enter_context(Progress(self.total_steps, start_step=position.step)) if main else None
            if position.step == 0:
                self._validate(0)
            for step in range(position.step, self.total_steps):
                values, tokens = self.step(step)
                position = Position(step + 1, position.tokens + tokens, self.fingerprint)
                values["train/tokens"] = position.tokens
                if self._due(position.step, self.recipe.train.eval_every):
                    values |= adapter_norms(factors_of(self.model, self.targets).items(), self.scaling)
                self._record(position.step, values)
                if progress is not None:
                    progress.update(position.step, values["train/loss"], values["train/tokens_per_s"])
                if self._due(position.step, self.recipe.train.eval_every):
                    self._validate(position.step)  # before saving: what a checkpoint stands for is on record
                stop = self._any(bool(received))
                if stop or self._due(position.step, self.recipe.checkpoint.every_steps):
                    self._save(position)
                if stop:
                    break
        if self._any(bool(received)):  # perhaps after the last step, while the log and the trackers closed
            raise KeyboardInterrupt if received == [signal.SIGINT] else Terminated
        return position

    def _due(self, step: int, every: int) -> bool:
        return step == self.total_steps or (every > 0 and step % every == 0)

    def _any(self, flag: bool) -> bool:
        """Whether any process raised the flag: all must leave the loop at the same step."""
        if self.accelerator.num_processes == 1:
            return flag
        total = self.accelerator.reduce(torch.tensor(float(flag), device=self.accelerator.device), "sum")
        return bool(total > 0)

    def step(self, step: int) -> tuple[dict[str, float], int]:
        """Do one optimizer step; return its metrics and the tokens it saw, both over all processes."""
        started = time.perf_counter()
        settings = self.recipe.train
        packs = [pack([self.train.samples[i] for i in indices]) for indices in self.plan.packs(step)]
        codes = torch.cat([batch.channels for batch in packs])
        divisor = float(self.channel_weights.cpu()[codes[codes > 0].long()].sum())
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        torch.manual_seed((settings.seed * 1_000_003 + step) * 1009 + rank)  # of dropout
        self.model.train()
        self._round_experts(step)
        watch = Watch(self.model.config, self.accelerator.device)
        sums = torch.zeros(2, len(CHANNELS) + 1, dtype=torch.float64)  # loss and labels per channel code
        for batch in packs[rank::world]:
            losses, channels = self._losses(batch, watch)
            (losses * self.channel_weights[channels.long()]).sum().div(divisor).backward()
            sums += channel_sums(losses, channels)
        norm = self._reduce_gradients()
        sums, watched = self._sum_over_processes(sums), self._sum_over_processes(watch.sums())
        rate = learning_rate(step, self.total_steps, self.recipe.optim)
        set_learning_rate(self.optimizer, rate)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        num_tokens, num_labels = len(codes), int((codes > 0).sum())
        documents = [self.train.samples[i].num_inputs for indices in self.plan.packs(step) for i in indices]
        values = {**named_losses("train", sums), "train/lr": rate, "train/grad_norm": norm}
        values |= {
            "train/labels": num_labels,
            "train/labelled_share": num_labels / num_tokens,
            "train/padding_share": 1 - num_tokens / (len(packs) * settings.pack_tokens),
        }
        values |= watch.values(watched) | self._speed(documents, num_labels, time.perf_counter() - started)
        return values, num_tokens

    def _round_experts(self, step: int) -> None:
        """In the last `train.rounded_steps`, let the experts compute as they would be exported now."""
        if step >= self.total_steps - self.recipe.train.rounded_steps:
            round_experts(self.model, self.recipe.export.rounding, self.recipe.export.seed)

    def _losses(self, batch: PackedBatch, watch: WatchProtocol | None) -> tuple[Tensor, Tensor]:
        """Return losses (n,) and channel codes (n,), on the device, of the labelled tokens of a pack."""
        device, settings = self.accelerator.device, self.recipe.train
        labelled = batch.channels > 0  # (N,)
        hidden = self.model.hidden(
            batch.input_ids[None].to(device),
            batch.positions[None],
            recompute=settings.recompute,
            offload=settings.offload,
            watch=watch,
        )[0]  # (N, C)
        losses = self.unembedding.losses(hidden[labelled.to(device)], batch.targets[labelled].to(device))
        return losses, batch.channels[labelled].to(device)

    def _speed(self, documents: Sequence[int], num_labels: int, seconds: float) -> dict[str, float]:
        """Return tokens and useful operations per second, over all processes, and the peak memory of this one."""
        operations = self.flops(document_tokens=documents, num_labels=num_labels)
        values = {
            "train/tokens_per_s": sum(documents) / seconds,
            "train/tflops": operations.useful / seconds / 1e12,
            "train/peak_memory_gb": peak_memory_bytes(self.accelerator.device) / 1e9,
        }
        if self.peak is not None:
            values["train/mfu"] = mfu(operations, seconds, self.peak * self.accelerator.num_processes)
        return values

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
        """Record the mean loss of the validation data, in all and per channel, and the drift of the router."""
        if self.validation is None:
            return
        self.model.eval()
        self._round_experts(step - 1)  # as in the step before, with the factors that it left
        packs = self._validation_packs()
        sums = torch.zeros(2, len(CHANNELS) + 1, dtype=torch.float64)
        choices = Choices()
        if packs and self.base_choices is None:
            self.base_choices = Choices()
            with disabled(self.model):
                self._losses(packs[0], self.base_choices)
        for number, batch in enumerate(packs):
            sums += channel_sums(*self._losses(batch, choices if number == 0 else None))
        drift = self.base_choices.gone(choices) if packs and self.base_choices else 0.0
        drifted = self._sum_over_processes(torch.tensor([drift, float(bool(packs))], dtype=torch.float64))
        values = named_losses("val", self._sum_over_processes(sums))
        self._record(step, values | {"val/router_drift": float(drifted[0] / drifted[1])}, always=True)

    def _validation_packs(self) -> list[PackedBatch]:
        """Return this process' share of the validation data, packed; the same at every call."""
        assert self.validation is not None, "there is validation data"
        samples = self.validation.samples
        steps = plan_epoch([s.num_inputs for s in samples], self.recipe.train.pack_tokens, 1, 0, 0)
        packs = [indices for step in steps for indices in step]
        mine = packs[self.accelerator.process_index :: self.accelerator.num_processes]
        return [pack([samples[i] for i in indices]) for indices in mine]

    def _record(self, step: int, values: dict[str, float], *, always: bool = False) -> None:
        if self.log is not None and (always or self._due(step, self.recipe.log.every_steps)):
            self.log.log(step, values)

    def _resume(self) -> Position:
        """Return the position of the newest checkpoint, its factors and moments restored; 0 if there is none."""
        root = self.run_dir / "checkpoints"
        found = checkpoints.load_latest(root, self.optimizer, self.fingerprint)
        if found is not None and self.accelerator.is_main_process:
            print(f"resuming from step {found.step} of {self.total_steps}", file=sys.stderr)
        return found or Position(0, 0, self.fingerprint)

    def _save(self, position: Position) -> None:
        if self.accelerator.is_main_process:
            assert self.log is not None, "the main process logs"
            self.log.sync()
            self.writer.save(position, self.optimizer)
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


def build_trainer(
    recipe: Recipe,
    checkpoint: Checkpoint,
    train: Dataset,
    validation: Dataset | None,
    *,
    run_dir: Path,
    fingerprint: str,
    accelerator: Accelerator,
) -> Trainer:
    """Load the base, attach the recipe's adapter to it, and return the trainer of both."""
    model = load(
        checkpoint,
        device=str(accelerator.device),
        dtype=DTYPES[recipe.model.dtype],
        experts=recipe.model.experts,
        embedding=recipe.model.embedding,
    )
    lora = recipe.lora
    layers = None if lora.layers == "all" else lora.layers
    targets = all_targets(checkpoint.config.num_hidden_layers, lora.weights, layers)
    torch.manual_seed(recipe.train.seed)  # of the factors
    attach(model, targets, rank=lora.rank, alpha=lora.alpha, dropout=lora.dropout, rslora=lora.rslora)
    path = tile_for_training(model)
    if accelerator.is_main_process:
        print(path, file=sys.stderr)
    return Trainer(
        recipe, model, targets, train, validation, run_dir=run_dir, fingerprint=fingerprint, accelerator=accelerator
    )


def channel_sums(losses: Tensor, channels: Tensor) -> Tensor:
    """Return (2, codes) fp64: the sum of losses and the number of labels per channel code."""
    size = len(CHANNELS) + 1
    codes, weights = channels.long().cpu(), losses.detach().double().cpu()
    return torch.stack([torch.bincount(codes, weights, minlength=size), torch.bincount(codes, minlength=size).double()])


def named_losses(prefix: str, sums: Tensor) -> dict[str, float]:
    """Return the mean loss per labelled token, over all channels and for each that occurs."""
    losses, counts = sums
    values = {f"{prefix}/loss": float(losses.sum() / counts.sum())}
    for code, name in enumerate(CHANNELS, start=1):
        if counts[code] > 0:
            values[f"{prefix}/loss_{name}"] = float(losses[code] / counts[code])
    return values


@contextmanager
def _open_log(run_dir: Path, step: int) -> Iterator[MetricsLog]:
    """Open metrics.jsonl, without the records of steps that will be done again."""
    with MetricsLog(run_dir / "metrics.jsonl") as log:
        rewound = log.rewind(step if step else -1)  # a run that starts over also repeats its validation at step 0
        if rewound.dropped:
            print(f"{rewound.dropped} records after step {step} moved to {log.superseded.name}", file=sys.stderr)
        yield log


@contextmanager
def _deferred_signals() -> Iterator[list[int]]:
    """Yield a list that SIGTERM and Ctrl-C add to: the step in progress is finished and saved; a second one kills."""
    received: list[int] = []

    def handler(signum: int, frame: FrameType | None) -> None:
        received.append(signum)
        signal.signal(signum, signal.SIG_DFL if signum == signal.SIGTERM else signal.default_int_handler)
        name = signal.Signals(signum).name
        print(f"{name}: saving after this step; send it again to stop at once", file=sys.stderr)

    previous = {signum: signal.signal(signum, handler) for signum in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for signum, former in previous.items():
            signal.signal(signum, former)
