"""What the cache saves where PerceptionGPT writes an answer with objects.

    python -m benchmarks.answering --tokens 64 --objects 4

The trunk has the sizes of SmolLM2-135M and random weights, the prompt an image of 256 tokens.
Objects are forced at regular places, all other tokens are the most probable; the same answer is
written with a cache and by reading everything again for each token. Times are those of the
process, on one thread.
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
    """

    tokens: int = 64
    objects: int = 4
    question: int = 48


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
        return torch.tensor([MARKERS.vis]) if is_object else logits[:, 1:VOCABULARY].argmax(-1) + 1

    return choose


def write(network: PerceptionGPTNetwork, options: Options, use_cache: bool) -> Answers:
    generator = torch.Generator().manual_seed(0)
    question = torch.randint(1, VOCABULARY, (1, options.question), generator=generator)
    image = torch.full((1, network.clip.num_tokens(224)), MARKERS.image)
    token_ids = torch.cat([question[:, :1], image, question[:, 1:]], dim=1)
    return write_answers(
        network,
        torch.zeros(1, 3, 224, 224),
        token_ids,
        torch.zeros_like(token_ids, dtype=torch.bool),
        Objects.of_boxes(torch.zeros(0, 4)),
        max_new_tokens=options.tokens,
        choose=forced_objects(options),
        use_cache=use_cache,
        with_masks=False,
    )


def main(options: Options) -> None:
    torch.set_num_threads(1)
    network = build()
    answers, seconds = [], []
    for use_cache in (True, False):
        start = time.process_time()
        answers.append(write(network, options, use_cache))
        seconds.append(time.process_time() - start)
        print(f"{'with' if use_cache else 'without'} a cache: {seconds[-1]:.1f} s", flush=True)
    same = torch.equal(answers[0].token_ids, answers[1].token_ids)
    apart = (answers[0].boxes - answers[1].boxes).abs().max().item()
    print(f"{seconds[1] / seconds[0]:.1f} times; same tokens: {same}; boxes apart: {apart:.1g}")


if __name__ == "__main__":
    main(tyro.cli(Options))
