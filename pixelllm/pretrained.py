"""`PixelLLM`: the network with its configuration and tokenizer, loaded and saved as one folder."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerFast

from pixelllm.batches import encode_context
from pixelllm.boxes import to_relative
from pixelllm.checkpoints import (
    load_config,
    load_weights,
    save_config,
    save_weights,
    write_text,
)
from pixelllm.config import Config
from pixelllm.contexts import default_contexts
from pixelllm.detection import ScoredBoxes
from pixelllm.generation import (
    Caption,
    CaptionedBox,
    check_search,
    join_chunks,
    place_words,
    rank,
    stream_words,
)
from pixelllm.loading import WithoutInitialValues, held_in, is_referenced
from pixelllm.locating import (
    Location,
    locate_boxes,
    original_mask,
    snap_boxes,
    word_probability,
)
from pixelllm.model_card import model_card
from pixelllm.models.build import (
    SpecialIds,
    build_detector,
    build_language,
    build_mask_head,
    build_parts,
)
from pixelllm.models.git import GitDecoder
from pixelllm.models.pixelllm import ImageFeatures, PixelLLMNetwork, Text
from pixelllm.processor import Processor, ProcessorConfig
from pixelllm.quantize import quantize_trunk, quantize_when_loaded, require_unquantized
from pixelllm.weights import load_sam_checkpoint

PUBLISHED = ("language", "sam", "eva02")  # parts whose weights a config can name
TRUNK_FOLDER = "trunk"  # structure of a published trunk, for saved models that carry its weights


class PixelLLM(PixelLLMNetwork):
    """A vision-language model that points at every word it writes.

    Args:
        config: sizes and recipe.
        tokenizer: of the trunk; only generation and saving use it.
        published: of `PUBLISHED`, the parts that start from the weights that the config names.
        trunk: structure of a trunk with random weights; None takes the sizes of the config.
        int8: hold a published trunk in 8 bits.
    """

    def __init__(
        self,
        config: Config,
        tokenizer: PreTrainedTokenizerFast,
        published: Collection[str] = (),
        trunk: PretrainedConfig | None = None,
        int8: bool = False,
    ) -> None:
        language = build_language(
            config.model.language,
            config.model.prompt.output_width,
            SpecialIds.of(tokenizer),
            "language" in published,
            trunk,
        )
        if int8 and "language" in published:  # before the encoders take their memory
            quantize_trunk(language)
        super().__init__(**build_parts(config.model, language, published))
        self.config = config
        self.tokenizer = tokenizer

    def grow(self, config: Config, tokenizer: PreTrainedTokenizerFast) -> None:
        """Go on as another recipe, whose model may have a mask head and a detector besides.

        New parts start from random weights, but for SAM's mask decoder where SAM is published.
        """
        device = next(self.parameters()).device
        if self.mask_head is None:
            self.mask_head = build_mask_head(config.model, self.language)
            if self.mask_head is not None and config.model.sam.weights is not None:
                parts = (self.sam.encoder, self.prompt_encoder, self.mask_head.decoder)
                load_sam_checkpoint(config.model.sam.weights, *parts)
        if self.detector is None:
            self.detector = build_detector(config.model)
        self.config, self.tokenizer = config, tokenizer
        self.to(device)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: Path | str,
        dtype: torch.dtype | None = None,
        int8: bool = False,
        adapt: Callable[[Config], Config] = lambda config: config,
    ) -> PixelLLM:
        """A saved model in evaluation mode, from a run's folder or a Hub id.

        Args:
            dtype: bfloat16 holds the image encoders and a trunk of `transformers` in it, None as
                the run says; the rest, where coordinates are computed, is float32 either way.
            int8: hold the trunk's linear layers in 8 bits (`pixelllm.quantize`).
            adapt: change what the run says and no size depends on, such as dropout.

        Raises FileNotFoundError where there is none and ValueError listing keys that do not fit.
        """
        config = adapt(load_config(Config, name_or_path))
        if dtype is not None:
            config = held_in(config, dtype)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(name_or_path)
        published = [part for part in PUBLISHED if is_referenced(part, config)]
        trunk = None
        if config.model.language.trunk is not None and "language" not in published:
            trunk = AutoConfig.from_pretrained(name_or_path, subfolder=TRUNK_FOLDER)
        with WithoutInitialValues():
            model = cls(config, tokenizer, published, trunk, int8)
        place = [quantize_when_loaded(model.language, "language.")] if int8 else []
        load_weights(model, name_or_path, lambda name: is_referenced(name, config), *place)
        return model.eval()

    def save_pretrained(self, folder: Path | str) -> None:
        """Write config, weights, tokenizer, processor and model card into a folder.

        Raises ValueError for a model held in 8 bits, which no training could go on from.
        """
        require_unquantized(self.language)
        folder = Path(folder)
        save_config(self.config, folder)
        self.processor().save_pretrained(folder)
        if self.config.model.language.trunk is not None:
            self.language.model.config.save_pretrained(folder / TRUNK_FOLDER)
        save_weights(self, folder, lambda name: is_referenced(name, self.config))
        referenced = [part for part in PUBLISHED if is_referenced(part, self.config)]
        write_text(folder / "README.md", model_card(self, self.config, referenced))

    def processor(self) -> Processor:
        """The processor that belongs to this model."""
        context, region_context = default_contexts(self.config)
        return Processor(
            self.tokenizer,
            ProcessorConfig(
                frame=self.config.model.frame,
                max_context=self.config.max_context,
                max_tokens=self.config.max_tokens,
                begin_id=self.language.bos_id,
                context=context,
                region_context=region_context,
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
        **search: int | float | bool,
    ) -> list[Caption]:
        """Caption every prompt; the image is encoded once, points come from one parallel pass.

        Args:
            images, sizes, boxes, context_ids, context_padding: from `Processor`.
            max_new_tokens: end token included; None is the recipe's length.
            official_rules: decode as the release does (greedy without immediate repetition, or
                its beam search) instead of through `transformers`.
            max_rows: prompts at a time, which bounds the memory.
            search: `num_beams`, `do_sample`, `temperature`, `top_p`, `length_penalty`.

        Returns:
            One caption per row, prompts of an image adjacent.

        Raises:
            ValueError: `num_beams` or `max_new_tokens` is below one.
        """
        features = self.encode(images, sizes, {})
        contexts = (context_ids, context_padding)
        return self.caption_boxes(features, sizes, boxes, *contexts, **search)

    @torch.no_grad()
    def caption_boxes(
        self,
        features: ImageFeatures,
        sizes: Tensor,
        boxes: Tensor,
        context_ids: Tensor,
        context_padding: Tensor,
        *,
        max_rows: int = 128,
        **search: int | float | bool,
    ) -> list[Caption]:
        """`generate` from the features of the images."""
        B, K = boxes.shape[:2]
        ids, padding = (c.unflatten(0, (B, K)) for c in (context_ids, context_padding))
        step = max(1, max_rows // B)
        chunks = []
        for start in range(0, K, step):
            part = slice(start, start + step)
            prefix = self.prefix(features, sizes, boxes[:, part]).flatten(0, 1)
            rows = (ids[:, part].flatten(0, 1), padding[:, part].flatten(0, 1))
            chunks.append(self.captions_from_prefix(prefix, *rows, **search))
        return join_chunks(chunks, B)

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
        length = self.config.max_tokens - 1 if max_new_tokens is None else max_new_tokens
        has_rules = official_rules or isinstance(self.language, GitDecoder)
        check_search(length, has_rules, **search)
        decode = self.language.generate_official if official_rules else self.language.generate
        found = decode(prefix, context_ids, context_padding, max_new_tokens=length, **search)
        points = self.point_head(found.hidden)
        rows = zip(found.token_ids.cpu(), found.log_probs.cpu(), points.cpu(), strict=True)
        return [place_words(self.tokenizer, *row) for row in rows]

    @torch.no_grad()
    def locate(
        self,
        images: Tensor,
        sizes: Tensor,
        image_sizes: Tensor,
        boxes: Tensor,
        context_ids: Tensor,
        context_padding: Tensor,
        token_ids: Tensor,
        token_padding: Tensor,
        is_place: Tensor,
        with_masks: bool = False,
        snap: bool = False,
        with_captions: bool = False,
        max_rows: int = 128,
    ) -> list[Location]:
        """Where expressions point.

        Args:
            with_masks: also segment what they point at.
            with_captions: also say what is seen there, which tells where nothing fits.
            snap: take the detected box that fits best instead of the words' own (`snap_boxes`).
            max_rows: expressions at a time, which bounds the memory.
            The others come from `Processor.locating`.

        Returns:
            One location per row, K rows an image, also for rows that fill up fewer expressions.

        Raises:
            ValueError: masks of a model that has no mask head, or snapping without a detector.
        """
        if with_masks and self.mask_head is None:
            raise ValueError("this model has no mask head; train one of the refseg recipes on it")
        features = self.encode(images, sizes, {})
        detected = self._detect(features, sizes) if snap else None
        text = Text(context_ids, context_padding, token_ids, token_padding)
        B = len(sizes)
        chunks = torch.arange(len(is_place)).view(B, -1).split(max(1, max_rows // B), dim=1)
        located = []
        for rows in (chunk.flatten() for chunk in chunks):
            part = (Text(*(tensor[rows] for tensor in text)), is_place[rows])
            wanted = (with_masks, with_captions, detected)
            located.append(self._locate(features, sizes, image_sizes, boxes, *part, *wanted))
        return join_chunks(located, B)

    def _locate(
        self,
        features: ImageFeatures,
        sizes: Tensor,
        image_sizes: Tensor,
        boxes: Tensor,
        text: Text,
        is_place: Tensor,
        with_masks: bool,
        with_captions: bool,
        detected: ScoredBoxes | None,
    ) -> list[Location]:
        """`locate` of so few expressions that they go at once."""
        found = locate_boxes(self, features, sizes, boxes, text, is_place)
        if detected is not None:
            found = found._replace(boxes=snap_boxes(found.boxes, *detected))
        context = self.region_context(len(is_place))
        captions = Text(*context, text.token_ids, text.token_padding)
        fit = word_probability(self.read(features, sizes, found.boxes, captions).logits, text)
        masks: list[dict | None] = [None] * len(fit)
        if with_masks:
            logits, _ = self.segment(features, sizes, *found, text.token_padding)
            frame, K = self.config.model.frame, logits.shape[1]
            masks = [
                original_mask(row, sizes[n // K], frame, tuple(image_sizes[n // K].tolist()))
                for n, row in enumerate(logits.flatten(0, 1))
            ]
        texts: list[str | None] = [None] * len(fit)
        if with_captions:
            seen = self.caption_boxes(features, sizes, found.boxes, *context)
            texts = [caption.text for caption in seen]
        rows = zip(found.boxes.flatten(0, 1).tolist(), fit.tolist(), masks, texts, strict=True)
        return [Location(tuple(box), *rest) for box, *rest in rows]

    @torch.no_grad()
    def describe(
        self,
        images: Tensor,
        sizes: Tensor,
        *,
        max_detections: int = 100,
        **search: int | float | bool,
    ) -> list[list[CaptionedBox]]:
        """Find objects and caption each (dense object captioning).

        Args:
            images, sizes: from `Processor`.
            search: as in `generate`.

        Returns:
            Per image its objects, the likeliest first.

        Raises:
            ValueError: a model without a detector.
        """
        features = self.encode(images, sizes, {})
        boxes, scores = self._detect(features, sizes, max_detections)
        found = []
        for image, detected in enumerate(scores > 0):
            own = ImageFeatures(*(maps[image, None] for maps in features))
            rows = boxes[image, detected][None]  # (1, M, 4)
            context = self.region_context(rows.shape[1])
            captions = self.caption_boxes(own, sizes[image, None], rows, *context, **search)
            found.append(rank(rows[0], scores[image, detected], captions))
        return found

    def _detect(
        self, features: ImageFeatures, sizes: Tensor, max_detections: int = 100
    ) -> ScoredBoxes:
        """Detections in [0, 1] of the images, of the size and order of `Detector.detect`."""
        if self.detector is None:
            raise ValueError("this model has no detector; train one of the densecap recipes on it")
        boxes_px, scores = self.detector.detect(features.fused, sizes, max_detections)
        return ScoredBoxes(to_relative(boxes_px, sizes).clamp(0, 1), scores)

    def region_context(self, num_rows: int) -> list[Tensor]:
        """Ids and padding of the context that asks for the caption of a box, for every row."""
        context = default_contexts(self.config)[1]
        encoded = encode_context([context], self.tokenizer, self.config.max_context)
        device = next(self.parameters()).device
        return [part.to(device).expand(num_rows, -1) for part in encoded]

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
        length = self.config.max_tokens - 1 if max_new_tokens is None else max_new_tokens
        check_search(length)
        prefix = self.prefix(self.encode(images, sizes, {}), sizes, boxes)[0]
        tokens = self.language.stream(prefix, context_ids, context_padding, length)
        yield from stream_words(
            self.tokenizer,
            ((token, self.point_head(hidden)[0].cpu(), score) for token, hidden, score in tokens),
        )
