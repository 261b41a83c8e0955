# One control-plane service: datasets, training, conversion or inference. No torch.
#   make images, or: docker build --build-arg SERVICE=datasets -f docker/service.Dockerfile .
# BASE is any image with Python 3.11 or newer as `python`; give it by digest (name@sha256:…) where builds must repeat.
ARG BASE=docker.io/library/python:3.12-slim-bookworm

FROM ${BASE} AS packages
ARG SERVICE
ARG PIP_EXTRA_INDEX_URL=""
ARG PIP_FIND_LINKS=""
COPY docker/locks/${SERVICE}.txt /lock.txt
# The environment gets no pip of its own: what is in it was put there here, by hash.
RUN python -m venv --without-pip /opt/venv \
 && python -m pip --python /opt/venv/bin/python install --no-cache-dir --no-deps --require-hashes -r /lock.txt \
 && rm -rf /opt/venv/lib/python3*/site-packages/kubernetes/aio /opt/venv/lib/python3*/site-packages/pyarrow/include \
           /opt/venv/lib/python3*/site-packages/pyarrow/tests
# What the image holds, as CycloneDX; the tool that writes it stays behind.
COPY docker/locks/sbom.txt /sbom.txt
RUN python -m venv --without-pip /opt/sbom \
 && python -m pip --python /opt/sbom/bin/python install --no-cache-dir --no-deps --require-hashes -r /sbom.txt \
 && /opt/sbom/bin/cyclonedx-py environment --output-reproducible -o /opt/venv/sbom.cdx.json /opt/venv

FROM ${BASE}
ARG SERVICE
ENV PATH=/opt/venv/bin:$PATH PYTHONPATH=/opt/quartet PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
COPY --from=packages /opt/venv /opt/venv
COPY protos/quartet /opt/quartet/quartet
COPY services/__init__.py /opt/quartet/services/
COPY services/finetune /opt/quartet/services/finetune
COPY services/common /opt/quartet/services/common
COPY services/${SERVICE} /opt/quartet/services/${SERVICE}
# Compiled here: the root is read-only when it runs. An exec form knows no arguments, so the entry is a script.
RUN python -m compileall -q /opt/quartet \
 && printf '#!/bin/sh\nexec python -m services.%s "$@"\n' "${SERVICE}" > /usr/local/bin/quartet-service \
 && chmod 755 /usr/local/bin/quartet-service
USER 10001:10001
ENTRYPOINT ["quartet-service"]
