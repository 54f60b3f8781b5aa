"""How the distillation loss cuts its tokens and adds up the head's gradient: a failure means a wrong gradient or too much
memory."""

import pytest
import torch

from minitron_mcore.distill import losses, tile_sizes

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("device", ["cpu", "meta", pytest.param("cuda", marks=needs_gpu)])
def test_head_gradient_is_added_to_a_fp32_sum(device, dtype, first):
    """On meta tensors: that torch has the product which sums in fp32, with `out`; its numbers exist on CUDA only."""
    g = torch.Generator().manual_seed(0)
    total, d_logits, hidden = (torch.randn(*shape, generator=g) for shape in ((40, 8), (100, 40), (100, 8)))
    d_logits, hidden = d_logits.to(dtype), hidden.to(dtype)
    expected = d_logits.t().double() @ hidden.double()
    if first:
        total.fill_(torch.nan)
    else:
        expected += total
    total, *factors = (x.to(device) for x in (total, d_logits, hidden))
    assert losses._product_accumulates(total, factors[0]) == (device != "cpu")
    losses._accumulate_head_gradient(total, *factors, 64, first)
    if device != "meta":
        rounded = device == "cpu" and dtype != torch.float32  # a CPU rounds the product before it is added
        assert (total.cpu() - expected).abs().max() <= (4e-3 if rounded else 1e-5) * expected.abs().max()


def test_a_chunk_on_an_h100_takes_at_most_2_gb_beyond_inputs_and_gradients():
    """8,192 tokens, vocabulary 128,256, student's H 3072, bf16: both logits of a chunk, and what the fp32 sum of the head's
    gradient takes more than the bf16 gradient."""
    row, head = 2 * 128_256, 128_256 * 3072
    tokens = tile_sizes.chunk_tokens(8192, 2 * row, tile_sizes.CHUNK_BYTES["cuda"])
    assert tokens == 2048 and tokens * 2 * row + (4 - 2) * head < 2e9
