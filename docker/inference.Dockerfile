# The engine server: one endpoint, one process, one model; with vLLM in the variant cuda. VARIANT and BASE are those of
# worker.Dockerfile.
ARG BASE=docker.io/library/python:3.12-slim-bookworm

FROM ${BASE} AS packages
ARG VARIANT=cuda
ARG PIP_EXTRA_INDEX_URL=""
ARG PIP_FIND_LINKS=""
COPY docker/locks/inference-${VARIANT}.txt /lock.txt
RUN python -m venv --without-pip /opt/venv \
 && python -m pip --python /opt/venv/bin/python install --no-cache-dir --no-deps --require-hashes -r /lock.txt
# What the image holds, as CycloneDX; the tool that writes it stays behind.
COPY docker/locks/sbom.txt /sbom.txt
RUN python -m venv --without-pip /opt/sbom \
 && python -m pip --python /opt/sbom/bin/python install --no-cache-dir --no-deps --require-hashes -r /sbom.txt \
 && /opt/sbom/bin/cyclonedx-py environment --output-reproducible -o /opt/venv/sbom.cdx.json /opt/venv

FROM ${BASE}
ARG RUNTIME_PACKAGES=""
# hadolint ignore=DL3008,SC2086
RUN if [ -n "${RUNTIME_PACKAGES}" ]; then \
      apt-get update && apt-get install -y --no-install-recommends ${RUNTIME_PACKAGES} \
      && rm -rf /var/lib/apt/lists/*; \
    fi
ENV PATH=/opt/venv/bin:$PATH PYTHONPATH=/opt/quartet PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
ENV HOME=/tmp HF_HOME=/tmp/hf TORCHINDUCTOR_CACHE_DIR=/tmp/inductor TRITON_CACHE_DIR=/tmp/triton
# As for workers of one machine: services/common/launchers/local.py says why.
ENV OMP_WAIT_POLICY=PASSIVE GOMP_SPINCOUNT=1000
COPY --from=packages /opt/venv /opt/venv
COPY protos/quartet /opt/quartet/quartet
COPY services/__init__.py /opt/quartet/services/
COPY services/finetune /opt/quartet/services/finetune
COPY services/common /opt/quartet/services/common
COPY services/inference /opt/quartet/services/inference
RUN python -m compileall -q /opt/quartet
USER 10001:10001
ENTRYPOINT ["python"]
CMD ["-m", "services.inference.engines"]
