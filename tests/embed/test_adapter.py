"""An adapter is a small file of one encoder: read back as it was, refused where it is damaged or of another model."""

import json
import os

import numpy as np
import pytest
import torch

from nestling.embed import ElasticAdapter, ElasticEncoder, TrainConfig
from nestling.embed.adapter_files import CONFIG_FILE, WEIGHTS_FILE, built_in
from nestling.errors import AdapterError, ExampleError, FileError, LadderError, OptionError

from .families import FAMILIES, some_texts

SIZES = "1x8,2x16,4x32"
TEXTS = list(dict.fromkeys(some_texts(80, seed=3)))


def trained(model) -> ElasticEncoder:
    config = TrainConfig(steps=3, batch_size=8, rank=2, held_out=0, progress=False, bf16=False)
    return ElasticEncoder.from_pretrained(model, SIZES).train(TEXTS, config)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_read_back_as_it_was(family, encoder, tmp_path):
    one = trained(encoder(family))
    one.adapter.save_pretrained(tmp_path / "adapter")
    read = ElasticEncoder.from_pretrained(encoder(family), adapter=tmp_path / "adapter")
    assert str(read.sizes) == SIZES and read.space == one.space and read.adapter.rank == 2
    assert read.info["training"]["steps"] == 3 and read.adapter.depth == 2
    for size in ("1x8", "2x16", "2x32", "4x32", "4x7"):
        np.testing.assert_array_equal(read.encode(TEXTS[:9], size), one.encode(TEXTS[:9], size))
    assert "Trained sizes (layers x dimensions) 1x8, 2x16, 4x32" in read.adapter.card
    again = ElasticAdapter.from_pretrained(tmp_path / "adapter")
    again.save_pretrained(tmp_path / "again")
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "adapter" / name).read_bytes()


def test_another_model_is_refused(encoder, tmp_path):
    one = trained(encoder())
    one.adapter.save_pretrained(tmp_path / "adapter")
    other = encoder()
    other[0].model.encoder.layer[3].output.dense.bias.data += 1e-3
    for model in (other, encoder("roberta"), encoder().half()):
        with pytest.raises(AdapterError, match="does not fit this model"):
            ElasticEncoder.from_pretrained(model, adapter=tmp_path / "adapter")
    with pytest.raises(AdapterError, match="neither an adapter folder nor a hub id"):
        ElasticEncoder.from_pretrained(encoder(), adapter=tmp_path / "nothing")


def test_damaged_files_are_refused(encoder, tmp_path):
    one = trained(encoder())
    folder = tmp_path / "adapter"
    one.adapter.save_pretrained(folder)
    config, weights = (folder / CONFIG_FILE).read_text(), (folder / WEIGHTS_FILE).read_bytes()

    def refused(message: str) -> None:
        with pytest.raises(AdapterError, match=message):
            ElasticAdapter.from_pretrained(folder)
        (folder / CONFIG_FILE).write_text(config)
        (folder / WEIGHTS_FILE).write_bytes(weights)

    for place in (3, 60, len(weights) // 2, len(weights) - 1):
        (folder / WEIGHTS_FILE).write_bytes(weights[:place] + bytes([weights[place] ^ 1]) + weights[place + 1 :])
        refused(WEIGHTS_FILE)
    (folder / WEIGHTS_FILE).write_bytes(weights[:-7])
    refused(WEIGHTS_FILE)
    (folder / WEIGHTS_FILE).unlink()
    refused(WEIGHTS_FILE)
    for key, value, message in (
        ("kind", "other", "'kind' must be"), ("format", 9, "format 9"), ("model", {"layers": 4}, "'dims' is missing"),
        ("sizes", "9x99,4x32", "9x99"), ("sizes", "1x8,3x16,4x32", r"lacks the projections of depths \[3\]"),
        ("sha256", "0" * 64, "sha256 differs"), ("space", None, "'space' must be"), ("training", 5, "'training'"),
    ):  # fmt: skip
        (folder / CONFIG_FILE).write_text(json.dumps({**json.loads(config), key: value}))
        refused(message)
    (folder / CONFIG_FILE).write_text("{")
    refused(CONFIG_FILE)
    os.remove(folder / CONFIG_FILE)
    refused("is missing: not a folder of an elastic adapter")


def test_places(encoder, tmp_path):
    one = trained(encoder())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "README.md").write_text("a user's own")
    with pytest.raises(FileError, match="holds other files and no adapter"):
        one.adapter.save_pretrained(tmp_path / "full")
    one.adapter.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "notes.txt").write_text("kept")
    one.adapter.card = "Another card."
    one.adapter.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "notes.txt").read_text() == "kept"
    assert ElasticAdapter.from_pretrained(tmp_path / "adapter").card == "Another card."
    one.save_pretrained(tmp_path / "encoder")
    (tmp_path / "encoder" / "adapter" / WEIGHTS_FILE).unlink()
    with pytest.raises(LadderError, match="the adapter is missing"):
        ElasticEncoder.from_pretrained(tmp_path / "encoder")


def test_spaces(encoder):
    one, other = trained(encoder()), trained(encoder("roberta"))
    assert one.space != other.space and ElasticEncoder(encoder(), SIZES).space is None
    assert one.encode_query(TEXTS[0], "1x8", space=one.space).shape == (8,)
    with pytest.raises(AdapterError, match=f"space='{other.space}', and this encoder's is {one.space}"):
        one.encode_document(TEXTS, "1x8", space=other.space)


def test_queries_for_documents_of_a_smaller_size(encoder):
    """They are the sum of both sizes' unit vectors, as wide as the documents."""
    one = trained(encoder())
    for documents, width in (("1x8", 8), ("2x32", 32)):
        wide, small = one.encode_query(TEXTS[:9]), one.encode_query(TEXTS[:9], documents)
        wide = wide[:, :width] / np.linalg.norm(wide[:, :width], axis=1, keepdims=True)
        wanted = (wide + small) / np.linalg.norm(wide + small, axis=1, keepdims=True)
        found = one.encode_query(TEXTS[:9], documents=documents, space=one.space)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)
        single = one.encode_query(TEXTS[0], documents=documents, convert_to_tensor=True)
        np.testing.assert_allclose(single.numpy(), wanted[0], rtol=0, atol=1e-6)
    np.testing.assert_allclose(
        one.encode_query(TEXTS[:9], "1x8", documents="1x8"), one.encode_query(TEXTS[:9], "1x8"), rtol=0, atol=1e-6
    )
    with pytest.raises(OptionError, match="documents=2x32 is wider than queries of 1x8"):
        one.encode_query(TEXTS, "1x8", documents="2x32")
    with pytest.raises(OptionError, match="leave sizes out"):
        one.encode_query(TEXTS, sizes=["1x8"], documents="1x8")
    with pytest.raises(LadderError, match="deeper than the model"):
        one.encode_query(TEXTS, documents="5x8")
    with pytest.raises(AdapterError, match="space='other'"):
        one.encode_query(TEXTS, documents="1x8", space="other")
    with pytest.raises(AdapterError, match="queries of 4x32 are in another space"):
        ElasticEncoder(encoder(), SIZES).encode_query(TEXTS, documents="1x8")


def test_alignment_fits_its_maps_in_its_space(encoder, tmp_path):
    one, new = trained(encoder()), list(dict.fromkeys(some_texts(120, seed=21)))

    def off() -> dict[str, float]:
        wanted = one.encode_query(new)
        return {
            size: float((1 - (one.encode_document(new, size) * wanted).sum(1)).mean()) for size in ("1x32", "2x32")
        }

    space, full, before = one.space, one.encode(TEXTS[:5]), off()
    one.align(new, progress=False)
    assert one.space == space and one.info["training"]["aligned"]["texts"] == len(new)
    assert all(after < before[size] for size, after in off().items())
    np.testing.assert_array_equal(one.encode(TEXTS[:5]), full)
    one.save_pretrained(tmp_path / "out")
    read = ElasticEncoder.from_pretrained(tmp_path / "out")
    np.testing.assert_array_equal(read.encode(TEXTS[:5], "2x16"), one.encode(TEXTS[:5], "2x16"))
    with pytest.raises(ExampleError, match="expected texts without labels"):
        one.align([{"anchor": "w9", "positive": "w8"}])


def test_training_on_pairs_takes_its_place(encoder):
    one = trained(encoder())
    pairs = [{"anchor": a, "positive": b} for a, b in zip(TEXTS[:20], TEXTS[20:40], strict=True)]
    one.train(pairs, TrainConfig(steps=1, batch_size=4, held_out=0, progress=False))
    assert one.adapter is None and one.space is None and sorted(one.projections) == [1, 2]


def test_measuring_reads_the_adapter(encoder, tmp_path):
    one = trained(encoder())
    rows = one.agreement(TEXTS[:40])
    assert [row["size"] for row in rows] == SIZES.split(",") and rows[-1]["agreement"] == pytest.approx(1)
    vectors = torch.tensor(one.encode(TEXTS[:40], "1x8"))
    sets = [{"sentence1": a, "sentence2": b, "score": float(c)} for a, b, c in
            zip(TEXTS[:20], TEXTS[20:40], (vectors[:20] * vectors[20:]).sum(-1), strict=True)]  # fmt: skip
    rows = one.evaluate(sts={"own": sets}, partial=tmp_path / "partial.json")
    assert rows[0]["own"] == pytest.approx(1, abs=1e-6) and rows[-1]["own"] < 1
    assert one.evaluate(sts={"own": sets}, partial=tmp_path / "partial.json") == rows
    assert one.choose(quality=0.1) == "1x8"


def test_what_comes_with_the_package():
    for name in built_in():
        adapter = ElasticAdapter.from_pretrained(name)
        assert adapter.base_model == name and adapter.card
