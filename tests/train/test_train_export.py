"""Export: what is merged equals dense arithmetic, what is not adapted keeps its bytes, and nothing is half-written."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from conftest import random_adapter as adapter_over
from conftest import random_tensors, tiny_config, write_tiny
from oracles import slow_decode
from safetensors.torch import load_file, save_file

import gptoss_infer as gi
from gptoss_infer import mxfp4
from gptoss_infer.adapter import ATTENTION, EXPERTS, Adapter, Factors, Target, write_adapter, zero_like
from gptoss_infer.checkpoint import Checkpoint
from gptoss_infer.checkpoint.convert import convert
from gptoss_infer.errors import DataError, UsageError
from gptoss_infer.lora import load_adapter
from gptoss_train.export import Rule, export, summary

CONFIG = tiny_config(num_hidden_layers=2, vocab_size=96)
ALL = [Target(layer, weight) for layer in range(2) for weight in (*ATTENTION, *EXPERTS)]
FORMS = ("hf", "sharded", "original")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "base", CONFIG)


def in_form(base: Path, form: str) -> Path:
    """The base in one of the MXFP4 forms that people have."""
    if form == "hf":
        return base
    target = base.with_name(form)
    convert(
        base, target, "original" if form == "original" else "hf", max_shard_bytes=10**9 if form != "sharded" else 20_000
    )
    assert form != "sharded" or len(list(target.glob("*.safetensors"))) > 3
    return target


def random_adapter(targets: Sequence[Target] = ALL, size: float = 0.2, rslora: bool = False) -> Adapter:
    return adapter_over(CONFIG, targets, size, rslora=rslora)


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != "MANIFEST.json"}


def dense(directory: Path, target: Target) -> torch.Tensor:
    """A weight of a checkpoint, (out, in) or (E, out, in), decoded by the specification's rules."""
    checkpoint = Checkpoint.open(directory)
    name = f"model.layers.{target.layer}.{'mlp.experts' if target.is_expert else 'self_attn'}.{target.weight}"
    if not target.is_expert:
        return checkpoint.tensor(f"{name}.weight").float()
    if checkpoint.experts == "bf16":
        return checkpoint.tensor(name).float().transpose(1, 2)
    return slow_decode(checkpoint.tensor(f"{name}_blocks"), checkpoint.tensor(f"{name}_scales"))


def delta(adapter: Adapter, target: Target) -> torch.Tensor:
    """Alpha / rank times B A, of all experts at once."""
    a, b = adapter.factors[target]
    return adapter.alpha / adapter.rank * torch.einsum("...or,...ri->...oi", b.double(), a.double()).float()


@pytest.mark.parametrize("form", FORMS)
def test_an_untrained_adapter_exported_with_allow_unchanged_is_its_base_byte_for_byte(
    tmp_path: Path, base: Path, form: str
) -> None:
    (base / "chat_template.jinja").write_text("{{ messages }}")
    source = in_form(base, form)
    survival = export(zero_like(CONFIG, ALL, 4, 8.0), source, tmp_path / "out", allow_unchanged=True).survival
    assert files_of(tmp_path / "out") == files_of(source)
    assert len(survival) == len(ALL)
    assert not any(item.changed for item in survival)


@pytest.mark.parametrize("format", ["mxfp4", "bf16"])
def test_an_untrained_adapter_is_refused_and_nothing_is_written(
    tmp_path: Path, base: Path, format: Literal["mxfp4", "bf16"]
) -> None:
    with pytest.raises(DataError, match=r"all zeros: it was not trained; --allow-unchanged writes it all the same"):
        export(zero_like(CONFIG, ALL, 4, 8.0), base, tmp_path / "out", format=format)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_rounding_that_loses_everything_is_refused_with_its_cause(tmp_path: Path, base: Path) -> None:
    experts = [Target(0, "gate_up_proj"), Target(1, "down_proj")]
    with pytest.raises(DataError, match=r"rounding to nearest lost every delta.*--rounding systematic"):
        export(random_adapter(experts, size=1e-4), base, tmp_path / "out", rule=Rule("nearest"))
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rslora", [False, True])
def test_an_export_to_nearest_is_the_nearest_element_on_the_bases_scales(
    tmp_path: Path, base: Path, form: str, rslora: bool
) -> None:
    adapter = random_adapter(rslora=rslora)
    factor = adapter.rank**0.5 if rslora else 1.0  # alpha / sqrt(r) instead of alpha / r
    export(adapter, in_form(base, form), tmp_path / "out", rule=Rule("nearest"))
    written, before = Checkpoint.open(tmp_path / "out"), Checkpoint.open(base)
    for target in ALL:
        merged = dense(base, target) + factor * delta(adapter, target)
        if not target.is_expert:
            # The sum in fp32 may round to the other neighbour where delta's own rounding differs from the engine's.
            torch.testing.assert_close(dense(tmp_path / "out", target), merged.bfloat16().float(), rtol=2**-7, atol=0)
            continue
        names = [f"model.layers.{target.layer}.mlp.experts.{target.weight}_{part}" for part in ("blocks", "scales")]
        assert torch.equal(written.tensor(names[1]), before.tensor(names[1]))
        step = torch.exp2(before.tensor(names[1]).double() - 127).repeat_interleave(32, -1)  # (E, out, in)
        errors = (merged.double() / step).unsqueeze(-1) - torch.tensor(mxfp4.E2M1_VALUES, dtype=torch.float64)
        off = (dense(tmp_path / "out", target).double() / step - merged.double() / step).abs()
        assert (off - errors.abs().amin(-1)).max() < 1e-4, "no element of the grid is nearer"


def test_what_only_one_expert_of_one_layer_changed_leaves_every_other_byte_alone(tmp_path: Path, base: Path) -> None:
    target, expert, row = Target(1, "gate_up_proj"), 2, 5
    adapter = zero_like(CONFIG, [target], 4, 8.0)
    adapter.factors[target].a[expert].normal_(generator=torch.Generator().manual_seed(0))
    adapter.factors[target].b[expert, row] = 1.0
    export(adapter, base, tmp_path / "out")
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    prefix = "model.layers.1.mlp.experts.gate_up_proj"
    assert changed == {f"{prefix}_blocks"}
    rows = (before[f"{prefix}_blocks"] != after[f"{prefix}_blocks"]).flatten(2).any(-1).nonzero().tolist()
    assert rows == [[expert, row]]
    assert before.keys() == after.keys()


def test_an_adapter_of_attention_alone_keeps_all_experts_bytes_in_the_fused_layout(tmp_path: Path, base: Path) -> None:
    source = in_form(base, "original")
    export(random_adapter([Target(0, "k_proj")]), source, tmp_path / "out")
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert [name for name in before if not torch.equal(before[name], after[name])] == ["block.0.attn.qkv.weight"]
    rows = (before["block.0.attn.qkv.weight"] != after["block.0.attn.qkv.weight"]).any(-1).nonzero().flatten()
    assert rows.tolist() == list(range(128, 160)), "8 query heads of 16 rows stand before 2 key heads"


@pytest.mark.parametrize("format", ["mxfp4", "bf16"])
def test_survival_equals_a_direct_computation_on_dense_weights(
    tmp_path: Path, base: Path, format: Literal["mxfp4", "bf16"]
) -> None:
    adapter = random_adapter(size=0.1)
    survival = {item.name: item for item in export(adapter, base, tmp_path / "out", format=format).survival}
    assert len(survival) == len(ALL)
    totals = {"attention": 0, "experts.gate_up_proj": 0, "experts.down_proj": 0}
    for target in ALL:
        item = survival[target.module]
        w, q = dense(base, target).double(), dense(tmp_path / "out", target).double()
        d = delta(adapter, target).double()
        assert (item.values, item.changed) == (w.numel(), int((q != w).sum()))
        totals[f"experts.{target.weight}" if target.is_expert else "attention"] += item.changed
        assert item.kept == pytest.approx(float(((q - w) * d).sum() / (d * d).sum()), rel=1e-4)
        assert item.residual == pytest.approx(float((q - w - d).norm() / d.norm()), rel=1e-4)
        assert item.to_json()["delta_to_base"] == pytest.approx(float(d.norm() / w.norm()), rel=1e-4)
    report = json.loads((tmp_path / "out/export.json").read_text())
    assert report["weights"] == [item.to_json() for item in survival.values()]
    assert {str(row["name"]): row["changed"] for row in summary(list(survival.values()))} == totals


def representable(tmp_path: Path) -> tuple[Path, Adapter]:
    """A base and an adapter whose sums bf16 holds exactly: multiples of 2^-8 below 1, so 8 bits.

    Experts are E2M1 values at scales 2^-7..2^-3, at most 0.75; attention is rounded to such multiples; deltas are ±1/8
    or 0.
    """
    tensors = random_tensors(CONFIG, "mxfp4")
    for name, tensor in tensors.items():
        if "self_attn" in name and name.endswith("proj.weight"):
            tensors[name] = ((tensor.float() * 256).round() / 256).clamp(-0.75, 0.75).bfloat16()
    base = write_tiny(tmp_path / "exact", CONFIG)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    generator = torch.Generator().manual_seed(1)
    factors = {}
    for target, (a, b) in zero_like(CONFIG, ALL, 1, 1.0).factors.items():
        signs = torch.randint(-1, 2, a.shape, generator=generator).float()
        factors[target] = Factors(signs, torch.randint(-1, 2, b.shape, generator=generator) / 8)
    return base, Adapter(1, 1.0, False, 0.0, factors)


def test_a_bf16_merge_of_representable_values_is_exact_and_gives_the_adapters_logits(tmp_path: Path) -> None:
    base, adapter = representable(tmp_path)
    export(adapter, base, tmp_path / "out", format="bf16")
    for target in ALL:
        assert torch.equal(dense(tmp_path / "out", target), dense(base, target) + delta(adapter, target)), target
    ids = torch.randint(0, 96, (2, 150), generator=torch.Generator().manual_seed(3))
    adapted = gi.load(base, device="cpu", dtype=torch.float32)
    plain = adapted(ids)
    load_adapter(adapted, adapter)
    merged = gi.load(tmp_path / "out", device="cpu", dtype=torch.float32, experts="bf16")
    scale = plain.abs().max()
    assert (merged(ids) - adapted(ids)).abs().max() <= 1e-5 * scale  # the order of fp32 sums
    assert (merged(ids) - plain).abs().max() > 0.01 * scale


@pytest.mark.parametrize("experts", ["mxfp4", "bf16"])
def test_a_bf16_merge_is_the_nearest_bf16_of_base_plus_delta(tmp_path: Path, experts: str) -> None:
    base = write_tiny(tmp_path / "base", CONFIG, experts)
    adapter = random_adapter()
    export(adapter, base, tmp_path / "out", format="bf16", max_shard_bytes=30_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    for target in ALL:
        merged = dense(base, target).double() + delta(adapter, target).double()
        error = (dense(tmp_path / "out", target).double() - merged).abs()
        # Half a step of bf16, which has 8 bits, plus the fp32 rounding of the delta.
        assert (error <= merged.abs() * 2**-8 + 1e-6).all(), target


def test_exporting_the_adapter_writes_one_that_reads_back_equal(tmp_path: Path, base: Path) -> None:
    adapter = random_adapter()
    assert export(adapter, base, tmp_path / "out", format="adapter").survival == []
    (tmp_path / "plain").mkdir()
    write_adapter(tmp_path / "plain", adapter, CONFIG)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "plain")


def test_an_adapter_of_another_model_is_refused(tmp_path: Path, base: Path) -> None:
    other = write_tiny(tmp_path / "other", tiny_config(num_hidden_layers=2, vocab_size=96, intermediate_size=64))
    (tmp_path / "adapter").mkdir()
    write_adapter(tmp_path / "adapter", random_adapter(), CONFIG)
    with pytest.raises(DataError, match=r"_proj has A .* expected .*trained over another model"):
        export(tmp_path / "adapter", other, tmp_path / "out")
    shallow = write_tiny(tmp_path / "shallow", tiny_config(num_hidden_layers=1, vocab_size=96))
    with pytest.raises(DataError, match=r"have no place in a 1-layer gpt-oss model, such as .*layers\.1\."):
        export(tmp_path / "adapter", shallow, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_a_layer_that_the_base_lacks_would_be_dropped_and_is_refused(tmp_path: Path) -> None:
    shallow = write_tiny(tmp_path / "shallow", tiny_config(num_hidden_layers=1, vocab_size=96))
    with pytest.raises(DataError, match=r"would drop the adapters of 6 weights, such as model\.layers\.1\."):
        export(random_adapter(), shallow, tmp_path / "out", allow_unchanged=True)
    assert [path.name for path in tmp_path.iterdir()] == ["shallow"]


def test_mxfp4_is_not_written_over_a_bf16_base(tmp_path: Path) -> None:
    base = write_tiny(tmp_path / "base", CONFIG, "bf16")
    with pytest.raises(UsageError, match=r"has bf16 experts: export it with --format bf16"):
        export(random_adapter(), base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_existing_output_is_replaced_only_when_asked_to(tmp_path: Path, base: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    with pytest.raises(UsageError, match="exists; choose another output or pass --overwrite"):
        export(random_adapter(), base, tmp_path / "out")
    assert (tmp_path / "out" / "mine").read_text() == "precious"
    export(random_adapter(), base, tmp_path / "out", overwrite=True)
    assert sorted(files_of(tmp_path / "out")) == ["config.json", "export.json", "model.safetensors"]


def saved_adapter(tmp_path: Path, base: Path) -> Path:
    (tmp_path / "adapter").mkdir()
    write_adapter(tmp_path / "adapter", random_adapter(), Checkpoint.open(base).config)
    return tmp_path / "adapter"


@pytest.mark.parametrize("format", ["mxfp4", "bf16", "adapter"])
def test_a_full_disk_exits_3_and_leaves_nothing_half_written(
    tmp_path: Path, base: Path, finish: Callable[..., str], format: str
) -> None:
    command = ["export", saved_adapter(tmp_path, base), tmp_path / "out", "--base", base, "--format", format]
    output = finish(*command, code=3, max_file_bytes=50_000)  # less than any of the files of weights
    assert "no space left" in output
    assert "Traceback" not in output
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def test_kill_9_in_the_middle_leaves_no_output_and_the_next_export_is_whole(
    tmp_path: Path, start: Any, finish: Callable[..., str]
) -> None:
    base = write_tiny(tmp_path / "base", tiny_config(num_hidden_layers=24, vocab_size=96))  # large enough to be caught
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    write_adapter(adapter, random_adapter(), Checkpoint.open(base).config)
    command = ["export", adapter, tmp_path / "out", "--base", base]
    job = start(*command)
    partial = tmp_path / f".out.tmp-{job.pid}" / "model.safetensors"
    deadline = time.monotonic() + 30
    while not (partial.exists() and partial.stat().st_size > 0) and time.monotonic() < deadline:
        time.sleep(0.0005)
    os.kill(job.pid, signal.SIGKILL)
    assert job.wait() == -signal.SIGKILL, job.output
    assert partial.exists()
    assert partial.stat().st_size < (base / "model.safetensors").stat().st_size
    assert not (tmp_path / "out").exists()
    finish(*command)
    export(adapter, base, tmp_path / "whole")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_the_command_prints_what_survived_as_json_alone(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from gptoss_train.__main__ import main

    command = ["export", str(saved_adapter(tmp_path, base)), str(tmp_path / "out"), "--base", str(base), "--json"]
    assert main(command) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["output"] == str(tmp_path / "out")
    assert {row["name"] for row in printed["survival"]} == {"attention", "experts.gate_up_proj", "experts.down_proj"}
    assert all(0.5 < row["kept"] < 1.5 for row in printed["survival"])
    assert main([*command[:-1], "--overwrite"]) == 0
    shown = capsys.readouterr()
    assert shown.out == f"{tmp_path / 'out'}\n"
    assert "delta kept" in shown.err


def test_a_weight_whose_whole_delta_was_lost_is_warned_of(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from gptoss_train.export import print_summary

    tiny = random_adapter([Target(1, "down_proj")], size=1e-4)
    mixed = Adapter(4, 8.0, False, 0.0, random_adapter([Target(0, "q_proj")]).factors | tiny.factors)
    print_summary(export(mixed, base, tmp_path / "out", rule=Rule("nearest")))
    warned = capsys.readouterr().err
    assert "rounding lost the whole delta of 1 of 2 weights, such as model.layers.1.mlp.experts.down_proj" in warned
    assert "0% of experts.down_proj's delta was written: this checkpoint is not what was trained" in warned


def test_an_export_that_kept_the_delta_warns_of_nothing(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from gptoss_train.export import print_summary

    print_summary(export(random_adapter([Target(0, "q_proj")]), base, tmp_path / "out"))
    assert "warning" not in capsys.readouterr().err
