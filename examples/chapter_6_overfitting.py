"""Overfitting on 300 samples, and the effects of weight decay and Dropout (sections 6.4.1 to 6.4.3).

    python examples/chapter_6_overfitting.py
    mpirun -n 2 python examples/chapter_6_overfitting.py --dataset mnist --data-dir FOLDER

Six hidden layers of 100 with ReLU, SGD with learning rate 0.01, batches of 100: 201 epochs with weight decay (λ = 0.1),
301 with Dropout, and 301 with neither.
"""

import chapter

from distdl import nn
from distdl.optim import SGD

CASES = {"neither": {}, "weight decay 0.1": {"weight_decay": 0.1}, "Dropout 0.2": {"dropout": 0.2}}
EPOCHS = {"neither": 301, "weight decay 0.1": 201, "Dropout 0.2": 301}


def curves(options, data, epochs, *, weight_decay=0.0, dropout=0.0):
    """Return the accuracy on the 300 samples and on the test part after epochs 1, 6, 11 and so on."""
    network = chapter.multi_layer_net(data, [100] * 6, nn.He(), dropout=dropout)
    training = chapter.Training(options, network, SGD, 0.01, micro_batch_size=50, weight_decay=weight_decay)
    found = []
    for step, (images, labels) in enumerate(chapter.batches(data, 100, epochs, options.key), start=1):
        training.step(images, labels)
        epoch, batch = divmod(step, 3)
        if batch == 0 and epoch % 5 == 1:
            on_training = chapter.accuracy(network, data.images, data.labels)
            found.append((on_training, chapter.accuracy(network, data.test_images, data.test_labels)))
    return found


def main(options):
    """Draw both curves of each case, and print the final accuracies."""
    data = chapter.pixels(options)
    data.images, data.labels = data.images[:300], data.labels[:300]
    figure, axes = chapter.axes(1, 3, sharey=True)
    ends = {}
    for ax, (name, settings) in zip(axes, CASES.items(), strict=True):
        found = curves(options, data, 3 if options.quick else EPOCHS[name], **settings)
        ends[name] = found[-1]
        epochs = range(1, 5 * len(found), 5)
        ax.plot(epochs, [train for train, _ in found], label="the 300 samples")
        ax.plot(epochs, [test for _, test in found], "--", label="test")
        ax.set(title=name, xlabel="epoch", ylim=(0, 1.02))
        if name == "neither" and not options.quick:
            options.print("neither, after 201 epochs: train {:.4f}, test {:.4f}".format(*found[40]))
    axes[0].legend()
    chapter.save(figure, options)
    reported = ("train about 1.0", "train below 1.0, gap smaller", "gap smaller")
    for (name, (train, test)), book in zip(ends.items(), reported, strict=True):
        options.print(f"{name}: train {train:.4f}, test {test:.4f}, gap {train - test:.4f} (the book: {book})")


if __name__ == "__main__":
    chapter.run(main, __doc__, has_data=True)
