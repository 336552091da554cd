# make demo    fine-tunes a tiny LLaMA with landmarks and finds pass keys in up to 32,768 tokens
# make smollm2 a real chat model, SmolLM2-135M, reads 32,768 tokens beside its dense self (docs/smollm2.md)
# make smollm2-train DATA="FILE FOLDER"   trains what `make smollm2` reads with, an hour on one CPU core
# make smollm2-evaluate   measures it against what it must reach, for hours, in steps (docs/smollm2_evaluation.md)
# make test    the whole test suite
# make lint    ruff's checks, and the order of imports
# make base    trains the dense model that the demo starts from (finetune/tiny_base), into runs/tiny_base_3_context
# make clean   removes the results of both, and the virtual environment
#
# Each target sets itself up: a virtual environment in .venv with the versions of constraints.txt, made once and again
# only when these files change. `make demo PYTHON=python3.12` takes another Python (3.10 to 3.13).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

DEMO := runs/tiny
DEMO_REPORT := runs/passkey
# the paper's wording, our own that says the number once, the licence as haystack, and 4 names of which one is asked
TASKS := passkey passkey:once passkey:text multi_key:4
LENGTHS := 512 1024 4096 32768

SMOLLM2_OUTPUT := runs/smollm2

# one process, and neither a question nor a warning about the settings that were not given
LAUNCH := $(BIN)/accelerate launch --quiet --num_machines 1 --mixed_precision no --dynamo_backend no
# Two processes of one thread train a small model half as fast again as one of two threads. (`--multi_gpu` is accelerate's
# word for several processes on a machine, whether it has GPUs or not.)
TWO_PROCESSES := --multi_gpu --num_processes 2

.PHONY: demo smollm2 smollm2-train smollm2-evaluate test lint base clean

demo: $(DEMO)/metrics.json
	$(BIN)/python eval_passkey/run.py --model $(DEMO) --baseline finetune/tiny_base \
		--task $(TASKS) --haystack LICENSE --lengths $(LENGTHS) --samples 20 --baseline_max_length 4096 \
		--output $(DEMO_REPORT)
	@echo $(DEMO)

# written last: what was interrupted before goes on where it stopped
$(DEMO)/metrics.json: | $(READY)
	$(LAUNCH) --num_processes 1 finetune/run.py --config finetune/configs/tiny.yaml --output_dir $(DEMO)

smollm2: $(READY)
	$(BIN)/python examples/smollm2/run.py --output $(SMOLLM2_OUTPUT) $(if $(SMOLLM2),--package $(SMOLLM2)) $(SMOLLM2_FLAGS)

smollm2-train: $(READY)
	$(BIN)/python examples/smollm2/train.py --output $(SMOLLM2_OUTPUT)_train --data $(DATA) \
		$(if $(SMOLLM2),--package $(SMOLLM2)) $(SMOLLM2_FLAGS)

# MODEL=FOLDER of a landmark model of your own, DATA="FILES" of texts that it was not trained on
smollm2-evaluate: $(READY)
	$(BIN)/python examples/smollm2/evaluate.py --output $(SMOLLM2_OUTPUT) $(if $(SMOLLM2),--package $(SMOLLM2)) \
		$(if $(MODEL),--model $(MODEL)) $(if $(DATA),--data $(DATA)) $(SMOLLM2_FLAGS)

test: $(READY)
	$(BIN)/python -m pytest -n 2

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache

base: $(READY)
	$(BIN)/python finetune/demo/corpus.py --output runs/tiny_base_corpus \
		--documents 8000 --retrieval_share 0.97 --retrieval_characters 80 600
	$(BIN)/python finetune/demo/tokenizer.py --data runs/tiny_base_corpus/train.jsonl --output runs/tiny_base_tokenizer
	$(LAUNCH) $(TWO_PROCESSES) finetune/run.py --config finetune/configs/tiny_base_1_copy.yaml \
		--per_device_train_batch_size 16 --overwrite_output_dir
	$(LAUNCH) $(TWO_PROCESSES) finetune/run.py --config finetune/configs/tiny_base_2_lookup.yaml \
		--per_device_train_batch_size 8 --overwrite_output_dir
	$(LAUNCH) $(TWO_PROCESSES) finetune/run.py --config finetune/configs/tiny_base_3_context.yaml \
		--per_device_train_batch_size 4 --overwrite_output_dir

clean:
	rm -rf $(VENV) $(DEMO) $(DEMO_REPORT) $(SMOLLM2_OUTPUT) $(SMOLLM2_OUTPUT)_train

$(READY): constraints.txt setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("Python 3.10 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt setuptools
	$(BIN)/python -m pip install --disable-pip-version-check --no-build-isolation -c constraints.txt -e '.[dev]'
	touch $@
