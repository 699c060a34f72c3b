"""The model card of an exported cup."""

from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub.utils import yaml_dump
from sentence_transformers import SentenceTransformer

from nestling.embed.evaluation.agreement import NOTE
from nestling.embed.evaluation.results import markdown
from nestling.embed.export.compatibility import inputs, longest
from nestling.embed.export.origin import Origin, origin_of
from nestling.embed.ladder import Cup, Ladder
from nestling.embed.model.encode import stored_prompts
from nestling.embed.model.projection import Projection
from nestling.embed.model.similarity import Similarity


def card(
    source: SentenceTransformer,
    served: SentenceTransformer,
    cup: Cup,
    ladder: Ladder,
    rows: Sequence[Mapping[str, Any]],
    onnx: bool,
) -> str:
    """Front matter, what the model is, how it is used, what was measured."""
    origin, similarity = origin_of(source), Similarity.of(served)
    million = sum(p.numel() for p in served.parameters()) / 1e6
    limit = longest(served)
    vectors = "unit vectors" if similarity.unit else "vectors whose lengths count"
    facts = [
        f"The cup **{cup.name}** ({cup.layers} layers, {cup.dims} dimensions) of "
        f"{origin.noun}, cut out by nestling: {million:.1f} M parameters"
        f"{f', texts of up to {limit} tokens' if limit else ''}, {vectors}, compared by {similarity.words}.",
        "Layers save encode time, dimensions save index bytes and search time.",
    ]
    if len(ladder) > 1:
        facts.append(f"Its ladder has the cups {', '.join(c.name for c in ladder)}.")
    parts = [_front(origin, cup.name), f"# {origin.title}, {cup.name}", " ".join(facts), _usage(served)]
    if onnx:
        parts += [_onnx(served, cup, similarity), _javascript(similarity)]
    own = [row for row in rows if row.get("cup") == cup.name]
    if own:
        labelled = "Spearman's correlation, nDCG@10 and recall@100, all x 100."
        note = f"{NOTE} All x 100." if any("agreement" in row for row in own) else labelled
        parts.append(f"## Measured\n\n{note}\n\n{markdown(own)}".rstrip())
    return "\n\n".join(parts) + "\n"


def trained_card(
    model: SentenceTransformer, ladder: Ladder, training: Mapping[str, Any], projections: Mapping[int, Projection]
) -> str:
    """The card of a model whose cups were trained: what they are, how they were trained, how one is handed out."""
    origin = origin_of(model)
    kinds = {"texts": "texts without labels", "pairs": "pairs", "scored": "scored pairs", "rows": "rows"}
    facts = (
        f"{_capital(origin.noun)} whose every size is good by itself, trained by nestling on "
        f"{training['rows']:,} {kinds[training['kind']]} ({training['steps']:,} steps of {training['batch_size']}): "
        f"the cups (layers x dims) {', '.join(cup.name for cup in ladder)}. Vectors are compared by "
        f"{Similarity.of(model).words} at every size."
    )
    parts = [_front(origin, "cups"), f"# {origin.title}, {len(ladder)} cups", facts, _cut_out(ladder, projections)]
    rows = measured(ladder, training)
    if len(rows[0]) > 1:
        parts.append(f"## Measured\n\nOn held-out data, x 100.\n\n{markdown(rows)}".rstrip())
    return "\n\n".join(parts) + "\n"


def aligned_card(
    model: SentenceTransformer, ladder: Ladder, info: Mapping[str, Any], projections: Mapping[int, Projection]
) -> str:
    """The card of a model whose small cups were aligned with it and not trained."""
    origin = origin_of(model)
    facts = (
        f"{_capital(origin.noun)} with smaller cups (layers x dims) "
        f"{', '.join(cup.name for cup in ladder)}, aligned with it by nestling on {info['texts']:,} texts: a linear "
        "map of each depth's vectors, in closed form. No weights were trained."
    )
    parts = [_front(origin, "cups"), f"# {origin.title}, {len(ladder)} cups", facts, _cut_out(ladder, projections)]
    return "\n\n".join(parts) + "\n"


def pretrained_card(model: SentenceTransformer, ladder: Ladder, training: Mapping[str, Any]) -> str:
    """The card of a model that was only pre-trained: what it is, and that it is no encoder to use yet."""
    origin = origin_of(model)
    kind = "masked-language model" if not training["decoder"] else "masked autoencoder (SMAE, arXiv 2410.13230)"
    facts = (
        f"{_capital(origin.noun)}, pre-trained by nestling as a {kind} on {training['tokens']:,} "
        f"tokens ({training['steps']:,} steps of {training['batch_size']}) at the cups (layers x dims) "
        f"{', '.join(cup.name for cup in ladder)}."
    )
    use = (
        "A start for training on pairs, scored pairs or texts, which gives it vectors that can be compared:\n\n```sh\n"
        'nestling embed train "this folder" --pairs pairs.jsonl --out trained\n```'
    )
    parts = [
        _front(origin, "pre-trained", usable=False),
        f"# {origin.title}, pre-trained",
        facts,
        f"## Use\n\n{use}",
    ]
    return "\n\n".join(parts) + "\n"


def _capital(noun: str) -> str:
    return noun[0].upper() + noun[1:]


def _front(origin: Origin, what: str, usable: bool = True) -> str:
    """What hubs read of a model. Its licence is its base's, if that has a card that states one."""
    head: dict[str, Any] = {"library_name": "sentence-transformers"}
    if usable:
        head["pipeline_tag"] = "sentence-similarity"
    if origin.name:
        head["model_name"] = f"{origin.name.rpartition('/')[2]}-{what}"
    if origin.base:
        head["base_model"] = origin.base
    head |= origin.facts
    head["tags"] = ["sentence-transformers", *["feature-extraction", "sentence-similarity"] * usable, "nestling"]
    return f"---\n{yaml_dump(head, sort_keys=False)}---"


def _cut_out(ladder: Ladder, projections: Mapping[int, Projection]) -> str:
    """How a cup is handed out."""
    small, full = ladder.cups[0], ladder.full
    whole = "Loaded as it is, it is the full model. A smaller cup is cut out as a model of its own"
    if full.layers in projections and not projections[full.layers].keeps_similarities:
        whole = (
            "Behind its pooling a linear map was trained with it, or its vectors were centred, which the folder as it "
            f"is does not apply: the full cup {full} has to be exported too. A cup is cut out as a model of its own"
        )
    turned = ", projections=embed.load_projections(folder)" if projections else ""
    return (
        "## Use\n\n"
        f"{whole}:\n\n```python\nfrom nestling import embed\n\n"
        'folder = "this folder"\nmodel, ladder = embed.load_encoder(folder), embed.load_ladder(folder)\n'
        f'embed.export(model, "{small}", "small", ladder=ladder{turned})\n```\n\n'
        'or, all of them, `nestling embed export "this folder" --out cups`.'
    )


def measured(ladder: Ladder, training: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row a cup of what was measured before the training, and at the step whose weights were kept."""
    points = [p for p in training.get("curve", ()) if any(name.endswith(("mean_sts", "mean_ndcg")) for name in p)]
    before: Mapping[str, Any] = next((p for p in points if p["step"] == 0), {})
    last = points[-1] if points and points[-1]["step"] else {}
    after = next((p for p in points if p["step"] == training.get("best_step")), last)
    rows = []
    for cup in ladder:
        row: dict[str, Any] = {"cup": cup.name}
        for when, point in (("before", before), ("after", after)):
            for kind in ("mean_sts", "mean_ndcg"):
                name = f"{cup.name}_{kind}"
                row |= {f"{kind} {when}": value for key, value in point.items() if f"_{key}".endswith(f"_{name}")}
        rows.append(row)
    return rows


def _usage(served: SentenceTransformer) -> str:
    prompts = {name: prompt for name, prompt in served.prompts.items() if prompt}
    note = "".join(f"\nPrompt `{name}`: {prompt!r}." for name, prompt in prompts.items())
    used = stored_prompts(served)
    asked = ""
    if used["query"] or used["passage"]:
        asked = 'queries, documents = model.encode_query(["a question"]), model.encode_document(["a passage"])\n'
    return (
        "## Use\n\n```python\nfrom sentence_transformers import SentenceTransformer\n\n"
        f'model = SentenceTransformer("this folder")\nvectors = model.encode(["a sentence"])\n{asked}```\n\n'
        "text-embeddings-inference and vLLM serve the folder as it is, where they know the architecture." + note
    )


def _onnx(served: SentenceTransformer, cup: Cup, similarity: Similarity) -> str:
    fed = " and ".join(f"`{name}`" for name in inputs(served))
    given = "unit vectors" if similarity.unit else "vectors whose lengths count"
    prompted = ""
    if any(served.prompts.values()):
        prompted = " Prompts are put in front of texts by whoever calls it."
    return (
        f"## ONNX\n\n`onnx/model.onnx` takes {fed} and returns {given} (`sentence_embedding`).{prompted} With "
        "fastembed:\n\n```python\nfrom fastembed import TextEmbedding\n"
        "from fastembed.common.model_description import ModelSource, PoolingType\n\n"
        f'TextEmbedding.add_custom_model("cup-{cup.name}", pooling=PoolingType.DISABLED, normalization=False,\n'
        f'    sources=ModelSource(url="local"), dim={cup.dims}, model_file="onnx/model.onnx")\n'
        f'model = TextEmbedding("cup-{cup.name}", specific_model_path="this folder")\n```\n\n'
        'The graph pools by itself, so `SentenceTransformer(..., backend="onnx")`, which pools once more, refuses it: '
        "leave the backend out."
    )


def _javascript(similarity: Similarity) -> str:
    unit = ", normalize: true" if similarity.unit else ""
    return (
        "With transformers.js (`dtype: 'q8'` where the folder has int8 weights):\n\n```js\n"
        "import { pipeline } from '@huggingface/transformers';\n\n"
        "const embed = await pipeline('feature-extraction', 'this folder', { dtype: 'fp32' });\n"
        f"const vectors = await embed(['a sentence'], {{ pooling: 'mean'{unit} }});\n```"
    )
