"""YAML files and `a.b=c` overrides -> pydantic models. A wrong key or value is one clear line: file:line, key, remedy.

Each module declares the model of what it configures, as a subclass of `Config`; defaults < file < command line.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

KeyPath = tuple[str | int, ...]


class UserError(Exception):
    """A mistake of the user's. The command line prints it as one line (what, where, how to mend it) and exits 2."""


class Config(BaseModel):
    """Base of every configuration: unknown keys are errors, values don't change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


ConfigT = TypeVar("ConfigT", bound=Config)


class _Loader(yaml.SafeLoader):
    """SafeLoader for which `1e-5` is a number (YAML 1.1 asks for `1.0e-5`) and a repeated key is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"key '{key.value}' is given twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _line_numbers(node: yaml.Node | None, at: KeyPath = ()) -> dict[KeyPath, int]:
    """Line (from 1) of every key and list item of a YAML document."""
    lines: dict[KeyPath, int] = {}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here: KeyPath = (*at, key.value)
            lines[here] = key.start_mark.line + 1
            lines |= _line_numbers(value, here)
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            here = (*at, i)
            lines[here] = value.start_mark.line + 1
            lines |= _line_numbers(value, here)
    return lines


def _parse(text: str, where: str) -> tuple[Any, dict[KeyPath, int]]:
    try:
        return yaml.load(text, _Loader), _line_numbers(yaml.compose(text, _Loader))  # _Loader is a SafeLoader
    except yaml.MarkedYAMLError as e:
        line = f":{e.problem_mark.line + 1}" if e.problem_mark else ""
        raise UserError(f"{where}{line}: not valid YAML: {e.problem or e.context}") from None
    except yaml.YAMLError as e:
        raise UserError(f"{where}: not valid YAML: {' '.join(str(e).split())}") from None


def read_text(path: Path) -> str:
    """A small text file of the user's (UTF-8, with or without a byte-order mark)."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder, a file is wanted") from None
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: not UTF-8 at byte {e.start}: save it as UTF-8") from None


def _override(tree: dict[str, Any], text: str) -> KeyPath:
    """Sets `a.b=c` (c read as YAML, numbers index lists) in `tree`; returns the key's path."""
    key, sep, value = text.partition("=")
    if not sep or not key:
        raise UserError(f"'{text}': an override is written key=value, for example learning_rate=1e-5")
    path: list[str | int] = []
    node: Any = tree
    parts = key.strip().split(".")
    for i, part in enumerate(parts):
        last = i == len(parts) - 1
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                raise UserError(f"'{text}': {'.'.join(parts[:i])} is a list of {len(node)}; '{part}' is not in it")
            step: str | int = int(part)
        elif isinstance(node, dict):
            step = part
            if not last and not isinstance(node.get(part), (dict, list)):
                node[part] = {}
        else:
            raise UserError(f"'{text}': {'.'.join(parts[:i])} has no keys")
        path.append(step)
        if last:
            node[step] = _parse(value, f"'{text}'")[0]
        else:
            node = node[step]
    return tuple(path)


def _fields_at(model: Any, path: KeyPath) -> list[str]:
    """Names of the keys allowed at `path` (for "did you mean"), by way of the model's JSON schema."""
    schema = model.model_json_schema()
    nodes = [schema]
    for part in path:
        below = []
        for node in _variants(nodes, schema):
            child = node.get("items") if isinstance(part, int) else node.get("properties", {}).get(part)
            if child:
                below.append(child)
        nodes = below
    return sorted({name for node in _variants(nodes, schema) for name in node.get("properties", {})})


def _variants(nodes: list[dict[str, Any]], schema: dict[str, Any]) -> list[dict[str, Any]]:
    out = []
    for node in nodes:
        if "$ref" in node:
            node = schema["$defs"][node["$ref"].rsplit("/", 1)[1]]
        out += _variants(node["anyOf"], schema) if "anyOf" in node else [node]
    return out


def _explain(error: ValidationError, model: type[Config], lines: dict[KeyPath, int], where: str) -> str:
    """The first problem of a failed validation, as one line."""
    problems = error.errors()
    first = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    # pydantic puts the names of union members into `loc`; keep what the file really has (or lacks).
    known = [part for part in first["loc"] if isinstance(part, int) or not re.search(r"[\[\](]", part)]
    path = tuple(known)
    while path and path not in lines and len(path) > 1 and path[:-1] not in lines:
        path = path[:-1]
    line = next((lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in lines), None)
    at = f"{where}:{line}" if line else where
    key = ".".join(str(p) for p in path) or "the file"
    if first["type"] == "extra_forbidden":
        names = _fields_at(model, path[:-1])
        near = difflib.get_close_matches(str(path[-1]), names, n=1, cutoff=0.5)
        return f"{at}: {key}: unknown key; " + (
            f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(names)}"
        )
    if first["type"] == "missing":
        return f"{at}: {key}: this key is needed"
    message = first["msg"].removeprefix("Value error, ")
    given = f" (got {first['input']!r})" if path and not isinstance(first["input"], dict) else ""
    return f"{at}: {key}: {message}{given}"


def load(model: type[ConfigT], path: str | Path, overrides: Sequence[str] = ()) -> ConfigT:
    """Reads `path` as a `model`, with `a.b=c` overrides put over it.

    Raises UserError: no such file, not YAML, unknown key (with the nearest known one), wrong value.
    """
    path = Path(path)
    data, lines = _parse(read_text(path), str(path))
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise UserError(f"{path}: a configuration is a mapping of keys to values")
    for text in overrides:
        key = _override(data, text)
        lines.pop(key, None)  # the value no longer comes from that line
    try:
        return model.model_validate(data)
    except ValidationError as e:
        raise UserError(_explain(e, model, lines, str(path))) from None
