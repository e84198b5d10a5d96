"""A run: its step, its loop, its checkpoints, its folder."""
