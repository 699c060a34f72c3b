"""What transformers does with caches, for every family and budget: at 1 as its own caches, below it consistently.

Below 1 the same tokens must give the same text however they come to the cache: in one call or in many, from a copy,
from a file, after a draft that was taken back, in beams that were reordered. Text may differ only where two tokens are
as likely as each other but for rounding.
"""

import copy
import pickle

import pytest
import torch
from transformers import DynamicCache

from ..families import FAMILIES, MORE, nested_cache, tiny_model

NEW = 14
BUDGETS = {"1": dict(budget=1.0), "0.5": dict(budget=0.5, quantise=True), "0.25": dict(budget=0.25, quantise=True)}
QUICK = ["llama-gqa", "gemma3"]
MATRIX = [
    pytest.param(family, budget, id=f"{family}-{budget}", marks=() if family in QUICK else pytest.mark.slow)
    for family in ("llama-gqa", "gemma3", *[f for f in (*FAMILIES, *MORE) if f not in ("llama-gqa", "gemma3")])
    for budget in BUDGETS
]
every = pytest.mark.parametrize("family, budget", MATRIX)


class Case:
    """A model, and caches of a budget for it; at full budget beside a stock model with stock caches."""

    def __init__(self, made, budget: str):
        self.made, self.budget, self.model = made, budget, made.model
        self.full = budget == "1"

    def cache(self, **options):
        base = dict(sinks=2, window=6, context=256) if not self.full else {}
        return nested_cache(self.model, self.made.adapter, **{**base, **BUDGETS[self.budget], **options})

    def generate(self, tokens, cache, mask=None, **more):
        """The text that is added, ``[B, new]``, and the logits of each of its tokens."""
        out = self.model.generate(
            tokens, attention_mask=torch.ones_like(tokens) if mask is None else mask, past_key_values=cache,
            return_dict_in_generate=True, output_logits=True,
            **{"do_sample": False, "max_new_tokens": NEW, "min_new_tokens": NEW, **more},
        )  # fmt: skip
        return out.sequences[:, tokens.shape[1] :], torch.stack(out.logits, 1) if out.logits else None

    def stock(self, tokens, mask=None, **more) -> torch.Tensor:
        """The same of a stock model with transformers' own cache."""
        torch.manual_seed(0)
        return self.made.stock.generate(
            tokens, attention_mask=torch.ones_like(tokens) if mask is None else mask,
            **{"do_sample": False, "max_new_tokens": NEW, "min_new_tokens": NEW, **more},
        )[:, tokens.shape[1] :]  # fmt: skip

    @torch.no_grad()
    def by_hand(self, calls, cache, new: int = NEW, mask=None):
        """Read some calls, then write ``new`` tokens one by one: what generate must come to."""
        for call in calls:
            out = self._forward(call, cache, mask)
        text, logits = [], []
        for _ in range(new):
            last = out.logits[:, -1].float()
            logits.append(last.clone())
            last[:, 2] = -torch.inf  # the end of a text is not written
            text.append(last.argmax(-1))
            if mask is not None:
                mask = torch.cat((mask, torch.ones_like(mask[:, :1])), 1)
            if len(text) < new:
                out = self._forward(text[-1][:, None], cache, mask)
        return torch.stack(text, 1), torch.stack(logits, 1)

    def _forward(self, tokens, cache, mask):
        if mask is None:
            return self.model(input_ids=tokens, past_key_values=cache)
        end = cache.get_seq_length() + tokens.shape[1]
        places = (mask[:, :end].cumsum(-1) - 1).clamp_min(0)[:, -tokens.shape[1] :]
        return self.model(input_ids=tokens, past_key_values=cache, attention_mask=mask[:, :end], position_ids=places)


@pytest.fixture
def case(fitted, family, budget):
    return Case(fitted(family), budget)


def same_text(text, expected, logits) -> None:
    """Equal, or different from a place on where the two best tokens have nearly the same logit."""
    assert text.shape == expected.shape
    for row in range(len(text)):
        different = (text[row] != expected[row]).nonzero()
        if len(different):
            place = logits[row, int(different[0])]
            best = place.topk(3).values
            assert float(best[0] - best[1]) < 0.05 * float(place.std()), f"row {row}, token {int(different[0])}"


@every
def test_greedy_with_left_padding(case, ids):
    mask = (torch.arange(20) >= torch.tensor([0, 5, 13])[:, None]).long()
    tokens = ids[:3, :20] * mask
    text, logits = case.generate(tokens, case.cache(), mask)
    if case.full:
        assert torch.equal(text, case.stock(tokens, mask))
    same_text(text, *case.by_hand([tokens], case.cache(), mask=mask))


@every
def test_sampling_and_returned_sequences(case, ids):
    sampling = dict(do_sample=True, top_k=20)
    torch.manual_seed(0)
    text, logits = case.generate(ids[:2, :20], case.cache(), num_return_sequences=3, **sampling)
    if case.full:
        assert torch.equal(text, case.stock(ids[:2, :20], num_return_sequences=3, **sampling))
    torch.manual_seed(0)
    again, _ = case.generate(ids[:2, :20].repeat_interleave(3, 0), case.cache(), **sampling)
    assert torch.equal(text, again)
    assert len({tuple(row.tolist()) for row in text[:3]}) == 3


@torch.no_grad()
def beams_by_hand(case, tokens, count: int, new: int):
    """Beam search that reads every beam anew at each step: prompt, then token by token."""
    beams = [(0.0, [])]
    for _ in range(new):
        cache = case.cache()
        rows = torch.tensor([text for _, text in beams], dtype=torch.long).reshape(len(beams), -1)
        out = case.model(input_ids=tokens.repeat(len(beams), 1), past_key_values=cache)
        for place in range(rows.shape[1]):
            out = case.model(input_ids=rows[:, place : place + 1], past_key_values=cache)
        scores = out.logits[:, -1].float().log_softmax(-1)
        scores[:, 2] = -torch.inf  # the end of a text is not written
        found = [
            (score + float(scores[i, token]), [*text, token])
            for i, (score, text) in enumerate(beams)
            for token in scores[i].topk(count).indices.tolist()
        ]
        beams = sorted(found, reverse=True)[:count]
    return beams


@every
def test_beams(case, ids):
    new = 6
    options = dict(num_beams=3, num_return_sequences=3, max_new_tokens=new, min_new_tokens=new, do_sample=False)
    out = case.model.generate(
        ids[:1, :20], attention_mask=torch.ones(1, 20, dtype=torch.long), past_key_values=case.cache(),
        return_dict_in_generate=True, output_scores=True, **options,
    )  # fmt: skip
    expected = beams_by_hand(case, ids[:1, :20], 3, new)
    scores = [score / new for score, _ in expected]
    torch.testing.assert_close(out.sequences_scores, torch.tensor(scores), rtol=5e-3, atol=5e-3)
    if min(a - b for a, b in zip(scores, scores[1:], strict=False)) > 5e-3:
        assert out.sequences[:, 20:].tolist() == [text for _, text in expected]
    if case.full:
        stock = case.stock(ids[:1, :20], **options)
        assert torch.equal(out.sequences[:, 20:], stock)


@every
def test_a_prefix_is_read_once_and_gone_on_with_often(case, ids):
    prefix = ids[:1, :30]
    start = case.cache()
    with torch.no_grad():
        case.model(input_ids=prefix, past_key_values=start)
    kept = start.nbytes
    for how in (copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))):
        for suffix in (ids[1:2, :1], ids[2:3, :9], ids[3:4, :25]):
            whole = torch.cat((prefix, suffix), 1)
            text, _ = case.generate(whole, how(start))
            same_text(text, *case.by_hand([prefix, suffix], case.cache()))
            if case.full:
                assert torch.equal(text, case.stock(whole))
    assert (start.get_seq_length(), start.nbytes) == (30, kept)


@every
def test_a_rollback_leaves_no_trace(case, ids):
    prefix, draft, rest = ids[:1, :30], ids[1:2, :11], ids[2:3, :8]
    cache = case.cache()
    cache.activate_past_recording()  # which layers with a sliding window need
    with torch.no_grad():
        case.model(input_ids=prefix, past_key_values=cache)
        cache.crop(0)
        for call in (draft[:, :1], draft[:, 1:]):
            case.model(input_ids=call, past_key_values=cache)
    cache.crop(-11)
    assert cache.get_seq_length() == 30
    text, _ = case.by_hand([rest], cache)
    same_text(text, *case.by_hand([prefix, rest], case.cache()))
    if case.full:
        assert torch.equal(text, case.stock(torch.cat((prefix, rest), 1)))


@every
def test_rows_of_a_batch(case, ids):
    rest = ids[4:8, :5]
    start = case.cache()
    with torch.no_grad():
        case.model(input_ids=ids[:4, :30], past_key_values=start)
    alone = [case.by_hand([ids[i : i + 1, :30], rest[:1]], case.cache()) for i in range(4)]
    for verb, argument, rows in (
        ("reorder_cache", torch.tensor([2, 0, 0, 3]), [2, 0, 0, 3]),
        ("batch_select_indices", torch.tensor([3, 1]), [3, 1]),
        ("batch_repeat_interleave", 2, [0, 0, 1, 1, 2, 2, 3, 3]),
    ):
        cache = copy.deepcopy(start)
        getattr(cache, verb)(argument)
        text, _ = case.by_hand([rest[:1].repeat(len(rows), 1)], cache)
        same_text(text, *(torch.cat([alone[i][part] for i in rows]) for part in (0, 1)))


@every
def test_a_chat_goes_on_over_several_calls(case, ids):
    """Against one cache that is given the same tokens one by one."""
    cache, tokens, calls = case.cache(), ids[:1, :20], [ids[:1, :20]]
    other = case.cache()
    for turn in (ids[1:2, :7], ids[2:3, :12], ids[3:4, :1]):
        text, _ = case.generate(tokens, cache)
        same_text(text, *case.by_hand(calls, other))
        if case.full:
            assert torch.equal(text, case.stock(tokens))
        tokens = torch.cat((tokens, text, turn), 1)
        calls = [call[None, None] for call in tokens[0, other.get_seq_length() :]]
    assert cache.get_seq_length() > 20 + 2 * NEW


@every
def test_drafts(case, ids):
    """Prompt lookup and an assistant against plain decoding."""
    tokens, assistant = ids[:1, :9].repeat(1, 3), tiny_model("llama-mha", seed=7, num_hidden_layers=1)
    text, logits = case.generate(tokens, case.cache())
    if case.full:
        assert torch.equal(text, case.stock(tokens))
    for more in ({"prompt_lookup_num_tokens": 4}, {"assistant_model": assistant}):
        cache = case.cache()
        drafted, _ = case.generate(tokens, cache, **more)
        same_text(drafted, text, logits)
        exact = [layer.exact for layer in cache.layers if getattr(layer, "exact", None) is not None]
        assert all(store.length - store.first >= 6 for store in exact)


@every
def test_prompts_in_chunks(case, ids):
    options = {} if case.full else {"exact_prompt": False}  # the first chunk would be exact otherwise
    text, logits = case.generate(ids[:2, :40], case.cache(**options))
    for size in (7, 16):
        chunked, _ = case.generate(ids[:2, :40], case.cache(**options), prefill_chunk_size=size)
        same_text(chunked, text, logits)
        if case.full:
            assert torch.equal(chunked, case.stock(ids[:2, :40], prefill_chunk_size=size))


@every
def test_a_cache_is_saved_in_the_middle_of_a_text_and_read_as_a_stock_one(case, ids):
    cache, stock = case.cache(), DynamicCache(config=case.made.stock.config)
    text, _ = case.generate(ids[:2, :30], cache, max_new_tokens=6, min_new_tokens=6)
    whole = torch.cat((ids[:2, :30], text), 1)
    twin = pickle.loads(pickle.dumps(cache))
    ended = [case.generate(whole, one)[0] for one in (cache, twin)]
    assert torch.equal(*ended) and not cache.is_compileable and len(cache) == len(stock) == len(list(cache))
    with torch.no_grad():
        case.made.stock(input_ids=torch.cat((whole, ended[0]), 1)[:, :-1], past_key_values=stock)
    for ours, theirs in zip(cache, stock, strict=True):
        assert [t.shape if t is not None else None for t in ours] == [
            t.shape if t is not None else None for t in theirs
        ]
        if case.full:
            torch.testing.assert_close(ours[:2], theirs[:2], rtol=1e-3, atol=1e-3)
