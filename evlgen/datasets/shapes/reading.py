"""Reads an English caption of coloured shapes into mentions of shapes and claims about them.

Written from the language side for the caption checker: it knows more words than any writer here uses.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_COLOUR = "red|orange|yellow|green|blue|purple|violet|pink|black|white|gr[ea]y|brown"
_SIZE = "small|smaller|little|tiny|large|larger|big|bigger|huge"
_KINDS = {
    "circle": "circles?|discs?|disks?|dots?",
    "square": "squares?|boxe?s?",
    "triangle": "triangles?",
    "star": "stars?",
    "heart": "hearts?",
    "cross": "cross|crosses|plus signs?",
    "any": "shapes?|objects?|figures?|ones?",
}
_COUNTS = {
    "a": 1,
    "an": 1,
    "one": 1,
    "another": 1,
    "the": 0,
    "both": 2,
    "two": 2,
    "pair": 2,
    "three": 3,
    "four": 4,
    "five": 5,
}
_SYNONYMS = {"violet": "purple", "gray": "grey"}
_SIZES = {
    **dict.fromkeys(("small", "smaller", "little", "tiny"), "small"),
    **dict.fromkeys(("large", "larger", "big", "bigger", "huge"), "large"),
}
_PICTURE = "(?:picture|image|photo|photograph|drawing|painting|scene|frame)"
_LEADS = re.compile(  # what only introduces
    rf"\b(?:(?:a|an|the|this) {_PICTURE} (?:of|shows|showing|contains|containing|has|with)|"
    r"(?:we|you|i) (?:can )?(?:see|have)|here (?:is|are)|here|just|only|exactly|together)\b"
)
_IN_PICTURE = re.compile(rf"\b(?:in|of) (?:the|this) {_PICTURE}\b")

_PLACE_WORD = "(?:top|upper|bottom|lower|middle|centre|center|left|right)"
_SIDE_OF = "(?:(?:to|on|at) the )?(?:{0})(?: hand)?(?: side)? of"
_RELATION = {
    "left": _SIDE_OF.format("left"),
    "right": _SIDE_OF.format("right"),
    "above": "above|over|on top of|higher than",
    "below": "below|under|underneath|beneath|lower than",
    "near": "next to|beside|near|close to",
}
_PART = "(?: (?:corner|side|half|part|edge))?"
_RELATION_ANY = "|".join(_RELATION.values())
_ITEMS = [  # first match wins
    ("beside", r"side by side|(?:next to|beside) (?:each other|one another)"),
    ("stacked", r"one (?:above|over|below|under|on top of) (?:the other|another)"),
    ("row", r"in a (?:row|line)|in line|lined up"),
    ("to_it", rf"(?:to|on|at) (?:its|their) (?:left|right)|(?:{_RELATION_ANY}) (?:it|them)"),
    ("place", rf"(?:in|at|on|near|towards?) the {_PLACE_WORD}(?:[ -]{_PLACE_WORD})*{_PART}(?!{_PART} of)"),
    ("relation", _RELATION_ANY),
    ("there", r"there (?:is|are)|there's"),
    ("be", r"(?:is|are)(?: both)?|sits?|stands?|lies"),
    ("and", r"and|plus|as well as"),
    ("with", r"with|along with"),
    ("comma", r"[,;.:]"),
    ("that", r"(?:that|which) (?:is|are)"),
    ("in", r"in"),
    ("of", r"of"),
    ("number", "|".join(sorted(_COUNTS, key=len, reverse=True)) + "|single|couple"),
    ("size", _SIZE),
    ("colour", rf"(?:{_COLOUR})(?:[- ]colou?red)?"),
    ("noun", "|".join(_KINDS.values())),
]
_SCANNER = re.compile("|".join(f"(?P<{name}>(?:{pattern})(?![a-z]))" for name, pattern in _ITEMS))
_NOUN_PHRASE = {"number", "size", "colour", "noun", "that", "of", "in"}


@dataclass
class Mention:
    """A noun phrase. ``same_as``: the earlier mention it repeats; ``part_of``: the plural mention it picks
    from."""

    count: int
    text: str
    kind: str | None = None
    colour: str | None = None
    size: str | None = None
    definite: bool = False
    bare: bool = False  # has no noun of its own: "one", "a red one", "one large"
    same_as: int | None = None
    part_of: int | None = None


@dataclass(frozen=True)
class Claim:
    """What is said of mentions (by index): ``relation`` to other mentions, ``place`` in the image,
    ``arrangement``."""

    about: str
    words: tuple[str, ...]
    subjects: tuple[int, ...]
    objects: tuple[int, ...] = ()
    text: str = ""


@dataclass
class Reading:
    """All that a caption says; ``unknown`` holds what could not be read."""

    mentions: list[Mention] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)


@dataclass
class _Item:
    name: str
    text: str
    mention: int = -1


def read(caption: str) -> Reading:
    """Mentions and claims of a caption; case and a final full stop do not matter."""
    reading = Reading()
    items = _merge_relations(_gather_mentions(_scan(caption, reading), reading))
    _resolve(reading)
    if not reading.unknown:
        _Clauses(items, reading).run()
    return reading


def _scan(caption: str, reading: Reading) -> list[_Item]:
    text = _IN_PICTURE.sub(" ", _LEADS.sub(" ", caption.lower().strip().rstrip(".!")))
    items: list[_Item] = []
    at = 0
    while at < len(text):
        if text[at].isspace():
            at += 1
            continue
        found = _SCANNER.match(text, at)
        if not found:
            word = text[at:].split(maxsplit=1)[0]
            reading.unknown.append(word)
            at += len(word)
            continue
        name = found.lastgroup or ""
        if found.group() == "one" and items and items[-1].name in ("size", "colour"):
            name = "noun"  # a big one
        items.append(_Item(name, found.group()))
        at = found.end()
    return items


def _gather_mentions(items: list[_Item], reading: Reading) -> list[_Item]:
    """Replaces the words of every noun phrase by one item ``mention``."""
    out, at = [], 0
    while at < len(items):
        end = _phrase_end(items, at)
        if end == at:
            if items[at].name in ("of", "in", "that"):
                reading.unknown.append(items[at].text)
            out.append(items[at])
            at += 1
            continue
        words = items[at:end]
        reading.mentions.append(_mention(words))
        out.append(_Item("mention", " ".join(w.text for w in words), len(reading.mentions) - 1))
        at = end
    return out


def _phrase_end(items: list[_Item], at: int) -> int:
    """Where the noun phrase that starts here ends: number, adjectives, noun, ``that is red``."""
    end, seen_noun = at, False
    while end < len(items):
        name = items[end].name
        following = items[end + 1].name if end + 1 < len(items) else ""
        if name in ("number", "size", "colour") and not seen_noun:
            if name == "number" and end > at and not _continues_number(items, at, end):
                break
            end += 1
        elif name == "of" and items[end - 1].text in ("pair", "couple") and end > at:
            end += 1
        elif name == "comma" and not seen_noun and end > at and items[end - 1].name in ("size", "colour"):
            if following not in ("size", "colour", "noun") or not _noun_follows(items, end + 1):
                break
            end += 1
        elif name == "noun" and not seen_noun:
            seen_noun, end = True, end + 1
        elif name in ("that", "in") and seen_noun and following in ("colour", "size"):
            end += 2
        else:
            break
    return end


def _continues_number(items: list[_Item], start: int, at: int) -> bool:
    """``a pair``, ``the two``, ``a single``, ``one``: several number words in one phrase."""
    return all(item.name == "number" for item in items[start:at])


def _noun_follows(items: list[_Item], at: int) -> bool:
    while at < len(items) and items[at].name in ("size", "colour"):
        at += 1
    return at < len(items) and items[at].name == "noun"


def _mention(words: list[_Item]) -> Mention:
    mention = Mention(count=1, text=" ".join(word.text for word in words))
    numbers = [w.text for w in words if w.name == "number"]
    counts = [2 if n == "couple" else _COUNTS.get(n, 1) for n in numbers]
    mention.count = max([1, *counts])
    mention.definite = bool(numbers) and numbers[0] in ("the", "both")
    for word in words:
        if word.name == "colour":
            colour = re.split(r"[- ]", word.text)[0]
            mention.colour = _SYNONYMS.get(colour, colour)
        elif word.name == "size":
            mention.size = _SIZES[word.text]
        elif word.name == "noun":
            mention.kind = next(kind for kind, forms in _KINDS.items() if re.fullmatch(forms, word.text))
    noun = next((w.text for w in words if w.name == "noun"), None)
    mention.bare = noun is None or noun in ("one", "ones")
    if mention.kind == "any":
        mention.kind = None
    return mention


def _merge_relations(items: list[_Item]) -> list[_Item]:
    """``above and to the left of`` is one relation of two words."""
    out: list[_Item] = []
    for item in items:
        if item.name == "relation" and len(out) > 1 and [i.name for i in out[-2:]] == ["relation", "and"]:
            out.pop()
            out[-1] = _Item("relation", f"{out[-1].text} and {item.text}")
        else:
            out.append(item)
    return out


def _resolve(reading: Reading) -> None:
    """What ``the circle``, ``one`` and ``a red and a blue circle`` refer to."""
    mentions = reading.mentions
    for index, mention in enumerate(mentions):
        earlier = range(index - 1, -1, -1)
        if mention.bare:
            plural = [i for i in earlier if mentions[i].count > mention.count and not mentions[i].bare]
            if plural:
                mention.part_of = plural[0]
            else:  # the noun comes later: a red and a blue circle
                mention.kind = next((m.kind for m in mentions[index + 1 :] if m.kind), None)
        elif mention.definite:
            same = [i for i in earlier if _compatible(mentions[i], mention)]
            mention.same_as = same[0] if same else None


def _compatible(earlier: Mention, later: Mention) -> bool:
    pairs = ((earlier.kind, later.kind), (earlier.colour, later.colour), (earlier.size, later.size))
    return earlier.count == later.count and all(a is None or b is None or a == b for a, b in pairs)


class _Clauses:
    """Walks over the items of a caption and notes who is where, and who stands how to whom."""

    def __init__(self, items: list[_Item], reading: Reading) -> None:
        self.items, self.reading = items, reading
        self.said: list[int] = []  # mentions so far
        self.together: list[int] = []  # mentions joined by "and" since the clause began

    def run(self) -> None:
        at = 0
        while at < len(self.items):
            handler = getattr(self, f"_on_{self.items[at].name}", None)
            at = handler(at) if handler else at + 1

    def _on_mention(self, at: int) -> int:
        self.said.append(self.items[at].mention)
        self.together.append(self.items[at].mention)
        return at + 1

    def _on_there(self, at: int) -> int:
        self.together = []
        return at + 1

    def _on_place(self, at: int) -> int:
        words = tuple(_place_words(self.items[at].text))
        if self._opens_clause(at):
            subjects, end = self._next_mentions(at + 1)
        else:
            subjects, end = self._subjects(at), at + 1
        self._claim("place", words, subjects, (), self.items[at].text)
        return end

    def _on_relation(self, at: int) -> int:
        words = tuple(_relation_words(self.items[at].text))
        fronted = self._opens_clause(at)
        subjects = () if fronted else self._subjects(at)
        objects, end = self._next_mentions(at + 1, joined=not fronted)
        if fronted:
            subjects, end = self._next_mentions(end)
        self._claim("relation", words, subjects, objects, self.items[at].text)
        self.together = list(objects)
        return end

    def _on_to_it(self, at: int) -> int:
        text = self.items[at].text
        words, plural = tuple(_relation_words(text)), text.endswith("them") or "their" in text
        if self._opens_clause(at):
            before = list(self.said)
            subjects, end = self._next_mentions(at + 1)
        else:
            subjects, end = self._subjects(at), at + 1
            before = [m for m in self.said if m not in subjects]
        many = [m for m in before if self.reading.mentions[m].count > 1]
        objects = before[-1:] if not plural or before[-1:] == many[-1:] else before
        self._claim("relation", words, subjects, tuple(objects), text)
        return end

    def _on_beside(self, at: int) -> int:
        return self._arrangement(at, "beside")

    def _on_stacked(self, at: int) -> int:
        return self._arrangement(at, "stacked")

    def _on_row(self, at: int) -> int:
        return self._arrangement(at, "row")

    def _arrangement(self, at: int, how: str) -> int:
        last = self.said[-1:]
        alone = bool(last) and self.reading.mentions[last[0]].count == 1
        self._claim("arrangement", (how,), tuple(self.together if alone else last), (), self.items[at].text)
        return at + 1

    def _claim(
        self,
        about: str,
        words: tuple[str, ...],
        subjects: tuple[int, ...],
        objects: tuple[int, ...],
        text: str,
    ) -> None:
        if not subjects or (about == "relation" and not objects):
            self.reading.unknown.append(text)
            return
        names = [[self.reading.mentions[m].text for m in group] for group in (subjects, objects)]
        told = " ".join(filter(None, (" and ".join(names[0]), text, " and ".join(names[1]))))
        self.reading.claims.append(Claim(about, words, subjects, objects, told))

    def _opens_clause(self, at: int) -> bool:
        """True where the words before do not end in who this is about: at the start, or after ``and``."""
        if not self.said:
            return True
        before = self.items[at - 1].name
        if before in ("and", "with", "there"):
            return True
        return before == "comma" and self._someone_new_follows(at)

    def _someone_new_follows(self, at: int) -> bool:
        names = [item.name for item in self.items[at + 1 : at + 4]]
        if self.items[at].name == "relation":
            names = names[1:]
        return bool(names) and names[0] in ("mention", "there", "be")

    def _subjects(self, at: int) -> tuple[int, ...]:
        """Who a predicate is about: all that are joined before ``are``, else the last one named."""
        before = self.items[at - 1]
        if before.name == "be" and before.text.startswith("are") and len(self.together) > 1:
            return tuple(self.together)
        return tuple(self.said[-1:])

    def _next_mentions(self, at: int, joined: bool = False) -> tuple[tuple[int, ...], int]:
        """The next mention; with ``joined`` those too that follow by ``and`` and have no predicate of their
        own."""
        while at < len(self.items) and self.items[at].name in ("there", "be", "comma"):
            at += 1
        if at >= len(self.items) or self.items[at].name != "mention":
            return (), at
        found = [self.items[at].mention]
        at += 1
        while joined and self._joins(at):
            found.append(self.items[at + 1].mention)
            at += 2
        self.said += found
        self.together += found
        return tuple(found), at

    def _joins(self, at: int) -> bool:
        names = [item.name for item in self.items[at : at + 3]]
        predicates = ("be", "relation", "to_it", "place")
        return names[:2] == ["and", "mention"] and (len(names) < 3 or names[2] not in predicates)


def _relation_words(text: str) -> list[str]:
    if match := re.search(r"(?:its|their) (left|right)", text):
        return [match.group(1)]
    plain = re.sub(r" (?:it|them)$", "", text)
    return [
        word for part in plain.split(" and ") for word, form in _RELATION.items() if re.fullmatch(form, part)
    ]


def _place_words(text: str) -> list[str]:
    same = {"upper": "top", "lower": "bottom", "centre": "middle", "center": "middle"}
    return [same.get(word, word) for word in re.findall(_PLACE_WORD, text)]
