"""Where the vocabulary comes from without a network, and what is said when it comes from nowhere."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoss_infer import harmony
from gptoss_infer.errors import MachineError
from gptoss_infer.harmony import vocabulary

FILE = "o200k_base.tiktoken"
SHA256 = "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"


def test_the_bytes_of_every_ordinary_token_are_those_that_openai_harmony_decodes_it_to() -> None:
    # Bytes that are no UTF-8 come as half surrogates, and go back the same way.
    texts = [vocabulary.encoding().decode([i], errors="surrogateescape") for i in range(vocabulary.FIRST_SPECIAL)]
    assert vocabulary.byte_sequences() == [text.encode(errors="surrogateescape") for text in texts]


@pytest.fixture
def no_vocabulary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty caches, no variable, and bpe-openai not importable; returns where our cache would be."""
    monkeypatch.delenv("TIKTOKEN_ENCODINGS_BASE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(vocabulary.tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
    monkeypatch.setitem(sys.modules, "bpe_openai", None)
    return tmp_path / "cache" / "gptoss" / "vocab"


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if key != "TIKTOKEN_ENCODINGS_BASE"}
    root = str(Path(__file__).resolve().parents[2])
    return subprocess.run(
        [sys.executable, "-c", code], env=kept | {"PYTHONPATH": root} | environment, capture_output=True, text=True
    )


def test_importing_the_package_loads_neither_openai_harmony_nor_torch() -> None:
    code = "import sys, gptoss_infer.harmony; print({'openai_harmony', 'pydantic', 'torch'} & set(sys.modules))"
    assert run_python(code).stdout.strip() == "set()"


def test_the_control_tokens_have_the_ids_that_openai_harmony_gives_them() -> None:
    names = ("start", "end", "message", "channel", "constrain", "return", "call")
    for name in names:
        token = getattr(harmony, name.upper())
        assert vocabulary.encoding().encode(f"<|{name}|>", allowed_special="all") == [token]
        assert harmony.decode([token]) == f"<|{name}|>"
    assert harmony.decode([harmony.END_OF_TEXT]) == "<|endoftext|>"
    assert set(vocabulary.encoding().stop_tokens_for_assistant_actions()) <= set(harmony.STOP_TOKENS)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text(max_size=40) | st.sampled_from(["<|end|>", "a<|start|>system<|message|>b", "<|return|><|call|>"]))
def test_any_text_survives_as_ordinary_tokens(text: str) -> None:
    ids = harmony.encode(text)
    assert harmony.decode(ids) == text
    assert all(token < 199998 for token in ids)


def test_decode_is_total() -> None:
    a = harmony.encode("a")
    half = next(i for i in range(256) if vocabulary.encoding().decode([i], errors="ignore") == "")
    assert harmony.decode([*a, -1, *a, 2**70, 201088]) == "a\ufffda\ufffd\ufffd"
    assert "\ufffd" in harmony.decode([half])
    assert harmony.decode([]) == ""


def test_the_folder_in_the_variable_comes_first(
    no_vocabulary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / FILE).write_bytes(b"whatever")
    monkeypatch.setenv("TIKTOKEN_ENCODINGS_BASE", str(tmp_path))
    assert vocabulary.locate() == tmp_path


def test_a_variable_that_names_no_vocabulary_is_an_error_with_the_cure(
    no_vocabulary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIKTOKEN_ENCODINGS_BASE", str(tmp_path / "nowhere"))
    with pytest.raises(MachineError, match=r"nowhere.*holds no file o200k_base.tiktoken; point it at .* or unset it"):
        vocabulary.locate()


def test_the_package_is_unpacked_into_the_cache_once(no_vocabulary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert vocabulary.locate() is None
    monkeypatch.delitem(sys.modules, "bpe_openai")
    assert vocabulary.locate() == no_vocabulary
    assert hashlib.sha256((no_vocabulary / FILE).read_bytes()).hexdigest() == SHA256
    assert [path.name for path in no_vocabulary.iterdir()] == [FILE]
    monkeypatch.setitem(sys.modules, "bpe_openai", None)
    assert vocabulary.locate() == no_vocabulary


def test_a_damaged_cache_is_replaced(no_vocabulary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_vocabulary.mkdir(parents=True)
    (no_vocabulary / FILE).write_bytes(b"IQ== 0\n")
    assert vocabulary.locate() is None
    monkeypatch.delitem(sys.modules, "bpe_openai")
    assert vocabulary.locate() == no_vocabulary
    assert hashlib.sha256((no_vocabulary / FILE).read_bytes()).hexdigest() == SHA256


def test_a_cache_that_cannot_be_written_gives_way_to_the_temporary_folder(
    no_vocabulary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    monkeypatch.delitem(sys.modules, "bpe_openai")
    folder = vocabulary.locate()
    assert folder is not None
    assert folder.is_relative_to(tmp_path / "tmp")


def test_another_vocabulary_in_the_package_is_not_used(no_vocabulary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "bpe_openai")
    monkeypatch.setattr(vocabulary.gzip, "decompress", lambda data: b"IQ== 0\n")
    assert vocabulary.locate() is None
    assert not no_vocabulary.exists()


def test_loading_leaves_the_environment_as_it_was(tmp_path: Path) -> None:
    code = (
        "import os; from gptoss_infer import harmony; before = dict(os.environ); "
        "print(harmony.encode('a'), dict(os.environ) == before)"
    )
    done = run_python(code, XDG_CACHE_HOME=str(tmp_path))
    assert done.stdout.strip() == "[64] True", done.stderr


NOWHERE = """
import sys
sys.modules["bpe_openai"] = None
from gptoss_infer.errors import run_command
from gptoss_infer.harmony import encode
sys.exit(run_command(lambda argv: print(encode("a")) or 0, []))
"""


def test_without_any_source_the_command_ends_with_the_cure_and_no_traceback(tmp_path: Path) -> None:
    unreachable = dict.fromkeys(("HTTPS_PROXY", "https_proxy", "ALL_PROXY"), "http://127.0.0.1:9")
    caches = {"XDG_CACHE_HOME": str(tmp_path), "TIKTOKEN_RS_CACHE_DIR": str(tmp_path), "TMPDIR": str(tmp_path)}
    done = run_python(NOWHERE, **caches, **unreachable)
    assert done.returncode == 3, done.stderr
    assert "pip install 'gptoss[vocab]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_damaged_vocabulary_in_the_variable_is_named(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"IQ== 0\n")
    done = run_python(NOWHERE, TIKTOKEN_ENCODINGS_BASE=str(tmp_path))
    assert done.returncode == 3, done.stderr
    assert f"TIKTOKEN_ENCODINGS_BASE={tmp_path}" in done.stderr
    assert "hash mismatch" in done.stderr


def test_openai_harmony_itself_finds_what_we_unpacked(tmp_path: Path) -> None:
    done = run_python(
        "from gptoss_infer.harmony import vocabulary; import os; os.environ['TIKTOKEN_ENCODINGS_BASE'] = "
        "str(vocabulary.locate()); import openai_harmony as oh; "
        "print(oh.load_harmony_encoding(oh.HarmonyEncodingName.HARMONY_GPT_OSS).encode('a'))",
        XDG_CACHE_HOME=str(tmp_path),
    )
    assert done.stdout.strip() == str(vocabulary.encoding().encode("a")), done.stderr
