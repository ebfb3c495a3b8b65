"""Every example of a chapter runs with --quick, writes its figure, and ends with the book's result."""

import ast
import importlib.util
import json
import math
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from distdl.data import sources, split
from distdl.inference.load import load
from distdl.inference.score import evaluate
from distdl.job.launched_by import read_launch
from distdl.nn import build_model, numerical_gradient
from distdl.rng import Key

REPOSITORY = Path(__file__).parents[2]
EXAMPLES = REPOSITORY / "examples"
#: All examples, so that a new one is checked too.
NAMES = sorted(path.stem for pattern in ("chapter_*.py", "ng_*.py") for path in EXAMPLES.glob(pattern))
SECONDS = 120
PNG = b"\x89PNG\r\n\x1a\n"

pytestmark = [
    pytest.mark.skipif(read_launch().by is not None, reason="already under a launcher"),
    pytest.mark.skipif(
        importlib.util.find_spec("matplotlib") is None,
        reason="the figures need matplotlib: pip install 'distdl-mpi[plots]'",
    ),
]


@pytest.fixture(scope="module")
def started(run_program):
    """Run an example in a folder."""
    env = dict(os.environ)  # a copy, because pytest changes its own in every test, while threads start programs

    def start(name, folder, *arguments):
        return run_program([sys.executable, EXAMPLES / f"{name}.py", *arguments], env=env, cwd=folder, timeout=SECONDS)

    return start


@pytest.fixture(scope="module")
def run(side_by_side, started, tmp_path_factory):
    """Run an example with --quick in its own folder, once; return its output and the file of its figure."""

    def start(name):
        folder = tmp_path_factory.mktemp(name)
        return started(name, folder, "--quick"), folder / "runs" / f"{name}.png"

    finished = side_by_side(test_the_example_writes_a_figure_and_ends_with_the_book_s_result, start)

    def run(name):
        done, picture = finished(name=name)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        return done.stdout, picture

    return run


def module(name, monkeypatch):
    """Return the example as a module, to test its functions."""
    monkeypatch.syspath_prepend(EXAMPLES)
    return __import__(name)


def numbers(text):
    return [float(number) for number in re.findall(r"(?<![\w.])-?\d+(?:\.\d+)?(?:e[+-]?\d+)?", text)]


def rest_of_line(stdout, start):
    """Return the rest of the line with this start, up to the book's result."""
    [line] = [line for line in stdout.splitlines() if line.startswith(start)]
    return line.removeprefix(start).split("(the book")[0]


@pytest.mark.parametrize("name", NAMES)
def test_the_example_is_one_page(name):
    assert len((EXAMPLES / f"{name}.py").read_text(encoding="utf-8").splitlines()) < 120


@pytest.mark.parametrize("name", NAMES)
def test_the_example_writes_a_figure_and_ends_with_the_book_s_result(run, name):
    stdout, picture = run(name)
    content = picture.read_bytes()
    assert content.startswith(PNG)
    width, height = int.from_bytes(content[16:20], "big"), int.from_bytes(content[20:24], "big")
    assert min(width, height) >= 150
    assert len(content) > 5000
    last = stdout.splitlines()[-1]
    assert "the book" in last or "the course" in last or "paths that end" in last
    assert f"figure: {Path('runs', name)}.png" in stdout.splitlines()


@pytest.mark.parametrize("name", NAMES)
def test_the_docstring_names_the_command_and_the_section(name):
    text = ast.get_docstring(ast.parse((EXAMPLES / f"{name}.py").read_text(encoding="utf-8")))
    assert re.search(r"\((sections? \d\.\d|Ng, week \d)", text.splitlines()[0])
    assert f"python examples/{name}.py" in text


# ------------------------------------------------------------------------------------------ the book's exact results


def test_the_gates_have_the_truth_tables(run):
    stdout, _ = run("chapter_2_gates")
    assert [line.split() for line in stdout.splitlines()[:5]] == [
        ["x1", "x2", "AND", "NAND", "OR", "XOR"],
        ["0", "0", "0", "1", "0", "0"],
        ["1", "0", "0", "1", "1", "1"],
        ["0", "1", "0", "1", "1", "1"],
        ["1", "1", "1", "0", "1", "0"],
    ]


def test_the_activations_have_the_known_values_and_derivatives(run):
    stdout, _ = run("chapter_3_activations")
    assert "step of -1, 0, 1, 2: [0, 0, 1, 1]" in stdout
    s, t = 1 / (1 + np.exp(-1)), np.tanh(1)
    expected = {
        "sigmoid": [1 - s, 0.5, s, s * (1 - s), 0.25, s * (1 - s)],
        "ReLU": [0, 0, 1, 0, 0, 1],
        "tanh": [-t, 0, t, 1 - t**2, 1, 1 - t**2],
        "leaky ReLU": [-0.01, 0, 1, 0.01, 0.01, 1],
    }
    for name, values in expected.items():
        assert numbers(rest_of_line(stdout, f"{name} of -1, 0, 1: ")) == pytest.approx(values, abs=1e-4)
    assert numbers(rest_of_line(stdout, "it sums to ")) == [1]


def test_the_three_layer_network_has_the_numbers_of_the_book(run):
    stdout, _ = run("chapter_3_network")
    assert numbers(rest_of_line(stdout, "A1 = ")) == [0.3, 0.7, 1.1]
    assert numbers(rest_of_line(stdout, "Z1 = ")) == [0.57444252, 0.66818777, 0.75026011]
    assert numbers(rest_of_line(stdout, "the library's network differs by "))[0] < 1e-12


def test_inference_gives_the_same_predictions_one_by_one_and_in_batches(run):
    stdout, _ = run("chapter_3_inference")
    assert "predictions that differ: 0" in stdout
    assert numbers(rest_of_line(stdout, "accuracy: "))[0] > 0.8


def test_the_losses_are_those_of_the_book_in_each_form(run):
    stdout, _ = run("chapter_4_losses")
    assert numbers(rest_of_line(stdout, "output 2: ")) == [0.0975, 0.5108]
    assert numbers(rest_of_line(stdout, "output 7: ")) == [0.5975, 2.3026]
    one_hot, integers = numbers(rest_of_line(stdout, "a batch of both, "))
    assert one_hot == integers == pytest.approx((0.5108 + 2.3026) / 2, abs=1e-4)
    assert numbers(rest_of_line(stdout, "the library's loss")) == pytest.approx([one_hot], abs=2e-6)


def test_descent_ends_at_the_book_s_point(run):
    stdout, _ = run("chapter_4_gradients")
    assert numbers(rest_of_line(stdout, "gradient at (3, 4): ")) == [6, 8]
    assert numbers(rest_of_line(stdout, "descent from (-3, 4) ends at ")) == [-6.1e-10, 8.1e-10]
    diverged, stayed = rest_of_line(stdout, "learning rate 10 diverges to ").split("1e-10 stays at")
    assert max(map(abs, numbers(diverged))) > 1e12
    assert numbers(stayed) == pytest.approx([-3, 4], abs=1e-6)
    assert numbers(rest_of_line(stdout, "derivative of 0.01 x² + 0.1 x at 5 and 10: "))[:2] == [0.2, 0.3]


def test_the_gradient_of_4_4_is_that_of_the_library(monkeypatch):
    example = module("chapter_4_gradients", monkeypatch)
    x = np.array([[0.3, -1.2], [2.0, 0.5]])
    ours = example.numerical_gradient(lambda x: np.sum(np.sin(x) * x), x)
    assert ours == pytest.approx(numerical_gradient(lambda: float(np.sum(np.sin(x) * x)), x), abs=1e-7)
    assert ours == pytest.approx(np.cos(x) * x + np.sin(x), abs=1e-7)


def test_two_epochs_of_the_two_layer_net_are_a_training_with_a_receipt(run):
    stdout, picture = run("chapter_4_two_layer_net")
    assert re.search("^weights sha256: [0-9a-f]{64}$", stdout, re.MULTILINE)
    assert "test accuracy after 26 steps" in stdout
    assert picture.with_name("chapter_4_two_layer_net-1").is_dir()


def test_apples_and_oranges_cost_what_they_cost_in_the_book(run, monkeypatch):
    stdout, _ = run("chapter_5_graph")
    assert "2 apples: 220 (" in stdout
    assert "and 3 oranges: 715 (" in stdout
    assert numbers(rest_of_line(stdout, "derivatives by price, count and tax: ")) == [2.2, 110, 200]
    example = module("chapter_5_graph", monkeypatch)
    given = {"apple": 100.0, "apple_count": 2.0, "orange": 150.0, "orange_count": 3.0, "tax": 1.1}
    lines = example.apples_and_oranges(**given)
    names = {"apple": "apple", "apple_count": "apples", "orange": "orange", "orange_count": "oranges", "tax": "tax"}
    for argument, line in names.items():
        up, down = (
            example.apples_and_oranges(**given | {argument: given[argument] + h})["total"][0] for h in (1e-3, -1e-3)
        )
        assert lines[line][1] == pytest.approx((up - down) / 2e-3)


def test_the_gradient_of_softmax_with_loss_is_y_minus_t(run, monkeypatch):
    stdout, _ = run("chapter_5_softmax_with_loss")
    assert numbers(rest_of_line(stdout, "the library's loss and gradient differ by "))[0] < 1e-12
    example, a, t = module("chapter_5_softmax_with_loss", monkeypatch), np.array([1.0, -2.0, 0.5, 3.0]), np.eye(4)[2]
    y, loss, d_a = example.forward_and_backward(a, t)
    assert d_a == pytest.approx(y - t)
    assert loss == pytest.approx(-np.log(np.exp(0.5) / np.exp(a).sum()))


def test_backpropagation_is_within_1e_7_of_central_differences(run):
    stdout, _ = run("chapter_5_gradient_check")
    assert 0 < numbers(rest_of_line(stdout, "largest mean difference: "))[0] < 1e-7


def test_sgd_and_momentum_follow_their_formulas(run):
    """SGD multiplies x by 1 - η/10 and y by 1 - 2η in each step. Momentum is a recurrence of two numbers."""
    stdout, _ = run("chapter_6_paths")
    assert numbers(rest_of_line(stdout, "SGD ends at "))[:2] == pytest.approx([-7 * 0.905**30, 2 * 0.9**30], abs=1e-4)
    place, velocity = np.array([-7.0, 2.0]), np.zeros(2)
    for _ in range(30):
        velocity = 0.9 * velocity - 0.1 * place * [0.1, 2]
        place = place + velocity
    assert numbers(rest_of_line(stdout, "Momentum ends at "))[:2] == pytest.approx(place, abs=1e-4)
    assert "paths that end below a twentieth of the start: 6" in stdout


def test_convolution_pooling_and_im2col_give_the_numbers_of_the_book(run):
    stdout, _ = run("chapter_7_convolution")
    compared = re.findall(r"^.*?: (.*) \(the book: (.*)\)$", stdout, re.MULTILINE)
    assert len(compared) == 6
    for ours, book in compared:
        assert numbers(ours) == numbers(book)
        assert len(numbers(book)) >= 2


def test_simple_convnet_ends_with_the_accuracies_of_its_run(run):
    stdout, picture = run("chapter_7_simple_convnet")
    folder = picture.with_name("chapter_7_simple_convnet-1")
    train, test = numbers(rest_of_line(stdout, "accuracy after 2 epochs: "))
    *_, epoch, last = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    assert (train, test) == (round(epoch["train_accuracy"], 4), round(last["test_accuracy"], 4))
    assert 'optimizer = "adam"' in (folder / "config.toml").read_text()


def test_stacked_small_filters_see_as_much_with_fewer_weights(run):
    stdout, _ = run("chapter_8_small_filters")
    assert re.findall(r"sees (\d+)x(\d+) pixels, (\d+) weights", stdout) == [
        ("5", "5", "25"),
        ("5", "5", "18"),
        ("7", "7", "49"),
        ("7", "7", "27"),
    ]


def test_the_share_of_the_convolutions_is_that_of_all_layers_of_alexnet(run, monkeypatch):
    stdout, _ = run("chapter_8_time_by_layer")
    names = [name for name, *_ in build_model("alexnet", (28, 28, 1), 10).parts(1)]
    rows = dict(re.findall(r"^(\w+) +(forward +[0-9.]+ ms, backward +[0-9.]+ ms)$", stdout, re.MULTILINE))
    assert list(rows) == names
    told = numbers(rest_of_line(stdout, "convolutions, of the time of AlexNet for 28x28: "))
    for direction, percent in enumerate(told):
        all_of_it = {name: numbers(row)[direction] for name, row in rows.items()}
        convolutions = sum(all_of_it[f"conv2d_{number}"] for number in range(1, 6))
        assert 0 < convolutions < sum(all_of_it.values())
        assert percent == pytest.approx(100 * convolutions / sum(all_of_it.values()), abs=1)
    example = module("chapter_8_time_by_layer", monkeypatch)
    assert example.share_of_convolutions({"conv2d_1": 2.0, "relu_1": 1.0, "conv2d_2": 4.0, "affine_1": 1.0}) == 0.75


@pytest.mark.parametrize(
    ("name", "second"),
    [("chapter_7_filters", "maps"), ("chapter_8_mistakes", "confusion")],
    ids=["filters", "mistakes"],
)
def test_a_trained_network_is_drawn_in_two_figures_and_no_run_folder_remains(run, name, second):
    stdout, picture = run(name)
    other = picture.with_stem(f"{name}_{second}")
    assert sorted(picture.parent.parent.rglob("*.*")) == [picture, other]
    assert other.read_bytes().startswith(PNG)
    [trained] = re.findall(r"^test accuracy: ([0-9.]+)%$", stdout, re.MULTILINE)
    *_, last = stdout.splitlines()
    [ours] = re.findall(r"^test accuracy: (0\.\d+).*the book's.*0\.9", last)
    assert f"{float(ours):.2%}" == f"{trained}%"


def test_the_printed_best_trial_is_that_of_the_summary(run):
    stdout, picture = run("chapter_6_hyperparameters")
    [folder] = picture.parent.glob("*-search")
    best = json.loads((folder / "summary.json").read_text())["best"]
    *_, last = stdout.splitlines()
    assert last.startswith(
        f"best: validation {best['validation_accuracy']:.4f}, test {best['test_accuracy']:.4f} with lr"
    )
    assert last.endswith("(the book, on MNIST: .83 with lr .0092 and weight decay 3.86e-07)")
    samples = json.loads((folder / "search.json").read_text())
    assert samples["ranges"] == ["lr=1e-06:0.01:log", "weight-decay=1e-08:0.0001:log"]


def test_only_the_convolution_is_transferred_and_one_of_three_freezes_it(run):
    stdout, picture = run("chapter_8_transfer")
    assert stdout.count("begins with 2 of 6 tensors") == 2
    assert stdout.count("frozen: 780 of 7,340 parameters (--freeze conv2d_1)") == 1
    tested = re.findall(r"^test accuracy: ([0-9.]+)%", stdout, re.MULTILINE)
    told = re.findall(r": test accuracy (0\.\d+)$", stdout, re.MULTILINE)
    assert [f"{float(accuracy):.2%}" for accuracy in told] == [f"{accuracy}%" for accuracy in tested]
    assert len(told) == 4
    assert [*picture.parent.parent.rglob("*.*")] == [picture], "no run folder remains"


def test_the_ensembles_are_of_the_networks_that_were_trained(run):
    stdout, picture = run("chapter_8_ensemble")
    trained = re.findall(r"^test accuracy: ([0-9.]+)%$", stdout, re.MULTILINE)
    lines = [numbers(rest_of_line(stdout, f"{name}: ")) for name in ("constant rate", "decayed rate")]
    assert [f"{accuracy:.2%}" for *alone, _ in lines for accuracy in alone] == [f"{accuracy}%" for accuracy in trained]
    gains = [ensemble - np.mean(alone) for *alone, ensemble in lines]
    decay = np.mean(lines[1][:-1]) - np.mean(lines[0][:-1])
    *told, together = map(float, re.findall(r"[+-]?0\.\d{4}", rest_of_line(stdout, "test accuracy: ensembles gain ")))
    assert told == pytest.approx([*gains, decay], abs=2e-4)
    assert together == lines[1][-1]
    assert [*picture.parent.parent.rglob("*.*")] == [picture]


@pytest.mark.parametrize("test_start", [None, 30])
def test_an_ensemble_is_scored_on_images_that_no_member_was_trained_on(monkeypatch, test_start):
    example, rows = module("chapter_8_ensemble", monkeypatch), np.arange(40)
    images = rows.astype(np.float32).reshape(-1, 1, 1, 1)
    data = example.with_test_part(sources.Dataset("rows", images, rows % 10, 10, test_start), Key(0)).checked()
    assert sorted(data.images.ravel()) == rows.tolist()
    assert data.labels.tolist() == (data.images.ravel() % 10).tolist()
    tests = [split.split(data.labels, data.test_start, Key(seed)).test.tolist() for seed in range(3)]
    assert tests == [list(range(20 if test_start is None else 30, 40))] * 3


def test_each_transform_changes_some_of_the_pixels_and_draws_differ(run):
    from matplotlib.image import imread

    stdout, path = run("chapter_8_augmentation")
    changed = dict(re.findall(r"^(\S+): (\d+)% of the pixels change$", stdout, re.MULTILINE))
    texts = ["rotate=20", "scale=0.3", "flip", "brightness=0.5", "shift=1", "rotate=10,scale=0.1,crop=1", "crop=1"]
    assert list(changed) == texts
    assert all(10 < int(share) < 95 for share in changed.values())
    picture = imread(path)
    height, width = picture.shape[:2]
    rows = np.split(picture[: height - height % 7], 7)
    columns = [np.split(row[:, : width - width % 9], 9, axis=1) for row in rows]
    drawn = [{column.tobytes() for column in row[1:]} for row in columns]
    assert [len(row) for row, text in zip(drawn, texts, strict=True) if text not in {"flip", "crop=1"}] == [8] * 5


def test_augmentation_changes_the_accuracy_of_a_training_on_few_images(run):
    stdout, _ = run("chapter_8_augmentation")
    plain, augmented = re.findall(r"^test accuracy: ([0-9.]+)%$", stdout, re.MULTILINE)
    assert plain != augmented
    assert min(float(plain), float(augmented)) > 50
    told = numbers(rest_of_line(stdout, "test accuracy, trained on 300 images: "))
    assert [f"{accuracy:.2%}" for accuracy in told[:2]] == [f"{plain}%", f"{augmented}%"]


def test_the_drawn_segmentation_is_that_of_the_test_score(run, monkeypatch, communicator):
    _, picture = run("chapter_8_segmentation")
    example = module("chapter_8_segmentation", monkeypatch)
    data = example.with_labels_per_pixel(sources.load("digits", None))
    folder = picture.with_name("chapter_8_segmentation-1")
    [trained] = load([folder], communicator, build_network=example.fully_convolutional, dataset=data)
    found = evaluate([trained], "test", communicator)
    images, labels, named = example.first_of_test_part(trained, 6)
    assert np.array_equal(images, data.images[found.rows[:6], ..., 0])
    assert np.array_equal(labels, found.labels[:6])
    assert np.array_equal(named, found.predictions[:6])
    assert len(np.unique(named)) > 2, "the network predicts more than the background"


def test_the_optimizers_have_the_order_of_the_book(run):
    stdout, _ = run("chapter_6_optimizers")
    order = rest_of_line(stdout, "by mean loss over all steps: ").split()
    assert order[0] == "SGD"
    assert order[-1] == "AdaGrad"


def test_relu_with_std_0_01_fades_as_in_the_book(run):
    stdout, _ = run("chapter_6_activations")
    means = numbers(rest_of_line(stdout, "layer means, ReLU, std 0.01: "))
    assert means == pytest.approx([0.0396, 0.0029, 1.97e-4, 1.32e-5, 9.46e-7], rel=0.15)


def test_units_that_start_at_zero_stay_equal(run):
    stdout, _ = run("chapter_6_initial_values")
    alike, different = (
        numbers(rest_of_line(stdout, f"hidden units from {name}: weights to ")) for name in ("zeros", "Xavier")
    )
    assert alike[0] > 1e-3  # the units have learned
    assert alike[1] < 1e-4 * alike[0]
    assert different[1] > different[0]
    ends = dict(re.findall(r"(zeros|std 0.01|Xavier|He) (\d\.\d+)", rest_of_line(stdout, "loss at the end: ")))
    assert min(float(ends["zeros"]), float(ends["std 0.01"])) > 2.25
    assert float(ends["He"]) < 2.2


def test_batch_normalization_learns_at_more_scales(run):
    stdout, _ = run("chapter_6_batch_norm")
    assert len(re.findall("^std .* with, .* without$", stdout, re.MULTILINE)) == 2
    with_it, without = numbers(rest_of_line(stdout, "scales that do not learn: "))
    assert with_it < without


def test_weight_decay_and_dropout_reduce_overfitting(run, monkeypatch, communicator):
    stdout, _ = run("chapter_6_overfitting")
    for name in ("neither", "weight decay 0.1", "Dropout 0.2"):
        train, test, gap = numbers(rest_of_line(stdout, f"{name}: "))
        assert gap == pytest.approx(train - test, abs=1e-3)
    example = module("chapter_6_overfitting", monkeypatch)
    options = SimpleNamespace(communicator=communicator, key=Key(0), dataset="digits", data_dir=None, quick=True)
    data = example.chapter.pixels(options)
    data.images, data.labels = data.images[:300], data.labels[:300]
    ends = {
        name: example.curves(options, data, 40, **settings)[-1]
        for name, settings in {"neither": {}, "decay": {"weight_decay": 10.0}, "dropout": {"dropout": 0.8}}.items()
    }
    assert ends["neither"][0] > 0.6
    assert ends["decay"][0] < 0.25  # the decay has removed the weights
    assert ends["dropout"][0] < ends["neither"][0] - 0.2


@pytest.mark.parametrize("name", ["ng_logistic_regression", "ng_shallow_network", "ng_deep_network"])
def test_sigmoid_keeps_small_probabilities_and_does_not_overflow(name, monkeypatch):
    z = np.array([-1000, -80, -30, -5, 0, 5, 30, 1000], np.float32)
    with np.errstate(over="raise", invalid="raise"):
        found = module(name, monkeypatch).sigmoid(z)
    assert found.dtype == np.float32
    exact = [1 / (1 + math.exp(-x)) if x > -700 else 0 for x in z.tolist()]
    assert found == pytest.approx(exact, rel=1e-6, abs=1e-44)


def test_the_vectorized_gradient_of_logistic_regression_is_that_of_the_loop_and_of_differences(run, monkeypatch):
    stdout, _ = run("ng_logistic_regression")
    assert numbers(rest_of_line(stdout, "they differ by "))[0] < 1e-6
    example = module("ng_logistic_regression", monkeypatch)
    w, X, Y = np.array([0.3, -0.2]), np.array([[1.0, -1, 2, 0.5], [0.2, 3, -1, 1]]), np.array([1.0, 0, 1, 1])
    _, dw, db = example.cost_and_gradient(w, 0.1, X, Y)
    assert dw == pytest.approx(numerical_gradient(lambda: example.cost_and_gradient(w, 0.1, X, Y)[0], w), abs=1e-5)
    above, below = (example.cost_and_gradient(w, 0.1 + h, X, Y)[0] for h in (1e-5, -1e-5))
    assert db == pytest.approx((above - below) / 2e-5, abs=1e-5)


def test_a_hidden_layer_separates_the_flower_and_a_line_does_not(run, monkeypatch):
    run("ng_shallow_network")
    example = module("ng_shallow_network", monkeypatch)
    x, y = example.flower(Key(0))
    right = {}
    for hidden in (0, 4):
        network = example.network_with(hidden)
        example.train(network, x, y, Key(0), 1500)
        right[hidden] = np.mean((network.forward(x)[:, 0] > 0) == y)
    assert right[0] < 0.65
    assert right[4] > 0.85


def test_the_gradients_of_the_deep_network_are_those_of_differences(run, monkeypatch):
    stdout, _ = run("ng_deep_network")
    assert "layer 1: W (20, 64), b (20, 1), Z and A (20, m)" in stdout
    example = module("ng_deep_network", monkeypatch)
    X, Y = Key(1).normal(15).reshape(3, 5), np.array([[1.0, 0, 1, 1, 0]])
    W, b = ([array + 0.1 for array in arrays] for arrays in example.initialize((3, 4, 2, 1), Key(0)))
    W, b = ([array.astype(np.float64) for array in arrays] for arrays in (W, b))

    def cost():
        A = example.forward(W, b, X)[-1]
        return float(-np.mean(Y * np.log(A) + (1 - Y) * np.log(1 - A)))

    dW, db = example.backward(W, b, example.forward(W, b, X), Y)
    for arrays, gradients in ((W, dW), (b, db)):
        for array, gradient in zip(arrays, gradients, strict=True):
            assert gradient == pytest.approx(numerical_gradient(cost, array), abs=1e-8)
    with pytest.raises(AssertionError, match=r"\(4, 1\) is not \(4, 5\)"):
        example.has_shape(np.zeros((4, 1)), 4, 5)


# ------------------------------------------------------------------------------------------------- any number of ranks


@pytest.fixture
def run_on_two_ranks(run_job, tmp_path):
    """Run an example with --quick on two ranks, and return its output."""
    from distdl.job.mpirun_command import mpirun_command

    def run(name):
        launch = mpirun_command(2, [sys.executable, str(EXAMPLES / f"{name}.py"), "--quick"])
        done = run_job(launch, timeout=SECONDS, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_two_ranks_print_the_same_results_as_one(run, run_on_two_ranks):
    """The example covers batch normalization, whose moments the ranks add up, and everything else in a step."""
    assert run_on_two_ranks("chapter_6_batch_norm") == run("chapter_6_batch_norm")[0]


def test_two_ranks_draw_and_train_with_the_same_changes_of_images(run, run_on_two_ranks):
    def of_no_rank(stdout):
        return re.findall(r"^(?:.*of the pixels change|weights sha256: .*|test accuracy.*)$", stdout, re.MULTILINE)

    alone = of_no_rank(run("chapter_8_augmentation")[0])
    assert len(alone) == 7 + 2 + 3
    assert of_no_rank(run_on_two_ranks("chapter_8_augmentation")) == alone


# -------------------------------------------------------------------------------------------------------- invalid input


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--out", "picture.jpg"], "--out picture.jpg: expected a file name that ends in .png"),
        (["--out", "file/picture.png"], "--out file/picture.png cannot be written"),
        (["--dataset", "mnits"], "unknown dataset 'mnits'"),
        (["--dataset", "mnist", "--data-dir", "nowhere"], "the data folder 'nowhere' cannot be read"),
    ],
)
def test_invalid_flags_end_in_one_line(started, arguments, words, tmp_path):
    (tmp_path / "file").touch()
    done = started("chapter_6_optimizers", tmp_path, *arguments)
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith("distdl: error: ")
    assert words in line
    assert done.stdout == ""


def test_invalid_flags_end_in_one_line_on_two_ranks_too(run_job, tmp_path):
    from distdl.job.mpirun_command import mpirun_command

    launch = mpirun_command(2, [sys.executable, str(EXAMPLES / "chapter_6_hyperparameters.py"), "--dataset", "mnits"])
    done = run_job(launch, timeout=SECONDS, cwd=tmp_path)
    assert done.returncode == 2
    assert (done.stdout + done.stderr).count("distdl: error: unknown dataset 'mnits'") == 1


def test_without_matplotlib_the_line_says_how_to_get_it(run_program, tmp_path):
    script = EXAMPLES / "chapter_2_gates.py"
    without = f"""
import runpy, sys
sys.modules["matplotlib"] = None
sys.path.insert(0, {str(EXAMPLES)!r})
sys.argv = [{str(script)!r}]
runpy.run_path({str(script)!r}, run_name="__main__")
"""
    done = run_program([sys.executable, "-c", without], cwd=tmp_path, timeout=SECONDS)
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert "pip install 'distdl-mpi[plots]'" in line
    assert list(tmp_path.iterdir()) == []
