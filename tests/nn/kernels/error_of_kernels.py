"""Measure the errors of all kernels against float64: NumPy form, compiled form and PyTorch; print tables in Markdown.

    python -m tests.nn.kernels.error_of_kernels

An error is the Euclidean norm of the difference, divided by the norm of the exact result. The unit is 1e-7; half a unit
in the last place of a float32 number is at most 0.6 of it. Inputs and parameters are normal random numbers. PyTorch
computes the same float32 inputs by its own functions; its errors are absent if it is not installed.
"""

import math

import numpy as np

from distdl.nn import (
    Affine,
    AvgPool2d,
    BatchNorm,
    Conv2d,
    ConvTranspose2d,
    Dropout,
    GlobalAvgPool2d,
    LeakyReLU,
    LocalResponseNorm,
    MaxPool2d,
    ReLU,
    Sequential,
    Sigmoid,
    SoftmaxCrossEntropy,
    Tanh,
    Upsample2d,
    build_model,
)
from distdl.nn.kernels import NUMPY, PLAIN
from distdl.nn.kernels.compiled import COMPILED
from distdl.nn.kernels.compiled.batch_norm import CompiledBatchNorm
from distdl.nn.kernels.compiled.composites import CompiledResidual
from distdl.optim import OPTIMIZERS
from distdl.rng import Key

try:
    import torch
    from torch.nn import functional
except ImportError:
    torch = None

N, KEY, UNIT = 16, Key(1), 1e-7
FORMS = (NUMPY, COMPILED)
FORMS_SHOWN = ("NumPy", "compiled", *(() if torch is None else ("PyTorch",)))


def normal(shape, name):
    return Key(7).of(name).normal(math.prod(shape)).reshape(shape).astype(np.float32)


def error(actual, exact):
    """Return the norm of the difference, relative to the norm of `exact`."""
    difference = np.asarray(actual, np.float64).ravel() - np.asarray(exact, np.float64).ravel()
    return float(np.linalg.norm(difference) / np.linalg.norm(exact))


# ------------------------------------------------------------------------------------------------------------ layers


def _convolved(z, p, layer):
    window = layer.window
    return functional.conv2d(z, p["weight"].permute(3, 2, 0, 1), p.get("bias"), window.stride, window.padding)


def _transposed(z, p, layer):
    window = layer.window
    weight = p["weight"].permute(3, 2, 0, 1)
    return functional.conv_transpose2d(z, weight, p["bias"], window.stride, window.padding)


def _normalized(z, p, layer):
    return functional.batch_norm(z, None, None, p["gamma"], p["beta"], training=True, eps=layer.epsilon)


def _response_norm(z, _, layer):
    return functional.local_response_norm(z, layer.size, layer.alpha, layer.beta, layer.k)


def _dropped(z, _, layer):
    mask = KEY.of("dropout_1").mask(z.numel(), 1 - layer.ratio).reshape(z.shape)
    return z * torch.tensor(mask) / (1 - layer.ratio)


def _pooled(z, layer, pool):
    return pool(z, layer.window.kernel, layer.window.stride, layer.window.padding)


def _enlarged(z, _, layer):
    return functional.interpolate(z, scale_factor=layer.factor, mode="bilinear", align_corners=False)


#: For each class of layers, its computation in PyTorch, given input, parameters and layer.
IN_PYTORCH = {
    Affine: lambda z, p, _: z @ p["weight"] + p["bias"],
    AvgPool2d: lambda z, _, layer: _pooled(z, layer, functional.avg_pool2d),
    BatchNorm: _normalized,
    Conv2d: _convolved,
    ConvTranspose2d: _transposed,
    Dropout: _dropped,
    GlobalAvgPool2d: lambda z, *_: z.mean((2, 3)),
    LeakyReLU: lambda z, _, layer: functional.leaky_relu(z, layer.slope),
    LocalResponseNorm: _response_norm,
    MaxPool2d: lambda z, _, layer: _pooled(z, layer, functional.max_pool2d),
    Sigmoid: lambda z, *_: torch.sigmoid(z),
    Tanh: lambda z, *_: torch.tanh(z),
    Upsample2d: _enlarged,
}

#: A layer, the shape of a sample, and the mean of the input.
LAYERS = {
    "convolution 3×3, 16 → 16, 28×28 (Winograd)": (lambda: Conv2d(16, 3, padding=1), (28, 28, 16), 0),
    "convolution 3×3, 128 → 128, 14×14 (Winograd)": (lambda: Conv2d(128, 3, padding=1), (14, 14, 128), 0),
    "convolution 3×3, 1 → 16, 28×28": (lambda: Conv2d(16, 3, padding=1), (28, 28, 1), 0),
    "convolution 3×3, stride 2, 32 → 64, 14×14": (lambda: Conv2d(64, 3, stride=2, padding=1), (14, 14, 32), 0),
    "convolution 5×5, 32 → 64, 14×14": (lambda: Conv2d(64, 5, padding=2), (14, 14, 32), 0),
    "convolution 1×1, 64 → 128, 14×14": (lambda: Conv2d(128, 1), (14, 14, 64), 0),
    "transposed convolution 4×4, stride 2, 32 → 16": (
        lambda: ConvTranspose2d(16, 4, stride=2, padding=1),
        (14, 14, 32),
        0,
    ),
    "affine 1,024 → 100": (lambda: Affine(100), (1024,), 0),
    "BatchNorm": (BatchNorm, (14, 14, 32), 0),
    "BatchNorm, mean 100 and deviation 1": (BatchNorm, (14, 14, 32), 100),
    "LocalResponseNorm": (lambda: LocalResponseNorm(5, alpha=0.1), (14, 14, 32), 0),
    "max-pooling 3×3, stride 2": (lambda: MaxPool2d(3, stride=2, padding=1), (14, 14, 32), 0),
    "average-pooling 3×3, stride 2": (lambda: AvgPool2d(3, stride=2, padding=1), (14, 14, 32), 0),
    "global average-pooling": (GlobalAvgPool2d, (14, 14, 32), 0),
    "leaky ReLU": (LeakyReLU, (14, 14, 32), 0),
    "tanh": (Tanh, (14, 14, 32), 0),
    "sigmoid": (Sigmoid, (14, 14, 32), 0),
    "dropout": (lambda: Dropout(0.3), (1024,), 0),
    "interpolation ×2": (Upsample2d, (14, 14, 32), 0),
}


def outcome_of_network(network, x, dy):
    """Return y, dx and the gradients of all parameters."""
    y = network.forward(x.astype(network.dtype), training=True, key=KEY).copy()
    dx = network.backward(dy.astype(network.dtype)).copy()
    gradients = [view.ravel() for _, view in network.named_gradients()]
    return y, dx, np.concatenate(gradients) if gradients else None


def outcome_of_pytorch(layer, x, dy):
    """Return the same as `outcome_of_network`, in the same layouts."""
    leaf = torch.tensor(x, requires_grad=True)
    parameters = {name: torch.tensor(view, requires_grad=True) for name, view in layer.parameters.items()}
    images = x.ndim == 4
    y = IN_PYTORCH[type(layer)](leaf.permute(0, 3, 1, 2) if images else leaf, parameters, layer)
    if y.ndim == 4:
        y = y.permute(0, 2, 3, 1)
    y.backward(torch.tensor(dy))
    gradients = [parameter.grad.numpy().ravel() for parameter in parameters.values()]
    return y.detach().numpy(), leaf.grad.numpy(), np.concatenate(gradients) if gradients else None


def built(make, shape, kernels, dtype):
    network = Sequential([make()], shape, dtype=dtype, kernels=kernels)
    network.bind(needs_input_gradient=True)
    for name, view in network.named_parameters():
        view[...] = normal(view.shape, name)
    return network


def errors_of_layer(make, shape, mean):
    """Return, for output, input gradient and parameter gradients, the errors of all forms."""
    x = normal((N, *shape), "x") + np.float32(mean)
    exact_network = built(make, shape, PLAIN, np.float64)
    dy = normal((N, *exact_network.output_shape), "dy")
    exact = outcome_of_network(exact_network, x, dy)
    outcomes = []
    for kernels in FORMS:
        network = built(make, shape, kernels, np.float32)
        fused = network.stack.segments[0][3]
        assert kernels is NUMPY or fused is not None
        outcomes.append(outcome_of_network(network, x, dy))
    if torch is not None:
        outcomes.append(outcome_of_pytorch(network.layers[0], x, dy))
    return [
        [] if reference is None else [error(one, reference) for one in found]
        for reference, *found in zip(exact, *outcomes, strict=True)
    ]


def errors_of_loss(K=10):
    """Return the errors of softmax with cross-entropy: of the value, and of the gradient."""
    z, labels = 3 * normal((64, K), "z"), np.arange(64) % K
    exact = SoftmaxCrossEntropy()
    value, outcomes = exact.forward(z.astype(np.float64), labels), []
    for kernels in FORMS:
        loss = kernels.loss(SoftmaxCrossEntropy())
        outcomes.append((loss.forward(z, labels), loss.backward()))
    if torch is not None:
        leaf = torch.tensor(z, requires_grad=True)
        their = functional.cross_entropy(leaf, torch.tensor(labels), reduction="sum")
        their.backward()
        outcomes.append((their.item(), leaf.grad.numpy()))
    return [[error(one[0], value) for one in outcomes], [error(one[1], exact.backward()) for one in outcomes], []]


# -------------------------------------------------------------------------------------------------------- optimizers

SIZE, STEPS, RATE = 10_000, 10, 0.01
IN_TORCH_OPTIM = {
    "sgd": ("SGD", {}),
    "momentum": ("SGD", {"momentum": 0.9}),
    "nesterov": ("SGD", {"momentum": 0.9, "nesterov": True}),
    "adagrad": ("Adagrad", {}),
    "rmsprop": ("RMSprop", {}),
    "adam": ("Adam", {}),
    "adamw": ("AdamW", {"weight_decay": 0.0}),
}


def moved_by(name, kernels, dtype):
    """Return how some steps change the parameters, which begin at 0."""
    rule = None if kernels is None else kernels.optimizer_rule(name)
    optimizer = OPTIMIZERS[name](SIZE, dtype=dtype, fused=rule)
    w = np.zeros(SIZE, dtype)
    for step in range(1, STEPS + 1):
        optimizer.update(w, normal((SIZE,), f"g{step}").astype(dtype), RATE, step)
    return w


def moved_by_pytorch(name):
    kind, settings = IN_TORCH_OPTIM[name]
    w = torch.zeros(SIZE, requires_grad=True)
    optimizer = getattr(torch.optim, kind)([w], lr=RATE, **settings)
    for step in range(1, STEPS + 1):
        w.grad = torch.tensor(normal((SIZE,), f"g{step}"))
        optimizer.step()
    return w.detach().numpy()


def errors_of_optimizer(name):
    exact = moved_by(name, None, np.float64)
    found = [moved_by(name, kernels, np.float32) for kernels in FORMS]
    return [[error(one, exact) for one in [*found, *([] if torch is None else [moved_by_pytorch(name)])]], [], []]


def errors_of_norm():
    x = normal((1_000_000,), "norm")
    found = [math.sqrt(float(np.vdot(x, x))), COMPILED.norm(x)]
    if torch is not None:
        found.append(torch.linalg.vector_norm(torch.tensor(x)).item())
    return [[error(one, np.linalg.norm(x.astype(np.float64))) for one in found], [], []]


# ---------------------------------------------------------------------------------------------------------- networks


def relu_decisions(network):
    """Return for each ReLU of a ResNet which elements passed it in the latest forward pass."""
    if network.stack.kernels.name != "compiled":
        return [layer.y.ravel() > 0 for layer in network.every_layer() if isinstance(layer, ReLU)]
    return list(_compiled_decisions(network.stack))


def _compiled_decisions(stack):
    for *_, fused in stack.segments:
        if isinstance(fused, CompiledResidual):
            for inner in fused.stacks:
                yield from _compiled_decisions(inner)
        elif isinstance(fused, CompiledBatchNorm) and fused.relu:
            yield np.unpackbits(fused.bits.view(np.uint8), bitorder="little")[: fused.x.size].astype(bool)


def force_decisions(network, decisions):
    """Make each ReLU of a network in the plain form pass exactly these elements."""
    for layer, passed in zip((one for one in network.every_layer() if type(one) is ReLU), decisions, strict=True):

        def only_those(x, passed=passed, **_):
            return np.where(passed.reshape(x.shape), x, 0)

        layer.forward = layer.backward = only_those


def gradient_of(network, x, labels):
    loss = SoftmaxCrossEntropy()
    loss.forward(network.forward(x.astype(network.dtype), training=True, key=KEY), labels)
    network.backward(loss.backward())
    return np.concatenate([view.ravel() for _, view in network.named_gradients()]).astype(np.float64)


def resnet(dtype, kernels, shape):
    network = build_model("resnet20", shape, 10, dtype=np.float32)
    network.initialize(Key(0))
    found = build_model("resnet20", shape, 10, dtype=dtype)
    found.use(kernels)
    for (_, view), (_, initial) in zip(found.named_parameters(), network.named_parameters(), strict=True):
        view[...] = initial
    return found


def errors_of_resnet(kernels, seed, samples=64, shape=(28, 28, 1)):
    """Return the error of the gradient of ResNet-20; the number of ReLU decisions that differ; the error without them.

    The last one compares with the float64 network whose ReLUs pass the same elements.
    """
    random = np.random.default_rng(seed)
    x, labels = random.standard_normal((samples, *shape)).astype(np.float32), random.integers(0, 10, samples)
    exact, network = resnet(np.float64, PLAIN, shape), resnet(np.float32, kernels, shape)
    expected, actual = gradient_of(exact, x, labels), gradient_of(network, x, labels)
    decisions = relu_decisions(network)
    differing = sum(int((one != other).sum()) for one, other in zip(decisions, relu_decisions(exact), strict=True))
    force_decisions(exact, decisions)
    return error(actual, expected), differing, error(actual, gradient_of(exact, x, labels))


# ------------------------------------------------------------------------------------------------------------ tables


def row(name, errors):
    """Return a line of the table: for each part, the errors of all forms in units of 1e-7."""
    return "| " + " | ".join([name, *(" / ".join(f"{one / UNIT:.1f}" for one in part) for part in errors)]) + " |"


def main():
    """Print all tables."""
    print("PyTorch is not installed" if torch is None else f"PyTorch {torch.__version__}", flush=True)
    print(f"| {' / '.join(FORMS_SHOWN)} | forward | input gradient | gradients of parameters |")
    print("|---|---|---|---|")
    for name, (make, shape, mean) in LAYERS.items():
        print(row(name, errors_of_layer(make, shape, mean)), flush=True)
    print(row("softmax and cross-entropy", errors_of_loss()))
    for name in OPTIMIZERS:
        print(row(f"{name}, {STEPS} steps", errors_of_optimizer(name)))
    print(row("norm of 1,000,000 numbers", errors_of_norm()), flush=True)
    print("\n| gradient of ResNet-20, 64 samples | error | ReLU decisions that differ | error without them |")
    print("|---|---|---|---|")
    for seed in (1, 2):
        for kernels in FORMS:
            found, differing, without = errors_of_resnet(kernels, seed)
            print(f"| batch {seed}, {kernels.name} | {found:.1e} | {differing} | {without:.1e} |", flush=True)


if __name__ == "__main__":
    main()
