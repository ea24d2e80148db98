"""What PerceptionGPT's cache saves: in an answer with objects, and between questions of an image.

    python -m benchmarks.answering --tokens 64 --objects 4

The trunk has the sizes of SmolLM2-135M and random weights, the prompt an image of 256 tokens.
Objects are forced at regular places, all other tokens are the most probable; the same answer is
written with a cache and by reading everything again for each token. Then several questions are
answered in a few tokens, about one image, which they share, and about as many images. Times are
those of the process, on one thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import tyro
from torch import Tensor
from transformers import LlamaConfig

from pixelllm.config import LanguageConfig
from pixelllm.markers import MarkerIds
from pixelllm.models.answering import Answers, write_answers
from pixelllm.models.build import SpecialIds
from pixelllm.models.build_perception import build_perception
from pixelllm.models.perceptiongpt import Objects, PerceptionGPTNetwork
from pixelllm.perception_config import ClipConfig, PerceptionModelConfig, VisConfig

VOCABULARY = 49152
SMOLLM2 = LlamaConfig(
    vocab_size=VOCABULARY,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    tie_word_embeddings=True,
    bos_token_id=0,
    eos_token_id=0,
)
MARKERS = MarkerIds(*range(VOCABULARY, VOCABULARY + 8))


@dataclass(frozen=True)
class Options:
    """What is written.

    Args:
        tokens: length of the answer.
        objects: in it.
        question: tokens of the prompt beside the image's.
        questions: about one image.
        short: length of their answers.
    """

    tokens: int = 64
    objects: int = 4
    question: int = 48
    questions: int = 10
    short: int = 8


def build() -> PerceptionGPTNetwork:
    torch.manual_seed(0)
    config = PerceptionModelConfig(
        clip=ClipConfig(width=64, depth=2, num_heads=4, ff_width=128, weights=None),
        vis=VisConfig(num_heads=4, ff_width=128),
        language=LanguageConfig(trunk=None, lora_rank=16),
    )
    parts = build_perception(config, MARKERS, SpecialIds(0, 0, 0), (), SMOLLM2)
    return PerceptionGPTNetwork(**parts).eval()


def forced_objects(options: Options) -> Callable[[Tensor], Tensor]:
    """The most probable token that is no end and no marker, and now and then an object."""
    written = 0

    def choose(logits: Tensor) -> Tensor:
        nonlocal written
        written += 1
        is_object = written % (options.tokens // options.objects) == 0
        words = logits[:, 1:VOCABULARY].argmax(-1) + 1
        return torch.full_like(words, MARKERS.vis) if is_object else words

    return choose


def write(
    network: PerceptionGPTNetwork, options: Options, questions: int, images: int, **given
) -> Answers:
    """Answers without an end to several questions, spread evenly over the images."""
    generator = torch.Generator().manual_seed(0)
    question = torch.randint(1, VOCABULARY, (questions, options.question), generator=generator)
    begin = question[:1, :1].expand(questions, 1)
    image = torch.full((questions, network.clip.num_tokens(224)), MARKERS.image)
    token_ids = torch.cat([begin, image, question[:, 1:]], dim=1)
    return write_answers(
        network,
        torch.zeros(images, 3, 224, 224),
        token_ids,
        torch.zeros_like(token_ids, dtype=torch.bool),
        Objects.of_boxes(torch.zeros(0, 4)),
        with_masks=False,
        **given,
    )


def compare(calls: dict[str, Callable[[], Answers]]) -> None:
    """Print what two calls take, the slower one last, and whether they answer alike."""
    answers, seconds = [], []
    for name, call in calls.items():
        start = time.process_time()
        answers.append(call())
        seconds.append(time.process_time() - start)
        print(f"{name}: {seconds[-1]:.1f} s", flush=True)
    same = torch.equal(answers[0].token_ids, answers[1].token_ids)
    apart = (answers[0].boxes - answers[1].boxes).abs().amax() if len(answers[0].boxes) else 0.0
    print(f"{seconds[1] / seconds[0]:.1f} times; same tokens: {same}; boxes apart: {apart:.1g}")


def main(options: Options) -> None:
    torch.set_num_threads(1)
    network = build()

    def one_answer(use_cache: bool) -> Answers:
        given = {"choose": forced_objects(options), "use_cache": use_cache}
        return write(network, options, 1, 1, max_new_tokens=options.tokens, **given)

    def short_answers(images: int) -> Answers:
        given = {"choose": forced_objects(options), "max_new_tokens": options.short}
        return write(network, options, options.questions, images, **given)

    compare(
        {"with a cache": lambda: one_answer(True), "without a cache": lambda: one_answer(False)}
    )
    compare(
        {
            f"{options.questions} questions of one image": lambda: short_answers(1),
            f"one question of {options.questions} images": lambda: short_answers(options.questions),
        }
    )


if __name__ == "__main__":
    main(tyro.cli(Options))
