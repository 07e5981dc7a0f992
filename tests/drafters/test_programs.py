"""The compiled programs do what the operations do one by one, for any number of rows."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from dspark.drafters.bound import NUM_CANDIDATES, BoundDrafter, sampling_rows, slot_signals
from dspark.drafters.programs import BlockInputs, ContextProgram, MarkovProgram
from dspark.models.attention import store
from dspark.models.cpu_ops import CompiledLinear, available
from dspark.models.layers import rms_norm, rotary_table, rotate_
from dspark.sampling import SamplingParams
from dspark.spec.draft import Draft
from tests.tiny import tiny_config

pytestmark = pytest.mark.skipif(not available(), reason="needs an x86 CPU with FMA and PyTorch on GNU OpenMP")


WIDTH = 32  # of hidden states


def markov_program(w1: Tensor, w2: CompiledLinear, d2t: Tensor) -> MarkovProgram:
    return MarkovProgram(4, w1, w2, d2t, torch.linspace(-1, 1, WIDTH + w1.shape[1] + 1))


def drafted(
    chain: MarkovProgram, previous: Tensor, logits: Tensor, sampling: tuple[Tensor, Tensor] | None = None
) -> Draft:
    """Of hidden states that are zeros."""
    r, g, _ = logits.shape
    return chain(previous, logits, torch.zeros(r, g, WIDTH), torch.zeros(r), sampling=sampling)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matches_argmax_slot_by_slot(dtype: torch.dtype):
    torch.manual_seed(0)
    vocab, rank, g = 96, 32, 3
    w1, d2t = torch.randn(200, rank), torch.randperm(200)[:vocab].sort().values
    w2 = CompiledLinear(torch.randn(vocab, rank).to(dtype))
    chain = markov_program(w1, w2, d2t)
    for r in (1, 5, 40, 2):
        logits, previous = torch.randn(r, g, vocab), torch.randint(0, 200, (r,))
        logits[0, 1, 7] = logits[0, 1, 70] = 1e30  # of equals the first
        hidden, temperatures = torch.randn(r, g, WIDTH), torch.rand(r)
        draft = chain(previous, logits, hidden, temperatures)
        tokens, signals = draft.tokens, draft.signals
        assert tokens.shape == (r, g)
        embeddings, logprobs = torch.empty(r, g, rank), torch.empty(r, g, vocab)
        for k in range(g):
            embeddings[:, k] = w1[previous]
            biased = logits[:, k] + w2(w1[previous])
            expected = d2t[biased.argmax(-1)]
            logprobs[:, k] = biased.log_softmax(-1)
            if k == 1:
                expected[0] = d2t[7]
            assert torch.equal(tokens[:, k], expected)
            previous = expected
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        seen = logprobs.exp().amax(-1), entropy, torch.zeros(r, g), temperatures
        expected = slot_signals(hidden, embeddings, chain.confidence, *seen)
        expected[0, 1, 3] = signals[0, 1, 3]  # the entropy where two logits were 1e30
        torch.testing.assert_close(signals, expected, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_block_inputs_equal_their_operations_one_by_one(dtype: torch.dtype):
    torch.manual_seed(0)
    width, num_slots = 32, 3
    embedding, features = torch.randn(50, width), torch.randn(20, width).to(dtype)
    features[0] = torch.nan  # the slot of no position
    norms, mask = [torch.rand(width) for _ in range(2)], torch.randn(1, width)
    proj = CompiledLinear(torch.randn(width, 2 * width).to(dtype))
    inputs = BlockInputs(embedding, (norms[0], norms[1], mask), proj, 1e-5)
    for r in (1, 7, 20, 2):
        slots, tokens = torch.randint(1, 20, (r,)), torch.randint(0, 50, (r,))
        slots[0] = -1
        feature = torch.where(slots[:, None] < 0, 0.0, features[slots.clamp(min=0)].float())
        feature, token = rms_norm(feature, norms[0], 1e-5), rms_norm(embedding[tokens], norms[1], 1e-5)
        first, masks = (proj(torch.cat([feature, t.expand(r, -1)], 1)) for t in (token, mask))
        expected = torch.stack([first, masks, masks], 1).flatten(0, 1)
        assert torch.equal(inputs(features, slots, tokens, num_slots), expected)


def test_nan_logits_give_a_token_of_the_vocabulary():
    d2t = torch.arange(0, 64, 2)
    chain = markov_program(torch.randn(64, 16), CompiledLinear(torch.randn(32, 16)), d2t)
    for bad in (torch.nan, torch.inf, -torch.inf):
        logits, previous = torch.full((2, 4, 32), bad), torch.tensor([1, 2])
        logits[0, :, 5] = 1.0
        sampling = sampling_rows([request(temperature=0.7), request(top_p=0.9)]), torch.rand(2, 4, dtype=torch.float64)
        for block in (drafted(chain, previous, logits), drafted(chain, previous, logits, sampling)):
            assert bool(torch.isin(block.tokens, d2t).all())
        assert bool(torch.isin(block.support, d2t).all())
        torch.testing.assert_close(block.draft_probs.sum(-1), torch.ones(2, 4))


SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.2, "top_p": 0.9},
    {"top_k": 3},
    {"temperature": 2.5, "top_k": 40, "top_p": 0.6},
    {"min_p": 0.1},
    {"temperature": 1.5, "top_p": 1e-46, "min_p": 0.02},
    {"temperature": 1e-39},
    {"temperature": 1e30},
]


def request(**settings: Any) -> Any:
    settings.setdefault("temperature", 1.0)
    return SimpleNamespace(params=SamplingParams(**settings))


@torch.inference_mode()
@pytest.mark.parametrize("vocab", [32, 96, 1024])  # fewer than the candidates, and more
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_draws_as_the_operations_do(vocab: int, dtype: torch.dtype):
    torch.manual_seed(0)
    rank, g = 32, 3
    w1, d2t = torch.randn(2000, rank), torch.randperm(2000)[:vocab].sort().values
    w2 = CompiledLinear((0.1 * torch.randn(vocab, rank)).to(dtype))
    chain, by_operations = markov_program(w1, w2, d2t), cast(BoundDrafter, SimpleNamespace(d2t=d2t))
    for requests in ([request()], [request(**s) for s in SETTINGS], [request()] * 40, [request(top_p=0.9)] * 2):
        r = len(requests)
        logits, previous = 2 * torch.randn(r, g, vocab), torch.randint(0, 2000, (r,))
        settings, draws = sampling_rows(requests), torch.rand(r, g, dtype=torch.float64)
        given = logits.clone()
        block = drafted(chain, previous, logits, (sampling_rows(requests), draws))
        assert torch.equal(logits, given)
        for k in range(g):
            slot = BoundDrafter.sample(by_operations, logits[:, k] + w2(w1[previous]), settings, draws[:, k])
            laws = (
                torch.zeros(r, 2000).scatter_add_(1, support, probs)
                for support, probs in ((slot.support, slot.draft_probs), (block.support[:, k], block.draft_probs[:, k]))
            )
            torch.testing.assert_close(*laws, rtol=1e-4, atol=1e-6)
            assert torch.equal(block.tokens[:, k], slot.token)
            previous = slot.token


@torch.inference_mode()
def test_tokens_follow_the_law_that_is_reported():
    """Which is all that verification asks of it; that another law would be seen is shown by one without truncation."""
    torch.manual_seed(0)
    vocab, r = 32, 4096
    chain = markov_program(torch.randn(vocab, 16), CompiledLinear(torch.randn(vocab, 16)), torch.arange(vocab))
    logits, previous = torch.randn(1, 2, vocab).expand(r, -1, -1), torch.full((r,), 3)
    draws = torch.rand(r, 2, dtype=torch.float64)

    def sampled(**settings: Any) -> tuple[Tensor, Tensor]:
        rows = sampling_rows([request(temperature=2.0, **settings)] * r)
        block = drafted(chain, previous, logits, (rows, draws))
        return block.tokens, block.draft_probs.clone()

    (tokens, laws), (free_tokens, free_laws) = sampled(top_p=0.9), sampled()

    def p_value(tokens: Tensor, law: Tensor) -> float:
        """Ids are places of the law, as all 32 tokens are candidates."""
        common = law * len(tokens) >= 5
        observed, expected = tokens.bincount(minlength=vocab)[common].double(), law[common].double() * len(tokens)
        if bool((law[tokens] == 0).any()):
            return 0.0
        return float(chisquare(observed, expected * (observed.sum() / expected.sum())).pvalue)

    assert p_value(tokens[:, 0], laws[0, 0]) > 1e-3
    assert p_value(free_tokens[:, 0], laws[0, 0]) < 1e-6 and p_value(tokens[:, 0], free_laws[0, 0]) < 1e-6
    rows = (tokens[:, 0] == tokens[:, 0].mode().values).nonzero()[:, 0]
    assert len(rows) > 400 and p_value(tokens[rows, 1], laws[rows[0], 1]) > 1e-3


@torch.inference_mode()
def test_draws_from_candidates_in_the_order_of_ids():
    """So that a shared draw lands in the same place; of equals beyond the candidates' number the first are taken."""
    vocab, d2t = 256, torch.arange(256)
    chain = markov_program(torch.zeros(256, 16), CompiledLinear(torch.randn(vocab, 16)), d2t)
    logits = torch.zeros(1, 1, vocab)
    logits[0, 0, 200:220] = 1.0
    for draw, token in ((0.0, 0), (1 - 2.0**-53, 219)):
        draws = torch.tensor([[draw]], dtype=torch.float64)
        block = drafted(chain, torch.tensor([1]), logits, (sampling_rows([request()]), draws))
        assert block.support[0, 0].tolist() == [*range(NUM_CANDIDATES - 20), *range(200, 220)]
        assert block.tokens.item() == token


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("keeps_fused", [False, True])
def test_context_equals_its_operations_one_by_one(dtype: torch.dtype, keeps_fused: bool):
    torch.manual_seed(0)
    c, layers, slots = tiny_config(), 2, 40
    shape = slots, 2, c.num_kv_heads, c.head_dim
    fc = CompiledLinear(torch.randn(c.hidden_size, 3 * c.hidden_size).to(dtype))
    context_kv = CompiledLinear(torch.randn(layers * 2 * c.kv_size, c.hidden_size).to(dtype))
    norm = torch.rand(c.hidden_size)
    table = rotary_table(slots, c.head_dim, c.rope_theta, torch.device("cpu"))
    context = ContextProgram(fc, norm, context_kv, table, c)
    for rows in (1, 5, 33, 2):
        taps = [torch.randn(rows, c.hidden_size) for _ in range(3)]
        positions = torch.arange(rows) + 3
        where = torch.randperm(slots)[:rows]
        ours, expected = ([torch.zeros(shape, dtype=dtype) for _ in range(layers)] for _ in range(2))
        kept = torch.zeros(slots, c.hidden_size, dtype=dtype) if keeps_fused else None
        context(taps, positions, where, ours, kept)
        fused = fc(torch.cat(taps, -1))
        if kept is not None:
            assert torch.equal(kept[where], fused.to(dtype)) and kept.count_nonzero() == fused.count_nonzero()
        product = context_kv(rms_norm(fused, norm, c.rms_norm_eps))
        for storage, kv in zip(expected, product.view(rows, layers, 2, c.num_kv_heads, c.head_dim).unbind(1)):
            rotate_(kv.flatten(1, 2), c.num_kv_heads, table, positions)
            store(kv, storage, where)
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
