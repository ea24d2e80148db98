"""The training loop: it learns, accumulates, resumes bit for bit and stops cleanly."""

from __future__ import annotations

import copy
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from conftest import (
    joint_tables,
    make_tiny_config,
    make_tiny_joint_config,
    run_stage,
    short_training,
)
from safetensors.torch import load_file
from torch import Tensor, nn

from pixelllm import checkpoints
from pixelllm.config import StartConfig, TrainConfig
from pixelllm.loading import is_referenced
from pixelllm.pretrained import PixelLLM
from pixelllm.tables import Table
from pixelllm.training import captioning
from pixelllm.training.checkpoint import CheckpointFolder, TrainingState
from pixelllm.training.loader import loader
from pixelllm.training.loop import NonFiniteLoss, Stage, accumulate_gradients, train
from pixelllm.training.optimizer import build_optimizer, freeze, set_learning_rate
from pixelllm.training.parallel import Processes, clip_gradients
from pixelllm.training.signals import StopRequest

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


# --- a stage that takes a millisecond ---


@dataclass(frozen=True)
class Numbers:
    values: Tensor
    ids: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.values)

    def to(self, _device: torch.device) -> Numbers:
        return self


class Stream(torch.utils.data.Dataset):
    """Batch `step` holds `size` numbers that depend on the step."""

    def __init__(self, length: int, size: int = 4) -> None:
        self.length, self.size = length, size

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, step: int) -> Numbers:
        first = step * self.size
        values = torch.arange(first, first + self.size, dtype=torch.float32).sin()
        return Numbers(values[:, None], tuple(f"n{first + i}" for i in range(self.size)))


def toy_stage(
    config: TrainConfig, scores: Sequence[float] = (), poison: int | None = None
) -> Stage:
    """A small network with dropout and a batch norm on `Stream`.

    Args:
        scores: of the validations, in order; then 0.
        poison: step whose loss is not a number.
    """
    torch.manual_seed(config.seed)
    model = nn.Sequential(nn.Linear(1, 6), nn.BatchNorm1d(6), nn.Dropout(0.2), nn.Linear(6, 1))
    left = list(scores)

    def loss(batch: Numbers) -> dict[str, Tensor]:
        error = (model(batch.values) - batch.values.square()).square().mean()
        bad = poison is not None and f"n{4 * poison}" in batch.ids
        return {"fit": error, "size": error * (torch.nan if bad else 0.1)}

    def export(folder: Path) -> None:
        (folder / "exported").write_text("yes")

    def validate() -> dict[str, float]:
        assert not model.training and not torch.is_grad_enabled()
        return {"score": left.pop(0) if left else 0.0, "other": torch.rand(1).item()}

    return Stage(model, Stream(config.steps * config.accumulate), loss, validate, export)


def log_lines(out: Path) -> list[dict]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "images_per_s"} for line in lines]


def newest(out: Path) -> dict[str, Tensor]:
    folder = CheckpointFolder(out / "checkpoints", 1)
    return load_file(folder.path(folder.steps()[-1]) / "state.safetensors")


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert not [name for name in first if not torch.equal(first[name], second[name])]


def stop_after(stage: Stage, step: int, number: int = signal.SIGINT) -> Stage:
    """The stage, with a signal to this process while `step` runs."""

    def loss(batch):
        if batch.ids[0] == f"n{4 * step}":
            os.kill(os.getpid(), number)
        return stage.loss(batch)

    return replace(stage, loss=loss)


# --- the loop ---


def test_a_resumed_run_equals_a_straight_one_bit_for_bit(tmp_path: Path):
    """Weights, moments, running statistics, random state and log: dropout shows any lost state."""
    config = short_training(9, log_every=1, eval_every=4, save_every=3)
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    train(toy_stage(config), config, straight, resume=False)
    with pytest.raises(StopRequest, match="stopped after step 5; go on with --resume") as stop:
        train(stop_after(toy_stage(config), 4), config, broken, resume=False)
    assert stop.value.code == 130
    assert not (broken / "exported").exists()
    torch.manual_seed(99)  # a resume must not depend on the state it finds
    train(toy_stage(config), config, broken, resume=True)
    assert_same(newest(straight), newest(broken))
    assert log_lines(straight) == log_lines(broken)
    assert (broken / "exported").exists()


def test_work_after_the_last_checkpoint_is_done_again(tmp_path: Path):
    """A killed process leaves log lines without a checkpoint; they must not come twice."""
    config = short_training(9, log_every=1, eval_every=4, save_every=3)
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    train(toy_stage(config), config, straight, resume=False)

    class Killed(BaseException):
        pass

    stage = toy_stage(config)

    def loss(batch):
        if batch.ids[0] == "n28":
            raise Killed
        return stage.loss(batch)

    with pytest.raises(Killed):
        train(replace(stage, loss=loss), config, broken, resume=False)
    assert max(line["step"] for line in log_lines(broken)) == 7
    with (broken / "log.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')  # a line cut short
    train(toy_stage(config), config, broken, resume=True)
    assert_same(newest(straight), newest(broken))
    assert log_lines(straight) == log_lines(broken)


def test_sigterm_also_leaves_a_checkpoint(tmp_path: Path):
    config = short_training(9)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(StopRequest) as stop:
        train(stop_after(toy_stage(config), 2, signal.SIGTERM), config, tmp_path, resume=False)
    assert stop.value.code == 143
    assert CheckpointFolder(tmp_path / "checkpoints", 2).steps()[-1] == 3
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_gradient_that_is_not_finite_changes_nothing(tmp_path: Path):
    """The loss is finite; its gradient, of a square root at 0, is not."""
    config = short_training(5, save_every=1)
    stage = toy_stage(config)

    def loss(batch):
        terms = stage.loss(batch)
        if batch.ids[0] == "n12":
            (first, *_) = stage.model.parameters()
            terms["root"] = (first.sum() * 0).sqrt()
        return terms

    with pytest.raises(NonFiniteLoss, match="step 3: the gradient is nan; phrases .*n12.*Lower"):
        train(replace(stage, loss=loss), config, tmp_path, resume=False)
    assert CheckpointFolder(tmp_path / "checkpoints", 2).steps()[-1] == 3
    assert all(tensor.isfinite().all() for tensor in newest(tmp_path).values())


@pytest.mark.parametrize("max_norm", [0.0, 1e-3])
def test_gradients_are_clipped_where_a_norm_is_given(max_norm: float):
    model = nn.Linear(3, 1)
    model(torch.ones(2, 3)).sum().backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()
    assert clip_gradients(model, max_norm) == pytest.approx(norm)
    after = torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()
    assert after == pytest.approx(max_norm or norm, rel=1e-3)


def test_rates_of_parts_that_are_not_there_are_named():
    config = short_training(1, lr_scales={"extractr": 0.1}, frozen=())
    with pytest.raises(ValueError, match="lr_scales: nothing is called 'extractr'; the parts are"):
        build_optimizer(nn.Sequential(nn.Linear(1, 1)), config)
    deeper = short_training(1, lr_scales={"0.blocks.23": 0.1}, frozen=())  # than this model is
    build_optimizer(nn.Sequential(nn.Linear(1, 1)), deeper)


def test_a_storage_that_breaks_off_is_no_dead_worker(tmp_path: Path):
    class Broken(Stream):
        def __getitem__(self, number):
            raise ConnectionError("Server Disconnected")

    config = short_training(3, workers=1)
    stage = replace(toy_stage(config), batches=Broken(3, 2))
    with pytest.raises(
        OSError, match="Server Disconnected; the last checkpoint is intact"
    ) as caught:
        train(stage, config, tmp_path, resume=False)
    assert type(caught.value) is OSError


def test_a_signal_while_processes_exchange_theirs_is_not_lost(tmp_path: Path):
    class Exchanging(Processes):
        def gather(self, value):
            sent = copy.copy(value)
            if value == []:
                os.kill(os.getpid(), signal.SIGTERM)
            return [sent]

    config = short_training(9)
    with pytest.raises(StopRequest, match="stopped after step 2") as stop:
        train(toy_stage(config), config, tmp_path, resume=False, processes=Exchanging())
    assert stop.value.code == 143
    assert CheckpointFolder(tmp_path / "checkpoints", 2).steps()[-1] == 2


def test_resuming_a_finished_run_only_exports(tmp_path: Path):
    config = short_training(3)
    train(toy_stage(config), config, tmp_path, resume=False)
    before = newest(tmp_path)
    (tmp_path / "exported").unlink()
    train(toy_stage(config), config, tmp_path, resume=True)
    assert (tmp_path / "exported").exists()
    assert_same(before, newest(tmp_path))


def test_a_new_run_does_not_mix_with_an_old_one(tmp_path: Path):
    """The next resume would go on from the old run's later step."""
    config = short_training(4)
    train(toy_stage(config), config, tmp_path, resume=False)
    with pytest.raises(ValueError, match="holds a run at step 4; go on with --resume"):
        train(toy_stage(config), config, tmp_path, resume=False)


@pytest.mark.parametrize("changes", [{"seed": 7}, {"batch_size": 2}])
def test_a_run_goes_on_with_the_batches_it_began_with(tmp_path: Path, changes):
    config = short_training(4)
    train(toy_stage(config), config, tmp_path, resume=False)
    ((name, value),) = changes.items()
    other = replace(config, steps=6, **changes)
    with pytest.raises(ValueError, match=f"step-00000004 was made with train.{name} .*, now"):
        train(toy_stage(other), other, tmp_path, resume=True)
    longer = replace(config, steps=6, lr=1e-4)  # both are often changed on purpose
    train(toy_stage(longer), longer, tmp_path, resume=True)


def test_a_resume_without_checkpoint_starts(tmp_path: Path):
    config = short_training(2)
    train(toy_stage(config), config, tmp_path, resume=True)
    assert log_lines(tmp_path)[0]["step"] == 1


def test_worker_processes_give_the_same_run(tmp_path: Path):
    config = short_training(5)
    train(toy_stage(config), config, tmp_path / "a", resume=False)
    config = replace(config, workers=1)
    train(toy_stage(config), config, tmp_path / "b", resume=False)
    assert_same(newest(tmp_path / "a"), newest(tmp_path / "b"))


def test_validation_does_not_change_the_run(tmp_path: Path):
    for every in (1, 100):
        config = short_training(6, eval_every=every)
        train(toy_stage(config), config, tmp_path / str(every), resume=False)
    assert_same(newest(tmp_path / "1"), newest(tmp_path / "100"))


def test_accumulated_gradients_are_those_of_the_big_batch():
    config = short_training(1, batch_size=8, accumulate=4, frozen=())
    stage = toy_stage(config)
    model = nn.Sequential(nn.Linear(1, 6), nn.Linear(6, 1))

    def loss(batch: Numbers) -> dict[str, Tensor]:
        return {"fit": (model(batch.values) - batch.values.square()).square().mean()}

    gradients = []
    for accumulate, size in ((4, 2), (1, 8)):
        small = replace(stage, model=model, loss=loss, batches=Stream(accumulate, size))
        part = replace(config, accumulate=accumulate)
        model.zero_grad()
        terms, num_images = accumulate_gradients(
            small, loader(small.batches, 0, part), part, 0, CPU
        )
        gradients.append(
            [p.grad.clone() for p in model.parameters()] + [torch.tensor(terms["fit"])]
        )
        assert num_images == 8
    for small, big in zip(*gradients, strict=True):
        torch.testing.assert_close(small, big)


def test_a_non_finite_loss_names_step_term_and_phrases(tmp_path: Path):
    config = short_training(9)
    stage = toy_stage(config, poison=4)
    with pytest.raises(NonFiniteLoss, match="step 4: the size loss is nan; .*: n16, n17, n18, n19"):
        train(stage, config, tmp_path, resume=False)
    assert all(torch.isfinite(p).all() for p in stage.model.parameters())
    assert CheckpointFolder(tmp_path / "checkpoints", 2).steps() == [2, 4]


def test_the_last_and_the_best_checkpoints_stay(tmp_path: Path):
    config = short_training(8, eval_every=1, save_every=1, keep=2)
    scores = [0.9, 0.5, 0.2, 0.6, 0.7, 0.8, 0.9, 0.3]
    train(toy_stage(config, scores), config, tmp_path, resume=False)
    folder = CheckpointFolder(tmp_path / "checkpoints", 2)
    assert folder.steps() == [3, 7, 8] and folder.best() == 3
    assert {path.name for path in folder.folder.iterdir()} == {
        "step-00000003", "step-00000007", "step-00000008",
    }  # fmt: skip


def test_a_full_disk_keeps_the_checkpoints_of_before(tmp_path: Path, monkeypatch):
    config = short_training(6, save_every=2)
    train(toy_stage(replace(config, steps=2)), replace(config, steps=2), tmp_path, resume=False)
    before = newest(tmp_path)

    def fill_disk(_tensors, path, **_):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", fill_disk)
    with pytest.raises(OSError, match=r"step-00000004 could not be written .*No space.*--resume"):
        train(toy_stage(config), config, tmp_path, resume=True)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]
    monkeypatch.undo()
    assert_same(before, newest(tmp_path))
    train(toy_stage(config), config, tmp_path, resume=True)
    assert CheckpointFolder(tmp_path / "checkpoints", 2).steps()[-2:] == [4, 6]


def test_a_damaged_checkpoint_is_named(tmp_path: Path):
    config = short_training(2)
    train(toy_stage(config), config, tmp_path, resume=False)
    file = tmp_path / "checkpoints" / "step-00000002" / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    damaged = "step-00000002/state.safetensors: not a readable file.*; remove .* go on from step 0"
    with pytest.raises(ValueError, match=damaged):
        train(toy_stage(config), config, tmp_path, resume=True)
    file.unlink()
    with pytest.raises(ValueError, match="0 of its 1 .safetensors files are there; remove"):
        train(toy_stage(config), config, tmp_path, resume=True)
    (file.parent / "state.json").write_text("{")
    with pytest.raises(ValueError, match="step-00000002/state.json: missing or damaged"):
        train(toy_stage(config), config, tmp_path, resume=True)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path):
    config = short_training(2)
    train(toy_stage(config), config, tmp_path, resume=False)
    stage = toy_stage(config)
    state = TrainingState(stage.model, build_optimizer(stage.model, config))
    stage.model[3] = nn.Linear(6, 2)
    stage.model.append(nn.Linear(2, 1))
    with pytest.raises(ValueError) as caught:
        CheckpointFolder(tmp_path / "checkpoints", 2).load_newest(state)
    assert "missing 4.weight" in str(caught.value)
    assert "3.weight is (1, 6), expected (2, 6)" in str(caught.value)


# --- the optimizer ---


def test_a_wrong_frozen_prefix_names_the_parts():
    model = nn.ModuleDict({"sam": nn.Linear(2, 2), "eva02": nn.Linear(2, 2)})
    with pytest.raises(ValueError, match="'sma'; the parts are sam, eva02"):
        freeze(model, ("sma",))
    freeze(model, ("sam",))
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        "eva02.weight", "eva02.bias",
    ]  # fmt: skip


def test_prefixes_are_whole_names():
    model = nn.ModuleDict({"sam": nn.Linear(2, 2), "sam2": nn.Linear(2, 2)})
    freeze(model, ("sam",))
    assert model["sam2"].weight.requires_grad


def test_nothing_left_to_train_is_an_error():
    model = nn.ModuleDict({"sam": nn.Linear(2, 2)})
    freeze(model, ("sam",))
    with pytest.raises(ValueError, match="leaves no parameter"):
        build_optimizer(model, TrainConfig())


def test_vectors_do_not_decay_and_scales_follow_prefixes():
    model = nn.ModuleDict({"new": nn.Linear(2, 2), "old": nn.Linear(2, 2)})
    optimizer = build_optimizer(model, TrainConfig(weight_decay=0.3, lr_scales={"old": 0.1}))
    set_learning_rate(optimizer, 2.0)
    found = {
        id(p): (group["weight_decay"], group["lr"])
        for group in optimizer.param_groups
        for p in group["params"]
    }
    expected = {"new.weight": (0.3, 2.0), "new.bias": (0.0, 2.0)}
    expected |= {"old.weight": (0.3, 0.2), "old.bias": (0.0, 0.2)}
    assert {name: found[id(p)] for name, p in model.named_parameters()} == expected


# --- PixelLLM ---


def test_two_samples_are_learnt_by_heart(tiny_tables, tmp_path: Path):
    """Words and points of two images: anything wrong in targets or gradients shows here."""
    config = make_tiny_config()
    config = replace(
        config,
        train=replace(config.train, steps=150, batch_size=2, lr=1e-2, warmup=10, threads=0),
        model=replace(config.model, language=replace(config.model.language, width=32)),
        loss=replace(config.loss, point=5.0),
    )
    table = Table(tiny_tables.train)
    stage = captioning.build_stage(config, [table], [table], CPU, tmp_path)
    two = stage.batches[0]
    stage.model.train()
    freeze(stage.model, config.train.frozen)
    optimizer = build_optimizer(stage.model, config.train)
    for step in range(150):
        set_learning_rate(optimizer, 1e-2 * min(1, (step + 1) / 10) * (1 - step / 150))
        terms = stage.loss(two)
        optimizer.zero_grad()
        sum(terms.values()).backward()
        nn.utils.clip_grad_norm_(stage.model.parameters(), 1.0)
        optimizer.step()
    assert terms["text"] < 0.05
    assert terms["point"] / config.loss.point < 0.03


def test_the_whole_model_resumes_bit_for_bit(tiny_tables, tmp_path: Path):
    """With a trainable encoder, dropout and stochastic depth, so that all state counts."""
    config = make_tiny_config()
    model = replace(
        config.model,
        eva02=replace(config.model.eva02, depth=2, drop_path=0.3),
        language=replace(config.model.language, dropout=0.1),
    )
    config = replace(config, model=model)
    config = replace(
        config, train=short_training(6, save_every=2, frozen=("sam", "prompt_encoder"))
    )
    tables = [tiny_tables.train], tiny_tables.val
    run_stage(config, *tables, tmp_path / "straight")
    run_stage(config, *tables, tmp_path / "broken")
    folder = CheckpointFolder(tmp_path / "broken" / "checkpoints", 2)
    for step in folder.steps()[1:]:  # as if the process had died after the first one that is left
        for file in folder.path(step).iterdir():
            file.unlink()
        folder.path(step).rmdir()
    assert folder.steps()[0] < 6
    run_stage(config, *tables, tmp_path / "broken", resume=True)
    assert_same(newest(tmp_path / "straight"), newest(tmp_path / "broken"))
    assert log_lines(tmp_path / "straight") == log_lines(tmp_path / "broken")
    weights = [load_file(tmp_path / n / "model.safetensors") for n in ("straight", "broken")]
    assert_same(*weights)


def test_a_run_of_all_tasks_resumes_bit_for_bit(tiny_tables, tmp_path: Path):
    """The detector samples its proposals at random: whatever it draws is part of the state."""
    train_config = short_training(8, save_every=4, eval_every=8, frozen=("sam", "prompt_encoder"))
    config = make_tiny_joint_config(train=train_config)
    tables = joint_tables(tiny_tables)
    run_stage(config, *tables, tmp_path / "straight")
    shutil.copytree(tmp_path / "straight" / "checkpoints", tmp_path / "broken" / "checkpoints")
    folder = CheckpointFolder(tmp_path / "broken" / "checkpoints", 2)
    assert folder.steps() == [4, 8]
    shutil.rmtree(folder.path(8))  # as if the process had died before
    torch.manual_seed(99)
    run_stage(config, *tables, tmp_path / "broken", resume=True)
    assert_same(newest(tmp_path / "straight"), newest(tmp_path / "broken"))
    after = [line for line in log_lines(tmp_path / "straight") if line["step"] > 4]
    assert after == log_lines(tmp_path / "broken")
    assert any("loss_detection" in line for line in after)


def test_every_task_is_validated_on_the_tables_that_have_it(tiny_joint, tiny_tables, tiny_run):
    (line,) = [line for line in log_lines(tiny_joint) if line["step"] == 24 and "val_loss" in line]
    terms = {name.removeprefix("val_") for name in line if name.startswith("val_")} - {"loss"}
    assert terms == {
        "narration_text", "narration_point", "region_detection", "region_text",
        "referring_point", "referring_mask",
    }  # fmt: skip
    assert line["val_loss"] == pytest.approx(sum(line[f"val_{name}"] for name in terms))
    sources = make_tiny_joint_config().sources
    val = [Table(tiny_tables.val), Table(tiny_tables.val_referring)]
    assert [s.task for s in captioning.scored_sources(sources, val)] == ["narration", "referring"]
    located = replace(sources[-1], mask_weight=0.0, every_word=True)
    named = [replace(located, tables=glob) for glob in ("*refer*", "*other*")]
    (scored,) = captioning.scored_sources(named, val)
    assert scored.tables == "*refer*"  # though the other comes last
    assert not scored.every_word  # it scores the word that is read
    (scored,) = captioning.scored_sources(named[1:], val)
    assert scored.tables == "*"  # a table of any name will do to validate on
    with pytest.raises(ValueError, match=r"no phrases of the recipe's tasks \(narration\)"):
        captioning.scored_sources(make_tiny_config().sources, val[1:])


def test_bfloat16_leaves_heads_and_losses_in_float32(tiny_tables, tmp_path: Path):
    config = make_tiny_config()
    train_config = replace(config.train, bfloat16=True, accumulate=2, workers=1)
    config = replace(config, train=train_config)
    stage = captioning.build_stage(
        config, [Table(tiny_tables.train)], [Table(tiny_tables.val)], CPU, None
    )
    seen = []
    loss = stage.loss

    def watched(batch):
        assert torch.is_autocast_enabled("cpu") == stage.model.training
        terms = loss(batch)
        prediction = stage.model(batch.images, batch.sizes, batch.boxes, batch.text)
        seen.append(
            {prediction.logits.dtype, prediction.points.dtype, *(t.dtype for t in terms.values())}
        )
        return terms

    train(replace(stage, loss=watched), train_config, tmp_path, resume=False)
    assert len(seen) == 8 and all(dtypes == {torch.float32} for dtypes in seen)
    assert all(p.dtype == torch.float32 for p in stage.model.parameters())


def test_the_exported_model_validates_as_the_trained_one(tiny_run, tiny_tables):
    """Features from the cache in training, from the images afterwards."""
    model = PixelLLM.from_pretrained(tiny_run.main)
    config = replace(model.config, start=StartConfig(run=str(tiny_run.main)))
    stage = captioning.build_stage(
        config, [Table(tiny_tables.train)], [Table(tiny_tables.val)], CPU, None
    )
    stage.model.eval()
    with torch.no_grad():
        scores = stage.validate()
    logged = [line for line in log_lines(tiny_run.main) if "val_loss" in line][-1]
    for name, score in scores.items():
        assert score == pytest.approx(logged[f"val_{name}"], rel=1e-4), name


def test_a_start_run_keeps_its_words(tiny_run, tiny_tables):
    """A tokenizer trained on other tables would give other ids to the same weights."""
    config = make_tiny_config(start=StartConfig(run=str(tiny_run.main)))
    stage = captioning.build_stage(
        config, [Table(tiny_tables.val)], [Table(tiny_tables.val)], CPU, None
    )
    trained = PixelLLM.from_pretrained(tiny_run.main)
    assert stage.model.tokenizer.get_vocab() == trained.tokenizer.get_vocab()
    for name, parameter in trained.named_parameters():
        assert torch.equal(dict(stage.model.named_parameters())[name], parameter)


def test_published_weights_are_named_for_what_still_has_them():
    """EVA02 was trained in the run, which had SAM's file; the next stage is given other names."""
    config = make_tiny_config(include_frozen=False)
    eva02 = "eva02_large_patch14_224.mim_m38m"
    model = replace(config.model, eva02=replace(config.model.eva02, weights=eva02))
    model = replace(model, sam=replace(config.model.sam, weights="a.pth"))
    run = replace(config, model=model, train=replace(config.train, frozen=("sam",)))
    other = replace(model, sam=replace(model.sam, weights="b.pth"))
    stage = replace(run, model=other, train=replace(run.train, frozen=("sam", "eva02")))
    held = captioning.naming_what_is_held(stage, run, reads_sam=False)
    names = held.model.sam.weights, held.model.eva02.weights, held.model.eva02.structure
    assert names == ("a.pth", None, eva02)
    assert not is_referenced("eva02", held) and is_referenced("sam", held)
    assert captioning.naming_what_is_held(stage, run, reads_sam=True).model.sam.weights == "b.pth"
    frozen = replace(run, train=replace(run.train, frozen=("eva02",)))
    held = captioning.naming_what_is_held(stage, frozen, reads_sam=False)
    assert (held.model.sam.weights, held.model.eva02.weights) == (None, eva02)
    begun = replace(stage, start=StartConfig(eyes="runs/small"))
    begun = captioning.without_published(begun).model
    assert (begun.sam.weights, begun.eva02.weights, begun.eva02.structure) == (None, None, eva02)


def test_a_start_run_is_held_as_the_recipe_says(tiny_run, tiny_tables):
    config = make_tiny_config(start=StartConfig(run=str(tiny_run.main)))
    model = replace(
        config.model,
        sam=replace(config.model.sam, bfloat16=True),
        language=replace(config.model.language, dropout=0.7),
    )
    tables = [Table(tiny_tables.val)], [Table(tiny_tables.val)]
    model = captioning.build_stage(replace(config, model=model), *tables, CPU, None).model
    assert next(model.sam.parameters()).dtype == torch.bfloat16
    assert 0.7 in {m.p for m in model.language.modules() if isinstance(m, nn.Dropout)}


def test_a_start_run_of_other_sizes_is_named(tiny_run, tiny_tables):
    config = make_tiny_config(start=StartConfig(sam=str(tiny_run.sam)))
    sam = replace(config.model.sam, window_size=3)
    config = replace(config, model=replace(config.model, sam=sam))
    with pytest.raises(ValueError, match="window_size is 2 there, 3 here"):
        captioning.build_stage(
            config, [Table(tiny_tables.val)], [Table(tiny_tables.val)], CPU, None
        )


def test_pretrained_parts_come_from_their_runs(tiny_run):
    main = load_file(tiny_run.main / "model.safetensors")
    sam, eva02 = (load_file(f / "model.safetensors") for f in (tiny_run.sam, tiny_run.eva02))
    for name, tensor in sam.items():
        ours = name.replace("image_encoder.", "sam.", 1)
        if not name.startswith("mask_decoder."):
            assert torch.equal(main[ours], tensor), name
    for name, tensor in eva02.items():
        assert torch.equal(main[f"eva02.{name}"], tensor), name


# --- the command ---


def small_sam(tables, out: Path, *more: str) -> list[str]:
    options = {
        "data": tables.train_regions, "val": tables.val_regions, "out": out, "device": "cpu",
        "frame": 48, "sam.table-size": 48, "sam.width": 16, "sam.depth": 1, "sam.num-heads": 2,
        "sam.out-channels": 16, "sam.global-blocks": 0, "num-layers": 1, "mlp-width": 16,
        "num-heads": 2, "train.steps": 60, "train.batch-size": 2, "train.warmup": 2,
        "train.eval-every": 1000, "train.eval-batches": 1, "train.save-every": 1000,
        "train.log-every": 1,
    }  # fmt: skip
    given = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    return [sys.executable, "train.py", "scenes-sam", *given, *more]


def test_control_c_checkpoints_and_the_run_goes_on(tiny_tables, tmp_path: Path):
    out = tmp_path / "run"
    command = small_sam(tiny_tables, out)
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    log = out / "log.jsonl"
    until = time.monotonic() + 120
    while not (log.exists() and log.read_text()) and time.monotonic() < until:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "go on with --resume" in errors and "Traceback" not in errors
    (step,) = CheckpointFolder(out / "checkpoints", 2).steps()
    assert 0 < step < 60 and not (out / "model.safetensors").exists()
    subprocess.run([*command, "--resume"], cwd=ROOT, check=True, capture_output=True)
    assert (out / "model.safetensors").exists()
    assert [line["step"] for line in log_lines(out) if "lr" in line] == list(range(1, 61))
