"""Masks as COCO run lengths and as polygons, for JSON.

Run lengths are exact and compact. Polygons follow the borders of the pixels and are exact too:
they have a corner wherever a border turns, and holes are polygons of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

Polygon = list[tuple[float, float]]  # (x, y) in [0, 1] of the image


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """bool[H, W] as COCO's compressed run lengths, `{"size": [H, W], "counts": str}`."""
    code = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(mask.shape), "counts": code["counts"].decode("ascii")}


def decode_mask(code: dict[str, Any]) -> np.ndarray:
    """The inverse of `encode_mask`: bool[H, W]."""
    return coco_mask.decode(code).astype(bool)


def checked_mask(code: Any, name: str) -> dict[str, Any]:
    """Run lengths, compressed or not, as compressed ones that fill their size.

    pycocotools reads past the end of what is corrupt, or never comes to an end.

    Raises ValueError beginning with the name and saying what is wrong.
    """
    if not isinstance(code, Mapping) or not {"size", "counts"} <= code.keys():
        found = f"with keys {sorted(code)}" if isinstance(code, Mapping) else f"{code!r:.60}"
        raise ValueError(f"{name}: mask {found}; expected 'size' and 'counts'")
    size, counts = code["size"], code["counts"]
    is_size = isinstance(size, list | tuple) and [type(n) for n in size] == [int, int]
    if not is_size or not isinstance(counts, str | bytes | list):
        raise ValueError(
            f"{name}: mask of size {size!r:.40} with counts {counts!r:.40}; expected [H, W] and "
            "run lengths, as a list or compressed"
        )
    if isinstance(counts, bytes):
        counts = counts.decode("latin-1")
    runs = _decode_counts(counts) if isinstance(counts, str) else counts
    if not all(type(run) is int and run >= 0 for run in runs) or sum(runs) != size[0] * size[1]:
        remedy = "is the file damaged?"
        raise ValueError(f"{name}: corrupt run lengths, they do not fill {tuple(size)}; {remedy}")
    if isinstance(counts, list):
        counts = coco_mask.frPyObjects({"size": size, "counts": counts}, *size)["counts"].decode()
    return {"size": list(size), "counts": counts}


def _decode_counts(counts: str) -> list[int]:
    """Run lengths of COCO's compressed form: five bits a character, differences from the third on.

    Returns [-1] where a character is out of range or a number is cut off.
    """
    runs: list[int] = []
    value = shift = 0
    for code in (ord(character) - 48 for character in counts):
        if not 0 <= code < 64:
            return [-1]
        value |= (code & 31) << shift
        shift += 5
        if not code & 32:  # the number's last character, with its sign
            if code & 16:
                value -= 1 << shift
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return runs if shift == 0 else [-1]


def trace_mask(mask: np.ndarray) -> list[Polygon]:
    """The borders of bool[H, W] as closed polygons; an empty mask has none.

    A place is inside where it lies inside an odd number of them: the even-odd rule of SVG and
    canvas. On screen, outer borders run clockwise and those of holes counter-clockwise.
    """
    height, width = mask.shape
    following = _border_steps(mask)
    polygons = []
    while following:
        ring = [next(iter(following))]
        while len(ring) == 1 or ring[-1] != ring[0]:
            ends = following[ring[-1]]
            ring.append(ends.pop())
            if not ends:
                del following[ring[-2]]
        corners = np.array(ring[:-1])
        arriving, leaving = corners - np.roll(corners, 1, 0), np.roll(corners, -1, 0) - corners
        corners = corners[(arriving != leaving).any(1)] / (width, height)
        polygons.append([(x, y) for x, y in corners.tolist()])
    return polygons


def fill_polygons(polygons: Sequence[Polygon], size: tuple[int, int]) -> np.ndarray:
    """The mask bool[H, W] that polygons enclose by the even-odd rule, at any size."""
    height, width = size
    mask = np.zeros(size, dtype=bool)
    for polygon in polygons:
        flat = (np.array(polygon) * (width, height)).ravel().tolist()
        mask ^= decode_mask(coco_mask.frPyObjects([flat], height, width)[0])
    return mask


def _border_steps(mask: np.ndarray) -> dict[tuple[int, int], list[tuple[int, int]]]:
    """Steps along the sides of pixels, the mask on their right: corner (x, y) -> next corners."""
    padded = np.pad(mask, 1).astype(np.int8)
    steps: dict[tuple[int, int], list[tuple[int, int]]] = {}
    # A side is entered at its far or its near end, depending on which pixel is foreground.
    below = np.diff(padded[:, 1:-1], axis=0)  # (H + 1, W): 1 where the mask is below the side
    right = np.diff(padded[1:-1], axis=1)  # (H, W + 1): 1 where it is to the right
    for changes, (dx, dy), forward in ((below, (1, 0), 1), (right, (0, 1), -1)):
        for y, x in np.argwhere(changes).tolist():
            near, far = (x, y), (x + dx, y + dy)
            start, end = (near, far) if changes[y, x] == forward else (far, near)
            steps.setdefault(start, []).append(end)
    return steps
