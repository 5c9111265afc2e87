"""Compile the CPU kernels with this machine's C++ compiler, once, into a cache; or say why that cannot be.

The file's name holds a hash of the sources, the command and the CPU, so another version, compiler or machine that
shares the folder compiles its own. Several processes may do it at once: each writes a file of its own and renames it.
Nothing here may break an installation: whatever fails is a reason to run plain PyTorch, told once by
`gptoss_infer.kernels`.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from gptoss_infer.errors import MachineError

SWITCH = "GPTOSS_CPU_KERNELS"  # in the environment: 0 runs plain PyTorch
SOURCES = (
    "kernels.cpp", "attention.h", "experts.h", "layers.h", "linear.h", "mxfp4.h", "parallel.h", "rows.h", "simd.h",
)  # fmt: skip
COMPILERS = ("c++", "g++", "clang++")
# Sums are written out in the order in which they are to be made; the compiler may fuse, but not reorder.
FLAGS = ("-std=c++17", "-O3", "-fopenmp", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-w")
THIS_CPU = ("-march=native",)


def load(target: Sequence[str] = THIS_CPU) -> ctypes.CDLL:
    """Return the compiled library, compiling it first if need be.

    Args:
        target: the flags that say for which CPU.
    Raises: MachineError with the reason, and the cure where there is one.
    """
    if os.environ.get(SWITCH) == "0":
        raise MachineError(f"{SWITCH}=0 is set; unset it to compile them")
    command = [_compiler(), *FLAGS, *target]
    path = cache_folder() / f"cpu-{_key(command)}.so"
    if path.is_file():
        return _open(path)
    print(f"compiling the CPU kernels with {command[0]}: some seconds, once", file=sys.stderr)
    with tempfile.TemporaryDirectory() as work:
        made = _compile(command, Path(work))
        library = _open(made)  # before it is kept
        try:
            _keep(made, path)
        except OSError as error:
            print(f"they will be compiled again: {path.parent} cannot be written ({error})", file=sys.stderr)
        return library


def cache_folder() -> Path:
    """Where compiled libraries are kept."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(root) / "gptoss" / "kernels"


def _keep(made: Path, path: Path) -> None:
    """Put a library into the cache, complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".compiled-", delete=False) as file:
        try:
            file.write(made.read_bytes())
            os.chmod(file.name, 0o755)
            os.replace(file.name, path)
        except OSError:
            os.unlink(file.name)
            raise


def _open(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise MachineError(f"{path} cannot be loaded ({error}); delete it to compile it again") from None


def _compiler() -> str:
    named = os.environ.get("CXX")
    found = next(filter(None, map(shutil.which, (named,) if named else COMPILERS)), None)
    if found is None:
        wanted = f"CXX={named} is not there" if named else f"there is no C++ compiler ({', '.join(COMPILERS)})"
        raise MachineError(f"{wanted}; install one, such as g++, to compile them")
    return found


def _compile(command: Sequence[str], work: Path) -> Path:
    """Compile and link in an empty folder; return the library there."""
    folder = Path(__file__).parent
    made, library = work / "kernels.o", work / "kernels.so"
    # Linked without an OpenMP library: torch has loaded one, and the threads are to be the same.
    for step in (
        [*command, "-c", str(folder / SOURCES[0]), "-o", str(made)],
        [command[0], "-shared", str(made), "-o", str(library)],
    ):
        try:
            done = subprocess.run(step, capture_output=True, text=True, errors="replace", check=False)
        except OSError as error:
            raise MachineError(f"{step[0]} cannot be run: {error}") from None
        if done.returncode != 0:
            lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
            raise MachineError(f"{step[0]} failed: {lines[0].strip() if lines else f'exit {done.returncode}'}")
    return library


def _key(command: Sequence[str]) -> str:
    found = hashlib.sha256("\0".join([*command, _cpu()]).encode())
    for name in SOURCES:
        found.update((Path(__file__).parent / name).read_bytes())
    return found.hexdigest()[:24]


def _cpu() -> str:
    """What the compiler's choice for this CPU can depend on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux: the name alone
        lines = []
    kinds = ("vendor_id", "cpu family", "model", "flags", "Features", "CPU part")
    first = {line.split(":")[0].strip(): line for line in reversed(lines) if line}
    return "\n".join([platform.machine(), platform.processor(), *(first.get(kind, "") for kind in kinds)])
