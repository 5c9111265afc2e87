"""The recipe of a run: every key with its type, default and meaning, and the loader that checks a file against them.

Here: `load_recipe` (file or shipped name, plus command-line overrides, to a frozen `Recipe`), `shipped_recipes`.
Not here: what the keys do (the modules of the same names), and the syntax (`gptoss_train.yaml_strict`).
Used by every command of `gptoss_train`. Imports no torch.

Paths in a recipe are relative to the directory the command runs in, not to the recipe's file: a recipe that is printed,
copied into a run directory or read from an installation means the same files.
"""

from __future__ import annotations

import datetime
import difflib
import re
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from gptoss_infer.errors import UsageError
from gptoss_train import yaml_strict
from gptoss_train.recipe_errors import explain, key_table, line, shown
from gptoss_train.yaml_strict import KeyPath, Location, Problem, Value

T = TypeVar("T")


def _distinct(items: tuple[T, ...]) -> tuple[T, ...]:
    repeated = [item for index, item in enumerate(items) if item in items[:index]]
    if repeated:
        raise ValueError(f"{repeated[0]!r} is given twice; once is enough")
    return items


def _iso_date(text: str) -> str:
    if not re.fullmatch(r"\d{4}-\d{2}-\d{2}", text):
        raise ValueError("expected a date as YYYY-MM-DD, such as 2025-06-28")
    datetime.date.fromisoformat(text)  # its ValueError names the month or day that does not exist
    return text


def _known_builtin(text: str) -> str:
    if text.startswith("builtin:") and text.partition("/")[0] != "builtin:addition":
        raise ValueError("the only built-in is builtin:addition, with files such as builtin:addition/train.jsonl")
    return text


Text = Annotated[str, Field(min_length=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
LayerIndex = Annotated[int, Field(ge=0)]
Effort = Literal["low", "medium", "high"]
Channel = Literal["analysis", "commentary", "final", "tool_call"]
Unique = AfterValidator(_distinct)


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, validate_default=True)


class Model(_Section):
    """The checkpoint to fine-tune and how to hold it."""

    checkpoint: Annotated[Text, AfterValidator(_known_builtin)] = Field(
        description="directory, hub id[@revision] or builtin:addition"
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        default="bfloat16", description="dtype of the dense weights and activations"
    )
    experts: Literal["mxfp4", "bf16"] = Field(
        default="mxfp4", description="how the frozen expert weights are held in memory"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto takes a GPU where there is one")
    embedding: Literal["device", "host"] = Field(
        default="device", description="host keeps the input embedding in main memory: 1.2 GB less on a GPU for gpt-oss"
    )


class Lora(_Section):
    """Which weights get an adapter, and its size."""

    rank: int = Field(default=8, ge=1, description="rank of every adapter")
    alpha: float = Field(
        default=16.0, gt=0, description="adapters are scaled by alpha / rank (rslora: alpha / sqrt(rank))"
    )
    dropout: float = Field(default=0.0, ge=0, lt=1, description="dropout on the adapters' input")
    attention: Annotated[tuple[Literal["q_proj", "k_proj", "v_proj", "o_proj"], ...], Unique] = Field(
        default=("q_proj", "k_proj", "v_proj", "o_proj"), description="attention projections to adapt; may be empty"
    )
    router: bool = Field(default=False, description="adapt the router too; watch val/router_drift")
    experts: Annotated[tuple[Literal["gate_up_proj", "down_proj"], ...], Unique] = Field(
        default=("gate_up_proj", "down_proj"), description="expert projections to adapt; may be empty"
    )
    layers: Literal["all"] | Annotated[tuple[LayerIndex, ...], Unique] = Field(
        default="all", description="all, or the indices of the layers to adapt"
    )
    rslora: bool = Field(default=False, description="scale by alpha / sqrt(rank), which keeps large ranks stable")

    @property
    def weights(self) -> tuple[str, ...]:
        """The adapted weights of a layer."""
        return (*self.attention, *self.experts, *(("router",) if self.router else ()))

    @field_validator("experts")
    @classmethod
    def _trains_something(cls, experts: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        if experts == info.data.get("attention") == () and not info.data.get("router"):
            raise ValueError(
                "attention and experts are both empty: nothing would train. Name q_proj, k_proj, v_proj or o_proj in "
                "attention, or gate_up_proj or down_proj in experts"
            )
        return experts

    @field_validator("layers")
    @classmethod
    def _some_layer(cls, layers: str | tuple[int, ...]) -> str | tuple[int, ...]:
        if not layers:
            raise ValueError("nothing would train. Write all, or name at least one layer")
        return layers


class Data(_Section):
    """The conversations, and which of their tokens are learned."""

    train: Text = Field(description="JSONL file of conversations, or builtin:NAME")
    validation: Text | None = Field(default=None, description="JSONL file of conversations, or builtin:NAME")
    validation_fraction: float = Field(
        default=0.0, ge=0, lt=1, description="share of data.train held out when data.validation is null"
    )
    max_tokens: int | None = Field(
        default=None,
        ge=2,
        description="longest sample; longer ones are counted and reported. null: what train.pack_tokens holds",
    )
    on_long: Literal["skip", "error"] = Field(default="skip", description="what happens to a sample over max_tokens")
    on_bad_line: Literal["error", "skip"] = Field(
        default="error",
        description="what happens to a line that is no conversation; skipped ones are counted and reported",
    )
    train_on: Literal["all_turns", "last_turn"] = Field(
        default="all_turns", description="assistant turns that carry loss"
    )
    reasoning_effort: Effort = Field(
        default="medium", description="effort in the system message of samples that name none"
    )
    date: Annotated[str, AfterValidator(_iso_date)] | None = Field(
        default=None, description="current date in the system message, YYYY-MM-DD; null leaves it out"
    )

    @field_validator("validation_fraction")
    @classmethod
    def _one_validation_set(cls, fraction: float, info: ValidationInfo) -> float:
        if fraction > 0 and info.data.get("validation") is not None:
            raise ValueError(f"data.validation ({info.data['validation']}) is given as well; drop one of them")
        return fraction


class Loss(_Section):
    """The objective."""

    objective: Literal["sft"] = Field(default="sft", description="cross-entropy on the labelled tokens")
    channel_weights: dict[Channel, Annotated[float, Field(ge=0)]] = Field(
        default={}, description="factor on the loss of a channel's tokens; 1 where none is given"
    )


class Optim(_Section):
    """AdamW and its schedule."""

    lr: float = Field(default=1e-4, gt=0, description="peak learning rate")
    lora_plus_ratio: float = Field(
        default=1.0, gt=0, description="learning rate of the factors B over that of A (LoRA+, arXiv 2402.12354)"
    )
    betas: tuple[Beta, Beta] = Field(default=(0.9, 0.999), description="AdamW's decay rates")
    eps: float = Field(default=1e-8, gt=0, description="AdamW's epsilon")
    weight_decay: float = Field(default=0.0, ge=0, description="decoupled weight decay")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="cosine", description="course of the rate after warm-up"
    )
    warmup_steps: int = Field(default=0, ge=0, description="steps over which the rate rises from 0")
    min_lr_ratio: Fraction = Field(
        default=0.1, description="rate at the end of a linear or cosine schedule, as a share of lr"
    )
    max_grad_norm: float = Field(
        default=1.0, ge=0, description="gradients are clipped to this norm; 0 leaves them alone"
    )


class Train(_Section):
    """How long, and in what batches. Exactly one of `epochs` and `max_steps` is set."""

    epochs: int | None = Field(default=None, ge=1, description="passes over the data; needs max_steps null")
    max_steps: int | None = Field(default=None, ge=1, description="optimizer steps; needs epochs null")
    pack_tokens: int = Field(
        default=8192,
        ge=1,
        description="tokens per forward pass: samples are packed into this budget, none sees another",
    )
    batch_tokens: int = Field(
        default=32768, ge=1, description="tokens per optimizer step, over all processes; a multiple of pack_tokens"
    )
    recompute: Literal["none", "experts", "layers"] = Field(
        default="none",
        description="what the backward pass computes again to save memory: the experts' first product, or whole layers",
    )
    offload: bool = Field(
        default=False, description="with recompute layers: their inputs wait in main memory, not on the GPU"
    )
    rounded_steps: int = Field(
        default=0,
        ge=0,
        description="in so many last steps the experts compute as export.rounding and export.seed will write them, and "
        "the adapter learns to live with it; costs a second copy of the experts",
    )
    deterministic: bool = Field(
        default=False, description="only algorithms that repeat bit for bit, on a GPU too; an error where there is none"
    )
    seed: int = Field(default=0, ge=0, description="seed of the adapters, the order of the data and dropout")
    eval_every: int = Field(default=0, ge=0, description="steps between validation losses; 0: at the end alone")

    @field_validator("batch_tokens")
    @classmethod
    def _whole_packs(cls, batch_tokens: int, info: ValidationInfo) -> int:
        pack = info.data.get("pack_tokens", 1)
        if batch_tokens % pack:
            below = batch_tokens // pack * pack
            near = f"{below} or {below + pack}" if below else str(pack)
            raise ValueError(f"train.pack_tokens is {pack}, and a batch is whole packs: take {near}")
        return batch_tokens

    @field_validator("offload")
    @classmethod
    def _offloads_something(cls, offload: bool, info: ValidationInfo) -> bool:
        if offload and info.data.get("recompute") != "layers":
            raise ValueError("only what train.recompute=layers keeps can wait in main memory; set that too")
        return offload

    @field_validator("max_steps")
    @classmethod
    def _one_length(cls, max_steps: int | None, info: ValidationInfo) -> int | None:
        if "epochs" in info.data and (max_steps is None) == (info.data["epochs"] is None):
            raise ValueError(
                "exactly one of train.epochs and train.max_steps must be set, and the other null; "
                f"epochs is {shown(info.data['epochs'])} and max_steps is {shown(max_steps)}"
            )
        return max_steps


class Parallel(_Section):
    """What one process may use; the number of processes is `accelerate launch`'s."""

    threads: int | None = Field(default=None, ge=1, description="CPU threads per process; null leaves torch's default")


class Checkpoint(_Section):
    """Checkpoints to resume from."""

    every_steps: int = Field(default=0, ge=0, description="steps between checkpoints; 0: at the end alone")
    keep: int = Field(default=2, ge=1, description="newest checkpoints kept")
    background: bool = Field(default=False, description="write while training goes on, from a copy in main memory")


class Log(_Section):
    """Where curves go besides `metrics.jsonl`, which is always written."""

    trackers: Annotated[tuple[Literal["wandb", "trackio", "tensorboard"], ...], Unique] = Field(
        default=(), description="dashboards that get a copy of every record; kept inside the run directory"
    )
    project: Text = Field(default="gptoss", description="project name in wandb and trackio")
    name: Text | None = Field(default=None, description="run name in wandb and trackio; null takes the run directory's")
    wandb_mode: Literal["offline", "online"] = Field(default="offline", description="offline never opens a connection")
    every_steps: int = Field(default=1, ge=1, description="steps between records")


class Export(_Section):
    """What is written when training ends."""

    formats: Annotated[tuple[Literal["mxfp4", "bf16", "adapter"], ...], Unique] = Field(
        default=("mxfp4",), description="checkpoints to write; may be empty"
    )
    rounding: Literal["stochastic", "systematic", "nearest"] = Field(
        default="systematic", description="how expert deltas are rounded to MXFP4, on the scales of the base"
    )
    seed: int = Field(default=0, ge=0, description="seed of the rounding")
    calibration_tokens: int = Field(
        default=32768,
        ge=0,
        description="training tokens that show what experts read on average, so that biases take back the mean of the "
        "rounding errors; 0 leaves the biases alone",
    )
    measure_tokens: int = Field(
        default=16384,
        ge=0,
        description="held-out tokens on which base, merge and export are compared; 0 compares nothing",
    )
    unrelated: Text | None = Field(
        default=None, description="JSONL file of conversations that the fine-tune should not have changed; compared too"
    )
    max_loss_increase: float | None = Field(
        default=None, ge=0, description="exit 1 if the export's held-out loss is over the merge's by more, in nats"
    )
    max_shard_bytes: int = Field(default=5_000_000_000, ge=1, description="largest safetensors file")
    allow_unchanged: bool = Field(
        default=False, description="write a checkpoint even if training changed no byte of it"
    )


class Eval(_Section):
    """What is measured after the export; no tasks, no evaluation."""

    tasks: Annotated[tuple[Text, ...], Unique] = Field(
        default=(), description="task names, as `gptoss-eval tasks` lists them"
    )
    data: dict[str, Text] = Field(default={}, description="task name to the path of its data")
    limit: int | None = Field(default=None, ge=1, description="samples per task; null takes all")
    variants: Annotated[tuple[Literal["base", "adapter", "model"], ...], Unique] = Field(
        default=("base", "adapter", "model"),
        description="base checkpoint, its bf16 merge with the adapter, MXFP4 export",
    )
    max_tokens: int = Field(default=1024, ge=1, description="tokens per answer")
    temperature: float = Field(default=0.0, ge=0, description="0 is greedy")
    effort: Effort = Field(default="medium", description="reasoning effort in the system message")
    epochs: int = Field(default=1, ge=1, description="answers per sample")
    header: Text | None = Field(
        default=None, description="text put in front of every answer, for a base that was never taught harmony"
    )


class Run(_Section):
    """The run directory."""

    dir: Text | None = Field(
        default=None, description="run directory; null makes one under runs/ named after the recipe"
    )
    resume: Literal["auto", "never", "must"] = Field(
        default="auto", description="whether to continue what the directory holds"
    )
    overwrite: bool = Field(default=False, description="delete what the directory holds and start again")


class Recipe(_Section):
    """A resolved recipe: every key has a value. `to_yaml` writes all of them, and that file repeats the run."""

    version: Literal[1] = Field(description="version of this format")
    model: Model
    lora: Lora = Lora()
    data: Data
    loss: Loss = Loss()
    optim: Optim = Optim()
    train: Train
    parallel: Parallel = Parallel()
    checkpoint: Checkpoint = Checkpoint()
    log: Log = Log()
    export: Export = Export()
    eval: Eval = Eval()
    run: Run = Run()

    @property
    def max_tokens(self) -> int:
        """Most tokens of a sample; one more than a pack holds, whose last token is a target only."""
        return self.data.max_tokens or self.train.pack_tokens + 1

    @field_validator("train")
    @classmethod
    def _packs_hold_samples(cls, train: Train, info: ValidationInfo) -> Train:
        longest = info.data["data"].max_tokens if "data" in info.data else None
        if longest is not None and longest > train.pack_tokens + 1:
            raise ValueError(
                f"train.pack_tokens is {train.pack_tokens}, which cannot hold a sample of data.max_tokens, {longest}; "
                "raise it or lower that"
            )
        if train.rounded_steps and "lora" in info.data and "model" in info.data:
            lora, model = info.data["lora"], info.data["model"]
            if not lora.experts or lora.dropout or model.experts != "mxfp4":
                raise ValueError(
                    f"train.rounded_steps is {train.rounded_steps}, which needs lora.experts, lora.dropout 0 and "
                    f"model.experts mxfp4; they are {list(lora.experts)}, {lora.dropout} and {model.experts}"
                )
        return train

    def to_yaml(self) -> str:
        """Every key as YAML; `load_recipe` of it gives an equal recipe."""
        return yaml_strict.dump(self.model_dump())

    @classmethod
    def describe(cls) -> str:
        """A table of all keys: name, type, default and meaning."""
        return key_table(cls)


def load_recipe(path_or_name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply command-line overrides to it.

    Args:
        path_or_name: a file, or the name of a shipped recipe.
        overrides: `section.key=value`, applied in order; values by the same rules as in the file.
    Raises: UsageError that lists every problem with its file and line (or override), key, value, what was expected and
        the nearest known name.
    """
    path = _find(path_or_name)
    with path.open("rb") as file:
        document = yaml_strict.parse(file.read(yaml_strict.MAX_BYTES + 1), str(path))
    if not isinstance(document.data, dict):
        raise UsageError(f"{path}: expected `version: 1` and the sections of a recipe, got {shown(document.data)}")
    problems = [Problem(p.location, p.path, line(p.location, p.path, p.text)) for p in document.problems]
    for number, text in enumerate(overrides, 1):
        location = Location(yaml_strict.MAX_BYTES + number, f"override {number}")
        try:
            _override(document.data, document.locations, location, text)
        except UsageError as error:
            problems.append(Problem(location, (), f"{location.label} ({text}): {error}"))
    try:
        recipe = Recipe.model_validate(document.data)
    except ValidationError as error:
        found = explain(error, Recipe, document.data, document.locations, str(path))
        problems += [problem for problem in found if problem.path not in document.unread]
    if problems:
        lines = list(dict.fromkeys(problem.text for problem in sorted(problems, key=lambda problem: problem.location)))
        raise UsageError(lines[0] if len(lines) == 1 else "\n  ".join([f"{path}: {len(lines)} problems", *lines]))
    return recipe


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name: the checkout's, else the installation's."""
    root = Path(__file__).resolve().parent.parent
    checkout = [root / "recipes"] if (root / "pyproject.toml").is_file() else []
    schemes = (sysconfig.get_default_scheme(), sysconfig.get_preferred_scheme("user"))
    installed = [Path(sysconfig.get_path("data", scheme), "share", "gptoss", "recipes") for scheme in schemes]
    for folder in (*checkout, *installed):
        found = {path.stem: path for path in sorted(folder.glob("*.yaml"))}
        if found:
            return found
    return {}


def _find(path_or_name: str) -> Path:
    path = Path(path_or_name)
    if path.is_file():
        return path
    shipped = shipped_recipes()
    if path_or_name in shipped:
        return shipped[path_or_name]
    near = difflib.get_close_matches(path.stem, shipped, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    names = ", ".join(shipped) or "none found"
    what = "is a directory, expected a YAML file" if path.is_dir() else "is neither a file nor a shipped recipe"
    raise UsageError(f"{path_or_name}: {what}.{hint} Shipped recipes: {names}")


def _override(data: dict[str, Value], locations: dict[KeyPath, Location], location: Location, text: str) -> None:
    """Set one `section.key=value` in `data` and note where it came from."""
    name, equals, value = text.partition("=")
    keys = name.strip().split(".")
    if not equals or not all(keys):
        raise UsageError("expected section.key=value, such as optim.lr=1e-4")
    section = data
    for depth, key in enumerate(keys[:-1], 1):
        inner = section.setdefault(key, {})
        if not isinstance(inner, dict):
            raise UsageError(f"{'.'.join(keys[:depth])} holds a value, no keys of its own")
        locations.setdefault(tuple(keys[:depth]), location)
        section = inner
    section[keys[-1]] = yaml_strict.parse_scalar(value)
    for path in [path for path in locations if path[: len(keys)] == tuple(keys)]:
        del locations[path]
    locations[tuple(keys)] = Location(location.order, f"{location.label} ({text})")
