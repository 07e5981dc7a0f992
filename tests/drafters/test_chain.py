"""What EAGLE-3 and MTP start from and refuse; the rest is in test_kinds.py."""

from dataclasses import replace

import pytest

from dspark.drafters.eagle3 import Eagle3Config, Eagle3Model
from dspark.models.decoder import layer_shapes
from tests.drafters.test_dspark import TARGET, TOKENS, Request, extended
from tests.drafters.test_kinds import WARM, proposal
from tests.tiny import plain_logits, tiny_chain, tiny_state_dict


def test_eagle3_starts_as_the_targets_last_layer():
    """It then says of the anchor what the target said of it one position before, all but exactly: position 0, which
    has no feature, is one key more."""
    state = tiny_state_dict(TARGET.config)
    model = Eagle3Model(Eagle3Config(TARGET.config, (0, 2), 4, 64))
    layer = {n: state[f"model.layers.3.{n}"] for n in layer_shapes(TARGET.config)}
    model.initialize_from_target([layer], state["model.norm.weight"], state["model.embed_tokens.weight"], 1.0)
    _, probs = proposal(extended(model), Request(TOKENS, WARM))
    around = (plain_logits(TARGET, TOKENS)[-3:] / 0.8).softmax(-1)
    errors = (probs[0, 0] - around).abs().amax(-1)
    assert errors[1] < 0.01 and min(errors[0], errors[2]) > 0.05


def test_mtp_reads_one_layer():
    with pytest.raises(ValueError, match="MTP reads one target layer, not 2"):
        replace(tiny_chain("mtp", TARGET.config).config, tap_layers=(1, 3))
