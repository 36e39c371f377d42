"""T5's vocabulary from tokenizer.json: the same ids, and what is not T5's refused by its part."""

import base64
import json
import random

import numpy as np
import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as proto

from cogvideox_jax.core.errors import InputError
from cogvideox_jax.models.convert import tokenizer
from data.transforms import Tokenizer
from tests.models.folders import VOCABULARY

SAMPLES = VOCABULARY.parents[1] / "samples"
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}


def tokenizer_json(content: bytes) -> dict:
    """What transformers 5 writes for a sentencepiece model."""
    model = proto.ModelProto.FromString(content)
    charsmap = base64.b64encode(model.normalizer_spec.precompiled_charsmap).decode()
    extra = [[f"<extra_id_{i}>", 0.0] for i in range(99, -1, -1)]
    return {
        "version": "1.0",
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": charsmap},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, METASPACE]},
        "model": {
            "type": "Unigram",
            "unk_id": 2,
            "vocab": [[piece.piece, piece.score] for piece in model.pieces] + extra,
            "byte_fallback": False,
        },
    }


def sentences() -> list[str]:
    """Captions, and strings of all kinds of characters."""
    found = [path.read_text() for path in sorted(SAMPLES.glob("*.txt"))]
    found += [str(json.loads(path.read_text())) for path in sorted(SAMPLES.glob("*.json"))]
    pools = [
        "abcdefghijklmnopqrstuvwxyz",
        "ABC XYZ 0123456789",
        " .,;:!?'\"-()▁_<>{}[]\\/|~`@#$%^&*",
        "éèüßñçøåœÆŠžαβγδЖзиу",
        "漢字かなカナ한국어😀🎬👧🏽",
        "ﬁ①½²³™℃ⅧＡＢＣ　\t\n\r\u00a0\u200b\u2009",
    ]
    rng = random.Random(0)
    for length in range(300):
        words = (
            "".join(rng.choices(pools[rng.randrange(len(pools))], k=1 + length % 9)) for _ in range(length // 9 + 1)
        )
        found.append(" ".join(words))
    return [*found, "", " ", "  two  spaces  ", "<extra_id_0>", "</s>"]


def same_ids(content: bytes) -> None:
    ours, theirs = (sentencepiece.SentencePieceProcessor(model_proto=m) for m in (content, VOCABULARY.read_bytes()))
    texts = sentences()
    assert len(texts) > 300
    expected = theirs.encode(texts)
    assert len({i for ids in expected for i in ids}) > 500
    assert ours.encode(texts) == expected
    assert ours.vocab_size() == theirs.vocab_size() == 32000


def small() -> dict:
    """A vocabulary by hand: a b c and two words."""
    content = tokenizer_json(VOCABULARY.read_bytes())
    pieces = {"▁": -2.0, "a": -3.0, "b": -3.5, "c": -4.0, "▁ab": -5.0, "▁abc": -5.5, "1": -6.0}
    vocab = [["<pad>", 0.0], ["</s>", 0.0], ["<unk>", 0.0], *([piece, score] for piece, score in pieces.items())]
    content["model"]["vocab"] = [*vocab, ["<extra_id_1>", 0.0], ["<extra_id_0>", 0.0]]
    return content


def test_the_published_vocabulary_comes_back_to_the_byte(tmp_path):
    content = VOCABULARY.read_bytes()
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer_json(content)))
    rebuilt = tokenizer.vocabulary(tmp_path)
    same_ids(rebuilt)
    assert rebuilt == content
    # spiece.model itself goes first
    (tmp_path / "tokenizer.json").write_text("{")
    (tmp_path / "spiece.model").write_bytes(content)
    assert tokenizer.vocabulary(tmp_path) == content


def test_a_small_vocabulary_by_hand(tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(small()))
    (tmp_path / "spiece.model").write_bytes(tokenizer.vocabulary(tmp_path))
    ids = Tokenizer(tmp_path / "spiece.model", 6)(["abc ab", " ca\u3000ba", "①z", ""])
    # ▁abc ▁ab | ▁ c a ▁ b: cut at five | 1 after its normal form, and what is unknown
    expected = [[8, 7, 1, 0, 0, 0], [3, 6, 4, 3, 5, 1], [3, 9, 2, 1, 0, 0], [1, 0, 0, 0, 0, 0]]
    np.testing.assert_array_equal(ids, expected)


@pytest.mark.parametrize(
    "change",
    [
        {"pre_tokenizer": METASPACE},
        {"pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "add_prefix_space": True}},
        {"normalizer": "a sequence"},
    ],
    ids=str,
)
def test_older_tokenizer_files_say_the_same_in_other_words(change):
    content = small()
    expected = tokenizer.rebuild(content, "FILE")
    if "normalizer" in change:
        steps = [content["normalizer"], {"type": "Strip", "strip_left": False, "strip_right": True}]
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "▁"})
        change = {"normalizer": {"type": "Sequence", "normalizers": steps}}
    assert tokenizer.rebuild(content | change, "FILE") == expected


def changed(part: str, **changes) -> dict:
    content = small()
    return content | {part: content[part] | changes}


VOCAB = small()["model"]["vocab"]
REFUSED = {
    "another model": (changed("model", type="BPE"), "model is 'BPE', expected Unigram"),
    "no model": ({"version": "1.0"}, "model is None, expected Unigram"),
    "another unk": (changed("model", unk_id=0), "unk_id = 0"),
    "bytes": (changed("model", byte_fallback=True), "byte_fallback = True"),
    "pieces without scores": (changed("model", vocab=["a", "b"]), "not a list of"),
    "a score that is none": (changed("model", vocab=[*VOCAB, ["x", float("nan")]]), "not a list of"),
    "a score that is too large": (changed("model", vocab=[*VOCAB, ["x", 10**400]]), "not a list of"),
    "half a character": (changed("model", vocab=[*VOCAB, ["\ud800", 0.0]]), "not a list of"),
    "an empty piece": (changed("model", vocab=[*VOCAB, ["", 0.0]]), "not a list of"),
    "another order": (changed("model", vocab=VOCAB[1:]), "the vocabulary starts with"),
    "no vocabulary": (changed("model", vocab=[]), "the vocabulary starts with"),
    "no normalizer": (
        small() | {"normalizer": None},
        "normalizer is None, expected Sequence or Precompiled or Strip",
    ),
    "another normalizer": (changed("normalizer", type="Lowercase"), "normalizer is 'Lowercase'"),
    "one more normalizer": (
        small() | {"normalizer": {"type": "Sequence", "normalizers": [small()["normalizer"], {"type": "NFD"}]}},
        "normalizer is 'NFD'",
    ),
    "two tables": (
        small() | {"normalizer": {"type": "Sequence", "normalizers": [small()["normalizer"]] * 2}},
        "has 2 Precompiled",
    ),
    "a replacement": (
        small()
        | {
            "normalizer": {
                "type": "Sequence",
                "normalizers": [small()["normalizer"], {"type": "Replace", "pattern": {"String": "a"}, "content": "b"}],
            }
        },
        "normalizer replaces {'String': 'a'}",
    ),
    "no sequence": (small() | {"normalizer": {"type": "Sequence"}}, "Sequence without normalizers"),
    "no base64": (changed("normalizer", precompiled_charsmap="é"), "is not base64"),
    "other signs in base64": (changed("normalizer", precompiled_charsmap="AA!AA"), "is not base64"),
    "half a base64": (changed("normalizer", precompiled_charsmap="abc"), "is not base64"),
    "another mark": (small() | {"pre_tokenizer": METASPACE | {"replacement": "_"}}, "marks spaces by '_'"),
    "no first mark": (
        small() | {"pre_tokenizer": METASPACE | {"prepend_scheme": "never"}},
        "marks spaces by '▁' and 'never'",
    ),
    "no mark": (small() | {"pre_tokenizer": {"type": "WhitespaceSplit"}}, "has 0 Metaspace"),
    "other words": (small() | {"pre_tokenizer": {"type": "ByteLevel"}}, "pre_tokenizer is 'ByteLevel'"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_what_sentencepiece_would_not_do_is_refused_by_its_part(tmp_path, fault):
    content, words = REFUSED[fault]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(InputError) as error:
        tokenizer.vocabulary(tmp_path)
    message = str(error.value)
    assert message.startswith(f"{tmp_path / 'tokenizer.json'}: ")
    assert words in message
    assert "\n" not in message


def test_what_is_no_vocabulary_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"holds neither spiece\.model nor tokenizer\.json"):
        tokenizer.vocabulary(tmp_path)
    double = changed("model", vocab=[*VOCAB[:-2], ["a", -3.0]])
    (tmp_path / "tokenizer.json").write_text(json.dumps(double))
    with pytest.raises(InputError, match=r"tokenizer\.json is not readable as a sentencepiece model"):
        tokenizer.vocabulary(tmp_path)
    (tmp_path / "spiece.model").write_bytes(b"no model")
    with pytest.raises(InputError, match=r"spiece\.model is not readable as a sentencepiece model"):
        tokenizer.vocabulary(tmp_path)
    other = proto.ModelProto.FromString(VOCABULARY.read_bytes())
    other.trainer_spec.pad_id = -1
    del other.pieces[0]
    (tmp_path / "spiece.model").write_bytes(other.SerializeToString())
    with pytest.raises(InputError, match=r"has pad, eos, unk = \(-1, 0, 1\), expected \(0, 1, 2\)"):
        tokenizer.vocabulary(tmp_path)
