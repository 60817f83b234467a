# The image that cells run in, for engines that reach a registry.
#
#   docker build --target plain -t rlm-sandbox - < docker/sandbox.Dockerfile
#   docker build --target science -t rlm-sandbox:science - < docker/sandbox.Dockerfile
#
# `rlm docker build --from registry [--science]` does the same. Nothing of rlm is in it: the worker is sent when a
# sandbox starts. It runs read-only, without a network and as nobody, with /tmp in memory. Builds with and without
# BuildKit, and copies nothing, so it needs no context.

ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS plain
LABEL org.opencontainers.image.title="rlm-sandbox" \
      org.opencontainers.image.description="Python for the cells of recursive language models"
ENV LANG=C.UTF-8 \
    PYTHONDONTWRITEBYTECODE=1
# The base image ships without byte code, and where the root is read-only Python would compile what it imports at
# every start: half a second. Unchecked, because nobody edits the sources. A file that does not compile is no
# failure; that none did would be one.
RUN find /usr/local/lib -depth -type d \( -name test -o -name tests -o -name idlelib \) -exec rm -rf {} + \
    && { python3 -m compileall -f -q --invalidation-mode unchecked-hash "$(python3 -c 'import os; print(os.path.dirname(os.__file__))')" || true; } \
    && python3 -B -c 'import json, os; assert os.path.exists(json.__cached__)'
WORKDIR /tmp
USER 65534:65534
CMD ["python3"]

FROM plain AS science
# Another list: --build-arg SCIENCE="numpy polars pyarrow"
ARG SCIENCE="numpy pandas scipy scikit-learn sympy networkx"
USER 0:0
# --no-compile: pip's byte code would be checked against time stamps at every import.
RUN python3 -m pip install --no-cache-dir --no-compile --root-user-action=ignore ${SCIENCE} \
    && packages="$(python3 -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
    && { python3 -m compileall -f -q --invalidation-mode unchecked-hash "$packages" || true; }
LABEL org.opencontainers.image.title="rlm-sandbox-science"
USER 65534:65534
