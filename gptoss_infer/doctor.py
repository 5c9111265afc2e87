"""What this machine can do for `gptoss-infer generate`, each lack with its cure. Downloads nothing, changes nothing.

Finding the vocabulary may unpack bpe-openai's copy into our cache, and looking at the CPU's kernels may compile them
there, as the first use would. Used by the command line.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gptoss_infer.errors import MachineError

GIB = 2**30
CHECKPOINT_BYTES = 14 * 10**9  # gpt-oss-20b in MXFP4; 120b has 65e9


@dataclass(frozen=True)
class Check:
    """One finding: `missing` stops generate, a `note` only limits it."""

    name: str
    status: Literal["ok", "note", "missing"]
    finding: str
    cure: str = ""


def examine() -> list[Check]:
    """Return all findings; no check depends on an earlier one having passed."""
    return [
        Check("python", "ok", f"{platform.python_version()} ({platform.system()} {platform.machine()})"),
        *(_package(name, cure) for name, cure in PACKAGES.items()),
        *_guarded("device", _devices),
        *_guarded("kernels", _kernels),
        *_guarded("cpu kernels", _cpu_kernels),
        *_guarded("vocabulary", _vocabulary),
        _constraints(),
        *(_disk(name, folder) for name, folder in (("disk here", Path.cwd()), ("disk cache", _hub_cache()))),
    ]


PACKAGES = {
    "torch": "pip install torch",
    "safetensors": "pip install safetensors",
    "numpy": "pip install numpy",
    "openai-harmony": "pip install openai-harmony",
}


def lines(checks: Sequence[Check]) -> Iterator[str]:
    """Yield the findings as text."""
    for check in checks:
        yield f"{check.status:<8} {check.name:<15} {check.finding}"
        if check.cure:
            yield f"{'':<24} cure: {check.cure}"


def _package(name: str, cure: str) -> Check:
    try:
        return Check(name, "ok", importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Check(name, "missing", "not installed", cure)


def _guarded(name: str, check: Callable[[], list[Check]]) -> list[Check]:
    """Run a check that needs packages: that they cannot be imported is a finding too."""
    try:
        return check()
    except (ImportError, MachineError) as error:
        return [Check(name, "missing", str(error), "install what is missing above, then run this again")]


def _devices() -> list[Check]:
    import torch

    cpu = Check("cpu", "ok", f"{torch.get_num_threads()} threads, {_memory_gib():.0f} GiB of memory")
    if torch.cuda.is_available():
        return [cpu, *(_gpu(index) for index in range(torch.cuda.device_count()))]
    build = (
        f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}" if torch.version.hip else ""
    )
    if build:
        cure = (
            f"this torch is built for {build}: check the driver with nvidia-smi or rocm-smi, and CUDA_VISIBLE_DEVICES"
        )
    else:
        cure = "none needed for a CPU; with a GPU, install a torch built for it (pytorch.org/get-started)"
    return [cpu, Check("gpu", "note", "torch sees none; everything runs on the CPU, large models slowly", cure)]


def _gpu(index: int) -> Check:
    import torch

    free, total = torch.cuda.mem_get_info(index)
    major, minor = torch.cuda.get_device_capability(index)
    name = f"{torch.cuda.get_device_name(index)}, capability {major}.{minor}"
    return Check(f"gpu {index}", "ok", f"{name}, {free / GIB:.0f} of {total / GIB:.0f} GiB free")


def _memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB


def _kernels() -> list[Check]:
    """Run the decode kernel if there is a GPU: compiling and launching are what fails on a broken installation."""
    import torch

    from gptoss_infer import kernels, mxfp4

    try:
        triton = f"triton {importlib.metadata.version('triton')}"
    except importlib.metadata.PackageNotFoundError:
        return [Check("kernels", "note", "triton is not installed: plain PyTorch", "pip install triton (Linux)")]
    if not torch.cuda.is_available():
        return [Check("kernels", "ok", f"plain PyTorch, as there is no GPU; {triton} is installed")]
    blocks = torch.arange(256, dtype=torch.uint8, device="cuda").view(16, 16)
    scales = torch.arange(120, 136, dtype=torch.uint8, device="cuda")
    try:
        equal = torch.equal(kernels.decode(blocks, scales), mxfp4.decode(blocks, scales))
    except (
        Exception
    ) as error:  # Triton raises its own, the driver's and the C compiler's; all mean that it does not run
        finding = f"{triton} cannot run here ({type(error).__name__}: {error})"
        return [Check("kernels", "missing", finding, "install a C compiler and the triton that belongs to this torch")]
    if not equal:
        return [Check("kernels", "missing", f"{triton} decodes MXFP4 wrongly here", "install another triton version")]
    return [
        Check("kernels", "ok", f"{triton}; MXFP4 decode equals its reference on this GPU, bf16 models run by kernels")
    ]


def _cpu_kernels() -> list[Check]:
    """Compile them, if that was not done before, and multiply numbers whose products and sums are exact."""
    import torch

    from gptoss_infer.kernels.cpu import Affine, Kernels

    try:
        compiled = Kernels()
    except MachineError as error:
        finding = f"plain PyTorch instead of compiled kernels, more slowly: {error}"
        return [Check("cpu kernels", "note", finding, "see the reason; a C++ compiler is needed, such as g++")]
    x, weight = (torch.arange(n * 64).remainder(13).sub(6).view(n, 64).bfloat16() for n in (5, 21))
    if not torch.equal(compiled.linear(x, Affine(weight), torch.float32), x.float() @ weight.float().T):
        return [Check("cpu kernels", "missing", "compiled kernels multiply wrongly here", "set GPTOSS_CPU_KERNELS=0")]
    return [Check("cpu kernels", "ok", f"compiled, {compiled.level}; products equal their reference on this CPU")]


def _vocabulary() -> list[Check]:
    from gptoss_infer.harmony import encode, vocabulary

    cure = "pip install 'gptoss[vocab]' (offline), or let the first use download it"
    try:
        folder = vocabulary.locate()
        if folder is None:
            return [Check("vocabulary", "missing", "not on this machine", cure)]
        encode("loads it")
    except MachineError as error:
        return [Check("vocabulary", "missing", str(error), cure)]
    return [Check("vocabulary", "ok", str(folder))]


def _constraints() -> Check:
    try:
        return Check("constraints", "ok", f"llguidance {importlib.metadata.version('llguidance')}")
    except importlib.metadata.PackageNotFoundError:
        finding = "llguidance is not installed: no JSON schema or grammar can be enforced"
        return Check("constraints", "note", finding, "pip install 'gptoss[structured]'")


def _hub_cache() -> Path:
    """Where huggingface_hub keeps what it fetches (its documentation: HF_HUB_CACHE, HF_HOME, XDG_CACHE_HOME)."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    home = os.environ.get("HF_HOME") or os.path.join(cache, "huggingface")
    return Path(os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub"))


def _disk(name: str, folder: Path) -> Check:
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    finding = f"{free / GIB:.0f} GiB free in {folder}"
    if free < CHECKPOINT_BYTES:
        cure = "free some, or set HF_HOME" if name == "disk cache" else "free some, or write elsewhere"
        return Check(name, "note", f"{finding}; gpt-oss-20b needs {CHECKPOINT_BYTES / GIB:.0f}", cure)
    return Check(name, "ok", finding)
