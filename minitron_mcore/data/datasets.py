"""Training batches and calibration samples from Megatron's .bin/.idx pairs.

Training uses megatron-core's GPTDataset and BlendedDataset. Pairs without weights form one dataset. Pairs with weights are blended
in exact proportions.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minitron_mcore.config.settings import DataConfig
from minitron_mcore.data.loss_mask import MaskStream, mask_prefix
from minitron_mcore.data.pair_writer import create_folder
from minitron_mcore.data.token_files import BLOCK, WHOLE_PAIR, Share, TokenStream, block_starts, split_share
from minitron_mcore.errors import UserError
from minitron_mcore.parallel import process_groups
from minitron_mcore.parallel.prefetch import run_ahead
from minitron_mcore.parallel.schedule import Batch
from minitron_mcore.reading import damage_as_user_error

from megatron.core.datasets.blended_dataset import BlendedDataset  # isort: skip
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig  # isort: skip
from megatron.core.datasets.utils import Split  # isort: skip

CACHE_REMEDY = "remove that folder, which is made again"
_FIELDS = ("tokens", "labels", "loss_mask", "position_ids")


def data_hash(prefixes: Sequence[str]) -> str:
    """16 hex digits that identify the tokens of .bin/.idx pairs and their loss masks, independent of their paths.

    SHA-256 over each whole .idx and 64 evenly spaced blocks of each .bin.
    """
    digest = hashlib.sha256()
    for pair in filter(None, itertools.chain.from_iterable((prefix, mask_prefix(prefix)) for prefix in prefixes)):
        with open(f"{pair}.idx", "rb") as index, open(f"{pair}.bin", "rb") as file:
            digest.update(hashlib.file_digest(index, "sha256").digest())
            size = file.seek(0, os.SEEK_END)
            digest.update(size.to_bytes(8, "little"))
            for start in block_starts(size):
                file.seek(start)
                digest.update(file.read(BLOCK))
    return digest.hexdigest()[:16]


def _largest_remainder(weights: Sequence[float], total: int) -> list[int]:
    """Split `total` into integers proportional to the weights, by the largest-remainder method."""
    shares = np.asarray(weights, dtype=np.float64) / sum(weights) * total
    counts = np.floor(shares).astype(np.int64)
    counts[np.argsort(counts - shares, kind="stable")[: total - counts.sum()]] += 1
    return counts.tolist()


@dataclasses.dataclass(frozen=True)
class SampleOrder:
    """All that determines which training samples a run reads, and in which order. It is independent of the parallel layout."""

    prefixes: Sequence[str]
    """Of the .bin/.idx pairs."""
    weights: Sequence[float] | None
    """Blend weight of each prefix; None for one shuffled pool of documents."""
    seed: int
    sequence_length: int
    num_samples: int
    document_mask: bool = False
    """Samples have "document_starts" (see `Samples.batch`)."""
    share: Share = WHOLE_PAIR
    """Documents of each pair that are read."""

    @classmethod
    def of(
        cls,
        data: DataConfig,
        prefixes: Sequence[str],
        weights: Sequence[float] | None,
        sequence_length: int,
        num_samples: int,
    ) -> "SampleOrder":
        """The order of a run's samples, from what `token_cache.prepare` returns."""
        share = split_share(data.split, "train")
        return cls(prefixes, weights, data.seed, sequence_length, num_samples, data.document_mask, share)

    def counts(self) -> list[int]:
        """Number of samples from each prefix; without weights, one number for all prefixes together."""
        return _largest_remainder(self.weights or [1.0], self.num_samples)

    def digest(self) -> str:
        """16 hex digits that identify the order, independent of the paths."""
        order: list[Any] = [data_hash(self.prefixes), self.weights, self.counts(), self.seed, self.sequence_length]
        order += ["document_mask"] if self.document_mask else []
        order += [] if self.share == WHOLE_PAIR else [self.share]
        return hashlib.sha256(json.dumps(order).encode()).hexdigest()[:16]


class Samples:
    """The training samples of a SampleOrder. The constructor is collective.

    Args:
        order: number and sequence of the samples.
        cache: folder for megatron-core's index files, which rank 0 builds.
        vocab_size: rows of the model's embedding.

    Raises:
        UserError: a dataset has fewer tokens than one sample (S + 1); a damaged loss mask; documents of several sequences under
            `document_mask`; a token id is not below `vocab_size`, when it is read.
    """

    def __init__(self, order: SampleOrder, cache: str, vocab_size: int):
        self.order = order
        groups = [order.prefixes] if order.weights is None else [[prefix] for prefix in order.prefixes]
        self._streams = [TokenStream(group, vocab_size, order.share) for group in groups]
        for group, stream in zip(groups, self._streams, strict=True):
            if order.document_mask:
                stream.check_documents()
            if stream.num_tokens <= order.sequence_length:
                size = f"{stream.num_tokens} tokens are fewer than one sample of {order.sequence_length} + 1"
                raise UserError(f"{', '.join(group)}: {size}: give more text or a shorter sequence.")
        folder = os.path.join(cache, f"order-{order.digest()}")
        masks = [MaskStream(stream) for stream in self._streams]
        process_groups.on_rank_0(lambda: create_folder(folder, lambda part: self._build(part, self._streams)))
        with process_groups.raise_on_all_ranks(), damage_as_user_error(folder, CACHE_REMEDY):
            self._dataset = self._build(folder, self._streams)
            # The documents have the same lengths, so the samples are of the same places.
            needed = any(mask.is_needed for mask in masks)
            self._masks = self._build(folder, masks) if needed else None

    def _build(self, cache: str, streams: Sequence[TokenStream | MaskStream]) -> Any:
        """megatron-core's dataset of the order's samples, of tokens or of masks."""
        config = GPTDatasetConfig(
            random_seed=self.order.seed,
            sequence_length=self.order.sequence_length,
            blend=([str(i) for i in range(len(self._streams))], None),
            split="1,0,0",
            path_to_cache=cache,
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
            inter_document_masking=self.order.document_mask,
            # The dataset requires a tokenizer but does not use it: the data are token ids, and EOS is not masked.
            tokenizer=SimpleNamespace(eod=None, vocab_size=None, unique_identifiers={}),
        )
        counts = self.order.counts()
        datasets = [
            GPTDataset(stream, str(i), np.arange(len(stream), dtype=np.int32), count, Split.train, config)
            for i, (stream, count) in enumerate(zip(streams, counts, strict=True))
            if count
        ]
        return datasets[0] if len(datasets) == 1 else BlendedDataset(datasets, [c for c in counts if c], None, config)

    def batch(self, rows: Sequence[int]) -> Batch:
        """The samples at these positions of the order as one microbatch of B = len(rows) samples, in host memory, from which the
        copy to a CUDA device is asynchronous (see `to_device`).

        Returns:
            tokens, labels (the next tokens) and position_ids [B, S] int64, samples [B] int64 (`rows`), and loss_mask [B, S]
            float32, 0 where the label does not count in the loss.
            With the order's `document_mask` also document_starts [B, S] int64, the position in the sample at which each token's
            document begins; position_ids then count from it.
        """
        with damage_as_user_error(self._dataset.config.path_to_cache, CACHE_REMEDY):
            samples = [self._dataset[row] for row in rows]
            masks = [self._masks[row]["labels"] for row in rows] if self._masks else None
        batch = {key: torch.stack([sample[key] for sample in samples]) for key in _FIELDS}
        if masks:
            batch["loss_mask"] *= torch.stack(masks)
        batch["samples"] = torch.tensor(rows)
        if self.order.document_mask:
            batch["document_starts"] = torch.arange(self.order.sequence_length) - batch["position_ids"]
        return {key: tensor.pin_memory() for key, tensor in batch.items()} if torch.cuda.is_available() else batch


def to_device(batch: Batch) -> Batch:
    """A microbatch of `Samples.batch` on this rank's device."""
    return {key: tensor.to(process_groups.device(), non_blocking=True) for key, tensor in batch.items()}


def train_batches(
    samples: Samples,
    *,
    micro_batch_size: int,
    global_batch_size: int,
    num_samples: int,
    consumed_samples: int = 0,
    dp_rank: int = 0,
    dp_size: int = 1,
    prefetch: int = 0,
) -> Iterator[Batch]:
    """Microbatches of one data-parallel rank, with the tensors of `Samples.batch`, on this rank's device.

    Global batch k holds samples k * GBS .. (k + 1) * GBS. In it, microbatch m of data-parallel rank r starts at sample
    (m * dp_size + r) * micro_batch_size, as in Megatron's sampler. All tensor-, context- and pipeline-parallel ranks of one
    data-parallel rank read the same microbatches.

    Args:
        num_samples: of the whole run. Beyond the end of `samples`, their order repeats from its start.
        consumed_samples: where a resumed run continues.
        prefetch: global batches that a thread reads ahead; 0 reads a microbatch when it is needed. The order is the same.

    Raises:
        UserError: `global_batch_size` is not a multiple of micro_batch_size * dp_size.
    """
    step = micro_batch_size * dp_size
    if global_batch_size % step:
        parts = f"microbatches of {micro_batch_size} on {dp_size} data-parallel ranks"
        raise UserError(f"A global batch of {global_batch_size} cannot be made of {parts}: give a multiple of {step}.")
    end = num_samples - (num_samples - consumed_samples) % global_batch_size
    starts = range(consumed_samples + dp_rank * micro_batch_size, end, step)
    total = samples.order.num_samples
    rows = ([(start + n) % total for n in range(micro_batch_size)] for start in starts)
    reads = (functools.partial(samples.batch, each) for each in rows)
    ahead = prefetch * (global_batch_size // step)
    return map(to_device, run_ahead(reads, 1, ahead) if ahead else (read() for read in reads))


def calibration(
    prefixes: Sequence[str],
    *,
    vocab_size: int,
    sequence_length: int,
    num_samples: int,
    seed: int,
    whole_documents: bool = False,
    share: Share = WHOLE_PAIR,
) -> tuple[Tensor, Tensor]:
    """Draw N samples at random without replacement from the concatenation of all pairs. Blend weights do not apply.

    A sample is one of the disjoint windows of S tokens or, with `whole_documents`, the first S tokens of a document.

    Returns:
        tokens [N, S] int64 and mask [N, S] bool (False on padding), on the CPU, identical on every rank.

    Raises:
        UserError: the data have fewer than N windows or documents; a token id is not below `vocab_size`.
    """
    stream = TokenStream(prefixes, vocab_size, share)
    available = len(stream) if whole_documents else stream.num_tokens // sequence_length
    if available < num_samples:
        kind = "documents" if whole_documents else f"windows of {sequence_length} tokens"
        raise UserError(f"The data holds {available} {kind}, not {num_samples}: take fewer samples or more text.")
    tokens = torch.zeros(num_samples, sequence_length, dtype=torch.int64)
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    for row, i in enumerate(np.random.default_rng(seed).choice(available, num_samples, replace=False).tolist()):
        length = min(sequence_length, int(stream.sequence_lengths[i])) if whole_documents else sequence_length
        start = int(stream.document_starts[i]) if whole_documents else i * sequence_length
        tokens[row, :length] = torch.from_numpy(stream.tokens(start, length))
        mask[row, :length] = True
    return tokens, mask
