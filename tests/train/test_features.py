"""Target features equal a direct computation, in memory and on disk, and neither cache outgrows its bound."""

import torch

from dspark.train.features import Features, FeatureSource
from tests.tiny import PlainAttention, make_example, plain_logits, tiny_target

TARGET = tiny_target()
EXAMPLES = [make_example(tuple(range(n)), tuple(range(40 - n, 60 - n))) for n in (5, 9, 1, 30)]


def assert_same(a: Features, b: Features) -> None:
    assert torch.equal(a.taps, b.taps) and torch.equal(a.hidden, b.hidden) and torch.equal(a.logsumexp, b.logsumexp)


def test_features_equal_a_direct_computation(monkeypatch):
    """Several examples in one forward: taps and last hidden state in bf16 and the log-normaliser, in several pieces,
    of the positions that blocks can use."""
    monkeypatch.setattr("dspark.train.features.LOGIT_ROWS", 7)
    monkeypatch.setattr("dspark.train.features.LOGIT_TILE", 3)
    source = FeatureSource(TARGET, (0, 2), 0)
    for example, features in zip(EXAMPLES, source.compute(EXAMPLES), strict=True):
        tokens = torch.tensor(example.token_ids)
        output = TARGET.forward(tokens, torch.arange(len(tokens)), PlainAttention(2), (0, 2))
        direct, answer = torch.cat(output.taps, -1), slice(example.opening_length, len(tokens) - 1)
        torch.testing.assert_close(features.taps.float(), direct[:-2], atol=2e-2, rtol=2**-7)
        hidden = output.hidden[answer]
        torch.testing.assert_close(features.hidden.float(), hidden, atol=2e-2, rtol=2**-7)
        expected = plain_logits(TARGET, example.token_ids).logsumexp(-1)[answer]
        torch.testing.assert_close(features.logsumexp, expected, atol=1e-4, rtol=0)
        assert features.taps.dtype is features.hidden.dtype is torch.bfloat16
        assert features.num_bytes == (len(tokens) - 2) * 2 * 32 * 2 + 19 * (32 * 2 + 4)


class CountingSource(FeatureSource):
    computed = packs = 0

    def compute(self, examples):
        self.computed += len(examples)
        self.packs += 1
        return super().compute(examples)


def test_examples_are_packed_up_to_a_bound(monkeypatch):
    """Lengths 25, 29, 21 and 50; the last alone is longer than a pack."""
    monkeypatch.setattr("dspark.train.features.PACK_TOKENS", 49)
    source = CountingSource(TARGET, (0,), 0)
    assert len(list(source.compute_all([]))) == 0
    packed = list(source.compute_all([EXAMPLES[0], EXAMPLES[2], EXAMPLES[1], EXAMPLES[3]]))
    assert source.packs == 3
    for example, features in zip((EXAMPLES[0], EXAMPLES[2], EXAMPLES[1], EXAMPLES[3]), packed, strict=True):
        (alone,) = source.compute([example])
        torch.testing.assert_close(features.taps, alone.taps, atol=1e-2, rtol=2**-7)


def test_the_cache_is_bounded_and_what_does_not_fit_is_computed_again():
    sizes = [f.num_bytes for f in FeatureSource(TARGET, (0,), 0).compute(EXAMPLES)]
    source = CountingSource(TARGET, (0,), sizes[0] + sizes[2])
    for _ in range(2):
        for example in EXAMPLES:
            source.get([example])
            assert source.used_bytes <= source.cache_bytes
    assert source.used_bytes == sizes[0] + sizes[2]
    assert source.computed == 4 + 2  # the first and the third were kept
    assert source.get(EXAMPLES[:1])[0] is source.get(EXAMPLES[:1])[0]
    both = source.get([EXAMPLES[3], EXAMPLES[0], EXAMPLES[3]])
    assert [len(f.taps) for f in both] == [48, 23, 48]


def test_cached_and_computed_features_are_the_same():
    kept, fresh = FeatureSource(TARGET, (0,), 1 << 20), FeatureSource(TARGET, (0,), 0)
    for _ in range(2):
        assert_same(kept.get(EXAMPLES[1:2])[0], fresh.get(EXAMPLES[1:2])[0])
    assert fresh.used_bytes == 0


def test_the_target_stays_frozen():
    (features,) = FeatureSource(TARGET, (0,), 0).compute(EXAMPLES[:1])
    assert not any(t.requires_grad for t in (features.taps, features.hidden, features.logsumexp))
    assert not TARGET.embedding.requires_grad
