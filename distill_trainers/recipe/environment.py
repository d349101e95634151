"""Which environment variables a recipe may set: those that say how fast and where on this machine a run computes.

All others are refused, because many of them run code (`LD_PRELOAD`, `PYTHONPATH`, `CC`, `NCCL_NET_PLUGIN`), are
secrets, or say where secrets and data are sent (`HF_ENDPOINT`, `WANDB_BASE_URL`, `HTTPS_PROXY`). Whoever starts a run
can set them in the shell.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from ..exceptions import ConfigurationError
from ..settings import shown

_ALLOWED = """
CUDA_VISIBLE_DEVICES CUDA_DEVICE_ORDER CUDA_LAUNCH_BLOCKING CUDA_DEVICE_MAX_CONNECTIONS CUBLAS_WORKSPACE_CONFIG
CUDA_MODULE_LOADING NVIDIA_TF32_OVERRIDE HIP_VISIBLE_DEVICES ROCR_VISIBLE_DEVICES HSA_OVERRIDE_GFX_VERSION
PYTORCH_ENABLE_MPS_FALLBACK PYTORCH_MPS_(?:HIGH|LOW)_WATERMARK_RATIO TORCHDYNAMO_DISABLE TORCH_COMPILE_DISABLE
TORCH_DISTRIBUTED_DEBUG TORCH_CPP_LOG_LEVEL TF_CPP_MIN_LOG_LEVEL
NCCL_(?:IB_GID_INDEX|CROSS_NIC|NET_GDR_LEVEL|BUFFSIZE|M(?:IN|AX)_NCHANNELS|NSOCKS_PERTHREAD|SOCKET_NTHREADS)
OMP_WAIT_POLICY
PYTORCH_ALLOC_CONF PYTORCH_CUDA_ALLOC_CONF TORCH_LOGS TORCH_SHOW_CPP_STACKTRACES TORCH_ALLOW_TF32_CUBLAS_OVERRIDE
TORCH_NCCL_(?:ASYNC_ERROR_HANDLING|BLOCKING_WAIT|HEARTBEAT_TIMEOUT_SEC|AVOID_RECORD_STREAMS) TRITON_INTERPRET
NCCL_(?:DEBUG|DEBUG_SUBSYS|ALGO|PROTO|SOCKET_IFNAME|P2P_(?:DISABLE|LEVEL)|SHM_DISABLE|IB_(?:DISABLE|HCA|TIMEOUT)|NVLS_ENABLE)
GLOO_SOCKET_IFNAME ACCELERATE_(?:MIXED_PRECISION|USE_CPU)
(?:OMP|MKL|OPENBLAS|NUMEXPR|VECLIB_MAXIMUM)_NUM_THREADS KMP_AFFINITY KMP_BLOCKTIME OMP_PROC_BIND OMP_PLACES
TOKENIZERS_PARALLELISM RAYON_NUM_THREADS
HF_HUB_OFFLINE HF_DATASETS_OFFLINE TRANSFORMERS_OFFLINE HF_HUB_DISABLE_(?:TELEMETRY|XET|PROGRESS_BARS) DO_NOT_TRACK
HF_HUB_(?:DOWNLOAD|ETAG)_TIMEOUT HF_HUB_ENABLE_HF_TRANSFER HF_XET_HIGH_PERFORMANCE
(?:TRANSFORMERS|DATASETS|HF_HUB|ACCELERATE)_(?:VERBOSITY|LOG_LEVEL) TRANSFORMERS_NO_ADVISORY_WARNINGS
VLLM_(?:LOGGING_LEVEL|ATTENTION_BACKEND|CPU_KVCACHE_SPACE|CPU_OMP_THREADS_BIND|WORKER_MULTIPROC_METHOD|USE_V1)
WANDB_(?:PROJECT|NAME|NOTES|TAGS|RUN_GROUP|JOB_TYPE|RUN_ID|RESUME|WATCH|SILENT|CONSOLE)
WANDB_(?:MODE|DISABLED) COMET_(?:PROJECT_NAME|MODE) MLFLOW_EXPERIMENT_NAME TRACKIO_PROJECT
"""
_MAY_BE_SET = re.compile("|".join(_ALLOWED.split()))


def set_environment(variables: Any) -> None:
    """Set the environment variables that a recipe names.

    Raises:
        ConfigurationError: no mapping of names to single values, or one that a recipe may not set.
    """
    if not isinstance(variables, Mapping):
        raise ConfigurationError(f"Got `env: {shown(variables)}`; expected a mapping of names to values.")
    refused = [shown(name) for name in variables if not _MAY_BE_SET.fullmatch(str(name))]
    if refused:  # the values may be secrets, and are not told
        raise ConfigurationError(
            f"Got `env` with {', '.join(refused)}; expected variables of speed, devices and logs. A recipe must not "
            "set what can run code or send something elsewhere: set it in the shell that starts the run."
        )
    for name, value in variables.items():
        if isinstance(value, bool) or not isinstance(value, (str, int, float)) or "\0" in str(value):
            raise ConfigurationError(
                f"Got `env: {{{name}: {shown(value)}}}`; expected text or a number. Put the value in quotes."
            )
    os.environ.update({str(name): str(value) for name, value in variables.items()})
