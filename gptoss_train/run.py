"""A recipe from start to end: base -> training -> adapter -> export -> evaluation of each variant -> report.

Every stage leaves its result complete in the run directory and is skipped when it is there, so the same command
continues an interrupted run wherever it stopped. Evaluation runs in child processes after the model is freed: training
and evaluation meet at directories on disk only.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator

from gptoss_infer.adapter import Adapter, write_adapter
from gptoss_infer.checkpoint import Checkpoint, atomic_directory, resolve
from gptoss_infer.checkpoint.atomic import MANIFEST, file_sha256
from gptoss_infer.errors import MachineError, UsageError
from gptoss_train import builtin
from gptoss_train.calibration import FILE as CALIBRATION
from gptoss_train.calibration import collect
from gptoss_train.data import Dataset, load_splits
from gptoss_train.export import Rule, export, falls_short, print_summary
from gptoss_train.export_inputs import calibration_of, reference_of
from gptoss_train.recipe import Recipe
from gptoss_train.yaml_strict import dump

if TYPE_CHECKING:
    from gptoss_train.train import Trainer

EXPORTS = {"mxfp4": "model", "bf16": "model-bf16", "adapter": "adapter-export"}  # format -> directory in the run
MARKS = ("environment.json", "recipe.yaml")  # written in this order; a directory with both is a run's


def run(recipe: Recipe, name: str) -> int:
    """Run a recipe; return the exit code."""
    if recipe.parallel.threads:
        torch.set_num_threads(recipe.parallel.threads)
    accelerator = _accelerator(recipe)
    run_dir = Path(recipe.run.dir or f"runs/{name}")
    main = accelerator.is_main_process
    if main:
        _prepare(run_dir, recipe)
        print(recipe.to_yaml(), file=sys.stderr)
        builtin.prepare(recipe)
    accelerator.wait_for_everyone()
    base = builtin.checkpoint(recipe.model.checkpoint) or resolve(recipe.model.checkpoint)
    if not (run_dir / "adapter").exists():
        _train(recipe, run_dir, base, accelerator)
    if not main:
        return 0
    short = _export_all(recipe, run_dir, base)
    code = _evaluate(recipe, run_dir, base)
    reported = _evals(["report", str(run_dir)])
    _print_places(run_dir)
    return short or code or reported


def _accelerator(recipe: Recipe) -> Accelerator:
    if recipe.model.device == "cuda" and not torch.cuda.is_available():
        raise MachineError(
            f"model.device is cuda, but torch {torch.__version__} sees no CUDA device; use model.device=cpu"
        )
    return Accelerator(cpu=recipe.model.device == "cpu" or not torch.cuda.is_available())


def _prepare(run_dir: Path, recipe: Recipe) -> None:
    """Make the run directory, or check that it is this recipe's to continue."""
    exists = _is_run(run_dir)
    if recipe.run.overwrite and recipe.run.resume == "must":
        raise UsageError(
            f"run.overwrite=true would delete what run.resume=must continues in {run_dir}; drop one of them"
        )
    if exists and recipe.run.overwrite:
        shutil.rmtree(run_dir)
        exists = False
    if exists and recipe.run.resume == "never":
        raise UsageError(
            f"{run_dir} exists and run.resume is never; choose another run.dir, or run.overwrite=true to delete it"
        )
    if not exists and recipe.run.resume == "must":
        raise UsageError(f"run.resume is must, but {run_dir} holds no run; check run.dir")
    resolved = dump(recipe.model_dump() | {"run": recipe.run.model_dump() | {"dir": str(run_dir)}})
    if exists:
        _refuse_another_recipe(run_dir, resolved)
        print(f"continuing {run_dir}", file=sys.stderr)
    run_dir.mkdir(parents=True, exist_ok=True)
    _write(run_dir / MARKS[0], json.dumps(_environment(), indent=2) + "\n")
    _write(run_dir / MARKS[1], resolved)


def _is_run(run_dir: Path) -> bool:
    """Whether this is a run directory; False for one that is absent, empty or was only just begun.

    Raises: UsageError for a directory that holds anything else, so that nothing of the user's is replaced or deleted.
    """
    names = {path.name for path in run_dir.iterdir()} if run_dir.exists() else set()
    if names.issuperset(MARKS):
        return True
    if names - {MARKS[0], *(_partial(name) for name in MARKS)}:
        raise UsageError(
            f"{run_dir} exists and is no run directory (that has {' and '.join(MARKS)}); choose another run.dir"
        )
    return False


def _refuse_another_recipe(run_dir: Path, resolved: str) -> None:
    """What was trained or exported with other keys must not pass for this recipe's result."""
    old = _sections((run_dir / "recipe.yaml").read_text())
    new = _sections(resolved)
    if not any((run_dir / name).exists() for name in ("checkpoints", "adapter")):
        return  # nothing was trained yet: a corrected recipe may start
    changed = [
        name for name in ("model", "lora", "data", "loss", "optim", "train", "export") if old.get(name) != new.get(name)
    ]
    if changed:
        raise UsageError(
            f"{run_dir} holds a run with other values in {', '.join(changed)} (see its recipe.yaml); choose another "
            "run.dir, or run.overwrite=true to delete it and start over"
        )


def _sections(text: str) -> dict[str, object]:
    import yaml

    parsed = yaml.safe_load(text)
    return parsed if isinstance(parsed, dict) else {}


def _partial(name: str) -> str:
    return f".{name}.tmp"


def _write(path: Path, text: str) -> None:
    partial = path.with_name(_partial(path.name))
    partial.write_text(text)
    os.replace(partial, path)


def _environment() -> dict[str, object]:
    packages = ("torch", "peft", "accelerate", "safetensors", "openai-harmony", "transformers")
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version(name) for name in packages},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
    }


def _train(recipe: Recipe, run_dir: Path, base: Path, accelerator: Accelerator) -> None:
    """Train to the end and write `adapter/`; the model is freed on return."""
    from gptoss_infer.lora import factors_of  # brings peft

    trainer = _trainer(recipe, run_dir, base, accelerator)
    trainer.run()
    if accelerator.is_main_process:
        settings = recipe.export
        # What was trained rounded has learned to live with the errors that biases would take back.
        rounds = "mxfp4" in settings.formats and recipe.lora.experts and not recipe.train.rounded_steps
        if rounds and settings.calibration_tokens:
            found = collect(trainer.model, trainer.train.samples, recipe.train.pack_tokens, settings.calibration_tokens)
            found.save(run_dir / CALIBRATION)
        factors = {
            target: type(pair)(*(x.detach() for x in pair))
            for target, pair in factors_of(trainer.model, trainer.targets).items()
        }
        lora = recipe.lora
        adapter = Adapter(lora.rank, lora.alpha, lora.rslora, lora.dropout, factors, base=str(base))
        with atomic_directory(run_dir / "adapter", overwrite=True) as directory:
            write_adapter(directory, adapter, trainer.model.config)
    accelerator.wait_for_everyone()
    del trainer
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _trainer(recipe: Recipe, run_dir: Path, base: Path, accelerator: Accelerator) -> Trainer:
    from gptoss_train.train import build_trainer  # brings peft

    data = recipe.data
    validation_path = builtin.path(data.validation) if data.validation else None
    train, validation = load_splits(recipe, builtin.path(data.train), validation_path)
    if accelerator.is_main_process:
        for dataset in (train, validation):
            if dataset is not None:
                print(dataset.report.text(), file=sys.stderr)
    fingerprint = _fingerprint(recipe, base, train, validation)
    checkpoint = Checkpoint.open(base)
    return build_trainer(
        recipe, checkpoint, train, validation, run_dir=run_dir, fingerprint=fingerprint, accelerator=accelerator
    )


def _fingerprint(recipe: Recipe, base: Path, train: Dataset, validation: Dataset | None) -> str:
    """Hash what decides a step's result: recipe sections, data and the base's files."""
    manifest = base / MANIFEST
    weights = (
        manifest.read_text()
        if manifest.exists()
        else str([*sorted((p.name, p.stat().st_size) for p in base.iterdir()), file_sha256(base / "config.json")])
    )
    sections = [getattr(recipe, name).model_dump() for name in ("lora", "data", "loss", "optim", "train")]
    sections.append({"dtype": recipe.model.dtype, "experts": recipe.model.experts})
    if recipe.train.rounded_steps:
        sections.append({"rounding": recipe.export.rounding, "seed": recipe.export.seed})
    parts = [json.dumps(sections, sort_keys=True), weights, train.sha256, validation.sha256 if validation else ""]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _export_all(recipe: Recipe, run_dir: Path, base: Path) -> int:
    """Write every export that is not there yet; return 1 if one is worse than the recipe allows."""
    code = 0
    calibration = calibration_of(recipe, run_dir, base, run_dir / "adapter", None)
    rule = Rule(recipe.export.rounding, recipe.export.seed, calibration)
    for format in recipe.export.formats:
        target = run_dir / EXPORTS[format]
        if target.exists():
            continue
        started = time.perf_counter()
        result = export(
            run_dir / "adapter", base, target, format=format, rule=rule,
            reference=reference_of(recipe, base, run_dir / "adapter") if format == "mxfp4" else None,
            allow_unchanged=recipe.export.allow_unchanged, max_shard_bytes=recipe.export.max_shard_bytes,
        )  # fmt: skip
        print(f"exported {format} to {target} in {time.perf_counter() - started:.1f} s", file=sys.stderr)
        print_summary(result)
        if format == "mxfp4":
            code = falls_short(result, recipe.export.max_loss_increase)
    return code


def _evaluate(recipe: Recipe, run_dir: Path, base: Path) -> int:
    """Evaluate each variant that exists, in a process of its own; return the first exit code that is not 0."""
    if not recipe.eval.tasks:
        return 0
    settings = recipe.eval
    options = ["--tasks", ",".join(settings.tasks), "--effort", settings.effort, "--epochs", str(settings.epochs)]
    options += ["--max-tokens", str(settings.max_tokens), "--temperature", str(settings.temperature)]
    options += ["--limit", str(settings.limit)] if settings.limit else []
    options += ["--header", settings.header] if settings.header else []
    options += ["--dtype", recipe.model.dtype, "--device", recipe.model.device]
    options += ["--date", recipe.data.date] if recipe.data.date else []
    for task, path in settings.data.items():
        options += ["--data", f"{task}={builtin.path(path)}"]
    codes = []
    for variant in settings.variants:
        if variant == "model" and "mxfp4" not in recipe.export.formats:
            print("eval: no MXFP4 export in this recipe, so the variant `model` is not evaluated", file=sys.stderr)
            continue
        print(f"evaluating {variant}", file=sys.stderr)
        codes.append(_evals(["run", str(run_dir), "--variant", variant, *options]))
    return next((code for code in codes if code), 0)


def _evals(arguments: list[str]) -> int:
    """Run `python -m evals` as a child and return its exit code."""
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith(("ACCELERATE_", "RANK", "LOCAL_RANK"))
    }
    environment.pop("WORLD_SIZE", None)
    return subprocess.run([sys.executable, "-m", "evals", *arguments], env=environment, check=False).returncode


def _print_places(run_dir: Path) -> None:
    places = {
        "adapter": "PEFT adapter: stock peft + transformers load it over the base",
        "model": "fine-tuned MXFP4 checkpoint: in the layout of its base",
        "model-bf16": "bf16 merge",
        "evals": "every answer, by variant",
        "metrics.jsonl": "every curve",
        "recipe.yaml": "the resolved recipe: enough to repeat the run",
        "report.html": "loss curve and comparison in one file",
    }
    print()
    for name, meaning in places.items():
        if (run_dir / name).exists():
            print(f"  {run_dir / name}: {meaning}")
