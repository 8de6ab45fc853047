# docker build -t lit-gpt-gdn2 .          (another PyTorch image: --build-arg BASE=...)
# docker run --gpus all --ipc host -v $PWD/runs:/workspace/runs lit-gpt-gdn2 python pretrain.py --help
ARG BASE=pytorch/pytorch:2.13.0-cuda13.0-cudnn9-devel
FROM ${BASE}

WORKDIR /workspace
COPY pyproject.toml constraints.txt README.md ./
COPY lit_gpt lit_gpt
COPY cache.py data.py ./
RUN python -m pip install --no-cache-dir --constraint constraints.txt --editable ".[wandb]"
COPY . .
