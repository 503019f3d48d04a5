# zimage-train for rented GPUs. Nobody has built it yet (docs/untested.md).
#
#   docker build -t zimage-train .
#   docker run --gpus all -v "$PWD:/workspace" zimage-train zimage-train train my.yaml
#   docker run --gpus all -v "$PWD:/workspace" -p 7860:7860 zimage-train zimage-train ui --host 0.0.0.0 --no-browser
#   docker run --gpus all -v "$PWD:/workspace" --user "$(id -u):$(id -g)" zimage-train zimage-train train my.yaml
#
# torch is installed once, with the CUDA libraries that its wheels bring, so the base image has none of its own. For a
# driver that is too old for them, name an older CUDA in both arguments:
#   --build-arg CUDA=12.6.3 --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu126
ARG CUDA=13.0.1
FROM nvidia/cuda:${CUDA}-base-ubuntu24.04

RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends python3 python3-venv openssh-server \
 && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/zimage-train
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY zimage_train zimage_train
ARG TORCH_INDEX=
RUN python3 -m venv venv \
 && venv/bin/pip install --no-cache-dir -c constraints.txt ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} ".[ui]"
COPY configs configs
COPY scripts/runpod scripts/runpod

ENV PATH=/opt/zimage-train/venv/bin:$PATH \
    VOLUME=/workspace \
    HF_HOME=/workspace/huggingface \
    XDG_CACHE_HOME=/workspace/cache
# For --user: whoever it is may write there, and has a home.
RUN mkdir -p /workspace && chmod 1777 /workspace
ENV HOME=/workspace
WORKDIR /workspace
CMD ["/opt/zimage-train/scripts/runpod/start.sh"]
