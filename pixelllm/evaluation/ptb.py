"""Penn Treebank tokens of a caption, as COCO caption evaluation counts them, without Java.

COCO runs Stanford's PTBTokenizer 3.4.1 (`-preserveLines -lowerCase`) and drops punctuation. That
lexer takes the longest match of its rules at every place, what must follow included in the
length. The rules below were written for the same results on English text;
`benchmarks/ptb_agreement.py` measures how often they agree with the Java program.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

# Dropped by COCO. It lists the brackets in capitals, so "-lrb-" and "-rrb-" stay in the captions.
PUNCTUATION = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"])
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_QUOTES = {ord(c): ascii for ascii, kind in
           {"`": "\x91‘‛‹", "'": "\x92’›", "``": "\x93“«", "''": "\x94”»"}.items()
           for c in kind}  # fmt: skip
# Two words written as one: where the second begins.
_CONTRACTIONS = {"cannot": 3, "gonna": 3, "gotta": 3, "lemme": 3, "gimme": 3, "wanna": 3}
_PLAIN = re.compile(r"[A-Za-z]+(?=\s)")  # a word that no rule can treat specially, nearly all


def tokenize(caption: str, following: str = "") -> list[str]:
    """Lower-case tokens without punctuation; empty where nothing remains.

    A fraction such as "3 1/2" or a telephone number is one token with no-break spaces in it.
    Characters that the lexer does not know (emoji, most of all) are dropped, as it drops them.

    Args:
        caption: line breaks in it count as blanks.
        following: the next caption of the file, if any. COCO tokenises all captions as one text,
            and a last "K." loses its period where the next caption begins with a word like "The".
    """
    line = " ".join(caption.splitlines())
    text = f"{line}\n{following}\n"
    tokens, place = [], 0
    while place < len(line):
        length, found = _next(text, place)
        tokens += [token for token in found if token not in PUNCTUATION]
        place += length
    return tokens


def _next(text: str, place: int) -> tuple[int, list[str]]:
    """Number of characters read at `place` and the tokens they give."""
    plain = _PLAIN.match(text, place)
    if plain and (word := plain[0].lower()) not in _CONTRACTIONS:
        return len(word), [word]
    if text[place].isspace():
        return 1, []
    best, normalise = None, _drop
    for pattern, candidate in _patterns():
        match = pattern.match(text, place)
        if match and (best is None or match.end() > best.end()):
            best, normalise = match, candidate
    if best is None:
        return 1, []
    return len(best[1]), normalise(best[1])


def _keep(token: str) -> list[str]:
    return [token.lower().replace("\u00ad", "").replace(" ", "\u00a0")]


def _drop(token: str) -> list[str]:
    return []


def _unescape(token: str) -> list[str]:
    for entity, character in (("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">")):
        token = token.replace(entity, character)
    return _keep(token)


def _quote(token: str) -> list[str]:
    """Quotes and apostrophes of any kind as ASCII; pairs of one kind are dropped afterwards."""
    return [token.lower().replace("&apos;", "'").translate(_QUOTES)]


def _split(token: str) -> list[str]:
    second = _CONTRACTIONS[token.lower()]
    return [token[:second].lower(), token[second:].lower()]


def _bracket(token: str) -> list[str]:
    """Brackets of a smiley are spelled out too: ":)" becomes ":-rrb-"."""
    spelled = "".join(_BRACKETS.get(c, c) if c in "()" else c for c in token.lower())
    return [spelled.replace(" ", "\u00a0")]


def _symbol(token: str) -> list[str]:
    fractions = {"¼": "1/4", "½": "1/2", "¾": "3/4", "⅓": "1/3"}
    currencies = {"¢": "cents", "£": "#", "€": "$", "¤": "$", "\x80": "$", "\u20a0": "$"}
    return [(_BRACKETS | fractions | currencies).get(token, token.lower())]


# Abbreviations that keep their period, whatever follows. "in." and "oz." are not among them.
_ABBREVIATIONS = """
jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec|mon|tues?|wed|thu|thurs|fri
ala|ariz|calif|colo|conn|ct|dak|fla|ga|ind|kans?|ky|md|mich|minn|mo|mont|neb|nev|okla|penn|tenn
va|vt|wisc?|wyo|(?-i:A)z|(?-i:A)rk|(?-i:D)el|(?-i:I)ll|(?-i:L)a|(?-i:M)ass|(?-i:M)iss
(?-i:O)re|(?-i:P)a|(?-i:T)ex|(?-i:W)ash
inc|cos?|corp|pp?t[ey]s?|ltd|plc|rt|bancorp|bhd|assn|univ|intl|sys|invt|elec|natl|m[ft]g|dept
ed\\.d|ph\\.d|tel|est|ext|sq|ft|ph|bldg|blvd|rd|ave|jr|sr|bros|esq|etc|al|seq|vs|cf
alex|wm|jos|cie|treas|m[rs]|mrs|drs?|profs?|sens?|reps?|attys?|lt|col|gen|messrs|govs?|adm|rev
maj|sgt|cpl|pvt|mt|capt|ste?|pres|lieut|hon|brig|co?mdr|pfc|spc|supts?|det|adj|adv|asst|assoc
ens|insp|mlle|mme|msgr|sfc
""".strip().replace("\n", "|")
_BEFORE_NUMBERS = "ca|figs?|prop|nos?|art|pp|op"
# Words that begin a sentence: "I." before one of them is a word and a full stop.
_OPENERS = (
    "About|According|Additionally|After|An|A|As|At|But|Earlier|He|Her|Here|However|If|In|It|Last|"
    r"Many|More|Mr\.|Ms\.|Now|Once|One|Other|Our|She|Since|So|Some|Such|That|The|Then|There|"
    "These|They|This|We|When|While|What|Yet|You"
)
_NOT_LETTERS = "²³¹¼-¾⁰-₟⅐-⅟①-⓿"  # alphanumeric for Python, signs for the lexer
_LETTER = rf"(?:[^\W\d_{_NOT_LETTERS}]|[\u00ad\u0300-\u036f]|&[aeiou](?:acute|grave|uml);)"
_ALNUM = rf"[^\W_{_NOT_LETTERS}]"
_APOSTROPHE = r"(?:['\x92’]|&apos;)"
_ANY_APOSTROPHE = r"(?:['`\x91\x92‘’‛]|&apos;)"
_WORD = rf"{_LETTER}(?:{_LETTER}|\d)*(?:[.!?]{_LETTER}(?:{_LETTER}|\d)*)*"
_CLITIC = rf"{_APOSTROPHE}(?:[msd]|re|ve|ll)"
_NOT = rf"n{_ANY_APOSTROPHE}t"
_ELISION = rf"(?:[dol]{_ANY_APOSTROPHE}(?={_ALNUM}))?"
_HYPHENATED = rf"{_ELISION}{_ALNUM}+(?:[-_\u058a‐‑]{_ELISION}{_ALNUM}+)*"
_ACRONYM = r"[A-Za-z](?:\.[A-Za-z])"
_DOTTED = rf"[A-Za-z0-9][A-Za-z0-9.,\u00ad]*(?:-(?:{_ACRONYM}+\.|[A-Za-z0-9\u00ad]+))+"
_JOINED = r"(?-i:[A-Z]+(?:(?:&amp;|[+&])[A-Z]+)+)"  # AT&T
_TAG = r"[A-Za-z][\w:.-]*"
_VALUE = rf"""(?:'[^']*'|"[^"]*"|{_TAG})"""
_PATH = r"""[^\s"<>|()]+[^\s"<>|.!?(){},-]"""
# Case matters in the host: its range from comma to underscore includes the capitals.
_HOST = r"""(?:(?-i:[^\s"`'<>|.!?()$,-_{}]+)\.)+(?:com|net|org|edu)"""
_DOMAIN = r"""[^\s"<>|(){}.]+"""
_SLASHED = r"[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}"
_AREA = r"(?:\(\d{2,3}\)[ \u00a0]?|\+{0,2}(?:\d{2,4}[- \u00a0])?\d{2,4}[- \u00a0])"
_EYE = r"[-^x=~<>']"


class _Rule(NamedTuple):
    becomes: Callable[[str], list[str]]
    token: str
    before: str = ""  # what must follow the token; part of the length that decides


# In this order: of two matches of one length the first rule wins.
_RULES = [
    # Words and entities
    _Rule(_split, "|".join(_CONTRACTIONS)),
    _Rule(_keep, "'t", "is|was"),
    _Rule(_keep, rf"<(?:[!?][A-Za-z-][^>]*|/{_TAG}|{_TAG}(?: +{_TAG}(?: *= *{_VALUE})?)* */?) *>"),
    _Rule(_drop, r"&(?:MD|mdash|ndash);|[\x96\x97–—―]"),
    _Rule(_unescape, r"&amp;|&lt;|&gt;|<<|>>"),
    _Rule(_keep, r"&(?:HT|TL|UR|LR|QC|QL|QR|odq|cdq|#\d+);"),
    _Rule(_keep, _WORD, _CLITIC),
    _Rule(_keep, r"[A-Za-z\u00ad]*[A-MO-Za-mo-z]\u00ad*", _NOT),
    _Rule(_keep, _WORD),
    _Rule(_keep, rf"{_APOSTROPHE}(?:em|till?|cause|[2-9]0s|n{_APOSTROPHE}?)"),
    _Rule(_keep, rf"(?:[ldj]|dunkin|somethin|ol){_APOSTROPHE}"),
    _Rule(_keep, rf"(?-i:[A-HJ-XZn]){_ANY_APOSTROPHE}{_LETTER}{{2,}}"),
    _Rule(_keep, rf"{_LETTER}+[aeiouy]{_ANY_APOSTROPHE}(?-i:[aeiouA-Z]){_LETTER}*"),
    _Rule(_keep, r"cont'd\.?|nor'easter|c'mon|e'er|s'mores|ev'ry|li'l|nat'l"),
    _Rule(_keep, rf"y{_APOSTROPHE}", _LETTER),
    # Addresses
    _Rule(_keep, rf"(?:ftp|https?)://{_PATH}"),
    _Rule(_keep, rf"www\.(?:[^\s\"<>|.!?(){{}},]+\.)+[A-Za-z]{{2,4}}(?:/{_PATH})?"),
    _Rule(_keep, rf"{_HOST}(?:/{_PATH})?"),
    _Rule(_keep, rf"[A-Za-z0-9][^\s\"<>|(){{}}]*@(?:{_DOMAIN}\.)*{_DOMAIN}>?"),
    _Rule(_keep, rf"@[A-Za-z_][A-Za-z_0-9]*|#{_LETTER}+"),
    # Numbers
    _Rule(_quote, _CLITIC, "[^A-Za-z]"),
    _Rule(_quote, _NOT),
    _Rule(_keep, r"\d{1,2}[-/]\d{1,2}[-/]\d{2,4}"),
    _Rule(_keep, r"[-+]?(?:\d+(?:[.:,\u00ad]\d+)*|(?:[.:,]\d+)+)"),
    _Rule(_keep, r"[⁺⁻₊₋]?(?:[⁰¹²³⁴-⁹]+|[₀-₉]+)"),
    _Rule(_keep, r"(?:\d{1,4}[- \u00a0])?\d{1,4}(?:\\?/|\u2044)\d{1,4}"),
    _Rule(_bracket, rf"{_AREA}\d{{3,4}}[- \u00a0]?\d{{3,5}}"),
    _Rule(_keep, r"\+{0,2}(?:\d{2,4}\.)?\d{2,4}\.\d{3,4}\.\d{3,5}"),
    _Rule(_keep, rf"{_SLASHED}(?:\\?/{_SLASHED}){{1,2}}"),
    _Rule(_keep, r"(?-i:[A-Z]*\$)|#|C\+\+"),
    # Abbreviations
    _Rule(_unescape, r"-[lr][rcs]b-|C\.D\.s|pro-|anti-|S&(?:amp;)?P-500|S&(?:amp;)?Ls"),
    _Rule(_keep, rf"cap{_APOSTROPHE}n|c{_APOSTROPHE}est"),
    _Rule(_keep, rf"(?:{_ABBREVIATIONS}|{_ACRONYM}*)\."),
    _Rule(_keep, r"[A-Za-z]", rf"\.\s+(?-i:{_OPENERS})\s"),
    _Rule(_keep, rf"(?:{_BEFORE_NUMBERS})\.", r"\s?\d"),
    _Rule(_keep, rf"{_APOSTROPHE}\d\d", r"\s"),
    _Rule(_unescape, rf"(?:{_WORD}|{_HYPHENATED}|{_DOTTED}|{_JOINED})\.", "[,;:]"),
    # Signs, hyphens and quotes
    _Rule(_drop, r"&quot;|&nbsp;|\.{3,}|\.[ \u00a0](?:\.[ \u00a0])+\.|---?-?(?!-)"),
    _Rule(_bracket, r"[<>]?[:;=][-o*']?(?-i:[()DPdpO\\:{@|\[\]])", "[^A-Za-z0-9]"),
    _Rule(_bracket, rf"[\^x=~<>]\.[\^x=~<>]|{_EYE}_{_EYE}|\({_EYE}[_.]?{_EYE}\)"),
    _Rule(_keep, r"-+|@+|_+|\*+|#+|[?!]+"),
    _Rule(_keep, _DOTTED),
    _Rule(_keep, _HYPHENATED),
    _Rule(_unescape, _JOINED),
    _Rule(_drop, "'", r"[A-Za-z]\S"),
    _Rule(_quote, _CLITIC),
    _Rule(_quote, r"[`\x91-\x94‘-‟‹›«»]{1,2}"),
    _Rule(_drop, r"""''|['"…\x85]|&apos;"""),
    # Any other sign of the basic plane that the lexer knows, roughly.
    _Rule(_symbol, r"[!-/:-@\[-`{-~\x80¡-¿×÷†-€℀-➿、。！-･]"),
]


@cache
def _patterns() -> list[tuple[re.Pattern, Callable[[str], list[str]]]]:
    """Group 1 is the token."""
    return [(re.compile(f"({r.token})(?:{r.before})", re.I), r.becomes) for r in _RULES]
