"""Files of a run: durable writes, checkpoints, the run folder."""
