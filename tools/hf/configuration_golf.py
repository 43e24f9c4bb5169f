"""The settings of an exported model, as transformers reads them. tools/export.py writes this file into the folder."""

from typing import Any

from transformers import PretrainedConfig


class GolfConfig(PretrainedConfig):
    """`settings` are those of the model's artifact; the other fields repeat some of them under their usual names."""

    model_type = "golf"

    def __init__(self, settings=None, **kwargs):
        self.settings = settings or {}
        usual: dict[str, Any] = dict(vocab_size=1024, model_dim=512, num_layers=9, num_heads=8, train_seq_len=1024)
        s = {**usual, **self.settings}
        self.vocab_size, self.hidden_size = s["vocab_size"], s["model_dim"]
        self.num_hidden_layers, self.num_attention_heads = s["num_layers"], s["num_heads"]
        self.max_position_embeddings = kwargs.pop("max_position_embeddings", s["train_seq_len"])
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"):
            kwargs.pop(name, None)
        # The head shares the embedding, where it does, within the model.
        tokens: dict[str, Any] = dict(bos_token_id=1, eos_token_id=1, tie_word_embeddings=False)
        super().__init__(**{**tokens, **kwargs})
