"""Several adapters in one engine: each against the model that holds it alone, through a full forward pass."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import random_adapter, tiny_config, write_tiny

import gptoss_infer as gi
from gptoss_infer import kernels
from gptoss_infer.adapter import ATTENTION, EXPERTS, ROUTER, write_adapter
from gptoss_infer.engine import BASE, Engine, SamplingParams
from gptoss_infer.errors import UsageError
from gptoss_infer.lora import all_targets, load_adapter

PARAMS = SamplingParams(max_tokens=12, stop_token_ids=())
# Other weights, ranks and layers: what one adapter lacks, another has.
TARGETS = {
    "all": all_targets(2, (*ATTENTION, *EXPERTS, ROUTER)),
    "attention": all_targets(2, ("q_proj", "o_proj")),
    "one_layer": all_targets(2, ("v_proj", *EXPERTS), layers=[1]),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("adapters")
    config = gi.load(write_tiny(root / "base", tiny_config()), device="cpu", dtype=torch.float32).config
    for number, (name, targets) in enumerate(TARGETS.items()):
        (root / name).mkdir()
        write_adapter(root / name, random_adapter(config, targets, rank=2 + number, seed=number), config)
    return root


@pytest.fixture(params=["compiled", "plain"])
def engine(folder: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Engine:
    if request.param == "plain":
        monkeypatch.setattr(kernels, "cpu_kernels", lambda: None)
    elif kernels.cpu_kernels() is None:
        pytest.skip("no compiled kernels here")
    model = gi.load(folder / "base", device="cpu", dtype=torch.float32)
    return Engine(model, max_batch=8, page_tokens=16, cache_tokens=4096)


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 512, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def alone(folder: Path, name: str, tokens: list[int], num: int) -> list[int]:
    """The likeliest tokens by full forward passes of a model that holds this adapter, or none, and nothing else."""
    model = gi.load(folder / "base", device="cpu", dtype=torch.float32)
    if name != BASE:
        load_adapter(model, folder / name)
    known = list(tokens)
    with torch.no_grad():
        for _ in range(num):
            known.append(int(model(torch.tensor([known]))[0, -1].argmax()))
    return known[len(tokens) :]


def test_each_request_of_a_batch_is_answered_by_its_adapter(folder: Path, engine: Engine) -> None:
    names = [*TARGETS, BASE]
    for name in TARGETS:
        engine.load_adapter(name, folder / name)
    prompts = [prompt(40)] * len(names) + [prompt(23, 1)] * len(names)
    params = [replace(PARAMS, adapter=name) for name in names * 2]
    found = [one.token_ids for one in engine.generate(prompts, params)]
    expected = [alone(folder, one.adapter or BASE, text, 12) for text, one in zip(prompts, params, strict=True)]
    assert found == expected
    assert len({tuple(tokens) for tokens in expected[:4]}) == 4, "the adapters do something"


def test_pages_are_shared_within_an_adapter_and_not_between_two(folder: Path, engine: Engine) -> None:
    for name in ("all", "attention"):
        engine.load_adapter(name, folder / name)
    text = prompt(40)
    for name, reused in (("all", 0), ("attention", 0), (BASE, 0), ("all", 32), ("attention", 64), (BASE, 96)):
        list(engine.generate([text], replace(PARAMS, adapter=name)))
        assert engine.scheduler.num_reused == reused, name


def test_an_adapter_that_comes_or_goes_changes_nothing_for_what_runs(folder: Path, engine: Engine) -> None:
    engine.load_adapter("attention", folder / "attention")
    engine.load_adapter("one_layer", folder / "one_layer")
    running = engine.add([prompt(30)], replace(PARAMS, adapter="attention"))
    for _ in range(4):
        engine.step()
    engine.unload_adapter("one_layer")
    engine.load_adapter("all", folder / "all")
    late = engine.add([prompt(30)], replace(PARAMS, adapter="all"))
    while running[0].finish_reason is None or late[0].finish_reason is None:
        engine.step()
    assert running[0].token_ids == alone(folder, "attention", prompt(30), 12)
    assert late[0].token_ids == alone(folder, "all", prompt(30), 12)


def test_a_name_that_is_given_again_stands_for_the_new_adapter_alone(folder: Path, engine: Engine) -> None:
    for name in ("all", "one_layer"):
        engine.load_adapter("mine", folder / name)
        (found,) = engine.generate([prompt(40)], replace(PARAMS, adapter="mine"))
        assert found.token_ids == alone(folder, name, prompt(40), 12), "nothing of the old one is left, pages neither"
        engine.unload_adapter("mine")
    (found,) = engine.generate([prompt(40)], PARAMS)
    assert found.token_ids == alone(folder, BASE, prompt(40), 12)


def test_requests_that_name_none_get_what_the_engine_came_with(folder: Path) -> None:
    engine = Engine.from_checkpoint(
        str(folder / "base"), adapter=str(folder / "one_layer"), device="cpu", dtype=torch.float32
    )
    for params, name in ((PARAMS, "one_layer"), (replace(PARAMS, adapter=BASE), BASE)):
        (found,) = engine.generate([prompt(20)], params)
        assert found.token_ids == alone(folder, name, prompt(20), 12)


def test_names_that_are_taken_unknown_or_in_use_are_refused(folder: Path, engine: Engine) -> None:
    engine.load_adapter("all", folder / "all")
    for name in ("all", BASE):
        with pytest.raises(UsageError, match=f"there is an adapter '{name}' already"):
            engine.load_adapter(name, folder / "all")
    with pytest.raises(UsageError, match="prompt 1 asks for adapter 'other'; known are base, all"):
        engine.add([prompt(5)] * 2, [PARAMS, replace(PARAMS, adapter="other")])
    samples = engine.add([prompt(5)], replace(PARAMS, adapter="all"))
    with pytest.raises(UsageError, match="1 samples are being generated with adapter 'all'"):
        engine.unload_adapter("all")
    engine.cancel(samples)
    engine.unload_adapter("all")
    with pytest.raises(UsageError, match="there is no adapter 'all'; loaded are none"):
        engine.unload_adapter("all")


def test_engines_over_one_model_have_their_own_adapters(folder: Path, engine: Engine) -> None:
    engine.load_adapter("mine", folder / "all")
    older = Engine(engine.model, max_batch=2, page_tokens=16, cache_tokens=1024)
    (found,) = engine.generate([prompt(40)], replace(PARAMS, adapter="mine"))
    newer = Engine(engine.model, max_batch=2, page_tokens=16, cache_tokens=1024)
    newer.load_adapter("mine", folder / "one_layer")
    assert found.token_ids == alone(folder, "all", prompt(40), 12)
    for other, params, name in (
        (older, PARAMS, BASE), (newer, replace(PARAMS, adapter="mine"), "one_layer"), (newer, PARAMS, BASE),
        (engine, replace(PARAMS, adapter="mine"), "all"), (older, PARAMS, BASE),
    ):  # fmt: skip
        (found,) = other.generate([prompt(40)], params)
        assert found.token_ids == alone(folder, name, prompt(40), 12), name


def test_an_unloaded_adapter_leaves_no_tensor_and_no_trace_at_its_address(folder: Path, engine: Engine) -> None:
    expected = {name: alone(folder, name, prompt(20), 6) for name in TARGETS}
    for number in range(6):
        name = list(TARGETS)[number % 3]
        engine.load_adapter("mine", folder / name)
        (found,) = engine.generate([prompt(20)], replace(PARAMS, adapter="mine", max_tokens=6))
        assert found.token_ids == expected[name]
        engine.scheduler.forget_prefixes()
        held = [weakref.ref(p) for key, p in engine.model.named_parameters() if ".lora_" in key and p.numel() > 64]
        engine.unload_adapter("mine")
        gc.collect()
        assert held
        assert [ref for ref in held if ref() is not None and ref().numel() > 128] == [], name


def test_an_adapter_whose_table_could_not_be_made_is_not_taken_for_the_base(
    folder: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    if engine.compiled is None:
        pytest.skip("tables are of the compiled model")
    engine.load_adapter("all", folder / "all")
    with monkeypatch.context() as patch:
        patch.setattr("gptoss_infer.compiled._layer", lambda *_: (_ for _ in ()).throw(MemoryError))
        with pytest.raises(MemoryError):
            list(engine.generate([prompt(20)], replace(PARAMS, adapter="all")))
    (found,) = engine.generate([prompt(20)], replace(PARAMS, adapter="all"))
    assert found.token_ids == alone(folder, "all", prompt(20), 12)
