"""The grid evaluator against the evaluators of sentence-transformers on models that are really cut."""

import json
import math
import shutil

import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.evaluation import (
    EmbeddingSimilarityEvaluator,
    InformationRetrievalEvaluator,
)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from nestling.embed.evaluation.evaluator import GridEvaluator
from nestling.embed.evaluation.metrics import spearman
from nestling.embed.evaluation.results import cost_figure, grid_figure, markdown, save_results
from nestling.embed.ladder import Ladder
from nestling.embed.model.encode import encode, stored_prompts
from nestling.errors import DataError, EvaluationError, LadderError

from ..families import HIDDEN, LAYERS, cut_folder, sentence_model, some_texts
from ..sets import scored, searched

LADDER = "1x4,2x8,4x32"
DEEPER = "2x4,3x8,4x32"  # transformers 5.16 cannot load a ModernBERT of one layer


def stock(model, rows, data, dims, **prompts):
    """Spearman, nDCG@10 and recall@100 of a model by sentence-transformers, at the first dims."""
    columns = [[row[key] for row in rows] for key in ("sentence1", "sentence2", "score")]
    sts = EmbeddingSimilarityEvaluator(*columns, main_similarity="cosine", truncate_dim=dims)(model)
    relevant = {key: set(gains) for key, gains in data.relevant.items()}
    options = dict(precision_recall_at_k=[100], truncate_dim=dims, main_score_function="cosine", **prompts)
    found = InformationRetrievalEvaluator(data.queries, data.corpus, relevant, **options)(model)
    return sts["spearman_cosine"], found["cosine_ndcg@10"], found["cosine_recall@100"]


@pytest.mark.parametrize("family, pooling", [("bert", "mean"), ("modernbert", "cls"), ("qwen3", "lasttoken")])
def test_every_cup_equals_a_cut_model_in_stock_evaluators(backbones, tmp_path, family, pooling):
    rows, data = scored(), searched()
    evaluator = GridEvaluator(DEEPER, sts={"s": rows}, retrieval={"r": data}, batch_size=7)
    found = evaluator.rows(sentence_model(backbones(family), pooling), model_name="tiny", method="cut")
    assert [row["size"] for row in found] == DEEPER.split(",")
    for row in found:
        depth, dims = map(int, row["size"].split("x"))
        folder = shutil.copytree(backbones(family), tmp_path / row["size"])
        cut_folder(folder, depth)
        expected = stock(sentence_model(folder, pooling), rows, data, dims)
        assert (row["s"], row["ndcg_r"], row["recall_r"]) == pytest.approx(expected, abs=2e-3)
        assert (row["model"], row["method"]) == ("tiny", "cut")
        assert (row["mean_sts"], row["mean_ndcg"], row["mean_recall"]) == (row["s"], row["ndcg_r"], row["recall_r"])


def test_at_full_size_numbers_are_those_of_the_stock_evaluators(encoder):
    rows, data, model = scored(200), searched(300, 40), encoder()
    (row,) = GridEvaluator("4x32", sts={"s": rows}, retrieval={"r": data}).rows(model)
    sts, ndcg, recall = stock(model, rows, data, None)
    assert row["s"] == pytest.approx(sts, abs=1e-5)
    assert row["ndcg_r"] == pytest.approx(ndcg, abs=1e-6) and row["recall_r"] == pytest.approx(recall, abs=1e-6)


def test_the_grid_and_the_default_ladder(encoder):
    model, sts = encoder(), {"a": scored(20), "b": scored(20, seed=5)}
    grid = GridEvaluator(Ladder.parse(LADDER).grid, sts=sts).rows(model)
    assert [row["size"] for row in grid] == [f"{k}x{d}" for k in (1, 2, 4) for d in (4, 8, 32)]
    cells = {row["size"]: row for row in grid}
    for row in GridEvaluator(LADDER, sts=sts).rows(model):
        assert row["mean_sts"] == pytest.approx(cells[row["size"]]["mean_sts"], abs=1e-5)
        assert row["mean_sts"] == pytest.approx((row["a"] + row["b"]) / 2)
        assert "mean_ndcg" not in row
    assert [row["size"] for row in GridEvaluator(sts=sts).rows(model)][-1] == f"{LAYERS}x{HIDDEN}"


def test_texts_are_encoded_once_and_the_model_is_left_as_it_was(encoder, monkeypatch):
    model, rows, data = encoder(), scored(30), searched(20, 4)
    model.train()
    model[0].model.embeddings.eval()
    seen = []
    preprocess = model.preprocess
    monkeypatch.setattr(model, "preprocess", lambda texts, **kw: seen.extend(texts) or preprocess(texts, **kw))
    GridEvaluator(Ladder.parse(LADDER).grid, sts={"a": rows, "b": rows}, retrieval={"r": data}).rows(model)
    sentences = {row[key] for row in rows for key in ("sentence1", "sentence2")}
    assert len(seen) == len(sentences) + len(data.corpus) + len(data.queries)
    assert model.training and model[0].model.encoder.training and not model[0].model.embeddings.training
    assert not any(module._forward_hooks for module in model.modules())


def test_batches_are_sorted_and_order_is_kept(encoder):
    model, texts = encoder(), some_texts(30, seed=3)
    texts[4] = ""
    whole = encode(model, texts, {2: 8, 4: 32}, batch_size=30)
    small = encode(model, texts, {2: 8, 4: 32}, batch_size=4)
    assert whole[2].shape == (30, 8) and whole[4].shape == (30, 32) and whole[2].dtype == torch.float32
    for layer in whole:
        torch.testing.assert_close(small[layer], whole[layer], atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.from_numpy(model.encode(texts)), whole[4], atol=1e-5, rtol=0)


def test_prompts_are_those_that_are_named(encoder):
    model, rows, data = encoder(), scored(), searched()
    model.prompts = {"query": "w11 w12 ", "document": "", "passage": "w13 w14 w15 ", "other": "w9 "}
    model.default_prompt_name = "other"
    assert stored_prompts(model) == {"sts": "w9 ", "query": "w11 w12 ", "passage": "w13 w14 w15 "}
    (row,) = GridEvaluator("4x32", sts={"s": rows}, retrieval={"r": data}).rows(model)
    expected = stock(model, rows, data, None, query_prompt="w11 w12 ", corpus_prompt="w13 w14 w15 ")
    assert (row["s"], row["ndcg_r"], row["recall_r"]) == pytest.approx(expected, abs=1e-4)
    evaluator = GridEvaluator("4x32", sts={"s": rows}, retrieval={"r": data}, prompts={"sts": "", "query": "w20 "})
    assert evaluator.prompts_for(model) == {"sts": "", "query": "w20 ", "passage": "w13 w14 w15 "}
    (other,) = evaluator.rows(model)
    model.default_prompt_name = None
    expected = stock(model, rows, data, None, query_prompt="w20 ", corpus_prompt="w13 w14 w15 ")
    assert (other["s"], other["ndcg_r"], other["recall_r"]) == pytest.approx(expected, abs=1e-4)
    assert other["s"] != row["s"]


def test_projections_are_applied_before_the_cut(encoder):
    model, rows = encoder(), scored()
    flip = {layer: lambda x: x.flip(-1) for layer in (2, 4)}
    turned = GridEvaluator("2x8,4x32", sts={"s": rows}, projections=flip).rows(model)
    texts = [row[key] for key in ("sentence1", "sentence2") for row in rows]
    last = encode(model, texts, {2: 32})[2][:, -8:]
    assert turned[0]["s"] == pytest.approx(spearman(last[:40], last[40:], [row["score"] for row in rows]), abs=1e-4)
    (plain,) = GridEvaluator("4x32", sts={"s": rows}).rows(model)
    assert turned[1]["s"] == pytest.approx(plain["s"], abs=1e-4)  # at full width nothing is lost


def test_during_training(encoder, tmp_path):
    model = encoder()
    evaluator = GridEvaluator(LADDER, sts={"s": scored()}, retrieval={"r": searched()}, name="dev")
    first = evaluator(model, str(tmp_path / "eval"), epoch=0.5, steps=10)
    assert evaluator.primary_metric == "dev_mean" and evaluator.greater_is_better
    cups = LADDER.split(",")
    for kind in ("mean_sts", "mean_ndcg"):
        assert first[f"dev_{kind}"] == pytest.approx(sum(first[f"dev_{cup}_{kind}"] for cup in cups) / 3)
    assert first["dev_mean"] == pytest.approx((first["dev_mean_sts"] + first["dev_mean_ndcg"]) / 2)
    assert model.model_card_data.eval_results_dict[evaluator] == first
    assert evaluator(model, str(tmp_path / "eval"), epoch=1.0, steps=20) == pytest.approx(first)
    kept = json.loads((tmp_path / "eval" / "grid_dev.json").read_text())
    assert [(row["steps"], row["size"]) for row in kept["rows"]] == [(s, cup) for s in (10, 20) for cup in cups]
    (tmp_path / "eval" / "grid_dev.json").write_text("[]")
    with pytest.raises(EvaluationError, match="grid_dev.json is damaged"):
        evaluator(model, str(tmp_path / "eval"))


def test_the_stock_trainer_selects_by_it(encoder, tmp_path):
    model = encoder()
    pairs = Dataset.from_dict({"anchor": some_texts(8), "positive": some_texts(8, seed=1)})
    arguments = SentenceTransformerTrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=4, eval_strategy="steps", eval_steps=1, save_steps=1,
        load_best_model_at_end=True, metric_for_best_model="eval_dev_mean", report_to="none", use_cpu=True,
        disable_tqdm=True, learning_rate=0.1,
    )  # fmt: skip
    evaluator = GridEvaluator(LADDER, sts={"s": scored()}, name="dev")
    trainer = SentenceTransformerTrainer(
        model, arguments, train_dataset=pairs, loss=MultipleNegativesRankingLoss(model), evaluator=evaluator
    )
    trainer.train()
    logged = [entry["eval_dev_mean"] for entry in trainer.state.log_history if "eval_dev_mean" in entry]
    assert len(logged) == 2 and trainer.state.best_metric == max(logged)
    assert evaluator(trainer.model)["dev_mean"] == pytest.approx(max(logged), abs=1e-5)
    kept = json.loads((tmp_path / "eval" / "grid_dev.json").read_text())["rows"]
    assert [row["steps"] for row in kept] == [1, 1, 1, 2, 2, 2]


def test_a_killed_measurement_goes_on(encoder, tmp_path, monkeypatch):
    model, file = encoder(), tmp_path / "partial.json"
    sets = dict(sts={"s": scored()}, retrieval={"a": searched(), "b": searched(60, 5, seed=1)})
    evaluator = GridEvaluator(LADDER, **sets)
    whole = evaluator.rows(model, method="cut")
    seen, preprocess = [], model.preprocess
    before_last = len(evaluator.sentences) + 130 + 12

    def killed(texts, **options):
        if len(seen) >= before_last:
            raise KeyboardInterrupt
        seen.extend(texts)
        return preprocess(texts, **options)

    monkeypatch.setattr(model, "preprocess", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluator.rows(model, partial=file)
    seen.clear()
    monkeypatch.setattr(model, "preprocess", lambda texts, **kw: seen.extend(texts) or preprocess(texts, **kw))
    assert GridEvaluator(LADDER, **sets).rows(model, method="cut", partial=file) == whole
    assert len(seen) == 65  # the last set alone
    seen.clear()
    assert evaluator.rows(model, method="cut", partial=file) == whole and not seen
    assert [path.name for path in tmp_path.iterdir()] == ["partial.json"]

    other = GridEvaluator(LADDER, **sets, prompts={"query": "w9 "})
    with pytest.raises(EvaluationError, match=r"of another job \(prompts differ\)"):
        other.rows(model, partial=file)
    with pytest.raises(EvaluationError, match=r"\(cups differ\)"):
        GridEvaluator("4x32", **sets).rows(model, partial=file)
    with pytest.raises(EvaluationError, match=r"\(sts differ\)"):
        GridEvaluator(LADDER, **sets | {"sts": {"s": scored(seed=8)}}).rows(model, partial=file)
    model.max_seq_length = 7
    with pytest.raises(EvaluationError, match=r"\(max_seq_length differ\)"):
        evaluator.rows(model, partial=file)
    model.max_seq_length = 64
    model[1].pooling_mode = "cls"
    with pytest.raises(EvaluationError, match=r"\(pooling differ\)"):
        evaluator.rows(model, partial=file)
    model[1].pooling_mode = "mean"
    with torch.no_grad():
        model[0].model.embeddings.word_embeddings.weight[50, 3] += 1e-3
    with pytest.raises(EvaluationError, match=r"\(weights differ\)"):
        evaluator.rows(model, partial=file)
    file.write_text(file.read_text()[:-9])
    with pytest.raises(EvaluationError, match="partial.json is damaged"):
        evaluator.rows(model, partial=file)


def test_what_cannot_be_measured_is_refused(encoder, tmp_path):
    rows = scored(10)
    for sets, expected in [
        ({}, "nothing to measure"),
        ({"sts": {"s": [row | {"score": 3} for row in rows]}}, "s: a correlation needs pairs with different scores"),
        ({"sts": {"s": [row | {"score": math.nan} for row in rows]}}, "s: row 1: 'score' must be a finite number"),
        ({"sts": {"s": []}}, "s: list: empty"),
        ({"sts": {"mean_x": rows}}, "cannot be called mean_x"),
        ({"sts": {"minutes": rows}}, "cannot be called minutes"),
        ({"sts": {"s": rows}, "prompts": {"doc": "x"}}, "unknown use of a prompt"),
    ]:
        with pytest.raises(EvaluationError, match=expected):
            GridEvaluator(LADDER, **sets)
    with pytest.raises(DataError, match="no such file"):
        GridEvaluator(LADDER, sts={"s": tmp_path / "a.jsonl"})
    with pytest.raises(DataError, match="no such folder"):
        GridEvaluator(LADDER, retrieval={"r": tmp_path / "a"})
    model = encoder()
    with pytest.raises(LadderError, match="5x8 is deeper than the model"):
        GridEvaluator("2x8,5x8", sts={"s": rows}).rows(model)
    with pytest.raises(LadderError, match="4x64 is wider than the model"):
        GridEvaluator("2x8,4x64", sts={"s": rows}).rows(model)
    same = [row | {"sentence1": "w9", "sentence2": "w9"} for row in rows]
    (row,) = GridEvaluator("4x32", sts={"s": same}).rows(model)
    assert math.isnan(row["s"])
    with torch.no_grad():
        model[0].model.encoder.layer[3].output.dense.bias.fill_(math.nan)
    shallow = GridEvaluator("3x8", sts={"s": rows})  # does not run what is broken
    assert shallow.rows(model) == shallow.rows(encoder())
    with pytest.raises(EvaluationError, match="the embedding at layer 4 is not finite for 1. of 1. texts"):
        GridEvaluator(LADDER, sts={"s": rows}).rows(model)


def measured(method, gain=0.0):
    cells = [(k, d) for k in (1, 2, 4) for d in (4, 8)]
    return [
        {"model": "m", "method": method, "size": f"{k}x{d}", "s": 0.1 * k + gain}
        | {"mean_sts": 0.1 * k + 0.01 * d + gain}
        for k, d in cells
    ]


def test_results_as_files(tmp_path):
    rows = measured("cut") + [row for row in measured("srl", 0.2) if row["size"] != "2x4"]
    rows[0]["mean_sts"] = math.nan
    files = save_results(tmp_path / "new" / "results", rows, {"note": 1})
    assert sorted(path.name for path in files) == ["cost.png", "grid.json", "grid.md", "grid.png"]
    assert all(path.stat().st_size for path in files)
    stored = json.loads(files[0].read_text())
    assert stored["rows"][0]["mean_sts"] is None and stored["rows"][1] == rows[1] and stored["meta"] == {"note": 1}
    lines = files[1].read_text().splitlines()
    assert lines[0] == "| model | method | size | s | STS, mean |" and len(lines) == 2 + len(rows)
    assert lines[3] == "| m | cut | 1x8 | 10 | 18 |"
    assert markdown(rows, ["size", "s"]).splitlines()[2] == "| 1x4 | 10 |"
    agreed = [{"size": "1x4", "agreement": 0.5, "overlap": 0.25, "minutes": 1.5, "peak_mib": 8.25, "seed": 0}]
    assert markdown(agreed).splitlines()[2] == "| 1x4 | 50 | 25 | 1.5 | 8.25 | 0 |"


def test_figures_show_what_was_measured():
    rows = measured("cut") + [row for row in measured("srl", 0.2) if row["size"] != "2x4"]
    figure = grid_figure(rows)
    panels = [axes for axes in figure.axes if axes.get_title(loc="left") in ("cut", "srl")]
    assert [label.get_text() for label in panels[0].get_yticklabels()] == ["1", "2", "4"]
    assert [label.get_text() for label in panels[0].get_xticklabels()] == ["4", "8"]
    shown = panels[1].collections[0].get_array()
    assert shown.reshape(3, 2)[0, 1] == pytest.approx(0.38) and shown.reshape(3, 2).mask[1, 0]
    lines = {line.get_label(): line for line in cost_figure(rows).axes[0].lines}
    assert list(lines["cut"].get_xdata()) == [0.25, 0.5, 1.0]  # the widest cup of each depth
    assert list(lines["cut"].get_ydata()) == pytest.approx([0.18, 0.28, 0.48])
    other = [row | {"model": "n"} for row in measured("cut")]
    lines = {line.get_label(): line for line in cost_figure(measured("cut") + other).axes[0].lines}
    assert {"cut, m", "cut, n"} <= set(lines) and "cut" not in lines
    costs = {row["size"]: 10.0 * i for i, row in enumerate(rows)}
    axes = cost_figure(rows, costs=costs, label="ms a text").axes[0]
    assert axes.get_xlabel() == "ms a text" and "FLOPs" in cost_figure(rows).axes[0].get_xlabel()
