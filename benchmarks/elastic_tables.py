"""The tables of experiments with sizes of an adapter: search across sizes, and early exit."""

from columns import Format, load, percent, pivot, table, times_100, titled
from names import EXITS, MAPS, POLICIES, QUERIES

PACKAGED = 156_288  # texts that the packaged adapter was distilled on: 2,442 steps of 64
CURVE = ("1x128", "2x192", "3x256", "4x384")  # sizes that are trained
KINDS = {"mean_sts": "STS", "mean_ndcg": "nDCG@10"}


def points(value: float) -> str:
    return f"{100 * value:+.1f}"


def joined(way: str) -> str:
    """Full queries on documents of small sizes, alone and joined with queries of the documents' size."""
    lines: dict[str, dict] = {}
    for row in load("elastic_across"):
        if row["way"] == way:
            line = lines.setdefault(row["size"], {"size": row["size"]})
            line |= {f"{key} {row['queries']}": row[key] for key in ("mean_ndcg", "share_ndcg")}
    columns: dict[str, tuple[str, Format]] = {"size": ("documents", str)}
    for queries in ("own", "full", "joined"):
        if f"mean_ndcg {queries}" in next(iter(lines.values())):
            columns[f"mean_ndcg {queries}"] = (QUERIES[queries], times_100)
            columns[f"share_ndcg {queries}"] = ("of full", percent)
    return table(lines.values(), columns)


def tried() -> str:
    """The share of full queries on full documents that full queries keep, by what maps the documents' vectors."""
    rows = [row for row in load("elastic_across") if row["queries"] == "full" and row["way"] in MAPS]
    return pivot(rows, ("way", "maps", MAPS.__getitem__), ("size", str), "share_ndcg", percent)


def early_exit() -> str:
    """What each policy has above the fixed sizes, at about two, three and four layers a text."""
    rows = [row for row in load("elastic_exit") if row["policy"] in POLICIES]
    parts = {}
    for kind, title in EXITS.items():
        lines = []
        for policy in POLICIES:
            own = [row for row in rows if (row["policy"], row["kind"]) == (policy, kind)]
            near = {str(n): min(own, key=lambda row, n=n: abs(row["layers"] - n))["over"] for n in (2, 3, 4)}
            lines.append({"policy": POLICIES[policy], **near})
        columns = {str(n): (f"about {n} layers", points) for n in (2, 3, 4)}
        parts[title] = table(lines, {"policy": ("who says where a text leaves", str), **columns})
    return titled(parts)


def curve() -> str:
    """STS and nDCG@10 of each size by the texts that it was distilled on; the packaged sizes saw the most."""
    rows = [row for row in load("elastic_curve") if row["way"] == "together"]
    rows += [{**row, "texts": PACKAGED} for row in load("elastic") if row["method"] == "trained"]
    rows = sorted((row for row in rows if row["size"] in CURVE), key=lambda row: row["texts"])
    down = ("texts", "texts", lambda count: f"{count:,}")
    return titled({title: pivot(rows, down, ("size", str), kind, times_100) for kind, title in KINDS.items()})


def alone() -> str:
    """Sizes that were trained together beside those of a training of their own, on as many texts."""
    rows = load("elastic_curve")
    texts = next(row["texts"] for row in rows if row["way"] != "together")
    lines: dict[str, dict] = {}
    for row in rows:
        if row["texts"] == texts and row["size"] in CURVE:
            way = "together" if row["way"] == "together" else "alone"
            lines.setdefault(row["size"], {"size": row["size"]}).update({f"{k} {way}": row[k] for k in KINDS})
    columns: dict[str, tuple[str, Format]] = {"size": ("size", str)}
    for kind, title in KINDS.items():
        columns |= {f"{kind} {way}": (f"{title}, {way}", times_100) for way in ("together", "alone")}
    return table([line for line in lines.values() if line.keys() == columns.keys()], columns)
