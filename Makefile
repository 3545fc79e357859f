# Every target builds what it needs. All paths are relative, so a clone may lie in a folder with spaces.
.DEFAULT_GOAL := help
.PHONY: help run play lab up down docker-build docker-train image-check pythons wheel check quick bench load records ablations ship ingest preprocess fe tune train evaluate test clean
.DELETE_ON_ERROR:
.NOTPARALLEL:
SHELL := /bin/sh

VENV := .venv/bin/python
# the first Python that is new enough and can make an environment; PYTHON=... chooses another
PYTHON ?= $(shell for p in python3.12 python3.13 python3.11 python3 python; do \
	"$$p" -c "import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))" \
	>/dev/null 2>&1 && { echo "$$p"; break; }; done)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export OMP_WAIT_POLICY ?= passive

help:
	@echo "make play    the dashboard, playing the model that ships"
	@echo "make run     the whole pipeline: a trained model, a report, MIDI files"
	@echo "make up      the API and the dashboard as services that stay up (by Docker where it is); make down ends them"
	@echo "make docker-build   the image that make up runs where there is a Docker engine; make docker-train: the one that trains"
	@echo "make lab     JupyterLab, with all it takes to run any notebook"
	@echo "make quick   the fast tests: two minutes"
	@echo "make check   every test, lint and type check: ten minutes"
	@echo "make image-check   builds the image on a Debian of its own and runs it (root, buildah, debootstrap; five minutes)"
	@echo "make pythons   installs, plays and tests on the Pythons of Debian 12 and 13 (root, debootstrap): before each release"
	@echo "make wheel   the package as one file in dist, to be installed elsewhere by pip"
	@echo "make bench   our speed beside peers and limits, over the corpus in data/raw (half an hour)"
	@echo "make load    half an hour of requests at the limit of the API, every answer checked"
	@echo "make records the published tables, by the same network (hours; can be stopped and called again)"
	@echo "make ablations  what each part of the model is worth (half an hour)"
	@echo "make ship    trains the model that comes with the package (hours; downloads Groove and POP909)"
	@echo "make ingest | preprocess | fe | tune | train | evaluate | test    one stage, and what it needs"
	@echo "make clean   remove what the pipeline made (.venv stays)"

.venv/made:
	@test -n "$(PYTHON)" || { echo "MusicGen needs Python 3.11, 3.12 or 3.13 with its venv module, and none \
	was found (on Debian and Ubuntu: apt-get install python3 python3-venv)." >&2; exit 1; }
	@"$(PYTHON)" -c "import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))" || \
	{ echo "$(PYTHON) cannot be used: MusicGen needs Python 3.11, 3.12 or 3.13 with its venv module." >&2; exit 1; }
	@echo "making .venv with $$("$(PYTHON)" --version)"
	@"$(PYTHON)" -m venv .venv && touch $@

# install LIST-OF-EXTRAS: the package itself stays editable; versions come from constraints.txt
define install
@echo "installing MusicGen$(1) into .venv: the first time this takes some minutes"
@$(VENV) -m pip install -q -c constraints.txt -e ".$(1)" || { echo "The installation did not succeed: see \
the lines above; make needs a package index that pip can reach, and goes on where it stopped when it is \
called again." >&2; exit 1; }
@touch $@
endef

.venv/play-ready: .venv/made pyproject.toml constraints.txt
	$(call install,)
.venv/run-ready: .venv/made pyproject.toml constraints.txt
	$(call install,[train])
.venv/check-ready: .venv/made pyproject.toml constraints.txt
	$(call install,[train$(comma)dev])
.venv/bench-ready: .venv/made pyproject.toml constraints.txt
	$(call install,[train$(comma)bench])
comma := ,

run: .venv/run-ready
	@$(VENV) run_pipeline.py

play: .venv/play-ready
	@$(VENV) -m voila dashboards/generate.ipynb

# the images' names, and a file that says that Docker built the first here once
IMAGE := musicgen:local
TRAINER := musicgen:train
BUILT := artifacts/docker-image

# what builds it: the first that answers. TORCH_INDEX: the package index of torch's CPU builds; BASE: another image with a Python to stand on
ENGINE ?= $(shell for e in docker podman buildah; do $$e info >/dev/null 2>&1 && { echo $$e; break; }; done)
BUILD_OPTIONS = $(if $(BASE),--build-arg BASE=$(BASE)) $(if $(TORCH_INDEX),--build-arg TORCH_INDEX=$(TORCH_INDEX))

docker-build:
	@$(MAKE) --no-print-directory build-image TARGET=play TAG=$(IMAGE)
docker-train:
	@$(MAKE) --no-print-directory build-image TARGET=train TAG=$(TRAINER)
# Docker's engine takes the context and the options as they are; Podman and buildah are shown this machine's settings of pip as well
.PHONY: build-image
build-image:
	@engine="$(ENGINE)"; mkdir -p artifacts; case "$$engine" in \
	docker) docker build --target $(TARGET) --tag $(TAG) $(if $(filter play,$(TARGET)),--iidfile $(BUILT)) $(BUILD_OPTIONS) .;; \
	podman|buildah) $(MAKE) --no-print-directory .venv/made && $(VENV) tools/image.py build $$engine $(TARGET) $(TAG) $(BUILD_OPTIONS);; \
	*) echo "No Docker engine answers on this machine, and neither Podman nor buildah is installed, so no image can be built \
	(Debian and Ubuntu: apt-get install buildah)." >&2; exit 1;; esac

image-check: .venv/check-ready
	@$(VENV) -m pytest tests/image_checks.py

# without build/ of an earlier time: setuptools packs whatever lies there, modules that are gone too
wheel: .venv/play-ready
	@rm -rf build dist && $(VENV) -m pip wheel -q --no-deps -w dist . && ls dist/*.whl

pythons: .venv/play-ready
	@$(VENV) tools/pythons.py

# Docker's engine keeps the containers up; without it, or without an image, supervisord does it for two processes of .venv
CONTAINED := docker compose ls --all --quiet 2>/dev/null | grep -qx musicgen
up:
	@if ! docker info >/dev/null 2>&1; then \
		echo "No Docker engine answers here: starting the API and the dashboard as two supervised processes."; \
		test -f $(BUILT) || echo "(The image was never built here either: make docker-build does it, and make up runs it where there is an engine.)"; \
	elif ! docker compose version >/dev/null 2>&1; then \
		echo "Docker is here without its compose plugin: starting the API and the dashboard as two supervised processes."; \
	elif ! docker image inspect $(IMAGE) >/dev/null 2>&1; then \
		echo "The image was never built (make docker-build): starting the API and the dashboard as two supervised processes."; \
	else mkdir -p artifacts && docker compose up --detach --wait && echo "The API and the dashboard are up, in containers: \
	docker compose ps lists them, docker compose logs shows what they say, make down ends them."; fi
	@$(CONTAINED) || $(MAKE) --no-print-directory up-here
.PHONY: up-here
up-here: .venv/play-ready
	@$(VENV) -m musicgen.app.services up

down:
	@if $(CONTAINED); then docker compose down; fi
	@if test -x $(VENV); then $(VENV) -m musicgen.app.services down; fi

ingest preprocess tune train evaluate test: .venv/run-ready
	@$(VENV) run_pipeline.py $@
fe: .venv/run-ready
	@$(VENV) run_pipeline.py features

bench: .venv/bench-ready
	@$(VENV) run_pipeline.py features
	@rm -f artifacts/bench/speed.json
	@$(VENV) run_pipeline.py --config bench.yaml

load: .venv/bench-ready
	@rm -f artifacts/bench/load.json
	@$(VENV) run_pipeline.py --config load.yaml

records: .venv/run-ready
	@$(VENV) run_pipeline.py --config records.yaml

ablations: .venv/run-ready
	@$(VENV) run_pipeline.py features
	@$(VENV) run_pipeline.py --config ablations.yaml

# the model that ships: trained under ship/ from ship.yaml, and packed into the package when it has passed its gates
ship: .venv/run-ready
	@$(VENV) run_pipeline.py --config ship.yaml --root ship
	@mkdir -p musicgen/assets
	@cp ship/artifacts/models/music_lstm.safetensors ship/artifacts/models/originality.npz ship/artifacts/models/README.md musicgen/assets/

lab: .venv/check-ready
	@$(VENV) -m jupyterlab nbs

# every notebook is a test too; two processes share them all, and the ten slowest are printed
PYTEST := OMP_NUM_THREADS=1 $(VENV) -m pytest tests -n 2 --dist loadscope --no-loadscope-reorder --durations 10
check: .venv/check-ready
	@$(PYTEST)
quick: .venv/check-ready
	@$(PYTEST) -m "not slow"

clean:
	rm -rf artifacts data/external data/raw data/interim data/processed
