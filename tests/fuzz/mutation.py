"""Damages valid files. An input is a function of the seed and its number, so any one can be made again.

An input is a folder, as {name: content}. One or two of its files get one to three edits, either of the values that
their format holds (JSON, JSON lines, the headers of safetensors and .npy, the members of .npz, the content of .gz and
.zst) or of their bytes. Checksums are then made valid again, because a reader that only compares them tests nothing.
"""

import gzip
import hashlib
import io
import json
import random
import re
import zipfile
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from anarchobot.storage.durable import CHECKSUM, with_checksum

Files = dict[str, bytes]

INTEGERS = (0, 1, -1, 2, 127, 255, 2**16, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30)
TEXTS = (
    "", " ", "\0", "\ud800", "\x1b[2J", "x" * 5000, "../../../etc/passwd", "/", ".", "nan", "null", "1e999", "(a+)+$",
    "(", "{{ 1 / 0 }}", "{% for i in range(10**9) %}x{% endfor %}", "\ufdd0", "\ufeff", "<|endoftext|>", "<s>",
    "\u2581",
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, False, *INTEGERS, 0.5, -0.5, 1e-320, 1e308, float("nan"), float("inf"), -float("inf"), *TEXTS,
    [], {}, [[]], [None], {"": 0}, [0] * 1000, {"content": None},
)  # fmt: skip
SNIPPETS = (
    b"\0", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\n", b"\r\n", b"\t", b'"', b"'", b"\\", b"{", b"}", b"[", b"]",
    b":", b"- ", b"*a", b"&a ", b"!!python/name:os ", b"---\n", b"NaN", b"-Infinity", b"1e999", b"9" * 5000, b"{{",
    b"{%", b"%}", b"\x1b[31m", b"\xe2\x80\xa8", b"\x1f\x8b", b"PK\x03\x04", b"\\ud800", b"true", b"null",
)  # fmt: skip
DEPTHS = (3, 40, 300, 1100, 20_000, 200_000)
_NEST = "@nest-%d@"  # becomes a nested list when JSON is written: json.dumps could not write one so deep


def make_input(name: str, seed: int, number: int, samples: list[Files], changed: tuple[str, ...] = ("",)) -> Files:
    """The input `number` of the reader `name`; one in fifty is a valid sample. `changed`: suffixes of the files to
    damage."""
    draw = random.Random(f"{seed} {name} {number}")
    files, other = dict(draw.choice(samples)), draw.choice(samples)
    if draw.random() < 0.02:
        return files
    names = [file for file in sorted(files) if file.endswith(changed)] or sorted(files)
    for file in draw.choices(names, k=1 if draw.random() < 0.9 else 2):
        if draw.random() < 0.01:
            files.pop(file, None)
        elif file in files:
            for _ in range(draw.choice((1, 1, 1, 2, 3))):
                files[file] = _edit(draw, file, files[file], other.get(file, files[file]))
    return _with_valid_checksums(files, other)


def _edit(draw: random.Random, name: str, content: bytes, other: bytes) -> bytes:
    """`other`: the same file of another sample, to copy from."""
    if draw.random() < 0.65 and (edit := _structured(name, content)) is not None:
        with suppress(Exception):  # an earlier edit may have left the file without its format
            return edit(draw, content, other)
    return _edit_bytes(draw, content, other)


def _structured(name: str, content: bytes) -> Callable[[random.Random, bytes, bytes], bytes] | None:
    if name.endswith((".gz", ".zst")):
        return _edit_compressed(name)
    if name.endswith(".jsonl"):
        return _edit_lines
    if name.endswith(".safetensors"):
        return _edit_safetensors
    if name.endswith(".model"):
        return _edit_sentencepiece
    if content.startswith(b"\x93NUMPY"):
        return _edit_npy
    if content.startswith(b"PK"):
        return _edit_npz
    return _edit_json if content.lstrip()[:1] in (b"{", b"[") else None


# --- Bytes


def _edit_bytes(draw: random.Random, content: bytes, other: bytes) -> bytes:
    if not content:
        return draw.choice(SNIPPETS)
    data, at = bytearray(content), draw.randrange(len(content))
    length = min(draw.choice((1, 2, 4, 8, 16, 64, 256, 4096)), len(content) - at)
    kind = draw.randrange(11)
    if kind == 0:
        data[at] ^= 1 << draw.randrange(8)
    elif kind == 1:
        data[at] = draw.randrange(256)
    elif kind == 2:
        del data[at:]
    elif kind == 3:
        del data[at : at + length]
    elif kind == 4:
        data[at:at] = data[at : at + length] * draw.choice((1, 2, 50))
    elif kind == 5 and other:
        start = draw.randrange(len(other))
        data[at : at + length] = other[start : start + length]
    elif kind == 6:
        data[at:at] = draw.choice(SNIPPETS) * draw.choice((1, 1, 3))
    elif kind == 7:  # a number in a binary header
        size = draw.choice((1, 2, 4, 8))
        number = draw.choice(INTEGERS) % 2 ** (8 * size)
        data[at : at + size] = number.to_bytes(size, draw.choice(("little", "big")))
    elif kind == 8:  # a number in a text
        if numbers := list(re.finditer(rb"-?[0-9]+", content[:50_000])):
            start, end = draw.choice(numbers).span()
            data[start:end] = str(draw.choice(INTEGERS)).encode()
    elif kind == 9:
        depth = draw.choice(DEPTHS)
        opening, closing = draw.choice(((b"[", b"]"), (b'{"a":', b"}"), (b"(", b")"), (b"{% if 1 %}", b"{% endif %}")))
        data[at:at] = opening * depth + draw.choice((b"", b"0" + closing * depth))
    else:
        data[at : at + length] = draw.choice((b"\0", b"\xff", b" ", b"A")) * length
    return bytes(data)


# --- JSON


def _edit_json(draw: random.Random, content: bytes, other: bytes) -> bytes:
    return _dump(_edit_value(draw, json.loads(content), json.loads(other)))


def _edit_lines(draw: random.Random, content: bytes, other: bytes) -> bytes:
    lines = content.split(b"\n")
    at = draw.randrange(len(lines))
    kind = draw.randrange(8)
    if kind == 0:
        lines.insert(at, draw.choice(lines))
    elif kind == 1:
        del lines[at]
    elif kind == 2:
        lines[at] = draw.choice(other.split(b"\n"))
    else:
        rows = [line for line in other.split(b"\n") if line]
        lines[at] = _edit_json(draw, lines[at] or draw.choice(rows), draw.choice(rows))
    return b"\n".join(lines)


def _dump(value: Any) -> bytes:
    text = json.dumps(value, indent=1 if isinstance(value, dict) and CHECKSUM in value else None)
    return re.sub('"@nest-([0-9]+)@"', lambda found: "[" * int(found[1]) + "]" * int(found[1]), text).encode()


def _edit_value(draw: random.Random, value: Any, other: Any) -> Any:
    holder: list[Any] = [value]
    parent, key = draw.choice(_places(holder))
    old = parent[key]
    kind = draw.randrange(9)
    if kind <= 2:
        parent[key] = draw.choice(VALUES)
    elif kind == 3 and len(parent) > 0 and parent is not holder:
        del parent[key]
    elif kind == 4 and isinstance(parent, dict):
        parent[draw.choice((*TEXTS, *map(str, parent)))] = parent.pop(key)
    elif kind == 5:
        source, name = draw.choice(_places([other]))
        parent[key] = source[name]
    elif kind == 6:
        source, name = draw.choice(_places(holder))
        parent[key] = json.loads(json.dumps(source[name]))
    elif kind == 7:
        parent[key] = _NEST % draw.choice(DEPTHS)
    elif isinstance(old, list) and old:
        parent[key] = old * draw.choice((2, 100))
    elif isinstance(old, bool) or not isinstance(old, int | float):
        parent[key] = [old] if draw.random() < 0.5 else {"a": old}
    else:
        parent[key] = draw.choice((old + 1, old - 1, -old, old * 2, old * 1000, old / 3, str(old), *INTEGERS))
    return holder[0]


def _places(holder: list[Any]) -> list[tuple[Any, Any]]:
    """All (container, key) pairs below; of a long list or mapping (a vocabulary), the first and last few."""
    found: list[tuple[Any, Any]] = []
    pending: list[Any] = [holder]
    while pending:
        container = pending.pop()
        keys = list(container) if isinstance(container, dict) else list(range(len(container)))
        for key in keys if len(keys) < 60 else [*keys[:20], *keys[-20:]]:
            found.append((container, key))
            if isinstance(container[key], dict | list):
                pending.append(container[key])
    return found


# --- Headers


def _edit_safetensors(draw: random.Random, content: bytes, other: bytes) -> bytes:
    length = int.from_bytes(content[:8], "little")
    theirs = other[8 : 8 + int.from_bytes(other[:8], "little")]
    header = _edit_json(draw, content[8 : 8 + length], theirs)
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


def _edit_sentencepiece(draw: random.Random, content: bytes, other: bytes) -> bytes:
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(content)  # type: ignore[attr-defined]
    kind = draw.randrange(8)
    piece = draw.choice(proto.pieces)
    if kind == 0:
        piece.piece = draw.choice((*(text for text in TEXTS if text.isprintable()), draw.choice(proto.pieces).piece))
    elif kind == 1:
        piece.type = draw.choice((1, 2, 3, 4, 5, 6))
    elif kind == 2:
        piece.score = draw.choice((float("nan"), float("inf"), -float("inf"), 0.0, 1e38, -1e38))
    elif kind == 3:
        proto.pieces.remove(piece)
    elif kind == 4:
        proto.pieces.extend([piece] * draw.choice((1, 1000)))
    elif kind == 5:
        spec, fields = proto.trainer_spec, ("unk_id", "bos_id", "eos_id", "pad_id", "vocab_size")
        setattr(spec, draw.choice(fields), draw.choice((-1, 0, 1, 2, 5, 2**31 - 1, -(2**31))))
    elif kind == 6:
        normalizer, value = proto.normalizer_spec, draw.random() < 0.5
        setattr(normalizer, draw.choice(("add_dummy_prefix", "remove_extra_whitespaces", "escape_whitespaces")), value)
        proto.trainer_spec.model_type = draw.choice((1, 2, 3, 4))
        proto.trainer_spec.byte_fallback = value
    else:
        charsmap = proto.normalizer_spec.precompiled_charsmap
        proto.normalizer_spec.precompiled_charsmap = _edit_bytes(draw, charsmap or bytes(64), other[:64])
    return bytes(proto.SerializeToString())


def _edit_npy(draw: random.Random, content: bytes, other: bytes) -> bytes:
    length = int.from_bytes(content[8:10], "little")
    header = content[10 : 10 + length].decode("latin1")
    kind = draw.randrange(4)
    if kind == 0:
        dtypes = ("<f4", "<f8", "<f2", "|O", "<U9", "|b1", "<c16", ">f4", "<u2", "<M8[s]", "|S0", "|V0", "<f4,<f4", "x")
        header = re.sub(r"'descr': '[^']*'", f"'descr': {draw.choice(dtypes)!r}", header)
    elif kind == 1:
        numbers = [str(draw.choice(INTEGERS)) for _ in range(draw.choice((0, 1, 2, 3, 70)))]
        header = re.sub(r"'shape': \([^)]*\)", f"'shape': ({', '.join(numbers)}{',' * (len(numbers) == 1)})", header)
    elif kind == 2:
        header = header.replace("False", draw.choice(("True", "None", "0", "[]", "__import__('os')")))
    else:
        header = _edit_bytes(draw, header.encode("latin1"), other[10:138]).decode("latin1")
    return content[:8] + len(header).to_bytes(4, "little")[:2] + header.encode("latin1") + content[10 + length :]


def _edit_npz(draw: random.Random, content: bytes, other: bytes) -> bytes:
    """Edits a member and packs all again, compressed or not; sometimes with a member of zeros, which deflate makes a
    thousand times smaller."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = draw.choice(sorted(members))
    kind = draw.randrange(6)
    if kind == 0:
        members[draw.choice(("x.npy", "", "../x.npy", "x", *members))] = members.pop(name)
    elif kind == 1:
        header = members[name][:128].replace(b"'shape': (", b"'shape': (20000000,), '': (")
        members[name] = header[:128] + bytes(80_000_000)
    else:
        members[name] = (_edit_npy if kind < 5 else _edit_bytes)(draw, members[name], members[name])
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", draw.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
        for member, data in members.items():
            archive.writestr(member, data)
    return packed.getvalue()


def _edit_compressed(name: str) -> Callable[[random.Random, bytes, bytes], bytes]:
    from backports import zstd

    decompress, compress = (
        (gzip.decompress, gzip.compress) if name.endswith(".gz") else (zstd.decompress, zstd.compress)
    )

    def edit(draw: random.Random, content: bytes, other: bytes) -> bytes:
        plain = decompress(content)
        if draw.random() < 0.1:
            return bytes(compress(plain + draw.choice((b"\0", b" ", b"\n", b"a")) * 5_000_000))
        return bytes(compress(_edit(draw, name.rpartition(".")[0], plain, decompress(other))))

    return edit


# --- Checksums


def _with_valid_checksums(files: Files, sample: Files) -> Files:
    """Sets the digests that state.json and manifest.json record of other files, and those of their own content."""
    for name, content in files.items():
        if not name.endswith(".json") or CHECKSUM.encode() not in content:
            continue
        try:
            values = json.loads(content)
            digests = values.get("sha256")
            for file in digests if isinstance(digests, dict) else ():
                if (beside := name.rpartition("/")[0] + "/" + file) in files:
                    digests[file] = hashlib.sha256(files[beside]).hexdigest()
            files[name] = with_checksum(values).encode()
        except (ValueError, TypeError, AttributeError, RecursionError):
            pass
    return files
