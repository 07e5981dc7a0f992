"""The copy head finds what a search written out would find: in training, in drafting, compiled and not."""

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dspark.drafters.copying import CopyBias, CopyHead, matches
from dspark.drafters.interface import DraftRequest
from dspark.drafters.programs import MarkovProgram
from dspark.models import cpu_ops
from dspark.models.cpu_ops import CompiledLinear, available
from tests.drafters.test_dspark import Request

VOCAB, LONGEST = 7, 3
compiled = pytest.mark.skipif(not available(), reason="needs an x86 CPU with FMA and PyTorch on GNU OpenMP")


def search(tokens: list[int], longest: int) -> tuple[int, int]:
    """The definition: the most of the last tokens that stood together before, and what followed them there last."""
    for n in range(min(longest, len(tokens) - 1), 0, -1):
        for end in range(len(tokens) - 1, n - 1, -1):
            if tokens[end - n : end] == tokens[-n:]:
                return n, tokens[end]
    return 0, 0


def histories(seed: int, count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 25, (count,), generator=generator).tolist()
    return [torch.randint(0, VOCAB, (n,), generator=generator).tolist() for n in lengths]


def test_every_position_of_a_text():
    tokens = histories(0, 1)[0] + histories(1, 1)[0] * 2
    everywhere = torch.arange(len(tokens)).expand(2, -1)
    lengths, followers = matches(torch.tensor([tokens, tokens[::-1]]), everywhere, LONGEST)
    for row, text in enumerate((tokens, tokens[::-1])):
        for t in range(len(text)):
            length, follower = search(text[: t + 1], LONGEST)
            assert lengths[row, t] == length
            assert length == 0 or followers[row, t] == follower


def test_the_last_position_of_many():
    texts = histories(2, 60)
    padded = pad_sequence([torch.tensor(text) for text in texts], batch_first=True)
    last = torch.tensor([[len(text) - 1] for text in texts])
    for text, length, follower in zip(texts, *matches(padded, last, LONGEST), strict=True):
        assert search(text, LONGEST)[0] == length
        assert length == 0 or search(text, LONGEST)[1] == follower


def test_biases_of_training_are_those_of_slot_and_length():
    head, tokens = CopyHead(2, LONGEST), torch.tensor([[1, 2, 3, 4, 1, 2, 3, 1]])
    with torch.no_grad():
        head.bias.copy_(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]))
    copies = head(tokens, torch.tensor([[0, 4, 6]]))
    assert copies.bias.tolist() == [[[0, 0], [1, 5], [3, 4]]]
    assert copies.tokens[0, 1].tolist() == [2, 3] and copies.tokens[0, 2].tolist() == [4, 2]
    copies.bias.sum().backward()
    assert head.bias.grad is not None and head.bias.grad.tolist() == [[1, 0, 1], [1, 1, 0]]


def placed(texts: list[list[int]], room: int) -> tuple[Tensor, list[DraftRequest]]:
    """All texts but their last token in storage, `room` slots after each, and their requests."""
    history: list[int] = []
    requests: list[DraftRequest] = []
    for text in texts:
        requests.append(Request(text, first_slot=len(history)))
        history += [*text[:-1], *[0] * (1 + room)]
    return torch.tensor(history), requests


@pytest.mark.parametrize("fallback", [False, True])
@torch.inference_mode()
def test_bias_added_slot_by_slot(fallback: bool, monkeypatch: pytest.MonkeyPatch):
    if fallback:
        monkeypatch.setattr(cpu_ops, "usable", lambda _: False)
    elif not available():
        pytest.skip("needs an x86 CPU with FMA and PyTorch on GNU OpenMP")
    slots, d2t = 3, torch.tensor([0, 2, 3, 5])
    head, texts = CopyHead(slots, LONGEST), histories(3, 40)
    copies = CopyBias(head, torch.tensor([0, -1, 1, 2, -1, 3, -1]))
    history, requests = placed(texts, slots)
    spans = copies.spans(requests)
    blocks = torch.zeros(len(texts), 5, len(d2t))[:, 1:4]
    for slot in range(slots):
        previous = torch.tensor([text[-1] for text in texts])
        lengths = copies.add_(blocks[:, slot], history, spans, previous, slot)
        for text, row, found in zip(texts, blocks[:, slot], lengths, strict=True):
            length, follower = search(text, LONGEST)
            assert found == length
            expected = torch.where(d2t == follower, float(length), 0.0)
            assert torch.equal(row, expected), (text, row)
            text.append((text[-1] + slot) % VOCAB)


@compiled
@torch.inference_mode()
def test_the_program_of_a_block_copies_too():
    torch.manual_seed(0)
    slots, rank, vocab = 3, 4, 64
    head, texts, d2t = CopyHead(slots, LONGEST), histories(4, 20), torch.arange(vocab)
    copies, w1, w2 = CopyBias(head, d2t), torch.randn(vocab, rank), CompiledLinear(torch.randn(vocab, rank))
    history, requests = placed(texts, slots)
    logits, previous = torch.randn(len(texts), slots, len(d2t)), torch.tensor([text[-1] for text in texts])
    program, spans = MarkovProgram(slots, w1, w2, d2t, torch.zeros(8 + rank + 1), copies), copies.spans(requests)
    hidden, temperatures = torch.zeros(len(texts), slots, 8), torch.zeros(len(texts))
    draft = program(previous, logits, hidden, temperatures, (history, spans))
    tokens, signals = draft.tokens, draft.signals
    largest, lengths = signals[..., 1], signals[..., 4]
    for row, text in enumerate(texts):
        for k in range(slots):
            scores = logits[row, k] + w2(w1[text[-1:]])[0]
            length, follower = search(text, LONGEST)
            if length:
                scores[follower] += length
            assert tokens[row, k] == scores.argmax() and lengths[row, k] == length
            torch.testing.assert_close(largest[row, k], scores.softmax(-1).max(), rtol=1e-5, atol=1e-6)
            text.append(int(tokens[row, k]))
