"""What PerceptionGPT is asked, by task: wordings of our own (reference, section 5.4).

`<image>` is where the image stands, "{}" the phrase's own context: the expression or the
question. The first wording of a task is the one that evaluation uses. Differences: fewer
wordings a task, and an answer to a question is the answer itself, without "The answer is".
"""

from __future__ import annotations

from pixelllm.marked_text import TEXT_END, TEXT_START, mark_objects

IMAGE = "<image>"
ANSWER = f"Answer:{mark_objects(1)}."  # to a referring expression
_PHRASE = f"{TEXT_START} {{}}{TEXT_END}"
_REGION = mark_objects(1)


def _after_image(*wordings: str) -> tuple[str, ...]:
    return tuple(f"{IMAGE} {wording}" for wording in wordings)


# Referring comprehension: a box is asked for.
LOCATE = _after_image(
    f"Where is{_PHRASE}?",
    f"Where in the image is{_PHRASE}?",
    f"Find{_PHRASE}.",
    f"Point out{_PHRASE} in this picture.",
    f"Which place does{_PHRASE} have in the photo?",
    f"Give the location of{_PHRASE}.",
    f"Show me where{_PHRASE} is.",
    f"I am looking for{_PHRASE}. Where is it?",
)
# Referring segmentation: the same answer, whose mask is meant.
SEGMENT = _after_image(
    f"Segment{_PHRASE}.",
    f"Give the segmentation mask of{_PHRASE}.",
    f"Mark the pixels of{_PHRASE} in this image.",
    f"Outline{_PHRASE} in the photo.",
    f"Please cut{_PHRASE} out of the picture.",
    f"What is the exact shape of{_PHRASE}?",
    f"Which pixels belong to{_PHRASE}?",
    f"Can you draw a mask over{_PHRASE}?",
)
# Region description: the object is given by its box or its mask.
DESCRIBE = _after_image(
    f"Describe{_REGION}.",
    f"What is{_REGION}?",
    f"What can be seen at{_REGION} in the image?",
    f"Write a short description of{_REGION}.",
    f"Tell me what{_REGION} shows.",
    f"Name what is in the region{_REGION} of this photo.",
    f"Give a phrase that describes{_REGION}.",
    f"Which object is{_REGION}?",
)
GROUND = _after_image(
    "Describe the image, and mark every object you mention.",
    "What is in this picture? Show where each thing is.",
    "Write a caption and locate the objects in it.",
    "Tell me what you see, with a box and a mask for everything you name.",
    "Give a description of the photo in which all objects are pointed out.",
    "Caption this image with the places of its objects.",
)
CAPTION = _after_image(
    "Describe the image in one sentence.",
    "Write a short caption for this picture.",
    "What does the photo show? Be brief.",
    "Give a brief description of the image.",
    "Sum up the picture in a few words.",
    "Say shortly what can be seen here.",
)
NARRATE = _after_image(
    "Describe the image in detail.",
    "Tell me at length what is in this picture.",
    "Go through the photo and name what you see.",
    "Give a long description of the image.",
)
SHORT_ANSWER = (
    *_after_image(
        "{} Answer in a word or two.",
        "{} Reply as briefly as you can.",
        "Look at the image and answer briefly: {}",
        "Question: {} Give a short answer.",
        "Using a single word or phrase, answer this: {}",
    ),
    f"{{}} Base your short answer on this image: {IMAGE}",
    f"Answer a question about {IMAGE} in few words. {{}}",
)
POINT = _after_image(
    "{} Answer, and mark every object you mention.",
    "{} Show where the things in your answer are.",
    "Answer with the places of what you speak of: {}",
    "{} Point at everything that your answer names.",
    "Question: {} Reply with boxes and masks.",
    "Tell me, and locate what you mention: {}",
)
CONVERSE = (f"{IMAGE} {{}}", f"{{}} {IMAGE}")
