# torch, Apex and Transformer Engine come from the image, built for one another, and stay as they are.
ARG TAG=26.04-py3
FROM nvcr.io/nvidia/pytorch:${TAG}

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
WORKDIR /workspace/minitron_mcore
COPY . .

# The image's own PIP_CONSTRAINT freezes every package it was built with, megatron-core's requirements among them; this
# one freezes only what is compiled against its torch, so pip stops with an error rather than replace any of it.
ENV PIP_CONSTRAINT=/etc/pip/minitron.txt
RUN pip list --format=freeze \
    | grep -E '^(apex|flash[-_]attn|numpy|torch|torchvision|transformer[-_]engine.*|(pytorch-)?triton)==' \
    > "${PIP_CONSTRAINT}" \
    && pip install --no-cache-dir -e .
