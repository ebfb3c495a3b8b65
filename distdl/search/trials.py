"""A search: what every rank does.

The ranks are divided into groups, and each group trains a trial of its own. When all groups are done, everybody learns
of all results, rank 0 writes them, and the next trials begin. A trial does not depend on the ranks that train it, its
settings follow from the seed and the results of the rounds before alone, and results are taken down in the order of
the trials; so a search ends with the same bytes on any number of ranks.

Where a rank is lost and the MPI library lets the others go on, they do: as new groups, with the trials that are not
taken down yet, each from its last checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from distdl.config import TrainConfig, is_own
from distdl.data import Dataset, split
from distdl.engine import train
from distdl.engine.console import Console
from distdl.engine.prepare import labelled, outputs_of
from distdl.engine.stop import StopRequest
from distdl.engine.user_code import BuildNetwork, check_equal_networks, load_dataset, network_builder
from distdl.errors import DistdlError, DivergedError, Stopped, UserError
from distdl.nn import Sequential
from distdl.parallel import Communicator, Survivors, guard, together, world
from distdl.rng import Key
from distdl.search import results as report
from distdl.search.folder import PICTURE, RESULTS, SearchFolder, choose, content_of_search, read
from distdl.search.procedure import Record, Trial, planned, ranges_of, standing
from distdl.search.settings import Range, Settings

#: What a record takes from the summary of a training.
OUTCOME = ("steps", "validation_loss", "validation_accuracy", "test_accuracy", "weights_sha256")


@dataclass(frozen=True)
class Found:
    """What a search has found, the same on every rank."""

    folder: Path
    records: list[Record]
    ranges: tuple[Range, ...]
    """As the last round but one has narrowed them."""

    @property
    def best(self) -> Record | None:
        """The best trial; None where all have diverged."""
        first = standing(self.records)[0]
        return None if first.diverged else first


def search(
    settings: Settings,
    communicator: Communicator | None = None,
    *,
    build_network: BuildNetwork | None = None,
    dataset: Dataset | None = None,
) -> Found:
    """Search as `settings` say, on all ranks of `communicator` (`world()` if not given), and return what was found.

    `build_network` and `dataset` take the place of what the config names, as in `train`; they must be the same on every
    rank. Collective. Raises `UserError`, on every rank, for what the user gave; any other exception on any rank ends
    the whole job.
    """
    communicator = world() if communicator is None else communicator
    one = _Search(settings, build_network, dataset)
    with guard(communicator), one.stop.listening():
        try:
            found = Survivors(communicator).run(one.run)
        finally:
            one.close()
    return found


class _Quiet(Console):
    """Of a trial, only warnings are printed."""

    def __init__(self, trial: Trial) -> None:
        super().__init__(live=False)
        self._name = trial.run_folder

    def line(self, text: str = "") -> None:
        """Print nothing."""

    def warning(self, text: str) -> None:
        """Print the warning with the trial's name in front."""
        super().warning(f"{self._name}: {text}")


class _Search:
    """A rank's part in a search; `run` begins again on the ranks that are left where one was lost."""

    def __init__(self, settings: Settings, build_network: BuildNetwork | None, dataset: Dataset | None) -> None:
        self._given = replace(settings, config=labelled(settings.config, build_network, dataset))
        self._build_network = build_network
        self._dataset = dataset
        self._place: Path | None = None
        self._open: SearchFolder | None = None
        self._records: list[Record] = []
        self._console = Console(live=False)
        self.stop = StopRequest()

    def run(self, communicator: Communicator) -> Found:
        """Do all trials that are not taken down yet. Collective."""
        self._communicator = communicator
        try:
            self._prepare()
            return self._search()
        except UserError:
            if self._open is not None and not self._records:
                self._open.undo()
            raise

    def close(self) -> None:
        """Let go of the folder."""
        if self._open is not None:
            self._open.close()

    def _prepare(self) -> None:
        """Do all that can fail because of what the user gave, and make the folder. Collective."""
        communicator, coordinates = self._communicator, self._communicator.rank == 0
        places = communicator.allgather_json(None if self._place is None else str(self._place))
        known = next((place for place in places if place is not None), None)  # from before a rank was lost
        begins = known is None
        self._settings = settings = together(communicator, self._given.checked)
        if begins:
            together(communicator, lambda: _check_ranks(settings, communicator.size))
        self._groups = max(1, communicator.size // settings.ranks_per_trial)
        chosen = together(communicator, lambda: str(choose(settings)) if coordinates and begins else known)
        self._place = folder = Path(communicator.bcast_json(chosen))
        self._group_number = communicator.rank * self._groups // communicator.size
        group = communicator.split(self._group_number)
        assert group is not None
        self._group = group
        loaded = communicator.bcast_json(together(communicator, self._load))
        data_sha256, self._training_samples, shape, outputs = loaded
        if self._build_network is not None or is_own(settings.config.model) or settings.config.model_settings:
            name = getattr(self._build_network, "__qualname__", settings.config.model)
            check_equal_networks(communicator, name, together(communicator, lambda: self._network(shape, outputs)))

        def take_over() -> list[dict[str, Any]]:
            if not coordinates:
                return []
            if self._open is None:
                before = read(folder, settings, data_sha256) if settings.resume or not begins else []
                self._open = SearchFolder(folder, content_of_search(settings, data_sha256), ours=not begins)
                self._records = before
            return [record.to_json() for record in self._records]

        records = communicator.bcast_json(together(communicator, take_over))
        self._records = [Record(**record) for record in records]
        if not begins:
            self._say(f"a rank was lost; {communicator.size} go on with the trials that are not taken down yet")
            return
        for line in report.banner(settings, communicator.size, self._groups):
            self._say(line)
        if self._records:
            self._say(f"resumed from {folder} after {len(self._records)} trials")
        elif settings.resume and self._open is not None and self._open.is_new:
            self._say(f"there is no search in {folder} yet: a new one begins")

    def _load(self) -> tuple[str, int, list[int], int]:
        """Load the dataset on the first rank of each group; return its hash, and how many samples are for training.

        And what a network is built for: the shape of an image, and the number of outputs.
        """
        if self._group.rank != 0:
            return "", 0, [], 0
        config = self._settings.config
        if self._dataset is None:
            self._dataset = replace(load_dataset(config.dataset, config.data_dir), name=config.dataset)
        self._dataset = data = self._dataset.checked()
        training = split.split(data.labels, data.test_start, Key(config.seed)).training
        return data.sha256(), len(training), list(data.images.shape[1:]), outputs_of(config, data)[-1]

    def _network(self, shape: Sequence[int], outputs: int) -> Sequential:
        """Build a model that is not ours once, before there is a folder; groups whose files differ train none alike."""
        height, width, channels = shape
        config = self._settings.config
        build = network_builder(config.model, config.model_settings, self._build_network)
        return build((height, width, channels), outputs)

    def _search(self) -> Found:
        settings, records = self._settings, self._records
        for number in range(1, settings.rounds + 1):
            trials = planned(settings, number, records)
            done = sum(record.round == number for record in records)
            if done < len(trials):
                for line in report.round_lines(settings, number, trials, ranges_of(settings, number, records)):
                    self._say(line)
            while done < len(trials):
                self._train_at_once(trials[done : done + self._groups])
                done = sum(record.round == number for record in records)
        found = Found(self.folder, records, ranges_of(settings, settings.rounds, records))
        together(self._communicator, lambda: self._finish(found))
        return found

    @property
    def folder(self) -> Path:
        """The folder of the search, once it is chosen."""
        assert self._place is not None
        return self._place

    def _train_at_once(self, trials: Sequence[Trial]) -> None:
        """Train each of the trials on a group of its own, and take down the results. Collective."""
        communicator = self._communicator
        mine = trials[self._group_number] if self._group_number < len(trials) else None
        record = together(communicator, lambda: None if mine is None else self._trained(mine))
        leads = self._group.rank == 0 and record is not None
        told = communicator.allgather_json(
            [self._group_number, record.to_json() if record is not None and leads else None, self.stop.asked]
        )
        results = {group: Record(**values) for group, values, _ in told if values is not None}
        new = list[Record]()
        for group in range(len(trials)):
            if group not in results:
                break  # stopped; those behind it are not lost, their run folders have them
            new.append(results[group])
        together(communicator, lambda: self._open.save([*self._records, *new]) if self._open is not None else None)
        self._records += new
        for result in new:
            self._say(report.trial_line(result, self._settings))
        signals = [asked for _, _, asked in told if asked is not None]
        if signals:
            stopped = Stopped(
                f"stopped by {signals[0]} after {len(self._records)} trials: the same command with --resume, and "
                f"--out {self.folder}, goes on (exit code {Stopped.exit_code})"
            )
            stopped.agreed = True
            raise stopped

    def _trained(self, trial: Trial) -> Record | None:
        """Train a trial on this rank's group; None where a signal has stopped it."""
        known: dict[str, Any] = asdict(trial)
        try:
            summary = train(
                self._config_of(trial),
                self._group,
                build_network=self._build_network,
                dataset=self._dataset,
                console=_Quiet(trial),
                stop=self.stop,
            )
        except DivergedError:
            return Record(**(known | dict.fromkeys(OUTCOME)))
        except Stopped:
            return None
        except DistdlError as error:
            error.agreed &= isinstance(error, UserError)  # those of other groups do not know, and must be ended
            raise
        return Record(**(known | {name: getattr(summary, name) for name in OUTCOME}))

    def _config_of(self, trial: Trial) -> TrainConfig:
        config = replace(
            self._settings.config_with(trial.settings),
            run_dir=self.folder / trial.run_folder,
            resume="auto",
            keep_checkpoints=1,
        )
        if trial.epochs < config.epoch_count:
            steps_per_epoch = split.steps_per_epoch(self._training_samples, config.batch_size)
            config = replace(config, max_steps=trial.epochs * steps_per_epoch)
        return config

    def _finish(self, found: Found) -> None:
        """Write the summary and the picture, and print the table: rank 0's work."""
        if self._open is None:
            return
        self._open.summarize(report.summary(found.records, found.ranges))
        for line in report.table(found.records, self._settings):
            self._say(line)
        written = [RESULTS, "summary.json"]
        picture = report.picture(found.records, self._settings)
        if picture is None:
            self._say(f"no {PICTURE}: drawing it needs matplotlib (pip install 'distdl-mpi[plots]')")
        else:
            self._open.write(PICTURE, picture)
            written.append(PICTURE)
        self._say(f"written: {', '.join(str(found.folder / name) for name in written)}")

    def _say(self, text: str) -> None:
        if self._communicator.rank == 0:
            self._console.line(text)


def _check_ranks(settings: Settings, ranks: int) -> None:
    """Raise `UserError` where the ranks cannot be divided so, or a group has more of them than work."""
    if settings.ranks_per_trial > ranks:
        raise UserError(
            f"--ranks-per-trial {settings.ranks_per_trial} is more than the {ranks} rank{'s' if ranks > 1 else ''} of "
            f"this job: start it with mpirun -n {settings.ranks_per_trial}, or give fewer"
        )
    largest = -(-ranks // (ranks // settings.ranks_per_trial))
    least = min(config.micro_batches for config in settings.extremes())
    if largest > least:
        raise UserError(
            f"{largest} ranks cannot share a trial whose batch has {least} micro-batches: give a smaller "
            "--ranks-per-trial, larger batches or smaller micro-batches"
        )
