# syntax=docker/dockerfile:1
# An image with the command `crossmae`. TORCH chooses the build of torch: cpu, or cu126, cu128, cu130 for CUDA. CUDA's
# libraries come with torch: the host needs only the driver and the NVIDIA Container Toolkit.
#
#     docker build --tag crossmae .
#     docker build --tag crossmae --build-arg TORCH=cu128 .
#     docker run --rm --gpus all --shm-size 8g -v "$PWD/IMAGES:/data:ro" -v "$PWD/outputs:/outputs" crossmae \
#         pretrain --config-file pretrain/small.yaml data.train=/data output_dir=/outputs/mine
#
# Checked by hadolint 2.15.1. Not built yet: no machine with a Docker engine was at hand.

FROM python:3.12-slim-bookworm AS build
ARG TORCH=cpu
# git: for the sources of detectron2, if the package index does not have them.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends git \
    && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/crossmae
ENV PATH=/opt/crossmae/bin:$PATH PIP_CACHE_DIR=/opt/.cache/pip
WORKDIR /source
COPY pyproject.toml setup.py README.md LICENSE NOTICE THIRD_PARTY.md requirements-tested.txt ./
COPY crossmae crossmae
COPY det det
COPY tools tools
COPY configs configs
# pip takes 2.11.0+cpu for the pin 2.11.0. A cache mount is no layer.
RUN --mount=type=cache,target=/opt/.cache/pip \
    pip install --constraint requirements-tested.txt --extra-index-url "https://download.pytorch.org/whl/${TORCH}" \
        ".[all]" \
    && python tools/install_detectron2.py

FROM python:3.12-slim-bookworm
LABEL org.opencontainers.image.title="CrossMAE toolkit" \
      org.opencontainers.image.licenses="Apache-2.0"
# A compiler: torch compiles the blocks of a model on a GPU.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --no-create-home --home-dir /cache crossmae \
    && mkdir /data /outputs /cache \
    && chmod 1777 /outputs /cache
COPY --from=build /opt/crossmae /opt/crossmae
# With `docker run --user`, the home folder is writable, too.
ENV PATH=/opt/crossmae/bin:$PATH \
    HOME=/cache \
    XDG_CACHE_HOME=/cache \
    HF_HOME=/cache/huggingface \
    TORCH_HOME=/cache/torch \
    MPLCONFIGDIR=/cache/matplotlib
VOLUME ["/data", "/outputs", "/cache"]
# The folder of relative paths: output_dir=outputs/mine is /outputs/mine.
WORKDIR /
USER 1000
ENTRYPOINT ["crossmae"]
CMD ["--help"]
