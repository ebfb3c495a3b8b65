"""Gradient check of TwoLayerNet: backpropagation compared with central differences (sections 5.5 to 5.7.3).

    python examples/chapter_5_gradient_check.py --dataset mnist --data-dir FOLDER

Three samples, float64. The check moves each weight up and down a little, and computes the loss twice. That is thousands
of times the work of one backward pass, so it is useful as a check only.
"""

import time

import chapter
import numpy as np

from distdl import nn


def two_layer_net(input_shape):
    """Return the network of section 5.7.2, with ReLU."""
    initializer = nn.Normal(0.01)
    layers = [nn.Flatten(), nn.Affine(50, initializer), nn.ReLU(), nn.Affine(10, initializer)]
    return nn.Sequential(layers, input_shape, dtype=np.float64)


def numerical_gradient(loss, parameter, h=1e-4):
    """Return (loss(w + h) - loss(w - h)) / 2h for each element w of a parameter, and restore the parameter."""
    gradient = np.empty_like(parameter)
    for i, kept in enumerate(parameter.flat):
        parameter.flat[i] = kept + h
        above = loss()
        parameter.flat[i] = kept - h
        gradient.flat[i] = (above - loss()) / (2 * h)
        parameter.flat[i] = kept
    return gradient


def main(options):
    """Compare both gradients of every parameter, and draw one over the other."""
    data = chapter.pixels(options)
    images, labels = data.images[:3].astype(np.float64), data.labels[:3]
    network, objective = two_layer_net(images.shape[1:]), nn.SoftmaxCrossEntropy()
    network.initialize(options.key)

    def loss():
        return objective.forward(network.forward(images), labels) / len(labels)

    start = time.perf_counter()
    loss()
    network.backward(objective.backward())
    backward = {name: gradient / len(labels) for name, gradient in network.named_gradients()}
    middle = time.perf_counter()
    numerical = {name: numerical_gradient(loss, parameter) for name, parameter in network.named_parameters()}
    seconds = time.perf_counter() - middle
    options.print(f"backpropagation {middle - start:.4f} s, numerical differentiation {seconds:.1f} s")

    figure, axes = chapter.axes(1, 4)
    for ax, (name, gradient) in zip(axes, backward.items(), strict=True):
        ax.plot(gradient.ravel(), numerical[name].ravel(), ".")
        ax.set(title=name, xlabel="backpropagation")
    axes[0].set_ylabel("numerical")
    chapter.save(figure, options)
    differences = {name: np.abs(gradient - numerical[name]).mean() for name, gradient in backward.items()}
    options.print(", ".join(f"{name} {difference:.1e}" for name, difference in differences.items()))
    options.print(f"largest mean difference: {max(differences.values()):.1e} (the book: 2e-13 to 1e-10)")


if __name__ == "__main__":
    chapter.run(main, __doc__, has_data=True)
