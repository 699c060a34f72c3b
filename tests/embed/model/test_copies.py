"""A model that is cut, tapped or measured is not touched: others use it at the same time, and get its vectors."""

import threading

import numpy as np
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from sentence_transformers.base.modules import Dense
from torch import nn

from nestling.embed.evaluation.agreement import agreement
from nestling.embed.evaluation.evaluator import GridEvaluator
from nestling.embed.export.export import export
from nestling.embed.ladder import Ladder
from nestling.embed.model.encode import encode
from nestling.embed.model.parts import Encoder
from nestling.embed.model.projection import fit_projections
from nestling.embed.model.taps import taps, token_taps
from nestling.embed.training.teacher import write_table
from nestling.errors import UnsupportedEncoderError

from ..families import LAYERS, some_texts
from ..sets import scored

TEXTS = some_texts(12, seed=3)
USES = {
    "the first tap, with its probe": lambda model, folder: taps(model, model.preprocess(TEXTS), [1, 2]),
    "token_taps": lambda model, folder: token_taps(model, model.preprocess(TEXTS), [2]),
    "encode": lambda model, folder: encode(model, TEXTS, {1: 8, 3: 16}),
    "projections": lambda model, folder: fit_projections(model, TEXTS, [1, 2]),
    "agreement": lambda model, folder: agreement(model, TEXTS, Ladder.parse("1x8,2x8")),
    "measuring": lambda model, folder: GridEvaluator("1x8,2x8", sts={"s": scored()}).rows(model),
    "export": lambda model, folder: export(model, "2x8", folder / "cup"),
    "a teacher": lambda model, folder: write_table(folder / "table.npy", model, [("", text) for text in TEXTS]),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("family", ["bert", "modernbert", "t5"])
def test_stock_encode_in_the_midst_of_a_call(encoder, tmp_path, use, family):
    """From a hook of the first layer: whatever state the call has put the model into is what the stock call meets."""
    model = encoder(family)
    model.append(Dense(32, 16))
    wanted, training, seen = model.encode(TEXTS), [], []
    model.train()  # the model of a training; its dropout must not come on, nor go off
    first = Encoder.of(encoder(family)).anatomy.layers
    layers = model[0].model.get_submodule(first)

    def meanwhile(*_):
        if not seen:
            seen.append(None)
            training.extend(module.training for module in model.modules())
            seen.append(np.abs(model.encode(TEXTS) - wanted).max())
            model.train()

    layers[0].register_forward_hook(meanwhile)
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    USES[use](model, tmp_path)
    assert seen[1] < 1e-5 and all(training) and all(module.training for module in model.modules())
    assert model[0].model.get_submodule(first) is layers and len(layers) == LAYERS
    assert hooks == [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]


def test_threads(encoder):
    """Nothing is known of the model when they start."""
    model, alone = encoder(), encoder()
    wanted = {depth: encode(alone, TEXTS, {depth: 32})[depth] for depth in range(1, LAYERS + 1)}
    stock = torch.from_numpy(alone.encode(TEXTS))
    differences: list[float] = []

    def tap(depth: int):
        for _ in range(15):
            differences.append(float((encode(model, TEXTS, {depth: 32})[depth] - wanted[depth]).abs().max()))

    def serve():
        for _ in range(15):
            differences.append(float((torch.from_numpy(model.encode(TEXTS)) - stock).abs().max()))

    threads = [threading.Thread(target=tap, args=(depth,)) for depth in wanted] + [threading.Thread(target=serve)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(differences) == 15 * (LAYERS + 1) and max(differences) < 1e-5


def test_forwards_that_were_patched_run_the_shorter_model(encoder):
    model, plain = encoder(), encoder()
    features = model.preprocess(TEXTS)
    with torch.no_grad():
        wanted = taps(plain, features, [2])[2]
        add_hook_to_module(model[0].model, ModelHook())  # accelerate's: a partial of the module, and its old method
        add_hook_to_module(model[0].model.encoder, ModelHook())
        torch.testing.assert_close(taps(model, features, [2])[2], wanted)
        backbone = plain[0].model
        backbone.forward = torch.compile(backbone.forward, backend="eager")
        torch.testing.assert_close(taps(plain, features, [2])[2], wanted)


def test_a_forward_that_only_runs_the_original_is_refused(encoder):
    model = encoder()
    backbone = model[0].model
    forward = backbone.forward
    backbone.forward = lambda **kwargs: forward(**kwargs)
    with pytest.raises(UnsupportedEncoderError, match="forward of a BertModel was replaced"):
        taps(model, model.preprocess(TEXTS), [2])


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_hidden_states_that_are_asked_for_leave_no_hooks(encoder, family):
    """transformers puts hooks into the model when a config asks for states, once: copies would do it in every call."""
    model = encoder(family)
    model[0].model.config.output_hidden_states = True
    features = model.preprocess(TEXTS)
    wanted = taps(encoder(family), features, [2])[2]
    for _ in range(3):
        torch.testing.assert_close(taps(model, features, [1, 2])[2], wanted)
    assert not any(module._forward_hooks for module in model.modules())
    assert len(model(dict(features))["all_layer_embeddings"]) == LAYERS + 1


def test_gradients_are_the_models(encoder):
    model = encoder()
    features = model.preprocess(TEXTS)
    sum(vectors.square().sum() for vectors in taps(model, features, [1, 3]).values()).backward()
    layers: nn.ModuleList = model[0].model.encoder.layer
    reached = [any(p.grad is not None for p in layer.parameters()) for layer in layers]
    assert reached == [True, True, True, False]
