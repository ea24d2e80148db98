"""`PixelLLM`: the network with its configuration and tokenizer, loaded and saved as one folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from pixelllm.checkpoints import load_config, load_weights, save_config, save_weights
from pixelllm.config import Config
from pixelllm.generation import Caption, place_words, stream_words
from pixelllm.model_card import model_card
from pixelllm.models.build import build_language, build_parts
from pixelllm.models.pixelllm import PixelLLMNetwork
from pixelllm.processor import Processor, ProcessorConfig
from pixelllm.recipes import default_contexts


class PixelLLM(PixelLLMNetwork):
    """A vision-language model that points at every word it writes.

    Args:
        config: sizes and recipe.
        tokenizer: of the trunk; only generation and saving use it.
        pretrained: start the trunk from its published weights instead of random ones.
    """

    def __init__(
        self, config: Config, tokenizer: PreTrainedTokenizerFast, pretrained: bool = False
    ) -> None:
        language = build_language(config.model.language, pretrained)
        super().__init__(**build_parts(config.model, language))
        self.config = config
        self.tokenizer = tokenizer

    @classmethod
    def from_pretrained(cls, name_or_path: Path | str) -> PixelLLM:
        """A saved model in evaluation mode, from a run's folder or a Hub id.

        Raises FileNotFoundError where there is none and ValueError listing keys that do not fit.
        """
        config = load_config(Config, name_or_path)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(name_or_path)
        referenced = referenced_parts(config)
        model = cls(config, tokenizer, pretrained="language" in referenced)
        load_weights(model, name_or_path, referenced)
        return model.eval()

    def save_pretrained(self, folder: Path | str) -> None:
        """Write config, weights, tokenizer, processor and model card into a folder."""
        folder = Path(folder)
        save_config(self.config, folder)
        self.processor().save_pretrained(folder)
        save_weights(self, folder, referenced_parts(self.config))
        (folder / "README.md").write_text(model_card(self))

    def processor(self) -> Processor:
        """The processor that belongs to this model."""
        context, region_context = default_contexts(self.config)
        return Processor(
            self.tokenizer,
            ProcessorConfig(
                self.config.model.frame, self.config.max_context, context, region_context
            ),
        )

    @torch.no_grad()
    def generate(
        self,
        images: Tensor,
        sizes: Tensor,
        boxes: Tensor,
        context_ids: Tensor,
        context_padding: Tensor,
        *,
        max_new_tokens: int | None = None,
        official_rules: bool = False,
        **search: int | float | bool,
    ) -> list[Caption]:
        """Caption every prompt; the image is encoded once, points come from one parallel pass.

        Args:
            images, sizes, boxes, context_ids, context_padding: from `Processor`.
            max_new_tokens: end token included; None is the recipe's length.
            official_rules: decode as the release does (greedy without immediate repetition, or
                its beam search) instead of through `transformers`.
            search: `num_beams`, `do_sample`, `temperature`, `top_p`, `length_penalty`.

        Returns:
            One caption per row, prompts of an image adjacent.
        """
        prefix = self.prefix(self.encode(images, sizes, {}), sizes, boxes)
        return self.captions_from_prefix(
            prefix.flatten(0, 1),
            context_ids,
            context_padding,
            max_new_tokens=max_new_tokens,
            official_rules=official_rules,
            **search,
        )

    @torch.no_grad()
    def captions_from_prefix(
        self,
        prefix: Tensor,
        context_ids: Tensor,
        context_padding: Tensor,
        *,
        max_new_tokens: int | None = None,
        official_rules: bool = False,
        **search: int | float | bool,
    ) -> list[Caption]:
        """`generate` from visual tokens float[R, N, D], where a caller has them already."""
        decode = self.language.generate_official if official_rules else self.language.generate
        found = decode(
            prefix,
            context_ids,
            context_padding,
            max_new_tokens=max_new_tokens or self.config.max_tokens - 1,
            **search,
        )
        points = self.point_head(found.hidden)
        rows = zip(found.token_ids.cpu(), found.log_probs.cpu(), points.cpu(), strict=True)
        return [place_words(self.tokenizer, *row) for row in rows]

    @torch.no_grad()
    def stream(
        self,
        images: Tensor,
        sizes: Tensor,
        boxes: Tensor,
        context_ids: Tensor,
        context_padding: Tensor,
        *,
        max_new_tokens: int | None = None,
    ) -> Iterator[tuple[str, tuple[float, float], float]]:
        """Write one caption greedily, word by word.

        Yields:
            (word, (x, y) in [0, 1] of the image, log-probability) as each word is finished.

        Raises:
            ValueError: more than one row is given.
        """
        if boxes.shape[:2] != (1, 1):
            raise ValueError(f"stream takes one image with one box, not {tuple(boxes.shape[:2])}")
        prefix = self.prefix(self.encode(images, sizes, {}), sizes, boxes)[0]
        tokens = self.language.stream(
            prefix, context_ids, context_padding, max_new_tokens or self.config.max_tokens - 1
        )
        yield from stream_words(
            self.tokenizer,
            ((token, self.point_head(hidden)[0].cpu(), score) for token, hidden, score in tokens),
        )


def referenced_parts(config: Config) -> tuple[str, ...]:
    """Frozen pretrained parts that a saved model names instead of carrying."""
    if config.include_frozen or config.model.language.trunk is None:
        return ()
    return ("language.model",) if config.model.language.lora_rank else ()
