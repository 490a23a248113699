"""A module's parameters and buffers by name."""

from __future__ import annotations

from torch import Tensor, nn


def register(module: nn.Module, name: str, tensor: Tensor, *, saved: bool = True) -> None:
    """Make a tensor a parameter or buffer of a module by its qualified name; the children in between are made."""
    *path, own = name.split(".")
    for child in path:
        if child not in module._modules:
            module.add_module(child, nn.Module())
        module = module.get_submodule(child)
    if isinstance(tensor, nn.Parameter):
        module.register_parameter(own, tensor)
    else:
        module.register_buffer(own, tensor, persistent=saved)


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """A module's parameters and buffers by name.

    What two children share is there twice; a child that has two names itself is taken by the first.
    """
    children = list(module.named_modules())
    return {
        f"{path}.{own}" if path else own: tensor
        for kind in ("_parameters", "_buffers")
        for path, child in children
        for own, tensor in getattr(child, kind).items()
        if tensor is not None
    }
