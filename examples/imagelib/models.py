"""Networks by name: resnet20 to resnet110 (CIFAR), torchvision:NAME, timm:NAME."""

import difflib

import torch
from torch import Tensor, nn

from imagelib import InputError
from imagelib.cifar_resnet import CifarResNet

CIFAR_DEPTHS = {f"resnet{depth}": depth for depth in (20, 32, 44, 56, 110)}


def build_model(name: str, num_classes: int, example: Tensor) -> nn.Module:
    """A network with new weights (torch's global generator draws them) that takes `example`."""
    source, _, plain_name = name.rpartition(":")
    if source == "torchvision":
        model = _torchvision(plain_name, num_classes)
    elif source == "timm":
        model = _timm(plain_name, num_classes)
    elif not source and name in CIFAR_DEPTHS:
        model = CifarResNet(CIFAR_DEPTHS[name], num_classes)
    else:
        raise _unknown(name, [*CIFAR_DEPTHS, *(f"torchvision:{n}" for n in _torchvision_names())])
    _check(name, model, num_classes, example)
    return model


def _torchvision_names() -> list[str]:
    import torchvision

    names: list[str] = torchvision.models.list_models(module=torchvision.models)
    return names


def _torchvision(name: str, num_classes: int) -> nn.Module:
    import torchvision

    if name not in _torchvision_names():
        raise _unknown(f"torchvision:{name}", [f"torchvision:{n}" for n in _torchvision_names()])
    model: nn.Module = torchvision.models.get_model(name, weights=None, num_classes=num_classes)
    for module in model.modules():  # what is to be dropped is said on the command line, and once
        if isinstance(module, torchvision.ops.StochasticDepth):
            module.p = 0.0
    return model


def _timm(name: str, num_classes: int) -> nn.Module:
    import timm
    from timm.layers.drop import DropPath

    if not timm.is_model(name):
        raise _unknown(f"timm:{name}", [f"timm:{n}" for n in timm.list_models()])
    model: nn.Module = timm.create_model(name, num_classes=num_classes)
    for module in model.modules():
        if isinstance(module, DropPath):
            module.drop_prob = 0.0
    return model


def _unknown(name: str, known: list[str]) -> InputError:
    by_plain_name = {full.rpartition(":")[2]: full for full in known}
    near = difflib.get_close_matches(name.rpartition(":")[2], by_plain_name, n=3)
    names = [by_plain_name[plain_name] for plain_name in near] or known[:5]
    return InputError(f"--model: there is no {name!r}; the nearest names are {', '.join(names)}")


def _check(name: str, model: nn.Module, num_classes: int, example: Tensor) -> None:
    size = example.shape[-1]
    try:
        with torch.no_grad():
            logits = model.eval()(example)
    except (RuntimeError, ValueError, AssertionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"--model: {name} cannot take images of {size} x {size} pixels ({reason}); "
            "another --image-size may do"
        ) from error
    finally:
        model.train()
    if not isinstance(logits, Tensor) or logits.shape != (len(example), num_classes):
        raise InputError(f"--model: {name} does not return one score for each class")
