"""Which package may import which, and which constructs have no place here: read from the source, not by running it.

The rules are those of the README's file tree: gptoss_infer is the base, training and evaluation meet at a directory.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("gptoss_infer", "gptoss_train", "evals")
# What each package may import of gptoss_infer. (Training gets the engine with the first method that samples.)
OF_INFER = {
    "gptoss_train": {
        "adapter", "attention", "checkpoint", "config", "errors", "experts", "harmony", "kernels", "loading", "lora",
        "model", "mxfp4", "rounding", "tiled",
    },
    "evals": {"config", "engine", "errors", "harmony", "remote", "sandbox", "tools"},
}  # fmt: skip
# Inside gptoss_infer: the formats know nothing of the model, the model nothing of the engine.
FORMATS = {"checkpoint", "config", "errors", "harmony", "mxfp4", "rounding"}
LAYERS = {name: FORMATS for name in FORMATS} | {
    "kernels": FORMATS | {"attention", "kernels", "page_tables", "sampling"},
    "attention": {"attention", "kernels"},
    "experts": FORMATS | {"kernels", "experts"},
    "model": FORMATS | {"attention", "experts", "kernels", "model"},
    "sampling": set(),
    "constraints": FORMATS,
    "page_tables": {"attention"},
    "adapter": FORMATS | {"adapter"},
    "loading": FORMATS | {"kernels", "model"},
    "lora": FORMATS | {"adapter", "experts", "model"},
    "client": {"errors"},
    "dialect": FORMATS | {"client", "engine"},
    "remote": FORMATS | {"client", "dialect", "engine"},
}
TRAINING_ONLY = {
    "accelerate",
    "datasets",
    "wandb",
    "trackio",
    "tensorboard",
    "transformers",
    "bitsandbytes",
    "deepspeed",
}


class Import(NamedTuple):
    """One import statement's target, `deferred` if it runs only when a function is called or for type checkers."""

    module: str
    deferred: bool
    line: int


def modules() -> list[str]:
    names = []
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return names


def path_of(module: str) -> Path:
    path = ROOT / Path(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(path_of(module).read_text(encoding="utf-8"))


@cache
def imports_of(module: str) -> list[Import]:
    known = set(modules())
    found = []
    for node, deferred in _statements(tree_of(module), False):
        if isinstance(node, ast.Import):
            found += [Import(alias.name, deferred, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno} imports relatively; write the full name"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.append(Import(full if full in known else str(node.module), deferred, node.lineno))
    return found


def _statements(node: ast.AST, deferred: bool) -> Iterator[tuple[ast.AST, bool]]:
    for child in ast.iter_child_nodes(node):
        inside = deferred or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            inside = True
        yield child, inside
        yield from _statements(child, inside)


def part_of_infer(module: str) -> str | None:
    """`checkpoint` for gptoss_infer.checkpoint.reader; None for other packages and for gptoss_infer itself."""
    parts = module.split(".")
    return parts[1] if parts[0] == "gptoss_infer" and len(parts) > 1 else None


@pytest.mark.parametrize("module", modules())
def test_packages_import_only_what_the_layout_allows(module: str) -> None:
    package = module.split(".")[0]
    for target, deferred, line in imports_of(module):
        where = f"{module}:{line} imports {target}"
        top, part = target.split(".")[0], part_of_infer(target)
        if package == "gptoss_infer":
            assert top not in ("gptoss_train", "evals"), f"{where}; gptoss_infer is the base and knows nothing above it"
            is_peer = module == "gptoss_infer.transformers_engine" and top == "transformers" and deferred
            assert top not in TRAINING_ONLY or is_peer, f"{where}; inference needs no training library"
            layer = part_of_infer(module)
            if layer in LAYERS and part is not None:
                assert part in LAYERS[layer], f"{where}; {layer} may import {sorted(LAYERS[layer])}"
        elif top in PACKAGES and top != package:
            assert top == "gptoss_infer", f"{where}; training and evaluation meet at a directory on disk"
            assert part is None or part in OF_INFER[package], (
                f"{where}; {package} may import {sorted(OF_INFER[package])}"
            )


@pytest.mark.parametrize("module", modules())
def test_triton_is_imported_by_kernel_modules_alone_and_those_only_when_needed(module: str) -> None:
    is_cpu = module.startswith("gptoss_infer.kernels.cpu")  # C++, which runs where there is no Triton
    is_kernel = module.startswith("gptoss_infer.kernels.") and not is_cpu
    for target, deferred, line in imports_of(module):
        if target.split(".")[0] == "triton":
            assert is_kernel, f"{module}:{line} imports triton; that is for kernels"
        if target.startswith("gptoss_infer.kernels.cpu"):
            allowed = module.removeprefix("gptoss_infer.") in ("kernels", "compiled", "doctor", "bench_kernels")
            assert is_cpu or allowed, f"{module}:{line}: only the engine's compiled model calls the CPU's kernels"
        elif target.startswith("gptoss_infer.kernels.") and not is_kernel:
            assert deferred, f"{module}:{line} imports {target} at once, and triton with it"
            times = (module, target) == ("gptoss_infer.bench_kernels", "gptoss_infer.kernels.check")
            chooses = module == "gptoss_infer.kernels"
            assert chooses or times, f"{module}:{line}: only gptoss_infer.kernels chooses kernels"


@pytest.mark.parametrize("package", PACKAGES)
def test_command_lines_import_nothing_heavy_at_once(package: str) -> None:
    """Follows the imports that run at start from __main__ on; what is left to functions does not delay --help."""
    start = f"{package}.__main__"
    if not path_of(start).exists():
        pytest.skip(f"{package} has no command line yet")
    seen, queue = {start}, [start]
    while queue:
        module = queue.pop()
        for target, deferred, line in imports_of(module):
            top = target.split(".")[0]
            light = top in PACKAGES or top in sys.stdlib_module_names or top in ("yaml", "pydantic", "pydantic_core")
            assert deferred or light, f"{module}:{line} imports {target} before {start} has read its arguments"
            parents = {target.rpartition(".")[0], target} if top in PACKAGES and not deferred else set()
            for name in parents & set(modules()) - seen:
                seen.add(name)
                queue.append(name)


def test_no_modules_import_each_other_in_a_circle() -> None:
    edges = {
        module: {i.module for i in imports_of(module) if not i.deferred and i.module in modules()} - {module}
        for module in modules()
    }
    while edges:  # take away what imports nothing that is left
        free = {module for module, targets in edges.items() if not targets & edges.keys()}
        assert free, f"circular imports among {sorted(edges)}"
        edges = {module: targets for module, targets in edges.items() if module not in free}


SERIALIZERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
CALLS = {
    "torch.load": "it unpickles; tensors are in safetensors, the rest in JSON",
    "torch.save": "it pickles; tensors are in safetensors, the rest in JSON",
    "eval": "data is no code",
    "exec": "data is no code",
    "os.system": "it starts a shell; use subprocess with a list",
    "os.popen": "it starts a shell; use subprocess with a list",
    "yaml.unsafe_load": "it makes arbitrary objects",
    "yaml.full_load": "it makes arbitrary objects",
    "yaml.UnsafeLoader": "it makes arbitrary objects",
}
FOREIGN_LOADERS = {
    "yaml.Loader",
    "yaml.FullLoader",
    "yaml.UnsafeLoader",
    "yaml.CLoader",
    "yaml.SafeLoader",
    "yaml.CSafeLoader",
}


def complaints(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [str(node.module)]
            for name in names:
                if name.split(".")[0] in SERIALIZERS:
                    yield f"{node.lineno}: imports {name}, which runs code from data"
            if isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names):
                yield f"{node.lineno}: imports *"
        if isinstance(node, ast.Call):
            yield from _call_complaints(node)
        if isinstance(node, ast.ExceptHandler):
            broad = node.type is None or ast.unparse(node.type) in ("Exception", "BaseException")
            if broad and all(isinstance(statement, ast.Pass) for statement in node.body):
                yield f"{node.lineno}: drops every exception in silence"


def _call_complaints(node: ast.Call) -> Iterator[str]:
    name = ast.unparse(node.func)
    keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
    if name in CALLS:
        yield f"{node.lineno}: calls {name}: {CALLS[name]}"
    if name == "yaml.load":
        loader = keywords.get("Loader") or (ast.unparse(node.args[1]) if len(node.args) > 1 else "none")
        if loader in FOREIGN_LOADERS or loader == "none":
            yield f"{node.lineno}: calls yaml.load with loader {loader}, which accepts duplicate keys; use yaml_strict"
    if keywords.get("shell") not in (None, "False"):
        yield f"{node.lineno}: starts a shell; give subprocess a list"
    if keywords.get("allow_pickle") not in (None, "False"):
        yield f"{node.lineno}: unpickles with numpy"


@pytest.mark.parametrize("module", modules())
def test_no_module_runs_code_from_data_or_drops_errors(module: str) -> None:
    assert list(complaints(tree_of(module))) == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle", "from pickle import loads", "torch.load('x')", "torch.save(1, 'x')", "eval('1')", "exec('1')",
        "os.system('ls')", "from os import *", "yaml.load(f)", "yaml.load(f, Loader=yaml.FullLoader)",
        "yaml.load(f, yaml.SafeLoader)", "subprocess.run('ls', shell=True)", "numpy.load(f, allow_pickle=True)",
        "try:\n    f()\nexcept Exception:\n    pass", "try:\n    f()\nexcept:\n    pass",
    ],
)  # fmt: skip
def test_the_checks_find_what_they_look_for(code: str) -> None:
    assert list(complaints(ast.parse(code)))


def test_the_checks_leave_ordinary_code_alone() -> None:
    code = "model.eval()\nsafetensors.torch.load(b)\nyaml.load(f, Loader=StrictLoader)\nrun(['ls'], shell=False)\n"
    assert list(complaints(ast.parse(code + "try:\n    f()\nexcept KeyError:\n    pass\n"))) == []


def test_gptoss_infer_needs_torch_safetensors_and_numpy_alone() -> None:
    code = """if True:
        import sys
        class Absent:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in BLOCKED:
                    raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        BLOCKED = {"accelerate", "datasets", "wandb", "peft", "transformers", "triton", "openai_harmony",
                   "huggingface_hub", "yaml", "rich", "jinja2", "pydantic", "tokenizers"}
        sys.meta_path.insert(0, Absent())
        import gptoss_infer
        assert "torch" not in sys.modules, "importing gptoss_infer should wait with torch until it is needed"
        for name in gptoss_infer.__all__:
            getattr(gptoss_infer, name)
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
