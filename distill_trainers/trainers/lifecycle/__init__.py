"""What surrounds the steps of a run: checkpoints, records, callbacks, publishing."""
