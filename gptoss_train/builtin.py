"""`builtin:NAME` in recipes: models and data that are made on this machine, once, and cached.

`builtin:addition` is a checkpoint; `builtin:addition/train.jsonl` is a file that comes with it. The cache is
`$XDG_CACHE_HOME/gptoss/builtin` (or below `~/.cache`); deleting it costs a minute.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from gptoss_infer.checkpoint import atomic_directory
from gptoss_infer.checkpoint.atomic import write_manifest
from gptoss_train import addition
from gptoss_train.recipe import Recipe

PREFIX = "builtin:"
NAME = "addition"


def directory() -> Path:
    """Return where `builtin:addition` is, made or not."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "gptoss" / "builtin" / f"{NAME}-{addition.VERSION}"


def prepare(recipe: Recipe) -> None:
    """Make what the recipe names and the cache lacks."""
    optional = (recipe.data.validation or "", recipe.export.unrelated or "")
    named = (recipe.model.checkpoint, recipe.data.train, *optional, *recipe.eval.data.values())
    if not any(text.startswith(PREFIX) for text in named) or directory().exists():
        return
    started = time.perf_counter()
    print(f"making {PREFIX}{NAME}: a tiny gpt-oss that can add (about a minute on two cores, once)", file=sys.stderr)
    with atomic_directory(directory()) as partial:
        (partial / "checkpoint").mkdir()
        accuracy = addition.make_checkpoint(partial / "checkpoint")
        write_manifest(partial / "checkpoint")
        addition.write_data(partial)
    seconds = time.perf_counter() - started
    print(f"made {directory()} in {seconds:.0f} s; it gets {accuracy:.1%} of unseen sums right", file=sys.stderr)


def checkpoint(name: str) -> Path | None:
    """Return the checkpoint directory of a built-in, or None for any other name."""
    return directory() / "checkpoint" if name == f"{PREFIX}{NAME}" else None


def path(text: str) -> Path:
    """Return the path that a recipe's `data` or `eval.data` entry means."""
    rest = text.removeprefix(f"{PREFIX}{NAME}/")
    return Path(text) if rest == text else directory() / rest
