# nirvana without a GPU:
#
#   docker build -f release/docker/cpu.Dockerfile --build-arg TORCH_INDEX=URL -t nirvana:cpu .
#   docker run --rm -v "$PWD:/work" nirvana:cpu demo
#
# TORCH_INDEX is the address of PyTorch's index of CPU builds, as its installation page gives it.
# Without it pip takes the build for CUDA, which is several gigabytes larger and works as well.

FROM python:3.11-slim AS build
ARG TORCH_INDEX=""
WORKDIR /src
RUN python -m venv /opt/nirvana
ENV PATH=/opt/nirvana/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
COPY constraints.txt ./
RUN pip install -c constraints.txt torch ${TORCH_INDEX:+--index-url "$TORCH_INDEX"}
COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN pip install -c constraints.txt '.[mri,train,eval,app]'

FROM python:3.11-slim
# The runtime of OpenMP, which PyTorch and scikit-image load.
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home nirvana && mkdir /work && chown nirvana /work
COPY --from=build /opt/nirvana /opt/nirvana
ENV PATH=/opt/nirvana/bin:$PATH
USER nirvana
WORKDIR /work
ENTRYPOINT ["nirvana"]
CMD ["--help"]
