"""Text to token ids, with one interface for Hugging Face's fast tokenizers and sentencepiece models.

A tokenizer.json is loaded as it is, and a sentencepiece .model by the sentencepiece package. transformers' AutoTokenizer would
rebuild some classes (LlamaTokenizer, GPT2Tokenizer) from their vocabulary alone and lose their rules for spaces and digits.
"""

import hashlib
import itertools
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from minitron_mcore.config.settings import DataConfig
from minitron_mcore.data.chat import ChatTemplate
from minitron_mcore.data.text_reader import Text
from minitron_mcore.errors import UserError
from minitron_mcore.reading import damage_as_user_error, read_json

FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
"""One of them in a Hugging Face folder holds the vocabulary."""
MAX_ID = 1 << 24
"""Largest id of a vocabulary: the tokenizers package allocates a list of that length. Published ids are below 2^19."""


class Spans(NamedTuple):
    """The T tokens of a text and their positions in it."""

    ids: list[int]
    ends: Sequence[int]
    """[T] number of characters of the text up to each token's end; undefined for special tokens"""
    special: Sequence[bool]
    """[T] True for BOS and EOS that were added to the text"""


class Tokenizer(ABC):
    """Encodes texts as documents: the ids that the model's own tokenizer gives, with exactly one EOS at the end."""

    eos: int
    bos: int | None
    """None if the vocabulary has none; texts may begin without it."""
    vocab_size: int
    """Largest id + 1."""
    fingerprint: bytes
    """Tokenizers with equal fingerprints give equal ids."""
    chat: ChatTemplate
    """Renders conversations."""
    rows: int | None = None
    """Rows of the embedding that the ids must fit; None skips the check."""

    @abstractmethod
    def _encode(self, texts: list[str]) -> list[list[int]]: ...

    @abstractmethod
    def _encode_spans(self, texts: list[str]) -> list[Spans]: ...

    @abstractmethod
    def decode(self, ids: list[int], special: bool = True) -> str:
        """The text of tokens; without `special`, that of the others than special tokens."""

    @abstractmethod
    def use_one_thread(self) -> None:
        """Encode in the calling thread only, in this process from now on."""

    @abstractmethod
    def pieces(self) -> dict[int, str]:
        """The vocabulary: the string of each id."""

    def documents(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text, EOS last.

        Raises:
            UserError: the text has an id without a row in the embedding (`rows`).
        """
        documents = [ids if ids and ids[-1] == self.eos else [*ids, self.eos] for ids in self._encode(texts)]
        self._check_rows(documents)
        return documents

    def spans(self, texts: list[str]) -> list[Spans]:
        """`documents` with the position of each token. Conversations have the special tokens of their template alone."""
        placed = [
            spans
            if (spans.ids and spans.ids[-1] == self.eos) or _is_chat(text)
            else Spans([*spans.ids, self.eos], [*spans.ends, len(text)], [*spans.special, True])
            for spans, text in zip(self._encode_spans(texts), texts, strict=True)
        ]
        self._check_rows([spans.ids for spans in placed])
        return placed

    def prompt(self, text: str) -> list[int]:
        """The ids of a text to continue: a document without the EOS that ends it, but with one that the text itself ends with.

        Raises:
            UserError: see `documents`; the text has no tokens.
        """
        [spans] = self.spans([text])
        if not (ids := spans.ids[:-1] if spans.special[-1] else spans.ids):
            raise UserError(f"the tokenizer gives {text[:40]!r} no tokens: write another text.")
        return ids

    def _check_rows(self, documents: list[list[int]]) -> None:
        largest = max((max(ids) for ids in documents), default=0)
        if self.rows is not None and largest >= self.rows:
            raise UserError(
                f"The text has token {largest} ({self.decode([largest])!r}), the model's embedding {self.rows} rows: give the "
                "model's own tokenizer with data.tokenizer=/path."
            )


def _is_chat(text: str) -> bool:
    return isinstance(text, Text) and text.is_chat


class _HuggingFace(Tokenizer):
    def __init__(self, tokenizer: PreTrainedTokenizerFast, folder: Path):
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"The tokenizer in {folder} has no eos_token to end documents: set it in tokenizer_config.json."
            )
        self.tokenizer, self.eos, self.bos = tokenizer, tokenizer.eos_token_id, tokenizer.bos_token_id
        self.vocab_size = max(tokenizer.get_vocab().values()) + 1
        self.backend = tokenizer.backend_tokenizer
        self.backend.no_truncation()
        self.backend.no_padding()
        self.chat = ChatTemplate(tokenizer, folder)
        self.fingerprint = hashlib.sha256(f"{self.backend.to_str()}{self.eos}{self.chat.identity}".encode()).digest()

    def decode(self, ids: list[int], special: bool = True) -> str:
        options = {"skip_special_tokens": not special, "clean_up_tokenization_spaces": False}
        return self.tokenizer.decode(ids, **options) if ids else ""

    def use_one_thread(self) -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"

    def pieces(self) -> dict[int, str]:
        return {number: piece for piece, number in self.tokenizer.get_vocab().items()}

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.backend.encode_batch_fast(texts)]

    def _encode_spans(self, texts: list[str]) -> list[Spans]:
        return [
            Spans(encoding.ids, [end for _, end in encoding.offsets], encoding.special_tokens_mask)
            for is_chat, group in itertools.groupby(texts, _is_chat)
            for encoding in self.backend.encode_batch(list(group), add_special_tokens=not is_chat)
        ]


class _SentencePiece(Tokenizer):
    REMEDY = "give another sentencepiece .model, or a folder with tokenizer.json"

    def __init__(self, path: Path, starts_with_bos: bool):
        try:
            self.processor = SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError, ValueError) as error:
            raise UserError(
                f"{path} cannot be read by sentencepiece ({error}): give a sentencepiece .model or a folder with "
                "tokenizer.json."
            ) from error
        self.path, self.eos, self.vocab_size = path, self.processor.eos_id(), self.processor.get_piece_size()
        self.bos = self.processor.bos_id() if self.processor.bos_id() >= 0 else None
        self.start = [self.processor.bos_id()] if starts_with_bos else []
        self.threads = -1  # one for each core
        self.chat = ChatTemplate(None, path)
        if self.eos < 0 or -1 in self.start:
            missing = "EOS to end" if self.eos < 0 else "BOS to begin"
            raise UserError(f"{path} has no {missing} documents with: it was trained without one.")
        self.fingerprint = hashlib.sha256(path.read_bytes() + bytes([starts_with_bos])).digest()

    def decode(self, ids: list[int], special: bool = True) -> str:  # control symbols have no text
        with damage_as_user_error(self.path, self.REMEDY):  # pieces need not be UTF-8
            return self.processor.decode(ids)

    def use_one_thread(self) -> None:
        self.threads = 1

    def pieces(self) -> dict[int, str]:
        with damage_as_user_error(self.path, self.REMEDY):
            return {number: self.processor.id_to_piece(number) for number in range(self.vocab_size)}

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return [[*self.start, *ids] for ids in self.processor.encode(texts, num_threads=self.threads)]

    def _encode_spans(self, texts: list[str]) -> list[Spans]:
        n = len(self.start)
        return [
            Spans(
                [*self.start, *encoding["ids"]],
                [*[0] * n, *(end for _, end in encoding["offsets"])],
                [*[True] * n, *[False] * len(encoding["ids"])],
            )
            for encoding in self.processor.encode(texts, return_type="offset_mapping")
        ]


def _read_json(path: Path) -> dict:
    return read_json(path, "copy the tokenizer's files again") if path.is_file() else {}


def _sentencepiece(path: Path, model: Path) -> _SentencePiece:
    """Load a .model together with the settings that it does not contain: whether BOS is added, and added tokens.

    These come from the files next to the .model, else from the model's folder. Without `add_bos_token`, Llama tokenizers add BOS,
    as Meta's code, transformers' LlamaTokenizer and Megatron's Llama2Tokenizer do. Others do not, as Megatron's
    GPTSentencePieceTokenizer, which Nemotron-4 was trained with. Control symbols in a text ("</s>") are encoded as text.
    """
    beside = _read_json(path.parent / "tokenizer_config.json")
    settings = beside or _read_json(model / "tokenizer_config.json")
    config = _read_json(path.parent / "config.json") or _read_json(model / "config.json")
    kind = settings.get("tokenizer_class") or config.get("model_type") or ""
    bos = settings.get("add_bos_token")
    tokenizer = _SentencePiece(path, "llama" in str(kind).lower() if bos is None else bool(bos))
    remedy = "copy the tokenizer's files again"
    with damage_as_user_error(f"tokenizer_config.json or added_tokens.json next to {path}", remedy):
        listed = [*beside.get("added_tokens_decoder", {}), *_read_json(path.parent / "added_tokens.json").values()]
        ids = [int(token) for token in listed]
    if added := [token for token in ids if token >= tokenizer.vocab_size]:
        raise UserError(
            f"{path} has {tokenizer.vocab_size} tokens, and the files beside it add token {added[0]}, which sentencepiece "
            "does not have: give a tokenizer folder with tokenizer.json."
        )
    return tokenizer


def has_tokenizer(folder: Path) -> bool:
    """Whether a Hugging Face folder has a tokenizer."""
    return any((folder / name).is_file() for name in FILES)


def check_vocabulary(folder: Path) -> None:
    """Refuse ids above MAX_ID in a folder's tokenizer.json and vocab.json, for which the tokenizers package would allocate memory.

    Raises:
        UserError: such an id, or a negative one.
    """
    for path in (folder / "tokenizer.json", folder / "vocab.json"):
        if path.is_file():
            _check_ids(path)


def _check_ids(path: Path) -> None:
    vocab = _read_json(path)
    if path.name == "tokenizer.json":
        vocab = vocab["model"].get("vocab") if isinstance(vocab.get("model"), dict) else None
    for token, number in vocab.items() if isinstance(vocab, dict) else ():
        if type(number) is not int or not 0 <= number <= MAX_ID:
            raise UserError(
                f"{path} gives {token[:40]!r} the id {str(number)[:40]}; ids are whole numbers from 0 to {MAX_ID}: copy the "
                "tokenizer's files again."
            )


def load(path: str | os.PathLike, model: str | os.PathLike | None = None) -> Tokenizer:
    """Load a Hugging Face tokenizer folder (offline, without remote code) or a sentencepiece .model.

    Args:
        path: the folder or the .model. A folder with tokenizer.model but no tokenizer.json is loaded as that .model.
        model: the model's Hugging Face folder, which supplies the settings that are missing next to a .model.

    Raises:
        UserError: no tokenizer, one without an EOS token, one that transformers implements in Python only ("slow"), or one with
            ids above `MAX_ID`.
    """
    path = Path(path)
    if path.is_file():
        return _sentencepiece(path, Path(model or path.parent))
    if (path / "tokenizer.model").is_file() and not (path / "tokenizer.json").is_file():
        return _sentencepiece(path / "tokenizer.model", Path(model or path))
    return _HuggingFace(load_fast(path), path)


def load_fast(path: Path) -> PreTrainedTokenizerFast:
    """Load the fast Hugging Face tokenizer of a folder. Raises UserError as `load` does."""
    check_vocabulary(path)
    tokenizer_class = PreTrainedTokenizerFast if (path / "tokenizer.json").is_file() else AutoTokenizer
    try:
        if not path.is_dir():
            raise OSError("no such file or folder")
        tokenizer = tokenizer_class.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        files = tokenizer.vocab_files_names.values()
        if files and not any((path / name).is_file() for name in files):
            raise OSError("it holds no vocabulary")  # some classes have a default vocabulary
    except Exception as error:  # the tokenizers package raises nothing narrower
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"No tokenizer can be read from {path} ({reason}): give a folder with tokenizer.json, or a sentencepiece .model."
        ) from error
    if not tokenizer.is_fast:
        raise UserError(
            f"The tokenizer in {path} is {type(tokenizer).__name__}, which has no fast version: give a folder with tokenizer.json, "
            "or a sentencepiece .model."
        )
    return tokenizer


def open_tokenizer(config: DataConfig, model: str | os.PathLike, vocab_size: int | None) -> Tokenizer:
    """The tokenizer of a run: `data.tokenizer`, or the one in the model's Hugging Face folder.

    Args:
        model: the model's Hugging Face folder.
        vocab_size: rows of the model's embedding; None if they are not known.

    The tokenizer may have ids without a row in the embedding, such as a padding token. A text that uses one is refused when it is
    read.

    Raises:
        UserError: see `load`; the id that ends each document has no row in the embedding.
    """
    tokenizer = load(config.tokenizer or model, model)
    if vocab_size is not None and tokenizer.eos >= vocab_size:
        raise UserError(
            f"The tokenizer {config.tokenizer or model} ends documents with token {tokenizer.eos}, the model's embedding has "
            f"{vocab_size} rows: give the model's own with data.tokenizer=/path."
        )
    tokenizer.rows = vocab_size
    return tokenizer
