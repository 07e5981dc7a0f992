"""The compiled greedy chain drafts what the plain one does, for any number of blocks."""

import pytest
import torch

from dspark.drafters.greedy_markov import GreedyMarkov
from dspark.models.cpu_ops import CompiledLinear, available

pytestmark = pytest.mark.skipif(not available(), reason="needs an x86 CPU with FMA and PyTorch on GNU OpenMP")


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matches_argmax_slot_by_slot(dtype: torch.dtype):
    torch.manual_seed(0)
    vocab, rank, g = 96, 32, 3
    w1, d2t = torch.randn(200, rank), torch.randperm(200)[:vocab].sort().values
    w2 = CompiledLinear(torch.randn(vocab, rank).to(dtype))
    chain = GreedyMarkov(w1, w2, d2t)
    for r in (1, 5, 40, 2):
        logits, previous = torch.randn(r, g, vocab), torch.randint(0, 200, (r,))
        logits[0, 1, 7] = logits[0, 1, 70] = 1e30  # of equals the first
        tokens, embeddings, largest = chain(previous, logits)
        assert tokens.shape == (r, g) and embeddings.shape == (r, g, rank)
        for k in range(g):
            assert torch.equal(embeddings[:, k], w1[previous])
            biased = logits[:, k] + w2(w1[previous])
            expected = d2t[biased.argmax(-1)]
            torch.testing.assert_close(largest[:, k], biased.softmax(-1).amax(-1), rtol=1e-5, atol=1e-6)
            if k == 1:
                expected[0] = d2t[7]
            assert torch.equal(tokens[:, k], expected)
            previous = expected


def test_nan_logits_give_a_token_of_the_vocabulary():
    d2t = torch.arange(0, 64, 2)
    chain = GreedyMarkov(torch.randn(64, 16), CompiledLinear(torch.randn(32, 16)), d2t)
    tokens, _, _ = chain(torch.tensor([1, 2]), torch.full((2, 4, 32), torch.nan))
    assert bool(torch.isin(tokens, d2t).all())
