"""From a config to a trained network: everything that happens once, before the first step.

All errors in what the user gave are found here and agreed by all ranks, before anything is written. If a rank is lost
meanwhile, the survivors begin the preparation again, in the same run folder.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from distdl.config import TrainConfig
from distdl.data import Dataset, PreparedDataset, batch_order
from distdl.engine import transfer
from distdl.engine.callbacks import Callback, Calls
from distdl.engine.checks.watchdog import Watchdog
from distdl.engine.console import Console
from distdl.engine.coordinator import Coordinator, RunFacts
from distdl.engine.environment import describe, numerics
from distdl.engine.fault_injection import fault_point
from distdl.engine.introduction import introduce
from distdl.engine.kernels import compile_for, with_kernels
from distdl.engine.logbook import Logbook
from distdl.engine.memory import check_memory, check_resized, check_room_for_dataset
from distdl.engine.metrics import Sums
from distdl.engine.proving import with_proof
from distdl.engine.requirements import check_moments, check_outputs, check_ranks, outputs_of, restore
from distdl.engine.state import TrainingState
from distdl.engine.stop import StopRequest
from distdl.engine.storage.files import check_output
from distdl.engine.storage.run_folder import StartingPoint, find_start
from distdl.engine.summary import Summary
from distdl.engine.tracking import callbacks_of
from distdl.engine.trainer import Trainer
from distdl.engine.user_code import BuildNetwork, agree_on_config, check_equal_networks, network_builder, read_data
from distdl.errors import UserError
from distdl.host_memory import allocations_limited
from distdl.job.warden import Warden
from distdl.nn.kernels.choice import kernels_named
from distdl.optim import optimizer_class
from distdl.parallel import Communicator, Survivors, from_rank_0, guard, on_rank_0, share_arrays, together, world
from distdl.rng import Key
from distdl.transforms import Transforms


def train(
    config: TrainConfig,
    communicator: Communicator | None = None,
    *,
    build_network: BuildNetwork | None = None,
    dataset: Dataset | None = None,
    callbacks: Sequence[Callback] = (),
    console: Console | None = None,
    stop: StopRequest | None = None,
    attach: Callable[[Trainer], object] = lambda _trainer: None,
) -> Summary:
    """Train as `config` says, on all ranks of `communicator` (`world()` if not given), and return the summary.

    `build_network` and `dataset` replace the model and dataset that the config names. They must be the same on every
    rank; only rank 0 reads the dataset. `callbacks` get the events of the run. `console` prints. `stop` is a stop
    request that the caller keeps. `attach` gets the trainer before its first step.

    Collective. Raises `UserError` on every rank for errors in what the user gave, `DivergedError` if numbers are no
    longer finite. Any other exception on any rank ends the whole job.
    """
    if getattr(config, "dry_run", False):  # `agree_on_config` refuses anything but a config
        raise UserError("dry_run trains nothing: call distdl.engine.dry_run with the same arguments, or leave it out")
    communicator = world() if communicator is None else communicator
    stop = StopRequest() if stop is None else stop
    with stop.listening(), guard(communicator):
        survivors = Survivors(communicator)
        config = survivors.run(partial(agree_on_config, config, build_network, dataset))
        watchdog = survivors.run(partial(Watchdog, stall_seconds=config.stall_warning))
        this_rank = survivors.communicator.world_ranks[survivors.communicator.rank]
        with numerics(config.threads_per_rank), watchdog, Warden(f"rank {this_rank}", config.detect_hangs):
            preparation = Preparation(config, build_network, dataset, console, stop, callbacks)
            trainer = survivors.run(partial(preparation.prepared_trainer, watchdog=watchdog))
            attach(trainer)
            watchdog.progress = lambda: trainer.work_done
            try:
                introduce(trainer, preparation.transferred, preparation.warnings)
                for recovery in survivors.recoveries:
                    trainer.note(recovery, during_preparation=True)
                return trainer.run()
            finally:
                trainer.close()


@dataclass
class Preparation:
    """Prepares a run, from nothing on each attempt. An attempt fails if a rank is lost; the survivors begin again.

    Only the run folder, once all ranks know it, and the coordinator of the latest attempt are kept between attempts.
    """

    config: TrainConfig
    build_network: BuildNetwork | None
    dataset: Dataset | None
    console: Console | None
    stop: StopRequest
    callbacks: Sequence[Callback] = ()
    find: Callable[..., StartingPoint] = find_start
    calls: Calls = field(default_factory=Calls)
    folder: Path | None = None
    is_repeated: bool = False
    coordinator: Coordinator | None = None
    transferred: transfer.Transfer | None = None
    warnings: Sequence[str] = ()

    def prepared_trainer(self, communicator: Communicator, watchdog: Watchdog) -> Trainer:
        """Return an opened trainer. If the user's input is wrong, leave no files. Collective."""
        self.close()  # the coordinator of an earlier attempt
        try:
            return self._prepare(communicator, watchdog)
        except UserError:
            self.close()
            raise
        finally:
            self.is_repeated = True

    def _prepare(self, communicator: Communicator, watchdog: Watchdog) -> Trainer:
        trainer, facts, start = self.build(communicator)
        console = self.console = self.console or Console(live=communicator.size == 1)
        self.warnings = [*self.warnings, *compile_for(trainer, console)]
        facts = with_proof(facts, trainer, start, console, watchdog)
        self.calls.attach(trainer)
        keeps = communicator.survives_failures
        logbook = Logbook(self.config, trainer.steps_per_epoch, console, self.calls, keeps=keeps)
        self._open_folder(communicator, facts, start, logbook)
        assert self.folder is not None
        trainer.open(facts, self.folder, logbook, console, self.coordinator)
        return trainer

    def build(self, communicator: Communicator) -> tuple[Trainer, RunFacts, StartingPoint | None]:
        """Return a trainer before its first step, its facts, and on rank 0 the start; write nothing. Collective."""
        config = self.config
        together(communicator, lambda: check_ranks(config, communicator.size))
        self.calls = together(communicator, lambda: Calls.of(self.callbacks, callbacks_of(config)))
        on_rank_0(communicator, lambda: check_resized(config))
        if config.trace is not None:
            on_rank_0(communicator, partial(check_output, config.trace, "--trace"))
        start = on_rank_0(communicator, lambda: self.find(config, self.folder, after_failure=self.is_repeated))
        config = self.config = with_kernels(config, communicator, start)
        data = self._share_data(communicator, start)
        state = together(communicator, lambda: self._build_state(data))
        check_equal_networks(communicator, config.model, state.network)
        self.warnings = check_memory(config, data, state, communicator)
        environment = describe(communicator, data, dataset=config.dataset, kernels=config.kernels)
        facts = RunFacts(config, environment, from_rank_0(communicator, data.sha256), data.signature())
        steps_per_epoch = batch_order.steps_per_epoch(len(data.parts.training), config.batch_size)
        on_rank_0(communicator, lambda: self._restore(state, start, facts.data_sha256, steps_per_epoch))
        state.send_from_rank_0(communicator)
        return Trainer(config, communicator, data, state, self.stop), facts, start

    def _share_data(self, communicator: Communicator, start: StartingPoint | None) -> PreparedDataset:
        """Read and split the dataset on rank 0; return it on all ranks, one copy per host. Collective."""
        sha256 = start.found.header().data_sha256 if start is not None and start.found is not None else None
        arrays = self.stop.on_rank_0(communicator, lambda: read_data(self.config, self.dataset, sha256).to_arrays())
        fault_point("data")
        check_room_for_dataset(communicator, arrays)
        shared = share_arrays(communicator, arrays or {})
        fault_point("data", when="after")
        return PreparedDataset.from_arrays(shared)

    def _build_state(self, data: PreparedDataset) -> TrainingState:
        """Return the state before the first step: the initialized network, its optimizer, empty sums."""
        config, (height, width, channels) = self.config, data.images.shape[1:]
        if config.augment is not None:
            Transforms.parse(config.augment).check_fit(height, width)
        build = network_builder(config.model, config.model_settings, self.build_network)
        try:
            with allocations_limited():
                network = build((height, width, channels), outputs_of(config, data)[-1])
                network.use(kernels_named(config.kernels))
                network.initialize(Key(config.seed).of("initialization"))
                optimizer = optimizer_class(config.optimizer)(
                    network.parameters.size,
                    weight_decay=config.weight_decay,
                    l1=config.l1_decay,
                    decay_slices=network.decay_slices,
                    frozen=transfer.frozen_slices(network, config.freeze),
                    fused=network.stack.kernels.optimizer_rule(config.optimizer),
                    **config.optimizer_settings,
                )
        except MemoryError:
            raise UserError(
                f"there is not enough memory for --model {config.model} on images of {height}x{width}x{channels}: "
                "use smaller images (--resize), or fewer ranks on this machine"
            ) from None
        check_outputs(config, network.output_shape, data)
        check_moments(config, network)
        return TrainingState(network, optimizer, epoch_sums=Sums(targets_per_sample=data.targets_per_sample))

    def _restore(
        self, state: TrainingState, start: StartingPoint | None, data_sha256: str, steps_per_epoch: int
    ) -> None:
        """Fill the state from the checkpoint of a resumed run, or from `--init-from`; on rank 0."""
        assert start is not None
        if start.found is not None:
            restore(state, start.found, data_sha256, self.config, steps_per_epoch)
        elif self.config.init_from is not None:
            self.transferred = transfer.copy_weights(self.config.init_from, state.network, self.config.model)

    def _open_folder(
        self, communicator: Communicator, facts: RunFacts, start: StartingPoint | None, logbook: Logbook
    ) -> None:
        """Claim the run folder and write its first files, on rank 0. Collective."""
        console = self.console
        assert console is not None

        def claim() -> str:
            assert start is not None
            self.coordinator = Coordinator.claim(facts, start, logbook, console)
            fault_point("run-folder")
            return str(self.coordinator.folder.absolute())

        def write_first_files() -> None:
            assert self.coordinator is not None
            self.coordinator.open_run()
            fault_point("run-folder", when="after")

        self.folder = Path(from_rank_0(communicator, claim))
        communicator.barrier()  # all ranks know the folder: if rank 0 is lost from here on, the next attempt uses it
        on_rank_0(communicator, write_first_files)
        logbook.lengths = communicator.bcast_json(logbook.lengths)

    def close(self) -> None:
        """Release the run folder."""
        if self.coordinator is not None:
            self.coordinator.close()
            self.coordinator = None
