"""The README that a saved model carries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pixelllm.pretrained import PixelLLM

TEMPLATE = """---
library_name: pixelllm
pipeline_tag: image-to-text
license: apache-2.0
language: en
tags: [image-captioning, visual-grounding, pixelllm]
---

# {name}

A PixelLLM (Xu et al., CVPR 2024): it captions an image and gives a point for every word.

```python
from pixelllm import PixelLLM, Processor

name = "."  # this folder, or its name on the Hub
model, processor = PixelLLM.from_pretrained(name), Processor.from_pretrained(name)
caption = model.generate(**processor("image.jpg"))[0]
for word in caption.words:
    print(word.text, word.point, word.log_prob)
```

- recipe `{name}`, {steps} steps of {batch} images, frame {frame} px
- {parameters:.1f} M parameters, {trained:.1f} M of them trained
- language trunk: {trunk}
- frozen pretrained parts: {frozen}

Points are (x, y) and boxes (x0, y0, x1, y1), in [0, 1] of the original image.
"""


def model_card(model: PixelLLM, referenced: Sequence[str]) -> str:
    """Markdown with the model's facts.

    Args:
        referenced: parts whose published weights are not in the folder.
    """
    config = model.config
    count = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return TEMPLATE.format(
        name=config.name,
        steps=config.train.steps,
        batch=config.train.batch_size,
        frame=config.model.frame,
        parameters=count / 1e6,
        trained=trained / 1e6,
        trunk=config.model.language.trunk or "T5 from random weights",
        frozen=f"{', '.join(referenced)}: loaded from their source" if referenced else "included",
    )
