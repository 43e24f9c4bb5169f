"""The tokenizer of an exported model, as transformers uses it. tools/export.py writes this file into the folder."""

import os
import shutil

import sentencepiece
from transformers import PreTrainedTokenizer

from .caseops import OPERATIONS, OPERATORS, CaseOpsError, decode, encode  # pyright: ignore[reportMissingImports] # beside it in an exported folder


class GolfTokenizer(PreTrainedTokenizer):
    """SentencePiece, with BOS in front of a text. Where case is written as operators, texts are transformed."""

    vocab_files_names = {"vocab_file": "tokenizer.model"}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(self, vocab_file, **kwargs):
        self.vocab_file = vocab_file
        self.model = sentencepiece.SentencePieceProcessor(model_file=vocab_file)
        unknown = self.model.unk_id()
        self.caseops = all(self.model.piece_to_id(symbol) != unknown for symbol in OPERATORS.values())
        names = dict(bos_token=self.model.id_to_piece(self.model.bos_id()), unk_token=self.model.id_to_piece(unknown))
        names |= dict(eos_token=names["bos_token"], pad_token=names["bos_token"])
        # <s> in a text is text, as in training. Padding stands in front, so that generate() goes on where a text ends.
        names |= dict(padding_side="left", split_special_tokens=True, clean_up_tokenization_spaces=False)
        kwargs = dict(names, **kwargs)
        super().__init__(**kwargs)

    @property
    def vocab_size(self):
        return self.model.vocab_size()

    def get_vocab(self):
        return {self.model.id_to_piece(i): i for i in range(self.vocab_size)} | self.added_tokens_encoder

    def _tokenize(self, text, **_):
        return self.model.encode(encode(text) if self.caseops else text, out_type=str)

    def _convert_token_to_id(self, token):
        return self.model.piece_to_id(token)

    def _convert_id_to_token(self, index):
        return self.model.id_to_piece(index)

    def convert_tokens_to_string(self, tokens):
        text = self.model.decode(tokens)
        if not self.caseops:
            return text
        try:
            return decode(text)
        except CaseOpsError:  # a model may write operators where no text has them
            return OPERATIONS.sub(lambda match: match[0][-1].upper() if len(match[0]) > 1 else "", text)

    def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None):
        return [self.bos_token_id, *token_ids_0, *(token_ids_1 or [])]

    def save_vocabulary(self, save_directory, filename_prefix=None):
        out = os.path.join(save_directory, (f"{filename_prefix}-" if filename_prefix else "") + "tokenizer.model")
        if os.path.abspath(out) != os.path.abspath(self.vocab_file):
            shutil.copyfile(self.vocab_file, out)
        return (out,)
