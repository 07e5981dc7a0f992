"""Drafters of every kind: what serves is what was trained, and is kept, windowed and fitted alike.

Shapes: G slots, V vocabulary.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dspark.drafters.bound import BoundDrafter
from dspark.drafters.checkpoint import load_drafter, save_drafter, write_official
from dspark.drafters.layers import DraftModel
from dspark.drafters.load import bind, make_drafter
from dspark.models.decoder import layer_shapes
from dspark.sampling import SamplingParams
from dspark.train.setup import with_block_size
from tests.drafters.test_dspark import TARGET, TOKENS, Request, extended, taps_of
from tests.tiny import VARIANTS, tiny_state_dict, tiny_target, tiny_variant

WARM = SamplingParams(temperature=0.8)

pytestmark = pytest.mark.parametrize("variant", VARIANTS)


def proposal(drafter: BoundDrafter, *requests: Request) -> tuple[list[list[int]], Tensor]:
    """Tokens and the distributions they were drawn from, [R, G, V]."""
    draft = drafter.propose(list(requests), drafter.block_size)
    probs = torch.zeros(*draft.tokens.shape, 64).scatter_add_(2, draft.support, draft.draft_probs)
    return draft.tokens.tolist(), probs


def trained_probs(model: DraftModel, token_ids: list[int], anchor: int) -> Tensor:
    """What training says of a block at `anchor` whose tokens are known, [G, V]."""
    taps = torch.cat(taps_of(model, token_ids), -1)[None]
    with torch.no_grad():
        outputs = model(taps, torch.tensor([token_ids]), torch.tensor([[5, anchor]]), TARGET.embedding)
        logits = outputs.hidden[0, 1] @ TARGET.lm_head_weight[model.d2t].T + outputs.features[0, 1] @ outputs.w2.T
        if outputs.copies is not None:
            copied, bias = (t[0, 1, :, None] for t in outputs.copies)
            logits += torch.where(model.d2t == copied, bias, 0.0)
    return torch.zeros(len(logits), 64).index_copy_(1, model.d2t, (logits / 0.8).softmax(-1))


@pytest.mark.parametrize("anchor", [0, 1, 13, 29])
@pytest.mark.parametrize(("window", "draft_vocab_size"), [(0, 0), (0, 20), (5, 0), (1, 0)])
def test_training_says_what_is_sampled_from(variant: str, window: int, draft_vocab_size: int, anchor: int):
    """Teacher forced with what was drafted, training gives the drafter's own distributions: no position is off by one,
    and nothing of what comes after the drafted tokens is seen."""
    model = tiny_variant(variant, TARGET, window, draft_vocab_size=draft_vocab_size)
    (drafted,), probs = proposal(extended(model), Request(TOKENS[: anchor + 1], WARM))
    known = TOKENS[: anchor + 1] + drafted + [9, 9, 9]
    torch.testing.assert_close(trained_probs(model, known, anchor), probs[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("params", [WARM, SamplingParams(temperature=0.0)], ids=["sampled", "greedy"])
def test_a_short_block_is_one_of_a_drafter_with_short_blocks(variant: str, slots: int, params: SamplingParams):
    model = tiny_variant(variant, TARGET)
    requests = [Request(TOKENS, params), Request(TOKENS[:15], params)]
    short = extended(model).propose(list(requests), slots)
    expected = extended(with_block_size(model, slots)).propose(list(requests), slots)
    assert torch.equal(short.tokens, expected.tokens) and short.tokens.shape == (2, slots)
    torch.testing.assert_close(short.draft_probs, expected.draft_probs)
    torch.testing.assert_close(short.signals, expected.signals)


def test_a_window_hides_what_lies_before_it(variant: str):
    def probs(window: int) -> Tensor:
        return proposal(extended(tiny_variant(variant, TARGET, window)), Request(TOKENS, WARM))[1][0, 0]

    torch.testing.assert_close(probs(29), probs(0), atol=1e-6, rtol=0)
    assert (probs(28) - probs(0)).abs().max() > 1e-5


@pytest.mark.parametrize("pieces", [(0, 1, 30), (0, 7, 8, 20, 30)])
@pytest.mark.parametrize("window", [0, 5])
def test_neither_pieces_nor_places_nor_company_matter(variant: str, pieces: tuple[int, ...], window: int):
    model = tiny_variant(variant, TARGET, window)
    tokens, probs = proposal(extended(model), Request(TOKENS, WARM))
    drafter = extended(model, pieces, first_slot=50)
    for slot, count in ((5, 30), (100, 15)):
        drafter.copy(50, slot, count)  # a shared prefix: the tokens' positions stay the same
    requests = [Request(TOKENS, WARM, first_slot=slot) for slot in (50, 5)]
    ours, together = proposal(drafter, Request(TOKENS[:15], first_slot=100), *requests)
    assert ours[1:] == tokens * 2
    for row in together[1:]:
        torch.testing.assert_close(row, probs[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("temperature", [1e-50, 1e-37, 1e30])
def test_extreme_temperatures_give_a_distribution(variant: str, temperature: float):
    _, probs = proposal(extended(tiny_variant(variant, TARGET)), Request(TOKENS, SamplingParams(temperature)))
    torch.testing.assert_close(probs.sum(-1), torch.ones(probs.shape[:2]))


def test_each_request_drafts_by_its_own_seed_and_temperature(variant: str):
    requests = [Request(TOKENS, SamplingParams(t), seed) for t, seed in ((0.0, 1), (1.0, 1), (1.0, 2), (1.0, 1))]
    model = tiny_variant(variant, TARGET)
    together, _ = proposal(extended(model), *requests)
    assert [proposal(extended(model), request)[0][0] for request in requests] == together
    assert together[1] == together[3]
    assert len(set(map(tuple, together))) == 3


def test_checkpoints_come_back(variant: str, tmp_path: Path):
    model = tiny_variant(variant, TARGET, window=7, draft_vocab_size=20)
    save_drafter(model, tmp_path, torch.float32)
    loaded = load_drafter(tmp_path)
    assert loaded.config == model.config and type(loaded) is type(model)
    assert all(torch.equal(t, loaded.state_dict()[name]) for name, t in model.state_dict().items())
    assert make_drafter(str(tmp_path), "tiny", TARGET).block_size == 4  # pyright: ignore


@pytest.mark.parametrize("change", [{"kind": "medusa"}, {"kind": ["eagle3"]}, {"kind": None}, {"heads": 2}], ids=str)
def test_unknown_kinds_and_keys_are_refused(variant: str, tmp_path: Path, change: dict):
    save_drafter(tiny_variant(variant, TARGET), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=r"config\.json': a drafter is of kind|unknown keys heads"):
        load_drafter(tmp_path)


def test_a_misfit_is_refused(variant: str):
    model = tiny_variant(variant, TARGET)
    with pytest.raises(ValueError, match="vocabulary 64, this target has 70"):
        bind(model, tiny_target(vocab_size=70))
    for changes, message in (({"window": -1}, "window must be"), ({"block_size": 0}, "block_size must be")):
        with pytest.raises(ValueError, match=message):
            replace(model.config, **changes)


def test_the_official_format_refuses_what_it_cannot_say(variant: str, tmp_path: Path):
    with pytest.raises(ValueError, match="the official format"):
        write_official(tiny_variant(variant, TARGET), TARGET.embedding, TARGET.lm_head_weight, tmp_path)


def test_initialised_from_the_target_it_runs(variant: str):
    model, state = tiny_variant(variant, TARGET), tiny_state_dict(TARGET.config)
    count = 1 if variant in ("eagle3", "mtp") else 2
    layers = [{n: state[f"model.layers.{i}.{n}"] for n in layer_shapes(TARGET.config)} for i in (2, 3)[-count:]]
    model.initialize_from_target(layers, state["model.norm.weight"], state["model.embed_tokens.weight"], 1.0)
    assert proposal(extended(model), Request(TOKENS, WARM))[1].isfinite().all()
