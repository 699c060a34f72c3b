"""The encoder side of the page: a corpus indexed by any size of an encoder, and searched by a query."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from nestling.embed.elastic import ElasticEncoder
from nestling.embed.ladder import Size
from nestling.embed.model.parts import Encoder
from nestling.embed.search.flat import FlatIndex
from nestling.embed.search.index import Hit
from nestling.embed.search.plan import Plan
from nestling.errors import OptionError
from nestling.visible import visible

MOST_TEXTS = 2000  # of a corpus: a page should not be waited for


@dataclass(frozen=True, eq=False)
class Indexed:
    """A corpus at one size: its index, the seconds that encoding took, and the bytes of its vectors in fp32."""

    index: FlatIndex
    seconds: float
    nbytes: int


@dataclass(eq=False)
class Corpus:
    """Texts, one string each, and their indexes by size, as far as they were asked for.

    Raises:
        OptionError: there are no texts, or more than `MOST_TEXTS`.
    """

    texts: Sequence[str]
    indexes: dict[str, Indexed] = field(default_factory=dict)

    def __post_init__(self):
        if not self.texts:
            raise OptionError("the corpus is empty: paste texts, one a line, or take the built-in ones")
        if len(self.texts) > MOST_TEXTS:
            raise OptionError(
                f"{len(self.texts):,} texts are more than this page takes, {MOST_TEXTS:,}; for more there is "
                "nestling embed encode"
            )

    @classmethod
    def of_lines(cls, text: str) -> "Corpus":
        """One text a line; blank lines are left out."""
        return cls([visible(line.strip()) for line in text.splitlines() if line.strip()])


@dataclass(frozen=True)
class Results:
    """What a size finds.

    Attributes:
        hits: texts with their scores, best first.
        encode_milliseconds, search_milliseconds: of encoding the query, and of looking through the index.
    """

    size: str
    query_size: str
    hits: list[tuple[str, float]]
    encode_milliseconds: float
    search_milliseconds: float
    indexed: Indexed


class Finder:
    """An encoder that searches at any of its sizes.

    Args:
        name: that the encoder is shown by.
        encoder: with an adapter all its sizes share a space, so that queries of the full size find documents of any.

    Attributes:
        sizes: by name, smallest first; `full` is the last one.
    """

    def __init__(self, name: str, encoder: ElasticEncoder):
        self.name, self.encoder = name, encoder
        parts = Encoder.of(encoder.model)
        self.full = Size(parts.depth, parts.dims).name
        self.sizes = list(dict.fromkeys([*(size.name for size in encoder.sizes), self.full]))

    @property
    def one_space(self) -> bool:
        """Whether vectors of different sizes can be compared."""
        return self.encoder.space is not None

    def index(self, corpus: Corpus, sizes: Sequence[str]) -> None:
        """Encode a corpus at sizes at which it is not yet, one after the other, so that each has its own time.

        Raises:
            LadderError: the model does not have a size.
        """
        for name in dict.fromkeys(sizes):
            if name not in corpus.indexes:
                start = time.perf_counter()
                vectors = self.encoder.encode_document(list(corpus.texts), name)
                seconds = time.perf_counter() - start
                index = FlatIndex(Plan.full(Size.parse(name).dims))
                index.add([str(number) for number in range(len(corpus.texts))], vectors)
                corpus.indexes[name] = Indexed(index, seconds, vectors.nbytes)

    def search(self, corpus: Corpus, query: str, size: str, query_size: str, count: int = 5) -> Results:
        """The texts of a corpus that are nearest to a query.

        Args:
            size: of the documents; they are encoded at it if they are not yet.
            query_size: the same one, or a wider one of the same space.

        Raises:
            OptionError: the query is empty, or the sizes are not of one space.
            LadderError: the model does not have a size.
            SearchError: the query's size is narrower than the documents'.
        """
        if not query.strip():
            raise OptionError("the query is empty: type what you look for")
        if query_size != size and not self.one_space:
            raise OptionError(
                f"{self.name}: each of its depths has a space of its own, so queries of {query_size} cannot find "
                f"documents of {size}; train its sizes with nestling embed train on plain texts for one space"
            )
        self.index(corpus, [size])
        indexed = corpus.indexes[size]
        start = time.perf_counter()
        vector = self.encoder.encode_query(query.strip(), query_size)
        middle = time.perf_counter()
        hits: list[Hit] = indexed.index.search(vector, count)
        end = time.perf_counter()
        found = [(corpus.texts[int(hit.id)], hit.score) for hit in hits]
        return Results(size, query_size, found, 1e3 * (middle - start), 1e3 * (end - middle), indexed)
