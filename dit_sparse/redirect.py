"""The source rewrite that redirects a processor's core attention call.

A model's processor projects, normalises and rotates, then makes one softmax-attention call:
``dispatch_attention_fn(q, k, v, ...)`` or ``F.scaled_dot_product_attention(q, k, v, ...)``.
:func:`redirected` builds a subclass of the processor's class whose ``__call__`` is the same source with that
call turned into ``self._core(attn, kind, <the original callable>, q, k, v, ...)``. Signature, globals,
defaults and line numbers stay those of the model's file, so nothing of a model is copied and its updates are
inherited.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
import types
from collections.abc import Callable
from functools import cache
from typing import Any

DISPATCH = "dispatch"
"""``dispatch_attention_fn``: q, k, v are [B, S, H, D]."""
SDPA = "sdpa"
"""``scaled_dot_product_attention``: q, k, v are [B, H, S, D]."""

_CALLEES = {"dispatch_attention_fn": DISPATCH, "scaled_dot_product_attention": SDPA}


class _Redirect(ast.NodeTransformer):
    def __init__(self, self_name: str, attn_name: str) -> None:
        self.names = self_name, attn_name
        self.hits = 0

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        callee = node.func
        name = (
            callee.id
            if isinstance(callee, ast.Name)
            else callee.attr
            if isinstance(callee, ast.Attribute)
            else ""
        )
        if name not in _CALLEES or _is_causal(node):
            return node
        self.hits += 1
        self_name, attn_name = self.names
        core = ast.Attribute(ast.Name(self_name, ast.Load()), "_core", ast.Load())
        ast.copy_location(core, callee)
        args = [ast.Name(attn_name, ast.Load()), ast.Constant(_CALLEES[name]), callee, *node.args]
        return ast.copy_location(ast.Call(core, args, node.keywords), node)


def _is_causal(node: ast.Call) -> bool:
    """Whether a call is causal by its source: then it is text's, which no grid is among."""
    given = [keyword.value for keyword in node.keywords if keyword.arg == "is_causal"]
    return any(isinstance(value, ast.Constant) and value.value is True for value in given)


@cache
def redirected(cls: type, mixin: type, edit: Callable[[ast.FunctionDef], None] | None = None) -> type | None:
    """A subclass of ``cls`` whose core attention call goes to ``mixin._core``.

    Args:
        edit: A further change to the parsed ``__call__``, in place; what it adds takes the place of
            something, so that line numbers stay.

    Returns:
        The class, the same for every layer (so a compiled graph is shared), or None when ``cls.__call__``
        makes no core attention call.

    Raises:
        ValueError: The source of ``cls.__call__`` cannot be read or closes over variables.
    """
    function: Any = cls.__call__
    code = function.__code__
    try:
        # Of the code object: getsource(function) would follow __wrapped__ past somebody else's patch.
        source = textwrap.dedent(inspect.getsource(code))
    except (OSError, TypeError) as error:
        raise ValueError(
            f"the source of {cls.__name__}.__call__ is needed to redirect it: {error}"
        ) from error
    (definition,) = ast.parse(source).body
    if not isinstance(definition, ast.FunctionDef) or code.co_freevars:
        raise ValueError(f"{cls.__name__}.__call__ is not a plain method; its attention cannot be redirected")
    args = definition.args
    names = [a.arg for a in (*args.posonlyargs, *args.args)]
    if len(names) < 2:
        return None
    rewrite = _Redirect(*names[:2])
    definition = rewrite.visit(definition)
    if not rewrite.hits:
        return None
    if edit is not None:
        edit(definition)
    _strip(definition)
    tree = ast.fix_missing_locations(ast.Module([definition], []))
    ast.increment_lineno(tree, code.co_firstlineno - 1)
    module = compile(tree, code.co_filename, "exec")
    new_code = next(c for c in module.co_consts if isinstance(c, types.CodeType))
    call = types.FunctionType(new_code, function.__globals__, function.__name__, function.__defaults__)
    call.__kwdefaults__ = function.__kwdefaults__
    call.__annotations__ = dict(function.__annotations__)
    call.__qualname__, call.__module__ = function.__qualname__, function.__module__
    return type(f"Sparse{cls.__name__}", (mixin, cls), {"__call__": call, "__module__": cls.__module__})


def _strip(definition: ast.FunctionDef) -> None:
    """Drop what would be evaluated at definition time; the original's own values are attached instead."""
    definition.decorator_list = []
    definition.returns = None
    args = definition.args
    args.defaults = [ast.Constant(None) for _ in args.defaults]
    args.kw_defaults = [None if d is None else ast.Constant(None) for d in args.kw_defaults]
    for arg in ast.walk(args):
        if isinstance(arg, ast.arg):
            arg.annotation = None
