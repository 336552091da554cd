"""Loading what is to be measured: any causal language model, its tokenizer, and what identifies it in the results."""

import hashlib
import platform
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import landmark_llama
from eval_passkey.prompts import InputError
from landmark_llama.configuration import RETRIEVAL_SETTINGS, LandmarkConfig

_IDENTIFYING_FILES = ("config.json", "tokenizer*", "*.safetensors", "*.bin")
_DIGEST_PIECE = 1 << 16  # bytes
_DIGEST_PIECES = 128


@dataclass(frozen=True)
class Subject:
    """A model to measure, before its weights are read."""

    name: str  # as the user gave it
    config: "LandmarkConfig"  # or any other causal LM's
    tokenizer: object
    fingerprint: str

    @property
    def is_landmark(self) -> bool:
        """Whether retrieval settings mean something to it."""
        return isinstance(self.config, LandmarkConfig)

    @property
    def training_context(self) -> int | None:
        """Positions it was trained at: landmarked ones of a landmark model, None if its configuration does not say."""
        name = "train_context_length" if self.is_landmark else "max_position_embeddings"
        return getattr(self.config, name, None)

    @property
    def retrieval_settings(self) -> dict:
        """How a landmark model reads a long text; empty for others."""
        names = (*RETRIEVAL_SETTINGS, "block_size") if self.is_landmark else ()
        return {name: getattr(self.config, name) for name in names}


def find_subject(option: str, name: str, retrieval: dict, kernels: bool = True) -> Subject:
    """Reads configuration and tokenizer of the model `name`, a folder or a hub id.

    retrieval: settings that replace those of a landmark model's configuration.
    kernels: False: a landmark model attends by PyTorch on a GPU, too.
    InputError, naming `option`, if the model is not there or if `retrieval` is given for a model without landmarks.
    """
    _refuse_missing_folder(option, name)
    try:
        config = AutoConfig.from_pretrained(name)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # transformers raises many kinds for a folder that is incomplete
        raise InputError(
            f"{option} {name}: no configuration and tokenizer can be read there ({_first_line(error)})"
        ) from error
    subject = Subject(name, config, tokenizer, _fingerprint(name, config))
    if retrieval and not subject.is_landmark:
        flags = ", ".join(f"--{setting}" for setting in retrieval)
        raise InputError(f"{option} {name}: {flags} needs a landmark model, and this one is {config.model_type!r}")
    if subject.is_landmark:
        _replace_retrieval_settings(option, subject, retrieval)
        subject.config.kernels = kernels
    return subject


def _replace_retrieval_settings(option: str, subject: Subject, retrieval: dict) -> None:
    try:
        subject.config.retrieval(**retrieval)  # checks them against the window
    except ValueError as error:
        raise InputError(f"{option} {subject.name}: {error}") from error
    for setting, value in retrieval.items():
        setattr(subject.config, setting, value)


def load_model(option: str, subject: Subject, dtype: str, device: str) -> PreTrainedModel:
    """The model with its weights on `device`, ready to generate; InputError, naming `option`, if that fails."""
    if landmark_llama.adapters.is_adapter(subject.name):
        return _load_adapter(option, subject, dtype, device)
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            subject.name, config=subject.config, dtype=dtype, output_loading_info=True
        )
        model = model.to(device).eval()
    except Exception as error:  # missing, truncated or foreign weights come as many kinds
        raise InputError(f"{option} {subject.name}: the model cannot be loaded ({_first_line(error)})") from error
    if loading["missing_keys"]:  # transformers would go on with random numbers
        missing = sorted(loading["missing_keys"])
        raise InputError(f"{option} {subject.name}: lacks {len(missing)} weights, the first being {missing[0]}")
    return model


def _load_adapter(option: str, subject: Subject, dtype: str, device: str) -> PreTrainedModel:
    """The adapter on the base that it names, with the subject's retrieval settings."""
    try:
        model = landmark_llama.load_adapter(subject.name, dtype=dtype).to(device).eval()
    except Exception as error:  # as above
        raise InputError(f"{option} {subject.name}: the adapter cannot be loaded ({_first_line(error)})") from error
    for setting, value in subject.retrieval_settings.items():
        setattr(model.config, setting, value)
    model.config.kernels = subject.config.kernels
    return model


def versions() -> dict[str, str]:
    """Of what the results depend on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "landmark_llama": landmark_llama.__version__,
    }


def device_in_words(device: str, kernels: bool = True) -> str:
    """The GPU's name and whether the Triton kernels ran, or the machine's processor and the threads in use."""
    if torch.device(device).type == "cuda":
        return f"{torch.cuda.get_device_name(device)} ({device}{'' if kernels else ', no kernels'})"
    return f"{device} ({platform.machine()}, {torch.get_num_threads()} threads)"


def _refuse_missing_folder(option: str, name: str) -> None:
    """A mistyped path must not be looked for on the hub, which takes long and ends in a sentence about the network."""
    if Path(name).is_dir():
        return
    if name.startswith((".", "/", "~")) or name.count("/") != 1 or Path(name).parent.is_dir():
        raise InputError(f"{option} {name}: there is no such folder")


def _fingerprint(name: str, config) -> str:
    """A digest of evenly spaced pieces of the files: another one for a model that was trained again in its folder."""
    folder = Path(name)
    if not folder.is_dir():
        return f"{name}@{getattr(config, '_commit_hash', None)}"
    digest = hashlib.sha256()
    for path in sorted({path for pattern in _IDENTIFYING_FILES for path in folder.glob(pattern) if path.is_file()}):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        step = max(_DIGEST_PIECE, size // _DIGEST_PIECES)
        with path.open("rb") as file:
            for offset in range(0, size, step):
                file.seek(offset)
                digest.update(file.read(_DIGEST_PIECE))
    return digest.hexdigest()[:16]


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
