"""Every setting of a run, typed, with its default, checked where it is made."""

from mhc.config.run import *  # noqa: F403
