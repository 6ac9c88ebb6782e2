# vlm-distill on NVIDIA GPUs:
#   docker build -t vlm-distill .
#   docker run --rm --gpus all --ipc=host --user "$(id -u):$(id -g)" -v "$PWD:/workspace" vlm-distill train my.yaml

# The wheel, built apart so that the image holds neither the sources nor what builds them.
FROM python:3.12-slim-bookworm AS wheel
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY configs configs
COPY data data
COPY vision vision
COPY vlm_distill vlm_distill
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM nvidia/cuda:13.0.1-runtime-ubuntu24.04
# A compiler and Python's headers: Triton compiles a launcher for each kernel.
# Ubuntu's archive keeps only the newest version of a package, so that pinned ones could not be installed for long.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates g++ ninja-build python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
COPY docker/constraints.txt /opt/constraints.txt
COPY --from=wheel /wheels /opt/wheels
RUN python3 -m venv /opt/vlm-distill \
    && /opt/vlm-distill/bin/pip install --no-cache-dir --constraint /opt/constraints.txt \
        --find-links /opt/wheels "vlm-distill[lora,wandb,mlflow,trackio]==0.1.0" \
    && rm -rf /opt/wheels
ENV PATH=/opt/vlm-distill/bin:$PATH

# Files are written as the user who starts it: pass --user. Caches of models and kernels go to the mounted folder.
RUN useradd --uid 10001 --no-create-home vlm && install --directory --owner vlm --mode 1777 /workspace
ENV HOME=/workspace USER=vlm
USER 10001
WORKDIR /workspace
ENTRYPOINT ["vlm-distill"]
CMD ["--help"]
