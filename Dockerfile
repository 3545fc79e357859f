# The API and the dashboard in one image, without torch: playing needs none. `make docker-build` builds it.
#
#   docker build -t musicgen:local .                        what compose.yaml runs
#   docker build -t musicgen:train --target train .         the same and the pipeline, with torch for the CPU
#
# PYTHON: 3.11, 3.12 or 3.13.
ARG PYTHON=3.12

# --- build: an environment in /opt/venv; pip stays outside
FROM python:${PYTHON}-slim AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
RUN python -m venv --without-pip /opt/venv
WORKDIR /build
# What we stand on comes first, so that a change of ours does not install it again.
COPY pyproject.toml constraints.txt README.md LICENSE ./
RUN mkdir musicgen && touch musicgen/__init__.py \
    && pip --python /opt/venv/bin/python install -c constraints.txt .
COPY musicgen musicgen
RUN pip --python /opt/venv/bin/python install --no-deps --force-reinstall .

# --- train: the pipeline. torch comes from its own index of CPU builds: the ordinary one brings gigabytes for graphics cards.
#   docker run --rm --user "$(id -u):$(id -g)" -v "$PWD:/srv/musicgen" musicgen:train
FROM build AS train
RUN pip --python /opt/venv/bin/python install -c constraints.txt --index-url https://download.pytorch.org/whl/cpu torch \
    && pip --python /opt/venv/bin/python install -c constraints.txt ".[train]"
ENV PATH=/opt/venv/bin:$PATH HOME=/tmp MPLCONFIGDIR=/tmp/matplotlib PYTHONDONTWRITEBYTECODE=1
WORKDIR /srv/musicgen
USER 10001:10001
CMD ["python", "run_pipeline.py"]

# --- play: the last stage is the one that is built when none is named
FROM python:${PYTHON}-slim AS play
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
