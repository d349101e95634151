"""The doctor: what would go wrong with a run, found before it starts, each with its remedy."""

from .case import Case
from .examine import Diagnosis, examine
from .findings import Finding, Severity
from .launch import Gpus, Launch, launch_here, read_launch
from .memory import MemoryEstimate, Workload, estimate
from .shapes import ModelShape, shape_of
