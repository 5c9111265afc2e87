"""What is evaluated: a checkpoint directory, one of the three models that a training run directory stands for, or a
model that a server runs.

Used by `evals.runner`. A run directory has `recipe.yaml`, and `model/` (the exported checkpoint) or `adapter/` (over
the base that the recipe names). A server has an OpenAI-compatible base URL.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from gptoss_infer.errors import DataError, UsageError

if TYPE_CHECKING:
    from gptoss_infer.remote import RemoteEngine

Variant = Literal["model", "adapter", "base"]
VARIANTS: tuple[Variant, ...] = ("model", "adapter", "base")


@dataclass(frozen=True)
class Target:
    """A model to evaluate: `checkpoint`, with `adapter` over it if there is one; `run` is the run directory it is
    from."""

    given: str
    variant: Variant
    checkpoint: Path
    adapter: Path | None
    run: Path | None

    @property
    def name(self) -> str:
        """What its evaluations are called by default."""
        name = self.checkpoint.resolve().name
        return f"{name}+{self.adapter.resolve().name}" if self.adapter else name

    def describe(self) -> dict[str, Any]:
        """What `run.json` says of it; reads the checkpoint once for its fingerprint."""
        return {
            "given": self.given,
            "variant": self.variant,
            "checkpoint": str(self.checkpoint.resolve()),
            "checkpoint_sha256": fingerprint(self.checkpoint),
            "adapter": str(self.adapter.resolve()) if self.adapter else None,
            "adapter_sha256": fingerprint(self.adapter) if self.adapter else None,
        }


@dataclass(frozen=True)
class Served:
    """A model that a server runs. What its weights are, nobody can check from here."""

    engine: RemoteEngine

    @property
    def name(self) -> str:
        """What its evaluations are called by default."""
        return self.engine.model.replace("/", "--")

    def describe(self) -> dict[str, Any]:
        """What `run.json` says of it: where it is asked and how, without the key."""
        dialect = self.engine.dialect
        return {
            "given": str(self.engine.server.address),
            "variant": "served",
            "server": str(self.engine.server.address),
            "model": self.engine.model,
            "mode": dialect.mode,
            "tokens": dialect.tokens,
        }


def is_url(given: str) -> bool:
    """Whether a target is a server."""
    return given.startswith(("http://", "https://"))


def resolve(given: str, *, variant: Variant | None, adapter: str | None) -> Target:
    """The model that a command line means.

    Raises: UsageError for a missing directory or options that do not go with the target.
    """
    path = Path(given)
    if not path.is_dir():
        raise UsageError(f"{given}: no such directory; expected a checkpoint or a run directory")
    if is_run(path):
        if adapter is not None:
            raise UsageError(
                f"{given} is a run directory: its own adapter is --variant adapter; --adapter needs a checkpoint"
            )
        return _resolve_run(given, path, variant or "model")
    if variant is not None:
        raise UsageError(f"--variant {variant} needs a run directory (with recipe.yaml); {given} has none")
    if adapter is not None and not Path(adapter).is_dir():
        raise UsageError(f"--adapter {adapter}: no such directory; expected one with adapter_config.json")
    return Target(given, "model", _checkpoint(path), Path(adapter) if adapter else None, None)


def is_run(path: Path) -> bool:
    """Whether the directory is that of a training run."""
    return (path / "recipe.yaml").is_file()


def read_recipe(run: Path) -> dict[str, object]:
    """The resolved recipe of a run directory."""
    path = run / "recipe.yaml"
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not YAML ({error}); expected the resolved recipe of the run") from None
    if not isinstance(recipe, dict):
        raise DataError(f"{path}: a {type(recipe).__name__}, expected a recipe with sections")
    return recipe


def recipe_value(recipe: dict[str, object], section: str, key: str) -> object:
    """`recipe[section][key]`, or None where the recipe does not say."""
    values = recipe.get(section)
    return values.get(key) if isinstance(values, dict) else None


def fingerprint(directory: Path) -> str:
    """SHA-256 over names and contents of the configuration and all tensors of a checkpoint or adapter.

    Reads every byte (about a second per GB), because headers and sizes alone are the same for a base and its fine-tune.
    """
    digest = hashlib.sha256()
    for path in _weight_files(directory):
        with path.open("rb") as file:
            digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def _resolve_run(given: str, run: Path, variant: Variant) -> Target:
    if variant == "model":
        if not (run / "model").is_dir():
            raise UsageError(f"{given} has no model/; was it exported? Its adapter is evaluated with --variant adapter")
        return Target(given, variant, _checkpoint(run / "model"), None, run)
    base = _base_of(run)
    if variant == "base":
        return Target(given, variant, base, None, run)
    if not (run / "adapter").is_dir():
        raise UsageError(f"{given} has no adapter/; expected a finished LoRA run. Its base is --variant base")
    return Target(given, variant, base, run / "adapter", run)


def _base_of(run: Path) -> Path:
    """The base of a run: the recipe's checkpoint, or where that is no directory, the one its adapter names."""
    named = recipe_value(read_recipe(run), "model", "checkpoint")
    candidates = [named, _adapter_base(run)]
    for candidate in candidates:
        if isinstance(candidate, str) and Path(candidate).is_dir():
            return _checkpoint(Path(candidate))
    raise UsageError(
        f"{run}/recipe.yaml: model.checkpoint is {named!r}, which is no directory here; "
        f"evaluate the base by its own path, or the adapter with: gptoss-eval run BASE --adapter {run}/adapter"
    )


def _adapter_base(run: Path) -> object:
    config = run / "adapter" / "adapter_config.json"
    if not config.is_file():
        return None
    try:
        return json.loads(config.read_bytes()).get("base_model_name_or_path")
    except (ValueError, AttributeError) as error:
        raise DataError(f"{config}: not an adapter's configuration ({error})") from None


def _checkpoint(path: Path) -> Path:
    if not any((path / name).is_file() for name in ("config.json", "original/config.json")):
        raise DataError(f"{path}: no config.json in it; expected a gpt-oss checkpoint")
    return path


def _weight_files(directory: Path) -> Iterable[Path]:
    files = sorted(directory.glob("*.safetensors")) or sorted(directory.glob("original/*.safetensors"))
    configs = [directory / name for name in ("config.json", "adapter_config.json", "original/config.json")]
    if not files:
        raise DataError(f"{directory}: no *.safetensors in it; expected the weights of a checkpoint or an adapter")
    return [path for path in configs if path.is_file()] + files
