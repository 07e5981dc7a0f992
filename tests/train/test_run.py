"""A run from files: from the target, from a trained drafter, and what is refused."""

import json
from pathlib import Path

import pytest
import torch

from dspark.drafters.checkpoint import load_drafter, save_drafter
from dspark.models.loader import Target
from dspark.train.output import only_writer
from dspark.train.run import TrainRun, make_trainer, read_all, train
from dspark.train.setup import default_recipe
from tests.tiny import tiny_config, tiny_model, tiny_state_dict, tiny_target


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "answers.jsonl"
    rows = [{"prompt_ids": [1, 2, i], "answer_ids": [5 + i % 40, 7, 9, 11, 13, 4]} for i in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_starts_from_a_trained_drafter(tmp_path: Path, data: Path):
    decoder = tiny_target()
    save_drafter(tiny_model(decoder.config, seed=4), tmp_path / "trained")
    run = TrainRun((data,), tmp_path / "out", initial=tmp_path / "trained", heldout=3)
    trainer = make_trainer(run, Target(None, decoder, None, frozenset()))  # pyright: ignore
    trained = load_drafter(tmp_path / "trained").state_dict()
    assert all(torch.equal(t, trained[name]) for name, t in trainer.model.state_dict().items())
    assert trainer.step([0, 1]).slots > 0


def test_a_trained_drafter_gets_longer_blocks(tmp_path: Path, data: Path):
    decoder = tiny_target()
    trained = tiny_model(decoder.config, seed=4, copy_length=2)
    torch.nn.init.normal_(trained.copy_head.bias)  # pyright: ignore
    save_drafter(trained, tmp_path / "trained")
    trained = load_drafter(tmp_path / "trained")
    for size in (5, 2):
        run = TrainRun((data,), tmp_path / "out", initial=tmp_path / "trained", block_size=size, heldout=3)
        trainer = make_trainer(run, Target(None, decoder, None, frozenset()))  # pyright: ignore
        weights, before = trainer.model.state_dict(), trained.state_dict()
        bias, old = weights.pop("copy_head.bias"), before.pop("copy_head.bias")
        assert trainer.model.config.block_size == size
        assert all(torch.equal(t, before[name]) for name, t in weights.items())
        assert all(torch.equal(row, old[min(slot, len(old) - 1)]) for slot, row in enumerate(bias))
        assert trainer.step([0, 1]).slots > 0


def test_makes_the_drafter_that_is_named(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("dspark.train.run.load_state_dict", lambda _: tiny_state_dict(tiny_config()))
    monkeypatch.setattr("dspark.train.run.mask_token", lambda _: 63)
    run = TrainRun((data,), tmp_path / "out", drafter="eagle3", block_size=3, window=7, draft_vocab_size=30, heldout=3)
    trainer = make_trainer(run, Target(None, tiny_target(), None, frozenset()))  # pyright: ignore
    config = trainer.model.config
    assert (config.kind, config.block_size, config.window, config.tap_layers) == ("eagle3", 3, 7, (1, 3, 2))
    assert config.draft_vocab_size == 30
    assert trainer.step([0, 1]).slots > 0


def test_a_drafter_of_another_model_is_refused(tmp_path: Path, data: Path):
    save_drafter(tiny_model(tiny_target(vocab_size=70).config), tmp_path / "other")
    run = TrainRun((data,), tmp_path / "out", initial=tmp_path / "other", heldout=3)
    with pytest.raises(ValueError, match="vocabulary 70, this target has 64"):
        make_trainer(run, Target(None, tiny_target(), None, frozenset()))  # pyright: ignore


def test_files_are_mixed_and_split_by_prompt(tmp_path: Path, data: Path):
    """Each prompt has two answers; those of one prompt are held out together, and the other file by its weight."""
    rows = [{"prompt_ids": [i, i], "answer_ids": [a, a, a]} for i in range(8) for a in (1, 2)]
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = TrainRun((data, other), tmp_path / "out", weights=(1.0, 3.0), heldout=3)
    heldout, examples = read_all(run, tiny_target())
    assert len(heldout) >= 3 and not {e.opening for e in heldout} & {e.opening for e in examples}
    of_other = [e for e in examples if len(e.opening) == 2]
    assert abs(len(of_other) - 3 * (len(examples) - len(of_other))) <= 3
    with pytest.raises(ValueError, match="no prompt is left to train on"):
        read_all(TrainRun((data,), tmp_path / "out", heldout=12), tiny_target())


def test_a_finished_drafter_is_not_trained_over(tmp_path: Path, data: Path):
    save_drafter(tiny_model(tiny_target().config), tmp_path / "shipped")
    before = (tmp_path / "shipped" / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="holds a finished drafter, not a run to resume"):
        train(TrainRun((data,), tmp_path / "shipped", heldout=3))
    assert (tmp_path / "shipped" / "model.safetensors").read_bytes() == before


def test_two_runs_do_not_train_into_one_folder(tmp_path: Path, data: Path):
    with only_writer(tmp_path / "out", "dspark train"), pytest.raises(ValueError, match="another 'dspark train'"):
        train(TrainRun((data,), tmp_path / "out", heldout=3))


def test_examples_at_the_end_of_the_models_context(tmp_path: Path):
    """Blocks reach past it, and batches are padded: both used to end in an IndexError."""
    path = tmp_path / "long.jsonl"
    rows = [{"prompt_ids": [1, 2, i], "answer_ids": [5, 7, 9] * 100} for i in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    save_drafter(tiny_model(tiny_target().config), tmp_path / "trained")
    run = TrainRun((path,), tmp_path / "out", initial=tmp_path / "trained", heldout=2, max_length=10_000)
    trainer = make_trainer(run, Target(None, tiny_target(), None, frozenset()))  # pyright: ignore
    assert {len(e.token_ids) for e in trainer.examples} == {256}
    assert trainer.step([0, 1]).slots > 0


def test_more_draft_layers_than_the_target_can_give():
    with pytest.raises(ValueError, match="a target of 4 layers gives 1 to 3 draft layers, not 4"):
        default_recipe(tiny_target(), 1, draft_layers=4)
