"""What any program stands on: console, files, processes, signals, flags."""
