"""Held-out text as windows of equal length, from text files or .bin/.idx pairs, and which of their tokens are predicted."""

import collections
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from minitron_mcore.config import ranges
from minitron_mcore.config.settings import DataConfig
from minitron_mcore.data import token_cache
from minitron_mcore.data.loss_mask import MaskStream, loss_mask
from minitron_mcore.data.text_reader import Limits, documents, is_prefix
from minitron_mcore.data.token_files import WHOLE_PAIR, Share, TokenStream, split_share
from minitron_mcore.data.tokenizer import Spans, Tokenizer
from minitron_mcore.errors import UserError, refuse
from minitron_mcore.parallel import process_groups


class Windows(NamedTuple):
    """A text as n windows of S tokens. Each token where `mask` is True is predicted from the tokens before it in its window."""

    tokens: Tensor
    """[n, S] int64"""
    mask: Tensor
    """[n, S] bool; False on the first token of a window, on added EOS and BOS, on padding, and where a token does not count"""
    num_bytes: Tensor | None
    """[n] int64, UTF-8 bytes of the predicted tokens; None if they are not known"""
    document_starts: Tensor | None = None
    """[n, S] int64, position in the window of each token's document; None: tokens see the documents before their own"""


class _Columns(NamedTuple):
    """Successive tokens of documents, [T] each."""

    ids: np.ndarray
    predicted: np.ndarray
    """False where a token does not count"""
    positions: np.ndarray
    """in the document"""
    num_bytes: np.ndarray | None


def _token_bytes(text: str, spans: Spans) -> np.ndarray:
    """UTF-8 bytes of each token [T]; the sum is that of the text.

    Characters without a token count for the next token, or for the last one. A character split over tokens counts for one of them.
    """
    codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    utf8_ends = np.cumsum(np.concatenate([[0], 1 + (codes > 0x7F) + (codes > 0x7FF) + (codes > 0xFFFF)]))
    token_ends = np.maximum.accumulate(np.asarray(spans.ends, dtype=np.int64))
    text_tokens = np.flatnonzero(~np.asarray(spans.special, dtype=bool))
    if len(text_tokens):
        token_ends[text_tokens[-1] :] = len(text)
    return np.diff(utf8_ends[token_ends], prepend=0)


def file_windows(
    path: str,
    tokenizer: Tokenizer,
    sequence_length: int,
    limits: Limits | None = None,
    max_windows: int | None = None,
    document_mask: bool = False,
) -> Windows:
    """The windows of a text file: its documents, each followed by EOS, as one stream that is split every S tokens.

    The last window is padded with EOS. Windows without a predicted token are dropped.

    Args:
        path: may also be the prefix of a .bin/.idx pair (see `pair_windows`).
        limits: on documents; None for the default.
        max_windows: of a pair.
        document_mask: with `Windows.document_starts`.

    Raises:
        UserError: the file is missing, not text, above the limits, or has no token to predict; see `pair_windows`.
    """
    if is_prefix(path):
        return pair_windows([path], tokenizer, sequence_length, WHOLE_PAIR, max_windows, document_mask)
    ids, predicted, positions, sizes = [], [], [], []
    for texts, _ in documents(path, limits, conversation=tokenizer.chat.conversation):
        for text, spans in zip(texts, tokenizer.spans(texts), strict=True):
            ids.append(np.asarray(spans.ids, dtype=np.int64))
            predicted.append(~np.asarray(spans.special, dtype=bool) & (loss_mask(text, spans) > 0))
            positions.append(np.arange(len(spans.ids)))
            sizes.append(_token_bytes(text, spans))
    if not ids:
        raise UserError(f"{path} holds no text.")
    columns = _Columns(*map(np.concatenate, (ids, predicted, positions, sizes)))
    return _split(path, columns, tokenizer.eos, sequence_length, document_mask)


def pair_windows(
    prefixes: Sequence[str],
    tokenizer: Tokenizer,
    sequence_length: int,
    share: Share,
    max_windows: int | None,
    document_mask: bool,
) -> Windows:
    """The windows of a share of .bin/.idx pairs as one stream: those of the text that `tokenizer` made them of, without bytes.

    BOS and EOS at the ends of documents are not predicted. Of more than `max_windows`, only that many are read, evenly spaced.

    Raises:
        UserError: see `TokenStream`, `MaskStream` and, with `document_mask`, `TokenStream.check_documents`; no token to predict.
    """
    stream = TokenStream(prefixes, tokenizer.rows or tokenizer.vocab_size, share)
    if document_mask:
        stream.check_documents()
    masks, added = MaskStream(stream), tokenizer.spans([""])[0]
    bos = [token for token, special in zip(added.ids[:-1], added.special, strict=False) if special]

    def read(number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        start = number * sequence_length
        tokens = np.arange(start, min(start + sequence_length, stream.num_tokens))
        document = np.searchsorted(stream.document_starts, tokens, side="right") - 1
        positions = tokens - stream.document_starts[document]
        ids = stream.tokens(start, len(tokens))
        is_last = positions == stream.sequence_lengths[document] - 1
        special = (is_last & (ids == tokenizer.eos)) | ((positions == 0) & np.isin(ids, bos))
        return ids, (masks.tokens(start, len(tokens)) > 0) & ~special, positions

    numbers: Sequence[int] = range(-(-stream.num_tokens // sequence_length))
    if masks.is_needed:
        numbers = [number for number in numbers if read(number)[1][1:].any()] or [0]
    count = min(len(numbers), max_windows or len(numbers))
    parts = [read(numbers[n * len(numbers) // count]) for n in range(count)]
    columns = _Columns(*map(np.concatenate, zip(*parts, strict=True)), None)
    return _split(", ".join(prefixes), columns, tokenizer.eos, sequence_length, document_mask)


def _split(name: str, columns: _Columns, eos: int, length: int, document_mask: bool) -> Windows:
    """Windows of `length` tokens, without those in which no token is predicted."""

    def cut(column: np.ndarray, fill: int) -> Tensor:
        padded = np.pad(column, (0, -len(column) % length), constant_values=fill)
        return torch.from_numpy(padded).reshape(-1, length)

    tokens, mask, num_bytes, starts = cut(columns.ids, eos), cut(columns.predicted, False), None, None
    mask[:, 0] = False
    used = mask.any(dim=1)
    if not used.any():
        raise UserError(f"{name} holds no token to predict: windows of {length} need two tokens of text.")
    if columns.num_bytes is not None:
        num_bytes = (cut(columns.num_bytes, 0) * mask).sum(dim=1)[used]
    if document_mask:
        starts = (torch.arange(length) - cut(columns.positions, 0)).clamp(min=0)[used]
    return Windows(tokens[used], mask[used], num_bytes, starts)


def heldout_windows(
    config: DataConfig, tokenizer: Tokenizer, sequence_length: int, max_windows: int | None
) -> tuple[dict[str, Windows], dict[str, float] | None]:
    """The windows of each text of `data.heldout` or, without it, of the valid part of the training text (collective).

    The valid part is Megatron-LM's: without weights in the blend one stream of all files, otherwise a text for each file.

    Args:
        tokenizer: of `open_tokenizer`.

    Returns:
        Windows by name, and the weights of a valid part's texts in the blend.

    Raises:
        UserError: no held-out text; see `file_windows`, `pair_windows` and `token_cache.prepare`.
    """
    refuse(ranges.heldout_text(config))
    options = max_windows, config.document_mask
    if config.heldout:
        with process_groups.raise_on_all_ranks():
            limits = Limits.of(config)
            return {
                path: file_windows(path, tokenizer, sequence_length, limits, *options) for path in config.heldout
            }, None
    prefixes, weights = token_cache.prepare(config, tokenizer, tokenizer.rows, "valid")
    texts, total = {}, collections.Counter()
    with process_groups.raise_on_all_ranks():
        share = split_share(config.split, "valid")
        for pool, weight in (
            [(prefixes, 1.0)] if weights is None else zip([[p] for p in prefixes], weights, strict=True)
        ):
            name = f"{pool[0]}{f' and {len(pool) - 1} more' if pool[1:] else ''} (valid)"
            texts[name] = pair_windows(pool, tokenizer, sequence_length, share, *options)
            total[name] += weight
    return texts, weights and dict(total)


def spread(windows: Windows, limit: int | None) -> Windows:
    """At most `limit` of the windows, spread evenly over the text; None keeps all."""
    count = len(windows.tokens)
    if limit is None or count <= limit:
        return windows
    kept = torch.arange(limit) * count // limit
    return Windows(*(column if column is None else column[kept] for column in windows))
