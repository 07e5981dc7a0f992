"""The checkpoint format of the official implementation (DeepSpec).

One folder: `config.json` (a Qwen3 config with the drafter's fields beside it) and `model.safetensors` with flat names,
the target's frozen embedding and LM head included.
"""

from dataclasses import asdict, replace

import torch
from torch import Tensor
from transformers import AutoConfig

from dspark.config import from_dict
from dspark.drafters.layers import DrafterConfig
from dspark.drafters.model import DSparkConfig, DSparkModel
from dspark.models.config import DecoderConfig

ARCHITECTURE = "Qwen3DSparkModel"
FROZEN = ("embed_tokens.weight", "lm_head.weight")
OFFICIAL_NAMES = {  # of fields of DSparkConfig
    "tap_layers": "target_layer_ids",
    "block_size": "block_size",
    "num_draft_layers": "num_hidden_layers",
    "markov_rank": "markov_rank",
    "mask_token_id": "mask_token_id",
}


def official_to_config(config: dict) -> DSparkConfig:
    """Raises ValueError for another architecture and for what our drafter does not compute."""
    if config.get("architectures") != [ARCHITECTURE]:
        raise ValueError(f"architecture {config.get('architectures')} is not supported; only {ARCHITECTURE} is")
    for name in ("num_target_layers", *OFFICIAL_NAMES.values()):
        if name not in config:
            raise ValueError(f"config.json lacks '{name}'")
    has_confidence = config.get("enable_confidence_head", False)
    if has_confidence and config["markov_rank"] and not config.get("confidence_head_with_markov", False):
        raise ValueError("a confidence head that does not see the token before its slot is not supported")
    layer = DecoderConfig.from_hf(
        AutoConfig.for_model("qwen3", **{k: v for k, v in config.items() if k not in ("architectures", "model_type")})
    )
    ours = {name: config[theirs] for name, theirs in OFFICIAL_NAMES.items()} | {
        "decoder": asdict(replace(layer, num_layers=config["num_target_layers"])),
        "draft_vocab_size": layer.vocab_size,
        "markov_head": config.get("markov_head_type", "vanilla"),
        "confidence_head": has_confidence,
    }
    return from_dict(DSparkConfig, ours, "the drafter")


def drafter_tensors(tensors: dict[str, Tensor], config: DrafterConfig) -> dict[str, Tensor]:
    """The state dict of `DSparkModel`: without the target's tensors, with the whole vocabulary to draft from."""
    state = {name: t for name, t in tensors.items() if name not in FROZEN}
    return state | {"d2t": torch.arange(config.decoder.vocab_size)}


def official_tensors(model: DSparkModel, embedding: Tensor, lm_head: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """What `model.safetensors` holds; embedding and lm_head [V, C] are the target's.

    Raises ValueError for a pruned draft vocabulary, which the format cannot say.
    """
    vocab_size = model.config.decoder.vocab_size
    if not torch.equal(model.d2t.cpu().long(), torch.arange(vocab_size)):
        raise ValueError("the official format has no pruned draft vocabulary; train with --official")
    state = {name: t for name, t in model.state_dict().items() if name != "d2t"}
    state |= dict(zip(FROZEN, (embedding, lm_head), strict=True))
    return {name: t.detach().cpu().to(dtype).contiguous() for name, t in sorted(state.items())}


def config_to_official(config: DSparkConfig, dtype: torch.dtype) -> dict:
    """config.json of the format. Raises ValueError for what it cannot say and for a target that is no Qwen3."""
    c = config.decoder
    if config.window or config.own_position or config.feature_input or config.copy_length:
        raise ValueError(
            "the official format has no draft window, no masks that predict their own position, no feature input and "
            "no copy head; train with --official"
        )
    if not c.qk_norm or c.qkv_bias:
        raise ValueError("the official format is for drafters of Qwen3 targets")
    heads = {"enable_confidence_head": config.confidence_head}
    if config.markov_rank:
        heads |= {"confidence_head_with_markov": config.confidence_head, "markov_head_type": config.markov_head}
    names = "head_dim", "hidden_size", "intermediate_size", "max_position_embeddings", "rms_norm_eps", "vocab_size"
    return {
        **heads,
        **{theirs: getattr(config, ours) for ours, theirs in OFFICIAL_NAMES.items()},
        **{name: getattr(c, name) for name in names},
        "architectures": [ARCHITECTURE],
        "attention_bias": False,
        "dtype": str(dtype).removeprefix("torch."),
        "hidden_act": "silu",
        "model_type": "qwen3",
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "num_target_layers": c.num_layers,
        "rope_parameters": {"rope_theta": c.rope_theta, "rope_type": "default"},
        "tie_word_embeddings": c.tie_embeddings,
    }
