"""Location-conditioned captioning: captions of given boxes against those of people (paper, §4).

Official protocol (reference, §12.3): one item per box of positive size, with its own caption as
the only reference, on the VG test and the RefCOCOg (umd) validation split.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from pixelllm.evaluation.captions import score_captions
from pixelllm.evaluation.dense import Region, group_boxes
from pixelllm.evaluation.meteor import score_meteor
from pixelllm.evaluation.overlap import checked_boxes


def score_region_captions(
    hypotheses: Mapping[str, str], references: Mapping[str, Sequence[str]]
) -> dict[str, float]:
    """`meteor`, `cider_d`, `rouge_l` and `bleu_4` of raw captions by region, as fractions.

    Document frequencies of CIDEr-D come from these references, a region being an "image" there.
    For the official protocol every list of references has one caption. Raises ValueError on ids
    of one side only.
    """
    scores = score_captions(hypotheses, references)
    kept = {name: scores[name] for name in ("cider_d", "rouge_l", "bleu_4")}
    return {"meteor": score_meteor(hypotheses, references), **kept}


def grouped_references(images: Iterable[Mapping[str, Region]]) -> dict[str, list[str]]:
    """References for the grouped protocol: each region has the captions of all it belongs to.

    Groups are those of dense captioning (`group_boxes`), found in each image alone.

    Args:
        images: the regions of each image by an id that no other image has, else ValueError.
    """
    references: dict[str, list[str]] = {}
    for regions in images:
        ids = list(regions)
        twice = references.keys() & regions.keys()
        if twice:
            raise ValueError(f"region {min(twice)} is in two images; give it another id")
        boxes = checked_boxes([box for box, _ in regions.values()], f"regions {ids[:1]} ...")
        for members in group_boxes(boxes):
            captions = [regions[ids[i]][1] for i in members]
            references |= {ids[i]: captions for i in members}
    return references
