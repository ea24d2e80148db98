"""PerceptionGPT's own study on scenes: what a box is written as, and which layers of CLIP are read.

    python -m benchmarks.representations --data TRAIN --val VAL --clip RUN --last-layer-clip RUN

One `<vis>` embedding a box, numbers in the text (Shikra) or location tokens (Kosmos-2), and `<vis>`
over the last layer alone instead of the sum of all: each is scenes-perceptiongpt trained on the
regions of a table in both directions, from the box to the phrase and from the phrase to the box,
with the same steps and batches, once for every seed. Scored as `eval.py` does: boxes in the text as
they are written, those of `<vis>` where the answer has it. Times are those of the process, on one
thread, whole answers written. Runs that are finished are not repeated, so the script can be
interrupted.
"""

from __future__ import annotations

import json
import re
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, stdev

import matplotlib
import torch
import tyro
from tqdm import tqdm

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from data.scene_expressions import parse_region
from pixelllm.box_text import spell
from pixelllm.conversations import Conversation, Referent
from pixelllm.evaluation.boxes import evaluate_regions
from pixelllm.evaluation.expressions import evaluate_expressions
from pixelllm.evaluation.report import Limits
from pixelllm.files import write_text
from pixelllm.marked_text import VIS_END, VIS_START
from pixelllm.perceiving import PerceptionGPT
from pixelllm.perception_config import BoxForm, PerceptionConfig, PerceptionStart
from pixelllm.perception_recipes import DESCRIBED, LOCATED, scenes_perceptiongpt
from pixelllm.tables import Table
from pixelllm.templates import ANSWER
from pixelllm.training.loop import train
from pixelllm.training.perceiving import build_stage
from pixelllm.views import open_record_image


@dataclass(frozen=True)
class Options:
    """What is trained.

    Args:
        data, val: tables of scenes' regions, made with --expressions.
        clip: a run of scenes-clip.
        last_layer_clip: the same with --clip.no-fuse-layers; without it, that variant is left out.
        out: folder of the runs, the figures and the plot.
        steps: of each run.
        seeds: runs of each variant.
        limit: regions of the validation table that are scored.
        timed: answers that are timed, one by one.
        only: the variants that are trained, by their places in the table; all of them by default.
    """

    data: Path
    val: Path
    clip: Path
    last_layer_clip: Path | None = None
    out: Path = Path("runs/representations")
    steps: int = 1000
    seeds: int = 3
    limit: int = 1000
    timed: int = 50
    only: tuple[int, ...] = (0, 1, 2, 3)


@dataclass(frozen=True)
class Variant:
    name: str
    form: BoxForm = "vis"
    fuse_layers: bool = True


VARIANTS = (
    Variant("one <vis>"),
    Variant("numbers", form="numbers"),
    Variant("location tokens", form="tokens"),
    Variant("one <vis>, last layer", fuse_layers=False),
)


@dataclass(frozen=True)
class Figures:
    """Of one run: the share of phrases located with an IoU above 0.5, their mean IoU, the share of
    boxes described with all attributes right, tokens and milliseconds a box."""

    precision: float
    mean_iou: float
    described: float
    tokens_per_box: float
    ms_per_box: float


def configure(variant: Variant, seed: int, options: Options) -> PerceptionConfig:
    """The recipe for regions and what they are called alone."""
    recipe = scenes_perceptiongpt()
    model = replace(
        recipe.model,
        vis=replace(recipe.model.vis, form=variant.form),
        clip=replace(recipe.model.clip, fuse_layers=variant.fuse_layers),
    )
    eyes = options.clip if variant.fuse_layers else options.last_layer_clip
    return replace(
        recipe,
        model=model,
        sources=(DESCRIBED, replace(LOCATED, weight=2)),
        start=PerceptionStart(clip=str(eyes)),
        train=replace(recipe.train, steps=options.steps, seed=seed, eval_every=options.steps),
    )


def run(variant: Variant, seed: int, options: Options) -> Figures:
    """Train and score, unless that is done."""
    folder = options.out / f"{re.sub('[^a-z]+', '-', variant.name).strip('-')}-{seed}"
    figures, val = folder / "figures.json", Table(options.val)
    if not figures.exists():
        config = configure(variant, seed, options)
        torch.manual_seed(seed)
        stage = build_stage(config, [Table(options.data)], [val], torch.device("cpu"))
        train(stage, config.train, folder, resume=(folder / "checkpoints").exists())
        model = PerceptionGPT.from_pretrained(folder)
        write_text(figures, json.dumps(asdict(score(model, val, options))))
    return Figures(**json.loads(figures.read_text()))


def score(model: PerceptionGPT, val: Table, options: Options) -> Figures:
    limits = Limits(options.limit)
    located = evaluate_expressions(model, val, limits, {}).metrics
    described = evaluate_regions(model, val, limits, [], parse_region).metrics
    return Figures(
        located["box_precision"],
        located["box_iou"],
        described["all_attributes_right"],
        tokens_per_box(model),
        ms_per_box(model, val, options.timed),
    )


def tokens_per_box(model: PerceptionGPT) -> float:
    """Between the marks of an answer; a number's depend on its digits, of which all are written."""
    talk = Conversation("", (1, 1), (("", ANSWER),), (Referent((0.123, 0.234, 0.345, 0.456)),))
    ((_, answer),) = spell(talk, model.config.model.vis.form).rounds
    spelled = answer.split(VIS_START)[1].split(VIS_END)[0]
    return len(model.tokenizer(spelled, add_special_tokens=False).input_ids)


def ms_per_box(model: PerceptionGPT, val: Table, count: int) -> float:
    """Milliseconds to answer one expression, without what reading image and question takes."""
    seconds = 0.0
    for row in val.positions("referring")[:count]:
        record = val[int(row)]
        image = open_record_image(record)
        phrase = next(p for p in record.phrases if p.task == "referring")
        question = [[model.question("referring", phrase.context)]]
        whole = _seconds(model, image, question)
        short = replace(model.config, max_new_tokens=1)
        model.config, config = short, model.config
        seconds += whole - _seconds(model, image, question)
        model.config = config
    return 1000 * seconds / count


def _seconds(model: PerceptionGPT, image, question: list[list[str]]) -> float:
    start = time.process_time()
    model.ask([image], question, with_masks=False)
    return time.process_time() - start


def spread(values: list[float]) -> str:
    return f"{mean(values):.3f} ± {stdev(values) if len(values) > 1 else 0:.3f}"


def table(found: dict[str, list[Figures]]) -> str:
    """Means over seeds and their standard deviation, as Markdown."""
    lines = [
        "| | located, P@0.5 | mean IoU | described, all right | tokens a box | ms a box |",
        "|---|---|---|---|---|---|",
    ]
    for name, runs in found.items():
        cells = [
            spread([r.precision for r in runs]),
            spread([r.mean_iou for r in runs]),
            spread([r.described for r in runs]),
            f"{mean(r.tokens_per_box for r in runs):.0f}",
            f"{mean(r.ms_per_box for r in runs):.0f}",
        ]
        lines.append(f"| {name.replace('<', '`<').replace('>', '>`')} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(found: dict[str, list[Figures]], file: Path) -> None:
    """Accuracy against the time a box takes, a dot for every run."""
    figure, axes = plt.subplots(figsize=(5, 3.2), layout="constrained")
    for name, runs in found.items():
        axes.plot([r.ms_per_box for r in runs], [r.mean_iou for r in runs], "o", label=name)
    axes.set(xlabel="milliseconds to write a box", ylabel="mean IoU", ylim=(0, 1))
    axes.set_xlim(0, 1.1 * axes.get_xlim()[1])
    axes.legend(loc="upper right")
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=150)


def main(options: Options) -> None:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    variants = [VARIANTS[i] for i in options.only]
    variants = [v for v in variants if v.fuse_layers or options.last_layer_clip]
    found: dict[str, list[Figures]] = {variant.name: [] for variant in variants}
    turns = [(seed, variant) for seed in range(options.seeds) for variant in variants]
    for seed, variant in tqdm(turns, desc="runs", unit="run"):
        found[variant.name].append(run(variant, seed, options))
    plot(found, options.out / "representations.png")
    print(table(found))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
