"""The source of somebody else's function, and whether it is what runs: compiled again, it must give the same code."""

from __future__ import annotations

import ast
import functools
import inspect
from types import CodeType, FunctionType


class Refused(Exception):
    """The function holds something that is not read."""


def parse(function: FunctionType) -> tuple[ast.FunctionDef, str]:
    """The definition, and the name of the one argument beside self ("*x" where it takes all there are)."""
    code = function.__code__
    lines, _ = inspect.findsource(code)
    definition, compiled = _definitions("".join(lines)).get((code.co_name, code.co_firstlineno), (None, None))
    if definition is None or code.co_freevars or not _same_code(compiled, code):
        raise Refused
    starred = bool(code.co_flags & inspect.CO_VARARGS)
    other = code.co_kwonlyargcount or code.co_flags & inspect.CO_VARKEYWORDS or function.__defaults__
    if other or code.co_argcount + starred != 2 or code.co_argcount == 0:
        raise Refused
    return definition, "*" * starred + code.co_varnames[1]


@functools.lru_cache(maxsize=16)
def _definitions(source: str) -> dict[tuple[str, int], tuple[ast.FunctionDef, CodeType]]:
    """The functions of a file by name and line. The whole of it: what it imports changes what is compiled."""
    tree, codes = ast.parse(source), [compile(source, "<forward>", "exec", dont_inherit=True)]
    for code in codes:  # grows
        codes += [part for part in code.co_consts if isinstance(part, CodeType)]
    by_line = {(code.co_name, code.co_firstlineno): code for code in codes}
    functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
    return {key: (f, by_line[key]) for f in functions if (key := (f.name, f.lineno)) in by_line}


def _same_code(a: CodeType, b: CodeType) -> bool:
    parts = ("co_code", "co_names", "co_varnames", "co_freevars", "co_cellvars", "co_argcount", "co_kwonlyargcount")
    if any(getattr(a, part) != getattr(b, part) for part in parts) or len(a.co_consts) != len(b.co_consts):
        return False
    return all(
        _same_code(x, y) if isinstance(x, CodeType) and isinstance(y, CodeType) else type(x) is type(y) and x == y
        for x, y in zip(a.co_consts, b.co_consts, strict=True)
    )
