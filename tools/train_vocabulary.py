"""Make the vocabulary of glm-tiny: `ice_text.model` in the layout of the published file.

    python tools/train_vocabulary.py --out src/glmtune/models/glm-tiny/ice_text.model

A unigram model whose pieces are the words of the toy world's grammar, which tells where words end,
with the pieces that any other text needs: single characters and 256 bytes. Its probabilities are
those of the pieces in sampled passages (one step of Viterbi training: cut with even scores, count,
score again). The order is that of the published file: <unk> <s> </s> <pad> <n>, the pieces, the
eight specials, the tab, the runs of blanks, the bytes. Text is normalised by nmt_nfkc.
"""

import argparse
import io
import math
import os
import re
import string
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as sentencepiece_model

from glmtune.data.templates import alpaca
from glmtune.demo.questions import training_questions
from glmtune.demo.world import GRAMMAR, MAX_NUMBER, load_world, passages
from glmtune.models.chatglm.vocabulary import MAX_BLANKS, SPECIALS, replace_blanks

BLANK = "\u2581"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
NUM_PASSAGES = 40_000

# So that English beyond the toy world is not spelt letter by letter.
FRAGMENTS = (
    "s es ed er ing ion tion ly al ment ness able ive ous ity ent ant ance ence est ful less ist "
    "an en in on re un de dis pre pro com con ex in inter sub ar or le th he nd st ch sh ck ll ss "
    "ee ea oo ou ai ay ow igh ate ize ise ure age ish ty y"
)
COMMON_WORDS = (
    "a an the of to in on at by for from with without about into over under between through and or "
    "but not no yes if then than as so because while when where why how who what which that this "
    "these those there here it its he she they we you I me him her them us my your his our their "
    "is are was were be been being am do does did have has had will would can could should may "
    "might must let make makes made use used using get give write explain describe list create "
    "find name tell say think know want need help show work go come take see look learn good "
    "great best better many much more most some any all each every other another such same "
    "new old first last next two three four five six seven eight nine ten one people person man "
    "woman child world life time day year way thing part place home house water food school book "
    "word words sentence text story question example number language English Chinese data "
    "following given different important also very only even just too well please"
)
COMMON_CHARACTERS = (
    "的一是在不了有和人这中大为上个国我以要他时来用们生到作地于出就分对成会可主发年动同工也能下"
    "过子说产种面而方后多定行学法所民得经十三之进着等部度家电力里如水化高自二理起小物现实加量都"
    "两体制机当使点从业本去把性好应开它合还因由其些然前外天政四日那社义事平形相全表间样与关各重"
    "新线内数正心反你明看原又么利比或但质气第向道命此变条只没结解问意建月公无系军很情者最立代想"
    "已通并提直题党程展五果料象员革位入常文总次品式活设及管特件长求老头基资边流路级少图山统接知"
    "较将组见计别她手角期根论运农指几九区强放决西被干做必战先回则任取据处队南给色光门即保治北造"
    "百规热领七海口东导器压志世金增争济阶油思术极交受联什认六共权收证改清己美再采转更单风切打白"
    "教速花带安场身车例真务具万每目至达走积示议声报斗完类八离华名确才科张信马节话米整空元况今集"
    "温传土许步群广石记需段研界拉林律叫且究观越织装影算低持音众书布复容儿须际商非验连断深难近矿"
)


def main() -> None:
    """Read the flags, train, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, type=Path, help="file to write")
    out: Path = parser.parse_args().out
    normalizer = _normalizer()
    pieces = dict.fromkeys(_pieces(), 0.0)
    even = _model(normalizer, pieces)
    texts = [replace_blanks(text) for text in _texts()]
    processor = sentencepiece.SentencePieceProcessor(model_proto=even)
    counts = Counter(piece for ids in processor.encode(texts, out_type=str) for piece in ids)
    total = sum(counts[piece] + 0.1 for piece in pieces)
    pieces = {piece: math.log((counts[piece] + 0.1) / total) for piece in pieces}
    pieces = dict(sorted(pieces.items(), key=lambda item: -item[1]))
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_suffix(".tmp")
    temporary.write_bytes(_model(normalizer, pieces))
    os.replace(temporary, out)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(out))
    num_tokens = sum(map(len, processor.encode(texts)))
    print(
        f"{out}: {processor.get_piece_size():,} pieces, {len(pieces):,} of them learned; "
        f"{num_tokens / sum(map(len, texts)):.3f} tokens a character of its own text"
    )


def _texts() -> Iterable[str]:
    yield from (passage.text for passage in passages(seed=1, count=NUM_PASSAGES))
    for asked in training_questions():
        yield alpaca(asked.instruction, asked.input)
        yield asked.output


def _pieces() -> list[str]:
    """The words of the grammar, marks, numbers, characters and fragments."""
    words: set[str] = {"Instruction", "Input", "Answer"}
    for rows in load_world().tables.values():
        words.update(row[language] for row in rows for language in ("en", "zh"))
    for language in ("en", "zh"):
        text = (GRAMMAR / f"{language}.txt").read_text(encoding="utf-8")
        patterns = [line for line in text.splitlines() if line and line[0] not in "#["]
        for pattern in patterns:
            words.update(re.findall(r"[^\W_]+", re.sub(r"\{\w+\}", " ", pattern)))
    words.update(COMMON_WORDS.split(), string.ascii_letters, "+-=")
    words.update(str(value) for value in range(MAX_NUMBER + 1))
    latin = {word for word in words if word.isascii()}
    inside = {word for word in latin if word[0].isupper()}  # begin a line, so have no blank before
    inside.update(str(value) for value in range(MAX_NUMBER + 1))
    return sorted(
        {BLANK + word for word in latin}
        | (words - latin)
        | inside
        | set(FRAGMENTS.split())
        | set(string.printable.strip())
        | set("".join(words - latin) + COMMON_CHARACTERS + "。、“”《》" + BLANK)
    )


def _normalizer() -> sentencepiece_model.NormalizerSpec:
    """The normaliser nmt_nfkc, taken from a throw-away model."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c"]),
        model_writer=model,
        vocab_size=8,
        hard_vocab_limit=False,
        normalization_rule_name="nmt_nfkc",
        minloglevel=2,
    )
    return sentencepiece_model.ModelProto.FromString(model.getvalue()).normalizer_spec


def _model(normalizer: sentencepiece_model.NormalizerSpec, learned: dict[str, float]) -> bytes:
    model = sentencepiece_model.ModelProto(normalizer_spec=normalizer)
    spec = model.trainer_spec
    spec.model_type = spec.UNIGRAM
    spec.byte_fallback = True
    spec.pad_id = 3
    pieces = [("<unk>", UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL), ("<pad>", CONTROL)]
    pieces += [("<n>", USER_DEFINED)]
    pieces += [(piece, NORMAL) for piece in learned]
    pieces += [(name, CONTROL) for name in SPECIALS]
    pieces += [("<|tab|>", USER_DEFINED)]
    pieces += [(f"<|blank_{n}|>", USER_DEFINED) for n in range(2, MAX_BLANKS + 1)]
    pieces += [(f"<0x{value:02X}>", BYTE) for value in range(256)]
    for piece, kind in pieces:
        model.pieces.add(piece=piece, score=learned.get(piece, 0.0), type=kind)
    spec.vocab_size = len(pieces)
    return model.SerializeToString(deterministic=True)


if __name__ == "__main__":
    main()
