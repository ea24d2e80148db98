"""Words <-> trace <-> tokens: where in the image every word of a spoken caption is.

A Localized Narrative is a caption, utterances (words or groups of words) with times, and a
mouse trace on the same clock. Two ways to bring them together:

`text_pieces` (ours, the default): utterances are found in the caption by their characters, the
    centre is the exact time average of the trace over the utterance, and nothing is extrapolated.
`rank_pieces` (official PixelLLM, `build_ln_tfrecord.py` and `ops.py`): 16 samples per utterance,
    linear extrapolation beyond the trace; utterances meet tokens by their order alone.

docs/alignment.md says what that changes. Letters: U utterances, M trace points, T tokens,
P pieces. Times are seconds from the start of the recording.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import SequenceMatcher
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pixelllm.records import Piece

Array = NDArray[np.float64]

NUM_SAMPLES = 16  # official: samples per utterance
MIN_DURATION = 1e-5  # official: a shorter span counts as one moment (seconds)
MAX_DISTANCE = 1.0  # text: a word this far from the trace, in seconds, points nowhere
MIN_MATCH = 0.5  # text: share of an utterance's characters that the caption must contain


class Trace(NamedTuple):
    """The pointer, sorted by time."""

    times: Array  # float64[M]
    points: Array  # float64[M, 2], not clipped
    breaks: NDArray[np.bool_]  # [M - 1], away from the image between points i and i + 1


class Places(NamedTuple):
    """Where each utterance points: centers float64[U, 2], boxes float64[U, 4]; NaN = nowhere."""

    centers: Array
    boxes: Array


def text_pieces(narrative: dict[str, Any]) -> tuple[Piece, ...]:
    """Pieces of the caption with the place the speaker pointed at while saying them.

    Args:
        narrative: a Localized Narratives object with `caption`, `timed_caption` and `traces`;
            ValueError where an utterance or a trace point lacks a field or a finite number.

    Returns:
        A piece per utterance that is found in the caption, in its order: start and end in
        characters of the caption, centre and box in [0, 1], both None where the word was said
        more than `MAX_DISTANCE` seconds from any trace. Empty for fewer than two trace points.
    """
    trace, (utterances, times) = read_trace(narrative), read_utterances(narrative)
    if len(trace.times) < 2 or not utterances:
        return ()
    spans = match_utterances(narrative["caption"], utterances)
    return _pieces(spans, *(np.clip(values, 0, 1) for values in average_trace(trace, times)))


def rank_pieces(narrative: dict[str, Any]) -> tuple[Piece, ...]:
    """The official alignment: a piece per non-blank utterance, known by its order alone.

    Start and end are -1; centre and box are neither clipped nor bounded (linear extrapolation).
    Arguments, errors and the empty result are those of `text_pieces`.
    """
    trace, (utterances, times) = read_trace(narrative), read_utterances(narrative)
    if len(trace.times) < 2 or not utterances:
        return ()
    spoken = np.array([bool(text.strip()) for text in utterances])
    return _pieces([(-1, -1)] * int(spoken.sum()), *sample_trace(trace, times[spoken]))


def _pieces(spans: list[tuple[int, int] | None], centers: Array, boxes: Array) -> tuple[Piece, ...]:
    known = np.isfinite(centers).all(1) & np.isfinite(boxes).all(1)
    rows = zip(spans, centers.tolist(), boxes.tolist(), known, strict=True)
    return tuple(
        Piece(*span, tuple(center), tuple(box)) if is_known else Piece(*span)
        for span, center, box, is_known in rows
        if span is not None
    )


def read_trace(narrative: dict[str, Any]) -> Trace:
    """The trace segments as one, sorted by time (stable, as the official sort).

    A break is a stretch of more than `MAX_DISTANCE` seconds within no segment: a new segment
    starts where the pointer came back to the image. Raises ValueError as `text_pieces`.
    """
    try:
        segments = [list(map(_XYT, segment)) for segment in narrative["traces"] if segment]
        values = np.array([row for rows in segments for row in rows], dtype=np.float64)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"traces: every point needs numbers x, y and t ({error!r})") from error
    values = values.reshape(-1, 3)
    if not np.isfinite(values).all():
        raise ValueError("traces: a coordinate or time is not a finite number")
    order = np.argsort(values[:, 2], kind="stable")
    times = values[order, 2]
    return Trace(times, values[order, :2], _breaks(times, values[:, 2], list(map(len, segments))))


def _breaks(times: Array, unsorted: Array, lengths: list[int]) -> NDArray[np.bool_]:
    """Which gaps between sorted times are long and within no segment."""
    if len(lengths) < 2:
        return np.zeros(max(len(times) - 1, 0), dtype=bool)
    first = np.cumsum([0, *lengths[:-1]])
    begins = np.sort(np.minimum.reduceat(unsorted, first))
    ends = np.sort(np.maximum.reduceat(unsorted, first))
    begun = np.searchsorted(begins, times[:-1], side="right")
    ended = np.searchsorted(ends, times[1:], side="left")
    return (begun == ended) & (np.diff(times) > MAX_DISTANCE)


def read_utterances(narrative: dict[str, Any]) -> tuple[list[str], Array]:
    """Texts and their times, float64[U, 2] of (start, end). Raises ValueError as `text_pieces`."""
    try:
        rows = [_UTTERANCE(entry) for entry in narrative["timed_caption"]]
        times = np.array([row[1:] for row in rows], dtype=np.float64).reshape(-1, 2)
        texts = [row[0] for row in rows]
        if not all(isinstance(text, str) for text in texts):
            raise TypeError("an utterance is not a string")
    except (KeyError, TypeError, ValueError) as error:
        fields = "utterance, start_time and end_time"
        raise ValueError(f"timed_caption: every entry needs {fields} ({error!r})") from error
    if not np.isfinite(times).all():
        raise ValueError("timed_caption: a time is not a finite number")
    return texts, times


_XYT = itemgetter("x", "y", "t")
_UTTERANCE = itemgetter("utterance", "start_time", "end_time")


def average_trace(trace: Trace, times: Array) -> Places:
    """Exact time average and extent of the trace over spans of time, without extrapolation.

    Each span is cut to the time the pointer was in the image. Between the points of a segment
    the pointer rested or moved straight; a break counts for nothing. A span that lies wholly in
    a break, before or after the trace takes the nearest moment of the trace if that is at most
    `MAX_DISTANCE` seconds away, else nothing.

    Args:
        times: float64[U, 2], (start, end); reversed spans are turned round.
    """
    start, end, known = _cut_to_trace(trace, times.min(1), times.max(1))
    first, last = _position(trace, start), _position(trace, end)  # (U, 2)
    duration, area = _integrals(trace, np.concatenate([start, end]), np.concatenate([first, last]))
    duration, area = (np.subtract(*np.split(sums, 2)[::-1]) for sums in (duration, area))
    is_moment = (duration < MIN_DURATION)[:, None]
    centers = np.where(is_moment, (first + last) / 2, area / np.maximum(duration, 1e-9)[:, None])
    low, high = _extent(trace, start, end)
    low, high = np.minimum(low, np.minimum(first, last)), np.maximum(high, np.maximum(first, last))
    centers = np.clip(centers, low, high)  # rounding of the integrals
    centers[~known] = np.nan
    return Places(centers, np.where(known[:, None], np.concatenate([low, high], axis=1), np.nan))


def _cut_to_trace(trace: Trace, start: Array, end: Array) -> tuple[Array, Array, NDArray[np.bool_]]:
    """Spans cut to the stretches between breaks, and whether any is near enough."""
    after = np.flatnonzero(trace.breaks) + 1
    begins = trace.times[np.concatenate([[0], after])]
    ends = trace.times[np.concatenate([after - 1, [-1]])]
    next_begin = np.append(begins, np.inf)[np.searchsorted(ends, start, side="left")]
    last_end = np.insert(ends, 0, -np.inf)[np.searchsorted(begins, end, side="right")]
    inside_start, inside_end = np.maximum(start, next_begin), np.minimum(end, last_end)
    is_away = inside_start > inside_end
    ahead, behind = next_begin - end, start - last_end
    nearest = np.where(ahead < behind, next_begin, last_end)
    known = ~is_away | (np.minimum(ahead, behind) <= MAX_DISTANCE)
    start, end = (np.where(is_away, nearest, inside) for inside in (inside_start, inside_end))
    return start, end, known


def _position(trace: Trace, times: Array) -> Array:
    x, y = trace.points.T
    return np.stack([np.interp(times, trace.times, x), np.interp(times, trace.times, y)], axis=1)


def _integrals(trace: Trace, times: Array, positions: Array) -> tuple[Array, Array]:
    """Integrals of 1 and of the position from the trace's start to each time, without breaks."""
    step = np.where(trace.breaks, 0.0, np.diff(trace.times))  # (M - 1,)
    duration = np.concatenate([[0.0], np.cumsum(step)])
    areas = step[:, None] * (trace.points[1:] + trace.points[:-1]) / 2
    area = np.concatenate([np.zeros((1, 2)), np.cumsum(areas, axis=0)])
    index = np.searchsorted(trace.times, times, side="right") - 1
    rest = times - trace.times[index]
    mean = (trace.points[index] + positions) / 2
    return duration[index] + rest, area[index] + rest[:, None] * mean


def _extent(trace: Trace, start: Array, end: Array) -> tuple[Array, Array]:
    """Smallest and largest trace point within each span; (inf, -inf) where there is none."""
    first = np.searchsorted(trace.times, start, side="left")
    stop = np.searchsorted(trace.times, end, side="right")
    bounds = np.stack([first, np.maximum(stop, first)], axis=1).ravel()
    is_empty = (stop <= first)[:, None]
    padded = np.concatenate([trace.points, trace.points[-1:]])  # reduceat needs a row at M
    low = np.minimum.reduceat(padded, bounds, axis=0)[::2]
    high = np.maximum.reduceat(padded, bounds, axis=0)[::2]
    return np.where(is_empty, np.inf, low), np.where(is_empty, -np.inf, high)


def sample_trace(trace: Trace, times: Array, num_samples: int = NUM_SAMPLES) -> Places:
    """The official places: equally spaced samples, linearly extrapolated beyond the trace.

    Centre = trapezoid mean over time, plain mean for spans below `MIN_DURATION` (reversed ones
    too); box = extent of the samples. Nothing is clipped.
    """
    start, end = times[:, 0], times[:, 1]
    at = np.linspace(start, end, num_samples, axis=1)  # (U, S)
    right = np.clip(np.searchsorted(trace.times, at), 1, len(trace.times) - 1)
    before, after = trace.times[right - 1], trace.times[right]
    with np.errstate(divide="ignore", invalid="ignore"):  # equal times: nowhere, as official
        slope = (trace.points[right] - trace.points[right - 1]) / (after - before)[..., None]
        samples = trace.points[right - 1] + slope * (at - before)[..., None]  # (U, S, 2)
        areas = (samples[:, 1:] + samples[:, :-1]) / 2 * np.diff(at, axis=1)[..., None]
        integral = areas.sum(1) / (end - start)[:, None]
    is_moment = (end - start < MIN_DURATION)[:, None]
    centers = np.where(is_moment, samples.mean(1), integral)
    return Places(centers, np.concatenate([samples.min(1), samples.max(1)], axis=1))


def match_utterances(caption: str, utterances: Sequence[str]) -> list[tuple[int, int] | None]:
    """Characters [start, end) of the caption for each utterance, in order; None = not found.

    Letters and digits are compared, without case. Where the texts differ, words are matched by
    difflib, and characters between matched words; an utterance counts as found when `MIN_MATCH`
    of its characters are. Punctuation goes with the word it touches.
    """
    place = iter(_match_characters(caption, " ".join(utterances)))
    spans: list[tuple[int, int] | None] = []
    for text in utterances:
        letters = [next(place) for char in text if char.isalnum()]
        found = [i for i in letters if i is not None]
        is_found = bool(found) and len(found) >= MIN_MATCH * len(letters)
        spans.append((found[0], found[-1] + 1) if is_found else None)
    return _widen_to_words(caption, spans)


def _match_characters(caption: str, speech: str) -> list[int | None]:
    """For each spoken letter its index in the caption."""
    position = [i for i, char in enumerate(caption) if char.isalnum()]
    written = [caption[i].lower() for i in position]
    spoken = [char.lower() for char in speech if char.isalnum()]
    if written == spoken:
        return position
    place: list[int | None] = [None] * len(spoken)
    left, right = _word_bounds(caption), _word_bounds(speech)
    left_words = ["".join(written[a:b]) for a, b in left]
    right_words = ["".join(spoken[a:b]) for a, b in right]
    matcher = SequenceMatcher(None, left_words, right_words, autojunk=False)
    for tag, i, i_end, j, j_end in matcher.get_opcodes():
        if tag in ("insert", "delete"):
            continue
        a, a_end, b, b_end = left[i][0], left[i_end - 1][1], right[j][0], right[j_end - 1][1]
        inner = SequenceMatcher(None, written[a:a_end], spoken[b:b_end], autojunk=False)
        for x, y, size in inner.get_matching_blocks():
            place[b + y : b + y + size] = position[a + x : a + x + size]
    return place


def _word_bounds(text: str) -> list[tuple[int, int]]:
    """Words as [start, end) among the letters and digits of `text`."""
    lengths = [sum(map(str.isalnum, word)) for word in text.split()]
    ends = np.cumsum([length for length in lengths if length]).tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True)) if ends else []


def _widen_to_words(
    caption: str, spans: list[tuple[int, int] | None]
) -> list[tuple[int, int] | None]:
    """Spans with what is left of their words: punctuation, and letters of no other span."""
    widened: list[tuple[int, int] | None] = []
    previous = 0
    for index, span in enumerate(spans):
        if span is not None:
            start, end = span
            stop = next((after[0] for after in spans[index + 1 :] if after), len(caption))
            start -= len(re.search(r"\S*\Z", caption[previous:start])[0])
            end += len(re.match(r"\S*", caption[end:stop])[0])
            span, previous = (start, end), end
        widened.append(span)
    return widened


def words_of(caption: str) -> list[tuple[int, int]]:
    """Characters [start, end) of the words, separated by blanks."""
    return [match.span() for match in re.finditer(r"\S+", caption)]


def assign_tokens(pieces: Sequence[Piece], offsets: Sequence[tuple[int, int]]) -> NDArray[np.int64]:
    """Index of the piece each token belongs to; -1 where it points nowhere.

    Pieces with characters (`text_pieces`) take the tokens that overlap them most; pieces without
    (`rank_pieces`) take them by the official rule on relative order.

    Args:
        pieces: of one alignment, in order.
        offsets: characters [start, end) of every token in the caption, as a fast tokenizer
            returns them; an empty span marks a special token.
    """
    spans = np.array(offsets, dtype=np.int64).reshape(-1, 2)
    if not pieces:
        return np.full(len(spans), -1)
    if pieces[0].start < 0:
        return _assign_by_rank(pieces, spans[:, 1] > spans[:, 0])
    bounds = np.array([(piece.start, piece.end) for piece in pieces])
    begin, end = np.maximum(spans[:, None], bounds), np.minimum(spans[:, None], bounds)
    overlap = end[..., 1] - begin[..., 0]  # (T, P)
    best = overlap.argmax(1)
    known = np.array([piece.center is not None for piece in pieces])
    return np.where((overlap.max(1) > 0) & known[best], best, -1)


def _assign_by_rank(pieces: Sequence[Piece], is_word: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Nearest relative position, in float64 like the official loader, where ties are common."""
    valid = np.array([p.center is not None and min(p.center) > 1e-5 for p in pieces])
    assigned = np.full(len(is_word), -1)
    if not valid.any() or not is_word.any():
        return assigned
    ranks = np.arange(1, valid.sum() + 1) / valid.sum()
    places = np.arange(1, is_word.sum() + 1) / is_word.sum()
    places = places * (ranks[-1] - ranks[0]) + ranks[0]
    nearest = np.abs(places[:, None] - ranks).argmin(1)
    assigned[is_word] = np.flatnonzero(valid)[nearest]
    return assigned


def token_boxes(pieces: Sequence[Piece], offsets: Sequence[tuple[int, int]]) -> NDArray[np.float32]:
    """float32[T, 4] xyxy in [0, 1] of the image, NaN where a token points nowhere."""
    return _gather([piece.box for piece in pieces], assign_tokens(pieces, offsets), 4)


def token_centers(
    pieces: Sequence[Piece], offsets: Sequence[tuple[int, int]]
) -> NDArray[np.float32]:
    """float32[T, 2] (x, y) in [0, 1], NaN where a token points nowhere."""
    return _gather([piece.center for piece in pieces], assign_tokens(pieces, offsets), 2)


def _gather(values: list[Any], index: NDArray[np.int64], width: int) -> NDArray[np.float32]:
    rows = [value if value is not None else (np.nan,) * width for value in values]
    table = np.array([*rows, (np.nan,) * width], dtype=np.float32)
    return np.clip(table[index], 0, 1)  # index -1 is the NaN row


def token_points_px(
    pieces: Sequence[Piece],
    offsets: Sequence[tuple[int, int]],
    size: tuple[int, int],
    points_per_side: int = 0,
) -> NDArray[np.float32]:
    """Token points as the official loader gives them: pixels, rounded, 0 where there is none.

    Args:
        size: (H, W) of the image.
        points_per_side: 0 for the two corners of the box (the paper's), -1 for the centre, n for
            the middles of an n x n grid of cells.

    Returns:
        float32[T, points, 2]; the grid is in row-major order.
    """
    scale = np.array(size[::-1], dtype=np.float32)
    if points_per_side == -1:
        return np.nan_to_num(np.rint(token_centers(pieces, offsets) * scale))[:, None]
    corners = np.nan_to_num(np.rint(token_boxes(pieces, offsets).reshape(-1, 2, 2) * scale))
    if points_per_side < 1:
        return corners
    cells = (np.arange(points_per_side, dtype=np.float32) + 0.5) / points_per_side
    y, x = np.meshgrid(cells, cells, indexing="ij")
    grid = np.stack([x.ravel(), y.ravel()], axis=1)  # (points, 2)
    return corners[:, :1] + grid * (corners[:, 1:] - corners[:, :1])
