"""Config files: short changes to the defaults of `mhc.config`.

`--config=smoke` is the file smoke.py of this folder, wherever it is installed.
"""
