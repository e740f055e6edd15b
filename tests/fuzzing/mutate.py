"""Damaging bytes as disks, networks and people with bad intentions do."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import pickletools
import random
import sys
import zipfile
from collections.abc import Iterator, Sequence
from typing import Any

import yaml

# Numbers at the edges of the types that headers are made of.
_NUMBERS = [
    (value % 2**bits).to_bytes(bits // 8, "little")
    for bits in (8, 16, 32, 64)
    for value in (0, 1, -1, 2 ** (bits - 1), 2 ** (bits - 1) - 1, 100_000)
]
_TEXTS = [
    *(b"null", b"true", b"-1", b"0", b"1e999", b"NaN", b"9" * 30, b"9" * 5000, b"[]", b"{}", b'""', b"[[[["),
    *(b"0x_", b"&a", b"*a", b"<<: *a", b"!!python/object:os.system", b"${a}", b"${oc.env:HOME}", b"\\ud800"),
    *(
        b"\x00",
        b"\xff\xfe",
        b"\xef\xbb\xbf",
        b"../../../",
        b"/dev/zero",
        b"\n",
        b":",
        b"- ",
        b"'",
        b'"',
        b"#",
    ),
    *(b"\n  " * 50, b"[" * 3000, b'{"a":' * 3000, b"x" * 10_000),
]


def mutate(data: bytes, rng: random.Random) -> bytes:
    """One to four damages, one after the other."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        data = rng.choice(_DAMAGES)(data, rng)
    return data


def _place(data: bytes, rng: random.Random) -> int:
    """Anywhere; every second time in the first KB or the last, where formats keep what they live by."""
    if not data or rng.random() < 0.5:
        return rng.randint(0, len(data))
    near = rng.randint(0, min(1024, len(data)))
    return near if rng.random() < 0.7 else len(data) - near


def _flip_bits(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 3, 20))):
        if out:
            out[min(_place(data, rng), len(out) - 1)] ^= 1 << rng.randrange(8)
    return bytes(out)


def _other_bytes(data: bytes, rng: random.Random) -> bytes:
    place = _place(data, rng)
    new = rng.randbytes(rng.choice((1, 2, 8, 64)))
    return data[:place] + new + data[place + len(new) :]


def _truncate(data: bytes, rng: random.Random) -> bytes:
    return data[: _place(data, rng)]


def _insert(data: bytes, rng: random.Random) -> bytes:
    place = _place(data, rng)
    return (
        data[:place] + rng.choice((rng.randbytes(rng.choice((1, 5, 300))), rng.choice(_TEXTS))) + data[place:]
    )


def _delete(data: bytes, rng: random.Random) -> bytes:
    place = _place(data, rng)
    return data[:place] + data[place + rng.choice((1, 2, 8, 100, 5000)) :]


def _repeat(data: bytes, rng: random.Random) -> bytes:
    start, length = _place(data, rng), rng.choice((1, 4, 30, 500))
    return (
        data[: start + length]
        + data[start : start + length] * rng.choice((1, 2, 40))
        + data[start + length :]
    )


def _splice(data: bytes, rng: random.Random) -> bytes:
    """Its own beginning before its own end, some of it twice or not at all."""
    return data[: _place(data, rng)] + data[_place(data, rng) :]


def _swap(data: bytes, rng: random.Random) -> bytes:
    a, b = sorted((_place(data, rng), _place(data, rng)))
    return data[:a] + data[b : b + 40] + data[a + 40 : b] + data[a : a + 40] + data[b + 40 :]


def _edge_number(data: bytes, rng: random.Random) -> bytes:
    place, number = _place(data, rng), rng.choice(_NUMBERS)
    return data[:place] + number + data[place + len(number) :]


def _other_digits(data: bytes, rng: random.Random) -> bytes:
    """Another number where one stands in text."""
    places = [i for i, byte in enumerate(data[:20_000]) if 48 <= byte <= 57]
    if not places:
        return _edge_number(data, rng)
    place = rng.choice(places)
    digits = rng.choice(
        (b"0", b"1", b"7", b"-3", b"00", b"99", b"12345", b"1000000000", b"9" * 25, b"0.5", b"1e9")
    )
    return data[:place] + digits + data[place + 1 :]


def _other_text(data: bytes, rng: random.Random) -> bytes:
    place = _place(data, rng)
    return data[:place] + rng.choice(_TEXTS) + data[place + rng.choice((0, 1, 5, 20)) :]


_DAMAGES = (
    *(_flip_bits, _other_bytes, _truncate, _insert, _delete, _repeat, _splice, _swap, _edge_number),
    *(_other_digits, _other_digits, _other_text),
)


# Values that a setting may be given, right and wrong.
VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2,
        3,
        7,
        64,
        255,
        4096,
        100_000,
        10**9,
        2**31,
        2**63 - 1,
        2**64,
        10**30,
        10**5000,
    ),
    *(
        0.0,
        0.5,
        -0.5,
        1e-30,
        1e30,
        float("inf"),
        float("nan"),
        "",
        "x",
        "a" * 5000,
        "1e-4",
        "nan",
        "null",
        "0",
        "-1",
    ),
    *([], {}, [1], [1, 2, 3], [None], [[]], {"a": 1}, [0] * 500, "../../x", "/dev/zero", "\u202e", "\ud83d"),
)


def mutate_tree(tree: Any, rng: random.Random, values: Sequence[Any] = VALUES) -> Any:
    """A copy of lists and mappings with one to four changes: another value, one more, one less, two changed
    round, a value wrapped or nested deeply."""
    with _without_limits():
        root = {"": copy.deepcopy(tree)}
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            places = _places(root)
            _change(*rng.choice(places), rng, values, places)
        return root[""]


def _places(node: Any) -> list[tuple[Any, Any]]:
    """(holder, key or index) of every value below a node."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [place for key, value in list(items) for place in [(node, key), *_places(value)]]


def _change(holder: Any, key: Any, rng: random.Random, values: Sequence[Any], places: list) -> None:
    value = holder[key]
    match rng.randrange(9):
        case 0 | 1 | 2:
            holder[key] = copy.deepcopy(rng.choice(values))
        case 3:
            holder[key] = _near(value, rng)
        case 4 if key != "":
            del holder[key]
        case 5 if isinstance(value, dict):
            value[rng.choice(["x", "", "name", "a.b", "__class__"])] = copy.deepcopy(rng.choice(values))
        case 5 if isinstance(value, list):
            value.insert(rng.randint(0, len(value)), copy.deepcopy(rng.choice(values)))
        case 6:
            other, place = rng.choice(places)
            holder[key] = copy.deepcopy(other[place])
        case 7:
            for _ in range(rng.choice((1, 3, 80, 600))):
                value = rng.choice(([value], {"a": value}))
            holder[key] = value
        case 8 if isinstance(holder, dict) and key != "":
            holder[f"{key}{rng.choice(['x', '_', ' ', '.', '0'])}"] = holder.pop(key)


def _near(value: Any, rng: random.Random) -> Any:
    """A value of the same kind, a little or far off."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return rng.choice((value + 1, value - 1, -value, value * 2, value * 1000, value // 2, repr(value)))
    if isinstance(value, str):
        return mutate(value.encode(errors="replace"), rng).decode(errors="replace")[:20_000]
    return rng.choice((None, str(value)[:100]))


def mutate_json(data: bytes, rng: random.Random) -> bytes:
    """Bytes of a JSON file damaged, or, more often, its values."""
    if rng.random() < 0.3:
        return mutate(data, rng)
    return dump_json(mutate_tree(json.loads(data), rng))


def mutate_yaml(data: bytes, rng: random.Random, values: Sequence[Any] = VALUES) -> bytes:
    """Bytes of a YAML file damaged, or, more often, its values."""
    if rng.random() < 0.35:
        return mutate(data, rng)
    return dump_yaml(mutate_tree(yaml.safe_load(data) or {}, rng, values))


def mutate_safetensors(data: bytes, rng: random.Random) -> bytes:
    """Bytes of the file damaged; or its header's values, the header's length put right."""
    if rng.random() < 0.4:
        return mutate(data, rng)
    length = int.from_bytes(data[:8], "little")
    tree = json.loads(data[8 : 8 + length])
    if rng.random() < 0.3:  # one name for another: everything fits but the model
        names = [name for name in tree if name != "__metadata__"]
        a, b = rng.choice(names), rng.choice(names)
        tree[a], tree[b] = tree[b], tree[a]
    else:
        types = (
            "F64",
            "F32",
            "F16",
            "BF16",
            "I64",
            "I8",
            "U8",
            "BOOL",
            "F8_E4M3",
            "F4",
            "C64",
            "U64",
            "F8_E8M0",
        )
        tree = mutate_tree(tree, rng, (*VALUES, *types, *types))
    header = dump_json(tree)
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def mutate_pytorch(data: bytes, rng: random.Random) -> bytes:
    """Bytes of the file damaged; or its pickle, in a zip file with the right sums."""
    if rng.random() < 0.3 or not data.startswith(b"PK"):
        return mutate(data, rng)
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as whole, zipfile.ZipFile(out, "w") as damaged:
        changed = rng.choice(
            [n for n in whole.namelist() if n.endswith(("data.pkl", "data.pkl", "byteorder", "/0"))]
        )
        for entry in whole.infolist():
            content = whole.read(entry)
            if entry.filename == changed:
                damage = rng.choice((mutate, mutate_pickle)) if changed.endswith(".pkl") else mutate
                content = damage(content, rng)
                if rng.random() < 0.1:
                    entry.compress_type = zipfile.ZIP_DEFLATED
            damaged.writestr(entry, content)
    return out.getvalue()


def mutate_pickle(data: bytes, rng: random.Random) -> bytes:
    """Numbers, sizes and names in a pickle changed so that its instructions stay whole."""
    places = [
        (position, opcode.name)
        for opcode, _, position in pickletools.genops(data)
        if opcode.name
        in ("BININT1", "BININT2", "BININT", "BINGET", "BINUNICODE", "GLOBAL", "NEWFALSE", "TUPLE2")
    ]
    out = bytearray(data)
    for place, name in rng.sample(places, min(len(places), rng.choice((1, 1, 2, 5)))):
        if name in ("BININT1", "BINGET"):
            out[place + 1] = rng.choice((0, 1, 2, 255, rng.randrange(256)))
        elif name in ("BININT2", "BININT"):
            out[place + 1 : place + 3] = rng.randbytes(2)
        elif name == "BINUNICODE":
            out[place + 5] = rng.choice(b"abcx0./_\x00\xff")
        elif name == "GLOBAL":
            out[place + 1 + rng.randrange(12)] ^= 1 << rng.randrange(7)
        elif name == "NEWFALSE":
            out[place] = rng.choice((0x88, 0x4E))  # True, None
        else:
            out[place] = rng.choice((0x85, 0x87, 0x52))  # TUPLE1, TUPLE3, REDUCE
    return bytes(out)


def dump_yaml(tree: Any) -> bytes:
    """As YAML; its flow style is JSON, which is also written for what PyYAML does not write."""
    try:
        return yaml.safe_dump(tree, allow_unicode=True).encode()
    except Exception:
        return dump_json(tree)


def dump_json(tree: Any) -> bytes:
    """JSON of values that may nest deeper, or be larger, than Python writes."""
    with _without_limits():
        return json.dumps(tree).encode()


@contextlib.contextmanager
def _without_limits() -> Iterator[None]:
    """Within the block Python handles what nests some thousands deep, and writes numbers of any length."""
    digits, depth = sys.get_int_max_str_digits(), sys.getrecursionlimit()
    sys.set_int_max_str_digits(0)
    sys.setrecursionlimit(20_000)
    try:
        yield
    finally:
        sys.set_int_max_str_digits(digits)
        sys.setrecursionlimit(depth)
