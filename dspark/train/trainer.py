"""Training a drafter against a frozen target.

`Trainer.step` is the whole of it: features, blocks, backbone, loss, update. Everything around it is
time keeping, evaluation and checkpoints.
Shapes: S sequences, T positions, A anchors, G block size, C width, N supervised slots.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from dspark.drafters.layers import DraftModel
from dspark.drafters.model import DSparkConfig
from dspark.models.decoder import Decoder
from dspark.models.layers import has_bf16_products
from dspark.train.blocks import Blocks, sample_blocks
from dspark.train.checkpoint import Progress, save_training
from dspark.train.data import Example
from dspark.train.feature_cache import FeatureCache
from dspark.train.features import FeatureSource, FeatureStore
from dspark.train.loss import LossWeights, SlotTargets, dspark_loss

DSPARK_LOSS = LossWeights(distillation=1.0)  # the paper's three terms and a fourth for short runs
DFLASH_LOSS = LossWeights(cross_entropy=1.0, total_variation=0.0, confidence=0.0)
CHAIN_LOSS = LossWeights(cross_entropy=0.0, total_variation=0.0, confidence=0.0, distillation=1.0)


@dataclass(frozen=True)
class TrainConfig:
    """One training run. `minutes` of training time are the budget and the schedule follows them; or `epochs`, if given.

    By epochs the weights depend on data and seed alone, by minutes on the speed of the machine too.
    """

    minutes: float = 60.0
    epochs: float | None = None
    learning_rate: float = 6e-4
    head_learning_rate_scale: float = 5.0  # the Markov head starts from zero and must reach logits of several units
    warmup_share: float = 0.04
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    sequences_per_step: int = 1
    sequences_at_once: int = 1  # of a step, in memory together; gradients of the others are added to theirs
    anchors_per_sequence: int = 256
    cache_gib: float = 6.0  # memory for the target's features
    feature_cache: str | None = None  # a folder for them on disk instead
    feature_cache_gib: float = 50.0
    eval_every_minutes: float = 5.0
    seed: int = 0
    loss: LossWeights | None = None  # None: what `default_loss` says

    def __post_init__(self) -> None:
        if not self.minutes > 0 or (self.epochs is not None and not self.epochs > 0):
            raise ValueError("a training run needs minutes or epochs above 0")
        for name in ("sequences_per_step", "sequences_at_once", "anchors_per_sequence"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")


@dataclass
class Batch:
    """S padded examples: tokens [S, T], taps [S, T, taps*C], hidden [S, T, C], logsumexp [S, T]."""

    tokens: Tensor
    taps: Tensor
    hidden: Tensor
    logsumexp: Tensor


@dataclass
class StepResult:
    """loss and expected accepted length (bonus included, teacher forced) of one batch; N supervised slots."""

    loss: float
    accepted_length: float
    slots: int


class Trainer:
    """Trains `model` in place on `examples`; `heldout` is for evaluation only."""

    def __init__(
        self,
        model: DraftModel,
        target: Decoder,
        examples: list[Example],
        heldout: list[Example],
        config: TrainConfig,
    ):
        self.loss_weights = config.loss or default_loss(model)
        self.model, self.target, self.config = model, target, replace(config, loss=self.loss_weights)
        self.examples, self.heldout = examples, heldout
        # Held-out examples carry negative indices, so that both share one bounded cache.
        self.features: FeatureStore = FeatureSource(target, model.config.tap_layers, int(config.cache_gib * 2**30))
        if config.feature_cache is not None:
            folder, size = Path(config.feature_cache), int(config.feature_cache_gib * 2**30)
            self.features = FeatureCache(self.features, folder, examples + heldout, size)
        head = [p for name, p in model.named_parameters() if name.startswith("markov_head.")]
        rest = [p for name, p in model.named_parameters() if not name.startswith("markov_head.")]
        self.optimizer = torch.optim.AdamW(
            [{"params": rest}, {"params": head}],
            lr=0.0,
            weight_decay=config.weight_decay,
            betas=(0.9, 0.95),
            fused=True,  # one pass over the weights: 21 % of a step became 1 %
        )
        self.progress = Progress()
        self.bind_draft_vocabulary()

    def bind_draft_vocabulary(self) -> None:
        """Derive the pruned LM head and the map to draft ids from the model's `d2t`."""
        target, model = self.target, self.model
        self.head = target.lm_head_weight[model.d2t].to(self.product_dtype)  # [V', C]
        t2d = torch.full((target.config.vocab_size,), -1)
        t2d[model.d2t] = torch.arange(len(model.d2t))
        self.t2d = t2d

    # -- one step ---------------------------------------------------------------------------------

    def step(self, indices: list[int]) -> StepResult:
        """One update on the examples of these indices."""
        size = self.config.sequences_at_once
        parts = [indices[i : i + size] for i in range(0, len(indices), size)]
        blocks = [self.sample_blocks(part, self.examples, 1 + self.progress.step) for part in parts]
        weight_sum = sum(self.slot_weights(b.supervised.nonzero()[:, 2]).sum() for b in blocks)
        self.optimizer.zero_grad(set_to_none=True)
        losses, acceptances, slots = [], [], []
        for part, of_part in zip(parts, blocks, strict=True):
            loss, acceptance, slot = self.loss(self.collate(part, self.examples), of_part, weight_sum)
            loss.backward()
            losses.append(loss.item())
            acceptances.append(acceptance)
            slots.append(slot)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        for group, scale in zip(self.optimizer.param_groups, (1.0, self.config.head_learning_rate_scale), strict=True):
            group["lr"] = scale * self.learning_rate()
        self.optimizer.step()
        slot = torch.cat(slots)
        length = accepted_length(torch.cat(acceptances), slot, self.model.config.block_size)
        return StepResult(sum(losses), length, len(slot))

    def sample_blocks(self, indices: list[int], examples: list[Example], step: int) -> Blocks:
        """Blocks of these examples, others at each step: slots are supervised inside answers only."""
        length = max(len(examples[i].token_ids) for i in indices)
        loss_mask = torch.zeros(len(indices), length, dtype=torch.bool)
        for row, i in zip(loss_mask, indices, strict=True):
            for start, end in examples[i].answer_spans:
                row[start:end] = True
        first = (self.config.seed * 1_000_003 + step) * 1_000_003
        generators = [torch.Generator().manual_seed((first + i) % 2**63) for i in indices]
        return sample_blocks(loss_mask, self.model.config.block_size, self.config.anchors_per_sequence, generators)

    def slot_weights(self, slots: Tensor) -> Tensor:
        """w_k of slot indices [N]."""
        return torch.exp(-slots / self.loss_weights.decay)

    def loss(self, batch: Batch, blocks: Blocks, weight_sum: Tensor | float | None = None) -> tuple[Tensor, ...]:
        """(loss, acceptance [N], slot index [N]) on blocks of the batch.

        weight_sum: of the slot weights of the whole step, of which the batch may be a part.
        """
        with self.autocast():
            outputs = self.model(batch.taps.float(), batch.tokens, blocks.anchors, self.target.embedding)
        supervised = blocks.supervised
        sequence, _, slots = supervised.nonzero(as_tuple=True)  # [N] each
        positions = blocks.positions()[supervised]
        targets = SlotTargets(
            batch.hidden[sequence, positions].float(),
            batch.logsumexp[sequence, positions],
            self.t2d[batch.tokens[sequence, positions + 1]],
            slots,
            self.slot_weights(slots),
        )
        loss, acceptance = dspark_loss(
            outputs.hidden[supervised],
            outputs.features[supervised],
            outputs.w2,
            self.head,
            None if outputs.confidence is None else outputs.confidence[supervised],
            targets,
            self.loss_weights,
            weight_sum,
        )
        return loss, acceptance, slots

    @property
    def product_dtype(self) -> torch.dtype:
        """bf16 for a bf16 target where the device multiplies that fast; weights, norms and softmaxes stay fp32."""
        target = self.target
        fast = target.dtype is torch.bfloat16 and has_bf16_products(target.device)
        return torch.bfloat16 if fast else torch.float32

    def autocast(self) -> torch.autocast:
        fast = self.product_dtype is torch.bfloat16
        return torch.autocast(self.target.device.type, torch.bfloat16, enabled=fast)

    def collate(self, indices: list[int], examples: list[Example]) -> Batch:
        """Examples padded to the longest; no block sees or is trained towards what is padding."""
        sign, chosen = -1 if examples is self.heldout else 1, [examples[i] for i in indices]
        features = self.features.get([sign * (i + 1) for i in indices], chosen)
        length, answers = max(len(e.token_ids) for e in chosen), [len(e.first_prompt) for e in chosen]

        def stack(rows: list[Tensor], starts: list[int] | None = None) -> Tensor:
            """[S, T, ...] from rows that begin at `starts`, at 0 by default."""
            padded = rows[0].new_zeros(len(rows), length, *rows[0].shape[1:])
            for row, target, start in zip(rows, padded, starts or [0] * len(rows), strict=True):
                target[start : start + len(row)] = row
            return padded

        return Batch(
            stack([torch.tensor(e.token_ids) for e in chosen]),
            stack([f.taps for f in features]),
            stack([f.hidden for f in features], answers),
            stack([f.logsumexp for f in features], answers),
        )

    # -- schedule ---------------------------------------------------------------------------------

    @property
    def share_done(self) -> float:
        if self.config.epochs is not None:
            return min(1.0, self.progress.step / (self.config.epochs * self.steps_per_epoch))
        return min(1.0, self.progress.seconds / (60 * self.config.minutes))

    @property
    def steps_per_epoch(self) -> int:
        return len(self.examples) // min(self.config.sequences_per_step, len(self.examples))

    def learning_rate(self) -> float:
        """Linear warm-up, then a cosine to zero, over the budget."""
        warmup = self.config.warmup_share
        if self.share_done < warmup:
            return self.config.learning_rate * max(self.share_done / warmup, 0.02)
        return self.config.learning_rate * 0.5 * (1 + math.cos(math.pi * (self.share_done - warmup) / (1 - warmup)))

    def batches(self) -> Iterator[list[int]]:
        """Example indices of the steps from the current one on: epochs of seeded permutations."""
        size = min(self.config.sequences_per_step, len(self.examples))
        step = self.progress.step
        while True:
            epoch, offset = divmod(step, self.steps_per_epoch)
            generator = torch.Generator().manual_seed(self.config.seed * 7_919 + epoch)
            order = torch.randperm(len(self.examples), generator=generator).tolist()
            yield order[offset * size : (offset + 1) * size]
            step += 1

    # -- the run ----------------------------------------------------------------------------------

    def run(
        self,
        checkpoint: Path,
        on_step: Callable[[StepResult], None] = lambda _: None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """Train until the budget is used up or `should_stop()`; a resumable state is left either way.

        State is also written after every evaluation. on_step is called after each step.
        """
        interval = 60 * self.config.eval_every_minutes
        next_eval = self.progress.seconds + interval
        for indices in self.batches():
            if self.share_done >= 1 or should_stop():
                break
            started = time.perf_counter()
            result = self.step(indices)
            self.progress.step += 1
            self.progress.slots += result.slots
            self.progress.seconds += time.perf_counter() - started
            on_step(result)
            if self.progress.seconds >= next_eval:
                self.evaluate()
                save_training(self, checkpoint)
                next_eval = self.progress.seconds + interval
        if not should_stop():
            self.evaluate()
        save_training(self, checkpoint)

    def describe_data(self) -> dict:
        """What was trained on, for the record."""
        return {
            "examples": len(self.examples),
            "answer_tokens": sum(len(e.answer_tokens) for e in self.examples),
            "heldout_examples": len(self.heldout),
        }

    @torch.no_grad()
    def evaluate(self) -> dict:
        """Loss and acceptance by slot on held-out examples, appended to the history."""
        losses, acceptances, slots = [], [], []
        for i in range(len(self.heldout)):
            blocks = self.sample_blocks([i], self.heldout, 0)
            loss, acceptance, slot = self.loss(self.collate([i], self.heldout), blocks)
            losses.append(loss.item())
            acceptances.append(acceptance)
            slots.append(slot)
        acceptance, slot = torch.cat(acceptances), torch.cat(slots)
        by_slot = [round(acceptance[slot == k].mean().item(), 4) for k in range(self.model.config.block_size)]
        entry = {
            "step": self.progress.step,
            "seconds": round(self.progress.seconds, 1),
            "slots": self.progress.slots,
            "heldout_loss": round(sum(losses) / len(losses), 4),
            "heldout_acceptance_by_slot": by_slot,
            "heldout_accepted_length": round(accepted_length(acceptance, slot, len(by_slot)), 4),
        }
        self.progress.history.append(entry)
        return entry


def default_loss(model: DraftModel) -> LossWeights:
    """Of DSpark, of DFlash where it has no sequential head, or of drafters that draft token by token."""
    if not isinstance(model.config, DSparkConfig):
        return CHAIN_LOSS
    return DSPARK_LOSS if model.config.markov_rank else DFLASH_LOSS


def accepted_length(acceptance: Tensor, slots: Tensor, block_size: int) -> float:
    """Expected tokens a round, 1 + sum over k of the product of mean acceptances up to slot k."""
    total, survival = 1.0, 1.0
    for k in range(block_size):
        at_slot = acceptance[slots == k]
        if not len(at_slot):
            break
        survival *= at_slot.mean().item()
        total += survival
    return total
