# Two images of one file, for processors x86_64:
#   docker build --target cpu  -t evlgen:cpu .       docker run --rm -p 127.0.0.1:8000:8000 evlgen:cpu
#   docker build --target cuda -t evlgen:cuda .      docker run --rm --gpus all -p 127.0.0.1:8000:8000 evlgen:cuda
# Versions and digests are those of docker/*.txt, which run_scripts/lock_container.sh writes.

# What both need, in a virtual environment without pip.
FROM python:3.12.12-slim-bookworm AS packages
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv --without-pip /opt/evlgen
COPY docker/requirements.txt /src/docker/
RUN pip --python /opt/evlgen/bin/python install --no-deps --require-hashes -r /src/docker/requirements.txt

FROM packages AS packages-cpu
RUN pip --python /opt/evlgen/bin/python install --no-deps --index-url https://download.pytorch.org/whl/cpu \
    torch==2.14.1 torchvision==0.29.1

FROM packages AS packages-cuda
COPY docker/requirements-cuda.txt /src/docker/
RUN pip --python /opt/evlgen/bin/python install --no-deps --require-hashes -r /src/docker/requirements-cuda.txt

# The package itself, as a wheel: the last stage has no sources.
FROM packages AS wheel
WORKDIR /src
COPY pyproject.toml setup.py README.md LICENSE ./
COPY evlgen evlgen
RUN python -m pip install --no-deps --target /opt/setuptools "$(grep -o '^setuptools==[0-9.]*' docker/requirements.txt)" \
    && PYTHONPATH=/opt/setuptools python -m pip wheel --no-deps --no-build-isolation --wheel-dir /wheels .

FROM python:3.12.12-slim-bookworm AS runtime
RUN python -m pip uninstall --yes pip \
    && useradd --uid 1000 --create-home evlgen \
    && install --directory --owner evlgen /cache /work
ENV PATH=/opt/evlgen/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    EVLGEN_CACHE=/cache/evlgen HF_HOME=/cache/huggingface MPLCONFIGDIR=/cache/matplotlib
VOLUME /cache
WORKDIR /work
EXPOSE 8000
HEALTHCHECK --start-period=120s --interval=15s --timeout=5s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["evlgen"]
CMD ["serve", "--host", "0.0.0.0"]

FROM packages-cuda AS whole-cuda
COPY --from=wheel /wheels /wheels
RUN pip --python /opt/evlgen/bin/python install --no-deps --no-index /wheels/*.whl

FROM runtime AS cuda
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=whole-cuda /opt/evlgen /opt/evlgen
USER 1000

FROM packages-cpu AS whole-cpu
COPY --from=wheel /wheels /wheels
RUN pip --python /opt/evlgen/bin/python install --no-deps --no-index /wheels/*.whl

# The last stage is what `docker build` makes without --target.
FROM runtime AS cpu
COPY --from=whole-cpu /opt/evlgen /opt/evlgen
USER 1000
