"""PostgreSQL with pgvector: one column of full vectors, and an index of their prefixes.

A search is one statement: the prefix finds candidates by the index, the full vectors rank them.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from nestling.embed.search.index import Hit, Index
from nestling.embed.search.plan import Plan
from nestling.errors import SearchError
from nestling.integrations.libraries import library
from nestling.options import text, whole

MOST = 1000  # candidates that pgvector's graph looks for at once
CREATE = "create table {table} (id text primary key, full_vector vector({dims}) not null)"
BUILD = (
    "create index on {table} using hnsw ((subvector(full_vector, 1, {width})::vector({width})) vector_ip_ops) "
    "with (m = {links}, ef_construction = {effort})"
)
SEARCH = (
    "select id, -(full_vector <#> %(query)s) from (select id, full_vector from {table} order by "
    "subvector(full_vector, 1, {width})::vector({width}) <#> %(prefix)s limit %(candidates)s) as candidates "
    "order by full_vector <#> %(query)s limit %(k)s"
)


class PgvectorIndex(Index):
    """A table of PostgreSQL, which is gone on with if it is there.

    Args:
        plan, space: as of `Index`; those that the table was made with.
        connection: of psycopg, which the caller opens and closes; or what ``psycopg.connect`` takes. It commits by
            itself.
        table: its name.

    Raises:
        MissingExtraError: psycopg or pgvector is not installed.
        SearchError: the table's vectors are of another plan or space, or the server has no pgvector.
    """

    def __init__(self, plan: Plan, space: str | None, connection: Any, *, table: str = "nestling_vectors"):
        super().__init__(plan, space)
        psycopg = library("psycopg", "pgvector")
        adapters = library("pgvector.psycopg", "pgvector")
        self._sql: Any = library("psycopg.sql", "pgvector")
        self.connection = psycopg.connect(connection) if isinstance(connection, str) else connection
        self.connection.autocommit = True
        self.table = text("table", table)
        try:
            self.connection.execute("create extension if not exists vector")
        except psycopg.Error as error:
            raise SearchError(f"the server has no pgvector ({error}): install the extension there") from error
        adapters.register_vector(self.connection)
        self._claim({"space": space, "plan": plan.id})

    def _claim(self, about: dict[str, Any]) -> None:
        """Make the table, or see that it is of the same plan and space, which its comment says."""
        said = self._one("select obj_description(to_regclass(%s))", [self._quoted()])
        if self._one("select to_regclass(%s) is null", [self._quoted()]):
            self._run(CREATE, dims=self.plan.dims)
            self._run("comment on table {table} is {about}", about=json.dumps(about))
            return
        try:
            theirs = dict(json.loads(said or "{}"))
        except ValueError:
            theirs = {}
        if differ := [name for name in about if theirs.get(name) != about[name]]:
            raise SearchError(
                f"the table {self.table} has vectors of another {' and '.join(differ)}: choose another table"
            )

    def build(self, links: int = 16, effort: int = 64) -> None:
        """Build the graph of prefixes; a search before that reads all rows. Rows that come later are added to it."""
        self._run(BUILD, width=self.plan.width, links=whole("links", links), effort=whole("effort", effort))

    def __len__(self) -> int:
        return self._one(self._statement("select count(*) from {table}"))

    def _add(self, ids: Sequence[str], vectors: np.ndarray) -> None:
        copy = self._statement("copy {table} (id, full_vector) from stdin with (format binary)")
        with self.connection.cursor() as cursor, cursor.copy(copy) as rows:
            rows.set_types(["text", "vector"])
            for name, vector in zip(ids, vectors, strict=True):
                rows.write_row((name, vector))

    def _search(self, query: np.ndarray, k: int, candidates: int) -> list[Hit]:
        many = "relaxed_order" if candidates > MOST else "off"
        self.connection.execute(
            "select set_config('hnsw.ef_search', %s, false), set_config('hnsw.iterative_scan', %s, false)",
            [str(min(MOST, max(64, candidates))), many],
        )
        values = {"query": query, "prefix": query[: self.plan.width], "candidates": candidates, "k": k}
        rows = self.connection.execute(self._statement(SEARCH, width=self.plan.width), values).fetchall()
        return [Hit(name, float(score)) for name, score in rows]

    def _vectors(self, ids: Sequence[str]) -> np.ndarray:
        statement = self._statement("select id, full_vector from {table} where id = any(%s)")
        rows = self.connection.execute(statement, [list(ids)]).fetchall()
        found = {name: vector.to_numpy() if hasattr(vector, "to_numpy") else vector for name, vector in rows}
        return np.array([found[name] for name in ids], dtype=np.float32)

    def _there(self, ids: Sequence[str]) -> str | None:
        return self._one(self._statement("select min(id) from {table} where id = any(%s)"), [list(ids)])

    def _delete(self, ids: Sequence[str]) -> None:
        with self.connection.transaction():
            statement = self._statement("delete from {table} where id = any(%s) returning id")
            gone = {row[0] for row in self.connection.execute(statement, [list(ids)]).fetchall()}
            for name in ids:
                if name not in gone:
                    raise KeyError(name)

    def _quoted(self) -> str:
        return self._sql.Identifier(self.table).as_string(self.connection)

    def _statement(self, template: str, **values: Any) -> Any:
        parts = {name: self._sql.Literal(value) for name, value in values.items()}
        return self._sql.SQL(template).format(table=self._sql.Identifier(self.table), **parts)

    def _run(self, template: str, **values: Any) -> None:
        self.connection.execute(self._statement(template, **values))

    def _one(self, statement: Any, values: Any = None) -> Any:
        return self.connection.execute(statement, values).fetchone()[0]
