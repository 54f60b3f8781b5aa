"""What samples know of their documents: a failure means that a token is assigned to a document that it is not in."""

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from minitron_mcore.data.datasets import SampleOrder, Samples
from minitron_mcore.errors import UserError

LENGTH, ROWS = 16, 60


def write_documents(prefix, lengths: list[int], first: int = 0) -> str:
    """Documents of these lengths; token p of document n is 100 (n + first) + p."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    for number, length in enumerate(lengths, first):
        builder.add_document(torch.arange(length) + 100 * number, [length])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def samples(prefixes, cache, weights=None, document_mask=True, rows=ROWS):
    order = SampleOrder(prefixes, weights, 5, LENGTH, rows, document_mask)
    return Samples(order, str(cache), 1 << 20).batch(range(rows))


@pytest.mark.parametrize("weights", [None, [0.3, 0.7]], ids=["pool", "blend"])
def test_document_starts_are_those_of_the_documents(tmp_path, weights):
    """Of one token, and longer than a sample; over several epochs of the shuffled documents."""
    lengths = [1, 5, 1, 1, 40, 3, 16, 17, 1, 2, 90]
    prefixes = [write_documents(tmp_path / "a", lengths), write_documents(tmp_path / "b", lengths[::-1], 50)]
    batch = samples(prefixes, tmp_path / "cache", weights)
    for tokens, starts, positions in zip(
        *(batch[k] for k in ("tokens", "document_starts", "position_ids")), strict=True
    ):
        # A sample's first token continues a document; any other is its document's first if its place there is 0.
        begins = torch.tensor([p == 0 or token % 100 == 0 for p, token in enumerate(tokens.tolist())])
        expected = torch.where(begins, torch.arange(LENGTH), 0).cummax(0).values
        assert torch.equal(starts, expected) and torch.equal(positions, torch.arange(LENGTH) - expected)
    plain = samples(prefixes, tmp_path / "cache", weights, document_mask=False)
    assert all(torch.equal(plain[key], batch[key]) for key in ("tokens", "labels", "loss_mask", "samples"))
    assert "document_starts" not in plain


def test_another_mask_is_another_order(tmp_path):
    prefixes = [write_documents(tmp_path / "a", [40, 60])]
    orders = [SampleOrder(prefixes, None, 5, LENGTH, 9, mask) for mask in (False, True)]
    assert orders[0].digest() != orders[1].digest()


def test_documents_of_several_sequences_are_refused(tmp_path):
    builder = IndexedDatasetBuilder(f"{tmp_path}/a.bin", dtype=np.int32)
    builder.add_document(torch.arange(60), [20, 40])
    builder.finalize(f"{tmp_path}/a.idx")
    with pytest.raises(
        UserError, match="1 documents of 2 sequences, but data.document_mask needs one sequence a document"
    ):
        samples([f"{tmp_path}/a"], tmp_path / "cache", rows=2)
    assert len(samples([f"{tmp_path}/a"], tmp_path / "cache", document_mask=False, rows=2)["tokens"]) == 2
