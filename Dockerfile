# syntax=docker/dockerfile:1
# docker build -t loramux:cpu .
# docker build -t loramux:cuda --build-arg DEVICE=cuda .
ARG DEVICE=cpu
ARG PYTHON_IMAGE=python:3.11.13-slim-bookworm

FROM ${PYTHON_IMAGE} AS python
ENV PYTHONDONTWRITEBYTECODE=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

# torch's CPU wheels are a tenth of the size; PyPI's carry the CUDA libraries, so that the host needs a driver only
FROM python AS index-cpu
ENV PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
FROM python AS index-cuda

# hadolint ignore=DL3006
FROM index-${DEVICE} AS build
WORKDIR /build
RUN python -m venv /opt/venv
# the dependencies in a layer of their own: it changes with these files only
COPY pyproject.toml constraints.txt README.md LICENSE ./
RUN mkdir src && /opt/venv/bin/pip install --constraint constraints.txt '.[otel]'
COPY src src
COPY kernels kernels
COPY adapters_store adapters_store
COPY router router
COPY server server
RUN /opt/venv/bin/pip install --no-deps --force-reinstall .

FROM python AS run-cpu
# Triton compiles a small launcher with the C compiler at its first use
FROM python AS run-cuda
RUN apt-get update \
 && apt-get install --yes --no-install-recommends gcc=4:12.2.* libc6-dev=2.36-* \
 && rm -rf /var/lib/apt/lists/*
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility

# hadolint ignore=DL3006
FROM run-${DEVICE}
RUN useradd --uid 10001 --user-group --create-home loramux \
 && install --directory --owner=loramux --group=loramux /var/lib/loramux /models
COPY --from=build /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH \
    LORAMUX_HOST=0.0.0.0 \
    LORAMUX_PORT=8000 \
    LORAMUX_STORE_DIR=/var/lib/loramux \
    HF_HOME=/models
USER 10001:10001
WORKDIR /home/loramux
# uploaded adapters, and models fetched by name
VOLUME ["/var/lib/loramux", "/models"]
EXPOSE 8000
# alive, as an orchestrator's liveness probe; /ready says whether the model is loaded
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import os, ssl, urllib.request as r; s = 's' * bool(os.environ.get('LORAMUX_SSL_CERTFILE')); r.urlopen(f'http{s}://127.0.0.1:' + os.environ['LORAMUX_PORT'] + '/health', timeout=4, context=ssl._create_unverified_context() if s else None)"]
ENTRYPOINT ["loramux"]
CMD ["serve"]
