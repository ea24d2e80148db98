"""Self-contained HTML pages of images: a gallery, and one image at a time.

A page is page.html (the frame, the gallery, their style and script) around a file of its own,
e.g. viewer.html: a style, the content, and a script. It asks the network for nothing and says so
in its content security policy. Images are embedded as JPEG and decoded only when looked at.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import re
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from pixelllm.files import written_whole
from pixelllm.pictures import fit

LONGEST, THUMBNAIL = 1024, 480  # pixels of the longer side


def write_page(
    template: str,
    items: Iterable[tuple[Image.Image, dict[str, Any]]],
    count: int,
    path: Path | str,
    title: str,
) -> None:
    """Write images and what the page's script needs to know about each; complete or not at all.

    Args:
        template: name of the page's own file.
        items: opened one by one; plain values with `name`, `title`, `size` [H, W] and `text`.
        count: how many items; above one the page begins with a gallery.
        path: of the page.
        title: plain text.
    """
    head, tail = _assemble(template)
    entries = []
    pictures: dict[tuple[tuple[int, int], bytes], int] = {}
    progress = tqdm(items, desc="images", unit="image", total=count, disable=count < 20)
    with written_whole(path) as beside, beside.open("w", encoding="utf-8") as file:
        file.write(head.replace("{{title}}", html.escape(title)))
        for image, entry in progress:  # several items may be of one image
            content = (image.size, hashlib.sha256(image.tobytes()).digest())
            if content not in pictures:
                number = pictures[content] = len(pictures)
                file.write(_embedded(f"image-{number}", image, LONGEST, quality=85))
                if count > 1:
                    file.write(_embedded(f"thumbnail-{number}", image, THUMBNAIL, quality=75))
            entries.append({**entry, "picture": pictures[content]})
        text = json.dumps(entries, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        # Inside a script element only "<" could end it; JSON allows the escape.
        text = text.replace("<", "\\u003c")
        file.write(f'<script type="application/json" id="captions">{text}</script>\n{tail}')


def _assemble(template: str) -> tuple[str, str]:
    """The page before and after its images."""
    folder = resources.files("pixelllm")
    page, own = (folder.joinpath(n).read_text(encoding="utf-8") for n in ("page.html", template))
    parts = re.fullmatch(r"(<style>.*</style>)\n(.*)\n(<script>.*</script>)\n", own, re.DOTALL)
    for name, part in zip(("style", "content", "script"), parts.groups(), strict=True):
        page = page.replace(f"{{{{{name}}}}}", part)
    head, tail = page.split("{{captions}}")
    return head, tail


def _embedded(name: str, image: Image.Image, longest: int, quality: int) -> str:
    """A JPEG data URL in an inert script element, which a browser keeps without decoding it."""
    if max(image.size) > longest:
        image = fit(image, longest)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, optimize=True, comment="")
    url = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
    return f'<script type="text/plain" id="{name}">{url}</script>\n'


def rounded(place: Iterable[float] | None) -> list[float] | None:
    """Coordinates with as many digits as a screen can show."""
    return None if place is None else [round(float(value), 5) for value in place]
