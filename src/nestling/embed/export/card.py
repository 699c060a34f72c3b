"""The model cards of encoders: facts that the templates beside this file put into words."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import CardData, RepoCard
from sentence_transformers import SentenceTransformer

from nestling.embed.evaluation.agreement import NOTE
from nestling.embed.evaluation.results import markdown
from nestling.embed.export.compatibility import inputs, longest
from nestling.embed.export.origin import origin_of
from nestling.embed.ladder import Ladder, Size
from nestling.embed.model.encode import stored_prompts
from nestling.embed.model.projection import Projection
from nestling.embed.model.similarity import Similarity

MEANS = ("mean_sts", "mean_ndcg", "mean_agreement")  # what is measured while training
KINDS = {"texts": "texts without labels", "pairs": "pairs", "scored": "scored pairs", "rows": "rows"}


def card(
    source: SentenceTransformer,
    served: SentenceTransformer,
    size: Size,
    ladder: Ladder,
    rows: Sequence[Mapping[str, Any]],
    onnx: bool,
) -> str:
    """The card of an exported size: what it is, how it is used, what was measured."""
    similarity, prompts = Similarity.of(served), stored_prompts(served)
    own = [row for row in rows if row.get("size") == size.name]
    labelled = "Spearman's correlation, nDCG@10 and recall@100, all x 100."
    return _card(
        "size", source, size.name, size=size, ladder=ladder, onnx=onnx, similarity=similarity, limit=longest(served),
        million=sum(p.numel() for p in served.parameters()) / 1e6, inputs=inputs(served),
        vectors="unit vectors" if similarity.unit else "vectors whose lengths count",
        prompts={name: repr(prompt) for name, prompt in served.prompts.items() if prompt},
        asymmetric=prompts["query"] or prompts["passage"], rows=markdown(own).rstrip() if own else "",
        note=f"{NOTE} All x 100." if any("agreement" in row for row in own) else labelled,
    )  # fmt: skip


def card_of(
    model: SentenceTransformer, ladder: Ladder, made: str, info: Mapping[str, Any],
    projections: Mapping[int, Projection],
) -> str:  # fmt: skip
    """The card of an encoder of several sizes, by how they were made; "" if they are cut out as they are."""
    if made == "training":
        return trained_card(model, ladder, info, projections)
    if made == "pretraining":
        return pretrained_card(model, ladder, info)
    return aligned_card(model, ladder, info, projections)


def trained_card(
    model: SentenceTransformer, ladder: Ladder, training: Mapping[str, Any], projections: Mapping[int, Projection]
) -> str:
    """The card of a model whose sizes were trained: what they are, how they were trained, how one is handed out."""
    rows = measured(ladder, training)
    facts = {"kind": KINDS[training["kind"]], "rows": markdown(rows).rstrip() if len(rows[0]) > 1 else ""}
    return _elastic_card(model, ladder, training, projections, trained=True, **facts)


def aligned_card(
    model: SentenceTransformer, ladder: Ladder, info: Mapping[str, Any], projections: Mapping[int, Projection]
) -> str:
    """The card of a model whose small sizes were aligned with it, or are cut out as they are, and not trained."""
    return _elastic_card(model, ladder, info, projections, trained=False)


def pretrained_card(model: SentenceTransformer, ladder: Ladder, training: Mapping[str, Any]) -> str:
    """The card of a model that was only pre-trained: what it is, and that it is no encoder to use yet."""
    return _card("pretrained", model, "pre-trained", usable=False, ladder=ladder, info=training)


def measured(ladder: Ladder, training: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row a size of what was measured before the training, and at the step whose weights were kept."""
    points = [p for p in training.get("curve", ()) if any(name.endswith(MEANS) for name in p)]
    before: Mapping[str, Any] = next((p for p in points if p["step"] == 0), {})
    last = points[-1] if points and points[-1]["step"] else {}
    after = next((p for p in points if p["step"] == training.get("best_step")), last)
    rows = []
    for size in ladder:
        row: dict[str, Any] = {"size": size.name}
        for when, point in (("before", before), ("after", after)):
            for kind in MEANS:
                name = f"{size.name}_{kind}"
                row |= {f"{kind} {when}": value for key, value in point.items() if f"_{key}".endswith(f"_{name}")}
        rows.append(row)
    return rows


def _elastic_card(
    model: SentenceTransformer, ladder: Ladder, info: Mapping[str, Any], projections: Mapping[int, Projection],
    **facts: Any,
) -> str:  # fmt: skip
    full = projections.get(ladder.full.layers)
    return _card(
        "elastic", model, "sizes", ladder=ladder, info=info, projections=projections, similarity=Similarity.of(model),
        mapped=full is not None and not full.keeps_similarities, **facts,
    )  # fmt: skip


def _card(template: str, model: SentenceTransformer, what: str, usable: bool = True, **facts: Any) -> str:
    """A card with what hubs read in front. Its licence is its base's, if that has a card that states one."""
    origin = origin_of(model)
    uses = ["feature-extraction", "sentence-similarity"] if usable else []
    front = {
        "library_name": "sentence-transformers", "pipeline_tag": "sentence-similarity" if usable else None,
        "model_name": f"{origin.name.rpartition('/')[2]}-{what}" if origin.name else None,
        "base_model": origin.base or None, **origin.facts, "tags": ["sentence-transformers", *uses, "nestling"],
    }  # fmt: skip
    path = Path(__file__).with_name(f"{template}.md.jinja")
    noun = origin.noun[0].upper() + origin.noun[1:]
    made = RepoCard.from_template(CardData(**front), str(path), origin=origin, noun=noun, **facts)
    return str(made).rstrip() + "\n"
