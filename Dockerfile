# The package with its CUDA half, for a machine with an NVIDIA GPU:
#   docker build -t tokenflex . && docker run --gpus all --rm tokenflex info
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04

RUN apt-get update \
 && apt-get install --yes --no-install-recommends g++ make python3 python3-dev python3-venv \
 && rm -rf /var/lib/apt/lists/*
ENV PATH=/opt/tokenflex/bin:$PATH
RUN python3 -m venv /opt/tokenflex

WORKDIR /src
COPY . .
# The index of Python packages has builds of torch for CUDA.
RUN TOKENFLEX_CUDA=1 pip install --no-cache-dir --constraint constraints.txt '.[train,serve]'

WORKDIR /work
ENTRYPOINT ["tokenflex"]
CMD ["info"]
