# nirvana with the kernels of the extra `cuda`:
#
#   docker build -f release/docker/cuda.Dockerfile -t nirvana:cuda .
#   docker run --rm --gpus all -v "$PWD:/work" nirvana:cuda bench --json bench.json
#
# PyTorch's wheel brings its own CUDA libraries. The compilers of the base image are for Triton and
# flash-qla, which build their kernels at run time; its CUDA version must be one that the host's
# driver supports.

ARG BASE=nvidia/cuda:12.8.1-devel-ubuntu24.04
FROM ${BASE}
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-dev python3-venv build-essential \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home nirvana && mkdir /work && chown nirvana /work
RUN python3 -m venv /opt/nirvana
ENV PATH=/opt/nirvana/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY src src
RUN pip install -c constraints.txt '.[mri,train,eval,app,cuda]'
USER nirvana
WORKDIR /work
ENTRYPOINT ["nirvana"]
CMD ["--help"]
