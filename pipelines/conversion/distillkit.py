"""DistillKit's compressed log-probabilities: bytes of each token become classes and log-probabilities again.

A token's bytes are, one after another: `exact_k` values of `exact_dtype`; a coefficient of `term_dtype` for each of
`polynomial_terms`; and for each of `residual_bins` a scale and packed whole numbers. With t = 0, 1, ... for the k - exact_k values
that are not exact (over [0, 1] where `normalize_t`), value t is

    sum of coefficient i * term i(t) + scale * (packed number - 2^(bits - 1)),     one bit b: scale * (2 b - 1)

in `term_dtype` before the second summand, since what the bins hold is the difference to that. With `delta_encoding` each value is the
difference to the one before. Ids are packed numbers of ceil(log2 d) bits. Packed numbers have their highest bit first and
stand without gaps; bytes are filled from the highest bit.

Source: the format of github.com/arcee-ai/DistillKit, `compression_config.yaml` beside the Parquet files of a capture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from distilbeam.settings import validated

CONFIG_FILE = "compression_config.yaml"
Dtype = Literal["float16", "bfloat16", "float32", "float64"]
Bytes = npt.NDArray[np.uint8]
_LEAST = 1e-6  # probability that is left for approximated values where rounding made the exact ones sum to 1
_SPECIAL = {"sqrt": torch.sqrt, "exp": torch.exp}


class _Fixed(BaseModel):  # no settings of ours
    model_config = ConfigDict(frozen=True, extra="forbid")


class ResidualBin(_Fixed):
    """Whole numbers that correct some of the approximated values."""

    scale_dtype: Dtype
    element_bits: int = Field(ge=1, le=32)
    num_elements: int = Field(ge=1)


class Compression(_Fixed):
    """How a data set was compressed: DistillKit's own settings, by their names there.

    Attributes:
      d: ids of the vocabulary.
      k: classes of a token.
      exact_k: of these, those whose value is stored.
      exact_dtype: type of these values.
      polynomial_terms: powers of t, `sqrt` and `exp`, whose coefficients are stored.
      term_dtype: type of the coefficients.
      residual_bins: corrections.
      delta_encoding: whether a value is the difference to the one before.
      error_diffusion: how values were rounded, which changes nothing here.
      normalize_t: whether t goes from 0 to 1.
    """

    d: int = Field(ge=2)
    k: int = Field(ge=1)
    exact_k: int = Field(ge=0)
    exact_dtype: Dtype = "float32"
    polynomial_terms: tuple[Annotated[int, Field(ge=-64, le=64)] | Literal["sqrt", "exp"], ...] | None = None
    term_dtype: Dtype = "float32"
    residual_bins: tuple[ResidualBin, ...] = ()
    delta_encoding: bool = True
    error_diffusion: bool = False
    normalize_t: bool = False

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if self.exact_k > self.k:
            raise ValueError(f"exact_k must be at most k = {self.k}, got {self.exact_k}")
        if sum(part.num_elements for part in self.residual_bins) > self.k - self.exact_k:
            raise ValueError(
                f"residual_bins must have at most the {self.k - self.exact_k} elements that are not exact, got more"
            )
        return self

    @property
    def id_bits(self) -> int:
        """Bits of an id; the logarithm is taken in single precision, as where they were packed."""
        return int(np.ceil(np.log2(np.float32(self.d))))

    @property
    def logprob_bytes(self) -> int:
        """Bytes of a token's values."""
        fixed = self.exact_k * _size(self.exact_dtype) + len(self.polynomial_terms or ()) * _size(self.term_dtype)
        return fixed + sum(_size(b.scale_dtype) + _packed(b.num_elements, b.element_bits) for b in self.residual_bins)

    @property
    def id_bytes(self) -> int:
        """Bytes of a token's ids."""
        return _packed(self.k, self.id_bits)


def read_compression(path: Path) -> Compression:
    """Read the settings that a data set was compressed with.

    Args:
      path: the YAML file: `compression_config.yaml`, or a training's with them as `logprob_compressor`.

    Raises:
      ValueError: there is none, or it does not hold them.
    """
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as e:
        raise ValueError(
            f"--compression must be DistillKit's {CONFIG_FILE}, which a capture writes beside its Parquet files; {path} cannot be "
            f"read ({(str(e).splitlines() or [''])[0]})"
        ) from e
    for name in ("teacher", "logprob_compressor"):
        if isinstance(found, dict) and isinstance(found.get(name), dict):
            found = found[name]
    if not isinstance(found, dict):
        raise ValueError(f"--compression: {path} must hold names and values, such as d, k and exact_k")
    if "legacy_logit_compression" in found or "polynomial_degree" in found:
        raise ValueError(f"--compression: {path} is of DistillKit's legacy form: {LEGACY}")
    return validated(Compression, found)


LEGACY = "it holds logits less their mean without what would make probabilities of them; capture again with logprob_compressor"


def decode_record(
    record: Mapping[str, pa.Array], compression: Compression | None, where: str
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Decode a row of a data set.

    Args:
      record: its columns as lists of lists of bytes.
      compression: the settings.
      where: file and row, for messages.

    Returns:
      Classes int64 [R, k] and log-probabilities float64 [R, k]. Where approximated ones leave the exact ones no room (of SmolLM2's
      top 50 under DistillKit's budget settings probabilities sum to as much as 1.5) they share what the exact ones leave.

    Raises:
      ValueError: it is of the legacy form or of other settings.
    """
    if "packed_indices" in record:
        raise ValueError(f"{where}: it is of DistillKit's legacy form: {LEGACY}")
    if compression is None:
        raise ValueError(
            f"--compression must be given: {CONFIG_FILE}, which says how compressed_logprobs are read, is not beside {where}"
        )
    if "bytepacked_indices" not in record:
        raise ValueError(f"{where}: the form 'distillkit' must have bytepacked_indices beside compressed_logprobs")
    values = _matrix(record, "compressed_logprobs", compression.logprob_bytes, where)
    packed = _matrix(record, "bytepacked_indices", compression.id_bytes, where)
    if len(values) != len(packed):
        raise ValueError(
            f"{where}: compressed_logprobs and bytepacked_indices must be of the same tokens, got {len(values):,} and "
            f"{len(packed):,}"
        )
    logprobs = decompress(values, compression)
    exact, approximated = np.split(np.exp(logprobs), [compression.exact_k], axis=1)
    room = np.maximum(1 - exact.sum(axis=1), _LEAST)
    over = np.maximum(approximated.sum(axis=1) / room, 1)
    logprobs[:, compression.exact_k :] -= np.log(over)[:, None]
    return unpack_ids(packed, compression), logprobs


def _matrix(record: Mapping[str, pa.Array], name: str, size: int, where: str) -> Bytes:
    lists = record[name]
    lengths = pc.list_value_length(lists).to_numpy(zero_copy_only=False) if len(lists) else np.full(0, size)
    if (lengths != size).any():
        raise ValueError(
            f"{where}: {name} must have {size} bytes for each token by --compression, got {int(lengths[lengths != size][0])}: it is "
            "of another capture"
        )
    flat = lists.flatten().to_numpy(zero_copy_only=False) if len(lists) else np.empty(0)
    return flat.astype(np.uint8).reshape(-1, size)


def unpack_ids(packed: Bytes, compression: Compression) -> npt.NDArray[np.int64]:
    """Unpack ids.

    Args:
      packed: uint8 [R, `id_bytes`].
      compression: the settings.

    Returns:
      int64 [R, k].
    """
    return _unpack(packed, compression.k, compression.id_bits)


def decompress(packed: Bytes, compression: Compression) -> npt.NDArray[np.float64]:
    """Decode values.

    Args:
      packed: uint8 [R, `logprob_bytes`].
      compression: the settings.

    Returns:
      float64 [R, k]. Those that are approximated are at most 0, whatever the polynomial says.
    """
    rest, exact_k = packed, compression.exact_k
    exact, rest = _values(rest, exact_k, compression.exact_dtype)
    terms = compression.polynomial_terms or ()
    count = compression.k - exact_k
    coefficients, rest = _values(rest, len(terms), compression.term_dtype)
    residual = torch.zeros(len(packed), count)
    place = 0
    for part in compression.residual_bins:
        scale, rest = _values(rest, 1, part.scale_dtype)
        size = _packed(part.num_elements, part.element_bits)
        numbers = torch.from_numpy(_unpack(rest[:, :size], part.num_elements, part.element_bits)).float()
        numbers = numbers * 2 - 1 if part.element_bits == 1 else numbers - 2 ** (part.element_bits - 1)
        residual[:, place : place + part.num_elements] = numbers * scale
        rest, place = rest[:, size:], place + part.num_elements
    approximated = residual.double()
    if terms and count:
        approximated = approximated + _polynomial(coefficients, terms, count, compression.normalize_t).double()
    values = torch.cat([exact.double(), approximated], dim=1)
    if compression.delta_encoding:
        values = values.cumsum(dim=1)
    values[:, exact_k:] = values[:, exact_k:].clamp(max=0)
    found: npt.NDArray[np.float64] = values.numpy()
    return found


def _polynomial(coefficients: torch.Tensor, terms: Sequence[int | str], count: int, normalize: bool) -> torch.Tensor:
    dtype = coefficients.dtype
    t = torch.linspace(0, 1, count, dtype=dtype) if normalize else torch.arange(count, dtype=dtype)
    columns = [t**term if isinstance(term, int) else _SPECIAL[term](t) for term in terms]
    return (torch.stack(columns, dim=1) * coefficients[:, None, :]).sum(dim=2)


def _values(packed: Bytes, count: int, dtype: Dtype) -> tuple[torch.Tensor, Bytes]:
    """Read numbers from the front of each row: [R, count] and the rest of the rows."""
    size, kind = count * _size(dtype), getattr(torch, dtype)
    if not size * len(packed):
        return torch.empty(len(packed), count, dtype=kind), packed
    return torch.from_numpy(np.ascontiguousarray(packed[:, :size])).view(kind), packed[:, size:]


def _unpack(packed: Bytes, count: int, bits: int) -> npt.NDArray[np.int64]:
    every = np.unpackbits(packed, axis=1)[:, : count * bits].reshape(len(packed), count, bits)
    powers = 1 << np.arange(bits - 1, -1, -1, dtype=np.int64)
    found: npt.NDArray[np.int64] = every.astype(np.int64) @ powers
    return found


def _packed(count: int, bits: int) -> int:
    return -(-count * bits // 8)


def _size(dtype: Dtype) -> int:
    return {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}[dtype]
