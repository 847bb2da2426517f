"""State that belongs to classes, and state that keeps its precision whatever a user does to the model around it."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ._distributed import DistributedModule

Self = TypeVar("Self", bound="PerClassState")


@contextmanager
def in_eval_mode(module: nn.Module) -> Iterator[None]:
    """A module and all that is in it in eval mode, and afterwards what was training again, whichever thread leaves last."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


class PerClassState(DistributedModule):
    """A module of which parameters and buffers belong to classes: the state of another number of classes is refused by name.

    ``_class_axes`` says which they are, by name, and which of their dimensions are the classes.
    """

    _class_axes: ClassVar[Mapping[str, tuple[int, ...]]] = {}

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        for name, axes in self._class_axes.items():
            own, found = getattr(self, name, None), state_dict.get(prefix + name)
            if not isinstance(own, Tensor) or not isinstance(found, Tensor) or own.ndim != found.ndim:
                continue
            wanted, got = own.shape[axes[0]], found.shape[axes[0]]
            if wanted != got:
                fix = f"build it for {got} classes"
                if hasattr(self, "with_classes"):
                    fix += ", load this state, and take the classes that stay by with_classes"
                errors: list[str] = args[-1]
                errors.append(f"{type(self).__name__}: {prefix}{name} must be of {wanted} classes, got a state of {got}; {fix}")
                return
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _keep_classes(self: Self, keep: Sequence[int | None]) -> Self:
        """A copy for another set of classes: everything of those that stay, zeros for the new ones."""
        owner, classes = type(self).__name__, int(self.num_classes)  # type: ignore[arg-type]
        places = [classes if place is None else operator.index(place) for place in keep]
        if not places or any(place is not None and not 0 <= place < classes for place in keep):
            raise ValueError(
                f"{owner}: keep must be one place from 0 to num_classes - 1 = {classes - 1}, or None for a new class, for each "
                f"class of the new set, got {list(keep)}"
            )
        with torch.inference_mode(False), torch.no_grad():  # or the copy could not be trained, nor take a state
            made = copy.deepcopy(self)
            for module in made.modules():
                if isinstance(module, PerClassState):
                    module._take_classes(places)
        return made

    def _take_classes(self, places: Sequence[int]) -> None:
        """Take the classes at these places, in place; the number of classes stands for a new one, which starts from zeros."""
        for name, axes in self._class_axes.items():
            value = self._buffers.get(name)
            if value is None:
                continue
            for axis in axes:
                padded = torch.cat([value, torch.zeros_like(value.narrow(axis, 0, 1))], dim=axis)
                value = padded.index_select(axis, torch.tensor(places, device=value.device))
            self._buffers[name] = value
        if "num_classes" in vars(self):
            vars(self)["num_classes"] = len(places)


class FullPrecisionState(PerClassState):
    """A module whose float buffers are float32 whatever the default dtype is, and stay so under ``.half()`` and ``.to(dtype)``.

    So are tensors that are assigned to them. They follow ``.to(device)``. One step of a running mean at momentum 0.99 or above is
    lost in half precision.
    """

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        if tensor is not None and tensor.is_floating_point():
            tensor = tensor.float()
        super().register_buffer(name, tensor, persistent)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in before.items():
            moved = getattr(self, name)
            if moved.dtype != buffer.dtype:
                setattr(self, name, buffer.to(moved.device))
        return self
