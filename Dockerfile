# distill_trainers on NVIDIA GPUs, with CUDA's compiler for kernels that are made on the machine (DeepSpeed's, Triton's).
#
# NOT BUILT by this project: it has had no machine that builds images. Its lines were read, not run.
#
#   docker build -t distill-trainers .
#   docker run --rm --gpus all --ipc host -v "$PWD:/work" -v "$HOME/.cache/huggingface:/cache" distill-trainers \
#       accelerate launch --config_file accelerate_configs/zero3.yaml -m distill_trainers.cli.train \
#       --config recipes/qwen2.5-0.5b/gkd.yaml
#
# --ipc host gives processes the shared memory that NCCL wants. /work is the folder with your recipes; without a clone,
# `distill-trainers recipes` fills it. BASE has to fit the driver of the host, and TORCH the CUDA version of BASE: for
# another one than PyPI's, give pip another index by PIP_ARGS.
ARG BASE=nvidia/cuda:13.0.0-devel-ubuntu24.04
FROM ${BASE}

RUN apt-get update \
    && apt-get install -y --no-install-recommends git python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH

# Torch first: it is large and seldom changes. On Linux, PyPI's builds are those with CUDA.
ARG TORCH=torch==2.13.0
ARG PIP_ARGS=
RUN pip install --no-cache-dir ${PIP_ARGS} ${TORCH}

WORKDIR /opt/distill-trainers
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY recipes recipes
COPY accelerate_configs accelerate_configs
COPY distill_trainers distill_trainers
ARG EXTRAS=all
RUN pip install --no-cache-dir ${PIP_ARGS} -c constraints.txt ".[${EXTRAS}]"

ENV HF_HOME=/cache
WORKDIR /work
CMD ["distill-trainers", "--help"]
