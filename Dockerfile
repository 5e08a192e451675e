# The server alone, on a CPU:
#   docker build --build-arg TORCH_INDEX=URL --tag gptj8 .
#   docker run --init --publish 127.0.0.1:8000:8000 --volume "$PWD/artifacts:/models:ro" gptj8
# docs/serving.md explains both.

FROM python:3.11-slim AS wheel
# For the CPU kernels; gptj8 also installs without a compiler and is then slower.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY gptj8 gptj8
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.11-slim
# OpenMP, which the CPU kernels need.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libgomp1 \
    && rm -rf /var/lib/apt/lists/*
COPY requirements.txt /tmp/requirements.txt
# The package index with torch for CPUs; PyTorch's installation page names it. Without it, torch from
# PyPI is installed, which brings several GB for GPUs.
ARG TORCH_INDEX=
RUN pip install --no-cache-dir --no-deps ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} \
    "$(grep '^torch==' /tmp/requirements.txt)"
# What the wheel needs, in the versions that the tests use.
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    pip install --no-cache-dir --constraint /tmp/requirements.txt /wheels/*.whl
RUN useradd --system --uid 10001 --create-home gptj8
USER gptj8
WORKDIR /home/gptj8
EXPOSE 8000
# A large model takes minutes to load; until then, the port is closed.
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health')"]
# The container's port is published by choice, so the server listens on every address in it.
ENTRYPOINT ["gptj8", "serve", "--host", "0.0.0.0", "--model", "/models/base-8bit", \
    "--adapter", "/models/export"]
