"""`gptoss-infer probe` against servers that each do one thing otherwise: that very thing must be found, no other."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

import pytest
import torch
from conftest import tiny_config, write_tiny
from openai_server import Behaviour, serving, status

import gptoss_infer as gi
from gptoss_infer import probe
from gptoss_infer.__main__ import main
from gptoss_infer.client import Address, Server, ServerError
from gptoss_infer.engine import Engine
from gptoss_infer.errors import run_command
from gptoss_infer.probe import Check

EFFORT = {"chat: reasoning effort"}


def findings(engine: Engine, does: Behaviour, ours: Engine | None = None, mode: str | None = None) -> dict[str, Check]:
    with serving(engine, does) as url:
        server = Server(Address.parse(url), backoff_s=0.01)
        return {check.name: check for check in probe.probe(server, "tiny", mode=mode, ours=ours)}  # type: ignore[arg-type]


def differing(checks: dict[str, Check]) -> set[str]:
    return {name for name, check in checks.items() if check.status == "differs"}


def failing(checks: dict[str, Check]) -> set[str]:
    return {name for name, check in checks.items() if check.failed}


def test_a_server_that_does_all_as_the_engine_has_no_differences(speaker_engine: Engine) -> None:
    checks = findings(speaker_engine, Behaviour(chat_answers="token_ids"), ours=speaker_engine)
    assert differing(checks) == set()
    unknown = {name for name, check in checks.items() if check.status == "unknown"}
    assert unknown == {"our distribution"}, "a model this sure of itself cannot show a filter"
    assert checks["chat: rendering"].finding == "our 74 tokens"
    assert "in the prompt that the server shows" in checks["chat: reasoning effort"].finding
    assert "all 15 tokens of 3 prompts" in checks["our greedy tokens"].finding


@pytest.mark.parametrize(
    ("does", "differs", "fails"),
    [
        (Behaviour(stops=False), {"raw: stops at <|return|>", "raw: stops at <|call|>"}, None),
        (Behaviour(limits=False), {"raw: max_tokens"}, None),
        (Behaviour(seeds=False), {"raw: seeds differ"}, None),
        (Behaviour(effort=False), EFFORT, set()),
        (Behaviour(date="2024-02-29"), {"chat: rendering", "chat: rendering of tools"}, set()),
        (Behaviour(chat=False), {"chat mode"}, set()),
        (Behaviour(completions=False), {"raw mode"}, set()),
        (
            Behaviour(completions=False, effort=False),
            {"raw mode", "chat: reasoning effort"},
            {"chat: reasoning effort"},
        ),
        (Behaviour(completions=False, seeds=False), {"raw mode", "chat: seeds differ"}, {"chat: seeds differ"}),
        (Behaviour(completions=False, limits=False), {"raw mode", "chat: max_tokens"}, {"chat: max_tokens"}),
        (Behaviour(completions=False, chat=False), {"raw mode", "chat mode"}, None),
        (Behaviour(answers="text", returns_stop=False, biases=False), {"raw: log-probabilities"}, set()),
    ],
)
def test_what_a_server_does_otherwise_is_found(
    speaker_engine: Engine, does: Behaviour, differs: set[str], fails: set[str] | None
) -> None:
    checks = findings(speaker_engine, does)
    if not does.returns_stop:  # the stop token, which is added, has no log-probability; only short answers show it
        differs = differs & differing(checks)
    assert differing(checks) == differs
    assert failing(checks) == (differs if fails is None else fails)
    assert all(check.meaning for check in checks.values() if check.status == "differs")


def test_an_effort_that_does_not_reach_the_prompt_is_seen_there(speaker_engine: Engine) -> None:
    does = Behaviour(chat_answers="token_ids", effort=False)
    checks = findings(speaker_engine, does, mode="chat")
    assert checks["chat: reasoning effort"].finding == "not in the prompt: low, high"
    assert failing(checks) == {"chat: reasoning effort"}
    assert "they part at token" in checks["chat: rendering"].finding


def test_a_rendering_is_compared_by_number_where_tokens_are_not_shown(speaker_engine: Engine) -> None:
    checks = findings(speaker_engine, Behaviour())
    assert checks["chat: rendering"].finding == "as many tokens as ours (74); which ones is not told"
    silent = findings(speaker_engine, Behaviour(usage=False))
    assert silent["chat: rendering"].status == "unknown"
    dated = findings(speaker_engine, Behaviour(date="2024-02-29"))
    assert "tokens, as many as ours with the line Current date: " in dated["chat: rendering"].finding


def test_a_template_that_adds_the_date_of_today_is_named_and_what_else_it_changes_too(speaker_engine: Engine) -> None:
    today = datetime.date.today().isoformat()  # the very small chance that it changes while this runs is accepted
    does = Behaviour(chat_answers="token_ids", date=today)
    assert findings(speaker_engine, does)["chat: rendering"].finding == f"ours with the line Current date: {today}"
    does = Behaviour(chat_answers="token_ids", date=today, effort=False)
    finding = findings(speaker_engine, does)["chat: rendering"].finding
    assert finding.endswith(f", with the line Current date: {today}")
    assert ": medium" in finding.partition("they part at token")[2]


def test_where_a_token_cannot_be_forced_its_end_is_looked_for_in_an_answer(speaker_engine: Engine) -> None:
    checks = findings(speaker_engine, Behaviour(biases=False))
    assert checks["raw: stops at <|return|>"].status == "ok"
    assert "by itself" in checks["raw: stops at <|return|>"].finding
    assert checks["raw: stops at <|call|>"].status == "unknown"
    going_on = findings(speaker_engine, Behaviour(biases=False, stops=False))
    assert differing(going_on) == {"raw: stops at <|return|>"}


def test_a_request_that_fails_is_a_finding_and_the_others_go_on(speaker_engine: Engine) -> None:
    does = Behaviour()
    with serving(speaker_engine, does) as url:
        checks = probe.probe(Server(Address.parse(url), backoff_s=0.01), "tiny")
        names = [next(checks).name for _ in range(2)]
        does.faults = [status(400)]
        rendering = next(checks)
        rest = list(checks)
    assert names == ["raw mode", "chat mode"]
    assert (rendering.status, rendering.failed) == ("differs", False)
    assert "fault 400" in rendering.finding
    assert {check.status for check in rest} == {"ok"}


def test_a_server_that_wants_a_key_is_no_list_of_differences(speaker_engine: Engine) -> None:
    with pytest.raises(ServerError, match="status 401"):
        findings(speaker_engine, Behaviour(key="sk-other"))


def random_engine(directory: Path, seed: int) -> Engine:
    """Random weights, so that thousands of tokens are about equally likely."""
    write_tiny(directory, tiny_config(num_hidden_layers=1, vocab_size=201088), seed=seed)
    return Engine(gi.load(directory, device="cpu", dtype=torch.float32))


@pytest.fixture(autouse=True)
def _few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "GREEDY_TOKENS", 12)
    monkeypatch.setattr(probe, "SEED_TOKENS", 6)
    monkeypatch.setattr(probe, "NATURAL_TOKENS", 40)


@pytest.fixture(scope="module")
def unsure(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return random_engine(tmp_path_factory.mktemp("unsure") / "model", 0)


def test_the_same_model_says_our_tokens_and_draws_from_our_distribution(unsure: Engine) -> None:
    checks = findings(unsure, Behaviour(chat=False), ours=unsure)
    assert checks["our greedy tokens"] == Check("our greedy tokens", "ok", "all 36 tokens of 3 prompts", "", True)
    assert "24 of 24 samples" in checks["our distribution"].finding
    assert checks["our distribution"].status == "ok"


def test_another_model_is_told_from_ours_by_its_first_tokens(unsure: Engine, tmp_path: Path) -> None:
    check = findings(unsure, Behaviour(chat=False), ours=random_engine(tmp_path / "other", 1))["our greedy tokens"]
    assert "parts at token 0" in check.finding
    assert check.failed


def test_a_near_tie_that_roundings_decide_is_no_failure(unsure: Engine, tmp_path: Path) -> None:
    ours = random_engine(tmp_path / "ours", 0)
    noise = torch.randn(ours.model.lm_head.weight.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours.model.lm_head.weight.mul_(1 + 0.04 * noise)  # logits of about unit size move by 0.04
    check = findings(unsure, Behaviour(chat=False), ours=ours)["our greedy tokens"]
    assert (check.status, check.failed) == ("differs", False)
    assert check.meaning == "a near tie, which roundings decide"


def test_a_server_that_keeps_only_the_likeliest_tokens_is_found_by_what_it_never_says(unsure: Engine) -> None:
    check = findings(unsure, Behaviour(chat=False, top_k=40), ours=unsure)["our distribution"]
    assert check.failed
    assert "0 of 24 samples" in check.finding


def run(url: str, *options: object) -> int:
    return run_command(main, ["probe", url, "--model", "tiny", *map(str, options)])


def test_the_command_prints_a_table_and_exits_1_where_evaluations_would_be_wrong(
    speaker: Path, speaker_engine: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(speaker_engine, Behaviour()) as url:
        assert run(url, "--against", speaker, "--device", "cpu", "--dtype", "float32") == 0
        lines = capsys.readouterr().out.splitlines()
    assert " ".join(lines[0].split()) == "ok raw mode prompts go as token ids, answers come as token ids"
    assert any(line.startswith("ok       our greedy tokens") for line in lines)
    with serving(speaker_engine, Behaviour(seeds=False)) as url:
        assert run(url, "--json") == 1
        out, err = capsys.readouterr()
    checks = {check["name"]: check for check in json.loads(out)}
    assert (checks["raw: seeds differ"]["status"], checks["raw: seeds differ"]["failed"]) == ("differs", True)
    assert not checks["raw mode"]["failed"]
    assert "evaluations by this server would be wrong: raw: seeds differ" in err


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["probe", "http://127.0.0.1:9/v1"], 2, "needs --model NAME"),
        (["probe", "nowhere", "--model", "m"], 2, "not a base URL"),
        (["probe", "http://127.0.0.1:9/v1", "--model", "m", "--api-key-env", "NOT_SET_ANYWHERE"], 2, "is not set"),
        (["probe", "http://127.0.0.1:9/v1", "--model", "m", "--timeout", "0"], 2, "timeout 0.0 must be above 0"),
        (["probe", "http://127.0.0.1:9/v1", "--model", "m"], 3, "is the server up?"),
    ],
)
def test_what_cannot_be_probed_ends_with_its_exit_code(
    argv: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gptoss_infer.client.random.uniform", lambda *_: 0.0)
    assert run_command(main, argv) == code
    assert message in capsys.readouterr().err
