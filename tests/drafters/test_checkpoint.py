"""Drafter checkpoints come back bit for bit, and a damaged or foreign one is refused with its name."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dspark.drafters.checkpoint import load_drafter, save_drafter
from dspark.drafters.layers import check_fit
from dspark.drafters.model import DSparkModel
from tests.tiny import tiny_config, tiny_model


@pytest.fixture
def model() -> DSparkModel:
    return tiny_model(tiny_config(), draft_vocab_size=20)


@pytest.fixture
def folder(model: DSparkModel, tmp_path: Path) -> Path:
    save_drafter(model, tmp_path / "drafter")
    return tmp_path / "drafter"


def test_saved_and_loaded_is_the_model_rounded_to_bf16(model: DSparkModel, folder: Path):
    loaded = load_drafter(folder)
    assert loaded.config == model.config
    for name, tensor in model.state_dict().items():
        expected = tensor.bfloat16().float() if tensor.is_floating_point() else tensor
        assert torch.equal(loaded.state_dict()[name], expected), name


def test_a_second_round_trip_changes_no_bit(folder: Path, tmp_path: Path):
    save_drafter(load_drafter(folder), tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("size", [0, 5, 1000, -1])
def test_a_truncated_weights_file_is_refused(folder: Path, size: int):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"model\.safetensors' cannot be read"):
        load_drafter(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(folder: Path, name: str):
    (folder / name).unlink()
    with pytest.raises(ValueError, match=name):
        load_drafter(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"markov_rank": 7}, r"does not fit its config\.json: .*markov_w"),
        ({"num_draft_layers": 3}, r"does not fit its config\.json"),
        ({"num_draft_layers": 1}, r"does not fit its config\.json"),
        ({"block_size": 0}, "block_size"),
        ({"block_size": 10**9}, "block_size"),
        ({"gamma": 4}, "unknown keys gamma"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(folder: Path, change: dict, message: str):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        load_drafter(folder)


@pytest.mark.parametrize("token", [64, -1, 999])
def test_a_draft_vocabulary_that_is_none_is_refused(folder: Path, token: int):
    """An id past the vocabulary would only fail later, deep in a forward pass; nor may an id stand twice (999)."""
    tensors = load_file(folder / "model.safetensors")
    tensors["d2t"][-1] = tensors["d2t"][0] if token == 999 else token
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match="d2t"):
        load_drafter(folder)


def test_blocks_longer_than_the_targets_context_are_refused(model: DSparkModel):
    short = replace(model.config.decoder, max_position_embeddings=4)
    with pytest.raises(ValueError, match="leave no room in this target's context of 4"):
        check_fit(model.config, short)
