"""The README that a saved model carries."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from pixelllm.config import Config
from pixelllm.perception_config import PerceptionConfig

TEMPLATE = """---
library_name: pixelllm
pipeline_tag: image-to-text
license: apache-2.0
language: en
tags: [image-captioning, visual-grounding, pixelllm]
---

# {name}

{about}

```python
{example}
```

- recipe `{name}`, {steps} steps of {batch} images, frame {frame} px
- {parameters:.1f} M parameters, {trained:.1f} M of them trained
- language trunk: {trunk}
- frozen pretrained parts: {frozen}

Points are (x, y) and boxes (x0, y0, x1, y1), in [0, 1] of the original image.
"""


ABOUT = {
    Config: "PixelLLM (Xu et al., CVPR 2024): it captions an image, with a point for every word.",
    PerceptionConfig: (
        "PerceptionGPT (Pi et al., CVPR 2024): it answers questions about an image, with boxes\n"
        "and masks of what it mentions."
    ),
}
EXAMPLES = {
    Config: """from pixelllm import PixelLLM, Processor

name = "."  # this folder, or its name on the Hub
model, processor = PixelLLM.from_pretrained(name), Processor.from_pretrained(name)
caption = model.generate(**processor("image.jpg"))[0]
for word in caption.words:
    print(word.text, word.point, word.log_prob)""",
    PerceptionConfig: """from PIL import Image
from pixelllm import PerceptionGPT

name = "."  # this folder, or its name on the Hub
model = PerceptionGPT.from_pretrained(name)
image = Image.open("image.jpg").convert("RGB")
answer = model.ask([image], [[model.question("grounded")]])[0][0]
print(answer.text, [found.box for found in answer.objects])""",
}


def model_card(
    model: nn.Module, config: Config | PerceptionConfig, referenced: Sequence[str]
) -> str:
    """Markdown with the facts of a model of this configuration.

    Args:
        referenced: parts whose published weights are not in the folder.
    """
    count = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    language = config.model.language
    return TEMPLATE.format(
        name=config.name,
        about=ABOUT[type(config)],
        example=EXAMPLES[type(config)],
        steps=config.train.steps,
        batch=config.train.batch_size,
        frame=config.model.frame,
        parameters=count / 1e6,
        trained=trained / 1e6,
        trunk=language.trunk or f"{language.architecture}, from random weights",
        frozen=f"{', '.join(referenced)}: loaded from their source" if referenced else "included",
    )
