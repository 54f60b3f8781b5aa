"""Megatron's .bin/.idx pairs, opened after a check of the index against the sizes of both files.

An index has a header (34 bytes), the lengths (int32) and offsets in the .bin (int64) of n sequences, and d document boundaries
(int64), which are sequence numbers from 0 to n.
"""

import functools
import os
import struct
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from minitron_mcore.errors import UserError
from minitron_mcore.parallel.megatron_patches import cpu_backend
from minitron_mcore.reading import first_line

cpu_backend.prepare()

from megatron.core.datasets import blended_megatron_dataset_config as splits  # noqa: E402  # isort: skip
from megatron.core.datasets.indexed_dataset import DType as DType, IndexedDataset  # noqa: E402  # isort: skip

_HEADER = struct.Struct("<9sQBQQ")
_MAGIC, _LEGACY = b"MMIDIDX\x00\x00", b"TNTIDX\x00\x00"
_ROWS = 1 << 20  # index entries per check
BLOCK = 1 << 16  # bytes
SCAN_BYTES = 4 << 30
"""Size up to which all ids of a .bin are checked; of a larger one, 64 blocks of BLOCK bytes are."""


def open_tokens(prefix: str) -> IndexedDataset:
    """Open a .bin/.idx pair.

    Raises:
        UserError: the index is damaged, of another format or id type, or does not fit its .bin; a sequence is empty.
    """
    check_index(prefix)
    try:
        return IndexedDataset(prefix)
    except (AssertionError, ValueError, OSError, struct.error) as error:
        raise UserError(f"{prefix}.idx cannot be opened ({first_line(error)}): tokenise the text again.") from error


def check_index(prefix: str) -> np.dtype:
    """Check the whole index of a pair, without reading ids, and return the dtype of the ids. Raises as `open_tokens` does."""
    path = f"{prefix}.idx"
    try:
        with open(path, "rb") as file:
            start = file.read(_HEADER.size)
        size, stored = os.path.getsize(path), os.path.getsize(f"{prefix}.bin")
    except OSError as error:
        raise UserError(f"{path} and its .bin cannot be read ({error.strerror}): check the path.") from error
    dtype, sequences, documents = _header(path, start)
    stated = _HEADER.size + 12 * sequences + 8 * documents
    if stated != size:
        raise UserError(
            f"{path} says that it holds {sequences} sequences and {documents} document boundaries, which take {stated} bytes, "
            f"but the file has {size}: it is cut short or damaged, copy it again or tokenise the text again."
        )
    if sequences == 0:
        raise UserError(f"{path} holds no documents: give data with text.")
    _check_entries(path, dtype, sequences, documents, stored)
    return dtype


def _header(path: str, start: bytes) -> tuple[np.dtype, int, int]:
    """(dtype of the ids, number of sequences, number of document boundaries) from the first bytes of an index."""
    if start.startswith(_LEGACY):
        raise UserError(
            f"{path} is an index of the legacy format (TNTIDX): tokenise the text again in Megatron's (MMIDIDX)."
        )
    if len(start) < _HEADER.size or not start.startswith(_MAGIC):
        raise UserError(f"{path} is no index of Megatron's .bin/.idx format: it is damaged, or another kind of file.")
    _, version, code, sequences, documents = _HEADER.unpack(start)
    if version != 1:
        raise UserError(
            f"{path} has version {version} of Megatron's index, but version 1 is supported: tokenise the text again."
        )
    if code not in [kind.value for kind in DType]:
        raise UserError(
            f"{path} names type {code} for its ids, which is not known: it is damaged, tokenise the text again."
        )
    dtype = np.dtype(DType.dtype_from_code(code))
    if dtype.kind not in "iu":
        raise UserError(
            f"{path} says that {path[:-4]}.bin holds {dtype} numbers; token ids are integers: tokenise the text again."
        )
    return dtype, sequences, documents


def index_header(dtype: np.dtype, sequences: int, documents: int) -> bytes:
    """The first bytes of an index, from the type of the ids and the numbers of sequences and document boundaries."""
    return _HEADER.pack(_MAGIC, 1, DType.code_from_dtype(dtype.type), sequences, documents)


def sequence_lengths(prefix: str) -> np.ndarray:
    """Tokens of each sequence of a pair, [n] int32, read without a check of the index."""
    with open(f"{prefix}.idx", "rb") as file:
        *_, sequences, _ = _HEADER.unpack(file.read(_HEADER.size))
        return np.fromfile(file, np.int32, sequences)


def _check_entries(path: str, dtype: np.dtype, sequences: int, documents: int, stored: int) -> None:
    """Check that lengths and offsets describe `stored` bytes of contiguous sequences, and that boundaries ascend."""
    index = np.memmap(path, mode="r")
    lengths = np.frombuffer(index, np.int32, sequences, _HEADER.size)
    offsets = np.frombuffer(index, np.int64, sequences, _HEADER.size + 4 * sequences)
    end = 0
    for first in range(0, sequences, _ROWS):
        part = lengths[first : first + _ROWS].astype(np.int64)
        if (short := np.flatnonzero(part <= 0)).size:
            number, length = first + int(short[0]), int(part[short[0]])
            what = "is empty" if length == 0 else f"has length {length}"
            raise UserError(f"{path}: sequence {number} {what}: leave such a document out and tokenise the text again.")
        ends = end + np.cumsum(part) * dtype.itemsize
        starts = ends - part * dtype.itemsize
        if (wrong := np.flatnonzero(offsets[first : first + _ROWS] != starts)).size:
            raise UserError(
                f"{path}: sequence {first + int(wrong[0])} does not begin where the one before it ends: the index is damaged, "
                "copy it again or tokenise the text again."
            )
        end = int(ends[-1])
    if end != stored:
        raise UserError(
            f"{path} describes {end} bytes of ids ({end // dtype.itemsize} of type {dtype}), but {path[:-4]}.bin has {stored}: one "
            "of the two is cut short, damaged or of other data, copy both again."
        )
    bounds = np.frombuffer(index, np.int64, documents, _HEADER.size + 12 * sequences)
    if documents == 0 or bounds[0] != 0 or bounds[-1] != sequences or (bounds[1:] < bounds[:-1]).any():
        raise UserError(f"{path}: its document boundaries do not ascend from 0 to {sequences}: the index is damaged.")


def check_ids(prefix: str, vocab_size: int) -> None:
    """Check the ids of a pair, or samples of them (see `SCAN_BYTES`). `TokenStream.get` checks the others when it reads them.

    Raises:
        UserError: an id is negative or not below `vocab_size`; see `open_tokens`.
    """
    dtype, file = check_index(prefix), f"{prefix}.bin"
    size = os.path.getsize(file)
    starts = range(0, size, 64 * BLOCK) if size <= SCAN_BYTES else block_starts(size)
    length = 64 * BLOCK if size <= SCAN_BYTES else BLOCK
    for start in starts:
        block = np.fromfile(file, dtype, length // dtype.itemsize, offset=start - start % dtype.itemsize)
        check_range(block, vocab_size, prefix)


def check_range(ids: np.ndarray, vocab_size: int, prefix: str) -> None:
    """Refuse ids outside 0 .. vocab_size - 1, for which Megatron's sharded embedding would silently return zeros."""
    if not ids.size:
        return
    low, high = int(ids.min()), int(ids.max())
    if low < 0:
        raise UserError(
            f"{prefix}.bin holds token {low}; ids begin at 0: it is damaged, or of another type than {prefix}.idx says."
        )
    if high >= vocab_size:
        raise UserError(
            f"{prefix}.bin holds token {high}, and the model's embedding has {vocab_size} rows: tokenise the text with "
            "the model's own tokenizer."
        )


def block_starts(size: int) -> list[int]:
    """First bytes of 64 evenly spaced blocks of BLOCK bytes, which cover a file of up to 4 MiB completely."""
    return sorted({max(0, size - BLOCK) * i // 63 for i in range(64)})


Share = tuple[float, float]
"""From and to: documents of a pair, in shares of their number."""
WHOLE_PAIR: Share = (0.0, 1.0)


def split_share(split: str | None, name: str) -> Share:
    """Share of each pair's documents that belong to a split, as megatron-core computes it.

    Args:
        split: `data.split`, such as "98,2,0"; None gives all documents to every split.
        name: "train" or "valid".

    Raises:
        UserError: the split has no documents.
    """
    if split is None:
        return WHOLE_PAIR
    matrix = splits.convert_split_vector_to_split_matrix(splits.parse_and_normalize_split(split))
    if (share := matrix[splits.Split[name].value]) is None:
        raise UserError(f'data.split is "{split}", which leaves no documents to {name}: give shares, as "98,2,0".')
    return share


class Stream(ABC):
    """Documents with a number for each token, with the interface of megatron-core's low-level datasets."""

    sequence_lengths: np.ndarray
    """[n] tokens of each document."""

    @abstractmethod
    def get(self, document: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """The numbers of `length` tokens of a document; None: up to its end."""

    def __len__(self) -> int:
        return len(self.sequence_lengths)

    @functools.cached_property
    def document_starts(self) -> np.ndarray:
        """[n] int64, position of each document's first token in the concatenation."""
        return np.cumsum(self.sequence_lengths, dtype=np.int64) - self.sequence_lengths

    def tokens(self, start: int, count: int) -> np.ndarray:
        """The numbers of tokens start .. start + count of the concatenation, [count] int64."""
        pieces, document = [], int(np.searchsorted(self.document_starts, start, side="right")) - 1
        while count:
            offset = start - int(self.document_starts[document])
            length = min(count, int(self.sequence_lengths[document]) - offset)
            pieces.append(self.get(document, offset, length).astype(np.int64))
            start, count, document = start + length, count - length, document + 1
        return np.concatenate(pieces)


class TokenStream(Stream):
    """Concatenation of .bin/.idx pairs, or of a share of each.

    Raises:
        UserError: a damaged pair, or no document in the share, when it is opened; a token id that is not below
            `vocab_size`, when it is read.
    """

    def __init__(self, prefixes: Sequence[str], vocab_size: int, share: Share = WHOLE_PAIR):
        self.prefixes, self.vocab_size = list(prefixes), vocab_size
        self.parts = [open_tokens(prefix) for prefix in prefixes]
        # As megatron-core rounds them in BlendedMegatronDatasetBuilder.
        ends = [[int(round(end * float(len(part)))) for end in share] for part in self.parts]
        if not any(last - first for first, last in ends):
            raise UserError(
                f"{', '.join(prefixes)}: no document lies between the shares {share[0]:.4g} and {share[1]:.4g} of all documents, "
                "which data.split gives: give more text or other shares."
            )
        self.first_documents = [first for first, _ in ends]
        self.part_starts = np.cumsum([0, *(last - first for first, last in ends)])
        lengths = [part.sequence_lengths[first:last] for part, (first, last) in zip(self.parts, ends, strict=True)]
        self.sequence_lengths = np.concatenate(lengths)
        self.num_tokens = int(self.sequence_lengths.sum(dtype=np.int64))

    def locate(self, document: int) -> tuple[int, int]:
        """Number of a document's pair, and of the document in it."""
        part = int(np.searchsorted(self.part_starts, document, side="right")) - 1
        return part, int(document - self.part_starts[part]) + self.first_documents[part]

    def get(self, document: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        part, stored = self.locate(document)
        ids = self.parts[part].get(stored, offset, length)
        check_range(ids, self.vocab_size, self.prefixes[part])
        return ids

    def check_documents(self) -> None:
        """
        Raises:
            UserError: documents that consist of several sequences, whose boundaries samples do not show.
        """
        for prefix, part in zip(self.prefixes, self.parts, strict=True):
            if (documents := len(part.document_indices) - 1) != len(part):
                raise UserError(
                    f"{prefix}.idx has {documents} documents of {len(part)} sequences, but data.document_mask needs one sequence a "
                    "document: tokenise the text again without splitting sentences, or set it to false."
                )
