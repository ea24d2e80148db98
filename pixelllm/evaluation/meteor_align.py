"""METEOR's alignment of a caption with a reference (Denkowski & Lavie 2014, section 2).

Words match where they are equal, share a stem or a synset, or where a phrase is a paraphrase of
the other caption's; the alignment covers every word once at most. Which one is found in a beam of
40 is part of the score, so the search keeps the order, the ties and the two slips of the Java
program: a match that is not exact counts half, rounded down, while the search compares, and its
distance is charged to the alternatives that come after it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import itemgetter

from pixelllm.evaluation.meteor_data import Word

EXACT, STEM, SYNONYM, PARAPHRASE = range(4)
_BEAM = 40
_LONGEST_PHRASE = 7  # words, in the paraphrase table
# A path is worth one number, less is better: first more matched words, then fewer chunks, then a
# smaller distance.
_CHUNK, _MATCH = 1 << 26, 1 << 42


# Where it starts in the reference, how many words it has there, the same of the caption, its kind.
# A plain tuple, because most of the time goes into making them.
Match = tuple[int, int, int, int, int]


class Caption:
    """A caption's words and phrases, arranged for comparison with others."""

    def __init__(self, words: Sequence[Word]):
        self.words = words
        self.texts = [word.text for word in words]
        self.keys = [word.key for word in words]
        self.synsets = frozenset().union(*(word.synsets for word in words))
        self.by_key: dict[int, list[int]] = {}
        self.by_stem: dict[int, list[int]] = {}
        for place, word in enumerate(words):
            self.by_key.setdefault(word.key, []).append(place)
            self.by_stem.setdefault(word.stem, []).append(place)
        # Set by `relate`: phrases with paraphrases elsewhere, and where phrases that paraphrase
        # others begin.
        self.sources: list[tuple[int, int, frozenset[str]]] = []
        self.places: dict[str, list[int]] = {}
        self.targets: frozenset[str] = frozenset()

    def phrases(self) -> list[tuple[int, int, str]]:
        """Start, number of words and text of all phrases, by start and length."""
        size = len(self.texts)
        return [
            (start, end - start, " ".join(self.texts[start:end]))
            for start in range(size)
            for end in range(start + 1, min(start + _LONGEST_PHRASE, size) + 1)
        ]

    def relate(self, paraphrases: Mapping[str, frozenset[str]], targets: frozenset[str]) -> None:
        """Note which phrases matter, of a table cut to the captions that will be compared."""
        for start, length, text in self.phrases():
            if text in paraphrases:
                self.sources.append((start, length, paraphrases[text]))
            if text in targets:
                self.places.setdefault(text, []).append(start)
        self.targets = frozenset(self.places)


def align(caption: Caption, reference: Caption) -> tuple[list[Match], int]:
    """The matches of the best alignment found, and its number of chunks.

    A chunk is a run of matches whose words follow one another in both texts.
    """
    matches = _word_matches(caption, reference)
    if caption.keys != reference.keys:  # equal ones need exact matches alone
        _add_paraphrases(matches, caption, reference)
    else:
        matches = [[match for match in found if match[-1] == EXACT] for found in matches]
    return _search(matches, _certain(matches, len(caption.words)))


def _word_matches(caption: Caption, reference: Caption) -> list[list[Match]]:
    """Of every reference word the exact, then the stem, then the synonym matches."""
    matches = []
    keys, by_key, by_stem = caption.keys, caption.by_key, caption.by_stem
    synsets = caption.synsets
    for place, word in enumerate(reference.words):
        found = []
        key = word.key
        if key in by_key:
            found += [(place, 1, i, 1, EXACT) for i in by_key[key]]
        if word.stem in by_stem:
            found += [(place, 1, i, 1, STEM) for i in by_stem[word.stem] if keys[i] != key]
        if not synsets.isdisjoint(word.synsets):
            found += [
                (place, 1, i, 1, SYNONYM)
                for i, other in enumerate(caption.words)
                if other.key != key and not word.synsets.isdisjoint(other.synsets)
            ]
        matches.append(found)
    return matches


def _add_paraphrases(matches: list[list[Match]], caption: Caption, reference: Caption) -> None:
    """Add the matches by the table, once for either direction: some are in it twice."""
    for start, length, paraphrases in reference.sources:
        if not caption.targets.isdisjoint(paraphrases):
            for text in sorted(caption.targets & paraphrases):
                matches[start] += [
                    (start, length, place, text.count(" ") + 1, PARAPHRASE)
                    for place in caption.places[text]
                ]
    for start, length, paraphrases in caption.sources:
        if not reference.targets.isdisjoint(paraphrases):
            for text in sorted(reference.targets & paraphrases):
                for place in reference.places[text]:
                    size = text.count(" ") + 1
                    matches[place].append((place, size, start, length, PARAPHRASE))


def _certain(matches: list[list[Match]], caption_size: int) -> list[Match | None]:
    """By reference word, the match that begins there if no other match has a word of it."""
    in_caption, in_reference = [0] * caption_size, [0] * len(matches)
    for found in matches:
        for start, length, caption_start, caption_length, _ in found:
            for place in range(start, start + length):
                in_reference[place] += 1
            for place in range(caption_start, caption_start + caption_length):
                in_caption[place] += 1
    certain = []
    for found in matches:
        match = found[0] if len(found) == 1 else None
        if match is not None:
            start, length, caption_start, caption_length, _ = match
            if (
                max(in_reference[start : start + length]) > 1
                or max(in_caption[caption_start : caption_start + caption_length]) > 1
            ):
                match = None
        certain.append(match)
    return certain


def _search(matches: list[list[Match]], certain: list[Match | None]) -> tuple[list[Match], int]:
    """The alignment, choosing from left to right of the reference."""
    # Of every path: its cost, the first reference word that is free, where its last match ends in
    # the caption (-1 after a gap), used caption words as bits, and its matches, newest first.
    paths = [(0, 0, -1, 0, None)]
    for place, (found, sure) in enumerate(zip(matches, certain, strict=True)):
        if len(paths) > 1:
            paths.sort(key=itemgetter(0))
            del paths[_BEAM:]
        options = [_option(match) for match in found]
        longer = []
        for path in paths:
            cost, free, end, used, chain = path
            if free > place:
                longer.append(path)
                continue
            for match, value, distance, begin, stop, after, mask in options:
                if used & mask:
                    continue
                new = cost - value + (distance if sure is not None else 0)
                if end != begin and end != -1:
                    new += _CHUNK
                longer.append((new, after, stop, used | mask, (match, chain)))
                cost += distance  # of the alternatives, not of the path that chose the match
            if sure is None:
                longer.append((cost + (end != -1) * _CHUNK, place + 1, -1, used, chain))
        paths = longer
    paths.sort(key=itemgetter(0))
    ended = [(cost + (end != -1) * _CHUNK, chain) for cost, _, end, _, chain in paths[:_BEAM]]
    cost, chain = min(ended, key=itemgetter(0))
    chosen = []
    while chain is not None:
        match, chain = chain
        chosen.append(match)
    return chosen, cost % _MATCH // _CHUNK


def _option(match: Match) -> tuple[Match, int, int, int, int, int, int]:
    """A match and what the search asks of it, worked out once for all paths."""
    start, length, caption_start, caption_length, kind = match
    matched_words = 2 if kind == EXACT else length // 2 + caption_length // 2
    mask = ((1 << caption_length) - 1) << caption_start
    stop = caption_start + caption_length
    distance = abs(start - caption_start)
    return match, matched_words * _MATCH, distance, caption_start, stop, start + length, mask
