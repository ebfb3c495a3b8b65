"""Collective work of the ranks: communicators, dealing, reduction, agreement, recovery, shared arrays."""

from distdl.parallel.agreement import end_rank_after_host_fault, from_rank_0, guard, on_rank_0, together
from distdl.parallel.communicator import Communicator, CompletedRecovery, OneProcess, ranks_per_host
from distdl.parallel.dealing import deal, loads_by_speed
from distdl.parallel.record import Field, Layout, Record
from distdl.parallel.recovery import Position, Survivors, commit, committed, recover
from distdl.parallel.reduction import REDUCTIONS, Reduction
from distdl.parallel.shared import share_arrays
from distdl.parallel.tree import Shard, contiguous_shards
from distdl.parallel.world import alone, present, tell_the_others, world

__all__ = ["end_rank_after_host_fault", "from_rank_0", "guard", "on_rank_0", "together"]
__all__ += ["Communicator", "CompletedRecovery", "OneProcess", "ranks_per_host"]
__all__ += ["Field", "Layout", "Record", "Shard", "contiguous_shards", "deal", "loads_by_speed"]
__all__ += ["Position", "Survivors", "commit", "committed", "recover"]
__all__ += ["REDUCTIONS", "Reduction", "alone", "present", "share_arrays", "tell_the_others", "world"]
