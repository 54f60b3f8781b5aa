"""Writes .bin/.idx pairs: the documents of a text file, or of other pairs."""

import array
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np

from minitron_mcore.data.loss_mask import loss_mask, mask_prefix, write_ones
from minitron_mcore.data.text_reader import MASK_SUFFIX, WHOLE_FILE, Limits, Part, Text, documents
from minitron_mcore.data.token_files import DType, index_header, sequence_lengths
from minitron_mcore.data.tokenizer import Tokenizer

PAIR = "tokens"
"""Name of the pair in a folder of its own."""


def create_folder(folder: str | Path, fill: Callable[[str], object]) -> None:
    """Fill a temporary folder and rename it to `folder` when complete, so that `folder` is never partial."""
    if os.path.isdir(folder):
        return
    unfinished = f"{folder}.unfinished-{uuid.uuid4().hex[:8]}"
    try:
        os.makedirs(unfinished)
        fill(unfinished)
        os.rename(unfinished, folder)
    except OSError:
        if not os.path.isdir(folder):  # otherwise another run created it first
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def encode(
    path: str,
    tokenizer: Tokenizer,
    prefix: str,
    limits: Limits,
    part: Part = WHOLE_FILE,
    key: str = "text",
    on_batch: Callable[[int, int], None] = lambda tokens, position: None,
) -> tuple[int, int]:
    """Tokenise the documents of a text file, or of a part of it, into the pair `prefix`, with a loss mask if a
    document has tokens that do not count.

    Args:
        on_batch: called with the number of tokens so far and the position in the file, in bytes, after each batch of documents.
        part, key: see `documents`.

    Returns:
        number of documents and of tokens.

    Raises:
        UserError: see `documents` and `Tokenizer.documents`.
    """
    dtype, lengths, tokens = np.dtype(DType.optimal_dtype(tokenizer.vocab_size)), array.array("i"), 0
    masks: IO[bytes] | None = None
    with open(f"{prefix}.bin", "wb") as file:
        for texts, position in documents(path, limits, part, key, tokenizer.chat.conversation):
            for ids, mask in _encoded(tokenizer, texts):
                file.write(np.asarray(ids, dtype).tobytes())
                if masks is None and not mask.all():
                    masks = open(f"{prefix}{MASK_SUFFIX}.bin", "wb")  # noqa: SIM115
                    write_ones(masks, tokens)
                if masks is not None:
                    masks.write(mask.tobytes())
                lengths.append(len(ids))
                tokens += len(ids)
            on_batch(tokens, position)
        _sync(file)
    if masks is not None:
        _sync(masks)
        masks.close()
        _write_index(prefix + MASK_SUFFIX, np.dtype(np.uint8), np.array(lengths, np.int32))
    _write_index(prefix, dtype, np.array(lengths, np.int32))
    return len(lengths), tokens


def _encoded(tokenizer: Tokenizer, texts: list[Text]) -> Iterator[tuple[list[int], np.ndarray]]:
    """Ids and loss mask of each document."""
    if all(text.loss_spans is None for text in texts):
        yield from ((ids, np.ones(len(ids), np.uint8)) for ids in tokenizer.documents(texts))
        return
    for text, spans in zip(texts, tokenizer.spans(texts), strict=True):
        yield spans.ids, loss_mask(text, spans)


def concatenate(prefixes: Sequence[str], prefix: str, dtype: np.dtype) -> None:
    """Write the documents of several pairs, whose ids have this type, as the pair `prefix`, with their loss masks."""
    lengths, masks = [sequence_lengths(each) for each in prefixes], [mask_prefix(each) for each in prefixes]
    if any(masks):
        with open(f"{prefix}{MASK_SUFFIX}.bin", "wb") as file:
            for mask, sizes in zip(masks, lengths, strict=True):
                if mask:
                    _copy(mask, file)
                else:
                    write_ones(file, int(sizes.sum(dtype=np.int64)))
            _sync(file)
        _write_index(prefix + MASK_SUFFIX, np.dtype(np.uint8), np.concatenate(lengths))
    with open(f"{prefix}.bin", "wb") as file:
        for each in prefixes:
            _copy(each, file)
        _sync(file)
    _write_index(prefix, dtype, np.concatenate(lengths))


def _copy(prefix: str, file: IO[bytes]) -> None:
    with open(f"{prefix}.bin", "rb") as source:
        shutil.copyfileobj(source, file, 1 << 22)


def _write_index(prefix: str, dtype: np.dtype, lengths: np.ndarray) -> None:
    """Write the index of documents of one sequence each, of these lengths [N] int32, as megatron-core's builder does.

    The builder holds lists of Python integers, several gigabytes for the documents of a large corpus.
    """
    with open(f"{prefix}.idx", "wb") as file:
        file.write(index_header(dtype, len(lengths), len(lengths) + 1))
        file.write(lengths.tobytes())
        file.write(((np.cumsum(lengths, dtype=np.int64) - lengths) * dtype.itemsize).tobytes())
        file.write(np.arange(len(lengths) + 1, dtype=np.int64).tobytes())
        _sync(file)


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())
