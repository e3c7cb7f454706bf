"""Reading torch.export programs without running what somebody put into them.

`torch.export.load` trusts its file: sample inputs that are no plain data are unpickled, so are tensors and constants that
say so, compiled parts are loaded as shared libraries, and texts of the program (shapes, guards, names, operators, the
nesting of inputs) become Python that is evaluated or imported. Here the archive is looked into first, through torch's own
reader, so that what is checked is what is loaded: pickles must hold tensors and plain data alone, texts must be of the
form that torch writes, operators must be torch's. Whatever else there is, is refused unless the user trusts the file.
"""

from __future__ import annotations

import ast
import io
import json
import keyword
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

_NEXT_TO_TORCH = (
    "aten|prims?|higher_order|quantized|quantized_decomposed|onednn|mkldnn|rngprims|torchvision|torchaudio|torchao"
)
_OPERATOR = re.compile(
    rf"torch\.ops\.({_NEXT_TO_TORCH})\.(?!from_file\b)([A-Za-z_]\w*)(\.[A-Za-z]\w*)?"
    r"|torch\.(_?sym_\w+)"
    r"|math\.[a-z]\w*"
    r"|_operator\.(getitem|add|sub|mul|floordiv|truediv|mod|pow|neg|pos|abs|eq|ne|lt|le|gt|ge|and_|or_|not_|xor|invert|"
    r"lshift|rshift|index|iadd|isub|imul)"
)
_DUNDER = re.compile(r"__(?!(and|or|xor|lshift|rshift|iand|ior|ixor|ilshift|irshift)__)\w*__")
_NAME = re.compile(r"[A-Za-z_][\w.]*")
_PLAIN_TEXT = re.compile(r"[\w .,:;/+*<>=|#@%~-]*")
_SYMBOL = re.compile(r"[a-z]{1,8}\d*")
_IMPORTS = ("__enum__", "default_factory")  # words with which a nesting names Python objects to import
_MEMBERS = re.compile(
    r"data/(weights|constants)/[^/]+|data/sample_inputs/[^/]+\.pt|models/[^/]+\.json|extra/.*|archive_format|archive_version|"
    r"version|byteorder|\.data/.*|\.format_version|\.storage_alignment"
)
_DAMAGED = "it is damaged or cut off; copy or export it again"
_METHODS = frozenset({"size", "stride", "dim", "numel", "storage_offset"})
_KEYS = frozenset({"positive", "integer", "nonnegative", "negative", "real", "evaluate", "finite", "zero", "nonzero"})
_ALGEBRA_NAMES = """
    Symbol Dummy Integer Float Rational Add Mul Pow Mod Max Min Abs floor ceiling log exp sqrt Eq Ne Lt Le Gt
    Ge And Or Not Xor StrictLessThan LessThan GreaterThan StrictGreaterThan Equality Unequality Piecewise
    ExprCondPair Tuple true false BooleanTrue BooleanFalse oo Infinity NegativeInfinity One Zero Half
    NegativeOne int float bool math isnan inf L args precision
"""
_ALGEBRA = frozenset(_ALGEBRA_NAMES.split())


class UntrustedProgram(ValueError):  # noqa: N818  (what it is)
    """A program that could run code while it is read."""


def load_program(path: str | Path, setting: str, *, trust: bool = False) -> torch.export.ExportedProgram:
    """Read a torch.export program.

    Args:
      path: the .pt2 file.
      setting: the setting that named the file, for messages.
      trust: read whatever is there, as torch does.

    Returns:
      The program.

    Raises:
      UntrustedProgram: the file could run code, and is not trusted.
      ValueError: the file is no such program.
    """
    if not Path(path).is_file():
        raise ValueError(f"{setting}: {path} is not a torch.export program: there is no such file")
    try:
        if trust:
            return torch.export.load(path)
        with Path(path).open("rb") as file:
            _require_data(file)
            file.seek(0)
            return _load(file)
    except UntrustedProgram as e:
        raise UntrustedProgram(
            f"{setting}: {path} could run code of whoever made it: {e}; export it again from a source that you trust, or say "
            "trust = true beside it in your own [teacher] section"
        ) from e
    except Exception as e:
        damaged = isinstance(e, OSError) or "corrupted" in str(e)  # the words of torch's reader
        why = _DAMAGED if damaged else str(e)
        raise ValueError(
            f"{setting}: {path} is not a torch.export program: {(why.splitlines() or [type(e).__name__])[0]}"
        ) from e


def training_operator(program: torch.export.ExportedProgram) -> str | None:
    """Name an operator of a program that works in training mode, or None: dropout, or batch normalisation by the batch."""
    places: dict[str, tuple[int, ...]] = {
        "dropout": (2,),
        "native_dropout": (2,),
        "feature_dropout": (2,),
        "alpha_dropout": (2,),
    }
    places |= {
        "batch_norm": (5,),
        "native_batch_norm": (5,),
        "_native_batch_norm_legit": (3, 5),
        "cudnn_batch_norm": (5,),
    }
    for node in program.graph.nodes:
        name = str(node.target).removeprefix("aten.").split(".")[0].rstrip("_")
        if node.op == "call_function" and any(
            len(node.args) > place and node.args[place] is True for place in places.get(name, ())
        ):
            return str(node.target)
    return None


def _load(file: Any) -> torch.export.ExportedProgram:
    """Load by the reader of the present format alone: `torch.export.load` would try an older one, which nobody looked at."""
    from torch.export.pt2_archive._package import load_pt2

    program: torch.export.ExportedProgram = load_pt2(file).exported_programs["model"]
    return program


def _require_data(file: Any) -> None:
    try:
        reader = torch._C.PyTorchFileReader(file)
        names = reader.get_all_records()
    except RuntimeError as e:
        file.seek(0)
        raise ValueError(_DAMAGED if file.read(2) == b"PK" else "it is no archive of torch") from e
    if "archive_format" not in names:
        if any(name.startswith("serialized_") for name in names) or "version" not in names:
            raise UntrustedProgram("it is in the format of torch before 2.8, whose parts are unpickled")
        raise ValueError("it has no archive_format; it may be a TorchScript file or a state dict")
    if len({name.casefold() for name in names}) < len(names):
        raise UntrustedProgram("two of its parts have the same name")
    for name in names:
        if not _MEMBERS.fullmatch(name):
            raise UntrustedProgram(f"it holds {name[:80]}, which is no part of a program that is data alone")
        if name.startswith("models/"):
            _require_plain_program(json.loads(reader.get_record(name)))
        elif name.startswith("data/") and name.endswith(".json"):
            _require_raw_tensors(json.loads(reader.get_record(name)))
        elif name.startswith("data/") and name.endswith(".pt"):
            _require_tensors_alone(name, reader.get_record(name))


def _require_tensors_alone(name: str, data: bytes) -> None:
    if not data:
        return
    try:
        torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as e:
        raise UntrustedProgram(f"{name} holds a pickle of more than tensors and plain data") from e


def _require_raw_tensors(config: Any) -> None:
    for name, payload in config["config"].items():
        if payload.get("use_pickle") or str(payload.get("path_name", "")).startswith(("custom_obj", "opaque_obj")):
            raise UntrustedProgram(f"its weight or constant {name[:80]!r} is a pickle")


def _require_plain_program(program: Any) -> None:
    for key, text in _texts(program, ""):
        if any(word in text for word in _IMPORTS):
            raise UntrustedProgram(f"the nesting of its inputs or outputs names Python objects ({text[:80]!r})")
        if key == "metadata":
            continue
        if key == "target":
            good = _OPERATOR.fullmatch(text) is not None and _DUNDER.search(text) is None
        elif key == "expr_str" or key == "guards_code":
            good = _is_expression(text)
        elif key == "name":
            good = _NAME.fullmatch(text) is not None and not keyword.iskeyword(text)
        else:
            good = _PLAIN_TEXT.fullmatch(text) is not None and not _DUNDER.search(text)
        if not good:
            raise UntrustedProgram(
                f"it has a {key or 'text'} that torch does not write or is no operator of torch's: {text[:80]!r}"
            )


def _texts(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """List all texts of a program with the key that they stand under, those inside of JSON in a text too."""
    if isinstance(value, Mapping):
        for name, part in value.items():
            yield "key", name
            yield from _texts(part, "metadata" if key == "metadata" else name)
    elif isinstance(value, list):
        for part in value:
            yield from _texts(part, key)
    elif isinstance(value, str):
        if key != "metadata" and value[:1] in ("[", "{", '"'):
            yield from _texts(json.loads(value), "nesting")
        else:
            yield key, value


def _is_expression(text: str) -> bool:
    """Tell whether a text is arithmetic on sizes, as torch writes shapes and guards."""
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return all(map(_is_arithmetic, ast.walk(tree)))


def _is_arithmetic(node: ast.AST) -> bool:
    match node:
        case ast.Constant(value=str(value)):
            return _NAME.fullmatch(value) is not None and "__" not in value
        case ast.Constant(value=value):
            return value is None or isinstance(value, bool | int | float)
        case ast.Name(id=name):
            return name in _algebra() or (_SYMBOL.fullmatch(name) is not None and name not in _builtin_names())
        case ast.Attribute(value=value, attr=name):
            return name in _METHODS or (isinstance(value, ast.Name) and value.id == "math" and not name.startswith("_"))
        case ast.Call(func=ast.Name(id=name)):
            return name in _algebra() and name not in ("L", "args", "math")
        case ast.Call(func=ast.Attribute()):
            return True  # the attribute is looked at by itself
        case ast.Call():
            return False
        case ast.keyword(arg=name):
            return name in _KEYS or name == "precision"
    allowed = (
        ast.Expression | ast.BoolOp | ast.Compare | ast.BinOp | ast.UnaryOp | ast.Subscript | ast.Tuple | ast.List
        | ast.expr_context | ast.boolop | ast.cmpop | ast.operator | ast.unaryop | ast.IfExp
    )  # fmt: skip
    return isinstance(node, allowed)


@lru_cache(maxsize=1)
def _algebra() -> frozenset[str]:
    """Names of the functions of sizes: sympy's that torch uses, and torch's own."""
    from torch.utils._sympy import functions

    own = (name for name, value in vars(functions).items() if isinstance(value, type) and name[:1].isupper())
    return _ALGEBRA | frozenset(own)


@lru_cache(maxsize=1)
def _builtin_names() -> frozenset[str]:
    import builtins

    import sympy

    return frozenset(dir(builtins)) | frozenset(name for name in vars(sympy) if not name[:1].isupper())
