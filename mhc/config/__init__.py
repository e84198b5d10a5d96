"""Every setting of a run: typed, with a default, checked when it is made.

A `Config` describes one training run. Files in configs/ are short diffs against
these defaults; `dicts` converts them to and from nested dicts.
"""

from mhc.config.attention import AttentionConfig
from mhc.config.attention import RopeScalingConfig
from mhc.config.model import DEPTH_KINDS
from mhc.config.model import KINDS
from mhc.config.model import ConnectionConfig
from mhc.config.model import Kind
from mhc.config.model import ModelConfig
from mhc.config.model import MoEConfig
from mhc.config.run import Between
from mhc.config.run import Config
from mhc.config.run import DataConfig
from mhc.config.run import GuardsConfig
from mhc.config.run import Head
from mhc.config.run import Keep
from mhc.config.run import MeshConfig
from mhc.config.run import OptimizerConfig
from mhc.config.run import Policy
from mhc.config.run import Schedule
from mhc.config.task import TaskConfig

__all__ = [
  'DEPTH_KINDS',
  'KINDS',
  'AttentionConfig',
  'Between',
  'Config',
  'ConnectionConfig',
  'DataConfig',
  'GuardsConfig',
  'Head',
  'Keep',
  'Kind',
  'MeshConfig',
  'MoEConfig',
  'ModelConfig',
  'OptimizerConfig',
  'Policy',
  'RopeScalingConfig',
  'Schedule',
  'TaskConfig',
]
