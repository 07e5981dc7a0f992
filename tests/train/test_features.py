"""Target features equal a direct computation, and the cache never outgrows its bound."""

import torch

from dspark.train.data import Example
from dspark.train.features import FeatureSource
from tests.tiny import PlainAttention, plain_logits, tiny_target

TARGET = tiny_target()
EXAMPLES = [Example(tuple(range(n)), tuple(range(40 - n, 60 - n))) for n in (5, 9, 1, 30)]


def test_features_equal_a_direct_computation(monkeypatch):
    """Taps and last hidden state in bf16; the log-normaliser of every answer position, in several pieces."""
    monkeypatch.setattr("dspark.train.features.LOGIT_ROWS", 7)
    source = FeatureSource(TARGET, (0, 2), 0)
    for example in EXAMPLES:
        features = source.compute(example)
        tokens = torch.tensor(example.token_ids)
        output = TARGET.forward(tokens, torch.arange(len(tokens)), PlainAttention(2), (0, 2))
        direct = torch.cat(output.taps, -1)
        torch.testing.assert_close(features.taps.float(), direct, atol=2e-2, rtol=2**-7)
        torch.testing.assert_close(features.hidden.float(), TARGET.final_hidden(output.hidden), atol=2e-2, rtol=2**-7)
        expected = plain_logits(TARGET, example.token_ids).logsumexp(-1)
        answer = len(example.prompt_ids)
        torch.testing.assert_close(features.logsumexp[answer:], expected[answer:], atol=1e-4, rtol=0)
        assert features.taps.dtype is features.hidden.dtype is torch.bfloat16
        assert features.num_bytes == len(tokens) * (3 * 32 * 2 + 4)


class CountingSource(FeatureSource):
    computed = 0

    def compute(self, example: Example):
        self.computed += 1
        return super().compute(example)


def test_the_cache_is_bounded_and_what_does_not_fit_is_computed_again():
    sizes = [FeatureSource(TARGET, (0,), 0).compute(e).num_bytes for e in EXAMPLES]
    source = CountingSource(TARGET, (0,), sizes[0] + sizes[2])
    for _ in range(2):
        for index, example in enumerate(EXAMPLES):
            source.get(index, example)
            assert source.used_bytes <= source.cache_bytes
    assert source.used_bytes == sizes[0] + sizes[2]
    assert source.computed == 4 + 2  # the first and the third were kept
    assert source.get(0, EXAMPLES[0]) is source.get(0, EXAMPLES[0])


def test_cached_and_computed_features_are_the_same():
    kept, fresh = FeatureSource(TARGET, (0,), 1 << 20), FeatureSource(TARGET, (0,), 0)
    for _ in range(2):
        a, b = kept.get(1, EXAMPLES[1]), fresh.get(1, EXAMPLES[1])
        assert torch.equal(a.taps, b.taps) and torch.equal(a.hidden, b.hidden) and torch.equal(a.logsumexp, b.logsumexp)
    assert fresh.used_bytes == 0


def test_the_target_stays_frozen():
    features = FeatureSource(TARGET, (0,), 0).compute(EXAMPLES[0])
    assert not any(t.requires_grad for t in (features.taps, features.hidden, features.logsumexp))
    assert not TARGET.embedding.requires_grad
