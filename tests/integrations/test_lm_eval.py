"""lm-eval's numbers under nested caches, with its own task files, on a tiny random model, offline."""

import json
import logging
import string
import subprocess
import sys

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

pytest.importorskip("lm_eval")
import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from nestling import kv
from nestling.errors import AdapterError, BudgetError, OptionError
from nestling.integrations.lm_eval import NestlingLM

from ..kv.families import tiny_fit, tiny_model

LETTERS = string.ascii_lowercase + string.ascii_uppercase + string.digits + string.punctuation + " \n"
CHOICES = """
task: tiny_choice
dataset_path: json
dataset_kwargs:
  data_files: {{train: "{folder}/choice.jsonl", test: "{folder}/choice.jsonl"}}
  cache_dir: "{folder}"
output_type: multiple_choice
training_split: train
test_split: test
fewshot_split: train
fewshot_config: {{sampler: first_n}}
num_fewshot: 2
doc_to_text: "Q: {{{{question}}}} A:"
doc_to_target: answer
doc_to_choice: choices
"""
ROLLING = """
task: tiny_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{folder}/pages.jsonl"}}, cache_dir: "{folder}"}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: bits_per_byte}}]
"""
GENERATION = """
task: tiny_generation
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{folder}/choice.jsonl"}}, cache_dir: "{folder}"}}
output_type: generate_until
test_split: test
doc_to_text: "Q: {{{{question}}}} and then some more of it, so that there is something to read A:"
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs: {{until: ["\\n\\n"], max_gen_toks: 12, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""
TASKS = ["tiny_choice", "tiny_rolling", "tiny_generation"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, its adapter, and three tasks of local files."""
    place = tmp_path_factory.mktemp("lm_eval")
    lm = tiny_model("llama-gqa", vocab_size=128)
    lm.save_pretrained(place / "model")
    raw = Tokenizer(
        models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2} | {c: i + 3 for i, c in enumerate(LETTERS)}, "<pad>")
    )
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", pad_token="<pad>")
    tokenizer.save_pretrained(place / "model")
    ids = torch.randint(3, 97, (8, 64), generator=torch.Generator().manual_seed(0))
    tiny_fit(lm, ids, sensitivity_windows=8).save_pretrained(place / "adapter")
    rows = [
        {
            "question": f"what is {a} plus {b}, if you can add",
            "choices": [f"{a + b}", f"about {a * b + 7}", "no"],
            "answer": 0,
        }
        for a, b in ((2, 3), (11, 6), (40, 2), (7, 7), (5, 16))
    ]
    (place / "choice.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pages = [{"text": "A ship leaves the harbour before the sun is up. " * 3}, {"text": "Bread is baked early. " * 5}]
    (place / "pages.jsonl").write_text("\n".join(map(json.dumps, pages)))
    for name, text in zip(TASKS, (CHOICES, ROLLING, GENERATION), strict=True):
        (place / f"{name}.yaml").write_text(text.format(folder=place))
    return place


@pytest.fixture(scope="module")
def run(folder):
    """``run(model, **options)``: lm-eval's results and samples."""
    manager = TaskManager(include_path=str(folder), include_defaults=False)

    def of(model, tasks=TASKS, **options):
        arguments = {"pretrained": str(folder / "model"), "dtype": "float32", **options}
        if model == "nestling":
            arguments["adapter"] = str(folder / "adapter")
        return lm_eval.simple_evaluate(
            model, model_args=arguments, tasks=list(tasks), task_manager=manager, bootstrap_iters=0, device="cpu",
            batch_size=2,
        )  # fmt: skip

    return of


def answers(results):
    """Every number and text that the model gave, by task."""
    found = {}
    for task, rows in results["samples"].items():
        found[task] = [row["filtered_resps"] for row in sorted(rows, key=lambda row: row["doc_id"])]
    return found


def numbers(rows):
    return [value for row in rows for resp in row for value in (resp if isinstance(resp, tuple | list) else [resp])]


def test_at_full_budget_everything_is_that_of_lm_evals_own_model(run):
    stock, ours = run("hf"), run("nestling", budget=1, cache_dtype="float32")
    assert stock["results"].keys() == ours["results"].keys() == set(TASKS)
    theirs, mine = answers(stock), answers(ours)
    for task in TASKS[:2]:
        assert numbers(mine[task]) == pytest.approx(numbers(theirs[task]), abs=1e-3)
    assert mine["tiny_generation"] == theirs["tiny_generation"]
    assert ours["config"]["nestling"]["held_share"] == pytest.approx(1.2, abs=0.3), "with slack"


def test_at_a_low_budget_they_are_those_of_a_cache_read_by_hand(run, folder):
    options = {"budget": 0.6, "window": 8, "context": 256, "quantise": False, "cache_dtype": "float32"}
    stock, ours = answers(run("hf")), run("nestling", chunk=7, **options)
    mine = answers(ours)
    for task in TASKS[:2]:
        pairs = zip(numbers(stock[task]), numbers(mine[task]), strict=True)
        assert max(abs(a - b) for a, b in pairs) > 0.01
    by_hand = NestlingLM(str(folder / "model"), str(folder / "adapter"), dtype="float32", device="cpu", **options)
    rows = sorted(ours["samples"]["tiny_choice"], key=lambda row: row["doc_id"])
    for row in rows[:2]:
        for (context, rest), (total, greedy) in zip(row["arguments"], row["filtered_resps"], strict=True):
            before, after = by_hand._encode_pair(context, rest)
            logits = by_hand_logits(by_hand, before + after)[len(before) - 1 :]
            expected = sum(float(at.log_softmax(-1)[token]) for at, token in zip(logits, after, strict=False))
            assert total == pytest.approx(expected, abs=1e-3)
            assert greedy == all(int(at.argmax()) == token for at, token in zip(logits, after, strict=False))


@torch.no_grad()
def by_hand_logits(lm, ids):
    cache = kv.NestedCache(lm.model, lm.adapter, lm.cache_config)
    steps = (lm.model(input_ids=torch.tensor([[i]]), past_key_values=cache, use_cache=True) for i in ids[:-1])
    return [step.logits[0, -1].double() for step in steps]


def test_a_context_is_read_once_for_its_choices_and_a_beginning_once_for_all(run, monkeypatch):
    read = []
    forward = HFLM.model.fget

    def counted(self):
        model = forward(self)
        if not hasattr(model, "_counted"):
            model._counted = model.register_forward_pre_hook(
                lambda module, args, kwargs: read.append(kwargs["input_ids"].shape[1]), with_kwargs=True
            )
        return model

    monkeypatch.setattr(NestlingLM, "model", property(counted))
    results = run("nestling", ["tiny_choice"], budget=0.6, window=8, context=256)
    rows = results["samples"]["tiny_choice"]
    contexts = [len(row["arguments"][0][0]) for row in rows]
    assert sum(read) < sum(contexts) / 1.5, "two examples are equal in all contexts"
    assert results["config"]["nestling"]["texts"] == len(rows)


def test_results_say_what_was_held_and_a_short_context_is_told(run, folder, caplog):
    with caplog.at_level(logging.WARNING, "nestling.integrations.lm_eval"):
        config = run("nestling", ["tiny_rolling"], budget="60%", window=8, context=256)["config"]["nestling"]
    assert not [record for record in caplog.records if record.name.startswith("nestling")]
    assert config["budget"] == "60%" and config["window"] == 8 and config["median_tokens"] > 83
    assert 0.3 < config["held_share"] < 1.5
    with caplog.at_level(logging.WARNING, "nestling.integrations.lm_eval"):
        run("nestling", ["tiny_generation"], budget=0.6, window=128, context=4096)
    [record] = [record for record in caplog.records if record.name.startswith("nestling")]
    assert (
        "more few-shot examples, or a smaller window" in record.getMessage() and "147 are exact" in record.getMessage()
    )


def test_what_is_of_no_use_is_refused_before_anything_is_read(run, folder):
    for options, error, words in (
        ({"budget": 0.001}, BudgetError, "smallest"),
        ({"budget": 0.5, "exact_prompt": True}, OptionError, "always read compressed"),
        ({"window": -1}, OptionError, "window=-1"),
        ({"chunk": 0}, OptionError, "chunk=0"),
    ):
        with pytest.raises(error, match=words):
            run("nestling", **options)
    with pytest.raises(AdapterError):
        NestlingLM(str(folder / "model"), "smollm2", device="cpu")


@pytest.mark.slow
def test_the_command(folder, tmp_path):
    arguments = (
        f"pretrained={folder / 'model'},adapter={folder / 'adapter'},budget=0.6,window=8,context=256,dtype=float32"
    )
    command = [sys.executable, "-m", "nestling.integrations.lm_eval", "run", "--model", "nestling", "--model_args"]
    done = subprocess.run(
        [*command, arguments, "--tasks", "tiny_choice", "--include_path", str(folder), "--device", "cpu",
         "--output_path", str(tmp_path)], capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    [path] = tmp_path.rglob("results_*.json")
    assert json.loads(path.read_text())["config"]["nestling"]["budget"] == 0.6
    wrong = subprocess.run([*command, arguments.replace("budget=0.6", "budget=0.0001"), "--tasks", "tiny_choice",
                            "--include_path", str(folder)], capture_output=True, text=True)  # fmt: skip
    assert wrong.returncode == 1 and "Traceback" not in wrong.stderr and "smallest possible" in wrong.stderr
