"""Random damage to the files of a folder: what disks, transfers, editors and attackers do to them."""

import gzip
import json
import os
import shutil
import socket
from pathlib import Path
from random import Random
from typing import Any

DEEP = 5000
VALUES = [
    "null", "true", "false", "-1", "0", "1", "0.5", "1e308", "-1e-308", "NaN", "Infinity", "1e999", "9" * 400,
    "9" * 5000, "2147483648", "1099511627776", '""', '"x"', '"\\ud800"', '"\\u0000"', '"../../etc/passwd"',
    '"/dev/zero"', '"' + "x" * 100_000 + '"', "[]", "{}", "[[]]", '{"x": []}', "[" * DEEP + "]" * DEEP,
    '{"x":' * DEEP + "1" + "}" * DEEP, "[" + "1," * 10_000 + "1]", '["x", 1, null]', "{", "", "0x10", "'x'",
]  # fmt: skip
PLACE = "@@PLACE@@"


def damage(folder: Path, rng: Random) -> tuple[Path, str]:
    """Do something to one random file of a folder; which, and what."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path = rng.choice(files)
    kinds = [_bytes] * 4 + [_place] * 3
    if path.suffix == ".json":
        kinds += [_json] * 8
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        kinds += [_line] * 6
    if path.suffix in (".tsv", ".csv"):
        kinds += [_cell] * 6
    if path.name.endswith(".gz"):
        kinds += [_gzip] * 3
    return path, rng.choice(kinds)(path, rng)


def _bytes(path: Path, rng: Random) -> str:
    raw = bytearray(path.read_bytes())
    how = rng.choice(("flip", "flip", "flip", "cut", "cut", "empty", "append", "splice", "zeros", "random", "twice"))
    start, length = rng.randrange(len(raw) + 1), rng.randrange(1, 200)
    if how == "flip":
        for _ in range(rng.choice((1, 1, 8))):
            if raw:
                raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    elif how == "cut":
        del raw[start:]
    elif how == "empty":
        raw.clear()
    elif how == "append":
        raw += rng.randbytes(length)
    elif how == "splice":
        other = rng.randrange(len(raw) + 1)
        raw[start : start + length] = raw[other : other + rng.randrange(200)]
    elif how == "zeros":
        raw[start : start + length] = bytes(min(length, len(raw) - start))
    elif how == "random":
        raw[start : start + length] = rng.randbytes(length)
    else:
        raw = raw * 2
    path.write_bytes(raw)
    return how


def _place(path: Path, rng: Random) -> str:
    how = rng.choice(
        ("gone", "folder", "pipe", "socket", "link to nothing", "circle", "zeros", "null", "sparse", "random")
    )
    path.unlink()
    if how == "folder":
        path.mkdir()
    elif how == "pipe":
        os.mkfifo(path)
    elif how == "socket":
        place = os.getcwd()
        os.chdir(path.parent)  # the names of sockets are short
        try:
            with socket.socket(socket.AF_UNIX) as made:
                made.bind(path.name)
        finally:
            os.chdir(place)
    elif how == "sparse":
        with open(path, "wb") as file:
            file.truncate(2**40)
    elif how != "gone":
        targets = {"link to nothing": "gone", "circle": path.name, "zeros": "/dev/zero", "null": "/dev/null"}
        path.symlink_to(targets.get(how, "/dev/urandom"))
    return how


def _json(path: Path, rng: Random) -> str:
    try:
        changed, how = changed_json(path.read_text("utf-8"), rng)
    except (ValueError, RecursionError):
        return _bytes(path, rng)
    path.write_text(changed, "utf-8", errors="surrogatepass")
    return how


def _line(path: Path, rng: Random) -> str:
    packed = path.suffix == ".gz"
    lines = (gzip.decompress(path.read_bytes()) if packed else path.read_bytes()).decode().splitlines()
    number = rng.randrange(len(lines))
    lines[number], how = changed_json(lines[number], rng)
    raw = ("\n".join(lines) + "\n").encode(errors="surrogatepass")
    path.write_bytes(gzip.compress(raw, 1) if packed else raw)
    return f"line {number + 1}: {how}"


def _cell(path: Path, rng: Random) -> str:
    lines = path.read_text().splitlines()
    separator = "\t" if path.suffix == ".tsv" else ","
    number = rng.randrange(len(lines))
    cells = lines[number].split(separator)
    place, value = rng.randrange(len(cells)), rng.choice(VALUES)
    cells[place] = value
    lines[number] = separator.join(cells)
    path.write_text("\n".join(lines) + "\n", "utf-8", errors="surrogatepass")
    return f"line {number + 1}, cell {place + 1} = {value[:30]}"


def changed_json(text: str, rng: Random) -> tuple[str, str]:
    """A JSON text with one value, key or object changed; and what was done."""
    root = json.loads(text)
    holder, key = rng.choice(list(_places({"": root})))
    how = rng.choice(("value",) * 6 + ("gone", "renamed", "twice", "more"))
    value = rng.choice(VALUES)
    if how == "gone" and key != "":
        del holder[key]
        return json.dumps(root), f"{key!r} gone"
    if how in ("renamed", "more") and isinstance(holder, dict) and key != "":
        holder[f"{key}x"] = holder.pop(key) if how == "renamed" else 1
        return json.dumps(root), f"{key!r} {how}"
    if how == "twice" and isinstance(holder, dict) and key != "":
        old = json.dumps(holder[key])
        holder[key] = PLACE
        made = json.dumps(root).replace(f'"{PLACE}"', f"{value}, {json.dumps(key)}: {old}")
        return made, f"{key!r} twice"
    if key == "":
        return value, f"all of it {value[:30]}"
    holder[key] = PLACE
    return json.dumps(root).replace(f'"{PLACE}"', value), f"{key!r} = {value[:30]}"


def _places(value: Any):
    """Every (holder, key) within a value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield value, key
        yield from _places(item)


def _gzip(path: Path, rng: Random) -> str:
    how = rng.choice(("bomb", "bomb of rows", "line of 1 GB", "twice", "no gzip"))
    raw = path.read_bytes()
    if how == "bomb":
        raw = _repeated(bytes(2**20), 2000)
    elif how == "bomb of rows":
        raw = _repeated(b'{"text": "a"}\n' * 2**16, 2000)
    elif how == "line of 1 GB":
        raw = _repeated(b"abcdefgh" * 2**17, 1000)
    elif how == "twice":
        raw = gzip.compress(raw, 1)
    else:
        raw = gzip.decompress(raw)
    path.write_bytes(raw)
    return how


_PACKED: dict[bytes, bytes] = {}


def _repeated(part: bytes, count: int) -> bytes:
    """The part that often, packed: members of a gzip may follow each other."""
    if part not in _PACKED:
        _PACKED[part] = gzip.compress(part, 1)
    return _PACKED[part] * count


def copied(folder: Path, place: Path) -> Path:
    """A copy of a folder, where another one may have been."""
    if place.is_symlink() or place.exists():
        shutil.rmtree(place)
    shutil.copytree(folder, place)
    return place
