# docker build -t hf_importance .                            CPU
# docker build -t hf_importance --build-arg DEVICE=cuda .    GPU; run it with --gpus all
# torch comes from the index that pip is set to; --build-arg PIP_EXTRA_INDEX_URL=… names another one for smaller CPU wheels.
ARG DEVICE=cpu

FROM python:3.12-slim AS cpu

FROM nvidia/cuda:13.0.1-runtime-ubuntu24.04 AS cuda
RUN apt-get update && apt-get install -y --no-install-recommends python3 python3-venv && rm -rf /var/lib/apt/lists/*

FROM ${DEVICE}
ARG PIP_EXTRA_INDEX_URL
WORKDIR /hf_importance
COPY . .
RUN bash scripts/test.sh
CMD ["bash", "scripts/quickstart.sh"]
