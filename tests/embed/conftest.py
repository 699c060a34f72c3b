from pathlib import Path

import pytest
from sentence_transformers import SentenceTransformer

from .families import save_backbone, sentence_model


@pytest.fixture(scope="session")
def backbones(tmp_path_factory):
    """``backbones(family, side)``: a folder with a tiny random model of that family. Not to be written to."""
    made: dict[tuple[str, str], Path] = {}

    def make(family: str, side: str = "right") -> Path:
        if (family, side) not in made:
            made[family, side] = save_backbone(family, tmp_path_factory.mktemp(family), side)
        return made[family, side]

    return make


@pytest.fixture
def encoder(backbones):
    """``encoder(family, pooling, side)``: a new SentenceTransformer in eval mode."""

    def make(family: str = "bert", pooling: str = "mean", side: str = "right", **options) -> SentenceTransformer:
        return sentence_model(backbones(family, side), pooling, **options)

    return make


@pytest.fixture(scope="module")
def tiny_bert(backbones):
    """One for many examples of a property; in fp64."""
    return sentence_model(backbones("bert")).double()
