# One control-plane service: datasets, training, conversion or inference; or the gateway. No torch.
#   make images, or: docker build --build-arg SERVICE=datasets -f docker/service.Dockerfile .
# BASE is any image of Debian's kind with Python 3.11 or newer as `python`; give it by digest (name@sha256:…) where builds
# must repeat.
ARG BASE=docker.io/library/python:3.12-slim-bookworm

FROM ${BASE} AS packages
ARG SERVICE
ARG PIP_EXTRA_INDEX_URL=""
ARG PIP_FIND_LINKS=""
COPY docker/locks/${SERVICE}.txt /lock.txt
# The environment gets no pip of its own: what is in it was put there here, by hash.
RUN python -m venv --without-pip /opt/venv \
 && python -m pip --python /opt/venv/bin/python install --no-cache-dir --no-deps --require-hashes -r /lock.txt
# What packages bring that no service loads: their own tests, headers, of Arrow what reads no file of rows, of the cluster's
# client its thousand generated classes (launchers speak plain JSON); and the symbols that only a debugger reads. Libraries
# in *.libs were patched after they were linked, which strip does not stand.
WORKDIR /opt/venv/lib
# hadolint ignore=DL3008
RUN find . -depth -type d \( -name tests -o -name SelfTest -o -path '*/kubernetes/aio' -o -path '*/numpy/f2py' \
      -o -path '*/numpy/_core/include' -o -path '*/pyarrow/include' -o -path '*/pyarrow/src' \) -exec rm -r {} + \
 && find . -path '*/pyarrow/*' \( -name '*_flight*' -o -name '*_s3*' -o -name '*_gcsfs*' -o -name '*_azurefs*' \
      -o -name '*_orc*' -o -name '*_cpp_tests*' -o -name '*.px?' -o -name 'libarrow*.so' -o -name '*.so.*.*.*' \) -delete \
 && find . -type f \( -path '*/kubernetes/client/api/*' -o -path '*/kubernetes/client/models/*' \) \
      ! -name '__init__*' -delete \
 && apt-get update && apt-get install -y --no-install-recommends binutils && rm -rf /var/lib/apt/lists/* \
 && find . -type f -name '*.so*' ! -path '*.libs/*' -exec strip --strip-unneeded {} +
# What the image holds, as CycloneDX; the tool that writes it stays behind.
WORKDIR /
COPY docker/locks/sbom.txt /sbom.txt
RUN python -m venv --without-pip /opt/sbom \
 && python -m pip --python /opt/sbom/bin/python install --no-cache-dir --no-deps --require-hashes -r /sbom.txt \
 && /opt/sbom/bin/cyclonedx-py environment --output-reproducible -o /opt/venv/sbom.cdx.json /opt/venv
# Its room and what that stands on; the gateway is a client of the others.
COPY services /services
RUN mkdir -p /opt/quartet/services \
 && cp -r /services/__init__.py /services/finetune /services/common "/services/${SERVICE}" /opt/quartet/services \
 && if [ "${SERVICE}" = gateway ]; then cp -r /services/client /opt/quartet/services; fi

FROM ${BASE}
ARG SERVICE
ENV PATH=/opt/venv/bin:$PATH PYTHONPATH=/opt/quartet PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
COPY --from=packages /opt/venv /opt/venv
COPY --from=packages /opt/quartet /opt/quartet
COPY protos/quartet /opt/quartet/quartet
# Compiled here: the root is read-only when it runs. An exec form knows no arguments, so the entry is a script.
RUN python -m compileall -q /opt/quartet \
 && printf '#!/bin/sh\nexec python -m services.%s "$@"\n' "${SERVICE}" > /usr/local/bin/quartet-service \
 && chmod 755 /usr/local/bin/quartet-service
USER 10001:10001
ENTRYPOINT ["quartet-service"]
