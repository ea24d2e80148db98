"""Worlds of procedural scenes: their vocabulary, their options, and where the objects lie.

A scene is planned before it is drawn, and kind, colour, size and place are drawn independently
of each other. Narrations, regions and referring expressions all read the same description.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.random import Generator

COLOURS = {
    "red": (222, 32, 38), "orange": (250, 132, 10), "yellow": (252, 222, 34),
    "green": (30, 158, 62), "blue": (36, 92, 222), "purple": (132, 50, 188),
    "pink": (255, 140, 196), "white": (250, 250, 250),
}  # fmt: skip
Pair = tuple[str, str]  # colour, kind
Square = tuple[str, tuple[float, float], float]  # size word, centre in [0, 1], side in pixels

TRIES = 40  # places looked at for every object
SIZES = ("small", "medium", "large")
KINDS = (
    "car", "house", "tree", "fish", "star", "heart", "boat", "cup", "umbrella", "mushroom",
    "plane", "key", "moon", "chair", "bottle", "flower",
)  # fmt: skip
BACKGROUNDS = {
    "grass": (128, 152, 104), "sand": (212, 194, 158), "water": (128, 166, 186),
    "bricks": (172, 138, 120), "wood": (178, 144, 108), "sky": (164, 192, 216),
    "stone": (150, 148, 146), "tiles": (188, 194, 196),
}  # fmt: skip


@dataclass(frozen=True)
class World:
    """What scenes look like.

    Args:
        image_size: H and W in pixels, or one number for a square.
        objects: smallest and largest number of objects in a scene.
        min_size, max_size: the longer side of an object, as a share of the image's shorter side.
        max_overlap: how much of the smaller of two objects' squares the other may cover.
        center_gap: smallest distance of two centres in x, as a share of the width; less where
            that many objects need it.
        kinds, colours: how many of the known ones are used.
        held_out: share of colour-kind pairs that training never shows together.
        rotation: largest angle in degrees.
    """

    image_size: tuple[int, ...] = (160,)
    objects: tuple[int, int] = (2, 3)
    min_size: float = 0.25
    max_size: float = 0.45
    max_overlap: float = 0.15
    center_gap: float = 0.08
    kinds: int = 16
    colours: int = 8
    held_out: float = 0.1
    rotation: float = 12.0

    def __post_init__(self) -> None:
        few, many = self.objects
        if len(self.image_size) not in (1, 2) or min(self.image_size) < 32:
            raise ValueError(f"image_size is one or two numbers from 32 on, not {self.image_size}")
        if not 1 <= few <= many:
            raise ValueError(f"objects: a smallest and a largest number, not {few} and {many}")
        if not 0.05 <= self.min_size <= self.max_size <= 0.9:
            raise ValueError(f"sizes rise in [0.05, 0.9], not {self.min_size} to {self.max_size}")
        limits = {
            "max_overlap": (0, 1), "center_gap": (0, 1), "held_out": (0, 1),
            "rotation": (0, 180), "kinds": (1, len(KINDS)), "colours": (1, len(COLOURS)),
        }  # fmt: skip
        for name, (low, high) in limits.items():
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name}: {low} to {high}, not {getattr(self, name)}")
        if many > len(self.pairs):
            raise ValueError(f"{many} different objects, but {len(self.pairs)} colour-kind pairs")

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) in pixels."""
        return (self.image_size[0], self.image_size[-1])

    @cached_property
    def pairs(self) -> list[Pair]:
        """The colour-kind pairs of training."""
        kept_back = set(self.held_out_pairs)
        kinds, colours = KINDS[: self.kinds], list(COLOURS)[: self.colours]
        every = ((colour, kind) for kind in kinds for colour in colours)
        return [pair for pair in every if pair not in kept_back]

    @cached_property
    def held_out_pairs(self) -> list[Pair]:
        """The others: the same for every seed, spread evenly over kinds and colours."""
        colours, count = list(COLOURS), self.colours
        in_turn = [
            (colours[(3 * k + k // count + turn) % count], kind)
            for turn in range(count)
            for k, kind in enumerate(KINDS[: self.kinds])
        ]
        return in_turn[: round(self.held_out * len(in_turn))]


@dataclass(frozen=True)
class SceneObject:
    """One object of a scene."""

    kind: str
    colour: str
    size: str
    center: tuple[float, float]  # (x, y) in [0, 1] of the image
    side_px: float  # of the square it just fits into
    angle: float = 0.0  # degrees
    held_out: bool = False  # training never shows this colour-kind pair


@dataclass(frozen=True)
class Scene:
    """`objects` from the farthest to the nearest; `size` is (H, W) in pixels."""

    size: tuple[int, int]
    background: str
    objects: tuple[SceneObject, ...]


def plan_scene(rng: Generator, world: World, with_held_out: bool = False) -> Scene:
    """Draw a scene; `with_held_out` gives one of its objects a held-out colour-kind pair.

    Where the drawn number of objects does not fit, the scene has fewer, but never fewer than
    the world's smallest number; ValueError where that is too many.
    """
    squares = _place_squares(rng, world)
    chosen = rng.choice(len(world.pairs), size=len(squares), replace=False)
    pairs = [(*world.pairs[index], False) for index in chosen]
    if with_held_out and world.held_out_pairs:
        unseen = world.held_out_pairs[rng.integers(len(world.held_out_pairs))]
        pairs[rng.integers(len(pairs))] = (*unseen, True)
    objects = []
    for square, (colour, kind, held_out) in zip(squares, pairs, strict=True):
        angle = rng.uniform(-world.rotation, world.rotation)
        objects.append(SceneObject(kind, colour, *square, angle, held_out))
    return Scene(world.size, str(rng.choice(list(BACKGROUNDS))), tuple(objects))


def _place_squares(rng: Generator, world: World) -> list[Square]:
    smallest, largest = world.objects
    count = int(rng.integers(smallest, largest + 1))
    for attempt in range(60):
        squares = _fitting_squares(rng, world, count)
        if len(squares) == count or (attempt >= 2 and len(squares) >= smallest):
            return squares
    sizes = f"{world.min_size} to {world.max_size}"
    remedy = "ask for fewer or smaller ones, or a larger max_overlap"
    raise ValueError(f"{smallest} objects of sizes {sizes} do not fit into an image; {remedy}")


def _fitting_squares(rng: Generator, world: World, count: int) -> list[Square]:
    """Up to `count` squares, each the first of some tried ones that is clear of the others."""
    extent = np.array(world.size[::-1], dtype=float)  # width, height
    gap = min(world.center_gap, 0.4 / world.objects[1]) * extent[0]
    words: list[str] = []
    sides, centers = np.zeros(0), np.zeros((0, 2))
    for _ in range(count):
        word, side = _draw_sizes(rng, world)
        center = side[:, None] / 2 + rng.random((TRIES, 2)) * (extent - side[:, None])
        apart = np.abs(center[:, None] - centers)  # (TRIES, squares so far, 2)
        small, reach = np.minimum(side[:, None], sides), (side[:, None] + sides) / 2
        shared = (reach[..., None] - apart).clip(0, small[..., None]).prod(-1) / small**2
        clear = ((apart[..., 0] >= gap) & (shared <= world.max_overlap)).all(axis=1)
        if clear.any():
            first = int(clear.argmax())
            words.append(SIZES[word[first]])
            sides = np.append(sides, side[first])
            centers = np.vstack([centers, center[first]])
    places = [(float(x), float(y)) for x, y in centers / extent]
    return list(zip(words, places, sides.tolist(), strict=True))


def _draw_sizes(rng: Generator, world: World) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of size words and sides in pixels, TRIES each; the words' ranges do not touch."""
    word = rng.integers(len(SIZES), size=TRIES)
    share = (word + rng.uniform(0.15, 0.85, size=TRIES)) / len(SIZES)
    side = world.min_size + share * (world.max_size - world.min_size)
    return word, side * min(world.size)
