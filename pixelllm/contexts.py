"""The texts a model is given before it writes: those of the official release (section 7.4)."""

from __future__ import annotations

from pixelllm.config import Config

# With the release's spelling.
NARRATION_CONTEXTS = (
    "A long image caption: ",
    "A long image description: ",
    "Write a long description for the image. ",
    "Write a long description for the photo. ",
    "Provide a long description of what is presented in the photo. ",
    "Describe the content of the image in detail. ",
    "Can you in detail explain what you see in the image? ",
    "Could you use a few sentences to describe what you perceive in the photo? ",
    "Please provide a long depiction of the picture. ",
    "Using language, provide a long account of the image. ",
    "Use a few senetences to illustrate what is happening in the picture. ",
)
CAPTION_CONTEXTS = (
    "A short image caption: ",
    "A short image description: ",
    "A photo of ",
    "An image that shows ",
    "Write a short description for the image. ",
    "Write a description for the photo. ",
    "Provide a description of what is presented in the photo. ",
    "Briefly describe the content of the image. ",
    "Can you briefly explain what you see in the image? ",
    "Could you use a few words to describe what you perceive in the photo? ",
    "Please provide a short depiction of the picture. ",
    "Using language, provide a short account of the image. ",
    "Use a few words to illustrate what is happening in the picture. ",
)
REGION_CONTEXT = "an object of "
REFERRING_CONTEXT = "where is {}"  # "{}" is the phrase's own context
QUESTION_CONTEXT = "Question: {}Answer: "


def default_contexts(config: Config) -> tuple[str, str]:
    """Contexts for the whole image and for a box, where a user gives none."""
    whole = [source.contexts[0] for source in config.sources if source.task == "narration"]
    regions = [source.contexts[0] for source in config.sources if source.task == "region"]
    return (whole or [""])[0], (regions or [REGION_CONTEXT])[0]
