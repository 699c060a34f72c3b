"""The seam: where layers and norms are found, what is refused, and configs of shallower models."""

import json

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize, Router, Transformer
from sentence_transformers.sentence_transformer.modules import BoW, Pooling, StaticEmbedding, WeightedLayerPooling
from torch import nn
from transformers import CONFIG_MAPPING, AutoModel

from nestling.embed.model.parts import Encoder, depth_of, truncated_config, unwrapped
from nestling.errors import UnsupportedEncoderError

from ..families import BASE, FAMILIES, HIDDEN, LAYERS, PRE_NORM, save_backbone, tokenizer


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_found(family, encoder):
    found = Encoder.of(encoder(family))
    assert (found.depth, found.dims) == (LAYERS, HIDDEN)
    assert len(found.layers) == LAYERS
    assert (found.final_norm is not None) == (family in PRE_NORM)
    assert depth_of(found.backbone.config) == LAYERS


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("depth", [1, 3, LAYERS])
def test_a_truncated_config_makes_the_shallow_model(family, depth, encoder, tmp_path):
    """The model of that config has the layers, its weights are the first layers', and it survives being saved."""
    backbone = Encoder.of(encoder(family)).backbone
    before = backbone.config.to_json_string()
    config = truncated_config(backbone.config, depth)
    assert backbone.config.to_json_string() == before
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert depth in (written.get("num_hidden_layers"), written.get("n_layers"), written.get("num_layers"))
    if "layer_types" in written:
        assert written["layer_types"] == backbone.config.layer_types[:depth]
    shallow = type(backbone)(type(config).from_pretrained(tmp_path))
    names = dict(shallow.named_parameters())
    full = dict(backbone.named_parameters())
    assert names.keys() <= full.keys()
    layers = {name for name, module in shallow.named_modules() if isinstance(module, nn.ModuleList)}
    assert any(len(shallow.get_submodule(name)) == depth for name in layers)
    shallow.load_state_dict(backbone.state_dict(), strict=False)
    assert all(torch.equal(parameter, full[name]) for name, parameter in names.items())


def test_lists_that_are_not_per_layer_stay(encoder):
    config = Encoder.of(encoder("gemma3")).backbone.config
    config.matryoshka_dimensions = [4, 8, 16, 32]  # as many as layers, and no business of theirs
    assert truncated_config(config, 2).matryoshka_dimensions == [4, 8, 16, 32]


@pytest.mark.parametrize("depth", [0, -1, LAYERS + 1])
def test_depths_that_are_not_there(depth, encoder):
    with pytest.raises(ValueError, match=f"cannot keep {depth} of 4 layers: expected 1 to 4"):
        truncated_config(Encoder.of(encoder("bert")).backbone.config, depth)


def test_a_config_without_layers():
    with pytest.raises(UnsupportedEncoderError, match="a resnet model has no number of layers"):
        depth_of(CONFIG_MAPPING["resnet"]())


def test_heads(encoder):
    """What is trained behind the pooling belongs to the vector; a last normalisation does not."""
    model = encoder("bert")
    model.append(Dense(HIDDEN, 48))
    model.append(Dense(48, 20, activation_function=None))
    model.append(Normalize())
    found = Encoder.of(model)
    assert found.dims == 20
    assert [type(module) for module in found.head] == [Pooling, Dense, Dense]
    assert Encoder.of(encoder("bert", ("mean", "cls"))).dims == 2 * HIDDEN


def test_wrappers_are_taken_off(encoder):
    model = encoder("bert")

    class Wrapper(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.module = inner

    assert unwrapped(torch.compile(Wrapper(model), backend="eager")) is model
    assert unwrapped(Wrapper(torch.compile(model, backend="eager"))) is model
    for other in (nn.Linear(2, 2), Wrapper(nn.Linear(2, 2)), "bert"):
        with pytest.raises(UnsupportedEncoderError, match="expected a SentenceTransformer, got"):
            unwrapped(other)
    with pytest.raises(UnsupportedEncoderError, match="one process per device"):
        unwrapped(nn.DataParallel(model))


def test_models_without_layers_are_refused(encoder, backbones):
    model = encoder("bert")
    router = Router({"query": list(encoder("bert")), "document": list(encoder("bert"))}, default_route="query")
    for modules, reason in (
        (
            [StaticEmbedding(tokenizer()._tokenizer, embedding_dim=8)],
            "starts with a StaticEmbedding: it has no layers",
        ),
        ([BoW(["a", "b"])], "starts with a BoW"),
        ([router], "starts with a Router"),
        ([model[0]], "needs a pooling"),
        ([model[0], Normalize()], "needs a pooling"),
        ([model[0], WeightedLayerPooling(HIDDEN, LAYERS)], "needs a pooling of its last layer"),
    ):
        with pytest.raises(UnsupportedEncoderError, match=reason):
            Encoder.of(SentenceTransformer(modules=modules, device="cpu"))


@pytest.mark.parametrize(
    "kind, extra, reason",
    [
        ("albert", {"embedding_size": 8}, "albert models cannot be cut: expected one list of 4 layers, found 0"),
        ("deberta-v2", {"conv_kernel_size": 3, "relative_attention": True}, "happens between layers 1 and 2"),
        ("xlm", {"emb_dim": 32, "n_layers": 4, "n_heads": 4}, "expected one list of 4 layers, found 4"),
    ],
)
def test_backbones_that_cannot_be_cut(kind, extra, reason, tmp_path):
    """Shared layers, something between layers, layers in parts: found out by looking and by a probe."""
    AutoModel.from_config(CONFIG_MAPPING[kind](**{**BASE, **extra})).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    model = SentenceTransformer(modules=[Transformer(str(tmp_path)), Pooling(HIDDEN)], device="cpu")
    with pytest.raises(UnsupportedEncoderError, match=reason):
        Encoder.of(model)


def test_what_follows_the_layers_must_be_a_norm(encoder):
    model = encoder("modernbert")

    class Doubled(nn.Module):
        def forward(self, states):
            return 2 * states

    model[0].model.final_norm = Doubled()
    with pytest.raises(UnsupportedEncoderError, match="what follows the last layer is not a norm"):
        Encoder.of(model)


def test_layers_that_write_into_their_input_are_found_out(encoder):
    """Their states would change after they were tapped."""

    def write(module, args):
        args[0].add_(1)

    model = encoder("bert")
    model[0].model.encoder.layer[1].register_forward_pre_hook(write)
    with pytest.raises(UnsupportedEncoderError, match="happens between layers 1 and 2"):
        Encoder.of(model)


def test_the_probe_leaves_no_traces(encoder):
    """Modes, hooks and random state are as before; dropout does not confuse it."""
    model = encoder("bert").train()
    model[0].model.embeddings.eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    assert Encoder.of(model).final_norm is None
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_model_of_other_weights_is_another_model(tmp_path):
    """What is found is remembered by model, as names: nothing of one model shows up in another."""
    folders = [save_backbone(family, tmp_path / family) for family in ("bert", "modernbert")]
    models = [SentenceTransformer(modules=[Transformer(str(f)), Pooling(HIDDEN)], device="cpu") for f in folders]
    first, second, again = (Encoder.of(models[i]) for i in (0, 1, 0))
    assert first.final_norm is None and second.final_norm is models[1][0].model.final_norm
    assert first.layers is again.layers is models[0][0].model.encoder.layer
