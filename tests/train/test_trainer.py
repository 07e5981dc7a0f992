"""Training: it learns, it stops when told to, and a resumed run is the run that was never stopped."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import save_file

from dspark.drafters.checkpoint import load_drafter
from dspark.train import parallel
from dspark.train.checkpoint import PROGRESS_FILE, last_state, resume_training, save_training
from dspark.train.config import TrainConfig
from dspark.train.trainer import Trainer
from tests.tiny import make_example, tiny_model, tiny_target
from tests.train.tiny_run import saved_tensors


def make_trainer(minutes: float = 60.0, dtype: torch.dtype = torch.float32, **changes) -> Trainer:
    target = tiny_target(dtype)
    of_run = {name: changes.pop(name) for name in list(changes) if hasattr(TrainConfig, name)}
    model = tiny_model(target.config, draft_vocab_size=40, **changes)
    generator = torch.Generator().manual_seed(1)
    examples = [
        make_example(tuple(ids[:6]), tuple(ids[6:]))
        for ids in (torch.randint(0, 64, (20,), generator=generator).tolist() for _ in range(10))
    ]
    return Trainer(
        model, target, examples[2:], examples[:2], TrainConfig(**{"minutes": minutes, "learning_rate": 3e-3, **of_run})
    )


def run_steps(trainer: Trainer, folder, steps: int) -> list[float]:
    """Train for so many steps on a clock that ticks one second a step, so that schedules are repeatable."""
    losses = []

    def on_step(result) -> None:
        losses.append(result.loss)
        trainer.progress.seconds = float(trainer.progress.step)

    trainer.run(folder, on_step, lambda: len(losses) >= steps)
    return losses


def state_of(folder: Path) -> Path:
    state = last_state(folder)
    assert state is not None
    return state


def resume(trainer: Trainer, folder: Path) -> None:
    resume_training(trainer, state_of(folder))


DFLASH = {"markov_rank": 0, "confidence_head": False}


@pytest.mark.parametrize("changes", [{}, {"markov_head": "gated"}, {"markov_head": "rnn"}, DFLASH], ids=str)
def test_the_loss_falls(tmp_path, changes: dict):
    losses = run_steps(make_trainer(**changes), tmp_path, 60)
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


def test_products_in_bf16_learn_too_and_leave_weights_in_fp32(tmp_path, monkeypatch):
    monkeypatch.setattr("dspark.train.trainer.has_bf16_products", lambda device: True)
    trainer = make_trainer(dtype=torch.bfloat16)
    losses = run_steps(trainer, tmp_path, 60)
    assert trainer.head.dtype is torch.bfloat16
    assert all(p.dtype is torch.float32 for p in trainer.model.parameters())
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


def test_every_part_of_every_head_is_trained(tmp_path):
    variants: list[dict] = [{}, {"markov_head": "gated"}, {"markov_head": "rnn"}, DFLASH, {"optimizer": "muon"}]
    for changes in variants:
        trainer = make_trainer(**changes)
        before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        run_steps(trainer, tmp_path / str(changes), 3)
        for name, parameter in trainer.model.named_parameters():
            assert not torch.equal(parameter, before[name]), name


def test_every_answer_of_a_conversation_is_supervised_and_nothing_else():
    trainer = make_trainer(anchors_per_sequence=99)
    example = make_example(tuple(range(12)), (20, 21, 22), earlier=((2, 5), (7, 9)))
    blocks = trainer.sample_blocks([0], [example], 1)
    positions = (blocks.positions() + 1)[blocks.supervised]
    assert set(positions.tolist()) == {3, 4, 8, 13, 14}
    assert set(blocks.anchors[blocks.supervised[..., 0]].tolist()) == {2, 3, 7, 12, 13}


@pytest.mark.parametrize("changes", [{}, DFLASH, {"optimizer": "muon"}], ids=str)
def test_a_resumed_run_ends_with_the_same_weights(tmp_path, changes: dict):
    whole = make_trainer(**changes)
    run_steps(whole, tmp_path / "whole", 10)
    run_steps(make_trainer(**changes), tmp_path / "parts", 5)
    resumed = make_trainer(**changes)
    resume(resumed, tmp_path / "parts")
    assert resumed.progress.step == 5
    run_steps(resumed, tmp_path / "parts", 5)
    for (name, a), b in zip(whole.model.named_parameters(), resumed.model.parameters()):
        assert torch.equal(a, b), name
    files = [saved_tensors(tmp_path / part) for part in ("whole", "parts")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(value, files[1][name]) for name, value in files[0].items())


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_a_step_in_parts_is_the_whole_step(at_once: int):
    """Gradients of parts add up to those of all sequences at once, whatever each part supervises."""
    gradients = []
    for size in (8, at_once):
        trainer = make_trainer(sequences_at_once=size)
        trainer.optimizers = []
        result = trainer.step(list(range(8)))
        gradients.append([p.grad for p in trainer.model.parameters()])
    assert result.slots > 8
    for whole, parts in zip(*gradients, strict=True):
        torch.testing.assert_close(parts, whole, atol=1e-6, rtol=1e-5)


def test_an_epoch_is_every_example_once_in_steps_of_like_length():
    trainer = make_trainer(sequences_per_step=4)
    lengths = [5, 9, 30, 6, 7, 28, 40, 8, 31, 90, 95, 93]
    trainer.examples = [make_example((1,), tuple(range(n))) for n in lengths]

    def epoch(number: int) -> list[list[int]]:
        steps = []
        for i in range(3):
            trainer.progress.step = 3 * number + i
            steps.append(trainer.next_indices())
        return steps

    first, second = epoch(0), epoch(1)
    by_length = [sorted(range(12), key=lambda i: lengths[i])[i : i + 4] for i in (0, 4, 8)]
    assert sorted(first) == sorted(second) == sorted(by_length)
    assert first == epoch(0) and len({str(epoch(n)) for n in range(8)}) > 1


def test_padding_moves_no_gradient(monkeypatch):
    gradients = []
    for multiple in (1, 7):
        monkeypatch.setattr("dspark.train.features.LENGTHS", multiple)
        monkeypatch.setattr("dspark.train.blocks.COUNTS", multiple)
        monkeypatch.setattr("dspark.train.trainer.ROWS", multiple)
        trainer = make_trainer()
        trainer.optimizers = []
        trainer.step(list(range(8)))
        gradients.append([p.grad for p in trainer.model.parameters()])
    for plain, padded in zip(*gradients, strict=True):
        torch.testing.assert_close(padded, plain, atol=1e-6, rtol=1e-5)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_compiled_it_is_the_same_step():
    outcomes = []
    for compiled in (False, True):
        trainer = make_trainer(compile=compiled, feature_input=True, num_layers=1)
        outcomes.append((trainer.step(list(range(8))).loss, list(trainer.model.parameters())))
    (loss, weights), (other, compiled) = outcomes
    assert other == pytest.approx(loss, rel=1e-5)
    for a, b in zip(weights, compiled, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_without_a_compiler_it_says_so(monkeypatch):
    def fails(*_args, **_more):
        raise RuntimeError("no C++ compiler\ndetails")

    monkeypatch.setattr(torch, "compile", lambda function: fails)
    with pytest.raises(ValueError, match=r"torch\.compile does not work here \(no C\+\+ compiler\); install g\+\+"):
        make_trainer(compile=True)


def test_by_epochs_the_budget_and_the_schedule_are_steps(tmp_path):
    trainer = make_trainer(epochs=1.5, sequences_per_step=2)
    rates = []
    trainer.run(tmp_path, lambda _: rates.append(trainer.optimizers[0].param_groups[0]["lr"]))
    assert len(rates) == 6  # 8 examples, 4 steps an epoch
    assert 0 < rates[0] < rates[1] > rates[3] > rates[5] > 0  # warm-up, then the cosine
    again = make_trainer(epochs=1.5, sequences_per_step=2)
    again.run(tmp_path / "again")
    assert all(torch.equal(a, b) for a, b in zip(trainer.model.parameters(), again.model.parameters()))


def test_the_drafter_of_the_best_evaluation_is_kept(tmp_path, monkeypatch):
    trainer = make_trainer(epochs=1.0, evaluations=4, decode_every=2)
    lengths, weights, decoded = iter([1.2, 1.6, 1.5, 1.3]), [], []
    trainer.decode = lambda model: decoded.append(trainer.progress.step) or []

    def evaluation(_) -> dict:
        weights.append({name: t.clone() for name, t in trainer.model.state_dict().items()})
        return {"heldout_accepted_length": next(lengths)}

    monkeypatch.setattr("dspark.train.trainer.expected_acceptance", evaluation)
    entries = []
    assert trainer.run(tmp_path, on_evaluation=entries.append)
    assert [e["step"] for e in entries] == [2, 4, 6, 8] and decoded == [4, 8]
    kept = load_drafter(tmp_path).state_dict()
    assert all(torch.equal(t, weights[1][name].bfloat16().to(t.dtype)) for name, t in kept.items() if name != "d2t")


def test_an_evaluation_shows_domains_and_moves_nothing(tmp_path):
    trainer = make_trainer(epochs=1.0, evaluations=1)
    trainer.heldout[1] = replace(trainer.heldout[1], domain="math")
    trainer.run(tmp_path)
    unobserved = make_trainer(epochs=1.0, evaluations=8)
    unobserved.run(tmp_path / "other")
    assert all(torch.equal(a, b) for a, b in zip(trainer.model.parameters(), unobserved.model.parameters()))
    (entry,) = trainer.progress.history
    assert list(entry["domains"]) == ["math", "other"]
    assert min(f["heldout_accepted_length"] for f in entry["domains"].values()) <= entry["heldout_accepted_length"]


def test_another_configuration_or_other_data_are_refused(tmp_path):
    run_steps(make_trainer(), tmp_path, 1)
    others: tuple[tuple[dict, str], ...] = (
        ({"learning_rate": 1e-4}, "learning_rate was 0.003 and is now 0.0001"),
        ({"minutes": 5.0}, "minutes was 60.0 and is now 5.0"),
        ({"dtype": torch.bfloat16}, "target dtype was torch.float32 and is now torch.bfloat16"),
        ({"block_size": 3}, "block_size was 4 and is now 3"),
    )
    for changes, message in others:
        with pytest.raises(ValueError, match=message):
            resume(make_trainer(**changes), tmp_path)
    other = make_trainer()
    other.examples.reverse()
    with pytest.raises(ValueError, match="data digest was"):
        resume(other, tmp_path)
    resume(make_trainer(sequences_at_once=3, cache_gib=0.0), tmp_path)


def shard(folder: Path) -> Path:
    (path,) = state_of(folder).glob("*.safetensors")
    return path


@pytest.mark.parametrize("damage", ["cut", "gone", "overwritten"])
def test_a_damaged_state_is_one_clear_error(tmp_path, damage: str):
    run_steps(make_trainer(), tmp_path, 1)
    path = shard(tmp_path)
    size = path.stat().st_size
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: size // 2] if damage == "cut" else bytes(size))
    with pytest.raises(ValueError, match=r"cannot resume from .* remove the folder"):
        resume(make_trainer(), tmp_path)


@pytest.mark.parametrize("record", ["", "[]", "{}", '{"progress": {"step": 1}, "identity": {}, "files": []}'])
def test_a_damaged_record_is_one_clear_error(tmp_path, record: str):
    run_steps(make_trainer(), tmp_path, 1)
    (state_of(tmp_path) / PROGRESS_FILE).write_text(record)
    with pytest.raises(ValueError, match=PROGRESS_FILE if not record else "cannot resume from"):
        resume(make_trainer(), tmp_path)


def test_a_disk_that_refuses_leaves_the_state_before(tmp_path, monkeypatch):
    """As when it is full: whatever goes wrong inside of torch.distributed.checkpoint."""
    trainer = make_trainer()
    run_steps(trainer, tmp_path, 1)
    before = saved_tensors(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(dcp.HuggingFaceStorageWriter, "write_data", full)
    trainer.progress.step += 1
    with pytest.raises(OSError, match=r"cannot write the checkpoint.*No space left"):
        save_training(trainer, tmp_path)
    assert [path.name for path in tmp_path.glob("resume*")] == [state_of(tmp_path).name]
    assert all(torch.equal(t, before[name]) for name, t in saved_tensors(tmp_path).items())


def test_a_run_leaves_a_loadable_drafter_and_a_record(tmp_path):
    trainer = make_trainer(minutes=2 / 60)
    run_steps(trainer, tmp_path, 99)
    assert trainer.progress.step == 2  # two seconds of budget on a clock of one second a step
    assert load_drafter(tmp_path).config == trainer.model.config
    entry = trainer.progress.history[-1]
    assert 1 <= entry["heldout_accepted_length"] <= 1 + trainer.model.config.block_size
    assert (tmp_path / "training.json").exists()


def test_compiling_around_fsdp_is_refused():
    with pytest.raises(ValueError, match="use --parallel ddp"):
        TrainConfig(compile=True, parallel="fsdp")


def test_a_loss_that_is_no_number_ends_the_run_and_leaves_the_best_drafter(tmp_path, monkeypatch):
    trainer = make_trainer(minutes=4 / 60, evaluations=2)
    plain = Trainer.step

    def step(self, indices):
        result = plain(self, indices)
        return replace(result, loss=float("nan")) if self.progress.step == 3 else result

    monkeypatch.setattr(Trainer, "step", step)
    with pytest.raises(ValueError, match="is no number at step 4"):
        run_steps(trainer, tmp_path, 99)
    assert load_drafter(tmp_path).config == trainer.model.config


def test_a_gradient_that_is_no_number_ends_the_run_before_anything_is_saved(tmp_path, monkeypatch):
    trainer = make_trainer(minutes=60.0, evaluations=2)
    run_steps(trainer, tmp_path, 2)
    state = last_state(tmp_path)
    plain, parameter = torch.Tensor.backward, next(iter(trainer.model.parameters()))

    def backward(self, *args, **kwargs):
        plain(self, *args, **kwargs)
        parameter.grad.view(-1)[0] = torch.inf  # pyright: ignore

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    with pytest.raises(ValueError, match=r"gradient is no number at step 3"):
        run_steps(trainer, tmp_path, 9)
    assert last_state(tmp_path) == state


def test_evaluations_are_spread_over_the_budget_however_long_a_step_takes(tmp_path):
    """Several that one long step made due are one; a finished run is not evaluated again."""
    trainer = make_trainer(epochs=1.0, evaluations=20)  # of 8 steps
    trainer.run(tmp_path)
    assert [e["step"] for e in trainer.progress.history] == [1, 2, 3, 4, 5, 6, 7, 8]
    (tmp_path / "calibration.json").write_text("{}")
    trainer.run(tmp_path)
    assert len(trainer.progress.history) == 8 and (tmp_path / "calibration.json").exists()


def test_a_new_drafter_takes_no_calibration_of_the_one_before(tmp_path):
    (tmp_path / "calibration.json").write_text("{}")
    run_steps(make_trainer(minutes=2 / 60), tmp_path, 99)
    assert not (tmp_path / "calibration.json").exists()


def test_a_state_without_some_weights_is_refused(tmp_path):
    run_steps(make_trainer(), tmp_path, 1)
    path = shard(tmp_path)
    size = path.stat().st_size
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys() if "layers.0" not in name}
        metadata = file.metadata()
    save_file(tensors, path, metadata)
    record = state_of(tmp_path) / PROGRESS_FILE
    record.write_text(record.read_text().replace(str(size), str(path.stat().st_size)))
    with pytest.raises(ValueError, match=r"Missing key .*layers.0"):
        resume(make_trainer(), tmp_path)


def test_uneven_shares_under_fsdp_are_refused(monkeypatch):
    """A process with fewer parts of a step would leave the others waiting for its weights for ever."""
    monkeypatch.setattr(parallel, "size", lambda: 2)
    with pytest.raises(ValueError, match="a multiple of 2 as sequences_per_step"):
        make_trainer(parallel="fsdp", sequences_per_step=3)
