"""Labelled pairs: what is positive is known by name, by a third label, or from the user; never guessed."""

import json

import numpy as np
import pytest

from nestling.data.pairs import read_pairs
from nestling.embed.training.data import Examples
from nestling.errors import DataError, ExampleError, OptionError

NLI, TWO = ("premise", "hypothesis"), ("text1", "text2")


def rows(labels, columns=NLI, **more):
    return [dict(zip(columns, (f"a{i}", f"b{i}"), strict=True)) | {"label": x} | more for i, x in enumerate(labels)]


def found(data, **options):
    """The numbers of the rows that came back as positive pairs."""
    pairs = read_pairs(data, **options)
    assert all(pair["anchor"][1:] == pair["positive"][1:] for pair in pairs)
    return [int(pair["anchor"][1:]) for pair in pairs]


@pytest.mark.parametrize("first", [0, 1, 2])
@pytest.mark.parametrize("kind", [int, float, str, np.int64, np.int8, np.float64])
def test_three_labels_are_those_of_the_hub(first, kind):
    labels = [first, 0, 1, 2, 1, 0, -1, 2, 0]
    assert found(rows(map(kind, labels))) == [i for i, label in enumerate(labels) if label == 0]


@pytest.mark.parametrize("labels", [[0, 1], [1, 1, 0], [0, 0], [1], [0, 1, -1]])
def test_two_integers_of_entailment_are_asked_about(labels):
    with pytest.raises(DataError, match=r"row 1: .*positive=0"):
        read_pairs(rows(labels))
    with pytest.raises(ExampleError):
        Examples.of(rows(labels))
    for said in {0, 1} & set(labels):
        assert found(rows(labels), positive=said) == [i for i, label in enumerate(labels) if label == said]


@pytest.mark.parametrize(
    "labels, positive",
    [
        (["entailment", "neutral", "contradiction"], [0]),
        (["Entailment", "CONTRADICTION", "ENTAILMENT "], [0, 2]),
        (["not_entailment", "entailment"], [1]),
        (["not duplicate", "duplicate"], [1]),
        (["not-equivalent", "equivalent", "nobody knows"], [1]),
        ([True, False, True], [0, 2]),
        ([np.bool_(True), np.bool_(False)], [0]),
        (["entailment", "-"], [0]),
        ([np.str_("neutral"), np.str_("entailment")], [1]),
    ],
)
def test_names_say_what_they_mean(labels, positive):
    for columns in (NLI, TWO):
        assert found(rows(labels, columns)) == positive


def test_names_of_the_data_set_count_more_than_convention(tmp_path):
    datasets = pytest.importorskip("datasets")
    for names in (["entailment", "not_entailment"], ["not_entailment", "entailment"]):
        kinds = datasets.Features(
            premise=datasets.Value("string"),
            hypothesis=datasets.Value("string"),
            label=datasets.ClassLabel(names=names),
        )
        made = datasets.Dataset.from_list(rows([0, 1, 1, -1]), features=kinds)
        expected = [i for i, label in enumerate([0, 1, 1]) if names[label] == "entailment"]
        made.to_parquet(tmp_path / "a.parquet")
        made.save_to_disk(tmp_path / names[0])
        for data in (made, made.to_iterable_dataset(), datasets.DatasetDict(train=made), tmp_path / "a.parquet",
                     tmp_path / names[0], made.with_format("torch"), made.with_format("arrow")[:]):  # fmt: skip
            assert found(data) == expected
        renamed = made.rename_column("label", "gold")
        assert found(renamed, columns={"label": "gold"}) == expected
        assert [int(a[1:]) for a in Examples.of(made).columns["anchor"]] == expected
        assert found(made, positive="entailment") == found(made, positive=names.index("entailment")) == expected
        assert found(made, positive="not_entailment") == [i for i in range(3) if i not in expected]


def test_names_beside_integers_as_setfit_has_them():
    texts = ["entailment", "neutral", "contradiction"]
    data = [row | {"label_text": texts[row["label"]]} for row in rows([1, 0, 2, 0], TWO)]
    assert found(data) == [1, 3]


def test_two_texts_with_a_third_integer_are_asked_about():
    assert found(rows([0, 1, 1, 0], TWO)) == [1, 2]
    with pytest.raises(DataError, match="row 3: it is not known what the label 2 means"):
        read_pairs(rows([0, 1, 2], TWO))
    assert found(rows([0, 1, 2], TWO), positive=2) == [2]
    assert found(rows([0, 1, 2], TWO), positive=[1, 2]) == [1, 2]


@pytest.mark.parametrize("label", [None, 0.5, float("nan"), [1], {"a": 1}, np.array([1])])
def test_what_is_no_label_is_refused(label):
    with pytest.raises(DataError, match="row 2: 'label' must be an integer or a text"):
        read_pairs(rows(["entailment", label]))


@pytest.mark.parametrize("label", [3, -2, 7])
def test_integers_that_nobody_knows(label):
    for columns in (NLI, TWO):
        with pytest.raises(DataError, match=f"row 2: it is not known what the label {label} means"):
            read_pairs(rows([0, label], columns))


def test_labels_without_a_positive_one_are_listed():
    with pytest.raises(DataError, match="labels are 'unrelated', 'related': .*positive="):
        read_pairs(rows(["unrelated", "related"]))
    assert found(rows(["unrelated", "related"]), positive="related") == [1]


def test_others_are_counted_by_label(tmp_path, caplog):
    caplog.set_level("INFO")
    path = tmp_path / "nli.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows([0, 1, 2, 2, -1])))
    read = read_pairs(path)
    assert read.left_out == {"pairs labelled 1": 1, "pairs labelled 2": 2, "pairs without a label": 1}
    assert "nli.jsonl, line 3: integer labels are read as 0 entailment" in caplog.text
    assert "pairs labelled 2 (2)" in caplog.text


@pytest.mark.parametrize("positive", [[], {}, [None], 0.5, object()])
def test_what_the_user_says_must_be_a_label(positive):
    with pytest.raises(OptionError, match="positive="):
        read_pairs(rows([0, 1]), positive=positive)


def test_rows_without_labels_have_nothing_to_be_told_about():
    with pytest.raises(OptionError, match="positive=1"):
        read_pairs([{"anchor": "a", "positive": "b"}], positive=1)
