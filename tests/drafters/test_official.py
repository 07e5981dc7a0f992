"""Parity with the official implementation: checkpoints, training, cached rounds and a whole greedy run."""

import json
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import Qwen3ForCausalLM

from dspark.cli import main
from dspark.drafters.checkpoint import load_drafter, save_drafter, write_official
from dspark.drafters.dspark import DSparkDrafter
from dspark.drafters.model import DSparkModel
from dspark.engine.engine import Engine
from dspark.models.attention import packed_attention
from dspark.models.config import DecoderConfig
from dspark.models.decoder import Decoder
from dspark.sampling import SamplingParams
from dspark.train.blocks import sample_blocks
from dspark.train.loss import LossWeights, SlotTargets, dspark_loss
from tests.drafters.test_dspark import Request
from tests.tiny import tiny_config, tiny_model

GOLDEN = Path(__file__).parents[1] / "golden"
VARIANTS = ("dspark_vanilla", "dspark_gated", "dspark_rnn", "dflash")
FORWARD = load_file(GOLDEN / "target_forward.safetensors")


@cache
def target() -> Decoder:
    model = Qwen3ForCausalLM.from_pretrained(GOLDEN / "target")
    return Decoder(DecoderConfig.from_hf(model.config), model.state_dict(), dtype=torch.float32)


class Golden(NamedTuple):
    """One variant: our model with its weights, and what the official one computed."""

    model: DSparkModel
    training: dict[str, Tensor]
    rounds: dict[str, Tensor]
    run: dict[str, Tensor]


def golden(variant: str) -> Golden:
    folder = GOLDEN / variant
    files = (load_file(folder / f"{n}.safetensors") for n in ("training_forward", "inference_rounds", "greedy_run"))
    model = load_drafter(folder)
    assert isinstance(model, DSparkModel)
    return Golden(model, *files)


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=0)


def test_target_forward():
    for tokens, logits, taps, last in zip(
        FORWARD["input_ids"], FORWARD["logits"], FORWARD["tap_hidden_states"], FORWARD["last_hidden_state"]
    ):
        attention = packed_attention([len(tokens)], target().config, torch.float32, tokens.device)
        output = target().forward(tokens, torch.arange(len(tokens)), attention, (1, 3, 4))
        close(target().logits(output.hidden), logits)
        close(torch.cat(output.taps, -1), taps)
        close(output.hidden, last)


def block_tokens(training: dict[str, Tensor]) -> Tensor:
    """The token before each slot, [S, A, G]."""
    anchors, g = training["anchor_positions"], training["target_ids"].shape[-1]
    positions = (anchors[..., None] + torch.arange(g)).clamp(max=FORWARD["input_ids"].shape[1] - 1)
    return FORWARD["input_ids"].gather(1, positions.flatten(1)).view(positions.shape)


def backbone(model: DSparkModel, training: dict[str, Tensor]) -> Tensor:
    tokens, anchors = FORWARD["input_ids"], training["anchor_positions"]
    return model.backbone(FORWARD["tap_hidden_states"], tokens, anchors, target().embedding)


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_logits_and_confidence(variant: str):
    model, training, *_ = golden(variant)
    with torch.no_grad():
        hidden = backbone(model, training)
        features, confidence = model.heads(hidden, block_tokens(training))
        logits = hidden @ target().lm_head_weight.T + features @ model.w2.T
    seen = training["eval_mask"]
    close(logits[seen], training["draft_logits"][seen])
    if confidence is None:
        assert variant == "dflash" and "confidence_logits" not in training
    else:
        close(confidence[seen], training["confidence_logits"][seen])


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_terms_and_gradients(variant: str):
    model, training, *_ = golden(variant)
    seen = training["eval_mask"]
    sequence, _, slots = seen.nonzero(as_tuple=True)
    hidden = backbone(model, training)
    features, confidence = model.heads(hidden, block_tokens(training))
    positions = (training["anchor_positions"][..., None] + torch.arange(seen.shape[-1]))[seen]
    targets = SlotTargets(
        FORWARD["last_hidden_state"][sequence, positions],
        FORWARD["logits"][sequence, positions].logsumexp(-1),
        training["target_ids"][seen],
        torch.exp(-slots / 4.0),
    )

    def loss(weights: LossWeights) -> Tensor:
        logits = None if confidence is None else confidence[seen]
        head = target().lm_head_weight
        return dspark_loss(hidden[seen], features[seen], model.w2, head, logits, targets, weights)[0]

    paper = LossWeights() if variant != "dflash" else LossWeights(cross_entropy=1.0, total_variation=0.0)
    total = loss(paper)
    close(total, training["loss"])
    terms = {
        "ce": LossWeights(cross_entropy=1.0, total_variation=0.0, confidence=0.0),
        "l1": LossWeights(cross_entropy=0.0, total_variation=1.0, confidence=0.0),
        "confidence": LossWeights(cross_entropy=0.0, total_variation=0.0, confidence=1.0),
    }
    for name, weights in terms.items():
        if variant == "dflash" and name != "ce":
            continue
        theirs = training[f"term.{name}_loss_num"] / training[f"term.{name}_loss_den"]
        close(loss(weights), theirs)
    total.backward()
    for name, theirs in training.items():
        if name.startswith("grad."):
            ours = model.get_parameter(name.removeprefix("grad.")).grad
            assert ours is not None
            assert (ours - theirs).norm() <= 1e-4 * theirs.norm(), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_cached_rounds(variant: str):
    """The cache is extended by what was committed between the rounds, and by that alone."""
    model, _, rounds, _ = golden(variant)
    drafter = DSparkDrafter(model, target())
    drafter.allocate(64)
    tokens, taps = FORWARD["input_ids"][0], FORWARD["tap_hidden_states"][0]
    done = 0
    for name in ("round0", "round1"):
        start = int(rounds[f"{name}.start"])
        positions = torch.arange(done, start)
        drafter.extend(list(taps[done:start].split(64, -1)), tokens[done:start], positions, positions)
        done = start
        request = Request(tokens[: start + 1].tolist())
        hidden = drafter.backbone([request], drafter.block_size)
        close(hidden, rounds[f"{name}.hidden"])
        close(drafter.head(hidden[0])[None], rounds[f"{name}.base_logits"])
        draft = drafter.propose([request], drafter.block_size)
        assert torch.equal(draft.tokens, rounds[f"{name}.tokens"])
        if variant != "dflash":
            close(draft.signals[..., 0], rounds[f"{name}.confidence_logits"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_run_with_the_same_accepted_lengths(variant: str):
    model, _, _, run = golden(variant)
    engine = Engine(target(), DSparkDrafter(model, target()))
    prompt = run["prompt_ids"][0].tolist()
    sequence = engine.add(prompt, SamplingParams(max_new_tokens=60))
    lengths = []
    while engine.has_work:
        lengths += [len(new.token_ids) for new in engine.step()]
    assert prompt + sequence.output_ids == run["output_ids"][0].tolist()
    theirs = run["acceptance_lengths"].tolist()
    # Our first token comes with the prompt; the last round is cut where the answer has its length.
    assert lengths[0] == 1 and lengths[1:-1] == theirs[: len(lengths) - 2]
    assert lengths[-1] <= theirs[len(lengths) - 2]


@pytest.mark.parametrize("variant", VARIANTS)
def test_checkpoints_go_both_ways_bit_for_bit(variant: str, tmp_path: Path):
    theirs, model = load_file(GOLDEN / variant / "model.safetensors"), load_drafter(GOLDEN / variant)
    write_official(model, target().embedding, target().lm_head_weight, tmp_path / "official", torch.float32)
    ours = load_file(tmp_path / "official" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in theirs)
    config, expected = (json.loads((f / "config.json").read_text()) for f in (tmp_path / "official", GOLDEN / variant))
    assert {k: expected[k] for k in config} == config
    again = load_drafter(tmp_path / "official")
    save_drafter(again, tmp_path / "own", torch.float32)
    own = load_drafter(tmp_path / "own")
    assert own.config == again.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(own.state_dict().values(), model.state_dict().values()))


def test_a_pruned_vocabulary_and_other_architectures_are_refused(tmp_path: Path):
    model = load_drafter(GOLDEN / "dspark_vanilla")
    model.d2t[0] = 5
    with pytest.raises(ValueError, match="no pruned draft vocabulary"):
        write_official(model, target().embedding, target().lm_head_weight, tmp_path)
    config = json.loads((GOLDEN / "dspark_vanilla" / "config.json").read_text())
    for changes, message in (
        ({"architectures": ["LlamaForCausalLM"]}, "only Qwen3DSparkModel"),
        ({"confidence_head_with_markov": False}, "confidence head"),
        ({"markov_head_type": "lstm"}, "markov_head must be one of vanilla, gated, rnn"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(ValueError, match=message):
            load_drafter(tmp_path)
    del config["block_size"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="lacks 'block_size'"):
        load_drafter(tmp_path)


def test_unused_slots_do_not_enter_the_loss():
    """The official mask and ours supervise the same slots."""
    training = golden("dspark_vanilla").training
    mask = training["loss_mask"].bool()
    blocks = sample_blocks(mask, 5, 64, [torch.Generator(), torch.Generator()])
    for s in range(len(mask)):
        ours = {int(a): row for a, row in zip(blocks.anchors[s], blocks.supervised[s]) if row.any()}
        for anchor, keep, row in zip(
            training["anchor_positions"][s], training["block_keep_mask"][s], training["eval_mask"][s]
        ):
            if keep:
                assert torch.equal(ours[int(anchor)], row)


def test_export_command(tmp_path: Path, capsys: pytest.CaptureFixture):
    source = GOLDEN / "dspark_gated"
    options = ["--model", str(GOLDEN / "target"), "--out", str(tmp_path / "out"), "--dtype", "fp32"]
    assert main(["export", "--drafter", str(source), *options]) == 0
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", source))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    save_drafter(tiny_model(tiny_config()), tmp_path / "other")
    assert main(["export", "--drafter", str(tmp_path / "other"), *options]) == 2
    assert "trained for a target of" in capsys.readouterr().err
