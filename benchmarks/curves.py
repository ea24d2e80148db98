"""Learning curves of runs as one picture: python benchmarks/curves.py OUT.png RUN [RUN …]."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PANELS = {
    "text loss": ("loss_text", "val_text"),
    "point loss": ("loss_point", "val_point"),
}


def read_log(run: Path, name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one number in a run's log."""
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    rows = [row for row in rows if name in row]
    return [row["step"] for row in rows], [row[name] for row in rows]


def main(out: Path, runs: list[Path]) -> None:
    figure, axes = plt.subplots(1, len(PANELS), figsize=(10, 3.6), layout="constrained")
    for axis, (title, (training, validation)) in zip(axes, PANELS.items(), strict=True):
        for number, run in enumerate(runs):
            colour = f"C{number}"
            axis.plot(*read_log(run, training), color=colour, alpha=0.35, linewidth=1)
            axis.plot(*read_log(run, validation), color=colour, label=f"{run.name}, held out")
        axis.set(title=title, xlabel="step", yscale="log")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), [Path(run) for run in sys.argv[2:]])
