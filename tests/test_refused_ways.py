"""Promise: a model that runs otherwise than it was watched, or that cannot be tried, is refused by
an error that names the block and says what to do.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stochastic_depth as sd
from networks import WIDTH, residuals, settled, vectors
from refusing import Refusal, check, gate, refused

pytestmark = pytest.mark.oldest
X = vectors(6, WIDTH)
Forward = Callable[..., Any]


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.GELU(),
                         nn.Linear(WIDTH, WIDTH))  # fmt: skip


class Written(nn.Module):
    """A block with two branches, a norm and a number, which a function of the test calls."""

    def __init__(self, call: Forward) -> None:
        super().__init__()
        self.f, self.g, self.norm, self.times = mlp(), mlp(), nn.LayerNorm(WIDTH), 2
        self.call = call

    def forward(self, *args: Any) -> Any:
        return self.call(self, *args)


def blocks(call: Forward) -> Any:
    return settled(lambda: nn.Sequential(*(Written(call) for _ in range(6))))


class Around(nn.Module):
    """Six residual blocks; a function says what becomes of their output."""

    def __init__(self, behind: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.blocks, self.behind = nn.Sequential(*residuals(6)), behind

    def forward(self, x: Tensor) -> Tensor:
        return self.behind(x, self.blocks(x))


def around(behind: Callable[[Tensor, Tensor], Tensor]) -> Any:
    return settled(lambda: Around(behind))


# When it is watched and tried.


def of_each_other(block: Any, x: Tensor) -> Tensor:
    made = block.f(x)
    y = x + made
    return y + block.g(y * made)


def unlike_for_nine_rows(x: Tensor, y: Tensor) -> Tensor:
    return y.sin() if len(y) > 6 else y


def unlike_where_nothing_ran(x: Tensor, y: Tensor) -> Tensor:
    if torch.equal(x, y):
        raise RuntimeError("nothing ran")
    return y


def by_value(x: Tensor, y: Tensor) -> Tensor:
    return y if float(y.sum()) > 0 else -y


class TwoWays(nn.Module):
    """A layer that is called first with one branch, then with two."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.blocks = Written(self.call), nn.Sequential(*residuals(6))

    @staticmethod
    def call(block: Any, x: Tensor, both: bool = False) -> Tensor:
        x = x + block.f(x)
        return x + block.g(x) if both else x

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.layer(self.layer(x), True))


class WithLosses(nn.Module):
    """Blocks that hand out a loss for each row beside their sum."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Written(self.call) for _ in range(6))

    @staticmethod
    def call(block: Any, x: Tensor, loss: Any) -> Any:
        made = block.f(x)
        return x + made, loss + made.square().mean(1)

    def forward(self, x: Tensor) -> Tensor:
        loss: Any = 0.0
        for block in self.blocks:
            x, loss = block(x, loss)
        return x.sum() + loss.sum()


NO_BLOCK = partial(refused, kind=sd.RefusedBlockError, example_inputs=X)
NO_EXAMPLE = partial(refused, kind=sd.ExampleInputsError, example_inputs=X)
WATCHED: list[Refusal] = [
    NO_BLOCK(
        'block "0": one of its branches computes with a value of another (try unit="block")',
        model=partial(blocks, of_each_other),
        unit="branch",
    ),
    NO_BLOCK(
        'block "layer": its module is called several times with different structure',
        "blocks=['!layer']",
        model=partial(settled, TwoWays),
    ),
    NO_BLOCK(
        'block "blocks.0": "blocks.1" computes with a value made inside of it',
        "returns as one number works",
        model=partial(settled, WithLosses),
    ),
    NO_BLOCK(
        'block "blocks.0": with all blocks dropped the forward fails: nothing ran',
        "blocks=['!blocks.0']",
        model=partial(around, unlike_where_nothing_ran),
    ),
    NO_EXAMPLE(
        'mode="sample" looks for the batch dimension',
        "takes another way for 9 rows than for 6",
        "another batch size",
        model=partial(around, unlike_for_nine_rows),
        mode="sample",
    ),
]


@pytest.mark.parametrize("refusal", WATCHED, ids=lambda refusal: refusal.says[0])
def test_a_model_that_cannot_be_watched(refusal: Refusal) -> None:
    check(refusal)


def test_a_model_without_weights_whose_forward_needs_values() -> None:
    model = around(by_value).to("meta")
    with pytest.raises(sd.ExampleInputsError, match=r"Around failed on its.*build the model on"):
        gate(model, example_inputs=X.to("meta"))


def test_a_model_without_blocks_has_none_to_show() -> None:
    with pytest.raises(sd.NoResidualBlocksError, match=r"Linear has no residual block.*DenseNet"):
        sd.find_residual_blocks(nn.Linear(WIDTH, 2), X)


def test_a_model_that_does_not_train_is_not_timed() -> None:
    class Unfinished(Around):
        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                raise RuntimeError("no targets")
            return super().forward(x)

    model = Unfinished(lambda x, y: y)
    says = r"Unfinished does not train on its example: no targets.*as for a training step"
    with pytest.raises(sd.ExampleInputsError, match=says):
        sd.estimate_saving(model, 0.2, example_inputs=X, timed=True)


# When it runs.


def again_and_again(block: Any, x: Tensor) -> Tensor:
    made = block.norm(x)
    for _ in range(block.times):
        made = block.f(made)
    return block.norm(x + made)


def test_a_branch_that_is_called_more_often_than_it_was() -> None:
    model = blocks(again_and_again)
    with pytest.warns(sd.StochasticDepthWarning, match=r"fold\(\) will not be able"):
        depth = gate(model, example_inputs=X)
    model[3].times = 3
    says = r'"3" does not run as it did.*"3\.f" is called 3 times in it'
    with depth.fixed({"3": False}), pytest.raises(sd.ChangedModelError, match=says):
        model(X)


class SixRows(nn.Linear):
    """Takes so many rows, and no others."""

    def forward(self, x: Tensor) -> Tensor:
        if len(x) != 6:
            raise RuntimeError("six rows, please")
        return super().forward(x)


def test_a_branch_that_takes_no_other_shape() -> None:
    model = blocks(lambda block, x: block.norm(x + block.f(x)))
    model[3].f[3] = SixRows(WIDTH, WIDTH)
    model[3].f.forward = lambda x: model[3].f[3](model[3].f[1](x).relu())
    depth = gate(model, example_inputs=X)
    says = r'shapes that "3\.f.*" hands out for an input of a new shape.*six rows, please.*blocks='
    with depth.fixed({"3": False}), pytest.raises(sd.ChangedModelError, match=says):
        model(X[:5])


def test_a_gate_is_open_or_closed() -> None:
    depth = gate(settled(lambda: nn.Sequential(*residuals(6))))
    says = r"""fixed\(\) got 'open' for "1". Expected True \(open\) or False \(closed\)"""
    with pytest.raises(sd.OptionError, match=says), depth.fixed({"1": "open"}):  # type: ignore[dict-item]
        pass


def test_a_checkpoint_of_weights_that_take_no_factor() -> None:
    model = settled(lambda: nn.Sequential(*residuals(6)))
    nn.utils.parametrizations.weight_norm(model[5].linear)
    with pytest.warns(sd.StochasticDepthWarning, match=r"fold\(\) will not be able"):
        depth = gate(model)
    with pytest.raises(sd.RefusedBlockError, match=r'"5:0" cannot be folded.*scale="train"'):
        sd.fold_state_dict(model.state_dict(), depth.state_dict())


class Gained(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
        self.gain, self.shift = nn.Parameter(torch.ones(8)), nn.Parameter(torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class GainedInCall(Gained):
    def __call__(self, x: Tensor) -> Any:
        return super().__call__(x * self.gain)


class GainedBehindCall(Gained):
    def __call__(self, x: Tensor) -> Any:
        return super().__call__(x) + self.shift


def _gain(module: Any, args: Any) -> Any:
    return (args[0] * module.gain,)


def _shift(module: Any, args: Any) -> Any:
    return (args[0] + module.shift,)


@pytest.mark.parametrize("mode", ["batch", "sample"])
@pytest.mark.parametrize(
    ("kind", "hook"),
    [(Gained, _gain), (Gained, _shift), (GainedInCall, None), (GainedBehindCall, None)],
)
def test_a_hook_that_changes_nothing_yet(kind: type[nn.Module], hook: Any, mode: Any) -> None:
    """Its weight is one, or zero, as long as nobody trains."""
    model = nn.Sequential(*(kind() for _ in range(6)))
    for block in model if hook is not None else ():
        block.register_forward_pre_hook(hook)
    with pytest.raises(sd.RefusedBlockError, match="do would be skipped with it"):
        sd.apply_stochastic_depth(model, 0.2, example_inputs=torch.randn(8, 8), mode=mode)


def test_a_hook_that_only_looks() -> None:
    model, shapes = nn.Sequential(*(Gained() for _ in range(6))), []
    for block in model:
        block.register_forward_pre_hook(lambda module, args: shapes.append(args[0].shape))
    depth = sd.apply_stochastic_depth(model, 0.2, example_inputs=torch.randn(8, 8))
    assert str(depth).count("skipped whole") == 6
