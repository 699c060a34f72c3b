"""Pre-training on tiny encoders: losses fall, it resumes, two processes are one, and bad input is named."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from sentence_transformers import SentenceTransformer

from nestling.embed import Texts
from nestling.embed.model.folder import load_ladder
from nestling.embed.model.loading import load_encoder
from nestling.embed.pretraining.autoencoder import MaskedAutoencoder
from nestling.embed.pretraining.config import PretrainConfig
from nestling.embed.pretraining.pretrain import pretrain
from nestling.errors import DataError, LadderError, MaskingError, TrainingError, UnsupportedEncoderError
from nestling.jobs.checkpoints import last_whole

from ..families import VOCAB, WORDS, some_texts
from ..ways import train

CUPS = "1x8,2x16,4x32"
FAST = dict(steps=12, batch_size=8, length=16, learning_rate=1e-3, progress=False, use_cpu=True, sizes_per_step=0)
NAMES = [f"{kind}_{cup}" for kind in ("mlm", "dec") for cup in ("1x8", "2x16", "4x32")]


def texts(count: int = 60) -> list[str]:
    """Each a run of words in their order, so that what is masked can be told from what is not."""
    rng = torch.Generator().manual_seed(1)
    starts = torch.randint(VOCAB - 5 - 12, (count,), generator=rng).tolist()
    return [" ".join(WORDS[start : start + 3 + start % 9]) for start in starts]


def run(model, folder, data=None, cups=CUPS, **options):
    return pretrain(model, texts() if data is None else data, cups, config(output_dir=folder, **options))


def config(**options) -> PretrainConfig:
    """Quick, with all sizes in every step by default; what is no field is an argument of the stock trainer."""
    options = FAST | options
    own = {name: options[name] for name in options if name in {field.name for field in fields(PretrainConfig)}}
    return PretrainConfig(**own, arguments={name: options[name] for name in options if name not in own})


def same(one, other) -> None:
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("options", [{}, {"sizes_per_step": 2}], ids=["all", "two"])
@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_every_loss_of_every_cup_falls(encoder, tmp_path, family, options):
    model = encoder(family, "cls")
    old = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trained = run(model, tmp_path / "out", steps=80, learning_rate=5e-3, logging_steps=20, **options)
    first, *_, last = trained.info["curve"]
    for name in NAMES:
        assert last[name] < first[name] - 0.1, name
    mean = sum(last[name] for name in NAMES) / 6
    assert last["loss"] == pytest.approx(mean, rel=1e-4 if not options else 0.2)
    assert not model.training and last["step"] == 80 and trained.info["head"] == "new"
    moved = [name for name, tensor in model.state_dict().items() if not tensor.equal(old[name])]
    assert len(moved) > len(old) / 2 and not [name for name in moved if "pooler" in name]


def test_the_result_is_a_start_for_train(encoder, tmp_path):
    model = encoder("mpnet")
    trained = run(model, tmp_path / "out")
    loaded = SentenceTransformer(str(tmp_path / "out"), device="cpu", local_files_only=True)  # a stock one
    torch.testing.assert_close(loaded.encode(WORDS[:5]), model.encode(WORDS[:5]))
    assert load_ladder(tmp_path / "out") == trained.ladder and not trained.projections
    info = json.loads((tmp_path / "out" / "nestling.json").read_text())["pretraining"]
    assert info["tokens"] == trained.info["tokens"] > 12 * 8 * 4 and info["decoder"] is True
    assert info["passes"] == 1 and {"mlm_1x8", "dec_4x32"} < set(info["curve"][0])
    again = load_encoder(tmp_path / "out")
    train(again, texts(16), load_ladder(tmp_path / "out"), folder=tmp_path / "next", steps=2, progress=False)
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".pth", ".pkl")]
    assert not any(str(tmp_path) in path.read_text("utf-8") for path in files if path.suffix in (".json", ".md"))
    assert "pre-trained by nestling as a masked autoencoder" in (tmp_path / "out" / "README.md").read_text()


def test_plain_masked_language_modelling_is_the_full_cup_without_a_decoder(encoder, tmp_path):
    trained = run(encoder(), tmp_path / "out", cups="4x32", decoder=False)
    assert {name for name in trained.info["curve"][0]} == {"step", "loss", "mlm_4x32"}
    assert trained.info["curve"][-1]["loss"] == pytest.approx(trained.info["curve"][-1]["mlm_4x32"], rel=1e-4)
    assert "as a masked-language model" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("options", [{}, {"sizes_per_step": 2}, {"gradient_accumulation_steps": 2}])
def test_a_stopped_training_goes_on_to_the_same_result(encoder, tmp_path, monkeypatch, options):
    """In the middle of a pass, with dropout on; what is left behind is read over without being trained on."""
    options = {"save_steps": 3, "logging_steps": 1, **options}
    whole, part = encoder(), encoder()
    expected = run(whole, tmp_path / "whole", **options)
    forward, calls = MaskedAutoencoder.forward, []

    def failing(self, *args, **kwargs):
        calls.append(torch.is_grad_enabled())
        if sum(calls) == 8 * options.get("gradient_accumulation_steps", 1):
            raise RuntimeError("the power went")
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(MaskedAutoencoder, "forward", failing)
    with pytest.raises(TrainingError, match="step 8: the power went; checkpoint-6 is kept in"):
        run(part, tmp_path / "part", **options)
    monkeypatch.undo()
    assert not (tmp_path / "part").exists()
    part = encoder()
    found = run(part, tmp_path / "part", resume=True, **options)
    same(whole, part)
    assert found.info["curve"] == expected.info["curve"] and len(found.info["curve"]) == 12
    assert found.info["tokens"] == expected.info["tokens"]


SCRIPT = """
import sys
sys.path.insert(0, {root!r})
import torch
from tests.embed.families import sentence_model
from tests.embed.pretraining.test_pretrain import run
torch.set_num_threads(1)
run(sentence_model({backbone!r}), sys.argv[1], steps={steps}, save_steps=1, logging_steps=1, dropout={dropout},
    resume=len(sys.argv) > 2)
"""


@pytest.fixture
def script(tmp_path, backbones):
    """A pre-training as a process: ``script(steps, dropout)(folder, *arguments, launcher=[...])``."""
    root = str(Path(__file__).parents[3])

    def make(steps: int, dropout: bool):
        path = tmp_path / f"{steps}.py"
        path.write_text(SCRIPT.format(root=root, backbone=str(backbones("bert")), steps=steps, dropout=dropout))
        environment = {**os.environ, "PYTHONPATH": f"{root}/src", "OMP_NUM_THREADS": "1"}

        def start(*arguments, launcher=()):
            command = [sys.executable, *launcher, str(path), *map(str, arguments)]
            return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

        return start

    return make


def finish(process) -> None:
    output = process.communicate()[0].decode()
    assert process.returncode == 0, output


def training(folder: Path) -> dict:
    return json.loads((folder / "nestling.json").read_text())["pretraining"]


@pytest.mark.slow
def test_a_killed_process_goes_on_to_the_same_losses(tmp_path, script):
    process = script(40, True)
    part = process(tmp_path / "part")
    held = tmp_path / "part-checkpoints"
    for _ in iter(lambda: part.poll() is None and not list(held.glob("checkpoint-1?")), False):
        pass  # wait for a checkpoint somewhere in the middle
    assert part.poll() is None
    part.send_signal(signal.SIGKILL)
    part.wait()
    assert not (tmp_path / "part").exists()
    finish(process(tmp_path / "part", "resume"))
    finish(process(tmp_path / "whole"))
    assert training(tmp_path / "part")["curve"] == training(tmp_path / "whole")["curve"]
    same(*(SentenceTransformer(str(tmp_path / name), device="cpu") for name in ("whole", "part")))


def test_the_seconds_of_a_resumed_run_count_what_was_before(encoder, tmp_path):
    run(encoder(), tmp_path / "out", steps=4, save_steps=2)
    shutil.rmtree(tmp_path / "out")
    shutil.rmtree(tmp_path / "out-checkpoints" / "checkpoint-4")
    path = tmp_path / "out-checkpoints" / "checkpoint-2" / "trainer_state.json"
    state = json.loads(path.read_text())
    assert 0 < state["stateful_callbacks"]["Clock"]["attributes"]["seconds"] < 60
    state["stateful_callbacks"]["Clock"]["attributes"]["seconds"] = 1000
    path.write_text(json.dumps(state))
    (path.parent / "checksums.json").unlink()  # which tell that the file was changed
    assert 1000 <= run(encoder(), tmp_path / "out", steps=4, save_steps=2, resume=True).info["seconds"] < 1060


@pytest.mark.slow
def test_two_processes_are_one(tmp_path, script):
    """Masked tokens are counted over both, though each has another number of them."""
    process = script(5, False)
    finish(process(tmp_path / "two", launcher=["-m", "torch.distributed.run", "--nproc-per-node", "2"]))
    finish(process(tmp_path / "one"))
    one, two = training(tmp_path / "one"), training(tmp_path / "two")
    assert one["tokens"] == two["tokens"] and len(one["curve"]) == 5
    for point, other in zip(one["curve"], two["curve"], strict=True):
        assert point == pytest.approx(other, rel=1e-4)
    ones, twos = (SentenceTransformer(str(tmp_path / name), device="cpu").state_dict() for name in ("one", "two"))
    for name in ones:
        torch.testing.assert_close(ones[name], twos[name], rtol=1e-3, atol=1e-3)


def test_steps_of_accumulation_are_one_batch(encoder, tmp_path):
    one, four = encoder(), encoder()
    options = {"steps": 4, "dropout": False, "logging_steps": 1}
    expected = run(one, tmp_path / "one", **options).info
    found = run(four, tmp_path / "four", gradient_accumulation_steps=4, **options).info
    assert found["tokens"] == expected["tokens"]
    for point, other in zip(expected["curve"], found["curve"], strict=True):
        assert point == pytest.approx(other, rel=1e-4)


def test_a_worker_that_reads_ahead_changes_nothing(encoder, tmp_path):
    alone, ahead = encoder(), encoder()
    expected, found = run(alone, tmp_path / "a"), run(ahead, tmp_path / "b", dataloader_num_workers=4)
    same(alone, ahead)
    assert found.info["tokens"] == expected.info["tokens"]


def test_bf16_changes_little(encoder, tmp_path):
    expected = run(encoder(), tmp_path / "full", steps=4, dropout=False).info["curve"]
    half = encoder()
    found = run(half, tmp_path / "half", steps=4, dropout=False, bf16=True).info["curve"]
    assert {p.dtype for p in half.parameters()} == {torch.float32}
    for point, other in zip(expected, found, strict=True):
        assert point == pytest.approx(other, rel=0.03)


def test_a_loss_that_is_not_finite_stops_the_training(encoder, tmp_path, monkeypatch):
    forward, calls = MaskedAutoencoder.forward, []

    def poisoned(self, *args, **kwargs):
        calls.append(torch.is_grad_enabled())
        found = forward(self, *args, **kwargs)
        return {**found, "dec_1x8": found["dec_1x8"] * torch.nan} if sum(calls) == 5 else found

    monkeypatch.setattr(MaskedAutoencoder, "forward", poisoned)
    with pytest.raises(TrainingError, match=r"step 5: the loss is not finite \(dec_1x8\); checkpoint-4 is kept in"):
        run(encoder(), tmp_path / "out", save_steps=2)
    monkeypatch.undo()
    again = encoder()
    run(again, tmp_path / "out", save_steps=2, resume=True)  # the last good checkpoint can be gone on from
    assert all(parameter.isfinite().all() for parameter in again.parameters())


def test_a_gradient_that_is_not_finite_stops_the_training(encoder, tmp_path):
    model = encoder()
    model[0].model.encoder.layer[1].output.dense.weight.register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(TrainingError, match=r"step 1: the gradient is not finite \(.*there is no checkpoint"):
        run(model, tmp_path / "out")


def test_broken_weights_are_found_before_anything_is_written(encoder, tmp_path):
    model = encoder()
    model[0].model.encoder.layer[1].output.dense.weight.data[0, 0] = torch.nan
    with pytest.raises(TrainingError, match="before the first step the loss is not finite .*mlm_2x16.*broken"):
        run(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_corrupt_line_is_named_or_left_out_and_counted(encoder, tmp_path):
    path = tmp_path / "text.jsonl"
    lines = [json.dumps({"text": text}) for text in texts(20)]
    path.write_text("\n".join([*lines[:10], '{"text": ', *lines[10:]]))
    with pytest.raises(DataError, match="text.jsonl, line 11: not valid JSON"):
        run(encoder(), tmp_path / "out", path)
    assert not (tmp_path / "out-checkpoints").exists()
    assert run(encoder(), tmp_path / "out", path, skip_bad=True, steps=4).info["bad_lines"] == 1
    good = tmp_path / "good.jsonl"
    good.write_text("\n".join(lines))
    one, other = encoder(), encoder()
    run(one, tmp_path / "one", Texts([path], skip_bad=True), steps=4)
    run(other, tmp_path / "other", good, steps=4)
    same(one, other)


def test_folders_are_checked(encoder, tmp_path):
    with pytest.raises(TrainingError, match="no training to resume: training.json is missing"):
        run(encoder(), tmp_path / "out", resume=True)
    run(encoder(), tmp_path / "out", steps=4)
    with pytest.raises(TrainingError, match="out exists: choose another folder, or remove it"):
        run(encoder(), tmp_path / "out", steps=4)
    with pytest.raises(TrainingError, match=r"holds another training \(encoder_ratio: 0.2, now 0.3\)"):
        run(encoder(), tmp_path / "out", steps=4, resume=True, encoder_ratio=0.3)
    with pytest.raises(TrainingError, match=r"holds another training \(data: "):
        run(encoder(), tmp_path / "out", some_texts(30, longest=9), steps=4, resume=True)
    (tmp_path / "out").rename(tmp_path / "moved")
    with pytest.raises(TrainingError, match="holds checkpoints already"):
        run(encoder(), tmp_path / "out", steps=4)
    state = last_whole(tmp_path / "out-checkpoints") / "trainer_state.json"
    shutil.rmtree(tmp_path / "out-checkpoints" / "checkpoint-3")  # which would be gone on from
    held = json.loads(state.read_text())
    state.write_text(json.dumps(held | {"stateful_callbacks": {}}))
    with pytest.raises(TrainingError, match="does not say how far the corpus was read"):
        run(encoder(), tmp_path / "out", steps=4, resume=True)
    state.write_text(json.dumps(held))
    (state.parent / "checksums.json").unlink()
    again = encoder()
    run(again, tmp_path / "out", steps=4, resume=True)  # all of its steps are done: it is only written
    same(again, SentenceTransformer(str(tmp_path / "moved"), device="cpu"))
    shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize(
    "data, options, error, message",
    [
        (None, {"cups": "1x8,5x32"}, LadderError, "5x32 is deeper than the model"),
        (None, {"cups": "1x8,2x16"}, LadderError, "the full size 4x32 is missing"),
        (None, {"decoder": "both"}, ValueError, "decoder='both': expected True or False"),
        (None, {"sizes_per_step": -1}, ValueError, "sizes_per_step=-1 is out of range"),
        (None, {"encoder_ratio": 0.5}, MaskingError, "encoder_ratio=0.5 and decoder_ratio=0.4"),
        (None, {"length": 65}, ValueError, "length=65 is more than the 64 tokens that the model reads"),
        (None, {"length": 3}, MaskingError, "length=3 leaves no room"),
        (None, {"steps": 0}, ValueError, "steps=0"),
        (None, {"learning_rate": float("nan")}, ValueError, "learning_rate=nan"),
        (None, {"warmup": 1.5}, ValueError, "warmup=1.5"),
        (None, {"batch_size": 0}, ValueError, "batch_size=0"),
        (None, {"max_steps": 3}, ValueError, "max_steps=3 is no option of this training: use steps"),
        (None, {"gradient_checkpointing": True}, ValueError, "gradient_checkpointing is no option of a pre-training"),
        (None, {"batch_size": 9, "gradient_accumulation_steps": 2}, ValueError, "must be a multiple of"),
        ([], {}, DataError, "there are no texts"),
        (iter(["w5 w6"]), {}, ValueError, "texts can be read only once"),
        (["w9", "w8", "words that nobody knows"], {}, MaskingError, "nothing to mask in 3 texts"),
        ("missing.jsonl", {}, DataError, "missing.jsonl: no such file"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(encoder, tmp_path, data, options, error, message):
    with pytest.raises(error, match=message):
        run(encoder(), tmp_path / "out", data, **options)
    assert not list(tmp_path.iterdir())


def test_models_that_cannot_be_pre_trained_are_refused(encoder, tmp_path, monkeypatch):
    with pytest.raises(UnsupportedEncoderError, match="qwen3 models cannot be pre-trained"):
        run(encoder("qwen3"), tmp_path / "out")
    model = encoder()
    model.tokenizer.mask_token = None
    with monkeypatch.context() as patch, pytest.raises(MaskingError, match="the tokenizer has no mask token"):
        patch.setattr("nestling.embed.pretraining.families.MASKS", ())
        run(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_mask_that_is_not_declared_is_found_in_the_vocabulary(encoder, tmp_path):
    """As in a conversion of multilingual-e5-small; the tokens of other words stay as they are."""
    model, declared = encoder(), encoder()
    model.tokenizer.mask_token = None
    run(model, tmp_path / "out", steps=2)
    run(declared, tmp_path / "declared", steps=2)
    assert model.tokenizer.mask_token_id == declared.tokenizer.mask_token_id
    same(model, declared)


def test_missing_packages_are_named(encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["nestling.embed.pretraining.pretrain"], "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"training needs accelerate: pip install 'nestling\[train,embed\]'"):
        run(encoder(), tmp_path / "out")


def test_two_sizes_a_step_are_the_default_and_all_are_the_papers(encoder, tmp_path):
    assert PretrainConfig().sizes_per_step == 2 and PretrainConfig.paper(steps=3).sizes_per_step == 0
    counts = []
    for name, options in (("two", {"sizes_per_step": 2}), ("many", {"sizes_per_step": 9}), ("all", {})):
        curve = run(encoder(), tmp_path / name, steps=4, logging_steps=1, **options).info["curve"]
        counts.append({sum(key.startswith("mlm") for key in point) for point in curve})
    assert counts == [{2}, {3}, {3}]
    with pytest.raises(ValueError, match="output_dir=None: expected the folder"):
        pretrain(encoder(), texts())
