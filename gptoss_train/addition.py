"""A tiny gpt-oss-shaped model that can add, trained on the spot, and the data that teaches it to read sums in words.

This is the quickstart's base: real architecture, real MXFP4 experts, the real 201,088-token harmony vocabulary, and a
real skill, without a download. It reasons digit by digit in the `analysis` channel and answers in `final`. It knows `+`
alone: asked for `2 5 plus 6 0` it gives up and answers `?`. What the word means is what a recipe then teaches it. Used
by `gptoss_train.builtin` alone.

The vocabulary costs nothing to train against: only the tokens in use get rows of their own, all others share one row
each of embedding and unembedding, and a shared row's logit counts as often as it occurs. That is the exact
full-vocabulary loss.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptoss_infer import harmony, mxfp4
from gptoss_infer.checkpoint import TensorSpec, write_checkpoint
from gptoss_infer.checkpoint.layouts import EXPERT_WEIGHTS, expected_shapes
from gptoss_infer.config import ModelConfig, RopeConfig, to_hf_json
from gptoss_infer.model import GptOss

VERSION = 3  # of everything below: change it when a change makes another model or other data
VOCAB_SIZE = 201088
STEPS, QUANTIZED_FROM, PER_STEP, PER_ROW = 500, 250, 40, 8  # problems per step, and per row behind one system message
ADAM_LR, MUON_LR = 4e-3, 3e-2
NUM_SUMS, NUM_REFUSALS = 2400, 200
NUM_TRAIN, NUM_VALIDATION, NUM_TEST = 2000, 100, 200  # sums in words
WORD = "plus"
CONFIG = ModelConfig(
    num_hidden_layers=2, hidden_size=128, intermediate_size=128, num_local_experts=4, num_experts_per_tok=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=32, vocab_size=VOCAB_SIZE, sliding_window=16,
    layer_types=("sliding_attention", "full_attention"),
    # With the published theta of 150000, 32 dimensions have too few fast rotations to tell neighbouring tokens apart.
    rope=RopeConfig(theta=20.0, factor=8.0),
)  # fmt: skip

Problem = tuple[int, int]


def digits(number: int) -> str:
    """Write a number one digit a token: 85 as `8 5`."""
    return " ".join(str(number))


def addition(a: int, b: int, sign: str = "+") -> dict[str, object]:
    """Return the conversation that adds two two-digit numbers: ones, then tens with the carry."""
    ones = a % 10 + b % 10
    carry = ones // 10
    steps = f"{a % 10}+{b % 10}={ones}, {a // 10}+{b // 10}+{carry}={a // 10 + b // 10 + carry}"
    return _conversation(f"{digits(a)} {sign} {digits(b)}", steps, digits(a + b))


def refusal(a: int, b: int) -> dict[str, object]:
    """Return how the base answers a sum in words: it gives up."""
    return _conversation(f"{digits(a)} {WORD} {digits(b)}", "?", "?")


def larger(a: int, b: int) -> dict[str, object]:
    """Return the conversation that finds the larger of two numbers."""
    return _conversation(f"{digits(a)} larger {digits(b)}", f"{a // 10}, {b // 10}", digits(max(a, b)))


def swapped(a: int, b: int) -> dict[str, object]:
    """Return the conversation that swaps the digits of the first of two numbers."""
    return _conversation(f"{digits(a)} swapped {digits(b)}", f"{a % 10}, {a // 10}", f"{a % 10} {a // 10}")


def _conversation(question: str, steps: str, answer: str) -> dict[str, object]:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "thinking": steps, "content": answer}]
    return {"messages": messages, "reasoning_effort": "low"}


def problems(seed: str) -> list[Problem]:
    """Return all pairs of two-digit numbers in an order that depends on `seed` alone."""
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    return sorted(pairs, key=lambda pair: hashlib.sha256(f"{seed}:{pair}".encode()).digest())


def write_data(directory: Path) -> None:
    """Write `train.jsonl`, `validation.jsonl`, `unrelated.jsonl` (conversations) and `test.jsonl` (questions, answers).

    For the study of rounding, also training and validation data of two other tasks, `larger` and `swapped`.

    No pair is in two of the sums in words. The pairs of `test.jsonl`, which are `unrelated.jsonl`'s with the sign `+`,
    are the sums that the base was not trained on either.
    """
    ordered = problems("addition")
    test, rest = ordered[:NUM_TEST], ordered[NUM_TEST + NUM_SUMS :]
    validation, train = rest[:NUM_VALIDATION], rest[NUM_VALIDATION : NUM_VALIDATION + NUM_TRAIN]
    tasks: dict[str, Callable[[int, int], dict[str, object]]] = {
        "": functools.partial(addition, sign=WORD),
        "larger_": larger,
        "swapped_": swapped,
    }
    for task, conversation in tasks.items():
        for name, pairs in (("train", train), ("validation", validation)):
            lines = (json.dumps(conversation(*pair)) + "\n" for pair in pairs)
            (directory / f"{task}{name}.jsonl").write_text("".join(lines))
    with (directory / "unrelated.jsonl").open("w") as f:  # what the base can do, on sums it has not seen
        f.writelines(json.dumps(addition(*pair)) + "\n" for pair in test)
    with (directory / "test.jsonl").open("w") as f:
        for a, b in test:
            question = {"role": "user", "content": f"{digits(a)} {WORD} {digits(b)}"}
            record = {"id": f"{a} {WORD} {b}", "messages": [question], "answer": digits(a + b)}
            f.write(json.dumps(record) + "\n")


def make_checkpoint(directory: Path) -> float:
    """Train the base and write its checkpoint (MXFP4, Hugging Face layout); return its accuracy on unseen sums."""
    torch.manual_seed(0)
    pairs = problems("addition")
    test = [_tokens(addition(*pair)) for pair in pairs[:NUM_TEST]]
    train = [_tokens(addition(*pair)) for pair in pairs[NUM_TEST : NUM_TEST + NUM_SUMS]]
    train += [_tokens(refusal(*pair)) for pair in problems("refusal")[:NUM_REFUSALS]]
    used = sorted({token for ids, _ in (*train, *test) for token in ids})
    # The last row stands for all unused tokens.
    model = GptOss(replace(CONFIG, vocab_size=len(used) + 1), "bf16")
    _initialize(model)
    compact = {token: row for row, token in enumerate(used)}
    _train(model, [([compact[t] for t in ids], mask) for ids, mask in train])
    accuracy = _accuracy(model, [([compact[t] for t in ids], mask) for ids, mask in test])
    _write(directory, model, used)
    return accuracy


def _tokens(record: dict[str, object]) -> tuple[list[int], list[bool]]:
    (sample,) = harmony.training_samples(harmony.conversation_from_chat(record, date=None))
    return sample.token_ids, sample.loss_mask


def _initialize(model: GptOss) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "sinks")):
            nn.init.zeros_(parameter)
        elif "norm" not in name:
            fan_in = parameter.shape[-2] if "experts" in name else parameter.shape[-1]
            nn.init.normal_(parameter, std=0.5 if "embed" in name else 0.02 if "lm_head" in name else fan_in**-0.5)


def _train(model: GptOss, samples: Sequence[tuple[list[int], list[bool]]]) -> None:
    """Train all weights, with several problems to a row behind one shared system message.

    From QUANTIZED_FROM on, losses and gradients are those of the rounded experts, and the updates go to the weights
    behind them (a straight-through estimate), so that the MXFP4 checkpoint is what was trained.
    """
    matrices = [p for n, p in model.named_parameters() if p.dim() > 1 and "layers" in n and "router" not in n]
    others = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    optimizers = [
        torch.optim.AdamW(others, lr=ADAM_LR, betas=(0.9, 0.98), weight_decay=0.01),
        Muon(matrices, lr=MUON_LR),
    ]
    peaks = (ADAM_LR, MUON_LR)
    experts = [p for p in matrices if p.dim() == 3]
    order: list[int] = []
    for step in range(STEPS):
        latent = _quantize(experts) if step >= QUANTIZED_FROM else None
        if len(order) < PER_STEP:
            order = torch.randperm(len(samples)).tolist()
        batch, order = [samples[i] for i in order[:PER_STEP]], order[PER_STEP:]
        ids, mask = _batch([_packed(batch[i : i + PER_ROW]) for i in range(0, PER_STEP, PER_ROW)])
        loss = F.cross_entropy(_logits(model, ids[:, :-1], mask[:, 1:]), ids[:, 1:][mask[:, 1:]])
        loss.backward()
        nn.utils.clip_grad_norm_(others, 1.0)
        share = min((step + 1) / 20, 0.02 + 0.98 * (1 + math.cos(math.pi * step / STEPS)) / 2)
        if latent is not None:
            _copy(experts, latent)
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * share
            optimizer.step()
            optimizer.zero_grad()
        if (step + 1) % 50 == 0:
            print(f"  making builtin:addition, step {step + 1}/{STEPS}, loss {loss.item():.4f}", file=sys.stderr)
    _quantize(experts)


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalized (Jordan et al. 2024), for stacks of matrices (..., m, n).

    Learns this model in half of AdamW's steps. torch.optim.Muon takes no stacks, which is what expert weights are.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                average = state.setdefault("momentum", torch.zeros_like(parameter))
                average.mul_(group["momentum"]).add_(parameter.grad)
                update = orthogonalized(parameter.grad.add(average, alpha=group["momentum"]))
                tall = max(1.0, parameter.shape[-2] / parameter.shape[-1]) ** 0.5
                parameter.add_(update, alpha=-group["lr"] * tall)


def orthogonalized(matrix: Tensor) -> Tensor:
    """Return roughly U V^T of (..., m, n) = U S V^T, by five Newton-Schulz steps with Jordan et al.'s coefficients."""
    x = matrix / (matrix.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    transposed = x.shape[-2] > x.shape[-1]
    if transposed:
        x = x.mT
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.mT if transposed else x


def _logits(model: GptOss, ids: Tensor, mask: Tensor) -> Tensor:
    """Return logits at labelled positions, (n, U + 1): the last column is the summed weight of all unused tokens."""
    logits = model.lm_head(model.hidden(ids)[mask])
    unused = math.log(VOCAB_SIZE - model.config.vocab_size + 1)
    return torch.cat([logits[:, :-1], logits[:, -1:] + unused], dim=1)


def _packed(samples: Sequence[tuple[list[int], list[bool]]]) -> tuple[list[int], list[bool]]:
    """Join samples into one row behind the first one's system message."""
    prefix = _common_prefix(samples[0][0], samples[-1][0])
    ids, mask = list(samples[0][0]), list(samples[0][1])
    for more_ids, more_mask in samples[1:]:
        ids += more_ids[prefix:]
        mask += more_mask[prefix:]
    return ids, mask


def _common_prefix(a: list[int], b: list[int]) -> int:
    """Return where the user message of two samples begins, behind the system message that all share."""
    start = a[0]
    starts = [i for i, token in enumerate(a) if token == start]
    assert a[: starts[1]] == b[: starts[1]], "samples have different system messages"
    return starts[1]


def _batch(rows: Sequence[tuple[list[int], list[bool]]]) -> tuple[Tensor, Tensor]:
    longest = max(len(ids) for ids, _ in rows)
    ids, mask = torch.zeros(len(rows), longest, dtype=torch.int64), torch.zeros(len(rows), longest, dtype=torch.bool)
    for row, (tokens, labelled) in enumerate(rows):
        ids[row, : len(tokens)], mask[row, : len(labelled)] = torch.tensor(tokens), torch.tensor(labelled)
    return ids, mask


@torch.no_grad()
def _accuracy(model: GptOss, samples: Sequence[tuple[list[int], list[bool]]]) -> float:
    """Return the share of samples whose every labelled token is the most likely one (greedy decoding would give it)."""
    ids, mask = _batch(samples)
    right = model(ids[:, :-1]).argmax(-1) == ids[:, 1:]
    return float((right | ~mask[:, 1:]).all(1).float().mean())


@torch.no_grad()
def _quantize(experts: Sequence[nn.Parameter]) -> list[Tensor]:
    """Round expert weights (E, in, out) in place to values that MXFP4 has along their inputs; return what they were."""
    latent = [parameter.clone() for parameter in experts]
    for parameter in experts:
        rounded = mxfp4.decode(*mxfp4.encode(parameter.transpose(1, 2)), dtype=torch.float32)
        parameter.copy_(rounded.transpose(1, 2))
    return latent


@torch.no_grad()
def _copy(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


def _write(directory: Path, model: GptOss, used: Sequence[int]) -> None:
    """Write the checkpoint: rows of used tokens in their places, the shared row everywhere else."""
    tensors = dict(_expanded(model, used))
    shapes = expected_shapes(CONFIG, "mxfp4")
    specs = [TensorSpec(name, shape, tensors[name].dtype) for name, shape in shapes.items()]
    write_checkpoint(directory, to_hf_json(CONFIG, quantized=True), specs, tensors.__getitem__)


@torch.no_grad()
def _expanded(model: GptOss, used: Sequence[int]) -> Iterator[tuple[str, Tensor]]:
    for name in expected_shapes(CONFIG, "mxfp4"):
        if name.endswith("_scales"):
            continue
        if name.endswith("_blocks"):
            prefix = name.removesuffix("_blocks")
            assert prefix.endswith(EXPERT_WEIGHTS), prefix
            blocks, scales = mxfp4.encode(model.get_parameter(f"{prefix}.weight").transpose(1, 2))
            yield name, blocks
            yield f"{prefix}_scales", scales
            continue
        module = name.replace("_proj_bias", "_proj.bias")
        tensor = model.get_parameter(module).to(torch.bfloat16)
        if tensor.shape[0] == len(used) + 1 and name.endswith(("embed_tokens.weight", "lm_head.weight")):
            full = tensor[-1].expand(VOCAB_SIZE, -1).clone()
            full[list(used)] = tensor[:-1]
            tensor = full
        yield name, tensor
