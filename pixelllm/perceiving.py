"""`PerceptionGPT`: the network with its configuration and tokenizer, saved as one folder.

What is asked is worded as the recipe's training data words it first (`pixelllm.templates`).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

import torch
from PIL.Image import Image
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerFast

from pixelllm.asked_images import (
    EncodedMask,
    Rows,
    check_one_each,
    roomy_box,
    size_of,
    to_location,
    to_referent,
)
from pixelllm.box_text import spell
from pixelllm.chats import ChatBatch, collate_chats, encode_chat
from pixelllm.checkpoints import load_config, load_weights, own_tensors, save_config, save_weights
from pixelllm.conversations import Conversation, Referent
from pixelllm.files import write_text
from pixelllm.generation import Caption
from pixelllm.images import open_image
from pixelllm.loading import WithoutInitialValues, held_in
from pixelllm.locating import Location
from pixelllm.marked_text import VIS
from pixelllm.markers import marker_ids
from pixelllm.model_card import model_card
from pixelllm.models.answering import Choose, most_probable, write_answers
from pixelllm.models.build import SpecialIds
from pixelllm.models.build_perception import build_perception
from pixelllm.models.perceptiongpt import PerceptionGPTNetwork
from pixelllm.perception_config import PerceptionConfig, named_parts
from pixelllm.pretrained import TRUNK_FOLDER
from pixelllm.quantize import quantize_trunk, quantize_when_loaded, require_unquantized
from pixelllm.records import Box
from pixelllm.squares import square_image
from pixelllm.templates import (
    ANSWER,
    CAPTION,
    CONVERSE,
    DESCRIBE,
    GROUND,
    LOCATE,
    POINT,
    SHORT_ANSWER,
)
from pixelllm.written import Answer, answer_last, ask_next, read_answer

WORDINGS = {
    "referring": LOCATE[0],
    "region": DESCRIBE[0],
    "grounded": GROUND[0],
    "caption": CAPTION[0],
    "question": SHORT_ANSWER[0],
    "conversation": CONVERSE[0],
    "pointed": POINT[0],
}
NOWHERE: Box = (0.0, 0.0, 1.0, 1.0)  # of an object that the model is to find


class PerceptionGPT(PerceptionGPTNetwork):
    """A vision-language model whose `<vis>` carries a box and a mask, read and written.

    Args:
        config: sizes and recipe.
        tokenizer: of the trunk, with the markers (else ValueError).
        published: of `PUBLISHED`, the parts that start from the weights that the config names.
        trunk: structure of a trunk with random weights; None takes the sizes of the config.
    """

    def __init__(
        self,
        config: PerceptionConfig,
        tokenizer: PreTrainedTokenizerFast,
        published: Collection[str] = (),
        trunk: PretrainedConfig | None = None,
    ) -> None:
        ids = marker_ids(tokenizer), SpecialIds.of(tokenizer)
        super().__init__(**build_perception(config.model, *ids, published, trunk))
        self.config = config
        self.tokenizer = tokenizer

    @classmethod
    def from_pretrained(
        cls, name_or_path: Path | str, dtype: torch.dtype | None = None, int8: bool = False
    ) -> PerceptionGPT:
        """A saved model in evaluation mode, from a run's folder or a Hub id.

        Args:
            dtype: bfloat16 holds the trunk in it, but for its embeddings; None as the run says.
            int8: hold the trunk's linear layers in 8 bits (`pixelllm.quantize`).

        Raises FileNotFoundError where there is none and ValueError listing keys that do not fit.
        """
        config = load_config(PerceptionConfig, name_or_path)
        if dtype is not None:
            config = held_in(config, dtype)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(name_or_path)
        published, trunk = named_parts(config), None
        if config.model.language.trunk is not None and "language" not in published:
            trunk = AutoConfig.from_pretrained(name_or_path, subfolder=TRUNK_FOLDER)
        with WithoutInitialValues():
            model = cls(config, tokenizer, published, trunk)
        elsewhere = model.named_elsewhere()  # before its trunk is another
        place = []
        if int8 and "language" in published:
            quantize_trunk(model.language)
        elif int8:
            place = [quantize_when_loaded(model.language, "language.")]
        load_weights(model, name_or_path, elsewhere.__contains__, *place)
        return model.eval()

    def save_pretrained(self, folder: Path | str) -> None:
        """Write config, weights, tokenizer and model card into a folder.

        Raises ValueError for a model held in 8 bits, which no training could go on from.
        """
        require_unquantized(self.language)
        folder = Path(folder)
        save_config(self.config, folder)
        self.tokenizer.save_pretrained(folder)
        if self.config.model.language.trunk is not None:
            self.language.model.config.save_pretrained(folder / TRUNK_FOLDER)
        save_weights(self, folder, self.named_elsewhere().__contains__)
        card = model_card(self, self.config, named_parts(self.config))
        write_text(folder / "README.md", card)

    def named_elsewhere(self) -> set[str]:
        """Tensors whose source a saved model names instead of carrying them.

        Of published parts what does not learn: CLIP where it is frozen, and the trunk but for its
        LoRA factors and embeddings.
        """
        parts = named_parts(self.config)
        trunk = self.language.model
        ends = (trunk.get_input_embeddings(), trunk.get_output_embeddings())
        learned = {id(parameter) for end in ends for parameter in end.parameters()}
        named = {
            "language": lambda name, t: "lora_" not in name and id(t) not in learned,
            "clip": lambda name, t: name.startswith("clip.vit."),
        }
        tensors = own_tensors(self).items()
        return {n for n, t in tensors if (p := n.split(".")[0]) in parts and named[p](n, t)}

    def question(self, task: str, context: str = "") -> str:
        """How the recipe words the task; `context` is the expression or the question.

        Raises ValueError for a task that has no wording, or an empty context where one is due.
        """
        if task not in WORDINGS:
            raise ValueError(f"there is no task {task!r}; there are: {', '.join(WORDINGS)}")
        own = (source.contexts[0] for source in self.config.sources if source.task == task)
        wording = next(own, WORDINGS[task])
        if "{}" in wording and not context.strip():
            what = "expression" if task == "referring" else "question"
            raise ValueError(f"empty {what}; say what to look for, or what to answer")
        return wording.replace("{}", context)

    @torch.no_grad()
    def locate(
        self,
        images: Sequence[Path | str | Image],
        texts: Sequence[Sequence[str]],
        with_masks: bool = False,
        with_captions: bool = False,
    ) -> list[list[Location]]:
        """Where expressions point, in one pass: the answer's words are given.

        As the release evaluates (reference, section 2.4). The score is the probability per word
        that the model answers so.

        Args:
            images: files or images; texts: the expressions of each.
            with_masks: also segment what they point at.
            with_captions: also say what is seen there, if the model was taught to describe boxes.

        Raises ValueError: an expression is empty, or an image has none.
        """
        check_one_each(images, texts, "expressions")
        images = [open_image(image) for image in images]
        in_words = self.config.model.vis.form != "vis"
        find = self._locate_in_words if in_words else self._locate_in_states
        reads_masks = with_captions and self.config.model.vis.read == "mask"
        located = find(images, texts, with_masks or reads_masks)
        if with_captions and "region" in {source.task for source in self.config.sources}:
            boxes = [[roomy_box(found.box) for found in of_image] for of_image in located]
            masks = [[found.mask for found in of_image] for of_image in located]
            seen = self.describe_boxes(
                images, boxes, masks=masks if with_masks or reads_masks else None
            )
            for of_image, captions in zip(located, seen, strict=True):
                pairs = zip(of_image, captions, strict=True)
                of_image[:] = [replace(found, caption=c.text) for found, c in pairs]
        if reads_masks and not with_masks:
            return [[replace(found, mask=None) for found in of_image] for of_image in located]
        return located

    def _locate_in_states(
        self, images: Sequence[Image], texts: Sequence[Sequence[str]], with_masks: bool
    ) -> list[list[Location]]:
        """As `locate`, by a model that decodes boxes of its states."""
        found = Referent(NOWHERE)
        asked = [
            [
                Conversation(text, size_of(image), ((self.question("referring", text), ANSWER),),
                             (found,))
                for text in of_image
            ]
            for image, of_image in zip(images, texts, strict=True)
        ]  # fmt: skip
        pixels, chats, kept = self.prepare(images, asked)
        tokens, objects = chats.tokens, chats.objects
        if with_masks:
            every = torch.ones_like(objects.has_mask)
            nothing = objects.boxes.new_zeros(len(every), 1, 1)
            objects = objects._replace(has_mask=every, masks=nothing)
        prediction = self(pixels, tokens, objects)
        logits = prediction.logits.log_softmax(-1)
        log_probs = logits.gather(-1, tokens.token_ids[tokens.is_answer][:, None])[:, 0]
        per_row = log_probs.split(tokens.is_answer.sum(1).tolist())
        scores = [float(row.mean().exp()) for row in per_row]
        masks = prediction.masks if with_masks else [None] * len(scores)
        rows = iter(list(zip(prediction.boxes, scores, masks, strict=True)))
        located = [
            [to_location(*next(rows), size_of(image)) for _ in range(kept.width)]
            for image in images
        ]
        return kept.of(located)

    def _locate_in_words(
        self, images: Sequence[Image], texts: Sequence[Sequence[str]], with_masks: bool
    ) -> list[list[Location]]:
        """As `locate`, by a model that writes its boxes: the first one of each answer."""
        if with_masks:
            form = self.config.model.vis.form
            raise ValueError(f"a model that writes boxes as {form} has no masks")
        asked = [[self.question("referring", text) for text in of_image] for of_image in texts]
        nothing = (Location(NOWHERE, 0.0),)
        return [
            [(*answer.objects, *nothing)[0] for answer in of_image]
            for of_image in self.ask(images, asked, with_masks=False)
        ]

    @torch.no_grad()
    def describe_boxes(
        self,
        images: Sequence[Path | str | Image],
        boxes: Sequence[Sequence[Box]],
        num_beams: int = 1,
        masks: Sequence[Sequence[EncodedMask | None]] | None = None,
    ) -> list[list[Caption]]:
        """What is in each box; the captions' words have no points.

        Args:
            images: files or images.
            boxes: of each, xyxy in [0, 1] of it.
            masks: of the boxes, COCO run-length encodings at the sizes of their images. A model
                of `VisInput` "mask" or "random" reads these in place of the boxes; one of "mask"
                needs them.

        Raises:
            ValueError: boxes that are none, boxes and masks that do not belong together, or no
                masks for a model that reads them.
        """
        check_one_each(images, boxes, "boxes")
        images = [open_image(image) for image in images]
        masks = masks or [[None] * len(of_image) for of_image in boxes]
        if self.config.model.vis.read == "mask" and None in chain(*masks):
            raise ValueError("this model reads masks: every box needs one (vis.read is 'mask')")
        question = self.question("region")
        n = question.count(VIS)
        asked = []
        for image, *of_image in zip(images, boxes, masks, strict=True):
            size = size_of(image)
            objects = [to_referent(*item, size) for item in zip(*of_image, strict=True)]
            asked.append([Conversation(f"box {found.box}", size, ((question, ""),), (found,) * n)
                          for found in objects])  # fmt: skip
        answers = self._write(images, asked, num_beams, with_masks=False)
        return [[Caption(a.text, (), a.log_prob) for a in of_image] for of_image in answers]

    @torch.no_grad()
    def caption_images(
        self,
        images: Sequence[Path | str | Image],
        num_beams: int = 1,
        choose: Choose = most_probable,
    ) -> list[Caption]:
        """A short caption of every image or file, whose words have no points.

        A model that was not taught captions, but grounded ones, writes these, without their marks.
        """
        taught = {source.task for source in self.config.sources}
        task = "grounded" if "grounded" in taught and "caption" not in taught else "caption"
        asked = [[self.question(task)]] * len(images)
        answers = self.ask(images, asked, num_beams, with_masks=False, choose=choose)
        return [Caption(answer.text, (), answer.log_prob) for (answer,) in answers]

    @torch.no_grad()
    def ask(
        self,
        images: Sequence[Path | str | Image],
        questions: Sequence[Sequence[str]],
        num_beams: int = 1,
        with_masks: bool = True,
        choose: Choose = most_probable,
        in_turn: bool = False,
    ) -> list[list[Answer]]:
        """Answers to questions as `question` words them.

        Args:
            images: files or images; questions: those about each.
            num_beams: above 1, beam search.
            with_masks: also segment what the answers mention.
            choose: the next words; `pixelllm.models.answering.sampler` draws them.
            in_turn: the questions about an image are one conversation, where each is read after
                the ones before it and their answers; otherwise each is asked on its own.

        Raises ValueError: an image without a question, or one that is not worded.
        """
        check_one_each(images, questions, "questions")
        images = [open_image(image) for image in images]
        talks = [Conversation("", size_of(image), (), ()) for image in images]
        if not in_turn:
            asked = [
                [ask_next(talk, text) for text in of_image]
                for talk, of_image in zip(talks, questions, strict=True)
            ]
            return self._write(images, asked, num_beams, with_masks, choose)
        answers: list[list[Answer]] = [[] for _ in images]
        for turn in range(max(map(len, questions))):
            left = [i for i, of_image in enumerate(questions) if turn < len(of_image)]
            asked = [[ask_next(talks[i], questions[i][turn])] for i in left]
            some = [images[i] for i in left]
            found = self._write(some, asked, num_beams, with_masks, choose)
            for i, (talk,), (answer,) in zip(left, asked, found, strict=True):
                talks[i] = answer_last(talk, answer)
                answers[i].append(answer)
        return answers

    def _write(
        self,
        images: Sequence[Image],
        asked: Sequence[Sequence[Conversation]],
        num_beams: int,
        with_masks: bool,
        choose: Choose = most_probable,
    ) -> list[list[Answer]]:
        pixels, chats, kept = self.prepare(images, asked, pad_left=True)
        answers = write_answers(
            self,
            pixels,
            chats.tokens.token_ids,
            chats.tokens.padding,
            chats.objects,
            max_new_tokens=self.config.max_new_tokens,
            choose=choose,
            num_beams=num_beams,
            feed_masks=self.config.model.vis.read == "mask",
            with_masks=with_masks,
        )
        sizes = [size_of(image) for image in images for _ in range(kept.width)]
        facts = (self.tokenizer, self.config.model.vis.form)
        rows = iter([read_answer(answers, row, size, *facts) for row, size in enumerate(sizes)])
        return kept.of([[next(rows) for _ in range(kept.width)] for _ in images])

    def prepare(
        self,
        images: Sequence[Image],
        asked: Sequence[Sequence[Conversation]],
        pad_left: bool = False,
    ) -> tuple[Tensor, ChatBatch, Rows]:
        """Pixels uint8[B, 3, S, S] and chats with equally many rows an image, on the device.

        Raises ValueError for an image without a conversation.
        """
        if not all(asked):
            raise ValueError("every image needs a question or a box")
        frame, width = self.config.model.frame, max(map(len, asked))
        filled = [c for of_image in asked for c in (*of_image, *of_image[-1:] * width)[:width]]
        num_patches, limit = self.clip.num_tokens(frame), self.config.max_tokens
        spoken = [spell(c, self.config.model.vis.form) for c in filled]
        chats = [encode_chat(c, self.tokenizer, num_patches, limit) for c in spoken]
        side = self.config.model.vis.mask_size
        batch = collate_chats(chats, self.tokenizer, mask_side=side, pad_left=pad_left)
        if self.config.model.vis.read != "box":
            batch = batch._replace(objects=batch.objects._replace(by_mask=batch.objects.has_mask))
        device = next(self.parameters()).device
        pixels = torch.stack([square_image(image, frame) for image in images])
        return pixels.to(device), batch.to(device), Rows(width, [len(found) for found in asked])
