"""The younger family's tokenizers as the tokenizers library's, which any program opens.

Byte-pair vocabularies are that already. Of a sentencepiece file every way to halve a piece into two
others becomes a merge, in the order of the pieces' scores: what sentencepiece does with such a
vocabulary. Source: sentencepiece's bpe_model.cc, and the normaliser's settings in the published
file (a blank before each text, none removed, bytes for unknown characters).
"""

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE

from glmtune.models.glm.byte_pair_encoder import BytePairEncoder
from glmtune.models.glm.piece_encoder import BLANK, PieceEncoder


def plain_tokenizer(tokenizer: Any) -> Tokenizer:
    """A tokenizer that gives the ids of `tokenizer.encode_plain`.

    In it, as in the published code for GLM-4, names of special tokens in a text become their ids,
    and a text alone begins with the layout's prefix.
    """
    if isinstance(tokenizer, BytePairEncoder):
        return Tokenizer.from_str(tokenizer.byte_pairs.to_str())
    assert isinstance(tokenizer, PieceEncoder)
    return _of_pieces(tokenizer)


def _of_pieces(encoder: PieceEncoder) -> Tokenizer:
    sp, layout = encoder.sp, encoder.layout
    pieces = [sp.id_to_piece(id_) for id_ in range(sp.get_piece_size())]
    vocab = {piece: id_ for id_, piece in enumerate(pieces)}
    unknown = pieces[sp.unk_id()]
    tokenizer = Tokenizer(
        BPE(vocab, _merges(encoder, vocab), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(BLANK), normalizers.Replace(" ", BLANK)]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(BLANK, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    controls = [piece for id_, piece in enumerate(pieces) if sp.is_control(id_)]
    appended = [name for _, name in sorted(encoder.names.items())]
    tokenizer.add_special_tokens(
        [
            # "people" has "eop" in it: such a name counts as a whole word alone.
            AddedToken(name, normalized=False, special=True, single_word=name.isalpha())
            for name in (unknown, *controls, *appended)
        ]
    )
    prefix = [(name, encoder.ids[name]) for name in layout.prefix]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*layout.prefix, "$A"], pair=[*layout.prefix, "$A", "$B:1"], special_tokens=prefix
    )
    return tokenizer


def _merges(encoder: PieceEncoder, vocab: dict[str, int]) -> list[tuple[str, str]]:
    sp = encoder.sp
    ordinary = [
        id_
        for id_ in range(sp.get_piece_size())
        if not (sp.is_control(id_) or sp.is_unknown(id_) or sp.is_byte(id_))
    ]
    found = []
    for id_ in sorted(ordinary, key=sp.get_score, reverse=True):
        piece = sp.id_to_piece(id_)
        for place in range(1, len(piece)):
            if piece[:place] in vocab and piece[place:] in vocab:
                found.append((piece[:place], piece[place:]))
    return found
