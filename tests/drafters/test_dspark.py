"""The DSpark drafter at inference is the trained module, packed and cached; a misfit is refused."""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from dspark.drafters.copying import matches
from dspark.drafters.dspark import DSparkDrafter
from dspark.drafters.layers import DraftModel, check_fit
from dspark.drafters.load import bind
from dspark.drafters.model import DSparkModel
from dspark.models.decoder import layer_shapes
from dspark.sampling import SamplingParams
from dspark.spec.draft import Draft
from tests.tiny import PlainAttention, tiny_config, tiny_model, tiny_state_dict, tiny_target

TARGET = tiny_target()
TOKENS = torch.randint(0, 64, (30,), generator=torch.Generator().manual_seed(2)).tolist()
ANCHORS = (0, 1, 13, 29)
GREEDY = SamplingParams()


@dataclass
class Request:
    """What a drafter reads of a sequence."""

    token_ids: list[int]
    params: SamplingParams = GREEDY
    seed: int = 5
    coupled: bool = False
    first_slot: int = 0


def taps_of(model: DraftModel, token_ids: list[int]) -> list[Tensor]:
    positions = torch.arange(len(token_ids))
    return TARGET.forward(torch.tensor(token_ids), positions, PlainAttention(2), model.config.tap_layers).taps


def extended(model: DraftModel, pieces: tuple[int, ...] = (0, 30), first_slot: int = 0) -> Any:
    """A drafter of any kind that took in TOKENS, piece by piece, into slots from first_slot on."""
    drafter = bind(model, TARGET)
    drafter.allocate(150)
    for storage in drafter._storage:
        storage.fill_(float("nan"))  # whatever is read must have been written
    taps = taps_of(model, TOKENS)
    for start, end in pairwise(pieces):
        positions = torch.arange(start, end)
        drafter.extend([t[start:end] for t in taps], torch.tensor(TOKENS[start:end]), positions, positions + first_slot)
    return drafter


def trained_hidden(model: DSparkModel, anchors: tuple[int, ...]) -> Tensor:
    """What training computes for blocks at these anchors of TOKENS, [A, G, C]."""
    taps = torch.cat(taps_of(model, TOKENS), -1)[None]
    with torch.no_grad():
        return model.backbone(taps, torch.tensor([TOKENS]), torch.tensor([anchors]), TARGET.embedding)[0]


def propose(model: DSparkModel, *requests: Request) -> Draft:
    return extended(model).propose(list(requests), model.config.block_size)


def test_backbone_equals_the_trained_module():
    model = tiny_model(TARGET.config)
    for anchor, hidden in zip(ANCHORS, trained_hidden(model, ANCHORS)):
        ours = extended(model).backbone([Request(TOKENS[: anchor + 1])], model.config.block_size)[0]
        torch.testing.assert_close(ours, hidden, atol=1e-4, rtol=0)


def test_a_block_depends_on_nothing_past_its_anchor():
    """Later tokens, padding and the other blocks of the batch leave a block's hidden states as they are."""
    model = tiny_model(TARGET.config)
    together = trained_hidden(model, ANCHORS)
    for i, anchor in enumerate(ANCHORS):
        torch.testing.assert_close(trained_hidden(model, (anchor,))[0], together[i], atol=1e-5, rtol=0)
    taps = torch.cat(taps_of(model, TOKENS), -1)[None]
    taps[:, 13:] = 7.0
    with torch.no_grad():
        padded = model.backbone(taps, torch.tensor([TOKENS[:14]]), torch.tensor([[13]]), TARGET.embedding)[0]
    torch.testing.assert_close(padded[0], together[2], atol=1e-5, rtol=0)


@pytest.mark.parametrize("markov_head", ["vanilla", "gated", "rnn", None])
@pytest.mark.parametrize("draft_vocab_size", [0, 20])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("copy_length", [0, 3])
def test_heads_equal_the_trained_ones(
    markov_head: str | None, draft_vocab_size: int, temperature: float, copy_length: int
):
    """Teacher-forced with the tokens that were drafted, training gives the distribution that was sampled from."""
    changes: dict[str, Any] = {"markov_head": markov_head} if markov_head else {"markov_rank": 0}
    model = tiny_model(TARGET.config, draft_vocab_size=draft_vocab_size, copy_length=copy_length, **changes)
    anchor = 13
    draft = propose(model, Request(TOKENS[: anchor + 1], SamplingParams(temperature)))
    tokens = draft.tokens[0]
    previous = torch.cat([torch.tensor([TOKENS[anchor]]), tokens[:-1]])
    hidden = trained_hidden(model, (anchor,))[0]
    with torch.no_grad():
        features, confidence = model.heads(hidden, previous)
        assert confidence is not None
        logits = hidden @ TARGET.lm_head_weight[model.d2t].T + features @ model.w2.T  # [G, V']
        lengths = torch.zeros(len(logits))
        if model.copy_head is not None:
            text = torch.tensor([TOKENS[: anchor + 1] + tokens.tolist()])
            copied, bias = model.copy_head(text, torch.tensor([[anchor]]))
            slots = torch.arange(anchor, text.shape[1] - 1)[None]
            lengths = matches(text, slots, copy_length)[0][0].float()
            assert bias.any() and lengths.any()
            logits += torch.where(model.d2t == copied[0, 0, :, None], bias[0, 0, :, None], 0.0)
    largest = logits.softmax(-1).amax(-1)
    warmth = torch.full_like(largest, temperature)
    entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)
    evidence = largest, largest.logit(1e-4), entropy, lengths, warmth
    torch.testing.assert_close(draft.signals[0], torch.stack([confidence, *evidence], -1), atol=1e-4, rtol=0)
    assert draft.lengths.tolist() == [model.config.block_size]
    if temperature == 0:
        assert tokens.tolist() == model.d2t[logits.argmax(-1)].tolist()
        assert draft.draft_probs.amax(-1).eq(1).all()
        return
    expected = torch.zeros(logits.shape[0], 64).index_copy_(1, model.d2t, (logits / temperature).softmax(-1))
    ours = torch.zeros_like(expected).scatter_add_(1, draft.support[0], draft.draft_probs[0])
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)
    assert ours.gather(1, tokens[:, None]).gt(0).all()


def test_what_a_slot_signals_does_not_depend_on_its_own_token():
    """Draws of many seeds: slots after the same tokens signal the same, whatever was drawn in them."""
    drafter = extended(tiny_model(TARGET.config))
    requests = [Request(TOKENS[:14], SamplingParams(temperature=1.0), seed) for seed in range(300)]
    draft = drafter.propose([*requests, Request(TOKENS[:14])], drafter.block_size)
    blocks, signals = draft.tokens.tolist(), draft.signals[:-1]
    for k in range(drafter.block_size):
        by_prefix: dict[tuple[int, ...], list[int]] = {}
        for i, block in enumerate(blocks[:-1]):
            by_prefix.setdefault(tuple(block[:k]), []).append(i)
        same = max(by_prefix.values(), key=len)
        assert len({blocks[i][k] for i in same}) > 1
        torch.testing.assert_close(signals[same, k], signals[same[:1], k].expand(len(same), -1), atol=1e-5, rtol=0)
    alone = drafter.propose([Request(TOKENS[:14])], drafter.block_size)
    torch.testing.assert_close(draft.signals[-1], alone.signals[0], atol=1e-5, rtol=0)


def test_candidates_are_picked_after_the_markov_bias(monkeypatch: pytest.MonkeyPatch):
    """A bug halved live acceptance: candidates were the top of the base logits, while training scores the whole
    draft vocabulary; the token that the bias favours was seldom among them."""
    monkeypatch.setattr("dspark.drafters.bound.NUM_CANDIDATES", 1)
    model = tiny_model(TARGET.config)
    anchor = ANCHORS[0]
    draft = propose(model, Request(TOKENS[: anchor + 1], SamplingParams(temperature=1.0)))
    hidden = trained_hidden(model, (anchor,))[0]
    previous = TOKENS[anchor]
    for k, token in enumerate(draft.tokens[0].tolist()):
        assert model.markov_head is not None
        bias = model.markov_head.markov_w2(model.markov_head.markov_w1.weight[previous])
        scores = TARGET.lm_head_weight[model.d2t] @ hidden[k] + bias
        assert token == model.d2t[scores.argmax()]
        previous = token


def test_initialised_from_the_target_it_is_made_of_target_layers():
    """Draft layers are copies, the transition bias starts at zero; the drafter runs and its shapes fit."""
    model, state = tiny_model(TARGET.config), tiny_state_dict(TARGET.config)
    names = layer_shapes(TARGET.config)
    layers = [{n: state[f"model.layers.{i}.{n}"] for n in names} for i in (2, 3)]
    model.initialize_from_target(layers, state["model.norm.weight"], state["model.embed_tokens.weight"], 1.0)
    assert torch.equal(model.layers[1].get_parameter("mlp.up_proj.weight"), layers[1]["mlp.up_proj.weight"])  # pyright: ignore
    assert not model.w2.any()
    assert propose(model, Request(TOKENS)).tokens.shape == (1, model.config.block_size)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 80}, "vocabulary 80, this target has 64"),
        ({"hidden_size": 40}, "width 40, this target has 32"),
        ({"head_dim": 16}, "head width 16, this target has 8"),
        ({"rope_theta": 5e5}, "rotary base"),
    ],
)
def test_a_drafter_of_another_target_is_refused(changes: dict, message: str):
    config = tiny_model(TARGET.config).config
    check_fit(config, TARGET.config)
    other = replace(config, decoder=replace(config.decoder, **changes))
    with pytest.raises(ValueError, match=message):
        DSparkDrafter(DSparkModel(other), TARGET)


def test_tap_layers_that_the_target_lacks_are_refused():
    shallow = tiny_config(num_layers=2)
    with pytest.raises(ValueError, match=r"reads target layers \[0, 2, 3\], this target has 2 layers"):
        check_fit(tiny_model(TARGET.config).config, shallow)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tap_layers": ()}, "tap layers"),
        ({"tap_layers": (4,)}, r"tap layers \(4,\) must lie in 0\.\.3"),
        ({"block_size": 0}, "block_size must be at least 1"),
        ({"num_draft_layers": 0}, "num_draft_layers"),
        ({"markov_rank": -1}, "markov_rank"),
        ({"copy_length": -1}, "copy_length must be at least 0"),
        ({"draft_vocab_size": 65}, r"draft_vocab_size must lie in 1\.\.64"),
        ({"mask_token_id": 64}, r"mask_token_id must lie in 0\.\.63"),
    ],
)
def test_impossible_configs_are_refused(changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        replace(tiny_model(TARGET.config).config, **changes)
