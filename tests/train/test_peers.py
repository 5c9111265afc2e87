"""The peers' own rounding, on values worked out by hand from their rules; and what is said where they are not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from oracles import slow_decode

from gptoss_infer import mxfp4
from gptoss_train import peers
from gptoss_train.peers import Rule

MODULES = {"torchao": "torchao", "nvidia-modelopt": "modelopt", "transformers": "transformers"}
ORACLES = "oracle: needs the environment that gptoss_train/peers.py tells how to make"


# Two blocks, whose largest are 7.5 and 6: both get scale 1 by floor and 2 by ceil of the log2; the least powers of two
# that hold them are 2 and 1.
WEIGHTS = (7.5, 5.0, -3.5, 0.75, 0.25), (6.0, 2.5, -0.75, 0.5)
WRITTEN = {
    "torchao floor": ((6.0, 4.0, -4.0, 1.0, 0.0), (6.0, 2.0, -1.0, 0.5)),  # saturates; ties to the even code
    "torchao ceil": ((8.0, 4.0, -4.0, 1.0, 0.0), (6.0, 2.0, -1.0, 0.0)),  # 0.5 is a quarter of its step of 2
    "modelopt": ((8.0, 4.0, -3.0, 1.0, 0.0), (6.0, 2.0, -0.5, 0.5)),  # ties towards zero
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", WRITTEN)
def test_peers_round_by_their_own_rules(name: str, dtype: torch.dtype) -> None:
    pytest.importorskip("modelopt" if name == "modelopt" else "torchao", reason=ORACLES)
    weights, expected = torch.zeros(1, 64), torch.zeros(1, 64)
    for block in (0, 1):
        weights[0, 32 * block :][: len(WEIGHTS[block])] = torch.tensor(WEIGHTS[block])
        expected[0, 32 * block :][: len(WEIGHTS[block])] = torch.tensor(WRITTEN[name][block])
    assert torch.equal(slow_decode(*peers.write(peers.rules()[name], weights.to(dtype))), expected)


def test_normal_weights_are_written_with_the_values_that_peers_dequantize_to() -> None:
    pytest.importorskip("torchao", reason=ORACLES)
    pytest.importorskip("modelopt", reason=ORACLES)
    weights = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).mul_(0.02)
    for rule in peers.rules().values():
        assert torch.equal(slow_decode(*peers.write(rule, weights)), rule.dequantize(rule.quantize(weights)))


def test_values_off_the_grid_are_refused() -> None:
    verbatim = Rule("none", lambda weights: weights, lambda weights: weights)
    on_grid = torch.tensor([[6.0, 0.5] + [0.0] * 30])
    assert torch.equal(mxfp4.decode(*peers.write(verbatim, on_grid), torch.float32), on_grid)
    with pytest.raises(ValueError, match=r"1 of 32 values .* are not on MXFP4's grid"):
        peers.write(verbatim, torch.tensor([[6.0, 0.3] + [0.0] * 30]))


def test_transformers_decodes_to_the_same_values_transposed() -> None:
    decode = peers.transformers_decode()
    assert decode is not None, "transformers belongs to the test extra"
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (2, 6, 3, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(100, 150, (2, 6, 3), generator=generator, dtype=torch.uint8)
    assert torch.equal(decode(blocks, scales, torch.float32), slow_decode(blocks, scales).mT)


@pytest.mark.parametrize("package", MODULES)
def test_a_missing_peer_is_said_once_with_the_cure(
    package: str, without: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    without(*MODULES.values())
    for _ in range(2):
        assert peers.rules() == {}
        assert peers.transformers_decode() is None
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = [line for line in said.err.splitlines() if line.startswith(package)]
    assert 'pip install -c .ci/constraints.txt -e ".[oracles]"' in line


def test_one_peer_is_here_without_the_other(without: Callable[..., None]) -> None:
    pytest.importorskip("torchao", reason=ORACLES)
    without("modelopt")
    assert set(peers.rules()) == {"torchao floor", "torchao ceil"}
