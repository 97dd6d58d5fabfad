# syntax=docker/dockerfile:1
# One image for Ray heads, workers, jobs and MLflow. BASE pins the interpreter by digest in a release build.
ARG BASE=python:3.11-slim-bookworm
FROM ${BASE} AS build
ARG EXTRAS=s3,postgres,k8s
# cpu: the small CPU build of torch; anything else that uv knows (cu130, auto) for a GPU image.
ARG TORCH_BACKEND=cpu
ENV UV_COMPILE_BYTECODE=1 UV_LINK_MODE=copy
RUN pip install --no-cache-dir "uv>=0.9"
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY platform platform
COPY kernels kernels
RUN uv venv /opt/altiplano && \
    uv pip install --no-cache --python /opt/altiplano/bin/python --torch-backend="${TORCH_BACKEND}" ".[${EXTRAS}]"

FROM ${BASE}
# KubeRay's probes call wget through bash.
RUN apt-get update && \
    apt-get install -y --no-install-recommends bash wget && \
    rm -rf /var/lib/apt/lists/* && \
    useradd --create-home --uid 1000 altiplano
COPY --from=build /opt/altiplano /opt/altiplano
COPY --chown=1000:1000 pipelines /home/altiplano/pipelines
ENV PATH=/opt/altiplano/bin:$PATH \
    RAY_USAGE_STATS_ENABLED=0 \
    RAY_AUTH_MODE=token
USER 1000
WORKDIR /home/altiplano
CMD ["altiplano", "--help"]
