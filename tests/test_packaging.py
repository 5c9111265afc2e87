"""What `pip install .` puts on a machine: the three packages and the recipes, and nothing of the tests.

A wheel is built from a copy of the sources and installed into a new virtual environment that borrows this one's
dependencies, so nothing is fetched.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("gptoss_infer", "gptoss_train", "evals")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of this checkout; built beside it, because setuptools leaves its work in the source directory."""
    pytest.importorskip("setuptools", minversion="77", reason="building needs setuptools >= 77; pip install setuptools")
    source = tmp_path_factory.mktemp("source")
    for folder in (*PACKAGES, "recipes", "tests"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    out = tmp_path_factory.mktemp("wheel")
    pip(["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out), str(source)])
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of a virtual environment with the wheel in it, and this environment's packages behind it."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=False, symlinks=True)
    own = folder / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
    (own / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip(["--python", str(folder / "bin" / "python"), "install", "--no-deps", "--ignore-installed", str(wheel)])
    return folder / "bin"


def pip(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_a_wheel_holds_every_module_the_template_the_kernels_and_the_recipes_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    data = f"{wheel.name.rsplit('-py3', 1)[0]}.data/data/share/gptoss/recipes"
    expected = {str(path.relative_to(ROOT)) for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    expected |= {
        str(path.relative_to(ROOT)) for kind in ("cpp", "h") for path in ROOT.glob(f"gptoss_infer/**/*.{kind}")
    }
    expected |= {"evals/report.html.j2"} | {f"{data}/{path.name}" for path in (ROOT / "recipes").glob("*.yaml")}
    assert names == expected


def test_an_installation_lists_the_shipped_recipes_and_its_commands_work(installed: Path, tmp_path: Path) -> None:
    listed = run([str(installed / "gptoss-train"), "recipes"], tmp_path)
    assert listed.returncode == 0, listed.stderr
    names = [line.split()[0] for line in listed.stdout.splitlines()]
    assert names == sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))
    for command in ("gptoss-train", "gptoss-infer", "gptoss-eval"):
        done = run([str(installed / command), "--help"], tmp_path)
        assert (done.returncode, done.stdout.split()[:2]) == (0, ["usage:", command]), done.stderr


def test_an_installation_imports_its_own_modules_and_neither_tests_nor_recipes(installed: Path, tmp_path: Path) -> None:
    code = (
        "import evals, gptoss_infer, gptoss_train, importlib.resources as r, importlib.util as u, sys;"
        "assert all(m.__file__.startswith(sys.prefix) for m in (evals, gptoss_infer, gptoss_train));"
        "assert u.find_spec('tests') is None and u.find_spec('recipes') is None;"
        "assert r.files('evals').joinpath('report.html.j2').is_file()"
    )
    done = run([str(installed / "python"), "-c", code], tmp_path)
    assert done.returncode == 0, done.stderr


def test_every_folder_with_modules_is_named_as_a_package() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {path.parent for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    assert set(listed) == {".".join(folder.relative_to(ROOT).parts) for folder in folders}


def test_the_constraints_pin_exact_versions_without_local_tags() -> None:
    lines = (ROOT / ".ci" / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert all(version and "+" not in version for version in pins.values())
    assert {"torch", "triton", "transformers", "peft", "accelerate", "openai-harmony", "pytest", "ruff"} <= pins.keys()


def test_the_workflow_runs_the_same_script_as_everyone_else() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    assert [step["run"] for step in workflow["jobs"]["all"]["steps"] if "run" in step] == [".ci/run"]
    assert os.access(ROOT / ".ci" / "run", os.X_OK), ".ci/run must be executable"
