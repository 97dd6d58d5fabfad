# syntax=docker/dockerfile:1
# One image for Ray heads, workers, jobs, MLflow and the chart's hooks.
#   docker build --target cpu -t altiplano:0.1.0 .
#   docker build --target gpu -t altiplano:0.1.0 .
# A release build pins BASE by digest: --build-arg BASE=docker.io/library/python@sha256:...
ARG BASE=docker.io/library/python:3.11.14-slim-bookworm

FROM ${BASE} AS tools
ARG UV_VERSION=0.13.8
RUN pip install --no-cache-dir "uv==${UV_VERSION}"
ENV UV_COMPILE_BYTECODE=1 UV_LINK_MODE=copy UV_NO_CACHE=1 VIRTUAL_ENV=/opt/altiplano
# What changes with every commit is not here: a change of code makes a new last layer of a few megabytes.
COPY pyproject.toml README.md LICENSE /src/
WORKDIR /src

FROM tools AS packages-cpu
# Helm values and custom resources name the same Ray; a test holds them together.
ARG RAY_VERSION=2.60.0
ARG EXTRAS="--extra s3 --extra postgres --extra server --extra k8s --extra tracing --extra eval"
RUN uv venv "${VIRTUAL_ENV}" && \
    echo "ray==${RAY_VERSION}" > /tmp/constraints.txt && \
    uv pip install --torch-backend=cpu --constraints /tmp/constraints.txt -r pyproject.toml ${EXTRAS}

FROM tools AS packages-gpu
ARG RAY_VERSION=2.60.0
ARG EXTRAS="--extra s3 --extra postgres --extra server --extra k8s --extra tracing --extra eval --extra gpu"
# As uv names it: cu128, cu130, auto.
ARG TORCH_BACKEND=cu130
RUN uv venv "${VIRTUAL_ENV}" && \
    echo "ray==${RAY_VERSION}" > /tmp/constraints.txt && \
    uv pip install --torch-backend="${TORCH_BACKEND}" --constraints /tmp/constraints.txt -r pyproject.toml ${EXTRAS}

FROM tools AS code
COPY platform platform
COPY kernels kernels
# A wheel without dependencies: those are in the layer before.
RUN uv build --wheel --out-dir /wheels .

FROM ${BASE} AS runtime
# KubeRay's probes call wget through bash.
RUN apt-get update && \
    apt-get install -y --no-install-recommends bash ca-certificates wget && \
    rm -rf /var/lib/apt/lists/* && \
    groupadd --gid 10001 altiplano && \
    useradd --create-home --uid 10001 --gid 10001 altiplano
# No variable holds a secret; Ray refuses callers without the cluster's token.
ENV PATH=/opt/altiplano/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    RAY_USAGE_STATS_ENABLED=0 \
    RAY_AUTH_MODE=token
WORKDIR /home/altiplano
CMD ["altiplano", "--help"]

FROM runtime AS cpu
COPY --from=packages-cpu /opt/altiplano /opt/altiplano
RUN --mount=from=code,source=/wheels,target=/wheels --mount=from=tools,source=/usr/local/bin/uv,target=/usr/local/bin/uv \
    uv pip install --no-cache --no-deps --python /opt/altiplano/bin/python /wheels/*.whl
COPY --chown=10001:10001 pipelines pipelines
USER 10001:10001

FROM runtime AS gpu
# Triton compiles a launcher for each kernel with a C compiler.
RUN apt-get update && \
    apt-get install -y --no-install-recommends gcc libc6-dev && \
    rm -rf /var/lib/apt/lists/*
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=packages-gpu /opt/altiplano /opt/altiplano
RUN --mount=from=code,source=/wheels,target=/wheels --mount=from=tools,source=/usr/local/bin/uv,target=/usr/local/bin/uv \
    uv pip install --no-cache --no-deps --python /opt/altiplano/bin/python /wheels/*.whl
COPY --chown=10001:10001 pipelines pipelines
USER 10001:10001
