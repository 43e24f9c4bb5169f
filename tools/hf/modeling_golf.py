"""GolfForCausalLM, which tools/export.py writes behind the code that it cuts out of train_gpt.py."""

import dataclasses

import torch
import torch.nn.functional as F
from configuration_golf import GolfConfig
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from train_gpt import BOS_ID, GPT, Documents, ModelConfig, Runtime, rotary_tables, softcap_plain


class GolfForCausalLM(PreTrainedModel, GenerationMixin):
    """The model as transformers uses it. A document begins with BOS, which also ends a generated text."""

    config_class = GolfConfig
    main_input_name = "input_ids"
    _no_split_modules = ["Block"]

    def __init__(self, config):
        super().__init__(config)
        context = config.max_position_embeddings
        runtime = Runtime(torch.float32, "sdpa", False, False, False, False, context)
        self.golf = GPT(ModelConfig(**config.settings), runtime)
        self.tables_ready = False
        self.post_init()

    def _init_weights(self, module):
        """Nothing: an export has every weight."""

    def get_input_embeddings(self):
        return self.golf.lookup

    def document_starts(self, ids, attention_mask):
        """[B, T] where each token's document begins: at a BOS, or at the first token after padding."""
        places = torch.arange(ids.size(1), device=ids.device).expand_as(ids)
        begins = ids == BOS_ID
        if attention_mask is not None:
            shown = attention_mask.to(torch.bool)
            begins = begins | (shown & ~F.pad(shown[:, :-1], (1, 0)))
        return torch.where(begins, places, torch.zeros_like(places)).cummax(1).values.to(torch.int32)

    def prepare_tables(self, dtype):
        """Rotary tables are no weights: they are computed once the model is on its device."""
        golf = self.golf
        golf.runtime = dataclasses.replace(golf.runtime, dtype=dtype)
        if not self.tables_ready:
            cos, sin = rotary_tables(golf.config, golf.runtime.context)
            device, wide = golf.embedding.device, torch.promote_types(dtype, torch.float32)
            golf.cos, golf.sin = cos.to(device, wide), sin.to(device, wide)
            self.tables_ready = True

    def forward(self, input_ids, attention_mask=None, labels=None, **_):
        """Softcapped logits [B, T, V] in float32, and the mean loss of labels that are not -100, shifted here."""
        golf, context = self.golf, self.config.max_position_embeddings
        if input_ids.size(1) > context:
            raise ValueError(f"{input_ids.size(1)} tokens: the context holds {context}")
        self.prepare_tables(golf.embedding.dtype)
        starts = self.document_starts(input_ids, attention_mask)
        documents = Documents(starts, torch.zeros(1, dtype=torch.int32))
        hidden = golf.trunk(input_ids, documents, looped=golf.config.loops)
        logits = golf.head_logits(hidden).float()
        logits = softcap_plain(logits, golf.config.logit_softcap, golf.config.softcap_type)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **_):
        """The last tokens that the context holds: there is no cache."""
        context = self.config.max_position_embeddings
        mask = None if attention_mask is None else attention_mask[:, -context:]
        return dict(input_ids=input_ids[:, -context:], attention_mask=mask)
