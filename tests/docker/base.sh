#!/bin/sh
# Makes a base image from Debian's own packages, where no registry of images can be reached: base.sh NAME
# Needs mmdebstrap and buildah. What comes out has Python 3.11 as `python`, as docker.io/library/python:3.11-slim has.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
mmdebstrap --quiet --variant=minbase --include=ca-certificates,python3,python3-pip,python3-venv \
  bookworm "$folder/base.tar" /etc/apt/sources.list.d/debian.sources
cat > "$folder/Dockerfile" <<'D'
FROM scratch
ADD base.tar /
RUN ln -s python3 /usr/bin/python && rm /usr/lib/python3.11/EXTERNALLY-MANAGED
CMD ["python3"]
D
buildah bud --isolation chroot -t "$1" "$folder"
