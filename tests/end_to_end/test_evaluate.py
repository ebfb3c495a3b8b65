"""An evaluation has the same scores as the run itself, on any number of ranks, and never changes the run."""

import dataclasses
import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from bad_inputs import changes, mnist_files, picture, write_files
from small_runs import VERY_RAGGED, piece_of_digits, remove, small_config, worlds
from test_tasks import TASKS
from test_tasks import run as run_task

from distdl import cli
from distdl import evaluate as shown
from distdl.config import TrainConfig
from distdl.data.batch_order import micro_batch
from distdl.engine import kernels, train
from distdl.engine.storage import checkpoints
from distdl.errors import UserError
from distdl.inference import class_scores, evaluate_runs, fit, score_table
from distdl.inference.load import load
from distdl.inference.score import Score, evaluate, in_half_precision
from distdl.job.launched_by import read_launch
from distdl.nn import Affine, BatchNorm, Conv2d, Flatten, ReLU, Sequential, Tanh, build_model
from distdl.nn.kernels.choice import kernels_named
from distdl.parallel import OneProcess

alone = pytest.mark.skipif(read_launch().by is not None, reason="already under a launcher")
MODELS = {"convnet": "simple_convnet", "mlp": "mlp"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Return finished runs on the digits: two networks with different micro-batch sizes, and another seed."""
    folder = tmp_path_factory.mktemp("runs")
    common = {"epochs": 3, "batch_size": 64}
    for name, settings in {
        "convnet": {"model": "simple_convnet", "micro_batch_size": 16, "lr": 0.003},
        "mlp": {"model": "mlp", "micro_batch_size": 7},
        "seed 1": {"model": "mlp", "seed": 1, "epochs": 1},
    }.items():
        train(TrainConfig(**{**common, **settings}, run_dir=folder / name), OneProcess())
    return folder


@pytest.fixture(scope="module")
def mnist_runs(tmp_path_factory):
    """Return runs on a tiny dataset with its own test part, in ``data``; ``other`` has other images."""
    folder = tmp_path_factory.mktemp("mnist")
    write_files(folder / "data", mnist_files())
    write_files(folder / "other", mnist_files(training=21))
    settings = {"dataset": "mnist", "data_dir": folder / "data", "model": "mlp", "epochs": 1}
    for seed in (0, 1):
        train(
            TrainConfig(**settings, seed=seed, batch_size=8, micro_batch_size=4, run_dir=folder / f"{seed}"),
            OneProcess(),
        )
    return folder


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


def records_of(folder, name):
    """Return the records in the metrics that have this value."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if name in record]


def command(arguments, folder, capsys, monkeypatch):
    """Run the command in this process; return its exit code and its output."""
    monkeypatch.chdir(folder)
    code = cli.run(shown.main, list(map(str, arguments)))
    return code, *capsys.readouterr()


def softmax(logits):
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def plain_logits(folder):
    """Return the logits of the test part and its labels, computed from the tensors of the last checkpoint."""
    checkpoint = checkpoints.newest_intact(folder / "checkpoints")[1]
    config = checkpoint.header["config"]
    [trained] = load([folder], OneProcess())
    network = build_model(config["model"], (8, 8, 1), 10)
    network.use(kernels_named(config["kernels"]))
    for name, view in network.named_parameters():
        view[...] = checkpoint.tensors[name]
    rows, size, logits = trained.data.parts.test, config["micro_batch_size"], []
    for index in range(-(-len(rows) // size)):
        chosen = micro_batch(rows, index, size)
        logits.append(network.forward(trained.data.normalization.apply(trained.data.images[chosen])).copy())
    return np.concatenate(logits).astype(np.float64), trained.data.labels[rows]


# ----------------------------------------------------------------------------------------------------------- one model


@alone
def test_a_model_from_user_code_runs_only_if_the_command_names_it(tmp_path, capsys, monkeypatch):
    file = tmp_path / "mine.py"
    file.write_text(
        "from pathlib import Path\n"
        "from distdl.nn import Affine, Flatten, Sequential\n"
        "Path(__file__).with_name('was run').touch()\n"
        "def model(shape, classes):\n"
        "    return Sequential([Flatten(), Affine(classes)], shape)\n"
    )
    name = f"{file}:model"
    summary = train(TrainConfig(model=name, epochs=1, run_dir=tmp_path / "run"), OneProcess())
    (tmp_path / "was run").unlink()
    assert command([str(tmp_path / "run")], tmp_path, capsys, monkeypatch)[0] == 2
    assert not (tmp_path / "was run").exists()
    with pytest.raises(UserError, match=r"if you trust that code, add --model .*mine\.py:model"):
        load([tmp_path / "run"], OneProcess())
    code, output, _ = command([str(tmp_path / "run"), "--model", name], tmp_path, capsys, monkeypatch)
    assert code == 0
    assert f"{summary.test_accuracy:.2%}" in output


@alone
@pytest.mark.parametrize("name", MODELS)
def test_the_test_score_is_bitwise_that_of_the_run(runs, name, tmp_path, capsys, monkeypatch):
    code, out, err = command([runs / name, "--json", "numbers.json"], tmp_path, capsys, monkeypatch)
    assert (code, err) == (0, "")
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    [member], [tested] = numbers["members"], records_of(runs / name, "test_accuracy")
    assert member["accuracy"] == summary_of(runs / name)["test_accuracy"] == tested["test_accuracy"]
    assert member["loss"] == tested["test_loss"]
    assert member["weights_sha256"] == summary_of(runs / name)["weights_sha256"]
    assert (member["model"], member["step"]) == (MODELS[name], summary_of(runs / name)["steps"])
    assert numbers["samples"] == 269
    assert out.splitlines()[-1] == f"test accuracy: {member['accuracy']:.2%} ({member['correct']} of 269)"


@alone
def test_the_validation_score_is_that_of_the_run_for_the_last_and_the_best_checkpoint(runs):
    epochs = records_of(runs / "convnet", "validation_accuracy")
    best = max(epochs, key=lambda record: record["validation_accuracy"])
    for which, record in ((False, epochs[-1]), (True, best)):
        [trained] = load([runs / "convnet"], OneProcess(), best=which)
        score = evaluate([trained], "validation", OneProcess()).ensemble
        assert trained.step == record["step"]
        assert (score.accuracy, score.loss) == (record["validation_accuracy"], record["validation_loss"])


@alone
def test_a_checkpoint_is_scored_by_itself(runs):
    epochs = records_of(runs / "convnet", "validation_accuracy")
    for record in epochs[-2:]:
        path = checkpoints.path_of_step(runs / "convnet" / "checkpoints", record["step"])
        score = evaluate(load([path], OneProcess()), "validation", OneProcess()).ensemble
        assert (score.accuracy, score.loss) == (record["validation_accuracy"], record["validation_loss"])


@alone
def test_scores_that_a_full_disk_refuses_are_an_error(runs):
    command = f"{sys.executable} -m distdl.evaluate {runs / 'mlp'} > /dev/full"
    done = subprocess.run(["bash", "-c", command], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "the scores cannot be printed: No space left on device" in done.stderr


@alone
def test_two_ranks_print_and_write_the_same_as_one_process(runs, tmp_path, run_on_ranks):
    flags = [str(runs / "convnet"), str(runs / "mlp"), "--half", "--confusion", "--json=numbers.json"]
    program = [sys.executable, "-m", "distdl.evaluate", *flags]
    said = []
    for ranks in (1, 2):
        folder = tmp_path / f"{ranks}"
        folder.mkdir()
        done = run_on_ranks(ranks, program, cwd=folder, timeout=60)
        assert done.returncode == 0, done.stderr
        said.append((done.stdout, (folder / "numbers.json").read_bytes()))
    assert said[0] == said[1]
    members = json.loads(said[1][1])["members"]
    assert [member["accuracy"] for member in members] == [summary_of(runs / name)["test_accuracy"] for name in MODELS]


@pytest.mark.mpi(min_size=2)
def test_ranks_that_build_different_networks_are_refused(communicator, shared_tmp_path):
    """The file of a model may differ between hosts. The sizes agree here, so no other check finds the difference."""
    dataset, folder = piece_of_digits(VERY_RAGGED), shared_tmp_path / "run"

    def network(shape, classes, between=ReLU):
        return Sequential([Flatten(), Affine(9), between(), Affine(classes)], shape)

    def with_another_on_rank_1(shape, classes):
        return network(shape, classes, Tanh if communicator.rank == 1 else ReLU)

    if communicator.rank == 0:
        train(small_config(folder), OneProcess(), dataset=dataset, build_network=network)
    communicator.barrier()
    with pytest.raises(UserError, match=r"network of rank 1 is not that of rank 0: give every host the same files"):
        load([folder], communicator, dataset=dataset, build_network=with_another_on_rank_1)
    load([folder], communicator, dataset=dataset, build_network=network)
    remove(communicator, shared_tmp_path)


@pytest.mark.mpi(min_size=2)
def test_any_number_of_ranks_gives_the_bits_of_one_process(communicator, shared_tmp_path):
    """The test part has 37 samples, so the last micro-batch is ragged, and some ranks have no sample."""
    dataset, folders = piece_of_digits(VERY_RAGGED), [shared_tmp_path / "a", shared_tmp_path / "b"]

    def scored(communicator):
        trained = load(folders, communicator, dataset=dataset)
        found = [evaluate(trained, "test", communicator), evaluate(in_half_precision(trained), "test", communicator)]
        return [
            [one.scores, one.ensemble, one.probabilities.tobytes(), one.predictions.tolist(), one.rows.tolist()]
            for one in found
        ]

    expected = None
    if communicator.rank == 0:
        summary = train(small_config(folders[0], model="simple_convnet"), OneProcess(), dataset=dataset)
        train(small_config(folders[1], model="mlp", micro_batch_size=16), OneProcess(), dataset=dataset)
        expected = scored(OneProcess())
        assert expected[0][0][0].accuracy == summary.test_accuracy
    communicator.barrier()
    for size, world in worlds(communicator, (1, 2, 3, 5, 8)):
        found = scored(world)
        given = world.allgather_json([str(one) for one in found])
        assert given == [given[0]] * size
        assert expected is None or found == expected
    remove(communicator, shared_tmp_path)


# ----------------------------------------------------------------------------------------------------------- ensembles


@alone
def test_an_ensemble_is_the_mean_of_the_softmax_of_its_members(runs):
    found = evaluate(load([runs / name for name in MODELS], OneProcess()), "test", OneProcess())
    members = [plain_logits(runs / name) for name in MODELS]
    labels = members[0][1]
    mean = sum(softmax(logits) for logits, _ in members) / 2
    assert np.allclose(found.probabilities, mean, rtol=1e-12, atol=0)
    assert found.predictions.tolist() == mean.argmax(axis=1).tolist()
    assert found.ensemble.correct == int((mean.argmax(axis=1) == labels).sum())
    assert np.isclose(found.ensemble.loss, -np.log(mean[np.arange(len(labels)), labels]).mean(), rtol=1e-12)
    for score, (logits, _) in zip(found.scores, members, strict=True):
        assert score.correct == int((logits.argmax(axis=1) == labels).sum())
    assert found.predictions.tolist() != members[0][0].argmax(axis=1).tolist()


@alone
def test_an_ensemble_of_one_member_equals_it_even_if_the_member_is_given_twice(runs):
    once = evaluate(load([runs / "mlp"], OneProcess()), "test", OneProcess())
    twice = evaluate(load([runs / "mlp"] * 2, OneProcess()), "test", OneProcess())
    assert once.ensemble == once.scores[0]
    assert twice.scores == once.scores * 2
    assert np.array_equal(twice.probabilities, once.probabilities)
    assert np.array_equal(twice.predictions, once.predictions)
    assert twice.ensemble.accuracy == once.ensemble.accuracy


@alone
def test_members_of_other_seeds_are_scored_together_if_the_dataset_has_its_own_test_part(mnist_runs):
    folders = [mnist_runs / "0", mnist_runs / "1"]
    trained = load(folders, OneProcess())
    found = evaluate(trained, "test", OneProcess())
    tested = [records_of(folder, "test_loss")[0] for folder in folders]
    assert [score.loss for score in found.scores] == [record["test_loss"] for record in tested]
    assert [score.accuracy for score in found.scores] == [record["test_accuracy"] for record in tested]
    assert not np.array_equal(trained[0].data.normalization.mean, trained[1].data.normalization.mean)
    with pytest.raises(UserError, match=r"validation part .*--seed 1.*--seed 0"):
        evaluate(trained, "validation", OneProcess())


@alone
def test_the_data_may_have_moved_to_another_folder(mnist_runs, tmp_path):
    shutil.copytree(mnist_runs / "data", tmp_path / "moved")
    shutil.copytree(mnist_runs / "0", tmp_path / "run")
    found = evaluate(load([tmp_path / "run"], OneProcess(), data_dir=tmp_path / "moved"), "test", OneProcess())
    assert found.ensemble.loss == records_of(mnist_runs / "0", "test_loss")[0]["test_loss"]


# -------------------------------------------------------------------------------------------------------- other tasks


NUMBERS = {"regression", "standardized regression"}


def with_batch_norm(shape, outputs):
    return Sequential([Conv2d(4, 3, padding=1), BatchNorm(), ReLU(), Flatten(), Affine(outputs)], shape)


def plain_mean(task, outputs, unit=1):
    """Return the mean of the predictions of the members, and its loss, by their definitions.

    `unit` is that of the errors of a regression.
    """
    labels, members = outputs[0][1], [logits for logits, _ in outputs]
    if task in NUMBERS:
        mean = sum(members) / len(members)
        return mean, (((mean - labels) / unit) ** 2).mean()
    if task == "logistic regression":
        positive = sum(1 / (1 + np.exp(-logits)) for logits in members) / len(members)
        mean = np.concatenate([1 - positive, positive], axis=1)
    else:
        each = [np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True) for logits in members]
        mean = sum(each) / len(members)
    return mean, -np.log(np.take_along_axis(mean, labels[..., np.newaxis], axis=-1)).mean()


@alone
@pytest.mark.parametrize("task", [*TASKS, "batch norm"])
def test_every_task_is_scored_as_in_its_run_and_as_an_ensemble(task, tmp_path):
    name = "classification" if task == "batch norm" else task
    dataset, build_network, settings = TASKS[name]
    build_network = with_batch_norm if task == "batch norm" else build_network
    folders = [tmp_path / "0", tmp_path / "1"]
    for seed, folder in enumerate(folders):
        config = small_config(folder, seed=seed, lr=0.01, micro_batch_size=4 + seed, **settings)
        train(config, OneProcess(), dataset=dataset, build_network=build_network)
    trained = load(folders, OneProcess(), dataset=dataset, build_network=build_network)
    found = evaluate(trained, "test", OneProcess())
    outputs = []
    for one, score, folder in zip(trained, found.scores, folders, strict=True):
        summary = summary_of(folder)
        assert (score.loss, score.accuracy) == (summary["test_loss"], summary["test_accuracy"])
        assert one.weights_sha256 == summary["weights_sha256"]
        rows = one.data.parts.test
        images = one.data.normalization.apply(one.data.images[rows])
        exact = one.network.forward(images).astype(np.float64)
        outputs.append((one.in_units_of_labels(exact), dataset.labels[rows]))
    deviation = trained[0].signature.target_deviation
    mean, loss = plain_mean(name, outputs, 1 if deviation is None else np.array(deviation))
    assert np.allclose(found.probabilities, mean, rtol=1e-4, atol=1e-6)
    assert np.isclose(found.ensemble.loss, loss, rtol=1e-5)
    if name in NUMBERS:
        assert found.ensemble.accuracy is None
        assert np.array_equal(found.predictions, found.probabilities)
    else:
        assert np.array_equal(found.predictions, found.probabilities.argmax(axis=-1))
        assert found.ensemble.accuracy == (found.predictions == outputs[0][1]).mean()
    half = evaluate(in_half_precision(trained), "test", OneProcess())
    assert 0 < abs(half.ensemble.loss - found.ensemble.loss) < 0.02 * abs(found.ensemble.loss)
    alone = evaluate(trained[:1], "test", OneProcess())
    assert alone.ensemble == found.scores[0]
    if name not in NUMBERS:
        assert int((alone.predictions == outputs[0][1]).sum()) == alone.ensemble.correct


@alone
def test_regression_is_scored_by_its_loss_and_has_no_confusion_matrix(tmp_path):
    dataset, build_network, _ = TASKS["regression"]
    run_task(OneProcess(), tmp_path / "run", "regression")
    trained = load([tmp_path / "run"], OneProcess(), dataset=dataset, build_network=build_network)
    found = evaluate(trained, "test", OneProcess())
    loss = summary_of(tmp_path / "run")["test_loss"]
    assert score_table.summary_line("test", found, None) == f"test loss: {loss:.6f}"
    assert score_table.score_table(trained, "test", found, None)[-1].endswith(f"–{loss:10.4f}")
    large = dataclasses.replace(found, scores=[Score(9073030.6755, 0, 0)])
    assert score_table.score_table(trained, "test", large, found)[-1].split()[-4:] == [
        "–",
        "9073030.6755",
        "–",
        f"{loss:.4f}",
    ]
    numbers = score_table.scores_json(trained, "test", found, found)
    assert numbers["ensemble"] == {
        "accuracy": None,
        "correct": 0,
        "loss": loss,
        "half": {"accuracy": None, "correct": 0, "loss": loss},
    }
    for flag in ("--confusion", "--confusion-figure=c.png", "--misclassified=m.png"):
        with pytest.raises(UserError, match=f"{flag.split('=')[0]} is for .* task has numbers; leave the flag out"):
            evaluate_runs.check_task(trained[0], shown.COMMAND.parse([str(tmp_path), flag]))


# --------------------------------------------------------------------------------------------- other data, parts, names


@pytest.fixture(scope="module")
def named(tmp_path_factory):
    """Return a folder with a run on three named classes, and other data in which the classes have another order."""
    folder = tmp_path_factory.mktemp("named")
    digits = piece_of_digits(VERY_RAGGED)
    rows = np.flatnonzero(digits.labels < 3)
    images, labels = digits.images[rows], digits.labels[rows]
    names = np.array(["cat", "dog", "a class with a name that is too long for a table of 80 columns"])
    np.savez(folder / "data.npz", images=images, labels=names[labels])
    np.savez(folder / "new.npz", images=images, labels=2 - labels, class_names=names[::-1])
    np.savez(folder / "cats.npz", images=images[labels == 0], labels=names[labels[labels == 0]])
    np.savez(folder / "fox.npz", images=images, labels=np.array(["cat", "fox", "dog"])[labels])
    np.savez(folder / "numbers.npz", images=images, labels=(labels + 1) % 3)  # in natural order of the names
    parts = {"test_images": images[:9], "test_labels": labels[:9], "val_images": images[:7], "val_labels": labels[:7]}
    np.savez(folder / "parts.npz", images=images, labels=labels, **parts)
    train(small_config(folder / "run", dataset=f"npz:{folder}/data.npz", epochs=1), OneProcess())
    return folder


@alone
def test_other_data_is_scored_with_the_normalization_of_the_training(runs, tmp_path, capsys, monkeypatch):
    """The test part as a file of its own has the score of the test part, to the last bit."""
    [trained] = load([runs / "convnet"], OneProcess())
    rows = trained.data.parts.test
    np.savez(tmp_path / "new.npz", images=trained.data.images[rows], labels=trained.data.labels[rows])
    flags = [runs / "convnet", "--on=npz:new.npz", "--json=numbers.json"]
    code, out, err = command(flags, tmp_path, capsys, monkeypatch)
    [member] = json.loads((tmp_path / "numbers.json").read_text())["members"]
    assert (code, err) == (0, "")
    assert member["loss"] == summary_of(runs / "convnet")["test_loss"]
    assert member["accuracy"] == summary_of(runs / "convnet")["test_accuracy"]
    assert out.splitlines()[-1].startswith("accuracy on npz:new.npz: ")


@alone
def test_classes_of_other_data_are_matched_by_name(named, capsys, monkeypatch):
    numbers = {}
    for name in ("data", "new", "numbers", "cats"):
        flags = ["run", f"--on=npz:{name}.npz", f"--json={name}.json"]
        code, _, err = command(flags, named, capsys, monkeypatch)
        assert code == 0
        assert ("warning: npz:numbers.npz has no names of classes" in err) == (name == "numbers")
        numbers[name] = json.loads((named / f"{name}.json").read_text())
    assert numbers["new"]["confusion"] == numbers["data"]["confusion"] == numbers["numbers"]["confusion"]
    cats = numbers["data"]["class_names"].index("cat")
    for actual, row in enumerate(numbers["cats"]["confusion"]):
        assert row == (numbers["data"]["confusion"][cats] if actual == cats else [0, 0, 0])


@alone
def test_scores_of_classes_have_their_names_and_are_those_of_the_confusion_matrix(named, capsys, monkeypatch):
    code, out, _ = command(["run", "--confusion", "--json=numbers.json"], named, capsys, monkeypatch)
    numbers = json.loads((named / "numbers.json").read_text())
    expected = class_scores.class_scores(np.array(numbers["confusion"]))
    assert code == 0
    assert [one.pop("class") for one in numbers["per_class"]] == numbers["class_names"]
    assert numbers["per_class"] == [vars(one) for one in expected]
    assert numbers["balanced_accuracy"] == class_scores.balanced_accuracy(expected)
    assert numbers["macro_f1"] == class_scores.macro_f1(expected)
    lines = out.splitlines()[3:]
    assert max(map(len, lines)) <= 80
    rows = [line.split("  ")[0] for line in lines]
    assert rows[:4] == ["class", "a class with a name that is too…", "cat", "dog"]
    assert [line.split()[-3:] for line in lines[1:4]] == [
        [f"{one.precision:.2%}" if one.precision is not None else "–", f"{one.recall:.2%}", f"{one.f1:.2%}"]
        for one in expected
    ]


@alone
@pytest.mark.parametrize(("given", "part"), [("val", "validation"), ("train", "training"), ("training", "training")])
def test_each_part_can_be_scored_also_by_its_short_name(runs, given, part, tmp_path, capsys, monkeypatch):
    code, out, _ = command([runs / "mlp", f"--part={given}"], tmp_path, capsys, monkeypatch)
    [trained] = load([runs / "mlp"], OneProcess())
    expected = evaluate([trained], part, OneProcess()).ensemble
    assert code == 0
    said = f"{part} accuracy: {expected.accuracy:.2%} ({expected.correct} of {len(getattr(trained.data.parts, part))})"
    assert out.splitlines()[-1] == said


@alone
@pytest.mark.parametrize(("part", "samples"), [("train", None), ("val", 7), ("test", 9)])
def test_a_part_of_other_data_is_its_own(named, part, samples, capsys, monkeypatch):
    flags = ["run", "--on=npz:parts.npz", f"--part={part}", "--json=parts.json"]
    assert command(flags, named, capsys, monkeypatch)[0] == 0
    with np.load(named / "parts.npz") as arrays:
        expected = samples or len(arrays["images"])
    assert json.loads((named / "parts.json").read_text())["samples"] == expected


@alone
def test_training_images_given_as_other_data_are_a_warning(named, capsys, monkeypatch):
    (named / "copies").mkdir()
    shutil.copy(named / "data.npz", named / "copies" / "data.npz")
    for source, is_training in (("data", True), ("copies/data", True), ("new", False), ("cats", False)):
        code, out, err = command(["run", f"--on=npz:{source}.npz"], named, capsys, monkeypatch)
        assert code == 0
        assert ("has the training images of run, so the scores are not those of new images" in err) == is_training
        assert out


@alone
@pytest.mark.parametrize(
    ("on", "part", "is_training"),
    [
        ("folder:photos", None, True),
        ("folder:./photos", "training", True),
        ("folder:photos", "test", False),
        ("folder:photos/train", None, True),
        ("folder:photos/test", None, False),
        ("folder:others", None, False),
        ("csv:photos", None, False),
    ],
)
def test_the_path_of_the_training_data_tells_training_images(on, part, is_training, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    digits = piece_of_digits(VERY_RAGGED)
    one = SimpleNamespace(config=small_config(tmp_path / "run", dataset=f"folder:{tmp_path}/photos"), data_sha256="")
    options = shown.COMMAND.parse(["run", f"--on={on}", *([] if part is None else [f"--part={part}"])])
    assert fit._has_training_images(one, digits, options) == is_training


@alone
@pytest.mark.parametrize("skip", [True, False])
def test_damaged_images_of_other_data_are_left_out_only_if_asked(skip, named, capsys, monkeypatch):
    image = pytest.importorskip("PIL.Image")
    with np.load(named / "parts.npz") as arrays:
        shape = arrays["images"].shape[1:3]
    for name in ("cat", "dog"):
        (named / "files" / name).mkdir(parents=True, exist_ok=True)
        for k in range(3):
            image.new("L", shape[::-1], 40 * k).save(named / "files" / name / f"{k}.png")
    (named / "files" / "cat" / "broken.png").write_bytes(b"")
    flags = ["run", "--on=folder:files", "--json=files.json", *["--skip-damaged"] * skip]
    code, _, err = command(flags, named, capsys, monkeypatch)
    assert "broken.png" in err
    assert code == (0 if skip else 3)
    if skip:
        assert json.loads((named / "files.json").read_text())["samples"] == 6
        shutil.copytree(named / "files" / "dog", named / "only" / "dog")
        code, out, _ = command(["run", "--on=folder:only"], named, capsys, monkeypatch)
        assert (code, out.splitlines()[0]) == (0, "folder:only: 3 samples"), "a single class that the network knows"
        (named / "only" / "dog").rename(named / "only" / "fox")
        code, _, err = command(["run", "--on=folder:only"], named, capsys, monkeypatch)
        assert (code, "'fox'" in err) == (2, True)


OTHER_DATA_REFUSED = {
    "an unknown class": (["--on=npz:fox.npz"], ["npz:fox.npz", "'fox'", "cat, dog"]),
    "no part of its own": (["--on=npz:new.npz", "--part=test"], ["--part test", "npz:new.npz", "leave the flag out"]),
    "no such file": (["--on=npz:none.npz"], ["none.npz", "does not exist"]),
    "no such source": (["--on=mnits"], ["mnits", "mnist"]),
    "a folder that is not read": (["--on=npz:new.npz", "--data-dir=."], ["--data-dir", "--on npz:new.npz"]),
    "damage in arrays": (["--on=npz:new.npz", "--skip-damaged"], ["--skip-damaged", "npz:new.npz", "leave it out"]),
    "damage in its own data": (["--skip-damaged"], ["--skip-damaged", "--on folder:PATH"]),
    "columns of arrays": (["--on=npz:new.npz", "--csv-columns=a,b"], ["--csv-columns", "npz:new.npz", "leave it out"]),
    "columns of its own data": (["--csv-columns=a,b"], ["--csv-columns", "--on csv:FILE"]),
    "a run twice": (["run", "--on=npz:new.npz"], ["run and run", "same weights"]),
}


@alone
@pytest.mark.parametrize("what", OTHER_DATA_REFUSED)
def test_other_data_that_does_not_fit_is_refused_in_one_line(what, named, capsys, monkeypatch):
    flags, words = OTHER_DATA_REFUSED[what]
    code, out, err = command(["run", *flags], named, capsys, monkeypatch)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert [word for word in words if word not in err] == []


@alone
def test_numbers_have_mean_absolute_error_and_r2(tmp_path):
    dataset, build_network, _ = TASKS["regression"]
    run_task(OneProcess(), tmp_path / "run", "regression", epochs=8)
    [trained] = load([tmp_path / "run"], OneProcess(), dataset=dataset, build_network=build_network)
    found = evaluate([trained], "test", OneProcess())
    scores = class_scores.number_scores(found.labels, found.predictions)
    numbers = score_table.numbers_json(scores, trained.signature)
    for place, one in enumerate(numbers["per_number"]):
        errors = [float(p) - float(t) for p, t in zip(found.predictions[:, place], found.labels[:, place], strict=True)]
        assert one["number"] == str(place)
        assert np.isclose(one["mean_absolute_error"], sum(map(abs, errors)) / len(errors))
        targets = found.labels[:, place].tolist()
        total = sum((target - sum(targets) / len(targets)) ** 2 for target in targets)
        assert np.isclose(one["r2"], 1 - sum(error**2 for error in errors) / total)
    [_, *rows] = score_table.number_table(scores, trained.signature)
    assert [row.split() for row in rows] == [
        [str(place), f"{one.mean_absolute_error:.6g}", f"{one.r2:.4f}"] for place, one in enumerate(scores)
    ]


# ------------------------------------------------------------------------------------------------------- output, files


@alone
def test_half_precision_is_shown_next_to_full_precision_and_differs_from_it(runs, tmp_path, capsys, monkeypatch):
    flags = [runs / "convnet", "--half", "--json=numbers.json"]
    code, out, _ = command(flags, tmp_path, capsys, monkeypatch)
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    [member] = numbers["members"]
    assert code == 0
    assert member["half"]["loss"] != member["loss"]
    assert abs(member["half"]["loss"] - member["loss"]) < 0.01
    assert abs(member["half"]["accuracy"] - member["accuracy"]) < 0.01
    said = f"in float16: {member['half']['accuracy']:.2%} ({member['half']['correct']} of 269)"
    assert out.splitlines()[-1].endswith(said)


@alone
def test_pictures_and_the_confusion_matrix_show_the_predictions_of_the_ensemble(runs, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    flags = ["--confusion", "--confusion-figure=new/c.png", "--misclassified=m.svg", "--json=new/numbers.json"]
    code, out, err = command([runs / "mlp", runs / "convnet", *flags], tmp_path, capsys, monkeypatch)
    assert (code, err) == (0, "")
    numbers = json.loads((tmp_path / "new" / "numbers.json").read_text())
    lines = out.splitlines()
    top = next(place for place, line in enumerate(lines) if line.startswith("actual/predicted"))
    printed = [list(map(int, line.split())) for line in lines[top + 1 : top + 11]]
    assert [line[1:] for line in printed] == numbers["confusion"]
    found = evaluate(load([runs / "mlp", runs / "convnet"], OneProcess()), "test", OneProcess())
    for actual in range(10):
        for predicted in range(10):
            both = (found.labels == actual) & (found.predictions == predicted)
            assert numbers["confusion"][actual][predicted] == int(both.sum())
    assert (tmp_path / "new" / "c.png").read_bytes()[:4] == b"\x89PNG"
    assert b"<svg" in (tmp_path / "m.svg").read_bytes()[:500]


@alone
def test_the_run_folder_does_not_change(runs, tmp_path, capsys, monkeypatch):
    def seen():
        times = {path: path.stat().st_mtime_ns for path in [runs, *runs.rglob("*")]}
        return picture(runs), times

    before = seen()
    for flags in (["--half"], ["--best", "--part=validation"]):
        assert command([runs / "convnet", runs / "mlp", *flags], tmp_path, capsys, monkeypatch)[0] == 0
    after = seen()
    assert changes(before[0], after[0]) == []
    assert after[1] == before[1]
    assert list(tmp_path.iterdir()) == []


@alone
def test_a_damaged_newest_checkpoint_gives_a_warning_and_the_previous_one_is_used(runs, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(runs / "mlp", folder)
    *_, before, newest = checkpoints.steps_in(folder / "checkpoints")
    flip_a_bit(checkpoints.path_of_step(folder / "checkpoints", newest))
    code, out, err = command([folder, "--part=validation"], tmp_path, capsys, monkeypatch)
    assert code == 0
    assert err.count("distdl: warning: ") == 1
    assert f"step-{newest:09d}" in err
    [record] = [record for record in records_of(folder, "validation_accuracy") if record["step"] == before]
    assert f"{record['validation_accuracy']:.2%}" in out.splitlines()[-1]


# ------------------------------------------------------------------------------------------------------------ refusals


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(bytes(content))


def with_header(source, target, **changed):
    """Write a checkpoint with a valid checksum and a changed header, as an attacker or another version could."""
    found = checkpoints.read(source)
    target.parent.mkdir(parents=True, exist_ok=True)
    header = {name: value for name, value in {**found.header, **changed}.items() if value is not None}
    checkpoints.write(target, dataclasses.replace(found, header=header))


@pytest.fixture(scope="module")
def wrong(runs, mnist_runs, tmp_path_factory):
    """Return a folder with files and runs that cannot be evaluated."""
    folder = tmp_path_factory.mktemp("wrong")
    for name in ("mlp", "convnet", "seed 1"):
        shutil.copytree(runs / name, folder / name)
    shutil.copytree(mnist_runs / "0", folder / "mnist")
    shutil.copytree(mnist_runs / "other", folder / "other-data")
    (folder / "empty").mkdir()
    (folder / "text").write_text("no checkpoint at all")
    (folder / "to text").symlink_to(folder / "text")
    newest = checkpoints.newest_intact(folder / "mlp" / "checkpoints")[0]
    header = checkpoints.read(newest).header
    config, progress = header["config"], {**header["progress"], "best_step": None}
    shutil.copytree(folder / "mlp", folder / "torn")
    for path in (folder / "torn" / "checkpoints").iterdir():
        flip_a_bit(path)
    (folder / "short").write_bytes(newest.read_bytes()[:-1])
    with_header(newest, folder / "from a script", config={**config, "model": "__main__:my_network"})
    with_header(newest, folder / "another model", config={**config, "model": "simple_convnet"})
    with_header(newest, folder / "another version", config={**config, "warp": 9})
    with_header(newest, folder / "impossible", config={**config, "batch_size": 0})
    with_header(newest, folder / "no data", data_sha256=None)
    with_header(newest, folder / "relative", config={**config, "dataset": "npz:gone/data.npz"})
    with_header(newest, folder / "not validated" / "checkpoints" / newest.name, progress=progress)
    (folder / "linked" / "checkpoints").mkdir(parents=True)
    (folder / "linked" / "checkpoints" / newest.name).symlink_to(newest)
    return folder


USER, DAMAGED = 2, 3
REFUSED = {
    "nothing to evaluate": ([], USER, ["RUN_OR_CHECKPOINT", "--help"]),
    "an unknown flag": (["mlp", "--hlaf"], USER, ["--hlaf"]),
    "a run twice": (["mlp", "mlp"], USER, ["mlp and mlp", "same weights"]),
    "data that is not here": (["relative"], USER, ["relative", "npz:gone/data.npz", "/gone/data.npz", "npz:PATH"]),
    "an unknown part": (["mlp", "--part=tests"], USER, ["'tests'", "validation", "did you mean 'test'"]),
    "no such folder": (["nowhere"], USER, ["nowhere", "no such checkpoint or run folder"]),
    "a folder without checkpoints": (["empty"], USER, ["empty/checkpoints", "expected a run folder"]),
    "one of several has no checkpoint": (["mlp", "empty"], USER, ["empty/checkpoints"]),
    "a file of another kind": (["text"], DAMAGED, ["text", "no checkpoint of distdl", "run folder"]),
    "a damaged checkpoint": (["torn"], DAMAGED, ["torn/checkpoints/step-", "checksum"]),
    "a truncated checkpoint": (["short"], DAMAGED, ["short", "announces"]),
    "the best of a file": (["short", "--best"], USER, ["--best", "short", "is a file"]),
    "no best yet": (["not validated", "--best"], USER, ["not validated", "no best checkpoint"]),
    "a checkpoint that is a link": (["linked"], USER, ["symbolic link"]),
    "no hash of the data": (["no data"], DAMAGED, ["no data", "data_sha256"]),
    "another dataset": (["mnist", "--data-dir=other-data"], USER, ["mnist/checkpoints", "other images", "--data-dir"]),
    "data for digits": (["mlp", "--data-dir=nowhere"], USER, ["--data-dir has no effect with digits", "mlp"]),
    "no data": (["mnist", "--data-dir=empty"], USER, ["empty", "--data-dir"]),
    "members of two datasets": (["mlp", "mnist"], USER, ["mnist", "digits", "expected one dataset"]),
    "members of two splits": (["mlp", "seed 1"], USER, ["seed 1", "--seed 1", "--seed 0", "other samples"]),
    "a network from a script": (["from a script"], USER, ["SCRIPT.py:my_network", "build_network"]),
    "tensors of another model": (["another model"], USER, ["another model", "affine_1.weight"]),
    "a setting of another version": (["another version"], USER, ["another version", "warp"]),
    "an impossible setting": (["impossible"], USER, ["impossible", "--batch-size"]),
    "json into a folder": (["mlp", "--json=empty"], USER, ["--json", "empty", "is a folder"]),
    "json in place of a link": (["mlp", "--json=to text"], USER, ["--json", "to text", "not a regular file"]),
    "json below a file": (["mlp", "--json=text/numbers"], USER, ["--json", "text/numbers"]),
    "a picture of an unknown kind": (["mlp", "--misclassified=m.bmp"], USER, ["--misclassified", "m.bmp", ".png"]),
}


@alone
@pytest.mark.parametrize("what", REFUSED)
def test_a_refusal_is_one_line_and_leaves_no_file(what, wrong, capsys, monkeypatch):
    flags, expected, words = REFUSED[what]
    before = picture(wrong)
    code, out, err = command(flags, wrong, capsys, monkeypatch)
    assert (code, out) == (expected, ""), err
    assert err.startswith("distdl: error: ")
    assert len(err.splitlines()) == 1
    assert [word for word in words if word not in err] == []
    assert changes(before, picture(wrong)) == []


@alone
def test_without_matplotlib_the_extra_is_named_before_any_work(wrong, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, out, err = command(["nowhere", "--confusion-figure=c.png"], wrong, capsys, monkeypatch)
    assert (code, out) == (USER, "")
    assert "pip install 'distdl-mpi[plots]'" in err


@alone
@pytest.mark.parametrize("what", ["a damaged checkpoint", "members of two splits"])
def test_two_ranks_print_a_refusal_once(what, wrong, run_job):
    from distdl.job.mpirun_command import mpirun_command

    flags, expected, words = REFUSED[what]
    done = run_job(mpirun_command(2, [sys.executable, "-m", "distdl.evaluate", *flags]), cwd=wrong, timeout=60)
    assert done.returncode == expected, done.stderr
    told = [line for line in done.stderr.splitlines() if line.startswith("distdl: ")]
    assert len(told) == 1
    assert [word for word in words if word not in told[0]] == []
    assert "Traceback" not in done.stderr


@alone
def test_a_run_with_compiled_kernels_is_scored_with_numpy_kernels_where_there_is_no_numba(runs, monkeypatch):
    why = "numba is not installed: pip install 'distdl-mpi[fast]'"
    [usual] = load([runs / "convnet"], OneProcess())
    monkeypatch.setattr(kernels, "obstacle", lambda: why)
    [other] = load([runs / "convnet"], OneProcess())
    assert (usual.network.stack.kernels.name, other.network.stack.kernels.name) == ("compiled", "numpy")
    assert (usual.warnings, len(other.warnings)) == ([], 1)
    assert why in other.warnings[0]
    scores = [evaluate([one], "test", OneProcess()).scores[0] for one in (usual, other)]
    assert scores[0].loss == pytest.approx(scores[1].loss, rel=1e-5)
