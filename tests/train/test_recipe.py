"""Recipes: what a file means, what overrides change, and what a user reads when something is wrong."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from gptoss_infer.errors import UsageError
from gptoss_train import recipe as recipe_module
from gptoss_train.recipe import Recipe, load_recipe, shipped_recipes
from gptoss_train.yaml_strict import dump

ROOT = Path(__file__).resolve().parents[2]
SMALLEST = """\
version: 1
model:
  checkpoint: some/dir
data:
  train: train.jsonl
train:
  epochs: 1
"""


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write(text: str) -> str:
        path = tmp_path / "r.yaml"
        path.write_text(text)
        return str(path)

    return write


def complaint(path: str, *overrides: str) -> str:
    with pytest.raises(UsageError) as caught:
        load_recipe(path, overrides)
    return str(caught.value).replace(path, "r.yaml") if Path(path).is_file() else str(caught.value)


def test_the_smallest_recipe_gets_every_default(write: Any) -> None:
    recipe = load_recipe(write(SMALLEST))
    assert recipe.model.experts == "mxfp4"
    assert recipe.lora.rank == 8
    assert recipe.lora.attention == ("q_proj", "k_proj", "v_proj", "o_proj")
    assert recipe.lora.layers == "all"
    assert recipe.data.on_bad_line == "error"
    assert recipe.optim.lr == 1e-4
    assert recipe.train.max_steps is None
    assert recipe.log.wandb_mode == "offline"
    assert recipe.export.formats == ("mxfp4",)
    assert recipe.eval.variants == ("base", "adapter", "model")
    assert recipe.run.resume == "auto"


def test_a_file_says_what_it_says(write: Any) -> None:
    text = (
        SMALLEST + "lora: {layers: [0, 3], experts: []}\noptim:\n  lr: 1e-3\n  betas: [0.8, 0.9]\nlog: {project: no}\n"
    )
    recipe = load_recipe(write(text))
    assert recipe.lora.layers == (0, 3)
    assert recipe.lora.experts == ()
    assert recipe.optim.lr == 1e-3
    assert recipe.optim.betas == (0.8, 0.9)
    assert recipe.log.project == "no"


def test_overrides_apply_in_order_after_the_file_with_the_same_scalar_rules(write: Any) -> None:
    recipe = load_recipe(
        write(SMALLEST),
        [
            "train.epochs=null",
            "train.max_steps=7",
            "optim.lr=3e-4",
            "optim.lr=2e-4",
            "log.trackers=[wandb, trackio]",
            "eval.data.gsm8k=a=b.jsonl",
            "log.name=off",
            "run.overwrite=true",
        ],
    )
    assert (recipe.train.epochs, recipe.train.max_steps, recipe.optim.lr) == (None, 7, 2e-4)
    assert recipe.log.trackers == ("wandb", "trackio")
    assert recipe.eval.data == {"gsm8k": "a=b.jsonl"}
    assert recipe.log.name == "off"
    assert recipe.run.overwrite is True


def test_the_resolved_recipe_has_every_key_and_loads_back_equal(write: Any, tmp_path: Path) -> None:
    recipe = load_recipe(
        write(SMALLEST), ["log.name=1e-4x", "eval.header=no", "data.date=2025-06-28", "model.device=cpu"]
    )
    again = tmp_path / "again.yaml"
    again.write_text(recipe.to_yaml())
    assert load_recipe(str(again)) == recipe
    for line in Recipe.describe().splitlines():
        assert f"{line.split()[0].rpartition('.')[2]}:" in recipe.to_yaml()


@given(
    name=st.text(st.characters(codec="utf-8"), min_size=1),
    lr=st.floats(min_value=0, exclude_min=True, allow_infinity=False),
    layers=st.just("all") | st.lists(st.integers(0, 10**6), min_size=1, unique=True).map(tuple),
    data=st.dictionaries(st.text(st.characters(codec="utf-8")), st.sampled_from(["no", "1e-4", "~", "012", "a: b"])),
)
def test_any_valid_recipe_survives_the_round_trip(
    tmp_path_factory: pytest.TempPathFactory, name: str, lr: float, layers: Any, data: dict[str, str]
) -> None:
    recipe = Recipe.model_validate(
        {
            "version": 1,
            "model": {"checkpoint": name},
            "data": {"train": name},
            "train": {"max_steps": 1},
            "optim": {"lr": lr},
            "lora": {"layers": layers},
            "eval": {"data": data},
        }
    )
    path = tmp_path_factory.mktemp("round") / "r.yaml"
    path.write_bytes(recipe.to_yaml().encode())
    assert load_recipe(str(path)) == recipe


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["", "all", "no", "q_proj", "x"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["lr", "epochs", "x"]), inner),
    max_leaves=4,
)
KEYS = [line.split()[0] for line in Recipe.describe().splitlines()]


@given(
    changes=st.dictionaries(st.sampled_from([*KEYS, "lora", "optim", "x", "train.x.y"]), ANYTHING, max_size=5),
    overrides=st.lists(st.tuples(st.sampled_from([*KEYS, "", "x", "a.b.c"]), st.text(max_size=6)), max_size=3),
)
def test_no_recipe_however_wrong_is_more_than_a_usage_error(
    tmp_path_factory: pytest.TempPathFactory, changes: dict[str, Any], overrides: list[tuple[str, str]]
) -> None:
    data: dict[str, Any] = {"version": 1, "model": {"checkpoint": "c"}, "data": {"train": "t"}, "train": {"epochs": 1}}
    for key, value in changes.items():
        *parents, last = key.split(".")
        section = data
        for parent in parents:
            if not isinstance(section.get(parent), dict):
                section[parent] = {}
            section = section[parent]
        section[last] = value
    path = tmp_path_factory.mktemp("wrong") / "r.yaml"
    path.write_bytes(dump(data).encode())
    with contextlib.suppress(UsageError):
        load_recipe(str(path), ["=".join(override) for override in overrides])


def test_a_recipe_cannot_be_changed_after_loading(write: Any) -> None:
    recipe = load_recipe(write(SMALLEST))
    with pytest.raises(ValidationError, match="frozen"):
        recipe.optim.lr = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("line", "want"),
    [
        ("optim: {lrr: 1}", "r.yaml:8: optim.lrr: unknown key (value 1). Did you mean optim.lr?"),
        ("optm: {lr: 1}", 'r.yaml:8: optm: unknown key (value {"lr": 1}). Did you mean optim?'),
        ("rank: 4", "r.yaml:8: rank: unknown key (value 4). Did you mean lora.rank?"),
        ("loss: {zzz: 4}", "r.yaml:8: loss.zzz: unknown key (value 4). Known here: objective"),
        ("optim: {lr: fast}", 'r.yaml:8: optim.lr: got "fast"; expected a number > 0 (peak learning rate)'),
        ("optim: {lr: 0}", "r.yaml:8: optim.lr: got 0; expected a number > 0"),
        ("optim: {lr: .inf}", "r.yaml:8: optim.lr: got Infinity; expected a number > 0"),
        ("optim: {lr: true}", "r.yaml:8: optim.lr: got true; expected a number > 0"),
        ("lora: {rank: 8.0}", "r.yaml:8: lora.rank: got 8.0; expected an integer >= 1"),
        ("lora: {rslora: yes}", 'r.yaml:8: lora.rslora: got "yes"; expected true | false'),
        ("lora: {layers: every}", 'r.yaml:8: lora.layers: got "every"; expected all or a list, each an integer >= 0'),
        ("lora:\n  layers:\n  - 0\n  - x", 'r.yaml:11: lora.layers.1: got "x"; expected an integer >= 0'),
        ("lora: {layers: [1, 1]}", "r.yaml:8: lora.layers: got [1, 1]: 1 is given twice"),
        ("lora: {attention: [q]}", 'r.yaml:8: lora.attention.0: got "q"; expected q_proj | k_proj | v_proj | o_proj'),
        ("lora: {attention: q_proj}", 'r.yaml:8: lora.attention: got "q_proj"; expected a list, each q_proj | '),
        ("lora: {attention: [], experts: []}", "r.yaml:8: lora.experts: got []: attention and experts are both empty"),
        ("optim: {betas: [0.9]}", "r.yaml:8: optim.betas: got [0.9]; expected a list of 2, each a number >= 0 and < 1"),
        ("log: {project: 12}", "r.yaml:8: log.project: got 12; expected text"),
        ('log: {project: ""}', 'r.yaml:8: log.project: got ""; expected text'),
        ("log:", "r.yaml:8: log: got null; expected a section with the keys trackers, project, name, wandb_mode"),
        ("eval: {data: {gsm8k: 1}}", "r.yaml:8: eval.data.gsm8k: got 1; expected text"),
        ("parallel: {threads: 1}\nparallel: {}", "r.yaml:9: parallel: duplicate key; first given at r.yaml:8"),
    ],
)
def test_a_wrong_value_is_named_with_line_key_value_and_what_was_expected(write: Any, line: str, want: str) -> None:
    assert complaint(write(SMALLEST + line + "\n")).startswith(want)


@pytest.mark.parametrize(
    ("override", "want"),
    [
        (
            "train.max_steps=5",
            "override 1 (train.max_steps=5): train.max_steps: got 5: exactly one of train.epochs and",
        ),
        ("train.epochs=null", "r.yaml:6: train: exactly one of train.epochs and train.max_steps must be set"),
        ("data.date=2025-02-30", 'override 1 (data.date=2025-02-30): data.date: got "2025-02-30": day is out of range'),
        ("data.date=20250228", "override 1 (data.date=20250228): data.date: got 20250228; expected text or null"),
        ("model.checkpoint=builtin:sum", "override 1 (model.checkpoint=builtin:sum): model.checkpoint: got"),
        ("optim.lr", "override 1 (optim.lr): expected section.key=value"),
        (".lr=3", "override 1 (.lr=3): expected section.key=value"),
        ("version.x=3", "override 1 (version.x=3): version holds a value, no keys of its own"),
        ("lora.layers=[1", "override 1 (lora.layers=[1): "),
    ],
)
def test_a_wrong_override_is_named_by_its_number(write: Any, override: str, want: str) -> None:
    assert complaint(write(SMALLEST), override).startswith(want)


def test_all_problems_of_the_file_and_the_overrides_are_reported_at_once_in_order(write: Any) -> None:
    text = "version: 2\nmodel: {checkpoint: *a, dtype: half}\ntrain: {epochs: 1, epochs: 2, max_steps: 3}\n"
    lines = complaint(write(text), "lora.rank=0", "nonsense").splitlines()
    assert lines[0] == "r.yaml: 8 problems"
    assert [line.split(": ")[0].strip() for line in lines[1:]] == [
        "r.yaml",
        "r.yaml:1",
        "r.yaml:2",
        "r.yaml:2",
        "r.yaml:3",
        "r.yaml:3",
        "override 1 (lora.rank=0)",
        "override 2 (nonsense)",
    ]
    assert "data: missing" in lines[1]


def test_a_missing_key_says_where_it_belongs_and_what_it_is(write: Any) -> None:
    text = SMALLEST.replace("  checkpoint: some/dir\n", "  dtype: float32\n")
    assert complaint(write(text)) == (
        "r.yaml:2: model.checkpoint: missing; expected text (directory, hub id[@revision] or builtin:addition)"
    )


@pytest.mark.parametrize("text", ["- 1\n", "just text\n", "3\n"])
def test_a_file_that_is_no_mapping_is_refused(write: Any, text: str) -> None:
    assert "expected `version: 1` and the sections of a recipe" in complaint(write(text))


def test_a_path_is_relative_to_the_working_directory_not_to_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "r.yaml").write_text(SMALLEST)
    monkeypatch.chdir(tmp_path)
    assert load_recipe("deep/r.yaml").data.train == "train.jsonl"


def test_a_shipped_recipe_is_found_by_name_and_a_wrong_name_lists_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "share" / "gptoss" / "recipes"
    data.mkdir(parents=True)
    for name in ("quickstart", "20b-lora"):
        (data / f"{name}.yaml").write_text(SMALLEST)
    monkeypatch.setattr(recipe_module, "__file__", str(tmp_path / "site-packages" / "gptoss_train" / "recipe.py"))
    monkeypatch.setattr("sysconfig.get_path", lambda name, scheme: str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert shipped_recipes() == {"20b-lora": data / "20b-lora.yaml", "quickstart": data / "quickstart.yaml"}
    assert load_recipe("quickstart").model.checkpoint == "some/dir"
    assert complaint("quikstart") == (
        "quikstart: is neither a file nor a shipped recipe. Did you mean quickstart? "
        "Shipped recipes: 20b-lora, quickstart"
    )
    (tmp_path / "quickstart").mkdir()
    assert load_recipe("quickstart").model.checkpoint == "some/dir"
    assert "is a directory, expected a YAML file" in complaint("share")


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_of_the_checkout_loads_by_name(path: Path) -> None:
    assert load_recipe(path.stem) == load_recipe(str(path))


def test_every_key_has_a_meaning_and_the_table_names_all_of_them() -> None:
    def keys(section: type[BaseModel], prefix: str = "") -> list[str]:
        found = []
        for name, field in section.model_fields.items():
            inner = field.annotation
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                found += keys(inner, f"{prefix}{name}.")
            else:
                assert field.description, f"{prefix}{name}"
                found.append(f"{prefix}{name}")
        return found

    assert [line.split()[0] for line in Recipe.describe().splitlines()] == keys(Recipe)


def test_loading_a_recipe_imports_no_torch() -> None:
    script = "import sys, gptoss_train.recipe; assert 'torch' not in sys.modules and 'wandb' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)
