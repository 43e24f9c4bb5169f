# The GPU environment as an image (docs/gpus.md). The host needs an NVIDIA driver of branch 580 or newer and NVIDIA's
# container toolkit; everything else of CUDA comes with torch. Build it, then run the first hour, or three seeds:
#
#   docker build --tag golf .
#   mkdir -p data/sp8192 results
#   docker run --rm --gpus all --ipc host --user "$(id -u)" -e DEVICE=cuda -e LAUNCH=first-hour \
#       -v "$PWD/data/sp8192:/golf/data/sp8192" -v "$PWD/results:/golf/results" golf
#
# --ipc host: NCCL needs more shared memory than a container has. --user: what is written belongs to you. Without a wheel
# of FlashAttention: docker build --build-arg FLASH_ATTENTION= --tag golf .
FROM python:3.11.14-slim-bookworm

# Triton and Inductor compile with gcc during a run.
RUN apt-get update && \
    apt-get install --yes --no-install-recommends build-essential && \
    rm -rf /var/lib/apt/lists/*

RUN useradd --create-home golf && install --directory --owner golf /golf
USER golf
WORKDIR /golf

# The environment alone first: it stays cached while the sources change.
COPY --chown=golf Makefile requirements.txt requirements-gpu.txt requirements-tools.txt requirements-data.txt \
    requirements-test.txt ./
ARG FLASH_ATTENTION
RUN make venv-gpu .venv/tools .venv/data-tools .venv/test-tools && rm -rf ~/.cache

COPY --chown=golf . .
# Whatever user runs the container writes here, and nowhere else.
RUN install --directory data/sp8192 logs packed results submissions && \
    chmod 1777 data data/sp8192 logs packed results submissions
# HOME and USER: caches of Triton and Inductor, for a user without an entry in /etc/passwd.
ENV HOME=/tmp USER=golf DEVICE=cuda NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
CMD ["launch/job.sh"]
