"""Tokenizers in Hugging Face's form: byte-level BPE (of GPT-2, Llama 3, Qwen, SmolLM), and what ``export_hf`` wrote.

What a run keeps of one is a single file: the ``tokenizer.json`` and the names of the special tokens, which Hugging Face has in another.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from minifoundation.data.tokenizer import Special, Tokenizer
from minifoundation.errors import UserError

NAMES = tuple(f"{name}_token" for name in Special._fields)
TOKENIZER_JSON = "tokenizer.json"
PROBE = "One  text (with spaces)\n\tand lines, 1,234 \u2013 don't: \u4e09\u756a\u76ee \U0001f642!\r\n  "
"""Decodes to itself where a tokenizer takes out nothing."""
REMEDY = "give a byte-level BPE (as of GPT-2, Llama 3, Qwen or SmolLM) or what export_hf wrote"


def is_folder_or_json(path: Path) -> bool:
    """Return whether ``path`` names a tokenizer of Hugging Face: its folder, or the ``tokenizer.json`` in it."""
    return path.is_dir() or path.suffix == ".json"


def is_packed(model: bytes) -> bool:
    """Return whether the content of a file is what ``packed`` returns, and no SentencePiece model."""
    return model.startswith(b'{"special_tokens":')


def packed(path: Path) -> bytes:
    """Return the tokenizer of a Hugging Face folder (or of the ``tokenizer.json`` in it) as one file.

    Raises:
        UserError: a file is missing or is no JSON.
    """
    folder = path if path.is_dir() else path.parent
    main = folder / TOKENIZER_JSON if path.is_dir() else path
    tokenizer = _json(main)
    if tokenizer is None:
        raise UserError(str(main), "no such file", "give a folder with a tokenizer.json, or a SentencePiece .model file")
    if "model" not in tokenizer:
        raise UserError(str(main), "no tokenizer.json of Hugging Face's tokenizers", REMEDY)
    config = folder / "tokenizer_config.json"
    settings = (_json(folder / "special_tokens_map.json") or {}) | (_json(config) or {})
    special = {name: _spelling(settings.get(name), name, config) for name in NAMES}
    for cuts in ("truncation", "padding"):  # settings of some program's last call
        tokenizer[cuts] = None
    return json.dumps({"special_tokens": special, "tokenizer": tokenizer}, ensure_ascii=False, separators=(",", ":")).encode()


def _spelling(token: Any, name: str, path: Path) -> str | None:
    spelling = token.get("content", token) if isinstance(token, dict) else token
    if spelling is None or isinstance(spelling, str):
        return spelling
    raise UserError(str(path), f"{name} is {token!r}, which spells no token", "copy the folder again, or correct it")


def _json(path: Path) -> dict[str, Any] | None:
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(str(path), f"cannot be read ({error})", "give another, or write the file again") from None
    if not isinstance(read, dict):
        raise UserError(str(path), "holds no JSON object", "give another, or write the file again")
    return read


class FastTokenizer(Tokenizer):
    """A tokenizer of the library ``tokenizers``, which segments here and in Hugging Face's programs alike.

    What is lost of a text is its normal form where the tokenizer has Unicode's NFC (Qwen), and ``missing``.

    Attributes:
        library: the object of ``tokenizers``.
        missing: bytes that the vocabulary has no token for, which are dropped: SmolLM2 lacks some control characters.
    """

    def __init__(self, path: Path, model: bytes) -> None:
        from tokenizers import Tokenizer as Library

        super().__init__(path, model)
        contents = json.loads(model)
        try:
            self.library = Library.from_str(json.dumps(contents["tokenizer"]))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the library raises bare exceptions, and panics, which are none
            raise UserError(str(path), f"is not read by tokenizers ({str(error).splitlines()[0]})", REMEDY) from None
        self._json: dict[str, Any] = json.loads(self.library.to_str())  # with what older files leave out, as GPT-2's the type of the model
        self.library.encode_special_tokens = True  # spelled in a text, they are text
        self._special_tokens = {name: token for name, token in contents["special_tokens"].items() if token is not None}
        self.vocab_size = self.library.get_vocab_size()
        if reason := next(self._faults(), None):
            raise UserError(str(path), f"not a tokenizer for this program: {reason}", REMEDY)
        self.kind = "byte-level bpe" if self._byte_level else self._json["model"]["type"].lower()
        ids = {name: self.library.token_to_id(token) for name, token in self._special_tokens.items()}
        self.special = Special(*(ids.get(name) for name in NAMES))  # type: ignore[arg-type]
        self.prefix = tuple(self.library.encode("").ids)

    @cached_property
    def missing(self) -> bytes:
        vocabulary = self.library.get_vocab()
        return bytes(byte for character, byte in BYTES.items() if character not in vocabulary) if self._byte_level else b""

    @property
    def special_tokens(self) -> dict[str, str]:
        return self._special_tokens

    @property
    def _byte_level(self) -> bool:
        return bool(self._json["decoder"]["type"] == "ByteLevel")

    @property
    def added(self) -> dict[int, dict[str, Any]]:
        """The added tokens by id, as ``tokenizer.json`` has them."""
        return {token["id"]: token for token in self._json["added_tokens"]}

    @property
    def pre_tokenizers(self) -> list[dict[str, Any]]:
        """The steps that cut text before it is joined to pieces."""
        return _parts(self._json.get("pre_tokenizer"))

    @property
    def merges(self) -> list[str]:
        """The pairs that a BPE joins, best first, each as two pieces with a space between."""
        return [pair if isinstance(pair, str) else " ".join(pair) for pair in self._json["model"]["merges"]]

    def piece(self, token: int) -> str:
        """Return how the vocabulary spells an id."""
        return str(self.library.id_to_token(token))

    @cached_property
    def surfaces(self) -> list[bytes]:
        added = self.added
        surfaces = []
        for token in range(self.vocab_size):
            piece = self.piece(token)
            if token in added:
                surfaces.append(b"" if added[token]["special"] else piece.encode())
            elif self._byte_level:
                surfaces.append(bytes(BYTES[character] for character in piece))
            else:
                surfaces.append(bytes([int(piece[1:-1], 16)]) if _is_byte(piece) else piece.encode())
        return surfaces

    def normalized(self, text: str) -> str:
        form = unicodedata.normalize("NFC", text) if self._json.get("normalizer") else text
        return form.encode().translate(None, self.missing).decode("utf-8", "replace")

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.library.encode(text, add_special_tokens=False).ids
        return ids

    def encode_documents(self, texts: Sequence[str]) -> list[npt.NDArray[np.int32]]:
        encoded = self.library.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array([*self.prefix, *one.ids, self.special.eos], np.int32) for one in encoded]

    def _faults(self) -> Iterator[str]:
        """Yield why text would be lost or ids differ in another program."""
        eos = self._special_tokens.get("eos_token")
        if eos is None:
            yield "tokenizer_config.json beside it names no eos_token, which ends a document"
        for name, token in self._special_tokens.items():
            if self.library.token_to_id(token) is None:
                yield f"its {name} {token!r} is not in its vocabulary"
        if any(self.library.id_to_token(token) is None for token in range(self.vocab_size)):
            yield "its ids have gaps"
        normalizer, decoder = self._json.get("normalizer"), self._json.get("decoder") or {}
        if normalizer is not None and normalizer["type"] != "NFC":
            yield f"its normaliser is {normalizer['type']}, which loses text"
        added = {token["content"]: token for token in self._json["added_tokens"]}
        if eos not in added or not added[str(eos)]["special"]:
            yield f"its eos_token {eos!r} is not marked special, so that a text could spell it"
        if stripping := next((token for token, what in added.items() if what["lstrip"] or what["rstrip"]), None):
            yield f"its token {stripping!r} swallows the spaces beside it"
        vocabulary = self.library.get_vocab()
        if decoder.get("type") == "ByteLevel":
            if self._json["model"]["type"] != "BPE":
                yield f"its model is {self._json['model']['type']}, not BPE"
            if any(part.get("add_prefix_space") for part in self.pre_tokenizers):
                yield "it puts a space before every text (add_prefix_space)"
            if foreign := next((c for piece in vocabulary if piece not in added for c in piece if c not in BYTES), None):
                yield f"it has a piece with {foreign!r}, which stands for no byte"
            if self.missing and self._json["model"].get("unk_token") == eos:
                yield "bytes that it has no tokens for become its eos_token"
            if lost := [chr(byte) for byte in range(0x20, 0x7F) if CHARACTERS[byte] not in vocabulary]:
                yield f"it has no tokens for {''.join(lost)}"
        elif [part["type"] for part in _parts(self._json["decoder"])] == ["ByteFallback", "Fuse"]:
            if not all(f"<0x{byte:02X}>" in vocabulary for byte in range(256)):
                yield "it has no tokens for some bytes"
        else:
            yield f"it is a {self._json['model']['type']} with the decoder {decoder.get('type', 'none')}"
        prefix = self.library.encode("").ids
        if prefix == [self.library.token_to_id(str(eos))]:
            yield "its bos_token is its eos_token, so that the end of a document could not be told"
        if prefix not in ([], [self.library.token_to_id(self._special_tokens.get("bos_token", ""))]):
            yield f"it puts the ids {prefix} around a text, not bos before it or nothing"
        if self._json["model"].get("dropout"):
            yield "it leaves out merges at random (dropout), so that a text has other ids each time"
        # Whatever the steps before and after the model are called: what they do to a text tells.
        if self.library.decode(self.encode(PROBE), skip_special_tokens=False) != self.normalized(PROBE):
            yield "text that is encoded and decoded is not what it was, spaces and punctuation included"
        spellings = [token for token, what in added.items() if what["special"]]
        for token, encoded in zip(spellings, self.library.encode_batch_fast(spellings, add_special_tokens=False), strict=True):
            if added[token]["id"] in encoded.ids:
                yield f"a text that spells its token {token!r} becomes that token"


def _parts(component: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return the parts of a pre-tokenizer or decoder; one that is no sequence is its own only part."""
    if component is None:
        return []
    parts: list[dict[str, Any]] = component.get("pretokenizers") or component.get("decoders") or [component]
    return parts


def _is_byte(piece: str) -> bool:
    return len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")


def _bytes() -> dict[str, int]:
    """Return the byte that each character of a byte-level vocabulary stands for, as GPT-2 has it.

    A byte that is a visible character of Latin-1 is that character; the rest follow from U+0100 on.
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + place): byte for place, byte in enumerate(hidden)}


BYTES = _bytes()
CHARACTERS = {byte: character for character, byte in BYTES.items()}
