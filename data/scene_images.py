"""Procedural scenes: what lies where in a scene, and the picture of it.

A scene is planned first (`plan_scene`: kinds, colours, sizes and places, none of which depends
on another) and drawn after (`draw_scene`), so that narrations, regions and referring
expressions can be made from the same description. Objects are polygons drawn four times too
large and averaged down; backgrounds are crops of textures that are computed once per process.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw

COLOURS = {
    "red": (222, 32, 38),
    "orange": (250, 132, 10),
    "yellow": (252, 222, 34),
    "green": (30, 158, 62),
    "blue": (36, 92, 222),
    "purple": (132, 50, 188),
    "pink": (255, 140, 196),
    "white": (250, 250, 250),
    "black": (34, 34, 38),
    "brown": (122, 72, 34),
}
SIZES = ("small", "medium", "large")
SCALE = 4  # supersampling of objects
OUTLINE = 0.035  # width of the dark outline, as a share of the object's side
TILE = 512  # side of a texture in pixels

Colour = tuple[int, int, int]
Shape = tuple[tuple[str, np.ndarray], ...]  # parts in drawing order: tone, (n, 2) polygon


def _polygon(*corners: tuple[float, float]) -> np.ndarray:
    return np.array(corners, dtype=np.float64)


def _rectangle(x0: float, y0: float, x1: float, y1: float) -> np.ndarray:
    return _polygon((x0, y0), (x1, y0), (x1, y1), (x0, y1))


def _arc(
    x: float, y: float, rx: float, ry: float, start: float = 0, end: float = 360
) -> np.ndarray:
    """Points on an ellipse; degrees run clockwise from the right, as y points down."""
    angles = np.radians(np.linspace(start, end, max(8, int(abs(end - start) / 12))))
    return np.stack([x + rx * np.cos(angles), y + ry * np.sin(angles)], axis=-1)


def _ring(x: float, y: float, outer: float, inner: float, start: float, end: float) -> np.ndarray:
    return np.concatenate(
        [_arc(x, y, outer, outer, start, end), _arc(x, y, inner, inner, end, start)]
    )


def _heart() -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 40)
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([x, -y], axis=-1) / 16


def _star() -> np.ndarray:
    angles = np.radians(np.arange(10) * 36 - 90)
    radii = np.where(np.arange(10) % 2 == 0, 1.0, 0.45)
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=-1)


def _petals(count: int, radius: float, petal: float) -> Shape:
    angles = np.radians(np.arange(count) * 360 / count - 90)
    return tuple(
        ("body", _arc(radius * np.cos(a), radius * np.sin(a), petal, petal)) for a in angles
    )


# Tones: body, dark and light are shades of the object's colour; the others are the same for all.
SHAPES: dict[str, Shape] = {
    "car": (
        ("body", _polygon((-0.6, 0), (-0.35, -0.48), (0.3, -0.48), (0.66, 0))),
        ("body", _polygon((-1, 0.02), (-0.92, -0.06), (0.9, -0.06), (1, 0.1), (1, 0.42), (-1, 0.42))),
        ("glass", _polygon((-0.42, -0.06), (-0.26, -0.36), (-0.04, -0.36), (-0.04, -0.06))),
        ("glass", _polygon((0.08, -0.06), (0.08, -0.36), (0.24, -0.36), (0.47, -0.06))),
        ("trim", _arc(-0.52, 0.42, 0.26, 0.26)),
        ("trim", _arc(0.54, 0.42, 0.26, 0.26)),
        ("light", _arc(-0.52, 0.42, 0.11, 0.11)),
        ("light", _arc(0.54, 0.42, 0.11, 0.11)),
    ),
    "house": (
        ("body", _rectangle(-0.72, -0.1, 0.72, 0.9)),
        ("dark", _polygon((-1, -0.06), (0, -0.92), (1, -0.06))),
        ("trim", _rectangle(-0.14, 0.3, 0.2, 0.9)),
        ("glass", _rectangle(-0.54, 0.14, -0.26, 0.44)),
        ("glass", _rectangle(0.32, 0.14, 0.58, 0.44)),
    ),
    "tree": (
        ("bark", _rectangle(-0.13, 0.55, 0.13, 1)),
        ("body", _polygon((-0.78, 0.62), (0, -0.2), (0.78, 0.62))),
        ("body", _polygon((-0.62, 0.16), (0, -0.6), (0.62, 0.16))),
        ("body", _polygon((-0.44, -0.3), (0, -1), (0.44, -0.3))),
        ("dark", _polygon((-0.4, 0.16), (0.62, 0.16), (0.3, 0.26))),
        ("dark", _polygon((-0.26, -0.3), (0.44, -0.3), (0.2, -0.2))),
    ),
    "fish": (
        ("body", _polygon((0.45, 0), (1, -0.5), (0.86, 0), (1, 0.5))),
        ("dark", _polygon((-0.25, -0.4), (0.1, -0.68), (0.32, -0.3))),
        ("body", _arc(-0.2, 0, 0.8, 0.48)),
        ("dark", _polygon((-0.05, 0.02), (0.3, -0.14), (0.3, 0.2))),
        ("glass", _arc(-0.62, -0.12, 0.12, 0.12)),
        ("trim", _arc(-0.64, -0.12, 0.06, 0.06)),
    ),
    "star": (("body", _star()), ("light", _star() * 0.4)),
    "heart": (("body", _heart()), ("light", _arc(-0.45, -0.36, 0.2, 0.16))),
    "boat": (
        ("trim", _rectangle(-0.06, -1, 0.04, 0.4)),
        ("light", _polygon((0.1, -0.95), (0.1, 0.24), (0.84, 0.24))),
        ("body", _polygon((-0.12, -0.72), (-0.12, 0.24), (-0.66, 0.24))),
        ("body", _polygon((-1, 0.36), (1, 0.36), (0.64, 0.86), (-0.66, 0.86))),
        ("dark", _polygon((-1, 0.36), (1, 0.36), (0.93, 0.47), (-0.94, 0.47))),
    ),
    "cup": (
        ("body", _ring(0.5, 0.05, 0.48, 0.26, -90, 90)),
        ("body", _polygon((-0.85, -0.7), (0.55, -0.7), (0.42, 0.75), (-0.72, 0.75))),
        ("dark", _arc(-0.15, -0.68, 0.7, 0.17)),
        ("light", _polygon((-0.62, -0.4), (-0.46, -0.38), (-0.42, 0.5), (-0.54, 0.5))),
    ),
    "umbrella": (
        ("trim", _rectangle(-0.05, -0.98, 0.05, 0.8)),
        ("trim", _ring(0.17, 0.76, 0.23, 0.13, 0, 180)),
        ("body", np.concatenate([_arc(0, 0.05, 1, 0.92, 180, 360)] + [
            _arc(x, 0.05, 0.25, 0.13, 0, -180) for x in (0.75, 0.25, -0.25, -0.75)])),
        ("dark", np.concatenate([_arc(0, 0.05, 0.5, 0.92, 180, 360), _arc(0.25, 0.05, 0.25, 0.13, 0, -180),
                                 _arc(-0.25, 0.05, 0.25, 0.13, 0, -180)])),
    ),
    "mushroom": (
        ("cream", _polygon((-0.24, 0), (0.24, 0), (0.34, 0.82), (0.2, 0.92), (-0.2, 0.92), (-0.34, 0.82))),
        ("body", _arc(0, 0.12, 1, 0.94, 180, 360)),
        ("cream", _arc(-0.5, -0.22, 0.15, 0.14)),
        ("cream", _arc(0.05, -0.48, 0.18, 0.15)),
        ("cream", _arc(0.52, -0.16, 0.14, 0.13)),
    ),
    "plane": (
        ("dark", _polygon((0, -0.25), (1, 0.25), (1, 0.46), (0, 0.22), (-1, 0.46), (-1, 0.25))),
        ("dark", _polygon((0, 0.58), (0.42, 0.84), (0.42, 0.98), (0, 0.86), (-0.42, 0.98), (-0.42, 0.84))),
        ("body", _arc(0, 0, 0.19, 1)),
        ("glass", _arc(0, -0.68, 0.1, 0.13)),
    ),
    "key": (
        ("body", _rectangle(-0.15, -0.13, 0.98, 0.13)),
        ("body", _rectangle(0.46, 0.08, 0.64, 0.46)),
        ("body", _rectangle(0.8, 0.08, 0.98, 0.4)),
        ("body", _ring(-0.5, 0, 0.5, 0.22, 0, 360)),
    ),
    "moon": (("body", np.concatenate([_arc(0, 0, 1, 1, 50, 310), _arc(0.42, 0, 0.8, 0.78, 282, 78)])),),
    "chair": (
        ("dark", _rectangle(-0.42, 0.2, -0.27, 1)),
        ("dark", _rectangle(0.38, 0.2, 0.53, 1)),
        ("body", _polygon((-0.72, -1), (-0.5, -1), (-0.46, 1), (-0.68, 1))),
        ("body", _rectangle(-0.66, 0.02, 0.72, 0.26)),
        ("body", _rectangle(0.5, 0.2, 0.7, 1)),
    ),
    "bottle": (
        ("body", _polygon((-0.15, -0.8), (0.15, -0.8), (0.17, -0.4), (0.42, -0.1), (0.42, 0.92),
                          (0.34, 1), (-0.34, 1), (-0.42, 0.92), (-0.42, -0.1), (-0.17, -0.4))),
        ("trim", _rectangle(-0.2, -1, 0.2, -0.76)),
        ("cream", _rectangle(-0.42, 0.12, 0.42, 0.62)),
    ),
    "flower": _petals(6, 0.6, 0.36) + (("cream", _arc(0, 0, 0.34, 0.34)), ("dark", _arc(0, 0, 0.2, 0.2))),
    "butterfly": (
        ("body", _arc(-0.52, -0.34, 0.48, 0.44)),
        ("body", _arc(0.52, -0.34, 0.48, 0.44)),
        ("dark", _arc(-0.42, 0.4, 0.36, 0.38)),
        ("dark", _arc(0.42, 0.4, 0.36, 0.38)),
        ("light", _arc(-0.54, -0.34, 0.2, 0.18)),
        ("light", _arc(0.54, -0.34, 0.2, 0.18)),
        ("trim", _arc(0, 0, 0.1, 0.74)),
    ),
    "cat": (
        ("body", _polygon((-0.88, -0.9), (-0.2, -0.5), (-0.8, 0.1))),
        ("body", _polygon((0.88, -0.9), (0.2, -0.5), (0.8, 0.1))),
        ("body", _arc(0, 0.14, 0.9, 0.74)),
        ("glass", _arc(-0.36, 0, 0.17, 0.17)),
        ("glass", _arc(0.36, 0, 0.17, 0.17)),
        ("trim", _arc(-0.36, 0, 0.08, 0.14)),
        ("trim", _arc(0.36, 0, 0.08, 0.14)),
        ("trim", _polygon((-0.13, 0.3), (0.13, 0.3), (0, 0.46))),
    ),
    "hat": (
        ("body", _rectangle(-0.56, -0.7, 0.56, 0.5)),
        ("trim", _rectangle(-0.56, 0.16, 0.56, 0.4)),
        ("body", _arc(0, 0.54, 1, 0.2)),
    ),
    "bell": (
        ("trim", _arc(0, 0.82, 0.2, 0.18)),
        ("trim", _ring(0, -0.86, 0.16, 0.07, 0, 360)),
        ("body", np.concatenate([_arc(0, -0.22, 0.5, 0.56, 180, 360),
                                 _polygon((0.56, 0.3), (0.86, 0.72), (-0.86, 0.72), (-0.56, 0.3))])),
        ("dark", _rectangle(-0.86, 0.6, 0.86, 0.76)),
    ),
}  # fmt: skip
KINDS = tuple(SHAPES)
BACKGROUNDS = ("grass", "sand", "water", "bricks", "wood", "sky", "stone", "tiles")


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
        if len(self.image_size) not in (1, 2) or min(self.image_size) < 32:
            raise ValueError(
                f"image_size must be one or two numbers from 32 on, not {self.image_size}"
            )
        if not 1 <= self.objects[0] <= self.objects[1]:
            raise ValueError(f"objects must be two rising numbers from 1 on, not {self.objects}")
        if not 0.05 <= self.min_size <= self.max_size <= 0.9:
            raise ValueError(
                f"sizes must rise within [0.05, 0.9], not {self.min_size} to {self.max_size}"
            )
        if not 0 <= self.max_overlap <= 1 or not 0 <= self.center_gap < 1:
            raise ValueError(
                f"max_overlap {self.max_overlap} and center_gap {self.center_gap} must be in [0, 1)"
            )
        if not 1 <= self.kinds <= len(KINDS) or not 1 <= self.colours <= len(COLOURS):
            raise ValueError(
                f"there are {len(KINDS)} kinds and {len(COLOURS)} colours, "
                f"not {self.kinds} and {self.colours}"
            )
        if not 0 <= self.held_out <= 0.5 or not 0 <= self.rotation <= 180:
            raise ValueError(
                f"held_out {self.held_out} must be in [0, 0.5], rotation {self.rotation} in [0, 180]"
            )
        if self.objects[1] > len(self.pairs()[0]):
            raise ValueError(
                f"{self.objects[1]} objects, but {len(self.pairs()[0])} colour-kind pairs"
            )

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) in pixels."""
        return (self.image_size[0], self.image_size[-1])

    def pairs(self) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
        """(colour, kind) pairs of training and those held out.

        The held-out ones are the same for every seed and spread evenly over kinds and colours.
        """
        colours, kinds = list(COLOURS)[: self.colours], KINDS[: self.kinds]
        rounds = [
            (colours[(k * 3 + k // len(colours) + turn * 5) % len(colours)], kind)
            for turn in range(len(colours))
            for k, kind in enumerate(kinds)
        ]
        held_out = rounds[: round(self.held_out * len(colours) * len(kinds))]
        every = [(colour, kind) for kind in kinds for colour in colours]
        return [pair for pair in every if pair not in held_out], sorted(set(held_out))


@dataclass(frozen=True)
class SceneObject:
    """One object: `center` (x, y) in [0, 1] of the image, `side_px` of its square in pixels."""

    kind: str
    colour: str
    size: str
    center: tuple[float, float]
    side_px: float
    held_out: bool = False


@dataclass(frozen=True)
class Scene:
    """`objects` from the farthest to the nearest; `size` is (H, W) in pixels."""

    size: tuple[int, int]
    background: str
    objects: tuple[SceneObject, ...]


def plan_scene(rng: Generator, world: World, with_held_out: bool = False) -> Scene:
    """Draw a scene; `with_held_out` gives one of its objects a held-out colour-kind pair.

    Raises ValueError where the world is so full that no scene of its smallest number fits.
    """
    count = int(rng.integers(world.objects[0], world.objects[1] + 1))
    for attempt in range(50):
        squares = _place_squares(rng, world, count if attempt < 10 else world.objects[0])
        if len(squares) >= world.objects[0]:
            break
    else:
        raise ValueError(
            f"{world.objects[0]} objects of {world.min_size} to {world.max_size} do not fit; "
            "ask for fewer or smaller ones, or a larger max_overlap"
        )
    trained, held_out = world.pairs()
    chosen = rng.choice(len(trained), size=len(squares), replace=False)
    pairs = [(*trained[index], False) for index in chosen]
    if with_held_out and held_out:
        pairs[rng.integers(len(pairs))] = (*held_out[rng.integers(len(held_out))], True)
    objects = tuple(
        SceneObject(kind, colour, size, center, side, unseen)
        for (size, center, side), (colour, kind, unseen) in zip(squares, pairs, strict=True)
    )
    return Scene(world.size, str(rng.choice(BACKGROUNDS)), objects)


def _place_squares(
    rng: Generator, world: World, count: int
) -> list[tuple[str, tuple[float, float], float]]:
    """Up to `count` squares (size word, centre in [0, 1], side in pixels) that fit together."""
    height, width = world.size
    gap = min(world.center_gap, 0.4 / world.objects[1]) * width
    placed: list[tuple[str, float, float, float]] = []
    for _ in range(count):
        for _ in range(40):
            word, side = _draw_size(rng, world)
            x, y = rng.uniform(side / 2, width - side / 2), rng.uniform(side / 2, height - side / 2)
            if all(
                abs(x - x2) >= gap and _overlap(x - x2, y - y2, side, side2) <= world.max_overlap
                for _, x2, y2, side2 in placed
            ):
                placed.append((word, x, y, side))
                break
    return [(word, (x / width, y / height), side) for word, x, y, side in placed]


def _draw_size(rng: Generator, world: World) -> tuple[str, float]:
    """A size word and a side in pixels; the words' ranges do not touch."""
    index = int(rng.integers(len(SIZES)))
    share = (index + rng.uniform(0.15, 0.85)) / len(SIZES)
    side = world.min_size + share * (world.max_size - world.min_size)
    return SIZES[index], float(side * min(world.size))


def _overlap(dx: float, dy: float, side: float, other: float) -> float:
    small = min(side, other)
    across = np.clip((side + other) / 2 - np.abs([dx, dy]), 0, small)
    return float(across.prod() / small**2)


def draw_scene(rng: Generator, scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """Draw a scene.

    Returns:
        uint8[H, W, 3], the picture; bool[n, H, W], the visible part of every object.
    """
    height, width = scene.size
    canvas = Image.fromarray(draw_background(rng, scene.background, scene.size))
    masks = np.zeros((len(scene.objects), height, width), dtype=bool)
    for index, thing in enumerate(scene.objects):
        patch, left, top = _draw_object(rng, thing, scene.size)
        canvas.paste(patch, (left, top), patch)
        cover = Image.new("L", (width, height))
        cover.paste(patch.getchannel("A"), (left, top))
        covered = np.asarray(cover) > 127
        masks[:index] &= ~covered
        masks[index] = covered
    return np.asarray(canvas), masks


def _draw_object(
    rng: Generator, thing: SceneObject, size: tuple[int, int]
) -> tuple[Image.Image, int, int]:
    """The object as an RGBA picture, and the pixel of the scene its top-left corner goes to."""
    height, width = size
    half = thing.side_px / 2
    x, y = thing.center[0] * width, thing.center[1] * height
    left, top = int(np.floor(x - half)) - 2, int(np.floor(y - half)) - 2
    side = int(np.ceil(thing.side_px)) + 5
    parts = _posed(rng, SHAPES[thing.kind], half - 1, x - left, y - top)
    tones = _tones(rng, COLOURS[thing.colour])
    patch = Image.new("RGBA", (side * SCALE, side * SCALE), (*tones["outline"], 0))
    draw = ImageDraw.Draw(patch)
    line = max(2, round(OUTLINE * thing.side_px * SCALE))
    closed = [[tuple(p) for p in (points * SCALE)] for _, points in parts]
    for corners in closed:
        draw.line([*corners, corners[0], corners[1]], tones["outline"], line, joint="curve")
    for (tone, _), corners in zip(parts, closed, strict=True):
        draw.polygon(corners, tones[tone])
    return patch.reduce(SCALE), left, top


def _posed(
    rng: Generator, shape: Shape, half: float, x: float, y: float, rotation: float = 12.0
) -> list[tuple[str, np.ndarray]]:
    """The shape turned, mirrored and stretched a little, then fitted into a square around x, y."""
    points = np.concatenate([part for _, part in shape])
    stretch = np.array([rng.uniform(0.9, 1.1) * rng.choice((-1, 1)), 1.0])
    angle = np.radians(rng.uniform(-rotation, rotation))
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    points = (points * stretch) @ turn
    low, high = points.min(axis=0), points.max(axis=0)
    points = (points - (low + high) / 2) * (2 * half / (high - low).max()) + (x, y)
    ends = np.cumsum([len(part) for _, part in shape])[:-1]
    return [(tone, part) for (tone, _), part in zip(shape, np.split(points, ends), strict=True)]


def _tones(rng: Generator, colour: Colour) -> dict[str, Colour]:
    base = np.clip(np.array(colour) * rng.uniform(0.92, 1.04), 0, 255)
    return {
        "body": _mix(base, base, 0),
        "dark": _mix(base, (0, 0, 0), 0.25),
        "light": _mix(base, (255, 255, 255), 0.45),
        "outline": _mix(base, (20, 16, 24), 0.78),
        "trim": (52, 50, 58),
        "glass": (226, 240, 248),
        "cream": (250, 240, 214),
        "bark": (110, 74, 44),
    }


def _mix(colour: np.ndarray, other: Colour, share: float) -> Colour:
    mixed = np.asarray(colour) * (1 - share) + np.asarray(other) * share
    return tuple(int(value) for value in mixed)


def draw_background(rng: Generator, name: str, size: tuple[int, int]) -> np.ndarray:
    """A crop of a texture with its own tint and light, uint8[H, W, 3]."""
    height, width = size
    rows = (rng.integers(TILE) + np.arange(height)) % TILE
    columns = (rng.integers(TILE) + np.arange(width)) % TILE
    crop = _texture(name)[rows[:, None], columns]
    slope = rng.uniform(-0.12, 0.12, size=2)
    light = (
        rng.uniform(0.92, 1.06)
        + slope[0] * np.linspace(-1, 1, height, dtype=np.float32)[:, None]
        + slope[1] * np.linspace(-1, 1, width, dtype=np.float32)
    )
    tint = rng.uniform(0.95, 1.05, size=3).astype(np.float32)
    return np.clip(crop * (light[..., None].astype(np.float32) * tint), 0, 255).astype(np.uint8)


@functools.cache
def _texture(name: str) -> np.ndarray:
    """float32[TILE, TILE, 3] in 0..255, periodic."""
    rng = np.random.default_rng(BACKGROUNDS.index(name))
    rows, columns = np.mgrid[0:TILE, 0:TILE].astype(np.float32)
    base, height = _RELIEFS[name](rng, rows, columns)
    return np.asarray(base, dtype=np.float32) * (1 + height[..., None]).astype(np.float32)


def _noise(rng: Generator, fine_y: float, fine_x: float) -> np.ndarray:
    """Periodic smooth noise of unit variance, with wavelengths of about so many pixels."""
    spectrum = np.fft.rfft2(rng.standard_normal((TILE, TILE)))
    fy, fx = np.fft.fftfreq(TILE)[:, None], np.fft.rfftfreq(TILE)
    smooth = np.fft.irfft2(spectrum * np.exp(-((fy * fine_y) ** 2 + (fx * fine_x) ** 2) * 2))
    return smooth / smooth.std()


def _grass(rng, rows, columns):
    return (128, 152, 104), 0.1 * _noise(rng, 9, 2) + 0.06 * _noise(rng, 40, 40)


def _sand(rng, rows, columns):
    ripple = np.sin(rows * (2 * np.pi * 32 / TILE) + 2.2 * _noise(rng, 60, 60))
    return (212, 194, 158), 0.04 * _noise(rng, 1.5, 1.5) + 0.035 * ripple


def _water(rng, rows, columns):
    wave = np.sin(rows * (2 * np.pi * 40 / TILE) + 2.6 * _noise(rng, 30, 50))
    return (128, 166, 186), 0.07 * wave + 0.05 * _noise(rng, 6, 24)


def _bricks(rng, rows, columns):
    row = rows // 16
    shifted = (columns + 16 * (row % 2)) % TILE
    shade = rng.normal(0, 0.06, (TILE // 16, TILE // 32))[
        row.astype(int), (shifted // 32).astype(int)
    ]
    mortar = (rows % 16 < 2) | (shifted % 32 < 2)
    return (172, 138, 120), np.where(mortar, 0.22, shade) + 0.03 * _noise(rng, 2, 2)


def _wood(rng, rows, columns):
    plank = (rows // 32).astype(int)
    shade = rng.normal(0, 0.05, TILE // 32)[plank]
    grain = np.sin(rows * (2 * np.pi * 96 / TILE) + 3 * _noise(rng, 14, 90))
    return (178, 144, 108), np.where(rows % 32 < 1.5, -0.3, shade + 0.05 * grain) + 0.02 * _noise(
        rng, 1.5, 8
    )


def _sky(rng, rows, columns):
    cloud = np.clip(_noise(rng, 45, 80) + 0.4 * _noise(rng, 12, 18), 0, 1.6)
    return (164, 192, 216), 0.16 * cloud


def _stone(rng, rows, columns):
    return (150, 148, 146), 0.07 * _noise(rng, 5, 5) + 0.09 * np.tanh(2 * _noise(rng, 30, 30))


def _tiles(rng, rows, columns):
    shade = rng.normal(0, 0.05, (16, 16))[(rows // 32).astype(int), (columns // 32).astype(int)]
    grout = (rows % 32 < 2) | (columns % 32 < 2)
    return (188, 194, 196), np.where(grout, -0.22, shade) + 0.015 * _noise(rng, 3, 3)


_RELIEFS = {
    "grass": _grass,
    "sand": _sand,
    "water": _water,
    "bricks": _bricks,
    "wood": _wood,
    "sky": _sky,
    "stone": _stone,
    "tiles": _tiles,
}
