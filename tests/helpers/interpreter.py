"""Triton's interpreter without what it repeats at every call of a device function.

The interpreter replaces the members of `triton.language` with its own when a kernel starts, and
looks for more of them to replace whenever the kernel calls a function. Only the first function of
another module can need that, but the search takes a third of the time of kernels of small blocks.
"""

from functools import cache
from types import ModuleType
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


@cache
def languages(function: Any) -> list[ModuleType]:
    """The modules under whose names a function finds the language."""
    return [value for value in function.__globals__.values() if value is tl or value is tl.core]


def call(function: Any, *arguments: Any, **named: Any) -> Any:
    """Runs a device function, as `InterpretedFunction.__call__` does."""
    if any(tl.core.is_builtin(language.load) for language in languages(function.fn)):
        interpreter._patch_lang(function.fn)
    run = function.rewrite()
    try:
        return run(*arguments, **named)
    except Exception as error:
        raise interpreter.InterpreterError(repr(error)) from error


def install() -> None:
    """Changes the interpreter in this process."""
    interpreter.InterpretedFunction.__call__ = call
