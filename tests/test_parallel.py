"""Many processes: whatever their number and whoever holds the weights, the run is the same."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import Tables, joint_tables, make_tiny_joint_config, short_training
from safetensors.torch import load_file
from test_survive import no_file_above
from test_training import Numbers, assert_same, newest, stop_after, toy_stage
from torch import nn

from pixelllm import cli
from pixelllm.config import Config
from pixelllm.pretrained import PixelLLM
from pixelllm.tables import Table
from pixelllm.training import captioning
from pixelllm.training.checkpoint import CheckpointFolder, convert_checkpoint
from pixelllm.training.loop import NonFiniteLoss, merged, train
from pixelllm.training.parallel import (
    ALONE,
    PeerFailed,
    Processes,
    average_gradients,
    distribute,
    join,
)
from pixelllm.training.signals import StopRequest

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
STEPS = 5
# Sums in another order: measured 5e-6 of a loss, and 2.3e-5 on weights that moved by 7.5e-3.
CURVE = {"rtol": 5e-5, "atol": 1e-6}
WEIGHTS = {"rtol": 1e-4, "atol": 1e-4}


class Team:
    """Four processes that wait for work, forked from one that imported everything.

    Each keeps its rank: torch remembers how sharded tensors lie by the ranks of their mesh, and a
    process that had another place in an equal mesh before would go by that.
    """

    def __init__(self) -> None:
        server = multiprocessing.get_context("forkserver")
        server.set_forkserver_preload(["pixelllm.training.captioning"])
        one_thread = {"initializer": torch.set_num_threads, "initargs": (1,)}
        self.pools = [ProcessPoolExecutor(1, server, **one_thread) for _ in range(4)]

    def run(self, count: int, work: Callable, *args: Any, sharded: bool = False) -> list[Any]:
        """The results of `work(processes, *args)` in `count` of them, by rank."""
        with tempfile.TemporaryDirectory() as folder:
            facts = (count, sharded, f"file://{folder}/store", work, args)
            work_of = [self.pools[rank].submit(take_part, rank, *facts) for rank in range(count)]
            return [future.result() for future in work_of]


def take_part(
    rank: int, count: int, sharded: bool, store: str, work: Callable, args: tuple[Any, ...]
) -> Any:
    facts = {"rank": rank, "world_size": count, "timeout": timedelta(seconds=120)}
    dist.init_process_group("gloo", init_method=store, **facts)
    try:
        return work(Processes(rank, count, sharded), *args)
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def team() -> Iterator[Team]:
    team = Team()
    yield team
    for pool in team.pools:
        pool.shutdown()


# --- whole runs of PixelLLM ---


def make_config(**changes: Any) -> Config:
    """Two tasks, one of which alone segments; LoRA; frozen parts; batch norms; all that is random.

    Some of the steps reach the mask head.
    """
    config = make_tiny_joint_config()
    model = replace(
        config.model,
        detector=None,
        eva02=replace(config.model.eva02, depth=2, drop_path=0.3),
        language=replace(config.model.language, dropout=0.1, lora_rank=4),
    )
    frozen = ("sam", "prompt_encoder", "mask_head.decoder")
    facts = {"accumulate": 4, "batch_size": 8, "save_every": 2, "keep": 9, "frozen": frozen}
    return replace(
        config,
        model=model,
        sources=(config.sources[0], config.sources[2]),
        train=short_training(STEPS, **facts, **changes),
    )


def train_model(
    processes: Processes, config: Config, tables: Tables, out: Path, resume: bool = False
) -> float:
    """Train as the command does; returns a sum over the weights that this process holds."""
    tables, val = ([Table(path) for path in paths] for paths in joint_tables(tables))
    torch.manual_seed(config.train.seed)
    stage = captioning.build_stage(config, tables, val, CPU)
    train(stage, config.train, out, resume, processes)
    return sum(p.detach().double().sum().item() for p in stage.model.parameters())


def begin_at(step: int, of: Path, out: Path) -> Path:
    """A run that was killed after the step of another."""
    checkpoint = Path("checkpoints") / f"step-{step:08d}"
    shutil.copytree(of / checkpoint, out / checkpoint)
    return out


@pytest.fixture(scope="module")
def runs(team: Team, tiny_tables: Tables, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs on 1, 2 and 4 processes, sharded ones, and one that moves 2 -> 4 -> 1."""
    out, config = tmp_path_factory.mktemp("runs"), make_config()
    train_model(ALONE, config, tiny_tables, out / "1")
    for count in (2, 4):
        sums = team.run(count, train_model, config, tiny_tables, out / f"{count}")
        assert len(set(sums)) == 1, "processes hold different weights"
    team.run(2, train_model, config, tiny_tables, out / "sharded", sharded=True)
    half = begin_at(2, out / "2", out / "2-4")
    team.run(4, train_model, config, tiny_tables, half, True, sharded=True)
    train_model(ALONE, config, tiny_tables, begin_at(4, half, out / "2-4-1"), resume=True)
    return out


def curve(out: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "images_per_s"} for line in lines]


def assert_same_curve(first: list[dict[str, float]], second: list[dict[str, float]]) -> None:
    """Losses, norms of gradients and validation scores."""
    assert [line.keys() for line in first] == [line.keys() for line in second]
    for ours, theirs in zip(first, second, strict=True):
        assert ours == pytest.approx(theirs, rel=CURVE["rtol"], abs=CURVE["atol"])


def assert_near(first: Path, second: Path) -> None:
    """Of the matrices: a bias before a batch norm has only noise as gradient, which AdamW grows."""
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (first, second))
    assert ours.keys() == theirs.keys()
    far = {
        name: (tensor - theirs[name]).abs().max().item()
        for name, tensor in ours.items()
        if tensor.ndim > 1 and not torch.allclose(tensor, theirs[name], **WEIGHTS)
    }
    assert not far


@pytest.mark.parametrize("name", ["2", "4", "sharded"])
def test_any_number_of_processes_gives_the_same_run(runs: Path, name: str):
    """Gradients averaged over the wrong number, or dropout drawn per process, show here."""
    assert any("loss_mask" in line for line in curve(runs / "1"))
    assert_same_curve(curve(runs / name), curve(runs / "1"))
    assert_near(runs / name, runs / "1")


def test_half_precision_with_lora_is_sharded_and_recomputed(
    team: Team, tiny_tables: Tables, tmp_path: Path
):
    """What the large models need all together: its losses are those of whole weights, roughly."""
    config = make_config(bfloat16=True, recompute=True)
    language = replace(config.model.language, bfloat16=True)
    config = replace(config, model=replace(config.model, language=language))
    train_model(ALONE, config, tiny_tables, tmp_path / "whole")
    team.run(2, train_model, config, tiny_tables, tmp_path / "sharded", sharded=True)
    whole, sharded = (curve(tmp_path / name) for name in ("whole", "sharded"))
    assert len(whole) == len(sharded) >= STEPS
    for ours, theirs in zip(whole, sharded, strict=True):
        assert ours.keys() == theirs.keys()
        losses = [name for name in ours if "loss" in name]
        assert losses
        assert [ours[n] for n in losses] == pytest.approx([theirs[n] for n in losses], rel=0.05)


def test_a_run_goes_on_with_other_numbers_of_processes(runs: Path):
    """From 2 with whole weights to 4 with shards to 1: moments and batch norms included."""
    whole, sharded = (
        sorted(path.name for path in (runs / name).glob("*/step-00000004/*"))
        for name in ("2", "2-4")
    )
    assert whole == ["state.json", "state.safetensors"]
    assert len(sharded) == 5 and {name.split(".")[1] for name in sharded} == {"json", "safetensors"}
    straight = curve(runs / "1")
    for name, begin in (("2-4", 2), ("2-4-1", 4)):
        assert_same_curve(curve(runs / name), [li for li in straight if li["step"] > begin])
    assert_near(runs / "2-4-1", runs / "1")


def test_a_checkpoint_converts_to_the_model_of_its_run(runs: Path, tmp_path: Path, capsys):
    """What the end of the training writes, from the shards alone; and any step before."""
    cli.main(["convert", str(runs / "sharded"), "--out", str(tmp_path / "last")])
    assert f"{tmp_path / 'last'}: the model after step {STEPS}" in capsys.readouterr().out
    assert_same(
        *(load_file(f / "model.safetensors") for f in (tmp_path / "last", runs / "sharded"))
    )
    names = {path.name for path in (runs / "sharded").iterdir()}
    assert {path.name for path in (tmp_path / "last").iterdir()} == names - {
        "checkpoints", "log.jsonl", "tensorboard", "start",
    }  # fmt: skip
    PixelLLM.from_pretrained(tmp_path / "last")
    for name in ("1", "sharded"):
        assert convert_checkpoint(runs / name, 2, tmp_path / name) == 2
    assert_near(tmp_path / "1", tmp_path / "sharded")
    before = load_file(runs / "1" / "model.safetensors")
    after = load_file(tmp_path / "1" / "model.safetensors")
    assert any(not torch.equal(before[name], after[name]) for name in before)


def resume_on_a_full_disk(processes: Processes, *args: Any) -> str:
    """What ends a run whose last process cannot write its shard."""
    with nullcontext() if processes.is_first else no_file_above(4096):
        try:
            train_model(processes, *args, resume=True)
        except (OSError, PeerFailed) as error:
            return str(error)
    return "none"


def test_a_disk_too_full_for_one_shard_keeps_the_last_checkpoint(
    team: Team, runs: Path, tiny_tables: Tables, tmp_path: Path
):
    out = begin_at(2, runs / "sharded", tmp_path / "run")
    args = (make_config(), tiny_tables, out)
    first, second = team.run(2, resume_on_a_full_disk, *args, sharded=True)
    assert "step-00000004 could not be written" in second and "File too large" in second
    assert "make room and go on with --resume" in second and first == f"process 1: {second}"
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000002"]
    team.run(2, train_model, *args, True, sharded=True)
    assert_near(out, runs / "1")


def test_what_cannot_be_converted_is_named(runs: Path, tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="no checkpoint of step 3; there are: 2, 4, 5"):
        convert_checkpoint(runs / "1", 3, tmp_path)
    with pytest.raises(FileNotFoundError, match="no checkpoint of step 0; there are: none"):
        convert_checkpoint(tmp_path, None, tmp_path)
    begin_at(2, runs / "1", tmp_path / "old")
    with pytest.raises(FileNotFoundError, match="old/start is missing: go on with --resume"):
        convert_checkpoint(tmp_path / "old", None, tmp_path)


def test_sharded_blocks_compute_in_bfloat16(team: Team, tiny_tables: Tables, tmp_path: Path):
    """A whole run: validation reads the sharded blocks' bfloat16 features as well."""
    config = make_config(bfloat16=True)
    train_model(ALONE, config, tiny_tables, tmp_path / "1")
    team.run(2, train_model, config, tiny_tables, tmp_path / "2", sharded=True)
    for ours, theirs in zip(curve(tmp_path / "2"), curve(tmp_path / "1"), strict=True):
        assert ours == pytest.approx(theirs, rel=0.05)


def gradient_of_two(processes: Processes) -> tuple[torch.dtype, float]:
    """What is computed in and the mean of 256 and 1, whose sum bfloat16 rounds to 256."""
    block = nn.Linear(1, 1, bias=False)
    model = nn.ModuleDict({"language": nn.ModuleDict({"layers": nn.ModuleList([block])})})

    def loss(x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": block(x).sum()}

    loss = distribute(model, loss, processes, bfloat16=True)
    out = loss(torch.tensor([[256.0 if processes.is_first else 1.0]]))["loss"]
    out.backward()
    return out.dtype, block.weight.grad.full_tensor().item()


def test_gradients_of_sharded_blocks_are_summed_in_float32(team: Team):
    assert team.run(2, gradient_of_two, sharded=True) == [(torch.bfloat16, 128.5)] * 2


# --- what processes agree on, with a stage that takes a millisecond ---


def test_micro_batches_must_come_out_even():
    assert Processes(1, 4).share_of(8) == 2
    with pytest.raises(ValueError, match="accumulate 6 cannot be divided among 4 processes"):
        Processes(0, 4).share_of(6)


def gradients_of_two(processes: Processes) -> list[Any]:
    """The first layer is used by both, the second by one process, the third by none."""
    model = nn.ModuleList(nn.Linear(1, 1, bias=False) for _ in range(3))
    x = torch.ones(1, 1)
    (model[0](x) * (processes.rank + 1)).sum().backward()
    if not processes.is_first:
        (model[1](x) * 8).sum().backward()
    average_gradients(model, processes)
    return [layer.weight.grad and layer.weight.grad.item() for layer in model]


def test_unused_parameters_are_averaged_where_any_process_used_them(team: Team):
    """With zeros instead of None, weights that no source reached would decay."""
    assert team.run(2, gradients_of_two) == [[1.5, 4.0, None]] * 2


def outcome(processes: Processes, out: Path, trouble: str) -> tuple[str, str, int | None]:
    """What ends a run in which the last process has the trouble."""
    config = short_training(6, accumulate=2, save_every=100, eval_every=100)
    ours = not processes.is_first
    stage = toy_stage(config, poison=5 if trouble == "poison" else None)
    if trouble == "signal" and ours:
        stage = stop_after(stage, 5, signal.SIGTERM)
    if trouble == "lost" and ours:
        stage = replace(stage, batches=Lost())
    try:
        train(stage, config, out, False, processes)
    except (StopRequest, NonFiniteLoss, PeerFailed, OSError) as error:
        return type(error).__name__, str(error), error.code if trouble == "signal" else None
    return "none", "", None


class Lost(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, number: int) -> Numbers:
        raise FileNotFoundError("images/7.jpg: no such file")


def test_a_non_finite_loss_on_one_process_stops_all(team: Team, tmp_path: Path):
    """Micro batch 5 is the second of step 2, which process 1 has."""
    (kind, first, _), (other, second, _) = team.run(2, outcome, tmp_path, "poison")
    assert (kind, other) == ("PeerFailed", "NonFiniteLoss")
    assert first == f"process 1: {second}" and second.startswith("step 2: the size loss is nan")


def test_a_lost_image_on_one_process_stops_all(team: Team, tmp_path: Path):
    (kind, first, _), (other, second, _) = team.run(2, outcome, tmp_path, "lost")
    assert (kind, first) == ("PeerFailed", f"process 1: {second}")
    assert (other, second) == ("FileNotFoundError", "images/7.jpg: no such file")


def test_a_signal_to_one_process_is_a_checkpoint_of_all(team: Team, tmp_path: Path):
    ends = team.run(2, outcome, tmp_path, "signal")
    message = f"stopped after step 3; go on with --resume --out {tmp_path}"
    assert ends == [("StopRequest", message, 143)] * 2
    assert CheckpointFolder(tmp_path / "checkpoints", 2).steps() == [3]
    assert torch.isfinite(newest(tmp_path)["weight.0.weight"]).all()


def test_streams_stand_where_each_process_left_its_own():
    """The first process still knows the old place of a walk that the second one has moved."""
    before = {"a": 1, "b": 1}
    assert merged(before, [{"a": 2, "b": 1}, {"a": 1, "b": 5}]) == {"a": 2, "b": 5}


def test_shards_need_processes():
    with pytest.raises(ValueError, match="fsdp needs processes"), join("fsdp", CPU):
        pass


# --- the command ---


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_torchrun_stops_and_goes_on(tiny_tables: Tables, tmp_path: Path, parallel: str):
    """SIGTERM to torchrun, as a cluster sends it, with a process that loads data beside each."""
    options = {
        "data": tiny_tables.train_regions, "val": tiny_tables.val_regions, "out": tmp_path,
        "device": "cpu", "frame": 48, "sam.table-size": 48, "sam.width": 16, "sam.depth": 1,
        "sam.num-heads": 2, "sam.out-channels": 16, "sam.global-blocks": 0, "num-layers": 1,
        "mlp-width": 16, "num-heads": 2, "train.batch-size": 4, "train.accumulate": 2,
        "train.eval-batches": 1, "train.log-every": 1, "train.workers": 1, "parallel": parallel,
    }  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "train.py"]
    command += ["scenes-sam", *(f"--{name}={value}" for name, value in options.items())]
    log = tmp_path / "log.jsonl"
    process = subprocess.Popen(
        [*command, "--train.steps=5000"], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 300
    while not log.exists() or log.read_text().count("\n") < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    os.kill(process.pid, signal.SIGTERM)
    errors = process.communicate(timeout=120)[1]
    assert errors.count("go on with --resume") == 1, errors
    (step,) = CheckpointFolder(tmp_path / "checkpoints", 2).steps()
    again = [*command, f"--train.steps={step + 2}", "--resume"]
    subprocess.run(again, cwd=ROOT, check=True, stderr=subprocess.DEVNULL, timeout=300)
    assert CheckpointFolder(tmp_path / "checkpoints", 2).steps() == [step, step + 2]
    assert load_file(tmp_path / "model.safetensors")
