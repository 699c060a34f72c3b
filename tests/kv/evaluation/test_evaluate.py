"""Measuring caches: against independent computations with the stock model, on tiny random models."""

import json
import math
import string
from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import DynamicCache, PreTrainedTokenizerFast, QuantizedCache

from nestling import kv
from nestling.errors import BudgetError, EvaluationError, TextTooShortError
from nestling.kv.cache.buffer import room
from nestling.kv.evaluation.config import EvalConfig
from nestling.kv.evaluation.evaluate import Candidate, ResultStore, compare, evaluate
from nestling.kv.evaluation.scoring import choice_scores
from nestling.kv.evaluation.tasks import DEPTHS, choice_pairs, encode_question, held_bytes, passkey_prompts
from nestling.kv.integration.attach import cached

from ..families import cache_of_bases, nested_cache, tiny_fit, tiny_model

LETTERS = string.ascii_letters + string.digits + string.punctuation + " \n"
VOCABULARY = 128
ROWS = [
    {"question": "The cat sat on the ", "choices": ["mat.", "moon of Jupiter.", "hat"], "answer": 0},
    {"question": "Water is", "choices": [" wet", "dry and hard"], "answer": 1},
    {"question": "Ann gave Bob a book so _ was happy.", "choices": ["Ann", "Bob"], "answer": 1},
]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer():
    """One token a character."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {letter: i + 3 for i, letter in enumerate(LETTERS)}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    raw.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", pad_token="<pad>")


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, 97, (12, 96), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama-gqa", vocab_size=VOCABULARY)


@pytest.fixture(scope="module")
def stock():
    """The same weights, never switched to another attention function."""
    return tiny_model("llama-gqa", vocab_size=VOCABULARY)


@pytest.fixture(scope="module")
def adapter(model, ids):
    return tiny_fit(model, ids, length=96, sensitivity_length=48)


def run(model, adapter, ids=None, budgets=(1.0,), **options):
    tokenizer, store = options.pop("tokenizer", None), options.pop("store", None)
    if options.pop("paper", False):
        options |= {"sinks": 0, "window": 0}
    usual = {"windows": 3, "length": 48, "chunk": 16, "window": 0, "quantise": False, "dtype": model.dtype}
    config = EvalConfig(**{**usual, "budgets": budgets, **options})
    return evaluate(model, tokenizer, ids, adapter, config, progress=False, store=store)


def test_the_full_budget_is_the_full_model(model, adapter, stock, ids):
    full, ours = run(model, adapter, ids)
    windows = ids[:, :48][:2].tolist() + [ids[0, 48:].tolist()]
    windows = torch.tensor([windows[0], windows[2], windows[1]])  # rows are cut into windows, in order
    with torch.no_grad():
        loss = stock(input_ids=windows, labels=windows).loss
    assert (full["method"], full["budget"], full["kl"], full["top1"]) == ("full", None, 0, 1)
    assert full["model"] == "llama"
    assert full["ppl"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert (ours["method"], ours["budget"], ours["top1"]) == ("balanced-energy", 1.0, 1)
    assert abs(ours["kl"]) < 1e-5
    assert ours["ppl"] == pytest.approx(full["ppl"], rel=1e-5)
    assert "above_chance" not in full


def test_numbers_equal_an_independent_computation(model, adapter, stock, ids):
    _, ours = run(model, adapter, ids[:2], [0.6], windows=2, length=96, sinks=0, chunk=7)
    kl, nll, hits = [], [], []
    with torch.no_grad():
        for window in ids[:2]:
            cache = nested_cache(model, adapter, 0.6, paper=True)
            student = model(input_ids=window[None], **cached(model, cache)).logits[0].double()
            teacher = stock(input_ids=window[None]).logits[0].double()
            p = teacher.softmax(-1)
            kl += (p * (p.log() - student.softmax(-1).log())).sum(-1).tolist()
            hits += (student.argmax(-1) == teacher.argmax(-1)).tolist()
            nll += [-float(student[t].softmax(-1)[window[t + 1]].log()) for t in range(95)]
    assert ours["kl"] == pytest.approx(sum(kl) / len(kl), rel=1e-3)
    assert ours["ppl"] == pytest.approx(math.exp(sum(nll) / len(nll)), rel=1e-4)
    assert ours["top1"] == pytest.approx(sum(hits) / len(hits), abs=1 / 192)


def test_more_bytes_less_distance(model, adapter, ids):
    rows = run(model, adapter, ids, [1.0, 0.75, 0.5], windows=8, sinks=0)[1:]
    assert rows[0]["kl"] < rows[1]["kl"] < rows[2]["kl"]
    assert rows[0]["bytes_share"] > rows[1]["bytes_share"] > rows[2]["bytes_share"]


def test_the_chunk_does_not_matter_when_all_is_compressed(model, adapter, ids):
    rows = [run(model, adapter, ids, [0.6], sinks=0, chunk=chunk)[1] for chunk in (5, 16, 48)]
    for row in rows[1:]:
        assert row["kl"] == pytest.approx(rows[0]["kl"], rel=1e-3)
        assert row["ppl"] == pytest.approx(rows[0]["ppl"], rel=1e-4)


def test_prompts_are_read_compressed(model, adapter, ids):
    assert run(model, adapter, ids, [0.6], chunk=48)[1]["kl"] > 1e-3
    assert run(model, adapter, ids, [0.6], chunk=48, exact_prompt=True)[1]["kl"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "moe"])
def test_other_families(family, ids):
    model = tiny_model(family)
    adapter = tiny_fit(model, ids, length=96, sensitivity_windows=2, sensitivity_length=48)
    full, ours = run(model, adapter, ids, windows=2)
    assert abs(ours["kl"]) < 1e-5 and ours["top1"] == 1


def test_bytes_are_those_of_storage(model, adapter, ids):
    cache = nested_cache(model, adapter, 0.6, window=5)
    stock_cache = DynamicCache(config=model.config)
    quantised = QuantizedCache("quanto", model.config, nbits=4, q_group_size=16, residual_length=64)
    with torch.no_grad():
        for c in (cache, stock_cache, quantised):
            model(input_ids=ids[:2, :80], **cached(model, c))
    elements = 2 * 80 * 3 * 2 * 2 * 16  # batch, tokens, layers, keys and values, heads, width
    assert held_bytes(cache) == cache.nbytes > 0
    assert any(b is not None for layer in cache.layers for b in layer.biases), "means are not counted"
    assert held_bytes(stock_cache) == elements * 4
    assert held_bytes(quantised) == elements // 2 + 2 * elements // 16 * 4  # half a byte; scale and shift in fp32
    assert held_bytes(DynamicCache(config=model.config)) == 0
    view = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ids[:2, :80], **cached(model, view))
    view.crop(-40)
    assert held_bytes(view) == elements * 4, "a view keeps all of its storage"


def test_bytes_agree_on_sliding_layers(ids):
    model = tiny_model("gemma3")
    adapter = tiny_fit(model, ids, length=96, sensitivity_windows=2, sensitivity_length=48)
    cache = nested_cache(model, adapter, 0.6)
    with torch.no_grad():
        model(input_ids=ids[:2, :80], **cached(model, cache))
    assert held_bytes(cache) == cache.nbytes


def test_byte_columns(model, adapter, ids):
    full, ours = run(model, adapter, ids, [0.6], sinks=0, dtype=torch.bfloat16)
    per_token = 3 * 2 * 2 * 16 * 2  # layers, keys and values, heads, width, bytes of bf16
    assert full["bytes_per_token"] == 2 * per_token and full["bytes_share"] == 2  # the model is fp32
    cache = nested_cache(model, adapter, 0.6, paper=True, dtype=torch.bfloat16)
    with torch.no_grad():
        model(input_ids=ids[:1, :48], **cached(model, cache))
    assert ours["bytes_per_token"] == cache.nbytes / 48
    assert ours["bytes_share"] == pytest.approx(cache.nbytes / 48 / per_token)


def test_byte_columns_leave_layers_out_that_do_not_grow(ids):
    """Of the three layers of this model two have a window, and are in fp32 with any cache."""
    model = tiny_model("gemma3")
    adapter = tiny_fit(model, ids, length=96, sensitivity_windows=2, sensitivity_length=48)
    full, ours = run(model, adapter, ids, [0.6], paper=True, dtype=torch.bfloat16)
    assert full["bytes_per_token"] == 2 * 2 * 2 * 24 * 2 and full["bytes_share"] == 2
    cache = nested_cache(model, adapter, 0.6, paper=True, dtype=torch.bfloat16)
    with torch.no_grad():
        model(input_ids=ids[:1, :48], **cached(model, cache))
    assert ours["bytes_per_token"] == cache.layers[1].nbytes / 48 < cache.nbytes / 48


def brute_force(stock, context, rest):
    """Mean log-likelihood of a continuation, one token at a time, without a cache."""
    total = 0.0
    for place, token in enumerate(rest):
        with torch.no_grad():
            logits = stock(input_ids=torch.tensor([context + rest[:place]]), use_cache=False).logits[0, -1]
        total += float(logits.double().log_softmax(-1)[token])
    return total / len(rest)


@pytest.mark.parametrize("row", ROWS)
def test_choice_scores_are_mean_log_likelihoods(model, adapter, stock, tokenizer, row):
    pairs = encode_question(tokenizer, row)
    expected = [brute_force(stock, context, rest) for context, rest in pairs]
    for make in (
        lambda: nested_cache(model, adapter, 1.0, exact_prompt=False),
        lambda: DynamicCache(config=model.config),
    ):
        with torch.no_grad():
            scores = choice_scores(model, make, pairs, chunk=6)
        assert scores == pytest.approx(expected, abs=1e-4)


def test_choices_of_one_token(model, stock):
    for pairs in ([([5, 6], [7]), ([5, 6], [8, 9])], [([5, 6], [7]), ([5, 6], [8])]):
        with torch.no_grad():
            scores = choice_scores(model, lambda: DynamicCache(config=model.config), pairs, chunk=64)
        assert scores == pytest.approx([brute_force(stock, *pair) for pair in pairs], abs=1e-4)


def test_caches_that_cannot_be_repeated(model, tokenizer):
    """transformers' quantised layers inherit a repeat that forgets what is quantised: each choice gets a new cache."""
    pairs, caches = encode_question(tokenizer, ROWS[0]), []

    def make():
        caches.append(QuantizedCache("quanto", model.config, nbits=4, q_group_size=16))
        return caches[-1]

    with torch.no_grad():
        scores = choice_scores(model, make, pairs, chunk=6)
        alone = [choice_scores(model, make, [pair], chunk=6)[0] for pair in pairs]
    assert scores == alone
    assert [c.get_seq_length() for c in caches[1:4]] == [len(context) + len(rest) - 1 for context, rest in pairs]


def test_compressed_choices_read_the_same_cache_whether_repeated_or_not(model, adapter, tokenizer):
    pairs = encode_question(tokenizer, ROWS[0])

    def make():
        return nested_cache(model, adapter, 0.6, paper=True)

    with torch.no_grad():
        together = choice_scores(model, make, pairs, chunk=6)
        alone = [choice_scores(model, make, [pair], chunk=4)[0] for pair in pairs]
    assert together == pytest.approx(alone, abs=1e-4)


def test_task_columns(model, adapter, stock, tokenizer):
    full, ours, half = run(model, adapter, budgets=[1.0, 0.6], windows=0, tasks={"toy": ROWS}, tokenizer=tokenizer)
    right = 0
    for row in ROWS:
        scores = [brute_force(stock, *pair) for pair in encode_question(tokenizer, row)]
        right += scores.index(max(scores)) == row["answer"]
    assert full["acc_toy"] == ours["acc_toy"] == right / 3
    chance = (1 / 3 + 1 / 2 + 1 / 2) / 3
    assert "kl" not in full and full["bytes_share"] is None
    for row in (full, ours, half):
        if right / 3 > chance:
            assert row["above_chance"] == pytest.approx((row["acc_toy"] - chance) / (right / 3 - chance))
        else:
            assert row["above_chance"] is None


def test_above_chance(model, adapter, stock, tokenizer):
    """The answers are what the full model picks, so that it is right, and its retention 1."""
    rows = []
    for row in ROWS:
        scores = [brute_force(stock, *pair) for pair in encode_question(tokenizer, row)]
        rows.append({**row, "answer": scores.index(max(scores))})
    tasks = {"good": rows, "half": [*rows[1:], {**rows[1], "answer": (rows[1]["answer"] + 1) % 2}]}
    full, low = run(model, adapter, budgets=[0.6], windows=0, tasks=tasks, tokenizer=tokenizer)
    assert (full["acc_good"], full["acc_half"], full["above_chance"]) == (1, pytest.approx(2 / 3), 1)
    chance = (1 / 3 + 1 / 2 + 1 / 2) / 3 + 1 / 2  # of both tasks
    expected = (low["acc_good"] + low["acc_half"] - chance) / (5 / 3 - chance)
    assert low["above_chance"] == pytest.approx(expected)
    assert list(full)[-3:] == ["acc_good", "acc_half", "above_chance"]


def test_blanks():
    assert choice_pairs({"question": "so _ was late.", "choices": ["Ann ", "Bob"]}) == [
        ("so Ann", " was late."),
        ("so Bob", " was late."),
    ]
    assert choice_pairs({"question": "It is _'s car.", "choices": ["Ann"]}) == [("It is Ann", "'s car.")]
    assert choice_pairs({"question": "_ was late.", "choices": ["Ann"]}) == [("Ann", " was late.")]
    assert choice_pairs({"question": "It was the _.", "choices": ["end"]}) == [("It was the", " end.")]
    for plain in ("snake_case is", "Fill in: ____ is", "_ and _ are"):
        assert choice_pairs({"question": plain + " ", "choices": [" x"]}) == [(plain, " x")]


def test_tokens_that_cross_the_boundary():
    class Merging:
        """Characters, but "e c" is one token, as a tokenizer without word boundaries may have it."""

        def __call__(self, text, **_):
            return {"input_ids": [1, *map(ord, text.replace("e c", "\u2603"))]}

    pairs = encode_question(Merging(), {"question": "the", "choices": ["cat", "dog"]})
    assert [c for c, _ in pairs] == [[1, *map(ord, "th")]] * 2, "one context for both"
    assert [r for _, r in pairs] == [[0x2603, *map(ord, "at")], [*map(ord, "e dog")]]

    class Silent:
        def __call__(self, text, **_):
            return {"input_ids": [7]}

    with pytest.raises(EvaluationError, match="no token of context"):
        encode_question(Silent(), {"question": "the", "choices": ["cat", "dog"]})


def test_passkey_prompts(tokenizer):
    prompts = passkey_prompts(tokenizer, 400)
    assert len(prompts) == len(DEPTHS)
    places = []
    for (ids, key), (again, _) in zip(prompts, passkey_prompts(tokenizer, 400), strict=True):
        text = tokenizer.decode(ids)
        assert len(ids) == 400 and torch.equal(ids, again)
        assert len(key) == 5 and text.count(key) == 2 and text.endswith("The pass key is")
        places.append(text.index(key))
    assert places == sorted(places) and places[0] < 200 < places[-1]
    with pytest.raises(EvaluationError, match="takes [0-9]+ without filler"):
        passkey_prompts(tokenizer, 50)


def test_passkey_answers(model, adapter, tokenizer, monkeypatch):
    """A model that copies the key is right, a random one is not; both are read greedily."""
    full, ours = run(model, adapter, windows=0, passkey=[200], tokenizer=tokenizer)
    assert full["passkey_200"] == ours["passkey_200"] == 0
    assert ours["bytes_share"] == pytest.approx(full["bytes_share"] * room(200) / 200)

    answers = [list(tokenizer(f" {key}.")["input_ids"]) for _, key in passkey_prompts(tokenizer, 200)] * 2
    script = iter([token for answer in answers for token in answer + [2]])

    def scripted(logits_of):
        def forward(*args, **kwargs):
            logits = logits_of(*args, **kwargs)
            out = torch.zeros_like(logits if isinstance(logits, torch.Tensor) else logits[0])
            out[..., next(script)] = 1
            return out

        return forward

    monkeypatch.setattr("nestling.kv.evaluation.tasks.read", scripted(lambda *a: torch.zeros(1, VOCABULARY)))
    monkeypatch.setattr("nestling.kv.evaluation.tasks.forward", scripted(lambda *a: torch.zeros(1, 1, VOCABULARY)))
    candidate = Candidate("copy", None, lambda: DynamicCache(config=model.config))
    config = EvalConfig(windows=0, passkey=[200])
    rows = compare(model, tokenizer, None, [candidate], config, progress=False, store=_known_bytes())
    assert [row["passkey_200"] for row in rows] == [1, 1]


def _known_bytes():
    store = ResultStore()
    store.done["stock cache of 200 tokens"] = [1.0, 1.0]
    return store


def test_a_killed_job_goes_on(model, adapter, ids, tokenizer, tmp_path):
    options = dict(tasks={"toy": ROWS}, passkey=[200], tokenizer=tokenizer)
    expected = run(model, adapter, ids, [0.6], **options)
    file, job = tmp_path / "x.partial.json", {"model": "tiny"}
    made = 0

    def dying():
        nonlocal made
        made += 1
        if made > 3:  # the third window
            raise KeyboardInterrupt
        return nested_cache(model, adapter, 0.6, window=0, exact_prompt=False, context=48)

    config = EvalConfig(windows=3, length=48, chunk=16)
    with pytest.raises(KeyboardInterrupt):
        compare(model, None, ids, [Candidate("balanced-energy", 0.6, dying)], config, store=ResultStore(file, job))
    done = json.loads(file.read_text())["done"]
    assert sum("text" in key for key in done) == 4, "two windows of two candidates"

    calls = 0

    def counting():
        nonlocal calls
        calls += 1
        return nested_cache(model, adapter, 0.6, window=0, exact_prompt=False, context=48)

    candidate = Candidate("balanced-energy", 0.6, counting)
    resumed = compare(model, None, ids, [candidate], config, progress=False, store=ResultStore(file, job))
    assert calls == 2, "once to try the budget, once for the third window"
    columns = ("kl", "ppl", "top1")
    assert [[r[c] for c in columns] for r in resumed] == [[r[c] for c in columns] for r in expected]

    store = ResultStore(file, job)
    assert run(model, adapter, ids, [0.6], **options, store=store) == expected
    before = dict(store.done)
    assert run(model, adapter, ids, [0.6], **options, store=ResultStore(file, job)) == expected
    assert ResultStore(file, job).done == before
    with pytest.raises(EvaluationError, match="another job"):
        ResultStore(file, {"model": "other"})
    file.write_text('{"job"')
    with pytest.raises(EvaluationError, match="damaged"):
        ResultStore(file, job)


def test_errors(model, adapter, ids, tokenizer):
    def stock_cache():
        return DynamicCache(config=model.config)

    with pytest.raises(TextTooShortError, match="48 tokens"):
        run(model, adapter, ids[:, :40])
    with pytest.raises(TextTooShortError):
        run(model, adapter, ["short"], tokenizer=tokenizer)
    with pytest.raises(BudgetError):
        run(model, adapter, ids, [1.0, 0.001])
    with pytest.raises(EvaluationError, match="repeated: .*'same'"):
        compare(model, None, ids, [Candidate("same", None, stock_cache)] * 2, progress=False)
    with pytest.raises(EvaluationError, match="tokenizer"):
        run(model, adapter, ids, passkey=[200])
    with pytest.raises(EvaluationError, match="task empty has no questions"):
        run(model, adapter, ids, tokenizer=tokenizer, tasks={"empty": []})
    with pytest.raises(kv.AdapterError):
        run(tiny_model("llama-mha"), adapter, ids)


def test_logits_that_are_not_finite_name_the_candidate(model, adapter, ids, tokenizer):
    bases = {i: adapter._layer_bases(i) for i in range(3)}
    bases[1] = bases[1] | {"value_decode": torch.full_like(bases[1]["value_decode"], torch.nan)}
    allocation = adapter.allocate(96 / adapter.full_elements, "uniform")

    def broken():
        return cache_of_bases(bases, allocation, model.config, exact_prompt=False)

    candidate = Candidate("broken", 0.5, broken)
    for options, where in (
        (dict(windows=1, length=48), "window 1, tokens 0 to 47"),
        (dict(windows=0, tasks={"toy": ROWS}), "toy, question 1"),
        (dict(windows=0, passkey=[200]), "passkey_200"),
    ):
        with pytest.raises(EvaluationError, match=f"broken at 0.5: .*not finite.* in {where}"):
            compare(model, tokenizer, ids, [candidate], EvalConfig(**options), progress=False)


def test_the_model_keeps_its_mode_and_no_gradients_are_made(model, adapter, ids):
    model.train()
    try:
        rows = run(model, adapter, ids)
        assert model.training and abs(rows[1]["kl"]) < 1e-5
    finally:
        model.eval()
    assert all(p.grad is None for p in model.parameters())


def test_rank_tables_and_defaults(model, adapter, ids, tokenizer):
    table = adapter.allocate(96 / adapter.full_elements, "uniform")
    rows = run(model, adapter, ids, allocation=table)
    assert [(r["method"], r["budget"]) for r in rows] == [("full", None), ("balanced-ranks", None)]
    config = EvalConfig(budgets=[0.6], windows=1, length=64, window=0, quantise=False)
    built_in = evaluate(model, tokenizer, None, adapter, config, progress=False)
    assert built_in[1]["kl"] > 0


def test_trained_adapters_are_named_by_their_preset(model, adapter, ids):
    training = {"preset": "paper", "allocation": "uniform"}
    trained = replace(adapter, info={**adapter.info, "training": training})
    for allocation, name in (("uniform", "paper"), ("energy", "paper-energy")):
        rows = run(model, trained, ids, (0.9,), allocation=allocation, windows=1)
        assert [row["method"] for row in rows] == ["full", name]
