"""A step on machines that are not here: memory, time, communication."""
