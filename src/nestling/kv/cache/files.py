"""Caches as files: a conversation that was read once is gone on with later, by another process, at once.

A file is safetensors with a JSON text in its metadata. Tensors are what the parts of the layers hold, as they are
pickled (``__getstate__``, without what lies in free places). The JSON has the model's fingerprint and some weights,
options, budget and allocation, and how many tokens each part holds. Nothing in a file is run or unpickled, and nothing
of it is used before it was checked.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from nestling.errors import CacheMismatchError, FileError, OptionError
from nestling.files.fields import Fields
from nestling.files.reading import parse, read_metadata, read_tensors, short
from nestling.files.writing import write_file
from nestling.kv.cache.buffer import Buffer
from nestling.kv.cache.config import CacheConfig
from nestling.kv.cache.eviction import HeavyHitters
from nestling.kv.cache.exact import ExactStore
from nestling.kv.cache.layer import RECORDED, NestedLayer
from nestling.kv.cache.packed import PackedRows
from nestling.kv.integration.attach import NAME, base_model, detach, implementation
from nestling.kv.integration.modes import default_mode
from nestling.kv.integration.state import layer_devices
from nestling.kv.integration.structure import fingerprint
from nestling.kv.quantisation.rows import decode_rows, row_bytes

if TYPE_CHECKING:
    from nestling.kv.adapter import KVAdapter
    from nestling.kv.cache.cache import NestedCache

FORMAT, KIND, KEY = 3, "nestling-cache", "nestling"
SIDES, PARTS = ("key", "value"), ("sinks", "recent", "spare")
NUMBERS = {Buffer: ("length",), ExactStore: ("length", "left", "spare", "size", "open"), HeavyHitters: ("evicted",)}
DERIVED = ("dtype", "device")  # attributes of stock layers that their tensors have

Part = Buffer | ExactStore | HeavyHitters


def save(cache: "NestedCache", path: str | Path) -> None:
    """See `NestedCache.save`."""
    tensors: dict[str, Tensor] = {}
    layers: list[Any] = []
    for index, layer in enumerate(cache.layers):
        place = f"layers.{index}"
        if isinstance(layer, NestedLayer):
            numbers = {name: getattr(layer, name) for name in ("length", "batch", "pending", "draft", "record_past")}
            saved: dict[str, Any] = {"weights": layer.owner.weights, **numbers}
            for name, part, _, _ in _parts(layer):
                state = _state(part)
                saved[name] = {number: state[number] for number in NUMBERS[type(part)]}
                tensors |= {f"{place}.{name}.{key}": tensor for key, tensor in _tensors(part, state).items()}
            layers.append(saved)
        else:
            own = {name: value for name, value in vars(layer).items() if name not in DERIVED}
            layers.append(_frozen(own, place, tensors))
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    dtype = str(cache._nested()[0][1].dtype).removeprefix("torch.")
    options = {**cache.options.to_dict(), "budget": cache.allocation.to_dict(), "dtype": dtype}
    if (factory := cache.factory) is not None:
        limit = None if factory.limit is None else factory.limit.limit
        options |= {"budget": factory.share, "limit": limit}
    head = {
        "format": FORMAT, "kind": KIND, "model": fingerprint(cache.config), "bases": _written_by(cache),
        "options": options, "budget": cache.budget, "allocation": cache.allocation.to_dict(), "layers": layers,
    }  # fmt: skip
    head["sha256"] = _checksum(head, tensors)
    write_file(path, lambda new: save_file(tensors, new, {KEY: json.dumps(head)}))


def load(kind: type["NestedCache"], path: str | Path, model: Any, adapter: "KVAdapter") -> "NestedCache":
    """See `NestedCache.load`. A model is not switched by a call that fails."""
    attached = implementation(base_model(model)) == NAME
    try:
        return _load(kind, path, model, adapter)
    except BaseException:
        if not attached:
            detach(model)
        raise


def _load(kind: type["NestedCache"], path: str | Path, model: Any, adapter: "KVAdapter") -> "NestedCache":
    head, tensors = _read(path)
    theirs = json.loads(json.dumps(adapter.fingerprint))
    if differ := [key for key, value in head.object("model").values.items() if theirs.get(key) != value]:
        raise CacheMismatchError(f"{path} was saved for another model than the adapter's ({', '.join(differ)} differ)")
    try:
        options = CacheConfig(**head.object("options").values)
        cache = kind(model, adapter, options)
        allocation, budget = adapter.allocate(head.object("allocation").values), head.number("budget", 0, 1)
    except (TypeError, OptionError) as error:
        raise FileError(f"{path} is damaged, or the adapter is another one: {error}") from error
    with default_mode(gradients=False):
        if cache.factory is not None:
            expected = cache.factory.at(budget)
            if expected is None or not torch.equal(expected.stacked, allocation.stacked):
                raise CacheMismatchError(f"{path} was saved with another adapter: this one shares out other bits")
            cache._store_by(allocation, budget)
        if _written_by(cache) != head.text("bases"):
            raise CacheMismatchError(f"{path} was saved with another adapter: its bases are not those of this one")
        layers, devices = list(head.objects("layers")), layer_devices(model)
        if len(layers) != len(cache.layers):
            raise FileError(f"{path} is damaged: {len(layers)} layers, expected {len(cache.layers)}")
        for index, (layer, saved) in enumerate(zip(cache.layers, layers, strict=True)):
            place = f"layers.{index}"
            own = {name: tensors.pop(name) for name in [*tensors] if name.startswith(f"{place}.")}
            own = {name.removeprefix(f"{place}."): tensor for name, tensor in own.items()}
            if isinstance(layer, NestedLayer):
                _fill(layer, saved, own)
                if (weights := saved.object("weights", default=None)) is not None:
                    known = {name: tuple(weights.numbers(name)) for name in weights.values}
                    layer.owner.recognise(model, index, known)
            else:
                _thaw(layer, saved, own, devices[index])
            if own:
                raise FileError(f"{path} is damaged: unknown tensor {place}.{min(own)}")
        if tensors:
            raise FileError(f"{path} is damaged: unknown tensor {min(tensors)}")
    return cache


def _read(path: str | Path) -> tuple[Fields, dict[str, Tensor]]:
    """Head and tensors of a file, which belong together."""
    text = read_metadata(path, FileError).get(KEY)
    try:
        values = parse("null" if text is None else text, finite=True)
    except ValueError as error:
        raise FileError(f"{path} is damaged: not valid JSON ({short(str(error))})") from error
    if not isinstance(values, dict) or values.get("kind") != KIND:
        raise FileError(f"{path} is not a saved NestedCache")
    head = Fields(path, values, FileError)
    if (number := head.whole("format")) != FORMAT:
        raise FileError(f"{path} has format {number}, this version reads {FORMAT}: upgrade nestling, or save it again")
    tensors = read_tensors(path, FileError)
    if _checksum(values, tensors) != head.text("sha256"):
        raise FileError(f"{path} is damaged: its checksum differs")
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise FileError(f"{path} is damaged: {name} holds NaN or infinity")
    return head, tensors


def _checksum(head: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """Of all that is in a file but the checksum itself."""
    rest = {key: value for key, value in head.items() if key != "sha256"}
    total = hashlib.sha256(json.dumps(rest, sort_keys=True).encode())
    for name in sorted(tensors):
        total.update(f"{name} {tensors[name].dtype} {list(tensors[name].shape)}".encode())
        total.update(_raw(tensors[name]))
    return total.hexdigest()


def _raw(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def _written_by(cache: "NestedCache") -> str:
    """The checksum of the bases and steps by which coordinates were written; not of inverses, in which machines differ
    by their rounding."""
    total = hashlib.sha256()
    for _, layer in cache._nested():
        for side in (side for pair in layer.bases.sides for side in pair):
            for tensor in (side.encode, None if side.coding is None else side.coding.step):
                total.update(b"-" if tensor is None else _raw(tensor))
    return total.hexdigest()


def _parts(layer: NestedLayer) -> Iterator[tuple[str, Part, int, int]]:
    """All that stores something in a layer: its name, and how many heads of how many rows it has."""
    width = layer.bases.width
    for number, group in enumerate(layer.groups):
        for side, rows, basis in zip(SIDES, group.rows, group.bases, strict=True):
            name, heads = f"groups.{number}.{side}", len(group.heads)
            if isinstance(rows, PackedRows):
                yield f"{name}.codes", rows.codes, heads, sum(rows.layout.widths)
                if rows.plain is not None:
                    yield f"{name}.plain", rows.plain, heads, rows.rank
            else:
                yield f"{name}.plain", rows, heads, width if basis.encode is None else basis.encode.shape[1]
    if layer.exact is not None:
        yield "exact", layer.exact, layer.heads, row_bytes(width) if layer.exact.rows else width
    if layer.hitters is not None:
        yield "hitters", layer.hitters, layer.heads, 0


def _state(part: Part) -> dict[str, Any]:
    """A part as it is pickled."""
    return {**vars(part)} if isinstance(part, HeavyHitters) else part.__getstate__()


def _tensors(part: Part, state: dict) -> dict[str, Tensor]:
    """The tensors of a part's state, none where it holds no tokens."""
    if isinstance(part, ExactStore):
        sides = zip(SIDES, state["data"], strict=False)  # none where there are no tokens
        tensors = {f"{side}.{p}": tensor for side, parts in sides for p, tensor in zip(PARTS, parts, strict=True)}
        return tensors | {f"{side}.rest": rest for side, rest in zip(SIDES, state["rest"], strict=False)}
    tensor = state["mass" if isinstance(part, HeavyHitters) else "data"]
    return {} if tensor is None else {"data": tensor}


def _fill(layer: NestedLayer, saved: Fields, tensors: dict[str, Tensor]) -> None:
    """Put what was saved of a nested layer into one that is empty; its tensors are taken out of the dictionary."""
    length, batch = saved.whole("length"), saved.whole("batch")
    stored = held = length - (0 if layer.hitters is None else saved.object("hitters").whole("evicted", maximum=length))
    if layer.exact is not None:
        exact = saved.object("exact")
        left, recent, spare, size = (exact.whole(name) for name in ("left", "length", "spare", "size"))
        stored -= recent
        fits = recent + spare <= size <= max(layer.exact.capacity(length), recent + spare) + RECORDED
        if left + recent != length or spare > left or not fits:
            raise FileError(f"{exact.where}: numbers of tokens that no cache of {length} has")
    for name, part, heads, rows in _parts(layer):
        fields = saved.object(name)
        numbers = {number: fields.whole(number) for number in NUMBERS[type(part)]}
        if isinstance(part, Buffer):
            if numbers["length"] != stored:
                raise FileError(f"{fields.where}: 'length' must be {stored}, got {numbers['length']}")
            shape = [heads, batch, rows, stored]
            shapes = {"data": [*shape[:2], stored, rows] if part.dim == 2 else shape}
        elif isinstance(part, ExactStore):
            first = min(numbers["length"], part.sinks)
            counts = dict(zip(PARTS, (first, numbers["length"] - first, numbers["spare"]), strict=True))
            if numbers["open"]:
                rows = layer.bases.width
            elif part.rows and part.sinks:
                counts["rest"] = first
            shapes = {f"{side}.{p}": [heads, batch, n, rows] for side in SIDES for p, n in counts.items()}
        else:
            shapes = {"data": [heads, batch, held]}
        dtype = _dtype(name, part, numbers, layer.dtype)
        own = {key: tensors.pop(f"{name}.{key}") for key in shapes if f"{name}.{key}" in tensors}
        for key, shape in shapes.items() if own or any(0 not in shape for shape in shapes.values()) else ():
            if key not in own or [*own[key].shape] != shape or own[key].dtype != dtype:
                raise FileError(f"{fields.where}: {key} must be of {dtype} and shape {shape}")
            if name == "exact" and dtype == torch.uint8 and not torch.isfinite(decode_rows(own[key])).all():
                raise FileError(f"{fields.where}: {key} holds NaN or infinity")
        restored = {**_state(part), **numbers, **_restored(part, own, layer.bases.device)}
        if isinstance(part, HeavyHitters):
            vars(part).update(restored)
        else:
            part.__setstate__(restored)
    if batch:
        layer.length, layer._shape = length, (batch, layer.heads, layer.bases.width)
        layer.device, layer.is_initialized = layer.bases.device, True
        layer.pending, layer.draft = saved.whole("pending"), saved.whole("draft")
        layer.record_past = saved.flag("record_past")


def _dtype(name: str, part: Part, numbers: dict[str, int], dtype: torch.dtype) -> torch.dtype:
    """Of the tensors of a part of a layer that stores ``dtype``."""
    if isinstance(part, ExactStore) and part.rows:
        return torch.float32 if numbers["open"] else torch.uint8
    return torch.uint8 if name.endswith(".codes") else torch.float32 if name == "hitters" else dtype


def _restored(part: Part, tensors: dict[str, Tensor], device: torch.device) -> dict[str, Any]:
    """The inverse of `_tensors`."""
    moved = {key: tensor.to(device, copy=True) for key, tensor in tensors.items()}
    if isinstance(part, ExactStore):
        data = [[moved[f"{side}.{p}"] for p in PARTS] for side in SIDES] if moved else []
        return {"data": data, "rest": [moved[f"{side}.rest"] for side in SIDES if f"{side}.rest" in moved]}
    return {"mass" if isinstance(part, HeavyHitters) else "data": moved.get("data")}


def _frozen(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    """What a stock layer has, as JSON; its tensors go into the dictionary under their place."""
    if isinstance(value, Tensor):
        tensors[place] = value.clone()
        return {"tensor": True}
    if isinstance(value, dict):
        return {str(key): _frozen(item, f"{place}.{key}", tensors) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_frozen(item, f"{place}.{key}", tensors) for key, item in enumerate(value)]
    if isinstance(value, bool | int | float | str | None):
        return value
    raise CacheMismatchError(f"{place}: a {type(value).__name__} of a stock layer cannot be saved")


def _thaw(layer: Any, saved: Fields, tensors: dict[str, Tensor], device: torch.device) -> None:
    """Put what was saved of a stock layer into an empty one of its kind; its tensors are taken out of the
    dictionary."""
    tensors_left = {name: tensors.pop(name).to(device, copy=True) for name in [*tensors]}
    states = [tensor for tensor in tensors_left.values() if tensor.is_floating_point()]
    for name, empty in [*vars(layer).items()]:
        if name not in DERIVED:
            setattr(layer, name, _thawed(saved.values.get(name), empty, name, tensors_left, saved.where))
    if states:
        layer.dtype, layer.device = states[0].dtype, device
    tensors |= tensors_left


def _thawed(saved: Any, empty: Any, place: str, tensors: dict[str, Tensor], where: str) -> Any:
    """The inverse of `_frozen`, for what has the form of ``empty``."""
    if saved == {"tensor": True} and isinstance(empty, Tensor | None) and place in tensors:
        return tensors.pop(place)
    if isinstance(empty, dict) and isinstance(saved, dict) and saved.keys() == {str(key) for key in empty}:
        return {key: _thawed(saved[str(key)], item, f"{place}.{key}", tensors, where) for key, item in empty.items()}
    if isinstance(empty, list) and isinstance(saved, list) and len(saved) == len(empty):
        return [
            _thawed(one, item, f"{place}.{key}", tensors, where)
            for key, (one, item) in enumerate(zip(saved, empty, strict=True))
        ]
    if isinstance(saved, bool | int | float | str | None) and (empty is None or type(saved) is type(empty)):
        return saved
    raise FileError(f"{where}: {place!r} is not what a layer of this kind has, got {short(saved)}")
