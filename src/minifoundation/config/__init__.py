"""Every setting: its type, bounds, default and where the default comes from. Imports no torch.

A setting is reached by its dotted name in YAML and on the command line (``train.lr``, ``--train.lr``); the few that
have a short flag name it in ``flag=``. Precedence: defaults < checkpoint (longft) < YAML < command line.
"""

from minifoundation.config.options import (
    REPOSITORY,
    BenchOptions,
    CheckOptions,
    ContaminationOptions,
    DoctorOptions,
    EvalOptions,
    ExportOptions,
    GenerateOptions,
    ImportOptions,
    InspectOptions,
    LongftOptions,
    PhaseOptions,
    PrepareConfig,
    PrepareOptions,
    PretrainOptions,
    PullOptions,
    ReportOptions,
    RunOptions,
    ServeOptions,
)
from minifoundation.config.reading import build, changed, dotted_names, fields, flags, merged, nearest, read_yaml, to_yaml, yaml_values
from minifoundation.config.run import DataConfig, ModelConfig, QualityFilter, RopeConfig, RunConfig, TokenizerConfig, TrainConfig
from minifoundation.config.setting import Settings, setting

__all__ = [
    "REPOSITORY",
    "BenchOptions",
    "CheckOptions",
    "ContaminationOptions",
    "DataConfig",
    "DoctorOptions",
    "EvalOptions",
    "ExportOptions",
    "GenerateOptions",
    "ImportOptions",
    "InspectOptions",
    "LongftOptions",
    "ModelConfig",
    "PhaseOptions",
    "PrepareConfig",
    "PrepareOptions",
    "PretrainOptions",
    "PullOptions",
    "QualityFilter",
    "ReportOptions",
    "RopeConfig",
    "RunConfig",
    "RunOptions",
    "ServeOptions",
    "Settings",
    "TokenizerConfig",
    "TrainConfig",
    "build",
    "changed",
    "dotted_names",
    "fields",
    "flags",
    "merged",
    "nearest",
    "read_yaml",
    "setting",
    "to_yaml",
    "yaml_values",
]
