"""What the benchmark counts, against counts made in another way: torch's own of operations, and the tensors' sizes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import tiny_config
from torch.utils.flop_counter import FlopCounterMode

import gptoss_infer as gi
from gptoss_infer import roofline
from gptoss_infer.__main__ import main
from gptoss_infer.bench import random_model, shape_config
from gptoss_infer.config import published, to_hf_json


def test_the_operations_of_reading_a_prompt_are_those_that_torch_counts() -> None:
    # Without a window, and few enough tokens that attention's causal half is all that differs.
    config = tiny_config(layer_types=("full_attention",) * 3)
    model = random_model(config, torch.device("cpu"), torch.float32)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        hidden = model.hidden(torch.arange(64)[None])
        model.lm_head(hidden[:, -1])
    heads, d = config.num_attention_heads, config.head_dim
    hidden_half = 2 * 2 * 3 * heads * d * (64 * 64 - 64 * 65 // 2)  # keys that torch multiplies and causality hides
    assert roofline.prefill_flops(config, 64) == counter.get_total_flops() - hidden_half


def test_a_window_limits_the_keys_that_are_counted() -> None:
    config = tiny_config(layer_types=("sliding_attention",) * 3)
    full = tiny_config(layer_types=("full_attention",) * 3)
    fewer = roofline.prefill_flops(full, 100) - roofline.prefill_flops(config, 100)
    hidden = sum(max(0, position + 1 - 16) for position in range(100))
    assert fewer == 2 * 2 * 3 * hidden * config.num_attention_heads * config.head_dim


def test_a_step_of_many_samples_reads_all_weights_but_the_embedding(tiny_checkpoint: Path) -> None:
    model = gi.load(tiny_checkpoint, device="cpu", dtype=torch.bfloat16)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    everything = sum(t.nbytes for name, t in tensors.items() if name != "model.embed_tokens.weight")
    assert roofline.decode_bytes(model, 10_000, 0) == pytest.approx(everything)
    # One sample chooses 2 of 6 experts.
    experts = sum(t.nbytes for name, t in tensors.items() if ".experts." in name)
    assert roofline.decode_bytes(model, 1, 0) == pytest.approx(everything - experts * 4 / 6)
    # 1 full layer and 2 of window 16; keys and values of 2 heads of 16 in bf16.
    assert roofline.decode_bytes(model, 1, 100) - roofline.decode_bytes(model, 1, 0) == 2 * 2 * 16 * 2 * (100 + 2 * 16)


def test_the_published_shapes_have_the_published_number_of_weights() -> None:
    for shape, parameters in (("20b", 20.9e9), ("120b", 116.8e9)):  # model card, table 1
        config = shape_config(shape)
        assert config == published(shape)  # type: ignore[arg-type]
        with torch.device("meta"):
            model = gi.model.GptOss(config)
        count = sum(p.numel() for p in model.parameters())
        count += sum(2 * b.numel() for name, b in model.named_buffers() if name.endswith("blocks"))
        assert count == pytest.approx(parameters, rel=5e-3)


def test_the_command_times_a_shape_of_random_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = tmp_path / "shape.json"
    shape.write_text(json.dumps(to_hf_json(tiny_config(), quantized=True)))
    arguments = ["bench", "--shape", str(shape), "--batch", "1,3", "--prompt", "20", "--new", "5", "--device", "cpu"]
    assert main([*arguments, "--rounds", "1", "--json"]) == 0
    results = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [result["batch"] for result in results] == [1, 3]
    for result in results:
        for share in ("prefill_share_of_arithmetic", "decode_share_of_bandwidth"):
            assert 0 <= result[share] <= 1
        assert result["prefill_tokens_per_s"] > 0
        assert result["decode_tokens_per_s"] > 0
    assert main([*arguments, "--rounds", "1"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a checkpoint, or --shape"),
        (["CKPT", "--shape", "20b"], "give a checkpoint, or --shape"),
        (["--shape", "20b", "--batch", "1,x"], "expected numbers with commas"),
        (["--shape", "20b", "--batch", "0"], "at least 1"),
        (["--shape", "20b", "--new", "1"], "--new at least 2"),
        (["--shape", "21b"], "expected 20b or 120b, or a file"),
        (["--shape", "20b", "--adapter", "a"], "goes with the checkpoint"),
    ],
)
def test_wrong_usage_says_what_was_expected(arguments: list[str], message: str) -> None:
    with pytest.raises(gi.errors.UsageError, match=message):
        main(["bench", *arguments])
