"""Drafters of every kind learn, and what they learn shows in live decoding; recipes make what their name says."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from dspark.drafters.checkpoint import write_official
from dspark.drafters.eagle3 import Eagle3Model
from dspark.drafters.load import bind
from dspark.drafters.model import DSparkModel
from dspark.drafters.mtp import MtpModel
from dspark.engine.engine import Engine, EngineConfig
from dspark.models.decoder import Decoder
from dspark.sampling import SamplingParams
from dspark.train.config import CHAIN_LOSS, DFLASH_LOSS, DSPARK_LOSS, TrainConfig
from dspark.train.setup import DRAFTERS, DrafterRecipe, default_recipe, new_drafter
from dspark.train.trainer import Trainer
from tests.tiny import make_example, plain_greedy, tiny_config, tiny_state_dict, tiny_target

TARGET = tiny_target()
PROMPTS = [[i, 3 * i + 1, 7] for i in range(6)]
EXAMPLES = [make_example(tuple(p), tuple(plain_greedy(TARGET, p, 24))) for p in PROMPTS]
MODELS = {"eagle3": Eagle3Model, "mtp": MtpModel}
LOSSES = {"dspark": DSPARK_LOSS, "dflash": DFLASH_LOSS, "dflash-zlab": DFLASH_LOSS}


def make_trainer(kind: str, **changes) -> Trainer:
    recipe = default_recipe(TARGET, 63, kind, **changes)
    model = new_drafter(TARGET, tiny_state_dict(tiny_config()), recipe, EXAMPLES, seed=0)
    return Trainer(model, TARGET, EXAMPLES, EXAMPLES[:1], TrainConfig(learning_rate=3e-3, sequences_per_step=6))


def live_accepted_length(trainer: Trainer) -> float:
    """Tokens a round, greedy, on the prompts that were trained on."""
    drafter = bind(trainer.model, TARGET)
    engine = Engine(TARGET, drafter, config=EngineConfig(max_streams=8, max_model_len=96))
    sequences = [engine.add(p, SamplingParams(max_new_tokens=24)) for p in PROMPTS]
    while engine.has_work:
        engine.step()
    assert [s.output_ids for s in sequences] == [e.answer_tokens for e in EXAMPLES]
    return sum(len(s.output_ids) - 1 for s in sequences) / sum(s.rounds for s in sequences)


@pytest.mark.parametrize("kind", DRAFTERS)
def test_what_is_learnt_by_heart_is_accepted_live(kind: str):
    trainer = make_trainer(kind, window=6)
    assert isinstance(trainer.model, MODELS.get(kind, DSparkModel)) and trainer.loss_weights == LOSSES.get(
        kind, CHAIN_LOSS
    )
    before = live_accepted_length(trainer)
    trainer.progress.seconds = 0.04 * 3600  # past the warm-up
    for _ in range(80):
        trainer.step(list(range(6)))
    assert live_accepted_length(trainer) > before + 0.3 * trainer.model.config.block_size


@pytest.mark.parametrize("kind", DRAFTERS)
def test_every_weight_is_trained(kind: str):
    trainer = make_trainer(kind)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.progress.seconds = 0.04 * 3600
    for _ in range(3):
        trainer.step(list(range(6)))
    for name, parameter in trainer.model.named_parameters():
        assert not torch.equal(parameter, before[name]), name


def test_recipes_by_name():
    recipes = {kind: default_recipe(TARGET, 1, kind) for kind in DRAFTERS}
    shapes = {
        kind: (r.tap_layers, r.block_size, r.markov_rank, r.own_position, r.feature_input)
        for kind, r in recipes.items()
    }
    assert shapes == {
        "dspark": ((2, 3, 1), 6, 32, False, True),
        "dflash": ((2, 3, 1), 4, 0, False, False),
        "dflash-zlab": ((2, 3, 1), 4, 0, True, False),
        "eagle3": ((1, 3, 2), 4, 0, False, False),
        "mtp": ((3,), 1, 0, False, False),
    }
    assert default_recipe(TARGET, 1, "eagle3", block_size=7).block_size == 7


@pytest.mark.parametrize(("kind", "window"), [("eagle3", 0), ("mtp", 0), ("dflash-zlab", 0), ("dspark", 4)])
def test_what_the_official_format_has_not_is_refused_before_training(kind: str, window: int):
    with pytest.raises(ValueError, match="leave --official out"):
        default_recipe(TARGET, 63, kind, window=window, official=True)


def test_the_official_format_is_for_qwen3_targets():
    with pytest.raises(ValueError, match="Qwen3 targets; leave --official out"):
        default_recipe(TARGET, 63, official=True)


def test_the_size_of_the_draft_vocabulary():
    assert [default_recipe(TARGET, 63, draft_vocab_size=n).draft_vocab_size for n in (None, 20)] == [64, 20]
    with pytest.raises(ValueError, match="leave --draft-vocab-size out"):
        default_recipe(TARGET, 63, official=True, draft_vocab_size=20)


def test_an_official_drafter_can_be_written_as_one(tmp_path, monkeypatch):
    target = Decoder(replace(tiny_config(), qk_norm=True), tiny_state_dict(replace(tiny_config(), qk_norm=True)))
    for official in (False, True):
        monkeypatch.setattr(DrafterRecipe, "draft_vocab_size", 20)
        recipe = default_recipe(target, 63, official=official)
        model = new_drafter(target, tiny_state_dict(target.config), recipe, EXAMPLES, seed=0)
        with nullcontext() if official else pytest.raises(ValueError, match="train with --official"):
            write_official(model, target.embedding, target.lm_head_weight, tmp_path)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("medusa", {}, "one of dspark, dflash, dflash-zlab, eagle3, mtp; not 'medusa'"),
        ("eagle3", {"draft_layers": 2}, "eagle3 has one draft layer, not 2"),
        ("mtp", {"draft_layers": 3}, "mtp has one draft layer, not 3"),
        ("dflash", {"markov_head": "rnn"}, "dflash has no sequential head"),
        ("mtp", {"markov_head": "vanilla"}, "mtp has no sequential head"),
    ],
)
def test_what_a_drafter_does_not_have_is_refused(kind: str, changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        default_recipe(TARGET, 1, kind, **changes)
