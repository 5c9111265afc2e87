"""`gptoss-train plan RECIPE`: what a recipe needs, before anything is loaded: memory, time and disk.

Memory comes from a step without data (`gptoss_train.dry_run`), so it follows the code; operations are exact
(`gptoss_train.flops`); the data, if it is there, gives lengths, labels and steps. Three numbers are not predicted but
assumed, and are printed as such: what a GPU's context and fragmentation take, what libraries hold beside torch's
tensors on a CPU, and the share of its peak that a device reaches.
"""

from __future__ import annotations

import os
import shutil
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gptoss_infer.checkpoint import Checkpoint
from gptoss_infer.checkpoint.layouts import ExpertFormat, expected_shapes
from gptoss_infer.config import ModelConfig, published
from gptoss_infer.errors import UsageError
from gptoss_infer.loading import DTYPES
from gptoss_train import addition, builtin, devices
from gptoss_train.data import Dataset, load_splits
from gptoss_train.devices import Gpu
from gptoss_train.dry_run import StepMemory, dry_run
from gptoss_train.flops import LoraShape, step_flops
from gptoss_train.packing import Plan
from gptoss_train.progress import peak_memory_bytes
from gptoss_train.recipe import Recipe

# Assumed for a GPU, of which none was measured: the driver's context, cuBLAS' workspace, and blocks that do not fit.
GPU_CONTEXT_BYTES, GPU_FRAGMENTATION = 0.6e9, 0.04
GPU_UTILISATION = 0.25
# Seen on a CPU (bench of 0.1 and 1.4 billion parameters, 14 settings): products that oneDNN compiled for bf16, blocks
# that C's allocator did not give back, and 36 to 45% of the rate of a lone product of the experts' shape.
CPU_LIBRARY_BYTES, CPU_FRAGMENTATION = {"bfloat16": 0.35e9, "float32": 0.08e9}, 0.25
CPU_UTILISATION = 0.4
FACTOR_BYTES = 4  # fp32

LEVERS: tuple[dict[str, object], ...] = (
    {"train.recompute": "none", "train.offload": False},
    {"train.recompute": "experts", "train.offload": False},
    {"train.recompute": "layers", "train.offload": False},
    {"train.recompute": "layers", "train.offload": True},
    {"train.recompute": "layers", "train.offload": True, "model.embedding": "host"},
)


class Workload(NamedTuple):
    """What a recipe trains on; from its data, or as bad as it can be where there is none yet."""

    documents: list[int]  # of one pack
    num_labels: int  # most in a pack
    steps: int | None
    tokens: int | None  # of all steps
    label_share: float


class Need(NamedTuple):
    """Bytes of one process, and operations per token, of a recipe on a device."""

    step: StepMemory
    beside: float  # context and fragmentation, or libraries: assumed
    main: float  # memory of the machine; on a CPU everything
    flops_per_token: float

    @property
    def device(self) -> float:
        """Memory of the device."""
        return self.step.device + self.beside


@dataclass(frozen=True)
class Prediction:
    """All that `plan` says."""

    recipe: Recipe
    device: str
    capacity: float  # bytes of the device's memory
    need: Need
    num_factors: int
    workload: Workload
    peak_flops: float | None  # of the device, operations per second
    utilisation: float
    disk: dict[str, float]  # bytes by what is written
    disk_free: int
    levers: list[tuple[dict[str, object], Need]]
    notes: list[str]

    @property
    def fits(self) -> bool:
        """Whether the device's memory is enough."""
        return self.need.device <= self.capacity

    def tokens_per_s(self, need: Need) -> float | None:
        """Return the expected rate of one process; None for a device of unknown speed."""
        return self.peak_flops * self.utilisation / need.flops_per_token if self.peak_flops else None

    @property
    def hours(self) -> float | None:
        """Time of all steps on one process."""
        rate = self.tokens_per_s(self.need)
        return self.workload.tokens / rate / 3600 if self.workload.tokens and rate else None


def predict(recipe: Recipe, device: str | None = None) -> Prediction:
    """Predict what a run needs; nothing is loaded, fetched, made or trained.

    Args:
        device: `cpu`, a name in `devices.GPUS`, or a size such as `24GB`; None for what the recipe would run on here.
    Raises: UsageError for an unknown device, or a checkpoint whose architecture is known nowhere here.
    """
    config, stored = _architecture(recipe.model.checkpoint)
    gpu = _gpu(recipe, device)
    resident = peak_memory_bytes(torch.device("cpu"))
    workload, notes = _workload(recipe)
    if recipe.model.checkpoint.startswith(builtin.PREFIX):
        notes.append("most rows of this model's unembedding are equal and trained as one: it is faster than this")

    def need_with(recipe: Recipe) -> Need:
        return need_of(recipe, config, workload, gpu=gpu is not None, resident=resident)

    need = need_with(recipe)
    changed = [(change, _changed(recipe, change)) for change in (LEVERS if gpu is not None else LEVERS[:3])]
    levers = [(change, need if other == recipe else need_with(other)) for change, other in changed]
    peak = _cpu_rate(config, DTYPES[recipe.model.dtype]) if gpu is None else gpu.peak_flops
    run_dir = Path(recipe.run.dir or "runs")
    existing = next(path for path in (run_dir, *run_dir.absolute().parents) if path.exists())
    return Prediction(
        recipe,
        "cpu" if gpu is None else gpu.name,
        float(_main_memory()) if gpu is None else gpu.memory_bytes,
        need,
        need.step.num_factors,
        workload,
        peak,
        CPU_UTILISATION if gpu is None else GPU_UTILISATION,
        _disk(recipe, config, stored, need.step.num_factors),
        shutil.disk_usage(existing).free,
        levers,
        notes,
    )


def _architecture(checkpoint: str) -> tuple[ModelConfig, ExpertFormat | None]:
    """Return the config, and how the experts are stored here; None for a checkpoint that is not here yet."""
    directory = builtin.checkpoint(checkpoint) or Path(checkpoint)
    if directory.is_dir():
        opened = Checkpoint.open(directory)
        return opened.config, opened.experts
    if checkpoint.startswith(builtin.PREFIX):
        return addition.CONFIG, None
    name = checkpoint.partition("@")[0].rpartition("/")[2]
    for size in ("20b", "120b"):
        if name.startswith(f"gpt-oss-{size}"):
            return published(size), None
    raise UsageError(
        f"the architecture of {checkpoint!r} is not known here: it is no directory, and neither gpt-oss-20b nor -120b; "
        "fetch it, and give its directory"
    )


def _gpu(recipe: Recipe, device: str | None) -> Gpu | None:
    """Return the card to plan for; None for the CPU."""
    if device == "cpu" or (device is None and (recipe.model.device == "cpu" or not torch.cuda.is_available())):
        return None
    if device is not None:
        return devices.named(device)
    properties = torch.cuda.get_device_properties(0)
    return Gpu(properties.name, "", properties.total_memory // 2**30, devices.peak_flops(properties.name))


def _workload(recipe: Recipe) -> tuple[Workload, list[str]]:
    """Return what will be trained on, and what had to be assumed."""
    settings = recipe.train
    train_path = builtin.path(recipe.data.train)
    validation_path = builtin.path(recipe.data.validation) if recipe.data.validation else None
    if train_path.exists() and (validation_path is None or validation_path.exists()):
        return _workload_of(recipe, load_splits(recipe, train_path, validation_path)[0]), []
    steps = settings.max_steps
    tokens = steps * settings.batch_tokens if steps else None
    missing = recipe.data.train if not train_path.exists() else recipe.data.validation
    note = f"{missing} is not there: every pack is taken as one full document, all of it labelled"
    return Workload([settings.pack_tokens], settings.pack_tokens, steps, tokens, 1.0), [note]


def _workload_of(recipe: Recipe, train: Dataset) -> Workload:
    settings = recipe.train
    lengths = [sample.num_inputs for sample in train.samples]
    labels = [int((sample.channels[1:] > 0).sum()) for sample in train.samples]
    plan = Plan(lengths, settings.pack_tokens, settings.batch_tokens // settings.pack_tokens, settings.seed)
    packs = [pack for step in plan.epoch(0) for pack in step]
    steps = settings.max_steps or plan.total_steps(settings.epochs or 0)
    fullest = max(packs, key=lambda pack: (sum(lengths[i] for i in pack), max(lengths[i] for i in pack)))
    documents = [lengths[i] for i in fullest]
    num_labels = min(max(sum(labels[i] for i in pack) for pack in packs), sum(documents))
    tokens = round(sum(lengths) * steps / len(plan.epoch(0)))
    return Workload(documents, num_labels, steps, tokens, sum(labels) / sum(lengths))


def need_of(recipe: Recipe, config: ModelConfig, workload: Workload, *, gpu: bool, resident: int) -> Need:
    """Return what one process needs, with the levers as the recipe has them.

    Args:
        resident: bytes that Python, torch and peft take in a process of this program before it loads anything.
    """
    step = dry_run(recipe, config, workload.documents, workload.num_labels, gpu=gpu)
    copy = 3 * FACTOR_BYTES * step.num_factors if recipe.checkpoint.background else 0
    if not gpu:
        # What an offloaded layer input or a host's embedding takes is main memory all the same.
        beside = CPU_LIBRARY_BYTES[recipe.model.dtype] + CPU_FRAGMENTATION * (step.device - step.weights)
        step = step._replace(weights=step.weights + step.embedding_on_host, kept=step.kept + step.offloaded)
        main = resident + beside + step.device + copy
        need_beside = resident + beside + copy
    else:
        main = resident + step.embedding_on_host + step.offloaded + copy
        need_beside = GPU_CONTEXT_BYTES + GPU_FRAGMENTATION * step.device
    lora = LoraShape.of(recipe.lora, config)
    num_labels = round(workload.label_share * sum(workload.documents))
    operations = step_flops(config, workload.documents, num_labels, lora, recipe.train.recompute)
    return Need(step, need_beside, main, operations.total / sum(workload.documents))


def _changed(recipe: Recipe, change: dict[str, object]) -> Recipe:
    """Return the recipe with other values for some dotted keys."""
    sections: dict[str, Any] = recipe.model_dump()
    for key, value in change.items():
        section, _, name = key.partition(".")
        sections[section][name] = value
    return Recipe.model_validate(sections)


def _disk(recipe: Recipe, config: ModelConfig, stored: ExpertFormat | None, num_factors: int) -> dict[str, float]:
    """Return the bytes that a run writes, by what they are."""
    factors = FACTOR_BYTES * num_factors
    found: dict[str, float] = {}
    if stored is None:
        found["base"] = checkpoint_bytes(config, "mxfp4")
    found["checkpoints"] = (recipe.checkpoint.keep + 1) * 3 * factors  # the next is complete before the oldest goes
    found["adapter"] = factors
    for format in recipe.export.formats:
        found[f"export {format}"] = factors if format == "adapter" else checkpoint_bytes(config, format)
    return found


def checkpoint_bytes(config: ModelConfig, experts: ExpertFormat) -> int:
    """Return the size of a checkpoint's tensors: uint8 for MXFP4, bf16 for all else."""
    return sum(
        torch.Size(shape).numel() * (1 if name.endswith(("_blocks", "_scales")) else 2)
        for name, shape in expected_shapes(config, experts).items()
    )


def _cpu_rate(config: ModelConfig, dtype: torch.dtype) -> float:
    """Return the operations per second of a lone product of the experts' shape, measured for a moment."""
    x = torch.ones(512, config.hidden_size, dtype=dtype)
    weight = torch.ones(config.hidden_size, 2 * config.intermediate_size, dtype=dtype)
    x @ weight
    times = []
    end = time.perf_counter() + 0.3
    while time.perf_counter() < end:
        started = time.perf_counter()
        x @ weight
        times.append(time.perf_counter() - started)
    return 2 * x.numel() * weight.shape[1] / statistics.median(times)


def _main_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def to_json(prediction: Prediction) -> dict[str, object]:
    """Return the prediction for `--json`; bytes as GB (1e9)."""
    p = prediction

    def memory(need: Need) -> dict[str, float]:
        parts = {f"{name}_gb": round(value / 1e9, 3) for name, value in need.step._asdict().items()}
        return {
            "device_gb": round(need.device / 1e9, 3), "main_gb": round(need.main / 1e9, 3), **parts,
            "beside_gb": round(need.beside / 1e9, 3),
        }  # fmt: skip

    return {
        "device": p.device,
        "capacity_gb": round(p.capacity / 1e9, 1),
        "fits": p.fits,
        "memory": memory(p.need),
        "trainable": p.num_factors,
        "steps": p.workload.steps,
        "tokens": p.workload.tokens,
        "tokens_per_s": p.tokens_per_s(p.need),
        "hours": p.hours,
        "utilisation": p.utilisation,
        "peak_flops": p.peak_flops,
        "disk_gb": {name: round(size / 1e9, 3) for name, size in p.disk.items()},
        "disk_free_gb": round(p.disk_free / 1e9, 1),
        "levers": [
            {"change": change, **memory(need), "tokens_per_s": p.tokens_per_s(need)} for change, need in p.levers
        ],
        "notes": p.notes,
    }


def lines(prediction: Prediction) -> Iterator[str]:
    """Yield the prediction as text."""
    p, step = prediction, prediction.need.step
    on_gpu = p.device != "cpu"
    verdict = "it fits" if p.fits else "it does NOT fit"
    yield f"{p.recipe.model.checkpoint} on {p.device}: {verdict}"
    yield ""
    beside = "context, fragmentation (assumed)" if on_gpu else "Python and libraries"
    rows: list[tuple[str, float, str]] = [
        ("weights", step.weights, f"experts {p.recipe.model.experts}, all else {p.recipe.model.dtype}"),
        ("adapters, gradients, AdamW", step.adapters, f"{p.num_factors:,} factors in fp32"),
        ("kept for the backward pass", step.kept, f"{sum(p.workload.documents):,} tokens in a pack"),
        ("coming and going", step.passing, "decoded experts, scores, logits"),
        (beside, p.need.beside, ""),
    ]
    yield f"  {'memory of the ' + ('GPU' if on_gpu else 'machine'):34}     GB"
    for name, size, meaning in rows:
        yield f"    {name:32} {size / 1e9:6.2f}   {meaning}".rstrip()
    yield f"    {'in all':32} {p.need.device / 1e9:6.2f}   of {p.capacity / 1e9:.1f}"
    if on_gpu:
        yield f"  {'main memory':34} {p.need.main / 1e9:6.2f}   without what the CUDA libraries take"
    yield f"  {'disk':34} {sum(p.disk.values()) / 1e9:6.2f}   of {p.disk_free / 1e9:.1f} free: " + ", ".join(
        f"{name} {size / 1e9:.2f}" for name, size in p.disk.items()
    )
    yield ""
    yield from _time_lines(p)
    yield ""
    yield f"  {'with':66} {'GPU' if on_gpu else '':>7} {'main':>7}   tokens/s"
    for change, need in p.levers:
        text = " ".join(f"{key}={str(value).lower()}" for key, value in change.items() if value is not False)
        gpu_gb = f"{need.device / 1e9:.2f}" if on_gpu else ""
        rate = p.tokens_per_s(need)
        here = "   as it is" if need is p.need else ""
        yield f"    {text:64} {gpu_gb:>7} {need.main / 1e9:7.2f} {f'{rate:10,.0f}' if rate else '         ?'}{here}"
    for note in p.notes:
        yield f"  note: {note}"


def _time_lines(p: Prediction) -> Iterator[str]:
    workload, rate = p.workload, p.tokens_per_s(p.need)
    steps = f"{workload.steps:,} steps" if workload.steps else "steps unknown"
    tokens = f", {workload.tokens:,} tokens" if workload.tokens else ""
    yield f"  {steps}{tokens}, {workload.label_share:.0%} labelled; {p.need.flops_per_token / 1e9:.2f} GFLOP a token"
    if rate is None or p.peak_flops is None:
        yield "  speed unknown: this device's peak is in no table here"
        return
    source = "measured just now" if p.device == "cpu" else "data sheet; the share is assumed, measure it with bench"
    duration = f", {p.hours:.2f} hours" if p.hours is not None else ""
    yield f"  about {rate:,.0f} tokens/s a process{duration}: {p.utilisation:.0%} of {p.peak_flops / 1e12:.3g} TFLOP/s"
    yield f"    ({source})"
