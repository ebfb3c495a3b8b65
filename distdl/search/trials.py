"""Run a search: train its trials on groups of ranks.

The ranks form groups, and each group trains one trial. After all groups have finished, every rank receives all results,
rank 0 saves them in the order of the trials, and the next trials start. So a search ends with the same bytes on any
number of ranks (docs/search.md).

If a rank is lost and the MPI library survives failures, the survivors form new groups. They continue with the trials
without a saved result, each from its last checkpoint.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from distdl.config import TrainConfig, is_own
from distdl.data import Dataset, batch_order, split
from distdl.engine import train
from distdl.engine.console import Console
from distdl.engine.kernels import agreed_kernels, compile_for_network
from distdl.engine.requirements import outputs_of
from distdl.engine.stop import StopRequest
from distdl.engine.storage.files import indented_json
from distdl.engine.user_code import BuildNetwork, check_equal_networks, load_dataset, names_from_script, network_builder
from distdl.errors import DistdlError, DivergedError, Stopped, UserError
from distdl.inference import figures
from distdl.nn import Sequential
from distdl.nn.kernels.choice import kernels_named
from distdl.parallel import Communicator, Survivors, from_rank_0, guard, on_rank_0, together, world
from distdl.rng import Key
from distdl.search import tables
from distdl.search.chart import search_figure
from distdl.search.folder import CHART, RESULTS, SEARCH, SUMMARY, SearchFolder, choose_folder, kernels_of, read_results
from distdl.search.procedure import Trial, TrialResult, leaderboard, ranges_of_round, trials_of_round
from distdl.search.settings import Range, SearchSettings

#: The fields of a training's summary that form the outcome of a trial.
OUTCOME = ("steps", "validation_loss", "validation_accuracy", "test_accuracy", "weights_sha256")


@dataclass(frozen=True)
class SearchResult:
    """The result of a search, the same on every rank."""

    folder: Path
    results: list[TrialResult]
    ranges: tuple[Range, ...]
    """The ranges of the last round."""

    @property
    def best(self) -> TrialResult | None:
        """The best trial; None if all have diverged."""
        first = leaderboard(self.results)[0]
        return None if first.diverged else first


def search(
    settings: SearchSettings,
    communicator: Communicator | None = None,
    *,
    build_network: BuildNetwork | None = None,
    dataset: Dataset | None = None,
) -> SearchResult:
    """Search with `settings` on all ranks of `communicator` (`world()` if not given), and return the result.

    `build_network` and `dataset` replace the model and dataset of the config, as in `train`. They must be the same on
    every rank. Collective. Raises `UserError` on every rank if the user's input is invalid. Any other exception on any
    rank ends the job.
    """
    communicator = world() if communicator is None else communicator
    run = _Search(settings, build_network, dataset)
    with guard(communicator), run.stop.listening():
        try:
            return Survivors(communicator).run(run.attempt)
        finally:
            run.close()


class _WarningsOnly(Console):
    """The console of a trial: it prints warnings with the trial's name, and nothing else."""

    def __init__(self, trial: Trial) -> None:
        super().__init__(live=False)
        self._name = trial.run_folder

    def line(self, text: str = "") -> None:
        """Print nothing."""

    def warning(self, text: str) -> None:
        """Print the warning after the name of the trial."""
        super().warning(f"{self._name}: {text}")


class _Search:
    """One rank's part of a search. If a rank is lost, the survivors call `attempt` again."""

    def __init__(self, settings: SearchSettings, build_network: BuildNetwork | None, dataset: Dataset | None) -> None:
        self._given = replace(settings, config=names_from_script(settings.config, build_network, dataset))
        self._build_network = build_network
        self._dataset = dataset
        self._path: Path | None = None
        self._open: SearchFolder | None = None  # on rank 0 only
        self._results: list[TrialResult] = []
        self._console = Console(live=False)
        self.stop = StopRequest()

    def attempt(self, communicator: Communicator) -> SearchResult:
        """Do all trials without a saved result. Collective."""
        self._communicator = communicator
        try:
            self._prepare()
            return self._search()
        except UserError:
            if self._open is not None and not self._results:
                self._open.undo()
            raise

    def close(self) -> None:
        """Unlock the folder."""
        if self._open is not None:
            self._open.close()

    def _prepare(self) -> None:
        """Form the groups, check everything that depends on the user's input, and open the folder. Collective."""
        communicator = self._communicator
        paths = communicator.allgather_json(None if self._path is None else str(self._path))
        known = next((path for path in paths if path is not None), None)  # from an attempt before a rank was lost
        self._settings = settings = together(communicator, self._given.checked)
        if known is None:
            together(communicator, lambda: _check_ranks(settings, communicator.size))
        self._groups = max(1, communicator.size // settings.ranks_per_trial)
        self._group_number = communicator.rank * self._groups // communicator.size
        self._path = Path(from_rank_0(communicator, lambda: str(choose_folder(settings)) if known is None else known))
        self._settings = settings = self._with_kernels(settings, self._path)
        group = communicator.split(self._group_number)
        assert group is not None
        self._group = group
        loaded = communicator.bcast_json(together(communicator, self._load))
        data_sha256, self._training_samples, shape, outputs = loaded
        config = settings.config

        def build() -> Sequential:
            return network_builder(config.model, config.model_settings, self._build_network)(tuple(shape), outputs)

        if self._build_network is not None or is_own(config.model) or config.model_settings:
            # The files of the user's own model may differ between the groups.
            name = getattr(self._build_network, "__qualname__", config.model)
            check_equal_networks(communicator, name, together(communicator, build))

        def open_folder() -> list[dict[str, Any]]:
            if self._open is None:
                may_continue = settings.resume or known is not None
                content = {**settings.to_json(), "data_sha256": data_sha256}
                results = read_results(self.folder, settings, content) if may_continue else []
                self._open = SearchFolder(self.folder, settings.config.lock, ours=known is not None)
                self._open.write(SEARCH, indented_json(content))
                self._results = results
            return [asdict(result) for result in self._results]

        self._results = [TrialResult(**result) for result in from_rank_0(communicator, open_folder)]
        if known is not None:
            ranks = f"{communicator.size} rank{'s continue' if communicator.size > 1 else ' continues'}"
            self._print(f"a rank was lost; {ranks} with the trials that have no saved result")
            return
        self._print(*tables.banner(settings, communicator.size, self._groups))
        if self._results:
            self._print(f"resumed from {self.folder} after {len(self._results)} trials")
        elif settings.resume and self._open is not None and self._open.is_new:
            self._print(f"there is no search in {self.folder} yet: a new one begins")
        if config.kernels == "compiled":  # once for all groups; a trial compiles only what it needs in addition
            network = together(communicator, build)
            network.use(kernels_named(config.kernels))
            compile_for_network(network, communicator, self._print, training=True)

    def _with_kernels(self, settings: SearchSettings, folder: Path) -> SearchSettings:
        """Return the settings with the same kernels for all groups: those of the search that continues. Collective."""
        saved = from_rank_0(self._communicator, lambda: kernels_of(folder))
        wanted = saved if saved is not None and settings.config.kernels == "auto" else settings.config.kernels
        return replace(settings, config=replace(settings.config, kernels=agreed_kernels(wanted, self._communicator)))

    def _load(self) -> tuple[str, int, list[int], int]:
        """Load the dataset on the first rank of each group.

        Returns its hash, the number of training samples, the shape of an image, and the number of outputs to build a
        network for.
        """
        if self._group.rank != 0:
            return "", 0, [], 0
        config = self._settings.config
        if self._dataset is None:
            self._dataset = replace(
                load_dataset(config.dataset, config.data_dir, config.image_options), name=config.dataset
            )
        self._dataset = data = self._dataset.checked()
        training = split.split(data.labels, data.test_start, Key(config.seed)).training
        return data.sha256(), len(training), list(data.images.shape[1:]), outputs_of(config, data)[-1]

    def _search(self) -> SearchResult:
        settings, results = self._settings, self._results
        for number in range(1, settings.rounds + 1):
            trials = trials_of_round(settings, number, results)
            done = sum(result.round == number for result in results)
            if done < len(trials):
                ranges = ranges_of_round(settings, number, results)
                self._print(*tables.round_lines(settings, number, trials, ranges))
            while done < len(trials):
                self._train_at_once(trials[done : done + self._groups])
                done = sum(result.round == number for result in results)
        found = SearchResult(self.folder, results, ranges_of_round(settings, settings.rounds, results))
        on_rank_0(self._communicator, lambda: self._finish(found))
        return found

    @property
    def folder(self) -> Path:
        """The folder of the search."""
        assert self._path is not None
        return self._path

    def _train_at_once(self, trials: Sequence[Trial]) -> None:
        """Train each of the trials on one group, and save the results. Collective."""
        communicator = self._communicator
        mine = trials[self._group_number] if self._group_number < len(trials) else None
        result = together(communicator, lambda: None if mine is None else self._train(mine))
        own = asdict(result) if result is not None and self._group.rank == 0 else None
        everyone = communicator.allgather_json([self._group_number, own, self.stop.asked])
        by_group = {group: TrialResult(**values) for group, values, _ in everyone if values is not None}
        new = list[TrialResult]()
        for group in range(len(trials)):
            if group not in by_group:
                break  # stopped; later trials are not lost, because their run folders hold them
            new.append(by_group[group])

        def save() -> None:
            assert self._open is not None
            self._open.save([*self._results, *new])

        on_rank_0(communicator, save)
        self._results += new
        self._print(*(tables.trial_line(one, self._settings) for one in new))
        if signals := [asked for _, _, asked in everyone if asked is not None]:
            stopped = Stopped(
                f"stopped by {signals[0]} after {len(self._results)} trials: the same command with --resume and "
                f"--out {self.folder} continues (exit code {Stopped.exit_code})"
            )
            stopped.agreed = True
            raise stopped

    def _train(self, trial: Trial) -> TrialResult | None:
        """Train a trial on this rank's group; return None if a signal has stopped it."""
        outcome: dict[str, Any] = dict.fromkeys(OUTCOME)
        try:
            summary = train(
                self._config_of(trial),
                self._group,
                build_network=self._build_network,
                dataset=self._dataset,
                console=_WarningsOnly(trial),
                stop=self.stop,
            )
            outcome = {name: getattr(summary, name) for name in OUTCOME}
        except DivergedError:
            pass
        except Stopped:
            return None
        except DistdlError as error:
            error.agreed &= isinstance(error, UserError)  # other groups do not know of it, and must be ended
            raise
        return TrialResult(**asdict(trial), **outcome)

    def _config_of(self, trial: Trial) -> TrainConfig:
        ours = {"run_dir": self.folder / trial.run_folder, "resume": "auto", "keep_checkpoints": 1}
        config = self._settings.config_with({**trial.settings, **ours})
        if trial.epochs < config.epoch_count:
            steps_per_epoch = batch_order.steps_per_epoch(self._training_samples, config.batch_size)
            config = replace(config, max_steps=trial.epochs * steps_per_epoch)
        return config

    def _finish(self, found: SearchResult) -> None:
        """Write the summary and the chart, and print the table."""
        assert self._open is not None
        self._open.write(SUMMARY, indented_json(tables.summary(found.results, found.ranges)))
        self._print(*tables.best_trials_table(found.results, self._settings))
        written = [RESULTS, SUMMARY]
        if figures.has_matplotlib():
            self._open.write(CHART, figures.content_of(search_figure(found.results, self._settings), "svg"))
            written.append(CHART)
        else:
            self._print(f"no {CHART}: {figures.NEEDS_MATPLOTLIB}")
        self._print(f"written: {', '.join(str(found.folder / name) for name in written)}")

    def _print(self, *lines: str) -> None:
        for line in lines if self._communicator.rank == 0 else ():
            self._console.line(line)


def _check_ranks(settings: SearchSettings, ranks: int) -> None:
    """Raise `UserError` if the ranks cannot form such groups, or if a group has more ranks than micro-batches."""
    if settings.ranks_per_trial > ranks:
        raise UserError(
            f"--ranks-per-trial {settings.ranks_per_trial} is more than the {ranks} rank{'s' if ranks > 1 else ''} of "
            f"this job: start it with mpirun -n {settings.ranks_per_trial}, or give fewer ranks"
        )
    largest = -(-ranks // (ranks // settings.ranks_per_trial))
    least = min(config.micro_batches for config in settings.extremes())
    if largest > least:
        raise UserError(
            f"{largest} ranks cannot share a trial whose batch has {least} micro-batches: give a smaller "
            "--ranks-per-trial, larger batches or smaller micro-batches"
        )
