"""T5's vocabulary as a sentencepiece model, also from a folder of transformers 5, which saves tokenizer.json alone."""

import base64
from pathlib import Path
from typing import Any

import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as proto

from cogvideox_jax.core.errors import InputError
from cogvideox_jax.models.convert.files import read_json

SPECIAL = ("<pad>", "</s>", "<unk>")  # ids 0, 1, 2
_SPACE, _FLOAT32 = "▁", 3e38  # a score's limit


def vocabulary(folder: Path) -> bytes:
    """The sentencepiece model of a tokenizer's folder: spiece.model, or what tokenizer.json says, rebuilt.

    Raises InputError where there is neither, or where it is not a T5 vocabulary.
    """
    path = folder / "spiece.model"
    if path.is_file():
        content = path.read_bytes()
    else:
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise InputError(f"{folder} holds neither spiece.model nor tokenizer.json: give the complete folder")
        content = rebuild(read_json(path), str(path))
    try:
        pieces = sentencepiece.SentencePieceProcessor(model_proto=content)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path} is not readable as a sentencepiece model ({reason}): give T5's") from None
    ids = (pieces.pad_id(), pieces.eos_id(), pieces.unk_id())
    if ids != (0, 1, 2):
        raise InputError(f"{path} has pad, eos, unk = {ids}, expected (0, 1, 2): give T5's")
    return content


def rebuild(content: dict[str, Any], where: str) -> bytes:
    """tokenizer.json of a T5 tokenizer -> a sentencepiece model that gives the same ids.

    The extra ids at the vocabulary's end are left out, as they are in the published model: captions do not have them.
    Raises InputError, naming the part, for whatever sentencepiece's unigram model with T5's settings does not do.
    """
    model = _part(content.get("model"), f"{where}: model", "Unigram")
    if model.get("unk_id") != SPECIAL.index("<unk>") or model.get("byte_fallback"):
        got = f"unk_id = {model.get('unk_id')!r}, byte_fallback = {model.get('byte_fallback')!r}"
        raise InputError(f"{where}: model has {got}, expected 2 and false: give T5's")
    vocab = model.get("vocab")
    if not isinstance(vocab, list) or not all(map(_is_piece, vocab)):
        raise InputError(f"{where}: model's vocab is not a list of [piece, score]: give T5's")
    while vocab and vocab[-1][0].startswith("<extra_id_"):
        vocab = vocab[:-1]
    if tuple(piece for piece, _ in vocab[:3]) != SPECIAL:
        raise InputError(f"{where}: the vocabulary starts with {vocab[:3]}, expected {', '.join(SPECIAL)}: give T5's")

    found = proto.ModelProto()
    # what is written, and what is left to its default, is as in the published file: the result is the same to the byte
    for piece, score in vocab:
        found.pieces.add(piece=piece, score=score)
    for piece in found.pieces[: len(SPECIAL)]:
        piece.type = piece.UNKNOWN if piece.piece == "<unk>" else piece.CONTROL
    trainer = found.trainer_spec
    trainer.model_type = trainer.UNIGRAM
    trainer.vocab_size = len(vocab)
    trainer.pad_id, trainer.eos_id, trainer.unk_id, trainer.bos_id = 0, 1, 2, -1
    trainer.pad_piece, trainer.eos_piece, trainer.unk_piece = SPECIAL
    normalizer = found.normalizer_spec
    normalizer.name = "nmt_nfkc"
    normalizer.precompiled_charsmap = _charsmap(content.get("normalizer"), f"{where}: normalizer")
    normalizer.add_dummy_prefix = normalizer.remove_extra_whitespaces = normalizer.escape_whitespaces = True
    _check_spaces(content.get("pre_tokenizer"), f"{where}: pre_tokenizer")
    return found.SerializeToString()


def _is_piece(row: Any) -> bool:
    if not isinstance(row, list) or list(map(type, row)) not in ([str, float], [str, int]):
        return False
    piece, score = row
    # JSON can write half of a character, which no encoding can
    return piece != "" and not any("\ud800" <= c <= "\udfff" for c in piece) and abs(score) < _FLOAT32


def _part(value: Any, where: str, *kinds: str) -> dict[str, Any]:
    got = value.get("type") if isinstance(value, dict) else value
    if not isinstance(value, dict) or got not in kinds:
        raise InputError(f"{where} is {repr(got)[:80]}, expected {' or '.join(kinds)}: give T5's")
    return value


def _steps(value: Any, where: str, listed: str, *kinds: str) -> list[dict[str, Any]]:
    """A step, or the steps of a sequence."""
    value = _part(value, where, "Sequence", *kinds)
    steps = value.get(listed) if value["type"] == "Sequence" else [value]
    if not isinstance(steps, list):
        raise InputError(f"{where} is a Sequence without {listed}: give T5's")
    return [_part(step, where, *kinds) for step in steps]


def _charsmap(value: Any, where: str) -> bytes:
    """The table of characters. Strip and Replace beside it do what sentencepiece's remove_extra_whitespaces does."""
    steps = _steps(value, where, "normalizers", "Precompiled", "Strip", "Replace")
    maps = [step.get("precompiled_charsmap") for step in steps if step["type"] == "Precompiled"]
    wrong = [step for step in steps if step["type"] == "Replace" and step.get("pattern") != {"Regex": " {2,}"}]
    if len(maps) != 1 or not isinstance(maps[0], str) or wrong:
        what = f"replaces {str(wrong[0].get('pattern'))[:80]}" if wrong else f"has {len(maps)} Precompiled"
        raise InputError(f"{where} {what}, expected one table of characters: give T5's")
    try:
        return base64.b64decode(maps[0], validate=True)
    except ValueError as error:
        raise InputError(f"{where}: precompiled_charsmap is not base64 ({error}): give T5's") from None


def _check_spaces(value: Any, where: str) -> None:
    """Words begin with a mark for the space before them, the first one too."""
    steps = _steps(value, where, "pretokenizers", "WhitespaceSplit", "Metaspace")
    marks = [step for step in steps if step["type"] == "Metaspace"]
    if len(marks) != 1:
        raise InputError(f"{where} has {len(marks)} Metaspace, expected one: give T5's")
    first = marks[0].get("prepend_scheme", "always" if marks[0].get("add_prefix_space") else "never")
    if marks[0].get("replacement") != _SPACE or first not in ("always", "first"):
        got = f"{marks[0].get('replacement')!r} and {first!r}"
        raise InputError(f"{where} marks spaces by {got}, expected {_SPACE!r} and 'always': give T5's")
