"""Other characters for a model that has learnt some already."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from services.ocr.finetune import base as bases
from services.ocr.finetune import vocabulary
from services.ocr.finetune.base import Base
from tests.support import tiny_trocr


@pytest.fixture
def base(tmp_path: Path) -> Base:
    return bases.load(str(tiny_trocr.save(tmp_path / "tiny", tiny_trocr.build())))


def rows(base: Base) -> torch.Tensor:
    weight: torch.Tensor = base.model.decoder.get_input_embeddings().weight.detach().clone()
    return weight


def token(base: Base, character: str) -> int:
    (found,) = vocabulary.encode(base.tokenizer, character)
    return found


def test_keep_changes_nothing(base: Base) -> None:
    before = base.model.decoder
    assert not bases.with_vocabulary(base, ["été"], "keep", 0).changed
    assert base.model.decoder is before


def test_extend_adds_what_is_missing_and_keeps_every_weight(base: Base) -> None:
    old = rows(base)
    state = {name: value.clone() for name, value in base.model.state_dict().items()}
    change = bases.with_vocabulary(base, ["été", "abc"], "extend", 0)
    assert change.added == ("é",)
    new = rows(base)
    assert new.shape == (len(old) + 1, old.shape[1])
    assert torch.equal(new[:-1], old)
    # An é begins as an e that can part from it.
    near = (new[-1] - old[token(base, "e")]).norm()
    assert 0 < near < (new[-1] - old[token(base, "a")]).norm() / 3
    for name, value in base.model.state_dict().items():
        if not name.endswith(("embed_tokens.weight", "output_projection.weight")):
            assert torch.equal(value, state[name]), name
    assert base.model.config.decoder.vocab_size == base.model.config.vocab_size == len(base.tokenizer) == len(new)
    ids = vocabulary.encode(base.tokenizer, "été")
    assert base.tokenizer.decode(ids, skip_special_tokens=True) == "été"


def test_replace_keeps_the_rows_of_characters_that_stay(base: Base) -> None:
    old = rows(base)
    old_ids = {character: token(base, character) for character in "ab"}
    change = bases.with_vocabulary(base, ["ba", "жук"], "replace", 0)
    assert set(change.added) == set("жук")
    assert "c" in change.dropped
    assert vocabulary.is_character_level(base.tokenizer)
    assert len(base.tokenizer) == 4 + len(set("baжук"))
    new = rows(base)
    for character, place in old_ids.items():
        assert torch.equal(new[token(base, character)], old[place])
    for mark, place in ((base.pad_id, tiny_trocr.PAD), (base.start_id, tiny_trocr.BOS), (base.eos_id, tiny_trocr.EOS)):
        assert torch.equal(new[mark], old[place])
    strangers = torch.stack([new[token(base, character)] for character in "жук"])
    assert len(torch.unique(strangers, dim=0)) == 3
    generation = base.model.generation_config
    assert (generation.eos_token_id, generation.decoder_start_token_id) == (base.eos_id, base.start_id)
    assert base.tokenizer.decode(vocabulary.encode(base.tokenizer, "жук ab"[:3])) == "жук"


def test_the_output_stays_tied_to_the_embeddings(base: Base) -> None:
    bases.with_vocabulary(base, ["ж"], "extend", 0)
    decoder = base.model.decoder
    assert decoder.output_projection.weight.data_ptr() == decoder.get_input_embeddings().weight.data_ptr()


def test_from_scratch_nothing_is_left_but_the_shape() -> None:
    base = bases.load(str(Path(__file__).parents[3] / "models" / "handwriting-tiny"))
    before = {name: value.clone() for name, value in base.model.named_parameters()}
    bases.forget(base, 0)
    after = dict(base.model.named_parameters())
    assert {name: value.shape for name, value in after.items()} == {name: value.shape for name, value in before.items()}
    learnt = [name for name, value in before.items() if value.dim() > 1 and "pooler" not in name]
    assert not any(torch.equal(before[name], after[name]) for name in learnt)
    decoder = base.model.decoder
    assert decoder.output_projection.weight.data_ptr() == decoder.get_input_embeddings().weight.data_ptr()
    first = {name: value.clone() for name, value in after.items()}
    bases.forget(base, 0)
    assert all(torch.equal(first[name], value) for name, value in base.model.named_parameters())


def bpe() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    inner.train_from_iterator(
        ["the cat and the hat", "that cat"] * 9,
        trainers.BpeTrainer(vocab_size=60, special_tokens=special, show_progress=False),
    )
    pad, bos, eos, unk = special
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token=pad, bos_token=bos, eos_token=eos, unk_token=unk)


def test_pieces_of_words_get_new_characters_as_tokens() -> None:
    tokenizer = bpe()
    assert not vocabulary.is_character_level(tokenizer)
    assert not vocabulary.can_write(tokenizer, "thé")
    change = vocabulary.choose(tokenizer, ["thé chat"], "extend")
    assert change.added == ("é",)
    assert len(change.origins) == len(tokenizer) + 1
    assert len(vocabulary.encode(change.tokenizer, "the")) < 3  # pieces are used as before
    assert vocabulary.can_write(change.tokenizer, "thé")


def test_replacing_pieces_makes_a_token_a_character() -> None:
    tokenizer = bpe()
    change = vocabulary.choose(tokenizer, ["the ж"], "replace")
    assert vocabulary.is_character_level(change.tokenizer)
    assert len(change.tokenizer) == 4 + len("the ж")
    place = vocabulary.encode(change.tokenizer, "h")[0]
    assert [tokenizer.convert_ids_to_tokens(old) for old in change.origins[place]] == ["h"]


def test_variants_are_folded_only_where_the_model_cannot_write_them() -> None:
    assert vocabulary.tidy("a\u0301  „x“ – y…", set('áxy".- ')) == 'á "x" - y...'
    assert vocabulary.tidy("„x“", set('„“x"')) == "„x“"


@pytest.mark.parametrize(
    ("what", "learning"),
    [
        ("none", {"encoder", "decoder.layers.0", "decoder.layers.1", "tokens"}),
        ("encoder", {"decoder.layers.0", "decoder.layers.1", "tokens"}),
        ("decoder", {"encoder"}),
        ("all-but-top-1", {"decoder.layers.1", "tokens"}),
    ],
)
def test_freezing(base: Base, what: str, learning: set[str]) -> None:
    bases.freeze(base.model, what, learn_tokens=False)
    found = set()
    for name, parameter in base.model.named_parameters():
        if parameter.requires_grad:
            if name.startswith("encoder."):
                found.add("encoder")
            elif ".layers." in name:
                found.add("decoder.layers." + name.split(".layers.")[1][0])
            elif name.endswith("embed_tokens.weight"):
                found.add("tokens")
    assert found == learning


def test_new_characters_learn_even_in_a_frozen_decoder(base: Base) -> None:
    bases.freeze(base.model, "decoder", learn_tokens=True)
    names = [name for name, parameter in base.model.decoder.named_parameters() if parameter.requires_grad]
    assert names == ["model.decoder.embed_tokens.weight"]


def test_what_can_be_frozen_is_said(base: Base) -> None:
    with pytest.raises(ValueError, match="is none of none, encoder, decoder, all-but-top-N"):
        bases.freeze(base.model, "nose", learn_tokens=False)
    with pytest.raises(ValueError, match="the decoder has 2 layers; N is from 1 to 2"):
        bases.freeze(base.model, "all-but-top-3", learn_tokens=False)
