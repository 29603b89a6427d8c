# The image with CUDA's half of libtorch beside the CPU's: a process that finds it there loads it. The driver is the host's.
#
#     docker build -f docker/Dockerfile -t lathe .
#     docker build -f docker/cuda.Dockerfile -t lathe:cuda .

FROM rust:1-bookworm AS pytorch
RUN apt-get update && apt-get install -y --no-install-recommends python3-pip && rm -rf /var/lib/apt/lists/*
ENV LATHE_CACHE=/opt/lathe
WORKDIR /src
COPY docker/setup.py ./
# All of the same build as the CPU's half, less the files that the image has already.
RUN cd "$(python3 setup.py peer)" && to=/image/opt/lathe/libtorch-$(python3 -c 'import sys; sys.path.append("/src"); import setup; print(setup.LIBTORCH_VERSION)') \
    && mkdir -p $to/torch && mv torch/lib $to/torch/ && mv nvidia $to/ && rm -rf /opt/lathe \
    && rm $to/torch/lib/libtorch_cpu.so $to/torch/lib/libc10.so $to/torch/lib/libgomp.so.1 \
        $to/nvidia/cu13/lib/libcudart.so.13 $to/nvidia/cu13/lib/libcupti.so.13

FROM lathe
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=pytorch /image /
