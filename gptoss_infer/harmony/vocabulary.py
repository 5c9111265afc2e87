"""The harmony vocabulary: found offline, loaded once, and the ids of its control tokens.

Here: `encode`, `decode`, `encoding` (openai-harmony's own object), `locate` (where the vocabulary would come from),
`byte_sequences` (what a tokenizer elsewhere is built from) and the token ids. Not here: what the tokens mean together
(`render`, `parse`). Used by everything that touches text.

The vocabulary is o200k_base (199,998 byte sequences) plus control tokens. openai-harmony reads it from the folder that
TIKTOKEN_ENCODINGS_BASE names, or downloads it. Searched here, in this order: that variable; our cache; the PyPI package
bpe-openai, which carries the same file and is unpacked into our cache; a download by openai-harmony.
"""

from __future__ import annotations

import base64
import functools
import gzip
import hashlib
import importlib.util
import logging
import os
import tempfile
import threading
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from gptoss_infer.errors import MachineError

if TYPE_CHECKING:
    from openai_harmony import HarmonyEncoding

END_OF_TEXT: Final = 199999
RETURN: Final = 200002
CONSTRAIN: Final = 200003
CHANNEL: Final = 200005
START: Final = 200006
END: Final = 200007
MESSAGE: Final = 200008
CALL: Final = 200012

# Generation ends at these. <|end|> only ends a message: after its analysis the model goes on by itself.
STOP_TOKENS: Final = (RETURN, CALL, END_OF_TEXT)

FIRST_SPECIAL: Final = 199998  # everything below is ordinary text
VOCABULARY_SIZE: Final = 201088  # rows of the embedding; openai-harmony names one id more, which no model can emit

_FILE_NAME = "o200k_base.tiktoken"
_SHA256 = "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"
_BASE_VARIABLE = "TIKTOKEN_ENCODINGS_BASE"
_CURE = (
    "install the package that carries it (pip install 'gptoss[vocab]', which is bpe-openai), or put "
    f"{_FILE_NAME} (sha256 {_SHA256[:12]}...) into a folder and set {_BASE_VARIABLE} to that folder"
)
_LOCK = threading.Lock()
_LOG = logging.getLogger(__name__)


def encode(text: str) -> list[int]:
    """Token ids of ordinary text; strings such as `<|end|>` in it stay plain text, so it cannot forge a message."""
    return encoding().encode(text, disallowed_special=())


def decode(ids: Sequence[int]) -> str:
    """The text of token ids, control tokens spelled out. Total: what is no token or no UTF-8 becomes U+FFFD."""
    return decode_checked(ids)[0]


def decode_checked(ids: Sequence[int]) -> tuple[str, bool]:
    """`decode(ids)`, and whether the bytes were valid UTF-8 throughout."""
    if not ids or (min(ids) >= 0 and max(ids) < VOCABULARY_SIZE):
        try:
            return encoding().decode(ids, errors="strict"), True
        except UnicodeDecodeError:
            return encoding().decode(ids, errors="replace"), False
    # Runs of real tokens are decoded as runs, because one character may span several tokens.
    parts: list[str] = []
    valid = True
    begin = 0
    for position in [i for i, token in enumerate(ids) if not 0 <= token < VOCABULARY_SIZE] + [len(ids)]:
        text, run_valid = decode_checked(ids[begin:position])
        parts.append(text)
        valid = valid and run_valid
        begin = position + 1
    return "\N{REPLACEMENT CHARACTER}".join(parts), valid


def encoding() -> HarmonyEncoding:
    """openai-harmony's encoding, loaded on the first call (about 0.3 s).

    Raises: MachineError if the vocabulary is neither on this machine nor to be had; the message says what to do.
    """
    with _LOCK:
        return _load()


def locate() -> Path | None:
    """The folder the vocabulary would be read from; None if only a download is left.

    May unpack bpe-openai's copy into our cache, or into the temporary folder where the cache cannot be written.
    Raises: MachineError if TIKTOKEN_ENCODINGS_BASE is set to a folder without the vocabulary.
    """
    base = os.environ.get(_BASE_VARIABLE)
    if base:
        if not (Path(base) / _FILE_NAME).is_file():
            raise MachineError(
                f"{_BASE_VARIABLE} is {base!r}, which holds no file {_FILE_NAME}; point it at the folder "
                "that does, or unset it to use the cached or packaged vocabulary"
            )
        return Path(base)
    folders = _cache_folders()
    for folder in folders:
        if _is_intact(folder / _FILE_NAME):
            return folder
    packed = _packaged_vocabulary()
    if packed is None:
        return None
    for folder in folders:
        try:
            _write_atomically(folder / _FILE_NAME, packed)
        except OSError as error:
            _LOG.warning("cannot cache the vocabulary in %s: %s", folder, error)
        else:
            return folder
    return None


def byte_sequences() -> list[bytes]:
    """The bytes of every ordinary token in the order of ids, which is the order in which BPE merges them.

    Raises: MachineError if the vocabulary is not on this machine; the message says what to do.
    """
    folder = locate()
    if folder is None:
        raise MachineError(f"{_FILE_NAME} is not on this machine; {_CURE}")
    path = folder / _FILE_NAME
    if not _is_intact(path):
        raise MachineError(f"{path} is another vocabulary or damaged (sha256 differs); {_CURE}")
    return [base64.b64decode(line.split()[0]) for line in path.read_bytes().splitlines()]


@functools.cache
def _load() -> HarmonyEncoding:
    try:
        import openai_harmony
    except ModuleNotFoundError as error:
        raise MachineError(f"openai-harmony cannot be imported ({error}); pip install openai-harmony") from error
    try:
        with _encodings_base(locate()):
            return openai_harmony.load_harmony_encoding(openai_harmony.HarmonyEncodingName.HARMONY_GPT_OSS)
    except (openai_harmony.HarmonyError, OSError) as error:
        source = os.environ.get(_BASE_VARIABLE)
        where = f"{_BASE_VARIABLE}={source}" if source else "the cache, bpe-openai and the download"
        raise MachineError(f"the harmony vocabulary could not be loaded from {where}: {error}; {_CURE}") from error


def _cache_folders() -> tuple[Path, Path]:
    """Our cache, and a place for machines whose home is read-only; contents are trusted by their hash alone."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(root) / "gptoss" / "vocab", Path(tempfile.gettempdir()) / f"gptoss-vocab-{os.getuid()}"


def _is_intact(path: Path) -> bool:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest() == _SHA256
    except OSError:  # absent or unreadable: the next source is tried
        return False


def _packaged_vocabulary() -> bytes | None:
    """bpe-openai's o200k_base, or None if the package is absent or carries another file."""
    # Found without importing the package, which would build a tokenizer of its own first.
    spec = importlib.util.find_spec("bpe_openai")
    if spec is None or not spec.submodule_search_locations:
        return None
    packed = Path(spec.submodule_search_locations[0]) / "data" / f"{_FILE_NAME}.gz"
    try:
        data = gzip.decompress(packed.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        _LOG.warning("bpe-openai is installed, but its %s cannot be read: %s", _FILE_NAME, error)
        return None
    if hashlib.sha256(data).hexdigest() != _SHA256:
        _LOG.warning("bpe-openai is installed, but its %s is another vocabulary (sha256 differs)", _FILE_NAME)
        return None
    return data


def _write_atomically(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".unpacking-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


@contextmanager
def _encodings_base(folder: Path | None) -> Iterator[None]:
    """Point openai-harmony at `folder` (None: let it download) for the time of one load; it reads only the variable."""
    before = os.environ.pop(_BASE_VARIABLE, None)
    if folder is not None:
        os.environ[_BASE_VARIABLE] = str(folder)
    try:
        yield
    finally:
        os.environ.pop(_BASE_VARIABLE, None)
        if before is not None:
            os.environ[_BASE_VARIABLE] = before
