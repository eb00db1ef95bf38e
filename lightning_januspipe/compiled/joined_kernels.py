"""Joins the C++ kernels of one graph into the source of one library.

Inductor makes a library of each kernel, and the C++ compiler takes longer to begin than for the code of most kernels.
"""

from __future__ import annotations

from collections.abc import Sequence

NAME = "kernel"
"""What inductor calls the function in the source of each kernel."""

_CALL, _TABLE = f"static PyObject* {NAME}_py(", "static PyMethodDef"
_ROW = f'{{"{NAME}", {NAME}_py, METH_VARARGS, ""}},'


def joined(kernels: Sequence[str], bindings: Sequence[str]) -> str | None:
    """Returns the source of a Python module with all kernels, ``kernel_0`` and so on.

    Args:
        kernels: the sources of the kernels; each defines a C function ``kernel``.
        bindings: the source that would make a Python module of each kernel alone.

    Returns:
        The source; None where the bindings are not written as expected.
    """
    includes: dict[str, None] = {}
    functions: list[str] = []
    calls: list[str] = []
    for i, (kernel, binding) in enumerate(zip(kernels, bindings, strict=True)):
        lines = kernel.splitlines()
        includes.update(dict.fromkeys(line for line in lines if line.startswith("#include")))
        body = "\n".join(line for line in lines if not line.startswith("#include"))
        functions.append(f"#define {NAME} {NAME}_{i}\n{body}\n#undef {NAME}")
        if not all(binding.count(mark) == 1 for mark in (_CALL, _TABLE, _ROW)):
            return None
        call = _CALL + binding.partition(_CALL)[2].partition(_TABLE)[0]
        calls.append(call.replace(f"{NAME}_py(", f"{NAME}_{i}_py(").replace(f" {NAME}(", f" {NAME}_{i}("))
    numbered = (_ROW.replace(f'"{NAME}", {NAME}_py', f'"{NAME}_{i}", {NAME}_{i}_py') for i in range(len(calls)))
    rows = "\n    ".join(numbered)
    before, _, rest = bindings[0].partition(_CALL)
    after = (_TABLE + rest.partition(_TABLE)[2]).replace(_ROW, rows)
    return "\n".join([*includes, *functions, before, *calls, after])
