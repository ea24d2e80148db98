"""What befalls a run: kills, a full disk, a vanished image, a worker that the system ends."""

from __future__ import annotations

import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import make_tiny_config, short_training
from test_training import CPU, Stream, assert_same, log_lines, newest, small_sam, toy_stage

from pixelllm.config import Config
from pixelllm.shards import open_table, unfinished_shards, write_shards
from pixelllm.tables import Table
from pixelllm.training import captioning
from pixelllm.training.checkpoint import CheckpointFolder
from pixelllm.training.loader import named_deaths
from pixelllm.training.logs import RunLog
from pixelllm.training.loop import train
from pixelllm.training.signals import StopRequest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_as_if_never_killed(tmp_path: Path):
    command = ["-m", "benchmarks.survive", "--kills", "6", "--keep", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, check=True)


def test_a_checkpoint_half_removed_is_in_nobodys_way(tmp_path: Path, monkeypatch):
    """Killed while an old one was removed, a run was left with a folder without its facts."""
    config = short_training(9, save_every=1, eval_every=100)
    train(toy_stage(config), config, tmp_path / "straight", resume=False)

    def killed(path: Path) -> None:
        (path / "state.json").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        train(toy_stage(config), config, tmp_path / "killed", resume=False)
    monkeypatch.undo()
    train(toy_stage(config), config, tmp_path / "killed", resume=True)
    assert_same(newest(tmp_path / "straight"), newest(tmp_path / "killed"))
    left = {path.name for path in (tmp_path / "killed" / "checkpoints").iterdir()}
    assert left == {"step-00000008", "step-00000009"}


# --- a full disk ---


@contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """The system refuses to let files grow, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_disk_that_fills_up_keeps_the_last_checkpoint(tmp_path: Path):
    config = short_training(8, log_every=100, eval_every=100)
    train(toy_stage(replace(config, steps=2)), replace(config, steps=2), tmp_path, resume=False)
    before = newest(tmp_path)
    size = (tmp_path / "checkpoints" / "step-00000002" / "state.safetensors").stat().st_size
    with no_file_above(size - 1), pytest.raises(OSError) as caught:
        train(toy_stage(config), config, tmp_path, resume=True)
    message = str(caught.value)
    assert "step-00000004 could not be written" in message and "File too large" in message
    assert "make room and go on with --resume" in message and "\n" not in message
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]
    assert_same(before, newest(tmp_path))
    train(toy_stage(config), config, tmp_path, resume=True)
    assert CheckpointFolder(tmp_path / "checkpoints", 2).steps()[-1] == 8


def test_a_log_that_cannot_be_written_says_so(tmp_path: Path):
    with RunLog(tmp_path, 0, 4) as log:
        log.write(1, lr=0.1)
        log.path = Path("/dev/full")
        with pytest.raises(OSError, match=r"/dev/full could not .*No space left.* --resume"):
            log.write(2, lr=0.1)


# --- a vanished image ---


@pytest.fixture(scope="module")
def mortal_tables(tiny_tables, tmp_path_factory) -> tuple[Path, Path, Path]:
    """The tiny narrations in shards and in an Arrow table, over images that may be deleted."""
    folder = tmp_path_factory.mktemp("mortal")
    table = Table(tiny_tables.train)
    kept = Path(table[0].path).parent
    shutil.copytree(kept, folder / "images")
    moved = [
        replace(table[i], path=str(folder / "images" / Path(table[i].path).name))
        for i in range(len(table))
    ]
    list(unfinished_shards(folder / "shards", []))
    write_shards(moved, folder / "shards", {}, 4)
    return folder / "shards", folder / "images", kept


def streamed_stage(config: Config, shards: Path, val: Path, at_step: int, event=lambda: None):
    """The tiny recipe on shards; something happens while the model is at a step."""
    torch.manual_seed(config.train.seed)
    stage = captioning.build_stage(config, [open_table(shards)], [Table(val)], CPU, None)
    done = []

    def loss(batch):
        done.append(batch)
        if len(done) == at_step + 1:
            event()
        return stage.loss(batch)

    return replace(stage, loss=loss)


def streamed_config(workers: int) -> Config:
    frozen = ("sam", "eva02", "prompt_encoder")
    return make_tiny_config(train=short_training(9, eval_every=100, workers=workers, frozen=frozen))


@pytest.fixture(scope="module")
def straight_run(mortal_tables, tiny_tables, tmp_path_factory) -> Path:
    """Nine steps of four records on twelve, left alone."""
    out, config = tmp_path_factory.mktemp("straight"), streamed_config(0)
    stage = streamed_stage(config, mortal_tables[0], tiny_tables.val, 0)
    train(stage, config.train, out, resume=False)
    return out


@pytest.mark.parametrize("workers", [0, 1])
def test_a_vanished_image_is_named_and_the_run_goes_on_with_it(
    mortal_tables, tiny_tables, straight_run, tmp_path: Path, workers: int
):
    """In one line, with the record and the path, also from a process that loads data."""
    shards, images, kept = mortal_tables
    config, val = streamed_config(workers), tiny_tables.val
    gone = sorted(images.iterdir())

    def vanish() -> None:
        for image in gone:
            image.unlink()

    stage = streamed_stage(config, shards, val, 2, vanish)
    try:
        with pytest.raises(FileNotFoundError) as caught:
            train(stage, config.train, tmp_path, resume=False)
    finally:
        for image in gone:
            shutil.copy(kept / image.name, image)
    message = str(caught.value)
    assert message.startswith("record scenes_train/") and "\n" not in message
    assert message.endswith("no such image file") and str(images) in message
    assert 2 <= CheckpointFolder(tmp_path / "checkpoints", 2).steps()[-1] < 9
    train(streamed_stage(config, shards, val, 0), config.train, tmp_path, resume=True)
    assert_same(newest(straight_run), newest(tmp_path))
    assert log_lines(straight_run) == log_lines(tmp_path)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stopped_run_on_shards_goes_on_bit_for_bit(
    mortal_tables, tiny_tables, straight_run, tmp_path: Path, workers: int
):
    """In the middle of an epoch, with what a worker read ahead thrown away."""
    config, val = streamed_config(workers), tiny_tables.val
    stage = streamed_stage(
        config, mortal_tables[0], val, 4, lambda: os.kill(os.getpid(), signal.SIGTERM)
    )
    with pytest.raises(StopRequest, match="stopped after step 5"):
        train(stage, config.train, tmp_path, resume=False)
    stage = streamed_stage(streamed_config(0), mortal_tables[0], val, 0)
    train(stage, config.train, tmp_path, resume=True)
    assert_same(newest(straight_run), newest(tmp_path))
    assert log_lines(straight_run) == log_lines(tmp_path)


# --- a worker that the system ends ---


class Deadly(Stream):
    """The process that loads batch 5 is killed, as by a system out of memory."""

    def __getitem__(self, step: int):
        if step == 5 and multiprocessing.parent_process() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(step)


def train_and_lose_a_worker(folder: Path) -> None:
    """Write what the run says into `folder`."""
    config = short_training(9, eval_every=100, workers=1)
    try:
        train(replace(toy_stage(config), batches=Deadly(9)), config, folder / "run", resume=False)
    except ChildProcessError as error:
        (folder / "message").write_text(str(error))


def test_a_killed_worker_is_explained_and_the_last_checkpoint_intact(tmp_path: Path):
    config = short_training(9, eval_every=100)
    train(toy_stage(config), config, tmp_path / "straight", resume=False)
    # In a process of its own: torch reports the dead worker again at every later signal.
    process = multiprocessing.get_context("spawn").Process(
        target=train_and_lose_a_worker, args=(tmp_path,)
    )
    process.start()
    process.join()
    message = (tmp_path / "message").read_text()
    assert message.startswith("DataLoader worker") and "\n" not in message
    assert "lower --train.workers (now 1) and go on with --resume" in message
    train(toy_stage(config), config, tmp_path / "run", resume=True)
    assert_same(newest(tmp_path / "straight"), newest(tmp_path / "run"))


@pytest.mark.parametrize("broken", [ConnectionResetError("reset by peer"), EOFError()])
def test_tensors_that_break_off_tell_of_the_worker(broken: Exception):
    with pytest.raises(ChildProcessError, match=r"^DataLoader worker died: .*--train.workers"):
        with named_deaths(2):
            raise broken
    with pytest.raises(type(broken)), named_deaths(0):
        raise broken


def test_other_errors_of_the_run_keep_their_words(tmp_path: Path):
    config = short_training(3)
    stage = toy_stage(config)

    def loss(_batch):
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="^shapes do not fit$"):
        train(replace(stage, loss=loss), config, tmp_path, resume=False)


# --- being told to stop ---


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_told_to_stop_with_its_workers_a_run_writes_a_checkpoint(tmp_path: Path, number: int):
    """A terminal and a scheduler tell all processes; the step in flight needs the workers'."""
    config = short_training(9, save_every=100, eval_every=100, workers=1)
    train(toy_stage(config), config, tmp_path / "straight", resume=False)
    stage = toy_stage(config)

    def loss(batch):
        if batch.ids[0] == "n16":
            for worker in multiprocessing.active_children():
                os.kill(worker.pid, number)
            os.kill(os.getpid(), number)
        return stage.loss(batch)

    with pytest.raises(StopRequest, match="stopped after step 5; go on with --resume") as caught:
        train(replace(stage, loss=loss), config, tmp_path / "run", resume=False)
    assert caught.value.code == 128 + number
    train(toy_stage(config), config, tmp_path / "run", resume=True)
    assert_same(newest(tmp_path / "straight"), newest(tmp_path / "run"))


@pytest.mark.slow
def test_the_command_reports_a_full_disk_in_one_line(tiny_tables, tmp_path: Path):
    command = [*small_sam(tiny_tables, tmp_path / "run"), "--train.save-every", "1"]
    limited = f"ulimit -f 20; exec {' '.join(map(str, command))}"
    done = subprocess.run(["bash", "-c", limited], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: ")
