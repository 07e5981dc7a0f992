"""EAGLE-3 (arXiv 2503.01840): a chain whose layer attends over [token; feature] and whose features fuse several taps.

The layer's input norm is the token's, the feature has one of its own and is the residual.
Shapes: C width.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dspark.drafters.chain import ChainModel
from dspark.drafters.layers import DrafterConfig, RMSNorm


@dataclass(frozen=True)
class Eagle3Config(DrafterConfig):
    kind: ClassVar[str] = "eagle3"


class Eagle3Model(ChainModel[Eagle3Config]):
    def __init__(self, config: Eagle3Config):
        c = config.decoder
        super().__init__(config, 2 * c.hidden_size)
        self.fc = nn.Linear(len(config.tap_layers) * c.hidden_size, c.hidden_size, bias=False)
        self.hidden_norm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def fuse(self, taps: Tensor) -> Tensor:
        return self.fc(taps)

    def pair(self, embeddings: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        normed = self.layer.input_layernorm(embeddings), self.hidden_norm(features)
        return features, torch.cat(normed, -1)

    @torch.no_grad()
    def initialize_from_target(
        self, layers: list[dict[str, Tensor]], final_norm: Tensor, embedding: Tensor, tap_rms: float
    ) -> None:
        """Start as a copy of the one layer given, which reads the last tap; attention learns to read the token."""
        (source,) = layers
        c = self.config.decoder.hidden_size
        wide = {f"self_attn.{n}_proj.weight": F.pad(source[f"self_attn.{n}_proj.weight"], (c, 0)) for n in "qkv"}
        ones = torch.ones_like(final_norm)
        self.layer.load_state_dict(source | wide | {"input_layernorm.weight": ones})
        self.hidden_norm.weight.copy_(source["input_layernorm.weight"])
        self.fc.weight.zero_()
        self.fc.weight[:, -c:].copy_(torch.eye(c))
        self.norm.weight.copy_(final_norm)
