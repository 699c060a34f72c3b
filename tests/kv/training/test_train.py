"""Training on tiny models: it helps, it resumes, it is the same on two processes, and it says what went wrong."""

import os
import resource
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nestling import kv
from nestling.errors import TextTooShortError, TrainingError
from nestling.jobs.checkpoints import last_whole
from nestling.kv.adapter_files import SIDES
from nestling.kv.integration.attach import cached
from nestling.kv.simulation.student import Student
from nestling.kv.training.config import TrainConfig
from nestling.kv.training.sampling import RankedWindows
from nestling.kv.training.train import train
from nestling.losses import IGNORED

from ..families import FAMILIES, nested_cache, tiny_model

OPTIONS = dict(length=16, batch_size=4, tokens=16 * 4 * 12, progress=False, budgets=(0.75, 0.5))


@pytest.fixture(scope="module")
def start(fitted):
    return fitted("llama-gqa").adapter


def configured(folder, **options) -> TrainConfig:
    """Options of a config, and of the stock trainer."""
    names = {field.name for field in fields(TrainConfig)}
    arguments = {name: value for name, value in options.items() if name not in names}
    ours = {name: value for name, value in options.items() if name in names}
    return TrainConfig(**{**OPTIONS, "output_dir": folder, "arguments": arguments, **ours})


def run(folder, ids, adapter, model=None, **options):
    own = {name: options.pop(name) for name in ("eval_texts", "labels", "callbacks") if name in options}
    config = configured(folder, **{"window": 0, "sinks": 2, "learning_rate": 0.02, **options})
    return train(model or tiny_model("llama-gqa"), None, ids, adapter, config, **own)


def same(a, b, **tolerance) -> None:
    for side in SIDES:
        torch.testing.assert_close(a.encode[side], b.encode[side], **(tolerance or {"rtol": 0, "atol": 0}))


@pytest.mark.parametrize("sampling", ["path", "independent", "bits"])
def test_training_lowers_the_kl_at_the_budgets(tmp_path, ids, start, sampling):
    options = {"tokens": 16 * 4 * 40, "eval_texts": ids, "eval_windows": 8, "sampling": sampling}
    trained = run(tmp_path, ids, start, **options)
    curve = [p for p in trained.info["training"]["curve"] if "kl_0.5" in p]
    assert [p["step"] for p in curve] == list(range(0, 41, 4)) and curve[-1]["tokens"] == 16 * 4 * 40
    assert curve[-1]["kl_0.5"] < 0.97 * curve[0]["kl_0.5"]
    assert not torch.allclose(trained.drop_cost["key"], start.drop_cost["key"])
    assert trained.info["training"]["sampling"] == sampling and trained.info["basis"] == "balanced"


@pytest.mark.parametrize("family", FAMILIES)
def test_full_budget_is_the_stock_model_after_training(tmp_path, ids, fitted, family):
    model, stock = tiny_model(family), tiny_model(family)
    trained = run(tmp_path, ids, fitted(family).adapter, model, learning_rate=0.05)
    moved = (trained.encode["key"] - fitted(family).adapter.encode["key"]).abs().max()
    assert float(moved) > 0.01
    back = torch.linalg.inv(fitted(family).adapter.encode["value"].double()) @ trained.encode["value"].double()
    eye = torch.eye(back.shape[-1], dtype=torch.float64).expand_as(back)
    torch.testing.assert_close(back @ back.mT, eye, rtol=0, atol=1e-5)
    arguments = dict(input_ids=ids[:2, :20], max_new_tokens=12, do_sample=False)
    expected = stock.generate(**arguments)
    assert torch.equal(model.generate(**arguments, **cached(model, nested_cache(model, trained, 1.0))), expected)
    assert not model.training and all(p.requires_grad for p in model.parameters())


def test_bf16_changes_little(tmp_path, ids, start):
    curves, moved = [], []
    for name, options in (("whole", {}), ("half", {"bf16": True})):
        trained = run(tmp_path / name, ids, start, learning_rate=0.002, **options)
        curves.append([point["loss"] for point in trained.info["training"]["curve"] if "loss" in point])
        moved.append(trained.encode["key"] - start.encode["key"])
        assert trained.encode["key"].dtype == torch.float32
    assert curves[0] != curves[1] and curves[1] == pytest.approx(curves[0], rel=0.1)
    assert 0 < (moved[0] - moved[1]).norm() < moved[0].norm()


def test_the_paper_preset(tmp_path, ids):
    model = tiny_model("llama-gqa")
    trained = train(
        model, None, ids, config=TrainConfig.paper(**{**OPTIONS, "tokens": 16 * 4 * 20}, output_dir=tmp_path)
    )
    info = trained.info["training"]
    assert trained.info["basis"] == "pca" and info["sampling"] == "independent" and info["window"] == 0
    assert (info["kl_weight"], info["ce_weight"]) == (0.25, 0.75)
    for side in SIDES:  # rotations of orthogonal bases
        e = trained.encode[side]
        torch.testing.assert_close(e @ e.mT, torch.eye(16).expand_as(e), rtol=0, atol=1e-5)


def test_a_stopped_training_goes_on_to_the_same_result(tmp_path, ids, start, monkeypatch):
    whole = run(tmp_path / "whole", ids, start, save_steps=3, eval_texts=ids, eval_windows=2)
    forward, calls = Student.forward, []

    def failing(self, *args, **kwargs):
        calls.append(self.training)
        if sum(calls) == 8:
            raise TrainingError("the power went")
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(Student, "forward", failing)
    with pytest.raises(TrainingError, match="step 8: the power went; checkpoint-6 is kept in"):
        run(tmp_path / "part", ids, start, save_steps=3, eval_texts=ids, eval_windows=2)
    monkeypatch.undo()
    resumed = run(tmp_path / "part", ids, start, save_steps=3, eval_texts=ids, eval_windows=2, resume=True)
    same(whole, resumed)
    assert whole.info["training"]["curve"] == resumed.info["training"]["curve"]


SCRIPT = """
import sys
sys.path.insert(0, {root!r})
import torch
from nestling import kv
from nestling.kv.training.config import TrainConfig
from nestling.kv.training.train import train
from tests.kv.families import tiny_model
torch.set_num_threads(1)
ids = torch.load({ids!r})
adapter = kv.KVAdapter.from_pretrained({adapter!r})
config = kv.TrainConfig(window=0, learning_rate=.02, length=16, batch_size=4, tokens=16 * 4 * {steps}, progress=False,
                        budgets=(.5,), output_dir=sys.argv[1], resume=len(sys.argv) > 2,
                        arguments=dict(save_steps=1, use_cpu=True))
trained = train(tiny_model("llama-gqa"), None, ids, adapter, config)
trained.save_pretrained(sys.argv[1] + "/result")
"""


@pytest.fixture
def script(tmp_path, ids, start):
    """A training as a process: ``script(folder, *arguments, launcher=[...])``."""
    torch.save(ids, tmp_path / "ids.pt")
    start.save_pretrained(tmp_path / "start")
    root = str(Path(__file__).parents[3])

    def make(steps: int):
        path = tmp_path / f"job{steps}.py"
        places = {"root": root, "ids": str(tmp_path / "ids.pt"), "adapter": str(tmp_path / "start"), "steps": steps}
        path.write_text(SCRIPT.format(**places))
        environment = {**os.environ, "PYTHONPATH": f"{root}/src", "OMP_NUM_THREADS": "1"}

        def start_process(*arguments, launcher=()):
            command = [sys.executable, *launcher, str(path), *map(str, arguments)]
            return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

        return start_process

    return make


@pytest.mark.slow
def test_a_killed_process_goes_on_to_the_same_result(tmp_path, script):
    process = script(400)
    whole, part = process(tmp_path / "whole"), process(tmp_path / "part")
    for _ in iter(lambda: part.poll() is None and not list((tmp_path / "part").glob("checkpoint-[3-9]?")), False):
        pass  # wait for a checkpoint somewhere in the middle
    assert part.poll() is None
    part.send_signal(signal.SIGKILL)
    part.wait()
    resumed = process(tmp_path / "part", "resume")
    for finished in (whole, resumed):
        output = finished.communicate()[0].decode()
        assert finished.returncode == 0, output
    same(*(kv.KVAdapter.from_pretrained(tmp_path / name / "result") for name in ("whole", "part")))


@pytest.mark.slow
def test_two_processes_are_as_good_as_one(tmp_path, script):
    process = script(12)
    two = process(tmp_path / "two", launcher=["-m", "torch.distributed.run", "--nproc-per-node", "2"])
    one = process(tmp_path / "one")
    for finished in (one, two):
        output = finished.communicate()[0].decode()
        assert finished.returncode == 0, output
        assert "find_unused_parameters" not in output  # DDP looks for them only where there are some
    one, two, before = (kv.KVAdapter.from_pretrained(tmp_path / n) for n in ("one/result", "two/result", "start"))
    for side in SIDES:  # what is read; rotations among coordinates that are kept or dropped together are free
        first, second, old = (a.encode[side][..., :8] @ a.decode[side][..., :8, :] for a in (one, two, before))
        torch.testing.assert_close(first, second, rtol=0, atol=2e-4)
        assert float((first - old).abs().max()) > 0.05
    assert one.info["training"]["steps"] == 12


def test_data_are_passes_in_orders_of_their_own(ids):
    data = RankedWindows(ids, lambda number: torch.tensor(number), seed=3, count=20)
    assert len(data) == 20 and [int(data[i]["bits"]) for i in range(20)] == list(range(20))
    rows = [next(r for r in range(8) if torch.equal(ids[r], data[i]["input_ids"])) for i in range(16)]
    assert sorted(rows[:8]) == sorted(rows[8:]) == list(range(8)) and rows[:8] != rows[8:]


def test_gradients_that_are_not_finite_are_named(tmp_path, ids, start, monkeypatch):
    masked = Student.masked

    def poisoned(self, bits):
        found = masked(self, bits)
        if torch.is_grad_enabled():
            poison = torch.zeros_like(found.cut.projectors)
            poison[0, 1, 2] = torch.inf
            found.cut.projectors.register_hook(lambda gradient: gradient + poison)
        return found

    monkeypatch.setattr(Student, "masked", poisoned)
    with pytest.raises(
        TrainingError, match="step 1: the gradient by the values of layer 2 is not finite; there is no"
    ):
        run(tmp_path, ids, start)


def test_a_model_with_nan_is_named(tmp_path, ids, start):
    model = tiny_model("llama-gqa")
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(TrainingError, match="hidden states hold NaN or infinity after layer 1"):
        run(tmp_path, ids, start, model)


def test_a_full_disk_keeps_the_last_whole_checkpoint(tmp_path, ids, start):
    """Files may not grow past a limit, which a first checkpoint keeps: later ones fail as on a full disk."""
    run(tmp_path, ids, start, save_steps=1, max_steps=12)
    size = max(p.stat().st_size for p in tmp_path.glob("checkpoint-12/*"))
    other = tmp_path / "limited"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, hard))
    try:
        with pytest.raises(TrainingError, match=r"step 2: .*there is no checkpoint in"):
            run(other, ids, start, save_steps=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    run(other, ids, start, save_steps=1, resume=True)


def test_half_written_checkpoints_are_passed_over(tmp_path, ids, start):
    whole = run(tmp_path, ids, start, save_steps=5)
    optimizer = tmp_path / "checkpoint-12" / "optimizer.pt"
    optimizer.write_bytes(optimizer.read_bytes()[:1000])
    assert last_whole(tmp_path).name == "checkpoint-10"
    same(whole, run(tmp_path, ids, start, save_steps=5, resume=True))


def test_folders_are_checked(tmp_path, ids, start):
    with pytest.raises(TrainingError, match="no training to resume: training.json is missing"):
        run(tmp_path, ids, start, resume=True)
    run(tmp_path, ids, start)
    with pytest.raises(TrainingError, match="holds checkpoints already"):
        run(tmp_path, ids, start)
    with pytest.raises(
        TrainingError, match=r"holds another training \(learning_rate: 0.02, now 0.01; seed: 0, now 1\)"
    ):
        run(tmp_path, ids, start, resume=True, seed=1, learning_rate=0.01)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"preset": "best"}, ValueError, "preset='best' is unknown: expected one of default, paper"),
        ({"batch_size": 3, "gradient_accumulation_steps": 2}, ValueError, "batch_size=3 must be a multiple of .* 2"),
        ({"sampling": "random"}, ValueError, "sampling='random'"),
        ({"window": 4}, ValueError, "length=16 must be longer than the 21 exact tokens"),
        ({"length": 65}, TextTooShortError, "shorter than one window of 65 tokens"),
        ({"eval_texts": torch.zeros(0, 16, dtype=torch.long)}, TextTooShortError, "shorter than one window"),
        ({"eval_texts": torch.ones(1, 16, dtype=torch.long), "budgets": (2,)}, kv.BudgetError, "2"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(tmp_path, ids, start, options, error, message):
    with pytest.raises(error, match=message):
        run(tmp_path / "new", ids, start, **options)
    assert not (tmp_path / "new").exists()


def test_lora_trains_along_on_the_answers_alone(tmp_path, ids, start):
    """Answers are the texts' second halves, in which a token always follows its predecessor."""
    peft = pytest.importorskip("peft")
    texts = ids[:, :32].clone()
    texts[:, 16:] = (texts[:, 15:16] + torch.arange(1, 17)) % 90 + 3
    labels = torch.where(torch.arange(32) < 16, IGNORED, texts)
    base = tiny_model("llama-gqa")
    before = {name: p.clone() for name, p in base.named_parameters()}
    torch.manual_seed(0)
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]))
    lm = model.get_base_model()

    @torch.no_grad()
    def answer_loss(adapter):
        cache = nested_cache(lm, adapter, 0.75, sinks=2, window=0, exact_prompt=False)
        logits = lm(input_ids=texts, **cached(lm, cache)).logits
        return float(torch.nn.functional.cross_entropy(logits[:, 15:-1].flatten(0, 1), texts[:, 16:].flatten()))

    untrained = answer_loss(start)
    options = dict(kl_weight=0.0, ce_weight=1.0, length=32, tokens=32 * 4 * 60, budgets=(0.75,))
    trained = run(tmp_path, texts, start, model, labels=labels, **options)
    assert answer_loss(trained) < 0.4 * untrained and answer_loss(trained) < answer_loss(start)
    lora = [name for name, p in model.named_parameters() if p.requires_grad]
    assert lora and all("lora" in name for name in lora)
    after = {name.replace(".base_layer", ""): p for name, p in lm.named_parameters() if "lora" not in name}
    assert all(torch.equal(after[name], p) for name, p in before.items())
    saved = load_file(tmp_path / "checkpoint-60" / "model.safetensors")
    assert len(saved) == 1 + len(lora)
    arguments = dict(input_ids=ids[:1, :20], max_new_tokens=8, do_sample=False)  # full rank is the tuned model
    assert torch.equal(
        model.generate(**arguments), lm.generate(**arguments, **cached(lm, nested_cache(lm, trained, 1.0)))
    )


def test_labels_are_checked(tmp_path, ids, start):
    with pytest.raises(ValueError, match=r"labels are \[8, 10\], expected \[48, 16\]|labels are \[8, 10\], expected"):
        run(tmp_path, ids, start, labels=ids[:, :10])


def test_texts_need_a_tokenizer_and_length(tmp_path, ids, start):
    with pytest.raises(ValueError, match="a tokenizer is needed"):
        run(tmp_path, ["some text"], start)
    with pytest.raises(TextTooShortError, match="shorter than one window of 16 tokens"):
        run(tmp_path, ids[:, :10], start)


def test_what_is_not_installed_is_named(tmp_path, ids, start, monkeypatch):
    monkeypatch.setattr(sys.modules["nestling.kv.training.train"], "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"training needs accelerate: pip install 'nestling\[train\]'"):
        run(tmp_path / "new", ids, start)
    assert not (tmp_path / "new").exists()


def test_foreign_adapters_are_refused(tmp_path, ids, fitted):
    with pytest.raises(kv.AdapterError, match="made for another model"):
        run(tmp_path, ids, fitted("qwen3").adapter)
