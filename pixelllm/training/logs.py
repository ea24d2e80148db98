"""What a run reports: a progress line, `log.jsonl` and tensorboard, all from the same numbers."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import fmean

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from pixelllm.checkpoints import write_text


class RunLog:
    """Use as a context manager around the loop.

    Args:
        out: the run's folder; `log.jsonl` lies there.
        first_step: lines after it, from an earlier attempt, are dropped.
        num_steps: of the whole run.
        writes: whether it does; of many processes one writes.
    """

    def __init__(self, out: Path, first_step: int, num_steps: int, writes: bool = True) -> None:
        self.writes = writes
        if not writes:
            return
        out.mkdir(parents=True, exist_ok=True)
        self.path = out / "log.jsonl"
        lines = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
        whole = (line for line in lines if line.endswith("\n"))  # a killed run may cut its last
        kept = [line for line in whole if json.loads(line)["step"] <= first_step]
        write_text(self.path, "".join(kept))
        self.board = SummaryWriter(out / "tensorboard", purge_step=first_step + 1)
        self.bar = tqdm(total=num_steps, initial=first_step, desc=out.name, unit="step")
        self._reset()

    def _reset(self) -> None:
        self._terms: dict[str, list[float]] = {}  # not every source has every term
        self._images = 0
        self._since = time.monotonic()

    def step(self, terms: dict[str, float], num_images: int) -> None:
        """Take the loss terms of a finished step."""
        if not self.writes:
            return
        for name, term in terms.items():
            self._terms.setdefault(name, []).append(term)
        self._images += num_images
        self.bar.update(1)

    def write(self, step: int, **numbers: float) -> None:
        """Write the numbers, with the mean loss terms since the last call that had any."""
        if not self.writes:
            return
        if self._terms:
            means = {f"loss_{name}": fmean(values) for name, values in self._terms.items()}
            rate = self._images / max(time.monotonic() - self._since, 1e-9)
            numbers = {**means, **numbers, "images_per_s": rate}
            shown = {name[5:]: f"{value:.3f}" for name, value in means.items()}
            self.bar.set_postfix({**shown, "img/s": f"{rate:.0f}"}, refresh=False)
            self._reset()
        with self._named_errors():
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step, **numbers}) + "\n")
            for name, value in numbers.items():
                self.board.add_scalar(name, value, step)

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(
                f"{self.path} could not be written ({error}); the last checkpoint is intact: make "
                "room and go on with --resume"
            ) from error

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if self.writes:
            self.bar.close()
            # A full disk fails here too; what it failed first says more.
            with self._named_errors() if error is None else suppress(OSError):
                self.board.close()
