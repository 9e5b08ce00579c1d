"""What stochastic depth would do to a model, on the command line: nothing is trained.

    python -m stochastic_depth timm:vit_tiny_patch16_224 --drop-rate 0.2
    python -m stochastic_depth torchvision:resnet50 --drop-rate 0.5 --timed
    python -m stochastic_depth transformers:bert --drop-distribution uniform --json
    python -m stochastic_depth package.module:function --input 2,3,32,32

The table of blocks with how each would be skipped, what is refused and why, and what it saves.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import inspect
import json
import logging
import os
import sys
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from stochastic_depth import errors
from stochastic_depth.discovery.own_drops import switched_off
from stochastic_depth.discovery.undisturbed import is_unmaterialised
from stochastic_depth.estimating import Saving, estimate_saving

_IMAGES = 2, 3, 224, 224  # of torchvision's models
_LONG = 1000  # characters of an error: some libraries list all that they know


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        what = "what --help lists"
        raise errors.OptionError(message, expected=what, instead="correct that option")


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; 2 where something cannot be used, in one line."""
    logging.getLogger("torch._subclasses").setLevel(logging.CRITICAL)  # it prints tracebacks
    try:
        options = _parser().parse_args(arguments)
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))  # what the model prints
            found = stack.enter_context(warnings.catch_warnings(record=True))
            model, example = _loaded(options.model, options.input, options.timed)
            saving, refused = _estimate(model, example, options)
        for one in found:  # only now: an error is one line, without warnings above it
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
    except errors.StochasticDepthError as error:
        print(textwrap.shorten(f"stochastic_depth: {error}", _LONG), file=sys.stderr)
        return 2
    lines = [str(saving), *(f"Refused: {name}: {why}" for name, why in refused.items())]
    if options.json:
        lines = [json.dumps({**dataclasses.asdict(saving), "refused": refused}, indent=2)]
    return _show("\n".join(lines))


def _show(text: str) -> int:
    """Print it; to whoever closes the output before the end, as much as it wants."""
    try:
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except OSError as error:
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115  (Python flushes it at its end)
        if not isinstance(error, BrokenPipeError):
            print(f"stochastic_depth: cannot write: {error}", file=sys.stderr)
            return 2
    return 0


def _parser() -> _Parser:
    parser = _Parser(prog="python -m stochastic_depth", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    text = "timm:NAME, torchvision:NAME, transformers:TYPE, or package.module:function"
    add("model", help=f"{text}, which returns a model, or one and its example inputs")
    add("--drop-rate", type=float, default=0.2, metavar="P", help="in [0, 1) (default: 0.2)")
    add("--drop-distribution", choices=("linear", "linear_from_zero", "uniform"))
    add("--unit", choices=("block", "branch"), default="block")
    add("--mode", choices=("batch", "sample"), default="batch")
    add("--scale", choices=("auto", "eval", "train", "none"), default="auto")
    add("--input", type=shape, metavar="SHAPE", help="of a batch of images, 2,3,32,32")
    add("--timed", action="store_true", help="time the blocks on this machine, too")
    add("--json", action="store_true", help="print the numbers for a program")
    return parser


def shape(text: str) -> Tensor:
    """Random numbers in a shape."""
    try:
        sizes = [int(size) for size in text.split(",")]
        return torch.randn([size if size > 0 else -1 for size in sizes])
    except (ValueError, RuntimeError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no shape of a batch") from error


def _loaded(name: str, example: Tensor | None, timed: bool) -> tuple[nn.Module, Any]:  # noqa: FBT001
    """The model of a name, and what to call it with."""
    source, _, what = name.rpartition(":")
    try:
        if source == "timm":
            return importlib.import_module("timm").create_model(what), example
        if source == "torchvision":
            models: Any = importlib.import_module("torchvision").models
            parts = inspect.signature(models.get_model_builder(what)).parameters
            no_weights = {n: None for n in ("weights", "weights_backbone") if n in parts}
            model = models.get_model(what, **no_weights)
            return model, torch.randn(_IMAGES) if example is None else example
        if source == "transformers":
            auto: Any = importlib.import_module("transformers")
            config = auto.AutoConfig.for_model(what)
            if not timed:
                config._experts_implementation = "batched_mm"  # which runs without values
            with torch.device("cpu" if timed else "meta"):  # some have billions of weights
                return auto.AutoModel.from_config(config), example
        made: Any = getattr(importlib.import_module(source), what)()
        made, *shown = made if isinstance(made, tuple) else (made,)
        if not isinstance(made, nn.Module) or len(shown) > 1:
            raise TypeError(f"{what}() returns no model, or more than one and its example")
    except (Exception, SystemExit) as error:  # whatever such a library raises, or the function
        raise errors.OptionError(
            f"{name!r} cannot be built: {type(error).__name__}: {error}",
            expected="timm:NAME, torchvision:NAME, transformers:TYPE, or package.module:function",
            instead="look whether that is installed here, and knows the name",
        ) from error
    return made, shown[0] if shown and example is None else example


def _estimate(
    model: nn.Module, example: Any, options: argparse.Namespace, refused: Mapping[str, str] = {}
) -> tuple[Saving, Mapping[str, str]]:
    """What it saves, and the blocks that are refused, left out."""
    try:
        with switched_off(model):  # what the model drops of its own accord
            saving = estimate_saving(
                model,
                options.drop_rate,
                options.drop_distribution,
                example_inputs=example,
                blocks=[f"!{name}" for name in refused] or None,
                unit=options.unit,
                mode=options.mode,
                scale=options.scale,
                timed=options.timed,
            )
    except errors.RefusedBlockError as error:
        if not error.reasons.keys() - refused.keys():
            raise
        try:
            return _estimate(model, example, options, {**refused, **error.reasons})
        except errors.SelectionError:  # nothing is left
            raise error from None
    except errors.ExampleInputsError as error:
        instead = "pass an --input that fits, or package.module:function that returns the model "
        instead += "and a dict"
        if is_unmaterialised(model):
            instead += "; or --timed, which makes its weights: without these not every model runs"
        raise errors.ExampleInputsError(
            error.arrived,
            expected="a model with an example of its own, or one of images",
            instead=instead,
        ) from error
    return saving, refused


if __name__ == "__main__":
    sys.exit(main())
