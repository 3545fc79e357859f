# The API and the dashboard in one image, without torch: playing needs none. `make docker-build` builds it, with Docker, Podman or buildah.
#
#   docker build -t musicgen:local .                        what compose.yaml runs
#   docker build -t musicgen:train --target train .         the pipeline, with torch
#
# PYTHON: 3.11, 3.12 or 3.13.
# BASE: an image that has `python3` of one of these versions with its venv module, and useradd. The checks build on a Debian of their own.
# TORCH_INDEX: the package index that torch is taken from. pytorch.org/get-started/locally names the one of the CPU builds; without it
# pip's ordinary torch brings several gigabytes for graphics cards.
ARG PYTHON=3.12
ARG BASE=python:${PYTHON}-slim

# --- build: an environment in /opt/venv. pip stays outside it, in an environment of its own.
FROM ${BASE} AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
RUN python3 -m venv /opt/pip && python3 -m venv --without-pip /opt/venv
WORKDIR /build
# The dependencies come first, so that a change of our own code does not install them again.
# They are read from pyproject.toml: our package is built once, below, from the whole source.
COPY pyproject.toml constraints.txt README.md LICENSE ./
RUN python3 -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" > play.txt \
    && /opt/pip/bin/pip --python /opt/venv/bin/python install -c constraints.txt -r play.txt
COPY musicgen musicgen
RUN /opt/pip/bin/pip --python /opt/venv/bin/python install --no-deps . && rm -rf build

# --- train: the pipeline.
#   docker run --rm --user "$(id -u):$(id -g)" -v "$PWD:/srv/musicgen" musicgen:train
FROM build AS train
ARG TORCH_INDEX=
RUN /opt/pip/bin/pip --python /opt/venv/bin/python install -c constraints.txt ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch
RUN python3 -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['train'], sep='\n')" > train.txt \
    && /opt/pip/bin/pip --python /opt/venv/bin/python install -c constraints.txt -r train.txt
ENV PATH=/opt/venv/bin:$PATH HOME=/tmp MPLCONFIGDIR=/tmp/matplotlib PYTHONDONTWRITEBYTECODE=1
WORKDIR /srv/musicgen
USER 10001:10001
CMD ["python", "run_pipeline.py"]

# --- play: the last stage is the one that is built when none is named
FROM ${BASE} AS play
RUN useradd --uid 10001 --user-group --home-dir /tmp --no-create-home --shell /usr/sbin/nologin musicgen
COPY --from=build /opt/venv /opt/venv
# The root may be read-only: what is written (kernels' connections, fonts' cache) goes to /tmp.
ENV PATH=/opt/venv/bin:$PATH HOME=/tmp MPLCONFIGDIR=/tmp/matplotlib \
    PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 OMP_WAIT_POLICY=passive \
    MUSICGEN_ROOT=/srv/musicgen MUSICGEN_API_HOST=0.0.0.0 MUSICGEN_API_PORT=8000
WORKDIR /srv/musicgen
COPY settings.ini voila.json ./
COPY dashboards dashboards
USER 10001:10001
EXPOSE 8000 8080
STOPSIGNAL SIGTERM
# Of the API; compose.yaml names the dashboard's.
HEALTHCHECK --interval=10s --timeout=6s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import json, urllib.request as u; assert json.load(u.urlopen('http://127.0.0.1:8000/health', timeout=5))['ready']"]
CMD ["python", "-c", "from musicgen.serve import run; run()"]
