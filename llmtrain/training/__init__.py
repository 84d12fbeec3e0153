"""The run: engine, loop, checkpoints, callbacks, loggers and report."""
