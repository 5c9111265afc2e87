"""What re-quantization costs a fine-tune, method by method: `gptoss-train study`.

A cell is a task, a learning rate (and with it a size of delta) and a training seed: an adapter of the experts is
trained, then written by every method in memory, with several rounding seeds, and measured on held-out samples of the
task and of unrelated data. Cells are appended to `OUT/cells.jsonl` as they are done, and done ones are not done again.
Methods:

- the rules of `gptoss_infer.rounding`, without and with biases that take back the mean error (`+bias`);
- `trained`: more steps with the experts rounded as they will be written, compared with a control: as many plain ones;
- what peers do, with their own code, if it is installed (`gptoss_train.peers`): new scales from the merged weights.
"""

from __future__ import annotations

import functools
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from gptoss_infer import mxfp4
from gptoss_infer.adapter import Adapter, Factors, Target
from gptoss_infer.checkpoint import Checkpoint, resolve
from gptoss_infer.checkpoint.changes import Pair
from gptoss_infer.errors import UsageError
from gptoss_infer.lora import LoraExpertLinear, factors_of
from gptoss_infer.rounding import Rounding
from gptoss_train import builtin, peers
from gptoss_train.calibration import Calibration, collect
from gptoss_train.data import Dataset, load_dataset, some_of
from gptoss_train.measure import Measured, Reference, Runtime
from gptoss_train.merging import Projection, by_rule, write_projection
from gptoss_train.recipe import Data, Recipe
from gptoss_train.train import Trainer, build_trainer

CELLS, SUMMARY = "cells.jsonl", "summary.json"
RULES: tuple[Rounding, ...] = ("nearest", "stochastic", "systematic")
MORE_RATE = 0.5  # of the learning rate, in the steps of `trained` and its control


@dataclass(frozen=True)
class Grid:
    """What a study goes through."""

    checkpoint: str
    tasks: dict[str, tuple[str, str]]  # name -> training and held-out file
    unrelated: str | None
    rates: tuple[float, ...]
    seeds: int
    draws: int
    steps: int
    more_steps: int
    pack_tokens: int
    rank: int
    dtype: str
    device: str

    def cells(self) -> Iterator[tuple[str, float, int]]:
        """Yield (task, learning rate, training seed)."""
        for task in self.tasks:
            for rate in self.rates:
                for seed in range(self.seeds):
                    yield task, rate, seed

    def recipe(self, rate: float, seed: int, steps: int, rounded_steps: int = 0, rounding_seed: int = 0) -> Recipe:
        """Return the recipe of some steps."""
        return Recipe.model_validate(
            {
                "version": 1,
                "model": {"checkpoint": self.checkpoint, "dtype": self.dtype, "device": self.device},
                "lora": {"rank": self.rank, "alpha": 2.0 * self.rank, "attention": ()},
                "data": {"train": "given"},
                "optim": {"lr": rate, "warmup_steps": min(10, steps // 2)},
                "train": {
                    "max_steps": steps,
                    "pack_tokens": self.pack_tokens,
                    "batch_tokens": self.pack_tokens,
                    "seed": seed,
                    "rounded_steps": rounded_steps,
                },
                "export": {"seed": rounding_seed},
            }
        )


def builtin_tasks() -> tuple[dict[str, tuple[str, str]], str]:
    """Return the tasks over `builtin:addition`, and what is unrelated to them."""
    prefix = "builtin:addition"
    tasks = {
        "plus": (f"{prefix}/train.jsonl", f"{prefix}/validation.jsonl"),
        "larger": (f"{prefix}/larger_train.jsonl", f"{prefix}/larger_validation.jsonl"),
        "swapped": (f"{prefix}/swapped_train.jsonl", f"{prefix}/swapped_validation.jsonl"),
    }
    return tasks, f"{prefix}/unrelated.jsonl"


def study(grid: Grid, out: Path) -> dict[str, Any]:
    """Do all cells that are not done, and return the summary of all.

    Raises: UsageError if `out` holds the cells of another grid.
    """
    out.mkdir(parents=True, exist_ok=True)
    _same_grid(grid, out / "grid.json")
    done = {(cell["task"], cell["rate"], cell["seed"]) for cell in read_cells(out)}
    if grid.checkpoint.startswith(builtin.PREFIX):
        builtin.prepare(grid.recipe(1e-3, 0, 1))
    base = builtin.checkpoint(grid.checkpoint) or resolve(grid.checkpoint)
    todo = [cell for cell in grid.cells() if cell not in done]
    if todo:
        peers.rules()  # which says what is missing before hours of work, not after
    for number, (task, rate, seed) in enumerate(todo, start=1):
        started = time.perf_counter()
        results = _cell(grid, Checkpoint.open(base), task, rate, seed)
        line = {"task": task, "rate": rate, "seed": seed, "seconds": time.perf_counter() - started, **results}
        with (out / CELLS).open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{number}/{len(todo)} {task} {rate:g} {seed}: {line['seconds']:.0f} s", file=sys.stderr)
        _summarized(out)  # so that it can be looked at before it is done
    return _summarized(out)


def _summarized(out: Path) -> dict[str, Any]:
    summary = summarize(read_cells(out))
    (out / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def read_cells(out: Path) -> list[dict[str, Any]]:
    """Return the cells that are done; one that a kill cut short is taken out of the file, to be done again."""
    path = out / CELLS
    if not path.exists():
        return []
    whole, newline, cut = path.read_text().rpartition("\n")
    if cut:
        print(f"the last cell of {path} was cut short: it will be done again", file=sys.stderr)
        path.write_text(whole + newline)
    return [json.loads(line) for line in whole.splitlines()]


def _same_grid(grid: Grid, path: Path) -> None:
    """Note the grid, or refuse one whose cells would not belong to those that are there: tasks, rates and training
    seeds may be added."""
    now = json.loads(json.dumps(asdict(grid)))
    before = json.loads(path.read_text()) if path.exists() else now
    same = [key for key in now if key not in ("tasks", "rates", "seeds")]
    tasks = before["tasks"] | now["tasks"]
    if any(now[key] != before[key] for key in same) or tasks != now["tasks"] | before["tasks"]:
        raise UsageError(f"{path.parent} holds a study with other settings (see {path.name}); choose another directory")
    path.write_text(json.dumps(now | {"tasks": tasks}, indent=2) + "\n")


def _cell(grid: Grid, checkpoint: Checkpoint, task: str, rate: float, seed: int) -> dict[str, Any]:
    """Train an adapter and measure what every method makes of it."""
    data = Data(train="given")
    train, held_out = (load_dataset(builtin.path(path), data) for path in grid.tasks[task])
    samples = {"task": some_of(held_out.samples, 10**9)}
    if grid.unrelated is not None:
        samples["unrelated"] = some_of(load_dataset(builtin.path(grid.unrelated), data).samples, 16384)
    trainer = _trainer(grid, checkpoint, train, grid.recipe(rate, seed, grid.steps))
    _do_steps(trainer)
    trained = _snapshot(trainer)
    runtime = Runtime(str(trainer.model.device), grid.pack_tokens)
    reference = Reference.of(checkpoint, _adapter(trainer), samples, runtime)
    calibration = collect(trainer.model, train.samples, grid.pack_tokens, 32768)
    results = [{"method": "merge", "draw": 0, **_measured(reference, trainer)}]
    for method in (*RULES, *(f"{rule}+bias" for rule in RULES)):
        rule, _, bias = method.partition("+")
        for draw in range(1 if rule == "nearest" else grid.draws):
            with _written(trainer, rule, draw, calibration if bias else None):
                results.append({"method": method, "draw": draw, **_measured(reference, trainer)})
    for method in peers.rules():
        with _written(trainer, method, 0, None):
            results.append({"method": method, "draw": 0, **_measured(reference, trainer)})
    if grid.more_steps:
        results += _more_steps(grid, trainer, trained, reference)
    return {"delta_to_base": _delta_to_base(trainer, trained), "results": results}


def _more_steps(
    grid: Grid, trainer: Trainer, trained: dict[Target, Factors], reference: Reference
) -> Iterator[dict[str, Any]]:
    """Yield the control, plain steps, and the same steps with rounded experts, from what was trained."""
    rate, seed = trainer.recipe.optim.lr, trainer.recipe.train.seed
    for method, draws in (("control", 1), ("trained", grid.draws)):
        for draw in range(draws):
            _restore(trainer, trained)
            rounded = grid.more_steps if method == "trained" else 0
            recipe = grid.recipe(MORE_RATE * rate, seed + 1000, grid.more_steps, rounded, draw)
            again = Trainer(
                recipe, trainer.model, trainer.targets, trainer.train, None, Path("unused"), "", trainer.accelerator
            )
            _do_steps(again)
            if method == "control":
                yield {"method": method, "draw": draw, **_measured(reference, trainer)}
                continue
            with _written(trainer, recipe.export.rounding, draw, None):
                yield {"method": method, "draw": draw, **_measured(reference, trainer)}
    _restore(trainer, trained)


def _trainer(grid: Grid, checkpoint: Checkpoint, train: Dataset, recipe: Recipe) -> Trainer:
    accelerator = Accelerator(cpu=grid.device == "cpu" or not torch.cuda.is_available())
    return build_trainer(
        recipe, checkpoint, train, None, run_dir=Path("unused"), fingerprint="", accelerator=accelerator
    )


def _do_steps(trainer: Trainer) -> None:
    for step in range(trainer.total_steps):
        trainer.step(step)


def _snapshot(trainer: Trainer) -> dict[Target, Factors]:
    pairs = factors_of(trainer.model, trainer.targets)
    return {target: Factors(pair.a.detach().clone(), pair.b.detach().clone()) for target, pair in pairs.items()}


@torch.no_grad()
def _restore(trainer: Trainer, factors: dict[Target, Factors]) -> None:
    for target, pair in factors_of(trainer.model, trainer.targets).items():
        pair.a.copy_(factors[target].a)
        pair.b.copy_(factors[target].b)
    for _, module in _experts(trainer):
        module.rounded = None


def _measured(reference: Reference, trainer: Trainer) -> Measured:
    """Measure the trainer's model as it is now, computing in fp32 whatever it trains in."""
    narrow = [parameter for parameter in trainer.model.parameters() if parameter.dtype != torch.float32]
    dtypes = [parameter.dtype for parameter in narrow]
    for parameter in narrow:
        parameter.data = parameter.data.float()
    try:
        return reference.measure(trainer.model)
    finally:
        for parameter, dtype in zip(narrow, dtypes, strict=True):
            parameter.data = parameter.data.to(dtype)  # as it was: every bf16 is an fp32


def _adapter(trainer: Trainer) -> Adapter:
    lora = trainer.recipe.lora
    return Adapter(lora.rank, lora.alpha, lora.rslora, 0.0, _snapshot(trainer))


def _experts(trainer: Trainer) -> Iterator[tuple[Target, LoraExpertLinear]]:
    for target in trainer.targets:
        module = trainer.model.get_submodule(target.module)
        assert isinstance(module, LoraExpertLinear), "the study adapts experts alone"
        yield target, module


class _written:
    """While it is entered, the model computes with the merged weights as a method writes them."""

    def __init__(self, trainer: Trainer, method: str, seed: int, calibration: Calibration | None) -> None:
        self.trainer, self.method, self.seed, self.calibration = trainer, method, seed, calibration
        self.before: list[tuple[LoraExpertLinear, Tensor, Tensor]] = []

    @torch.no_grad()
    def __enter__(self) -> None:
        """Write all experts, in memory."""
        adapter = _adapter(self.trainer)
        for target, module in _experts(self.trainer):
            base = module.base_layer
            self.before.append((module, base.scales, base.bias.data))
            stored = Projection(base.blocks, base.scales, base.bias.data.bfloat16())  # the bias as it is on disk
            write = functools.partial(_write, self.method, self.seed)
            (blocks, scales, bias), _ = write_projection(stored, adapter, target, write, self.calibration)
            module.rounded, base.scales, base.bias.data = blocks, scales, bias.to(base.bias.dtype)

    def __exit__(self, *exception: object) -> None:
        """Restore the base."""
        for module, scales, bias in self.before:
            module.rounded, module.base_layer.scales, module.base_layer.bias.data = None, scales, bias


def _write(method: str, seed: int, pair: Pair, delta: Tensor, target: Target, expert: int) -> Pair:
    """Return the blocks and scales of base + delta for one expert."""
    theirs = peers.rules().get(method)
    if theirs is not None:
        return peers.write(theirs, (mxfp4.decode(*pair, torch.float32) + delta).bfloat16())
    return by_rule(method, seed)(pair, delta, target, expert)  # type: ignore[arg-type]


def _delta_to_base(trainer: Trainer, factors: dict[Target, Factors]) -> float:
    """Return |D| / |W| over all adapted experts."""
    adapter = Adapter(trainer.recipe.lora.rank, trainer.recipe.lora.alpha, False, 0.0, factors)
    deltas = weights = 0.0
    for target, module in _experts(trainer):
        base = module.base_layer
        for expert in range(base.num_experts):
            deltas += float(adapter.delta(target, expert).double().square().sum())
            pair = base.blocks[expert], base.scales[expert]
            weights += float(mxfp4.decode(*pair, torch.float32).double().square().sum())
    return math.sqrt(deltas / weights)


def summarize(cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return, per learning rate and method, the share of the gain that was kept and what unrelated data paid.

    A cell's draws are averaged first; the interval is a 95% one of the mean over cells (Student's t).
    """
    rows = []
    for rate in sorted({cell["rate"] for cell in cells}):
        group = [cell for cell in cells if cell["rate"] == rate]
        methods = list(dict.fromkeys(result["method"] for cell in group for result in cell["results"]))
        size = statistics.mean(cell["delta_to_base"] for cell in group)
        gain = statistics.mean(_result(cell, "merge")[0]["task"]["compared"]["gain"] for cell in group)
        for method in methods:
            done = [cell for cell in group if _result(cell, method)]  # a peer may have been installed in between
            kept = [_mean(_kept(cell, result) for result in _result(cell, method)) for cell in done]
            paid = [_mean(_paid(cell, result) for result in _result(cell, method)) for cell in done]
            exact = [_mean(result["task"]["export"]["exact"] for result in _result(cell, method)) for cell in done]
            rows.append(
                {
                    "rate": rate, "delta_to_base": size, "gain": gain, "method": method, "cells": len(done),
                    "kept": _interval(kept), "unrelated_increase": _interval(paid), "exact": statistics.mean(exact),
                }
            )  # fmt: skip
    return {"rows": rows, "seconds": sum(cell["seconds"] for cell in cells)}


def _result(cell: dict[str, Any], method: str) -> list[Measured]:
    return [result for result in cell["results"] if result["method"] == method]


def _kept(cell: dict[str, Any], result: dict[str, Any]) -> float:
    """Return the share of the gain that is left: of the merge's, or for `trained` of its control's."""
    best = _result(cell, "control" if result["method"] == "trained" else "merge")[0]["task"]["export"]["loss"]
    base = result["task"]["base"]["loss"]
    return (base - result["task"]["export"]["loss"]) / (base - best)


def _paid(cell: dict[str, Any], result: dict[str, Any]) -> float:
    """Return how much the loss on unrelated data is over that of the merge, or of the control."""
    if "unrelated" not in result:
        return math.nan
    best = _result(cell, "control" if result["method"] == "trained" else "merge")[0]["unrelated"]["export"]["loss"]
    return float(result["unrelated"]["export"]["loss"] - best)


def _mean(values: Iterator[float]) -> float:
    return statistics.mean(values)


def _interval(values: Sequence[float]) -> dict[str, float]:
    mean = statistics.mean(values)
    if len(values) < 2:
        return {"mean": mean, "half": math.nan}
    # Student's t at 97.5% for up to 12 degrees of freedom, then 2.2 and below.
    table = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18)
    quantile = table[len(values) - 2] if len(values) - 2 < len(table) else 2.1
    return {"mean": mean, "half": quantile * statistics.stdev(values) / math.sqrt(len(values))}


def lines(summary: dict[str, Any]) -> Iterator[str]:
    """Yield the summary as a table."""
    yield f"{'rate':>8} {'|D|/|W|':>9} {'gain':>7}  {'method':16} {'kept %':>16} {'unrelated, nats':>20} {'exact':>7}"
    for row in summary["rows"]:
        kept, paid = row["kept"], row["unrelated_increase"]
        yield (
            f"{row['rate']:8.0e} {row['delta_to_base']:9.4%} {row['gain']:7.4f}  {row['method']:16} "
            f"{100 * kept['mean']:8.2f} ± {100 * kept['half']:5.2f} {paid['mean']:+12.5f} ± {paid['half']:.5f} "
            f"{row['exact']:7.1%}"
        )
