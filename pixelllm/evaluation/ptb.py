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

# Dropped by COCO. It lists the brackets in capitals, so "-lrb-" and "-rrb-" stay in the captions.
PUNCTUATION = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"])
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
# Two words written as one: where the second begins.
_CONTRACTIONS = {"cannot": 3, "gonna": 3, "gotta": 3, "lemme": 3, "gimme": 3, "wanna": 3,
                 "'tis": 2, "'twas": 2}  # fmt: skip
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
    for pattern, candidate in _rules():
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


def _clitic(token: str) -> list[str]:
    straight = re.sub(r"&apos;|[\x92\u2019]", "'", token.lower())
    return [re.sub(r"[\x91\u2018\u201b]", "`", straight)]


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
_FILES = (
    "bat|bmp|bz2|cgi|class|cpp|dll|docx?|exe|gif|gz|html?|jar|java|jpe?g|mov|mp[34g]|pdf|php|pl|"
    "png|ppt|ps|py|sql|tar|txt|wav|xml|zip|3gp|wm[va]|avi|flv|[chx]"
)


@cache
def _rules() -> list[tuple[re.Pattern, Callable[[str], list[str]]]]:
    """(pattern, what its group 1 becomes); on equal length the first rule wins."""
    no_letters = "²³¹¼-¾⁰-₟⅐-⅟①-⓿"
    letter = rf"(?:[^\W\d_{no_letters}]|[\u00ad\u0300-\u036f]|&[aeiou](?:acute|grave|uml);)"
    alnum = rf"[^\W_{no_letters}]"
    apostrophe = r"(?:['\x92\u2019]|&apos;)"
    any_apostrophe = r"(?:['\x91\x92\u2018\u2019\u201b]|&apos;)"
    word = rf"{letter}(?:{letter}|\d)*(?:[.!?]{letter}(?:{letter}|\d)*)*"
    clitic = rf"{apostrophe}(?:[msd]|re|ve|ll)"
    number = r"(?:\d+(?:[.:,\u00ad]\d+)*|(?:[.,]\d+)+)"
    acronym = r"[A-Za-z](?:\.[A-Za-z])+"
    elision = rf"(?:[dol]{any_apostrophe}(?={alnum}))?"
    compound = rf"{elision}{alnum}+(?:[-_\u058a\u2010\u2011]{elision}{alnum}+)*"
    dotted = rf"[A-Za-z0-9][A-Za-z0-9.,\u00ad]*(?:-(?:{acronym}\.|[A-Za-z0-9\u00ad]+))+"
    joined = r"(?-i:[A-Z]+(?:(?:&amp;|[+&])[A-Z]+)+)"
    slashed = rf"{alnum}+(?:-[A-Za-z]+){{0,2}}"
    url_part, url_end = r"""[^\s"<>|()]+""", r"""[^\s"<>|.!?(){},-]"""
    name = r"[A-Za-z][\w:.-]*"
    pairs = [
        ("|".join(_CONTRACTIONS), "", _split),
        (rf"<(?:[!?][A-Za-z-][^>]*|/{name}|{name}(?: +{name}(?: *= *(?:'[^']*'|\"[^\"]*\"|{name}))?)* */?) *>",
         "", _keep),
        (r"&(?:MD|mdash|ndash);|[\x96\x97\u2013-\u2015]", "", _drop),
        (r"&amp;|&lt;|&gt;|<<|>>", "", _unescape),
        (r"&(?:HT|TL|UR|LR|QC|QL|QR|odq|cdq|#\d+);", "", _keep),
        (word, clitic, _keep),
        (r"[A-Za-z\u00ad]*[A-MO-Za-mo-z]\u00ad*", rf"n{any_apostrophe}t", _keep),
        (word, "", _keep),
        (rf"{apostrophe}n{apostrophe}?|[ldj]{apostrophe}|(?:dunkin|somethin|ol){apostrophe}", "", _keep),
        (rf"{apostrophe}(?:em|till?|cause|[2-9]0s)|(?-i:[A-HJ-XZn]){any_apostrophe}{letter}{{2,}}", "", _keep),
        (rf"{letter}+[aeiouy]{any_apostrophe}(?-i:[aeiouA-Z]){letter}*", "", _keep),
        (r"cont'd\.?|nor'easter|c'mon|e'er|s'mores|ev'ry|li'l|nat'l", "", _keep),
        (rf"y{apostrophe}", letter, _keep),
        (rf"(?:(?:ftp|https?)://){url_part}{url_end}", "", _keep),
        (rf"www\.(?:[^\s\"<>|.!?(){{}},]+\.)+[A-Za-z]{{2,4}}(?:/{url_part}{url_end})?", "", _keep),
        (rf"(?:(?-i:[^\s\"`'<>|.!?()\x24,-_{{}}]+)\.)+(?:com|net|org|edu)(?:/{url_part}{url_end})?", "", _keep),
        (r"[A-Za-z0-9][^\s\"<>|()]*@(?:[^\s\"<>|().]+\.)*[^\s\"<>|().,;:]+", "", _keep),
        (rf"@[A-Za-z_][A-Za-z_0-9]*|#{letter}(?:{letter}|\d|_)*(?:{letter}|\d)", "", _keep),
        (clitic, "[^A-Za-z]", _clitic),
        (rf"n{any_apostrophe}t", "", _clitic),
        (rf"\d{{1,2}}[-/]\d{{1,2}}[-/]\d{{2,4}}|[-+]?{number}", "", _keep),
        (r"[⁺⁻₊₋]?(?:[⁰¹²³⁴-⁹]+|[₀-₉]+)", "", _keep),
        (r"(?:\d{1,4}[- \u00a0])?\d{1,4}(?:\\?/|\u2044)\d{1,4}", "", _keep),
        (rf"-[lr][rcs]b-|C\.D\.s|pro-|anti-|S&(?:amp;)?P-500|S&(?:amp;)?Ls|cap{apostrophe}n|c{apostrophe}est",
         "", _unescape),
        (rf"{slashed}(?:\\?/{slashed}){{1,2}}", "", _keep),
        (rf"{alnum}+(?:[-._/]{alnum}+)*\.(?:{_FILES})", r"[\s.?!,\"'<()]", _keep),
        (r"(?-i:[A-Z]*\$)|#|C\+\+", "", _keep),
        (rf"(?:{_ABBREVIATIONS}|[A-Za-z](?:\.[A-Za-z])*)\.", "", _keep),
        (r"[A-Za-z]", rf"\.\s+(?-i:{_OPENERS})\s", _keep),
        (rf"(?:{_BEFORE_NUMBERS})\.", r"\s?\d", _keep),
        (rf"{apostrophe}\d\d", r"\s", _keep),
        (rf"(?:{word}|{compound}|{dotted}|{joined})\.", "[,;:]", _unescape),
        (r"(?:\(\d{2,3}\)[ \u00a0]?|\+{0,2}(?:\d{2,4}[- \u00a0])?\d{2,4}[- \u00a0])\d{3,4}[- \u00a0]?\d{3,5}",
         "", _bracket),
        (r"\+{0,2}(?:\d{2,4}\.)?\d{2,4}\.\d{3,4}\.\d{3,5}", "", _keep),
        (r"&quot;|&nbsp;|\.{3,}|\.[ \u00a0](?:\.[ \u00a0])+\.|---?-?(?!-)", "", _drop),
        (r"[<>]?[:;=][-o*']?[()DPO\\:{@|\[\]]", r"[^A-Za-z0-9]", _bracket),
        (r"[\^x=~<>]\.[\^x=~<>]|[-^x=~<>']_[-^x=~<>']|\([-^x=~<>'][_.]?[-^x=~<>']\)", "", _bracket),
        (r"-+|@+|_+|\*+|#+|[?!]+", "", _keep),
        (dotted, "", _keep),
        (compound, "", _keep),
        (joined, "", _unescape),
        (clitic, "", _clitic),
        (r"['\"`\x91-\x94\u2018-\u201f\u2039\u203a«»\u2026\x85]|&apos;", "", _drop),
        # Any other symbol of the basic plane that the lexer knows.
        (r"[!-/:-@\[-`{-~\x80¡-¿×÷\u2020-\u20ac\u2100-\u27bf\u3001\u3002\uff01-\uff65]", "", _symbol),
    ]  # fmt: skip
    return [(re.compile(f"({token}){after}", re.I), what) for token, after, what in pairs]
