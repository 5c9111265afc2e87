"""What an export works with: the rounding rule, what the experts read, and held-out data to measure base and merge on.

Here: finding these in a run directory, in a recipe, or in files named on a command line. Not here: the export itself
(`gptoss_train.export`). Used by `gptoss_train.run` and by `gptoss-train export`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from gptoss_infer.adapter import CONFIG
from gptoss_infer.checkpoint import Checkpoint, resolve
from gptoss_infer.config import read_json
from gptoss_infer.errors import UsageError
from gptoss_infer.loading import DTYPES, load, pick_device
from gptoss_train import builtin
from gptoss_train.calibration import FILE as CALIBRATION
from gptoss_train.calibration import Calibration, collect
from gptoss_train.data import Sample, load_dataset, load_splits, some_of
from gptoss_train.export import Rule
from gptoss_train.measure import Reference, Runtime
from gptoss_train.recipe import Recipe, load_recipe


class Planned(NamedTuple):
    """What `gptoss-train export` works with."""

    adapter: Path
    base: Path
    rule: Rule
    reference: Reference | None
    max_loss_increase: float | None


def plan_export(
    source: Path,
    base: str | None,
    asked: Mapping[str, object],
    *,
    calibrate: str | None,
    task: str | None,
    measure: bool,
) -> Planned:
    """Find what an export needs: in the run directory that `source` is, or from the files that are named.

    Args:
        source: a run directory, or an adapter, ours or a peer's.
        base: checkpoint; None for the one that the adapter names.
        asked: keys of a recipe's `export` section that replace the run's.
        calibrate: conversations to collect the experts' mean inputs from; None for what the run collected, if any.
        task: held-out conversations; None for the run's validation data, if any.
        measure: whether base and merge are wanted.
    """
    is_run = _is_run_directory(source)
    adapter = source / "adapter" if is_run else source
    named = base or read_json(adapter / CONFIG).get("base_model_name_or_path")
    if not named:
        raise UsageError(f"{adapter / CONFIG} names no base; give it with --base CKPT")
    checkpoint = resolve(str(named))
    if is_run:
        recipe = load_recipe(str(source / "recipe.yaml"))
    else:
        recipe = Recipe.model_validate(
            {"version": 1, "model": {"checkpoint": str(named)}, "data": {"train": "none"}, "train": {"max_steps": 1}}
        )
    sections = recipe.model_dump()
    _warn_of_other_rounding(recipe, asked)
    sections["export"] |= asked
    if task is not None:
        sections["data"] |= {"validation": task, "validation_fraction": 0.0, "train": task}
    elif is_run and not builtin.path(recipe.data.validation or recipe.data.train).exists():
        gone = recipe.data.validation or recipe.data.train
        print(
            f"{gone}, the run's held-out data, is not there: measured without it; name some with --task",
            file=sys.stderr,
        )
        sections["data"] |= {"validation": None, "validation_fraction": 0.0}
    recipe = Recipe.model_validate(sections)
    calibration = calibration_of(recipe, source, checkpoint, adapter, calibrate)
    rule = Rule(recipe.export.rounding, recipe.export.seed, calibration)
    if measure and calibration is None and not recipe.train.rounded_steps:
        print("biases keep the mean of the rounding errors: --calibrate JSONL takes it back", file=sys.stderr)
    reference = reference_of(recipe, checkpoint, adapter) if measure else None
    return Planned(adapter, checkpoint, rule, reference, recipe.export.max_loss_increase)


def _warn_of_other_rounding(recipe: Recipe, asked: Mapping[str, object]) -> None:
    """Say so if an adapter that was trained to be rounded in one way is about to be rounded in another."""
    trained = {"rounding": recipe.export.rounding, "seed": recipe.export.seed}
    other = {key: asked[key] for key in trained if asked.get(key, trained[key]) != trained[key]}
    if recipe.train.rounded_steps and other:
        print(f"warning: this run's last steps were trained for {trained}, not for {other}", file=sys.stderr)


def _is_run_directory(source: Path) -> bool:
    return (source / "adapter").is_dir() and (source / "recipe.yaml").is_file()


def calibration_of(
    recipe: Recipe, run_dir: Path, base: Path, adapter: Path, calibrate: str | None
) -> Calibration | None:
    """Return the experts' mean inputs: collected now from a file, or those that a run left; None if it left none."""
    if calibrate is None:
        path = run_dir / CALIBRATION
        return Calibration.load(path, Checkpoint.open(base).config) if path.exists() else None
    from gptoss_infer.lora import load_adapter  # brings peft

    data = recipe.data.model_copy(update={"max_tokens": recipe.max_tokens})
    samples = load_dataset(calibrate, data).samples
    model = load(base, device=recipe.model.device, dtype=DTYPES[recipe.model.dtype])
    load_adapter(model, adapter)
    return collect(model, samples, recipe.train.pack_tokens, recipe.export.calibration_tokens)


def reference_of(recipe: Recipe, base: Path, adapter: Path) -> Reference | None:
    """Return base and merge on held-out and unrelated data; None if the recipe has neither, or measures nothing."""
    settings, data = recipe.export, recipe.data
    samples: dict[str, list[Sample]] = {}
    if settings.measure_tokens and (data.validation or data.validation_fraction):
        validation_path = builtin.path(data.validation) if data.validation else None
        validation = load_splits(recipe, builtin.path(data.train), validation_path)[1]
        assert validation is not None, "the recipe has validation data"
        samples["task"] = some_of(validation.samples, settings.measure_tokens)
    if settings.measure_tokens and settings.unrelated:
        unrelated = load_dataset(builtin.path(settings.unrelated), data.model_copy(update={"max_tokens": None}))
        samples["unrelated"] = some_of(unrelated.samples, settings.measure_tokens)
    if not samples:
        if settings.measure_tokens:
            print("no held-out data: base, merge and export are not compared", file=sys.stderr)
        return None
    device = str(pick_device(recipe.model.device))
    return Reference.of(Checkpoint.open(base), adapter, samples, Runtime(device, recipe.train.pack_tokens))
