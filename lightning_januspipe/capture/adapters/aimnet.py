"""Helps AIMNet2 through capture: packed batches tell by addresses which matrices of neighbours are the same.

Tensors have no addresses while they are traced. Packed batches end with an atom of padding, which is masked by its
place: on graph ranks it is masked by its number, as the last row of one rank is another atom. There padded batches,
(B, N, ...), are packed before the traced call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_januspipe.capture.adapters import aimnet_padded
from lightning_januspipe.capture.adapters.capture_adapter import Adapter
from lightning_januspipe.capture.patches import patched_package


class AIMNetAdapter(Adapter):
    """Adapts all models that prepare their batches with ``aimnet.nbops.calc_masks``."""

    def arguments(
        self, potential: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns the arguments with a packed batch in the place of a padded one, on graph ranks."""
        return ((aimnet_padded.packed(args[0]),), kwargs) if self._packs(args) else (args, kwargs)

    def joined(self, potential: nn.Module, returned: Any) -> Any:
        """Returns the entries of a packed batch, on graph ranks."""
        is_packed = isinstance(returned, dict) and aimnet_padded.PADDING in returned
        return aimnet_padded.joined(returned) if is_packed or self._packs((returned,)) else returned

    def separated(self, potential: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], returned: Any) -> Any:
        """Returns the entries of a padded batch, if the call had one."""
        return aimnet_padded.separated(args[0], returned) if self._packs(args) else returned

    def _packs(self, args: tuple[Any, ...]) -> bool:
        return self.graph_size > 1 and len(args) == 1 and aimnet_padded.is_padded(args[0])

    def tracing(self, potential: nn.Module) -> AbstractContextManager[None]:
        """Returns a context in which masks are made without addresses, and on graph ranks without places of rows."""
        nbops = import_module("aimnet.nbops")
        make_masks, find_suffix = nbops.calc_masks, nbops.resolve_suffix

        def calc_masks(data: dict[str, Tensor]) -> dict[str, Tensor]:
            with _Identities():
                made: dict[str, Tensor] = make_masks(data)
            return aimnet_padded.with_masks(made) if aimnet_padded.PADDING in made else made

        def resolve_suffix(data: dict[str, Tensor], suffixes: list[str]) -> str:
            return "" if aimnet_padded.PADDING in data else find_suffix(data, suffixes)

        functions: dict[str, Callable[..., Any]] = {"calc_masks": calc_masks, "resolve_suffix": resolve_suffix}
        if self.graph_size > 1:
            functions["mask_i_"] = partial(_masked, nbops.get_nb_mode, nbops.mask_i_)
        return _replaced(nbops, functions)


@contextmanager
def _replaced(module: ModuleType, functions: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    with ExitStack() as stack:
        for name, function in functions.items():
            stack.enter_context(patched_package(module, name, function, "aimnet 0.2"))
        yield


def _masked(
    mode: Callable[[dict[str, Tensor]], int],
    mask: Callable[..., Tensor],
    x: Tensor,
    data: dict[str, Tensor],
    mask_value: float = 0.0,
    inplace: bool = True,
) -> Tensor:
    """Returns (N, ...) values of atoms with those of the padding masked, as ``aimnet.nbops.mask_i_`` does.

    Args:
        mode: tells how a batch is padded; 1 where it is packed.
        mask: the function of the package, for batches that are not packed.
        x: the values.
        data: the batch.
        mask_value: the value of the padding.
        inplace: whether the values may be changed.
    """
    if mode(data) != 1:
        return mask(x, data, mask_value, inplace)
    is_padding = data["mask_i"].view(-1, *[1] * (x.dim() - 1))
    return x.masked_fill_(is_padding, mask_value) if inplace else x.masked_fill(is_padding, 0.0)


class _Identities(TorchFunctionMode):
    """Answers with the identity of a tensor where its address is asked for."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return id(args[0]) if func is Tensor.data_ptr else func(*args, **(kwargs or {}))
