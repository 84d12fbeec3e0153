"""DeepSpeed behind one door: its configuration, the training step, and its checkpoint files."""
