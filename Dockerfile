# syntax=docker/dockerfile:1
# Two stages: `build` makes a virtual environment, the last stage carries it and nothing else.
# ci/dockerfile-steps runs the RUN lines of this file on a bare machine, since not every CI has a Docker engine.

FROM python:3.11-slim-bookworm AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY ci/constraints.txt ci/constraints.txt
COPY pipeline pipeline
RUN python -m venv /opt/enginewright
# Nothing here uses CUDA, and torch with CUDA is several gigabytes: give the address of PyTorch's index of CPU wheels by
# `--build-arg TORCH_INDEX=...`. Without it the configured index answers.
ARG TORCH_INDEX=
RUN /opt/enginewright/bin/pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch==2.13.0
RUN /opt/enginewright/bin/pip install --no-cache-dir --constraint ci/constraints.txt '.[onnxruntime,serve,sign]'

FROM python:3.11-slim-bookworm
COPY --from=build /opt/enginewright /opt/enginewright
ENV PATH=/opt/enginewright/bin:$PATH \
    ENGINEWRIGHT_CACHE=/cache \
    HF_HUB_DISABLE_TELEMETRY=1 \
    DO_NOT_TRACK=1
RUN useradd --create-home --uid 1000 wright && mkdir /cache /work && chown wright /cache /work
USER wright
WORKDIR /work
VOLUME ["/cache", "/work"]
ENTRYPOINT ["enginewright"]
CMD ["--help"]
