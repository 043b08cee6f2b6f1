"""The order of lines and what is done to them: a matter of the seed and the place, of nothing else."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from services.ocr import images
from services.ocr.finetune import augment
from services.ocr.finetune.batches import IGNORED, WINDOW, Collator, Lines, Plan, eval_pixels, weights
from services.ocr.finetune.lines import resized
from services.ocr.finetune.rows import DEFAULT_LIMITS, read_folder
from tests.support.teaching import write_lines


def lines(count: int, seed: int = 0, channels: int = 1) -> Lines:
    random = np.random.default_rng(seed)
    tokens = [[4] * int(random.integers(1, 20)) + [2] for _ in range(count)]
    return Lines(random.integers(0, 256, (count, 16, 85, channels), dtype=np.uint8), tokens)


def plan(steps: int = 100, *, seed: int = 0, shares: tuple[float | None, ...] = (None, None)) -> Plan:
    return Plan([lines(10), lines(22, 1)], shares, batch=8, steps=steps, seed=seed)


def collator(sources: list[Lines], *, strength: float, noise: float = 0.0, channels: int = 1) -> Collator:
    processor = ViTImageProcessorPil(
        size={"height": 16, "width": 64}, image_mean=[0.5] * channels, image_std=[0.5] * channels
    )
    return Collator(sources, processor, channels, 1, 0, np.arange(4, 30), 7, strength, noise)


def test_every_line_comes_once_before_any_comes_twice() -> None:
    order = plan()
    drawn = [order[place][:2] for place in range(8 * 100)]
    windows = 32 // 8  # batches that hold all lines once; the window of sorting is a multiple
    for start in range(0, 800 - WINDOW * 8 + 1, WINDOW * 8):
        counts = Counter(drawn[start : start + WINDOW * 8])
        assert set(counts.values()) == {WINDOW // windows}
        assert len(counts) == 32


def test_a_batch_holds_lines_of_like_length() -> None:
    order = plan()
    spreads, alone = [], []
    for start in range(0, 800, 8):
        batch = [order[place] for place in range(start, start + 8)]
        lengths = [len(order.sources[source].tokens[line]) for source, line, _ in batch]
        spreads.append(max(lengths) - min(lengths))
        alone.append(max(lengths))
    assert np.mean(spreads) < 5
    assert len(set(alone)) > 3  # and batches come in any order of length


def test_shares_are_kept() -> None:
    order = plan(shares=(0.75, None))
    first = sum(order[place][0] == 0 for place in range(800))
    assert 540 < first < 660
    assert weights([10, 30, 10], [None, None, 0.2]) == pytest.approx([0.2, 0.6, 0.2])
    with pytest.raises(ValueError, match=r"add up to 1.2"):
        weights([1, 1], [0.6, 0.6])
    with pytest.raises(ValueError, match="leave nothing for the folders without one"):
        weights([1, 1], [1.0, None])


def test_the_seed_decides() -> None:
    def order(seed: int) -> list[tuple[int, int, int]]:
        made = plan(seed=seed)
        return [made[place] for place in range(64)]

    assert order(0) == order(0)
    assert order(0) != order(1)


def test_a_line_is_distorted_alike_in_any_company() -> None:
    order = plan()
    whole = collator(list(order.sources), strength=1.0, noise=0.3)
    together = whole([order[place] for place in range(8)])
    apart = [whole([order[place] for place in part]) for part in (range(3), range(3, 8))]
    for name, filler in (("labels", IGNORED), ("decoder_input_ids", 0)):
        for number in range(8):
            one = together[name][number].tolist()
            other = apart[number >= 3][name][number - 3 * (number >= 3)].tolist()
            length = max(len(one), len(other))
            assert one + [filler] * (length - len(one)) == other + [filler] * (length - len(other))
    assert torch.allclose(together["pixel_values"], torch.cat([part["pixel_values"] for part in apart]), atol=1e-5)


def test_inputs_are_the_labels_moved_on_with_some_wrong_ones() -> None:
    order = plan()
    rows = [order[place] for place in range(64)]
    exact = collator(list(order.sources), strength=0.0)(rows)
    assert (exact["decoder_input_ids"][:, 0] == 1).all()
    inside = exact["labels"][:, 1:] != IGNORED
    assert torch.equal(exact["decoder_input_ids"][:, 1:][inside], exact["labels"][:, :-1][inside])
    noisy = collator(list(order.sources), strength=0.0, noise=0.3)(rows)
    assert torch.equal(noisy["labels"], exact["labels"])
    wrong = (noisy["decoder_input_ids"] != exact["decoder_input_ids"]).sum() / inside.sum()
    assert 0.2 < wrong < 0.4


def test_no_distortion_reads_what_the_processor_makes(tmp_path: Path) -> None:
    source = read_folder(write_lines(tmp_path / "lines", [("ab", ""), ("cdefgh", "")]))
    processor = ViTImageProcessorPil(size={"height": 16, "width": 64}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    stored = resized(source.rows, processor, 3, tmp_path / "cache")
    wanted = []
    for row in source.rows:
        line = images.decode(row.read(), DEFAULT_LIMITS)
        image = np.frombuffer(line.pixels, np.uint8).reshape(line.height, line.width, 3)
        wanted.append(processor(image, return_tensors="pt")["pixel_values"])
    assert torch.allclose(eval_pixels(np.asarray(stored), processor), torch.cat(wanted), atol=1e-6)


def test_lines_are_resized_once_and_again_when_an_image_changes(tmp_path: Path) -> None:
    folder = write_lines(tmp_path / "lines", [("ab", ""), ("cd", "")])
    processor = ViTImageProcessorPil(size={"height": 16, "width": 64}, image_mean=[0.5], image_std=[0.5])
    ticks: list[int] = []

    def store() -> np.ndarray:
        found = resized(read_folder(folder).rows, processor, 1, tmp_path / "cache", tick=lambda: ticks.append(1))
        return np.array(found)

    first = store()
    assert len(ticks) == 2
    assert np.array_equal(store(), first)
    assert len(ticks) == 2
    write_lines(folder, [("ab", ""), ("xyz", "")])
    changed = store()
    assert len(ticks) == 4
    assert np.array_equal(changed[0], first[0])
    assert not np.array_equal(changed[1], first[1])
    assert not list((tmp_path / "cache").glob("*.npy.*"))  # nothing half-written stays


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("strength", [0.5, 1.0, 2.0])
def test_distorted_ink_stays_ink(channels: int, strength: float) -> None:
    ink = torch.zeros(40, 1, 48, 576)
    for stroke in range(100, 480, 16):
        ink[:, :, 20:28, stroke : stroke + 4] = 1.0
    changes = [augment.draw(np.random.default_rng((1, number)), strength, channels) for number in range(40)]
    found = augment.apply(ink, changes, 48, 432, channels)
    assert found.shape == (40, channels, 48, 432)
    assert found.min() >= 0
    assert found.max() <= 1
    assert found.isfinite().all()
    assert (found.amax((1, 2, 3)) > 0.15).all()  # the writing is still there
    assert len(torch.unique(found.sum((1, 2, 3)))) == 40  # and no two lines were treated alike
    again = augment.apply(ink, changes, 48, 432, channels)
    assert torch.equal(found, again)
    if channels == 3:
        assert (found.std(1) > 0.01).any()  # some ink has a colour


def test_strength_zero_changes_nothing() -> None:
    ink = torch.rand(5, 1, 16, 64)
    changes = [augment.draw(np.random.default_rng(number), 0.0, 1) for number in range(5)]
    for change in changes:
        change.thicken = 0.0
    assert torch.allclose(augment.apply(ink, changes, 16, 64, 1), ink, atol=1e-4)
