"""A GGUF file that ``hf-clm export`` wrote, computed by llama.cpp, as a model of transformers.

generate, chat, serve and evaluate use it like any other model: same prompts, same decoding, same figures.
The logits come from llama.cpp, and the stop tokens are those that llama.cpp finds in the file.
"""

import copy
import importlib
import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from transformers import GenerationConfig, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from hf_clm.errors import EnvironmentFault, ModelError
from hf_clm.model.load import max_positions

INSTALL = "pip install 'hf_clm[gguf]'"
BATCH = 512  # tokens that llama.cpp computes in one call
CONTEXT = 1024  # tokens of the first context, which grows with the rows


class LlamaCppModel(PreTrainedModel, GenerationMixin):
    """A model that llama.cpp computes, one row at a time. It cannot be trained.

    Args:
        config: of the model that was converted.
        file: the GGUF file.
        device: layers are moved to a GPU unless it is a CPU.

    Raises EnvironmentFault without llama-cpp-python, ModelError for a file that llama.cpp cannot open.
    """

    main_input_name = "input_ids"
    _supports_sdpa = True  # llama.cpp computes attention itself, but transformers checks this

    def __init__(self, config: PretrainedConfig, file: Path, *, device: torch.device | None = None):
        super().__init__(copy.deepcopy(config))
        self.file, self._layers_on_gpu = file, 0 if device is None or device.type == "cpu" else -1
        self._ids: list[int] = []  # what the context of llama.cpp holds
        self._open(1)
        self.generation_config = GenerationConfig(eos_token_id=self.stop_ids())

    @property
    def device(self) -> torch.device:
        """Where inputs and logits are, whatever llama.cpp computes on."""
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the logits."""
        return torch.float32

    def stop_ids(self) -> list[int]:
        """Returns the tokens at which llama.cpp ends an answer.

        They are named in the file, or known to llama.cpp by their text.
        """
        is_end = self._library.llama_vocab_is_eog
        return [token for token in range(self._llama.n_vocab()) if is_end(self._vocabulary, token)]

    def tokenize(self, text: str, *, is_chat: bool) -> list[int]:
        """Returns the ids that llama.cpp reads for a prompt. The texts of control tokens become these tokens.

        The start token is added if the file asks for it; in a chat not if the template has written it.
        """
        start = self._library.llama_vocab_bos(self._vocabulary)
        ids = self._llama.tokenize(text.encode(), add_bos=True, special=True)
        return ids[1:] if is_chat and ids[:2] == [start, start] else ids

    def render(self, messages: list[dict[str, str]]) -> str:
        """Returns the prompt of a chat, rendered by llama-cpp-python with the template in the file."""
        template = self._llama.metadata.get("tokenizer.chat_template", "")
        chats = importlib.import_module("llama_cpp.llama_chat_format")
        start, end = (self._text(self._llama.token_bos()), self._text(self._llama.token_eos()))
        return chats.Jinja2ChatFormatter(template, bos_token=start, eos_token=end)(messages=messages).prompt

    def _text(self, token: int) -> str:
        return self._library.llama_vocab_get_text(self._vocabulary, token).decode() if token >= 0 else ""

    def prepare_inputs_for_generation(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **_: object
    ) -> dict[str, object]:
        """Passes all tokens at each step: llama.cpp finds those that its context already holds."""
        return {"input_ids": input_ids, "attention_mask": attention_mask, "logits_to_keep": 1}

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **_: object,
    ) -> CausalLMOutput:
        """Computes logits (1, K, V) float32.

        Args:
            input_ids: (1, T) int64. Documents of a packed row are read separately.
            position_ids: (1, T) int64; each document begins with 0.
            logits_to_keep: the last K positions, 0 for all, or an index (K,) int64 in ascending order.

        Raises ValueError for several rows and for padding, which llama.cpp would read as text.
        """
        if len(input_ids) > 1 or (attention_mask is not None and not bool(attention_mask.all())):
            raise ValueError("llama.cpp reads one row at a time, without padding")
        ids = input_ids[0].tolist()
        places = torch.arange(len(ids))
        places = places[-logits_to_keep:] if isinstance(logits_to_keep, int) else logits_to_keep
        starts = [0]
        if position_ids is not None:
            starts += [at for at in torch.nonzero(position_ids[0] == 0)[:, 0].tolist() if at > 0]
        logits = [
            self._logits(ids[start:stop], [at - start for at in places.tolist() if start <= at < stop])
            for start, stop in pairwise([*starts, len(ids)])
        ]
        return CausalLMOutput(logits=torch.cat(logits)[None])

    def _open(self, tokens: int) -> None:
        """Opens the file with a context of at least this many tokens."""
        limit = max_positions(self.config) or tokens
        size = max(tokens, min(limit, max(CONTEXT, 1 << (tokens - 1).bit_length())))
        threads = torch.get_num_threads()
        self._library = import_llama_cpp(str(self.file))
        try:
            self._llama = self._library.Llama(
                str(self.file),
                n_ctx=size,
                n_batch=BATCH,
                n_threads=threads,
                n_threads_batch=threads,
                n_gpu_layers=self._layers_on_gpu,
                verbose=False,
            )
        except (ValueError, RuntimeError) as error:
            raise ModelError("llama.cpp cannot open it", where=str(self.file), got=str(error)) from error
        self._vocabulary = self._library.llama_model_get_vocab(self._llama.model)
        self._room, self._ids = size, []

    def _logits(self, ids: list[int], places: Sequence[int]) -> torch.Tensor:
        """Returns the logits (K, V) after these places of a document.

        Reuses the longest prefix that is already in the context.
        """
        if not places:
            return torch.empty(0, self._llama.n_vocab())
        if len(ids) > self._room:
            self._open(len(ids))
        library, context = self._library, self._llama.ctx
        memory = library.llama_get_memory(context)
        # Until all is computed, it is unknown what the context holds: Ctrl-C may stop an answer.
        known, self._ids = self._ids, []
        same = [one == other for one, other in zip(ids, known, strict=False)]
        kept = min(same.index(False) if False in same else len(same), places[0])
        if not library.llama_memory_seq_rm(memory, 0, kept, -1):  # a recurrent state cannot go back
            library.llama_memory_clear(memory, True)
            kept = 0
        batch = library.llama_batch_init(BATCH, 0, 1)
        rows, wanted = [], set(places)
        try:
            for start in range(kept, len(ids), BATCH):
                batch.n_tokens = min(BATCH, len(ids) - start)
                for at in range(batch.n_tokens):
                    batch.token[at], batch.pos[at] = ids[start + at], start + at
                    batch.n_seq_id[at], batch.seq_id[at][0] = 1, 0
                    batch.logits[at] = start + at in wanted
                if code := library.llama_decode(context, batch):
                    raise ModelError(
                        "llama.cpp cannot compute a row", where=str(self.file), got=f"code {code}"
                    )
                for at in range(batch.n_tokens):
                    if start + at in wanted:
                        pointer = library.llama_get_logits_ith(context, at)
                        rows.append(np.ctypeslib.as_array(pointer, (self._llama.n_vocab(),)).copy())
        finally:
            library.llama_batch_free(batch)
        self._ids = ids
        return torch.from_numpy(np.stack(rows))


def import_llama_cpp(where: str) -> ModuleType:
    """Imports llama-cpp-python. Raises EnvironmentFault if it is not installed."""
    os.environ.setdefault("GGML_BACKEND_SILENT", "1")
    try:
        return importlib.import_module("llama_cpp")
    except ImportError as error:
        what = "needs the package llama-cpp-python"
        raise EnvironmentFault(what, where=where, got=str(error), fix=INSTALL) from error
