# The worker: services/finetune and what it stands on; it knows no gRPC, no database, no Kubernetes.
#   VARIANT=cuda  torch as the package index has it, with CUDA
#   VARIANT=cpu   the small build; PIP_EXTRA_INDEX_URL must name PyTorch's CPU index
ARG BASE=docker.io/library/python:3.12-slim-bookworm

FROM ${BASE} AS packages
ARG VARIANT=cuda
ARG PIP_EXTRA_INDEX_URL=""
ARG PIP_FIND_LINKS=""
COPY docker/locks/worker-${VARIANT}.txt /lock.txt
RUN python -m venv --without-pip /opt/venv \
 && python -m pip --python /opt/venv/bin/python install --no-cache-dir --no-deps --require-hashes -r /lock.txt
# What the image holds, as CycloneDX; the tool that writes it stays behind.
COPY docker/locks/sbom.txt /sbom.txt
RUN python -m venv --without-pip /opt/sbom \
 && python -m pip --python /opt/sbom/bin/python install --no-cache-dir --no-deps --require-hashes -r /sbom.txt \
 && /opt/sbom/bin/cyclonedx-py environment --output-reproducible -o /opt/venv/sbom.cdx.json /opt/venv

FROM ${BASE}
# torch.compile asks for a C compiler while it runs: with VARIANT=cuda give RUNTIME_PACKAGES="gcc libc6-dev" (make images
# does). It is no tool of the build; the CPU variant is without.
ARG RUNTIME_PACKAGES=""
# hadolint ignore=DL3008,SC2086
RUN if [ -n "${RUNTIME_PACKAGES}" ]; then \
      apt-get update && apt-get install -y --no-install-recommends ${RUNTIME_PACKAGES} \
      && rm -rf /var/lib/apt/lists/*; \
    fi
ENV PATH=/opt/venv/bin:$PATH PYTHONPATH=/opt/quartet PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
# Everything that libraries write goes to /tmp, the one folder that a pod may write to.
ENV HOME=/tmp HF_HOME=/tmp/hf TORCHINDUCTOR_CACHE_DIR=/tmp/inductor TRITON_CACHE_DIR=/tmp/triton
# As for workers of one machine: services/common/launchers/local.py says why.
ENV OMP_WAIT_POLICY=PASSIVE GOMP_SPINCOUNT=1000
COPY --from=packages /opt/venv /opt/venv
COPY services/__init__.py /opt/quartet/services/
COPY services/finetune /opt/quartet/services/finetune
RUN python -m compileall -q /opt/quartet
USER 10001:10001
ENTRYPOINT ["python"]
CMD ["-m", "services.finetune"]
