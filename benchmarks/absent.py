"""Whether what a model sees at the place it found tells that an expression fits no object.

    python -m benchmarks.absent RUN SCENES --limit 200

SCENES is a folder of `data.scenes`. For every object of its validation scenes three expressions are
located: "the red car", which is there, and two that fit nothing, of the same kind in another
color and of another kind in the same color. Each is taken for found where the caption of its box
(`locate --caption`) has its color and kind. Beside it the score, as the chance that an expression
that fits scores higher than one that does not.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random
from typing import Annotated, Any

import torch
import tyro
from tqdm import tqdm

from pixelllm.commands.given import load_any_model
from pixelllm.images import open_image
from pixelllm.locating import Location
from pixelllm.perceiving import PerceptionGPT

Names = set[tuple[str, str]]  # (color, kind)


@dataclass(frozen=True)
class Options:
    """What is located.

    Args:
        run: a finished run.
        scenes: a folder of scenes.
        limit: scenes.
        threads: of torch.
    """

    run: Annotated[str, tyro.conf.Positional]
    scenes: Annotated[Path, tyro.conf.Positional]
    limit: int = 200
    threads: int = 1


def asked_of(scene: dict[str, Any], names: Names, rng: Random) -> list[tuple[str, bool]]:
    """Expressions and whether they fit an object."""
    present = {(thing["colour"], thing["kind"]) for thing in scene["objects"]}
    absent = sorted(names - present)
    found = []
    for colour, kind in sorted(present):
        others = [[n for n in absent if n[place] == (colour, kind)[place]] for place in (0, 1)]
        chosen = [rng.choice(some) for some in others if some]
        found += [(f"the {colour} {kind}", True)]
        found += [(f"the {c} {k}", False) for c, k in chosen]
    return found


def locate(model: Any, path: Path, texts: list[str]) -> list[Location]:
    image = open_image(path)
    if isinstance(model, PerceptionGPT):
        return model.locate([image], [texts], with_captions=True)[0]
    return model.locate(**model.processor().locating([image], [texts]), with_captions=True)


def main(options: Options) -> None:
    torch.set_num_threads(options.threads)
    model, rng = load_any_model(options.run, "cpu"), Random(0)
    with open(options.scenes / "annotations/scenes_val_truth.jsonl") as lines:
        scenes = [json.loads(line) for line in lines]
    names = {(thing["colour"], thing["kind"]) for scene in scenes for thing in scene["objects"]}
    seen: dict[bool, list[bool]] = {True: [], False: []}
    scores: dict[bool, list[float]] = {True: [], False: []}
    for scene in tqdm(list(islice(scenes, options.limit)), "scenes"):
        asked = asked_of(scene, names, rng)
        path = options.scenes / "val" / f"{int(scene['image_id']):012d}.jpg"
        located = locate(model, path, [text for text, _ in asked])
        for (text, fits), found in zip(asked, located, strict=True):
            said = (found.caption or "").split()
            seen[fits].append(all(word in said for word in text.split()[1:]))
            scores[fits].append(found.score)
    for fits, what in ((True, "expressions that fit"), (False, "that fit nothing")):
        share = sum(seen[fits]) / len(seen[fits])
        print(f"{what:22}{len(seen[fits]):6}  taken for found {share:.3f}")
    pairs = torch.tensor(scores[True])[:, None] > torch.tensor(scores[False])
    print(f"the score is higher where it fits: {float(pairs.float().mean()):.3f} of pairs")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
