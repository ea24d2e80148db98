"""Conversations to tokens and batches, in the trunk's own chat format or Vicuna's.

Reference of PerceptionGPT, sections 1.4, 1.5 and 5.3: only the assistant's words and end tokens
are learnt. Differences: a tokenizer that has a chat template is used with it; text is tokenized
whole and answers are found by their characters, so that no round can lose its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os.path import commonprefix
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from pixelllm.conversations import Conversation, Referent
from pixelllm.marked_text import IMAGE_END, IMAGE_START, PATCH, TEXT_START
from pixelllm.markers import check_markers, marker_ids
from pixelllm.mask_codes import decode_mask
from pixelllm.models.perceptiongpt import Objects, Tokens
from pixelllm.squares import square_boxes, square_mask
from pixelllm.templates import IMAGE

# For a tokenizer trained on the captions, which needs no instruction.
PLAIN = (
    "{% for message in messages %}"
    "{% if message.role == 'user' %}USER: {{ message.content }} "
    "{% else %}ASSISTANT: {{ message.content }}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
# FastChat's vicuna_v1.1: what Vicuna and LLaVA were trained on.
VICUNA = (
    "{{ bos_token or '' }}A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
) + PLAIN


@dataclass(frozen=True)
class Chat:
    """A conversation as tokens.

    Args:
        id, size: as in `Conversation`.
        token_ids: with as many tokens for the image as the model sees.
        is_answer: for every token, whether the assistant says it.
        objects: one for every `<vis>` among the tokens.
        branches: for every token, 0 for what all branches begin with, or the number of its own,
            which sees no other (`share_image`).
    """

    id: str
    size: tuple[int, int]
    token_ids: list[int]
    is_answer: list[bool]
    objects: tuple[Referent, ...]
    branches: list[int]


class ChatBatch(NamedTuple):
    """R chats of equal length, as the network takes them.

    Args:
        tokens: of the chats; `tokens.is_answer` is what is learnt.
        objects: of all their `<vis>`, in reading order; all are read as boxes.
        owner: int64[M], the chat of every object.
        ids: of the chats.
    """

    tokens: Tokens
    objects: Objects
    owner: Tensor
    ids: tuple[str, ...]

    def to(self, device: torch.device) -> ChatBatch:
        tokens, objects = (
            type(part)(*(None if tensor is None else tensor.to(device) for tensor in part))
            for part in (self.tokens, self.objects)
        )
        return ChatBatch(tokens, objects, self.owner.to(device), self.ids)


class Rendered(NamedTuple):
    """A conversation as one text; `answers` are characters of it, end tokens included."""

    text: str
    answers: list[tuple[int, int]]


def encode_chat(
    conversation: Conversation,
    tokenizer: PreTrainedTokenizerFast,
    num_patches: int,
    max_tokens: int,
) -> Chat:
    """The tokens of a conversation, which loses its end where it is too long.

    A `<vis>` that is cut off takes its object along. Raises ValueError naming the conversation:
    not one image, marks and objects that do not match, or no room for the image or the question.

    Args:
        num_patches: visual tokens of the image.
        max_tokens: of the result, image included.
    """
    name, ids = conversation.id, marker_ids(tokenizer)
    token_ids, is_answer = _tokenize(conversation, tokenizer)
    check_markers(token_ids.tolist(), ids, len(conversation.objects), name)
    if (token_ids == ids.image).sum() != 1:
        raise ValueError(f"{name}: {(token_ids == ids.image).sum()} {IMAGE} in it, expected one")
    copies = np.where(token_ids == ids.image, num_patches, 1)
    token_ids, is_answer = token_ids.repeat(copies), is_answer.repeat(copies)
    needed, cut = len(token_ids), token_ids[max_tokens:]
    token_ids, is_answer = token_ids[:max_tokens], is_answer[:max_tokens]
    is_question = not conversation.rounds[-1][1]
    if ids.image_end in cut or (len(cut) and (is_question or not is_answer.any())):
        room = f"{max_tokens} tokens do not hold the image and the question"
        raise ValueError(f"{name}: {room} but {needed} hold it all; raise max_tokens")
    objects = conversation.objects[: (token_ids == ids.vis).sum()]
    branches = [0] * len(token_ids)
    return Chat(name, conversation.size, token_ids.tolist(), is_answer.tolist(), objects, branches)


def share_image(chats: Sequence[Chat], image_end: int, max_tokens: int) -> Chat:
    """One text of the chats about an image: it once, then what remains of each as a branch.

    The network reads every branch as if it stood behind the image alone, so that nothing but the
    time differs from a text for each. Chats that find no room are left out, but never the first.

    Args:
        image_end: the token after which chats differ.
        max_tokens: of the result.

    Raises ValueError where the chats do not begin alike.
    """
    first = chats[0]
    shared = first.token_ids.index(image_end) + 1
    token_ids, is_answer = first.token_ids[:shared], first.is_answer[:shared]
    branches, taken = [0] * shared, []
    for chat in chats:
        if chat.token_ids[:shared] != first.token_ids[:shared]:
            raise ValueError(f"{chat.id} and {first.id} do not begin alike; put the image first")
        if taken and len(token_ids) + len(chat.token_ids) - shared > max_tokens:
            continue
        taken.append(chat)
        token_ids = token_ids + chat.token_ids[shared:]
        is_answer = is_answer + chat.is_answer[shared:]
        branches += [len(taken)] * (len(chat.token_ids) - shared)
    return Chat(
        "+".join(chat.id for chat in taken),
        first.size,
        token_ids,
        is_answer,
        tuple(referent for chat in taken for referent in chat.objects),
        branches,
    )


def _tokenize(
    conversation: Conversation, tokenizer: PreTrainedTokenizerFast
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids int64[T], with one token for the image, and which are answers, bool[T]."""
    text, answers = render(conversation, tokenizer)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    starts = np.array([start for start, _ in encoded.offset_mapping])
    is_answer = np.zeros(len(starts), dtype=bool)
    for start, end in answers:
        is_answer |= (starts >= start) & (starts < end)
    return np.array(encoded.input_ids), is_answer


def render(conversation: Conversation, tokenizer: PreTrainedTokenizerFast) -> Rendered:
    """The text in the tokenizer's chat template, or Vicuna's where it has none.

    Up to where the answer begins, if the last one is "". Raises ValueError where the template
    does not show an answer as it is, and after it the end token.
    """
    messages = []
    for question, answer in conversation.rounds:
        shown = question.replace(IMAGE, IMAGE_START + PATCH + IMAGE_END)
        messages.append({"role": "user", "content": shown})
        messages.append({"role": "assistant", "content": answer})
    if not conversation.rounds[-1][1]:
        messages.pop()
    text = _apply_template(messages, tokenizer)
    answers = []
    for place in range(1, len(messages), 2):
        start = len(_apply_template(messages[:place], tokenizer))
        answer = messages[place]["content"]
        begins = text.find(answer + tokenizer.eos_token, start)
        end = begins + len(answer) + len(tokenizer.eos_token)
        if text[start:begins].strip() or text[begins:end] != answer + tokenizer.eos_token:
            expected = f"{answer!r} and {tokenizer.eos_token!r}"
            found = f"{text[start : start + len(answer) + 20]!r}"
            raise ValueError(f"the chat template shows {found} where {expected} belong")
        answers.append((start, end))
    return Rendered(text, answers)


def _apply_template(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerFast) -> str:
    """After a question, with what opens the answer."""
    return tokenizer.apply_chat_template(
        messages,
        chat_template=tokenizer.chat_template or VICUNA,
        tokenize=False,
        add_generation_prompt=messages[-1]["role"] == "user",
    )


def decode_answer(token_ids: Sequence[int], tokenizer: PreTrainedTokenizerFast) -> str:
    """Generated tokens up to the end token as marked text (`pixelllm.marked_text`)."""
    token_ids = list(token_ids)
    if tokenizer.eos_token_id in token_ids:
        token_ids = token_ids[: token_ids.index(tokenizer.eos_token_id)]
    text = tokenizer.decode(token_ids)
    for mark in (IMAGE_START, PATCH, IMAGE_END):  # of questions; a model may write them still
        text = text.replace(mark, "")
    text = text.strip()
    if text.startswith(TEXT_START):  # tokenizers put a blank before the first word
        text = TEXT_START + text.removeprefix(TEXT_START).lstrip()
    return text


def collate_chats(
    chats: Sequence[Chat],
    tokenizer: PreTrainedTokenizerFast,
    *,
    mask_side: int = 256,
    pad_left: bool = False,
) -> ChatBatch:
    """Pad chats to one length: on the right for training, further left for generation.

    Args:
        mask_side: S of the masks, which the network's mask encoder is made for.
        pad_left: pad where the chats begin to differ, so that all end at the same place and what
            they have in common stays side by side.
    """
    lengths = [len(chat.token_ids) for chat in chats]
    length = max(lengths)
    in_common = len(commonprefix([chat.token_ids for chat in chats]))
    token_ids = torch.full((len(chats), length), tokenizer.pad_token_id)
    padding, is_answer = torch.ones_like(token_ids).bool(), torch.zeros_like(token_ids).bool()
    branches = torch.zeros_like(token_ids)
    for row, chat in enumerate(chats):
        pad_at = min(in_common, min(lengths) - 1) if pad_left else lengths[row]
        filled = torch.ones(length, dtype=torch.bool)
        filled[pad_at : pad_at + length - lengths[row]] = False
        token_ids[row, filled] = torch.tensor(chat.token_ids)
        is_answer[row, filled] = torch.tensor(chat.is_answer)
        branches[row, filled] = torch.tensor(chat.branches)
        padding[row, filled] = False
    owner = [row for row, chat in enumerate(chats) for _ in chat.objects]
    return ChatBatch(
        Tokens(token_ids, padding, is_answer, branches if branches.any() else None),
        _collate_objects([(c.size, found) for c in chats for found in c.objects], mask_side),
        torch.tensor(owner, dtype=torch.long),
        tuple(chat.id for chat in chats),
    )


def _collate_objects(found: Sequence[tuple[tuple[int, int], Referent]], mask_side: int) -> Objects:
    """Objects in the padded squares of their images, whose sizes stand beside them."""
    boxes = [square_boxes(torch.tensor(referent.box), size) for size, referent in found]
    masks = [square_mask(decode_mask(r.mask), mask_side) for _, r in found if r.mask is not None]
    return Objects(
        boxes=torch.stack(boxes) if boxes else torch.zeros(0, 4),
        masks=torch.stack(masks) if masks else torch.zeros(0, mask_side, mask_side),
        has_mask=torch.tensor([r.mask is not None for _, r in found], dtype=torch.bool),
        by_mask=torch.zeros(len(found), dtype=torch.bool),
    )
