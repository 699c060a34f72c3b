"""Files that are read whole: whatever is in their place, one error names them, soon and in little memory."""

import json
import os
import resource
import time

import pytest
import torch
from safetensors.torch import save_file

from nestling.errors import AdapterError, DataError, NestlingError
from nestling.files.fields import Fields
from nestling.files.reading import (
    check_regular,
    parse,
    read_json,
    read_object,
    read_tensors,
    read_text,
    short,
    tensor_shapes,
)

READERS = (read_text, read_object, read_json, read_tensors, tensor_shapes, check_regular)


def pipe(path):
    os.mkfifo(path)


def socket(path):
    import socket as sockets

    sockets.socket(sockets.AF_UNIX).bind(str(path))


def link_to(target):
    return lambda path: path.symlink_to(target)


def sparse(path):
    with open(path, "wb") as file:
        file.truncate(2**40)


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize(
    "make",
    [
        pipe, socket, link_to("/dev/zero"), link_to("/dev/random"), link_to("gone"), link_to("file"), sparse,
        lambda path: path.mkdir(), lambda path: None,
    ],
)  # fmt: skip
def test_what_is_no_file(tmp_path, read, make):
    if (make, read) == (sparse, check_regular):
        return
    path, before, start = tmp_path / "file", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    make(path)
    with pytest.raises(AdapterError, match="file"):
        read(path, AdapterError)
    assert time.monotonic() - start < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024  # KiB


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("name", ["a\0b", "n" * 300, "file/below"])
def test_names_that_no_file_can_have(tmp_path, read, name):
    (tmp_path / "file").write_text("")
    with pytest.raises(AdapterError):
        read(tmp_path / name, AdapterError)


@pytest.mark.parametrize(
    "text, why",
    [
        ("", "JSON"),
        ("{", "JSON"),
        ("[]", "object"),
        ("null", "object"),
        ('{"a": NaN}', "NaN"),
        ('{"a": -Infinity}', "Infinity"),
        ('{"a": 1e999}', "too large"),
        ('{"a": ' + "1" * 400 + "}", "400 digits"),
        ('{"a": ' + "1" * 5000 + "}", "5000 digits"),
        ('{"a": ' * 100 + "1" + "}" * 100, "deep"),
        ('{"a":' + "[" * 5000 + "]" * 5000 + "}", "deep"),
        ("[" * 1_000_000, "deep"),
        ('{"a": 1, "b": 2, "a": 3}', "twice"),
        ('{"a": "\\ud800"}', "surrogate"),
        ('{"\\udfff": 1}', "surrogate"),
        ('{"a": [' + "{}," * 6_000_000 + "1]}", "values"),
        ("\ufeff{}", "JSON"),
    ],
)
def test_objects_that_are_none(tmp_path, text, why):
    (tmp_path / "a.json").write_text(text, "utf-8")
    start = time.monotonic()
    with pytest.raises(DataError, match=f"a.json is damaged.*{why}"):
        read_object(tmp_path / "a.json", DataError)
    assert time.monotonic() - start < 5


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "a.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(DataError, match="a.json is damaged: not UTF-8"):
        read_object(tmp_path / "a.json", DataError)


def test_what_json_may_hold(tmp_path):
    value = {"a": [1, -2.5e10, "text \U0001f600", None, True], "b": {"c": {}}, "d": 10**299}
    (tmp_path / "a.json").write_text(json.dumps(value).replace("d83d", "D83D"))
    assert read_object(tmp_path / "a.json") == value
    assert parse("[NaN, 1e999]")[1] == float("inf")
    nested: list = []
    for _ in range(60):
        nested = [nested]
    assert parse(json.dumps([nested, [0] * 100])) == [nested, [0] * 100]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda raw: raw[:-1],
        lambda raw: raw + b"\0",
        lambda raw: (2**40).to_bytes(8, "little") + raw[8:],
        lambda raw: (2**63).to_bytes(8, "little") + raw[8:],
        lambda raw: raw[:7],
        lambda raw: bytes(len(raw)),
        lambda raw: raw.replace(b"F32", b"F99"),
        lambda raw: raw.replace(b"F32", b"F64"),
        lambda raw: raw.replace(b"[0,16]", b"[4,16]"),
        lambda raw: raw.replace(b"[0,16]", b"[9,16]"),
        lambda raw: raw.replace(b"[0,16]", b"[16,0]"),
        lambda raw: raw.replace(b"[2,2]", b"[9,9]"),
        lambda raw: raw.replace(b"[2,2]", b"[-2]"),
        lambda raw: raw.replace(b'"b"', b'"a"'),
    ],
)
def test_weights_whose_header_lies(tmp_path, spoil):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(2, 2), "b": torch.ones(2, 2)}, path)
    assert tensor_shapes(path) == {"a": [2, 2], "b": [2, 2]} and read_tensors(path)["b"].sum() == 4
    raw = spoil(path.read_bytes())
    assert raw != path.read_bytes()
    path.write_bytes(raw)
    for read in (tensor_shapes, read_tensors):
        with pytest.raises(AdapterError, match="x.safetensors is truncated or not"):
            read(path, AdapterError)


GETTERS = {
    "whole": lambda fields: fields.whole("x", 1, 9),
    "number": lambda fields: fields.number("x", 0, 9),
    "text": lambda fields: fields.text("x", ("a", "b")),
    "flag": lambda fields: fields.flag("x"),
    "array": lambda fields: fields.array("x", 2),
    "numbers": lambda fields: fields.numbers("x", 2, 0),
    "object": lambda fields: fields.object("x").values,
    "objects": lambda fields: [item.values for item in fields.objects("x")],
}
GOOD = {"whole": 9, "number": 0.5, "text": "b", "flag": False, "array": ["a", None], "numbers": [0, 2.5], "object": {},
        "objects": [{"y": 1}, {}]}  # fmt: skip


@pytest.mark.parametrize("name", GETTERS)
def test_values_of_the_type_and_range_that_is_expected(name):
    assert GETTERS[name](Fields("a.json", {"x": GOOD[name]}, AdapterError)) == GOOD[name]
    hostile = [None, True, -1, 10, 0.5, float("nan"), 10**400, "z", [1], [10**400, 1], [True, 1], [-1, 1], ["1", 2],
               {"y": 1}, [3, {}]]  # fmt: skip
    taken = {"flag": [True], "number": [0.5], "array": hostile[9:13] + [[3, {}]], "object": [{"y": 1}]}
    for value in hostile:
        if any(value is good or value == good and type(value) is type(good) for good in taken.get(name, [])):
            continue
        with pytest.raises(AdapterError, match="a.json: 'x") as error:
            GETTERS[name](Fields("a.json", {"x": value}, AdapterError))
        assert len(str(error.value)) < 250
    with pytest.raises(AdapterError, match="a.json: 'x' is missing"):
        GETTERS[name](Fields("a.json", {}, AdapterError))


def test_values_that_may_be_missing():
    fields = Fields("a.json", {"null": None, "wrong": "x"}, NestlingError)
    assert fields.whole("gone", default=None) is None and fields.number("null", default=2.0) == 2.0
    with pytest.raises(NestlingError, match="a.json: 'wrong'"):
        fields.whole("wrong", default=None)
    with pytest.raises(NestlingError, match="a.json must be an object, got 3"):
        Fields("a.json", 3, NestlingError)


def test_values_too_long_to_show():
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    for value in (10**5000, deep, "x" * 1000):
        assert len(short(value)) <= 60
