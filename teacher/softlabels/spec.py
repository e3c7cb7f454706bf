"""The specification of a soft-label dataset, which every shard and every manifest entry carries.

Two shards may be read together exactly when their specifications agree in everything that gives a number its meaning:
the classes, the kind of label, the temperature and the teacher. How a shard was stored may differ.

A row is an example with one label (format 1.x), or, where `unit` is "token", a block of tokens with a label at each
position (format 2.x), which releases that know examples alone refuse.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any, Literal, get_args

Kind = Literal["dense", "top_k", "sampled"]
Storage = Literal["float32", "float16"]
Unit = Literal["example", "token"]

FORMAT = "distilbeam.softlabels"
MAJOR, MINOR = 1, 1  # 1.1: `candidates` is int32
VERSIONS: Mapping[Unit, tuple[int, int]] = {"example": (MAJOR, MINOR), "token": (2, 0)}
MAX_CLASSES = 2**31 - 1
MAX_BLOCK = 2**20  # tokens
MAX_TOKENS = 2**24  # up to here float32 holds every id
MAX_DRAWS = 2048  # up to here a count is restored exactly from its logarithm in half precision


@dataclass(frozen=True)
class SoftLabelSpec:
    """Specification of a soft-label dataset, version 1, or 2 where the labels are of tokens.

    Attributes:
      num_classes: number of classes C of the teacher.
      kind: `dense` keeps every class, `top_k` the k most probable and the mass of the others, `sampled` the classes of
        k independent draws from the teacher with their frequencies (random sampling distillation, arXiv:2503.16870).
      k: classes kept (top_k) or draws (sampled); None for dense labels.
      classes: names of the classes in the order of the teacher's outputs, or None.
      temperature: what the teacher's logits are divided by before the softmax. 1 stores the teacher's own distribution;
        another value stores a calibrated teacher. A training temperature is applied by the trainer, not here.
      teacher: fingerprint of the teacher.
      carried: names of the columns that are copied from the pool beside the labels.
      storage: `float32` columns hold values rounded to half precision, the frequencies of sampled labels exactly, and are
        the smaller ones on disk; `float16` columns hold the same values in half of the memory.
      version: format version `major.minor` of the data that this object describes; the newest of its unit unless given.
      unit: `example` for a label of each row, `token` for one at each position of a row, which is a block of tokens.
      sequence_length: tokens L of a block; None for examples.
      positions: labels P of a block: `all` of its L positions, or the number of those that `label_positions` names.
      tokenizer: fingerprint of the tokenizer below `num_classes` (`distilbeam.inputs.tokenizer`).
      source: where the log-probabilities are from: the teacher's `logits`, or `server` with the engine and its cap,
        or the form of the data set that they were converted from.

    Raises:
      ValueError: a field breaks its rule; the message names the field, the rule and the value.

    Example:
      >>> SoftLabelSpec(num_classes=1000, kind="top_k", k=64).width
      64
      >>> of_tokens = SoftLabelSpec(num_classes=1000, kind="top_k", k=8, unit="token", sequence_length=256, tokenizer="ab")
      >>> of_tokens.width, of_tokens.version
      (2048, '2.0')
    """

    num_classes: int
    kind: Kind = "dense"
    k: int | None = None
    classes: tuple[str, ...] | None = None
    temperature: float = 1.0
    teacher: str = ""
    carried: tuple[str, ...] = ()
    storage: Storage = "float32"
    version: str = ""
    unit: Unit = "example"
    sequence_length: int | None = None
    positions: int | Literal["all"] = "all"
    tokenizer: str = ""
    source: str = "logits"

    def __post_init__(self) -> None:
        _check_choice("unit", self.unit, get_args(Unit))
        if self.version == "":
            object.__setattr__(self, "version", "{}.{}".format(*VERSIONS[self.unit]))
        self._check_unit()
        _check_int("num_classes", self.num_classes, 2, MAX_CLASSES)
        _check_choice("kind", self.kind, get_args(Kind))
        _check_choice("storage", self.storage, get_args(Storage))
        self._check_k()
        if not (isinstance(self.temperature, (int, float)) and 0 < self.temperature < math.inf):
            raise ValueError(f"temperature must be a positive number, got {self.temperature!r}")
        object.__setattr__(self, "temperature", float(self.temperature))
        object.__setattr__(self, "carried", _strings("carried", self.carried))
        # An empty list of names is what a configuration without names holds.
        object.__setattr__(self, "classes", _strings("classes", self.classes) if self.classes else None)
        if self.classes is not None and len(self.classes) != self.num_classes:
            raise ValueError(
                f"classes must be one name for each of the {self.num_classes:,} classes, "
                f"got {len(self.classes):,} names"
            )

    def _check_unit(self) -> None:
        major = _check_version(self.version)
        if major != VERSIONS[self.unit][0]:
            raise ValueError(
                f"version must be {VERSIONS[self.unit][0]}.x for labels of unit '{self.unit}', got {self.version}"
            )
        if self.unit == "example":
            default = (None, "all", "", "logits")
            if (self.sequence_length, self.positions, self.tokenizer, self.source) != default:
                raise ValueError(
                    "sequence_length, positions, tokenizer and source must be left out unless unit is 'token'"
                )
            return
        _check_int("num_classes", self.num_classes, 2, MAX_TOKENS)
        _check_int("sequence_length", self.sequence_length, 2, MAX_BLOCK)
        if self.positions != "all":
            _check_int("positions", self.positions, 1, self.sequence_length or 0)
        if self.kind == "dense":
            raise ValueError(
                "kind must be top_k or sampled for token labels: a block of dense ones takes L x C numbers"
            )
        for name in ("tokenizer", "source"):
            if not (isinstance(getattr(self, name), str) and getattr(self, name)):
                raise ValueError(f"{name} must be given for token labels, got {getattr(self, name)!r}")

    def _check_k(self) -> None:
        if self.kind == "dense":
            if self.k is not None:
                raise ValueError(f"k must be left out for dense labels, got {self.k!r}; kind 'top_k' keeps k classes")
        elif self.k is None:
            raise ValueError(f"k must be given for {self.kind} labels")
        elif self.kind == "top_k":
            _check_int("k", self.k, 1, self.num_classes)
        else:
            _check_int("k", self.k, 1, MAX_DRAWS)

    @property
    def width(self) -> int:
        """Number of log-probabilities stored in a row: C for dense labels, else k; P k for blocks of tokens."""
        return self.num_classes if self.k is None else self.k * self.labels_per_row

    @property
    def labels_per_row(self) -> int:
        """Number of labels of a row: 1 for examples, P for blocks of tokens."""
        if self.unit == "example":
            return 1
        return (self.sequence_length or 0) if self.positions == "all" else self.positions

    @property
    def answer_width(self) -> int:
        """Number of float32 that a teacher's answer to a row takes until it is stored.

        C logits, or of a block P k classes and as many log-probabilities, P tails and P log-probabilities of the tokens.
        """
        return self.num_classes if self.unit == "example" else 2 * (self.width + self.labels_per_row)

    @property
    def label_bytes(self) -> int:
        """Bytes that a row's log-probabilities and classes take in memory."""
        per_label = 0 if self.unit == "example" else 8
        return self.width * (4 if self.k is None else 8) + per_label * self.labels_per_row

    def class_name(self, index: int) -> str:
        """Return the name of a class, or its index as text where there are no names."""
        return str(index) if self.classes is None else self.classes[index]

    def to_json(self) -> str:
        """Return the specification as JSON text with sorted keys; `from_json` is its inverse."""
        return self._json

    @cached_property
    def _json(self) -> str:  # asked for at every batch, and long where classes have names
        data = {name: value for name, value in asdict(self).items() if self.unit == "token" or name not in _OF_TOKENS}
        return json.dumps({"format": FORMAT, **data}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str | bytes | Mapping[str, Any]) -> SoftLabelSpec:
        """Read a specification.

        Args:
          text: what `to_json` returned, as text, bytes or parsed. Fields that a newer minor version added are ignored.

        Returns:
          The specification, with the version of the data.

        Raises:
          ValueError: not a soft-label specification, or one of another major version.
        """
        data = _parsed(text)
        if data.get("format") != FORMAT:
            raise ValueError(f"format must be '{FORMAT}', got {data.get('format')!r}; this is not a soft-label dataset")
        _check_version(data.get("version"))
        known = {f.name for f in fields(cls)}
        if "num_classes" not in data:
            raise ValueError("num_classes must be given in a soft-label specification")
        return cls(**{name: value for name, value in data.items() if name in known})

    def meaning(self) -> str:
        """Hash everything that gives a stored number its meaning or decides which rows are stored with it.

        Returns:
          A hexadecimal hash; storage, the minor version and the names of the classes leave it unchanged.
        """
        parts: tuple[Any, ...] = (VERSIONS[self.unit][0], self.num_classes, self.kind, self.k, self.temperature.hex())
        parts += (self.teacher, self.carried)
        if self.unit == "token":
            parts += tuple(getattr(self, name) for name in _OF_TOKENS)
        return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()

    def differences(self, other: SoftLabelSpec) -> list[str]:
        """List the fields that keep two datasets from being read together.

        Args:
          other: another specification.

        Returns:
          Texts such as `num_classes (10 and 100)`; empty when the labels mean the same.
        """
        names = (*_OF_TOKENS, "num_classes", "kind", "k", "classes", "temperature", "teacher")
        pairs = [(name, getattr(self, name), getattr(other, name)) for name in names]
        return [f"{name} ({_brief(a)} and {_brief(b)})" for name, a, b in pairs if a != b]


def label_key(content_key: str, teacher_fingerprint: str, spec: SoftLabelSpec) -> str:
    """Compute the key under which a shard of labels is committed.

    Args:
      content_key: hash of what is labelled.
      teacher_fingerprint: hash of who labels it.
      spec: how the answers are stored.

    Returns:
      32 hexadecimal digits. Equal keys mean equal labels, so that a committed key is never asked again.
    """
    text = json.dumps([content_key, teacher_fingerprint, spec.meaning(), spec.storage])
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _parsed(text: str | bytes | Mapping[str, Any]) -> Mapping[str, Any]:
    if isinstance(text, Mapping):
        return text
    try:
        data = json.loads(text)
    except ValueError as e:
        raise ValueError(f"the soft-label specification is not valid JSON: {e}") from e
    if not isinstance(data, dict):
        raise ValueError(f"a soft-label specification must be a JSON object, got {type(data).__name__}")
    return data


def require_unit(spec: SoftLabelSpec, unit: Unit, where: object) -> None:
    """Refuse labels of the other unit.

    Args:
      spec: of the labels.
      unit: the one that the caller reads.
      where: the dataset, for the message.

    Raises:
      ValueError: the labels are of the other unit.
    """
    if spec.unit == unit:
        return
    if spec.unit == "token":
        raise ValueError(
            f"{where} holds labels of tokens (unit 'token', {spec.labels_per_row:,} labels in a row), where labels of examples "
            "are read; a student of kind causal_lm learns from them"
        )
    raise ValueError(
        f"{where} holds labels of examples (unit 'example', one label in a row), where labels of tokens are read; label a "
        "pool of blocks with a teacher of kind causal_lm"
    )


_OF_TOKENS = ("unit", "sequence_length", "positions", "tokenizer", "source")


def _check_version(version: object) -> int:
    major, _, minor = version.partition(".") if isinstance(version, str) else ("", "", "")
    if not (major.isdecimal() and minor.isdecimal()):
        raise ValueError(f"version must be 'major.minor', got {version!r}")
    known = [first for first, _ in VERSIONS.values()]
    if int(major) not in known:
        way_out = "install a newer distilbeam" if int(major) > max(known) else "write the dataset again"
        raise ValueError(
            f"soft labels of format version {version} cannot be read by this release, which reads "
            f"{' and '.join(f'{first}.x' for first in known)}; {way_out}"
        )
    return int(major)


def _check_int(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{name} must be a whole number from {low:,} to {high:,}, got {value!r}")


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def _strings(name: str, values: object) -> tuple[str, ...]:
    if isinstance(values, str) or not isinstance(values, (list, tuple)) or not all(isinstance(v, str) for v in values):
        raise ValueError(f"{name} must be a list of strings, got {values!r}")
    if len(set(values)) < len(values):
        twice = next(v for v in values if values.count(v) > 1)
        raise ValueError(f"{name} must be distinct, got '{twice}' twice")
    return tuple(values)


def _brief(value: object) -> str:
    text = "unset" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
