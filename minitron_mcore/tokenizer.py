"""Text to token ids: Hugging Face tokenizers, fast and slow, and sentencepiece models, behind one interface.

What decides the ids is read as it was shipped. A tokenizer.json is taken whole, and a sentencepiece .model goes to the
sentencepiece package: transformers' AutoTokenizer rebuilds both from their vocabulary alone for some classes (LlamaTokenizer,
GPT2Tokenizer), and loses what else they say of spaces and digits.
"""

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from minitron_mcore.config import DataConfig
from minitron_mcore.errors import UserError
from minitron_mcore.reading import read_json, readable

_CONTEXT = 4  # tokens before one that decide what text it adds: a character of UTF-8 may be spread over four


class Spans(NamedTuple):
    """A text's T tokens and where they stand in it."""

    ids: list[int]
    ends: Sequence[int]
    """[T] number of characters up to each token's end; those of special tokens mean nothing"""
    special: Sequence[bool]
    """[T] True on BOS and EOS that the text doesn't hold"""


class Tokenizer(ABC):
    """Texts become documents: their ids as the model's own tokenizer gives them, and EOS at the end, once."""

    eos: int
    vocab_size: int
    """Largest id + 1."""
    fingerprint: bytes
    """Tokenizers of the same fingerprint give the same ids."""

    @abstractmethod
    def _ids(self, texts: list[str]) -> list[list[int]]: ...

    @abstractmethod
    def _spans(self, texts: list[str]) -> list[Spans]: ...

    @abstractmethod
    def decode(self, ids: list[int]) -> str: ...

    @abstractmethod
    def pieces(self) -> dict[int, str]:
        """What each id stands for, as the vocabulary writes it."""

    def documents(self, texts: list[str]) -> list[list[int]]:
        return [ids if ids and ids[-1] == self.eos else [*ids, self.eos] for ids in self._ids(texts)]

    def spans(self, texts: list[str]) -> list[Spans]:
        """`documents`, with what each token stands for."""
        return [
            found
            if found.ids and found.ids[-1] == self.eos
            else Spans([*found.ids, self.eos], [*found.ends, len(text)], [*found.special, True])
            for found, text in zip(self._spans(texts), texts, strict=True)
        ]


class _HuggingFace(Tokenizer):
    def __init__(self, tokenizer: PreTrainedTokenizerBase, folder: Path):
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"The tokenizer in {folder} has no eos_token to end documents: set it in tokenizer_config.json."
            )
        self.tokenizer, self.eos = tokenizer, tokenizer.eos_token_id
        self.vocab_size = max(tokenizer.get_vocab().values()) + 1

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False) if ids else ""

    def pieces(self) -> dict[int, str]:
        return {number: piece for piece, number in self.tokenizer.get_vocab().items()}


class _Fast(_HuggingFace):
    def __init__(self, tokenizer: PreTrainedTokenizerFast, folder: Path):
        super().__init__(tokenizer, folder)
        self.backend = tokenizer.backend_tokenizer
        self.backend.no_truncation()
        self.backend.no_padding()
        self.fingerprint = hashlib.sha256(f"{self.backend.to_str()}{self.eos}".encode()).digest()

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.backend.encode_batch_fast(texts)]

    def _spans(self, texts: list[str]) -> list[Spans]:
        return [
            Spans(found.ids, [end for _, end in found.offsets], found.special_tokens_mask)
            for found in self.backend.encode_batch(texts)
        ]


class _Slow(_HuggingFace):
    """A tokenizer in Python, which knows no offsets: they come from what its tokens decode to."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, folder: Path):
        super().__init__(tokenizer, folder)
        digest = hashlib.sha256(type(tokenizer).__name__.encode())
        settings = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
        for name in sorted({*tokenizer.vocab_files_names.values(), *settings}):
            digest.update(f"{name}{(folder / name).is_file()}".encode())
            if (folder / name).is_file():
                digest.update((folder / name).read_bytes())
        self.fingerprint = digest.digest()

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, verbose=False)["input_ids"]

    def _spans(self, texts: list[str]) -> list[Spans]:
        inner = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return [self._placed(*found) for found in zip(texts, self._ids(texts), inner, strict=True)]

    def _placed(self, text: str, ids: list[int], inner: list[int]) -> Spans:
        """Ends are exact where ids decode to the text again; else the text is shared out as what they decode to."""
        ends = [0]
        for i in range(len(inner)):
            before, after = (self.decode(inner[max(0, i - _CONTEXT) : stop]) for stop in (i, i + 1))
            ends.append(ends[-1] + max(0, len(after) - len(before)))
        ends = [end * len(text) // max(1, ends[-1]) for end in ends[1:]]
        first = next(at for at in range(len(ids) + 1) if ids[at : at + len(inner)] == inner)
        after = len(ids) - first - len(inner)
        special = [*[True] * first, *[False] * len(inner), *[True] * after]
        return Spans(ids, [*[0] * first, *ends, *[len(text)] * after], special)


class _SentencePiece(Tokenizer):
    def __init__(self, path: Path, starts_with_bos: bool):
        try:
            self.processor = SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise UserError(
                f"{path} cannot be read by sentencepiece ({error}): give a sentencepiece .model or a folder with "
                "tokenizer.json."
            ) from error
        self.eos, self.vocab_size = self.processor.eos_id(), self.processor.get_piece_size()
        self.start = [self.processor.bos_id()] if starts_with_bos else []
        if self.eos < 0 or -1 in self.start:
            missing = "EOS to end" if self.eos < 0 else "BOS to begin"
            raise UserError(f"{path} has no {missing} documents with: it was trained without one.")
        self.fingerprint = hashlib.sha256(path.read_bytes() + bytes([starts_with_bos])).digest()

    def decode(self, ids: list[int]) -> str:
        return self.processor.decode(ids)

    def pieces(self) -> dict[int, str]:
        return {number: self.processor.id_to_piece(number) for number in range(self.vocab_size)}

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return [[*self.start, *ids] for ids in self.processor.encode(texts)]

    def _spans(self, texts: list[str]) -> list[Spans]:
        n = len(self.start)
        return [
            Spans(
                [*self.start, *found["ids"]],
                [*[0] * n, *(end for _, end in found["offsets"])],
                [*[True] * n, *[False] * len(found["ids"])],
            )
            for found in self.processor.encode(texts, return_type="offset_mapping")
        ]


def _read_json(path: Path) -> dict:
    return read_json(path, "copy the tokenizer's files again") if path.is_file() else {}


def _sentencepiece(path: Path, model: Path) -> _SentencePiece:
    """The .model says neither whether BOS comes first nor which tokens were added to it: files beside it or the model's do.

    Without `add_bos_token` Llamas begin with BOS, as in Meta's code, transformers' LlamaTokenizer and Megatron's
    Llama2Tokenizer; others don't, as in Megatron's GPTSentencePieceTokenizer, which Nemotron-4 was trained with.
    Whether EOS is added doesn't matter here: documents end with it. Control symbols in a text ("</s>") are text.
    """
    beside = _read_json(path.parent / "tokenizer_config.json")
    settings = beside or _read_json(model / "tokenizer_config.json")
    config = _read_json(path.parent / "config.json") or _read_json(model / "config.json")
    kind = settings.get("tokenizer_class") or config.get("model_type") or ""
    bos = settings.get("add_bos_token")
    found = _SentencePiece(path, "llama" in str(kind).lower() if bos is None else bool(bos))
    with readable(f"tokenizer_config.json or added_tokens.json beside {path}", "copy the tokenizer's files again"):
        listed = [*beside.get("added_tokens_decoder", {}), *_read_json(path.parent / "added_tokens.json").values()]
        listed = [int(token) for token in listed]
    if added := [token for token in listed if token >= found.vocab_size]:
        raise UserError(
            f"{path} has {found.vocab_size} tokens, and the files beside it add token {added[0]}, which sentencepiece "
            "doesn't know: give a tokenizer folder with tokenizer.json."
        )
    return found


def load(path: str | os.PathLike, model: str | os.PathLike | None = None) -> Tokenizer:
    """A Hugging Face tokenizer folder, read offline and without remote code, or a sentencepiece .model.

    Args:
        path: the folder, or the .model; a folder with a tokenizer.model and no tokenizer.json is read as the .model.
        model: the model's Hugging Face folder, whose settings count where there are none beside a .model.

    Raises:
        UserError: no tokenizer there, or one without an EOS token.
    """
    path = Path(path)
    if path.is_file():
        return _sentencepiece(path, Path(model or path.parent))
    if (path / "tokenizer.model").is_file() and not (path / "tokenizer.json").is_file():
        return _sentencepiece(path / "tokenizer.model", Path(model or path))
    kind = PreTrainedTokenizerFast if (path / "tokenizer.json").is_file() else AutoTokenizer
    try:
        if not path.is_dir():
            raise OSError("there is no such file or folder")
        found = kind.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        files = found.vocab_files_names.values()
        if files and not any((path / name).is_file() for name in files):
            raise OSError("it holds no vocabulary")  # some classes make one up
    except Exception as error:  # the tokenizers package raises nothing narrower
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"No tokenizer can be read from {path} ({reason}): give a folder with tokenizer.json, or a sentencepiece .model."
        ) from error
    return _Fast(found, path) if found.is_fast else _Slow(found, path)


def open_tokenizer(config: DataConfig, model: str | os.PathLike, vocab_size: int) -> Tokenizer:
    """The tokenizer that a run reads text with: `data.tokenizer`, or that of the model's Hugging Face folder.

    Raises:
        UserError: see `load`; ids that an embedding of `vocab_size` rows doesn't have.
    """
    found = load(config.tokenizer or model, model)
    if found.vocab_size > vocab_size:
        raise UserError(
            f"The tokenizer {config.tokenizer or model} has ids up to {found.vocab_size - 1}, the model's embedding "
            f"{vocab_size} rows: give the model's own with data.tokenizer=/path."
        )
    return found
