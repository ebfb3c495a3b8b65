"""Optimizers over flat vectors: from the parameters, the reduced gradient and the step to new parameters.

The base class owns the update: it walks over the vectors in pieces that stay in the cache, adds the weight decay, and
passes each piece to the rule of the subclass. Everything is elementwise and in place. So every rank computes the same
bits from the same gradient.

Legend: w parameters, g gradient (mean over the batch), λ weight decay, η learning rate, t = 1, 2, … the update.
The book and PyTorch differ in the position of η in Momentum, in Nesterov's rule, and in the position and size of ε.
These optimizers follow PyTorch.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from distdl.arrays import aligned_empty, aligned_zeros
from distdl.elementary import power
from distdl.errors import unknown_name

Vector = NDArray[Any]
State = dict[str, Vector]
Update = Callable[[Vector, Vector, float, int, int], None]

BLOCK = 32768  # elements; four float32 vectors of this length fit the second-level cache


class Optimizer(ABC):
    """Updates a flat parameter vector in place (book 6.1).

    In `decay_slices` (weights, not biases) `weight_decay` λ adds λw to the gradient, and `l1` adds ``l1 sign(w)``. The
    slices in `frozen`, ascending, keep their bits. `state` holds the vectors that must survive a step, by name, each as
    long as the parameters. `settings` replace the class attributes of these names: the constants of the rule. `fused`
    computes the same update in one pass over float32 vectors (see ``Kernels.optimizer_rule``).
    """

    state_names: ClassVar[tuple[str, ...]] = ()
    setting_names: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        size: int,
        *,
        weight_decay: float = 0.0,
        l1: float = 0.0,
        decay_slices: Sequence[slice] = (),
        frozen: Sequence[slice] = (),
        dtype: Any = np.float32,
        fused: "Callable[[Optimizer], Update] | None" = None,
        **settings: float,
    ) -> None:
        if unknown := settings.keys() - {*self.setting_names}:
            raise TypeError(f"{type(self).__name__} has no setting {', '.join(sorted(unknown))}")
        vars(self).update(settings)
        self.weight_decay, self.l1, self.frozen = weight_decay, l1, tuple(frozen)
        self.decay_slices = tuple(where for where in decay_slices if where not in self.frozen)
        starts, stops = [0, *(where.stop for where in frozen)], [*(where.start for where in frozen), size]
        self.updated = [slice(*ends) for ends in zip(starts, stops, strict=True)]
        self.state: State = {name: aligned_zeros(size, dtype) for name in self.state_names}
        self._scratch = aligned_empty(min(size, BLOCK), dtype)
        self.fused = None if fused is None or dtype != np.float32 else fused(self)

    def update(self, parameters: Vector, gradients: Vector, learning_rate: float, step: int, samples: int = 1) -> None:
        """Apply update number `step` = 1, 2, … to `parameters`.

        Without `fused`, `gradients` is the mean gradient and is overwritten. With it, `gradients` is the sum over
        `samples`, and keeps its bits.
        """
        if self.fused is not None:
            self.fused(parameters, gradients, learning_rate, step, samples)
            return
        for piece in _pieces(self.decay_slices if self.weight_decay or self.l1 else ()):
            w, g, scratch = parameters[piece], gradients[piece], self._scratch[: piece.stop - piece.start]
            if self.weight_decay:
                self._decay(w, g, learning_rate, scratch)
            if self.l1:
                np.sign(w, out=scratch)
                scratch *= self.l1
                g += scratch
        for piece in _pieces(self.updated):
            scratch = self._scratch[: piece.stop - piece.start]
            state = {name: vector[piece] for name, vector in self.state.items()}
            self._rule(parameters[piece], gradients[piece], state, learning_rate, step, scratch)

    def _decay(self, w: Vector, g: Vector, learning_rate: float, scratch: Vector) -> None:
        """Add the term of λ to the piece `g` of the gradient."""
        np.multiply(w, self.weight_decay, out=scratch)
        g += scratch

    @abstractmethod
    def _rule(self, w: Vector, g: Vector, state: State, learning_rate: float, step: int, scratch: Vector) -> None:
        """Update the piece `w` and its `state` in place; `g` and `scratch` may be overwritten."""


def _pieces(slices: Iterable[slice]) -> Iterator[slice]:
    """Yield slices in pieces of at most `BLOCK` elements."""
    for where in slices:
        for start in range(where.start, where.stop, BLOCK):
            yield slice(start, min(start + BLOCK, where.stop))


class SGD(Optimizer):
    """Stochastic gradient descent: w ← w - ηg (book 6.1.2)."""

    def _rule(self, w: Vector, g: Vector, state: State, learning_rate: float, step: int, scratch: Vector) -> None:
        g *= learning_rate
        w -= g


class Momentum(Optimizer):
    """SGD with momentum, as in PyTorch: v ← αv + g, w ← w - ηv with α = 0.9 (book 6.1.4).

    The book keeps η inside v: v ← αv - ηg, w ← w + v. At a constant rate the steps are the same. If a schedule changes
    the rate, the book's v keeps the rates of earlier steps; this one uses the new rate at once.
    """

    state_names = ("momentum_buffer",)  # checkpoints of earlier versions have the book's v as "velocity"
    setting_names = ("momentum",)
    momentum = 0.9

    def _rule(self, w: Vector, g: Vector, state: State, learning_rate: float, step: int, scratch: Vector) -> None:
        v = state["momentum_buffer"]
        v *= self.momentum
        v += g
        np.multiply(v, learning_rate, out=g)
        w -= g


class Nesterov(Optimizer):
    """Nesterov's accelerated gradient, as in PyTorch: v ← αv + g, w ← w - η(g + αv) with α = 0.9 (book 6.1.4)."""

    state_names = ("velocity",)
    setting_names = ("momentum",)
    momentum = 0.9

    def _rule(self, w: Vector, g: Vector, state: State, learning_rate: float, step: int, scratch: Vector) -> None:
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
    setting_names = ("epsilon",)
    epsilon = 1e-10

    def _rule(self, w: Vector, g: Vector, state: State, learning_rate: float, step: int, scratch: Vector) -> None:
        h = state["sum_of_squares"]
        np.multiply(g, g, out=scratch)
        h += scratch
        _divided_step(w, g, h, self.epsilon, learning_rate, scratch)


class RMSProp(Optimizer):
    """RMSProp (Tieleman and Hinton 2012; book 6.1.5): h ← βh + (1-β)g², w ← w - ηg / (√h + ε), β = 0.99, ε = 1e-8."""

    state_names = ("mean_of_squares",)
    setting_names = ("beta2", "epsilon")
    beta2, epsilon = 0.99, 1e-8

    def _rule(self, w: Vector, g: Vector, state: State, learning_rate: float, step: int, scratch: Vector) -> None:
        h = state["mean_of_squares"]
        h *= self.beta2
        np.multiply(g, g, out=scratch)
        scratch *= 1 - self.beta2
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
    setting_names = ("beta1", "beta2", "epsilon")
    beta1, beta2, epsilon = 0.9, 0.999, 1e-8

    def _rule(self, w: Vector, g: Vector, state: State, learning_rate: float, step: int, scratch: Vector) -> None:
        m, v = state["first_moment"], state["second_moment"]
        np.multiply(g, 1 - self.beta1, out=scratch)
        m *= self.beta1
        m += scratch
        g *= g
        g *= 1 - self.beta2
        v *= self.beta2
        v += g
        root, corrected_rate = self.corrections(learning_rate, step)
        np.sqrt(v, out=scratch)
        scratch /= root
        scratch += self.epsilon
        np.divide(m, scratch, out=scratch)
        scratch *= corrected_rate
        w -= scratch

    def corrections(self, learning_rate: float, step: int) -> tuple[float, float]:
        """Return ``√(1-β₂ᵗ)`` and ``η / (1-β₁ᵗ)``."""
        return math.sqrt(1 - power(self.beta2, step)), learning_rate / (1 - power(self.beta1, step))


class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019): w ← w - ηλw first, then Adam without λ."""

    def _decay(self, w: Vector, g: Vector, learning_rate: float, scratch: Vector) -> None:
        w *= 1 - learning_rate * self.weight_decay


#: The name of an optimizer is that of its class in lower case.
OPTIMIZERS: dict[str, type[Optimizer]] = {
    rule.__name__.lower(): rule for rule in (SGD, Momentum, Nesterov, AdaGrad, RMSProp, Adam, AdamW)
}


def optimizer_class(name: str) -> type[Optimizer]:
    """Return the optimizer with this name; raise `UserError`, listing the known ones, for an unknown name."""
    if name not in OPTIMIZERS:
        raise unknown_name("optimizer", name, OPTIMIZERS)
    return OPTIMIZERS[name]
