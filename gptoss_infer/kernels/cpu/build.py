"""Compile the CPU kernels with this machine's C++ compiler, once, into a cache; or say why that cannot be.

The file's name holds a hash of the sources, the command and the CPU, so another version, compiler or machine that
shares the folder compiles its own. Several processes may do it at once: each writes a file of its own and renames it.
Nothing here may break an installation: whatever fails is a reason to run plain PyTorch, told once by
`gptoss_infer.kernels`.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import shlex
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
    compiler, flags = _compiler(), [*FLAGS, *target]
    path = cache_folder() / f"cpu-{_key([*compiler, *flags])}.so"
    library = _opened(path)
    if library is not None:
        return library
    print(f"compiling the CPU kernels with {' '.join(compiler)}: some seconds, once", file=sys.stderr)
    try:
        with tempfile.TemporaryDirectory() as work:
            return _made(compiler, flags, Path(work), path)
    except OSError as error:
        raise MachineError(f"no folder for temporary files ({error}); set TMPDIR to one") from None


def _made(compiler: Sequence[str], flags: Sequence[str], work: Path, path: Path) -> ctypes.CDLL:
    """Compile in an empty folder, keep the library at `path`, and return it."""
    made = _compile(compiler, flags, work)
    library = _opened(made)
    try:
        _keep(made, path)
    except OSError as error:
        if library is not None:
            print(f"they will be compiled again: {path.parent} cannot be written ({error})", file=sys.stderr)
    library = library or _opened(path)
    if library is None:
        with contextlib.suppress(OSError):
            path.unlink()
        raise MachineError(
            f"what was compiled can be loaded neither from {work.parent} nor from {path.parent}; if they are mounted "
            "noexec, set TMPDIR or XDG_CACHE_HOME to a folder that is not"
        )
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


def _opened(path: Path) -> ctypes.CDLL | None:
    """Return a library, or None where there is none that can be loaded: not there, not readable, broken, noexec."""
    try:
        return ctypes.CDLL(str(path))
    except OSError:
        return None


def _compiler() -> list[str]:
    """Return the compiler, and the arguments that CXX may name with it."""
    named, *arguments = shlex.split(os.environ.get("CXX", "")) or [""]
    found = next(filter(None, map(shutil.which, (named,) if named else COMPILERS)), None)
    if found is None:
        wanted = f"CXX={named} is not there" if named else f"there is no C++ compiler ({', '.join(COMPILERS)})"
        raise MachineError(f"{wanted}; install one, such as g++, to compile them")
    return [found, *arguments]


def _compile(compiler: Sequence[str], flags: Sequence[str], work: Path) -> Path:
    """Compile and link in an empty folder; return the library there."""
    folder = Path(__file__).parent
    made, library = work / "kernels.o", work / "kernels.so"
    # Linked without an OpenMP library: torch has loaded one, and the threads are to be the same.
    for step in (
        [*compiler, *flags, "-c", str(folder / SOURCES[0]), "-o", str(made)],
        [*compiler, "-shared", str(made), "-o", str(library)],
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
