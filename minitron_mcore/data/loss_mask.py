"""Loss masks: which tokens of documents count in the loss, stored beside a .bin/.idx pair as PREFIX.mask.bin and PREFIX.mask.idx.

A mask is a pair of the same documents with a byte for each token: 1 if the loss predicts the token, otherwise 0. A pair without a
mask counts all its tokens.
"""

from typing import IO

import numpy as np

from minitron_mcore.data.text_reader import MASK_SUFFIX, Text, is_prefix
from minitron_mcore.data.token_files import TokenStream, open_tokens
from minitron_mcore.data.tokenizer import Spans
from minitron_mcore.errors import UserError

_CHUNK = 1 << 20


def mask_prefix(prefix: str) -> str | None:
    """Prefix of a pair's mask; None if it has none."""
    return prefix + MASK_SUFFIX if is_prefix(prefix + MASK_SUFFIX) else None


def loss_mask(text: Text, spans: Spans) -> np.ndarray:
    """[T] uint8: 1 for the tokens whose last character is in one of `text.loss_spans`, or for all without them.

    The EOS that ends the document counts if a span reaches the end of the text. In a conversation a token that holds the last
    character of a span counts too where it is longer than the span, as in transformers' masks.
    """
    if text.loss_spans is None:
        return np.ones(len(spans.ids), np.uint8)
    in_span = np.zeros(len(text) + 1, np.uint8)  # entry c: the character before position c
    for first, end in text.loss_spans:
        in_span[first + 1 : end + 1] = 1
    special = np.asarray(spans.special, dtype=bool)
    mask = in_span[np.where(special, 0, spans.ends)]
    if text.is_chat:
        last = np.searchsorted(np.maximum.accumulate(spans.ends), [end for _, end in text.loss_spans])
        mask[last.clip(max=len(mask) - 1)] = 1
    if special[-1]:
        mask[-1] = any(end == len(text) for _, end in text.loss_spans)
    return mask


def write_ones(file: IO[bytes], count: int) -> None:
    """Write the mask of `count` tokens that count."""
    for start in range(0, count, _CHUNK):
        file.write(b"\1" * min(_CHUNK, count - start))


class MaskStream:
    """The masks of a TokenStream's pairs, with its interface: a mask instead of ids.

    Raises:
        UserError: a damaged mask, or one of other documents than its pair's, when it is opened.
    """

    def __init__(self, stream: TokenStream):
        self.stream, self.sequence_lengths = stream, stream.sequence_lengths
        masks = [mask_prefix(prefix) for prefix in stream.prefixes]
        self.parts = [mask and open_tokens(mask) for mask in masks]
        for mask, part, tokens in zip(masks, self.parts, stream.parts, strict=True):
            if part is not None and not np.array_equal(part.sequence_lengths, tokens.sequence_lengths):
                raise UserError(f"{mask}.idx has other documents than the pair beside it: tokenise the text again.")
        self.is_needed = any(part is not None for part in self.parts)

    def __len__(self) -> int:
        return len(self.sequence_lengths)

    def get(self, document: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        part, stored = self.stream.locate(document)
        if (mask := self.parts[part]) is not None:
            return mask.get(stored, offset, length)
        rest = int(self.sequence_lengths[document]) - offset
        return np.ones(rest if length is None else length, np.uint8)
