"""A callback that stores the records of a run in a file, as the docstring of `distdl.Callback` asks."""

import json

import distdl

#: Fields of the summary that may differ after a failure.
OF_THIS_RUN = {"ranks", "recoveries", "train_seconds", "samples_per_second"}
FILE = "records.jsonl"


class Recorder(distdl.Callback):
    """Stores every record, with the name of its event."""

    def on_start(self, record):
        path = self.run.folder / FILE
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        path.write_text("".join(line for line in lines if json.loads(line)[1]["step"] <= record["step"]))
        self.file = path.open("a")

    def store(self, event, record):
        self.file.write(json.dumps([event, record]) + "\n")

    def on_step(self, record):
        self.store("on_step", record)

    def on_epoch(self, record):
        self.store("on_epoch", record)

    def on_checkpoint(self, record):
        self.store("on_checkpoint", record)
        self.file.flush()

    def on_recovery(self, record):
        self.store("on_recovery", record)

    def on_end(self, record):
        self.store("on_end", {"step": record["steps"], **record})
        self.file.close()


def records_in(folder, *, of_this_run=False):
    """Return the stored pairs of event and record; by default without those, and without the numbers, of one run."""
    found = [json.loads(line) for line in (folder / FILE).read_text().splitlines()]
    if of_this_run:
        return [tuple(one) for one in found]
    return [
        (event, {name: value for name, value in record.items() if name not in OF_THIS_RUN})
        for event, record in found
        if event != "on_recovery"
    ]
