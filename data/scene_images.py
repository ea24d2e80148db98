"""Pictures of procedural scenes.

Objects are polygons, drawn four times too large and averaged down, with a thin dark outline and
a soft shadow, so that every colour shows on every background. Backgrounds are crops of textures
that are computed once per process.
"""

from __future__ import annotations

import functools

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw

from data.scene_worlds import BACKGROUNDS, COLOURS, Scene, SceneObject

SCALE = 4  # supersampling of objects
OUTLINE = 0.018  # width of the dark outline, as a share of the object's side
SHADOW = 0.3  # how much darker the shadow is
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
    outside, inside = _arc(x, y, outer, outer, start, end), _arc(x, y, inner, inner, end, start)
    return np.concatenate([outside, inside])


def _heart() -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 40)
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([x, -y], axis=-1) / 16


def _star() -> np.ndarray:
    angles = np.radians(np.arange(10) * 36 - 90)
    radii = np.tile([1.0, 0.45], 5)
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=-1)


def _canopy(radius: float, scallops: int) -> np.ndarray:
    """The top of an umbrella with arcs cut out of its lower edge, from right to left."""
    step = radius / scallops
    cuts = [_arc(radius - step * n, 0.05, step, 0.13, 0, -180) for n in range(1, 2 * scallops, 2)]
    return np.concatenate([_arc(0, 0.05, radius, 0.92, 180, 360), *cuts])


def _petals(count: int, radius: float, petal: float) -> Shape:
    angles = np.radians(np.arange(count) * 360 / count - 90)
    centers = zip(radius * np.cos(angles), radius * np.sin(angles), strict=True)
    return tuple(("body", _arc(*center, petal, petal)) for center in centers)


# Tones: body, dark and light are shades of the object's colour; the others are the same for all.
SHAPES: dict[str, Shape] = {
    "car": (("body", _polygon((-0.6, 0), (-0.35, -0.48), (0.3, -0.48), (0.66, 0))),
        ("body", _polygon((-1, 0), (-0.92, -0.06), (0.9, -0.06), (1, 0.1), (1, 0.42), (-1, 0.42))),
        ("glass", _polygon((-0.42, -0.06), (-0.26, -0.36), (-0.04, -0.36), (-0.04, -0.06))),
        ("glass", _polygon((0.08, -0.06), (0.08, -0.36), (0.24, -0.36), (0.47, -0.06))),
        ("trim", _arc(-0.52, 0.42, 0.26, 0.26)), ("trim", _arc(0.54, 0.42, 0.26, 0.26)),
        ("light", _arc(-0.52, 0.42, 0.11, 0.11)), ("light", _arc(0.54, 0.42, 0.11, 0.11))),
    "house": (("body", _rectangle(-0.72, -0.1, 0.72, 0.9)),
        ("dark", _polygon((-1, -0.06), (0, -0.92), (1, -0.06))),
        ("trim", _rectangle(-0.14, 0.3, 0.2, 0.9)), ("glass", _rectangle(-0.54, 0.14, -0.26, 0.44)),
        ("glass", _rectangle(0.32, 0.14, 0.58, 0.44))),
    "tree": (("bark", _rectangle(-0.13, 0.55, 0.13, 1)),
        ("body", _polygon((-0.78, 0.62), (0, -0.2), (0.78, 0.62))),
        ("body", _polygon((-0.62, 0.16), (0, -0.6), (0.62, 0.16))),
        ("body", _polygon((-0.44, -0.3), (0, -1), (0.44, -0.3))),
        ("dark", _polygon((-0.4, 0.16), (0.62, 0.16), (0.3, 0.26))),
        ("dark", _polygon((-0.26, -0.3), (0.44, -0.3), (0.2, -0.2)))),
    "fish": (("body", _polygon((0.45, 0), (1, -0.5), (0.86, 0), (1, 0.5))),
        ("dark", _polygon((-0.25, -0.4), (0.1, -0.68), (0.32, -0.3))),
        ("body", _arc(-0.2, 0, 0.8, 0.48)),
        ("dark", _polygon((-0.05, 0.02), (0.3, -0.14), (0.3, 0.2))),
        ("glass", _arc(-0.62, -0.12, 0.12, 0.12)), ("trim", _arc(-0.64, -0.12, 0.06, 0.06))),
    "star": (("body", _star()), ("light", _star() * 0.4)),
    "heart": (("body", _heart()), ("light", _arc(-0.45, -0.36, 0.2, 0.16))),
    "boat": (("trim", _rectangle(-0.06, -1, 0.04, 0.4)),
        ("light", _polygon((0.1, -0.95), (0.1, 0.24), (0.84, 0.24))),
        ("body", _polygon((-0.12, -0.72), (-0.12, 0.24), (-0.66, 0.24))),
        ("body", _polygon((-1, 0.36), (1, 0.36), (0.64, 0.86), (-0.66, 0.86))),
        ("dark", _polygon((-1, 0.36), (1, 0.36), (0.93, 0.47), (-0.94, 0.47)))),
    "cup": (("body", _ring(0.5, 0.05, 0.48, 0.26, -90, 90)),
        ("body", _polygon((-0.85, -0.7), (0.55, -0.7), (0.42, 0.75), (-0.72, 0.75))),
        ("dark", _arc(-0.15, -0.68, 0.7, 0.17)),
        ("light", _polygon((-0.62, -0.4), (-0.46, -0.38), (-0.42, 0.5), (-0.54, 0.5)))),
    "umbrella": (("trim", _rectangle(-0.05, -0.98, 0.05, 0.8)),
        ("trim", _ring(0.17, 0.76, 0.23, 0.13, 0, 180)), ("body", _canopy(1, 4)),
        ("dark", _canopy(0.5, 2))),
    "mushroom": (("cream", _polygon((-0.24, 0), (0.24, 0), (0.34, 0.82), (0.2, 0.92),
                                    (-0.2, 0.92), (-0.34, 0.82))),
        ("body", _arc(0, 0.12, 1, 0.94, 180, 360)), ("cream", _arc(-0.5, -0.22, 0.15, 0.14)),
        ("cream", _arc(0.05, -0.48, 0.18, 0.15)), ("cream", _arc(0.52, -0.16, 0.14, 0.13))),
    "plane": (
        ("dark", _polygon((0, -0.25), (1, 0.25), (1, 0.46), (0, 0.22), (-1, 0.46), (-1, 0.25))),
        ("dark", _polygon((0, 0.55), (0.42, 0.84), (0.42, 0.98), (0, 0.86),
                          (-0.42, 0.98), (-0.42, 0.84))),
        ("body", _arc(0, 0, 0.19, 1)), ("glass", _arc(0, -0.68, 0.1, 0.13))),
    "key": (("body", _rectangle(-0.15, -0.13, 0.98, 0.13)),
        ("body", _rectangle(0.46, 0.08, 0.64, 0.46)), ("body", _rectangle(0.8, 0.08, 0.98, 0.4)),
        ("body", _ring(-0.5, 0, 0.5, 0.22, 0, 360))),
    "moon": (("body", np.concatenate([_arc(0, 0, 1, 1, 50, 310),
                                      _arc(0.42, 0, 0.8, 0.78, 282, 78)])),),
    "chair": (("dark", _rectangle(-0.42, 0.2, -0.24, 1)), ("dark", _rectangle(0.3, 0.2, 0.48, 1)),
        ("body", _polygon((-0.82, -1), (-0.56, -1), (-0.48, 1), (-0.74, 1))),
        ("body", _rectangle(-0.7, -0.04, 0.78, 0.28)), ("body", _rectangle(0.52, 0.2, 0.78, 1))),
    "bottle": (
        ("body", _polygon((-0.15, -0.8), (0.15, -0.8), (0.17, -0.4), (0.42, -0.1), (0.42, 0.92),
            (0.34, 1), (-0.34, 1), (-0.42, 0.92), (-0.42, -0.1), (-0.17, -0.4))),
        ("trim", _rectangle(-0.2, -1, 0.2, -0.76)), ("cream", _rectangle(-0.42, 0.12, 0.42, 0.62))),
    "flower": (*_petals(6, 0.6, 0.36), ("cream", _arc(0, 0, 0.34, 0.34)),
        ("dark", _arc(0, 0, 0.2, 0.2))),
}  # fmt: skip


def draw_scene(rng: Generator, scene: Scene) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw a scene.

    Returns:
        uint8[H, W, 3], the picture; bool[n, H, W], the visible pixels of every object; float[n],
        the share of every object's pixels that is visible.
    """
    height, width = scene.size
    picture = draw_background(rng, scene.background, scene.size)  # float32 until the end
    masks = np.zeros((len(scene.objects), height, width), dtype=bool)
    areas = np.zeros(len(scene.objects))
    for index, thing in enumerate(scene.objects):
        colour, cover, top, left = _draw_object(rng, thing, scene)
        side = len(cover)
        rows = slice(max(0, top), min(height, top + side))
        columns = slice(max(0, left), min(width, left + side))
        inside = (slice(rows.start - top, rows.stop - top),
                  slice(columns.start - left, columns.stop - left))  # fmt: skip
        shadow = np.zeros_like(cover)
        shift = max(1, round(0.03 * thing.side_px))
        shadow[shift:, shift:] = SHADOW * cover[:-shift, :-shift]
        region = picture[rows, columns]
        region *= 1 - shadow[inside][..., None]
        region += (colour[inside] - region) * cover[inside][..., None]
        masks[:index, rows, columns] &= cover[inside] < 0.5
        masks[index, rows, columns] = cover[inside] >= 0.5
        areas[index] = masks[index].sum()
    visible = masks.sum(axis=(1, 2)) / areas.clip(min=1)
    return np.clip(picture, 0, 255, out=picture).astype(np.uint8), masks, visible


def _draw_object(
    rng: Generator, thing: SceneObject, scene: Scene
) -> tuple[np.ndarray, np.ndarray, int, int]:
    """A patch: float32[s, s, 3] colour, float32[s, s] cover in [0, 1], and its top and left."""
    height, width = scene.size
    half = thing.side_px / 2
    x, y = thing.center[0] * width, thing.center[1] * height
    outline = max(1, round(OUTLINE * thing.side_px))
    margin = outline + max(1, round(0.03 * thing.side_px)) + 1
    left, top = int(np.floor(x - half)) - margin, int(np.floor(y - half)) - margin
    side = int(np.ceil(thing.side_px)) + 2 * margin + 1
    parts = _posed(rng, thing, half - outline, (x - left, y - top))
    tones = _tones(rng, COLOURS[thing.colour])
    # Two canvases, as what is averaged with the outline's colour must not be transparent there.
    canvas = Image.new("RGB", (side * SCALE, side * SCALE), tones["outline"])
    stencil = Image.new("L", canvas.size)
    draw, cut = ImageDraw.Draw(canvas), ImageDraw.Draw(stencil)
    for tone, points in parts:
        corners = (points * SCALE).ravel().tolist()
        draw.polygon(corners, tones[tone])
        cut.polygon(corners, 255)
    colour = np.asarray(canvas.reduce(SCALE), dtype=np.float32)
    cover = np.asarray(stencil.reduce(SCALE), dtype=np.float32) / 255
    shade = np.linspace(1.07, 0.93, side, dtype=np.float32)[:, None, None]
    return colour * shade, _widened(cover, outline), top, left


def _widened(cover: np.ndarray, pixels: int) -> np.ndarray:
    """Grow a shape by so many pixels; octagons pass for discs at this size."""
    for step in range(pixels):
        grown = cover.copy()  # three times as fast as a maximum filter
        np.maximum(grown[1:], cover[:-1], out=grown[1:])
        np.maximum(grown[:-1], cover[1:], out=grown[:-1])
        across = grown if step % 2 else cover
        wider = grown.copy()
        np.maximum(wider[:, 1:], across[:, :-1], out=wider[:, 1:])
        np.maximum(wider[:, :-1], across[:, 1:], out=wider[:, :-1])
        cover = wider
    return cover


def _posed(
    rng: Generator, thing: SceneObject, half: float, center: tuple[float, float]
) -> list[tuple[str, np.ndarray]]:
    """The kind's shape turned, mirrored and stretched a little, fitted into a square, in pixels."""
    tones, parts = zip(*SHAPES[thing.kind], strict=True)
    points = np.concatenate(parts)
    stretch = np.array([rng.uniform(0.9, 1.1) * rng.choice((-1, 1)), 1.0])
    angle = np.radians(thing.angle)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    points = (points * stretch) @ turn
    low, high = points.min(axis=0), points.max(axis=0)
    points = (points - (low + high) / 2) * (2 * half / (high - low).max()) + center
    ends = np.cumsum([len(part) for part in parts])[:-1]
    return list(zip(tones, np.split(points, ends), strict=True))


def _tones(rng: Generator, colour: Colour) -> dict[str, Colour]:
    strength = rng.uniform(0.92, 1.04)
    base = tuple(min(255, round(strength * value)) for value in colour)
    return {
        "body": base,
        "dark": _mix(base, (0, 0, 0), 0.25),
        "light": _mix(base, (255, 255, 255), 0.45),
        "outline": _mix(base, (20, 16, 24), 0.78),
        "trim": (52, 50, 58),
        "glass": (226, 240, 248),
        "cream": (250, 240, 214),
        "bark": (110, 74, 44),
    }


def _mix(colour: Colour, other: Colour, share: float) -> Colour:
    return tuple(int(a + (b - a) * share) for a, b in zip(colour, other, strict=True))


def draw_background(rng: Generator, name: str, size: tuple[int, int]) -> np.ndarray:
    """A crop of a texture with its own tint and light, float32[H, W, 3] in about 0..255."""
    height, width = size
    rows = (rng.integers(TILE) + np.arange(height)) % TILE
    columns = (rng.integers(TILE) + np.arange(width)) % TILE
    crop = _texture(name)[rows].take(columns, axis=1).astype(np.float32)
    down, across = rng.uniform(-0.12, 0.12, size=2)
    slope = down * np.linspace(-1, 1, height)[:, None] + across * np.linspace(-1, 1, width)
    light = rng.uniform(0.92, 1.06) + slope
    crop *= light[..., None].astype(np.float32)
    crop *= rng.uniform(0.95, 1.05, size=3).astype(np.float32)
    return crop


@functools.cache
def _texture(name: str) -> np.ndarray:
    """uint8[TILE, TILE, 3], periodic."""
    rng = np.random.default_rng(list(BACKGROUNDS).index(name))
    texture = np.array(BACKGROUNDS[name]) * (1 + _relief(name, rng))[..., None]
    return texture.clip(0, 255).astype(np.uint8)


def _noise(rng: Generator, tall: float, wide: float) -> np.ndarray:
    """Periodic smooth noise of unit variance, with spots of about so many pixels."""
    spectrum = np.fft.rfft2(rng.standard_normal((TILE, TILE)))
    down, across = np.fft.fftfreq(TILE)[:, None], np.fft.rfftfreq(TILE)
    smooth = np.fft.irfft2(spectrum * np.exp(-2 * ((down * tall) ** 2 + (across * wide) ** 2)))
    return smooth / smooth.std()


def _waves(count: int, positions: np.ndarray, bends: np.ndarray) -> np.ndarray:
    return np.sin(positions * (2 * np.pi * count / TILE) + bends)


def _shades(rng: Generator, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """A shade of its own for every plank, brick or tile, by its row and column."""
    return rng.normal(0, 0.055, (TILE, TILE))[rows, columns]


def _relief(name: str, rng: Generator) -> np.ndarray:
    """How much lighter every pixel of a texture is than its colour, float[TILE, TILE]."""
    rows, columns = np.mgrid[:TILE, :TILE]
    match name:
        case "grass":
            return 0.1 * _noise(rng, 9, 2) + 0.06 * _noise(rng, 40, 40)
        case "sand":
            ripples = 0.04 * _noise(rng, 1.5, 1.5)
            return ripples + 0.035 * _waves(32, rows, 2.2 * _noise(rng, 60, 60))
        case "water":
            return 0.07 * _waves(40, rows, 2.6 * _noise(rng, 30, 50)) + 0.05 * _noise(rng, 6, 24)
        case "bricks":
            shifted = (columns + 16 * (rows // 16 % 2)) % TILE
            mortar = (rows % 16 < 2) | (shifted % 32 < 2)
            shades = _shades(rng, rows // 16, shifted // 32)
            return np.where(mortar, 0.22, shades) + 0.03 * _noise(rng, 2, 2)
        case "wood":
            grain = 0.05 * _waves(96, rows, 3 * _noise(rng, 14, 90)) + 0.02 * _noise(rng, 1.5, 8)
            return np.where(rows % 32 < 2, -0.3, _shades(rng, rows // 32, 0 * columns)) + grain
        case "sky":
            return 0.16 * (_noise(rng, 45, 80) + 0.4 * _noise(rng, 12, 18)).clip(0, 1.6)
        case "stone":
            return 0.07 * _noise(rng, 5, 5) + 0.09 * np.tanh(2 * _noise(rng, 30, 30))
    grout = (rows % 32 < 2) | (columns % 32 < 2)  # tiles
    shades = _shades(rng, rows // 32, columns // 32)
    return np.where(grout, -0.22, shades) + 0.015 * _noise(rng, 3, 3)
