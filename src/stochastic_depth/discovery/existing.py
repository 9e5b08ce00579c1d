"""Whether the model already drops branches on its own, by the names that libraries give that.

timm and transformers call the module DropPath (`drop_prob`), torchvision StochasticDepth (`p`);
transformers' LayerDrop is an attribute `layerdrop` of a module or of the configuration.
"""

from __future__ import annotations

from torch import nn

from stochastic_depth.errors import ActiveDropPathError

_MODULES = ("DropPath", "StochasticDepth", "DropConnect")
_RATES = ("drop_prob", "p", "drop_rate")
_LAYER_DROP = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")


def refuse_active_drop_path(model: nn.Module) -> None:
    """Raises where the model's own drop path or layerdrop is active, naming what to set to 0."""
    for name, module in model.named_modules():
        kind = type(module).__name__
        if kind.endswith(_MODULES):
            for attribute in _RATES:
                _refuse(
                    f"{name}.{attribute}", kind, getattr(module, attribute, 0.0), "apply_drop_path"
                )
        for attribute in _LAYER_DROP:
            path = f"{name}.{attribute}" if name else attribute
            _refuse(path, kind, getattr(module, attribute, 0.0), "apply_layer_drop")
    for attribute in _LAYER_DROP:
        rate = getattr(getattr(model, "config", None), attribute, 0.0)
        _refuse(f"config.{attribute}", type(model).__name__, rate, "apply_layer_drop")


def _refuse(path: str, kind: str, rate: object, preset: str) -> None:
    if not isinstance(rate, int | float) or isinstance(rate, bool) or rate <= 0:
        return
    raise ActiveDropPathError(
        f"{path} is {rate}: the model drops branches of its own accord ({kind})",
        expected="a model whose own drop path and layerdrop are 0",
        instead=f"build the model without it (drop_path_rate=0, stochastic_depth_prob=0, "
        f"layerdrop=0) or set {path} = 0; to take its rates over instead, sd.{preset}(model, "
        '"model") is to come',
    )
