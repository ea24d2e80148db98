from __future__ import annotations

import json

import pytest
from conftest import golden_root

from pixelllm.evaluation.ptb import tokenize

# What Stanford's PTBTokenizer 3.4.1 gives for these, less COCO's punctuation.
RECORDED = [
    ("I can't, won't; she's they're I'd've", "i ca n't wo n't she 's they 're i 'd 've"),
    ("cannot gonna gotta 'tis don’t dogs’", "can not gon na got ta 't is do n't dogs"),
    ("y'all rock'n'roll o'clock d'art O'Neil", "y' all rock 'n' roll o'clock d'art o'neil"),
    (
        "Mr. Smith of Main St. at 5 a.m. ate 3 oz. of it.",
        "mr. smith of main st. at 5 a.m. ate 3 oz of it",
    ),
    ("No. 5 said no. I. The U.S. flag", "no. 5 said no i the u.s. flag"),
    (
        "a black-and-white T-shirt's well-lit a_b a--b",
        "a black-and-white t-shirt 's well-lit a_b a b",
    ),
    (
        "1,000.50 -5 10:30 8:30am 1st 1990s '90s 12/25/2010",
        "1,000.50 -5 10:30 8:30 am 1st 1990s '90s 12/25/2010",
    ),
    ("w/ and/or a/b/c/d 1/2 ½", "w / and/or a/b/c / d 1/2 1/2"),
    ("$5 US$5 £3 €4 5¢ 50% #1 #one @user", "$ 5 us$ 5 # 3 $ 4 5 cents 50 % # 1 #one @user"),
    (
        "a@b.com http://x.com/y?z=1. www.x.org/a foo.jpg",
        "a@b.com http://x.com/y?z=1 www.x.org / a foo.jpg",
    ),
    ("\"quoted\" 'quoted' “curly” ‘x’ «y» `z`", "quoted quoted curly x y z"),
    ("wait... no.... and . . . then … end what.. -- — -", "wait no and then end what"),
    (
        "(a) [b] {c} <d> :) e&f AT&T &amp; R&amp;B",
        "-lrb- a -rrb- -lsb- b -rsb- -lcb- c -rcb- <d> :-rrb- e & f at&t & r&b",
    ),
    ("what?! really??? ok!? no!", "what ?! really ??? ok !? no"),
    ("café naïve Ünder 日本語 😀 x² 20° ©", "café naïve ünder 日本語 x ² 20 ° ©"),
    ("The man.The woman , the dog .", "the man.the woman the dog"),
]


def test_golden_tokens_of_hypotheses_and_references():
    for path in sorted(golden_root().glob("caption_metrics/*.json")):
        items = json.loads(path.read_text())["items"]
        pairs = [(item["hypothesis"], item["hypothesis_tokens"]) for item in items]
        truths = [
            pair
            for item in items
            for pair in zip(item["references"], item["reference_tokens"], strict=True)
        ]
        for texts in (pairs, truths):  # each was tokenised as one text
            following = [caption for caption, _ in texts[1:]] + [""]
            for (caption, tokens), after in zip(texts, following, strict=True):
                assert " ".join(tokenize(caption, after)) == tokens


@pytest.mark.parametrize(("caption", "tokens"), RECORDED)
def test_tokens_are_those_of_the_java_program(caption, tokens):
    assert " ".join(tokenize(caption)) == tokens


def test_mixed_fractions_and_telephones_are_one_token():
    assert tokenize("3 1/2 cups") == ["3\u00a01/2", "cups"]
    assert tokenize("call (555) 123-4567") == ["call", "-lrb-555-rrb-\u00a0123-4567"]


def test_the_next_caption_decides_on_the_period_of_a_last_letter():
    assert tokenize("it reads K.") == ["it", "reads", "k."]
    assert tokenize("it reads K.", "The dog") == ["it", "reads", "k"]
    assert tokenize("it reads K.", "Dogs run") == ["it", "reads", "k."]


def test_line_breaks_are_blanks_and_nothing_gives_nothing():
    assert tokenize("two lines\nof\r\ntext\n") == ["two", "lines", "of", "text"]
    assert tokenize("") == tokenize(" \t\n") == tokenize("...!") == []


def test_tokenizing_the_tokens_again_changes_nothing_for_plain_captions():
    caption = "A man isn't riding the grey, well-lit horse (near 2 dogs)."
    once = [token for token in tokenize(caption) if not token.startswith("-")]
    assert tokenize(" ".join(once)) == once
