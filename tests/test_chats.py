"""Chats: tokens, labels and batches, with the trunk's chat template and with Vicuna's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from data import flickr30k, llava, refcoco, visual_genome
from data.scenes import Options, write_scenes
from pixelllm import templates
from pixelllm.batches import Prompted, fill
from pixelllm.chats import (
    PLAIN,
    Chat,
    collate_chats,
    decode_answer,
    encode_chat,
    render,
    share_image,
)
from pixelllm.conversations import Conversation, Referent, converse
from pixelllm.markers import add_markers, marker_ids
from pixelllm.mask_codes import encode_mask
from pixelllm.tables import Table
from pixelllm.tokenizer import train_tokenizer

TEXTS = ["USER: What is the car? ASSISTANT: Answer a red car, and a blue tree."] * 3
# ChatML, as of SmolLM2: an end token after every turn, which closes answers too.
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OBJECT = "<obj_vis_s><vis><obj_vis_e>"
FIRST, SECOND, THIRD = (0.1, 0.2, 0.3, 0.4), (0.5, 0.5, 0.9, 0.8), (0.0, 0.0, 1.0, 0.5)
TALK = Conversation(
    "talk/1",
    (40, 80),
    (
        (f"<image> What is{OBJECT}?", "a red car"),
        ("Where is<obj_text_s> the tree<obj_text_e>?", f"Answer:{OBJECT}, and{OBJECT}."),
    ),
    (Referent(FIRST), Referent(SECOND), Referent(THIRD)),
)


def word_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = train_tokenizer(TEXTS, 200)
    tokenizer.chat_template = PLAIN
    return tokenizer


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level, padded with its end token: the kind of SmolLM2's."""
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator(TEXTS, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=model, eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture(scope="module", params=[word_tokenizer, byte_tokenizer])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    made = request.param()
    add_markers(made)
    return made


def encode(tokenizer: PreTrainedTokenizerFast, talk: Conversation = TALK, room: int = 500) -> Chat:
    return encode_chat(talk, tokenizer, num_patches=5, max_tokens=room)


def test_only_answers_and_their_end_are_learnt(tokenizer):
    """Catches answers that slip by a token, from one round to the next."""
    chat, end = encode(tokenizer), tokenizer.eos_token_id
    pairs = zip(chat.token_ids, chat.is_answer, strict=True)
    learnt = [token for token, is_answer in pairs if is_answer]
    assert learnt.count(end) == 2 and learnt[-1] == end
    first = learnt.index(end)
    answers = [decode_answer(learnt, tokenizer), decode_answer(learnt[first + 1 :], tokenizer)]
    blank_free = [answer.replace(" ", "") for answer in answers]
    assert blank_free == [answer.replace(" ", "") for _, answer in TALK.rounds]


def test_the_image_is_as_many_tokens_as_the_model_sees(tokenizer):
    chat, ids = encode(tokenizer), marker_ids(tokenizer)
    start = chat.token_ids.index(ids.image_start)
    assert chat.token_ids[start : start + 7] == [ids.image_start, *[ids.image] * 5, ids.image_end]
    assert chat.token_ids.count(ids.image) == 5


def test_objects_are_those_of_the_vis_tokens(tokenizer):
    chat, ids = encode(tokenizer), marker_ids(tokenizer)
    assert chat.token_ids.count(ids.vis) == 3 and chat.objects == TALK.objects
    said = [a for t, a in zip(chat.token_ids, chat.is_answer, strict=True) if t == ids.vis]
    assert said == [False, True, True]


def test_what_is_given_to_generate_from_is_how_training_begins(tokenizer):
    """Catches a prompt whose last token training sees merged with the answer's first."""
    whole, asked = encode(tokenizer), encode(tokenizer, TALK.unanswered())
    length = len(asked.token_ids)
    assert whole.token_ids[:length] == asked.token_ids and length < len(whole.token_ids)
    assert not whole.is_answer[length - 1] and whole.is_answer[length]
    assert asked.objects == TALK.objects[:1]


def test_an_overlong_chat_loses_its_end_with_the_objects_in_it(tokenizer):
    whole, ids = encode(tokenizer), marker_ids(tokenizer)
    places = [n for n, token in enumerate(whole.token_ids) if token == ids.vis]
    for room in range(places[1] - 3, len(whole.token_ids)):
        cut = encode(tokenizer, room=room)
        assert cut.token_ids == whole.token_ids[:room] and cut.is_answer == whole.is_answer[:room]
        assert len(cut.objects) == cut.token_ids.count(ids.vis)
        assert cut.objects == whole.objects[: len(cut.objects)]


def test_a_question_is_never_cut(tokenizer):
    asked = TALK.unanswered()
    length = len(encode(tokenizer, asked).token_ids)
    alone = Conversation("talk/2", (4, 4), ((f"<image> {'What ' * 9}?", ""),), ())
    late = Conversation("talk/7", (4, 4), (("Hi", "a"), ("<image> What", "a car")), ())
    half = encode(tokenizer, late).token_ids.index(marker_ids(tokenizer).image) + 2
    for talk, room in ((TALK, 6), (alone, 20), (late, half)):
        message = f"{talk.id}: {room} tokens do not hold the image and the question but"
        with pytest.raises(ValueError, match=message):
            encode(tokenizer, talk, room)
    assert len(encode(tokenizer, asked, length).token_ids) == length


def test_a_trunk_without_a_template_talks_like_vicuna():
    tokenizer = train_tokenizer(TEXTS, 200)
    text, answers = render(TALK, tokenizer)
    opening = "A chat between a curious user and an artificial intelligence assistant. "
    assert text.startswith(opening)
    assert text.endswith(
        "user's questions. USER: <im_start><im_patch><im_end> What is"
        f"{OBJECT}? ASSISTANT: a red car</s>USER: Where is<obj_text_s> the tree<obj_text_e>? "
        f"ASSISTANT: Answer:{OBJECT}, and{OBJECT}.</s>"
    )
    assert [text[start:end] for start, end in answers] == [
        " a red car</s>",
        f" Answer:{OBJECT}, and{OBJECT}.</s>",
    ]
    assert render(TALK.unanswered(), tokenizer).text.endswith("? ASSISTANT:")
    silent = Conversation("talk/4", (4, 4), (("<image> Hi", ""), ("What?", "a car")), ())
    text, answers = render(silent, tokenizer)
    assert [text[start:end].strip() for start, end in answers] == ["</s>", "a car</s>"]


@pytest.mark.parametrize(
    ("rounds", "objects", "message"),
    [
        ((("<image> Hi", f"at{OBJECT}"),), (), "talk/3: 1 <vis> in the text, but 0 boxes"),
        ((("<image> Hi", "no"),), (Referent(FIRST),), "talk/3: 0 <vis> in the text, but 1 boxes"),
        ((("<image> Hi", "<obj_text_s> a"),), (), "talk/3: <obj_text_s> without <obj_text_e>"),
        ((("Hi", "no"),), (), "talk/3: 0 <image> in it, expected one"),
        ((("<image> Hi <image>", "no"),), (), "talk/3: 2 <image> in it, expected one"),
    ],
)
def test_what_does_not_match_is_named(rounds, objects, message: str, tokenizer):
    with pytest.raises(ValueError, match=message):
        encode(tokenizer, Conversation("talk/3", (4, 4), rounds, objects))


def test_a_tokenizer_without_marks_or_end_is_refused():
    tokenizer = word_tokenizer()
    with pytest.raises(ValueError, match="the tokenizer has no <vis>"):
        encode(tokenizer)
    add_markers(tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    with pytest.raises(ValueError, match="chat template shows 'a red car\\\\n.* '</s>' belong"):
        encode(tokenizer)
    # without a prompt to generate from, the model would have to write "assistant" itself
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }} {{ m.content }}{{ eos_token }}{% endfor %}"
    )
    with pytest.raises(ValueError, match="chat template shows 'assistant a red"):
        encode(tokenizer)


def test_batches_are_padded_on_either_side(tokenizer):
    chats = [encode(tokenizer), encode(tokenizer, TALK.unanswered())]
    long, short = (len(chat.token_ids) for chat in chats)
    right, left = (collate_chats(chats, tokenizer, pad_left=side) for side in (False, True))
    assert right.tokens.token_ids.shape == left.tokens.is_answer.shape == (2, long)
    assert right.tokens.padding.tolist()[1] == [False] * short + [True] * (long - short)
    begin = short - 1  # the second is what the first begins with, and ends with its own last token
    padded = [False] * begin + [True] * (long - short) + [False]
    assert left.tokens.padding.tolist()[1] == padded
    for tokens in (left.tokens, right.tokens):
        for row, chat in enumerate(chats):
            padding = tokens.padding[row]
            assert tokens.token_ids[row][~padding].tolist() == chat.token_ids
            assert tokens.is_answer[row][~padding].tolist() == chat.is_answer
            assert (tokens.token_ids[row][padding] == tokenizer.pad_token_id).all()
            assert not tokens.is_answer[row][padding].any()
    assert right.ids == ("talk/1", "talk/1")


def describe(name: str, box: Referent, answer: str) -> Conversation:
    return Conversation(name, (40, 80), ((f"<image> What is{OBJECT}?", answer),), (box,))


def test_chats_share_an_image_and_are_branches_behind_it(tokenizer):
    found = [
        describe("talk/7", TALK.objects[0], "a red car"),
        describe("talk/8", TALK.objects[1], "a tree"),
    ]
    first, second = (encode(tokenizer, talk) for talk in found)
    image_end = marker_ids(tokenizer).image_end
    shared = first.token_ids.index(image_end) + 1
    chat = share_image([first, second], image_end, 1000)
    for branch, alone in ((1, first), (2, second)):
        seen = [own in (0, branch) for own in chat.branches]
        assert [
            t for t, is_seen in zip(chat.token_ids, seen, strict=True) if is_seen
        ] == alone.token_ids
        assert [
            a for a, is_seen in zip(chat.is_answer, seen, strict=True) if is_seen
        ] == alone.is_answer
    assert chat.branches.count(0) == shared and chat.branches == sorted(chat.branches)
    assert chat.objects == (*first.objects, *second.objects) and chat.id == "talk/7+talk/8"
    padded = collate_chats([chat, first], tokenizer).tokens
    assert padded.branches[0].tolist() == chat.branches and not padded.branches[1].any()
    assert collate_chats([first, second], tokenizer).tokens.branches is None


def test_a_chat_that_finds_no_room_behind_the_image_is_left_out(tokenizer):
    talks = [describe(f"talk/{i}", TALK.objects[0], "a tree" + " a car" * i) for i in (0, 9, 1)]
    chats = [encode(tokenizer, talk) for talk in talks]
    image_end = marker_ids(tokenizer).image_end
    room = len(share_image([chats[0], chats[2]], image_end, 1000).token_ids)
    assert share_image(chats, image_end, room).id == "talk/0+talk/1"
    assert share_image(chats, image_end, 1).token_ids == chats[0].token_ids


def test_chats_that_begin_differently_do_not_share_an_image(tokenizer):
    other = Conversation("talk/9", (40, 80), (("What is it? <image>", "a tree"),), ())
    chats = [encode(tokenizer, TALK), encode(tokenizer, other)]
    with pytest.raises(ValueError, match="talk/9 and talk/1 do not begin alike; put the image"):
        share_image(chats, marker_ids(tokenizer).image_end, 1000)


def test_boxes_and_masks_are_in_the_padded_square_with_their_owners(tokenizer):
    """The image is twice as wide as high: y runs from a quarter to three quarters."""
    mask = np.zeros((40, 80), dtype=bool)
    mask[:20, 40:] = True  # upper right quarter
    rounds = (("<image> Where?", f"Answer:{OBJECT}."),)
    other = Conversation("talk/4", (40, 80), rounds, (Referent(THIRD, encode_mask(mask)),))
    batch = collate_chats([encode(tokenizer), encode(tokenizer, other)], tokenizer)
    assert batch.owner.tolist() == [0, 0, 0, 1]
    expected = [(x0, 0.25 + y0 / 2, x1, 0.25 + y1 / 2)
                for x0, y0, x1, y1 in (FIRST, SECOND, THIRD, THIRD)]  # fmt: skip
    torch.testing.assert_close(batch.objects.boxes, torch.tensor(expected))
    assert batch.objects.has_mask.tolist() == [False, False, False, True]
    assert not batch.objects.by_mask.any() and batch.objects.masks.shape == (1, 256, 256)
    inside = torch.zeros(256, 256, dtype=torch.bool)
    inside[64:128, 128:] = True
    assert ((batch.objects.masks[0] > 0.5) != inside).sum() <= 4  # corners are soft
    is_vis = batch.tokens.token_ids == marker_ids(tokenizer).vis
    assert is_vis.nonzero()[:, 0].tolist() == batch.owner.tolist()


def test_masks_have_the_side_that_is_asked_for(tokenizer):
    whole = Referent(THIRD, encode_mask(np.ones((40, 80), dtype=bool)))
    talk = Conversation("talk/6", (40, 80), (("<image> Where?", OBJECT),), (whole,))
    masks = collate_chats([encode(tokenizer, talk)], tokenizer, mask_side=8).objects.masks
    assert masks.round().sum((1, 2)).tolist() == [32.0]


def test_a_batch_without_objects_is_well_formed(tokenizer):
    talk = Conversation("talk/5", (4, 4), (("<image> Hi", "a tree"),), ())
    batch = collate_chats([encode(tokenizer, talk)], tokenizer).to(torch.device("cpu"))
    assert batch.objects.boxes.shape == (0, 4) and batch.objects.masks.shape == (0, 256, 256)
    assert batch.objects.has_mask.dtype == torch.bool and batch.owner.shape == (0,)
    assert batch.owner.dtype == torch.long and batch.tokens.token_ids.dtype == torch.long


def test_scenes_of_every_task_become_chats(tmp_path: Path):
    """From written scenes through every reader to a batch: catches boxes of other words."""
    out, folder = tmp_path / "scenes", tmp_path / "scenes/annotations"
    write_scenes(Options(out, train=4, val=0, num_proc=1))
    refcoco.convert(
        [folder / "refer/refs(unc).p", folder / "refer/instances.json"],
        refcoco.Options(out / "train", "train"),
        tmp_path / "referring",
    )
    visual_genome.convert(
        [folder / "visual_genome/train.json"],
        visual_genome.Options(out / "train"),
        tmp_path / "region",
    )
    flickr30k.convert(folder / "flickr30k/annotations.zip", out / "train", tmp_path / "grounded")
    llava.convert([folder / "llava_train.json"], out, tmp_path / "question")
    wordings = {
        "referring": templates.SEGMENT, "region": templates.DESCRIBE,
        "grounded": templates.GROUND, "question": templates.SHORT_ANSWER,
    }  # fmt: skip
    tokenizer = word_tokenizer()
    markers, chats = add_markers(tokenizer), []
    for task, contexts in wordings.items():
        for record in Table(tmp_path / task):
            filled = tuple(fill(contexts[-1], phrase) for phrase in record.phrases)
            talks = converse(Prompted(record, record.phrases, filled))
            branches = [encode_chat(talk, tokenizer, 4, max_tokens=2000) for talk in talks]
            chats.append(share_image(branches, markers.image_end, 2000))
    batch = collate_chats(chats, tokenizer, mask_side=32)
    is_vis = batch.tokens.token_ids == markers.vis
    is_answer = is_vis & batch.tokens.is_answer
    objects = [len(chat.objects) for chat in chats]
    referring, regions, grounded, questions = (slice(n, n + 4) for n in (0, 4, 8, 12))
    assert len(chats) == 16 and is_vis.sum(1).tolist() == objects
    assert is_answer[referring].any(1).all() and is_answer[grounded].any(1).all()
    assert is_vis[regions].any(1).all() and not is_answer[regions].any()
    assert not is_vis[questions].any()
    assert batch.objects.has_mask.tolist() == [True] * sum(objects[:4]) + [False] * sum(objects[4:])
    low, high = batch.objects.boxes.unflatten(1, (2, 2)).unbind(1)
    assert (low < high).all() and len(low) == sum(objects)


def test_answers_are_decoded_with_their_marks(tokenizer):
    text = f"a<obj_text_s> red car<obj_text_e>{OBJECT}"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    ids += [tokenizer.eos_token_id, tokenizer.pad_token_id, ids[0]]
    assert decode_answer(ids, tokenizer) == text


def test_an_answer_that_begins_with_a_phrase_begins_with_its_word(tokenizer):
    answer = f"<obj_text_s>a red car<obj_text_e>{OBJECT}."
    token_ids = tokenizer(answer, add_special_tokens=False).input_ids
    assert decode_answer(token_ids, tokenizer).startswith("<obj_text_s>a red car")
