"""Optimizers over flat vectors: from the parameters, the reduced gradient and the step to new parameters.

The base class owns the update: it walks over the vectors in blocks that stay in the cache, adds the weight
decay, and hands each block to the rule of the subclass. Everything is elementwise and in place, so every rank
computes the same bits from the same gradient.

Legend: w parameters, g gradient (mean over the batch), λ weight decay, η learning rate, t = 1, 2, … the update.
Where the book and PyTorch differ (where η stands in Momentum, the form of Nesterov's rule, the place of ε and its
size), these are PyTorch's.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from distdl.arrays import aligned_empty, aligned_zeros
from distdl.errors import unknown_name

Vector = NDArray[Any]

BLOCK = 32768  # elements; four float32 vectors of this length fit the second-level cache


class Optimizer(ABC):
    """Updates a flat parameter vector in place (book 6.1).

    `weight_decay` λ adds λw to the gradient where `decay_slices` say so (weights, not biases), and `l1` adds the
    sign of w times itself there. The parts in `frozen`, ascending, are left as they are, to the bit. `state` holds the
    vectors that must survive a step, by name, each as long as the parameters.
    """

    state_names: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        size: int,
        *,
        weight_decay: float = 0.0,
        l1: float = 0.0,
        decay_slices: Sequence[slice] = (),
        frozen: Sequence[slice] = (),
        dtype: Any = np.float32,
    ) -> None:
        self.weight_decay = weight_decay
        self.l1 = l1
        self.frozen = tuple(frozen)
        self.decay_slices = tuple(where for where in decay_slices if where not in self.frozen)
        starts, stops = [0, *(where.stop for where in frozen)], [*(where.start for where in frozen), size]
        self._updated = [slice(*ends) for ends in zip(starts, stops, strict=True)]
        self.state: dict[str, Vector] = {name: aligned_zeros(size, dtype) for name in self.state_names}
        self._scratch = aligned_empty(min(size, BLOCK), dtype)

    def update(self, parameters: Vector, gradients: Vector, learning_rate: float, step: int) -> None:
        """Take update number `step` = 1, 2, …; both vectors are overwritten (the gradient serves as scratch)."""
        if self.weight_decay or self.l1:
            for block in _blocks(self.decay_slices):
                scratch = self._scratch[: block.stop - block.start]
                self._decay(parameters[block], gradients[block], learning_rate, scratch)
        for block in _blocks(self._updated):
            scratch = self._scratch[: block.stop - block.start]
            state = {name: vector[block] for name, vector in self.state.items()}
            self._rule(parameters[block], gradients[block], state, learning_rate, step, scratch)

    def _decay(self, w: Vector, g: Vector, learning_rate: float, scratch: Vector) -> None:  # noqa: ARG002
        """Add what λ and `l1` say to the block `g` of the gradient."""
        if self.weight_decay:
            np.multiply(w, self.weight_decay, out=scratch)
            g += scratch
        if self.l1:
            np.sign(w, out=scratch)
            scratch *= self.l1
            g += scratch

    @abstractmethod
    def _rule(
        self, w: Vector, g: Vector, state: dict[str, Vector], learning_rate: float, step: int, scratch: Vector
    ) -> None:
        """Update the block `w` and its `state` in place; `g` and `scratch` may be overwritten."""


def _blocks(parts: Iterable[slice]) -> Iterator[slice]:
    """Yield the parts of a vector in pieces of at most `BLOCK` elements."""
    for part in parts:
        for start in range(part.start, part.stop, BLOCK):
            yield slice(start, min(start + BLOCK, part.stop))


class SGD(Optimizer):
    """Stochastic gradient descent: w ← w - ηg (book 6.1.2)."""

    def _rule(
        self,
        w: Vector,
        g: Vector,
        state: dict[str, Vector],  # noqa: ARG002
        learning_rate: float,
        step: int,  # noqa: ARG002
        scratch: Vector,  # noqa: ARG002
    ) -> None:
        g *= learning_rate
        w -= g


class Momentum(Optimizer):
    """SGD with momentum, as PyTorch has it: v ← αv + g, w ← w - ηv with α = 0.9 (book 6.1.4).

    The book keeps η inside of v: v ← αv - ηg, w ← w + v. At a constant rate the steps are the same. Where a schedule
    changes the rate, the book's v goes on with the rates of earlier steps, and this one takes the new rate at once.
    """

    state_names = ("momentum_buffer",)  # "velocity" is the book's v, in checkpoints of earlier versions
    momentum = 0.9

    def _rule(
        self,
        w: Vector,
        g: Vector,
        state: dict[str, Vector],
        learning_rate: float,
        step: int,  # noqa: ARG002
        scratch: Vector,  # noqa: ARG002
    ) -> None:
        v = state["momentum_buffer"]
        v *= self.momentum
        v += g
        np.multiply(v, learning_rate, out=g)
        w -= g


class Nesterov(Optimizer):
    """Nesterov's accelerated gradient, as PyTorch has it: v ← αv + g, w ← w - η(g + αv) with α = 0.9 (book 6.1.4)."""

    state_names = ("velocity",)
    momentum = 0.9

    def _rule(
        self,
        w: Vector,
        g: Vector,
        state: dict[str, Vector],
        learning_rate: float,
        step: int,  # noqa: ARG002
        scratch: Vector,
    ) -> None:
        velocity = state["velocity"]
        velocity *= self.momentum
        velocity += g
        np.multiply(velocity, self.momentum, out=scratch)
        scratch += g
        scratch *= learning_rate
        w -= scratch


class AdaGrad(Optimizer):
    """AdaGrad (Duchi, Hazan and Singer 2011; book 6.1.5): h ← h + g², w ← w - ηg / (√h + ε) with ε = 1e-10."""

    state_names = ("sum_of_squares",)
    epsilon = 1e-10

    def _rule(
        self,
        w: Vector,
        g: Vector,
        state: dict[str, Vector],
        learning_rate: float,
        step: int,  # noqa: ARG002
        scratch: Vector,
    ) -> None:
        h = state["sum_of_squares"]
        np.multiply(g, g, out=scratch)
        h += scratch
        _divided_step(w, g, h, self.epsilon, learning_rate, scratch)


class RMSProp(Optimizer):
    """RMSProp (Tieleman and Hinton 2012; book 6.1.5): h ← βh + (1-β)g², w ← w - ηg / (√h + ε), β = 0.99, ε = 1e-8."""

    state_names = ("mean_of_squares",)
    beta, epsilon = 0.99, 1e-8

    def _rule(
        self,
        w: Vector,
        g: Vector,
        state: dict[str, Vector],
        learning_rate: float,
        step: int,  # noqa: ARG002
        scratch: Vector,
    ) -> None:
        h = state["mean_of_squares"]
        h *= self.beta
        np.multiply(g, g, out=scratch)
        scratch *= 1 - self.beta
        h += scratch
        _divided_step(w, g, h, self.epsilon, learning_rate, scratch)


def _divided_step(w: Vector, g: Vector, h: Vector, epsilon: float, learning_rate: float, scratch: Vector) -> None:
    """Take the step w ← w - ηg / (√h + ε)."""
    np.sqrt(h, out=scratch)
    scratch += epsilon
    np.divide(g, scratch, out=scratch)
    scratch *= learning_rate
    w -= scratch


class Adam(Optimizer):
    """Adam (Kingma and Ba 2015, algorithm 1; book 6.1.6).

    m ← β₁m + (1-β₁)g,  v ← β₂v + (1-β₂)g²,  w ← w - η·m̂ / (√v̂ + ε)  with m̂ = m/(1-β₁ᵗ), v̂ = v/(1-β₂ᵗ),
    β₁ = 0.9, β₂ = 0.999, ε = 1e-8 outside the root (the book folds the corrections into η and takes 1e-7).
    """

    state_names = ("first_moment", "second_moment")
    beta1, beta2, epsilon = 0.9, 0.999, 1e-8

    def _rule(
        self, w: Vector, g: Vector, state: dict[str, Vector], learning_rate: float, step: int, scratch: Vector
    ) -> None:
        m, v = state["first_moment"], state["second_moment"]
        np.multiply(g, 1 - self.beta1, out=scratch)
        m *= self.beta1
        m += scratch
        g *= g
        g *= 1 - self.beta2
        v *= self.beta2
        v += g
        np.sqrt(v, out=scratch)
        scratch /= (1 - self.beta2**step) ** 0.5
        scratch += self.epsilon
        np.divide(m, scratch, out=scratch)
        scratch *= learning_rate / (1 - self.beta1**step)
        w -= scratch


class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019): w ← w - ηλw first, then Adam without λ."""

    def _decay(self, w: Vector, g: Vector, learning_rate: float, scratch: Vector) -> None:
        if self.weight_decay:
            w *= 1 - learning_rate * self.weight_decay
        if self.l1:
            np.sign(w, out=scratch)
            scratch *= self.l1
            g += scratch


OPTIMIZERS: dict[str, type[Optimizer]] = {
    "sgd": SGD,
    "momentum": Momentum,
    "nesterov": Nesterov,
    "adagrad": AdaGrad,
    "rmsprop": RMSProp,
    "adam": Adam,
    "adamw": AdamW,
}


def clip_by_norm(gradient: Vector, largest: float) -> float:
    """Scale the flat gradient down in place so that its length is at most `largest`; return its length before.

    The factor is ``largest / (length + 1e-6)``, as PyTorch's ``clip_grad_norm_`` takes it. Not in the book. Source:
    Pascanu, Mikolov and Bengio 2013.
    """
    length = math.sqrt(float(np.vdot(gradient, gradient)))
    if not math.isfinite(length):  # the squares overflow
        length = float(np.linalg.norm(gradient.astype(np.float64)))
    if length + 1e-6 > largest:
        gradient *= largest / (length + 1e-6)
    return length


def optimizer_class(name: str) -> type[Optimizer]:
    """Return the optimizer of that name; raise `UserError` listing the known ones otherwise."""
    if name not in OPTIMIZERS:
        raise unknown_name("optimizer", name, OPTIMIZERS)
    return OPTIMIZERS[name]
