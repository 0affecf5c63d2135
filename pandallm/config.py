"""YAML files and `a.b=c` overrides -> pydantic models. A wrong key or value is one clear line: file:line, key, remedy.

Each module declares the model of what it configures, as a subclass of `Config`; defaults < file < command line.
"""

from __future__ import annotations

import difflib
import json
import re
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

KeyPath = tuple[str | int, ...]


class UserError(Exception):
    """A mistake of the user's. The command line prints it as one line (what, where, how to mend it) and exits 2."""


class Config(BaseModel):
    """Base of every configuration: unknown keys are errors, inf and nan no numbers, values don't change."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


ConfigT = TypeVar("ConfigT", bound=Config)


class _Loader(yaml.SafeLoader):
    """SafeLoader for which `1e-5` is a number (YAML 1.1 asks for `1.0e-5`) and a repeated key is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key is a word", problem_mark=key.start_mark)
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"key '{key.value}' is given twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


Places = dict[KeyPath, str]  # where each key and list item was written: file:line, or the override's text


def _places(node: yaml.Node | None, where: str, at: KeyPath = ()) -> Places:
    """Place of every key and list item of a YAML document."""
    places: Places = {}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here: KeyPath = (*at, key.value)
            places[here] = f"{where}:{key.start_mark.line + 1}"
            places |= _places(value, where, here)
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            here = (*at, i)
            places[here] = f"{where}:{value.start_mark.line + 1}"
            places |= _places(value, where, here)
    return places


def _parse(text: str, where: str) -> tuple[Any, Places]:
    try:
        return yaml.load(text, _Loader), _places(yaml.compose(text, _Loader), where)  # _Loader is a SafeLoader
    except yaml.MarkedYAMLError as e:
        line = f":{e.problem_mark.line + 1}" if e.problem_mark else ""
        raise UserError(f"{where}{line}: not valid YAML: {e.problem or e.context}") from None
    except (yaml.YAMLError, ValueError) as e:  # ValueError: 2026-13-45, which looks like a date
        raise UserError(f"{where}: not valid YAML: {' '.join(str(e).split())}") from None
    except RecursionError:
        raise UserError(f"{where}: not valid YAML: nested too deeply, or inside itself") from None


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
    except OSError as e:
        raise UserError(f"{path}: can't be read: {e.strerror}") from None


def parse_json(text: str, path: Path, line: int | None = None) -> Any:
    """The value of a JSON text of the user's, which stands in `path` (in this `line` of it, else it is the whole)."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as e:
        raise UserError(f"{path}:{line or e.lineno}: not valid JSON: {e.msg}") from None
    except RecursionError:
        raise UserError(f"{path}:{line or 1}: not valid JSON: nested too deep") from None
    except ValueError:  # Python's guard against numbers that take minutes to read
        raise UserError(f"{path}:{line or 1}: not valid JSON: a number of thousands of digits") from None


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
            if not part.isdecimal() or int(part) >= len(node):
                raise UserError(f"'{text}': {'.'.join(parts[:i])} is a list of {len(node)}; '{part}' is not in it")
            step: str | int = int(part)
        elif isinstance(node, dict):
            step = part
            if not last and node.get(part) is None:
                node[part] = {}
        else:
            raise UserError(f"'{text}': {'.'.join(parts[:i])} is {node!r} and has no keys")
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


def _real_path(loc: tuple[str | int, ...], data: Any) -> KeyPath:
    """The path in `data` of a problem's `loc`, into which pydantic puts the names of union members too."""
    path: KeyPath = ()
    for part in loc:
        within = isinstance(data, list) and isinstance(part, int) and part < len(data)
        if within or (isinstance(data, dict) and part in data):
            data = data[part]
            path += (part,)
    return path


def _explain(error: ValidationError, model: type[Config], data: Any, places: Places, where: str) -> str:
    """One problem of a failed validation, as one line: an unknown key, or the most precise one."""
    problems = sorted(error.errors(), key=lambda p: -len(_real_path(p["loc"], data)))
    first = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    path = _real_path(first["loc"], data)
    if first["type"] == "missing":
        path += (first["loc"][-1],)
    at = next((places[path[:n]] for n in range(len(path), 0, -1) if path[:n] in places), where)
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
    given = f" (got {reprlib.repr(first['input'])})" if path and not isinstance(first["input"], dict) else ""
    return f"{at}: {key}: {message}{given}"


def load(model: type[ConfigT], path: str | Path, overrides: Sequence[str] = ()) -> ConfigT:
    """Reads `path` as a `model`, with `a.b=c` overrides put over it.

    Raises UserError: no such file, not YAML, unknown key (with the nearest known one), wrong value.
    """
    path = Path(path)
    data, places = _parse(read_text(path), str(path))
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise UserError(f"{path}: a configuration is a mapping of keys to values")
    for text in overrides:
        key = _override(data, text)
        places = {at: place for at, place in places.items() if at[: len(key)] != key}
        places[key] = f"'{text}'"
    try:
        return model.model_validate(data)
    except ValidationError as e:
        raise UserError(_explain(e, model, data, places, str(path))) from None
