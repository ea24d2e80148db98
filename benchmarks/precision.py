"""How much a model says otherwise in bfloat16 and with its trunk in 8 bits.

    python -m benchmarks.precision RUN --data RUN/data/narrations_val --limit 100

Each precision is compared with the run's own on the same images: the captions that it writes by
itself, and, given the other's caption, its likeliest token, its logits and its points.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor

from pixelllm.batches import pad_rows
from pixelllm.images import open_image
from pixelllm.models.pixelllm import Prediction, Text
from pixelllm.pretrained import PixelLLM
from pixelllm.tables import Table

PRECISIONS: dict[str, dict[str, Any]] = {
    "bfloat16": {"dtype": torch.bfloat16},
    "int8 trunk": {"int8": True},
    "bfloat16, int8 trunk": {"dtype": torch.bfloat16, "int8": True},
}


@dataclass(frozen=True)
class Options:
    """What to compare.

    Args:
        run: folder of a finished run.
        data: table with images.
        limit: images.
    """

    run: Annotated[Path, tyro.conf.Positional]
    data: Path
    limit: int = 100


def compare(options: Options) -> None:
    model = PixelLLM.from_pretrained(options.run)
    records = islice(iter(Table(options.data)), options.limit)
    batch = model.processor()([open_image(record.path) for record in records])
    captions = model.generate(**batch)
    text = written(model, batch, captions)
    reference = read(model, batch, text)
    print(f"{len(captions)} captions, {int((~text.token_padding).sum())} tokens")
    print("                        same captions  same tokens  logits  points moved")
    for name, precision in PRECISIONS.items():
        other = PixelLLM.from_pretrained(options.run, **precision)
        found = other.generate(**batch)
        same = sum(a.text == b.text for a, b in zip(captions, found, strict=True)) / len(found)
        shares = difference(reference, read(other, batch, text), ~text.token_padding)
        print(f"{name:24}{same:13.3f}{shares[0]:13.4f}{shares[1]:8.4f}{shares[2]:14.5f}")


def written(model: PixelLLM, batch: dict[str, Tensor], captions: list) -> Text:
    """The captions as given words."""
    begin, end = model.language.bos_id, model.language.eos_id
    encoded = model.tokenizer([c.text for c in captions], add_special_tokens=False).input_ids
    rows = pad_rows([[begin, *ids, end] for ids in encoded], model.language.pad_id)
    return Text(batch["context_ids"], batch["context_padding"], *rows)


@torch.no_grad()
def read(model: PixelLLM, batch: dict[str, Tensor], text: Text) -> Prediction:
    return model(batch["images"], batch["sizes"], batch["boxes"], text)


def difference(a: Prediction, b: Prediction, valid: Tensor) -> tuple[float, float, float]:
    """Share of equal likeliest tokens; error of the logits, relative to their spread; mean L1."""
    same = (a.logits.argmax(-1) == b.logits.argmax(-1))[valid].float().mean()
    error = (a.logits - b.logits)[valid].square().mean().sqrt() / a.logits[valid].std()
    return float(same), float(error), float((a.points - b.points)[valid].abs().mean())


if __name__ == "__main__":
    compare(tyro.cli(Options, description=__doc__))
