# The live page and its interfaces, as a container that is not root.
#
#   docker build -t rehyat .                                   # CPU
#   docker build -t rehyat --build-arg DEVICE=cuda .           # NVIDIA GPU, through the NVIDIA Container Toolkit
#   docker run -p 127.0.0.1:8765:8765 -v rehyat:/data -e REHYAT_TOKEN=secret rehyat
#   docker run --gpus all -p 127.0.0.1:8765:8765 -v rehyat:/data -v ~/student:/model:ro rehyat --model /model
ARG PYTHON=3.12
FROM python:${PYTHON}-slim

# cpu or cuda: which of JAX's wheels.
ARG DEVICE=cpu

WORKDIR /opt/rehyat
COPY pyproject.toml README.md LICENSE ./
COPY rehyat_jax rehyat_jax
COPY pallas_kernels pallas_kernels
COPY train train
COPY configs configs
COPY benchmarks benchmarks
RUN case "$DEVICE" in \
      cpu) extras=serve,hub ;; \
      cuda) extras=serve,hub,cuda ;; \
      *) echo "DEVICE must be cpu or cuda, not $DEVICE" >&2; exit 1 ;; \
    esac \
    && pip install --no-cache-dir ".[$extras]" \
    && useradd --system --uid 10001 --create-home rehyat \
    && install -d -o rehyat -g rehyat /data

USER 10001
# Compiled programs, prompt embeddings and streams outlive the container where /data is a volume.
ENV REHYAT_CACHE_DIR=/data/cache
VOLUME /data
WORKDIR /data
EXPOSE 8765

HEALTHCHECK --interval=30s --timeout=5s --start-period=120s \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8765/health', timeout=4)"]

# SIGTERM: the chunk under way is finished, and every stream is saved.
STOPSIGNAL SIGTERM
ENTRYPOINT ["rehyat", "serve", "--host", "0.0.0.0", "--port", "8765", "--folder", "/data/streams", "--log", "json"]
