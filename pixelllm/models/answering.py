"""Answers of PerceptionGPT: greedy, sampled or by beams, with boxes fed back (reference, 2.3).

Where `<vis>` is written, the state that wrote it is decoded to a box; read back, `<vis>` is the
embedding of that box. Difference: a cache of keys and values, where the release reads everything
again for each word, and decodes objects in greedy search alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from pixelllm.decoding import beam_search
from pixelllm.models.perceptiongpt import Objects, PerceptionGPTNetwork, Views
from pixelllm.models.vis_masks import resize_logits

Choose = Callable[[Tensor], Tensor]  # logits float32[R, V] -> token ids int64[R]


class Answers(NamedTuple):
    """R finished answers and the n objects in them, in reading order, one answer after the other.

    `token_ids` int64[R, T], up to the end token and then padding; `padding` bool[R, T];
    `log_probs` float32[R, T], natural ones of the model, 0 on padding; `states` float[R, T, D],
    that each token was written from; `row` int64[n], the answer of each object; `boxes`
    float32[n, 4], xyxy in [0, 1] of the padded square, corners in any order; `masks`
    float32[n, h, w], logits over it, or none where none were asked for.
    """

    token_ids: Tensor
    padding: Tensor
    log_probs: Tensor
    states: Tensor
    row: Tensor
    boxes: Tensor
    masks: Tensor


def most_probable(logits: Tensor) -> Tensor:
    """Greedy choice."""
    return logits.argmax(-1)


def sampler(
    temperature: float = 1.0, top_p: float = 1.0, generator: torch.Generator | None = None
) -> Choose:
    """Random choice among the most probable tokens that make up `top_p` together."""
    warpers = [TemperatureLogitsWarper(temperature), TopPLogitsWarper(top_p)]

    def choose(logits: Tensor) -> Tensor:
        for warp in warpers:
            logits = warp(None, logits)
        return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]

    return choose


@torch.no_grad()
def write_answers(
    network: PerceptionGPTNetwork,
    images: Tensor,
    token_ids: Tensor,
    padding: Tensor,
    objects: Objects,
    *,
    max_new_tokens: int,
    choose: Choose = most_probable,
    num_beams: int = 1,
    use_cache: bool = True,
    feed_masks: bool = False,
    with_masks: bool = True,
) -> Answers:
    """Go on with R prompts about B images, R = B * K, by a network in evaluation mode.

    Args:
        images: uint8 or float[B, 3, S, S] in 0..255, padded to a square.
        token_ids, padding: int64 and bool[R, T]; no prompt ends in padding. What prompts about an
            image begin with in common, up to padding or a `<vis>`, is read once.
        objects: of the `<vis>` in the prompts.
        choose: the next tokens.
        num_beams: above 1, beam search by the rules of `pixelllm.decoding` instead.
        use_cache: off, everything is read again for each word; the answers are the same.
        feed_masks: read `<vis>` back as its mask instead, as a model of `VisInput` "mask" does.
        with_masks: decode the masks of the answers.

    Raises:
        ValueError: padding at the end of a prompt, no token or no beam asked for, or markers that
            do not fit as in `PerceptionGPTNetwork.embed`.
    """
    if min(max_new_tokens, num_beams) < 1:
        given = f"max_new_tokens {max_new_tokens}, num_beams {num_beams}"
        raise ValueError(f"{given}: expected 1 or more of both")
    if padding[:, -1].any():
        raise ValueError("prompts end with their last word, and this one in padding: pad it left")
    views = network.view(images, fine=with_masks or feed_masks)
    inputs = network.embed(token_ids, views, objects)
    shared = count_shared(token_ids.masked_fill(padding, -1), len(images), network.markers.vis)
    writer = Writer(network, views, inputs, ~padding, shared, num_beams, use_cache, feed_masks)
    language = network.language
    start = torch.full((len(inputs), max_new_tokens + 2), language.eos_id, device=inputs.device)
    if num_beams == 1:
        found = search(writer, start, language.eos_id, choose)
    else:
        beams, _ = beam_search(writer, start, language.eos_id, num_beams, reorder=writer.reorder)
        found = beams[:, -1]
    return finish(writer, found[:, :-1], with_masks)


def count_shared(token_ids: Tensor, num_images: int, vis: int) -> int:
    """How many tokens all prompts about any image begin with in common, their last one aside.

    Args:
        token_ids: int64[R, T], negative on padding; those of an image adjacent.
    """
    of_image = token_ids.unflatten(0, (num_images, -1))
    same = (of_image == of_image[:, :1]) & (of_image >= 0) & (of_image != vis)
    return int(same.all(1).all(0)[:-1].long().cumprod(0).sum())


def search(
    next_logits: Callable[[Tensor, int], Tensor], start: Tensor, eos_id: int, choose: Choose
) -> Tensor:
    """Token by token until all rows have ended; arguments and result as in `beam_search`."""
    token_ids = start.clone()
    ended = torch.zeros(len(start), dtype=torch.bool, device=start.device)
    for t in range(start.shape[1] - 2):
        token = choose(next_logits(token_ids, t).float())
        token_ids[:, t + 1] = token.masked_fill(ended, eos_id)
        ended |= token == eos_id
        if ended.all():
            break
    return token_ids


class Writer:
    """The network inside a search: reads what was written and says what may follow.

    Args:
        network, views: of the prompts' images.
        inputs: float[R, S, D], the prompts.
        valid: bool[R, S], False on padding.
        shared: tokens that all prompts of an image begin with.
        num_beams: rows per prompt, once the prompts are read.
        use_cache, feed_masks: as in `write_answers`.
    """

    def __init__(
        self,
        network: PerceptionGPTNetwork,
        views: Views,
        inputs: Tensor,
        valid: Tensor,
        shared: int = 0,
        num_beams: int = 1,
        use_cache: bool = True,
        feed_masks: bool = False,
    ) -> None:
        self.network, self.views = network, views
        self.inputs, self.valid, self.shared = inputs, valid, shared
        self.num_beams, self.feed_masks = num_beams, feed_masks
        self.cache = network.language.new_cache() if use_cache else None
        rows = torch.arange(len(inputs), device=inputs.device)
        self.image = (rows * len(views.coarse) // len(rows)).repeat_interleave(num_beams)
        self.first_beam = rows[:, None] * num_beams
        self.states: list[Tensor] = []  # of every step, float[R * beams, D]
        self.written: list[Tensor] = []  # before every step, int64[R * beams, t + 1]
        self.last_states = inputs[:0, 0]  # those that wrote the last tokens

    def __call__(self, token_ids: Tensor, t: int) -> Tensor:
        """Logits float32[R * beams, V] after position t of int64[R * beams, T]; t = 0, 1, ..."""
        if t:
            self._append(token_ids[:, t])
            hidden = self.network.language.read(self.inputs, self.valid, self.cache)[:, -1]
        else:
            hidden = self._repeat(self._read_prompts())
        self.last_states = hidden
        self.states.append(hidden)
        self.written.append(token_ids[:, : t + 1])
        return self.network.language.logits(hidden)

    def reorder(self, beams: Tensor) -> None:
        """Go on with these beams of every prompt, int64[R, beams]."""
        rows = (self.first_beam + beams).flatten()
        self.last_states = self.last_states[rows]
        if self.cache is None:
            self.inputs = self.inputs[rows]
        else:
            self.cache.reorder_cache(rows)

    def _read_prompts(self) -> Tensor:
        """The states at the ends of the prompts, float[R, D]."""
        read, inputs = self.network.language.read, self.inputs
        prompts_per_image = len(inputs) // len(self.views.coarse)
        if self.cache is not None and self.shared and prompts_per_image > 1:
            first = inputs[::prompts_per_image, : self.shared]
            read(first, self.valid[::prompts_per_image, : self.shared], self.cache)
            self.cache.batch_repeat_interleave(prompts_per_image)
            inputs = inputs[:, self.shared :]
        return read(inputs, self.valid, self.cache)[:, -1]

    def _repeat(self, hidden: Tensor) -> Tensor:
        """All beams of a prompt begin alike, and it is read but once."""
        self.inputs, self.valid, hidden = (
            tensor.repeat_interleave(self.num_beams, dim=0)
            for tensor in (self.inputs, self.valid, hidden)
        )
        if self.cache is not None:
            self.cache.batch_repeat_interleave(self.num_beams)
        return hidden

    def _append(self, tokens: Tensor) -> None:
        """Have tokens int64[R * beams] read next, `<vis>` as the object of the state before."""
        network = self.network
        embeddings = network.language.embed(tokens)
        is_vis = tokens == network.markers.vis
        if is_vis.any():
            objects = self._objects(self.last_states[is_vis], self.image[is_vis])
            embeddings[is_vis] = network.embed_objects(objects).to(embeddings.dtype)
        embeddings = embeddings[:, None]
        if self.cache is None:
            embeddings = torch.cat([self.inputs, embeddings], dim=1)
        self.inputs, self.valid = embeddings, F.pad(self.valid, (0, 1), value=True)

    def _objects(self, states: Tensor, image: Tensor) -> Objects:
        """What states float[n, D] decode to, as it is fed back."""
        objects = Objects.of_boxes(self.network.box_decoder(states))
        if not self.feed_masks:
            return objects
        side = self.network.mask_encoder.size
        logits = self.network.segment(states, self.views, image)
        masks = resize_logits(logits, (side, side)).sigmoid()
        every = torch.ones_like(objects.by_mask)
        return objects._replace(masks=masks, has_mask=every, by_mask=every)

    def states_of(self, token_ids: Tensor) -> Tensor:
        """The states that wrote the answers found: int64[R, T], first no token -> float[R, T, D].

        Of every step, the beam that begins as the answer does; where beams begin alike, so are
        their states.
        """
        found = []
        for t, (states, written) in enumerate(zip(self.states, self.written, strict=True)):
            if t == token_ids.shape[1]:
                break
            beams = written.unflatten(0, (-1, self.num_beams))  # (R, beams, t + 1)
            same = (beams == token_ids[:, None, : t + 1]).all(-1)
            found.append(states[self.first_beam[:, 0] + same.int().argmax(1)])
        return torch.stack(found, dim=1)


def finish(writer: Writer, token_ids: Tensor, with_masks: bool) -> Answers:
    """Answers from the ids that a search found, int64[R, 1 + T], the first one being no token."""
    network, language = writer.network, writer.network.language
    written = token_ids[:, 1 : 1 + len(writer.states)]
    is_end = written == language.eos_id
    padding = is_end.cumsum(1) - is_end.long() > 0
    T = int((~padding).sum(1).max())
    written, padding = written[:, :T], padding[:, :T]
    states = writer.states_of(token_ids[:, :T])
    log_probs = language.logits(states).log_softmax(-1)
    log_probs = log_probs.gather(-1, written[..., None])[..., 0].masked_fill(padding, 0.0)
    is_vis = (written == network.markers.vis) & ~padding
    row = is_vis.nonzero()[:, 0]
    image = writer.image[:: writer.num_beams][row]
    asked = slice(None) if with_masks else slice(0)
    masks = network.segment(states[is_vis][asked], writer.views, image[asked])
    return Answers(
        written.masked_fill(padding, language.pad_id),
        padding,
        log_probs,
        states,
        row,
        network.box_decoder(states[is_vis]),
        masks,
    )
