"""A pure-Python Penn-Treebank-style tokenizer for machines without Java.

Published caption scores are computed on tokens of Stanford's PTBTokenizer (CoreNLP 3.4.1, ``-preserveLines
-lowerCase``) with punctuation removed, as pycocoevalcap calls it. This module gives the same tokens. It was
written from the Penn Treebank's tokenization conventions (contractions are split: *ca n't*, *dog 's*, *gon
na*; brackets become *-lrb-*) and from what the Java program answers to probes;
``tests/tasks/test_ptb_tokenizer.py`` holds it to that.

How it works: the captions are joined by line ends and read from left to right. At each place every rule is
tried and the longest match wins, the earlier rule on a tie, as a lexer generator does it. A rule with a group
takes only the group as its token; what follows the group is context that counts for the length (*ca* in front
of *n't* beats *can*).

Where it differs: rare scripts and symbols newer than 2014 are told apart by today's Unicode, and exotic
mark-up and addresses may be cut elsewhere. English captions are not concerned.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

# Removed from the tokens of a caption. The brackets stand here in upper case and the tokens are lower case,
# so brackets stay in published scores; so do doubled marks such as "!!".
PUNCTUATION = frozenset(
    ["''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";"]
)

# Abbreviations that keep their full stop. Single letters do as well.
_ABBREVIATIONS = (
    "adj adm adv al ala alex apr ariz assn assoc asst atty aug ave bhd bldg blvd brig bros calif capt cf "
    "cie cmdr co col colo comdr conn corp cos cpl ct dak dec dept det dr drs elec ens esq est etc ext feb "
    "fla fri ft ga gen gov hon inc ind insp intl invt jan jos jr jul jun kan kans ky lt ltd maj mar md "
    "messrs mfg mich minn mlle mme mo mon mont mr mrs ms msgr mt mtg natl neb nev nov oct okla penn pfc ph "
    "plc pres prof pte pty pvt rd rep reps rev rt sen sens sep sept seq sfc sgt spc sq sr st ste supt sys "
    "tel tenn thu thurs treas tue tues univ va vs vt wed wis wisc wm wyo"
).split()
_CAPITALISED_ABBREVIATIONS = "ark az del ill la mass miss ore pa tex wash".split()
_ABBREVIATIONS_BEFORE_NUMBERS = "art ca fig figs no nos op pp prop".split()
# A single letter and a full stop in front of one of these ends a sentence: "plan B. The dog", but not in
# "J. Smith".
_SENTENCE_STARTERS = (
    "A About According Additionally After An As At But Earlier He Her Here However If In It Last Many More "
    "Mr. Ms. Now Once One Other Our She Since So Some Such That The Their Then There These They This We "
    "What When While Yet You"
).split()
_ASSIMILATIONS = {"cannot": 3, "gonna": 3, "gotta": 3, "lemme": 3, "gimme": 3, "wanna": 3}
_ENTITIES = {"&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": "''", "&apos;": "'", "&nbsp;": ""}

# Characters beyond ASCII that are neither letters nor digits but tokens of their own. All others are dropped.
_SYMBOLS = (
    "\xa1-\xa9\xab\xac\xae-\xb4\xb6-\xb9\xbb-\xbf\xd7\xf7\u2013-\u2023\u2026\u2030-\u203b\u203e-\u2042\u2044"
    "\u2070-\u208e\u20a0\u20a4\u20ac\u2100-\u2149\u2153-\u215e\u2190-\u2bff\u3001\u3002\u3012\u30fb"
    "\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65\uffe0-\uffe6"
)
_APOSTROPHE = "['’]"
_LETTER = f"[^\\x00-@\\[-`{{-\xa9{_SYMBOLS}]"
_LETTER_OR_DIGIT = f"[^\\x00-/:-@\\[-`{{-\xa9{_SYMBOLS}]"


def _one_of(words: Sequence[str]) -> str:
    return "|".join(sorted(words, key=len, reverse=True))


def _fill(pattern: str) -> re.Pattern[str]:
    """Compiles a pattern in which @A is an apostrophe, @L a letter, @W a letter or digit, @E a word's end."""
    pattern = pattern.replace("@A", _APOSTROPHE).replace("@E", f"(?!{_LETTER_OR_DIGIT})")
    return re.compile(pattern.replace("@L", _LETTER).replace("@W", _LETTER_OR_DIGIT))


def _plain(token: str) -> list[str]:
    return [token.lower()]


def _straight(token: str) -> list[str]:
    return [token.lower().replace("’", "'")]


def _brackets(token: str) -> list[str]:
    return [token.lower().replace("(", "-lrb-").replace(")", "-rrb-").replace(" ", "\xa0")]


def _glued(token: str) -> list[str]:
    # One token that holds a blank: Java writes a no-break space, at which pycocoevalcap does not split.
    return [token.lower().replace(" ", "\xa0")]


def _assimilation(token: str) -> list[str]:
    cut = _ASSIMILATIONS[token.lower()]
    return [token[:cut].lower(), token[cut:].lower()]


def _entity(token: str) -> list[str]:
    plain = _ENTITIES[token.lower()]
    return [plain] if plain else []


def _double_quotes(token: str) -> list[str]:
    return [("``" if token[0] in "“«" else "''") * len(token)]


class _Rule(NamedTuple):
    name: str
    pattern: re.Pattern[str]
    emit: Callable[[str], list[str]]


def _rule(name: str, pattern: str, emit: Callable[[str], list[str]] = _plain) -> _Rule:
    return _Rule(name, _fill(pattern), emit)


_CAPITALISED = [form for word in _CAPITALISED_ABBREVIATIONS for form in (word.capitalize(), word.upper())]
_STARTERS = [re.escape(form) for word in _SENTENCE_STARTERS for form in (word, word.upper())]
_STARTER_FOLLOWS = rf"\.\s+(?:{_one_of(_STARTERS)})\s"

_WORDS = (
    _rule("assimilation", rf"(?i:{_one_of(list(_ASSIMILATIONS))})@E", _assimilation),
    _rule("word", r"@W+(?:_@W+)*"),
    _rule("word before a clitic", r"(@L+)@A(?i:s|d|m|ll|re|ve)"),
    _rule("hyphenated word", r"@W+(?:_@W+)*(?:-(?:[dDlLoO]@A(?=@L@L))?@W+(?:_@W+)*)+"),
    _rule(
        "word before a full stop and another mark",
        r"(@W+(?:_@W+)*(?:-(?:[dDlLoO]@A(?=@L@L))?@W+|\.@L@W*)*\.)[,:;]",
    ),
    _rule("hyphenated word with points", r"[A-Za-z0-9][A-Za-z0-9.,]*(?:-[A-Za-z0-9]+)+"),
    _rule("hyphenated acronym", r"(?:@W+\.?-)*(?:[A-Za-z]\.){2,}(?:-(?:(?:[A-Za-z]\.){2,}|@W+))*"),
    _rule("words with slashes", r"[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}(?:/[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}){1,2}"),
    _rule("dotted word", r"@L@W*(?:[.!?]@L@W*)+"),
    _rule("capitals with ampersand", r"[A-Z]+(?:&[A-Z]+)+"),
    _rule("musical key", r"[CF]#@E"),
    _rule("currency of a country", r"[A-Z]{1,2}\$"),
    _rule("degree", r"(?i:ph\.d\.?)"),
    _rule("initial that ends a sentence", rf"([A-Za-z]){_STARTER_FOLLOWS}"),
    _rule("initial", r"[A-Za-z]\."),
    _rule("abbreviation", rf"(?:(?i:{_one_of(_ABBREVIATIONS)})|{_one_of(_CAPITALISED)})\."),
    _rule("abbreviation before a number", rf"((?i:{_one_of(_ABBREVIATIONS_BEFORE_NUMBERS)})\.)\s?\d"),
    _rule(
        "elision",
        r"[dDlLoO]@A@L@L+(?:-(?:[dDlLoO]@A(?=@L@L))?@W+)*|[nN]@A@L@L+|[A-HJKMP-XZ]@A@L@L+|[dDlLjJ]@A|[yY]@A(?=@L)",
    ),
    _rule("vowels", r"@L+[aeiouyAEIOUY]@A[aeiouAEIOU]@L*|@L*[aeiouy]@A[A-Z]@L*"),
    _rule(
        "word with apostrophe", r"(?i:[cC]@A(?:mon|est)|[eno]@Aer|ev@Ary|(?:li|nat)@Al|hallowe@Aen|cap@An)"
    ),
    _rule("word with apostrophe at its end", r"(?i:s@Amores|(?:somethin|dunkin|ol)@A)"),
    _rule("verb before n't", r"(@L*[^\W\d_nN])[nN]@A[tT]"),
    _rule("n't", r"[nN]@A[tT]", _straight),
)
_NUMBERS = (
    _rule("number", r"[-+]?\d+(?:[.,:]\d+)*|[-+]?(?:[.,:]\d+)+"),
    _rule("fraction", r"(?:\d{1,4}[- \xa0])?\d{1,4}\\?/\d{1,4}", _glued),
    _rule(
        "telephone",
        r"(?:\(\d{2,3}\)[ \xa0-]?|\+?(?:\d{2,4}[ \xa0-])?\d{2,4}[ \xa0-])\d{3,4}[ \xa0-]?\d{3,5}",
        _brackets,
    ),
)
_ADDRESSES = (
    _rule("URL", r"(?i:https?)://[^\s\"<>|(){}]+[^\s\"<>|(){}.!?,-]"),
    _rule(
        "host",
        r"(?:www\.(?:[^\s\"<>|()./]+\.)+[A-Za-z]{2,4}|(?:[A-Za-z][A-Za-z0-9]*\.)+(?:com|net|org|edu))"
        r"(?:/[^\s\"<>|()]+[^\s\"<>|().!?,;:-])?",
    ),
    _rule("e-mail", r"<?[A-Za-z0-9][^\s\"<>|(){}]*@(?:[^\s\"<>|(){}.]+\.)*[^\s\"<>|(){}.]+>?"),
)
_MARKS = (
    _rule("clitic", r"'(?i:s|d|m|ll|re|ve)(?![A-Za-z])|’(?i:s|d|m|ll|re|ve)", _straight),
    _rule(
        "word after an apostrophe", r"@A(?i:em|till?|cause)|@A[nN]@A|@A[nN](?=\s|$)|@A\d0[sS]|@A\d\d(?=\s|$)"
    ),
    _rule("'t of 'tis", r"('[tT])(?i:is|was)"),
    _rule(
        "tag",
        r"</?[A-Za-z][\w.:-]*"
        r"(?:[ \t]+[A-Za-z][\w.:-]*(?:[ \t]*=[ \t]*(?:\"[^\"\n]*\"|'[^'\n]*'|[^\s\"'<>]+))?)*[ \t]*/?>"
        r"|<[!?][A-Za-z-][^>\n]*>",
        _glued,
    ),
    _rule("entity", r"&(?i:amp|lt|gt|quot|nbsp|apos);", _entity),
    _rule("mention", r"@[A-Za-z_]\w*"),
    _rule("hashtag", r"#@L+"),
    _rule("smiley", r"[<>]?[:;=][-o']?[()DPp\\|O@\[\]{]@E|\(?\^_\^\)?|-_-", _brackets),
    _rule("ellipsis", r"\.{3,4}", lambda token: ["..."]),
    _rule("dashes", r"-{2,4}", lambda token: ["--"]),
    _rule("many dashes", r"-{5,}"),
    _rule("run of marks", r"\*+|_+|@+|#+|[!?]+|<<|>>"),
    _rule("two single quotes", r"''|’’|[`‘]{2}", lambda token: ["``" if token[0] in "`‘" else "''"]),
    _rule("bracket word", r"(?i:-[lr][rcs]b-)"),
    _rule("double quotes", r"[“«]{1,2}|[”»]{1,2}", _double_quotes),
)
_LETTER_RULES = _WORDS + _ADDRESSES
_DIGIT_RULES = _WORDS + _NUMBERS + _ADDRESSES
_MARK_RULES = _NUMBERS + _ADDRESSES + _MARKS

_SINGLE = {
    **{"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-", '"': "''"},
    **{"‘": "`", "‹": "`", "’": "'", "›": "'", "–": "--", "—": "--", "―": "--", "…": "..."},
    **{"½": "1/2", "¼": "1/4", "¾": "3/4", "¢": "cents", "£": "#", "€": "$", "¤": "$"},
}
# Most words of a caption: no rule takes more of them, so they need not be tried.
_SIMPLE_WORD = re.compile(rf"(?!(?i:{_one_of(list(_ASSIMILATIONS))})[ \n])[A-Za-z]+(?=[ \n])")
_BLANKS = re.compile(r"[ \t\xa0]+")
_LINE_ENDS = re.compile("[\n\r\x0b\x0c\x85\u2028\u2029]+")
_NON_ASCII = re.compile(r"[^\t\n -~]")
_SYMBOL = re.compile(f"[{_SYMBOLS}]")
_OLD_WINDOWS_MARKS = {
    "\x80": "€",
    "\x91": "‘",
    "\x92": "’",
    "\x93": "“",
    "\x94": "”",
    "\x96": "–",
    "\x97": "—",
}


@lru_cache(maxsize=4096)
def _admitted(character: str) -> str:
    """The character if it may be part of a token, else what Java makes of it: nothing or a blank."""
    if character == "\xad":
        return ""
    if character > "\uffff":
        return " "
    combining = "\u0300" <= character <= "\u036f"
    joining = character in "\u2010\u2011"
    if character.isalpha() or character.isdecimal() or combining or joining or _SYMBOL.match(character):
        return character
    return _OLD_WINDOWS_MARKS.get(character, " ")


def one_line(caption: str) -> str:
    """The caption with each line end of any kind replaced by a blank: captions are told apart by lines."""
    return _LINE_ENDS.sub(" ", caption)


def _scan(text: str) -> Iterator[str]:
    """The tokens of a text in order, punctuation and line ends included."""
    place, end = 0, len(text)
    while place < end:
        if blanks := _BLANKS.match(text, place):
            place = blanks.end()
            continue
        if word := _SIMPLE_WORD.match(text, place):
            yield word.group().lower()
            place = word.end()
            continue
        token_end, tokens = _longest(text, place)
        yield from tokens
        place = token_end


def _longest(text: str, place: int) -> tuple[int, list[str]]:
    """Where the longest match at ``place`` ends, and its tokens."""
    first = text[place]
    rules = _LETTER_RULES if first.isalpha() else _DIGIT_RULES if first.isdecimal() else _MARK_RULES
    longest, best, best_rule = place, None, None
    for rule in rules:
        match = rule.pattern.match(text, place)
        if match and match.end() > longest:
            longest, best, best_rule = match.end(), match, rule
    if best is None or best_rule is None:
        return place + 1, [_SINGLE.get(first, first)]
    group = 1 if best_rule.pattern.groups else 0
    return best.end(group), best_rule.emit(best.group(group))


def tokenize_lines(captions: Sequence[str]) -> list[str]:
    """Tokens of each caption: lower case, without punctuation, joined by blanks.

    A line end inside a caption counts as a blank. As with the Java program, whether a single letter in front
    of a full stop ends a sentence (*b* or *b.*) can depend on the first word of the next caption.

    Args:
        captions: any text; an empty caption gives an empty string.

    Returns:
        As many strings as there are captions, in their order.
    """
    text = "".join(f"{one_line(caption)}\n" for caption in captions)
    text = _NON_ASCII.sub(lambda match: _admitted(match.group()), text)
    lines: list[list[str]] = [[]]
    for token in _scan(text):
        if token == "\n":
            lines.append([])
        elif token not in PUNCTUATION:
            lines[-1].append(token)
    return [" ".join(tokens) for tokens in lines[: len(captions)]]
