"""Training a drafter against a frozen target.

`Trainer.step` is the whole of it: features, blocks, backbone, loss, update. Everything around it is
time keeping, evaluation and checkpoints. In several processes each takes its share of a step's examples.
Shapes: S sequences, T positions, A anchors, G block size, C width, N supervised slots.
"""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Muon, Optimizer

from dspark.drafters.checkpoint import save_drafter
from dspark.drafters.copying import Copies
from dspark.drafters.layers import DraftModel
from dspark.drafters.load import CALIBRATION_FILE
from dspark.models.decoder import Decoder
from dspark.models.layers import has_bf16_products
from dspark.train import parallel
from dspark.train.blocks import Blocks, sample_blocks
from dspark.train.checkpoint import Progress, save_training
from dspark.train.config import FREE, TrainConfig, default_loss
from dspark.train.data import Example
from dspark.train.evaluate import accepted_length, by_slot, expected_acceptance
from dspark.train.feature_cache import FeatureCache, model_digest
from dspark.train.features import Batch, FeatureSource, collate, padded_length
from dspark.train.loss import SlotTargets, dspark_loss

SORTED_STEPS = 32  # in the order of their lengths
ROWS = 256  # supervised slots are padded to a multiple of it, see `drafters.layers.LENGTHS`


@dataclass
class StepResult:
    """loss and expected accepted length (bonus included, teacher forced) of one batch; N supervised slots."""

    loss: float
    accepted_length: float
    slots: int


class Trainer:
    """Trains `model` in place on `examples`; `heldout` is for evaluation only.

    decode: what live decoding accepts with a drafter, for the record.
    """

    def __init__(
        self,
        model: DraftModel,
        target: Decoder,
        examples: list[Example],
        heldout: list[Example],
        config: TrainConfig,
        decode: Callable[[DraftModel], list[dict]] = lambda _: [],
    ):
        """Raises ValueError if a step has fewer examples than there are processes, or if nothing compiles here."""
        if min(config.sequences_per_step, len(examples)) < parallel.size():
            raise ValueError(
                f"{parallel.size()} processes need an example each at every step: raise sequences_per_step"
            )
        if config.parallel == "fsdp" and min(config.sequences_per_step, len(examples)) % parallel.size():
            raise ValueError(
                f"with FSDP all processes work in step: give a multiple of {parallel.size()} as sequences_per_step, or "
                "--parallel ddp"
            )
        self.loss_weights = config.loss or default_loss(model)
        self.model, self.target, self.config = model, target, replace(config, loss=self.loss_weights)
        self.examples, self.heldout = examples, heldout
        self.features = FeatureSource(target, model.config.tap_layers, int(config.cache_gib * 2**30))
        if config.feature_cache is not None:
            folder, size = Path(config.feature_cache), int(config.feature_cache_gib * 2**30)
            self.features = FeatureCache(self.features, folder, examples + heldout, size)
        model.to(target.device)
        if config.compile:
            check_compiler(target.device)
            model.compile(dynamic=True)
        self.global_loss = parallel.wrap(model, self.loss, config.parallel)
        self.optimizers = make_optimizers(model, config)
        self.decode = decode
        self.progress = Progress()
        self.bind_draft_vocabulary()

    def bind_draft_vocabulary(self) -> None:
        """Derive the pruned LM head and the map to draft ids from the model's `d2t`."""
        target, model = self.target, self.model
        self.head = target.lm_head_weight[model.d2t].to(self.product_dtype)  # [V', C]
        self.t2d = model.t2d

    # -- one step ---------------------------------------------------------------------------------

    def step(self, indices: list[int]) -> StepResult:
        """One update on the examples of these indices, shared out over the processes."""
        mine, size = parallel.share(indices), self.config.sequences_at_once
        parts = [mine[i : i + size] for i in range(0, len(mine), size)]
        blocks = [self.sample_blocks(part, self.examples, 1 + self.progress.step) for part in parts]
        weights = [self.slot_weights(b.supervised.nonzero()[:, 2]).sum() for b in blocks]
        weight_sum = parallel.total(torch.stack(weights).sum())
        self.model.zero_grad(set_to_none=True)
        loss_sum = torch.zeros(1, device=self.target.device)
        tally = torch.zeros(2, self.model.config.block_size, device=self.target.device)
        for part, of_part in zip(parts, blocks, strict=True):
            parallel.exchange_gradients(self.global_loss, part is parts[-1])
            loss, acceptance, slots = self.global_loss(self.batch(part, self.examples), of_part, weight_sum)
            (parallel.size() * loss).backward()  # processes take the mean of what is to be summed
            loss_sum += loss.detach()
            tally += by_slot(acceptance, slots, self.model.config.block_size)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        loss_sum += 0 * norm  # no number if that is none: then neither are the weights from here on
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["scale"] * self.learning_rate()
            optimizer.step()
        result = parallel.total(torch.cat([loss_sum, tally.flatten()])).cpu()  # the one wait for the device
        tally = result[1:].view(2, -1)
        return StepResult(result[0].item(), accepted_length(tally), int(tally[1].sum()))

    def sample_blocks(self, indices: list[int], examples: list[Example], step: int) -> Blocks:
        """Blocks of these examples, others at each step: slots are supervised inside answers only."""
        length = padded_length([examples[i] for i in indices])
        loss_mask = torch.zeros(len(indices), length, dtype=torch.bool, device=self.target.device)
        for row, i in zip(loss_mask, indices, strict=True):
            for start, end in examples[i].answer_spans:
                row[start:end] = True
        first = (self.config.seed * 1_000_003 + step) * 1_000_003
        generators = [torch.Generator().manual_seed((first + i) % 2**63) for i in indices]
        return sample_blocks(loss_mask, self.model.config.block_size, self.config.anchors_per_sequence, generators)

    def slot_weights(self, slots: Tensor) -> Tensor:
        """w_k of slot indices [N]."""
        return torch.exp(-slots / self.loss_weights.decay)

    def loss(self, batch: Batch, blocks: Blocks, weight_sum: Tensor | None = None) -> tuple[Tensor, ...]:
        """(loss, acceptance [N], slot index [N]) on blocks of the batch.

        weight_sum: of the slot weights of the whole step, of which the batch may be a part.
        """
        fast = self.product_dtype is torch.bfloat16
        with torch.autocast(self.target.device.type, torch.bfloat16, enabled=fast):
            outputs = self.model(batch.taps.float(), batch.tokens, blocks.anchors, self.target.embedding)
        index = blocks.supervised.flatten().nonzero()[:, 0]
        count = len(index)
        index = torch.cat([index, index[:1].expand(-count % ROWS)])  # padding, which weighs nothing
        sequence, _, slots = torch.unravel_index(index, blocks.supervised.shape)  # [N] each
        positions = blocks.positions().flatten()[index]
        rows = positions - batch.starts[sequence]
        weights = self.slot_weights(slots)
        weights[count:] = 0.0
        targets = SlotTargets(
            batch.hidden[sequence, rows].float(),
            batch.logsumexp[sequence, rows],
            self.t2d[batch.tokens[sequence, positions + 1]],
            weights,
        )
        hidden, features = (t.flatten(0, 2).index_select(0, index) for t in (outputs.hidden, outputs.features))
        confidence = None if outputs.confidence is None else outputs.confidence.flatten()[index]
        copies = None if outputs.copies is None else self.copies(outputs.copies, index)
        loss, acceptance = dspark_loss(
            hidden, features, outputs.w2, self.head, confidence, targets, self.loss_weights, weight_sum, copies
        )
        return loss, acceptance[:count], slots[:count]

    def copies(self, copies: Copies, index: Tensor) -> tuple[Tensor, Tensor]:
        """Draft-vocabulary indices [N] and bias [N] of slots [S*A*G] at `index`: no bias outside of that vocabulary."""
        tokens, bias = (t.flatten()[index] for t in copies)
        ids = self.t2d[tokens]
        return ids.clamp(min=0), torch.where(ids >= 0, bias, 0.0)

    @property
    def product_dtype(self) -> torch.dtype:
        """bf16 for a bf16 target where the device multiplies that fast; weights, norms and softmaxes stay fp32."""
        target = self.target
        fast = target.dtype is torch.bfloat16 and has_bf16_products(target.device)
        return torch.bfloat16 if fast else torch.float32

    def batch(self, indices: list[int], examples: list[Example]) -> Batch:
        chosen = [examples[i] for i in indices]
        return collate(chosen, self.features.get(chosen))

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

    def next_indices(self) -> list[int]:
        """Examples of the coming step: epochs are seeded permutations, in which those of a step are of like length.

        So little of a batch is padding. Steps of a length stay apart: only SORTED_STEPS of them are sorted together.
        """
        size = min(self.config.sequences_per_step, len(self.examples))
        epoch, i = divmod(self.progress.step, self.steps_per_epoch)
        generator = torch.Generator().manual_seed(self.config.seed * 7_919 + epoch)
        order = torch.randperm(len(self.examples), generator=generator)
        first = i - i % SORTED_STEPS
        window = order[first * size : min(first + SORTED_STEPS, self.steps_per_epoch) * size].tolist()
        steps = torch.tensor(sorted(window, key=lambda j: len(self.examples[j]))).view(-1, size)
        return steps[torch.randperm(len(steps), generator=generator)[i - first]].tolist()

    # -- the run ----------------------------------------------------------------------------------

    def run(
        self,
        folder: Path,
        on_step: Callable[[StepResult], None] = lambda _: None,
        should_stop: Callable[[], bool] = lambda: False,
        on_evaluation: Callable[[dict], None] = lambda _: None,
    ) -> bool:
        """Train until the budget is used up (True) or `should_stop()` in any process (False).

        `folder` gets a resumable state at the end, after evaluations and by the clock, and the drafter of the best
        evaluation. The callbacks are called after each step and evaluation.
        Raises ValueError without held-out examples, and when the loss is no longer a number.
        """
        if not self.heldout:
            raise ValueError("a training run needs at least one held-out example")
        stopped = self.agree(should_stop()) > 0
        next_save = self.progress.seconds + 60 * self.config.save_every_minutes
        while True:
            done = self.share_done >= 1
            due, seen = (int(s * self.config.evaluations) for s in (self.share_done, self.progress.share_evaluated))
            evaluating = not stopped and due > seen
            if evaluating:
                if not self.progress.history:
                    save_training(self, folder)  # a kill must not leave a drafter and nothing to resume from
                on_evaluation(self.evaluate(folder))
            if done or stopped or evaluating or self.progress.seconds >= next_save:
                save_training(self, folder)
                next_save = self.progress.seconds + 60 * self.config.save_every_minutes
            if done or stopped:
                return not stopped
            started = time.perf_counter()
            result = self.step(self.next_indices())
            if not math.isfinite(result.loss):
                raise ValueError(
                    f"the loss or its gradient is no number at step {self.progress.step + 1}: go on from the best "
                    f"drafter before that, --initial '{folder}' if there was an evaluation, with another --out and a "
                    "smaller --learning-rate"
                )
            self.progress.step += 1
            self.progress.slots += result.slots
            self.progress.seconds += self.agree((time.perf_counter() - started) / parallel.size())
            on_step(result)
            stopped = self.agree(should_stop()) > 0

    def agree(self, value: float) -> float:
        """The sum over all processes, so that they decide alike."""
        return value if parallel.size() == 1 else parallel.total(torch.tensor(value, device=self.target.device)).item()

    def evaluate(self, folder: Path) -> dict:
        """Measure on held-out examples, for the history, and keep the drafter if no evaluation was better."""
        model = parallel.gathered(self.model)
        entry = {
            "step": self.progress.step,
            "seconds": round(self.progress.seconds, 1),
            "slots": self.progress.slots,
            **expected_acceptance(self),
        }
        history = self.progress.history
        if parallel.rank() == 0:
            if (len(history) + 1) % self.config.decode_every == 0 or self.share_done >= 1:
                entry["decoded"] = self.decode(model)
            if all(entry["heldout_accepted_length"] >= e["heldout_accepted_length"] for e in history):
                save_drafter(model, folder)
                (folder / CALIBRATION_FILE).unlink(missing_ok=True)  # it was of other weights
        history.append(entry)
        self.progress.share_evaluated = self.share_done
        return entry

    @cached_property
    def identity(self) -> dict:
        """What a resumed run must share with the one that was stopped."""
        digest = sha256()
        for example in [*self.heldout, *self.examples]:
            digest.update(repr(example).encode())
        return {
            "target": {"dtype": str(self.target.dtype), "digest": model_digest(self.target)},
            "training": {name: value for name, value in asdict(self.config).items() if name not in FREE},
            "drafter": {"kind": self.model.config.kind, **asdict(self.model.config)},
            "data": {
                "examples": len(self.examples),
                "answer_tokens": sum(len(e.answer_tokens) for e in self.examples),
                "heldout_examples": len(self.heldout),
                "digest": digest.hexdigest(),
            },
        }


def check_compiler(device: torch.device) -> None:
    """Raise ValueError unless torch.compile works here."""
    try:
        torch.compile(torch.sin)(torch.zeros(8, device=device))
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"torch.compile does not work here ({reason}); install g++, or train without --compile"
        ) from None


def make_optimizers(model: nn.Module, config: TrainConfig) -> list[Optimizer]:
    """AdamW over the Markov and copy heads and the rest, of which Muon may take the matrices.

    `scale` of each group multiplies the schedule's learning rate; Muon's updates are as large as AdamW's.
    """
    head, matrices, rest = [], [], []
    for name, parameter in model.named_parameters():
        if name.startswith(("markov_head.", "copy_head.")):
            head.append(parameter)
        elif config.optimizer == "muon" and parameter.ndim == 2 and min(parameter.shape) > 1:
            matrices.append(parameter)
        else:
            rest.append(parameter)
    groups = {"scale": 1.0, "params": rest}, {"scale": config.head_learning_rate_scale, "params": head}
    # Fused: one pass over the weights, 21 % of a step became 1 %.
    adamw = AdamW(groups, lr=0.0, weight_decay=config.weight_decay, betas=(0.9, 0.95), fused=True)
    if not matrices:
        return [adamw]
    of_matrices = [{"scale": 1.0, "params": matrices}]
    return [adamw, Muon(of_matrices, lr=0.0, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw")]
