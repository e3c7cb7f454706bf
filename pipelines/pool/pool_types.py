"""One type per column for a pool whose files were written at different times and by different tools.

Columns that are read may differ in encoding (dictionaries, long offsets), in the width of their numbers, in whole numbers
beside fractions, and may have no type where all values are missing: each gets the type that holds them all, and a file that
has another is cast while it is read. Columns that nobody reads are not looked at.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from distilbeam.pipelines.pool.pool_files import PoolFile


def common_type(one: pa.DataType, two: pa.DataType) -> pa.DataType | None:
    """Return the type that holds the values of both, or None where none does."""
    if one == two:
        return one
    plain = [kind.value_type if pa.types.is_dictionary(kind) else kind for kind in (one, two)]
    if plain[0] == plain[1]:
        return plain[0]
    if _is_text(plain[0]) != _is_text(plain[1]) and pa.null() not in plain:  # bytes are no text
        return None
    try:
        schemas = [pa.schema([("column", kind)]) for kind in plain]
        return pa.unify_schemas(schemas, promote_options="permissive").field(0).type
    except pa.ArrowException:
        return None


def columns_and_types(
    files: Sequence[PoolFile], what: str, columns: Iterable[str] | None
) -> tuple[tuple[str, ...], dict[str, pa.DataType]]:
    """Find the columns of the first file that has rows, and the types of those that are read."""
    first: pa.Schema | None = None
    read: tuple[str, ...] = ()
    types: dict[str, pa.DataType] = {}
    for file in files:
        if not file.metadata.num_rows:
            continue
        schema = file.metadata.schema.to_arrow_schema()
        if first is None:
            first, read = schema, tuple(schema.names) if columns is None else tuple(dict.fromkeys(columns))
        if columns is None:
            _require_same(first, schema, file.path, what)
        for name in read:
            if name in schema.names:
                types[name] = _common(types.get(name), schema.field(name).type, name, file.path, what)
            elif name in first.names:
                raise ValueError(
                    f"{what}: {file.path} has no column {name}, which is read and other files have; write it again with "
                    "it, or take it out"
                )
    return (() if first is None else tuple(first.names)), types


def casts_of(file: PoolFile, types: dict[str, pa.DataType]) -> tuple[tuple[str, pa.DataType], ...]:
    """List the columns of a file that are read and have another type in it than in the pool, with the pool's."""
    schema = file.metadata.schema.to_arrow_schema()
    return tuple(
        (name, kind) for name, kind in types.items() if name in schema.names and schema.field(name).type != kind
    )


def cast_batches(
    batches: Iterable[pa.RecordBatch], casts: Sequence[tuple[str, pa.DataType]], path: str
) -> Iterator[pa.RecordBatch]:
    """Give the columns of a file's batches the types that they have in the pool.

    Raises:
      ValueError: a value does not fit.
    """
    for batch in batches:
        for name, kind in casts:
            if name in batch.schema.names:
                batch = _cast(batch, name, kind, path)
        yield batch


def _common(so_far: pa.DataType | None, found: pa.DataType, name: str, path: str, what: str) -> pa.DataType:
    common = found if so_far is None else common_type(so_far, found)
    if common is None:
        raise ValueError(
            f"{what}: {path} differs from the files before it in column(s) {name}, which is {found} there and {so_far} in "
            "them; write it again with one type"
        )
    return common


def _require_same(first: pa.Schema, schema: pa.Schema, path: str, what: str) -> None:
    expected, found = ({field.name: field.type for field in s} for s in (first, schema))
    if differing := {name for name, _ in expected.items() ^ found.items()}:
        raise ValueError(
            f"{what}: {path} differs from the first file in column(s) {', '.join(sorted(differing))}; all files must have "
            "one schema"
        )


def _cast(batch: pa.RecordBatch, name: str, kind: pa.DataType, path: str) -> pa.RecordBatch:
    index = batch.schema.get_field_index(name)
    try:
        # whole numbers beyond 2^53 become the nearest fraction
        column = pc.cast(batch.column(index), kind, safe=not _has_fractions(kind))
    except pa.ArrowException as e:
        raise ValueError(
            f"{path}: column {name} cannot be read as {kind}, which it is in other files of the pool ({e}); "
            "write the file again with the type of the others"
        ) from e
    return batch.set_column(index, pa.field(name, kind), column)


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _has_fractions(kind: pa.DataType) -> bool:
    return bool(pa.types.is_floating(kind) or (hasattr(kind, "value_type") and _has_fractions(kind.value_type)))
